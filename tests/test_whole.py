"""VAEs, ControlNets and CLIP vision models as wholes on a device of their own: simulated ones that compute."""

import gc
import weakref

import comfy.clip_vision
import comfy.controlnet
import pytest
import safetensors.torch
import torch
from computing import computing as computing
from computing import expected as expected
from computing import inference_mode as inference_mode
from computing import load, same, sim
from sampling import core_load, sample
from test_compatibility import control_lora, controlled, controlnet, latents, t2i_adapter

from distorch2.comfyui.whole import place_clip_vision, place_control_net, place_vae
from distorch2.loading import distribute_clip
from distorch2.planning.plan import ComponentRequest, PlanError, VirtualVram

pytestmark = pytest.mark.usefixtures("inference_mode", "computing")
KINDS = ("sd3_no_clip_weights", "sd15_blocks_no_clip")
OTHER = torch.device("sim:1")


def test_a_vae(checkpoints, expected):
    vae = core_load(checkpoints("sd3_no_clip_weights"))[2]
    pixels = torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(1))
    decoded, encoded = vae.decode(expected["sd3_no_clip_weights"]), vae.encode(pixels)
    placed = place_vae(vae, OTHER)
    assert torch.equal(placed.decode(expected["sd3_no_clip_weights"]).cpu(), decoded.cpu())
    assert torch.equal(placed.encode(pixels).cpu(), encoded.cpu())
    assert {p.device for p in placed.first_stage_model.parameters()} == {OTHER}
    assert sim.used_bytes[1] > 0
    again = place_vae(placed, torch.device("cpu"))
    assert torch.equal(again.decode(expected["sd3_no_clip_weights"]).cpu(), decoded.cpu())
    assert torch.equal(vae.decode(expected["sd3_no_clip_weights"]).cpu(), decoded.cpu())


def test_a_vae_without_weights_is_refused(checkpoints):
    vae = core_load(checkpoints("sd3_no_vae"))[2]
    with pytest.raises(PlanError, match="this VAE has no weights"):
        place_vae(vae, OTHER)


def test_a_clip_vision_model():
    config = {
        "model_type": "clip_vision_model",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    config |= {"image_size": 28, "patch_size": 14, "num_channels": 3, "projection_dim": 32, "hidden_act": "quick_gelu"}
    vision = comfy.clip_vision.ClipVisionModel({**config, "layer_norm_eps": 1e-5})
    generator = torch.Generator().manual_seed(1)
    vision.load_sd({name: torch.randn(each.shape, generator=generator) * 0.1 for name, each in vision.get_sd().items()})
    image = torch.rand(1, 40, 40, 3, generator=generator)
    wanted = vision.encode_image(image)
    placed = place_clip_vision(vision, OTHER)
    for name in ("last_hidden_state", "image_embeds", "penultimate_hidden_states"):
        assert torch.equal(placed.encode_image(image)[name].cpu(), wanted[name].cpu())
    assert {p.device for p in placed.model.parameters()} == {OTHER}
    assert torch.equal(vision.encode_image(image)["image_embeds"].cpu(), wanted["image_embeds"].cpu())


def control_net(folder, make, model):
    path = folder / "control.safetensors"
    safetensors.torch.save_file(make(), path)
    return comfy.controlnet.load_controlnet(str(path), model)


def test_a_controlnet_on_another_device_than_the_diffusion_model(checkpoints, tmp_path):
    model, clip = load(checkpoints, "sd15_blocks_no_clip", "sim:0,50%;cpu,50%")
    control = control_net(tmp_path, controlnet, model)
    plain, expected = latents(model, clip), controlled(model, clip, control)
    assert not torch.equal(plain, expected)
    placed = place_control_net(control, OTHER)
    for one in (placed, control, placed, place_control_net(control, torch.device("cpu"))):
        assert torch.equal(controlled(model, clip, one), expected)
    assert torch.equal(controlled(model, clip, placed), expected)
    again = place_control_net(placed, torch.device("sim:0"))
    assert torch.equal(controlled(model, clip, again), expected)
    assert again.control_model is not placed.control_model
    assert torch.equal(controlled(model, clip, placed), expected)
    assert {p.device for p in placed.control_model.parameters()} == {OTHER}
    assert all(each.device != OTHER for each in model.model.parameters())


@pytest.mark.parametrize("make", [control_lora, t2i_adapter])
def test_what_computes_with_the_diffusion_model_is_refused(checkpoints, tmp_path, make):
    control = control_net(tmp_path, make, None)
    with pytest.raises(PlanError, match="computes where the diffusion model does, and cannot be put on sim:1"):
        place_control_net(control, OTHER)


def test_a_text_encoder_on_another_device_than_the_sampler(checkpoints, expected):
    model, _ = load(checkpoints, "sd3_no_clip_weights", "sim:0,50%;cpu,50%")
    clip = core_load(checkpoints("sd3"))[1]
    wanted = sample(model, clip)
    for request in (("sim:1", 0.0, "cpu"), ("sim:1", 0.1, "cpu"), ("sim:1", 0.1, "sim:0")):
        device, gb, donor = request
        placed = distribute_clip(clip, ComponentRequest(device, VirtualVram(gb, donor), "stream"))
        assert same(sample(model, placed), wanted.cpu())


def test_a_placed_controlnet_is_let_go_at_once(checkpoints, tmp_path):
    control = control_net(tmp_path, controlnet, None)
    placed = place_control_net(control, OTHER)
    module = weakref.ref(placed.control_model)
    gc.disable()
    try:
        del placed
        assert module() is None
    finally:
        gc.enable()
