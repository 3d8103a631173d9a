"""Models of ComfyUI's own loaders, distributed: while they stay usable, with what was done to them before and after."""

import gc
import types
import weakref

import comfy.hooks
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import comfy_extras.nodes_hooks as hook_nodes
import comfy_extras.nodes_model_advanced as advanced_nodes
import pytest
import torch
from comfy.patcher_extension import PatcherInjection, WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from placing import (
    DONOR,
    RESIDENT,
    devices_known_to_comfyui,  # noqa: F401
    inference_mode,  # noqa: F401
    lora_for,
    lora_patches,
    partly_on_donor,
)
from sampling import core_load, sample

from distorch2 import loading
from distorch2.comfyui.sharing import unload
from distorch2.loading import distribute, distribute_clip
from distorch2.planning.plan import ComponentRequest, PlanError, VirtualVram
from distorch2.weights.checkpoint_file import CheckpointError
from distorch2.weights.quantised import plain_tensors

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


class TestOnADeviceWithOtherDtypes:
    """The weights are stored in fp8. The CPU computes in fp32; the donor is said to have fp16 and bf16 as well."""

    pytestmark = pytest.mark.skipif(DONOR == "cpu", reason="the donor is to be another device than the CPU")
    REQUEST = ComponentRequest(DONOR, VirtualVram(0.0, "cpu"))

    @pytest.fixture
    def core(self, checkpoints, monkeypatch):
        """A model that supports bf16, and not fp16."""
        for name in ("should_use_bf16", "should_use_fp16"):
            monkeypatch.setattr(mm, name, lambda device=None, *arguments, **options: str(device) == DONOR)
        monkeypatch.setattr(comfy.supported_models.SD3, "supported_inference_dtypes", [torch.bfloat16, torch.float32])
        path = str(checkpoints("sd3_fp8_no_clip_weights"))
        core = comfy.sd.load_diffusion_model(path, {"dtype": torch.float8_e4m3fn})
        assert core.get_model_object("manual_cast_dtype") is torch.float32
        return core

    def test_the_dtype_is_one_that_the_device_and_the_model_support(self, core):
        ours = distribute(core, self.REQUEST)
        assert ours.get_model_object("manual_cast_dtype") is torch.bfloat16
        assert core.get_model_object("manual_cast_dtype") is torch.float32

    def test_a_second_device_gets_its_own_dtype(self, core):
        on_the_host = distribute(distribute(core, self.REQUEST), ComponentRequest("cpu", VirtualVram(0.0, "cpu")))
        assert on_the_host.get_model_object("manual_cast_dtype") is torch.float32
        assert on_the_host.force_cast_weights == core.force_cast_weights
        assert distribute(on_the_host, self.REQUEST).get_model_object("manual_cast_dtype") is torch.bfloat16

    def test_what_a_node_has_chosen_stays(self, core):
        chosen = core.clone()
        chosen.set_model_compute_dtype(torch.float16)
        assert distribute(chosen, self.REQUEST).get_model_object("manual_cast_dtype") is torch.float16


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
        with pytest.raises(CheckpointError):
            load(str(tmp_path / "missing.safetensors"))
    with pytest.raises(CheckpointError, match="is not a checkpoint that ComfyUI"):
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


def compiled(model):
    patched = model.clone()
    patched.add_object_patch("diffusion_model", torch.compile(model.model.diffusion_model, backend="eager"))
    return patched


def with_another_tensor(model):
    weight = model.model.diffusion_model.x_embedder.proj.weight
    model.model.diffusion_model.x_embedder.proj._parameters["weight"] = weight.data.as_subclass(OtherTensor)
    return model


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (injected, "has injections"),
        (of_another_class, r"moves its weights in its own way \(OtherPatcher has its own load\)"),
        (compiled, "diffusion_model is compiled already"),
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


def with_own_forward(model):
    """With an object patch that is a method of one of the model's modules, as packs set it."""

    def forward(self, *arguments, **options):
        return tuple(each if each is None else 0.9 * each for each in type(self).forward(self, *arguments, **options))

    patched = model.clone()
    block = patched.model.diffusion_model.joint_blocks[0]
    patched.add_object_patch("diffusion_model.joint_blocks.0.forward", types.MethodType(forward, block))
    return patched


def test_a_method_among_object_patches_is_that_of_the_module_that_is_served(checkpoints):
    core, clip, _ = core_load(checkpoints(KIND))
    expected = sample(lora_for(with_own_forward(core)), clip)
    ours = distribute(lora_for(with_own_forward(core)), ALL)
    assert torch.equal(sample(ours, clip), expected)
    assert streams(ours)


def test_a_compiled_model_is_refused(checkpoints):
    core = core_load(checkpoints(KIND))[0]
    by_node, by_patch = core.clone(), core.clone()
    set_torch_compile_wrapper(by_node, backend="eager")
    by_patch.add_object_patch("diffusion_model", torch.compile(core.model.diffusion_model, backend="eager"))
    for compiled in (by_node, by_patch):
        with pytest.raises(PlanError, match="is compiled already: put the node that compiles it after this one"):
            distribute(compiled, HALF)


def encoded(clip):
    text, pooled = clip.encode_from_tokens(clip.tokenize("a test"), return_pooled=True)
    return torch.cat([text.flatten(), pooled.flatten()])


def hooked(clip):
    """With a LoRA as a hook, which ComfyUI writes into the weights when it encodes, and leaves there."""
    generator, state_dict = torch.Generator().manual_seed(3), {}
    for name, module in clip.cond_stage_model.named_modules():
        if type(module).__name__ == "Linear" and "mlp" in name:
            rows, columns = module.weight.shape
            state_dict[f"text_encoders.{name}.lora_up.weight"] = torch.randn(rows, 4, generator=generator) * 0.3
            state_dict[f"text_encoders.{name}.lora_down.weight"] = torch.randn(4, columns, generator=generator)
    hooks = comfy.hooks.create_hook_lora(lora=state_dict, strength_model=1.0, strength_clip=1.0)
    return hook_nodes.SetClipHooks().apply_hooks(clip, False, True, hooks)[0]


@pytest.mark.parametrize("request_for", [RESIDENT, HALF], ids=["resident", "half"])
def test_hooks_of_one_text_encoder_are_not_those_of_others_with_its_weights(checkpoints, request_for):
    """They are written in place, and the original, and two of another plan, have the same tensors."""
    clip = core_load(checkpoints("sd3"))[1]
    plain, expected = encoded(clip), encoded(hooked(clip))
    assert not torch.equal(plain, expected)
    ours = distribute_clip(clip, request_for)
    other = distribute_clip(clip, ALL)
    for hooked_one in (clip, ours, other, ours):
        with_hooks = hooked(hooked_one)
        for _ in range(2):
            assert torch.equal(encoded(with_hooks), expected)
            for each in (ours, other, clip):
                assert torch.equal(encoded(each), plain)


@pytest.mark.parametrize("of_ours", [False, True])
def test_what_was_loaded_last_can_be_freed_when_it_is_dropped(checkpoints, of_ours):
    """By way of the patcher that stands in for it: the module is still in use."""
    core, clip, _ = core_load(checkpoints(KIND))
    expected = sample(core, clip)
    kept = distribute(core, HALF)
    dropped = distribute(kept if of_ours else core, ALL)
    assert torch.equal(sample(dropped, clip), expected)
    del dropped
    gc.collect()
    assert all(loaded.model is not None for loaded in mm.current_loaded_models)
    mm.load_models_gpu(mm.loaded_models(only_currently_used=True))
    mm.unload_all_models()
    assert not any("forward" in vars(module) for module in kept.model.modules())
    assert not mm.current_loaded_models
    assert torch.equal(sample(kept, clip), expected)


def test_a_field_that_an_object_patch_sets_is_not_set_in_the_other_module(checkpoints):
    core, _, _ = core_load(checkpoints("flux"))
    before = core.model.diffusion_model.params.default_ref_method
    patched = distribute(core, HALF).clone()
    patched.add_object_patch("diffusion_model.params.default_ref_method", "index_timestep_zero")
    mm.load_models_gpu([patched])
    assert patched.model.diffusion_model.params.default_ref_method == "index_timestep_zero" != before
    assert core.model.diffusion_model.params.default_ref_method == before


def test_a_text_encoder_computes_on_the_cpu_where_the_device_lacks_its_dtype(checkpoints, monkeypatch):
    monkeypatch.setattr(mm, "supports_cast", lambda device, dtype: device.type == "cpu")
    request = ComponentRequest(DONOR, VirtualVram(0.0, "cpu"))
    clip = loading.load_text_encoder([str(checkpoints("clip_l"))], "stable_diffusion", request)
    assert str(clip.patcher.load_device) == "cpu"


def test_the_entry_of_a_module_leaves_comfyuis_list_and_not_another_whose_patcher_is_gone(checkpoints):
    patchers = [core_load(checkpoints(KIND))[0] for _ in range(2)]
    mm.load_models_gpu(patchers)
    modules = [patcher.model for patcher in patchers]
    for module in modules:
        module.current_patcher = None
    del patchers
    gc.collect()
    last = mm.current_loaded_models[-1].real_model()
    unload(last)
    assert [loaded.real_model() is last for loaded in mm.current_loaded_models] == [False]


def test_hooks_after_a_lora_are_not_written_into_weights_that_both_modules_have(checkpoints):
    core, _, _ = core_load(checkpoints("wan_fp32"))
    in_file = comfy.utils.load_torch_file(checkpoints("wan_fp32"))
    for name, parameter in core.model.diffusion_model.named_parameters():
        parameter.data = in_file[f"model.diffusion_model.{name}"]  # as with DynamicVRAM
    before = {name: parameter.detach().clone() for name, parameter in core.model.named_parameters()}
    ours = distribute(core, HALF, high_precision_loras=False)
    hooks = comfy.hooks.HookGroup()
    hook = comfy.hooks.WeightHook(strength_model=1.0)
    hook.weights, hook.need_weight_init = lora_patches(core), False
    hooks.add(hook)
    for patcher in (lora_for(ours), ours):
        hooked = patcher.clone()
        hooked.add_hook_patches(hook, hook.weights, 1.0)
        mm.load_models_gpu([hooked])
        hooked.patch_hooks(hooks)
        changed = [
            name for name, weight in hooked.model.named_parameters() if not torch.equal(weight.cpu(), before[name])
        ]
        assert len(changed) > 20
        assert all(torch.equal(weight, before[name]) for name, weight in core.model.named_parameters())
        hooked.unpatch_hooks()


def test_what_a_patcher_that_is_gone_was_given_is_let_go(checkpoints):
    core, _, _ = core_load(checkpoints(KIND))
    given = torch.nn.Identity()
    first = core.clone()
    first.model_options["transformer_options"]["given"] = given
    one = distribute(first, HALF)
    other = distribute(core, ALL)
    assert other.model is one.model
    reference = weakref.ref(given)
    del given, first, one
    gc.collect()
    assert reference() is None


class Held:
    """What owns memory outside torch, as DynamicVRAM's buffers: a copy would free it twice."""

    def __deepcopy__(self, memo):
        raise AssertionError("copied")


def test_what_a_module_holds_apart_from_tensors_and_modules_is_not_copied(checkpoints):
    core, clip, _ = core_load(checkpoints(KIND))
    expected = sample(core, clip)
    core.model.dynamic_pins = {"cuda:0": {"weights": (Held(), [Held()])}}
    core.model.diffusion_model.x_embedder.held = [{"held": Held()}]
    ours = distribute(core, HALF)
    assert not hasattr(ours.model, "dynamic_pins")
    assert torch.equal(sample(ours, clip), expected)
