"""ComfyUI's memory manager and the pack, on simulated accelerators that compute: what is granted, taken back and freed.

The compute device is sim:0 and ComfyUI's own; sim:1 and the host lend memory. Latents are compared with those of
ComfyUI's loader on the CPU, whose kernels the simulated devices use.
"""

import contextlib
import copy
import gc
import logging
import re

import comfy.cli_args
import comfy.hooks
import comfy.lora
import comfy.model_management as mm
import pytest
import torch
from computing import INFERENCE_BYTES, MIB, compute_on_sim, limit, load, same, sim
from computing import computing as computing
from computing import expected as expected
from computing import inference_mode as inference_mode
from placing import lora_for
from sampling import core_load, sample

from allocation_parser import parse_allocation
from distorch2.comfyui.program import COMFYUI
from distorch2.loading import distribute, load_checkpoint
from distorch2.moving.transfer import Detour, Transfer
from distorch2.planning.plan import ComponentRequest
from distorch2.planning.schedule import Schedule
from distorch2.serving.distribution import Distribution
from distorch2.weights import slab

pytestmark = pytest.mark.usefixtures("inference_mode", "computing")
KINDS = ("sd3_no_clip_weights", "flux", "sd15_blocks", "sd15_blocks_no_clip")


def log_lines(caplog, text):
    return [record.getMessage() for record in caplog.records if text in record.getMessage()]


# --- the compute device


@pytest.mark.parametrize("text", ["sim:0,*", "sim:0,50%;cpu,50%", "sim:1,50%;cpu,50%"])
def test_a_text_encoder_on_an_accelerator_gives_the_bits_of_one_on_the_host(checkpoints, expected, text):
    on_host = load(checkpoints, "sd15_blocks", "sim:0,*")[1]
    request = ComponentRequest("sim:0", parse_allocation(text))
    model, clip, _ = load_checkpoint(checkpoints("sd15_blocks"), request, request, "cpu")
    tokens = clip.tokenize("a red cube on a table")
    for found, wanted in zip(clip.encode_from_tokens(tokens, True), on_host.encode_from_tokens(tokens, True)):
        assert same(found, wanted.cpu())
    assert (clip.patcher.load_device, on_host.patcher.load_device) == (torch.device("sim:0"), torch.device("cpu"))
    assert clip.patcher.loaded_size() == clip.patcher.model_size() > 0
    assert (clip.patcher.distribution.transfer.copies > 0) == ("cpu" in text)  # streamed
    assert same(sample(model, clip), expected["sd15_blocks"])


@pytest.mark.parametrize("text", ["sim:0,*", "sim:0,50%;cpu,50%", "sim:0,30%;sim:1,40%;cpu,30%", "cpu,*"])
@pytest.mark.parametrize("kind", ["sd3_no_clip_weights", "flux"])
@pytest.mark.quick("flux-sim:0,30%;sim:1,40%;cpu,30%")
def test_the_sizes_that_comfyui_is_told_are_those_of_the_device(checkpoints, expected, kind, text):
    model, clip = load(checkpoints, kind, text)
    assert model.loaded_size() == 0
    mm.load_models_gpu([model])
    assert model.loaded_size() == model.model_size() == sim.used_bytes[0]
    assert [share.loaded_size() for share in model.distribution.shares] == [sim.used_bytes[1]] * ("sim:1" in text)
    assert same(sample(model, clip), expected[kind])
    assert model.loaded_size() == sim.used_bytes[0]
    mm.unload_all_models()
    assert model.loaded_size() == 0
    assert sim.used_bytes == [0, 0]


@pytest.mark.parametrize("text", ["sim:0,*", "sim:0,70%;cpu,30%", "sim:0,70%;sim:1,30%"])
def test_what_comfyui_does_not_grant_is_streamed_until_there_is_room(checkpoints, expected, monkeypatch, caplog, text):
    model, clip = load(checkpoints, "sd15_blocks_no_clip", text)
    asked, layers = model.model_size(), {placement.layer.name for placement in model.distribution.asked.placements}
    for part in (0.7, 0.4):
        mm.unload_all_models()
        limit(monkeypatch, 0, asked * part + 3 * INFERENCE_BYTES)
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert same(sample(model, clip), expected["sd15_blocks_no_clip"])
        plan = model.distribution.plan
        assert model.loaded_size() == plan.compute_bytes <= asked * part + 3 * INFERENCE_BYTES
        assert {placement.layer.name for placement in plan.placements} == layers
        assert sum(group.num_bytes for group in plan.evicted) >= asked * (1 - part) - 3 * INFERENCE_BYTES
        assert len(log_lines(caplog, "streamed from the host, for want of room")) == 1
        caplog.clear()
        assert same(sample(model, clip), expected["sd15_blocks_no_clip"])  # nothing moves when nothing changed
        assert log_lines(caplog, "DisTorch2") == []
    monkeypatch.undo()
    compute_on_sim(monkeypatch)
    with caplog.at_level(logging.INFO):
        assert same(sample(model, clip), expected["sd15_blocks_no_clip"])
    assert model.distribution.plan == model.distribution.asked
    assert model.loaded_size() == asked
    assert len(log_lines(caplog, "resident again")) == 1


def test_an_eviction_keeps_the_learnt_order(checkpoints, expected, monkeypatch):
    model, clip = load(checkpoints, "flux", "sim:0,50%;cpu,50%")
    assert same(sample(model, clip), expected["flux"])
    late, enter = [], Schedule.enter

    def watched(schedule, layer):
        groups = enter(schedule, layer)
        late.extend(group for group in groups if group == schedule._group_of[layer])
        return groups

    monkeypatch.setattr(Schedule, "enter", watched)
    asked = model.model_size()
    limit(monkeypatch, 0, asked * 0.7 + INFERENCE_BYTES)
    assert same(sample(model, clip), expected["flux"])
    plan = model.distribution.plan
    assert plan.evicted
    # Layers that were resident have no learnt place; they are expected in registration order.
    assert len(late) < len(plan.groups) / 2
    late.clear()
    assert same(sample(model, clip), expected["flux"])
    assert len(late) <= 1


@pytest.mark.parametrize("other_is_ours", [True, False])
@pytest.mark.quick("True")
def test_two_models_that_do_not_fit_together_run_in_turns(checkpoints, expected, monkeypatch, other_is_ours):
    model, clip = load(checkpoints, "sd15_blocks_no_clip", "sim:0,*")
    if other_is_ours:
        other, other_clip = load(checkpoints, "flux", "sim:0,60%;cpu,40%")
    else:
        other, other_clip = core_load(checkpoints("flux"))[:2]
    limit(monkeypatch, 0, model.model_size() + other.model_size() / 2 + INFERENCE_BYTES)
    assert same(sample(model, clip), expected["sd15_blocks_no_clip"])
    for _ in range(2):
        assert same(sample(other, other_clip), expected["flux"])
        assert any(loaded.model is model for loaded in mm.current_loaded_models)  # it moved only what it had to
        assert 0 < model.loaded_size() < model.model_size()
        assert same(sample(model, clip), expected["sd15_blocks_no_clip"])


@pytest.mark.parametrize("patched", [False, True])
def test_memory_taken_back_between_two_steps(checkpoints, expected, patched):
    model, clip = load(checkpoints, "flux", "sim:0,70%;cpu,30%")
    reference, core_clip = core_load(checkpoints("flux"))[:2]
    wanted = expected["flux"]
    if patched:
        wanted = sample(lora_for(reference), core_clip)
        mm.unload_all_models()
        model = lora_for(model)
    calls = []

    def taking_back(apply_model, arguments):
        calls.append(model.loaded_size())
        if len(calls) in (2, 3):
            mm.free_memory(mm.get_free_memory(torch.device("sim:0")) + 4 * MIB, torch.device("sim:0"))
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    hindered = model.clone()
    hindered.set_model_unet_function_wrapper(taking_back)
    assert same(sample(hindered, clip, steps=4), sample(model, clip, steps=4))
    assert calls[2] <= calls[1] - 4 * MIB
    assert calls[3] <= calls[2] - 4 * MIB
    assert same(sample(model, clip), wanted)


def test_a_patched_weight_keeps_its_patch_when_it_is_evicted_and_loses_it_afterwards(checkpoints, expected):
    reference, core_clip = core_load(checkpoints("sd3_no_clip_weights"))[:2]
    wanted = sample(lora_for(reference), core_clip)
    mm.unload_all_models()
    model, clip = load(checkpoints, "sd3_no_clip_weights", "sim:0,*")
    patched = lora_for(model)
    assert same(sample(patched, clip), wanted)
    all_that_can_be = model.model_size() - model.distribution.plan.within(0).compute_bytes
    freed = patched.partially_unload(torch.device("cpu"), all_that_can_be)
    assert freed == model.model_size() - model.loaded_size() > 0
    assert patched.model.current_weight_patches_uuid == patched.patches_uuid
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(comfy.lora, "calculate_weight", lambda *arguments, **options: pytest.fail("computed again"))
        assert same(sample(patched, clip), wanted)
    patched.partially_unload(torch.device("cpu"), all_that_can_be)
    assert same(sample(model, clip), expected["sd3_no_clip_weights"])


# --- donors


@pytest.mark.quick
def test_comfyui_evicts_a_donors_share_to_the_host_and_brings_it_back(checkpoints, expected, monkeypatch):
    model, clip = load(checkpoints, "flux", "sim:0,50%;sim:1,50%")
    assert same(sample(model, clip), expected["flux"])
    on_donor = sim.used_bytes[1]
    assert on_donor == model.distribution.asked.bytes_on("sim:1") > 0
    (share,) = model.distribution.shares
    assert any(loaded.model is share for loaded in mm.current_loaded_models)

    limit(monkeypatch, 1, on_donor + 8 * MIB)
    mm.free_memory(20 * MIB, torch.device("sim:1"))
    assert mm.get_free_memory(torch.device("sim:1")) >= 20 * MIB
    assert any(loaded.model is share for loaded in mm.current_loaded_models)  # in part
    assert 0 < share.loaded_size() == sim.used_bytes[1] <= on_donor - 12 * MIB
    mm.free_memory(1e30, torch.device("sim:1"))
    assert share.loaded_size() == sim.used_bytes[1] == 0
    assert not any(loaded.model is share for loaded in mm.current_loaded_models)

    assert same(sample(model, clip), expected["flux"])
    assert sim.used_bytes[1] == on_donor


def test_a_share_is_evicted_between_two_steps(checkpoints, expected):
    model, clip = load(checkpoints, "flux", "sim:1,*")
    calls = []

    def evicting(apply_model, arguments):
        calls.append(sim.used_bytes[1])
        if len(calls) == 2:
            mm.free_memory(1e30, torch.device("sim:1"))
        return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

    hindered = model.clone()
    hindered.set_model_unet_function_wrapper(evicting)
    assert same(sample(hindered, clip), expected["flux"])
    assert calls[0] > 0
    assert sim.used_bytes[1] == 0
    assert same(sample(model, clip), expected["flux"])
    assert sim.used_bytes[1] == calls[0]


def test_loading_a_share_evicts_others_from_its_donor(checkpoints, expected, monkeypatch):
    model, clip = load(checkpoints, "flux", "sim:0,50%;sim:1,50%")
    other = core_load(checkpoints("sd15_blocks_no_clip"))[0]
    other.load_device = torch.device("sim:1")
    mm.load_models_gpu([other])
    used_by_other = sim.used_bytes[1]
    limit(monkeypatch, 1, used_by_other + INFERENCE_BYTES)
    assert same(sample(model, clip), expected["flux"])
    (share,) = model.distribution.shares
    assert share.loaded_size() == share.model_size() == model.distribution.asked.bytes_on("sim:1") > INFERENCE_BYTES / 2
    assert sim.used_bytes[1] - share.loaded_size() < used_by_other


def test_a_donor_that_is_full_when_the_model_is_placed_hands_over_to_the_host(checkpoints, expected, monkeypatch):
    model, clip = load(checkpoints, "flux", "sim:0,50%;sim:1,50%")
    limit(monkeypatch, 1, 3 * MIB)  # taken by somebody else between planning and placing
    assert same(sample(model, clip), expected["flux"])
    assert 0 < sim.used_bytes[1] <= 3 * MIB
    monkeypatch.undo()
    compute_on_sim(monkeypatch)
    assert same(sample(model, clip), expected["flux"])
    assert sim.used_bytes[1] == model.distribution.asked.bytes_on("sim:1")


# --- failures


def failing_allocations(patches, nth):
    """Let the nth allocation of a slab or staging buffer fail; returns the list of those made."""
    allocate, made = slab.allocate, []

    def fail(num_bytes, device):
        made.append(device)
        if len(made) == nth:
            if device.type == "cpu":
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory (planted)")
            raise torch.OutOfMemoryError("planted")
        return allocate(num_bytes, device)

    for module in ("distorch2.serving.groups", "distorch2.serving.streaming", "distorch2.moving.modules"):
        patches.setattr(f"{module}.allocate", fail)
    return made


def test_an_allocation_that_fails_at_any_point_of_a_load(checkpoints, expected):
    model, clip = load(checkpoints, "flux", "sim:0,40%;sim:1,30%;cpu,30%")
    wanted, nth = expected["flux"], 0
    failed = []
    while True:
        nth += 1
        with pytest.MonkeyPatch.context() as patches:
            made = failing_allocations(patches, nth)
            try:
                assert same(sample(model, clip), wanted)
                message = ""
            except mm.OOM_EXCEPTION as error:
                message = str(error)
        if message:
            failed.append(nth)
            assert re.search("out of memory while placing Flux", message)
            assert model.loaded_size() == 0
            gc.collect()
            assert sim.used_bytes == [0, 0]
            assert not any("forward" in vars(module) for module in model.model.modules())
            assert not any(loaded.model is model for loaded in mm.current_loaded_models)
        if len(made) < nth:
            break
        assert same(sample(model, clip), wanted)
        mm.unload_all_models()
        model.distribution.groups.clear()  # so that everything is allocated again
        model.distribution._stores._stored.clear()
    assert failed  # those on the host
    assert len(failed) < nth - 1  # the others are made on the host or smaller


def test_what_the_model_itself_runs_out_of_names_the_device_and_what_to_change(checkpoints, expected):
    model, clip = load(checkpoints, "flux", "sim:0,60%;cpu,40%")

    def failing(*arguments, **options):
        raise torch.OutOfMemoryError("planted")

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(type(model.model.diffusion_model), "forward", failing)
        with pytest.raises(
            torch.OutOfMemoryError, match=r"while running Flux: .*keep less of it on sim:0.*\(planted\)"
        ):
            sample(model, clip)
    assert same(sample(model, clip), expected["flux"])


LOST = "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later"


def lost(*arguments, **options):
    raise RuntimeError(LOST)


@pytest.mark.quick
def test_a_device_that_is_lost_is_named_and_needs_a_restart(checkpoints, expected):
    """Nothing is tried on it any more. That it works again here is for the test."""
    model, clip = load(checkpoints, "flux", "sim:0,60%;sim:1,40%")
    wanted = (
        r"sim:0 or sim:1 failed while {} Flux \(CUDA error: an illegal memory access was encountered\); restart ComfyUI"
    )
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(Distribution, "place", lost)
        with pytest.raises(RuntimeError, match=wanted.format("placing")):
            sample(model, clip)
    assert same(sample(model, clip), expected["flux"])
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(type(model.model.diffusion_model), "forward", lost)
        with pytest.raises(RuntimeError, match=wanted.format("running")):
            sample(model, clip)
    assert same(sample(model, clip), expected["flux"])


def page_lock_with(monkeypatch, distribution, page_lock, unlock):
    monkeypatch.setattr(mm, "pin_memory", page_lock)
    monkeypatch.setattr(mm, "unpin_memory", unlock)
    monkeypatch.setattr(mm, "ensure_pin_registerable", lambda num_bytes: True)
    distribution.pinned._is_useful = True


@pytest.mark.parametrize("num_allowed", [0, 1, 2, 10, 1000])
@pytest.mark.parametrize("is_deferred", [False, True])
def test_host_memory_that_cannot_be_page_locked_is_copied_by_way_of_some_that_can(
    checkpoints, expected, monkeypatch, num_allowed, is_deferred
):
    model, clip = load(checkpoints, "flux", "sim:0,30%;cpu,70%")
    locked = set()

    def page_lock(tensor):
        if len(locked) < num_allowed:
            locked.add(tensor.data_ptr())
            return True
        return False

    distribution = model.distribution
    page_lock_with(monkeypatch, distribution, page_lock, lambda tensor: locked.remove(tensor.data_ptr()))
    with sim.deferred_copies() if is_deferred else contextlib.nullcontext():
        assert same(sample(model, clip), expected["flux"])
        assert same(sample(model, clip), expected["flux"])
    assert len(locked) == min(num_allowed, len(distribution.groups)) if num_allowed != 1 else not locked
    assert (distribution.transfer.upload is not None) == (2 <= num_allowed < len(distribution.groups))
    mm.unload_all_models()
    assert not locked
    assert distribution.transfer.upload is None
    assert same(sample(model, clip), expected["flux"])


@pytest.fixture
def with_detours(checkpoints, monkeypatch):
    """(model, clip) of which a half may come by way of sim:1: it is large enough, and twice as fast."""
    model, clip = load(checkpoints, "flux", "sim:0,30%;cpu,70%")
    page_lock_with(monkeypatch, model.distribution, lambda tensor: True, lambda tensor: True)
    monkeypatch.setattr(type(COMFYUI), "devices_in_use", lambda host: {torch.device("sim:1")})
    monkeypatch.setattr("distorch2.serving.detour._gains", {})
    for name, value in {"_LEAST_TO_DETOUR_BYTES": 0, "_MEASURED_BYTES": 1024**2, "_SLOT_BYTES": 10_000}.items():
        monkeypatch.setattr(f"distorch2.serving.detour.{name}", value)
    monkeypatch.setattr("distorch2.moving.transfer._LEAST_TO_HALVE_BYTES", 1000)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    measure_with_gain(monkeypatch, 2.0)
    yield model, clip
    mm.unload_all_models()


def measure_with_gain(monkeypatch, gain):
    measure = Transfer.bytes_per_second

    def measured(transfer, copies):
        measure(transfer, copies)
        return gain if transfer.detour is not None else 1.0

    monkeypatch.setattr(Transfer, "bytes_per_second", measured)


def test_half_of_what_is_streamed_comes_by_way_of_another_accelerator(with_detours, expected, caplog):
    model, clip = with_detours
    before = sim.counters["bytes_across"]
    with caplog.at_level(logging.INFO), sim.deferred_copies():
        for _ in range(2):
            assert same(sample(model, clip), expected["flux"])
    assert sim.counters["bytes_across"] - before > 3 * model.distribution.plan.bytes_on("cpu") / 2
    assert log_lines(caplog, "half of what is streamed to sim:0 comes by way of sim:1")
    assert sim.used_bytes[1] == 40_000
    mm.unload_all_models()
    assert sim.used_bytes == [0, 0]


def test_nothing_is_done_on_a_device_that_nobody_named(with_detours, expected, monkeypatch):
    model, clip = with_detours
    monkeypatch.setattr(type(COMFYUI), "devices_in_use", lambda host: set())
    streams = []
    monkeypatch.setattr("distorch2.serving.detour.Detour", lambda *arguments: streams.append(arguments))
    assert same(sample(model, clip), expected["flux"])
    assert model.distribution.transfer.detour is None
    assert streams == []
    assert sim.used_bytes[1] == 0


def test_a_detour_is_measured_once(with_detours, expected, monkeypatch):
    model, clip = with_detours
    measured = []
    measure = Transfer.bytes_per_second
    monkeypatch.setattr(
        Transfer, "bytes_per_second", lambda transfer, copies: measured.append(1) or measure(transfer, copies)
    )
    for _ in range(3):
        assert same(sample(model, clip), expected["flux"])
        assert model.distribution.transfer.detour is not None
        mm.unload_all_models()
    assert len(measured) == 2  # without it and with it
    assert same(sample(model, clip), expected["flux"])


def planted_error(*arguments):
    raise RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable")


@pytest.mark.parametrize(
    "reason",
    ["not faster", "no bytes arrive", "no memory there", "no memory for slots", "an error there", "little to stream"],
)
def test_no_detour(with_detours, expected, monkeypatch, reason):
    model, clip = with_detours
    if reason == "not faster":
        measure_with_gain(monkeypatch, 1.1)
    elif reason == "no bytes arrive":
        monkeypatch.setattr(Detour, "copy", lambda *arguments: None)
    elif reason == "no memory there":
        limit(monkeypatch, 1, INFERENCE_BYTES - 1)
    elif reason == "an error there":
        monkeypatch.setattr("distorch2.serving.detour.Detour", planted_error)
    elif reason == "no memory for slots":
        monkeypatch.setattr(mm, "minimum_inference_memory", lambda: 0)
        limit(monkeypatch, 1, 39_999)
    else:
        monkeypatch.setattr("distorch2.serving.detour._LEAST_TO_DETOUR_BYTES", 1024**3)
    assert same(sample(model, clip), expected["flux"])
    assert model.distribution.transfer.detour is None
    assert model.distribution.transfer.copies > 0
    assert sim.used_bytes[1] == 0


def test_a_staging_buffer_that_does_not_fit_is_made_smaller(checkpoints, expected, monkeypatch):
    model, clip = load(checkpoints, "flux", "cpu,*")
    planned = model.distribution.asked.staging_bytes
    allocate = slab.allocate

    def at_most(num_bytes, device):
        if device.type == "sim" and num_bytes > planned // 2:
            raise torch.OutOfMemoryError("planted")
        return allocate(num_bytes, device)

    largest = max(group.slab_bytes for group in model.distribution.asked.groups)
    assert largest <= planned // 2
    monkeypatch.setattr("distorch2.serving.streaming.allocate", at_most)
    assert same(sample(model, clip), expected["flux"])
    assert model.distribution.streamer.staging.nbytes == max(largest, planned // 2)
    assert model.loaded_size() == sim.used_bytes[0] < model.model_size()


# --- patches


def test_a_changed_strength_computes_what_changed(checkpoints, expected, monkeypatch):
    model, clip = load(checkpoints, "flux", "sim:0,50%;cpu,50%")
    core, core_clip = core_load(checkpoints("flux"))[:2]
    patches = lora_for(core).patches
    keys = sorted(patches)
    first, second = keys[::2], keys[1::2]

    def patched(patcher, strength_of_second):
        clone = patcher.clone()
        assert clone.add_patches({key: patches[key][0][1] for key in first}, 1.0)
        assert clone.add_patches({key: patches[key][0][1] for key in second}, strength_of_second)
        return clone

    wanted = {strength: sample(patched(core, strength), core_clip) for strength in (1.0, 0.5)}
    mm.unload_all_models()
    calculate, computed = comfy.lora.calculate_weight, []

    def counted(patch_list, weight, key, *arguments, **options):
        computed.append(key)
        return calculate(patch_list, weight, key, *arguments, **options)

    monkeypatch.setattr(comfy.lora, "calculate_weight", counted)
    for strength, expected_keys in ((1.0, keys), (0.5, second), (0.5, []), (1.0, second)):
        computed.clear()
        assert same(sample(patched(model, strength), clip), wanted[strength])
        assert sorted(computed) == sorted(expected_keys)
    computed.clear()
    assert same(sample(model, clip), expected["flux"])
    assert computed == []


@pytest.mark.parametrize("kind", ["sd3_fp8_no_clip_weights", "sd3_fp8_scaled_no_clip_weights"])
@pytest.mark.parametrize("text", ["sim:0,*", "sim:0,50%;cpu,50%", "cpu,*"])
def test_high_precision_loras_are_not_rounded_to_the_dtype_of_storage(checkpoints, monkeypatch, kind, text):
    monkeypatch.setattr(comfy.cli_args.args, "fp8_e4m3fn_unet", "scaled" not in kind)  # on a CPU it would become fp32
    core, core_clip = core_load(checkpoints(kind))[:2]
    rounded = sample(lora_for(core), core_clip)
    mm.unload_all_models()
    # The same weights with their patches, in the dtype of computation, as if the file had them so.
    core = core_load(checkpoints(kind))[0]
    for key, patches in lora_for(core).patches.items():
        module = core.model.get_submodule(key.rpartition(".")[0])
        weight = module.weight.dequantize() if hasattr(module.weight, "dequantize") else module.weight
        full = comfy.lora.calculate_weight(patches, weight.to(torch.float32, copy=True), key)
        module.weight = torch.nn.Parameter(full.to(core.model.get_dtype_inference()), requires_grad=False)
        module.comfy_force_cast_weights = True
    core.force_cast_weights = True
    precise = sample(core, core_clip)
    mm.unload_all_models()
    assert not torch.equal(precise, rounded)

    for high_precision, wanted in ((True, precise), (False, rounded)):
        model, clip = load(checkpoints, kind, text, high_precision_loras=high_precision)
        plain = sample(model, clip)
        sizes = model.loaded_size(), sim.used_bytes[0]
        assert sizes[0] == model.model_size()
        patched = lora_for(model)
        for _ in range(2):
            assert same(sample(patched, clip), wanted)
            assert patched.loaded_size() == patched.model_size() == model.distribution.compute_bytes
            assert (patched.model_size() > model.model_size()) == high_precision
            if text != "sim:0,*":
                assert model.distribution.transfer.copies > 0
            mm.free_memory(mm.get_free_memory(torch.device("sim:0")) + MIB // 2, torch.device("sim:0"))
            assert same(sample(patched, clip), wanted)
            assert torch.equal(sample(model, clip), plain)
            assert model.loaded_size() == sizes[0]
        mm.unload_all_models()
        del model, patched, clip


# --- orders of events that were wrong once


def test_a_grant_of_nothing_is_no_grant_of_everything(checkpoints):
    model, _ = load(checkpoints, "flux", "sim:0,*")
    first, second = lora_for(model, 1.0), lora_for(model, 0.5)
    mm.load_models_gpu([first])
    size = first.loaded_size()
    second.partially_load(torch.device("sim:0"), -size)
    assert second.loaded_size() < size / 2


def test_no_memory_on_the_host_while_comfyui_frees_a_device(checkpoints, expected):
    """An exception there would leave its list of loaded models broken until it is started again."""
    model, clip = load(checkpoints, "sd15_blocks_no_clip", "sim:0,*")
    shared, _ = load(checkpoints, "flux", "sim:0,50%;sim:1,50%")
    other, other_clip = core_load(checkpoints("flux"))[:2]
    mm.load_models_gpu([shared])
    mm.load_models_gpu([model])
    mm.load_models_gpu([other])
    failed = []

    def none_on_the_host(num_bytes, device):
        if device.type == "cpu":
            failed.append(num_bytes)
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory (planted)")
        return allocate(num_bytes, device)

    allocate = slab.allocate
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr("distorch2.serving.groups.allocate", none_on_the_host)
        # On sim:0 the smaller models go as a whole, and then a part of the largest.
        smaller = shared.loaded_size() + other.loaded_size()
        for device in map(torch.device, ("sim:1", "sim:0")):
            mm.free_memory(mm.get_free_memory(device) + smaller + 4 * MIB, device)
            assert failed
            failed.clear()
    assert same(sample(model, clip), expected["sd15_blocks_no_clip"])
    assert same(sample(shared, other_clip), expected["flux"])
    assert same(sample(other, other_clip), expected["flux"])


def test_a_weight_that_somebody_else_patched_is_patched_again(checkpoints):
    model, _ = load(checkpoints, "flux", "sim:0,50%;cpu,50%")
    first, second = lora_for(model, 1.0), lora_for(model, 0.5)
    key = next(iter(first.patches))
    module = model.model.get_submodule(key.rpartition(".")[0])
    mm.load_models_gpu([first])
    patched = module.weight.to("cpu", copy=True)
    second.patch_weight_to_device(key, second.load_device)
    assert not torch.equal(module.weight.cpu(), patched)
    third = first.clone()
    third.add_patches({name: patches[0][1] for name, patches in first.patches.items() if name != key}, 0.1)
    mm.load_models_gpu([third])
    assert torch.equal(module.weight.cpu(), patched)


def test_memory_is_freed_under_those_who_hold_weights(checkpoints):
    """A merge, say, whose patches are the parameters of another model."""
    model, _ = load(checkpoints, "flux", "sim:0,50%;sim:1,50%")
    mm.load_models_gpu([model])
    held = {key: value[0][0] for key, value in model.get_key_patches("diffusion_model.").items()}
    before = {key: weight.to("cpu", copy=True) for key, weight in held.items()}
    used = sim.used_bytes[0]
    assert model.partially_unload(torch.device("cpu"), 8 * MIB) == used - sim.used_bytes[0] >= 8 * MIB
    mm.free_memory(1e30, torch.device("sim:1"))
    assert sim.used_bytes[1] == 0
    assert all(torch.equal(held[key].cpu(), before[key]) for key in held)


def test_a_weight_hook_on_an_object_patch_and_memory_taken_back(checkpoints):
    model, _ = load(checkpoints, "flux", "sim:0,*")
    patches = lora_for(model).patches
    key = next(key for key in patches if "double_blocks.0" in key and key.endswith("weight"))
    path = key.rpartition(".")[0]
    own = model.model.get_submodule(path)
    with torch.inference_mode(False):
        other = copy.deepcopy(own)
        other.weight = torch.nn.Parameter(torch.full(own.weight.shape, 0.5), requires_grad=False)
    before = own.weight.clone()
    hooked = model.clone()
    hooked.add_object_patch(path, other)
    hook = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=1.0)
    hooked.add_hook_patches(hook, {key: patches[key][0][1]}, 1.0)
    group = comfy.hooks.HookGroup()
    group.add(hook)
    mm.load_models_gpu([hooked])
    hooked.patch_hooks(group)
    assert not (other.weight == 0.5).all()
    hooked.partially_unload(torch.device("cpu"), hooked.loaded_size() // 2)
    assert (other.weight == 0.5).all()
    assert torch.equal(own.weight.cpu(), before)
    mm.unload_all_models()
    assert torch.equal(own.weight.cpu(), before)


def test_weights_kept_in_full_precision_and_room_for_them(checkpoints, monkeypatch):
    monkeypatch.setattr(comfy.cli_args.args, "fp8_e4m3fn_unet", True)
    model, _ = load(checkpoints, "sd3_fp8_no_clip_weights", "sim:0,*")
    device = torch.device("sim:0")
    patched = lora_for(model)
    mm.load_models_gpu([model])
    size = model.loaded_size()
    patched.partially_load(device, 0.4 * size)
    assert patched.distribution.plan.evicted
    # Without the LoRA the model fits, and is not larger on its way there.
    place, used = Distribution.place, []
    monkeypatch.setattr(Distribution, "place", lambda *arguments: used.append((place(*arguments), sim.used_bytes[0])))
    model.partially_load(device, 1.4 * size - patched.loaded_size())
    assert not model.distribution.plan.evicted
    assert max(num_bytes for _, num_bytes in used) == sim.used_bytes[0] == model.loaded_size() == size

    # The dtype is that of the clone.
    half = patched.clone()
    half.set_model_compute_dtype(torch.bfloat16)
    key = next(iter(patched.patches))
    module = model.model.get_submodule(key.rpartition(".")[0])
    for patcher, dtype in ((half, torch.bfloat16), (patched, torch.float32), (half, torch.bfloat16)):
        mm.load_models_gpu([patcher])
        assert module.weight.dtype == dtype
        assert patcher.loaded_size() == patcher.model_size() == sim.used_bytes[0]


def chained(core, one, request):
    return distribute(one, request)


def beside(core, one, request):
    return distribute(core, request)


def selected(core, one, request):
    """As by ComfyUI's node that selects a device."""
    clone = one.clone()
    clone.load_device = torch.device(request.compute_device)
    return clone


@pytest.mark.parametrize("make", [chained, beside, selected])
def test_what_a_patcher_for_another_device_loaded_can_be_freed_when_it_is_dropped(checkpoints, expected, make):
    core, clip, _ = core_load(checkpoints("sd3_no_clip_weights"))
    one = distribute(core, ComponentRequest("sim:0", parse_allocation("sim:0,50%;cpu,50%"), "stream"))
    other = make(core, one, ComponentRequest("sim:1", parse_allocation("sim:1,50%;cpu,50%"), "stream"))
    assert same(sample(other, clip), expected["sd3_no_clip_weights"])
    assert sim.used_bytes[1] > 0
    del other
    gc.collect()
    mm.unload_all_models()
    assert sim.used_bytes == [0, 0]
    assert same(sample(one, clip), expected["sd3_no_clip_weights"])
