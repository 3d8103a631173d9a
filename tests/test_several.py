"""Several devices that run the same model at once, by ComfyUI's MultiGPU CFG Split: simulated accelerators, threads.

Latents are compared with those of ComfyUI's loader on the CPU, one conditioning after another.
"""

import gc
import os
import subprocess
import sys
import threading
import weakref

import comfy.model_management as mm
import comfy.sd
import gguf_files
import pytest
import torch
from comfy_extras import nodes_multigpu
from computing import limit, load, same, sim
from placing import lora_for, with_hook
from sampling import output, sample
from several import DEVICES, KINDS, forwards, on_all, regions, split, without_guidance
from several import computing as computing
from several import expected as expected
from several import inference_mode as inference_mode
from several import one_at_a_time as one_at_a_time

from allocation_parser import parse_allocation
from distorch2.components import DIFFUSION_MODEL, load_again, placed_components
from distorch2.loading import distribute
from distorch2.planning.plan import ComponentRequest
from distorch2.serving.stores import Stores
from distorch2.weights.devices import CPU


def slabs_on_host(patchers):
    """Address of each slab in main memory -> its bytes."""
    slabs = [group.host_slab for each in patchers for group in each.distribution.groups.values()]
    return {slab.data_ptr(): slab.nbytes for slab in slabs if slab is not None}


def check_memory(patchers):
    """On each device lies what is planned, to a layer, and in main memory what they have in common lies once."""
    for patcher in patchers:
        index, plan = patcher.load_device.index, patcher.distribution.plan
        assert 0 <= sim.used_bytes[index] - plan.compute_bytes < 2**20
    groups = {key: key.slab_bytes for each in patchers for key in each.distribution.groups if key.device == "cpu"}
    assert sum(slabs_on_host(patchers).values()) == sum(groups.values())


@pytest.mark.parametrize("percent", [0, 25, 50, 90])
@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_bit_identical_and_weights_lie_once_in_main_memory(checkpoints, expected, kind, percent):
    model, clip = load(checkpoints, kind, f"sim:0,{100 - percent}%;cpu,{percent}%" if percent else "sim:0,*")
    model = split(model)
    plain, with_lora, _ = expected[kind]
    for _ in range(2):
        with forwards(model) as counts:
            assert same(sample(model, clip), plain)
        assert counts == dict.fromkeys(DEVICES[:2], 2)  # as many devices as conditionings
        check_memory(on_all(model))
        assert same(sample(lora_for(model), clip), with_lora)
        check_memory(on_all(model))
        mm.unload_all_models()
    del model
    gc.collect()


@pytest.mark.parametrize("text", ["sim:0,50%;sim:1,50%", "sim:0,30%;sim:1,60%;cpu,10%", "sim:1,100%"])
@pytest.mark.parametrize("kind", ["flux", "wan"])
def test_what_the_other_device_would_lend_it_keeps_for_itself(checkpoints, expected, kind, text):
    relayed, clip = load(checkpoints, kind, text, donor_mode="auto")
    model = split(relayed, 2)
    plain = expected[kind][0]
    with forwards(model) as counts:
        assert same(sample(model, clip), plain)
    assert counts == dict.fromkeys(DEVICES[:2], 2)
    for patcher in on_all(model):
        device, plan = str(patcher.load_device), patcher.distribution.plan
        assert set(plan.devices) <= {device, "cpu"}
        asked = relayed.request.plan.bytes_on(device)
        largest = max(item.layer.num_bytes for item in plan.placements)
        assert abs(plan.bytes_on(device) - asked) <= largest or asked == 0
    assert same(sample(relayed, clip), plain)  # without the split, as it was asked for
    assert relayed.distribution.plan.relayed_units
    assert same(sample(model, clip), plain)


@pytest.mark.parametrize("text", ["sim:0,50%;cpu,50%", "sim:0,50%;sim:1,50%"])
def test_a_gguf_model_runs_on_several_devices(checkpoints, tmp_path, text):
    path = gguf_files.write_flux(tmp_path / "flux.gguf", "Q8_0")

    def load_gguf():
        options = {"custom_operations": gguf_files.Layers, "load_device": CPU}
        return comfy.sd.load_diffusion_model_state_dict(gguf_files.read(path), options)

    clip = load(checkpoints, "flux", "sim:0,*")[1]
    expected = sample(load_gguf(), clip)
    loaded = load_gguf()
    loaded.cached_patcher_init = (load_again, (DIFFUSION_MODEL, (path,), load_gguf))
    alone = distribute(loaded, ComponentRequest("sim:0", parse_allocation(text)), is_new=True)
    with_lora = sample(lora_for(alone), clip)
    assert not same(with_lora, expected)
    model = split(alone, 2)
    for patcher, latent in ((model, expected), (lora_for(model), with_lora), (model, expected)):
        with forwards(patcher) as counts:
            assert same(sample(patcher, clip), latent)
        assert counts == dict.fromkeys(DEVICES[:2], 2)
        check_memory(on_all(model))
    assert {*placed_components((path,), {DIFFUSION_MODEL: "sim:1"})} == {DIFFUSION_MODEL}


def test_one_conditioning_is_relayed_and_its_copies_are_left_alone(checkpoints, monkeypatch, expected):
    relayed, clip = load(checkpoints, "flux", "sim:0,50%;sim:1,50%", donor_mode="auto")
    model = split(relayed, 2)
    wanted = without_guidance(relayed, clip)
    mm.unload_all_models()
    with forwards(model) as counts:
        assert torch.equal(without_guidance(model, clip), wanted)
    assert counts == {"sim:0": 2}
    copy = on_all(model)[1]
    assert copy.loaded_size() == 0
    assert len(on_all(model)) == 2
    assert same(sample(model, clip), expected["flux"][0])


def test_regions_run_on_all_devices_without_guidance(checkpoints):
    model, clip = load(checkpoints, "flux", "sim:0,50%;cpu,50%")
    outputs = []
    for patcher in (model, split(model, 2)):
        with forwards(patcher) as counts:
            outputs.append(regions(patcher, clip))
    assert torch.equal(*outputs)
    assert counts == {"sim:0": 4, "sim:1": 2}  # three conditionings, two steps


@pytest.mark.parametrize("kind", ["flux", "sd3_no_clip_weights"])
def test_hooks_write_into_slabs_of_their_own(checkpoints, expected, kind):
    plain, _, with_hooks = expected[kind]
    model, clip = load(checkpoints, kind, "sim:0,30%;cpu,70%")
    model = split(model)
    for _ in range(2):
        hooked, hooks = with_hook(model)
        assert same(sample(hooked, clip, hooks=hooks), with_hooks)
        assert same(sample(model, clip), plain)


@pytest.mark.parametrize("raised", [mm.InterruptProcessingException, ZeroDivisionError])
@pytest.mark.parametrize("number", [0, 1])
def test_what_one_of_them_raises(checkpoints, expected, number, raised):
    plain = expected["flux"][0]
    model, clip = load(checkpoints, "flux", "sim:0,40%;cpu,60%")
    model = split(model, 2)
    assert same(sample(model, clip), plain)
    before = list(sim.used_bytes)
    layer = on_all(model)[number].model.diffusion_model.single_blocks[3].linear1

    def fail(*arguments):
        raise raised

    hook = layer.register_forward_hook(fail)
    with pytest.raises(raised):
        sample(model, clip)
    hook.remove()
    assert same(sample(model, clip), plain)
    gc.collect()
    assert sim.used_bytes == before
    check_memory(on_all(model))


@pytest.mark.parametrize("index", [0, 1])
def test_memory_taken_on_one_of_them(checkpoints, expected, monkeypatch, index):
    plain, with_lora, _ = expected["flux"]
    model, clip = load(checkpoints, "flux", "sim:0,80%;cpu,20%")
    model = split(model, 2)
    assert same(sample(model, clip), plain)
    patcher = on_all(model)[index]
    with monkeypatch.context() as patches:
        mm.free_memory(mm.get_free_memory(patcher.load_device) + patcher.loaded_size() // 2, patcher.load_device)
        limit(patches, index, sim.used_bytes[index] + 17 * 2**20)
        assert same(sample(model, clip), plain)
        assert on_all(model)[index].distribution.plan.evicted
        assert not on_all(model)[1 - index].distribution.plan.evicted
        assert same(sample(lora_for(model), clip), with_lora)
    assert same(sample(model, clip), plain)
    assert not on_all(model)[index].distribution.plan.evicted


def test_slabs_go_with_the_last_that_is_served_from_them(checkpoints, expected):
    plain = expected["flux"][0]
    model, clip = load(checkpoints, "flux", "cpu,*")
    model = split(model, 2)
    assert same(sample(model, clip), plain)
    first, second = on_all(model)
    slabs = [weakref.ref(group.slab) for group in first.distribution.groups.values()]
    addresses = slabs_on_host([first]).keys()
    assert slabs_on_host([second]).keys() == addresses
    mm.free_memory(1e12, first.load_device)
    assert slabs_on_host([second]).keys() == addresses
    assert same(sample(model, clip), plain)
    assert slabs_on_host(on_all(model)).keys() == addresses
    mm.unload_all_models()
    del model, first, second
    gc.collect()
    assert not any(slab() is not None for slab in slabs)


def test_main_memory_that_is_enough_for_one(checkpoints, expected, monkeypatch):
    plain = expected["flux"][0]
    model, clip = load(checkpoints, "flux", "cpu,*")
    model = split(model, 2)
    needed = sum(key.slab_bytes for key in model.distribution.asked.groups)
    monkeypatch.setattr(
        "distorch2.comfyui.core.spare_host_memory",
        lambda: 1.1 * needed - sum(slabs_on_host(on_all(model)).values()),
    )
    assert same(sample(model, clip), plain)
    assert {group.device for each in on_all(model) for group in each.distribution.groups.values()} == {CPU}


def test_what_is_shared_is_counted_and_given_up_once(checkpoints, expected, monkeypatch):
    plain = expected["flux"][0]
    model, clip = load(checkpoints, "flux", "cpu,*")
    model = split(model, 2)
    assert same(sample(model, clip), plain)
    distributions = [patcher.distribution for patcher in on_all(model)]
    used = sum(slabs_on_host(on_all(model)).values())
    assert [each.host_bytes for each in distributions] == [used, 0]
    with monkeypatch.context() as patches:  # others have taken main memory, while both run
        patches.setattr("distorch2.comfyui.core.spare_host_memory", lambda: -used / 2)
        for each in distributions:
            each.relieve_host_memory()
    assert sum(slabs_on_host(on_all(model)).values()) == used
    distributions[0].give_up_host_memory(used / 2)
    assert sum(slabs_on_host(on_all(model)).values()) <= used / 2
    assert same(sample(model, clip), plain)


def test_one_copy_in_main_memory_again_after_hooks(checkpoints, expected):
    plain, _, with_hooks = expected["flux"]
    model, clip = load(checkpoints, "flux", "cpu,*")
    model = split(model, 2)
    assert same(sample(model, clip), plain)
    used = sum(slabs_on_host(on_all(model)).values())
    hooked, hooks = with_hook(model)
    assert same(sample(hooked, clip, hooks=hooks), with_hooks)
    assert same(sample(model, clip), plain)
    assert sum(slabs_on_host(on_all(model)).values()) == used


if sim.NUM_DEVICES > 2:  # in the runs of `test_more_devices`

    def test_slabs_with_hooks_in_them_are_not_shared(checkpoints):
        model, clip = load(checkpoints, "flux", "sim:0,20%;sim:2,*")
        hooked, hooks = with_hook(split(model, 2))
        sample(hooked, clip)
        patchers = on_all(hooked)
        for patcher in patchers:
            patcher.hook_patches = hooked.hook_patches
            patcher.apply_hooks(hooks)
        mm.free_memory(1e12, torch.device("sim:2"))
        first, second = (slabs_on_host([patcher]).keys() for patcher in patchers)
        assert first
        assert not first & second
        for patcher in patchers:
            patcher.unpatch_hooks()


def test_main_memory_is_asked_for_before_a_lora_is_in_the_second_copy(checkpoints, expected, monkeypatch):
    """It is filled without the LoRA, and so with other bytes than the first."""
    model, clip = load(checkpoints, "flux", "cpu,*")
    model = split(model, 2)
    needed = sum(key.slab_bytes for key in model.distribution.asked.groups)
    patched = lora_for(model)
    place, used = Stores.place, []

    def watched(stores, *arguments):
        place(stores, *arguments)
        used.append(sum(slabs_on_host(on_all(patched)).values()))

    monkeypatch.setattr(Stores, "place", watched)
    monkeypatch.setattr(
        "distorch2.comfyui.core.spare_host_memory",
        lambda: 1.2 * needed - sum(slabs_on_host(on_all(patched)).values()),
    )
    assert same(sample(patched, clip), expected["flux"][1])
    assert 0.9 * needed < max(used) <= 1.2 * needed


def test_a_log_line_says_what_lies_where(checkpoints, caplog):
    model, clip = load(checkpoints, "flux", "sim:0,50%;sim:1,50%")
    with caplog.at_level("INFO"):
        sample(split(model, 2), clip)
    for device, other in (("sim:0", "sim:1"), ("sim:1", "sim:0")):
        assert f"Flux for {device}, beside {other}: " in caplog.text


@pytest.mark.parametrize("device", ["sim:0", "sim:1", "cpu"])
def test_two_copies_are_served_by_two_threads_at_once(checkpoints, device):
    model, _ = load(checkpoints, "flux", "sim:0,30%;cpu,70%")
    copy = model.clone(force_deepcopy=True)
    copy.load_device = torch.device(device)
    patchers = [model, copy]
    wanted = [output(patcher).cpu() for patcher in patchers]
    assert torch.equal(*wanted)
    mm.load_models_gpu(patchers)
    found = {patcher: [] for patcher in patchers}

    def run(patcher):
        for _ in range(5):
            found[patcher].append(output(patcher, is_loaded=True).cpu())

    threads = [threading.Thread(target=run, args=(patcher,)) for patcher in patchers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(outputs) for outputs in found.values()] == [5, 5]
    assert all(torch.equal(each, wanted[0]) for outputs in found.values() for each in outputs)


def test_a_model_that_selects_another_device_keeps_its_split(checkpoints, expected, caplog):
    """ComfyUI's node Select Model Device."""
    model, clip = load(checkpoints, "flux", "sim:0,50%;sim:1,30%;cpu,20%")
    with caplog.at_level("INFO"):
        selected = nodes_multigpu._apply_patcher_device(model.clone(), torch.device("sim:1"))
        assert same(sample(selected, clip), expected["flux"][0])
    asked, plan = model.request.plan, selected.distribution.plan
    assert [plan.bytes_on(each) for each in ("sim:1", "sim:0", "cpu")] == [
        asked.bytes_on(each) for each in ("sim:0", "sim:1", "cpu")
    ]
    assert "Flux for sim:1: " in caplog.text


if sim.NUM_DEVICES == 2:

    @pytest.mark.parametrize("number", [3, 4])
    def test_more_devices(number):
        files = [__file__, os.path.join(os.path.dirname(__file__), "test_pair.py")]
        command = [sys.executable, "-m", "pytest", "-c", "pytest.ini", "--rootdir=.", "-n0", "-q", *files]
        environment = {**os.environ, "SIMULATED_DEVICES": str(number)}
        environment.pop("PYTEST_XDIST_WORKER", None)
        chosen = (
            "bit_identical and (25 or 90) and (flux or wan) or regions or hooks_in_them or lie_once and flux or way"
        )
        result = subprocess.run(
            [*command, "-k", chosen], cwd=os.path.dirname(__file__), env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout[-3000:]
