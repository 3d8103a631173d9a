"""What else ComfyUI users do to a model works while its weights are streamed: the same bits as ComfyUI's own loader.

What a test does with a model it does with one of ComfyUI's loader, and with ours with half and with all of the weights
on the donor. It also has to change the result, where it is meant to.
"""

import gc
import random

import comfy.cli_args
import comfy.controlnet
import comfy.model_management as mm
import comfy.sample
import comfy.sd
import comfy_extras.nodes_easycache as easycache_nodes
import comfy_extras.nodes_freelunch as free_u_nodes
import comfy_extras.nodes_hypertile as hypertile_nodes
import comfy_extras.nodes_model_advanced as advanced_nodes
import comfy_extras.nodes_pag as pag_nodes
import comfy_extras.nodes_sag as sag_nodes
import comfy_extras.nodes_slg as skip_layer_nodes
import pytest
import safetensors.torch
import torch
from checkpoints import (
    FP8,
    MODEL,
    Spec,
    _res_block,
    _transformer,
    flux,
    sd_vae,
    unet,
)
from comfy.cli_args import PerformanceFeature
from comfy.patcher_extension import CallbacksMP, WrappersMP
from placing import (
    COMPUTE,
    HAS_SIMULATED,
    RESIDENT,
    built_on_the_host,  # noqa: F401
    devices_known_to_comfyui,  # noqa: F401
    inference_mode,  # noqa: F401
    lora_for,
    on_donor,
)
from sampling import conditioning, core_load, output

import nodes
from allocation_parser import parse_allocation
from distorch2.loading import load_checkpoint
from distorch2.planning.plan import ComponentRequest

if HAS_SIMULATED:
    import simulated_accelerators as sim

PERCENTAGES = [50, 100]
MMDIT = "sd3_no_clip_weights"


def unet_with_middle() -> Spec:
    """SD1.5's family with one level of three residual blocks, and with the middle block that many patches are for."""
    spec = unet([1, 0], [0, 1, 0], context=768)
    for name in ("middle_block.0", "middle_block.2"):
        _res_block(spec, name, 320, 320)
    _transformer(spec, "middle_block.1", 320, 1, 768, linear=False)
    return spec


OWN_KINDS = {
    "unet": lambda: unet_with_middle().draw(0, prefix=MODEL) | sd_vae(0),
    "other_unet": lambda: unet_with_middle().draw(1, prefix=MODEL),
    "flux_small": lambda: flux(4, 4).draw(0, torch.bfloat16, prefix=MODEL),
}


@pytest.fixture(scope="module")
def checkpoints(checkpoints, tmp_path_factory):
    """kind -> path; with kinds that only this file needs."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def path_of(kind):
        if kind not in OWN_KINDS:
            return checkpoints(kind)
        path = folder / f"{kind}.safetensors"
        if not path.exists():
            safetensors.torch.save_file(OWN_KINDS[kind](), path)
        return str(path)

    with torch.inference_mode():
        latents(*core_load(path_of("unet"))[:2])  # the first forward of a process may take other kernels
    return path_of


def latents(model, clip=None, size=(8, 8), batch=1, steps=3, cfg=3.0, sampler="euler", conds=None, **options):
    """Of a short run, from noise or, as `latent_image`, from latents [batch, C, *size]."""
    options.setdefault("scheduler", "simple")
    options.setdefault("latent_image", torch.zeros(batch, model.model.latent_format.latent_channels, *size))
    noise = comfy.sample.prepare_noise(options["latent_image"], 7)
    positive, negative = conds or [conditioning(model, clip, seed) for seed in (7, 8)]
    made = comfy.sample.sample(
        model, noise, steps, cfg, sampler, positive=positive, negative=negative, seed=7, disable_pbar=True, **options
    )
    assert torch.isfinite(made).all()
    assert made.std() > 0.01
    return made


def assert_same_bits(checkpoints, kind, run, minimum_copies=1, percentages=PERCENTAGES):
    """What `run(model, clip, vae)` returns, a list of tensors, which is the same wherever the weights lie."""
    expected = run(*core_load(checkpoints(kind)))
    mm.unload_all_models()
    for percent in percentages:
        model, clip, vae = on_donor(checkpoints, kind, percent)
        found = run(model, clip, vae)
        assert model.distribution.transfer.copies >= minimum_copies * len(model.distribution.plan.groups) > 0
        same = [torch.equal(ours, core) for ours, core in zip(found, expected, strict=True)]
        assert all(same), f"{percent} %: {same}"
        assert_gone_after_unloading(model)
    return expected


def assert_gone_after_unloading(model):
    mm.unload_all_models()
    module = model.model
    assert [name for name, child in module.named_modules() if not has_forward_of_its_class(child)] == []
    assert {parameter.device.type for parameter in module.parameters()} == {"cpu"}


def has_forward_of_its_class(child):
    """ComfyUI's bypass LoRAs give a module back its own forward as an attribute."""
    own = vars(child).get("forward")
    return own is None or getattr(own, "__func__", None) is type(child).forward


def model_of(output):
    """The model that a node returns: nodes of both of ComfyUI's kinds."""
    return output[0]


# --- ControlNet and its relatives


def hint_image():
    return torch.rand(1, 64, 64, 3, generator=torch.Generator().manual_seed(4))


def controlled(model, clip, control, strength=0.8, **options):
    positive, negative = (conditioning(model, clip, seed) for seed in (7, 8))
    apply = nodes.ControlNetApplyAdvanced().apply_controlnet
    conds = apply(positive, negative, control, hint_image(), strength, 0.0, 1.0)
    return latents(model, clip, conds=conds, **options)


def hint_block(spec: Spec):
    channels = [(3, 16), (16, 16), (16, 32), (32, 32), (32, 96), (96, 96), (96, 256), (256, 320)]
    for index, (n_in, n_out) in enumerate(channels):
        spec.conv(f"input_hint_block.{2 * index}", n_in, n_out)
    for index in range(3):
        spec.conv(f"zero_convs.{index}.0", 320, 320, 1)
    spec.conv("middle_block_out.0", 320, 320, 1)


def controlnet() -> dict:
    spec = Spec(
        {name: draw for name, draw in unet_with_middle().items() if not name.startswith(("output_blocks.", "out."))}
    )
    hint_block(spec)
    return spec.draw(3)


def control_lora() -> dict:
    """Differences of rank 4 to weights of the model that it is applied to, from which it takes all others."""
    spec = Spec()
    hint_block(spec)
    for name, (shape, *_) in unet_with_middle().items():
        if name.startswith(("input_blocks.", "middle_block.")) and name.endswith(".weight") and len(shape) > 1:
            rows, *columns = shape
            spec.add(name.replace(".weight", ".up"), rows, 4, std=0.1)
            spec.add(name.replace(".weight", ".down"), 4, *columns, std=0.1)
    return spec.draw(3) | {"lora_controlnet": torch.zeros(0)}


def t2i_adapter() -> dict:
    spec = Spec()
    channels = [320, 640, 1280, 1280]
    for index, (n_in, n_out) in enumerate(zip([192, *channels], channels)):
        inner = n_out // 4
        spec.conv(f"body.{index}.in_conv", n_in, inner, 1)
        for block in range(4):
            spec.conv(f"body.{index}.body.{block}.block1", inner, inner)
            spec.conv(f"body.{index}.body.{block}.block2", inner, inner)
        spec.conv(f"body.{index}.out_conv", inner, n_out, 1)
    return spec.draw(3, torch.float32)


@pytest.mark.parametrize("make", [controlnet, control_lora, t2i_adapter])
def test_a_controlnet(checkpoints, tmp_path, make):
    """ControlLoRA takes the model's weights where they lie, and does not cast those of norms, which are the last to be
    streamed: with everything on a donor it fails, and in ComfyUI with a norm that is not on the device."""
    path = tmp_path / "control.safetensors"
    safetensors.torch.save_file(make(), path)

    def run(model, clip, _):
        control = comfy.controlnet.load_controlnet(str(path), model)
        made = [latents(model, clip), controlled(model, clip, control), controlled(lora_for(model), clip, control)]
        mm.unload_all_models()
        return [*made, controlled(model, clip, control), latents(model, clip)]

    plain, with_control, with_both, again, last = assert_same_bits(
        checkpoints, "unet", run, percentages=[50] if make is control_lora else PERCENTAGES
    )
    assert not torch.equal(plain, with_control)
    assert not torch.equal(with_both, with_control)
    assert torch.equal(again, with_control)
    assert torch.equal(last, plain)


# --- patches


def patches(**by_name):
    """A function that sets these patches, by the name of the patcher's method, with the arguments after the patch."""

    def apply(model):
        patched = model.clone()
        for name, (patch, *arguments) in by_name.items():
            getattr(patched, f"set_model_{name}")(patch, *arguments)
        return patched

    return apply


def scaled_attention(q, k, v, extra_options, mask=None):
    return torch.nn.functional.scaled_dot_product_attention(1.1 * q, k, v)


def node(execute, *arguments):
    """A function that gives a model to a node."""
    return lambda model: model_of(execute(model, *arguments))


def with_narrow_channels(model):
    """FreeU looks for blocks of 2 and 4 times the channels of the first level, of which this small model has none."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setitem(model.model.model_config.unet_config, "model_channels", 160)
        return model_of(free_u_nodes.FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2))


def skipped_or_run_twice(model):
    """A double block that is skipped, run twice or run once, each in its turn, and a single block as well."""
    patched, calls = model.clone(), []

    def replacement(arguments, extra):
        calls.append(arguments)
        turns = len(calls) % 3
        for _ in range(turns):
            arguments = {**arguments, **extra["original_block"](arguments)}
        return arguments

    patched.set_model_patch_replace(replacement, "dit", "double_block", 1)
    patched.set_model_patch_replace(replacement, "dit", "single_block", 2)
    return patched


ORDERS = [[0, 1, 2, 3], [3, 2, 1, 0], [0, 0, 2], [1, 3, 1, 3, 1], [2]]


def rearranged(model):
    """Every forward goes through the blocks in another order, some twice, some not at all."""
    patched, calls = model.clone(), []

    def wrapper(executor, *arguments, **options):
        order = ORDERS[len(calls) % len(ORDERS)]
        calls.append(order)
        module, names = executor.class_obj, ("double_blocks", "single_blocks")
        blocks = {name: getattr(module, name) for name in names}
        try:
            for name in names:
                setattr(module, name, torch.nn.ModuleList([blocks[name][index] for index in order]))
            return executor(*arguments, **options)
        finally:
            for name in names:
                setattr(module, name, blocks[name])

    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "rearranged", wrapper)
    return patched


def with_bypass_lora(model):
    generator = torch.Generator().manual_seed(5)
    state_dict = {}
    for name, module in model.model.diffusion_model.named_modules():
        if type(module).__name__ in ("Linear", "Conv2d"):
            rows, *columns = module.weight.shape
            up_shape = (rows, 4, *(1 for _ in columns[1:]))
            state_dict[f"diffusion_model.{name}.lora_up.weight"] = torch.randn(up_shape, generator=generator) * 0.02
            state_dict[f"diffusion_model.{name}.lora_down.weight"] = torch.randn(4, *columns, generator=generator) * 0.1
    return comfy.sd.load_bypass_lora_for_models(model, None, state_dict, 1.0, 0.0)[0]


def with_weight_wrapper(model):
    patched = model.clone()
    for key in model.model.state_dict():
        if key.endswith("attn2.to_q.weight"):
            patched.add_weight_wrapper(key, lambda weight: weight * 1.5)
    return patched


def both(first, second):
    return lambda model: second(first(model))


UNET_PATCHES = {
    "attention patches": patches(
        attn1_patch=[lambda q, k, v, _: (1.2 * q, k, v)],
        attn2_patch=[lambda q, k, v, _: (q, k, 1.2 * v)],
        attn1_output_patch=[lambda n, _: 1.2 * n],
        attn2_output_patch=[lambda n, _: 0.9 * n],
    ),
    "attention replaced": patches(
        attn1_replace=[scaled_attention, "input", 1], attn2_replace=[scaled_attention, "middle", 0, 0]
    ),
    "block patches": patches(
        emb_patch=[lambda emb, channels, _: 1.1 * emb],
        input_block_patch=[lambda h, _: 1.1 * h],
        input_block_patch_after_skip=[lambda h, _: 0.9 * h],
        output_block_patch=[lambda h, hsp, _: (1.1 * h, 0.9 * hsp)],
    ),
    "function wrapper that runs it twice": patches(
        unet_function_wrapper=[
            lambda apply, a: apply(apply(a["input"], a["timestep"], **a["c"]), a["timestep"], **a["c"])
        ]
    ),
    "CFG functions": patches(
        sampler_cfg_function=[lambda a: a["uncond"] + 2 * (a["cond"] - a["uncond"])],
        sampler_pre_cfg_function=[lambda a: [1.1 * part for part in a["conds_out"]]],
        sampler_post_cfg_function=[lambda a: 0.9 * a["denoised"]],
    ),
    "HyperTile": node(hypertile_nodes.HyperTile.execute, 32, 1, 1, False),
    "FreeU": with_narrow_channels,
    "PAG": node(pag_nodes.PerturbedAttentionGuidance.execute, 3.0),
    "SAG": node(sag_nodes.SelfAttentionGuidance.execute, 0.5, 2.0),
    "RescaleCFG": node(advanced_nodes.RescaleCFG().patch, 0.7),
    "ModelSamplingDiscrete": node(advanced_nodes.ModelSamplingDiscrete().patch, "v_prediction", True),
    "ModelComputeDtype": node(advanced_nodes.ModelComputeDtype().patch, "bf16"),
    "bypass LoRA and LoRA": both(with_bypass_lora, lora_for),
    "weight wrapper": with_weight_wrapper,
}
FLUX_PATCHES = {
    "block replace": skipped_or_run_twice,
    "blocks rearranged": rearranged,
    "blocks rearranged, with LoRA": both(lora_for, rearranged),
    "SkipLayerGuidance": node(skip_layer_nodes.SkipLayerGuidanceDiT.execute, 3.0, 0.0, 1.0, "1", "0, 2"),
    "EasyCache": node(easycache_nodes.EasyCacheNode.execute, 100.0, 0.0, 1.0, False),
    "ModelSamplingFlux": node(advanced_nodes.ModelSamplingFlux().patch, 1.5, 0.5, 64, 64),
    "ModelComputeDtype": node(advanced_nodes.ModelComputeDtype().patch, "fp16"),
    "bypass LoRA": with_bypass_lora,
}
# As many as there are orders, and one.
STEPS = {"unet": 2, MMDIT: 2, "flux_small": 6}
PATCHES = [
    *(("unet", name, patch) for name, patch in UNET_PATCHES.items()),
    *(("flux_small", name, patch) for name, patch in FLUX_PATCHES.items()),
    (MMDIT, "ModelSamplingSD3", node(advanced_nodes.ModelSamplingSD3().patch, 1.0)),
]


@pytest.fixture(scope="module")
def core(checkpoints):
    """kind -> model of ComfyUI's own loader, and its latents."""
    made = {}

    def load(kind):
        if kind not in made:
            with torch.inference_mode():
                model = core_load(checkpoints(kind))[0]
                made[kind] = model, latents(model, steps=STEPS[kind])
        return made[kind]

    return load


@pytest.mark.parametrize(("kind", "patch"), [pytest.param(k, p, id=f"{name}, {k}") for k, name, p in PATCHES])
@pytest.mark.quick("blocks rearranged, with LoRA, flux_small")
def test_a_patched_model(checkpoints, core, kind, patch):
    core_model, plain = core(kind)
    expected = latents(patch(core_model), steps=STEPS[kind])
    assert not torch.equal(plain, expected)
    mm.unload_all_models()
    for percent, runs in ((50, ["plain", "patched", "unload", "patched", "plain"]), (100, ["patched", "plain"])):
        model = on_donor(checkpoints, kind, percent)[0]
        for index, which in enumerate(runs):
            if which == "unload":
                mm.unload_all_models()
            elif which == "plain":
                assert torch.equal(latents(model, steps=STEPS[kind]), plain), (percent, index)
            else:
                assert torch.equal(latents(patch(model), steps=STEPS[kind]), expected), (percent, index)
        # EasyCache runs the first steps only.
        assert model.distribution.transfer.copies >= 2 * len(model.distribution.plan.groups) > 0
        assert_gone_after_unloading(model)


@pytest.mark.usefixtures("built_on_the_host")  # so that ComfyUI's model is loaded in the test, and calls back
def test_wrappers_and_callbacks_of_every_kind(checkpoints):
    wrapped = [
        WrappersMP.OUTER_SAMPLE,
        WrappersMP.PREPARE_SAMPLING,
        WrappersMP.SAMPLER_SAMPLE,
        WrappersMP.PREDICT_NOISE,
        WrappersMP.CALC_COND_BATCH,
        WrappersMP.APPLY_MODEL,
        WrappersMP.DIFFUSION_MODEL,
    ]
    called_back = [CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_CLEANUP, CallbacksMP.ON_LOAD, CallbacksMP.ON_DETACH]
    called_back += [CallbacksMP.ON_CLONE, CallbacksMP.ON_INJECT_MODEL, CallbacksMP.ON_EJECT_MODEL]
    runs = []

    def run(model, clip, _):
        seen = []
        runs.append(seen)
        patched = with_bypass_lora(model)

        def wrapper_for(kind):
            def wrapper(executor, *arguments, **options):
                seen.append(kind)
                result = executor(*arguments, **options)
                return 0.9 * result if kind == WrappersMP.DIFFUSION_MODEL else result

            return wrapper

        for kind in wrapped:
            patched.add_wrapper_with_key(kind, "tests", wrapper_for(kind))
        for kind in called_back:
            patched.add_callback_with_key(kind, "tests", lambda *_, kind=kind: seen.append(kind))
        made = [latents(patched, clip, steps=2), latents(patched.clone(), clip, steps=2)]
        mm.unload_all_models()
        return made

    assert_same_bits(checkpoints, "flux_small", run)
    assert set(runs[0]) == {*wrapped, *called_back}
    # How often a model is loaded and injected is the memory manager's affair.
    free = {CallbacksMP.ON_LOAD, CallbacksMP.ON_DETACH, CallbacksMP.ON_INJECT_MODEL, CallbacksMP.ON_EJECT_MODEL}
    for seen in runs:
        assert [kind for kind in seen if kind not in free] == [kind for kind in runs[0] if kind not in free]
        assert set(seen) == set(runs[0])


def test_a_model_that_another_one_brings_along_is_used_in_every_step(checkpoints):
    """Two models on donors, used alternately: one in the other's forward, and step by step in one workflow."""

    def run_with(other):
        def run(model, clip, _):
            patched = model.clone()
            patched.set_additional_models("tests", [other])

            def wrapper(executor, x, *arguments, **options):
                own = executor(x, *arguments, **options)
                (brought,) = model_in_use.get_additional_models_with_key("tests")
                return own + 0.5 * brought.model.diffusion_model._forward(x, *arguments, **options)

            patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "tests", wrapper)
            model_in_use = patched
            made = [latents(patched, clip), latents(model, clip), latents(other, clip)]
            state = torch.zeros(1, 4, 8, 8)
            for step in range(4):
                limits = {"start_step": step, "last_step": step + 1, "disable_noise": step > 0}
                state = latents((model, other)[step % 2], clip, steps=4, latent_image=state, **limits)
            return [*made, state]

        return run

    expected = run_with(core_load(checkpoints("other_unet"))[0])(*core_load(checkpoints("unet")))
    assert len({latent.sum().item() for latent in expected}) == 4
    mm.unload_all_models()
    for percent in PERCENTAGES:
        model, other = (on_donor(checkpoints, kind, percent)[0] for kind in ("unet", "other_unet"))
        found = run_with(other)(model, None, None)
        assert all(torch.equal(ours, core) for ours, core in zip(found, expected, strict=True)), percent
        for each in (model, other):
            assert each.distribution.transfer.copies >= 8 * len(each.distribution.plan.groups) > 0
        assert_gone_after_unloading(model)
        assert_gone_after_unloading(other)


# --- one session


def test_a_session_of_runs_of_every_size(checkpoints):
    def run(model, clip, _):
        made = [latents(model, size=size, batch=batch, steps=2) for size, batch in [((8, 8), 1), ((8, 12), 2)]]
        made += [latents(model, batch=batch, steps=2, cfg=1.0) for batch in (1, 3)]
        made += [latents(lora_for(model), size=(12, 8), batch=2, steps=2)]
        return [*made, latents(model, steps=2)]

    first, *_, last = expected = assert_same_bits(checkpoints, "unet", run, minimum_copies=12)
    assert torch.equal(first, last)
    assert not torch.equal(first, expected[2])  # with CFG 1.0


SAMPLERS = ["heun", "dpm_2", "dpmpp_2m", "dpmpp_sde", "euler_ancestral", "uni_pc", "ddim", "lcm", "res_multistep"]


def test_samplers_that_call_the_model_once_or_twice_a_step(checkpoints):
    def run(model, clip, _):
        return [latents(model, clip, sampler=sampler) for sampler in SAMPLERS]

    expected = assert_same_bits(checkpoints, MMDIT, run, minimum_copies=20)
    assert len({latent.sum().item() for latent in expected}) > 5


def test_image_to_image_with_the_vae_between(checkpoints):
    def run(model, clip, vae):
        image = hint_image()
        encoded = vae.encode(image)
        halfway = latents(model, clip, latent_image=encoded, denoise=0.5, steps=2)
        decoded = vae.decode(halfway)
        finer = torch.nn.functional.interpolate(decoded.movedim(-1, 1), scale_factor=2).movedim(1, -1)
        again = latents(model, clip, latent_image=vae.encode(finer), denoise=0.4, steps=2)
        masked = latents(model, clip, latent_image=encoded, noise_mask=torch.ones(1, 8, 8).triu())
        return [encoded, halfway, decoded, again, masked]

    encoded, halfway, decoded, *_ = assert_same_bits(checkpoints, "unet", run, minimum_copies=3)
    assert not torch.equal(encoded, halfway)
    assert decoded.std() > 0.01


@pytest.mark.parametrize("feature", list(PerformanceFeature), ids=lambda feature: feature.value)
def test_fast_options(checkpoints, monkeypatch, feature):
    """Those that ComfyUI asks for when a model is loaded; others it obeys as it starts."""
    monkeypatch.setattr(comfy.cli_args.args, "fast", {feature})

    def run(model, clip, _):
        assert any(parameter.dtype == FP8 for parameter in model.model.state_dict().values())
        return [latents(model, clip), latents(model, clip)]

    assert_same_bits(checkpoints, "sd3_fp8_scaled_no_clip_weights", run, minimum_copies=3)


# --- a random walk


def memory_used():
    """Bytes on every device but the host."""
    gc.collect()
    if HAS_SIMULATED:
        return tuple(sim.used_bytes)
    return tuple(torch.cuda.memory_allocated(index) for index in range(torch.cuda.device_count()))


def interrupt(patcher, walk, raised):
    """Raise in the forward of some layer, before or after it has computed."""
    leaf = walk.choice([child for child in patcher.model.diffusion_model.modules() if child._parameters])
    forward, is_before = type(leaf).forward, walk.random() < 0.5

    def raising(module, *arguments, **options):
        result = None if module is leaf and is_before else forward(module, *arguments, **options)
        if module is leaf:
            raise raised("planted")
        return result

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(type(leaf), "forward", raising)
        with pytest.raises(raised, match="planted"):
            output(patcher)


def test_a_random_walk(checkpoints):
    sizes = [(8, 8), (16, 8), (12, 20)]
    core_model = core_load(checkpoints("flux_small"))[0]
    output(core_model)
    core_model = {False: core_model, True: lora_for(core_model)}
    expected = {(lora, size): output(core_model[lora], size) for lora in (False, True) for size in sizes}
    assert not torch.equal(expected[False, (8, 8)], expected[True, (8, 8)])
    mm.unload_all_models()
    del core_model
    before_loading = memory_used()

    donors = "sim:0,40%;sim:1,30%" if HAS_SIMULATED else "cpu,70%"
    request = ComponentRequest(COMPUTE, parse_allocation(f"{COMPUTE},30%;{donors}"), "stream")
    model = load_checkpoint(checkpoints("flux_small"), request, RESIDENT, COMPUTE)[0]
    clones = {False: model, True: lora_for(model)}
    output(model)
    mm.unload_all_models()
    at_start = memory_used()
    bound = {name: id(child) for name, child in model.model.named_modules()}
    walk, has_lora, steps = random.Random(12), False, []
    while len(steps) < 200:
        steps.append(
            walk.choice(
                ["forward", "resolution", "KeyboardInterrupt", "RuntimeError", "unload", "reload", "LoRA", "clone"]
            )
        )
        patcher = clones[has_lora]
        if steps[-1] == "resolution":
            size = walk.choice(sizes[1:])
            assert torch.equal(output(patcher, size), expected[has_lora, size]), steps
        elif steps[-1] == "KeyboardInterrupt":
            interrupt(patcher, walk, KeyboardInterrupt)
        elif steps[-1] == "RuntimeError":
            interrupt(patcher, walk, RuntimeError)
        elif steps[-1] in ("unload", "reload"):
            mm.unload_all_models()
            assert memory_used() == at_start, steps
            if steps[-1] == "reload":
                mm.load_models_gpu([patcher])
        elif steps[-1] == "LoRA":
            has_lora = not has_lora
        elif steps[-1] == "clone":
            clones[has_lora] = patcher.clone()
        del patcher
        assert torch.equal(output(clones[has_lora]), expected[has_lora, (8, 8)]), steps
    copies = model.distribution.transfer.copies
    assert copies >= 200 * len(model.distribution.plan.groups) > 0
    assert {"LoRA", "unload", "KeyboardInterrupt", "clone"} <= set(steps)
    assert {name: id(child) for name, child in model.model.named_modules()} == bound
    assert_gone_after_unloading(model)
    assert memory_used() == at_start
    if HAS_SIMULATED:
        assert at_start == before_loading == (0, 0)
