"""Stores: which group of layers lies in which slab on which device."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar, cast

import torch

from ..moving.file_reader import copy_now
from ..moving.modules import Mover
from ..moving.pinning import PinnedSlabs
from ..moving.program import Program
from ..planning.plan import OFF, Group, Plan
from ..planning.relief import spread
from ..planning.sizing import packed_bytes
from ..weights.devices import CPU, DISK, device_of
from ..weights.inventory import layout_of, loaded_dtypes, note_dtype, own_tensors
from ..weights.packing import PackedSlab
from ..weights.quantised import as_parameter, plain_tensors, to_device
from ..weights.sources import Sources
from ..weights.temporary import TemporarySlabs
from . import host_memory
from .groups import StoredGroup, StoredLayer
from .packer import Packer
from .shared_slabs import SharedSlabs, Slab

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_FILLING_THREADS = 8


class Stores:
    """The weights of one module: slabs on donors, and everything else on `device`, or on the host after `release`.

    `groups` are those that lie in slabs. `pinned` page-locks those on the host while `is_in_use`. With `pack_weights`,
    one of `PACK_MODES`, groups that are streamed are packed where that makes them smaller: from the beginning, or after
    `packer.start()`.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        device: torch.device,
        program: Program,
        pack_weights: str = OFF,
        shared_slabs: SharedSlabs | None = None,
    ) -> None:
        self.device = device
        self.shared_slabs = shared_slabs
        self.groups: dict[Group, StoredGroup] = {}
        self.sources = Sources()
        self.pinned = PinnedSlabs(device, program)
        self.is_in_use = False
        self.packer = Packer(device, program, self.pinned, pack_weights)
        self._program = program
        self._temporary = TemporarySlabs(program.temporary_folder)
        self._limits: dict[torch.device, float] = {}
        self._module = weakref.ref(module)
        self._stored: weakref.WeakKeyDictionary[torch.nn.Module, tuple[StoredGroup, StoredLayer]]
        self._stored = weakref.WeakKeyDictionary()

    @property
    def module(self) -> torch.nn.Module:
        return cast(torch.nn.Module, self._module())

    def holds(self, module: torch.nn.Module) -> bool:
        """Whether the module's own weights lie in a slab."""
        return module in self._stored

    def place(self, plan: Plan, is_cancellable: bool = False) -> None:
        """Put every layer where `plan` has it, one after another.

        What is on the module but not in the plan, since somebody put it there, goes to the compute device as well. If
        it `is_cancellable`, a cancelled prompt raises before the next group; `release` takes back what is placed then.
        """
        module = self.module
        self.is_in_use = True
        self.sources.check_files()
        self._note_sources()
        _fill_missing(module)
        # What leaves the compute device does so before anything else is put there.
        devices = self._devices_of_slabs(plan.groups)
        to_fill = {}
        for key in plan.groups:
            if key not in self.groups or not self.groups[key].is_bound() or self._is_to_be_packed_now(self.groups[key]):
                to_fill[key] = {layer.name: module.get_submodule(layer.name) for layer in key.layers}
            elif self.groups[key].device != devices[key]:
                self.groups[key].is_written_to = False  # hooks have given back what was there
                self.move(key, devices[key])
            elif self.groups[key].is_written_to:
                self._share_again(self.groups[key])
        self._fill(to_fill, devices, set(plan.evicted), is_cancellable)
        returned = []
        for key in [key for key in self.groups if key not in devices]:
            was_hiding = self._show_patches(self.groups[key])
            group = self._unstore(key)
            if was_hiding:  # unpacked, all of them might not fit into main memory: each leaves it at once
                self._move_all([layer.module for layer in group.living], self.device)
                self.pinned.unpin(group.host_slab)
            else:
                returned.append(group)
        self._take_the_others_to_the_device()
        for group in returned:
            self.pinned.unpin(group.host_slab)

    def place_others(self) -> None:
        """Put what is on the module and was not there when it was placed on the compute device."""
        if any(group.device == DISK for group in self.groups.values()):
            self.sources.check_files()
        self._note_sources()
        self._take_the_others_to_the_device()

    def _note_sources(self) -> None:
        """Temporary files are none: nothing is to keep them when their slabs are replaced."""
        temporary = [group for group in self.groups.values() if group.is_in_temporary_file]
        skipped = {layer.module for group in temporary for layer in group.living}
        self.sources.note(child for child in self.module.modules() if child not in skipped)

    def _take_the_others_to_the_device(self) -> None:
        self._move_all((child for child in self.module.modules() if child not in self._stored), self.device)

    def release(self, originals: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Take everything back to the host.

        Weights that a file has are those of the file again. Slabs on the host stay, if they hold others. `originals`
        are the weights of patched layers, by layer name and name in it, on the host. Needs no memory of any other
        device.
        """
        module = self.module
        self.is_in_use = False
        for layer_name, values in originals.items():
            child = module.get_submodule(layer_name)
            for name, value in values.items():
                child._parameters[name] = as_parameter(value)
                note_dtype(child, name, value)
                self.sources.replaced(child, name, value, is_original=True)
        for key, group in list(self.groups.items()):
            if not group.is_bound_on_host or all(self.sources.are_known(layer.module) for layer in group.living):
                for layer in group.living:
                    self.sources.rebind(layer.module)
            if not group.is_bound_on_host or not group.is_bound():
                self._unstore(key)
        self._take_to_the_host(child for child in module.modules() if child not in self._stored)
        self._temporary = TemporarySlabs(self._program.temporary_folder)  # the file that has room left may go

    def drop_unbound(self) -> None:
        """Let slabs go whose weights the modules have elsewhere now, as another plan has it."""
        for key in [key for key, group in self.groups.items() if not group.is_bound()]:
            self.pinned.unpin(self._unstore(key).host_slab)

    def limit(self, plan: Plan, donor: torch.device, num_bytes: float) -> list[tuple[Group, torch.device]]:
        """Allow no more than `num_bytes` of slabs on a donor; returns the groups that are to be moved for it, and where
        they go."""
        self._limits[donor] = num_bytes
        if not self.is_in_use:
            return []
        planned = [key for key in plan.groups if device_of(key.device) == donor and key in self.groups]
        devices = self._devices_of_slabs(planned)
        return [
            (key, devices[key])
            for key in planned
            if self.groups[key].device != devices[key] and self.groups[key].is_bound()
        ]

    def keys_on_host(self, is_running: bool = False) -> list[Group]:
        """Of groups in main memory that can leave it. Where several modules are served from the same memory the first
        of them counts it; if it `is_running`, the others may be as well, and it stays."""
        keys = [key for key, group in self.groups.items() if group.device == CPU and group.is_bound()]
        if self.shared_slabs is None:
            return keys
        holders = {key: self.shared_slabs.holders(key, cast(torch.Tensor, self.groups[key].host_slab)) for key in keys}
        return [key for key in keys if holders[key][0].groups is self.groups and not (is_running and holders[key][1:])]

    def to_give_up(self, num_bytes: float, is_running: bool) -> list[Group]:
        """Groups in main memory that are to be moved to the disk for so many bytes there: first those that a file has
        already, spread over the model."""
        candidates = self.keys_on_host(is_running)
        candidates = [candidates[index] for index in spread(len(candidates))]
        candidates.sort(key=lambda key: self.groups[key].find_in_files(self.sources) is None)
        return _as_many_as(candidates, num_bytes, self.bytes_of)

    def overflow_bytes(self, plan: Plan) -> int:
        """Of groups on the disk that are planned for elsewhere."""
        on_disk = [key for key in plan.groups if key in self.groups and self.groups[key].device == DISK]
        return sum(key.slab_bytes for key in on_disk if device_of(key.device) != DISK)

    def can_leave_the_disk(self, plan: Plan) -> bool:
        """Whether main memory has room again for what `overflow_bytes` counts, or for a part that is worth moving."""
        num_bytes = self.overflow_bytes(plan)
        least = min(num_bytes, host_memory.LEAST_TO_RETURN_BYTES)
        return num_bytes > 0 and host_memory.obtainable(self.module, self._program, self.shared_slabs) >= least

    def batches(self, layer_names: Iterable[str]) -> Iterable[list[str]]:
        """The names, with those of a group together: its weights are best replaced all at once."""
        group_of = {layer.name: group for group in self.groups for layer in group.layers}
        batches: dict[object, list[str]] = {}
        for name in layer_names:
            batches.setdefault(group_of.get(name, name), []).append(name)
        return batches.values()

    def replace(
        self, weights: Mapping[str, Mapping[str, torch.Tensor]], originals: Collection[tuple[str, str]] = ()
    ) -> list[StoredGroup]:
        """Give layers new weights, by layer name and name in it, where theirs lie; others that hold the old keep them.

        `originals` are the names of those that are the model's own again. Returns the groups whose slabs they do not
        fit: the modules have the weights, and `lay_out_again` is to follow.
        """
        in_slabs: dict[StoredGroup, dict[StoredLayer, Mapping[str, torch.Tensor]]] = {}
        others = []
        for layer_name, values in weights.items():
            child = self.module.get_submodule(layer_name)
            group, layer = self.find(child)
            if group is None or layer is None:
                self._set(layer_name, child, values, originals)
            else:
                in_slabs.setdefault(group, {})[layer] = values
        for group, of_layers in in_slabs.items():
            fits = all(layer.fits(of_layers.get(layer, {})) for layer in group.living)
            if fits and group.device != DISK:
                self._fill_anew(group, of_layers, originals)
                continue
            self._show_patches(group)
            for layer, values in of_layers.items():
                self._set(layer.name, layer.module, values, originals)
            if fits:
                with self.sources.kept(layer.module for layer in group.living):
                    self._put_on_disk(group, group.filled_on)
            else:
                others.append(group)
        return others

    def lay_out_again(self, group: StoredGroup) -> None:
        """A new slab, of another layout, for the weights that the modules have."""
        self._fill({group.key: {layer.name: layer.module for layer in group.living}}, {group.key: group.device})

    def kept_weight(self, layer_name: str, name: str) -> torch.Tensor | None:
        """A weight as it stays in main memory when it is replaced: in the file's mapping, or in the old slab. Then it
        needs no copy; None where it needs one."""
        child = self.module.get_submodule(layer_name)
        group, _ = self.find(child)
        source = self.sources.of(child, name)
        if source is None and group is not None and group.is_bound_on_host:
            return getattr(child, name)
        return source

    def move(self, key: Group, device: torch.device) -> None:
        group = self.groups[key]
        replaced = group.host_slab
        with self.sources.kept(layer.module for layer in group.living):
            if device == DISK:
                self._put_on_disk(group, partial(self._copied, group))
            elif group.packed is not None:
                group.serve_copy(self._once(group, self._there_or_on_host(group.packed.to, device)))
            else:
                slab = self._there_or_on_host(partial(self._copied, group), device)
                group.move(slab if group.is_written_to else self._once(group, slab))
        self.pinned.unpin(replaced)
        self._pack(group)
        self._pin(group)

    def make_writable(self, layer_name: str) -> None:
        """For weights to be written in place: those in the mapping of a file, or in a slab that other modules may be
        served from, get a slab that they alone have."""
        group, _ = self.find(self.module.get_submodule(layer_name))
        if group is None:
            return
        group.is_written_to = True
        if group.slab is not None and not self._is_shared(group):
            return
        replaced = group.host_slab
        with self.sources.kept(layer.module for layer in group.living):
            if group.device == DISK:
                group.move(*self._temporary.store(self._copied(group, CPU)))
            else:
                group.move(self._there_or_on_host(partial(self._copied, group), group.device_unpacked))
        self.pinned.unpin(replaced)
        self._pin(group)

    def hides_patches(self, module: torch.nn.Module) -> bool:
        """Whether the patched weights of a module that are served are hidden: see [Note: hidden patches]."""
        group, _ = self.find(module)
        return group is not None and self._holds_hidden_patches(group)

    def _holds_hidden_patches(self, group: StoredGroup) -> bool:
        return group.packed is not None and any(self.sources.is_patched(layer.module) for layer in group.living)

    def _show_patches(self, group: StoredGroup) -> bool:
        """Unpack the group into main memory and bind its modules to that, if they hold originals instead of patched
        weights; whether they did."""
        if not self._holds_hidden_patches(group):
            return False
        replaced = group.host_slab
        set_by_others = [(layer.module, layer.set_by_others) for layer in group.living]
        with self.sources.kept(layer.module for layer in group.living):
            group.serve_from(self._copied(group, CPU))
        for module, parameters in set_by_others:
            module._parameters.update(parameters)
        self.pinned.unpin(replaced)
        self._pin(group)
        return True

    def _show_patches_of(self, modules: Iterable[torch.nn.Module]) -> None:
        for module in modules:
            group, _ = self.find(module)
            if group is not None:
                self._show_patches(group)

    def _copied(self, group: StoredGroup, device: torch.device) -> torch.Tensor:
        """A slab in memory of `device` with the weights that are served."""
        source = group.source if group.packed is None else self.packer.unpacked(group.packed)
        return copy_now(source, group.new_slab(device))

    def bytes_of(self, key: Group) -> int:
        """That a group takes, or would take."""
        return self.groups[key].source.nbytes if key in self.groups else key.slab_bytes

    def find(self, child: torch.nn.Module) -> tuple[StoredGroup, StoredLayer] | tuple[None, None]:
        """By the module itself: an object patch may have put another in the place of one in a slab."""
        return self._stored.get(child, (None, None))

    def _set(
        self,
        layer_name: str,
        child: torch.nn.Module,
        values: Mapping[str, torch.Tensor],
        originals: Collection[tuple[str, str]],
    ) -> None:
        """Give a module new parameters, on the devices of those that it has."""
        for name, value in values.items():
            device = plain_tensors(getattr(child, name))[0].device
            note_dtype(child, name, value)
            setattr(child, name, to_device(value, device))
            self.sources.replaced(child, name, value, (layer_name, name) in originals)

    def _fill_anew(
        self,
        group: StoredGroup,
        values: Mapping[StoredLayer, Mapping[str, torch.Tensor]],
        originals: Collection[tuple[str, str]],
    ) -> None:
        """Serve a group with these weights, by layer and name, and the others that it has."""
        replaced = group.host_slab
        group.stays_unpacked = group.is_written_to = False
        changing = {(layer.module, name) for layer, of_layer in values.items() for name in of_layer}
        with self.sources.kept((layer.module for layer in group.living), changing):
            if group.packed is not None:
                self._overwrite_packed(group, group.packed, values)
            else:
                self._fill_new_slab(group, values)
        for layer, of_layer in values.items():
            for name, value in of_layer.items():
                self.sources.replaced(layer.module, name, value, (layer.name, name) in originals)
        self.pinned.unpin(replaced)
        self._pack(group)
        self._pin(group)  # if it could not be, beside the one that it replaces

    def _fill_new_slab(self, group: StoredGroup, values: Mapping[StoredLayer, Mapping[str, torch.Tensor]]) -> None:
        """Serve a group with these weights from a new slab, which is page-locked before they come: from the compute
        device that is faster."""
        slab = self._there_or_on_host(group.new_slab, group.device_unpacked)
        try:
            if self.is_in_use and not group.key.is_table:
                self.pinned.pin(slab)
            filled = self._once(group, group.fill(slab, values), is_patched=True)
            group.serve_from(filled)
        except BaseException:
            self.pinned.unpin(slab)
            raise
        if filled is not slab:
            self.pinned.unpin(slab)

    def _overwrite_packed(
        self, group: StoredGroup, packed: PackedSlab, values: Mapping[StoredLayer, Mapping[str, torch.Tensor]]
    ) -> None:
        """Write these weights into a packed group, where it is unpacked: only packed bytes are copied to and fro."""
        slab = self.packer.unpacked(packed)
        for layer, of_layer in values.items():
            layer.overwrite(slab, of_layer)
        again = self.packer.pack(slab, group)
        if again is not None:
            group.serve_copy(self._once(group, self._packed_on(again, packed.device), is_patched=True))
        else:
            new_slab = self._there_or_on_host(group.new_slab, group.device_unpacked)
            group.serve_from(self._once(group, copy_now(slab, new_slab), is_patched=True))

    def is_any_to_be_filled_anew(self, plan: Plan) -> bool:
        """Of groups that lie where they are planned: one that is to be packed now, since there was no need before, or
        hooks were written into it; one that is packed, and whose modules somebody else has moved; or one into which
        hooks were written, and which has the bytes of another module's again."""
        groups = [self.groups[key] for key in plan.groups if key in self.groups]
        return any(
            self._is_to_be_packed_now(each)
            or (each.packed and not each.is_bound())
            or (each.is_written_to and self.shared_slabs is not None)
            for each in groups
        )

    def _is_to_be_packed_now(self, group: StoredGroup) -> bool:
        """It lies in memory as it is, and not since it could not be packed."""
        lies_unpacked = group.slab is not None and group.device != DISK and not group.stays_unpacked
        return lies_unpacked and self._is_to_be_packed(group)

    def _is_to_be_packed(self, group: StoredGroup) -> bool:
        return group.key.is_packable and self._may_be_packed(layer.module for layer in group.living)

    def _may_be_packed(self, modules: Iterable[torch.nn.Module]) -> bool:
        """Packed groups have no slab: their modules have the originals, in the mappings of files."""
        return self.packer.is_on and all(
            self.sources.has_original(child, name) for child in modules for name in own_tensors(child)
        )

    def _bytes_expected(self, key: Group) -> int:
        """Of main memory for a group that is not there yet: 0 if another module's slab is likely to serve it."""
        if self.shared_slabs is not None and self.shared_slabs.has_unpatched(key):
            return 0
        modules = (self.module.get_submodule(layer.name) for layer in key.layers)
        is_packed = key.is_packable and self._may_be_packed(modules)
        return packed_bytes(key.slab_bytes) if is_packed else key.slab_bytes

    def _pack(self, group: StoredGroup) -> None:
        """Have a group that lies in memory packed there, or on the compute device."""
        if group.slab is None or not self._is_to_be_packed_now(group):
            return
        replaced = group.host_slab
        packed = self.packer.pack(group.slab, group)
        if packed is not None:
            device = self.device if group.key.is_packed_resident else group.device
            self._serve_packed(group, self._once(group, self._packed_on(packed, device)))
            self.pinned.unpin(replaced)

    def _packed_on(self, packed: PackedSlab, device: torch.device) -> PackedSlab:
        return packed if packed.device == device else self._there_or_on_host(packed.to, device)

    def _serve_packed(self, group: StoredGroup, packed: PackedSlab) -> None:
        for layer in group.living:
            self.sources.rebind_patched(layer.module)
        group.serve_copy(packed)

    def _put_on_disk(self, group: StoredGroup, fill: Callable[[torch.device], torch.Tensor]) -> None:
        """Serve a group from the files of its weights; where some have none, those that are patched, or were converted
        when they were loaded, from a temporary one with the slab that `fill` makes."""
        self.sources.check_files()
        in_files = group.find_in_files(self.sources)
        if in_files is None:
            group.serve_from(*self._temporary.store(fill(CPU)))
        else:
            for layer in group.living:
                self.sources.rebind(layer.module)
            group.serve_copy(in_files)

    def _devices_of_slabs(self, keys: Iterable[Group]) -> dict[Group, torch.device]:
        """Where the slab of every group is to lie: the first on their donors, as far as the limits there allow; the
        others in main memory, as far as there is room; the others on the disk."""
        devices, used = {}, dict.fromkeys(self._limits, 0)
        for key in keys:
            device = device_of(key.device)
            if device in self._limits:
                if used[device] + self.bytes_of(key) > self._limits[device]:
                    device = CPU
                else:
                    used[device] += self.bytes_of(key)
            if key.is_packed_resident and key in self.groups and not self._is_to_be_packed_now(self.groups[key]):
                is_packed = self.groups[key].packed is not None
                device = self.groups[key].device if is_packed else CPU  # what could not be packed has no room there
            devices[key] = device
        is_there = {key for key, group in self.groups.items() if group.device == CPU}
        coming = [key for key, device in devices.items() if device == CPU and key not in is_there]
        to_leave_out = self._lacking_for(coming)
        if to_leave_out and self.packer.can_start:
            self.start_packing()
            to_leave_out = self._lacking_for(coming)
        if to_leave_out:
            in_order = [coming[index] for index in spread(len(coming)) if self._bytes_expected(coming[index])]
            devices |= dict.fromkeys(_as_many_as(in_order, to_leave_out, self._bytes_expected), DISK)
        return devices

    def start_packing(self) -> None:
        self.packer.start()
        if self.shared_slabs is not None:
            self.shared_slabs.is_packing = True

    def _lacking_for(self, keys: Iterable[Group]) -> float:
        num_bytes = sum(map(self._bytes_expected, keys))
        return host_memory.make_room(num_bytes, self.module, self._program, self.shared_slabs)

    def _fill(
        self,
        modules: Mapping[Group, Mapping[str, torch.nn.Module]],
        devices: Mapping[Group, torch.device],
        evicted: Collection[Group] = (),
        is_cancellable: bool = False,
    ) -> None:
        """Serve these groups from slabs on these devices, or on the host where a device has no memory; packed, where
        they can be.

        For the host, and packed, several are filled at a time, a few ahead of the one that is page-locked and served
        here: that is when the weights that they are filled with are let go.
        """
        made = {
            key: StoredGroup(key, members, list(map(layout_of, members.values()))) for key, members in modules.items()
        }
        filled_ahead = [key for key in made if devices[key] == CPU or key.is_packed_resident]
        to_pack = {key for key in filled_ahead if self._is_to_be_packed(made[key])}
        filling: dict[Group, Future[torch.Tensor | PackedSlab]] = {}
        to_fill_ahead = iter(filled_ahead)
        buffers = self.packer.buffers([made[key] for key in to_pack], _FILLING_THREADS)
        has_filled = self._program.progress_of(len(made)) if is_cancellable else lambda: None
        with buffers, ThreadPoolExecutor(_FILLING_THREADS) as pool:
            for key, group in made.items():
                if is_cancellable:
                    self._program.raise_if_cancelled()
                for ahead in itertools.islice(to_fill_ahead, 2 * _FILLING_THREADS - len(filling)):
                    self._show_patches_of(modules[ahead].values())
                    if ahead in evicted:
                        # The same parameters with other memory: whoever holds them too keeps none of the device.
                        self._take_to_the_host(modules[ahead].values())
                    if ahead in to_pack:
                        fill = partial(self.packer.fill_packed, made[ahead], devices[ahead])
                    else:  # what a thread allocates, the C library may keep for it when it is freed
                        fill = partial(made[ahead].fill, made[ahead].new_slab(CPU))
                    filling[ahead] = pool.submit(self._filled_once, made[ahead], fill)
                if key not in filling:
                    self._show_patches_of(modules[key].values())
                replaced = self.groups.get(key)
                with self.sources.kept(modules[key].values()):
                    if devices[key] == DISK:
                        self._take_to_the_host(modules[key].values())
                        self._put_on_disk(group, group.filled_on)
                    elif key in filling:
                        filled = filling.pop(key).result()
                        if isinstance(filled, PackedSlab):
                            self._serve_packed(group, filled)
                        else:
                            group.serve_from(filled)
                    else:
                        group.serve_from(self._there_or_on_host(group.filled_on, devices[key]))
                self.groups[key] = group
                self._stored.update({layer.module: (group, layer) for layer in group.living})
                if replaced is not None:
                    self.pinned.unpin(replaced.host_slab)
                if key not in to_pack:
                    self._pack(group)
                self._pin(group)
                has_filled()

    def _filled_once(
        self, group: StoredGroup, fill: Callable[[], torch.Tensor | PackedSlab]
    ) -> torch.Tensor | PackedSlab:
        return self._once(group, fill())

    def _once(self, group: StoredGroup, slab: Slab, is_patched: bool = False) -> Slab:
        """The slab, or one in main memory that another module has with the same bytes."""
        if self.shared_slabs is None or slab.device != CPU:
            return slab
        is_patched = is_patched or any(self.sources.is_patched(layer.module) for layer in group.living)
        return self.shared_slabs.share(group.key, slab, is_patched)

    def _share_again(self, group: StoredGroup) -> None:
        replaced, group.is_written_to = group.host_slab, False
        if group.slab is None or group.device != CPU:
            return
        shared = self._once(group, group.slab)
        if shared is not group.slab:
            with self.sources.kept(layer.module for layer in group.living):
                group.move(shared)
            self.pinned.unpin(replaced)
            self._pin(group)

    def _is_shared(self, group: StoredGroup) -> bool:
        return self.shared_slabs is not None and group.slab is not None and self.shared_slabs.has(group.key, group.slab)

    def _pin(self, group: StoredGroup) -> None:
        """Tables are read in place, and need not be page-locked."""
        if self.is_in_use and group.host_slab is not None and not group.key.is_table:
            self.pinned.pin(group.host_slab)

    def _unstore(self, key: Group) -> StoredGroup:
        group = self.groups.pop(key)
        for layer in group.living:
            if self.find(layer.module)[0] is group:
                del self._stored[layer.module]
        return group

    def _move_all(self, modules: Iterable[torch.nn.Module], device: torch.device) -> None:
        modules = list(modules)
        with self.sources.kept(modules), Mover(device, self.pinned) as mover:
            for module in modules:
                mover.move(module)

    def _take_to_the_host(self, modules: Iterable[torch.nn.Module]) -> None:
        """What a file has is not copied."""
        modules = list(modules)
        with self.sources.kept(modules), Mover(CPU, self.pinned) as mover:
            for module in modules:
                mover.move(module, apart_from=self.sources.rebind(module))

    def _there_or_on_host(self, make: Callable[[torch.device], _T], device: torch.device) -> _T:
        """What `make` makes on `device`, or on the host where that has no memory left."""
        try:
            return make(device)
        except RuntimeError as error:
            if device == CPU or not self._program.is_out_of_memory(error):
                raise
            logger.warning(
                "DisTorch2: %s is full; a group of layers planned for it is on the host (%s)", device, str(error)
            )
            return make(CPU)


def _as_many_as(keys: Iterable[Group], num_bytes: float, size_of: Callable[[Group], int]) -> list[Group]:
    """The first of them that take so many bytes together."""
    taken, sum_of_taken = [], 0
    for key in keys:
        if sum_of_taken >= num_bytes:
            break
        taken.append(key)
        sum_of_taken += size_of(key)
    return taken


def _fill_missing(module: torch.nn.Module) -> None:
    """Zeros for weights that the file does not have: with DynamicVRAM they have no memory yet."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and parameter.is_meta:
                (dtype,) = loaded_dtypes(child, name)
                zeros = torch.zeros(parameter.shape, dtype=dtype)
                child._parameters[name] = torch.nn.Parameter(zeros, requires_grad=False)
