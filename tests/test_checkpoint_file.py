import json
import struct

import pytest

from distorch2.weights.checkpoint_file import CheckpointError, check_file

pytestmark = pytest.mark.quick


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return str(path)


def test_a_whole_file_is_accepted(tmp_path):
    header = {"__metadata__": {"a": "b"}, "x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}
    check_file(write(tmp_path / "a.safetensors", header, b"1234"))
    check_file(write(tmp_path / "b.SFT", {}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not a safetensors file"),
        (b"PK\x03\x04 and so on", "is not a safetensors file"),
        (struct.pack("<Q", 4) + b"{oh}", "its header is damaged; download it again"),
        (struct.pack("<Q", 2) + b"[]", "its header is damaged; download it again"),
        (struct.pack("<Q", 8) + b'{"x": 1}', "its header is damaged; download it again"),
        (struct.pack("<Q", 200_000) + b"[" * 200_000, "its header is damaged; download it again"),
        (struct.pack("<Q", 100) + b'{"x"', "is cut off: it has 12 of 108 bytes; download it again"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        check_file(str(path))


def test_a_file_cut_off_in_its_data_is_refused(tmp_path):
    # 8 bytes of size and 60 of header before 4 bytes of data; one is missing.
    path = write(tmp_path / "a.safetensors", {"x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, b"123")
    with pytest.raises(CheckpointError, match="is cut off: it has 71 of 72 bytes; download it again"):
        check_file(path)


def test_bytes_after_the_last_tensor_are_refused(tmp_path):
    path = write(tmp_path / "a.safetensors", {"x": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}, b"1234567")
    with pytest.raises(CheckpointError, match="has 3 bytes after its last tensor"):
        check_file(path)


@pytest.mark.parametrize("name", ["missing.safetensors", "missing.ckpt", "."])
def test_a_missing_file_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError, match="there is no file .*; press R to refresh"):
        check_file(str(tmp_path / name))
