"""Text encoders as the pack builds them against those of ComfyUI's loader: the same parameters, byte by byte."""

import json
import types

import comfy.model_management as mm
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.utils
import pytest
import torch

from distorch2.comfyui import loaders
from distorch2.weights.quantised import is_quantised, plain_tensors

CPU = torch.device("cpu")
# Nothing is moved there before a plan says so; with a GPU, ComfyUI asks what it can do.
ACCELERATOR = "cuda:5" if mm.get_torch_device() == CPU else str(mm.get_torch_device())


@pytest.fixture(autouse=True)
def inference_mode():
    with torch.inference_mode():
        yield
    mm.unload_all_models()


def options_for(device):
    return {"load_device": torch.device(device), "offload_device": CPU, "initial_device": CPU}


def assert_same_parameters(found, wanted, unused=()):
    found, wanted = (dict(clip.cond_stage_model.named_parameters()) for clip in (found, wanted))
    assert found.keys() == wanted.keys()
    for name in wanted.keys() - set(unused):
        one, other = found[name], wanted[name]
        assert (type(one), one.dtype, one.shape, one.stride()) == (
            type(other),
            other.dtype,
            other.shape,
            other.stride(),
        )
        assert one.requires_grad == other.requires_grad
        for part, other_part in zip(plain_tensors(one), plain_tensors(other), strict=True):
            assert part.dtype == other_part.dtype
            assert torch.equal(part.reshape(-1).view(torch.uint8), other_part.reshape(-1).view(torch.uint8))


def transposed(tensor):
    return tensor.t().contiguous().t() if tensor.dim() == 2 else tensor


STORED = {
    "float16": lambda tensor: tensor,
    "float32": torch.Tensor.float,
    "bfloat16": torch.Tensor.bfloat16,
    "transposed": transposed,
}


@pytest.mark.parametrize("device", ["cpu", ACCELERATOR])
@pytest.mark.parametrize("stored", STORED)
def test_a_text_encoder_has_the_parameters_that_comfyuis_loader_gives_it(checkpoints, stored, device):
    weights = comfy.utils.load_torch_file(checkpoints("sd15_blocks"))
    for name in weights:
        if name.startswith("cond_stage_model."):
            weights[name] = STORED[stored](weights[name])
    of_file = loaders.Weights("sd15", dict(weights), None)
    clip = loaders.load_model_and_clip(of_file, ACCELERATOR, device, None, with_model=False)[1]
    options = options_for(device)
    core = comfy.sd.load_state_dict_guess_config(
        dict(weights), output_vae=False, output_model=False, te_model_options=options
    )[1]
    # The file has no projection, and ComfyUI does not use it then.
    assert_same_parameters(clip, core, unused=["clip_l.transformer.text_projection.weight"])
    assert clip.patcher.load_device == torch.device(device)


@pytest.fixture
def t5(monkeypatch):
    """(a model's config, weights of its text encoder) with a T5 of two small layers."""

    def small(file):
        config = json.load(file)
        if config.get("model_type") == "t5":
            config |= {"num_layers": 2, "vocab_size": 64, "d_model": 128, "d_ff": 64, "num_heads": 4, "d_kv": 32}
        return config

    monkeypatch.setattr(comfy.sd1_clip, "json", types.SimpleNamespace(load=small))
    config = comfy.supported_models.LTXV({"image_model": "ltxv"})
    with torch.device("meta"):
        module = config.clip_target(state_dict={}).clip(device="meta", dtype=torch.bfloat16, model_options={})
    generator = torch.Generator().manual_seed(5)
    prefix = config.text_encoder_key_prefix[0]
    return config, {
        prefix + name: torch.randn(tensor.shape, generator=generator).bfloat16()
        for name, tensor in module.state_dict().items()
    }


def quantised(weights):
    """With ComfyUI's markers, the linear layers of attention and feed forward."""
    made = dict(weights)
    for name, weight in weights.items():
        if "SelfAttention" in name or "DenseReluDense" in name:
            layer = name.removesuffix(".weight")
            if weight.dim() == 2 and "relative" not in layer:
                made[name] = weight.float().clamp(-1, 1).to(torch.float8_e4m3fn)
                made[f"{layer}.weight_scale"] = torch.tensor(0.5)
                marker = json.dumps({"format": "float8_e4m3fn"}).encode()
                made[f"{layer}.comfy_quant"] = torch.tensor(list(marker), dtype=torch.uint8)
    return made


def built(config, weights, device=ACCELERATOR):
    return loaders.build_text_encoder(loaders.Detected(dict(weights), "", config), options_for(device), None, False)


def cores(config, weights, device=ACCELERATOR):
    target = config.clip_target(state_dict=weights)
    state_dict = config.process_clip_state_dict(dict(weights))
    return comfy.sd.CLIP(target, tokenizer_data=state_dict, state_dict=state_dict, model_options=options_for(device))


def names_in_memory_of(clip, weights):
    addresses = {tensor.data_ptr() for tensor in weights.values()}
    return {name for name, tensor in clip.cond_stage_model.state_dict().items() if tensor.data_ptr() in addresses}


@pytest.mark.parametrize("is_quantised_file", [False, True])
@pytest.mark.parametrize("lacks_dtypes", [False, True])
def test_a_quantised_text_encoder_and_one_for_a_device_that_lacks_its_dtype(
    t5, is_quantised_file, lacks_dtypes, monkeypatch
):
    """Where the device lacks a dtype of it, ComfyUI computes it on the CPU."""
    config, weights = t5
    if is_quantised_file:
        weights = quantised(weights)
    if lacks_dtypes:
        monkeypatch.setattr(mm, "supports_cast", lambda device, dtype: device == CPU or dtype == torch.float32)
    clip, core = built(config, weights), cores(config, weights)
    assert_same_parameters(clip, core)
    assert any(is_quantised(parameter) for parameter in clip.cond_stage_model.parameters()) == is_quantised_file
    assert clip.patcher.load_device == core.patcher.load_device
    assert (clip.patcher.load_device == CPU) == lacks_dtypes
    in_file = names_in_memory_of(clip, weights)
    if lacks_dtypes:
        assert in_file == names_in_memory_of(core, weights)  # what is quantised is not copied by ComfyUI either
    else:
        weights_of_layers = {name for name in clip.cond_stage_model.state_dict() if name.endswith(".weight")}
        assert weights_of_layers and weights_of_layers <= in_file


@pytest.mark.quick
def test_a_text_encoder_that_comfyui_converts_is_left_to_its_loader(t5):
    config, weights = t5
    prefix = config.text_encoder_key_prefix[0]
    assert built(config, weights) is not None
    assert built(config, {**weights, f"{prefix}t5xxl.transformer.scaled_fp8": torch.zeros(2)}) is None
    assert built(config, {}) is None


@pytest.mark.parametrize("unet_device", ["cpu", ACCELERATOR])
@pytest.mark.parametrize("clip_device", ["cpu", ACCELERATOR])
def test_a_config_may_learn_about_the_text_encoder_from_the_diffusion_model(unet_device, clip_device):
    """As that of SAM 3 does, here with the few weights that it is known by."""
    ones = torch.ones(1, dtype=torch.float16)
    weights = {
        "detector.backbone.vision_backbone.trunk.blocks.0.attn.qkv.weight": ones.expand(3072, 1024),
        "detector.transformer.decoder.query_embed.weight": ones.expand(200, 256),
        "tracker.x": ones,
        "detector.backbone.language_backbone.encoder.token_embedding.weight": ones.expand(49408, 1024),
        "detector.backbone.language_backbone.encoder.ln_final.weight": ones.expand(1024),
    }
    model, clip = loaders.load_model_and_clip(loaders.Weights("sam3", weights, {}), unet_device, clip_device, None)
    assert type(model.model).__name__ == "SAM3"
    name = "sam3_clip.transformer.text_model.final_layer_norm.weight"
    assert torch.equal(clip.cond_stage_model.state_dict()[name].float(), torch.ones(1024))
