"""What is measured of a machine: once, and kept in a file. Simulated accelerators."""

import json

import pytest
import torch
from placing import HAS_SIMULATED

from distorch2 import machine
from distorch2.moving import speed

if not HAS_SIMULATED:
    pytest.skip("for simulated accelerators; this machine has a real one", allow_module_level=True)
import simulated_accelerators as sim

ONE, OTHER = torch.device("sim:0"), torch.device("sim:1")


@pytest.fixture(autouse=True)
def file(monkeypatch, tmp_path):
    """Of a machine of which nothing is known yet."""
    monkeypatch.setattr(machine, "_known", None)
    monkeypatch.setattr(machine, "user_folder", lambda: str(tmp_path / "user" / "__distorch2"))
    return tmp_path / "user" / "__distorch2" / "speeds.json"


def starts_again(monkeypatch):
    monkeypatch.setattr(machine, "_known", None)


def test_measuring_is_done_once_and_leaves_nothing(monkeypatch, file):
    monkeypatch.setattr(speed, "_SIDE", 16)  # of these devices, which the host computes for
    monkeypatch.setattr(speed, "_COPIED_BYTES", 4096)
    assert machine.multiplications(ONE, may_measure=False) is None
    assert machine.link(OTHER, ONE, may_measure=False) is None
    assert not file.exists()
    found = machine.multiplications(ONE, True), machine.link(OTHER, ONE, True)
    assert min(found) > 0
    assert sim.used_bytes == [0, 0]
    monkeypatch.setattr(speed, "_seconds", None)
    assert (machine.multiplications(ONE, True), machine.link(OTHER, ONE, True)) == found
    starts_again(monkeypatch)
    assert (machine.multiplications(ONE, False), machine.link(OTHER, ONE, False)) == found
    assert machine.link(ONE, OTHER, False) is None  # the other way is another link
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_another_card_or_another_torch_is_measured_anew(monkeypatch, file):
    values = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr(machine, "multiplications_per_second", lambda device: next(values))
    assert machine.multiplications(ONE, True) == 1.0
    with monkeypatch.context() as patches:
        patches.setattr(torch.sim, "get_device_name", lambda device: "another")
        assert machine.multiplications(ONE, True) == 2.0
    with monkeypatch.context() as patches:
        patches.setattr(torch, "__version__", "another")
        assert machine.multiplications(ONE, True) == 3.0
    assert machine.multiplications(ONE, True) == 1.0
    assert sorted(json.loads(file.read_text()).values()) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("text", ["", "{", "[1.0]", '{"a": "b"}', '{"a": -1.0}', '{"a": NaN}', "\udcff", None])
def test_a_file_that_says_nothing_is_written_anew(monkeypatch, file, text):
    file.parent.mkdir(parents=True)
    if text is None:
        file.mkdir()
    else:
        file.write_text(text, encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(machine, "multiplications_per_second", lambda device: 7.0)
    assert machine.multiplications(ONE, True) == 7.0
    if text is not None:
        starts_again(monkeypatch)
    assert machine.multiplications(ONE, False) == 7.0  # where it cannot be written it is known for this process


def test_a_device_that_cannot_be_measured_is_not_known(monkeypatch, file):
    def fail(*devices):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(machine, "multiplications_per_second", fail)
    monkeypatch.setattr(machine, "link_bytes_per_second", fail)
    assert machine.multiplications(ONE, True) is None
    assert machine.link(OTHER, ONE, True) is None
    assert machine.link(machine.CPU, ONE, True) is None  # nothing is page-locked for it
    assert not file.exists()
