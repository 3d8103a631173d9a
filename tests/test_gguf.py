"""GGUF models: streamed as the bytes that they are, with LoRAs that stay patches."""

import importlib.util
import itertools
import sys
from pathlib import Path

import comfy.lora
import comfy.model_management as mm
import folder_paths
import gguf_files
import pytest
import torch
from placing import (
    DONOR,
    devices_known_to_comfyui,  # noqa: F401
    inference_mode,  # noqa: F401
    lora_for,
    partly_on_donor,
)
from sampling import core_load, sample

from distorch2.loading import distribute
from distorch2.weights.inventory import list_layers
from distorch2.weights.quantised import carries_patches, is_gguf, plain_tensors


@pytest.fixture(scope="session")
def pack():
    """ComfyUI-GGUF, as ComfyUI imports it."""
    name = "comfyui_gguf_of_the_tests"
    spec = importlib.util.spec_from_file_location(name, Path(gguf_files.PACK) / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def by_the_pack(path, pack, **options):
    node = pack.NODE_CLASS_MAPPINGS["UnetLoaderGGUF"]()
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(folder_paths, "get_full_path", lambda *_: path)
        return node.load_unet(path, **options)[0]


@pytest.fixture(
    params=[
        "tests",
        pytest.param("ComfyUI-GGUF", marks=gguf_files.NEEDS_PACK),
    ]
)
def load(request, tmp_path):
    """A function of a type of GGUF that gives a patcher of a Flux."""
    pack = request.getfixturevalue("pack") if request.param != "tests" else None

    def load(qtype, **options):
        path = tmp_path / f"{qtype}.gguf"
        if not path.exists():
            gguf_files.write_flux(path, qtype)
        return by_the_pack(str(path), pack, **options) if pack else gguf_files.load(str(path), gguf_files.Layers)

    return load


@pytest.fixture
def clip(checkpoints):
    return core_load(checkpoints("sd3_no_clip_weights"))[1]


def by_hand(patcher):
    """The same LoRA on a patcher of the tests' loader, which ComfyUI's own cannot apply."""
    patched = lora_for(patcher)
    for key, patches in patched.patches.items():
        weight = patched.model.get_parameter(key)
        if carries_patches(weight):
            weight.patches = [(patches, key)]
        else:
            full = comfy.lora.calculate_weight(patches, plain_tensors(weight)[0].float(), key)
            plain_tensors(weight)[0].copy_(full.to(weight.dtype))
    return patcher


def num_bytes(module):
    tensors = itertools.chain(module.parameters(), module.buffers())
    return sum(part.nbytes for tensor in tensors for part in plain_tensors(tensor))


@pytest.mark.quick("Q4_K-50-tests")
@pytest.mark.parametrize("percent", [50, 100])
@pytest.mark.parametrize("qtype", gguf_files.QTYPES)
def test_latents_are_bit_identical(load, clip, qtype, percent):
    core = load(qtype)
    expected = sample(core, clip)
    layers = list_layers(core.model)
    assert sum(layer.num_bytes for layer in layers) == num_bytes(core.model)
    model = distribute(core, partly_on_donor(percent))
    for _ in range(2):
        assert torch.equal(sample(model, clip), expected)
    plan = model.distribution.plan
    assert plan.streamed
    assert plan.bytes_on(DONOR) == pytest.approx(plan.model_bytes * percent / 100, rel=0.2)
    copies = model.distribution.transfer.copies
    sample(model, clip, steps=2)
    assert model.distribution.transfer.copies - copies >= 2 * len([g for g in plan.groups if g.is_streamed])
    weight = model.model.diffusion_model.double_blocks[0].img_attn.qkv.weight
    assert is_gguf(weight) and weight.tensor_type.name == qtype
    assert torch.equal(sample(core, clip), expected)


@pytest.mark.parametrize("percent", [50, 100])
def test_what_comfyui_keeps_of_the_file_under_dynamicvram(load, clip, percent, monkeypatch):
    """Norms, which the file has in F32: else they are copied, in the dtype of the model."""
    gguf_files.load_for_dynamic_vram(monkeypatch)
    core = load("Q4_K")
    assert is_gguf(core.model.diffusion_model.double_blocks[0].img_attn.norm.query_norm.weight)
    expected = sample(core, clip)
    model = distribute(core, partly_on_donor(percent))
    for _ in range(2):
        assert torch.equal(sample(model, clip), expected)


@pytest.mark.parametrize("qtype", ["Q8_0", "Q4_K", "F16"])
def test_a_lora_stays_a_patch(load, clip, qtype, request):
    core = load(qtype)
    plain = sample(core, clip)
    model = distribute(core, partly_on_donor(60))
    if "ComfyUI-GGUF" in request.node.name:
        expected, weaker = sample(lora_for(core), clip), sample(lora_for(core, 0.5), clip)
        assert not torch.equal(weaker, expected)
    else:
        expected, weaker = sample(by_hand(load(qtype)), clip), None
    assert not torch.equal(plain, expected)
    patched = lora_for(model)
    before = distribute(lora_for(core), partly_on_donor(100))
    for patcher, wanted in ((patched, expected), (model, plain), (patched, expected), (before, expected)):
        for _ in range(2):
            assert torch.equal(sample(patcher, clip), wanted)
    if weaker is not None:
        assert torch.equal(sample(lora_for(model, 0.5), clip), weaker)
    mm.unload_all_models()
    assert all(not tensor.patches for tensor in model.model.parameters() if is_gguf(tensor))
    assert num_bytes(model.model) == num_bytes(core.model)
    assert torch.equal(sample(core, clip), plain)
