"""Weights that a file backs are those of the file again when a model is unloaded: nothing is copied back or kept."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import comfy.model_management as mm
import comfy.utils
import pytest
import safetensors.torch
import torch
from computing import computing as computing
from computing import expected as expected
from computing import inference_mode as inference_mode
from computing import load, same, sim
from conftest import ROOT
from placing import lora_for
from sampling import core_load, sample

from allocation_parser import parse_allocation
from distorch2.loading import distribute, load_diffusion_model
from distorch2.moving.modules import Mover
from distorch2.planning.plan import ComponentRequest
from distorch2.weights import sources
from distorch2.weights.checkpoint_file import CheckpointError
from distorch2.weights.devices import CPU
from distorch2.weights.quantised import plain_tensors

pytestmark = [
    pytest.mark.usefixtures("inference_mode", "computing"),
    pytest.mark.skipif(not sources._MAPPINGS.exists(), reason="which memory is a file is known on Linux only"),
]
KINDS = ("wan_fp32", "sd3_fp8_scaled_no_clip_weights")
KIND = KINDS[0]
SPLITS = ["sim:0,*", "sim:0,50%;cpu,*", "cpu,*", "sim:0,40%;sim:1,30%;cpu,*"]


def request_for(text):
    return ComponentRequest("sim:0", parse_allocation(text), "stream")


def bytes_in_files(model):
    """(Those of its parameters that lie in mapped files, those of all)."""
    mappings = sources._Mappings()
    parts = [part for parameter in model.model.parameters() for part in plain_tensors(parameter)]
    return sum(part.nbytes for part in parts if mappings.find(part)), sum(part.nbytes for part in parts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", SPLITS)
def test_unloaded_weights_are_those_of_the_file(checkpoints, expected, kind, text):
    model, clip = load(checkpoints, kind, text)
    before = bytes_in_files(model)
    assert before[0] > 0.7 * before[1]  # the rest is stored in another dtype than it is loaded in
    for _ in range(2):
        assert same(sample(model, clip), expected[kind])
        assert bytes_in_files(model)[0] < 0.3 * before[1]
        mm.unload_all_models()
        assert bytes_in_files(model)[0] >= before[0]
    assert model.distribution.groups == {}


@pytest.mark.parametrize("text", SPLITS[:3])
def test_originals_of_patched_weights_are_read_from_the_file(checkpoints, expected, text):
    core, core_clip, _ = core_load(checkpoints(KIND))
    wanted = sample(lora_for(core), core_clip)
    model, clip = load(checkpoints, KIND, text)
    mappings = sources._Mappings()
    for _ in range(2):
        patched = lora_for(model)
        assert same(sample(patched, clip), wanted)
        assert len(patched.backup) > 20
        assert all(mappings.find(backup.weight) for backup in patched.backup.values())
        assert same(sample(model, clip), expected[KIND])  # back from the LoRA, while the model stays loaded
        assert same(sample(patched, clip), wanted)
        mm.unload_all_models()
        assert bytes_in_files(model)[0] == bytes_in_files(model)[1]


class TestDiffusionModelsInFilesOfTheirOwn:
    """Without DynamicVRAM ComfyUI's loader copies the file."""

    @pytest.fixture(params=["as in a checkpoint", "without a prefix"])
    def path(self, request, checkpoints, tmp_path):
        path = checkpoints(KIND)
        if request.param == "without a prefix":
            weights = comfy.utils.load_torch_file(path)
            path = str(tmp_path / "model.safetensors")
            bare = {name.removeprefix("model.diffusion_model."): weight for name, weight in weights.items()}
            safetensors.torch.save_file(bare, path)
        return path

    def test_they_are_built_of_the_file(self, checkpoints, expected, path):
        model = load_diffusion_model(path, request_for("sim:0,50%;cpu,*"))
        assert bytes_in_files(model)[0] == bytes_in_files(model)[1]
        clip = core_load(checkpoints(KIND))[1]
        assert same(sample(model, clip), expected[KIND])
        mm.unload_all_models()
        assert bytes_in_files(model)[0] == bytes_in_files(model)[1]

    def test_what_is_asked_for_otherwise_is_what_comfyui_makes_of_it(self, checkpoints, path):
        request = request_for("sim:0,50%;cpu,*")
        model = load_diffusion_model(path, request, model_options={"dtype": torch.float16})
        assert model.model_dtype() is torch.float16

    def test_a_file_that_is_no_diffusion_model_is_refused(self, checkpoints):
        with pytest.raises(CheckpointError, match="is not a checkpoint that ComfyUI"):
            load_diffusion_model(checkpoints("clip_l"), ComponentRequest("sim:0", parse_allocation("sim:0,*")))


def test_a_weight_that_somebody_has_replaced_stays(checkpoints):
    model, clip = load(checkpoints, KIND, "sim:0,50%;cpu,*")
    sample(model, clip)
    plan = model.distribution.plan
    found = [(placement.layer.name, placement.device) for placement in plan.placements if placement.layer.movable]
    names = [next(name for name, where in found if where == device) for device in ("sim:0", "cpu")]
    for name in names:
        layer = model.model.get_submodule(name)
        layer.weight = torch.nn.Parameter(torch.full_like(layer.weight, 0.5), requires_grad=False)
    mm.unload_all_models()
    assert all((model.model.get_submodule(name).weight == 0.5).all() for name in names)


@pytest.mark.parametrize("nth", [3, 40])
def test_after_a_move_that_failed_weights_are_those_of_the_file(checkpoints, expected, monkeypatch, nth):
    model, clip = load(checkpoints, KIND, "sim:0,*")
    moved, calls = Mover._moved, itertools.count()

    def failing(*arguments):
        if next(calls) == nth:
            raise torch.OutOfMemoryError("planted")
        return moved(*arguments)

    with monkeypatch.context() as patches:
        patches.setattr(Mover, "_moved", failing)
        with pytest.raises(torch.OutOfMemoryError):
            mm.load_models_gpu([model])
    assert bytes_in_files(model)[0] == bytes_in_files(model)[1]
    assert same(sample(model, clip), expected[KIND])


@pytest.mark.parametrize("text", SPLITS[:3])
def test_weights_in_another_dtype_than_the_files(checkpoints, monkeypatch, text):
    """As ComfyUI notes it with DynamicVRAM: nothing is converted when they are given back."""
    model, _ = load(checkpoints, KIND, text)
    for module in model.model.modules():
        for name in module._parameters:
            setattr(module, f"{name}_comfy_model_dtype", torch.bfloat16)
    before = bytes_in_files(model)
    sizes = []
    for patched in (model, lora_for(model)):
        mm.load_models_gpu([patched])
        with monkeypatch.context() as patches:
            patches.setattr(
                Mover, "_moved", lambda mover, tensor, dtype: sizes.append(tensor.numel()) or tensor.to(CPU)
            )
            mm.unload_all_models()
        assert bytes_in_files(model) == before
        assert max(sizes) <= 1000  # those of buffers


def test_weights_that_comfyui_says_are_mapped_need_no_list_of_mappings(checkpoints, expected, monkeypatch):
    """As on Windows with DynamicVRAM."""
    model, clip = load(checkpoints, KIND, "sim:0,50%;cpu,*")
    addresses = {name: weight.data_ptr() for name, weight in model.model.named_parameters()}
    for weight in model.model.parameters():
        setattr(weight.untyped_storage(), sources._MAPPED_BY_COMFYUI, ())
    monkeypatch.setattr(sources, "_MAPPINGS", Path("/nonexistent"))
    assert same(sample(model, clip), expected[KIND])
    mm.unload_all_models()
    assert {name: weight.data_ptr() for name, weight in model.model.named_parameters()} == addresses


def test_small_weights_do_not_keep_the_slab_of_another_plan(checkpoints):
    core, clip, _ = core_load(checkpoints(KIND))  # which copies the file
    one = distribute(core, request_for("sim:0,20%;cpu,*"))
    sample(one, clip)
    slabs = {group.slab.untyped_storage().data_ptr() for group in one.distribution.groups.values()}
    other = distribute(core, request_for("sim:0,10%;cpu,*"))
    del one
    sample(other, clip)
    noted = [source for of_module in other.distribution._stores.sources._of.values() for source in of_module.values()]
    assert len(slabs) > 3
    assert not slabs & {source.parameter.untyped_storage().data_ptr() for source in noted}


def test_an_eviction_where_a_file_was_written_into_raises_nothing(checkpoints, tmp_path):
    path = shutil.copy(checkpoints(KIND), tmp_path / "model.safetensors")
    model, clip = load(lambda kind: str(path), KIND, "sim:0,*")
    sample(model, clip)
    os.utime(path, (0, 0))
    device = torch.device("sim:0")
    mm.free_memory(mm.get_free_memory(device) + 4 * 1024**2, device)  # a part of it would be enough
    assert sim.used_bytes == [0, 0]


def test_evicted_weights_are_not_copied_back(checkpoints, monkeypatch):
    model, clip = load(checkpoints, KIND, "sim:0,*")
    sample(model, clip)
    monkeypatch.setattr(Mover, "_moved", lambda *arguments: pytest.fail("a weight was copied to the host"))
    assert model.partially_unload(torch.device("cpu"), 100 * 1024**2) > 0
    assert len(model.distribution.plan.evicted) > 0


class TestFiles:
    @pytest.fixture
    def path(self, checkpoints, tmp_path):
        return shutil.copy(checkpoints(KIND), tmp_path / "model.safetensors")

    def test_one_that_is_replaced_or_deleted_stays_mapped(self, path, expected):
        model, clip = load(lambda kind: str(path), KIND, "sim:0,50%;cpu,*")
        assert same(sample(model, clip), expected[KIND])
        (other := path.with_suffix(".new")).write_bytes(b"something else")
        os.replace(other, path)
        mm.unload_all_models()
        assert same(sample(model, clip), expected[KIND])
        path.unlink()
        mm.unload_all_models()
        assert same(sample(model, clip), expected[KIND])

    def test_one_that_is_written_into_is_named(self, path):
        model, clip = load(lambda kind: str(path), KIND, "sim:0,50%;cpu,*")
        sample(model, clip)
        mm.unload_all_models()
        with open(path, "r+b") as file:
            file.seek(-100, os.SEEK_END)
            file.write(b"x" * 100)
        with pytest.raises(RuntimeError, match=r"model.safetensors was written into while it was in use; load the"):
            sample(model, clip)
        assert sim.used_bytes == [0, 0]


@pytest.mark.parametrize("text", ["sim:0,70%;cpu,*", "cpu,*"])
def test_anonymous_memory(checkpoints, text):
    """In a process of its own, in MiB; what is on sim:0 is taken off, although it is in this process."""
    script = ROOT / "tests" / "in_process_anonymous.py"
    command = [sys.executable, str(script), checkpoints(KIND), text]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    slack = 64
    assert found["streamed"] > 60
    assert found["placed"] < found["streamed"] + found["group"] + slack
    assert found["unloaded"] < slack
    assert found["with a LoRA"] < found["streamed"] + found["group"] + slack
    assert found["unloaded again"] < slack
