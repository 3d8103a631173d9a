"""`auto`: how much of a model each device is to keep, chosen by how long a step would take. Pure: numbers only.

The compute device keeps what it has room for. Of what is left, other accelerators run a part (relay), and the rest is
copied to the compute device while it computes. While another device computes, the staging buffer has room for little of
what comes next, so copies wait. Accelerators of the same speed cost nothing but their memory, so they are filled; of
slower ones so much is used that a step is shortest: each byte there makes computing longer, and copying shorter. What
crosses over between accelerators is not counted: it is a hundredth of the weights or less. Accelerators that compute
equally fast are filled in the order of their links. So are those that only keep weights; one with a link slower than
that of main memory is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from .plan import OVERFLOW_DEVICE, STREAM, Automatic, ComponentRequest, DeviceMemory, Shares, kind_of

_TOKENS = 4096
"""Of an image of 1024 x 1024 pixels: what a step is taken for until one has been timed."""
_BYTES_OF_A_WEIGHT = 2
_AS_FAST = 0.1
"""Speeds are compared in steps of about this much: less is noise."""
_NUM_CHOICES = 64


@dataclass(frozen=True)
class Speeds:
    """What is known of a machine, and of the model on it.

    `link_bytes_per_s` is that of copies to the compute device, by the device that they come from, and
    `multiplications_per_s` what each accelerator does in matrices of the model's kind; `step_s` is what a step took on
    the compute device alone, without copies. None, or no entry, where that is not known.
    """

    link_bytes_per_s: Mapping[str, float] = field(default_factory=dict)
    multiplications_per_s: Mapping[str, float] = field(default_factory=dict)
    step_s: float | None = None

    def slowness(self, device: str, compute_device: str) -> float:
        """How many times as long `device` takes for what `compute_device` does."""
        own, theirs = self.multiplications_per_s.get(compute_device), self.multiplications_per_s.get(device)
        found = own / theirs if own and theirs else 1.0
        return 1.0 if abs(found - 1) <= _AS_FAST else found

    def rank(self, device: str, compute_device: str) -> tuple[int, float]:
        """Lower for a device that computes faster; of those that are as fast, for one with a faster link. One whose
        link is not known comes last."""
        links = {name: link for name, link in self.link_bytes_per_s.items() if name != OVERFLOW_DEVICE}
        of_link = _steps(max(links.values()) / links[device]) if device in links else math.inf
        return _steps(self.slowness(device, compute_device)), of_link

    def is_link_slower(self, device: str) -> bool:
        """Than that of main memory, as far as is known."""
        link, of_host = self.link_bytes_per_s.get(device), self.link_bytes_per_s.get(OVERFLOW_DEVICE)
        return link is not None and of_host is not None and link < (1 - _AS_FAST) * of_host

    def seconds_of_step(self, compute_device: str, model_bytes: int) -> float | None:
        """As timed, or as a transformer would take for an image of 1024 x 1024 pixels."""
        own = self.multiplications_per_s.get(compute_device)
        if self.step_s is not None or not own:
            return self.step_s
        return model_bytes / _BYTES_OF_A_WEIGHT * _TOKENS / own


def _steps(slowness: float) -> int:
    """In steps of `_AS_FAST`: 0 for what is as fast."""
    return int(math.log(slowness, 1 + _AS_FAST))


UNKNOWN = Speeds()


def choose(
    model_bytes: int, request: ComponentRequest, memory: Mapping[str, DeviceMemory], speeds: Speeds = UNKNOWN
) -> Shares:
    """The shares of a request whose allocation is `Automatic`. A device has room for what is free there without the
    bytes that are to be kept free, and for everything where it is not known what is.

    Accelerators that cannot run what the compute device runs, or are not to, keep what is left before `cpu` does,
    unless their links are slower.
    """
    allocation, home = request.allocation, request.compute_device
    assert isinstance(allocation, Automatic)
    relaying, keeping = relaying_and_keeping(request, memory)
    room = room_of(request, memory, model_bytes)

    def slowness(device: str) -> float:
        return speeds.slowness(device, home)

    keeping = [device for device in keeping if not speeds.is_link_slower(device)]
    for devices in (relaying, keeping):
        devices.sort(key=lambda device: (speeds.rank(device, home), -room[device], device))
    kept = min(model_bytes, room[home])
    left = model_bytes - kept
    relayed = _filled(left, relaying, room)
    step_s, link = speeds.seconds_of_step(home, model_bytes), speeds.link_bytes_per_s.get(OVERFLOW_DEVICE)
    if relayed and step_s is not None and link is not None:

        def step_of(choice: Mapping[str, int]) -> float:
            elsewhere = sum(choice.values())
            at_home_s = step_s * (1 - elsewhere / model_bytes)
            computing_s = step_s * computing_part(choice, model_bytes, slowness)
            return max(computing_s, computing_s - at_home_s + (left - elsewhere) / link)

        most = sum(relayed.values())
        choices = [most * number // _NUM_CHOICES for number in range(_NUM_CHOICES, -1, -1)]
        # The first of those that take the least: of the same, the one that copies less.
        relayed = min((_filled(num_bytes, relaying, room) for num_bytes in choices), key=step_of)
    left -= sum(relayed.values())
    stored = _filled(left, keeping, room)
    shares = {home: kept, **relayed, **stored}
    if left := left - sum(stored.values()):
        shares[OVERFLOW_DEVICE] = shares.get(OVERFLOW_DEVICE, 0) + left
    return Shares(shares)


def of_its_kind(request: ComponentRequest) -> list[str]:
    """The other devices of the allocation that are of the compute device's kind."""
    home = request.compute_device
    return [each for each in request.allocation.devices if kind_of(each) == kind_of(home) and each != home]


def room_of(request: ComponentRequest, memory: Mapping[str, DeviceMemory], model_bytes: int) -> dict[str, int]:
    """Bytes that a model may take of the compute device and of the others of its kind."""
    assert isinstance(request.allocation, Automatic)
    found = {}
    for device in (request.compute_device, *of_its_kind(request)):
        free_bytes = memory[device].free_bytes
        found[device] = model_bytes if free_bytes is None else max(0, free_bytes - request.allocation.keep_bytes)
    return found


def relaying_and_keeping(request: ComponentRequest, memory: Mapping[str, DeviceMemory]) -> tuple[list[str], list[str]]:
    """The devices of `of_its_kind` in two lists: those that may relay, and those that only keep weights."""
    others = of_its_kind(request)
    relaying = [each for each in others if memory[each].can_compute and request.donor_mode != STREAM]
    return relaying, [each for each in others if each not in relaying]


def _filled(num_bytes: int, devices: Iterable[str], room: Mapping[str, int]) -> dict[str, int]:
    """So many bytes on these devices, each filled before the next, as far as there is room."""
    found = {}
    for device in devices:
        if taken := min(num_bytes, room[device]):
            found[device] = taken
            num_bytes -= taken
    return found


def computing_part(relayed: Mapping[str, int], model_bytes: int, slowness: Callable[[str], float]) -> float:
    """How many times as long computing takes when other devices do what belongs to so many bytes."""
    return 1 + sum(num_bytes * (slowness(device) - 1) for device, num_bytes in relayed.items()) / max(1, model_bytes)
