"""ComfyUI computing on sim:0, with its own memory management, for tests in process."""

import gc

import comfy.model_base
import comfy.model_management as mm
import pytest
import torch
from placing import HAS_SIMULATED
from sampling import runs_of_core, sample

from allocation_parser import parse_allocation
from distorch2.loading import load_checkpoint
from distorch2.planning.plan import ComponentRequest

if not HAS_SIMULATED:
    pytest.skip("for simulated accelerators; this machine has a real one", allow_module_level=True)
import simulated_accelerators as sim

MIB = 1024**2
INFERENCE_BYTES = 16 * MIB


@pytest.fixture
def inference_mode():
    with torch.inference_mode():
        yield
    mm.unload_all_models()
    gc.collect()
    assert not any(sim.used_bytes), sim.used_bytes


@pytest.fixture(scope="module")
def expected(request, checkpoints):
    """kind -> latents of ComfyUI's loader on the CPU, whose kernels the simulated devices use, for the module's KINDS.

    They are made before anything computes on sim:0.
    """
    latents = runs_of_core(checkpoints, lambda model, clip, vae: sample(model, clip))
    return {kind: latents(kind) for kind in request.module.KINDS}


@pytest.fixture
def computing(expected, monkeypatch):
    """sim:0 computes, from now on."""
    compute_on_sim(monkeypatch)


def compute_on_sim(monkeypatch):
    sim.tell_comfyui(monkeypatch.setattr, compute="sim:0", inference_bytes=INFERENCE_BYTES)
    # ComfyUI runs positive and negative conditioning as one batch when there is room for it, which gives other bits.
    monkeypatch.setattr(comfy.model_base.BaseModel, "memory_required", lambda *arguments, **options: 0)


def limit(monkeypatch, index, num_bytes):
    """How much memory a simulated accelerator has."""
    capacity = list(sim.capacity_bytes)
    capacity[index] = int(num_bytes)
    monkeypatch.setattr(sim, "capacity_bytes", capacity)


def load(checkpoints, kind, text, donor_mode="stream", **options):
    """(model, clip) with the diffusion model as in `text`, and the text encoder on the host."""
    unet = ComponentRequest("sim:0", parse_allocation(text), donor_mode)
    clip = ComponentRequest("cpu", parse_allocation("cpu,*"))
    return load_checkpoint(checkpoints(kind), unet, clip, "cpu", **options)[:2]


def same(latents, expected):
    return torch.equal(latents.cpu(), expected)
