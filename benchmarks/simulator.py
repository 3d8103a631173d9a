"""How long a step takes with streamed weights or with relayed units, forecast from how long its parts take. Pure:
numbers only.

For streaming the real `Schedule` is run against two clocks, that of the compute device and that of the link. As the
engine does it, a copy starts when the one before it is done and the compute device has done what it had been given when
the copy was submitted; a layer starts when its group has arrived.

For relay every device has a clock, and each way between home and a donor. A unit starts when its device is free and
what it is given has arrived; home waits for what the units on donors make.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distorch2.planning.schedule import Schedule

_PASSES = 4  # one to learn the order, one to fill the staging buffer, and two to agree


@dataclass(frozen=True)
class LayerTime:
    """Seconds of the compute device in the layer's forward, and from its end to the next streamed layer. Where several
    layers were measured together, as `layer_times.py` does, the first has the time of all."""

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


@dataclass(frozen=True)
class UnitCall:
    """A unit runs once: bytes of the tensors that it is given and makes, by number. A tensor that is written to has
    another number then.

    Seconds: `inside_s` of the unit itself; `after_s` of home from there to the next call, or to the end of the step;
    `before_s` of home before the call, for the first one.
    """

    unit: str
    given: Mapping[int, int]
    made: Mapping[int, int]
    before_s: float = 0.0
    inside_s: float = 0.0
    after_s: float = 0.0


@dataclass(frozen=True)
class RelayForecast:
    """Of all calls: seconds until home is done, and bytes that go to donors and come home."""

    seconds: float
    bytes_sent: int
    bytes_brought: int


def forecast_relay(
    calls: Sequence[UnitCall], donor_of: Mapping[str, str], bytes_per_s: float = float("inf")
) -> RelayForecast:
    """With the units in `donor_of` on these donors and the others at home; `bytes_per_s` each way."""
    home = 0.0
    donors = dict.fromkeys(donor_of.values(), 0.0)
    out, back = dict(donors), dict(donors)
    twins: dict[int, tuple[str, float]] = {}  # tensor -> where it has a twin, and from when
    sent = brought = 0
    for call in calls:
        home += call.before_s
        donor = donor_of.get(call.unit)
        if donor is None:
            home += call.inside_s
        else:
            start = donors[donor]
            for tensor, num_bytes in call.given.items():
                if twins.get(tensor, ("", 0.0))[0] != donor:
                    out[donor] = max(out[donor], home) + num_bytes / bytes_per_s
                    twins[tensor] = donor, out[donor]
                    sent += num_bytes
                start = max(start, twins[tensor][1])
            donors[donor] = start + call.inside_s
            for tensor, num_bytes in call.made.items():
                back[donor] = max(back[donor], donors[donor]) + num_bytes / bytes_per_s
                twins[tensor] = donor, donors[donor]
                brought += num_bytes
                home = max(home, back[donor])
        home += call.after_s
    return RelayForecast(home, sent, brought)


def forecast_pair(calls: Sequence[UnitCall], device_of: Mapping[str, int], bytes_per_s: float = float("inf")) -> float:
    """Seconds until two inputs have been through all calls, on two devices that take turns with them.

    A unit runs on the device `device_of` has for it, the rest of the model on device 0. Of two inputs the one that can
    begin first goes on, and the first where both can. What a unit is given crosses over when the one before it ran on
    the other device. Between two units device 0 has something to do only if the second is given something new.
    """
    parts = [(0, calls[0].before_s if calls else 0.0, 0)]  # of one input: device, seconds, bytes that it is given
    known: set[int] = set()
    for call, following in itertools.zip_longest(calls, calls[1:]):
        device = device_of[call.unit]
        crossing = sum(call.given.values()) if device != parts[-1][0] else 0
        parts.append((device, call.inside_s, crossing))
        known |= {*call.given, *call.made}
        if following is None or not known.issuperset(following.given):
            parts.append((0, call.after_s, 0))
    free, ready, done = [0.0, 0.0], [0.0, 0.0], [0, 0]
    while min(done) < len(parts):
        begins = {}
        for number in (0, 1):
            if done[number] < len(parts):
                device, _, crossing = parts[done[number]]
                begins[number] = max(free[device], ready[number] + crossing / bytes_per_s)
        number = min(begins, key=lambda each: begins[each])
        device, seconds, _ = parts[done[number]]
        free[device] = ready[number] = begins[number] + seconds
        done[number] += 1
    return max(ready)
