"""Weights on donors, in process: the same bits as ComfyUI's own loader, whatever lies where."""

import copy
import gc
import weakref

import comfy.cli_args
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.ops
import comfy.sd1_clip
import pytest
import torch
from placing import (
    COMPUTE,
    DONOR,
    HAS_SIMULATED,
    RESIDENT,
    bytes_on,
    devices_known_to_comfyui,  # noqa: F401
    inference_mode,  # noqa: F401
    lora_for,
    on_donor,
    partly_on_donor,
    with_hook,
)
from safetensors.torch import load_file
from sampling import core_load, runs_of_core, sample

from allocation_parser import parse_allocation
from distorch2.comfyui.patcher import DistributedPatcher
from distorch2.comfyui.program import COMFYUI
from distorch2.loading import distribute, load_checkpoint, load_components
from distorch2.moving.crossing import Crossing
from distorch2.moving.transfer import Transfer
from distorch2.planning.plan import GIB, ComponentRequest, DeviceMemory, Placement, Plan, VirtualVram
from distorch2.planning.planner import make_plan
from distorch2.serving.distribution import Distribution
from distorch2.weights.devices import DISK
from distorch2.weights.inventory import list_layers
from distorch2.weights.slab import allocate

if HAS_SIMULATED:
    import simulated_accelerators as sim
on_simulated = pytest.mark.skipif(not HAS_SIMULATED, reason="for simulated accelerators; this machine has a real one")


@pytest.fixture
def forwards(monkeypatch):
    """Counts the forward passes of diffusion models and of CLIP's transformers."""
    counts = {"diffusion": 0, "clip": 0}

    def counted(owner, name, counter):
        function = getattr(owner, name)

        def count(*arguments, **options):
            counts[counter] += 1
            return function(*arguments, **options)

        monkeypatch.setattr(owner, name, count)

    counted(comfy.model_base.BaseModel, "_apply_model", "diffusion")
    counted(comfy.sd1_clip.SDClipModel, "forward", "clip")
    return counts


@pytest.fixture(scope="module")
def core_latents(checkpoints):
    """kind -> latents of ComfyUI's own loader."""
    return runs_of_core(checkpoints, lambda model, clip, vae: sample(model, clip))


def allocation_of(way, percent, model_bytes):
    """The same part of a model on the donor, asked for in every way that there is."""
    on_donor = model_bytes * percent // 100
    fraction = on_donor / mm.get_total_memory(torch.device(DONOR))
    return {
        "virtual VRAM": VirtualVram(on_donor / GIB, DONOR),
        "ratio": parse_allocation(f"{COMPUTE},{100 - percent}%;{DONOR},{percent}%"),
        "bytes": parse_allocation(f"{DONOR},{on_donor}b;{COMPUTE},*"),
        "wildcard": parse_allocation(f"{COMPUTE},{model_bytes - on_donor}b;{DONOR},*"),
        "fraction": parse_allocation(f"{DONOR},{fraction:.12f};{COMPUTE},*"),
    }[way]


# A machine's memory may grow while it runs, so a fraction of the host's is not the same bytes a second time.
WAYS = ["virtual VRAM", "ratio", "bytes", "wildcard", *(["fraction"] if HAS_SIMULATED else [])]
KINDS = ["sd3", "sd15_blocks_no_clip", "flux", "sd3_fp8_no_clip_weights", "sd3_fp8_scaled_no_clip_weights"]
PERCENTAGES = [0, 25, 50, 90, 100]


@pytest.mark.parametrize("percent", PERCENTAGES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.quick("flux-50", "sd3_fp8_scaled_no_clip_weights-100")
def test_latents_are_bit_identical_wherever_the_weights_lie(checkpoints, core_latents, forwards, kind, percent):
    way = WAYS[(KINDS.index(kind) + PERCENTAGES.index(percent)) % len(WAYS)]
    expected = core_latents(kind)
    model_bytes = load_checkpoint(checkpoints(kind), RESIDENT, RESIDENT, COMPUTE)[0].distribution.plan.model_bytes
    request = ComponentRequest(COMPUTE, allocation_of(way, percent, model_bytes), "stream")
    model, clip, _ = load_checkpoint(checkpoints(kind), request, RESIDENT, COMPUTE)
    plan, distribution = model.distribution.plan, model.distribution
    assert torch.equal(sample(model, clip), expected)
    copies, forwards["diffusion"] = distribution.transfer.copies, 0
    assert torch.equal(sample(model, clip), expected)
    # Once the order is known, every group once for every forward; some are ahead for the next, before and after.
    assert forwards["diffusion"] >= 2
    assert distribution.transfer.copies - copies == len(plan.groups) * forwards["diffusion"]
    assert (len(plan.streamed) > 0) == (percent > 0)
    found = {device: bytes_on(model.model, device) for device in (COMPUTE, DONOR)}
    assert found == {device: plan.bytes_on(device) for device in (COMPUTE, DONOR)}
    assert model.loaded_size() == model.model_size() == found[COMPUTE] + distribution.streamer.staging.nbytes
    if HAS_SIMULATED:
        assert sim.used_bytes[0] == sum(placement.layer.slab_bytes for placement in plan.streamed)


@pytest.mark.parametrize("text", [f"{COMPUTE},50%;disk,*", "disk,100%", f"{COMPUTE},20%;{DONOR},40%;disk,*"])
@pytest.mark.parametrize("kind", ["wan_fp32", *KINDS])
@pytest.mark.quick("wan_fp32-disk,100%")
def test_latents_are_bit_identical_with_weights_on_the_disk(checkpoints, core_latents, kind, text):
    request = ComponentRequest(COMPUTE, parse_allocation(text), "stream")
    clip_on_disk = ComponentRequest(COMPUTE, parse_allocation(f"{COMPUTE},50%;disk,*"), "stream")
    model, clip, _ = load_checkpoint(checkpoints(kind), request, clip_on_disk, COMPUTE, high_precision_loras=False)
    core_model, core_clip, _ = core_load(checkpoints(kind))
    patched = sample(lora_for(core_model), core_clip)
    has_hooks = "scaled" not in kind  # for which ComfyUI has none
    if has_hooks:
        hooked, hooks = with_hook(core_model)
        with_hooks = sample(hooked, core_clip, hooks=hooks)
    for _ in range(2):
        assert torch.equal(sample(model, clip), core_latents(kind))
        assert torch.equal(sample(model, clip), core_latents(kind))
        assert torch.equal(sample(lora_for(model), clip), patched)
        for _ in range(2 if has_hooks else 0):
            hooked, hooks = with_hook(model)
            assert torch.equal(sample(hooked, clip, hooks=hooks), with_hooks)
            assert torch.equal(sample(model, clip), core_latents(kind))
        assert sum(group.device == DISK for group in model.distribution.groups.values()) > 1
        mm.unload_all_models()


@pytest.mark.parametrize("percent", PERCENTAGES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_of_asking_for_the_same_bytes_gives_the_same_plan(checkpoints, kind, percent):
    layers = list_layers(load_checkpoint(checkpoints(kind), RESIDENT, RESIDENT, COMPUTE)[0].model)
    model_bytes = sum(layer.num_bytes for layer in layers)
    memory = {device: DeviceMemory(int(mm.get_total_memory(torch.device(device)))) for device in (COMPUTE, DONOR)}
    plans = [
        make_plan(layers, ComponentRequest(COMPUTE, allocation_of(way, percent, model_bytes), "stream"), memory)
        for way in WAYS
    ]
    assert all(plan.placements == plans[0].placements for plan in plans)


@pytest.mark.parametrize("percent", [25, 50, 90, 100])
@pytest.mark.parametrize("kind", ["sd3", "sd15_blocks"])
@pytest.mark.quick("sd3-50")
def test_the_text_encoder_is_streamed_as_well(checkpoints, core_latents, forwards, kind, percent):
    expected = core_latents(kind)
    model, clip, _ = load_checkpoint(checkpoints(kind), RESIDENT, partly_on_donor(percent), COMPUTE)
    assert torch.equal(sample(model, clip), expected)
    copies, forwards["clip"] = clip.patcher.distribution.transfer.copies, 0
    assert torch.equal(sample(model, clip), expected)
    # The position embedding is read without being called, by code of ComfyUI that casts it to its input's device.
    alone = {"transformer.text_model.embeddings.position_embedding"}
    groups = [group for group in clip.patcher.distribution.plan.groups if group.is_streamed]
    called = [group for group in groups if not {layer.name for layer in group.layers} <= alone]
    assert forwards["clip"] >= 2
    assert clip.patcher.distribution.transfer.copies - copies == len(called) * forwards["clip"] > 0


# --- what a patcher must keep, and give back


def bindings(module):
    """What is bound where: the identity of every parameter and buffer, and every module's own forward."""
    tensors = {name: id(tensor) for name, tensor in [*module.named_parameters(), *module.named_buffers()]}
    return tensors, {name: vars(child).get("forward") for name, child in module.named_modules()}


def leaves(patcher):
    """The modules that are streamed, in the order in which they are registered."""
    return [layer.module for group in patcher.distribution.groups.values() for layer in group.layers]


def test_every_attribute_of_comfyuis_patcher_is_taken_over(checkpoints):
    _, core_clip, _ = core_load(checkpoints("sd3"))
    core = core_clip.patcher
    core.model_options["transformer_options"]["planted"] = 1
    before = dict(vars(core))
    plan = load_checkpoint(checkpoints("sd3"), RESIDENT, RESIDENT, COMPUTE)[1].patcher.distribution.plan
    ours = DistributedPatcher.take_over(core, plan)
    assert vars(ours).keys() >= before.keys()
    for name, value in before.items():
        if name not in ("size", "load_device", "offload_device", "parent"):
            assert getattr(ours, name) is value, name
    assert ours.parent.model is ours.model
    assert ours.is_clip
    assert ours.force_cast_weights
    assert ours.offload_device == torch.device("cpu")
    # A text encoder for the CPU is loaded in its constructor; the entry for the patcher that is no more is gone.
    assert not any(loaded.model is core for loaded in mm.current_loaded_models)


def test_parameters_are_in_their_slab_between_runs_and_on_the_compute_device_inside(checkpoints, monkeypatch):
    model, clip, _ = on_donor(checkpoints, percent=100)
    linear, inside = torch.nn.functional.linear, set()

    def watched(x, weight, bias=None):
        inside.add(weight.device.type)
        return linear(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", watched)
    sample(model, clip)
    assert inside == {torch.device(COMPUTE).type}
    assert {parameter.device.type for leaf in leaves(model) for parameter in leaf.parameters()} == {
        torch.device(DONOR).type
    }


@pytest.mark.quick
def test_detach_gives_back_what_was_there(checkpoints):
    model, clip, _ = on_donor(checkpoints)
    before = bindings(model.model)
    expected = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    sample(model, clip)
    assert bindings(model.model)[1] != before[1]
    mm.unload_all_models()
    assert bindings(model.model)[1] == before[1]
    assert model.loaded_size() == 0
    after = model.model.state_dict()
    assert {tensor.device.type for tensor in after.values()} == {"cpu"}
    assert all(torch.equal(after[name], expected[name]) for name in expected)


def test_unload_and_reload_run_the_same(checkpoints, core_latents):
    model, clip, _ = on_donor(checkpoints)
    for _ in range(3):
        assert torch.equal(sample(model, clip), core_latents("sd3_no_clip_weights"))
        assert any(loaded.model is model for loaded in mm.current_loaded_models)
        mm.unload_all_models()


def test_clones_share_one_distribution_and_their_collection_releases_nothing(checkpoints, core_latents):
    model, clip, _ = on_donor(checkpoints)
    clones = [model.clone() for _ in range(3)]
    for clone in clones:
        assert isinstance(clone, DistributedPatcher)
        assert torch.equal(sample(clone, clip), core_latents("sd3_no_clip_weights"))
    slabs = {key: group.slab for key, group in model.distribution.groups.items()}
    del clones, clone
    gc.collect()
    assert torch.equal(sample(model, clip), core_latents("sd3_no_clip_weights"))
    assert all(model.distribution.groups[key].slab is slab for key, slab in slabs.items())


@pytest.mark.parametrize("raised", [KeyboardInterrupt, RuntimeError, mm.InterruptProcessingException])
@pytest.mark.parametrize("percent", [50, 100])
def test_whatever_is_raised_in_any_layer_leaves_every_parameter_where_it_was(
    checkpoints, core_latents, percent, raised
):
    model, clip, _ = on_donor(checkpoints, percent=percent)
    sample(model, clip)
    before = bindings(model.model)
    assert leaves(model)
    for leaf in leaves(model):
        forward = type(leaf).forward
        with pytest.MonkeyPatch.context() as patches:

            def raising(module, *arguments, leaf=leaf, forward=forward, **options):
                if module is leaf:
                    assert {parameter.device for parameter in module.parameters()} == {torch.device(COMPUTE)}
                    raise raised("planted")
                return forward(module, *arguments, **options)

            patches.setattr(type(leaf), "forward", raising)
            with pytest.raises(raised, match="planted"):
                sample(model, clip)
        assert bindings(model.model) == before
    assert torch.equal(sample(model, clip), core_latents("sd3_no_clip_weights"))


@pytest.mark.parametrize("nth", [1, 2, 5])
def test_a_copy_that_fails_is_made_again(checkpoints, core_latents, monkeypatch, nth):
    model, clip, _ = on_donor(checkpoints, "flux", percent=100)
    submit, calls = Transfer.submit, []

    def failing(transfer, copies):
        calls.append(copies)
        if len(calls) == nth:
            raise RuntimeError("planted")
        submit(transfer, copies)

    with monkeypatch.context() as patches:
        patches.setattr(Transfer, "submit", failing)
        with pytest.raises(RuntimeError, match="planted"):
            for _ in range(3):
                sample(model, clip)
    assert torch.equal(sample(model, clip), core_latents("flux"))


@pytest.mark.quick
def test_a_dropped_model_is_let_go(checkpoints):
    model, clip, vae = on_donor(checkpoints, kind="sd3")
    sample(model, clip)
    references = [weakref.ref(part) for part in (model, model.model, clip.patcher, clip.cond_stage_model)]
    streamer = weakref.ref(model.distribution.streamer)
    gc.collect()
    gc.disable()  # what is large is freed at once, and not by a collection some time later
    try:
        del model, clip, vae
        mm.cleanup_models()
        assert streamer() is None
    finally:
        gc.enable()
    gc.collect()
    assert [reference for reference in references if reference() is not None] == []


# --- patches


@pytest.mark.parametrize("kind", ["sd3_no_clip_weights", "flux", "sd3_fp8_scaled_no_clip_weights", "wan"])
def test_a_lora_gives_the_same_bits_wherever_the_weights_lie(checkpoints, kind):
    core_model, core_clip, _ = core_load(checkpoints(kind))
    plain, expected = sample(core_model, core_clip), sample(lora_for(core_model), core_clip)
    half = sample(lora_for(core_model, 0.5), core_clip)
    assert not torch.equal(plain, expected)
    for percent in (0, 50, 100):
        model, clip, _ = on_donor(checkpoints, kind, percent)
        assert torch.equal(sample(lora_for(model), clip), expected), percent
        assert torch.equal(sample(lora_for(model, 0.5), clip), half), percent
        assert torch.equal(sample(model, clip), plain), percent
        model = None
        gc.collect()


def test_a_lora_on_the_text_encoder(checkpoints):
    import comfy.lora

    def patched_output(clip):
        clip = clip.clone()
        keys = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, {})
        key = next(key for key in keys.values() if key.endswith("layers.3.mlp.fc1.weight"))
        clip.add_patches({key: ("diff", (torch.full((3072, 768), 0.01),))}, 1.0)
        return clip.encode_from_tokens(clip.tokenize("a house"), return_pooled=True)

    expected = patched_output(core_load(checkpoints("sd3"))[1])
    request = ComponentRequest(COMPUTE, parse_allocation(f"{DONOR},*"), "stream")
    ours = patched_output(load_checkpoint(checkpoints("sd3"), RESIDENT, request, COMPUTE)[1])
    assert all(torch.equal(a, b) for a, b in zip(ours, expected))


def test_originals_are_what_merging_and_saving_start_from(checkpoints):
    """Else saving, merging and LoRA extraction would apply the LoRA twice."""
    core_model, core_clip, _ = core_load(checkpoints("sd3_no_clip_weights"))
    core_patched = lora_for(core_model)
    expected_originals = {key: value[0][0].clone() for key, value in core_patched.get_key_patches().items()}
    model, clip, _ = on_donor(checkpoints)
    patched = lora_for(model)
    sample(core_patched, core_clip)
    sample(patched, clip)
    originals = {key: value[0][0] for key, value in patched.get_key_patches().items()}
    assert originals.keys() == expected_originals.keys()
    assert all(torch.equal(originals[key].cpu(), expected_originals[key].cpu()) for key in originals)
    for key in patched.patches:
        again = patched.patch_weight_to_device(key, torch.device(COMPUTE), return_weight=True)
        assert torch.equal(again.cpu(), core_patched.model.state_dict()[key].cpu())


@pytest.mark.parametrize("kind", ["sd3", "sd3_fp8_scaled"])
@pytest.mark.parametrize("percent", [0, 50, 100])
def test_a_saved_checkpoint_equals_the_one_saved_from_a_resident_model(checkpoints, tmp_path, percent, kind):
    import comfy.sd

    saved = []
    for model, clip, vae in (core_load(checkpoints(kind)), on_donor(checkpoints, kind, percent)):
        path = tmp_path / f"{len(saved)}.safetensors"
        patched = lora_for(model)
        sample(patched, clip)
        comfy.sd.save_checkpoint(str(path), patched, clip, vae)
        saved.append(load_file(path))
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


@pytest.mark.parametrize("percent", [0, 100])
def test_a_weight_patched_before_the_model_is_loaded_is_given_back(checkpoints, percent):
    model = on_donor(checkpoints, percent=percent)[0]
    before = {key: weight.clone() for key, weight in model.model.state_dict().items()}
    patched = lora_for(model)
    for key in patched.patches:
        patched.patch_weight_to_device(key, torch.device(COMPUTE))
    mm.load_models_gpu([patched])
    mm.unload_all_models()
    assert all(torch.equal(weight, before[key]) for key, weight in model.model.state_dict().items())


@pytest.mark.parametrize("percent", [0, 50, 100])
def test_weights_that_a_merge_holds_are_not_changed_by_later_patches(checkpoints, percent):
    model, clip, _ = on_donor(checkpoints, percent=percent)
    sample(model, clip)
    held = {key: value[0][0] for key, value in model.get_key_patches().items()}
    before = {key: weight.to("cpu", copy=True) for key, weight in held.items()}
    sample(lora_for(model), clip)
    assert all(torch.equal(held[key].to("cpu"), before[key]) for key in held)
    sample(model, clip)
    now = model.model.state_dict()
    assert all(torch.equal(now[key].to("cpu"), before[key]) for key in held)
    # As with ComfyUI's patcher, resident ones leave the compute device with their model unless they were patched.
    mm.unload_all_models()
    patched, streamed = (
        lora_for(model).patches,
        {placement.layer.name for placement in model.distribution.plan.streamed},
    )
    left = [weight for key, weight in held.items() if key not in patched and key.rpartition(".")[0] not in streamed]
    assert {weight.device.type for weight in left} == {"cpu"}


def test_a_patch_that_changes_a_weights_shape(checkpoints):
    key = "diffusion_model.x_embedder.proj.weight"

    def embedded(model, channels):
        mm.load_models_gpu([model], force_full_load=True)
        layer = model.model.diffusion_model.x_embedder.proj
        x = torch.randn(1, channels, 8, 8, generator=torch.Generator().manual_seed(0))
        return layer(x.to(COMPUTE, layer.weight.dtype))

    def widened(model):
        patched = model.clone()
        rows, _, height, width = model.model.state_dict()[key].shape
        patched.add_patches({key: ("diff", (torch.full((rows, 32, height, width), 0.01), {"pad_weight": True}))})
        # And others of the same group, whose shape stays.
        for name, weight in model.model.state_dict().items():
            if name.startswith("diffusion_model.") and name.endswith(".weight") and name != key and weight.dim() == 2:
                patched.add_patches({name: ("diff", (torch.full(weight.shape, 0.01),))})
        return patched

    core_model = core_load(checkpoints("sd3_no_clip_weights"))[0]
    plain, expected = embedded(core_model, 16), embedded(widened(core_model), 32)
    for percent in (0, 100):
        model = on_donor(checkpoints, percent=percent)[0]
        assert torch.equal(embedded(widened(model), 32), expected)
        assert torch.equal(embedded(model, 16), plain)
        # The last run was streamed from a slab again.
        assert (model.distribution.transfer.copies > 0) == (percent > 0)


def test_a_module_that_another_pack_moved_is_still_served(checkpoints, core_latents):
    """From where its weights are now, since they are not in their slab any more."""
    model, clip, _ = on_donor(checkpoints, percent=100)
    sample(model, clip)
    for leaf in leaves(model):
        dtype = next(leaf.parameters()).dtype
        leaf.to("cpu", torch.float64).to(dtype)
    assert torch.equal(sample(model, clip), core_latents("sd3_no_clip_weights"))


def test_object_patches_are_those_of_the_clone_that_runs(checkpoints, core_latents):
    import comfy.model_sampling

    class Shifted(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
        pass

    def shifted(model):
        clone = model.clone()
        sampling = Shifted(model.model.model_config)
        sampling.set_parameters(shift=1.0, multiplier=1000)
        clone.add_object_patch("model_sampling", sampling)
        return clone

    core_model, core_clip, _ = core_load(checkpoints("sd3_no_clip_weights"))
    expected = sample(shifted(core_model), core_clip)
    model, clip, _ = on_donor(checkpoints)
    assert torch.equal(sample(shifted(model), clip), expected)
    assert torch.equal(sample(model, clip), core_latents("sd3_no_clip_weights"))


PATCHED = "diffusion_model.joint_blocks.0.x_block.attn.proj"


@pytest.mark.parametrize("percent", [0, 100])
@pytest.mark.parametrize("patch", ["module", "forward", "module and LoRA"])
def test_object_patches_of_streamed_layers(checkpoints, core_latents, patch, percent):
    """A module or forward put in the place of a streamed one, before and after the model without it has run."""

    def patched(model):
        clone = lora_for(model) if "LoRA" in patch else model.clone()
        leaf = model.model.get_submodule(PATCHED)
        if patch == "forward":
            forward = type(leaf).forward
            clone.add_object_patch(f"{PATCHED}.forward", lambda x: 2 * forward(leaf, x))
        else:
            # On the compute device at once: ComfyUI does not move it there for every model.
            size = leaf.in_features, leaf.out_features
            other = comfy.ops.disable_weight_init.Linear(*size, dtype=leaf.weight.dtype, device=COMPUTE)
            generator = torch.Generator().manual_seed(5)
            other.weight = torch.nn.Parameter(torch.randn(leaf.weight.shape, generator=generator).to(other.weight))
            other.bias = torch.nn.Parameter(torch.zeros_like(other.bias))
            clone.add_object_patch(PATCHED, other)
        return clone

    plain = core_latents("sd3_no_clip_weights")
    core_model, core_clip, _ = core_load(checkpoints("sd3_no_clip_weights"))
    core_patched = patched(core_model)
    expected = sample(core_patched, core_clip)
    assert not torch.equal(expected, plain)
    for patched_first in (True, False):
        model, clip, _ = on_donor(checkpoints, percent=percent)
        clone = patched(model)
        for run in [True, True, False, True, "unload", False, True] if patched_first else [False, True, "unload", True]:
            if run == "unload":
                mm.unload_all_models()
            else:
                assert torch.equal(sample(clone if run else model, clip), expected if run else plain)
        mm.unload_all_models()
        del clone
        gc.collect()
        assert torch.equal(sample(model, clip), plain)
        mm.unload_all_models()


@pytest.mark.parametrize("percent", [0, 100])
def test_a_shallow_copy_of_a_served_module_runs_itself(checkpoints, percent):
    """ComfyUI makes such copies, with another configuration, for patches of a model's configuration."""

    def configured(model):
        copied = copy.copy(model.model.get_submodule(PATCHED))
        copied._parameters = {**copied._parameters, "bias": None}
        clone = model.clone()
        clone.add_object_patch(PATCHED, copied)
        return clone

    core_model, core_clip, _ = core_load(checkpoints("sd3_no_clip_weights"))
    expected = sample(configured(core_model), core_clip)
    model, clip, _ = on_donor(checkpoints, percent=percent)
    plain = sample(model, clip)
    assert not torch.equal(plain, expected)
    clone = configured(model)
    for run in (True, False, True):
        assert torch.equal(sample(clone if run else model, clip), expected if run else plain)


def test_a_layer_that_another_pack_replaces_is_moved_and_unloads(checkpoints):
    model, clip, _ = on_donor(checkpoints, percent=100)
    sample(model, clip)
    parent = model.model.get_submodule(PATCHED.rpartition(".")[0])
    proj = parent.proj
    parent.proj = comfy.ops.disable_weight_init.Linear(proj.in_features, proj.out_features, dtype=proj.weight.dtype)
    for parameter in parent.proj.parameters():
        torch.nn.init.zeros_(parameter)
    del proj
    gc.collect()
    sample(model, clip)
    assert {parameter.device for parameter in parent.proj.parameters()} == {torch.device(COMPUTE)}
    mm.unload_all_models()
    sample(model, clip)  # the new one is streamed in the place of the old one now
    mm.unload_all_models()
    assert mm.current_loaded_models == []


@pytest.mark.parametrize("percent", [0, 100])
def test_failing_while_patches_are_taken_back_leaves_no_half_patched_model(checkpoints, monkeypatch, percent):
    core_model, core_clip, _ = core_load(checkpoints("sd3_no_clip_weights"))
    plain, expected = sample(core_model, core_clip), sample(lora_for(core_model), core_clip)
    model, clip, _ = on_donor(checkpoints, percent=percent)
    patched = lora_for(model)
    assert torch.equal(sample(patched, clip), expected)
    replaced = Distribution.replace
    with monkeypatch.context() as patches:
        calls = []

        def failing(distribution, weights, originals):
            calls.append(weights)
            if len(calls) == 2 or percent == 100:
                raise torch.OutOfMemoryError("planted")
            replaced(distribution, weights, originals)

        patches.setattr(Distribution, "replace", failing)
        with pytest.raises(mm.OOM_EXCEPTION, match="out of memory"):
            sample(model, clip)
        assert not any(loaded.model is model for loaded in mm.current_loaded_models)
        mm.unload_all_models()  # needs no memory of the donor
    assert torch.equal(sample(patched, clip), expected)
    assert torch.equal(sample(model, clip), plain)


def test_two_devices_for_one_model_have_a_plan_each(checkpoints, core_latents):
    """As with ComfyUI's node that sets the device of a clone which shares the model."""
    other_device = "cpu" if COMPUTE != "cpu" else "cpu:0"
    model, clip, _ = on_donor(checkpoints, percent=100)
    plan = model.distribution.plan
    clone = model.clone()
    clone.load_device = torch.device(other_device)
    for patcher in (model, clone, model):
        latents = sample(patcher, clip)
        if torch.device(patcher.load_device).type == torch.device(COMPUTE).type:
            assert torch.equal(latents, core_latents("sd3_no_clip_weights"))
        of_devices = [*vars(model.model)["distorch2"].distributions.values()]
        placed = [distribution for each in of_devices for distribution in each.values() if distribution.is_placed]
        assert placed == [patcher.distribution]
        assert [each.loaded_size() > 0 for each in (model, clone)] == [patcher is model, patcher is clone]
    assert model.distribution.plan is plan
    mm.unload_all_models()
    assert not any("forward" in vars(module) for module in model.model.modules())


def test_a_patch_of_what_comfyui_does_not_patch(checkpoints):
    """A parameter of a module whose children have parameters stays as it is, as with ComfyUI's patcher."""
    for model in (core_load(checkpoints("sd3_no_clip_weights"))[0], on_donor(checkpoints)[0]):
        block = model.model.diffusion_model.joint_blocks[0]
        block.scale = torch.nn.Parameter(torch.zeros(3), requires_grad=False)
        patched = model.clone()
        key = "diffusion_model.joint_blocks.0.scale"
        patched.add_patches({key: ("diff", (torch.ones(3),))})
        mm.load_models_gpu([patched], force_full_load=True)
        assert block.scale.sum() == 0


def test_hook_loras_are_applied_between_forwards(checkpoints):
    """Scheduled per step: weights on donors are rewritten while the model is in use."""
    import comfy.hooks

    def hooked(model, clip):
        patched = lora_for(model)
        patches = {key: value[0][1] for key, value in patched.patches.items()}
        group = comfy.hooks.HookGroup()
        hook = comfy.hooks.WeightHook(strength_model=1.0, strength_clip=0.0)
        hook.weights = patches
        hook.need_weight_init = False
        group.add(hook)
        model = model.clone()
        model.add_hook_patches(hook, patches, 1.0)
        mm.load_models_gpu([model])
        generator = torch.Generator().manual_seed(0)
        shapes = {"x": (1, 16, 8, 8), "c_crossattn": (1, 77, 4096), "y": (1, 2048)}
        inputs = {name: torch.randn(shape, generator=generator).to(COMPUTE) for name, shape in shapes.items()}
        outputs = []
        for hooks in (None, group, None, group):
            model.apply_hooks(hooks)
            outputs.append(model.model.apply_model(t=torch.tensor([0.5], device=COMPUTE), **inputs))
        model.apply_hooks(None)
        return outputs

    core_model, core_clip, _ = core_load(checkpoints("sd3_no_clip_weights"))
    expected = hooked(core_model, core_clip)
    assert not torch.equal(expected[0], expected[1])
    for percent in (0, 50, 100):
        model, clip, _ = on_donor(checkpoints, percent=percent)
        ours = hooked(model, clip)
        assert all(torch.equal(a, b) for a, b in zip(ours, expected)), percent


def test_other_models_are_left_alone(checkpoints, core_latents):
    core_model, core_clip, _ = core_load(checkpoints("sd3_no_clip_weights"))
    model, clip, _ = on_donor(checkpoints, "sd15_blocks_no_clip")
    for _ in range(2):
        assert torch.equal(sample(core_model, core_clip), core_latents("sd3_no_clip_weights"))
        assert torch.equal(sample(model, clip), core_latents("sd15_blocks_no_clip"))


# --- memory


@on_simulated
def test_the_donor_with_too_little_free_memory_hands_the_rest_to_the_cpu(checkpoints, core_latents, monkeypatch):
    monkeypatch.setattr(sim, "capacity_bytes", [1024**2, sim.capacity_bytes[1]])
    model, clip, _ = on_donor(checkpoints, percent=100)
    plan = model.distribution.plan
    assert 0 < plan.bytes_on("sim:0") <= 1024**2
    assert any("sim:0 has 1.0 MiB free" in note for note in plan.notes)
    assert torch.equal(sample(model, clip), core_latents("sd3_no_clip_weights"))


@on_simulated
def test_weights_of_two_donors_and_the_compute_device(checkpoints, core_latents):
    allocation = parse_allocation(f"{COMPUTE},20%;sim:0,30%;sim:1,50%")
    model, clip, _ = load_checkpoint(
        checkpoints("flux"), ComponentRequest(COMPUTE, allocation, "stream"), RESIDENT, COMPUTE
    )
    assert torch.equal(sample(model, clip), core_latents("flux"))
    plan = model.distribution.plan
    for device, part in ((COMPUTE, 0.2), ("sim:0", 0.3), ("sim:1", 0.5)):
        assert plan.bytes_on(device) / plan.model_bytes == pytest.approx(part, abs=0.02)
    assert sim.used_bytes == [sum(layer.slab_bytes for layer in plan.layers_on(f"sim:{index}")) for index in (0, 1)]


@pytest.mark.quick
def test_distribute_takes_what_another_loader_made(checkpoints, core_latents):
    core_model, clip, _ = core_load(checkpoints("sd3_no_clip_weights"))
    patched = lora_for(core_model)
    expected = sample(patched, clip)
    request = ComponentRequest(COMPUTE, parse_allocation(f"{COMPUTE},50%;{DONOR},50%"), "stream")
    ours = distribute(patched, request)
    assert len(ours.distribution.plan.streamed) > 0
    assert torch.equal(sample(ours, clip), expected)
    assert torch.equal(sample(core_model, clip), core_latents("sd3_no_clip_weights"))
    assert ours.model is not core_model.model
    original = weakref.ref(core_model.model)
    del core_model, patched
    gc.collect()
    assert original() is None
    again = distribute(ours, ComponentRequest(COMPUTE, parse_allocation(f"{DONOR},*"), "stream"))
    assert torch.equal(sample(again, clip), expected)


def test_a_clone_on_another_device_gets_a_plan_of_its_own(checkpoints, core_latents):
    """As ComfyUI's MultiGPU work units make it: a module of its own, loaded again, and split as the other."""
    model, clip, _ = on_donor(checkpoints)
    sample(model, clip)
    other = model.deepclone_multigpu(new_load_device=torch.device(COMPUTE))
    assert other.model is not model.model
    assert torch.equal(sample(other, clip), core_latents("sd3_no_clip_weights"))
    assert other.distribution.plan == model.distribution.asked


def test_weights_that_the_file_does_not_have_are_zero():
    """With DynamicVRAM ComfyUI leaves them without memory until they are loaded."""
    for device in (COMPUTE, DONOR):
        embedding = comfy.ops.disable_weight_init.Embedding(3, 5, device="meta", dtype=torch.float16)
        module = torch.nn.Sequential(embedding)
        plan = Plan(COMPUTE, tuple(Placement(layer, device) for layer in list_layers(module)))
        distribution = Distribution(module, plan, COMFYUI)
        distribution.place(plan)
        assert torch.equal(module(torch.tensor([0, 2], device=COMPUTE)).cpu(), torch.zeros(2, 5, dtype=torch.float16))
        distribution.release({})


@pytest.mark.parametrize("released_first", [True, False])
def test_page_locked_slabs_are_given_back_when_a_model_is_unloaded_or_dropped(monkeypatch, released_first):
    pinned = []
    monkeypatch.setattr(mm, "is_device_cuda", lambda device: True)
    monkeypatch.setattr(mm, "ensure_pin_budget", lambda num_bytes: True)
    monkeypatch.setattr(mm, "ensure_pin_registerable", lambda num_bytes: True)
    monkeypatch.setattr(mm, "pin_memory", lambda slab: pinned.append(slab.data_ptr()) or True)
    monkeypatch.setattr(mm, "unpin_memory", lambda slab: pinned.remove(slab.data_ptr()))
    module = torch.nn.Module()
    distribution = Distribution(module, Plan(COMPUTE, ()), COMFYUI)
    slabs = [allocate(num_bytes, torch.device("cpu")) for num_bytes in (10, 1000)]
    for slab in slabs:
        assert distribution.pinned.pin(slab)
    assert len(pinned) == 2
    if released_first:
        distribution.release({})
        assert pinned == []
    del module, distribution
    gc.collect()
    assert pinned == []


@pytest.mark.parametrize("percent", [0, 50, 100])
def test_channels_last_stays_channels_last(checkpoints, monkeypatch, percent):
    """As with ComfyUI's --force-channels-last: other kernels, and other bits."""
    monkeypatch.setattr(comfy.cli_args.args, "force_channels_last", True)
    core_model = core_load(checkpoints("sd15_blocks_no_clip"))[0]
    expected = sample(core_model, None)
    formats = []
    conv2d = torch.nn.functional.conv2d

    def watched(x, weight, *arguments, **options):
        if weight.shape[-1] == 3:
            formats.append(weight.is_contiguous(memory_format=torch.channels_last))
        return conv2d(x, weight, *arguments, **options)

    model = on_donor(checkpoints, "sd15_blocks_no_clip", percent)[0]
    monkeypatch.setattr(torch.nn.functional, "conv2d", watched)
    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", conv_forward)
    assert torch.equal(sample(model, None), expected)
    assert formats
    assert all(formats)


def conv_forward(module, x, weight, bias):
    return torch.nn.functional.conv2d(x, weight, bias, module.stride, module.padding, module.dilation, module.groups)


@on_simulated
def test_a_peer_that_cannot_be_reached_directly_is_streamed_from_by_way_of_the_host(checkpoints, monkeypatch):
    """The copies that a check makes are wrong, as between cards that say that they can reach each other and cannot."""
    layer = comfy.ops.manual_cast.Linear(64, 64, dtype=torch.float32)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 64)
    expected = layer(x)
    checked = []
    monkeypatch.setattr(Crossing, "check", lambda crossing: bool(checked.append(crossing)))
    module = torch.nn.Sequential(layer)
    plan = Plan("sim:0", tuple(Placement(each, "sim:1") for each in list_layers(module)))
    distribution = Distribution(module, plan, COMFYUI)
    distribution.place(plan)
    across = sim.counters["copies_across"]
    for _ in range(3):
        assert torch.equal(module(x.to("sim:0")).cpu(), expected)
    assert len(checked) == 1
    assert sim.counters["copies_across"] == across
    distribution.release({})


def test_a_slow_place_for_a_large_text_encoder_is_said(checkpoints, monkeypatch):
    monkeypatch.setattr("distorch2.plans.GIB", 1024)  # that of this one is large then
    devices = [torch.device("cpu"), torch.device("cuda", 3)]
    monkeypatch.setattr(mm, "get_all_torch_devices", lambda *arguments, **options: devices)
    on_cpu = ComponentRequest("cpu", VirtualVram(0.0, "cpu"))
    report = load_components(checkpoints("sd3"), on_cpu, on_cpu, "cpu").report
    assert "text encoder: computes on cpu, which is slow for one of its size; choose cuda:3 for speed" in report
