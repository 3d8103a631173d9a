import threading

import pytest
import torch

from distorch2.comfyui.program import COMFYUI
from distorch2.moving.modules import Mover
from distorch2.moving.pinning import PinnedSlabs
from distorch2.moving.transfer import Upload

pytestmark = pytest.mark.quick

CPU = torch.device("cpu")


class Stream:
    def synchronize(self):
        pass


class Event(Stream):
    def record(self, stream):
        pass


def upload_on_the_cpu(monkeypatch, buffers):
    """The host in the place of an accelerator, with streams that do everything at once."""
    monkeypatch.setattr(torch.cpu, "current_stream", lambda device: Stream())
    monkeypatch.setattr(torch.cpu, "Event", Event, raising=False)
    return Upload(CPU, buffers)


def test_tensors_larger_than_the_buffers_arrive_whole_and_in_the_dtype_asked_for(monkeypatch):
    buffers = [torch.zeros(1000, dtype=torch.uint8) for _ in range(2)]
    upload = upload_on_the_cpu(monkeypatch, buffers)
    for shape in ((3, 5), (40, 50), (7,), (500,), ()):
        source = torch.randn(shape)
        for dtype in (torch.float32, torch.float16):
            target = torch.zeros(shape, dtype=dtype)
            upload.copy(source, target)
            upload.flush()
            assert torch.equal(target, source.to(dtype))
    upload.wait()


def test_what_was_loaded_in_inference_mode_may_come_before_what_was_not(monkeypatch):
    upload = upload_on_the_cpu(monkeypatch, [torch.zeros(1000, dtype=torch.uint8) for _ in range(2)])
    sources = [torch.randn(1000) for _ in range(3)]
    targets = []
    for source, mode in zip(sources, (True, False, True), strict=True):
        with torch.inference_mode(mode):
            targets.append(torch.zeros(1000))
            upload.copy(source, targets[-1])
    upload.flush()
    assert [target.is_inference() for target in targets] == [True, False, True]
    assert all(torch.equal(target, source) for target, source in zip(targets, sources, strict=True))


def test_what_cannot_be_read_is_raised(monkeypatch):
    upload = upload_on_the_cpu(monkeypatch, [torch.zeros(1000, dtype=torch.uint8) for _ in range(2)])
    upload.copy(torch.zeros(10, dtype=torch.float8_e4m3fn), torch.zeros(10))
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *arguments, **options: 1 / 0)
    upload.copy(torch.zeros(10), torch.zeros(10))
    with pytest.raises(ZeroDivisionError):
        upload.wait()


def test_a_tensor_stays_the_same_object_and_a_cpu_needs_no_buffers():
    module = torch.nn.Linear(1000, 1000)
    module.weight_comfy_model_dtype = torch.float16
    weight, expected = module.weight, module.weight.detach().half()
    with Mover(CPU, PinnedSlabs(CPU, COMFYUI)) as mover:
        mover.move(module)
        assert mover._upload is None
    assert module.weight is weight
    assert torch.equal(weight, expected)


class PageLocking:
    """A program that notes what it page-locks and unlocks, and calls `meanwhile` when it does the first."""

    def __init__(self, meanwhile=lambda: None):
        self.calls, self._meanwhile = [], meanwhile

    def can_pin_for(self, device):
        return True

    def may_pin(self, num_bytes):
        return True

    def pin(self, slab):
        self._meanwhile()
        self.calls.append("pin")
        return True

    def unpin(self, slab):
        self.calls.append("unpin")


def test_a_model_that_goes_while_another_is_page_locked():
    """ComfyUI drops what it can spare then, and page-locked memory with it."""
    dropped, slab = PinnedSlabs(CPU, PageLocking()), torch.zeros(8)
    dropped.pin(slab)
    program = PageLocking(dropped.unpin_all)
    pinned = PinnedSlabs(CPU, program)
    thread = threading.Thread(target=pinned.pin, args=(torch.zeros(8),), daemon=True)
    thread.start()
    thread.join(10)
    assert program.calls == ["pin"]
    assert not dropped.holds(slab)
    pinned.unpin_all()


def test_memory_that_is_page_locked_for_two_is_unlocked_with_the_last():
    program, slab = PageLocking(), torch.zeros(8)
    first, second = (PinnedSlabs(CPU, program) for _ in range(2))
    assert first.pin(slab)
    assert second.pin(slab)
    first.unpin(slab)
    assert program.calls == ["pin"]
    second.unpin_all()
    assert program.calls == ["pin", "unpin"]
