"""What the benchmark of streaming records of a step, with clocks that do not measure."""

import itertools
import types

import comfy.model_management as mm
import pytest
import torch
from computing import computing as computing
from computing import expected as expected
from computing import inference_mode as inference_mode
from computing import load, same
from layer_times import recorded_layers
from sampling import sample
from simulator import LayerTime

from distorch2.planning.plan import Group

KINDS = ("flux", "sd15_blocks_no_clip")


class Event:
    def __init__(self, seconds):
        self.seconds = seconds

    def elapsed_time(self, other):
        return 1000.0 * (other.seconds - self.seconds)

    def synchronize(self):
        pass


@pytest.mark.quick
def test_time_is_given_to_the_layer_at_the_last_event():
    now = 0.0

    def passes(seconds):
        nonlocal now
        now += seconds

    class Transfer:
        def use(self, copy):
            passes(0.0 if copy.is_awaited else copy.waiting_s)
            copy.is_awaited = True

        def submit(self, copies):
            pass

    slabs = [torch.zeros(1), torch.zeros(1)]
    one, other = (
        types.SimpleNamespace(source=slab, is_awaited=False, waiting_s=waiting_s)
        for slab, waiting_s in zip(slabs, (2.0, 0.5))
    )
    groups = {
        Group(f"group {number}", ()): types.SimpleNamespace(slab=slab, slab_bytes=100 * (number + 1))
        for number, slab in enumerate(slabs)
    }
    plan = types.SimpleNamespace(groups=tuple(groups), staging_bytes=300)
    distribution = types.SimpleNamespace(plan=plan, groups=groups, transfer=Transfer())
    transfer = distribution.transfer
    with recorded_layers(distribution, lambda: Event(now)) as recorded:
        passes(1.0)  # before the first layer
        transfer.use(other)
        passes(4.0)
        transfer.use(other)  # a second layer of the same group
        passes(3.0)
        transfer.submit([one])
        passes(1.5)
        transfer.use(one)
        passes(2.0)
        transfer.submit([other])
        passes(0.5)
    assert (recorded.sizes, recorded.staging_bytes) == ([100, 200], 300)
    assert recorded.group_of == [1, 1, 0]
    assert recorded.times == {
        0: LayerTime(inside_s=4.0 + 3.0, after_s=0.0),
        1: LayerTime(inside_s=0.0, after_s=1.5),
        2: LayerTime(inside_s=2.0, after_s=0.5 + 1.0),
    }
    assert recorded.stall_s == 0.5 + 2.0
    assert not vars(transfer)  # both methods are given back


@pytest.mark.usefixtures("inference_mode", "computing")
@pytest.mark.parametrize("kind", KINDS)
def test_the_forecast_of_a_recorded_step_takes_as_long_as_the_step(checkpoints, expected, kind):
    model, clip = load(checkpoints, kind, "sim:0,40%;cpu,60%")
    sample(model, clip)
    mm.load_models_gpu([model])
    distribution, ticks = model.distribution, map(Event, itertools.count())
    with recorded_layers(distribution, lambda: next(ticks)) as recorded:
        latents = sample(model, clip, steps=1)
    assert same(latents, sample(model, clip, steps=1))
    groups = distribution.plan.groups
    assert len(recorded.group_of) == sum(len(group.layers) for group in groups)
    assert {*recorded.group_of} == {*range(len(groups))}
    assert recorded.stall_s == len(groups)  # each is waited for once, which is a tick
    last_tick = next(ticks).seconds - 1  # that of the end; the first was 0, and each is a second
    computed_s = last_tick - len(groups)
    forecast = recorded.forecast(float("inf"))
    assert (forecast.step_s, forecast.stall_s) == (pytest.approx(computed_s), 0.0)
