"""What the benchmark of streaming records of a step, with a clock that ticks with every event."""

import itertools

import comfy.model_management as mm
import pytest
from computing import computing as computing
from computing import expected as expected
from computing import inference_mode as inference_mode
from computing import load, same
from layer_times import recorded_layers
from sampling import sample

pytestmark = pytest.mark.usefixtures("inference_mode", "computing")
KINDS = ("flux", "sd15_blocks")


class Tick:
    def __init__(self, number):
        self.number = number

    def elapsed_time(self, other):
        return 1000.0 * (other.number - self.number)

    def synchronize(self):
        pass


@pytest.mark.parametrize("kind", KINDS)
def test_the_forecast_of_a_recorded_step_takes_as_long_as_the_step(checkpoints, expected, kind):
    model, clip = load(checkpoints, kind, "sim:0,40%;cpu,60%")
    sample(model, clip)
    mm.load_models_gpu([model])
    distribution, ticks = model.distribution, map(Tick, itertools.count())
    with recorded_layers(distribution, lambda: next(ticks)) as recorded:
        latents = sample(model, clip, steps=1)
    assert same(latents, sample(model, clip, steps=1))
    groups = distribution.plan.groups
    assert len(recorded.group_of) == sum(len(group.layers) for group in groups)
    assert {*recorded.group_of} == {*range(len(groups))}
    assert recorded.stall_s == len(groups)  # each is waited for once, which is a tick
    last_tick = next(ticks).number - 1  # that of the end; the first was 0, and each is a second
    computed_s = last_tick - len(groups)
    forecast = recorded.forecast(float("inf"))
    assert (forecast.step_s, forecast.stall_s) == (pytest.approx(computed_s), 0.0)
