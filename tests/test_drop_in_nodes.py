"""The nodes with the names of ComfyUI-MultiGPU's, over HTTP; `multigpu_nodes.txt` lists what that pack registers."""

import copy
import json
import re
import urllib.parse

import gguf_files
import pytest
import safetensors.torch
import torch
from checkpoints import SD_VAE, sd3_vae
from comfy_server import PromptRefused, error_of
from conftest import NUM_ACCELERATORS, ROOT
from serving import DEVICES, NEWEST, VERSIONS, latent_of, prompt_for, start
from workflows import NODE_ID, nodes_of_class

NODES_WITH_MORE = {
    f"{name}CLIPLoader{end}" for name in ("Triple", "Quadruple") for end in ("DisTorch2MultiGPU", "MultiGPU")
}
"""With that pack they have no inputs for devices since ComfyUI's loaders are nodes of another kind; ours have them."""
OTHER_PACK = """
class DeviceSelectorMultiGPU:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {}}
    RETURN_TYPES, FUNCTION, CATEGORY = ("INT",), "run", "other"
    def run(self):
        return (1,)
NODE_CLASS_MAPPINGS = {"DeviceSelectorMultiGPU": DeviceSelectorMultiGPU, "UNETLoaderMultiGPU": DeviceSelectorMultiGPU}
"""
donor = "sim:0" if NUM_ACCELERATORS == 0 else "cpu"
compute = DEVICES[-1]


def described(described_text):
    """Name -> (category, outputs, {"required": inputs, "optional": inputs}), of lines as in `multigpu_nodes.txt`."""
    nodes = {}
    for line in described_text.splitlines():
        if match := re.fullmatch(r"(\w+) \((.*)\) -> (.*)", line):
            nodes[match[1]] = (match[2], match[3].split(", "), {"required": [], "optional": []})
            last = nodes[match[1]]
        else:
            kind, *inputs = line.split()
            last[2][kind] += inputs
    return nodes


def input_text(name, kind, options):
    """As the lines have it."""
    if isinstance(kind, list):
        kind, options = "COMBO", {**options, "options": kind}
    text = f"{name}:{kind}"
    devices = DEVICES if NUM_ACCELERATORS else [*DEVICES, "sim:0", "sim:1"]
    if name == "donor_device":  # what the other pack does not have
        *others, last = options["options"]
        assert last == "disk"
        options = {**options, "options": others}
    if options.get("options") == devices:
        options = {**options, "default": "cpu"} if "default" in options else options  # it depends on the machine
    if "default" in options and (
        options.get("options") == devices or kind != "COMBO" or options["options"][0] == "default"
    ):
        text += f"={json.dumps(options['default'])}"
    if "min" in options:
        text += f"[{options['min']}..{options['max']}]"
    return text + ("{devices}" if options.get("options") == devices else "")


def info_text(info):
    return {
        kind: [
            input_text(name, *(described if len(described) > 1 else (*described, {})))
            for name, described in info["input"].get(kind, {}).items()
        ]
        for kind in ("required", "optional")
    }


EXPECTED = described((ROOT / "tests" / "multigpu_nodes.txt").read_text())
OF_CORE = sorted(name for name in EXPECTED if "GGUF" not in name and name != NODE_ID)


OF_GGUF = sorted(name for name in EXPECTED if "GGUF" in name)


@pytest.fixture(scope="module", params=dict.fromkeys((VERSIONS[0], NEWEST)))
def server(request, checkpoints, tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    (base / "custom_nodes").mkdir()
    if NUM_ACCELERATORS == 0:
        (base / "custom_nodes" / "simulated").symlink_to(ROOT / "tests" / "simulated_accelerators")
    models = base / "models"
    for folder in ("diffusion_models", "vae"):
        (models / folder).mkdir(parents=True)
    (models / "diffusion_models" / "sd3.safetensors").symlink_to(checkpoints("diffusion_only"))
    vae = {name.removeprefix(SD_VAE): tensor for name, tensor in sd3_vae(0).items()}
    safetensors.torch.save_file(vae, models / "vae" / "sd3.safetensors")
    # A prompt before the last is run again: with much memory, newer ones would have its results still.
    with start(request.param, base, checkpoints, ("--cache-classic",)) as running:
        if NUM_ACCELERATORS:  # the first forward of a process may take other kernels
            for loaders in (CORE, SEPARATE["split"]):
                latent_of(running, separate_files(running, loaders))
        yield running


def test_every_node_has_the_inputs_that_saved_workflows_expect(server):
    assert_as_listed(server, OF_CORE)


def assert_as_listed(server, names):
    object_info = server.get("/object_info")
    assert {name for name in object_info if "MultiGPU" in name and "MultiGPU_" not in name} == {*names, NODE_ID}
    for name in names:
        category, outputs, inputs = EXPECTED[name]
        info, found = object_info[name], info_text(object_info[name])
        assert info["output"] == outputs, name
        if name in NODES_WITH_MORE:
            assert found["required"] == inputs["required"], name
            assert found["optional"], name
        else:
            assert (info["category"], found) == (category, inputs), name
        assert info["description"] and info["search_aliases"], name
        # By which web/distorch2.js knows its own nodes.
        assert info["python_module"] == object_info["DistributeModelDisTorch2"]["python_module"], name
        assert info["display_name"] != name
        own = [options for _, *options in info["input"].get("optional", {}).values()]
        assert all(options[0]["tooltip"] for options in own), name


def separate_files(server, loaders):
    """The example with separate loaders of the diffusion model, the text encoder and the VAE."""
    prompt = prompt_for(server, "sd3.safetensors")
    (ours,) = nodes_of_class(prompt, NODE_ID)
    del prompt[ours]
    for index, (class_type, inputs) in enumerate(loaders):
        prompt[f"loader{index}"] = {"class_type": class_type, "inputs": inputs}
        for node in prompt.values():
            for name, value in node["inputs"].items():
                if value == [ours, index]:
                    node["inputs"][name] = [f"loader{index}", 0]
    return prompt


UNET = {"unet_name": "sd3.safetensors", "weight_dtype": "default"}
CLIP = {"clip_name": "clip_l.safetensors", "type": "sd3"}
DUAL_CLIP = {"clip_name1": "clip_l.safetensors", "clip_name2": "clip_l.safetensors", "type": "sd3"}
VAE = {"vae_name": "sd3.safetensors"}
SPLIT = {"virtual_vram_gb": 4.0, "donor_device": donor, "expert_mode_allocations": "", "eject_models": False}
CORE = [("UNETLoader", UNET), ("CLIPLoader", CLIP), ("VAELoader", VAE)]


def split(device_input, **more):
    return {device_input: compute, **SPLIT, **more}


SEPARATE = {
    "split": [
        ("UNETLoaderDisTorch2MultiGPU", {**UNET, **split("compute_device")}),
        ("CLIPLoaderDisTorch2MultiGPU", {**CLIP, **split("device")}),
        ("VAELoaderDisTorch2MultiGPU", {**VAE, **split("compute_device")}),
    ],
    "expert string": [
        (
            "UNETLoaderDisTorch2MultiGPU",
            {**UNET, **split("compute_device", expert_mode_allocations=f"{compute},50%;{donor},*")},
        ),
        ("CLIPLoaderMultiGPU", {**CLIP, "device": compute}),
        ("VAELoaderMultiGPU", {**VAE, "device": compute}),
    ],
    "whole": [
        ("UNETLoaderMultiGPU", {**UNET, "device": compute}),
        ("CLIPLoaderMultiGPU", {**CLIP, "device": compute}),
        ("VAELoaderMultiGPU", {**VAE, "device": compute}),
    ],
}


@pytest.mark.parametrize("way", SEPARATE)
def test_separate_files_give_the_bits_of_cores_loaders(server, way):
    expected = latent_of(server, separate_files(server, CORE))
    before = len(server.log)
    assert torch.equal(latent_of(server, separate_files(server, SEPARATE[way])), expected)
    is_streamed = re.search(rf"^  diffusion model +{donor} +streamed", server.log[before:], re.MULTILINE)
    assert bool(is_streamed) == (way != "whole")
    if way != "whole":
        assert re.search(r"^  note: VAE: whole, on ", server.log[before:], re.MULTILINE)


def distributed(prompt, percent):
    """The prompt with this pack's nodes behind ComfyUI's loaders."""
    prompt = copy.deepcopy(prompt)
    placed = {"compute_device": compute, "virtual_vram_gb": 0.0, "donor_device": "cpu"}
    placed["expert_mode_allocations"] = f"{compute},{100 - percent}%;{donor},*"
    added = {
        "model": ("DistributeModelDisTorch2", "loader0", placed),
        "clip": ("DistributeCLIPDisTorch2", "loader1", placed),
        "vae": ("PlaceVAEDisTorch2", "loader2", {"device": compute}),
    }
    for name, (class_type, loader, widgets) in added.items():
        for node in prompt.values():
            for each, value in node["inputs"].items():
                if value == [loader, 0]:
                    node["inputs"][each] = [class_type, 0]
        prompt[class_type] = {"class_type": class_type, "inputs": {**widgets, name: [loader, 0]}}
    return prompt


def test_distribute_behind_cores_loaders_gives_the_same_bits_with_any_plan(server):
    """The loaders are cached from one prompt to the next, and their models stay usable."""
    plain = separate_files(server, CORE)
    expected = latent_of(server, plain)
    for percent in (50, 90, 50):
        before = len(server.log)
        assert torch.equal(latent_of(server, distributed(plain, percent)), expected)
        for component in ("diffusion model", "text encoder"):
            assert re.search(rf"^  {component} +{donor} +streamed", server.log[before:], re.MULTILINE)
        assert torch.equal(latent_of(server, plain), expected)
        assert "memory leak" not in server.log[before:]


@pytest.mark.parametrize(
    ("class_type", "widgets"),
    [
        ("CheckpointLoaderSimpleDisTorch2MultiGPU", split("compute_device")),
        ("CheckpointLoaderSimpleMultiGPU", {"device": compute}),
        ("CheckpointLoaderAdvancedMultiGPU", dict.fromkeys(("unet_device", "clip_device", "vae_device"), compute)),
    ],
)
def test_checkpoints_give_the_bits_of_cores_loader(server, class_type, widgets):
    prompt = prompt_for(server, "sd3.safetensors")
    (ours,) = nodes_of_class(prompt, NODE_ID)
    latents = []
    for name, inputs in (("CheckpointLoaderSimple", {}), (class_type, widgets)):
        prompt[ours] = {"class_type": name, "inputs": {"ckpt_name": "sd3.safetensors", **inputs}}
        latents.append(latent_of(server, prompt))
    assert torch.equal(*latents)


def test_text_encoders_of_several_files_give_the_bits_of_cores_loaders(server):
    """ComfyUI's loader has types of which its `CLIPType` knows nothing: sdxl."""
    prompts = [
        separate_files(server, [("UNETLoader", UNET), (name, {**DUAL_CLIP, **more}), ("VAELoader", VAE)])
        for name, more in (("DualCLIPLoader", {}), ("DualCLIPLoaderDisTorch2MultiGPU", split("device")))
    ]
    before = len(server.log)
    assert torch.equal(*(latent_of(server, prompt) for prompt in prompts))
    assert re.search(rf"^  text encoder +{donor} +streamed", server.log[before:], re.MULTILINE)
    loader = ("DualCLIPLoaderMultiGPU", {**DUAL_CLIP, "type": "sdxl", "device": "cpu"})
    prompt = separate_files(server, [("UNETLoader", UNET), loader, ("VAELoader", VAE)])
    del prompt["5"], prompt["6"], prompt["7"], prompt["latent"]
    prompt["shown"] = {"class_type": "PreviewAny", "inputs": {"source": ["2", 0]}}
    server.run(prompt)


def test_mistakes_are_refused_when_the_prompt_is_queued(server):
    for widgets, expected in (
        ({"compute_device": "cuda:7"}, "'cuda:7' not in ["),
        ({"expert_mode_allocations": "cpu,2tib"}, "unknown unit 'tib'"),
    ):
        loader = ("UNETLoaderDisTorch2MultiGPU", {**UNET, **split("compute_device", **widgets)})
        with pytest.raises(PromptRefused) as refused:
            server.queue(separate_files(server, [loader, *CORE[1:]]))
        (error, *_) = refused.value.answer["node_errors"]["loader0"]["errors"]
        assert expected in error["details"]


@pytest.mark.parametrize("index", range(3))
def test_a_file_that_is_cut_off_is_named_by_every_loader(server, index):
    name, widgets = SEPARATE["split"][index]
    file_input, folder = [("unet_name", "diffusion_models"), ("clip_name", "text_encoders"), ("vae_name", "vae")][index]
    folder = server.base / "models" / folder
    (folder / "cut.safetensors").write_bytes((folder / widgets[file_input]).read_bytes()[:100_000])
    loaders = [*CORE]
    loaders[index] = (name, {**widgets, file_input: "cut.safetensors"})
    message = error_of(server.run(separate_files(server, loaders)))["exception_message"]
    assert re.search("cut.safetensors is cut off: it has 100,000 of .* bytes; download it again", message)


@pytest.mark.parametrize("name", ["0 first", "z last"])
def test_where_the_other_pack_is_installed_its_nodes_stay(checkpoints, tmp_path, name):
    (tmp_path / "custom_nodes" / name).mkdir(parents=True)
    (tmp_path / "custom_nodes" / name / "__init__.py").write_text(OTHER_PACK)
    with start(NEWEST, tmp_path, checkpoints) as server:
        object_info = server.get("/object_info")
        assert object_info["DeviceSelectorMultiGPU"]["category"] == "other"
        assert object_info["UNETLoaderMultiGPU"]["category"] == "other"
        assert "DistributeModelDisTorch2" in object_info
        assert server.log.count("ComfyUI-MultiGPU is installed too; the nodes that both have are its own") == 1


def test_every_node_has_a_help_page_that_names_its_own_inputs(server):
    served = server.get("/i18n")
    for name, info in server.get("/object_info").items():
        if "custom_nodes" not in info["python_module"] or not re.search(r"MultiGPU$|DisTorch2$", name):
            continue
        inputs = [*info["input"].get("optional", ())] or [*info["input"]["required"]]
        for language in ("en", "zh", "ja"):
            page = (ROOT / "web" / "docs" / name / f"{language}.md").read_text()
            named = info if language == "en" else served[language]["nodeDefs"][name]
            assert page.startswith(f"# {named['display_name']}\n"), (name, language)
            assert [each for each in inputs if f"`{each}`" not in page] == [], (name, language)


def test_the_packs_own_nodes_have_names_and_tooltips_in_three_languages(server):
    object_info, served = server.get("/object_info"), server.get("/i18n")
    own = [name for name in object_info if name == NODE_ID or re.fullmatch(r"(Distribute|Place)\w+DisTorch2", name)]
    assert len(own) == 6
    for language, names in (("en", [NODE_ID]), ("zh", own), ("ja", own)):
        definitions = served[language]["nodeDefs"]
        for name in names:
            info, definition = object_info[name], definitions[name]
            inputs = {**info["input"]["required"], **info["input"].get("optional", {})}
            assert [*definition["inputs"]] == [*inputs], (language, name)
            tooltips = {each: options["tooltip"] for each, (_, options) in inputs.items()}
            translated = {each: of_input["tooltip"] for each, of_input in definition["inputs"].items()}
            if language == "en":
                assert translated == tooltips
            else:
                assert not set(translated.values()) & set(tooltips.values())
            assert [of_output["name"] for of_output in definition["outputs"].values()] == info["output_name"]
            pages = ROOT / "web" / "docs" / name
            page, english = ((pages / f"{each}.md").read_text() for each in (language, "en"))
            assert page.startswith(f"# {definition['display_name']}\n")
            assert [each for each in inputs if f"`{each}`" not in page] == []
            assert re.findall("```.*?```", page, re.DOTALL) == re.findall("```.*?```", english, re.DOTALL)


@pytest.mark.parametrize(
    "name",
    ["of the tests", *(pytest.param(name, marks=gguf_files.NEEDS_PACK) for name in ("0 first", "z last"))],
)
def test_gguf_loaders(checkpoints, tmp_path, name):
    is_of_tests = name == "of the tests"
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes" / name).symlink_to(ROOT / "tests" / "gguf_pack" if is_of_tests else gguf_files.PACK)
    if NUM_ACCELERATORS == 0:
        (tmp_path / "custom_nodes" / "simulated").symlink_to(ROOT / "tests" / "simulated_accelerators")
    (tmp_path / "models" / "diffusion_models").mkdir(parents=True)
    flux = tmp_path / "models" / "diffusion_models" / "flux.gguf"
    gguf_files.write_flux(flux, "Q4_K")
    flux.with_name("cut_off.gguf").write_bytes(flux.read_bytes()[:100_000])
    with start(NEWEST, tmp_path, checkpoints) as server:
        of_gguf = [each for each in OF_GGUF if each.startswith("UnetLoaderGGUF") and "Advanced" not in each]
        assert_as_listed(server, [*OF_CORE, *(of_gguf if is_of_tests else OF_GGUF)])
        text = ("CLIPLoader", CLIP)
        vae = ("CheckpointLoaderSimple", {"ckpt_name": "flux.safetensors"})
        loaders = {
            "UnetLoaderGGUF": {},
            "UnetLoaderGGUFDisTorch2MultiGPU": split(
                "compute_device", expert_mode_allocations=f"{compute},50%;{donor},*"
            ),
            "UnetLoaderGGUFDisTorchMultiGPU": {"device": compute, "virtual_vram_gb": 4.0, "use_other_vram": True},
            "UnetLoaderGGUFMultiGPU": {"device": compute},
        }
        latents = []
        for loader, widgets in loaders.items():
            before = len(server.log)
            prompt = separate_files(server, [(loader, {"unet_name": "flux.gguf", **widgets}), text, vae])
            prompt["6"]["inputs"]["vae"] = ["loader2", 2]
            latents.append(latent_of(server, prompt))
            assert ("streamed" in server.log[before:]) == ("DisTorch" in loader)
            if loader == "UnetLoaderGGUFDisTorch2MultiGPU":
                asked = urllib.parse.urlencode({"unet_name": "flux.gguf", **widgets})
                (shown,) = server.get(f"/distorch2/preview?{asked}")["components"]
                assert len(shown["parts"]) == 2
                assert shown["now"] == shown["parts"]
                for part in shown["parts"]:
                    row = rf"diffusion model +{part['device']} +{part['served']} +{part['layers']} "
                    assert re.search(row, server.log[before:])
        assert all(torch.equal(each, latents[0]) for each in latents)
        cut_off = ("UnetLoaderGGUFDisTorch2MultiGPU", {"unet_name": "cut_off.gguf", **split("compute_device")})
        message = error_of(server.run(separate_files(server, [cut_off, text, vae])))["exception_message"]
        assert re.match(r"ComfyUI-GGUF cannot read .*cut_off\.gguf \(", message)
