"""Distribution: a module's weights where a plan has them, and served from there."""

from __future__ import annotations

import contextlib
import enum
import logging
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch

from ..moving.pinning import PinnedSlabs
from ..moving.program import Program
from ..moving.transfer import Transfer
from ..planning.plan import AUTO, GIB, STREAMED_ONLY, Group, Plan, size_text
from ..weights.devices import CPU, DISK, device_of
from ..weights.files import FileError
from . import host_memory
from .groups import StoredGroup
from .pace import MOST_WAITING, Pace
from .reading import Reading
from .relay import Relay
from .serving import Serving
from .shared_slabs import SharedSlabs
from .stores import Stores
from .streaming import Streamer

logger = logging.getLogger(__name__)


class State(enum.Enum):
    """
    RELEASED -> SERVED      place
    SERVED   -> SERVED      place with another plan
    SERVED   -> PAUSED      replace, with weights that do not fit their slabs
    PAUSED   -> SERVED      resume, place
    any      -> RELEASED    release
    any      -> PAUSED      place, where it raises after it has stopped serving; `release` or `place` is to follow
    """

    RELEASED = enum.auto()
    """On the host. Forwards are the modules' own."""
    SERVED = enum.auto()
    """Where the plan, the evictions and the limits have them; forwards serve what is elsewhere."""
    PAUSED = enum.auto()
    """The same places, or on the way there; forwards are the modules' own."""


class Distribution:
    """Where the weights of one module lie. Held by the module, so that all who share the module share it.

    `asked` is the plan as it was made, and `plan` the one that is served: groups are evicted from the compute device
    while there is no room for them. Groups that are planned for another accelerator lie on the host while there is none
    there, without being moved in the plan.
    """

    def __init__(
        self, module: torch.nn.Module, plan: Plan, program: Program, shared_slabs: SharedSlabs | None = None
    ) -> None:
        self.device = torch.device(plan.compute_device)
        self.asked = self.plan = plan
        self.state = State.RELEASED
        self.shares = [
            program.share_on(device_of(donor), self, donor in plan.relays)
            for donor in plan.donors
            if device_of(donor) not in (CPU, DISK)
        ]
        self._logged_overflow = self._logged_packed = 0
        self._program = program
        self._stores = Stores(module, self.device, program, plan.pack_weights, shared_slabs)
        if shared_slabs is not None:
            shared_slabs.join(self)
        self._serving = Serving(self._stores, program)
        self._pace = Pace(self.transfer)
        # A dropped module is not unloaded first.
        weakref.finalize(module, _unpin_all, self.transfer, self.pinned).atexit = False

    @property
    def is_placed(self) -> bool:
        return self.state is State.SERVED

    @property
    def groups(self) -> dict[Group, StoredGroup]:
        return self._stores.groups

    @property
    def pinned(self) -> PinnedSlabs:
        return self._stores.pinned

    @property
    def transfer(self) -> Transfer:
        return self._serving.transfer

    @property
    def streamer(self) -> Streamer | None:
        return self._serving.streamer

    @property
    def reading(self) -> Reading | None:
        return self._serving.reading

    @property
    def relay(self) -> Relay | None:
        return self._serving.relay

    @property
    def computing_devices(self) -> set[torch.device]:
        """The compute device, and donors that relay."""
        return {self.device, *(self.relay.donors if self.relay is not None else ())}

    @property
    def compute_bytes(self) -> int:
        """What is on the compute device: resident layers, those that are packed there, and staging buffers."""
        if self.streamer is None:
            return 0
        buffers = self.streamer.staging.nbytes + self.transfer.packed_room_bytes + self.unplanned_bytes
        return self.plan.resident_bytes + self.bytes_on(self.device) + buffers

    @property
    def unplanned_bytes(self) -> int:
        """The staging buffer of relayed units that had to run on the compute device."""
        return self.relay.streamer.staging.nbytes if self.relay is not None else 0

    def slab_bytes_planned_on(self, donor: torch.device) -> int:
        return sum(self._stores.bytes_of(key) for key in self.plan.groups if device_of(key.device) == donor)

    def bytes_on(self, donor: torch.device) -> int:
        return sum(group.source.nbytes for group in self.groups.values() if group.device == donor)

    @property
    def module(self) -> torch.nn.Module | None:
        """None when nobody holds it any more."""
        return self._stores.module

    @property
    def host_bytes(self) -> int:
        """Of slabs that can be given up."""
        return sum(self._stores.bytes_of(key) for key in self._stores.keys_on_host())

    @property
    def shared_slabs(self) -> SharedSlabs | None:
        return self._stores.shared_slabs

    @property
    def modules(self) -> list[torch.nn.Module]:
        """Those that may be served from the same slabs now: its own, and copies for other devices."""
        members = self.shared_slabs.members if self.shared_slabs is not None else [self]
        return [each.module for each in members if each.is_placed and each.module is not None]

    def give_up_host_memory(self, num_bytes: float, is_running: bool = False) -> None:
        """Have slabs of so many bytes, or all that are in main memory, lie on the disk, also while they are served; of
        all modules that are served from them. If it `is_running`, those that others are served from stay."""
        keys, shared_slabs = self._stores.to_give_up(num_bytes, is_running), self.shared_slabs
        if shared_slabs is None or is_running:
            self.give_up(keys)
            return
        for member, held in shared_slabs.keys_by_holder(keys, self.groups).items():
            member.give_up(held)

    def give_up(self, keys: Iterable[Group]) -> None:
        """Have those of these groups that lie in main memory lie on the disk."""
        on_host = [key for key in keys if key in self.groups and self.groups[key].device == CPU]
        self._move([(key, DISK) for key in on_host if self.groups[key].is_bound()])

    def drop_unbound(self) -> None:
        """As `Stores.drop_unbound`."""
        self._stores.drop_unbound()

    def note_written(self, layer_name: str, name: str) -> None:
        """Hooks have written into a weight in place. Until `note_restored` it is not taken for that of the file."""
        self._stores.sources.written(self._stores.module.get_submodule(layer_name), name)

    def note_restored(self, layer_name: str, name: str) -> None:
        self._stores.sources.restored(self._stores.module.get_submodule(layer_name), name)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Around each pass of the module."""
        self.relieve_host_memory()
        is_timed = self.is_placed and self.transfer.has_streams
        with self._pace.a_pass() if is_timed else contextlib.nullcontext():
            yield

    @property
    def may_start_packing(self) -> bool:
        return self._stores.packer.can_start and self.plan.is_worth_packing

    @property
    def waiting_part(self) -> float | None:
        """The part of the last run that computing waited for copies, 0 to 1; None where that is not known."""
        return self._pace.waiting_part()

    @property
    def computing_seconds(self) -> float | None:
        """What a pass of the last run took, beside waiting for copies; None where that is not known."""
        return self._pace.computing_seconds()

    @property
    def activation_bytes(self) -> int | None:
        """What the compute device needed in a run, beside the weights and buffers there; None where that is not
        known."""
        return self._pace.activation_bytes

    @property
    def serves_one_at_a_time(self) -> bool:
        """Whether something is streamed or looked up, by way of buffers that belong to one pass."""
        return any(not key.is_relayed or group.device != device_of(key.device) for key, group in self.groups.items())

    def relieve_host_memory(self) -> None:
        """Give slabs up where others have taken so much main memory that less is left than is to be."""
        if self._program.spare_host_memory() >= 0:  # that costs little, in every step
            return
        if not self._stores.keys_on_host(is_running=True):
            return
        to_leave = host_memory.make_room(0, self._stores.module, self._program, self.shared_slabs)
        if to_leave:
            self.give_up_host_memory(to_leave, is_running=True)
            self._log_overflow()

    def begin_run(self) -> None:
        """Before a plan for the next run is made of `asked`: have what is streamed packed from now on, if computing has
        waited for it, or another copy of the module has it packed."""
        waiting_part, stores = self._pace.begin_run(), self._stores
        has_waited = waiting_part is not None and waiting_part > MOST_WAITING and self.plan.is_worth_packing
        others_pack = stores.shared_slabs is not None and stores.shared_slabs.is_packing
        if not stores.packer.can_start or not (has_waited or others_pack):
            return
        if has_waited:
            logger.info(
                "DisTorch2: %s has waited %.0f%% of the time for copies of weights, which are packed now",
                type(stores.module).__name__,
                100 * (waiting_part or 0),
            )
        stores.start_packing()
        self.asked = replace(self.asked, pack_weights=STREAMED_ONLY)

    def place(self, plan: Plan, is_cancellable: bool = False) -> None:
        """Put every layer where `plan` has it, and serve what is elsewhere. The plan is `asked`, perhaps with groups
        evicted or with extra bytes. Cancellable as in `Stores.place`."""
        before, self.plan = self.plan, plan
        if self.relay is not None:
            self.relay.streamer.give_up_staging()
        host_memory.note_use(self)
        is_as_planned = plan.relieved == before.relieved and not self._stores.is_any_to_be_filled_anew(plan)
        if self.is_placed and is_as_planned and not self._stores.can_leave_the_disk(plan):
            self._stores.place_others()
            return
        self._pause()
        self._log_evicted(before)
        self._stores.place(plan, is_cancellable)
        if self._stores.packer.is_on and self.asked.pack_weights == AUTO:  # for want of main memory
            self.asked = replace(self.asked, pack_weights=STREAMED_ONLY)
        self._serve()
        self._log_overflow()
        self._log_packed()

    def limit(self, donor: torch.device, num_bytes: float) -> None:
        """Keep no more than `num_bytes` of slabs on a donor, and the others that are planned for it on the host."""
        self._move(self._stores.limit(self.plan, donor, num_bytes))

    def _move(self, moving: Sequence[tuple[Group, torch.device]]) -> None:
        """What there is no room for elsewhere stays: those who ask for this can do nothing with an exception."""
        if moving:
            self.settle()
        for key, device in moving:
            before = self.groups[key].device
            try:
                self._stores.move(key, device)
            except RuntimeError as error:
                if not isinstance(error, FileError) and not self._program.is_out_of_memory(error):
                    raise
                where = "in main memory" if before == CPU else f"on {before}"
                logger.warning("DisTorch2: %s stays %s (%s)", type(self._stores.module).__name__, where, str(error))
                break
        if moving and self.is_placed:
            self._serving.fit_unpacker()

    def release(self, originals: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
        """Take everything back to the host and stop serving, as `Stores.release` says."""
        self._serving.stop()
        self.state = State.RELEASED
        _unpin_all(self.transfer, self.pinned)
        self._stores.release(originals)

    @contextlib.contextmanager
    def unserved(self) -> Iterator[None]:
        """For setting forwards or modules: those that are found are the module's own."""
        streamer, relay = self.streamer, self.relay
        self._serving.detach()
        try:
            yield
        finally:
            if self.streamer is streamer and self.relay is relay:
                self._serving.attach()

    def settle(self) -> None:
        """Before weights are written: no copy reads a slab any more, and what was copied ahead is not used."""
        self._serving.settle()

    def batches(self, layer_names: Iterable[str]) -> Iterable[list[str]]:
        """The names, with those of a group together: its weights are best replaced all at once."""
        return self._stores.batches(layer_names)

    def replace(
        self, weights: Mapping[str, Mapping[str, torch.Tensor]], originals: Collection[tuple[str, str]] = ()
    ) -> None:
        """Give layers new weights, by layer name and name in it, where theirs lie. To be called after `settle`.

        Whoever holds the old ones keeps them. `originals` are the names of those that are the model's own again.
        Weights that do not fit their slabs pause serving until `resume`.
        """
        for group in self._stores.replace(weights, originals):
            if self.is_placed:
                self._pause()
            self._serving.forget({layer.name for layer in group.living})
            self._stores.lay_out_again(group)

    def resume(self) -> None:
        """After `replace`: serve again, if weights of another size made it stop."""
        if self.state is State.PAUSED:
            self._serve()
        elif self.state is State.SERVED:
            self._serving.fit_unpacker()

    def kept_weight(self, layer_name: str, name: str) -> torch.Tensor | None:
        """As `Stores.kept_weight`."""
        return self._stores.kept_weight(layer_name, name)

    def make_writable(self, layer_name: str) -> None:
        """As `Stores.make_writable`. To be called after `settle`."""
        self._stores.make_writable(layer_name)

    def hides_patches(self, module: torch.nn.Module) -> bool:
        """As `Stores.hides_patches`."""
        return self._stores.hides_patches(module)

    def is_on_donor(self, module: torch.nn.Module) -> bool:
        return self._stores.holds(module)

    def _pause(self) -> None:
        self._serving.stop()
        self.state = State.PAUSED

    def _serve(self) -> None:
        try:
            self._serving.start(self.plan)
        except BaseException:
            self._serving.stop()
            raise
        self.state = State.SERVED

    def _log_evicted(self, plan_before: Plan) -> None:
        before, now = (sum(group.num_bytes for group in plan.evicted) for plan in (plan_before, self.plan))
        if before != now:
            logger.info(
                "DisTorch2: %.2f GiB of %s planned for %s are %s",
                (now or before) / GIB,
                type(self._stores.module).__name__,
                self.device,
                "streamed from the host, for want of room" if now else "resident again",
            )

    @property
    def packed_part(self) -> float | None:
        """What packed groups take, of their bytes before; None where none is packed."""
        num_bytes, of_slabs = self._packed_bytes()
        return num_bytes / of_slabs if of_slabs else None

    def _packed_bytes(self) -> tuple[int, int]:
        packed = [group for group in self.groups.values() if group.packed is not None]
        return sum(each.source.nbytes for each in packed), sum(each.slab_bytes for each in packed)

    def _log_packed(self) -> None:
        num_bytes, of_slabs = self._packed_bytes()
        if num_bytes and num_bytes != self._logged_packed:
            logger.info(
                "DisTorch2: %s of %s are packed to %.0f%%",
                size_text(of_slabs),
                type(self._stores.module).__name__,
                100 * num_bytes / of_slabs,
            )
        self._logged_packed = num_bytes

    def _log_overflow(self) -> None:
        num_bytes = self._stores.overflow_bytes(self.plan)
        if num_bytes and num_bytes != self._logged_overflow:
            logger.info(
                "DisTorch2: main memory is short; %s of %s are read from the disk each time it runs",
                size_text(num_bytes),
                type(self._stores.module).__name__,
            )
        self._logged_overflow = num_bytes


def _unpin_all(transfer: Transfer, pinned: PinnedSlabs) -> None:
    """Memory must not be freed while it is page-locked, nor unlocked while it is copied from."""
    transfer.wait()
    pinned.unpin_all()
