"""Streamed weights that are packed: the same bits, in less memory."""

import itertools
import logging

import comfy.cli_args
import comfy.model_management as mm
import comfy.multigpu
import pytest
import test_reading
import torch
from computing import MIB, limit, same, sim
from computing import computing as computing
from computing import expected as expected
from computing import inference_mode as inference_mode
from placing import lora_for, lora_patches, with_hook
from sampling import core_load, output, sample

from allocation_parser import parse_allocation
from distorch2 import plans
from distorch2.comfyui import core
from distorch2.loading import load_checkpoint
from distorch2.moving import unpacking
from distorch2.moving.transfer import Timing
from distorch2.planning import plan
from distorch2.planning.plan import ComponentRequest
from distorch2.serving import packer
from distorch2.serving.groups import StoredGroup, StoredLayer
from distorch2.weights import sources
from distorch2.weights.devices import CPU, DISK
from distorch2.weights.packing import PackedSlab, unpack

KINDS = ("wan_bf16", "wan_fp32", "wan_bf16_deep")
KIND, NOT_PACKED, DEEP = KINDS
FOR_THE_DEFINITION_BYTES = 128 * MIB

pytestmark = [
    pytest.mark.usefixtures("bf16", "inference_mode", "computing", "unpacking_on_sim"),
    pytest.mark.skipif(not sources._MAPPINGS.exists(), reason="which memory is a file is known on Linux only"),
]


@pytest.fixture(scope="module", autouse=True)
def bf16():
    """Weights stay bf16, as on a GPU."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(comfy.cli_args.args, "bf16_unet", True)
        yield


@pytest.fixture
def unpacking_on_sim(monkeypatch):
    monkeypatch.setattr(plans, "reason_against", lambda kind: "")


def load(checkpoints, text, kind=KIND, pack_weights="on"):
    unet = ComponentRequest("sim:0", parse_allocation(text), "stream", pack_weights)
    clip = ComponentRequest("cpu", parse_allocation("cpu,*"))
    return load_checkpoint(checkpoints(kind), unet, clip, "cpu")[:2]


def packed(model):
    return [group for group in model.distribution.groups.values() if isinstance(group.source, PackedSlab)]


def packed_on(model, device="sim:0"):
    return [group for group in packed(model) if str(group.device) == device]


@pytest.mark.parametrize("text", ["cpu,*", "sim:0,50%;cpu,*", "sim:0,30%;sim:1,30%;cpu,*", "sim:0,30%;sim:1,*"])
def test_latents_are_bit_identical(checkpoints, expected, text):
    model, clip = load(checkpoints, text)
    for _ in range(2):
        for _ in range(2):
            assert same(sample(model, clip), expected[KIND])
        groups = packed(model)
        assert len(groups) > 4
        assert 0.69 < sum(each.source.nbytes for each in groups) / sum(each.slab_bytes for each in groups) < 0.73
        assert 0.69 < model.distribution.packed_part < 0.73
        # What ComfyUI is told is what there is, but for what the last step left: less than 1 MiB.
        assert 0 <= sim.used_bytes[0] - model.loaded_size() < MIB
        assert model.distribution.bytes_on(CPU) == sum(
            each.source.nbytes for each in model.distribution.groups.values() if each.device == CPU
        )
        mm.unload_all_models()
        assert not packed(model)


def test_what_is_not_asked_for_or_not_bf16_stays(checkpoints, expected):
    for kind, pack_weights in ((KIND, "off"), (NOT_PACKED, "on")):
        model, clip = load(checkpoints, "cpu,*", kind, pack_weights)
        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(comfy.cli_args.args, "bf16_unet", kind == KIND)
            assert same(sample(model, clip), expected[kind])
        assert not packed(model)


def test_loras_and_hooks(checkpoints):
    core_model, core_clip, _ = core_load(checkpoints(KIND))
    plain = sample(core_model, core_clip)
    with_lora = sample(lora_for(core_model), core_clip)
    hooked, hooks = with_hook(core_model)
    with_hooks = sample(hooked, core_clip, hooks=hooks)
    model, clip = load(checkpoints, "sim:0,20%;cpu,*")
    for _ in range(2):
        assert same(sample(lora_for(model), clip), with_lora)
        number = len(packed(model))
        assert number > 4
        assert same(sample(model, clip), plain)
        assert len(packed(model)) == number
        hooked, hooks = with_hook(model)
        assert same(sample(hooked, clip, hooks=hooks), with_hooks)
        assert not [group for group in model.distribution.groups.values() if group.device == DISK]
        assert same(sample(model, clip), plain)
        assert len(packed(model)) == number
        mm.unload_all_models()
        assert same(sample(hooked, clip, hooks=hooks), with_hooks)


class TestPatched:
    """The weights of a LoRA are in what is packed; the modules have the originals."""

    @pytest.fixture(scope="class")
    def of_core(self, checkpoints):
        """ComfyUI's model and text encoder, on the CPU."""
        return core_load(checkpoints(KIND))[:2]

    def test_loras_that_change_some_weights_of_a_group(self, checkpoints, of_core):
        model, clip = load(checkpoints, "sim:0,20%;cpu,*")
        keys = list(lora_patches(model))
        some, others = keys[::2], keys[1::2]
        for steps in ([(some, 1.0)], [(some, 1.0), (others, 0.5)], [(others, 0.5)], [(keys, 0.7)]):
            latents = []
            for patcher, its_clip in (of_core, (model, clip)):
                patched = patcher.clone()
                for chosen, strength in steps:
                    patched.add_patches({key: lora_patches(patcher)[key] for key in chosen}, strength)
                latents.append(sample(patched, its_clip).cpu())
            assert torch.equal(*latents)
            assert len(packed(model)) > 4

    @pytest.mark.parametrize("text", ["sim:0,20%;cpu,*", "sim:0,20%;sim:1,*"])
    def test_they_stay_when_groups_move(self, checkpoints, of_core, text):
        wanted, plain = sample(lora_for(of_core[0]), of_core[1]), sample(*of_core)
        model, clip = load(checkpoints, text)
        patched = lora_for(model)
        assert same(sample(patched, clip), wanted)
        distribution, size = model.distribution, patched.loaded_size()
        disturbances = [
            lambda: distribution.give_up_host_memory(1e9),
            lambda: patched.partially_unload(CPU, 0.2 * size),
            lambda: patched.partially_load(mm.get_torch_device(), 0.1 * size),
            lambda: [mm.free_memory(1e12, share.load_device) for share in distribution.shares],
            lambda: distribution.place(distribution.plan),
        ]
        for disturb in disturbances:
            disturb()
            assert same(sample(patched, clip), wanted)
            assert len(packed(model)) > 4
        patched.partially_unload(CPU, 0.2 * size)
        assert same(sample(model, clip), plain)
        mm.unload_all_models()
        assert same(sample(model, clip), plain)

    def test_they_are_saved(self, checkpoints, of_core):
        model, clip = load(checkpoints, "sim:0,20%;cpu,*")
        saved = []
        for patcher, its_clip in (of_core, (model, clip)):
            patched = lora_for(patcher)
            sample(patched, its_clip)
            saved.append(patched.model_state_dict_for_saving())
        assert saved[0].keys() == saved[1].keys()
        assert all(torch.equal(value, saved[1][name].to("cpu")) for name, value in saved[0].items())

    def test_packing_starts_while_they_are_in_place(self, checkpoints, of_core, monkeypatch):
        monkeypatch.setattr(plan, "LEAST_TO_PACK_BYTES", 0)
        monkeypatch.setattr(Timing, "waiting_part", lambda self: 0.5)
        wanted, plain = sample(lora_for(of_core[0]), of_core[1]), sample(*of_core)
        model, clip = load(checkpoints, "sim:0,20%;cpu,*", pack_weights="auto")
        sample(lora_for(model), clip, steps=4)
        assert not packed(model)
        assert same(sample(lora_for(model), clip), wanted)
        assert len(packed(model)) > 4
        assert same(sample(model, clip), plain)

    @pytest.mark.parametrize("fails", ["pack", "unpacked"])
    def test_what_there_is_no_memory_for(self, checkpoints, of_core, monkeypatch, fails):
        """A LoRA's weights stay as they are; packed ones are unpacked in main memory."""
        wanted, plain = sample(lora_for(of_core[0]), of_core[1]), sample(*of_core)
        model, clip = load(checkpoints, "sim:0,20%;cpu,*")
        assert same(sample(model, clip), plain)

        def failing(slab, *arguments):
            if slab.device != CPU:
                raise torch.OutOfMemoryError("planted")
            return unpack(slab, *arguments)

        with monkeypatch.context() as patches:
            patches.setattr(*{"pack": (packer, "pack"), "unpacked": (unpacking, "unpack")}[fails], failing)
            assert same(sample(lora_for(model), clip), wanted)
        assert (len(packed(model)) > 4) == (fails == "unpacked")
        assert same(sample(model, clip), plain)
        assert len(packed(model)) > 4

    def test_they_are_computed_with_where_autograd_may_keep_them(self, checkpoints):
        model, _ = load(checkpoints, "cpu,*", "flux")
        patched = lora_for(model)
        wanted = output(patched)
        assert not torch.equal(wanted, output(model))
        output(patched)
        assert len(packed(model)) > 4
        with torch.inference_mode(False), torch.enable_grad():
            assert torch.equal(output(patched), wanted)

    def test_hooks_on_top_of_them_while_another_model_takes_the_memory(self, checkpoints, of_core):
        wanted, plain = sample(lora_for(of_core[0]), of_core[1]), sample(*of_core)
        model, clip = load(checkpoints, "sim:0,20%;sim:1,*")
        hooked, hooks = with_hook(model)
        hooked = lora_for(hooked)
        assert same(sample(hooked, clip), wanted)
        hooked.apply_hooks(hooks)
        (share,) = model.distribution.shares
        mm.free_memory(1e12, share.load_device)
        hooked.unpatch_hooks()
        assert same(sample(hooked, clip), wanted)
        assert same(sample(model, clip), plain)
        mm.unload_all_models()
        assert same(sample(model, clip), plain)

    def test_copies_apart_come_by_way_of_the_host_where_devices_cannot_reach_each_other(self, checkpoints, monkeypatch):
        model, clip = load(checkpoints, "sim:0,20%;sim:1,*")
        sample(lora_for(model), clip)
        streamer, across = model.distribution.streamer, sim.counters["copies_across"]
        for number, layer in enumerate(streamer.layers):
            streamer.copied_apart(number, layer.stored)
        assert sim.counters["copies_across"] == across

    def test_a_donor_without_room_for_them(self, checkpoints, of_core, monkeypatch):
        wanted = sample(lora_for(of_core[0]), of_core[1])
        model, clip = load(checkpoints, "sim:0,20%;sim:1,*")
        sample(model, clip)
        with monkeypatch.context() as patches:
            limit(patches, 1, sim.used_bytes[1] + 4096)
            assert same(sample(lora_for(model), clip), wanted)
        assert packed_on(model, "cpu")

    def test_modules_that_somebody_else_has_moved(self, checkpoints, of_core):
        wanted = sample(lora_for(of_core[0]), of_core[1])
        model, clip = load(checkpoints, "sim:0,20%;cpu,*")
        patched = lora_for(model)
        for _ in range(2):
            assert same(sample(patched, clip), wanted)
            patched.model.diffusion_model.to("sim:0")
        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(mm, "load_models_gpu", lambda *arguments, **options: None)  # it would bring them back
            assert same(sample(patched, clip), wanted)
        assert same(sample(patched, clip), wanted)

    def test_a_weight_that_somebody_else_has_set_is_served(self, checkpoints):
        model, clip = load(checkpoints, "sim:0,20%;cpu,*")
        patched = lora_for(model)
        sample(patched, clip)
        layers = [layer for group in packed(model) for layer in group.layers]
        module = next(layer.module for layer in layers if type(layer.module).__name__ == "Linear")
        module.weight = torch.nn.Parameter(torch.zeros_like(module.weight), requires_grad=False)
        patched.partially_unload(CPU, 0.2 * patched.loaded_size())
        found = [(group, layer) for group in packed(model) for layer in group.layers if layer.module is module]
        ((group, layer),) = found
        assert not layer.views(unpack(group.source))["weight"].any()

    def test_layers_that_are_only_read_have_them_in_the_first_pass(self, checkpoints):
        path = checkpoints("minimax_h3")
        request = ComponentRequest("sim:0", parse_allocation("cpu,*"), "stream", "on")
        model, *_ = load_checkpoint(path, request, ComponentRequest("cpu", parse_allocation("cpu,*")), "cpu")
        generator = torch.Generator().manual_seed(0)
        patched, weights = model.clone(), model.model.state_dict()
        norms = {
            key: torch.randn(weight.shape, generator=generator) for key, weight in weights.items() if "q_norm" in key
        }
        patched.add_patches({key: ("diff", (values,)) for key, values in norms.items()})
        outputs = [test_reading.output(patched) for _ in range(3)]
        assert all(group.source.nbytes for group in packed(model))
        assert model.distribution.reading.only_read
        assert all(test_reading.same(each, outputs[0]) for each in outputs)
        assert not test_reading.same(test_reading.output(model), outputs[0])

    def test_an_interrupt_while_they_are_computed(self, checkpoints, of_core, monkeypatch):
        wanted, plain = sample(lora_for(of_core[0]), of_core[1]), sample(*of_core)
        model, clip = load(checkpoints, "sim:0,20%;cpu,*")
        assert same(sample(model, clip), plain)
        overwrite, calls = StoredLayer.overwrite, itertools.count()

        def interrupted(layer, slab, values):
            if next(calls) == 9:
                raise mm.InterruptProcessingException
            overwrite(layer, slab, values)

        with monkeypatch.context() as patches:
            patches.setattr(StoredLayer, "overwrite", interrupted)
            with pytest.raises(mm.InterruptProcessingException):
                sample(lora_for(model), clip)
        assert same(sample(lora_for(model), clip), wanted)
        assert same(sample(model, clip), plain)


@pytest.fixture
def small_models_too(monkeypatch):
    monkeypatch.setattr(plan, "LEAST_TO_PACK_BYTES", 0)


@pytest.fixture
def waiting(monkeypatch):
    """Sets the part of the time that computing is said to wait for copies, once passes have been timed."""

    return lambda part: monkeypatch.setattr(Timing, "waiting_part", lambda self: part)


@pytest.mark.usefixtures("small_models_too")
class TestAutomatically:
    @pytest.mark.parametrize("text", ["sim:0,20%;cpu,*", "sim:0,20%;sim:1,30%;cpu,*"])
    def test_packed_after_a_run_in_which_computing_waited_for_copies(
        self, checkpoints, expected, waiting, caplog, text
    ):
        waiting(0.25)
        model, clip = load(checkpoints, text, pack_weights="auto")
        sample(model, clip, steps=4)
        assert not packed(model)
        with caplog.at_level(logging.INFO):
            for _ in range(2):
                assert same(sample(model, clip), expected[KIND])
        assert caplog.text.count("has waited 25% of the time for copies of weights, which are packed now") == 1
        assert "are packed to 7" in caplog.text
        assert len(packed(model)) > 4
        assert {group.device.type for group in packed(model)} == ({"cpu", "sim"} if "sim:1" in text else {"cpu"})
        assert 0 <= sim.used_bytes[0] - model.loaded_size() < MIB
        mm.unload_all_models()
        assert same(sample(model, clip), expected[KIND])  # it is known now
        assert len(packed(model)) > 4

    def test_left_as_they_are_when_copies_keep_up(self, checkpoints, waiting):
        waiting(0.04)
        model, clip = load(checkpoints, "sim:0,20%;cpu,*", pack_weights="auto")
        for _ in range(2):
            sample(model, clip, steps=4)
            assert not packed(model)
        waiting(0.5)  # another run says something else
        sample(model, clip, steps=4)
        sample(model, clip)
        assert packed(model)

    def test_short_runs_are_timed_together(self, checkpoints, waiting):
        waiting(0.5)
        model, clip = load(checkpoints, "sim:0,20%;cpu,*", pack_weights="auto")
        for _ in range(2):
            sample(model, clip)
            assert not packed(model)
        sample(model, clip)
        assert packed(model)

    def test_what_has_failed_is_not_tried_again(self, checkpoints, expected, waiting, monkeypatch, caplog):
        waiting(0.5)
        model, clip = load(checkpoints, "sim:0,20%;cpu,*", pack_weights="auto")
        sample(model, clip, steps=4)
        calls = []

        def failing(*arguments):
            calls.append(arguments)
            raise RuntimeError("no compiler")

        monkeypatch.setattr(unpacking.Reference, "decode", failing)
        for _ in range(2):
            assert same(sample(model, clip, steps=4), sample(model, clip, steps=4))
        monkeypatch.undo()
        assert len(calls) == 1
        assert caplog.text.count("weights are not packed (no compiler)") == 1

    def test_packed_before_the_disk_is_used(self, checkpoints, expected, monkeypatch):
        model, clip = load(checkpoints, "cpu,*", pack_weights="auto")
        needed = sum(key.slab_bytes for key in model.distribution.asked.groups)
        monkeypatch.setattr(core, "spare_host_memory", lambda: 0.8 * needed - model.distribution.host_bytes)
        assert same(sample(model, clip), expected[KIND])
        assert len(packed(model)) > 4
        assert not [group for group in model.distribution.groups.values() if group.device == DISK]

    def test_packed_before_the_disk_is_used_for_two_devices_at_once(self, checkpoints, monkeypatch):
        model, clip = load(checkpoints, "cpu,*", pack_weights="auto")
        model = comfy.multigpu.create_multigpu_deepclones(model, 2)
        patchers = [model, *model.get_additional_models_with_key("multigpu")]
        needed = sum(key.slab_bytes for key in model.distribution.asked.groups)

        def used():
            slabs = [group.host_slab for each in patchers for group in each.distribution.groups.values()]
            return sum({slab.data_ptr(): slab.nbytes for slab in slabs if slab is not None}.values())

        monkeypatch.setattr(core, "spare_host_memory", lambda: 0.8 * needed - used())
        sample(model, clip)
        patchers = [model, *model.get_additional_models_with_key("multigpu")]
        assert all(len(packed(patcher)) > 4 for patcher in patchers)
        assert 0.6 * needed < used() < 0.8 * needed

    def test_an_interrupt_while_packing(self, checkpoints, expected, waiting, monkeypatch):
        waiting(0.5)
        model, clip = load(checkpoints, "sim:0,20%;cpu,*", pack_weights="auto")
        serve, calls = StoredGroup.serve_copy, itertools.count()

        def interrupted(group, source):
            if next(calls) == 3:
                raise mm.InterruptProcessingException
            serve(group, source)

        sample(model, clip, steps=4)
        with monkeypatch.context() as patches:
            patches.setattr(StoredGroup, "serve_copy", interrupted)
            with pytest.raises(mm.InterruptProcessingException):
                sample(model, clip)
        assert sim.used_bytes == [0, 0]  # nothing half-loaded stays
        assert same(sample(model, clip), expected[KIND])
        assert len(packed(model)) > 4


@pytest.fixture
def limited():
    """Has the simulated accelerator grant so many bytes to models. Beside them the definition of packing needs room."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(mm, "minimum_inference_memory", lambda: FOR_THE_DEFINITION_BYTES)

        def grant(num_bytes):
            limit(patches, 0, num_bytes + FOR_THE_DEFINITION_BYTES)
            return num_bytes

        yield grant


class TestOnTheComputeDevice:
    @pytest.mark.parametrize("text", ["sim:0,*", "sim:0,70%;cpu,*", "sim:0,70%;sim:1,*"])
    def test_what_has_no_room_is_packed_before_any_leaves(self, checkpoints, expected, limited, caplog, text):
        model, clip = load(checkpoints, text, DEEP)
        asked = model.model_size()
        for part, leaves in ((0.95, False), (0.5, True)):
            mm.unload_all_models()
            granted = limited(asked * part)
            assert same(sample(model, clip), expected[DEEP])
            plan, sizes = model.distribution.plan, [(each.source.nbytes, each.slab_bytes) for each in packed_on(model)]
            assert len(sizes) == len(plan.packed_residents) > 0
            assert bool(plan.evicted) == leaves
            assert {plan.how_served(item) for item in plan.placements} >= {"packed"}
            assert 0 <= sim.used_bytes[0] - model.loaded_size() < MIB
            assert model.loaded_size() <= plan.compute_bytes <= granted
            assert 0.69 < sum(size for size, _ in sizes) / sum(before for _, before in sizes) < 0.76
            caplog.clear()
            assert same(sample(model, clip), expected[DEEP])  # nothing moves when nothing changed
            assert "DisTorch2" not in caplog.text
        limited(2 * asked)
        assert same(sample(model, clip), expected[DEEP])
        assert model.distribution.plan == model.distribution.asked
        mm.unload_all_models()
        assert sim.used_bytes == [0, 0]

    def test_loras_and_hooks(self, checkpoints, limited):
        """What hooks write into is not packed, and leaves instead."""
        core_model, core_clip, _ = core_load(checkpoints(DEEP))
        plain, with_lora = sample(core_model, core_clip), sample(lora_for(core_model), core_clip)
        hooked, hooks = with_hook(core_model)
        with_hooks = sample(hooked, core_clip, hooks=hooks)
        mm.unload_all_models()
        model, clip = load(checkpoints, "sim:0,*", DEEP)
        granted = limited(model.model_size() * 0.95)
        for _ in range(2):
            assert same(sample(model, clip), plain)
            assert packed_on(model)
            assert same(sample(lora_for(model), clip), with_lora)
            assert packed_on(model)
            assert not model.distribution.plan.evicted
            assert model.loaded_size() <= granted
            hooked, hooks = with_hook(model)
            assert same(sample(hooked, clip, hooks=hooks), with_hooks)
            assert model.loaded_size() <= granted
        assert same(sample(model, clip), plain)

    def test_what_cannot_be_packed_lies_in_main_memory(self, checkpoints, expected, limited, monkeypatch):
        monkeypatch.setattr(unpacking.Reference, "decode", lambda self, packed, slab: slab.zero_())
        model, clip = load(checkpoints, "sim:0,*", DEEP)
        granted = limited(model.model_size() * 0.95)
        for _ in range(2):
            assert same(sample(model, clip), expected[DEEP])
            assert model.distribution.plan.packed_residents
            assert not packed(model)
            assert model.loaded_size() <= granted
            assert {group.device for group in model.distribution.groups.values()} == {CPU}

    def test_with_auto_what_has_no_room_leaves_and_is_packed_in_main_memory(
        self, checkpoints, expected, limited, waiting, small_models_too
    ):
        waiting(0.5)
        model, clip = load(checkpoints, "sim:0,*", DEEP, pack_weights="auto")
        granted = limited(model.model_size() * 0.8)
        sample(model, clip, steps=4)
        assert model.distribution.plan.evicted
        assert not packed(model)
        assert same(sample(model, clip), expected[DEEP])
        assert packed(model)
        assert not packed_on(model)
        assert model.loaded_size() <= granted

    def test_memory_taken_back_between_two_steps(self, checkpoints, expected):
        model, clip = load(checkpoints, "sim:0,*", DEEP)
        assert same(sample(model, clip), expected[DEEP])
        size = model.loaded_size()
        assert size == model.model_size()
        for part in (0.95, 0.6):
            model.partially_unload(CPU, model.loaded_size() - part * size)
            assert model.loaded_size() <= part * size
            assert packed_on(model)
            assert same(sample(model, clip), expected[DEEP])


@pytest.mark.parametrize("text", ["cpu,*", "sim:0,*"])
def test_where_nothing_can_be_unpacked_nothing_is_packed(checkpoints, expected, monkeypatch, limited, caplog, text):
    monkeypatch.setattr(plans, "reason_against", lambda kind: "a test says so")
    with caplog.at_level(logging.INFO):
        model, clip = load(checkpoints, text, DEEP)
    assert "weights are not packed for sim:0: a test says so" in caplog.text
    limited(model.model_size() * 0.8)
    assert same(sample(model, clip), expected[DEEP])
    assert not packed(model)
    assert not model.distribution.plan.packed_residents
    assert model.distribution.plan.packed_room_bytes == model.distribution.transfer.packed_room_bytes == 0


def test_given_up_and_taken_again(checkpoints, expected):
    model, clip = load(checkpoints, "sim:0,20%;cpu,*")
    assert same(sample(model, clip), expected[KIND])
    before = model.distribution.host_bytes
    model.distribution.give_up_host_memory(before / 2)
    assert 0.4 < model.distribution.host_bytes / before < 0.6
    assert same(sample(model, clip), expected[KIND])  # there is room in main memory again
    assert model.distribution.host_bytes == before


def test_a_share_on_another_accelerator_is_counted_as_it_is(checkpoints, expected):
    model, clip = load(checkpoints, "sim:0,20%;sim:1,*")
    assert same(sample(model, clip), expected[KIND])
    (share,) = model.distribution.shares
    assert share.loaded_size() == share.model_size() == sim.used_bytes[1]
    mm.free_memory(1e12, share.load_device)
    assert share.loaded_size() == 0
    assert same(sample(model, clip), expected[KIND])


@pytest.mark.parametrize(
    "error", [RuntimeError("no compiler"), torch.OutOfMemoryError("planted"), AssertionError("of a compiler")]
)
def test_what_cannot_be_packed_stays(checkpoints, expected, monkeypatch, caplog, error):
    def failing(*arguments):
        raise type(error)(*error.args)  # a new one, that keeps no frames

    monkeypatch.setattr(unpacking.Reference, "decode", failing)
    model, clip = load(checkpoints, "cpu,*")
    assert same(sample(model, clip), expected[KIND])
    assert not packed(model)
    assert f"weights are not packed ({error})" in caplog.text


def test_bytes_that_do_not_come_back_are_not_served(checkpoints, expected, monkeypatch):
    monkeypatch.setattr(unpacking.Reference, "decode", lambda self, packed, slab: slab.zero_())
    model, clip = load(checkpoints, "cpu,*")
    assert same(sample(model, clip), expected[KIND])
    assert not packed(model)
