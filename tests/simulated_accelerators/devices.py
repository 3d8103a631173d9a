"""The simulated devices: their memory, streams and events, as `torch.sim` offers them."""

from __future__ import annotations

import collections
import contextlib
import os
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator

import torch

NAME = "sim"
NUM_DEVICES = int(os.environ.get("SIMULATED_DEVICES", "2"))


def _capacities() -> list[int]:
    """SIMULATED_CAPACITY_MB: one number for every device, or one for each, separated by commas."""
    megabytes = [int(part) for part in os.environ.get("SIMULATED_CAPACITY_MB", "1024").split(",")]
    return [megabytes[min(index, len(megabytes) - 1)] * 1024**2 for index in range(NUM_DEVICES)]


capacity_bytes = _capacities()
used_bytes = [0] * NUM_DEVICES
peak_bytes = [0] * NUM_DEVICES
defers_copies = os.environ.get("SIMULATED_DEFERRED_COPIES") == "1"
_threads = threading.local()  # the current device, and the current stream of each device


def free_bytes(index: int) -> int:
    # The package's list, since a test may have put another there.
    return sys.modules[__package__].capacity_bytes[index] - used_bytes[index]


def take(num_bytes: int, index: int) -> None:
    """Count memory of a device as used, until it is given back."""
    if not 0 <= index < NUM_DEVICES:
        raise RuntimeError(f"sim:{index} is no device; there are {NUM_DEVICES}")
    if num_bytes > free_bytes(index):
        raise torch.OutOfMemoryError(f"sim:{index} out of memory: {num_bytes} bytes asked, {free_bytes(index)} free")
    used_bytes[index] += num_bytes
    peak_bytes[index] = max(peak_bytes[index], used_bytes[index])


def give_back(num_bytes: int, index: int) -> None:
    used_bytes[index] -= num_bytes


def index_of(device: torch.device | str | int | None) -> int:
    """The index of a device however it is given; without one it is the current device's."""
    if isinstance(device, str):
        device = torch.device(device)
    index = device.index if isinstance(device, torch.device) else device
    return getattr(_threads, "device", 0) if index is None else index


class Stream:
    """Work in order. All is done at once, but for copies on other streams than the default one when those are deferred.

    See `deferred_copies`.
    """

    def __init__(self, device: torch.device | str | int | None = None, priority: int = 0, is_default: bool = False):
        self.device = torch.device(NAME, index_of(device))
        self.is_default = is_default
        self.num_submitted = 0
        self._pending: collections.deque[Callable[[], object]] = collections.deque()
        self._previous: list[Stream] = []
        if not is_default:
            _streams.add(self)

    def submit(self, work: Callable[[], object]) -> None:
        """Do `work` when somebody waits for this stream."""
        self.num_submitted += 1
        self._pending.append(work)

    def finish(self, position: int | None = None) -> None:
        """Do what was submitted, up to `position` of all that ever was."""
        while self._pending and (position is None or self.num_submitted - len(self._pending) < position):
            self._pending.popleft()()

    def query(self) -> bool:
        return not self._pending

    def synchronize(self) -> None:
        self.finish()

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def wait_event(self, event: Event) -> None:
        if self.is_default:
            event.synchronize()
        else:
            self.submit(event.snapshot().synchronize)

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def __enter__(self) -> Stream:
        self._previous.append(current_stream(self.device))
        set_stream(self)
        return self

    def __exit__(self, *exception: object) -> None:
        set_stream(self._previous.pop())


class Event:
    """A place in a stream: `stream` and `position`, None and 0 until it is recorded."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        self.stream: Stream | None = None
        self.position = 0
        self.num_records = 0

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or current_stream()
        self.position = self.stream.num_submitted
        self.num_records += 1

    def snapshot(self) -> Event:
        """An event of its own for what is recorded now: this one may be recorded again."""
        event = Event()
        event.stream, event.position = self.stream, self.position
        return event

    def wait(self, stream: Stream | None = None) -> None:
        (stream or current_stream()).wait_event(self)

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.finish(self.position)

    def query(self) -> bool:
        return self.stream is None or self.stream.num_submitted - len(self.stream._pending) >= self.position

    def elapsed_time(self, _end: Event) -> float:
        return 0.0


_streams: weakref.WeakSet[Stream] = weakref.WeakSet()
_default_streams: dict[int, Stream] = {}


def default_stream(device: torch.device | str | int | None = None) -> Stream:
    index = index_of(device)
    if index not in _default_streams:
        _default_streams[index] = Stream(index, is_default=True)
    return _default_streams[index]


def current_stream(device: torch.device | str | int | None = None) -> Stream:
    index = index_of(device)
    return getattr(_threads, "streams", {}).get(index) or default_stream(index)


def set_stream(stream: Stream) -> None:
    if not hasattr(_threads, "streams"):
        _threads.streams = {}
    _threads.streams[stream.device.index] = stream


class use_stream:
    """As torch's, it can be entered again."""

    def __init__(self, stream: Stream | None) -> None:
        self._context = contextlib.nullcontext() if stream is None else stream

    def __enter__(self) -> None:
        self._context.__enter__()

    def __exit__(self, *exception: object) -> None:
        self._context.__exit__(*exception)


@contextlib.contextmanager
def use_device(device: torch.device | str | int) -> Iterator[None]:
    previous = index_of(None)
    set_device(device)
    try:
        yield
    finally:
        set_device(previous)


def set_device(device: torch.device | str | int) -> None:
    _threads.device = index_of(device)


def synchronize(device: torch.device | str | int | None = None) -> None:
    for stream in list(_streams):
        if stream.device.index == index_of(device):
            stream.synchronize()


@contextlib.contextmanager
def deferred_copies() -> Iterator[None]:
    """Copies with `non_blocking=True` on other streams than the default one really happen when they are waited for.

    So whoever does not wait for one reads what was there before. (SIMULATED_DEFERRED_COPIES=1: always.)
    """
    global defers_copies
    previous, defers_copies = defers_copies, True
    try:
        yield
    finally:
        defers_copies = previous
        for index in range(NUM_DEVICES):
            synchronize(index)


def mem_get_info(device: torch.device | str | int | None = None) -> tuple[int, int]:
    index = index_of(device)
    return free_bytes(index), free_bytes(index) + used_bytes[index]


def _memory_stats(device: torch.device | str | int | None = None) -> dict[str, int]:
    used = used_bytes[index_of(device)]
    return {"active_bytes.all.current": used, "reserved_bytes.all.current": used}


torch_module = types.SimpleNamespace(
    Stream=Stream,
    Event=Event,
    _is_in_bad_fork=lambda: False,
    current_device=lambda: index_of(None),
    current_stream=current_stream,
    default_stream=default_stream,
    device=use_device,
    device_count=lambda: NUM_DEVICES,
    empty_cache=lambda: None,
    get_amp_supported_dtype=lambda: [torch.float16, torch.bfloat16],
    get_device_name=lambda device=None: "simulated accelerator",
    is_available=lambda: True,
    is_initialized=lambda: True,
    manual_seed=lambda seed: None,
    manual_seed_all=lambda seed: None,
    mem_get_info=mem_get_info,
    max_memory_allocated=lambda device=None: peak_bytes[index_of(device)],
    memory_allocated=lambda device=None: used_bytes[index_of(device)],
    memory_reserved=lambda device=None: used_bytes[index_of(device)],
    memory_stats=_memory_stats,
    set_device=set_device,
    set_stream=set_stream,
    stream=use_stream,
    synchronize=synchronize,
)
"""What torch offers of a backend as `torch.<name>`."""
