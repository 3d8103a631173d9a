"""Patches of weights: the same bits as with ComfyUI's own loader, whatever lies where.

What a test does with a model it does with one of ComfyUI's loader and with ours at several percentages on the donor,
and the results have to be equal. A patch that ComfyUI fails to apply changes nothing, and is found by that.
"""

import contextlib
import gc
import json
import math
import shutil

import comfy.cli_args
import comfy.lora
import comfy.model_management as mm
import comfy.sample
import comfy.sd
import comfy_extras.nodes_hooks as hook_nodes
import comfy_extras.nodes_lora_extract as extraction_nodes
import comfy_extras.nodes_model_merging as merging_nodes
import folder_paths
import pytest
import torch
from checkpoints import make_checkpoint
from placing import (
    COMPUTE,
    HAS_SIMULATED,
    devices_known_to_comfyui,  # noqa: F401
    inference_mode,  # noqa: F401
    lora_for,
    on_donor,
    partly_on_donor,
)
from safetensors.torch import save_file
from sampling import conditioning, core_load, sample

import nodes  # ComfyUI's, which comes first on the path
from distorch2.loading import load_checkpoint

if HAS_SIMULATED:
    import simulated_accelerators as sim

PERCENTAGES = [0, 50, 100]
MMDIT = "sd3_no_clip_weights"
UNET = "sd15_ckpt"
FP8 = "sd3_fp8"
FP8_SCALED = "sd3_fp8_scaled"
INPUTS = {
    "SD3": {"x": (1, 16, 8, 8), "c_crossattn": (1, 7, 4096), "y": (1, 2048)},
    "BaseModel": {"x": (1, 4, 8, 8), "c_crossattn": (1, 7, 768)},
}


@contextlib.contextmanager
def as_stored(kind):
    """ComfyUI by itself keeps fp8 weights in fp8 only where the compute device can use them."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(comfy.cli_args.args, "fp8_e4m3fn_unet", kind == FP8)
        yield


@pytest.fixture(scope="module")
def ours(checkpoints):
    """(kind, percent) -> a model with so much of it on the donor."""

    def load(kind, percent):
        with as_stored(kind):
            return on_donor(checkpoints, kind, percent)[0]

    return load


@pytest.fixture(scope="module")
def core(checkpoints):
    """kind -> (model, clip, vae) of ComfyUI's own loader; to be cloned and not to be changed."""
    loaded = {}

    def load(kind):
        if kind not in loaded:
            with torch.inference_mode(), as_stored(kind):
                loaded[kind] = core_load(checkpoints(kind))
                output(loaded[kind][0])  # the first forward may take other kernels
        return loaded[kind]

    return load


@pytest.fixture(scope="module")
def other_checkpoints(checkpoints, tmp_path_factory):
    """As `checkpoints`, with other numbers in the files."""
    folder = tmp_path_factory.mktemp("other")

    def path(kind):
        made = folder / checkpoints(kind).rpartition("/")[2]
        return str(made if made.exists() else make_checkpoint(kind, made, seed=1))

    return path


@pytest.fixture
def loras(tmp_path, monkeypatch):
    """Save a LoRA where ComfyUI's nodes find it by the name that this returns."""
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))

    def save(state_dict, name="lora.safetensors"):
        save_file(state_dict, tmp_path / name)
        return name

    return save


@pytest.fixture
def output_folder(tmp_path, monkeypatch):
    """Of ComfyUI's nodes that save; `saved(save)` calls `save()` and returns what every file by name holds."""

    def saved(save):
        folder = tmp_path / f"output{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        monkeypatch.setattr(folder_paths, "output_directory", str(folder))
        save()
        held = {path.name: header_and_data(path) for path in folder.rglob("*.safetensors")}
        shutil.rmtree(folder)
        return held

    return saved


def header_and_data(path):
    """The header, in which the metadata has no order, and the bytes of all tensors."""
    held = path.read_bytes()
    begin = 8 + int.from_bytes(held[:8], "little")
    return json.loads(held[8:begin]), held[begin:]


def output(patcher, **more_inputs):
    """Of one forward of the diffusion model, on the CPU; `more_inputs` are shapes by name."""
    mm.load_models_gpu([patcher], force_full_load=True)
    generator = torch.Generator().manual_seed(0)
    shapes = {**INPUTS[type(patcher.model).__name__], **more_inputs}
    inputs = {name: torch.randn(shape, generator=generator).to(COMPUTE) for name, shape in shapes.items()}
    result = patcher.model.apply_model(t=torch.tensor([0.5], device=COMPUTE), **inputs)
    assert torch.isfinite(result).all()
    return result.cpu()


def text(clip):
    """The conditioning of a prompt and its pooled output, as one tensor on the CPU."""
    cond, pooled = clip.encode_from_tokens(clip.tokenize("a house on a hill"), return_pooled=True)
    return torch.cat([cond.flatten(), pooled.flatten()]).cpu()


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def assert_streamed(patcher, percent):
    """That a model was served from a donor, if it should be."""
    plan, transfer = patcher.distribution.plan, patcher.distribution.transfer
    assert (len(plan.streamed) > 0) == (transfer.copies > 0) == (percent > 0)


# --- kinds of patches


class Draw:
    """Random numbers for the tensors of one LoRA file."""

    def __init__(self):
        self._generator = torch.Generator().manual_seed(3)

    def __call__(self, *shape, std=0.05):
        return torch.randn(shape, generator=self._generator) * std

    def around_one(self, *shape):
        return 1 + self(*shape, std=0.2)


def lora(draw, rows, *columns):
    return {
        "lora_up.weight": draw(rows, 4, *[1 for _ in columns[1:]]),
        "lora_down.weight": draw(4, *columns, std=0.2),
    }


def with_alpha(draw, rows, *columns):
    return {**lora(draw, rows, *columns), "alpha": torch.tensor(2.0)}


def dora(draw, rows, *columns):
    return {**with_alpha(draw, rows, *columns), "dora_scale": draw.around_one(rows, *[1 for _ in columns])}


def dora_by_column(draw, rows, *columns):
    return {**lora(draw, rows, *columns), "dora_scale": draw.around_one(1, columns[0], *[1 for _ in columns[1:]])}


def tucker_lora(draw, rows, *columns):
    if len(columns) == 1:
        return lora(draw, rows, *columns)
    return {
        "lora_up.weight": draw(rows, 4, 1, 1),
        "lora_mid.weight": draw(4, 4, *columns[1:]),
        "lora_down.weight": draw(4, columns[0], 1, 1, std=0.5),
    }


def loha(draw, rows, *columns):
    first = {"hada_w1_a": draw(rows, 4), "hada_w1_b": draw(4, math.prod(columns), std=0.5)}
    return {
        **first,
        "hada_w2_a": draw(rows, 4, std=0.5),
        "hada_w2_b": draw(4, math.prod(columns)),
        "alpha": torch.tensor(2.0),
    }


def tucker_loha(draw, rows, *columns):
    if len(columns) == 1:
        return loha(draw, rows, *columns)
    parts = {}
    for half in ("1", "2"):
        parts[f"hada_t{half}"] = draw(4, 4, *columns[1:], std=0.5)
        parts[f"hada_w{half}_a"] = draw(4, rows, std=0.5)
        parts[f"hada_w{half}_b"] = draw(4, columns[0], std=0.5)
    return parts


def lokr(draw, rows, *columns):
    return {"lokr_w1": draw(2, 2, std=0.5), "lokr_w2": draw(rows // 2, columns[0] // 2, *columns[1:])}


def decomposed_lokr(draw, rows, *columns):
    return {
        "lokr_w1_a": draw(2, 2, std=0.5),
        "lokr_w1_b": draw(2, 2, std=0.5),
        "lokr_w2_a": draw(rows // 2, 3),
        "lokr_w2_b": draw(3, math.prod(columns) // 2, std=0.5),
        "alpha": torch.tensor(1.5),
    }


def oft(draw, rows, *_columns):
    return {"oft_blocks": draw(rows // 8, 8, 8), "alpha": torch.tensor(1.0)}


def boft(draw, rows, *_columns):
    return {"oft_blocks": draw(2, rows // 8, 8, 8), "alpha": torch.tensor(1.0)}


def glora(draw, rows, *columns):
    return {
        "a1.weight": draw(columns[0], 4),
        "a2.weight": draw(4, columns[0]),
        "b1.weight": draw(rows, 4),
        "b2.weight": draw(4, math.prod(columns)),
    }


def difference(draw, rows, *columns):
    return {"diff": draw(rows, *columns), "diff_b": draw(rows)}


def new_weight(draw, rows, *columns):
    return {"set_weight": draw(rows, *columns)}


ADAPTERS = [
    *(lora, with_alpha, dora, dora_by_column, tucker_lora, loha, tucker_loha, lokr, decomposed_lokr),
    *(oft, boft, glora, difference, new_weight),
]


def fits(key, weight):
    """A weight that all of them fit. Of the UNet only those on the way in, which has every kind of layer."""
    if not key.endswith(".weight") or not key.startswith("diffusion_model.") or ".output_blocks." in key:
        return False
    return weight.dim() in (2, 4) and weight.shape[0] % 16 == weight.shape[1] % 2 == 0


def lora_file(patcher, adapter):
    """What a file of such a LoRA holds, for layers of the diffusion model."""
    draw, state_dict = Draw(), {}
    for key, weight in patcher.model.state_dict().items():
        if fits(key, weight):
            tensors = adapter(draw, *weight.shape)
            state_dict.update({f"{key.removesuffix('weight')}{name}": tensor for name, tensor in tensors.items()})
    for name, module in patcher.model.named_modules():
        if adapter is difference and type(module).__name__ == "GroupNorm":
            state_dict |= {f"{name}.w_norm": draw(module.num_channels), f"{name}.b_norm": draw(module.num_channels)}
    return state_dict


def patched_by(patcher, state_dict, strength=1.0):
    """A clone with this LoRA, as ComfyUI's node makes it."""
    patched = comfy.sd.load_lora_for_models(patcher, None, state_dict, strength, 0.0)[0]
    assert patched.patches.keys() >= {key for key, weight in patcher.model.state_dict().items() if fits(key, weight)}
    return patched


@pytest.fixture(scope="module")
def core_outputs(core):
    """(kind, adapter) -> output of ComfyUI's model with such a LoRA; without an adapter that of the model itself."""
    made = {}

    def outputs(kind, adapter=None):
        if (kind, adapter) not in made:
            with torch.inference_mode():
                model = core(kind)[0]
                patched = patched_by(model, lora_file(model, adapter), -0.6) if adapter else model
                made[kind, adapter] = output(patched)
        return made[kind, adapter]

    return outputs


def changes_the_output(kind, adapter):
    """Whether ComfyUI's output does.

    Its BOFT mixes dtypes where LoRAs are computed in fp16, as on a GPU, and leaves a weight as it was; one in scaled
    fp8 is rounded anew even so.
    """
    return adapter is not boft or kind == FP8_SCALED or mm.lora_compute_dtype(mm.get_torch_device()) == torch.float32


@pytest.mark.parametrize("kind", [MMDIT, UNET])
@pytest.mark.parametrize("adapter", ADAPTERS, ids=lambda adapter: adapter.__name__)
@pytest.mark.quick("lora-sd3_no_clip_weights")
def test_every_kind_of_patch(ours, core_outputs, kind, adapter):
    """On Linear and Conv2d layers, in the dtype of the file."""
    assert changes_the_output(kind, adapter) != torch.equal(core_outputs(kind, adapter), core_outputs(kind))
    for percent in PERCENTAGES:
        model = ours(kind, percent)
        patched = patched_by(model, lora_file(model, adapter), -0.6)
        assert torch.equal(output(patched), core_outputs(kind, adapter)), percent
        assert_streamed(patched, percent)
        assert torch.equal(output(model), core_outputs(kind)), percent


@pytest.mark.parametrize("percent", PERCENTAGES)
@pytest.mark.parametrize("kind", [FP8, FP8_SCALED])
def test_every_kind_of_patch_of_fp8_weights(ours, core_outputs, kind, percent):
    """Rounded to fp8 again, with ComfyUI's seeds; in the scaled kind a weight is a quantised tensor."""
    model = ours(kind, percent)
    dtypes = {weight.dtype for key, weight in model.model.state_dict().items() if fits(key, weight)}
    assert torch.float8_e4m3fn in dtypes
    for adapter in ADAPTERS:
        assert changes_the_output(kind, adapter) != torch.equal(core_outputs(kind, adapter), core_outputs(kind))
        patched = patched_by(model, lora_file(model, adapter), -0.6)
        assert torch.equal(output(patched), core_outputs(kind, adapter)), adapter.__name__
    assert_streamed(patched, percent)
    assert torch.equal(output(model), core_outputs(kind))


def stacked(patcher):
    """Patches of several kinds on the same weights: (kind, strength, what the weight itself is multiplied by)."""
    stack = [(lora, 0.8, 1.0), (dora, -0.5, 1.0), (difference, 0.0, 1.0), (lokr, 1.3, 0.7), (glora, 1.0, 0.9)]
    patched, keys = patcher.clone(), comfy.lora.model_lora_keys_unet(patcher.model, {})
    for adapter, strength, strength_model in stack:
        patched.add_patches(comfy.lora.load_lora(lora_file(patcher, adapter), keys), strength, strength_model)
    assert max(len(patches) for patches in patched.patches.values()) == len(stack)
    return patched


def only_scaled(patcher):
    """A LoRA of strength 0, of a weight that is multiplied by 0.5 nevertheless."""
    patched, keys = patcher.clone(), comfy.lora.model_lora_keys_unet(patcher.model, {})
    patched.add_patches(comfy.lora.load_lora(lora_file(patcher, lora), keys), 0.0, 0.5)
    return patched


def of_slices(patcher):
    """In Diffusers' names: query and value are thirds of one weight, and two halves of another are swapped."""
    draw, state_dict = Draw(), {}
    attention = "transformer.transformer_blocks.0.attn"
    sizes = {f"{attention}.to_q": (64, 64), f"{attention}.to_v": (64, 64), "transformer.norm_out.linear": (128, 64)}
    for name, (rows, columns) in sizes.items():
        state_dict |= {f"{name}.lora_B.weight": draw(rows, 4), f"{name}.lora_A.weight": draw(4, columns, std=0.5)}
    patched = comfy.sd.load_lora_for_models(patcher, None, state_dict, 0.9, 0.0)[0]
    patches = [patch for patches in patched.patches.values() for patch in patches]
    offsets, functions = [patch[3] for patch in patches], [patch[4] for patch in patches]
    assert (len(patches), offsets.count(None), functions.count(None)) == (3, 1, 2)
    return patched


@pytest.mark.parametrize("kind", [MMDIT, FP8_SCALED])
@pytest.mark.parametrize("way", [stacked, only_scaled, of_slices], ids=lambda way: way.__name__)
def test_patches_together_and_of_parts(ours, core, core_outputs, kind, way):
    expected = output(way(core(kind)[0]))
    assert not torch.equal(expected, core_outputs(kind))
    for percent in PERCENTAGES:
        model = ours(kind, percent)
        assert torch.equal(output(way(model)), expected), percent
        assert_streamed(model, percent)
        assert torch.equal(output(model), core_outputs(kind)), percent


@pytest.mark.parametrize("percent", PERCENTAGES)
@pytest.mark.parametrize("way", ["difference", "lora"])
def test_a_patch_that_widens_a_weight(ours, core, core_outputs, way, percent):
    """As the control LoRAs for Flux: more input channels, together with patches of the other layers of the group."""
    name, shape, draw = "diffusion_model.x_embedder.proj", (64, 32, 2, 2), Draw()
    if way == "difference":
        patches = {f"{name}.weight": ("diff", (draw(*shape), {"pad_weight": True}))}
    else:
        tensors = {**lora(draw, *shape), "reshape_weight": torch.tensor(shape)}
        state_dict = {f"{name}.{part}": tensor for part, tensor in tensors.items()}
        patches = comfy.lora.load_lora(state_dict, {name: f"{name}.weight"})

    def widened(patcher):
        patched = lora_for(patcher)
        patched.add_patches(patches, 0.9)
        return output(patched, c_concat=(1, 16, 8, 8))

    expected = widened(core(MMDIT)[0])
    assert not torch.equal(expected, output(lora_for(core(MMDIT)[0])))
    model = ours(MMDIT, percent)
    for _ in range(2):
        assert torch.equal(widened(model), expected)
        assert torch.equal(output(model), core_outputs(MMDIT))
    assert_streamed(model, percent)


# --- the text encoder


def text_encoder_file(clip):
    """A LoRA of two layers of two blocks of the text encoder."""
    draw, state_dict = Draw(), {}
    for key, weight in clip.cond_stage_model.state_dict().items():
        if key.endswith(("q_proj.weight", "mlp.fc1.weight")) and (".layers.2." in key or ".layers.9." in key):
            tensors = with_alpha(draw, *weight.shape)
            state_dict |= {f"text_encoders.{key.removesuffix('weight')}{name}": part for name, part in tensors.items()}
    assert state_dict
    return state_dict


@pytest.fixture(scope="module")
def with_text_encoder(checkpoints, core):
    """percent -> (model, clip) of "sd3" with so much of both on the donor; None is ComfyUI's own."""

    def load(percent):
        if percent is None:
            return core("sd3")[:2]
        request = partly_on_donor(percent)
        return load_checkpoint(checkpoints("sd3"), request, request, COMPUTE)[:2]

    return load


@pytest.fixture(scope="module")
def compared(with_text_encoder):
    """Asserts that what `run(model, clip)` returns, tensors by name, is the same with so much on the donor."""
    made = {}

    def compare(run, percent):
        if run.__qualname__ not in made:
            made[run.__qualname__] = run(*with_text_encoder(None))
        expected = made[run.__qualname__]
        model, clip = with_text_encoder(percent)
        assert_same(run(model, clip), expected)
        for patcher in (model, clip.patcher):
            assert_streamed(patcher, percent)
        return expected

    return compare


@pytest.mark.parametrize("percent", PERCENTAGES)
def test_comfyuis_lora_loaders(compared, loras, percent):
    """LoRAs on both models, on the text encoder only, on the diffusion model only, and one after another."""

    def run(model, clip):
        name = loras(lora_file(model, lora) | text_encoder_file(clip))
        both = nodes.LoraLoader().load_lora(model, clip, name, 0.8, -0.5)
        only_text = nodes.LoraLoader().load_lora(model, clip, name, 0.0, 0.7)
        only_model = nodes.LoraLoaderModelOnly().load_lora_model_only(only_text[0], name, 0.6)
        twice = nodes.LoraLoader().load_lora(*both, name, 0.3, 0.4)
        models = {"plain": model, "both": both[0], "only model": only_model[0], "twice": twice[0]}
        clips = {"plain": clip, "both": both[1], "only text": only_text[1], "twice": twice[1]}
        outputs = {f"{name}, model": output(patched) for name, patched in models.items()}
        texts = {f"{name}, text": text(patched) for name, patched in clips.items()}
        again = {"again, model": output(model), "again, text": text(clip)}
        return outputs | texts | again

    expected = compared(run, percent)
    assert torch.equal(expected["again, model"], expected["plain, model"])
    assert torch.equal(expected["again, text"], expected["plain, text"])
    assert not any(torch.equal(expected[f"{case}, model"], expected["plain, model"]) for case in ("both", "twice"))
    assert not any(torch.equal(expected[f"{case}, text"], expected["plain, text"]) for case in ("both", "only text"))


# --- weight wrappers and hooks


class Wrapper:
    """A function of weights that ComfyUI moves to the compute device, as those of some adapters."""

    def __init__(self):
        self._factor = torch.tensor(1.5)

    def __call__(self, weight):
        return weight * self._factor.to(weight.dtype)

    def move_to(self, device):
        self._factor = self._factor.to(device)
        return 0


@pytest.mark.parametrize("percent", PERCENTAGES)
@pytest.mark.parametrize("kind", [MMDIT, FP8_SCALED])
def test_weight_wrappers(ours, core, core_outputs, kind, percent):
    """On weights and biases, alone and on top of a LoRA, and gone with the clone that has them."""

    def wrapped(patcher):
        wrapped = patcher.clone()
        for key, weight in patcher.model.state_dict().items():
            if fits(key, weight):
                wrapped.add_weight_wrapper(key, Wrapper())
                wrapped.add_weight_wrapper(key, lambda weight: weight + 0.01)
                wrapped.add_weight_wrapper(key.removesuffix("weight") + "bias", lambda bias: -bias)
        return wrapped

    def outputs(patcher):
        patched = patched_by(patcher, lora_file(patcher, lora), -0.6)
        ways = {"wrapped": wrapped(patcher), "both": wrapped(patched), "patched": patched, "plain": patcher}
        return {name: output(way) for name, way in ways.items()}

    expected = outputs(core(kind)[0])
    assert len({tensor.double().sum().item() for tensor in expected.values()}) == len(expected)
    assert torch.equal(expected["plain"], core_outputs(kind))
    model = ours(kind, percent)
    assert_same(outputs(model), expected)
    assert_streamed(model, percent)


def keyframes(*strengths):
    """Spread evenly over the steps."""
    frames = None
    for index, strength in enumerate(strengths):
        frames = hook_nodes.CreateHookKeyframe().create_hook_keyframe(strength, index / len(strengths), frames)[0]
    return frames


def sampled(model, positive, negative, seed=7):
    noise_of = torch.zeros(1, model.model.latent_format.latent_channels, 8, 8)
    noise = comfy.sample.prepare_noise(noise_of, seed)
    latents = comfy.sample.sample(model, noise, 3, 3.0, "euler", "simple", positive, negative, noise_of)
    assert torch.isfinite(latents).all()
    return latents


def with_hooks(case, first, second, positive, negative):
    """Conditionings with hooks; ComfyUI caches patched weights when there are more groups of them than one."""
    set_on_both = hook_nodes.PairConditioningSetProperties().set_properties
    if case == "on both":
        return set_on_both(positive, negative, 1.0, "default", hooks=first)
    if case == "on one":
        return hook_nodes.ConditioningSetProperties().set_properties(positive, 1.0, "default", hooks=first)[0], negative
    if case == "one each":
        attach = hook_nodes.SetModelHooksOnCond().attach_hook
        return attach(positive, first)[0], attach(negative, second)[0]
    if case == "combined":
        combined = hook_nodes.CombineHooks().combine_hooks(first, second)[0]
        return set_on_both(positive, negative, 1.0, "default", hooks=combined)
    early, _, late = hook_nodes.ConditioningTimestepsRange().create_range(0.0, 0.5)
    pair = set_on_both(positive, negative, 1.0, "default", hooks=second, timesteps=late)
    combine = hook_nodes.PairConditioningSetPropertiesAndCombine().set_properties
    return combine(*pair, positive, negative, 1.0, "default", hooks=first, timesteps=early)


HOOK_CASES = ["on both", "on one", "one each", "combined", "one after another"]


@pytest.mark.parametrize(
    ("kind", "case"), [*((MMDIT, case) for case in HOOK_CASES), (FP8, "on both"), (FP8, "one each")]
)
def test_hook_loras_while_sampling(ours, core, loras, kind, case):
    """Scheduled by step and by conditioning, without and with a LoRA below: weights are rewritten between forwards.

    Not with quantised weights: ComfyUI's own patcher raises an AttributeError for those.
    """
    first_name = loras(lora_file(core(kind)[0], lora), "first.safetensors")
    second_name = loras(lora_file(core(kind)[0], loha), "second.safetensors")

    def latents(model):
        conditionings = conditioning(model, None, 7), conditioning(model, None, 8)
        first = hook_nodes.CreateHookLora().create_hook(first_name, 0.9, 0.0)[0]
        first = hook_nodes.SetHookKeyframes().set_hook_keyframes(first, keyframes(1.0, 0.3, -0.5))[0]
        second = hook_nodes.CreateHookLoraModelOnly().create_hook_model_only(second_name, -0.7)[0]
        hooked = with_hooks(case, first, second, *conditionings)
        patched = patched_by(model, lora_file(model, dora))
        return {
            "plain": sampled(model, *conditionings),
            "hooked": sampled(model, *hooked),
            "patched and hooked": sampled(patched, *hooked),
            "patched": sampled(patched, *conditionings),
            "again": sampled(model, *conditionings),
        }

    expected = latents(core(kind)[0])
    assert torch.equal(expected["again"], expected["plain"])
    assert len({tensor.double().sum().item() for tensor in expected.values()}) == len(expected) - 1
    for percent in PERCENTAGES:
        model = ours(kind, percent)
        assert_same(latents(model), expected)
        assert_streamed(model, percent)


@pytest.mark.parametrize("percent", PERCENTAGES)
def test_a_whole_model_as_hook(checkpoints, ours, other_checkpoints, core, monkeypatch, percent):
    """Patches that are differences from the original weights, which lie on the donor."""
    path = other_checkpoints(MMDIT)
    folder, _, name = path.rpartition("/")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "checkpoints", ([folder], {".safetensors"}))

    def latents(model):
        hooks = hook_nodes.CreateHookModelAsLora().create_hook(name, 0.6, 0.0)[0]
        hooks = hook_nodes.SetHookKeyframes().set_hook_keyframes(hooks, keyframes(0.5, 1.0))[0]
        conditionings = conditioning(model, None, 7), conditioning(model, None, 8)
        patched = patched_by(model, lora_file(model, lora))
        return {
            "plain": sampled(model, *conditionings),
            "hooked": sampled(model, *with_hooks("on one", hooks, None, *conditionings)),
            "patched": sampled(patched, *with_hooks("on both", hooks, None, *conditionings)),
        }

    expected = latents(core(MMDIT)[0])
    assert not any(torch.equal(expected["plain"], expected[case]) for case in ("hooked", "patched"))
    model = ours(MMDIT, percent)
    assert_same(latents(model), expected)
    assert_streamed(model, percent)


@pytest.mark.parametrize("percent", PERCENTAGES)
def test_hooks_on_the_text_encoder(compared, loras, percent):
    """Scheduled or not, for the text encoder and, through its conditionings, for the diffusion model."""

    def run(model, clip):
        name = loras(lora_file(model, lora) | text_encoder_file(clip))
        hooks = hook_nodes.CreateHookLora().create_hook(name, 0.9, 0.8)[0]
        hooks = hook_nodes.SetHookKeyframes().set_hook_keyframes(hooks, keyframes(1.0, -0.5))[0]
        tokens = clip.tokenize("a house")
        plain = clip.encode_from_tokens_scheduled(tokens)
        found = {"plain": plain[0][0], "plain, latents": sampled(model, plain, plain)}
        for scheduled in (False, True):
            hooked = hook_nodes.SetClipHooks().apply_hooks(clip, scheduled, True, hooks)[0]
            encoded = hooked.encode_from_tokens_scheduled(tokens)
            assert len(encoded) == (2 if scheduled else 1)
            found |= {f"{scheduled} {index}": cond for index, (cond, _) in enumerate(encoded)}
            found[f"{scheduled}, latents"] = sampled(model, encoded, plain)
        return found | {"again": clip.encode_from_tokens_scheduled(tokens)[0][0]}

    expected = compared(run, percent)
    assert torch.equal(expected["again"], expected["plain"])
    assert len({tensor.double().sum().item() for tensor in expected.values()}) >= len(expected) - 2


# --- merging, saving, extracting


def merged_simply(first, second):
    return merging_nodes.ModelMergeSimple().merge(first, second, 0.3)[0]


def merged_by_block(first, second):
    ratios = {"input": 0.2, "middle": 0.5, "out": 0.9, "joint_blocks.": 0.4}
    return merging_nodes.ModelMergeBlocks().merge(first, second, **ratios)[0]


def added_difference(first, second):
    difference = merging_nodes.ModelSubtract().merge(second, first, 0.7)[0]
    return merging_nodes.ModelAdd().merge(first, difference)[0]


@pytest.mark.parametrize("percent", [50, 100])
@pytest.mark.parametrize("merged", [merged_simply, merged_by_block, added_difference], ids=lambda m: m.__name__)
@pytest.mark.parametrize(("kind", "used_before"), [(MMDIT, False), (MMDIT, True), (UNET, True)])
def test_merges(checkpoints, other_checkpoints, core, core_outputs, kind, used_before, merged, percent):
    """Of two distributed models, and of one with one of ComfyUI's; the second with a LoRA, and used before or not."""

    def outputs(first, second):
        second = patched_by(second, lora_file(second, lora))
        found = {"first": output(first), "second": output(second)} if used_before else {}
        merge = merged(first, second)
        found["merged"] = output(merge) if kind == UNET else sample(merge, None)
        return found | {"first again": output(first), "second again": output(second)}

    core_first, core_second = core(kind)[0], core_load(other_checkpoints(kind))[0]
    expected = outputs(core_first, core_second)
    plain = core_outputs(kind) if kind == UNET else sample(core_first, None)
    assert not torch.equal(expected["merged"], plain)
    first, second = on_donor(checkpoints, kind, percent)[0], on_donor(other_checkpoints, kind, percent)[0]
    for pair in ((first, second), (first, core_second), (core_first, second)):
        assert_same(outputs(*pair), expected)
    for patcher in (first, second):
        assert_streamed(patcher, percent)


@pytest.mark.parametrize("percent", [50, 100])
def test_a_merge_of_text_encoders(compared, loras, percent):
    """The second one with a LoRA, which is computed within the merge."""

    def run(model, clip):
        other = nodes.LoraLoader().load_lora(None, clip, loras(text_encoder_file(clip)), 0.0, 1.0)[1]
        merged = merging_nodes.CLIPMergeSimple().merge(clip, other, 0.3)[0]
        return {"plain": text(clip), "other": text(other), "merged": text(merged), "model": output(model)}

    expected = compared(run, percent)
    assert len({tensor.double().sum().item() for tensor in expected.values()}) == len(expected)


def assert_same_files(found, expected):
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []  # and not in full in the message


@pytest.mark.parametrize("used_before", [False, True])
@pytest.mark.parametrize("kind", [MMDIT, UNET])
def test_saved_models(checkpoints, core, output_folder, kind, used_before):
    """With ComfyUI's nodes, with a LoRA: byte by byte what a resident model is saved as."""

    def save(model, clip, vae):
        for name, patched in {"plain": model, "patched": patched_by(model, lora_file(model, dora))}.items():
            if used_before:
                output(patched)
            merging_nodes.ModelSave().save(patched, f"{name} model")
            merging_nodes.CheckpointSave().save(patched, clip, vae, f"{name} checkpoint")

    expected = output_folder(lambda: save(*core(kind)))
    assert len(expected) == 4
    for kind_of_file in ("model", "checkpoint"):
        plain, patched = (expected[f"{name} {kind_of_file}_00001_.safetensors"] for name in ("plain", "patched"))
        assert plain[0].keys() == patched[0].keys()
        assert plain[1] != patched[1]
    for percent in PERCENTAGES:
        loaded = on_donor(checkpoints, kind, percent)
        assert_same_files(output_folder(lambda loaded=loaded: save(*loaded)), expected)
        output(loaded[0])
        assert_streamed(loaded[0], percent)


@pytest.mark.parametrize("percent", [50, 100])
def test_a_saved_text_encoder(with_text_encoder, output_folder, percent):
    def save(clip):
        patched = clip.clone()
        patches = comfy.lora.load_lora(text_encoder_file(clip), comfy.lora.model_lora_keys_clip(clip.cond_stage_model))
        assert patched.add_patches(patches, 0.8)
        merging_nodes.CLIPSave().save(patched, "text")

    expected = output_folder(lambda: save(with_text_encoder(None)[1]))
    assert len(expected) == 1
    clip = with_text_encoder(percent)[1]
    assert_same_files(output_folder(lambda: save(clip)), expected)
    text(clip)
    assert_streamed(clip.patcher, percent)


@pytest.mark.parametrize("percent", PERCENTAGES)
@pytest.mark.parametrize("lora_type", ["standard", "full_diff"])
@pytest.mark.parametrize("of", ["subtracted", "patched"])
def test_extracted_loras(ours, core, output_folder, of, lora_type, percent):
    """Of the difference of two models, as ComfyUI means it, and of a model as it is."""

    def extract(model):
        patched = patched_by(model, lora_file(model, difference))
        subtracted = merging_nodes.ModelSubtract().merge(patched, model, 1.0)[0]
        extracted = subtracted if of == "subtracted" else patched
        extraction_nodes.LoraSave.execute("extracted", 4, lora_type, True, model_diff=extracted)

    expected = output_folder(lambda: extract(core(MMDIT)[0]))
    assert len(expected["extracted_00001_.safetensors"][0]) == (45 if lora_type == "standard" else 30)
    model = ours(MMDIT, percent)
    assert_same_files(output_folder(lambda: extract(model)), expected)
    output(model)
    assert_streamed(model, percent)


@pytest.mark.parametrize("percent", PERCENTAGES)
def test_an_extracted_lora_is_computed_on_the_compute_device(ours, output_folder, monkeypatch, percent):
    """Its bits depend on where singular values are computed, and a donor would take long."""
    extract, devices = extraction_nodes.extract_lora, set()

    def watched(diff, rank):
        devices.add(str(diff.device))
        return extract(diff, rank)

    monkeypatch.setattr(extraction_nodes, "extract_lora", watched)
    model = ours(MMDIT, percent)
    patched = patched_by(model, lora_file(model, difference))
    output_folder(lambda: extraction_nodes.LoraSave.execute("extracted", 4, "standard", True, model_diff=patched))
    assert devices == {COMPUTE}


# --- memory


def living_tensors():
    gc.collect()
    # Not of other classes: what a compiler has left behind has no size.
    tensors = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter)]
    used = sim.used_bytes[0] if HAS_SIMULATED else torch.cuda.memory_allocated()
    return len(tensors), sum(tensor.nbytes for tensor in tensors), used


@pytest.mark.parametrize("percent", PERCENTAGES)
def test_fifty_rounds_leave_nothing_behind(ours, percent):
    """LoRAs are added, changed in strength, stacked and taken away; counted are tensors, their bytes, and devices'."""
    model = ours(MMDIT, percent)
    files = [lora_file(model, adapter) for adapter in (lora, loha, difference)]
    at_start = sample(model, None)
    counted = []
    for number in range(50):
        patched = patched_by(model, files[number % 3], 0.1 * number - 2)
        if number % 5 == 0:
            patched = patched_by(patched, files[0], 0.5)
        assert not torch.equal(output(patched), output(model) if number % 7 == 0 else at_start)
        del patched
        if number % 10 == 9:
            assert torch.equal(sample(model, None), at_start)
            counted.append(living_tensors())
    assert counted == [counted[0]] * 5
    assert torch.equal(sample(model, None), at_start)
    assert_streamed(model, percent)
