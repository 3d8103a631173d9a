"""How long the layers that a model streams take in one step of it, for `simulator.py`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import simulator

from distorch2.moving.transfer import Copy
from distorch2.serving.distribution import Distribution


@dataclass
class RecordedLayers:
    """The streamed layers in the order in which they ran, which numbers them: `group_of[layer]` is the layer's group,
    `sizes[group]` its bytes in a ring of `staging_bytes`. The device waited for weights for `stall_s`."""

    sizes: Sequence[int]
    staging_bytes: int
    group_of: list[int] = field(default_factory=list)
    times: dict[int, simulator.LayerTime] = field(default_factory=dict)
    stall_s: float = 0.0

    def forecast(self, bytes_per_s: float) -> simulator.Forecast:
        return simulator.forecast(self.group_of, self.sizes, self.staging_bytes, self.times, bytes_per_s)


@contextlib.contextmanager
def recorded_layers(distribution: Distribution, mark: Callable[[], Any]) -> Iterator[RecordedLayers]:
    """Of the one step that runs inside `with`, of a model whose order is learnt; complete at the end of it.

    `mark` records an event that takes the time. There is one only where a group is waited for and where copies are
    started: one at every layer would slow down a model that is bound by the CPU. So the layer at an event gets the time
    until the next event, also that of layers after it.
    """
    groups = [distribution.groups[key] for key in distribution.plan.groups if key.is_streamed]
    number_of = {group.slab.data_ptr(): number for number, group in enumerate(groups)}
    recorded = RecordedLayers([group.slab_bytes for group in groups], distribution.plan.staging_bytes)
    transfer = distribution.transfer
    use, submit = transfer.use, transfer.submit
    spans: list[tuple[str, int, Any]] = []  # what is going on from an event on, for which layer

    def recording_use(copy: Copy) -> None:
        layer = len(recorded.group_of)
        recorded.group_of.append(number_of[copy.source.data_ptr()])
        if copy.is_awaited:
            use(copy)
        else:
            spans.append(("waiting", layer, mark()))
            use(copy)
            spans.append(("inside", layer, mark()))

    def recording_submit(copies: Sequence[Copy]) -> None:
        spans.append(("after", len(recorded.group_of) - 1, mark()))
        submit(copies)

    transfer.use, transfer.submit = recording_use, recording_submit
    begin = mark()
    try:
        yield recorded
    finally:
        end = mark()
        del transfer.use, transfer.submit
    end.synchronize()
    num_layers = len(recorded.group_of)
    seconds = {name: [0.0] * num_layers for name in ("waiting", "inside", "after")}
    spans.insert(0, ("after", -1, begin))  # before the first layer runs what comes after the last one
    ends = [*(event for _, _, event in spans[1:]), end]
    for (name, layer, started), ended in zip(spans, ends, strict=True):
        seconds[name][layer] += started.elapsed_time(ended) / 1000
    layer_times = zip(seconds["inside"], seconds["after"], strict=True)
    recorded.times = {layer: simulator.LayerTime(*times) for layer, times in enumerate(layer_times)}
    recorded.stall_s = sum(seconds["waiting"])
