"""How long a step takes with streamed weights, forecast from how long its parts take. Pure: numbers only.

The real `Schedule` is run against two clocks, that of the compute device and that of the link. As the engine does it,
a copy starts when the one before it is done and the compute device has done what it had been given when the copy was
submitted; a layer starts when its group has arrived.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distorch2.schedule import Schedule

_PASSES = 4  # one to learn the order, one to fill the staging buffer, and two to agree


@dataclass(frozen=True)
class LayerTime:
    """Seconds of the compute device in the layer's forward, and from its end to the next streamed layer."""

    inside_s: float
    after_s: float


@dataclass(frozen=True)
class Forecast:
    """Of one step, in seconds: `stall_s` of `step_s` are spent waiting for weights."""

    step_s: float
    stall_s: float


def forecast(
    group_of: Sequence[int],
    sizes: Sequence[int],
    capacity: int,
    times: Mapping[int, LayerTime],
    bytes_per_s: float,
) -> Forecast:
    """A step in the steady state, with the arguments of `Schedule`, and `times[layer]` in the order of running."""
    schedule = Schedule(group_of, sizes, capacity)
    now = link_free = begun = stalled = 0.0
    arrives: dict[int, float] = {}

    def submit(groups: Sequence[int]) -> None:
        nonlocal link_free
        for group in groups:
            link_free = max(link_free, now) + sizes[group] / bytes_per_s
            arrives[group] = link_free

    for _ in range(_PASSES):
        begun, stalled = now, 0.0
        for layer, time in times.items():
            submit(schedule.enter(layer))
            stalled += max(0.0, arrives[group_of[layer]] - now)
            now = max(now, arrives[group_of[layer]]) + time.inside_s
            submit(schedule.leave(layer))
            now += time.after_s
    return Forecast(now - begun, stalled)
