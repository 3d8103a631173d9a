"""Models of ComfyUI's own loaders, distributed: while they stay usable, with what was done to them before and after."""

import gc
import weakref

import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import comfy_extras.nodes_model_advanced as advanced_nodes
import pytest
import torch
from comfy.patcher_extension import PatcherInjection, WrappersMP
from placing import (
    DONOR,
    devices_known_to_comfyui,  # noqa: F401
    inference_mode,  # noqa: F401
    lora_for,
    partly_on_donor,
)
from sampling import core_load, sample

from distorch2 import loading
from distorch2.loading import distribute, distribute_clip
from distorch2.plan import ComponentRequest, PlanError, VirtualVram
from distorch2.quantised import plain_tensors

KIND = "sd3_no_clip_weights"
HALF, ALL = partly_on_donor(50), partly_on_donor(100)


def streams(model):
    """Whether something of the last run was copied, and ComfyUI was told so."""
    return model.distribution.transfer.copies > 0 and len(model.distribution.plan.streamed) > 0


def shifted(model):
    """With an object patch."""
    return advanced_nodes.ModelSamplingSD3().patch(model, 5.0)[0]


def wrapped(model):
    patched = model.clone()
    patched.add_wrapper_with_key(
        WrappersMP.APPLY_MODEL, "tests", lambda executor, *args, **options: 0.9 * executor(*args, **options)
    )
    return patched


@pytest.mark.quick("sd3_no_clip_weights")
@pytest.mark.parametrize("kind", [KIND, "sd3_fp8_scaled_no_clip_weights", "sd15_blocks_no_clip", "flux", "wan"])
def test_a_model_that_is_in_use_stays_usable(checkpoints, kind):
    core, clip, _ = core_load(checkpoints(kind))
    expected = sample(core, clip)
    for request in (HALF, ALL):  # it is loaded, or the other is
        ours = distribute(core, request, high_precision_loras=False)
        assert torch.equal(sample(ours, clip), expected)
        assert streams(ours)
        assert torch.equal(sample(core, clip), expected)


@pytest.mark.parametrize("patch", [lora_for, shifted, wrapped])
def test_patches_may_come_before_or_after(checkpoints, patch):
    core, clip, _ = core_load(checkpoints(KIND))
    plain, expected = sample(core, clip), sample(patch(core), clip)
    assert not torch.equal(plain, expected)
    before = distribute(patch(core), HALF)
    assert torch.equal(sample(before, clip), expected)
    after = patch(distribute(core, HALF))
    for model, wanted in ((after, expected), (before, expected), (core, plain)):
        assert torch.equal(sample(model, clip), wanted)


def test_two_of_one_loader_share_a_module_and_host_memory(checkpoints):
    core, clip, _ = core_load(checkpoints(KIND))
    expected = sample(core, clip)
    one, other = distribute(core, HALF), distribute(core, ALL)
    assert one.model is other.model is not core.model
    addresses = {part.data_ptr() for p in core.model.parameters() for part in plain_tensors(p)}
    assert {part.data_ptr() for p in one.model.parameters() for part in plain_tensors(p)} == addresses
    for model in (one, other, one):
        assert torch.equal(sample(model, clip), expected)
        assert streams(model)
        assert model.distribution.is_placed
        assert sum(each.distribution.is_placed for each in (one, other)) == 1


def test_a_distributed_model_gets_another_plan(checkpoints):
    core, clip, _ = core_load(checkpoints(KIND))
    expected = sample(core, clip)
    one = distribute(core, HALF)
    assert torch.equal(sample(one, clip), expected)
    other = distribute(lora_for(one), ALL)
    assert other.model is one.model
    assert other.distribution.asked.bytes_on(DONOR) > one.distribution.asked.bytes_on(DONOR)
    assert torch.equal(sample(other, clip), sample(lora_for(core), clip))
    assert torch.equal(sample(one, clip), expected)


def test_a_node_that_runs_again_with_another_plan_lets_the_first_go(checkpoints):
    core, clip, _ = core_load(checkpoints(KIND))
    expected = sample(core, clip)
    ours = distribute(core, HALF)
    for request in (ALL, HALF, ALL):
        sample(ours, clip)
        distribution = weakref.ref(ours.distribution)
        ours = distribute(core, request)
        assert torch.equal(sample(ours, clip), expected)
        gc.collect()
        assert distribution() is None
        assert sum(loaded.model is ours for loaded in mm.current_loaded_models) == 1
    module = weakref.ref(ours.model)
    del ours
    gc.collect()
    mm.cleanup_models_gc()
    assert module() is None
    assert torch.equal(sample(core, clip), expected)


def test_a_text_encoder(checkpoints):
    _, clip, _ = core_load(checkpoints("sd3"))
    tokens = clip.tokenize("a test")
    expected = clip.encode_from_tokens(tokens)
    ours = distribute_clip(clip, HALF)
    assert torch.equal(ours.encode_from_tokens(tokens), expected)
    assert streams(ours.patcher)
    assert ours.clone().patcher.distribution is ours.patcher.distribution
    assert torch.equal(clip.encode_from_tokens(tokens), expected)


def test_files_of_their_own(checkpoints):
    core = comfy.sd.load_diffusion_model(checkpoints("diffusion_only"))
    ours = loading.load_diffusion_model(checkpoints("diffusion_only"), HALF)
    _, clip, _ = core_load(checkpoints(KIND))
    assert torch.equal(sample(ours, clip), sample(core, clip))
    assert streams(ours)
    for clip_type in ("sd3", "SD3"):
        text_encoder = loading.load_text_encoder([checkpoints("clip_l")], clip_type, HALF)
        wanted = comfy.sd.load_clip([checkpoints("clip_l")], clip_type=comfy.sd.CLIPType.SD3)
        tokens = wanted.tokenize("a test")
        assert torch.equal(text_encoder.encode_from_tokens(tokens), wanted.encode_from_tokens(tokens))
        assert streams(text_encoder.patcher)


def test_mistakes_in_files_and_types(checkpoints, tmp_path):
    for load in (
        lambda path: loading.load_diffusion_model(path, HALF),
        lambda path: loading.load_text_encoder([path], "sd3", HALF),
    ):
        with pytest.raises(loading.CheckpointError):
            load(str(tmp_path / "missing.safetensors"))
    with pytest.raises(loading.CheckpointError, match="is not a checkpoint that ComfyUI"):
        loading.load_diffusion_model(checkpoints("clip_l"), HALF)
    with pytest.raises(ValueError, match="no text encoder type 'sd33'; use stable_diffusion, "):
        loading.load_text_encoder([checkpoints("clip_l")], "sd33", HALF)


class OtherPatcher(comfy.model_patcher.ModelPatcher):
    def load(self, *arguments, **options):
        return super().load(*arguments, **options)


class OtherTensor(torch.Tensor):
    pass


def injected(model):
    patched = model.clone()
    patched.set_injections("tests", [PatcherInjection(lambda _: None, lambda _: None)])
    return patched


def of_another_class(model):
    return OtherPatcher(model.model, model.load_device, model.offload_device)


def with_another_tensor(model):
    weight = model.model.diffusion_model.x_embedder.proj.weight
    model.model.diffusion_model.x_embedder.proj._parameters["weight"] = weight.data.as_subclass(OtherTensor)
    return model


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (injected, "has injections"),
        (of_another_class, r"moves its weights in its own way \(OtherPatcher has its own load\)"),
        (with_another_tensor, "weights of the class OtherTensor .diffusion_model.x_embedder.proj."),
    ],
)
def test_what_cannot_be_served_is_refused_before_anything_is_changed(checkpoints, made, reason):
    core, clip, _ = core_load(checkpoints(KIND))
    sample(core, clip)
    loaded = list(mm.current_loaded_models)
    with pytest.raises(PlanError, match=reason):
        distribute(made(core), HALF)
    assert mm.current_loaded_models == loaded


def test_devices_that_are_missing_are_named(checkpoints):
    core = core_load(checkpoints(KIND))[0]
    with pytest.raises(PlanError, match="there is no device 'cuda:9'; this machine has cpu"):
        distribute(core, ComponentRequest("cuda:9", VirtualVram(1.0, "cpu")))
