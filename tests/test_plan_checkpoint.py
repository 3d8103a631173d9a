"""What a checkpoint's header says of a load that has not been made."""

import json
import struct
from pathlib import Path

import pytest
from checkpoints import KINDS
from placing import COMPUTE, DONOR, devices_known_to_comfyui, inference_mode  # noqa: F401

from allocation_parser import parse_allocation
from distorch2.components import DIFFUSION_MODEL, TEXT_ENCODER, VAE
from distorch2.loading import load_checkpoint
from distorch2.planning.plan import ComponentRequest, Plan, PlanError, VirtualVram
from distorch2.plans import plan_checkpoint
from distorch2.weights.checkpoint_file import CheckpointError
from distorch2.weights.inventory import list_layers

# Of a diffusion model or a text encoder alone.
CHECKPOINTS = [kind for kind, each in KINDS.items() if each.suffix != ".ckpt" and kind != "clip_l"]


@pytest.mark.parametrize("percent", [0, 25, 50, 90, 100])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_the_plans_are_those_of_the_load(checkpoints, kind, percent):
    text = f"{COMPUTE},{100 - percent}%;{DONOR},{percent}%" if percent else f"{COMPUTE},*"
    unet = ComponentRequest(COMPUTE, parse_allocation(text))
    clip = ComponentRequest(COMPUTE, VirtualVram(0.05, DONOR))
    planned = plan_checkpoint(checkpoints(kind), unet, clip, COMPUTE)
    model, encoder, vae = load_checkpoint(checkpoints(kind), unet, clip, COMPUTE)
    assert (VAE in planned) == (getattr(vae, "patcher", None) is not None)
    if VAE in planned:
        assert planned[VAE] == Plan.all_on(COMPUTE, list_layers(vae.first_stage_model))
    assert planned[DIFFUSION_MODEL] == model.distribution.asked
    assert (TEXT_ENCODER in planned) == (encoder is not None)
    if encoder is not None:
        assert planned[TEXT_ENCODER] == encoder.patcher.distribution.asked


def test_nothing_is_read_but_the_header(checkpoints, tmp_path):
    """The data may be anything."""
    path = tmp_path / "model.safetensors"
    whole = Path(checkpoints("flux")).read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    with open(path, "wb") as file:
        file.write(whole[:header_end])
        file.truncate(len(whole))  # a hole, which takes no room
    unet = ComponentRequest(COMPUTE, parse_allocation(f"{COMPUTE},50%;{DONOR},*"))
    plans = [plan_checkpoint(str(each), unet, unet, COMPUTE) for each in (path, checkpoints("flux"))]
    assert plans[0] == plans[1]


@pytest.mark.parametrize("kind", ["clip_l", "sd15_ckpt"])
def test_what_cannot_be_told_is_said(checkpoints, kind):
    unet = ComponentRequest(COMPUTE, VirtualVram(1, DONOR))
    with pytest.raises(CheckpointError):
        plan_checkpoint(checkpoints(kind), unet, unet, COMPUTE)


def test_mistakes_are_those_of_a_load(checkpoints, tmp_path):
    unet = ComponentRequest(COMPUTE, VirtualVram(1, "cuda:63"))
    with pytest.raises(PlanError, match="there is no device 'cuda:63'"):
        plan_checkpoint(checkpoints("flux"), unet, unet, COMPUTE)
    unet = ComponentRequest(COMPUTE, VirtualVram(1, DONOR))
    with pytest.raises(CheckpointError, match="there is no file"):
        plan_checkpoint(str(tmp_path / "none.safetensors"), unet, unet, COMPUTE)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(Path(checkpoints("flux")).read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="cut off"):
        plan_checkpoint(str(cut), unet, unet, COMPUTE)


TENSOR = {"dtype": "F16", "shape": [4, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "change",
    [
        {"data_offsets": [16, 0]},
        {"data_offsets": [-8, 8]},
        {"data_offsets": [0, 16.0]},
        {"data_offsets": [0, 8, 16]},
        {"data_offsets": "ab"},
        {"shape": [4, 3]},
        {"shape": [-4, -2]},
        {"shape": [2**40, 2**40]},
        {"shape": 8},
        {"shape": None},
        {"dtype": ["F16"]},
        {"dtype": "F17"},
        {"dtype": None},
    ],
    ids=str,
)
def test_a_header_that_lies_is_one_clear_error(tmp_path, change):
    header = {"whole": TENSOR, "model.diffusion_model.x_embedder.proj.weight": {**TENSOR, **change}}
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    unet = ComponentRequest(COMPUTE, VirtualVram(1, DONOR))
    with pytest.raises(CheckpointError):
        plan_checkpoint(str(path), unet, unet, COMPUTE)
