"""Weights on donors, over HTTP: simulated accelerators beside a real ComfyUI server of every supported version."""

import re
import time

import pytest
import torch
from conftest import NUM_ACCELERATORS, ROOT
from serving import ACCELERATOR, DEVICES, NEWEST, VERSIONS, latent_of, prompt_for, start, with_text_encoder_of_its_own
from workflows import NODE_ID, with_core_loader

pytestmark = pytest.mark.skipif(NUM_ACCELERATORS > 0, reason="simulated accelerators are not for beside real ones")


@pytest.fixture(scope="module", params=VERSIONS)
def server_with_donors(request, checkpoints, tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "simulated").symlink_to(ROOT / "tests" / "simulated_accelerators")
    with start(request.param, base, checkpoints, ("--cache-none",)) as running:
        yield running


def test_the_node_offers_the_donors(server_with_donors):
    inputs = server_with_donors.get("/object_info")[NODE_ID]["input"]["required"]
    assert inputs["unet_donor_device"][1]["options"] == [*DEVICES, "sim:0", "sim:1", "disk"]


@pytest.mark.parametrize(
    ("checkpoint", "widgets"),
    [
        ("sd3", {"unet_virtual_vram_gb": 0.1, "unet_donor_device": "sim:0"}),
        ("sd15_blocks", {"unet_expert_mode_allocations": f"{ACCELERATOR},50%;sim:1,50%"}),
        ("flux", {"unet_expert_mode_allocations": f"{ACCELERATOR},10%;sim:0,20mb*"}),
        ("sd3_fp8", {"unet_expert_mode_allocations": "sim:0,50%;sim:1,50%"}),
        ("sd3", {"clip_expert_mode_allocations": f"{ACCELERATOR},50mb;sim:1,*"}),
        ("sd15_blocks", {"unet_expert_mode_allocations": f"{ACCELERATOR},30%;sim:0,20%;disk,*"}),
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
        if row["served"] == "streamed" and row["device"] != "disk":  # what is copied from there is not counted
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


def test_letting_go_of_models_empties_the_donors(checkpoints, tmp_path):
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes" / "simulated").symlink_to(ROOT / "tests" / "simulated_accelerators")
    with start(NEWEST, tmp_path, checkpoints) as server:
        latent_of(server, prompt_for(server, "sd3.safetensors", unet_expert_mode_allocations="sim:0,*"))
        assert server.get("/simulated_accelerators")["used_bytes"][0] > 0
        deadline = time.monotonic() + 30
        while server.get("/simulated_accelerators")["used_bytes"] != [0, 0]:
            assert time.monotonic() < deadline
            # Again and again: while ComfyUI collects garbage after a prompt it does not wake up for it.
            server.post("/free", {"unload_models": True, "free_memory": True})
            time.sleep(0.2)


@pytest.fixture(scope="module")
def computing_server(checkpoints, tmp_path_factory):
    """ComfyUI computes on sim:0."""
    base = tmp_path_factory.mktemp("comfyui")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "simulated").symlink_to(ROOT / "tests" / "simulated_accelerators")
    with start(NEWEST, base, checkpoints, ("--cache-none",), {"SIMULATED_COMPUTE": "sim:0"}) as running:
        yield running


@pytest.mark.parametrize(
    ("mode", "served"), [("auto", {"resident", "relayed", "streamed"}), ("stream", {"resident", "streamed"})]
)
def test_an_accelerator_that_computes_beside_the_compute_device(computing_server, mode, served):
    computing = dict.fromkeys(("unet_compute_device", "clip_compute_device", "vae_device"), "sim:0")
    widgets = {"unet_expert_mode_allocations": "sim:0,45%;sim:1,55%", "donor_mode": mode, **computing}
    before = len(computing_server.log)
    prompt = with_text_encoder_of_its_own(prompt_for(computing_server, "flux.safetensors", **widgets))
    ours = latent_of(computing_server, prompt)
    assert torch.equal(ours, latent_of(computing_server, with_core_loader(prompt)))
    rows = placement_rows(computing_server.log[before:])
    assert {row["served"] for row in rows if row["component"] == "diffusion"} == served


def test_what_comfyui_drops_for_want_of_ram_is_loaded_again(checkpoints, tmp_path):
    """With more RAM to be kept free than there is, nothing outlives its prompt."""
    (tmp_path / "custom_nodes").mkdir()
    (tmp_path / "custom_nodes" / "simulated").symlink_to(ROOT / "tests" / "simulated_accelerators")
    too_much = ("--cache-ram", "1000000", "1000000")
    with start(NEWEST, tmp_path, checkpoints, too_much) as server:
        prompt = prompt_for(server, "sd3.safetensors", unet_expert_mode_allocations="cpu,30%;sim:0,70%")
        expected = latent_of(server, with_core_loader(prompt))
        for run in (1, 2, 3):
            assert torch.equal(latent_of(server, prompt), expected)
            assert server.log.count("DisTorch2: sd3.safetensors") == run
        latent_of(server, with_core_loader(prompt))
        assert server.get("/simulated_accelerators")["used_bytes"] == [0, 0]


@pytest.mark.parametrize(
    ("checkpoint", "text", "donor_mode"),
    [
        ("sd3", "sim:0,*", "auto"),
        ("sd3", "sim:0,50%;sim:1,50%", "auto"),
        ("sd3", "sim:0,80%;sim:1,20%", "relay"),
        ("sd15_blocks", "sim:0,60%;sim:1,40%", "relay"),
        ("sd15_blocks", "sim:0,30%;cpu,70%", "auto"),
        ("sd3_no_clip_weights", "cpu,*", "auto"),
        ("sd15_blocks", "auto;keep=860mb", "relay"),
    ],
)
def test_two_devices_run_a_model_at_once(computing_server, checkpoint, text, donor_mode):
    """MultiGPU CFG Split with ComfyUI's loader, a whole copy on each, and with ours."""
    server = computing_server
    computing = dict.fromkeys(("unet_compute_device", "clip_compute_device", "vae_device"), "sim:0")
    placed = {"unet_expert_mode_allocations": text, "donor_mode": donor_mode}
    prompt = prompt_for(server, f"{checkpoint}.safetensors", **computing, **placed)
    prompt["split"] = {"class_type": "MultiGPU_WorkUnits", "inputs": {"model": ["1", 0], "max_gpus": 2}}
    prompt["5"]["inputs"] |= {"model": ["split", 0], "cfg": 4.0}
    expected = latent_of(server, with_core_loader(prompt))
    before = len(server.log)
    for seed in (prompt["5"]["inputs"]["seed"], 21):
        prompt["5"]["inputs"]["seed"] = seed
        latent = latent_of(server, prompt)
        assert torch.equal(latent, expected) == (seed != 21)
    how = "for sim:1, beside sim:0: " if donor_mode == "auto" else "for sim:0, as a relayed pair: "
    assert how in server.log[before:]
    prompt["5"]["inputs"]["cfg"] = 1.0
    forwards = server.get("/simulated_accelerators")["diffusion_forwards"]
    latent_of(server, prompt)
    assert server.get("/simulated_accelerators")["diffusion_forwards"] == forwards + 2
    assert "Traceback" not in server.log
