"""A real ComfyUI server with the pack in custom_nodes, over HTTP: every ComfyUI version of the supported range."""

import copy
import math
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pytest
import torch
from checkpoints import make_checkpoint
from comfy_server import ComfyServer, PromptRefused, error_of
from conftest import COMFYUI_PATH, NUM_ACCELERATORS, ROOT
from host import DEFAULT_VERSION, SDISTS, fetch_comfyui
from safetensors.torch import load_file
from workflows import (
    NODE_ID,
    example,
    nodes_of_class,
    with_core_loader,
    with_saved_latent,
    with_small_image,
)

# A ComfyUI of the user's own is tested as it is.
VERSIONS = sorted(SDISTS) if "DISTORCH2_FETCHED_COMFYUI" in os.environ else ["given"]
NEWEST = VERSIONS[-1]
ARGUMENTS = () if NUM_ACCELERATORS else ("--cpu",)
DEVICES = ["cpu", *(f"cuda:{index}" for index in range(NUM_ACCELERATORS))]
ACCELERATOR = DEVICES[min(1, NUM_ACCELERATORS)]


def _start(version, base, checkpoints, arguments=(), environment=None):
    """A server whose checkpoint folder has every file that the tests ask for."""
    folder = base / "models" / "checkpoints"
    folder.mkdir(parents=True)
    for kind in ("sd3", "sd3_fp8", "sd3_no_clip_weights", "sd15_blocks", "flux", "sd15_ckpt"):
        (folder / Path(checkpoints(kind)).name).symlink_to(checkpoints(kind))
    (base / "models" / "text_encoders").mkdir()
    (base / "models" / "text_encoders" / "clip_l.safetensors").symlink_to(checkpoints("clip_l"))
    tree = COMFYUI_PATH if version in ("given", DEFAULT_VERSION) else fetch_comfyui(version, Path(sys.executable))
    return ComfyServer(tree, base, arguments=(*ARGUMENTS, *arguments), environment=environment)


@pytest.fixture(scope="module", params=VERSIONS)
def server(request, checkpoints, tmp_path_factory):
    with _start(request.param, tmp_path_factory.mktemp("comfyui"), checkpoints) as running:
        yield running


@pytest.fixture(scope="module")
def newest_server(checkpoints, tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    extra = base / "elsewhere"
    (extra / "checkpoints").mkdir(parents=True)
    shutil.copy(checkpoints("sd3_no_clip_weights"), extra / "checkpoints" / "from_extra_path.safetensors")
    paths = base / "paths.yaml"
    paths.write_text(f"elsewhere:\n  base_path: {extra}\n  checkpoints: checkpoints\n")
    with _start(NEWEST, base, checkpoints, ("--extra-model-paths-config", str(paths))) as running:
        yield running


def prompt_for(server, checkpoint, **widgets):
    """The example workflow, small, on what this machine has, with its latent saved."""
    prompt = example("two_cards_by_ratio")
    computing = dict.fromkeys(("unet_compute_device", "clip_compute_device", "vae_device"), ACCELERATOR)
    resident = {"unet_virtual_vram_gb": 0.0, "clip_virtual_vram_gb": 0.0}
    resident |= dict.fromkeys(("unet_expert_mode_allocations", "clip_expert_mode_allocations"), "")
    prompt["1"]["inputs"].update({"ckpt_name": checkpoint, **computing, **resident, **widgets})
    return with_saved_latent(with_small_image(prompt, 64, 2))


def with_text_encoder_of_its_own(prompt):
    """For checkpoints without one: a CLIP-L file, whose SD3 form Flux takes too."""
    prompt = copy.deepcopy(prompt)
    inputs = {"clip_name": "clip_l.safetensors", "type": "sd3"}
    prompt["clip"] = {"class_type": "CLIPLoader", "inputs": inputs}
    for node_id in nodes_of_class(prompt, "CLIPTextEncode"):
        prompt[node_id]["inputs"]["clip"] = ["clip", 0]
    return prompt


def latent_of(server, prompt):
    files = server.output_files(server.run(prompt))
    (latent,) = (file for file in files if file.suffix == ".latent")
    assert any(file.suffix == ".png" for file in files)
    return load_file(latent)["latent_tensor"]


def refused_details(server, prompt):
    """Texts of the errors on node 1 of a refused prompt."""
    with pytest.raises(PromptRefused) as refused:
        server.queue(prompt)
    assert refused.value.answer["error"]["type"] == "prompt_outputs_failed_validation"
    errors = refused.value.answer["node_errors"]["1"]["errors"]
    assert {error["type"] for error in errors} == {"custom_validation_failed"}
    return [error["details"] for error in errors]


def test_the_node_is_what_saved_workflows_expect(server):
    info = server.get("/object_info")[NODE_ID]
    checkpoints = info["input"]["required"]["ckpt_name"][1]["options"]
    assert "sd3.safetensors" in checkpoints

    def described(inputs):
        kept = ("default", "min", "max", "step", "multiline", "options")
        return [
            (name, kind, {key: options[key] for key in kept if key in options and name != "ckpt_name"})
            for name, (kind, options) in inputs.items()
        ]

    def device(name, default):
        return name, "COMBO", {"default": default, "options": DEVICES}

    def virtual_vram(name, default):
        return name, "FLOAT", {"default": default, "min": 0.0, "max": 128.0, "step": 0.1}

    assert described(info["input"]["required"]) == [
        ("ckpt_name", "COMBO", {}),
        device("unet_compute_device", ACCELERATOR),
        virtual_vram("unet_virtual_vram_gb", 4.0),
        device("unet_donor_device", "cpu"),
        device("clip_compute_device", "cpu"),
        virtual_vram("clip_virtual_vram_gb", 2.0),
        device("clip_donor_device", "cpu"),
        device("vae_device", ACCELERATOR),
    ]
    assert described(info["input"]["optional"]) == [
        ("unet_expert_mode_allocations", "STRING", {"default": "", "multiline": False}),
        ("clip_expert_mode_allocations", "STRING", {"default": "", "multiline": False}),
        ("high_precision_loras", "BOOLEAN", {"default": True}),
        ("eject_models", "BOOLEAN", {"default": False}),
        ("donor_mode", "COMBO", {"default": "auto", "options": ["auto", "stream", "relay"]}),
    ]
    assert info["output"] == ["MODEL", "CLIP", "VAE"]
    assert info["category"] == "multigpu/distorch_2"
    assert info["display_name"] == "Load Checkpoint (DisTorch2)"
    assert all(options["tooltip"] for part in ("required", "optional") for _, options in info["input"][part].values())
    assert all(info["output_tooltips"])


def test_the_locale_file_names_and_explains_what_the_node_has(newest_server):
    info = newest_server.get("/object_info")[NODE_ID]
    inputs = {**info["input"]["required"], **info["input"]["optional"]}
    outputs = zip(info["output_name"], info["output_tooltips"])
    assert newest_server.get("/i18n")["en"]["nodeDefs"][NODE_ID] == {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": {name: {"name": name, "tooltip": options["tooltip"]} for name, (_, options) in inputs.items()},
        "outputs": {str(i): {"name": name, "tooltip": tooltip} for i, (name, tooltip) in enumerate(outputs)},
    }


@pytest.mark.parametrize(
    ("checkpoint", "widgets"),
    [
        ("sd3.safetensors", {}),
        ("sd15_blocks.safetensors", {"unet_expert_mode_allocations": f" {ACCELERATOR.upper()} , 100% ;"}),
        ("flux.safetensors", {"unet_expert_mode_allocations": f"{ACCELERATOR},1gb*", "eject_models": True}),
        ("sd3.safetensors", {"clip_expert_mode_allocations": f"{ACCELERATOR},*"}),
    ],
)
def test_latents_are_bit_identical_to_those_of_the_core_loader(server, checkpoint, widgets):
    prompt = prompt_for(server, checkpoint, **widgets)
    if checkpoint == "flux.safetensors":
        prompt = with_text_encoder_of_its_own(prompt)
    ours = latent_of(server, prompt)
    assert torch.isfinite(ours).all()
    assert ours.std() > 0.01
    assert torch.equal(ours, latent_of(server, with_core_loader(prompt)))
    assert f"DisTorch2: {checkpoint}\n  component " in server.log


def test_an_expert_string_replaces_virtual_vram_and_donor(server):
    prompt = prompt_for(
        server,
        "sd3.safetensors",
        unet_virtual_vram_gb=4.0,
        unet_expert_mode_allocations=f"{ACCELERATOR},0.001%",
    )
    server.output_files(server.run(prompt))
    assert "0.001% alone is a ratio of one and means the whole model" in server.log


@pytest.mark.parametrize("name", ["unet_expert_mode_allocations", "clip_expert_mode_allocations"])
def test_a_bad_expert_string_is_refused_when_the_prompt_is_queued(newest_server, name):
    log_before = newest_server.log
    details = refused_details(newest_server, prompt_for(newest_server, "sd3.safetensors", **{name: "cpu,2tib"}))
    expected = f"{name}: unknown unit 'tib'; use b, kb, mb, gb or tb\n    cpu,2tib\n         ~~~^"
    assert any(expected in text for text in details)
    assert "model_type" not in newest_server.log[len(log_before) :]


def test_an_absent_device_in_an_expert_string_is_refused_with_the_present_ones(newest_server):
    prompt = prompt_for(newest_server, "sd3.safetensors", unet_expert_mode_allocations="cuda:63,*")
    expected = f"unknown device 'cuda:63'; this machine has {', '.join(DEVICES)}"
    assert any(expected in text for text in refused_details(newest_server, prompt))


def test_a_long_bad_string_is_not_echoed_whole(newest_server):
    prompt = prompt_for(newest_server, "sd3.safetensors", unet_expert_mode_allocations="x" * 200_000)
    details = refused_details(newest_server, prompt)
    assert all("has 200,000 characters; the longest accepted has 4,096" in text for text in details)
    assert all(len(text) < 500 for text in details)


def test_a_device_that_is_not_there_is_refused_when_the_prompt_is_queued(newest_server):
    with pytest.raises(PromptRefused) as refused:
        newest_server.queue(prompt_for(newest_server, "sd3.safetensors", vae_device="cuda:63"))
    (error,) = refused.value.answer["node_errors"]["1"]["errors"]
    assert error["type"] == "value_not_in_list"
    assert "vae_device: 'cuda:63' not in" in error["details"]


def test_a_checkpoint_of_extra_model_paths_is_found(newest_server):
    latent_of(newest_server, prompt_for(newest_server, "from_extra_path.safetensors"))


def test_virtual_vram_that_is_no_number_is_refused(newest_server):
    history = newest_server.run(prompt_for(newest_server, "sd3.safetensors", unet_virtual_vram_gb=math.nan))
    assert "virtual VRAM is nan GB; use 0 or more" in error_of(history)["exception_message"]


def test_a_file_damaged_after_queueing_is_an_error_on_the_loader_and_the_next_prompt_runs(newest_server):
    folder = newest_server.base / "models" / "checkpoints"
    whole = (folder / "sd3_no_clip_weights.safetensors").read_bytes()
    damaged = folder / "damaged.safetensors"
    damaged.write_bytes(whole[:-1000])
    history = newest_server.run(prompt_for(newest_server, damaged.name))
    assert error_of(history)["node_id"] == "1"
    assert "is cut off: it has" in error_of(history)["exception_message"]
    damaged.write_bytes(whole)
    latent_of(newest_server, prompt_for(newest_server, damaged.name))
    damaged.unlink()


def test_a_replaced_file_is_loaded_again(newest_server, tmp_path):
    replaced = newest_server.base / "models" / "checkpoints" / "replaced.safetensors"
    latents = []
    for seed in (0, 1):
        make_checkpoint("sd3_no_clip_weights", replaced, seed)
        latents.append(latent_of(newest_server, prompt_for(newest_server, replaced.name)))
    assert not torch.equal(*latents)
    replaced.unlink()


def test_the_same_prompt_again_loads_nothing(newest_server):
    prompt = prompt_for(newest_server, "sd15_ckpt.ckpt")
    prompt = with_text_encoder_of_its_own(prompt)
    prompt["clip"]["inputs"]["type"] = "stable_diffusion"
    latent_of(newest_server, prompt)
    loads = newest_server.log.count("DisTorch2: sd15_ckpt.ckpt")
    prompt["5"]["inputs"]["seed"] += 1
    latent_of(newest_server, prompt)
    assert newest_server.log.count("DisTorch2: sd15_ckpt.ckpt") == loads == 1


# --- weights on donors: simulated accelerators beside ComfyUI's real server


on_simulated = pytest.mark.skipif(NUM_ACCELERATORS > 0, reason="simulated accelerators are not for beside real ones")


@pytest.fixture(scope="module", params=VERSIONS)
def server_with_donors(request, checkpoints, tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "simulated").symlink_to(ROOT / "tests" / "simulated_accelerators")
    with _start(request.param, base, checkpoints, ("--cache-none",)) as running:
        yield running


@on_simulated
def test_the_node_offers_the_donors(server_with_donors):
    inputs = server_with_donors.get("/object_info")[NODE_ID]["input"]["required"]
    assert inputs["unet_donor_device"][1]["options"] == [*DEVICES, "sim:0", "sim:1"]


@on_simulated
@pytest.mark.parametrize(
    ("checkpoint", "widgets"),
    [
        ("sd3", {"unet_virtual_vram_gb": 0.1, "unet_donor_device": "sim:0"}),
        ("sd15_blocks", {"unet_expert_mode_allocations": f"{ACCELERATOR},50%;sim:1,50%"}),
        ("flux", {"unet_expert_mode_allocations": f"{ACCELERATOR},10%;sim:0,20mb*"}),
        ("sd3_fp8", {"unet_expert_mode_allocations": "sim:0,50%;sim:1,50%"}),
        ("sd3", {"clip_expert_mode_allocations": f"{ACCELERATOR},50mb;sim:1,*"}),
    ],
)
def test_latents_with_weights_on_donors_are_bit_identical(server_with_donors, checkpoint, widgets):
    assert_streamed_and_bit_identical(server_with_donors, checkpoint, widgets, expected={})


AMOUNTS = {
    "virtual VRAM": lambda percent, mib: {"virtual_vram_gb": percent / 100 * mib / 1024, "donor_device": "sim:0"},
    "ratio": lambda percent, mib: f"{ACCELERATOR},{100 - percent}%;sim:0,{percent}%",
    "bytes": lambda percent, mib: f"sim:0,{percent / 100 * mib:.3f}mb;{ACCELERATOR},*",
    "wildcard": lambda percent, mib: f"{ACCELERATOR},{(100 - percent) / 100 * mib:.3f}mb;sim:0,*",
    "fraction": lambda percent, mib: f"sim:0,{percent / 100 * mib / 1024:.9f};{ACCELERATOR},*",  # each has 1 GiB
}
COMPONENTS = [("unet", "sd3"), ("unet", "sd15_blocks"), ("unet", "flux"), ("unet", "sd3_fp8"), ("clip", "sd3")]


@pytest.fixture(scope="module")
def resident_runs():
    """checkpoint -> (latent of ComfyUI's own loader, MiB of each component), filled on first use."""
    return {}


@on_simulated
@pytest.mark.parametrize("server_with_donors", [NEWEST], indirect=True)
@pytest.mark.parametrize("percent", [0, 25, 50, 90, 100])
@pytest.mark.parametrize(("part", "checkpoint"), COMPONENTS)
def test_every_amount_of_every_component(server_with_donors, resident_runs, part, checkpoint, percent):
    """Each part of each component is asked for in another of the five ways, each way for every part."""
    if checkpoint not in resident_runs:
        before = len(server_with_donors.log)
        latent_of(server_with_donors, prompt_with_text(server_with_donors, checkpoint, {}))
        rows = placement_rows(server_with_donors.log[before:])
        resident_runs[checkpoint] = {"mib": {row["component"]: row["mib"] for row in rows}}
    mib = resident_runs[checkpoint]["mib"]["text" if part == "clip" else "diffusion"]
    way = list(AMOUNTS)[(COMPONENTS.index((part, checkpoint)) + percent // 25) % len(AMOUNTS)]
    amount = AMOUNTS[way](percent, mib)
    if isinstance(amount, str):
        amount = {"expert_mode_allocations": amount}
    widgets = {f"{part}_{name}": value for name, value in amount.items()}
    assert_streamed_and_bit_identical(
        server_with_donors, checkpoint, widgets, resident_runs[checkpoint], streams=percent > 0
    )


def prompt_with_text(server, checkpoint, widgets):
    prompt = prompt_for(server, f"{checkpoint}.safetensors", **widgets)
    return with_text_encoder_of_its_own(prompt) if checkpoint == "flux" else prompt


def placement_rows(log):
    """Component, device and so on of the rows of placement tables in the log; MiB are printed rounded to a tenth."""
    pattern = r"^  (diffusion|text)\S* \S+ +(\S+) +(resident|streamed|relayed) +(\d+) +([\d.]+)"
    names = ("component", "device", "served", "layers", "mib")
    rows = [dict(zip(names, row)) for row in re.findall(pattern, log, re.MULTILINE)]
    return [{**row, "layers": int(row["layers"]), "mib": float(row["mib"]) + 0.05} for row in rows]


def assert_streamed_and_bit_identical(server, checkpoint, widgets, expected, streams=True):
    """Runs the prompt with ComfyUI's loader, unless `expected` has its latent already, and with ours."""
    prompt = prompt_with_text(server, checkpoint, widgets)
    if "latent" not in expected:
        expected["latent"] = latent_of(server, with_core_loader(prompt))
    before, log_before = server.get("/simulated_accelerators"), len(server.log)
    assert torch.equal(latent_of(server, prompt), expected["latent"])
    after = server.get("/simulated_accelerators")
    streamed = {"diffusion": 0.0, "text": 0.0}
    for row in placement_rows(server.log[log_before:]):
        if row["served"] == "streamed":
            assert row["device"].startswith("sim:")
            streamed[row["component"]] += row["mib"]
    forwards = after["diffusion_forwards"] - before["diffusion_forwards"]
    encodings = after["clip_forwards"] - before["clip_forwards"]
    copied = (after["bytes"] - before["bytes"]) / 1024**2
    needed = streamed["diffusion"] * forwards + streamed["text"] * encodings
    # Some is copied twice while the order is learnt, and some ahead for a forward that does not come; what is printed
    # is rounded, and slabs are aligned.
    assert 0.95 * needed <= copied <= 1.05 * (needed + 2 * sum(streamed.values())) + 1
    assert (copied > 0) == streams
    # Nothing of the prompt is kept (--cache-none): its slabs go with the last patcher.
    assert after["used_bytes"] == [0, 0]


@on_simulated
def test_letting_go_of_models_empties_the_donors(checkpoints, tmp_path):
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes" / "simulated").symlink_to(ROOT / "tests" / "simulated_accelerators")
    with _start(NEWEST, tmp_path, checkpoints) as server:
        latent_of(server, prompt_for(server, "sd3.safetensors", unet_expert_mode_allocations="sim:0,*"))
        assert server.get("/simulated_accelerators")["used_bytes"][0] > 0
        server.post("/free", {"unload_models": True, "free_memory": True})
        deadline = time.monotonic() + 30
        while server.get("/simulated_accelerators")["used_bytes"] != [0, 0]:
            assert time.monotonic() < deadline
            time.sleep(0.2)


@on_simulated
@pytest.mark.parametrize(
    ("mode", "served"), [("auto", {"resident", "relayed", "streamed"}), ("stream", {"resident", "streamed"})]
)
def test_an_accelerator_that_computes_beside_the_compute_device(checkpoints, tmp_path, mode, served):
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes" / "simulated").symlink_to(ROOT / "tests" / "simulated_accelerators")
    computing = dict.fromkeys(("unet_compute_device", "clip_compute_device", "vae_device"), "sim:0")
    widgets = {"unet_expert_mode_allocations": "sim:0,45%;sim:1,55%", "donor_mode": mode, **computing}
    with _start(NEWEST, tmp_path, checkpoints, ("--cache-none",), {"SIMULATED_COMPUTE": "sim:0"}) as server:
        prompt = with_text_encoder_of_its_own(prompt_for(server, "flux.safetensors", **widgets))
        ours = latent_of(server, prompt)
        assert torch.equal(ours, latent_of(server, with_core_loader(prompt)))
        rows = placement_rows(server.log)
    assert {row["served"] for row in rows if row["component"] == "diffusion"} == served


@on_simulated
def test_what_comfyui_drops_for_want_of_ram_is_loaded_again(checkpoints, tmp_path):
    """With more RAM to be kept free than there is, nothing outlives its prompt."""
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes" / "simulated").symlink_to(ROOT / "tests" / "simulated_accelerators")
    too_much = ("--cache-ram", "1000000", "1000000")
    with _start(NEWEST, tmp_path, checkpoints, too_much) as server:
        prompt = prompt_for(server, "sd3.safetensors", unet_expert_mode_allocations="cpu,30%;sim:0,70%")
        expected = latent_of(server, with_core_loader(prompt))
        for run in (1, 2, 3):
            assert torch.equal(latent_of(server, prompt), expected)
            assert server.log.count("DisTorch2: sd3.safetensors") == run
        latent_of(server, with_core_loader(prompt))
        assert server.get("/simulated_accelerators")["used_bytes"] == [0, 0]
