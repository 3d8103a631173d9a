"""A relayed pair: one module that runs for itself and for its copies of ComfyUI's MultiGPU CFG Split, on all devices at
the same time. Simulated accelerators, threads.

Latents are compared with those of ComfyUI's loader on the CPU, one conditioning after another.
"""

import gc
import threading
import time
import weakref

import comfy.model_management as mm
import comfy.multigpu
import pytest
import torch
from computing import INFERENCE_BYTES, MIB, limit, load, same, sim
from placing import lora_for, with_hook
from sampling import sample
from several import DEVICES, forwards, on_all, regions, split, with_control, without_guidance
from several import computing as computing
from several import expected as expected
from several import inference_mode as inference_mode
from several import one_at_a_time as one_at_a_time

from distorch2.moving.transfer import Timing
from distorch2.planning.planner import plan_alternating
from distorch2.serving.distribution import Distribution
from distorch2.serving.pair import _held_by, _is_same

SHARES = {2: "sim:0,60%;sim:1,40%", 3: "sim:0,40%;sim:1,30%;sim:2,30%", 4: "sim:0,40%;sim:1,20%;sim:2,20%;sim:3,20%"}


def load_pair(checkpoints, kind="flux", text=SHARES[sim.NUM_DEVICES], donor_mode="relay", **options):
    relayed, clip = load(checkpoints, kind, text, donor_mode=donor_mode, **options)
    return split(relayed), clip


def is_paired(model):
    """Whether the last run was that of a pair."""
    return model._shared.placed.plan == plan_alternating(model.request.plan, model.layers_of(model.model))


def check_memory(model):
    """Everything lies where it is planned, once, and nothing in main memory."""
    placed = model._shared.placed
    for index, device in enumerate(DEVICES):
        planned = placed.plan.compute_bytes if index == 0 else placed.slab_bytes_planned_on(torch.device(device))
        assert 0 <= sim.used_bytes[index] - planned < MIB
    assert all(group.host_slab is None for group in placed.groups.values())
    assert all(copy.loaded_size() == 0 for copy in on_all(model)[1:])


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("flux", SHARES[sim.NUM_DEVICES]),
        ("flux", "sim:0,20%;sim:1,*"),
        ("sd3_no_clip_weights", "sim:0,80%;sim:1,*"),
        ("sd15_blocks_no_clip", "sim:0,50%;sim:1,*"),
        ("wan", "sim:0,50%;sim:1,*"),
    ],
)
def test_latents_are_bit_identical_and_weights_lie_once(checkpoints, expected, kind, text):
    model, clip = load_pair(checkpoints, kind, text)
    plain, with_lora, _ = expected[kind]
    for _ in range(2):
        with forwards(model) as counts:
            assert same(sample(model, clip), plain)
        assert counts == {"sim:0": 4, "sim:1": 2}  # those of the copy run the first
        assert is_paired(model)
        check_memory(model)
        assert same(sample(lora_for(model), clip), with_lora)
        mm.unload_all_models()
        gc.collect()
        assert not any(sim.used_bytes)


def test_two_inputs_are_on_their_way_at_the_same_time(checkpoints, expected):
    model, clip = load_pair(checkpoints)
    sample(model, clip)
    both = threading.Barrier(2, timeout=20)
    seen = []

    def wait(*arguments):
        seen.append(threading.get_ident())
        if len(seen) > 2:  # the first passes of a run are watched, and take turns
            both.wait()

    hook = model.model.diffusion_model.double_blocks[4].register_forward_hook(wait)
    assert same(sample(model, clip), expected["flux"][0])
    hook.remove()


def test_a_module_that_keeps_something_takes_turns(checkpoints, expected, caplog):
    model, clip = load_pair(checkpoints)
    module, passes = model.model.diffusion_model, []

    def keep(block, arguments, result):
        module.kept = {"last": [result]}
        passes.append(threading.get_ident())

    blocks = [module.double_blocks[0], module.single_blocks[11]]
    hooks = [block.register_forward_hook(keep) for block in blocks]
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert same(sample(model, clip), expected["flux"][0])
    assert len(passes) == 16  # two runs, two steps, two conditionings, two blocks
    assert len({*passes}) > 1
    assert passes[::2] == passes[1::2]  # the beginning and the end of one pass after another
    assert caplog.text.count("Flux keeps something of a pass, and runs one at a time") == 2
    for hook in hooks:
        hook.remove()


def test_one_conditioning_is_relayed(checkpoints, expected):
    model, clip = load_pair(checkpoints)
    wanted = without_guidance(load(checkpoints, "flux", "sim:0,*")[0], clip)
    for _ in range(2):
        with forwards(model) as counts:
            assert torch.equal(without_guidance(model, clip), wanted)
        assert counts == {"sim:0": 2}
        assert same(sample(model, clip), expected["flux"][0])
        assert is_paired(model)


@pytest.mark.parametrize("donor_mode", ["stream", "relay"])
def test_a_control_net(checkpoints, expected, donor_mode):
    one, clip = load(checkpoints, "flux", "sim:0,*")
    wanted = with_control(one, clip)
    assert not same(wanted, expected["flux"][0])
    mm.unload_all_models()
    model, clip = load_pair(checkpoints, donor_mode=donor_mode)
    for _ in range(2):
        with forwards(model) as counts:
            assert same(with_control(model, clip), wanted.cpu())
        assert counts["sim:1"] == 2
        assert is_paired(model) == (donor_mode == "relay")


def test_regions(checkpoints):
    model, clip = load_pair(checkpoints)
    wanted = regions(load(checkpoints, "flux", "sim:0,*")[0], clip)
    with forwards(model) as counts:
        assert torch.equal(regions(model, clip), wanted)
    assert counts["sim:0"] == 6  # three conditionings, two steps
    assert is_paired(model)


@pytest.mark.parametrize("raised", [mm.InterruptProcessingException, ZeroDivisionError])
@pytest.mark.parametrize("name", ["double_blocks.0", "double_blocks.4", "single_blocks.11"])
@pytest.mark.parametrize("times", [1, 2])
def test_what_is_raised_in_one_or_both(checkpoints, expected, name, raised, times):
    plain = expected["flux"][0]
    model, clip = load_pair(checkpoints)
    assert same(sample(model, clip), plain)
    before = list(sim.used_bytes)
    left = iter(range(times))

    def fail(*arguments):
        if next(left, None) is not None:
            raise raised

    hook = model.model.diffusion_model.get_submodule(name).register_forward_hook(fail)
    with pytest.raises(raised):
        sample(model, clip)
    hook.remove()
    gc.collect()
    assert sim.used_bytes == before
    assert same(sample(model, clip), plain)
    assert is_paired(model)
    check_memory(model)


@pytest.mark.parametrize("index", [0, 1])
def test_memory_taken_on_one_of_the_devices(checkpoints, expected, monkeypatch, index):
    plain, with_lora, _ = expected["flux"]
    model, clip = load_pair(checkpoints)
    assert same(sample(model, clip), plain)
    device = torch.device(DEVICES[index])
    with monkeypatch.context() as patches:
        taken = 5 * MIB
        limit(patches, index, sim.used_bytes[index] + INFERENCE_BYTES - taken)
        mm.free_memory(mm.get_free_memory(device) + taken, device)
        assert same(sample(model, clip), plain)
        placed = model._shared.placed
        assert placed.plan.evicted if index == 0 else placed.bytes_on(device) < placed.slab_bytes_planned_on(device)
        assert same(sample(lora_for(model), clip), with_lora)
    assert same(sample(model, clip), plain)
    check_memory(model)


def add_hook(model):
    hooked, hooks = with_hook(model)
    return hooked, {"hooks": hooks}


def add_block_patch(model):
    patched = model.clone()
    patched.set_model_patch(lambda arguments: arguments, "double_block")
    return patched, {}


def add_block_replacement(model):
    patched = model.clone()
    patched.set_model_patch_replace(
        lambda arguments, extra: extra["original_block"](arguments), "dit", "double_block", 1
    )
    return patched, {}


def add_attention(model):
    patched = model.clone()
    options = patched.model_options["transformer_options"]
    options["optimized_attention_override"] = lambda attention, *arguments, **given: attention(*arguments, **given)
    return patched, {}


def add_wrapper(model):
    patched = model.clone()
    patched.add_wrapper("diffusion_model", lambda executor, *arguments, **options: executor(*arguments, **options))
    return patched, {}


def add_object_patch(model):
    patched = model.clone()
    patched.add_object_patch("diffusion_model.patch_size", model.model.diffusion_model.patch_size)
    return patched, {}


@pytest.mark.parametrize(
    "change", [add_hook, add_block_patch, add_block_replacement, add_attention, add_wrapper, add_object_patch]
)
def test_what_is_there_for_its_own_device_runs_in_copies(checkpoints, expected, change):
    model, clip = load_pair(checkpoints)
    plain, _, with_hooks = expected["flux"]
    changed, options = change(model)
    for _ in range(2):
        assert same(sample(changed, clip, **options), with_hooks if options else plain)
        assert not is_paired(model)
        assert same(sample(model, clip), plain)
        assert is_paired(model)


@pytest.mark.parametrize(
    ("text", "mode"),
    [("sim:0,50%;sim:1,50%", "stream"), ("sim:0,50%;sim:1,40%;cpu,10%", "relay"), ("sim:1,*", "relay")],
)
def test_what_cannot_be_a_pair(checkpoints, expected, text, mode):
    model, clip = load_pair(checkpoints, text=text, donor_mode=mode)
    assert same(sample(model, clip), expected["flux"][0])
    assert model.pair_plan is None
    assert model._shared.placed is model.distribution


@pytest.mark.parametrize(("part", "becomes_pair"), [(0.3, False), (0.4, True)])
def test_with_auto_once_copies_have_waited_for_weights(checkpoints, expected, monkeypatch, part, becomes_pair):
    monkeypatch.setattr(Timing, "waiting_part", lambda self: part)
    model, clip = load_pair(checkpoints, donor_mode="auto")
    sample(model, clip, steps=4)
    assert not is_paired(model)
    for _ in range(2):
        assert same(sample(model, clip), expected["flux"][0])
        assert is_paired(model) == becomes_pair
    mm.unload_all_models()
    assert same(sample(lora_for(model), clip), expected["flux"][1])
    assert is_paired(model) == becomes_pair


def test_with_auto_packing_is_tried_first(checkpoints, expected, monkeypatch):
    monkeypatch.setattr(Timing, "waiting_part", lambda self: 0.5)
    model, clip = load_pair(checkpoints, donor_mode="auto")
    with monkeypatch.context() as patches:
        patches.setattr(Distribution, "may_start_packing", True)
        for _ in range(2):
            sample(model, clip, steps=4)
            assert not is_paired(model)
    sample(model, clip)
    assert is_paired(model)


def test_a_little_memory_is_freed_between_two_runs(checkpoints, expected):
    model, clip = load_pair(checkpoints)
    sample(model, clip)
    before = list(sim.used_bytes)
    mm.free_memory(mm.get_free_memory(torch.device("sim:0")) + 2 * MIB, torch.device("sim:0"))
    assert before[0] - 8 * MIB < sim.used_bytes[0] < before[0]
    assert sim.used_bytes[1] == before[1]
    assert same(sample(model, clip), expected["flux"][0])
    check_memory(model)


def test_units_that_stay_at_home_are_streamed_for_one_thread_at_a_time(checkpoints, expected):
    model, clip = load_pair(checkpoints)
    sample(model, clip)
    for unit in model.distribution.relay.units[::2]:
        unit.stays_at_home = True
    for _ in range(3):
        assert same(sample(model, clip), expected["flux"][0])
    assert any(unit.stays_at_home for unit in model.distribution.relay.units)
    assert model.distribution.relay.streamer.staging.nbytes


def test_a_thread_that_is_left_behind_is_waited_for(checkpoints, expected, monkeypatch):
    model, clip = load_pair(checkpoints)
    sample(model, clip)
    failed, ended, threads, left = threading.Event(), [], [], iter([ZeroDivisionError])

    def fail_or_wait(*arguments):
        if error := next(left, None):
            failed.set()
            raise error
        failed.wait(20)
        time.sleep(0.5)
        ended.append(threading.get_ident())

    def shut_down(pool):
        """As ComfyUI's, which waits for 5 s at most."""
        threads.extend(pool._workers)
        for queue in pool._work_queues.values():
            queue.put(None)

    hook = model.model.diffusion_model.single_blocks[11].register_forward_hook(fail_or_wait)
    with monkeypatch.context() as patches, pytest.raises(ZeroDivisionError):
        patches.setattr(comfy.multigpu.MultiGPUThreadPool, "shutdown", shut_down)
        sample(model, clip)
    assert len(ended) == 1
    hook.remove()
    for thread in threads:  # with what they hold: ComfyUI unloads models while it goes through its list of them
        thread.join()
    assert same(sample(model, clip), expected["flux"][0])


def test_a_pair_goes_with_its_last_patcher(checkpoints):
    model, clip = load_pair(checkpoints)
    sample(model, clip)
    module = weakref.ref(model.model)
    gc.collect()
    gc.disable()
    try:
        del model
        assert module() is None
        assert not any(sim.used_bytes)
    finally:
        gc.enable()


def test_numbers_that_are_equal_are_the_same():
    """Of writes to a tensor, which are other objects each time from 257 on."""
    with torch.inference_mode(False), torch.no_grad():
        module = torch.nn.Linear(2, 2)
        for _ in range(300):
            module.weight.add_(1)
        lists = [_held_by(module), _held_by(module)]
        assert all(map(_is_same, *lists))
        module.weight.add_(1)
        assert not all(map(_is_same, lists[0], _held_by(module)))
