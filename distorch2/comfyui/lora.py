"""Patched weights: the originals, what is wanted, computing it where the model computes, and giving it back.

What changes is computed once, from the original, on the compute device, and its bytes are shipped to its place.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..moving.modules import Mover
from ..serving.distribution import Distribution
from ..weights.devices import CPU
from ..weights.quantised import (
    as_parameter,
    carries_patches,
    carry,
    is_gguf,
    is_quantised,
    plain_tensors,
    rebuilder,
    to_device,
)
from . import core
from .core import ModelPatcher, mm
from .patcher_state import Request, Shared
from .sharing import is_shared


class _Backup(NamedTuple):
    """The original of a patched weight. ComfyUI reads the first two fields.

    `patches` are those in the weight that is in place, None where that is not known; `kept_dtype` is the dtype in which
    it is kept, if not that of the original.
    """

    weight: torch.Tensor
    inplace_update: bool
    patches: list[tuple] | None = None
    kept_dtype: torch.dtype | None = None


class WeightPatcher(ModelPatcher):
    """The part of `DistributedPatcher` that changes weights. Keys are names of weights in the model."""

    request: Request

    @property
    def distribution(self) -> Distribution:
        raise NotImplementedError

    @property
    def _shared(self) -> Shared:
        raise NotImplementedError

    def patch_weight_to_device(
        self,
        key: str,
        device_to: torch.device | None = None,
        inplace_update: bool = False,
        return_weight: bool = False,
        force_cast: bool = False,
    ) -> Any:
        """As ComfyUI's, but always from the original weight, since the one in place may be patched already."""
        if carries_patches(self._original(key)):
            if not return_weight:
                self._carry({**self._shared.carried, key: list(self.patches.get(key, ()))})
            return self._original(key)
        if return_weight or key not in self.patches:
            return self._patched(key, self._original(key), device_to, force_cast)
        layer_name, name = split_key(key)
        self.model.current_weight_patches_uuid = None  # those of others may be of another clone
        self.distribution.settle()
        self._back_up(key)
        weight = self._patched(key, self._original(key), device_to, force_cast)
        self.distribution.replace({layer_name: {name: weight}})
        self.distribution.resume()
        return None

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, original_weights, memory_counter) -> None:
        with self._on_compute_device(key):
            super().patch_hook_weight_to_device(hooks, combined_patches, key, original_weights, memory_counter)

    def patch_cached_hook_weights(self, cached_weights, key, memory_counter) -> None:
        with self._on_compute_device(key):
            super().patch_cached_hook_weights(cached_weights, key, memory_counter)

    def unpatch_hooks(self, whitelist_keys_set: set[str] | None = None) -> None:
        before = list(self.hook_backup)
        if before:
            self.distribution.settle()
        super().unpatch_hooks(whitelist_keys_set)
        for key in before:
            if key not in self.hook_backup:
                self.distribution.note_restored(*split_key(key))

    def _patch_weights(self, anew: bool = False) -> None:
        """Bring the weights in place from the patches that they have to those of this clone.

        What changes is computed once, from the original, on the compute device, and its bytes are shipped to its place.
        All of it, if `anew`.
        """
        wanted = {key: list(self.patches[key]) for key in self.patches if self._is_patched_by_comfyui(key)}
        carried = {key: patches for key, patches in wanted.items() if carries_patches(self._original(key))}
        self._carry(carried)
        wanted = {key: patches for key, patches in wanted.items() if key not in carried}
        changed = [
            key
            for key in dict.fromkeys([*self.backup, *wanted])
            if anew or not (key in wanted and self._is_in_place(key, wanted[key]))
        ]
        self._change_weights(changed, wanted)

    def _carry(self, wanted: Mapping[str, list[tuple]]) -> None:
        """Set the patches of the weights that carry them, by key; all others of these lose theirs. No data changes."""
        carried = self._shared.carried
        changed = [key for key in {*carried, *wanted} if not _same(carried.get(key), wanted.get(key))]
        if changed:
            self.model.current_weight_patches_uuid = None
        for key in changed:
            module, name = self._owner(key)
            patches = wanted.get(key)
            carry(getattr(module, name), [(patches, key)] if patches else [])
        self._shared.carried = dict(wanted)

    def _unpatch_weights(self, keys: Collection[str]) -> None:
        self._change_weights(keys, {})

    def _change_weights(self, keys: Collection[str], wanted: Mapping[str, list[tuple]]) -> None:
        """Patch these weights as `wanted` says, each from its original; one that it lacks gets its original back."""
        if not keys:
            return
        self.model.current_weight_patches_uuid = None  # first: what fails in the middle is not taken for patched
        self.distribution.settle()
        by_layer = _by_layer(keys)
        with Mover(self.load_device, self.distribution.pinned) as mover:
            for batch in self.distribution.batches(by_layer):
                if wanted:
                    mm.throw_exception_if_processing_interrupted()
                of_batch = [key for layer_name in batch for key in by_layer[layer_name].values()]
                self._change_batch(of_batch, wanted, mover)

    def _change_batch(self, keys: Sequence[str], wanted: Mapping[str, list[tuple]], mover: Mover) -> None:
        """`_change_weights` for the weights of one group of layers, or of one layer."""
        originals = {key: mover.copied(self._original(key)) for key in keys if key in wanted}
        mover.flush()
        weights: dict[str, dict[str, torch.Tensor]] = {}
        for key in keys:
            layer_name, name = split_key(key)
            if key in wanted:
                weight = self._patched(key, originals.pop(key), self.load_device)
            else:
                weight = self.backup[key].weight
            weights.setdefault(layer_name, {})[name] = weight
            self._back_up(key)
        self.distribution.replace(weights, {split_key(key) for key in keys if key not in wanted})
        for key in keys:
            if key in wanted:
                self.backup[key] = self.backup[key]._replace(patches=wanted[key], kept_dtype=self._kept_dtype(key))
            else:
                del self.backup[key]

    def _is_in_place(self, key: str, patches: list[tuple]) -> bool:
        backup = self.backup.get(key)
        return backup is not None and _same(backup.patches, patches) and backup.kept_dtype == self._kept_dtype(key)

    def _is_patched_by_comfyui(self, key: str) -> bool:
        """Not a buffer, nor a parameter of a module whose children have parameters: those ComfyUI leaves alone."""
        try:
            module, name = self._owner(key)
        except AttributeError:  # of a module that an object patch will bring
            return False
        own = module._parameters
        return name in own and all(child_name in own for child_name, _ in module.named_parameters())

    def _originals(self) -> dict[str, dict[str, torch.Tensor]]:
        """Layer name -> name in it -> the weight as it was, for all that are patched."""
        return {
            layer_name: {name: self.backup[key].weight for name, key in of_layer.items()}
            for layer_name, of_layer in _by_layer(self.backup).items()
        }

    def _forget_patches(self) -> None:
        self._carry({})
        self.model.current_weight_patches_uuid = None
        self.backup.clear()
        for module in self.model.modules():
            if hasattr(module, "comfy_patched_weights"):
                del module.comfy_patched_weights

    def _extra_bytes(self) -> dict[str, int]:
        """Name of a layer -> how much larger its weights are for being kept in the dtype of computation."""
        extra: dict[str, int] = {}
        for key in self.patches:
            dtype = self._kept_dtype(key)
            if dtype is not None:
                original, layer_name = self._original(key), split_key(key)[0]
                num_bytes = sum(part.nbytes for part in plain_tensors(original))
                extra[layer_name] = extra.get(layer_name, 0) + original.numel() * dtype.itemsize - num_bytes
        return extra

    def _kept_dtype(self, key: str) -> torch.dtype | None:
        """The dtype to keep the patched weight in, if not that of the original."""
        if key not in self.patches or not self.request.high_precision_loras or not self._is_patched_by_comfyui(key):
            return None
        original = self._original(key)
        if is_gguf(original) or (not is_quantised(original) and original.dtype.itemsize > 1):
            return None
        return self._compute_dtype

    @property
    def _compute_dtype(self) -> torch.dtype:
        """That of this clone, which may have it as an object patch."""
        if hasattr(self.model, "manual_cast_dtype"):
            return self.get_model_object("manual_cast_dtype") or self.model.get_dtype()
        return mm.lora_compute_dtype(self.load_device)

    def _original(self, key: str) -> torch.Tensor:
        """The weight without any clone's patches."""
        if key in self.backup:
            return self.backup[key].weight
        module, name = self._owner(key)
        return getattr(module, name)

    def _patched(
        self, key: str, original: torch.Tensor, device: torch.device | None, force_cast: bool = False
    ) -> torch.Tensor:
        """`original`, the weight without any clone's patches or a copy of it, with this clone's. Without patches, and
        unless it is to be cast, ComfyUI returns the original itself."""
        module, name = self._owner(key)
        in_place, weight = getattr(module, name), original
        if device is not None and is_quantised(weight):
            weight = to_device(weight, device)  # before ComfyUI takes it there in full precision
        if is_gguf(weight) and key in self.patches:  # as ComfyUI-GGUF: computed in full precision
            (plain,) = plain_tensors(weight)
            full = mm.cast_to_device(plain, device or plain.device, torch.float32, copy=True)
            return rebuilder(weight)([core.lora.calculate_weight(self.patches[key], full, key).to(plain.dtype)])
        dtype = self._kept_dtype(key)
        with contextlib.nullcontext() if weight is in_place else self._bound_to(key, weight):
            if dtype is None:
                return super().patch_weight_to_device(key, device, return_weight=True, force_cast=force_cast)
            # As there, but not rounded to the dtype of the original in the end.
            weight, _, convert = core.get_key_weight(self.model, key)
            lora_dtype = mm.lora_compute_dtype(device)
            full = mm.cast_to_device(weight, device or weight.device, lora_dtype, copy=True)
            full = full if convert is None else convert(full, inplace=True)
            return core.lora.calculate_weight(self.patches[key], full, key).to(dtype)

    def _back_up(self, key: str) -> None:
        """Before a weight is replaced: keep the original, and do not take the one in place for what it was."""
        if key in self.backup:
            self.backup[key] = self.backup[key]._replace(patches=None)
        else:
            weight = self.distribution.kept_weight(*split_key(key))
            if weight is None:
                module, name = self._owner(key)
                weight = to_device(getattr(module, name), CPU, copy=True)
            self.backup[key] = _Backup(weight, False)

    def _owner(self, key: str) -> tuple[torch.nn.Module, str]:
        """The module that has the weight `key`, and the weight's name in it."""
        layer_name, name = split_key(key)
        return self.model.get_submodule(layer_name), name

    @contextlib.contextmanager
    def _bound_to(self, key: str, value: torch.Tensor) -> Iterator[None]:
        """The parameter replaced by one with this value."""
        module, name = self._owner(key)
        parameter = module._parameters[name]
        module._parameters[name] = as_parameter(value)
        try:
            yield
        finally:
            module._parameters[name] = parameter

    @contextlib.contextmanager
    def _on_compute_device(self, key: str) -> Iterator[None]:
        """A weight on a donor replaced by a copy on the compute device, which is written back."""
        module, name = self._owner(key)
        is_resident = getattr(module, name).device == self.load_device and not self.distribution.is_on_donor(module)
        if not is_resident or self.distribution.relay is not None:
            self.distribution.settle()
            self.distribution.make_writable(split_key(key)[0])
        weight = getattr(module, name)
        if is_resident:
            if weight.device == CPU and is_shared(self.model) and self._shared.private.get(key) != weight.data_ptr():
                module._parameters[name] = copy = to_device(weight, CPU, copy=True)
                self._shared.private[key] = copy.data_ptr()
            yield
            return
        copy = weight.to(self.load_device, copy=True)
        with self._bound_to(key, copy):
            yield
        weight.data.copy_(copy)
        self.distribution.note_written(*split_key(key))


def split_key(key: str) -> tuple[str, str]:
    """Name of the layer and name of the weight in it."""
    layer_name, _, name = key.rpartition(".")
    return layer_name, name


def _by_layer(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Name of the layer -> name of the weight in it -> key."""
    layers: dict[str, dict[str, str]] = {}
    for key in keys:
        layer_name, name = split_key(key)
        layers.setdefault(layer_name, {})[name] = key
    return layers


def _same(left: Any, right: Any) -> bool:
    """Whether two lists of patches do the same: of tensors, only whether they are the same objects."""
    if left is right:
        return True
    if type(left) is not type(right):
        return False
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, core.WeightAdapterBase):
        return _same(vars(left), vars(right))
    return isinstance(left, (bool, int, float, str, set)) and left == right
