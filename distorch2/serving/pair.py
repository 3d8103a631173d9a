"""A module that is relayed with several inputs at the same time: its own, and those of its copies for other devices.

A copy's inputs are brought to the module's device and the results to the copy's; the copy's own weights are not needed.
While the units of one thread run on one device, those of another thread run on another: every device has work, and all
weights lie somewhere once.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import operator
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..moving.streams import on_device, on_stream_for
from .activations import Activations, Visit
from .distribution import Distribution
from .forwards import Forwards
from .relay import Relay

logger = logging.getLogger(__name__)

_keeps_nothing: weakref.WeakKeyDictionary[torch.nn.Module, bool] = weakref.WeakKeyDictionary()
"""Whether a module holds the same after a pass as before, once a pass has been watched."""


class RelayedPair:
    """Runs `module`, which `distribution` serves, for itself and its `copies` by device, while it is `attached`.

    Where two passes at the same time would disturb each other, they take turns. A module might keep something of a pass
    in itself: its first is watched.
    """

    def __init__(
        self, distribution: Distribution, module: torch.nn.Module, copies: Mapping[torch.device, torch.nn.Module]
    ) -> None:
        self._distribution = distribution
        self._module = module
        self._copies = copies
        self._forwards = Forwards("pair")
        self._turn = threading.Lock()

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        try:
            self._forwards.set(self._module, self._make_own)
            for number, (device, copy) in enumerate(self._copies.items(), 1):
                self._forwards.set(copy, functools.partial(self._make_for_copy, device, number))
            yield
        finally:
            self._forwards.give_back()

    def _make_own(self, previous: Callable[..., Any] | None) -> Callable[..., Any]:
        self._run = previous or type(self._module).forward.__get__(self._module)
        lane = _Lane(0, self._distribution, self._distribution.device)

        def serve(*arguments: Any, **options: Any) -> Any:
            with lane.entered(), self._in_turn():
                return self._run(*arguments, **options)

        return serve

    def _make_for_copy(
        self, device: torch.device, number: int, previous: Callable[..., Any] | None
    ) -> Callable[..., Any]:
        lane, home = _Lane(number, self._distribution, device), self._distribution.device
        given = Activations(device, [home], f"to copy {number}")

        def serve(*arguments: Any, **options: Any) -> Any:
            visit = Visit(given, home)
            with lane.entered():
                try:
                    arguments, options = visit.send((arguments, options))
                    with self._in_turn():
                        result = self._run(*arguments, **options)
                    return visit.bring_home(result)
                finally:
                    visit.restore()
                    given.forget()

        return serve

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        if _keeps_nothing.get(self._module) and not self._distribution.serves_one_at_a_time:
            yield
            return
        with self._turn:
            if self._module in _keeps_nothing:
                yield
                return
            before = _held_by(self._module)
            yield
            after = _held_by(self._module)
            _keeps_nothing[self._module] = len(before) == len(after) and all(map(operator.is_, before, after))
            if not _keeps_nothing[self._module]:
                logger.info("DisTorch2: two passes of %s take turns", type(self._module).__name__)


class _Lane:
    """The streams that one thread gives its work to, and its way of bringing activations from device to device.

    What is on one stream is done one after another: on those of another thread it would wait for all that is given
    there. The thread of the module itself, lane 0, has the current stream of the module's device, and only there.
    """

    def __init__(self, number: int, distribution: Distribution, device: torch.device) -> None:
        self._name = f"lane {number}"
        self._distribution = distribution
        self._device = device
        self._relay: Relay | None = None
        self._activations: Activations | None = None

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        home, relay = self._distribution.device, self._distribution.relay
        donors = {unit.donor for unit in relay.units} if relay is not None else set()
        if self._activations is None or self._relay is not relay:
            self._relay, self._activations = relay, Activations(home, donors, self._name)
        with contextlib.ExitStack() as stack:
            stack.callback(self._activations.forget)
            for device in {*donors, self._device} - {home}:
                stack.enter_context(on_stream_for(device, self._name))
            if self._device != home:  # all that is needed there comes with the inputs
                stack.enter_context(on_stream_for(home, self._name, in_order=False))
            stack.enter_context(on_device(home))
            if relay is not None:
                stack.enter_context(relay.crossing_by(self._activations))
            yield


def _held_by(module: torch.nn.Module) -> list[object]:
    """The attributes of all modules in it, and what is in these."""
    found: list[object] = []
    for child in module.modules():
        _add_held(vars(child), found)
    return found


def _add_held(value: object, found: list[object], depth: int = 3) -> None:
    if isinstance(value, dict):
        items = list(value.values())
    elif isinstance(value, (list, tuple, set)):
        items = list(value)
    elif isinstance(value, (torch.nn.Module, torch.Tensor, type)) or not hasattr(value, "__dict__"):
        return
    else:
        items = list(vars(value).values())
    found += items
    if depth:
        for item in items:
            _add_held(item, found, depth - 1)
