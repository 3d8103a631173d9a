"""A relayed pair: one module that runs with its own inputs and with those of its copies for other devices.

A copy's thread brings its inputs to the module's device, runs the module, and takes the result back; the copy's own
weights are not needed. While one input is in the units of one device, another is in those of another device: all
devices have work, and each weight lies on one device only. A pair may have more than two devices.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..moving.streams import Turns, on_device, on_stream_for, wait_for
from .activations import Activations, Visit
from .distribution import Distribution
from .forwards import Forwards
from .relay import Relay

logger = logging.getLogger(__name__)


class RelayedPair:
    """While it is `attached`, the forwards of the `copies`, by device, run `module`, which `distribution` serves. The
    module's own passes have to be inside `own_pass`.

    Passes run one at a time where weights are streamed, or where the module keeps something of a pass in itself: the
    first one is watched to find out.
    """

    def __init__(
        self, distribution: Distribution, module: torch.nn.Module, copies: Mapping[torch.device, torch.nn.Module]
    ) -> None:
        self._distribution = distribution
        self._module = module
        self._copies = copies
        self._forwards = Forwards("pair")
        self._own_lane = _Lane(0, distribution, distribution.device)
        self._turns = Turns()
        self._keeps_something: bool | None = None
        """Whether the module held something else after the first pass than before."""
        self._passes = threading.Condition()
        self._num_running = 0
        self._has_ended = False

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """Ends when no pass is under way: after an error, that of another thread may be, and devices may be at work."""
        try:
            for number, (device, copy) in enumerate(self._copies.items(), 1):
                self._forwards.set(copy, functools.partial(self._make_forward, number, device))
            yield
        except BaseException:
            self._end()
            for device in {self._distribution.device, *self._copies}:
                with contextlib.suppress(RuntimeError):  # where it is lost, it has been said
                    wait_for(device)
            raise
        else:
            self._end()

    def _end(self) -> None:
        with self._passes:
            self._has_ended = True
            self._passes.wait_for(lambda: not self._num_running)
        self._forwards.give_back()

    @contextlib.contextmanager
    def own_pass(self) -> Iterator[None]:
        with self._own_lane.entered(), self._a_pass():
            yield

    def _make_forward(
        self, number: int, device: torch.device, previous: Callable[..., Any] | None
    ) -> Callable[..., Any]:
        """For a copy."""
        lane, home = _Lane(number, self._distribution, device), self._distribution.device
        crossing = Activations(device, [home], f"to copy {number}")

        def serve(*arguments: Any, **options: Any) -> Any:
            visit = Visit(crossing, home)
            with lane.entered(), self._a_pass():
                try:
                    arguments, options = visit.send((arguments, options))
                    return visit.bring_home(self._module(*arguments, **options))
                finally:
                    visit.restore()
                    crossing.forget()

        return serve

    @contextlib.contextmanager
    def _a_pass(self) -> Iterator[None]:
        with self._passes:
            if self._has_ended:
                raise RuntimeError("sampling has ended")
            self._num_running += 1
        try:
            with self._in_turn():
                yield
        finally:
            with self._passes:
                self._num_running -= 1
                self._passes.notify_all()

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        if self._keeps_something is False and not self._distribution.serves_one_at_a_time:
            yield
            return
        with self._turns.taken(self._distribution.computing_devices):
            if self._keeps_something is not None:
                yield
                return
            before = _held_by(self._module)
            yield
            after = _held_by(self._module)
            self._keeps_something = len(before) != len(after) or not all(map(_is_same, before, after))
            if self._keeps_something:
                logger.info(
                    "DisTorch2: %s keeps something of a pass, and runs one at a time", type(self._module).__name__
                )


class _Lane:
    """The streams of one thread on all devices, and its way of bringing activations from one to another.

    What is on one stream is done one after another, so threads on the same stream would wait for each other. Lane 0, of
    the module's own thread, goes before the others: two that shared each device equally would arrive at each at the
    same time, and leave the other one idle.
    """

    def __init__(self, number: int, distribution: Distribution, device: torch.device) -> None:
        self._name, self._priority = f"lane {number}", -1 if number == 0 else 0
        self._distribution = distribution
        self._device = device
        self._relay: Relay | None = None
        self._activations: Activations | None = None

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        home, relay = self._distribution.device, self._distribution.relay
        computing = self._distribution.computing_devices
        if self._activations is None or self._relay is not relay:
            self._relay, self._activations = relay, Activations(home, computing - {home}, self._name)
        with contextlib.ExitStack() as stack:
            stack.callback(self._activations.forget)
            for device in computing | {self._device}:
                # At home a copy's stream does not wait for lane 0: the copy's inputs come in order as it is.
                in_order = device != home or self._device == home
                stack.enter_context(on_stream_for(device, self._name, self._priority, in_order))
            stack.enter_context(on_device(home))
            if relay is not None:
                stack.enter_context(relay.crossing_by(self._activations))
            yield


def _held_by(module: torch.nn.Module) -> list[object]:
    """All that the attributes of `module` and those in it hold, up to a few levels deep, and the number of writes to
    each tensor. Two such lists tell whether a pass has changed something."""
    found: list[object] = []
    for child in module.modules():
        _add_held(vars(child), found)
    return found


def _is_same(one: object, other: object) -> bool:
    return one is other or (type(one) is type(other) is int and one == other)


def _add_held(value: object, found: list[object], depth: int = 3) -> None:
    if isinstance(value, torch.Tensor):
        if not value.is_inference():
            found.append(value._version)
        return
    if isinstance(value, dict):
        items = list(value.values())
    elif isinstance(value, (list, tuple, set)):
        items = list(value)
    elif isinstance(value, (torch.nn.Module, type)) or not hasattr(value, "__dict__"):
        return
    else:
        items = list(vars(value).values())
    found += items
    if depth:
        for item in items:
            _add_held(item, found, depth - 1)
