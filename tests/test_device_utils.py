import types

import pytest
import torch

import device_utils

pytestmark = pytest.mark.quick


@pytest.fixture
def machine(monkeypatch):
    """Replaces what torch reports: {"cuda": 2} is a machine with two CUDA devices and nothing else."""

    def install(counts, has_mps=False):
        device_utils.list_devices.cache_clear()
        for name in ("cuda", "xpu", "npu", "mlu", "sim"):
            monkeypatch.delattr(torch, name, raising=False)
        for name, count in counts.items():
            backend = types.SimpleNamespace(
                is_available=lambda count=count: count > 0,
                device_count=lambda count=count: count,
            )
            monkeypatch.setattr(torch, name, backend, raising=False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: has_mps)

    yield install
    monkeypatch.undo()
    device_utils.list_devices.cache_clear()


@pytest.mark.parametrize(
    ("counts", "has_mps", "devices", "first"),
    [
        ({}, False, ("cpu",), "cpu"),
        ({"cuda": 0}, False, ("cpu",), "cpu"),
        ({"cuda": 2}, False, ("cpu", "cuda:0", "cuda:1"), "cuda:0"),
        ({"cuda": 1, "xpu": 1}, False, ("cpu", "cuda:0", "xpu:0"), "cuda:0"),
        ({"npu": 1}, False, ("cpu", "npu:0"), "npu:0"),
        ({"mlu": 2}, False, ("cpu", "mlu:0", "mlu:1"), "mlu:0"),
        ({}, True, ("cpu", "mps"), "mps"),
    ],
)
def test_lists_cpu_first_then_the_accelerators(machine, counts, has_mps, devices, first):
    machine(counts, has_mps)
    assert device_utils.list_devices() == devices
    assert device_utils.first_accelerator(devices) == first


def test_torch_is_asked_once(machine, monkeypatch):
    machine({"cuda": 1})
    assert device_utils.list_devices() == ("cpu", "cuda:0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: pytest.fail("asked again"))
    assert device_utils.list_devices() == ("cpu", "cuda:0")
