"""What `auto` learns of the machine and of a model's last run: simulated accelerators."""

from dataclasses import replace

import comfy.model_management as mm
import pytest
import torch
from computing import INFERENCE_BYTES, MIB, load, same, sim
from computing import computing as computing
from computing import expected as expected
from computing import inference_mode as inference_mode
from sampling import sample

from allocation_parser import parse_allocation
from distorch2 import knowledge
from distorch2.components import DIFFUSION_MODEL, note_runs, placed_components
from distorch2.planning.automatic import UNKNOWN, Speeds, choose
from distorch2.planning.plan import ComponentRequest
from distorch2.plans import plan_checkpoint
from distorch2.serving.distribution import Distribution

pytestmark = pytest.mark.usefixtures("inference_mode", "computing")
KINDS = ("flux",)
DEVICES = ("cpu", "sim:0", "sim:1", "disk")
AUTO = ComponentRequest("sim:0", parse_allocation("auto", DEVICES))


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch):
    monkeypatch.setattr(knowledge, "_runs", {})


@pytest.fixture
def cards_differ(monkeypatch):
    monkeypatch.setattr(torch.sim, "get_device_name", lambda device: f"simulated accelerator {device}")


def planned(path):
    return plan_checkpoint(path, AUTO, AUTO, "sim:0")[DIFFUSION_MODEL]


def test_what_a_run_needed_beside_weights_stays_free(checkpoints, expected, monkeypatch):
    path = checkpoints("flux")
    model, clip = load(checkpoints, "flux", "sim:0,*")
    assert model.distribution.activation_bytes is None
    mm.load_models_gpu([model])
    sim.peak_bytes[:] = sim.used_bytes  # of tests before
    assert same(sample(model, clip), expected["flux"])
    # The peak is of this run; weights and buffers do not count.
    needed = model.distribution.activation_bytes
    assert 64 * 1024 < needed < sim.peak_bytes[0] - model.distribution.plan.compute_bytes + 64 * 1024
    assert placed_components((path,), {DIFFUSION_MODEL: "sim:1"}) == {}
    monkeypatch.setattr(sim, "capacity_bytes", [int(0.7 * model.model_size()) + INFERENCE_BYTES, 40 * MIB])
    layers = model.layers_of(model.model)
    before = planned(path)
    monkeypatch.setattr(Distribution, "activation_bytes", INFERENCE_BYTES + 10 * MIB)
    planned(path)  # which notes that
    model.detach()
    del model, clip
    mm.unload_all_models()
    after = planned(path)  # and it is still known
    largest = max(layer.num_bytes for layer in layers)
    for device in ("sim:0", "sim:1"):  # the other one computes, too
        most = sim.capacity_bytes[int(device[-1])] - INFERENCE_BYTES - 10 * MIB
        assert after.bytes_on(device) <= most < before.bytes_on(device) + 2 * largest
    assert after.bytes_on("cpu") > before.bytes_on("cpu") + 5 * MIB


def test_what_comfyui_leaves_free_in_any_case_is_not_left_twice():
    memory = {device: knowledge.DeviceMemory(10**9, 10**8) for device in DEVICES}
    run = knowledge.Run(INFERENCE_BYTES // 2, None, {}, 10**6)
    assert knowledge.memory_beside_activations(AUTO, memory, run) == memory


def test_cards_that_differ_are_measured_if_both_are_needed(checkpoints, monkeypatch, cards_differ):
    path, measured = checkpoints("flux"), []
    speeds = {"sim:0": 4e12, "sim:1": 4e12}

    def multiplications(device, may_measure):
        measured.append(device)
        return speeds[device]

    monkeypatch.setattr(knowledge, "multiplications_per_second", multiplications)
    model_bytes = planned(path).model_bytes
    assert measured == []  # there is room on the compute device
    monkeypatch.setattr(sim, "capacity_bytes", [model_bytes // 2 + INFERENCE_BYTES, 1024 * MIB])
    assert planned(path).devices == ("sim:0", "sim:1")
    assert set(measured) == {"sim:0", "sim:1"}
    monkeypatch.setattr(knowledge, "bytes_per_second", lambda *arguments: 1e12)
    speeds["sim:1"] = 4e11  # and copies are hidden
    assert planned(path).devices == ("sim:0", "cpu")
    measured.clear()
    monkeypatch.setattr(torch.sim, "get_device_name", lambda device: "the same")
    assert planned(path).devices == ("sim:0", "sim:1")
    assert measured == []


def test_the_time_of_a_step_is_taken_without_those_that_relayed(checkpoints, monkeypatch, cards_differ):
    path = checkpoints("flux")
    model, clip = load(checkpoints, "flux", "sim:0,50%;sim:1,50%", "auto")
    sample(model, clip)
    monkeypatch.setattr(Distribution, "computing_seconds", 2.0)
    note_runs()
    run = knowledge.last_run((DIFFUSION_MODEL, (path,)), "sim:0")
    measured = {"sim:0": 3e9, "sim:1": 1e9}
    monkeypatch.setattr(knowledge, "multiplications_per_second", lambda device, _: measured[device])
    memory = {device: knowledge.DeviceMemory(10**9, 10**5) for device in DEVICES}
    found = knowledge.speeds_for(AUTO, run.model_bytes, memory, run, True, True)
    # Half of it took three times as long.
    assert found.step_s == pytest.approx(1.0, rel=0.05)


def test_what_cannot_or_need_not_be_measured_is_not_known(monkeypatch, cards_differ):
    asked = []
    monkeypatch.setattr(knowledge, "multiplications_per_second", lambda device, _: {"sim:0": 5.0}.get(device))
    monkeypatch.setattr(knowledge, "bytes_per_second", lambda *arguments: None)
    memory = {device: knowledge.DeviceMemory(10**9, 10**5) for device in DEVICES}
    found = knowledge.speeds_for(AUTO, 10**6, memory, None, True, True)
    assert found == Speeds({}, {"sim:0": 5.0})
    monkeypatch.setattr(knowledge, "multiplications_per_second", lambda device, may_measure: asked.append(may_measure))
    monkeypatch.setattr(knowledge, "is_started", lambda device: False)
    knowledge.speeds_for(AUTO, 10**6, memory, None, False, True)
    assert asked == [False, False]  # a preview does not begin to use a card
    knowledge.speeds_for(AUTO, 10**6, memory, None, True, True)
    assert asked[2:] == [True, True]
    monkeypatch.setattr(knowledge, "multiplications_per_second", None)
    monkeypatch.setattr(knowledge, "bytes_per_second", None)
    there_is_room = {**memory, "sim:0": knowledge.DeviceMemory(10**9, 10**6)}
    assert knowledge.speeds_for(AUTO, 10**6, there_is_room, None, True, True) == UNKNOWN
    alone = {device: room for device, room in memory.items() if device != "sim:1"}
    for_one = replace(AUTO, allocation=parse_allocation("auto", tuple(alone)))
    assert knowledge.speeds_for(for_one, 10**6, alone, None, True, True) == UNKNOWN
    monkeypatch.setattr(torch.sim, "get_device_name", lambda device: "the same")
    assert knowledge.speeds_for(AUTO, 10**6, memory, None, True, True) == UNKNOWN


@pytest.mark.parametrize(("donor_mode", "can_compute"), [("stream", True), ("auto", False)])
def test_links_are_looked_at_where_a_card_only_keeps_weights(monkeypatch, donor_mode, can_compute):
    speeds, asked = {"cpu": 20e9, "sim:1": 10e9}, []

    def bytes_per_second(source, target, may_measure):
        asked.append(may_measure)
        return speeds[source]

    monkeypatch.setattr(knowledge, "bytes_per_second", bytes_per_second)
    memory = {device: knowledge.DeviceMemory(10**9, 10**5) for device in DEVICES}
    memory["sim:1"] = replace(memory["sim:1"], can_compute=can_compute)
    request = replace(AUTO, donor_mode=donor_mode)

    def chosen():
        found = knowledge.speeds_for(request, 10**6, memory, None, False, True)
        return choose(10**6, request, memory, found).num_bytes

    assert chosen() == {"sim:0": 10**5, "cpu": 9 * 10**5}  # copies from there would take twice as long
    speeds["sim:1"] = 40e9
    assert chosen() == {"sim:0": 10**5, "sim:1": 10**5, "cpu": 8 * 10**5}
    assert all(asked)
    asked.clear()
    monkeypatch.setattr(knowledge, "is_started", lambda device: device.index == 0)
    chosen()
    assert asked == [False, False]  # a preview does not begin to use a card
    asked.clear()
    memory["sim:1"] = replace(memory["sim:1"], free_bytes=0)
    assert chosen() == {"sim:0": 10**5, "cpu": 9 * 10**5}
    assert asked == []


def test_links_are_looked_at_where_they_decide_which_card_computes(monkeypatch):
    speeds = {"cpu": 20e9, "sim:1": 3e9, "sim:2": 20e9}
    monkeypatch.setattr(knowledge, "bytes_per_second", lambda source, *_: speeds[source])
    monkeypatch.setattr(knowledge, "multiplications_per_second", None)  # all are the same
    devices = (*DEVICES, "sim:2")
    memory = {device: knowledge.DeviceMemory(10**9, 10**5) for device in devices}
    request = replace(AUTO, allocation=parse_allocation("auto", devices))
    found = knowledge.speeds_for(request, 250_000, memory, None, True, True)
    assert choose(250_000, request, memory, found).num_bytes == {"sim:0": 10**5, "sim:2": 10**5, "sim:1": 50_000}
