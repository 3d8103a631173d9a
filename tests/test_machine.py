"""What is measured of a machine: once, and kept in a file. Simulated accelerators."""

import json

import folder_paths
import pytest
import torch
from placing import HAS_SIMULATED

from distorch2 import machine
from distorch2.moving import speed

if not HAS_SIMULATED:
    pytest.skip("for simulated accelerators; this machine has a real one", allow_module_level=True)
import simulated_accelerators as sim

ONE, OTHER = "sim:0", "sim:1"


@pytest.fixture(autouse=True)
def file(monkeypatch, tmp_path):
    """Of a machine of which nothing is known yet."""
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path))
    machine._known.cache_clear()
    yield tmp_path / "__distorch2" / "speeds.json"
    machine._known.cache_clear()


def test_measuring_is_done_once_and_leaves_nothing(monkeypatch, file):
    monkeypatch.setattr(speed, "_SIDE", 16)  # of these devices, which the host computes for
    monkeypatch.setattr(speed, "_COPIED_BYTES", 4096)
    assert machine.multiplications_per_second(ONE, may_measure=False) is None
    assert machine.bytes_per_second(OTHER, ONE, may_measure=False) is None
    assert not file.exists()
    found = machine.multiplications_per_second(ONE, True), machine.bytes_per_second(OTHER, ONE, True)
    assert min(found) > 0
    assert sim.used_bytes == [0, 0]
    monkeypatch.setattr(speed, "_seconds", None)
    assert (machine.multiplications_per_second(ONE, True), machine.bytes_per_second(OTHER, ONE, True)) == found
    machine._known.cache_clear()
    assert (machine.multiplications_per_second(ONE, False), machine.bytes_per_second(OTHER, ONE, False)) == found
    assert machine.bytes_per_second(ONE, OTHER, False) is None  # the other way is another link
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_another_card_or_another_torch_is_measured_anew(monkeypatch, file):
    values = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(speed, "multiplications_per_second", lambda device: next(values))
    assert machine.multiplications_per_second(ONE, True) == 1.0
    with monkeypatch.context() as patches:
        patches.setattr(torch.sim, "get_device_name", lambda device: "another")
        assert machine.multiplications_per_second(ONE, True) == 2.0
    with monkeypatch.context() as patches:
        patches.setattr(torch, "__version__", "another")
        assert machine.multiplications_per_second(ONE, True) == 3.0
    assert machine.multiplications_per_second(ONE, True) == 1.0
    assert sorted(json.loads(file.read_text()).values()) == [1.0, 2.0, 3.0]


ODD = ["", "{", "[1.0]", '{"a": "b"}', '{"a": -1.0}', '{"a": NaN}', '{"a": true}', "\udcff", "[" * 100_000]


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_a_file_that_says_nothing_is_written_anew(monkeypatch, file, text):
    file.parent.mkdir(parents=True)
    file.write_text(text, encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(speed, "multiplications_per_second", lambda device: 7.0)
    assert machine.multiplications_per_second(ONE, True) == 7.0
    machine._known.cache_clear()
    assert machine.multiplications_per_second(ONE, False) == 7.0
    assert [path.name for path in file.parent.iterdir()] == [file.name]


@pytest.mark.parametrize("what", ["a folder", "no folder"])
def test_what_cannot_be_written_is_known_for_this_process(monkeypatch, file, what):
    if what == "a folder":
        file.mkdir(parents=True)
    else:
        file.parent.write_text("a file where its folder would be")
    monkeypatch.setattr(speed, "multiplications_per_second", lambda device: 7.0)
    assert machine.multiplications_per_second(ONE, True) == 7.0
    assert machine.multiplications_per_second(ONE, False) == 7.0
    assert what == "no folder" or [path.name for path in file.parent.iterdir()] == [file.name]


def test_what_another_process_has_written_stays(monkeypatch, file):
    monkeypatch.setattr(speed, "multiplications_per_second", lambda device: 7.0)
    machine.multiplications_per_second(ONE, True)
    file.write_text(json.dumps({**json.loads(file.read_text()), "of another": 1.0, "odd": []}))
    machine.multiplications_per_second(OTHER, True)
    assert len(found := json.loads(file.read_text())) == 3
    assert found["of another"] == 1.0


def test_a_device_that_cannot_be_measured_is_not_known(monkeypatch, file):
    def fail(*devices):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(speed, "multiplications_per_second", fail)
    monkeypatch.setattr(speed, "link_bytes_per_second", fail)
    assert machine.multiplications_per_second(ONE, True) is None
    assert machine.bytes_per_second(OTHER, ONE, True) is None
    assert machine.bytes_per_second("cpu", ONE, True) is None  # nothing is page-locked for it
    assert not file.exists()
