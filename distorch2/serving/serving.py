"""Serving: the forwards, and the buffers and copies behind them, by which a module runs with weights in slabs."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence

import torch

from ..moving.file_reader import FileReader
from ..moving.modules import UPLOAD_BYTES, page_locked_upload, unlock
from ..moving.program import Program
from ..moving.transfer import Transfer
from ..moving.unpacking import Unpacker
from ..planning.plan import Plan
from ..planning.schedule import LearntOrder
from ..planning.sizing import PACKED_SLOTS
from ..weights.devices import CPU, device_of
from ..weights.slab import allocate
from .detour import take_detour
from .groups import StoredGroup
from .lookup import Lookup
from .reading import Reading
from .relay import Relay, RelayedUnit, StreamerOfUnits
from .stores import Stores
from .streaming import Streamer

logger = logging.getLogger(__name__)


class Serving:
    """Runs one module with the weights that lie in `stores`, from `start` to `stop`. What was learnt of the order in
    which layers run, and of those that are only read, is kept in between."""

    def __init__(self, stores: Stores, program: Program) -> None:
        self.streamer: Streamer | None = None
        self.reading: Reading | None = None
        self.relay: Relay | None = None
        self.lookup: Lookup | None = None
        self.transfer = Transfer(stores.device, FileReader(stores.device, stores.pinned))
        self._stores, self._program = stores, program
        self._streamed: list[str] = []  # names of the layers that `streamer` has, by number
        self._order = LearntOrder()
        self._is_only_read: dict[str, bool] = {}  # by name of the layer, as far as it is known

    def start(self, plan: Plan) -> None:
        stores = self._stores
        groups = [stores.groups[key] for key in plan.groups if key.is_streamed]
        tables = [stores.groups[key] for key in plan.groups if key.is_table and not key.is_relayed]
        self._streamed = [layer.name for group in groups for layer in group.layers]
        order = self._order.of(self._streamed, (placement.layer.name for placement in plan.placements))
        relay = self._make_relay(plan) if plan.relayed_units else None
        self.streamer, self.relay = self._streamer_of(groups, plan.staging_bytes, order), relay
        self.reading = Reading(stores.module, self.streamer, self._is_only_read, self._program, stores.hides_patches)
        self.lookup = Lookup(tables, stores.device)
        self.attach()
        moved = [group.host_slab for key, group in stores.groups.items() if not key.is_table]
        self._page_lock([slab for slab in moved if slab is not None])
        streamed = [group.host_slab for group in groups if group.packed is None]
        slabs = [slab for slab in streamed if slab is not None and stores.pinned.holds(slab)]
        self.fit_unpacker()
        devices = [device_of(name) for name in plan.devices]
        others = [device_of(name) for name in plan.others]
        take_detour(self.transfer, slabs, self.streamer.staging, devices, self._program, others)

    def stop(self) -> None:
        if self.streamer is not None and self.streamer.order is not None:
            self._order.note(self._streamed[number] for number in self.streamer.order)
        if self.reading is not None:
            self._is_only_read |= self.reading.known
        self.detach()
        self.streamer = self.reading = self.relay = self.lookup = None
        upload = self.transfer.upload
        self.transfer.close()
        if upload is not None:
            unlock(upload, self._stores.pinned)

    def attach(self) -> None:
        for server in (self.lookup, self.streamer, self.reading, self.relay):
            if server is not None:
                server.attach()

    def detach(self) -> None:
        for server in (self.relay, self.reading, self.streamer, self.lookup):
            if server is not None:
                server.detach()

    def settle(self) -> None:
        """No copy reads a slab any more, and what was copied ahead is not used."""
        self.transfer.wait()
        if self.streamer is not None:
            self.streamer.forget_staged()
        if self.relay is not None:
            self.relay.forget_copies()

    def forget(self, layer_names: set[str]) -> None:
        """What was learnt of layers whose weights have another dtype now: they may be called, in another order."""
        was_only_read = [self._is_only_read.pop(name, False) for name in layer_names]
        if any(was_only_read):
            self._order = LearntOrder()

    def fit_unpacker(self) -> None:
        """Give the transfer an unpacker whose slots hold every packed group, or none where nothing is packed."""
        served = self.streamer.groups if self.streamer is not None and self.transfer.has_streams else ()
        packed = [group.packed for group in served if group.packed is not None]
        slot_bytes = max((each.nbytes for each in packed if each.device != self._stores.device), default=0)
        unpacker = self.transfer.unpacker
        if packed and unpacker is not None and unpacker.slot_bytes >= slot_bytes:
            return
        self.transfer.unpack_by(None)  # before memory for the next one is taken
        if packed:
            self.transfer.unpack_by(self._make_unpacker(slot_bytes))

    def _make_relay(self, plan: Plan) -> Relay:
        stores = self._stores
        groups = [stores.groups[key] for key in plan.groups if key.is_relayed]
        units = []
        for name, donor in plan.relayed_units.items():
            module = stores.module.get_submodule(name)
            found = [stores.find(child) for child in module.modules()]
            layers = [(group, layer) for group, layer in found if group is not None and layer is not None]
            units.append(RelayedUnit(module, torch.device(donor), layers))
        staging_bytes = max([plan.staging_bytes_of_units, *(group.slab_bytes for group in groups)])
        allocate_later = functools.partial(_allocate_outside_compiler, self._program)
        streamer = StreamerOfUnits(groups, self.transfer, staging_bytes, allocate_later)
        return Relay(stores.device, units, streamer, self._program.is_compiler_active)

    def _streamer_of(self, groups: Sequence[StoredGroup], num_bytes: int, order: Sequence[int] | None) -> Streamer:
        """With a smaller buffer where there is no memory for the one that is planned: the largest group has to fit."""
        smallest = max((group.slab_bytes for group in groups), default=0)
        num_bytes = max(num_bytes, smallest)
        while True:
            try:
                return Streamer(groups, self.transfer, num_bytes, order)
            except RuntimeError as error:
                if num_bytes <= smallest or not self._program.is_out_of_memory(error):
                    raise
                num_bytes = max(smallest, num_bytes // 2)
                logger.warning("DisTorch2: %s is full; streaming through %d MiB", self.transfer.device, num_bytes >> 20)

    def _make_unpacker(self, slot_bytes: int) -> Unpacker:
        """With fewer slots where there is no memory for as many as are planned: one has to fit."""
        device, slots = self._stores.device, list[torch.Tensor]()
        try:
            while slot_bytes and len(slots) < PACKED_SLOTS:
                slots.append(allocate(slot_bytes, device))
        except RuntimeError as error:
            if not (slots and self._program.is_out_of_memory(error)):
                raise
        return Unpacker(device, slots)

    def _page_lock(self, slabs: Sequence[torch.Tensor]) -> None:
        """All of `slabs`, or as many as can be beside buffers by way of which the others are copied."""
        locked = [slab for slab in slabs if self._stores.pinned.pin(slab)]
        if len(locked) < len(slabs) and self.transfer.upload is None:
            given_up: list[torch.Tensor] = []
            while (upload := page_locked_upload(self._stores.device, self._stores.pinned)) is None and locked:
                if sum(slab.nbytes for slab in given_up) > UPLOAD_BYTES:  # it is not for want of room
                    locked += [slab for slab in given_up if self._stores.pinned.pin(slab)]
                    break
                given_up.append(locked.pop())
                self._stores.pinned.unpin(given_up[-1])
            self.transfer.take(upload=upload)
        if len(locked) < len(slabs) and self._stores.device != CPU:
            logger.info(
                "DisTorch2: %d of %d groups of layers on the host are not page-locked, and are copied more slowly",
                len(slabs) - len(locked),
                len(slabs),
            )


def _allocate_outside_compiler(program: Program, num_bytes: int, device: torch.device) -> torch.Tensor:
    """For what comes in the middle of a forward, and stays."""
    with program.outside_compiler():
        return allocate(num_bytes, device)
