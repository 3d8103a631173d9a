"""Streamed weights that are packed: the same bits, in less memory."""

import logging

import comfy.cli_args
import comfy.model_management as mm
import pytest
import torch
from computing import computing as computing
from computing import expected as expected
from computing import inference_mode as inference_mode
from computing import same, sim
from placing import lora_for, with_hook
from sampling import core_load, sample

from allocation_parser import parse_allocation
from distorch2.comfyui import core
from distorch2.loading import load_checkpoint
from distorch2.moving import unpacking
from distorch2.moving.transfer import Timing
from distorch2.planning import plan
from distorch2.planning.plan import ComponentRequest
from distorch2.serving import distribution
from distorch2.serving.stores import Stores
from distorch2.weights import sources
from distorch2.weights.devices import CPU, DISK
from distorch2.weights.packing import PackedSlab

KINDS = ("wan_bf16", "wan_fp32")
KIND, NOT_PACKED = KINDS

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
    monkeypatch.setattr(distribution, "reason_against", lambda kind: "")


def load(checkpoints, text, kind=KIND, pack_weights="on"):
    unet = ComponentRequest("sim:0", parse_allocation(text), "stream", pack_weights)
    clip = ComponentRequest("cpu", parse_allocation("cpu,*"))
    return load_checkpoint(checkpoints(kind), unet, clip, "cpu")[:2]


def packed(model):
    return [group for group in model.distribution.groups.values() if isinstance(group.source, PackedSlab)]


@pytest.mark.parametrize("text", ["cpu,*", "sim:0,50%;cpu,*", "sim:0,30%;sim:1,30%;cpu,*", "sim:0,30%;sim:1,*"])
def test_latents_are_bit_identical(checkpoints, expected, text):
    model, clip = load(checkpoints, text)
    for _ in range(2):
        for _ in range(2):
            assert same(sample(model, clip), expected[KIND])
        groups = packed(model)
        assert len(groups) > 4
        assert 0.69 < sum(each.source.nbytes for each in groups) / sum(each.slab_bytes for each in groups) < 0.73
        # What ComfyUI is told is what there is, but for what the last step left: less than 1 MiB.
        assert 0 <= sim.used_bytes[0] - model.loaded_size() < 1024**2
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
        assert len(packed(model)) < 4
        assert same(sample(model, clip), plain)
        assert len(packed(model)) > 4  # again
        hooked, hooks = with_hook(model)
        assert same(sample(hooked, clip, hooks=hooks), with_hooks)
        assert not [group for group in model.distribution.groups.values() if group.device == DISK]
        assert same(sample(model, clip), plain)
        mm.unload_all_models()


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
    def test_packed_when_computing_waits_for_copies(self, checkpoints, expected, waiting, caplog, text):
        waiting(0.25)
        model, clip = load(checkpoints, text, pack_weights="auto")
        assert same(sample(model, clip), expected[KIND])  # two steps, of which the second is timed
        assert not packed(model)
        with caplog.at_level(logging.INFO):
            assert same(sample(model, clip, steps=4), sample(*core_load(checkpoints(KIND))[:2], steps=4))
        assert caplog.text.count("waits 25% of the time for copies of weights, and has them packed") == 1
        assert "are packed to 7" in caplog.text
        assert len(packed(model)) > 4
        assert {group.device.type for group in packed(model)} == ({"cpu", "sim"} if "sim:1" in text else {"cpu"})
        assert 0 <= sim.used_bytes[0] - model.loaded_size() < 1024**2
        assert same(sample(model, clip), expected[KIND])
        mm.unload_all_models()
        assert same(sample(model, clip), expected[KIND])  # it is known now
        assert len(packed(model)) > 4

    def test_left_as_they_are_when_copies_keep_up(self, checkpoints, waiting):
        waiting(0.04)
        model, clip = load(checkpoints, "sim:0,20%;cpu,*", pack_weights="auto")
        sample(model, clip, steps=4)
        assert not packed(model)

    def test_runs_are_timed_again(self, checkpoints, waiting):
        model, clip = load(checkpoints, "sim:0,20%;cpu,*", pack_weights="auto")
        waiting(0.0)
        sample(model, clip, steps=4)
        assert not packed(model)
        waiting(0.5)
        sample(model, clip, steps=4)
        assert packed(model)

    def test_short_runs_are_timed_together(self, checkpoints, waiting):
        waiting(0.5)
        model, clip = load(checkpoints, "sim:0,20%;cpu,*", pack_weights="auto")
        for _ in range(3):
            assert not packed(model)
            sample(model, clip)
        assert packed(model)

    def test_packed_before_the_disk_is_used(self, checkpoints, expected, monkeypatch):
        model, clip = load(checkpoints, "cpu,*", pack_weights="auto")
        needed = sum(key.slab_bytes for key in model.distribution.asked.groups)
        monkeypatch.setattr(core, "spare_host_memory", lambda: 0.8 * needed - model.distribution.host_bytes)
        assert same(sample(model, clip), expected[KIND])
        assert len(packed(model)) > 4
        assert not [group for group in model.distribution.groups.values() if group.device == DISK]

    def test_an_interrupt_while_packing(self, checkpoints, expected, waiting, monkeypatch):
        waiting(0.5)
        model, clip = load(checkpoints, "sim:0,20%;cpu,*", pack_weights="auto")
        fill = Stores._fill

        def interrupted(stores, modules, *arguments):
            fill(stores, dict(list(modules.items())[:3]), *arguments)
            raise mm.InterruptProcessingException

        sample(model, clip)
        monkeypatch.setattr(Stores, "_fill", interrupted)
        with pytest.raises(mm.InterruptProcessingException):
            sample(model, clip, steps=4)
        monkeypatch.setattr(Stores, "_fill", fill)
        assert len(packed(model)) == 3
        assert same(sample(model, clip), expected[KIND])


def test_small_models_are_left_as_they_are(checkpoints, waiting):
    waiting(0.5)
    model, clip = load(checkpoints, "sim:0,20%;cpu,*", pack_weights="auto")
    sample(model, clip, steps=4)
    assert not packed(model)
    assert model.distribution.plan.packed_room_bytes == 0


def test_where_nothing_can_be_unpacked_no_room_is_taken_for_it(checkpoints, monkeypatch, caplog):
    monkeypatch.setattr(distribution, "reason_against", lambda kind: "a test says so")
    with caplog.at_level(logging.INFO):
        model, clip = load(checkpoints, "cpu,*")
        sample(model, clip)
    assert "weights are not packed for sim:0: a test says so" in caplog.text
    assert not packed(model)
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
