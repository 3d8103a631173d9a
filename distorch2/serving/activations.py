"""Activations that travel between home, the compute device, and the donors that units run on.

What a unit was given or returned is known by identity when it comes to the next unit, and is not sent again unless it
was written meanwhile. So units that follow each other on one donor do not wait for home. Tensors made in inference mode
do not count their writes: those that are sent are made to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from ..moving.crossing import Crossing

_PLAIN = frozenset({bool, int, float, str, type(None)})
"""Types of what holds no tensors: most of what units are given."""


class _Sent:
    """A tensor at home and its twin on a donor, with the counts of writes at which they were equal."""

    def __init__(self, home: torch.Tensor, twin: torch.Tensor) -> None:
        self.home = weakref.ref(home)
        self.twin = twin
        self._writes = (_writes(home), twin._version)

    def is_equal(self) -> bool:
        home = self.home()
        return home is not None and self._writes == (_writes(home), self.twin._version)

    def is_changed_there(self) -> bool:
        return self.twin._version != self._writes[1]


class Activations:
    """Which tensors are equal at home and on a donor, and the copies between them.

    `bytes_sent` and `bytes_brought` count what crossed over. Those that are not to wait for each other have different
    `lane`s.
    """

    def __init__(self, home: torch.device, donors: Iterable[torch.device], lane: str = "") -> None:
        self.home = home
        self.crossings = {donor: Crossing(home, donor, lane) for donor in donors}
        self.bytes_sent = self.bytes_brought = 0
        self._known: dict[int, _Sent] = {}  # by id of the tensor at home

    def forget(self) -> None:
        """From now on every tensor is sent, also one that was before."""
        self._known.clear()

    def send(self, tensor: torch.Tensor, donor: torch.device) -> _Sent:
        """A tensor at home, with a twin on `donor` that is equal."""
        known = self._known.get(id(tensor))
        if known is not None and known.home() is tensor and known.twin.device == donor and known.is_equal():
            return known
        self.bytes_sent += tensor.nbytes
        crossing = self.crossings[donor]
        with crossing.leaving(self.home):
            twin = crossing.copy(tensor, donor)
        if tensor.is_inference() and _is_whole(tensor):
            with contextlib.suppress(RuntimeError):  # others refer to it: it is sent again each time
                torch.utils.swap_tensors(tensor, _counting(tensor))
        return self._remember(tensor, twin)

    def copy_home(self, arriving: Sequence[tuple[torch.Tensor, torch.Tensor]], donor: torch.device) -> None:
        """Pairs of a twin and what is to be equal at home."""
        # Of copies, since the next unit may write to a twin while it is on its way.
        leaving = [twin.clone() for twin, _ in arriving]
        crossing = self.crossings[donor]
        with crossing.leaving(donor):
            for source, (twin, tensor) in zip(leaving, arriving, strict=True):
                self.bytes_brought += source.nbytes
                crossing.copy(source, self.home, into=tensor)
                self._remember(tensor, _counting(twin))

    def _remember(self, tensor: torch.Tensor, twin: torch.Tensor) -> _Sent:
        sent = _Sent(tensor, twin)
        if not tensor.is_inference() and _is_whole(tensor):
            key, known = id(tensor), self._known
            sent.home = weakref.ref(tensor, lambda reference: known.pop(key, None))
            known[key] = sent
        return sent


class Visit:
    """One run of a unit on its donor: what went there and what takes its place at home."""

    def __init__(self, activations: Activations, donor: torch.device) -> None:
        self._activations, self._donor = activations, donor
        self._sent: dict[int, _Sent] = {}  # by id of the tensor at home
        self._returned: dict[int, torch.Tensor] = {}  # by id of the twin: what to return for it
        self._originals: list[torch.Tensor] = []  # lest their ids be given to others
        self._arriving: list[tuple[torch.Tensor, torch.Tensor]] = []  # twins, and what is to be equal at home
        self._undo: list[Callable[[], None]] = []
        self._seen: set[int] = set()  # by id: containers, which may hold each other

    def send(self, value: Any) -> Any:
        """`value` with its tensors on the donor. What can be changed (lists, dicts, objects) is changed, until
        `restore`: the unit may write to it."""
        if isinstance(value, torch.Tensor):
            return self._twin(value) if value.device == self._activations.home else value
        if isinstance(value, tuple):
            items = [self.send(item) for item in value]
            if all(item is old for item, old in zip(items, value)):
                return value
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        if id(value) in self._seen:
            return value
        if isinstance(value, list):
            self._seen.add(id(value))
            self._send_items(value, list(enumerate(value)))
        elif isinstance(value, dict):
            self._seen.add(id(value))
            self._send_items(value, list(value.items()))
        elif fields := _field_names(value):
            self._seen.add(id(value))
            self._send_fields(value, fields)
        return value

    def _send_items(self, container: Any, items: list[tuple[Any, Any]]) -> None:
        for key, old in items:
            if type(old) in _PLAIN:
                continue
            new = self.send(old)
            if new is not old:
                container[key] = new
                self._undo.append(functools.partial(_put_back, container, key, new, old))

    def _send_fields(self, value: Any, names: Sequence[str]) -> None:
        for name in names:
            old = getattr(value, name)
            new = self.send(old)
            if new is not old:
                object.__setattr__(value, name, new)
                self._undo.append(functools.partial(object.__setattr__, value, name, old))

    def _twin(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in self._sent:
            self._sent[id(tensor)] = sent = self._activations.send(tensor, self._donor)
            self._originals.append(tensor)
            self._returned[id(sent.twin)] = tensor
        return self._sent[id(tensor)].twin

    def bring_home(self, result: Any) -> Any:
        """`result`, which the unit returned, with its tensors at home. What it wrote to its arguments is written to
        them there too."""
        for tensor, sent in zip(self._originals, self._sent.values(), strict=True):
            if sent.is_changed_there():
                self._arriving.append((sent.twin, tensor))
        result = self._brought(result)
        self._activations.copy_home(self._arriving, self._donor)
        return result

    def _brought(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in self._returned and value.device == self._donor:
                with torch.inference_mode(False):
                    tensor = torch.empty_like(value, device=self._activations.home)
                self._returned[id(value)] = tensor
                self._arriving.append((value, tensor))
            return self._returned.get(id(value), value)
        if isinstance(value, (tuple, list)):
            items = [self._brought(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, dict):
            return {key: self._brought(item) for key, item in value.items()}
        if fields := _field_names(value):
            for name in fields:
                object.__setattr__(value, name, self._brought(getattr(value, name)))
        return value

    def restore(self) -> None:
        while self._undo:
            self._undo.pop()()


def _put_back(container: Any, key: Any, new: Any, old: Any) -> None:
    """Unless the unit has put something else there."""
    try:
        is_as_it_was = container[key] is new
    except (IndexError, KeyError):
        return
    if is_as_it_was:
        container[key] = old


def _field_names(value: Any) -> Sequence[str]:
    """Names of what a small record holds."""
    return [name for name in _names_of_class(type(value)) if hasattr(value, name)]  # type: ignore[arg-type]


@functools.lru_cache(maxsize=256)
def _names_of_class(cls: type) -> Sequence[str]:
    """Fields of a dataclass, or slots of a class whose objects have nothing beside and are not called."""
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls)]
    slots = vars(cls).get("__slots__", ())
    if cls.__dictoffset__ or any("__call__" in vars(base) for base in cls.__mro__):
        return ()
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether nothing else has a part of its memory, as far as can be told: a write to that would not be noticed."""
    is_plain = type(tensor) is torch.Tensor and not tensor.is_conj() and not tensor.is_neg()
    return is_plain and tensor.untyped_storage().nbytes() == tensor.nbytes


def _counting(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or one of the same memory, if that does not count its writes."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _writes(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
