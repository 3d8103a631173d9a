"""Allocation strings: which device keeps how much of a model.

    allocation = entry *( ";" entry ) [ ";" ] / "auto" [ ";" "keep" "=" number unit ] [ ";" ]
    entry      = device "," amount
    device     = "cpu" / "mps" / "disk" / name [ ":" index ]
    amount     = number "%"             a ratio when every entry has one, else a part of the model
               / number unit [ "*" ]    bytes, powers of 1024; with "*": whatever remains
               / "*"                    whatever remains
               / number                 0 to 1: a fraction of that device's total memory; not for "disk"

`auto` fills the compute device, then others of its kind, and keeps so many bytes of each free. Blank around tokens is
free and case does not matter. `parse_allocation` turns the text into an `Allocation`, or `Automatic`; nothing behind it
sees a string again. Standard library only.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction

MAX_LENGTH = 4096
UNITS = {
    "b": 1,
    "k": 1024, "kb": 1024,
    "m": 1024**2, "mb": 1024**2,
    "g": 1024**3, "gb": 1024**3,
    "t": 1024**4, "tb": 1024**4,
}  # fmt: skip
OVERFLOW_DEVICE = "cpu"  # as in distorch2/plan.py, which this file may not import
_ONE_CARD_ON_WINDOWS = (
    "; on Windows newer ComfyUIs use the first NVIDIA card only, unless they are started with "
    "--cuda-device all --disable-pinned-memory"
)
DISK_NAME = "disk"
"""Weights there are read from their files while the model runs."""
_UNINDEXED_DEVICES = ("cpu", "mps", DISK_NAME)

_AUTO = "auto"
_AUTO_EXAMPLES = "use auto, or auto;keep=3gb to leave so much of each device free"
_KEEP = re.compile(r"keep\s*=\s*", re.IGNORECASE)
_EXAMPLES = "use 50%, 2gb, 2gb*, * or a fraction from 0 to 1"
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+")
_WORD = re.compile(r"[A-Za-z]+")
_DEVICE = re.compile(r"([A-Za-z][A-Za-z_]*)(?:\s*:\s*([0-9]+))?")


class AllocationError(ValueError):
    """A mistake in an allocation string.

    Attributes: `message` says what is wrong and what is accepted, `source` is the whole text, `position` and `end` are
    the 0-based span of the mistake in it. `str()` renders them with the span marked, cutting a long source to the
    part around the mistake.
    """

    __module__ = "distorch2"  # ComfyUI shows it; as a pack this is a folder of the user's
    _CONTEXT = 36

    def __init__(self, message: str, source: str, position: int, end: int | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.source = source
        self.position = position
        self.end = position if end is None else end

    def __str__(self) -> str:
        first = max(0, self.position - self._CONTEXT)
        last = min(len(self.source), min(self.end, self.position + self._CONTEXT) + self._CONTEXT)
        before, after = "..." * (first > 0), "..." * (last < len(self.source))
        # One column per character, so that the mark stands under the mistake.
        shown = "".join(c if c.isprintable() else " " if c.isspace() else "?" for c in self.source[first:last])
        mark = "~" * (min(self.end, last) - self.position) + "^"
        return f"{self.message}\n    {before}{shown}{after}\n    {' ' * (len(before) + self.position - first)}{mark}"


@dataclass(frozen=True)
class Percent:
    """`value` hundredths of the model, or a weight when all entries are percentages."""

    value: Decimal

    def __str__(self) -> str:
        return f"{self.value:f}%"


@dataclass(frozen=True)
class Bytes:
    """`count` bytes of the model."""

    count: int

    def __str__(self) -> str:
        unit = next(unit for unit in ("tb", "gb", "mb", "kb", "b") if self.count % UNITS[unit] == 0)
        return f"{self.count // UNITS[unit]}{unit}"


@dataclass(frozen=True)
class Remainder:
    """Whatever the other entries leave; `hint_bytes` is the number written before the `*`, if any."""

    hint_bytes: int | None = None

    def __str__(self) -> str:
        return "*" if self.hint_bytes is None else f"{Bytes(self.hint_bytes)}*"


@dataclass(frozen=True)
class MemoryFraction:
    """As many bytes of the model as `value` (0 to 1) of the device's total memory."""

    value: Decimal

    def __str__(self) -> str:
        return f"{self.value:f}"


Amount = Percent | Bytes | Remainder | MemoryFraction


@dataclass(frozen=True)
class Entry:
    device: str
    amount: Amount


@dataclass(frozen=True)
class Allocation:
    """A parsed allocation string; `str()` gives a string that parses to an equal record."""

    entries: tuple[Entry, ...]

    def __str__(self) -> str:
        return ";".join(f"{entry.device},{entry.amount}" for entry in self.entries)

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(entry.device for entry in self.entries)

    @property
    def is_ratio(self) -> bool:
        """Whether the percentages are weights of a ratio, normalised to the whole model."""
        return all(isinstance(entry.amount, Percent) for entry in self.entries)

    @property
    def note(self) -> str:
        """What a reader may not expect of this allocation, or an empty string."""
        only = self.entries[0].amount
        if len(self.entries) == 1 and isinstance(only, Percent) and only.value != 100:
            note = f"{self} alone is a ratio of one and means the whole model"
            device = self.entries[0].device
            return f"{note}; to keep a part: {self};cpu,*" if only.value < 100 and device != "cpu" else note
        return ""

    def shares(
        self,
        model_bytes: int,
        compute_device: str,
        device_total_bytes: Mapping[str, int],
    ) -> tuple[tuple[str, int], ...]:
        """Bytes asked of each device, in the order of the string; they add up to `model_bytes`.

        `device_total_bytes` needs the devices whose amount is a fraction of their memory. What no entry asks for goes
        to the entry with `*`, and without one to `cpu`; more than the model has leaves less for the later entries.
        """
        if self.is_ratio:
            return self._ratio_shares(model_bytes)
        asked: dict[str, int] = {}
        rest_device = OVERFLOW_DEVICE
        left = model_bytes
        for entry in self.entries:
            device, amount = entry.device, entry.amount
            asked[device] = 0
            if isinstance(amount, Remainder):
                rest_device = device
                continue
            if isinstance(amount, Percent):
                wanted = int(Fraction(amount.value) * model_bytes / 100)
            elif isinstance(amount, MemoryFraction):
                wanted = int(Fraction(amount.value) * device_total_bytes[device])
            else:
                wanted = amount.count
            asked[device] = min(wanted, left)
            left -= asked[device]
        if left:
            asked[rest_device] = asked.get(rest_device, 0) + left
        return tuple(asked.items())

    def _ratio_shares(self, model_bytes: int) -> tuple[tuple[str, int], ...]:
        amounts = (entry.amount for entry in self.entries)
        weights = [Fraction(amount.value) for amount in amounts if isinstance(amount, Percent)]
        shares, reached, given = [], Fraction(0), 0
        for device, weight in zip(self.devices, weights):
            reached += weight
            boundary = int(model_bytes * reached / sum(weights))
            shares.append((device, boundary - given))
            given = boundary
        return tuple(shares)


@dataclass(frozen=True)
class Automatic:
    """Shares are to be chosen, among `accelerators` of the compute device's kind and `cpu`, beside the compute device.
    `keep_bytes` of each accelerator stay free."""

    accelerators: tuple[str, ...]
    keep_bytes: int = 0

    def __str__(self) -> str:
        return f"{_AUTO};keep={Bytes(self.keep_bytes)}" if self.keep_bytes else _AUTO

    @property
    def devices(self) -> tuple[str, ...]:
        return (*self.accelerators, OVERFLOW_DEVICE)


def parse_allocation(text: str, devices: Collection[str] | None = None) -> Allocation | Automatic:
    """Parse an allocation string in time linear in its length.

    `devices`, when given, are the names of the devices that exist; any other is an error.
    Raises `AllocationError` for every mistake, the first one in the text.
    """
    if len(text) > MAX_LENGTH:
        raise AllocationError(
            f"the allocation has {len(text):,} characters; the longest accepted has {MAX_LENGTH:,}", text, MAX_LENGTH
        )
    if not text.strip():
        raise AllocationError("the allocation is empty; write device,amount, as in cuda:0,50%;cpu,50%", text, 0)
    if text.partition(";")[0].strip().lower() == _AUTO:
        return _parse_automatic(text, devices or ())
    entries: list[Entry] = []
    seen: set[str] = set()
    has_remainder = False
    for start, end in _entry_spans(text):
        if not text[start:end].strip():
            raise AllocationError("empty entry; write device,amount between semicolons", text, start, end)
        comma = text.find(",", start, end)
        if comma < 0:
            raise AllocationError(
                "missing comma; write device,amount, as in cuda:0,50%", text, *_strip(text, start, end)
            )
        device = _parse_device(text, start, comma, devices)
        if device in seen:
            message = f"{device} stands twice; give each device one entry"
            raise AllocationError(message, text, *_strip(text, start, comma))
        amount = _parse_amount(text, comma + 1, end)
        if device == DISK_NAME and isinstance(amount, MemoryFraction):
            message = f"a fraction of {DISK_NAME} is not defined; use 50%, 2gb, 2gb* or *"
            raise AllocationError(message, text, *_strip(text, comma + 1, end))
        if isinstance(amount, Remainder):
            if has_remainder:
                star = text.rindex("*", start, end)
                raise AllocationError("only one entry can take what remains (*)", text, star, star + 1)
            has_remainder = True
        seen.add(device)
        entries.append(Entry(device, amount))
    if not any(_is_positive(entry.amount) for entry in entries):
        raise AllocationError(
            "every amount is zero; give at least one device a part", text, *_strip(text, 0, len(text))
        )
    return Allocation(tuple(entries))


def _parse_automatic(text: str, devices: Collection[str]) -> Automatic:
    accelerators = tuple(device for device in devices if device not in ("cpu", DISK_NAME))
    _, *settings = _entry_spans(text)
    if not settings:
        return Automatic(accelerators)
    start, end = _strip(text, *settings[0])
    keep = _KEEP.match(text, start, end)
    if keep is None or len(settings) > 1:
        raise AllocationError(f"{_quote(text[start:])} cannot follow auto; {_AUTO_EXAMPLES}", text, start, len(text))
    amount = _parse_amount(text, keep.end(), end)
    if not isinstance(amount, Bytes):
        raise AllocationError(f"keep takes bytes, as in 3gb; {_AUTO_EXAMPLES}", text, keep.end(), end)
    return Automatic(accelerators, amount.count)


def _entry_spans(text: str) -> list[tuple[int, int]]:
    """The spans between semicolons; one blank span after the last semicolon is dropped."""
    spans, start = [], 0
    for part in text.split(";"):
        spans.append((start, start + len(part)))
        start += len(part) + 1
    if len(spans) > 1 and not text[slice(*spans[-1])].strip():
        spans.pop()
    return spans


def _parse_device(text: str, start: int, end: int, devices: Collection[str] | None) -> str:
    start, end = _strip(text, start, end)
    if start == end:
        raise AllocationError("missing device before the comma; write cpu, cuda:0 or the like", text, start)
    match = _DEVICE.fullmatch(text, start, end)
    if match is None:
        message = f"{_quote(text[start:end])} is not a device; write a name and an index, as in cpu or cuda:0"
        raise AllocationError(message, text, start, end)
    name, index = match[1].lower(), int(match[2] or 0)
    if name in _UNINDEXED_DEVICES:
        if index:
            raise AllocationError(f"there is one {name} only; write {name}", text, start, end)
        device = name
    else:
        device = f"{name}:{index}"
    if devices is not None and device not in devices:
        message = f"unknown device {_quote(device)}; this machine has {', '.join(devices)}"
        if name == "cuda" and index and "cuda:0" in devices and sys.platform == "win32":
            message += _ONE_CARD_ON_WINDOWS
        raise AllocationError(message, text, start, end)
    return device


def _parse_amount(text: str, start: int, end: int) -> Amount:
    start, end = _strip(text, start, end)
    if start == end:
        raise AllocationError(f"missing amount after the comma; {_EXAMPLES}", text, start)
    if text[start] == "*":
        _expect_end(text, start + 1, end, "*")
        return Remainder()
    number = _NUMBER.match(text, start, end)
    if number is None:
        reason = "cannot be negative" if text[start] == "-" else "is not an amount"
        raise AllocationError(f"{_quote(text[start:end])} {reason}; {_EXAMPLES}", text, start, end)
    value = Decimal(number[0])
    suffix, _ = _strip(text, number.end(), end)
    if suffix == end:
        if value > 1:
            message = (
                f"{_quote(number[0])} has no unit; a bare number is a fraction of the device's memory, from 0 to 1"
            )
            raise AllocationError(f"{message}; for bytes write {_shorten(number[0])}gb", text, start, end)
        return MemoryFraction(value)
    if text[suffix] == "%":
        _expect_end(text, suffix + 1, end, "%")
        return Percent(value)
    return _parse_bytes(text, suffix, end, number[0])


def _parse_bytes(text: str, start: int, end: int, number: str) -> Bytes | Remainder:
    """The unit from `start` on, and the `*` behind it, if any."""
    word = _WORD.match(text, start, end)
    if word is None:
        raise _unexpected(text, start, end, number)
    if word[0].lower() not in UNITS:
        raise AllocationError(f"unknown unit {_quote(word[0])}; use b, kb, mb, gb or tb", text, *word.span())
    count = int(Fraction(Decimal(number)) * UNITS[word[0].lower()])
    star, _ = _strip(text, word.end(), end)
    if text[star:end].startswith("*"):
        _expect_end(text, star + 1, end, "*")
        return Remainder(hint_bytes=count)
    _expect_end(text, star, end, word[0])
    return Bytes(count)


def _expect_end(text: str, start: int, end: int, after: str) -> None:
    start, _ = _strip(text, start, end)
    if start < end:
        raise _unexpected(text, start, end, after)


def _unexpected(text: str, start: int, end: int, after: str) -> AllocationError:
    hint = _EXAMPLES
    if text[start] == ",":
        hint = "entries are separated by ';', and a decimal point is '.'"
    return AllocationError(f"unexpected {_quote(text[start:end])} after {_quote(after)}; {hint}", text, start, end)


def _is_positive(amount: Amount) -> bool:
    return isinstance(amount, Remainder) or (amount.count if isinstance(amount, Bytes) else amount.value) > 0


def _strip(text: str, start: int, end: int) -> tuple[int, int]:
    """The span without blank at its ends; an all-blank span becomes empty at `end`."""
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    return start, end


def _shorten(token: str) -> str:
    return token if len(token) <= 24 else token[:21] + "..."


def _quote(token: str) -> str:
    return repr(_shorten(token))
