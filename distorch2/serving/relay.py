"""Relay: units of a model run on the donor that holds their weights, and activations travel instead of weights.

A unit is a module that is called. Its tensor arguments are copied to the donor and its results home; to the rest of the
model it is as if it had run there (`activations.py` says what is not copied again).

A unit stays at home, where its layers are streamed, while it cannot run on the donor: when ComfyUI has evicted a part
of its weights, when something runs inside it that has tensors of its own at home (attention patches, weight functions,
injections, or what is only seen when it fails), or while gradients are recorded.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch

from ..moving.streams import Turns, on_device, wait_for
from ..moving.transfer import Transfer
from ..weights.quantised import to_device
from ..weights.slab import allocate
from .activations import Activations, Visit
from .forwards import Forwards
from .groups import StoredGroup, StoredLayer
from .streaming import Streamer

logger = logging.getLogger(__name__)

_OUTSIDE_OF_UNITS = {
    "dit", "double_block", "emb_patch", "forward_timestep_embed_patch", "input_block_patch",
    "input_block_patch_after_skip", "middle_block_after_patch", "noise_refiner", "output_block_patch", "post_input",
    "single_block",
}  # fmt: skip
"""Of ComfyUI's patches, those that its models call between units."""


class RelayedUnit:
    """A module all of whose movable weights lie on `donor`, in slabs; `layers` has the group of each."""

    def __init__(
        self, module: torch.nn.Module, donor: torch.device, layers: Sequence[tuple[StoredGroup, StoredLayer]]
    ) -> None:
        # Weak, since the module reaches this object through its own forward.
        self._module = weakref.ref(module)
        self.donor = donor
        self.stays_at_home = False
        self.lock = threading.RLock()
        """Held while a thread gives the unit's work to a device: it changes what the modules hold."""
        self._layers = layers
        self._groups = {group for group, _ in layers}
        self._others: list[tuple[dict[str, Any], str, torch.Tensor, torch.Tensor]] | None = None

    @property
    def module(self) -> torch.nn.Module | None:
        return self._module()

    def is_on_donor(self) -> bool:
        """Whether all of its weights are on the donor and the module's own, and nothing at home is to be added."""
        return all(group.device == self.donor for group in self._groups) and all(
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
            if self._others:
                wait_for(self.donor)  # other threads use them on other streams
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

    def __init__(
        self,
        groups: Sequence[StoredGroup],
        transfer: Transfer,
        staging_bytes: int,
        allocate_later: Callable[[int, torch.device], torch.Tensor] = allocate,
    ) -> None:
        super().__init__(groups, transfer, staging_bytes, allocate_later=allocate_later)

    def _make_forward(self, index: int, layer: StoredLayer, previous: Callable[..., Any] | None) -> Callable[..., Any]:
        serve, group = super()._make_forward(index, layer, previous), self.groups[self._group_of[index]]

        def serve_where_called(*arguments: Any, **options: Any) -> Any:
            if _device_of(arguments, options) != group.device:
                return serve(*arguments, **options)
            module = layer.module
            return (previous or type(module).forward.__get__(module))(*arguments, **options)

        return serve_where_called


class Relay:
    """Runs units on donors, from `attach` to `detach`, but for those that are called while `must_stay_at_home()`."""

    def __init__(
        self,
        home: torch.device,
        units: Sequence[RelayedUnit],
        streamer: Streamer,
        must_stay_at_home: Callable[[], bool] = lambda: False,
    ) -> None:
        self.units = units
        self._must_stay_at_home = must_stay_at_home
        self.streamer = streamer
        self.is_allowed = True
        """Set it to False to keep all units at home."""
        self._activations = Activations(home, self.donors)
        self._of_thread = threading.local()
        self._streaming = Turns()
        """Of units at home: their layers come through one buffer."""
        self._forwards = Forwards("relay")

    @property
    def activations(self) -> Activations:
        """Those of this thread."""
        return getattr(self._of_thread, "activations", self._activations)

    @property
    def donors(self) -> set[torch.device]:
        return {unit.donor for unit in self.units}

    @contextlib.contextmanager
    def crossing_by(self, activations: Activations) -> Iterator[None]:
        """Have this thread's activations cross over in another way than those of other threads."""
        before = vars(self._of_thread).get("activations")
        self._of_thread.activations = activations
        try:
            yield
        finally:
            self._of_thread.activations = before or self._activations

    def attach(self) -> None:
        self.streamer.attach()
        for unit in self.units:
            if unit.module is not None:
                self._forwards.set(unit.module, functools.partial(self._make_forward, unit))

    def detach(self) -> None:
        self._forwards.give_back()
        self._activations.forget()
        for unit in self.units:
            unit.forget_others()  # object patches may bring others
        self.streamer.detach()

    def forget_copies(self) -> None:
        """Weights are written now. No copy may be under way."""
        self.streamer.forget_staged()
        for unit in self.units:
            unit.forget_others()

    def _make_forward(self, unit: RelayedUnit, previous: Callable[..., Any] | None) -> Callable[..., Any]:
        def serve(*arguments: Any, **options: Any) -> Any:
            module = cast(torch.nn.Module, unit.module)
            forward = previous or type(module).forward.__get__(module)
            if _device_of(arguments, options) != self.activations.home:
                return forward(*arguments, **options)
            with unit.lock:
                runs_on_donor = (
                    self.is_allowed
                    and not torch.is_grad_enabled()  # a backward pass does not cross over
                    and not unit.stays_at_home
                    and unit.is_on_donor()
                    and not self._must_stay_at_home()
                    and not _brings_tensors_along((*arguments, *options.values()))
                )
                if runs_on_donor:
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
                with self._streaming.taken((self.activations.home,)):
                    return forward(*arguments, **options)

        return torch.compiler.disable(serve)

    def _run(self, unit: RelayedUnit, forward: Callable[..., Any], arguments: tuple, options: dict) -> Any:
        visit = Visit(self.activations, unit.donor)
        with on_device(unit.donor):
            try:
                on_donor, options_on_donor = visit.send((arguments, options))
                with unit.others_there():
                    result = forward(*on_donor, **options_on_donor)
                return visit.bring_home(result)
            finally:
                visit.restore()


def _device_of(arguments: Sequence[Any], options: Mapping[str, Any]) -> torch.device | None:
    """That of the first tensor, also of one inside a tuple, since some units take their streams as one."""
    for value in (*arguments, *options.values()):
        if isinstance(value, torch.Tensor):
            return value.device
        if isinstance(value, (tuple, list)) and value and isinstance(value[0], torch.Tensor):
            return value[0].device
    return None


def _brings_tensors_along(values: Sequence[Any]) -> bool:
    """Whether something that may have tensors at home runs inside a unit that is called with these.

    ComfyUI's patches may, and so may a function, such as an attention that a node made. ComfyUI's own attention, which
    text encoders hand to their layers, has none.
    """
    for value in values:
        if callable(value) and not isinstance(value, (torch.nn.Module, type)) and not _holds_nothing(value):
            return True
        if isinstance(value, dict):
            for patches in (value.get("patches"), value.get("patches_replace")):
                if patches and any(found and name not in _OUTSIDE_OF_UNITS for name, found in patches.items()):
                    return True
            if value.get("optimized_attention_override") is not None:
                return True
    return False


def _holds_nothing(value: Any, seen: tuple[Any, ...] = ()) -> bool:
    """Whether a function can have no tensor of its own: it has none in what it closes over, nor in its defaults.

    ComfyUI's attention is decorated, so it closes over the function that is decorated, and over itself.
    """
    if value is None or isinstance(value, (bool, int, float, str)) or any(value is each for each in seen):
        return True
    if isinstance(value, types.BuiltinFunctionType):
        return value.__self__ is None or isinstance(value.__self__, (types.ModuleType, type))
    if not isinstance(value, types.FunctionType):
        return False
    try:
        held = [cell.cell_contents for cell in value.__closure__ or ()]
    except ValueError:  # a cell is empty
        return False
    held += [*(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    return all(_holds_nothing(each, (*seen, value)) for each in held)


def _has_functions(module: Any) -> bool:
    """Of ComfyUI's, which are applied to a weight each time and have tensors of their own."""
    return bool(module.weight_function or module.bias_function)
