"""Relay: units of a model run on the donor that holds their weights, and activations travel instead of weights.

A unit is a module that is called. Its tensor arguments are copied to the donor and its results home; to the rest of the
model it is as if it had run there. What a unit was given or returned is known by identity when it comes to the next
unit, and is not sent again unless it was written meanwhile. So units that follow each other on one donor do not wait
for home. Tensors made in inference mode do not count their writes: those that are sent are made to.

A unit stays at home, where its layers are streamed, while it cannot run on the donor: when ComfyUI has evicted a part
of its weights, or when something runs inside it that has tensors of its own at home (attention patches, weight
functions, injections, or what is only seen when it fails).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch

from .quantised import to_device
from .streaming import Forwards, StreamedGroup, StreamedLayer, Streamer
from .transfer import Crossing, Transfer, on_device

logger = logging.getLogger(__name__)

_OUTSIDE_OF_UNITS = {
    "dit", "double_block", "emb_patch", "forward_timestep_embed_patch", "input_block_patch",
    "input_block_patch_after_skip", "middle_block_after_patch", "noise_refiner", "output_block_patch", "post_input",
}  # fmt: skip
"""Of ComfyUI's patches, those that its models call between units."""
_PLAIN = frozenset({bool, int, float, str, type(None)})
"""Of what units are given, what holds no tensors, and is most of it."""


class RelayedUnit:
    """A module all of whose movable weights lie on `donor`, in slabs; `layers` has the group of each."""

    def __init__(
        self, module: torch.nn.Module, donor: torch.device, layers: Sequence[tuple[StreamedGroup, StreamedLayer]]
    ) -> None:
        # Weak, since the module reaches this object through its own forward.
        self._module = weakref.ref(module)
        self.donor = donor
        self.stays_at_home = False
        self._layers = layers
        self._groups = {group for group, _ in layers}
        self._others: list[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]] | None = None

    @property
    def module(self) -> torch.nn.Module | None:
        return self._module()

    def is_there(self) -> bool:
        """Whether all of its weights are on the donor and the module's own, and nothing at home is to be added."""
        return all(group.slab.device == self.donor for group in self._groups) and all(
            layer.is_alive and layer.is_bound() and not _has_functions(layer.module) for _, layer in self._layers
        )

    def forget_others(self) -> None:
        """Copy what does not lie in slabs anew: it may be written now."""
        self._others = None

    @contextlib.contextmanager
    def others_there(self) -> Iterator[None]:
        """Tensors that cannot be kept on donors (bare parameters, buffers) replaced by copies that are there."""
        if self._others is None or any(tensors.get(name) is not tensor for tensors, name, tensor, _ in self._others):
            self._others = self._copied()
        try:
            for tensors, name, _, copy in self._others:
                tensors[name] = copy
            yield
        finally:
            for tensors, name, original, copy in self._others:
                if tensors.get(name) is copy:
                    tensors[name] = original

    def _copied(self) -> list[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]]:
        in_slabs = {layer.module for _, layer in self._layers}
        copies = []
        for child in cast(torch.nn.Module, self.module).modules():
            if child not in in_slabs:
                for tensors in (child._parameters, child._buffers):
                    for name, tensor in tensors.items():
                        if tensor is not None and tensor.device != self.donor:
                            with torch.inference_mode(False):
                                copies.append((tensors, name, tensor, to_device(tensor, self.donor)))
        return copies


class StreamerOfUnits(Streamer):
    """Streams the layers of relayed units that are called at home, and leaves alone those that are called on a donor.

    It has no staging buffer until one is called at home.
    """

    def __init__(self, groups: Sequence[StreamedGroup], transfer: Transfer, staging_bytes: int) -> None:
        super().__init__(groups, transfer, staging_bytes, is_lazy=True)

    def _serving(self, index: int, layer: StreamedLayer, previous: Callable[..., Any] | None) -> Callable[..., Any]:
        serve, group = super()._serving(index, layer, previous), self._groups[self._group_of[index]]

        def serve_where_called(*arguments: Any, **options: Any) -> Any:
            if _device_of(arguments, options) != group.slab.device:
                return serve(*arguments, **options)
            module = layer.module
            return (previous or type(module).forward.__get__(module))(*arguments, **options)

        return serve_where_called


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


class Relay:
    """Runs units on donors, from `attach` to `detach`.

    `bytes_sent` and `bytes_brought` count what crossed over.
    """

    def __init__(self, home: torch.device, units: Sequence[RelayedUnit], streamer: Streamer) -> None:
        self.units = units
        self.streamer = streamer
        self.is_allowed = True
        """Set it to False to keep all units at home."""
        self.bytes_sent = self.bytes_brought = 0
        self._home = home
        self.crossings = {unit.donor: Crossing(home, unit.donor) for unit in units}
        self._known: dict[int, _Sent] = {}  # by id of the tensor at home
        self._forwards = Forwards()

    def attach(self) -> None:
        self.streamer.attach()
        for unit in self.units:
            if unit.module is not None:
                self._forwards.set(unit.module, functools.partial(self._serving, unit))

    def detach(self) -> None:
        self._forwards.give_back()
        self._known.clear()
        for unit in self.units:
            unit.forget_others()  # object patches may bring others
        self.streamer.detach()

    def forget_copies(self) -> None:
        """Weights are written now. No copy may be under way."""
        self.streamer.forget_staged()
        for unit in self.units:
            unit.forget_others()

    def _serving(self, unit: RelayedUnit, previous: Callable[..., Any] | None) -> Callable[..., Any]:
        def serve(*arguments: Any, **options: Any) -> Any:
            module = cast(torch.nn.Module, unit.module)
            forward = previous or type(module).forward.__get__(module)
            runs_there = (
                self.is_allowed
                and not unit.stays_at_home
                and _device_of(arguments, options) == self._home
                and unit.is_there()
                and not _has_patches_inside((*arguments, *options.values()))
            )
            if runs_there:
                try:
                    return self._run(unit, forward, arguments, options)
                except RuntimeError as error:
                    if "same device" not in str(error):
                        raise
                    # It was given something at home that nobody sees. Nothing there has been written yet.
                    unit.stays_at_home = True
                    logger.warning(
                        "DisTorch2: a %s cannot run on %s and is streamed from there (%s)",
                        type(module).__name__,
                        unit.donor,
                        str(error).splitlines()[0],
                    )
            return forward(*arguments, **options)

        return torch.compiler.disable(serve)

    def _run(self, unit: RelayedUnit, forward: Callable[..., Any], arguments: tuple, options: dict) -> Any:
        visit = _Visit(self, unit.donor)
        with on_device(unit.donor):
            try:
                there, options_there = visit.send((arguments, options))
                with unit.others_there():
                    result = forward(*there, **options_there)
                visit.bring_changes()
                result = visit.bring(result)
                self._copy_home(visit.arriving, unit.donor)
                return result
            finally:
                visit.restore()

    def _send(self, tensor: torch.Tensor, donor: torch.device) -> _Sent:
        known = self._known.get(id(tensor))
        if known is not None and known.home() is tensor and known.twin.device == donor and known.is_equal():
            return known
        self.bytes_sent += tensor.nbytes
        crossing = self.crossings[donor]
        with crossing.leaving(self._home):
            twin = crossing.copy(tensor, donor)
        if tensor.is_inference() and _is_whole(tensor):
            with contextlib.suppress(RuntimeError):  # others refer to it: it is sent again each time
                torch.utils.swap_tensors(tensor, _counting(tensor))
        return self._remember(tensor, twin)

    def _copy_home(self, arriving: Sequence[tuple[torch.Tensor, torch.Tensor]], donor: torch.device) -> None:
        """Pairs of a twin and what is to be equal at home."""
        # Of copies, since the next unit may write to a twin while it is on its way.
        leaving = [twin.clone() for twin, _ in arriving]
        crossing = self.crossings[donor]
        with crossing.leaving(donor):
            for source, (twin, tensor) in zip(leaving, arriving, strict=True):
                self.bytes_brought += source.nbytes
                crossing.copy(source, self._home, into=tensor)
                self._remember(tensor, _counting(twin))

    def _remember(self, tensor: torch.Tensor, twin: torch.Tensor) -> _Sent:
        sent = _Sent(tensor, twin)
        if not tensor.is_inference() and _is_whole(tensor):
            key, known = id(tensor), self._known
            sent.home = weakref.ref(tensor, lambda reference: known.pop(key, None))
            known[key] = sent
        return sent


class _Visit:
    """One run of a unit on its donor: what went there and what takes its place at home."""

    def __init__(self, relay: Relay, donor: torch.device) -> None:
        self._relay, self._donor = relay, donor
        self._sent: dict[int, _Sent] = {}  # by id of the tensor at home
        self._returned: dict[int, torch.Tensor] = {}  # by id of the twin: what to return for it
        self._originals: list[torch.Tensor] = []  # lest their ids be given to others
        self.arriving: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Twins, and the tensors at home that they are to be copied to."""
        self._undo: list[Callable[[], None]] = []
        self._seen: set[int] = set()  # by id: containers, which may hold each other

    def send(self, value: Any) -> Any:
        """`value` with its tensors on the donor. What can be changed (lists, dicts, objects) is changed, until
        `restore`: the unit may write to it."""
        if isinstance(value, torch.Tensor):
            return self._twin(value) if value.device == self._relay._home else value
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
            self._sent[id(tensor)] = sent = self._relay._send(tensor, self._donor)
            self._originals.append(tensor)
            self._returned[id(sent.twin)] = tensor
        return self._sent[id(tensor)].twin

    def bring_changes(self) -> None:
        """What the unit wrote to its arguments is written to them at home."""
        for tensor, sent in zip(self._originals, self._sent.values(), strict=True):
            if sent.is_changed_there():
                self.arriving.append((sent.twin, tensor))

    def bring(self, value: Any) -> Any:
        """`value`, which the unit returned, with its tensors at home."""
        if isinstance(value, torch.Tensor):
            if id(value) not in self._returned and value.device == self._donor:
                with torch.inference_mode(False):
                    tensor = torch.empty_like(value, device=self._relay._home)
                self._returned[id(value)] = tensor
                self.arriving.append((value, tensor))
            return self._returned.get(id(value), value)
        if isinstance(value, (tuple, list)):
            items = [self.bring(item) for item in value]
            return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
        if isinstance(value, dict):
            return {key: self.bring(item) for key, item in value.items()}
        if fields := _field_names(value):
            for name in fields:
                object.__setattr__(value, name, self.bring(getattr(value, name)))
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
    """Names of what a small record holds: of a dataclass, or of an object with slots and nothing beside."""
    if names := _names_of_class(type(value)):  # type: ignore[arg-type]  # a class is hashable
        return [name for name in names if hasattr(value, name)]
    return ()


@functools.lru_cache(maxsize=256)
def _names_of_class(cls: type) -> Sequence[str]:
    if dataclasses.is_dataclass(cls):
        return [field.name for field in dataclasses.fields(cls)]
    slots = vars(cls).get("__slots__", ())
    # Objects with a dict of their own, and what is called, are no records.
    if cls.__dictoffset__ or any("__call__" in vars(base) for base in cls.__mro__):
        return ()
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _device_of(arguments: Sequence[Any], options: Mapping[str, Any]) -> torch.device | None:
    """That of the first tensor, also of one inside a tuple, since some units take their streams as one."""
    for value in (*arguments, *options.values()):
        if isinstance(value, torch.Tensor):
            return value.device
        if isinstance(value, (tuple, list)) and value and isinstance(value[0], torch.Tensor):
            return value[0].device
    return None


def _has_patches_inside(values: Sequence[Any]) -> bool:
    """Whether ComfyUI is to run patches inside a unit that is called with these."""
    for value in values:
        if isinstance(value, dict):
            for patches in (value.get("patches"), value.get("patches_replace")):
                if patches and any(found and name not in _OUTSIDE_OF_UNITS for name, found in patches.items()):
                    return True
            if value.get("optimized_attention_override") is not None:
                return True
    return False


def _is_whole(tensor: torch.Tensor) -> bool:
    """Whether nothing else has a part of its memory, as far as can be told: a write to that would not be noticed."""
    is_plain = type(tensor) is torch.Tensor and not tensor.is_conj() and not tensor.is_neg()
    return is_plain and tensor.untyped_storage().nbytes() == tensor.nbytes


def _has_functions(module: Any) -> bool:
    """Of ComfyUI's, which are applied to a weight each time and have tensors of their own."""
    return bool(module.weight_function or module.bias_function)


def _counting(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or one of the same memory, if that does not count its writes."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _writes(tensor: torch.Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
