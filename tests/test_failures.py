"""What goes wrong, and what is said and left then: memory, lost devices, cancelled prompts, what the system refuses."""

import os

import comfy.model_management as mm
import pytest
import torch
from placing import (
    COMPUTE,
    HAS_SIMULATED,
    devices_known_to_comfyui,  # noqa: F401
    inference_mode,  # noqa: F401
    on_donor,
)
from sampling import output

from allocation_parser import AllocationError, parse_allocation
from distorch2.comfyui import failures
from distorch2.comfyui.program import COMFYUI
from distorch2.loading import load_checkpoint
from distorch2.moving.modules import Mover
from distorch2.moving.pinning import PinnedSlabs
from distorch2.planning.plan import ComponentRequest, PlanError, VirtualVram
from distorch2.serving.distribution import Distribution
from distorch2.serving.groups import StoredGroup
from distorch2.serving.stores import Stores
from distorch2.weights.checkpoint_file import CheckpointError, check_file

# Classes and texts: an exception that has been raised holds what the test had.
OUT_OF_MEMORY = [
    (torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB"),
    (RuntimeError, "CUDA error: out of memory\nCUDA kernel errors might be reported later"),
    (RuntimeError, "HIP error: out of memory"),
    (RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
]
LOST = [
    (RuntimeError, "CUDA error: an illegal memory access was encountered"),
    (RuntimeError, "HIP error: unspecified launch failure"),
    (RuntimeError, "CUDA error: uncorrectable ECC error encountered"),
    (RuntimeError, "CUDA error: the launch timed out and was terminated"),
]
NEITHER = [
    (RuntimeError, "CUDA error: invalid argument"),
    (RuntimeError, "HIP error: no kernel image is available for execution on the device"),
    (RuntimeError, "shape '[3]' is invalid for input of size 4"),
    (ValueError, "CUDA error: an illegal memory access was encountered"),  # in a text of somebody's
]


def failing_with(error):
    kind, text = error

    def fail(*arguments, **options):
        raise kind(text)

    return fail


@pytest.mark.quick
@pytest.mark.parametrize("error", [*OUT_OF_MEMORY, *LOST, *NEITHER], ids=lambda error: error[1])
def test_what_an_error_means(error):
    kind, text = error
    assert failures.is_out_of_memory(kind(text)) == (error in OUT_OF_MEMORY)
    assert failures.is_device_lost(kind(text)) == (error in LOST)


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: error[1])
def test_out_of_memory_while_placing_has_the_class_for_which_comfyui_unloads_models(checkpoints, monkeypatch, error):
    model = on_donor(checkpoints)[0]
    with monkeypatch.context() as patches:
        patches.setattr(StoredGroup, "serve_from", failing_with(error))
        with pytest.raises(mm.OOM_EXCEPTION, match="out of memory while placing SD3: the plan keeps"):
            mm.load_models_gpu([model])
    assert model.loaded_size() == 0
    expected = output_of(model)
    mm.unload_all_models()
    assert torch.equal(output_of(model), expected)


def output_of(model):
    mm.load_models_gpu([model])
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (1, 16, 8, 8), "c_crossattn": (1, 7, 4096), "y": (1, 2048)}
    inputs = {name: torch.randn(shape, generator=generator).to(COMPUTE) for name, shape in shapes.items()}
    return model.model.apply_model(t=torch.tensor([0.5], device=COMPUTE), **inputs)


def test_an_error_that_is_none_of_both_stays_what_it_is(checkpoints, monkeypatch):
    model = on_donor(checkpoints)[0]
    mm.load_models_gpu([model])
    with monkeypatch.context() as patches:
        patches.setattr(type(model.model.diffusion_model), "forward", failing_with(NEITHER[0]))
        with pytest.raises(RuntimeError, match="^CUDA error: invalid argument$"):
            output_of(model)


def test_a_device_that_is_lost_while_placing_leaves_nothing_half_placed(checkpoints, monkeypatch):
    model = on_donor(checkpoints)[0]
    fill = Stores._fill

    def lost_afterwards(stores, *arguments, **options):
        fill(stores, *arguments, **options)
        failing_with(LOST[0])()

    with monkeypatch.context() as patches:
        patches.setattr(Stores, "_fill", lost_afterwards)
        with pytest.raises(RuntimeError, match="restart ComfyUI"):
            mm.load_models_gpu([model])
    assert model.loaded_size() == 0
    assert not any("forward" in vars(module) for module in model.model.modules())


@pytest.mark.parametrize("nth", [1, 3])
def test_a_prompt_is_cancelled_while_weights_are_packed(checkpoints, monkeypatch, nth):
    model = on_donor(checkpoints, "flux", 100)[0]
    asked = []

    def cancelled():
        asked.append(None)
        if len(asked) == nth:
            raise mm.InterruptProcessingException

    with monkeypatch.context() as patches:
        patches.setattr(mm, "throw_exception_if_processing_interrupted", cancelled)
        with pytest.raises(mm.InterruptProcessingException):
            mm.load_models_gpu([model])
    assert len(asked) == nth
    assert model.loaded_size() == 0
    assert not any("forward" in vars(module) for module in model.model.modules())
    mm.unload_all_models()
    assert torch.isfinite(output(model)).all()


def test_buffers_are_given_back_when_what_they_are_for_fails(monkeypatch):
    locked = set()
    monkeypatch.setattr(mm, "is_device_cuda", lambda device: True)
    monkeypatch.setattr(mm, "ensure_pin_budget", lambda num_bytes: True)
    monkeypatch.setattr(mm, "ensure_pin_registerable", lambda num_bytes: True)
    monkeypatch.setattr(mm, "pin_memory", lambda tensor: locked.add(tensor.data_ptr()) or True)
    monkeypatch.setattr(mm, "unpin_memory", lambda tensor: locked.remove(tensor.data_ptr()))

    class FailingUpload:
        def __init__(self, buffers):
            self.buffers = buffers

        def wait(self):
            raise OSError("a file that is on a drive that is gone")

    pinned = PinnedSlabs(torch.device(COMPUTE), COMFYUI)
    with pytest.raises(OSError, match="gone"), Mover(torch.device(COMPUTE), pinned) as mover:
        mover._upload = FailingUpload([torch.zeros(8, dtype=torch.uint8) for _ in range(3)])
        assert all(pinned.pin(buffer) for buffer in mover._upload.buffers)
        assert len(locked) == 3
    assert not locked


@pytest.mark.quick
def test_page_locking_that_is_refused_is_not_asked_for_again(monkeypatch):
    asked = []
    monkeypatch.setattr(mm, "is_device_cuda", lambda device: True)
    monkeypatch.setattr(mm, "ensure_pin_budget", lambda num_bytes: True)
    monkeypatch.setattr(mm, "ensure_pin_registerable", lambda num_bytes: True)
    monkeypatch.setattr(mm, "pin_memory", lambda tensor: asked.append(tensor.nbytes) or tensor.nbytes < 50)
    monkeypatch.setattr(mm, "unpin_memory", lambda tensor: True)
    pinned = PinnedSlabs(torch.device("cuda"), COMFYUI)
    slabs = [torch.zeros(size, dtype=torch.uint8) for size in (100, 100, 200, 60, 60, 40, 80)]
    assert [pinned.pin(slab) for slab in slabs] == [False] * 5 + [True, False]
    assert asked == [100, 60, 40]
    pinned.unpin(slabs[5])  # there is more room then
    assert not pinned.pin(slabs[0])
    assert asked == [100, 60, 40, 100]


def test_a_load_where_nothing_can_be_page_locked_asks_a_few_times(checkpoints, monkeypatch):
    request = ComponentRequest("sim:0" if HAS_SIMULATED else COMPUTE, parse_allocation("cpu,*"), "stream")
    model = load_checkpoint(checkpoints("flux"), request, request, "cpu")[0]
    asked = []
    monkeypatch.setattr(mm, "pin_memory", lambda tensor: bool(asked.append(tensor.nbytes)))
    monkeypatch.setattr(mm, "ensure_pin_registerable", lambda num_bytes: True)
    monkeypatch.setattr(mm, "ensure_pin_budget", lambda num_bytes: True)
    model.distribution.pinned._is_useful = True
    distribution = model.distribution
    distribution.place(distribution.asked)
    assert 0 < len(asked) < len(distribution.groups) / 4
    distribution.release({})


def test_what_cannot_be_freed_is_not_packed_first(checkpoints, monkeypatch):
    """ComfyUI unloads the whole model then."""
    model = on_donor(checkpoints, "flux", 50)[0]
    mm.load_models_gpu([model])
    before = model.loaded_size()
    placed = []
    monkeypatch.setattr(Distribution, "place", lambda *arguments: placed.append(arguments))
    assert model.partially_unload(torch.device("cpu"), 2 * before) == 0
    assert placed == []
    assert model.loaded_size() == before


# --- texts


@pytest.mark.quick
@pytest.mark.parametrize("error", [PlanError, CheckpointError, AllocationError])
def test_the_type_of_an_error_does_not_name_a_folder(error):
    """ComfyUI sends the name of its module and its own."""
    assert error.__module__ == "distorch2"


def test_a_kind_of_device_that_torch_knows_nothing_of_is_refused(checkpoints, monkeypatch):
    device = torch.device("hpu", 0)  # as DirectML's: torch has no module for its streams
    monkeypatch.delattr(torch, "hpu", raising=False)
    devices = mm.get_all_torch_devices()
    monkeypatch.setattr(mm, "get_all_torch_devices", lambda *arguments, **options: [*devices, device])
    request = ComponentRequest(str(device), VirtualVram(1.0, "cpu"))
    with pytest.raises(PlanError, match=r"hpu:0 is of a kind that torch has no streams and events for \(DirectML"):
        load_checkpoint(checkpoints("flux"), request, request, "cpu")


@pytest.mark.quick
def test_a_link_to_nothing_says_where_it_leads(tmp_path):
    link = tmp_path / "model.safetensors"
    os.symlink(tmp_path / "gone" / "model.safetensors", link)
    with pytest.raises(CheckpointError, match=r"is a link to .*gone.*, which is not there"):
        check_file(str(link))
