"""Small but real checkpoints with random weights, for the tests and the demo.

ComfyUI recognises an architecture by the names and shapes of its tensors, so a file with the right names and small
shapes is loaded, sampled with and decoded by the same code as a file of several gigabytes. The images are noise.

Nothing here imports ComfyUI: the names and shapes are written out. Each tensor is drawn from a generator seeded by
the checkpoint's seed and the tensor's own name without its prefix. So the same name holds the same values in every
kind ("sd3" and "sd3_fp8" differ by rounding only), and adding a tensor changes no other.

    python tools/checkpoints.py KIND FOLDER
"""

import os
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch

FP8 = torch.float8_e4m3fn
MODEL = "model.diffusion_model."  # what a checkpoint's diffusion model is stored under, in every family here
SD_VAE = "first_stage_model."  # Flux alone uses "vae."
BIAS_STD = 0.02  # small, and not zero: a bias that got lost shows in the result


class Draw(NamedTuple):
    """How one tensor is drawn: a normal distribution; std 0 gives a constant."""

    shape: tuple
    mean: float = 0.0
    std: float = 0.0


class Spec(dict):
    """Tensor name -> Draw of one model, without the prefix that a checkpoint stores it under."""

    def add(self, name: str, *shape: int, mean: float = 0.0, std: float = 0.0):
        self[name] = Draw(shape, mean, std)

    def bias(self, name: str, size: int, mean: float = 0.0):
        self.add(name + ".bias", size, mean=mean, std=BIAS_STD)

    def linear(self, name: str, n_in: int, n_out: int, bias: bool = True, gain: float = 1.0):
        self.add(name + ".weight", n_out, n_in, std=gain * n_in**-0.5)
        if bias:
            self.bias(name, n_out)

    def conv(self, name: str, n_in: int, n_out: int, size: int = 3, bias: bool = True, gain: float = 1.0):
        self.add(name + ".weight", n_out, n_in, size, size, std=gain * (n_in * size * size) ** -0.5)
        if bias:
            self.bias(name, n_out)

    def norm(self, name: str, size: int):
        self.add(name + ".weight", size, mean=1.0)
        self.bias(name, size)

    def draw(self, seed: int, dtype: torch.dtype = torch.float16, prefix: str = "") -> dict:
        """The tensors, named prefix + name, in `dtype` on the CPU."""
        tensors = {}
        for name, (shape, mean, std) in self.items():
            generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{name}".encode()))
            tensors[prefix + name] = torch.randn(shape, generator=generator).mul_(std).add_(mean).to(dtype)
        return tensors


def mmdit(hidden: int = 64, side: int = 64) -> Spec:
    """SD3's diffusion model with ONE joint block of one 64-wide head (the core reads the depth as hidden // 64).

    Latents [B, 16, H/8, W/8] in 2x2 patches, at most `side` patches a side (1024 px for 64); text [B, tokens, 4096],
    pooled text [B, 2048]. The block is also the last one, whose text half has no output, as in the full model.
    """
    spec = Spec()
    spec.add("pos_embed", 1, side * side, hidden, std=0.5)
    spec.conv("x_embedder.proj", 16, hidden, 2)
    for name, n_in in (("t_embedder", 256), ("y_embedder", 2048)):
        spec.linear(f"{name}.mlp.0", n_in, hidden)
        spec.linear(f"{name}.mlp.2", hidden, hidden)
    spec.linear("context_embedder", 4096, hidden)
    spec.linear("joint_blocks.0.context_block.attn.qkv", hidden, 3 * hidden)
    spec.linear("joint_blocks.0.context_block.adaLN_modulation.1", hidden, 2 * hidden)
    spec.linear("joint_blocks.0.x_block.attn.qkv", hidden, 3 * hidden)
    spec.linear("joint_blocks.0.x_block.attn.proj", hidden, hidden)
    spec.linear("joint_blocks.0.x_block.mlp.fc1", hidden, 4 * hidden)
    spec.linear("joint_blocks.0.x_block.mlp.fc2", 4 * hidden, hidden)
    spec.linear("joint_blocks.0.x_block.adaLN_modulation.1", hidden, 6 * hidden)
    spec.linear("final_layer.linear", hidden, 2 * 2 * 16)
    spec.linear("final_layer.adaLN_modulation.1", hidden, 2 * hidden)
    return spec


def flux(double: int = 12, single: int = 12, hidden: int = 128) -> Spec:
    """Flux (dev) with one 128-wide head; about 1.2 MB (bf16) a double block and 0.5 MB a single one.

    Latents [B, 16, H/8, W/8] in 2x2 patches, text [B, tokens, 4096], pooled text: its first 768 values.
    """
    spec = Spec()
    spec.linear("img_in", 2 * 2 * 16, hidden)
    spec.linear("txt_in", 4096, hidden)
    for name, n_in in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        spec.linear(f"{name}.in_layer", n_in, hidden)
        spec.linear(f"{name}.out_layer", hidden, hidden)
    for block in range(double):
        for half in (f"double_blocks.{block}.img", f"double_blocks.{block}.txt"):
            spec.linear(f"{half}_mod.lin", hidden, 6 * hidden)
            spec.linear(f"{half}_attn.qkv", hidden, 3 * hidden)
            spec.add(f"{half}_attn.norm.query_norm.scale", hidden, mean=1.0)  # published files say scale, not weight
            spec.add(f"{half}_attn.norm.key_norm.scale", hidden, mean=1.0)
            spec.linear(f"{half}_attn.proj", hidden, hidden)
            spec.linear(f"{half}_mlp.0", hidden, 4 * hidden)
            spec.linear(f"{half}_mlp.2", 4 * hidden, hidden)
    for block in (f"single_blocks.{i}" for i in range(single)):
        spec.linear(f"{block}.linear1", hidden, 7 * hidden)  # query, key, value and a 4x wide MLP
        spec.linear(f"{block}.linear2", 5 * hidden, hidden)
        spec.add(f"{block}.norm.query_norm.scale", hidden, mean=1.0)
        spec.add(f"{block}.norm.key_norm.scale", hidden, mean=1.0)
        spec.linear(f"{block}.modulation.lin", hidden, 3 * hidden)
    spec.linear("final_layer.linear", hidden, 2 * 2 * 16)
    spec.linear("final_layer.adaLN_modulation.1", hidden, 2 * hidden)
    return spec


def wan(blocks: int = 4, hidden: int = 128) -> Spec:
    """Wan 2.1's text-to-video model with one 128-wide head (the core reads their number as hidden // 128).

    Latents [B, 16, frames, H/8, W/8] in 1x2x2 patches, text [B, tokens, 4096]; about 0.5 MB (fp16) a block.
    """
    spec = Spec()
    spec.add("patch_embedding.weight", hidden, 16, 1, 2, 2, std=(16 * 2 * 2) ** -0.5)
    spec.bias("patch_embedding", hidden)
    for name, n_in in (("text_embedding", 4096), ("time_embedding", 256)):
        spec.linear(f"{name}.0", n_in, hidden)
        spec.linear(f"{name}.2", hidden, hidden)
    spec.linear("time_projection.1", hidden, 6 * hidden)
    for block in (f"blocks.{i}" for i in range(blocks)):
        spec.add(f"{block}.modulation", 1, 6, hidden, std=hidden**-0.5)
        for attention in ("self_attn", "cross_attn"):
            for name in ("q", "k", "v", "o"):
                spec.linear(f"{block}.{attention}.{name}", hidden, hidden)
            spec.add(f"{block}.{attention}.norm_q.weight", hidden, mean=1.0)
            spec.add(f"{block}.{attention}.norm_k.weight", hidden, mean=1.0)
        spec.norm(f"{block}.norm3", hidden)  # before cross_attn; the other two norms have no weights
        spec.linear(f"{block}.ffn.0", hidden, 4 * hidden)
        spec.linear(f"{block}.ffn.2", 4 * hidden, hidden)
    spec.add("head.modulation", 1, 2, hidden, std=hidden**-0.5)
    spec.linear("head.head", hidden, 2 * 2 * 16)
    return spec


def minimax_h3(blocks: int = 3, hidden: int = 128) -> Spec:
    """MiniMax-H3's video and audio model with two 64-wide heads; about 1.0 MB (bf16) a block.

    Latents [1, 24, frames, H/8, W/8] in 1x2x2 patches and [1, 32, 2, frames]; text [1, tokens, 256].
    """
    head, ffn, time = 64, 2 * hidden, 32
    spec = Spec()
    spec.linear("video_patch_proj", 4 * 24, hidden)
    spec.linear("audio_patch_proj", 32, hidden)
    spec.linear("condition_proj", 256, hidden)
    spec.linear("time_embedder.proj_in", 64, hidden)
    spec.linear("time_embedder.proj_out", hidden, time)
    spec.add("rope.inv_freq", 4, mean=0.1, std=0.01)
    refiner = [f"token_refiner.blocks.{i}" for i in range(1)]
    for block in (*refiner, *(f"blocks.{i}" for i in range(blocks))):
        spec.add(f"{block}.norm1.weight", hidden, mean=1.0)
        spec.add(f"{block}.norm2.weight", hidden, mean=1.0)
        spec.linear(f"{block}.attn.qkv_proj", hidden, 3 * hidden, bias=False)
        spec.add(f"{block}.attn.q_norm.weight", head, mean=1.0)
        spec.add(f"{block}.attn.k_norm.weight", head, mean=1.0)
        spec.linear(f"{block}.attn.out_proj", hidden, hidden, bias=False)
        spec.linear(f"{block}.mlp.fc1", hidden, 2 * ffn, bias=False)
        spec.linear(f"{block}.mlp.fc2", ffn, hidden, bias=False)
        if block not in refiner:
            spec.linear(f"{block}.adaln_proj.linear", time, 6 * hidden * 3)
    spec.add("token_refiner.final_norm.weight", hidden, mean=1.0)
    spec.add("final_layer.norm.weight", hidden, mean=1.0)
    spec.linear("final_layer.adaln_proj.linear", time, 2 * hidden)
    spec.linear("final_layer.video_out", hidden, 4 * 24)
    spec.linear("final_layer.audio_out", hidden, 32)
    return spec


def qwen_image(blocks: int = 2) -> Spec:
    """Qwen-Image in its full width, since the core takes its 24 heads for granted: 680 MB (bf16) a block, 81 MB beside.

    Latents [B, 16, 1, H/8, W/8] in 2x2 patches, text [B, tokens, 3584].
    """
    head, hidden = 128, 24 * 128
    spec = Spec()
    spec.linear("img_in", 2 * 2 * 16, hidden)
    spec.add("txt_norm.weight", 3584, mean=1.0)
    spec.linear("txt_in", 3584, hidden)
    spec.linear("time_text_embed.timestep_embedder.linear_1", 256, hidden)
    spec.linear("time_text_embed.timestep_embedder.linear_2", hidden, hidden)
    for block in (f"transformer_blocks.{i}" for i in range(blocks)):
        for half in ("img", "txt"):
            spec.linear(f"{block}.{half}_mod.1", hidden, 6 * hidden)
            spec.linear(f"{block}.{half}_mlp.net.0.proj", hidden, 4 * hidden)
            spec.linear(f"{block}.{half}_mlp.net.2", 4 * hidden, hidden)
        for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            spec.linear(f"{block}.attn.{name}", hidden, hidden)
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            spec.add(f"{block}.attn.{name}.weight", head, mean=1.0)
    spec.linear("norm_out.linear", hidden, 2 * hidden)
    spec.linear("proj_out", hidden, 2 * 2 * 16)
    return spec


def _res_block(spec: Spec, name: str, n_in: int, n_out: int):
    spec.norm(f"{name}.in_layers.0", n_in)
    spec.conv(f"{name}.in_layers.2", n_in, n_out)
    spec.linear(f"{name}.emb_layers.1", 1280, n_out)
    spec.norm(f"{name}.out_layers.0", n_out)
    spec.conv(f"{name}.out_layers.3", n_out, n_out)
    if n_in != n_out:
        spec.conv(f"{name}.skip_connection", n_in, n_out, 1)


def _transformer(spec: Spec, name: str, channels: int, depth: int, context: int, linear: bool):
    """`depth` equal blocks; with 320 channels and a context of 768 each is 2,340,160 parameters."""
    project = spec.linear if linear else lambda key, n_in, n_out: spec.conv(key, n_in, n_out, 1)
    spec.norm(f"{name}.norm", channels)
    project(f"{name}.proj_in", channels, channels)
    for block in (f"{name}.transformer_blocks.{i}" for i in range(depth)):
        for attention, width in (("attn1", channels), ("attn2", context)):
            spec.linear(f"{block}.{attention}.to_q", channels, channels, bias=False)
            spec.linear(f"{block}.{attention}.to_k", width, channels, bias=False)
            spec.linear(f"{block}.{attention}.to_v", width, channels, bias=False)
            spec.linear(f"{block}.{attention}.to_out.0", channels, channels)
        spec.linear(f"{block}.ff.net.0.proj", channels, 8 * channels)
        spec.linear(f"{block}.ff.net.2", 4 * channels, channels)
        for norm in ("norm1", "norm2", "norm3"):
            spec.norm(f"{block}.{norm}", channels)
    project(f"{name}.proj_out", channels, channels)


def unet(down: list, up: list, context: int, linear: bool = False, adm: int = 0) -> Spec:
    """A UNet of one level, 320 channels wide, without a middle block; latents [B, 4, H/8, W/8].

    down: transformer blocks after each residual block on the way in; up: the same for the way out, one entry more
    (the first convolution has a skip connection too). context: width of the text; adm: of the pooled text, 0 if none.
    """
    spec = Spec()
    spec.linear("time_embed.0", 320, 1280)
    spec.linear("time_embed.2", 1280, 1280)
    if adm:
        spec.linear("label_emb.0.0", adm, 1280)
        spec.linear("label_emb.0.2", 1280, 1280)
    spec.conv("input_blocks.0.0", 4, 320)
    for side, depths, first, n_in in (("input", down, 1, 320), ("output", up, 0, 640)):
        for index, depth in enumerate(depths, first):
            _res_block(spec, f"{side}_blocks.{index}.0", n_in, 320)
            if depth:
                _transformer(spec, f"{side}_blocks.{index}.1", 320, depth, context, linear)
    spec.norm("out.0", 320)
    spec.conv("out.2", 320, 4)
    return spec


def unet_sd15(blocks: int) -> Spec:
    """SD1.5's family with `blocks` transformer blocks, half of them on the way in, half on the way out."""
    return unet([blocks // 2], [blocks - blocks // 2, 0], context=768)


def clip_l(projection: bool = True) -> Spec:
    """The full CLIP-L text encoder, 123.65 million parameters (123.06 without the projection); text [B, 77, 768]."""
    spec = Spec()
    spec.add("text_model.embeddings.token_embedding.weight", 49408, 768, std=0.05)
    spec.add("text_model.embeddings.position_embedding.weight", 77, 768, std=0.05)
    for layer in (f"text_model.encoder.layers.{i}" for i in range(12)):
        spec.norm(f"{layer}.layer_norm1", 768)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            spec.linear(f"{layer}.self_attn.{name}", 768, 768)
        spec.norm(f"{layer}.layer_norm2", 768)
        spec.linear(f"{layer}.mlp.fc1", 768, 3072)
        spec.linear(f"{layer}.mlp.fc2", 3072, 768)
    spec.norm("text_model.final_layer_norm", 768)
    if projection:
        spec.linear("text_projection", 768, 768, bias=False)
    return spec


def tiny_vae(channels: int, scale: float, shift: float) -> Spec:
    """TAESD (2.5 million parameters) for latents [B, channels, H/8, W/8].

    scale, shift: the latent format's own, which this VAE, unlike the full ones, is expected to undo.
    """
    spec = Spec()
    spec.add("vae_scale", mean=scale)
    spec.add("vae_shift", mean=shift)
    # Positions in the two chains: a number alone is a 3x3 convolution, 64 -> 64; a range holds residual blocks.
    encoder = (range(1, 2), 2, range(3, 6), 6, range(7, 10), 10, range(11, 14))
    decoder = (range(3, 6), 7, range(8, 11), 12, range(13, 16), 17, range(18, 19))
    for part, chain in (("taesd_encoder", encoder), ("taesd_decoder", decoder)):
        for item in chain:
            if isinstance(item, int):
                spec.conv(f"{part}.{item}", 64, 64, bias=False)
                continue
            for name in (f"{part}.{i}.conv.{j}" for i in item for j in (0, 2, 4)):
                spec.conv(name, 64, 64)
    spec.conv("taesd_encoder.0", 3, 64)
    spec.conv("taesd_encoder.14", 64, channels)
    spec.conv("taesd_decoder.1", channels, 64)
    spec.conv("taesd_decoder.19", 64, 3, gain=0.3)
    spec.bias("taesd_decoder.19", 3, mean=0.5)  # pixels are clamped to 0..1: stay around the middle
    return spec


def sd_vae(seed: int) -> dict:
    return tiny_vae(4, 0.18215, 0.0).draw(seed, prefix=SD_VAE)


def sd3_vae(seed: int) -> dict:
    return tiny_vae(16, 1.5305, 0.0609).draw(seed, prefix=SD_VAE)


def sd3_clip(seed: int) -> dict:
    return clip_l().draw(seed, prefix="text_encoders.clip_l.transformer.")


def sd3_no_clip(seed: int) -> dict:
    """One key is enough for the core to make a CLIP object; it then holds no text encoder, and encodes to zeros."""
    return {"text_encoders.placeholder": torch.zeros(1, dtype=torch.float16)}


def sd3_model(seed: int) -> dict:
    return mmdit().draw(seed, prefix=MODEL)


def to_fp8(tensors: dict) -> dict:
    """All of it in float8_e4m3fn, biases too, as the published fp8 diffusion models have it."""
    return {name: tensor.to(FP8) for name, tensor in tensors.items()}


def to_scaled_fp8(tensors: dict) -> dict:
    """ComfyUI's older scaled fp8: per linear an fp8 weight and a float32 `scale_weight`; the rest as it was.

    weight = stored weight * scale_weight, chosen so that the largest stored one is fp8's largest number, 448.
    """
    out = {MODEL + "scaled_fp8": torch.zeros(0, dtype=FP8)}  # the marker; two elements would forbid fp8 matmuls
    for name, tensor in tensors.items():
        if name.endswith(".weight") and tensor.ndim == 2:
            scale = tensor.float().abs().max() / torch.finfo(FP8).max
            out[name.removesuffix("weight") + "scale_weight"] = scale
            tensor = (tensor.float() / scale).to(FP8)
        out[name] = tensor
    return out


def to_int8(tensors: dict) -> dict:
    """ComfyUI's INT8: the weights of linear layers in blocks as int8, with a float32 scale and a marker for each.

    weight = stored weight * scale, chosen so that the largest stored one is 127.
    """
    out = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(".weight") and tensor.ndim == 2 and ".blocks." in name:
            layer = name.removesuffix(".weight")
            scale = tensor.float().abs().max() / 127
            out[name] = (tensor.float() / scale).round().to(torch.int8)
            out[f"{layer}.weight_scale"] = scale
            out[f"{layer}.comfy_quant"] = torch.tensor([*b'{"format": "int8_tensorwise"}'], dtype=torch.uint8)
    return out


def sd15_blocks_no_clip(seed: int) -> dict:
    return unet_sd15(12).draw(seed, prefix=MODEL) | sd_vae(seed)


def sd15_blocks(seed: int) -> dict:
    """CLIP-L goes without its projection, as in the published SD1.5 files: the core then uses the identity."""
    return sd15_blocks_no_clip(seed) | clip_l(projection=False).draw(seed, prefix="cond_stage_model.transformer.")


def v_pred(spec: Spec, seed: int) -> dict:
    """The key stands OUTSIDE the diffusion model's prefix, so whoever keeps the prefix's keys only loses it."""
    return spec.draw(seed, prefix=MODEL) | {"v_pred": torch.zeros(0)}


def sdxl_v_pred(seed: int) -> dict:
    """The smallest of the SDXL family (KOALA 700M by its depths 0, 2, 5): the family whose `v_pred` the core obeys."""
    return v_pred(unet([0, 2, 5], [0, 0, 0, 0], context=2048, linear=True, adm=2816), seed)


def flux_checkpoint(seed: int) -> dict:
    vae = tiny_vae(16, 0.3611, 0.1159).draw(seed, torch.bfloat16, prefix="vae.")
    return flux().draw(seed, torch.bfloat16, prefix=MODEL) | vae


class Kind(NamedTuple):
    build: Callable  # seed -> {name: tensor}
    suffix: str = ".safetensors"


KINDS = {
    "sd3": Kind(lambda seed: sd3_model(seed) | sd3_clip(seed) | sd3_vae(seed)),
    "sd3_no_clip_weights": Kind(lambda seed: sd3_model(seed) | sd3_no_clip(seed) | sd3_vae(seed)),
    "sd3_no_vae": Kind(lambda seed: sd3_model(seed) | sd3_no_clip(seed)),
    "sd3_only_model_prefix": Kind(sd3_model),
    "sd3_fp8": Kind(lambda seed: to_fp8(sd3_model(seed)) | sd3_clip(seed) | sd3_vae(seed)),
    "sd3_fp8_scaled": Kind(lambda seed: to_scaled_fp8(sd3_model(seed)) | sd3_clip(seed) | sd3_vae(seed)),
    "sd3_fp8_no_clip_weights": Kind(lambda seed: to_fp8(sd3_model(seed)) | sd3_no_clip(seed) | sd3_vae(seed)),
    "sd3_fp8_scaled_no_clip_weights": Kind(
        lambda seed: to_scaled_fp8(sd3_model(seed)) | sd3_no_clip(seed) | sd3_vae(seed)
    ),
    "sd15_blocks": Kind(sd15_blocks),
    "sd15_blocks_no_clip": Kind(sd15_blocks_no_clip),  # its text takes longer to encode than to sample from
    "sdxl_v_pred": Kind(sdxl_v_pred),
    "sd15_ckpt": Kind(lambda seed: unet_sd15(2).draw(seed, prefix=MODEL) | sd_vae(seed), ".ckpt"),
    "flux": Kind(flux_checkpoint),
    "wan": Kind(lambda seed: wan().draw(seed, prefix=MODEL)),
    "wan_fp32": Kind(lambda seed: wan(6, 768).draw(seed, torch.float32, prefix=MODEL)),  # 245 MB; as the CPU computes
    "wan_bf16": Kind(lambda seed: wan(3, 768).draw(seed, torch.bfloat16, prefix=MODEL)),
    "wan_bf16_deep": Kind(lambda seed: wan(16, 384).draw(seed, torch.bfloat16, prefix=MODEL)),
    "minimax_h3": Kind(lambda seed: minimax_h3().draw(seed, torch.bfloat16, prefix=MODEL)),
    "minimax_h3_int8": Kind(lambda seed: to_int8(minimax_h3().draw(seed, torch.bfloat16, prefix=MODEL))),
    "qwen_image": Kind(lambda seed: qwen_image().draw(seed, torch.bfloat16, prefix=MODEL)),
    "diffusion_only": Kind(lambda seed: mmdit().draw(seed)),  # no prefix: not a checkpoint to the core, yet SD3
    "clip_l": Kind(lambda seed: clip_l().draw(seed)),  # for CLIPLoader; with type "sd3" its text fits Flux too
}


def make_checkpoint(kind: str, path, seed: int = 0) -> Path:
    """Write a checkpoint; another process sees it whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = KINDS[kind].build(seed)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if KINDS[kind].suffix == ".ckpt":
            with open(temporary, "wb") as file:  # given a name, torch.save would write that name into the file
                torch.save({"state_dict": tensors}, file)
        else:
            safetensors.torch.save_file(tensors, temporary, metadata={"format": "pt"})
            temporary.chmod(0o644)  # safetensors makes it readable by its owner only
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def ensure_checkpoint(kind: str, folder) -> Path:
    """folder/<kind>.safetensors (or .ckpt), made if it is absent."""
    path = Path(folder) / (kind + KINDS[kind].suffix)
    return path if path.exists() else make_checkpoint(kind, path)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in KINDS:
        sys.exit(f"usage: {Path(sys.argv[0]).name} KIND FOLDER\nkinds: {', '.join(KINDS)}")
    print(ensure_checkpoint(sys.argv[1], sys.argv[2]))
