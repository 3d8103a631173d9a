"""A real ComfyUI server with the pack in custom_nodes, over HTTP: every ComfyUI version of the supported range."""

import json
import math
import re
import shutil
import subprocess
import sys
import time

import pytest
import torch
from checkpoints import make_checkpoint
from comfy_server import PromptRefused, error_of
from host import NEWEST_PACKAGES
from PIL import Image
from serving import (
    ACCELERATOR,
    DEVICES,
    IS_FETCHED,
    NEWEST,
    VERSIONS,
    WITH_NEWEST_PACKAGES,
    latent_of,
    prompt_for,
    start,
    with_text_encoder_of_its_own,
)
from workflows import EXAMPLES, NODE_ID, with_core_loader

SERVERS = [*VERSIONS, WITH_NEWEST_PACKAGES] if IS_FETCHED else VERSIONS


@pytest.fixture(scope="module", params=SERVERS)
def server(request, checkpoints, tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    extra = base / "elsewhere"
    (extra / "checkpoints").mkdir(parents=True)
    shutil.copy(checkpoints("sd3_no_clip_weights"), extra / "checkpoints" / "from_extra_path.safetensors")
    paths = base / "paths.yaml"
    paths.write_text(f"elsewhere:\n  base_path: {extra}\n  checkpoints: checkpoints\n")
    with start(request.param, base, checkpoints, ("--extra-model-paths-config", str(paths))) as running:
        yield running


on_newest = pytest.mark.parametrize("server", [NEWEST], indirect=True)


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

    def device(name, default, others=()):
        return name, "COMBO", {"default": default, "options": [*DEVICES, *others]}

    def virtual_vram(name, default):
        return name, "FLOAT", {"default": default, "min": 0.0, "max": 128.0, "step": 0.1}

    assert described(info["input"]["required"]) == [
        ("ckpt_name", "COMBO", {}),
        device("unet_compute_device", ACCELERATOR),
        virtual_vram("unet_virtual_vram_gb", 4.0),
        device("unet_donor_device", "cpu", ["disk"]),
        device("clip_compute_device", "cpu"),
        virtual_vram("clip_virtual_vram_gb", 2.0),
        device("clip_donor_device", "cpu", ["disk"]),
        device("vae_device", ACCELERATOR),
    ]
    assert described(info["input"]["optional"]) == [
        ("unet_expert_mode_allocations", "STRING", {"default": "", "multiline": False}),
        ("clip_expert_mode_allocations", "STRING", {"default": "", "multiline": False}),
        ("high_precision_loras", "BOOLEAN", {"default": True}),
        ("eject_models", "BOOLEAN", {"default": False}),
        ("donor_mode", "COMBO", {"default": "auto", "options": ["auto", "stream", "relay"]}),
        ("pack_weights", "COMBO", {"default": "auto", "options": ["auto", "on", "off"]}),
    ]
    assert info["output"] == ["MODEL", "CLIP", "VAE"]
    assert info["category"] == "multigpu/distorch_2"
    assert info["display_name"] == "Load Checkpoint (DisTorch2)"
    assert all(options["tooltip"] for part in ("required", "optional") for _, options in info["input"][part].values())
    assert all(info["output_tooltips"])


@on_newest
def test_the_locale_file_names_and_explains_what_the_node_has(server):
    info = server.get("/object_info")[NODE_ID]
    inputs = {**info["input"]["required"], **info["input"]["optional"]}
    outputs = zip(info["output_name"], info["output_tooltips"])
    assert server.get("/i18n")["en"]["nodeDefs"][NODE_ID] == {
        "display_name": info["display_name"],
        "description": info["description"],
        "inputs": {name: {"name": name, "tooltip": options["tooltip"]} for name, (_, options) in inputs.items()},
        "outputs": {str(i): {"name": name, "tooltip": tooltip} for i, (name, tooltip) in enumerate(outputs)},
    }


if IS_FETCHED:

    @pytest.mark.parametrize("server", [WITH_NEWEST_PACKAGES], indirect=True)
    def test_the_newest_packages_are_those_that_the_server_has(server):
        for name in ("comfy-kitchen", "comfy-aimdo"):
            assert f"{name} version: {NEWEST_PACKAGES[name]}\n" in server.log
        (web_root,) = re.findall(r"web root: (.*)", server.log)
        assert f"comfyui-frontend-package=={NEWEST_PACKAGES['comfyui-frontend-package']}" in web_root


@pytest.mark.parametrize(
    ("checkpoint", "widgets"),
    [
        ("sd3.safetensors", {}),
        ("sd15_blocks.safetensors", {"unet_expert_mode_allocations": f" {ACCELERATOR.upper()} , 100% ;"}),
        ("flux.safetensors", {"unet_expert_mode_allocations": f"{ACCELERATOR},1gb*", "eject_models": True}),
        ("sd3.safetensors", {"clip_expert_mode_allocations": f"{ACCELERATOR},*"}),
        ("sd3.safetensors", {"unet_expert_mode_allocations": "auto", "clip_expert_mode_allocations": "auto;keep=1gb"}),
    ],
)
@pytest.mark.quick(f"{NEWEST}-sd3.safetensors-widgets0")
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


@on_newest
@pytest.mark.parametrize("name", ["unet_expert_mode_allocations", "clip_expert_mode_allocations"])
@pytest.mark.quick(f"{NEWEST}-unet_expert_mode_allocations")
def test_a_bad_expert_string_is_refused_when_the_prompt_is_queued(server, name):
    log_before = server.log
    details = refused_details(server, prompt_for(server, "sd3.safetensors", **{name: "cpu,2tib"}))
    expected = f"{name}: unknown unit 'tib'; use b, kb, mb, gb or tb\n    cpu,2tib\n         ~~~^"
    assert any(expected in text for text in details)
    assert "model_type" not in server.log[len(log_before) :]


@on_newest
def test_an_absent_device_in_an_expert_string_is_refused_with_the_present_ones(server):
    prompt = prompt_for(server, "sd3.safetensors", unet_expert_mode_allocations="cuda:63,*")
    expected = f"unknown device 'cuda:63'; this machine has {', '.join(DEVICES)}"
    assert any(expected in text for text in refused_details(server, prompt))


@on_newest
def test_a_long_bad_string_is_not_echoed_whole(server):
    prompt = prompt_for(server, "sd3.safetensors", unet_expert_mode_allocations="x" * 200_000)
    details = refused_details(server, prompt)
    assert all("has 200,000 characters; the longest accepted has 4,096" in text for text in details)
    assert all(len(text) < 500 for text in details)


@on_newest
def test_a_device_that_is_not_there_is_refused_when_the_prompt_is_queued(server):
    with pytest.raises(PromptRefused) as refused:
        server.queue(prompt_for(server, "sd3.safetensors", vae_device="cuda:63"))
    (error,) = refused.value.answer["node_errors"]["1"]["errors"]
    assert error["type"] == "value_not_in_list"
    assert "vae_device: 'cuda:63' not in" in error["details"]


@on_newest
def test_a_checkpoint_of_extra_model_paths_is_found(server):
    latent_of(server, prompt_for(server, "from_extra_path.safetensors"))


@on_newest
def test_virtual_vram_that_is_no_number_is_refused(server):
    history = server.run(prompt_for(server, "sd3.safetensors", unet_virtual_vram_gb=math.nan))
    assert "virtual VRAM is nan GB; use 0 or more" in error_of(history)["exception_message"]


@on_newest
def test_a_file_damaged_after_queueing_is_an_error_on_the_loader_and_the_next_prompt_runs(server):
    folder = server.base / "models" / "checkpoints"
    whole = (folder / "sd3_no_clip_weights.safetensors").read_bytes()
    damaged = folder / "damaged.safetensors"
    damaged.write_bytes(whole[:-1000])
    history = server.run(prompt_for(server, damaged.name))
    assert error_of(history)["node_id"] == "1"
    assert "is cut off: it has" in error_of(history)["exception_message"]
    damaged.write_bytes(whole)
    latent_of(server, prompt_for(server, damaged.name))
    damaged.unlink()


@on_newest
def test_a_replaced_file_is_loaded_again(server, tmp_path):
    replaced = server.base / "models" / "checkpoints" / "replaced.safetensors"
    latents = []
    for seed in (0, 1):
        make_checkpoint("sd3_no_clip_weights", replaced, seed)
        latents.append(latent_of(server, prompt_for(server, replaced.name)))
    assert not torch.equal(*latents)
    replaced.unlink()


@on_newest
def test_the_same_prompt_again_loads_nothing(server):
    prompt = prompt_for(server, "sd15_ckpt.ckpt")
    prompt = with_text_encoder_of_its_own(prompt)
    prompt["clip"]["inputs"]["type"] = "stable_diffusion"
    latent_of(server, prompt)
    loads = server.log.count("DisTorch2: sd15_ckpt.ckpt")
    prompt["5"]["inputs"]["seed"] += 1
    latent_of(server, prompt)
    assert server.log.count("DisTorch2: sd15_ckpt.ckpt") == loads == 1


@on_newest
def test_the_script_of_the_examples_runs_a_workflow(server, tmp_path):
    workflow = tmp_path / "workflow.json"
    workflow.write_text(json.dumps(prompt_for(server, "flux.safetensors")))

    def script(*changes, file=workflow, address=server.url):
        command = [sys.executable, EXAMPLES / "api" / "run.py", file, "--server", address, "--output", tmp_path / "new"]
        changes = [f"--set={change}" for change in changes]
        return subprocess.run([*command, *changes], capture_output=True, text=True)

    run = script(
        "1.ckpt_name=sd3.safetensors",
        "5.seed=7",
        "5.cfg=2.5",
        "1.eject_models=False",
        "1.unet_expert_mode_allocations=cpu,*",
        "2.text=true",
        address=f"{server.url}/",
    )
    assert run.returncode == 0, run.stderr
    assert "DisTorch2: sd3.safetensors" in run.stdout
    (picture,) = (tmp_path / "new").glob("*.png")
    assert picture.name in run.stdout
    with Image.open(picture) as image:
        assert image.size == (64, 64)
        sent = json.loads(image.info["prompt"])
    assert (sent["1"]["inputs"]["eject_models"], sent["2"]["inputs"]["text"]) == (False, "true")
    for change, message in {
        "1.nothing=1": "'1.nothing=1' changes nothing here; use NODE.INPUT=VALUE, with one of 1.ckpt_name, ",
        "2.clip=1": "'2.clip=1' changes nothing here",
        "5.seed=x": "5.seed is 'x'; use a value like ",
        "1.eject_models=maybe": "1.eject_models is 'maybe'; use a value like false",
        "1.unet_expert_mode_allocations=cpu,2q": "unknown unit 'q'; use b, kb, mb, gb or tb\n    cpu,2q\n",
        "1.ckpt_name=flux.safetensors": "CLIPTextEncode failed: ",
    }.items():
        run = script(change)
        assert (run.returncode, message in run.stderr) == (1, True), run.stderr
    run = script(address="http://127.0.0.1:9")
    assert (run.returncode, "does ComfyUI run there?" in run.stderr) == (1, True), run.stderr
    run = script(file=EXAMPLES / "one_small_card.json")
    assert (run.returncode, "is not in API format" in run.stderr) == (1, True), run.stderr
    run = script(file=tmp_path / "none.json")
    assert (run.returncode, "cannot read" in run.stderr) == (1, True), run.stderr


@on_newest
def test_the_script_says_that_a_run_was_interrupted(server, tmp_path):
    workflow = tmp_path / "workflow.json"
    prompt = prompt_for(server, "sd3.safetensors")
    prompt["5"]["inputs"] |= {"steps": 10_000, "seed": 8}
    workflow.write_text(json.dumps(prompt))
    command = [sys.executable, EXAMPLES / "api" / "run.py", workflow, "--server", server.url]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path) as running:
        while running.poll() is None and not server.get("/queue")["queue_running"]:
            time.sleep(0.1)
        time.sleep(2)
        server.post("/interrupt", {})
        _, said = running.communicate(timeout=60)
    assert (running.returncode, "was interrupted" in said) == (1, True), said
