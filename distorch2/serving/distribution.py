"""Distribution: puts a module's weights where a plan has them, and takes them back."""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar, cast

import torch

from ..moving.host import Host
from ..moving.modules import UPLOAD_BYTES, Mover, page_locked_upload
from ..moving.pinning import PinnedSlabs
from ..moving.transfer import Transfer
from ..planning.plan import GIB, Group, Plan
from ..planning.schedule import LearntOrder
from ..weights.inventory import layout_of, loaded_dtypes, note_dtype
from ..weights.quantised import as_parameter, plain_tensors, to_device
from ..weights.slab import allocate
from ..weights.sources import Sources
from .detour import take_detour
from .lookup import Lookup
from .reading import Reading
from .relay import Relay, RelayedUnit, StreamerOfUnits
from .streaming import StreamedGroup, StreamedLayer, Streamer

logger = logging.getLogger(__name__)

_CPU = torch.device("cpu")
_T = TypeVar("_T")
_PACKING_THREADS = 8


class Distribution:
    """Where the weights of one module lie. Held by the module, so that all who share the module share it.

    `asked` is the plan as it was made, and `plan` the one that is served: groups are evicted from the compute device
    while there is no room for them. Groups that are planned for another accelerator lie on the host while there is none
    there, without being moved in the plan.
    """

    def __init__(self, module: torch.nn.Module, plan: Plan, host: Host) -> None:
        self._host = host
        self.asked = self.plan = plan
        self.device = torch.device(plan.compute_device)
        self.groups: dict[Group, StreamedGroup] = {}
        self.streamer: Streamer | None = None
        self.reading: Reading | None = None
        self.relay: Relay | None = None
        self.lookup: Lookup | None = None
        self.transfer = Transfer(self.device)
        self.pinned = PinnedSlabs(self.device, host)
        self.sources = Sources()
        self.shares = [
            host.share_on(torch.device(donor), self, donor in plan.relays)
            for donor in plan.donors
            if torch.device(donor) != _CPU
        ]
        self._streamed: list[str] = []  # names of the layers that `streamer` has, by number
        self._order = LearntOrder()
        self._only_read: set[str] = set()  # names of layers
        self._limits: dict[torch.device, float] = {}
        self._is_interrupted = False
        self._module = weakref.ref(module)
        self._served: weakref.WeakKeyDictionary[torch.nn.Module, tuple[StreamedGroup, StreamedLayer]]
        self._served = weakref.WeakKeyDictionary()
        # A dropped module is not unloaded first.
        weakref.finalize(module, _unpin_all, self.transfer, self.pinned).atexit = False

    @property
    def _root(self) -> torch.nn.Module:
        return cast(torch.nn.Module, self._module())

    @property
    def is_placed(self) -> bool:
        return self.streamer is not None

    @property
    def compute_bytes(self) -> int:
        """What is on the compute device: resident layers and staging buffers."""
        if self.streamer is None:
            return 0
        return self.plan.bytes_on(self.plan.compute_device) + self.streamer.staging.nbytes + self.unplanned_bytes

    @property
    def unplanned_bytes(self) -> int:
        """The staging buffer of relayed units that had to run on the compute device."""
        return self.relay.streamer.staging.nbytes if self.relay is not None else 0

    def bytes_planned_on(self, donor: torch.device) -> int:
        return sum(key.slab_bytes for key in self.plan.groups if torch.device(key.device) == donor)

    def bytes_on(self, donor: torch.device) -> int:
        return sum(group.num_bytes for group in self.groups.values() if group.slab.device == donor)

    def place(self, plan: Plan, is_cancellable: bool = False) -> None:
        """Put every layer where `plan` has it, one after another, and start serving the streamed ones.

        It is `asked`, perhaps with groups evicted or with extra bytes. What is on the module but not in the plan,
        since somebody put it there, goes to the compute device as well. If it `is_cancellable`, ComfyUI's exception for
        a cancelled prompt may leave it half done.
        """
        module, before = self._root, self.plan
        self.plan = plan
        if self.relay is not None:
            self.relay.streamer.give_up_staging()
        if self.is_placed and plan.evicted == before.evicted:
            self.sources.note(module.modules())
            self._move_the_others(module, self.device)
            return
        self._stop_serving()
        self._log_evicted(before)
        self.sources.note(module.modules())
        _fill_missing(module)
        # What leaves the compute device does so before anything else is put there.
        homes = self._homes()
        to_pack = {}
        for key in plan.groups:
            if key not in self.groups or not self.groups[key].is_bound():
                to_pack[key] = {layer.name: module.get_submodule(layer.name) for layer in key.layers}
            elif self.groups[key].slab.device != homes[key]:
                self._move(key, homes[key])
        self._pack(to_pack, homes, is_cancellable)
        returned = [self._unserve(key).slab for key in list(self.groups) if key not in homes]
        self._move_the_others(module, self.device)
        for slab in returned:
            self.pinned.unpin(slab)
        self._start_serving()

    def limit(self, donor: torch.device, num_bytes: float) -> None:
        """Keep no more than `num_bytes` of slabs on a donor, and the others that are planned for it on the host."""
        self._limits[donor] = num_bytes
        homes = self._homes() if self.is_placed else {}
        moving = [key for key, home in homes.items() if (it := self.groups[key]).slab.device != home and it.is_bound()]
        if moving:
            self.settle()
        for key in moving:
            self._move(key, homes[key])

    def release(self, originals: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Take everything back to the host and stop serving.

        Weights that a file has are those of the file again. Slabs on the host stay, if they hold others. `originals`
        are the weights of patched layers, by layer name and name in it, on the host. Needs no memory of any other
        device.
        """
        module = self._root
        self._stop_serving()
        self._is_interrupted = False
        _unpin_all(self.transfer, self.pinned)
        self.transfer.upload = None
        for layer_name, values in originals.items():
            child = module.get_submodule(layer_name)
            for name, value in values.items():
                child._parameters[name] = as_parameter(value)
                note_dtype(child, name, value)
                self.sources.replaced(child, name, value)
        for key, group in list(self.groups.items()):
            if group.slab.device != _CPU or all(self.sources.are_known(layer.module) for layer in group.living):
                for layer in group.living:
                    self.sources.rebind(layer.module)
            if group.slab.device != _CPU or not group.is_bound():
                self._unserve(key)
        self._take_to_the_host(child for child in module.modules() if child not in self._served)

    @contextlib.contextmanager
    def unserved(self) -> Iterator[None]:
        """For setting forwards or modules: those that are found are the module's own."""
        streamer, relay = self.streamer, self.relay
        self._detach()
        try:
            yield
        finally:
            if self.streamer is streamer and self.relay is relay:
                self._attach()

    def settle(self) -> None:
        """Before weights are written: no copy reads a slab any more, and what was copied ahead is not used."""
        self.transfer.wait()
        if self.streamer is not None:
            self.streamer.forget_staged()
        if self.relay is not None:
            self.relay.forget_copies()

    def batches(self, layer_names: Iterable[str]) -> Iterable[list[str]]:
        """The names, with those of a group together: its weights are best replaced all at once."""
        group_of = {layer.name: group for group in self.groups for layer in group.layers}
        batches: dict[object, list[str]] = {}
        for name in layer_names:
            batches.setdefault(group_of.get(name, name), []).append(name)
        return batches.values()

    def replace(self, weights: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Give layers new weights, by layer name and name in it, where theirs lie. To be called after `settle`.

        Whoever holds the old ones keeps them.
        """
        in_slabs: dict[StreamedGroup, dict[StreamedLayer, Mapping[str, torch.Tensor]]] = {}
        for layer_name, values in weights.items():
            child = self._root.get_submodule(layer_name)
            group, layer = self._find(child)
            if group is None or layer is None:
                self._set(child, values)
            else:
                in_slabs.setdefault(group, {})[layer] = values
        for group, of_layers in in_slabs.items():
            if all(layer.fits(of_layers.get(layer, {})) for layer in group.living):
                self._pack_anew(group, of_layers)
            else:
                for layer, values in of_layers.items():
                    self._set(layer.module, values)
                self._lay_out_again(group)

    def _set(self, child: torch.nn.Module, values: Mapping[str, torch.Tensor]) -> None:
        """Give a module new parameters, on the devices of those that it has."""
        for name, value in values.items():
            device = plain_tensors(getattr(child, name))[0].device
            note_dtype(child, name, value)
            setattr(child, name, to_device(value, device))
            self.sources.replaced(child, name, value)

    def _pack_anew(self, group: StreamedGroup, values: Mapping[StreamedLayer, Mapping[str, torch.Tensor]]) -> None:
        """Serve a group from a new slab with these weights. It is page-locked before they come: from the compute device
        that is faster."""
        replaced = group.slab
        slab = self._there_or_on_host(group.new_slab, replaced.device)
        try:
            if self.is_placed:
                self._pin(group, slab)
            with self.sources.kept(layer.module for layer in group.living):
                group.serve_from(group.fill(slab, values))
        except BaseException:
            self.pinned.unpin(slab)
            raise
        for layer, of_layer in values.items():
            for name, value in of_layer.items():
                self.sources.replaced(layer.module, name, value)
        self.pinned.unpin(replaced)
        if self.is_placed:  # if it could not be, beside the one that it replaces
            self._pin(group, slab)

    def resume(self) -> None:
        """After `replace`: serve again, if weights of another size made it stop."""
        if self._is_interrupted:
            self._start_serving()

    def kept_weight(self, layer_name: str, name: str) -> torch.Tensor | None:
        """A weight as it goes on lying in host memory when it is replaced; None if it does not."""
        child = self._root.get_submodule(layer_name)
        group, _ = self._find(child)
        is_on_host = group is not None and group.slab.device == _CPU
        source = self.sources.of(child, name)
        return getattr(child, name) if source is None and is_on_host else source

    def is_on_donor(self, module: torch.nn.Module) -> bool:
        return module in self._served

    def _homes(self) -> dict[Group, torch.device]:
        """Where the slab of every group is to lie: the first on their donors, as far as the limits there allow."""
        homes, used = {}, dict.fromkeys(self._limits, 0)
        for key in self.plan.groups:
            device = torch.device(key.device)
            if device in self._limits:
                if used[device] + key.slab_bytes > self._limits[device]:
                    device = _CPU
                else:
                    used[device] += key.slab_bytes
            homes[key] = device
        return homes

    def _pack(
        self,
        modules: Mapping[Group, Mapping[str, torch.nn.Module]],
        homes: Mapping[Group, torch.device],
        is_cancellable: bool = False,
    ) -> None:
        """Serve these groups from slabs at their homes, or on the host where a home has no memory.

        On the host several are packed at a time, a few ahead of the one that is page-locked and served here: that is
        when the weights that they are packed from are let go.
        """
        made = {
            key: StreamedGroup(members, [layout_of(each) for each in members.values()], key.is_table)
            for key, members in modules.items()
        }
        on_host = iter([key for key in made if homes[key] == _CPU])
        evicted = set(self.plan.evicted)
        packing: dict[Group, Future[torch.Tensor]] = {}
        with ThreadPoolExecutor(_PACKING_THREADS) as pool:
            for key, group in made.items():
                if is_cancellable:
                    self._host.raise_if_interrupted()
                for ahead in itertools.islice(on_host, 2 * _PACKING_THREADS - len(packing)):
                    if ahead in evicted:
                        # In place: other holders of the parameters keep no memory there.
                        self._take_to_the_host(modules[ahead].values())
                    # What a thread allocates, the C library may keep for it when it is freed.
                    packing[ahead] = pool.submit(made[ahead].fill, made[ahead].new_slab(_CPU))
                slab = packing.pop(key).result() if key in packing else self._there_or_on_host(group.packed, homes[key])
                replaced = self.groups.get(key)
                with self.sources.kept(modules[key].values()):
                    group.serve_from(slab)
                self.groups[key] = group
                self._served.update({layer.module: (group, layer) for layer in group.living})
                if replaced is not None:
                    self.pinned.unpin(replaced.slab)
                self._pin(group, slab)

    def _lay_out_again(self, group: StreamedGroup) -> None:
        self._is_interrupted |= self.is_placed
        self._stop_serving()
        names = {layer.name for layer in group.living}
        if self._only_read & names:  # of another dtype, they may be called, in another order
            self._only_read -= names
            self._order = LearntOrder()
        key = next(key for key, each in self.groups.items() if each is group)
        self._pack({key: {layer.name: layer.module for layer in group.living}}, {key: group.slab.device})
        if not self._is_interrupted:  # the model is not placed
            self.pinned.unpin(self.groups[key].slab)

    def _move(self, key: Group, device: torch.device) -> None:
        group = self.groups[key]
        replaced = group.slab
        with self.sources.kept(layer.module for layer in group.living):
            self._there_or_on_host(group.move, device)
        self.pinned.unpin(replaced)
        if self.is_placed:
            self._pin(group, group.slab)

    def _pin(self, group: StreamedGroup, slab: torch.Tensor) -> None:
        """Tables are read in place, and need not be page-locked."""
        if not group.is_table:
            self.pinned.pin(slab)

    def _unserve(self, key: Group) -> StreamedGroup:
        group = self.groups.pop(key)
        for layer in group.living:
            if self._find(layer.module)[0] is group:
                del self._served[layer.module]
        return group

    def _start_serving(self) -> None:
        groups = [self.groups[key] for key in self.plan.groups if key.is_streamed]
        tables = [self.groups[key] for key in self.plan.groups if key.is_table and not key.is_relayed]
        self._streamed = [layer.name for group in groups for layer in group.layers]
        order = self._order.of(self._streamed, (placement.layer.name for placement in self.plan.placements))
        relay = self._make_relay() if self.plan.relayed_units else None
        self.streamer, self.relay = self._streamer_of(groups, order), relay
        self.reading = Reading(self._root, self.streamer, self._only_read, self._host)
        self.lookup = Lookup(tables, self.device)
        self._attach()
        self._is_interrupted = False
        moved = [group for key, group in self.groups.items() if not key.is_table]
        self._page_lock([group.slab for group in moved if group.slab.device == _CPU])
        slabs = [group.slab for group in groups if self.pinned.holds(group.slab)]
        take_detour(
            self.transfer, slabs, self.streamer.staging, [torch.device(name) for name in self.plan.devices], self._host
        )

    def _make_relay(self) -> Relay:
        groups = [self.groups[key] for key in self.plan.groups if key.is_relayed]
        units = []
        for name, donor in self.plan.relayed_units.items():
            module = self._root.get_submodule(name)
            layers = [self._served[child] for child in module.modules() if child in self._served]
            units.append(RelayedUnit(module, torch.device(donor), layers))
        staging_bytes = max([self.plan.staging_bytes_of_units, *(group.num_bytes for group in groups)])
        streamer = StreamerOfUnits(
            groups, self.transfer, staging_bytes, functools.partial(_allocate_outside_compiler, self._host)
        )
        return Relay(self.device, units, streamer, self._host.is_compiler_active)

    def _attach(self) -> None:
        for server in (self.lookup, self.streamer, self.reading, self.relay):
            if server is not None:
                server.attach()

    def _detach(self) -> None:
        for server in (self.relay, self.reading, self.streamer, self.lookup):
            if server is not None:
                server.detach()

    def _page_lock(self, slabs: Sequence[torch.Tensor]) -> None:
        """All of `slabs`, or as many as can be beside buffers by way of which the others are copied."""
        locked = [slab for slab in slabs if self.pinned.pin(slab)]
        if len(locked) < len(slabs) and self.transfer.upload is None:
            given_up: list[torch.Tensor] = []
            while (upload := page_locked_upload(self.device, self.pinned)) is None and locked:
                if sum(slab.nbytes for slab in given_up) > UPLOAD_BYTES:  # it is not for want of room
                    locked += [slab for slab in given_up if self.pinned.pin(slab)]
                    break
                given_up.append(locked.pop())
                self.pinned.unpin(given_up[-1])
            self.transfer.upload = upload
        if len(locked) < len(slabs) and self.device != _CPU:
            logger.info(
                "DisTorch2: %d of %d groups of layers on the host are not page-locked, and are copied more slowly",
                len(slabs) - len(locked),
                len(slabs),
            )

    def _stop_serving(self) -> None:
        if self.streamer is not None and self.streamer.order is not None:
            self._order.note(self._streamed[number] for number in self.streamer.order)
        if self.reading is not None:
            self._only_read.update(self.reading.only_read)
        self._detach()
        self.streamer = self.reading = self.relay = self.lookup = self.transfer.detour = None

    def _log_evicted(self, plan_before: Plan) -> None:
        before, now = (sum(group.num_bytes for group in plan.evicted) for plan in (plan_before, self.plan))
        if before != now:
            logger.info(
                "DisTorch2: %.2f GiB of %s planned for %s are %s",
                (now or before) / GIB,
                type(self._root).__name__,
                self.device,
                "streamed from the host, for want of room" if now else "resident again",
            )

    def _move_the_others(self, module: torch.nn.Module, device: torch.device) -> None:
        self._move_all((child for child in module.modules() if child not in self._served), device)

    def _move_all(self, modules: Iterable[torch.nn.Module], device: torch.device) -> None:
        modules = list(modules)
        with self.sources.kept(modules), Mover(device, self.pinned) as mover:
            for module in modules:
                mover.move(module)

    def _take_to_the_host(self, modules: Iterable[torch.nn.Module]) -> None:
        """What a file has is not copied."""
        modules = list(modules)
        for module in modules:
            self.sources.rebind(module)
        self._move_all(modules, _CPU)

    def _there_or_on_host(self, make: Callable[[torch.device], _T], device: torch.device) -> _T:
        """What `make` makes on `device`, or on the host where that has no memory left."""
        try:
            return make(device)
        except RuntimeError as error:
            if device == _CPU or not self._host.is_out_of_memory(error):
                raise
            logger.warning(
                "DisTorch2: %s is full; a group of layers planned for it is on the host (%s)", device, str(error)
            )
            return make(_CPU)

    def _streamer_of(self, groups: Sequence[StreamedGroup], order: Sequence[int] | None) -> Streamer:
        """With a smaller buffer where there is no memory for the one that is planned: the largest group has to fit."""
        smallest = max((group.num_bytes for group in groups), default=0)
        num_bytes = max(self.plan.staging_bytes, smallest)
        while True:
            try:
                return Streamer(groups, self.transfer, num_bytes, order)
            except RuntimeError as error:
                if num_bytes <= smallest or not self._host.is_out_of_memory(error):
                    raise
                num_bytes = max(smallest, num_bytes // 2)
                logger.warning("DisTorch2: %s is full; streaming through %d MiB", self.device, num_bytes >> 20)

    def _find(self, child: torch.nn.Module) -> tuple[StreamedGroup, StreamedLayer] | tuple[None, None]:
        """By the module itself: an object patch may have put another in the place of a streamed one."""
        return self._served.get(child, (None, None))


def _allocate_outside_compiler(host: Host, num_bytes: int, device: torch.device) -> torch.Tensor:
    """For what comes in the middle of a forward, and stays."""
    with host.outside_compiler():
        return allocate(num_bytes, device)


def _unpin_all(transfer: Transfer, pinned: PinnedSlabs) -> None:
    """Memory must not be freed while it is page-locked, nor unlocked while it is copied from."""
    transfer.wait()
    pinned.unpin_all()


def _fill_missing(module: torch.nn.Module) -> None:
    """Zeros for weights that the file does not have: with DynamicVRAM they have no memory yet."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None and parameter.is_meta:
                (dtype,) = loaded_dtypes(child, name)
                zeros = torch.zeros(parameter.shape, dtype=dtype)
                child._parameters[name] = torch.nn.Parameter(zeros, requires_grad=False)
