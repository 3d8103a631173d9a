"""Is this file whole? Checked from its header, before anything is read or built."""

from __future__ import annotations

import json
import os
import struct
from typing import Any, NamedTuple

_SAFETENSORS_ENDINGS = (".safetensors", ".sft")
_MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format."""


class CheckpointError(RuntimeError):
    """A file that cannot be loaded as a checkpoint; the message says why and what to do."""

    __module__ = "distorch2"  # ComfyUI shows it; as a pack this is a folder of the user's


def check_file(path: str) -> None:
    """Raise `CheckpointError` when `path` is missing, or is a safetensors file that is damaged or cut off."""
    _checked(path)


def _checked(path: str) -> tuple[dict[str, Any], int] | None:
    """The header of a safetensors file, and where its data begins; None for a file in another format."""
    if os.path.islink(path) and not os.path.exists(path):
        raise CheckpointError(
            f"{path} is a link to {os.readlink(path)}, which is not there: has it been moved, or is its drive not "
            "connected?"
        )
    if not os.path.isfile(path):
        raise CheckpointError(
            f"there is no file {path}; press R to refresh the list of checkpoints, and pick one of it"
        )
    if not path.lower().endswith(_SAFETENSORS_ENDINGS):
        return None
    try:
        return _check_safetensors(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}; check the file and its permissions") from error


class StoredTensor(NamedTuple):
    """A tensor of a safetensors file: `dtype` as the format names it, and its bytes in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: str) -> tuple[dict[str, StoredTensor], dict[str, str] | None]:
    """The tensors of a safetensors file, by name, and its metadata. Raises `CheckpointError` as `check_file`."""
    checked = _checked(path)
    if checked is None:
        raise CheckpointError(f"{path} is no safetensors file: what is in it is not known before it is loaded")
    header, data_start = checked
    metadata = header.pop("__metadata__", None)
    try:
        tensors = {name: _stored_tensor(info, data_start) for name, info in header.items()}
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path) from error
    return tensors, metadata


def _stored_tensor(info: Any, data_start: int) -> StoredTensor:
    """Raises `ValueError`, `KeyError` or `TypeError` where it is none."""
    dtype, shape, (begin, end) = info["dtype"], info["shape"], info["data_offsets"]
    numbers = [*shape, begin, end]
    if not isinstance(dtype, str) or any(type(each) is not int or each < 0 for each in numbers) or end < begin:
        raise ValueError(info)
    return StoredTensor(dtype, tuple(shape), data_start + begin, data_start + end)


def _check_safetensors(path: str) -> tuple[dict[str, Any], int]:
    """As `_checked`.

    Layout: 8 bytes little-endian header size, JSON header with byte ranges, data (safetensors format, 2022)."""
    file_bytes = os.path.getsize(path)
    with open(path, "rb") as file:
        prefix = file.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else None
        if header_bytes is None or header_bytes > _MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{path} is not a safetensors file: it is empty, a saved web page or of another kind; "
                "download it again, or give it the name of its format"
            )
        text = file.read(header_bytes)
    data_start = 8 + header_bytes
    if len(text) < header_bytes:
        raise _cut_off(path, data_start, file_bytes)
    try:
        header = json.loads(text)
        tensors = [info for name, info in header.items() if name != "__metadata__"]
        expected_bytes = data_start + max((info["data_offsets"][1] for info in tensors), default=0)
    except (ValueError, AttributeError, KeyError, TypeError, IndexError, RecursionError) as error:
        raise _damaged(path) from error
    if file_bytes < expected_bytes:
        raise _cut_off(path, expected_bytes, file_bytes)
    if file_bytes > expected_bytes:
        raise CheckpointError(
            f"{path} has {file_bytes - expected_bytes:,} bytes after its last tensor, as when a download was taken up "
            "again at the wrong place; download it again"
        )
    return header, data_start


def _damaged(path: str) -> CheckpointError:
    return CheckpointError(f"{path} is not a safetensors file, or its header is damaged; download it again")


def _cut_off(path: str, expected_bytes: int, file_bytes: int) -> CheckpointError:
    message = f"{path} is cut off: it has {file_bytes:,} of {expected_bytes:,} bytes; download it again"
    return CheckpointError(message)
