"""Units run on the donor that holds their weights: the same bits as on one device, on simulated ones that compute."""

import contextlib
import dataclasses
import functools

import comfy.controlnet
import comfy.hooks
import comfy.model_management as mm
import comfy.sd
import pytest
import safetensors.torch
import torch
from comfy.ldm.modules.attention import optimized_attention
from computing import INFERENCE_BYTES, load, same, sim
from computing import computing as computing
from computing import expected as expected
from computing import inference_mode as inference_mode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from placing import lora_for, lora_weights
from sampling import sample
from simulator import forecast_relay
from test_compatibility import OWN_KINDS, controlled, controlnet, latents
from unit_calls import recorded_units

from distorch2.loading import load_checkpoint
from distorch2.moving.crossing import Crossing
from distorch2.planning.plan import ComponentRequest, PlanError, VirtualVram
from distorch2.serving.activations import Visit
from distorch2.serving.relay import _brings_tensors_along

pytestmark = pytest.mark.usefixtures("inference_mode", "computing")
KINDS = ("sd3_no_clip_weights", "sd3", "flux", "sd15_blocks_no_clip", "wan")
HALF = "sim:0,50%;sim:1,50%"
SPLITS = (HALF, "sim:1,100%", "sim:0,30%;sim:1,40%;cpu,30%", "sim:0,90%;sim:1,10%")


class Planted(BaseException):
    pass


def is_relayed(model):
    """Whether something crossed over, and nothing of what is relayed was streamed."""
    relay = model.distribution.relay
    return relay.activations.bytes_sent > 0 < relay.activations.bytes_brought and relay.streamer.staging.nbytes == 0


@pytest.mark.parametrize("is_deferred", [False, True])
@pytest.mark.parametrize("text", SPLITS)
@pytest.mark.parametrize("kind", ["sd3_no_clip_weights", "flux", "sd15_blocks_no_clip", "wan"])
@pytest.mark.quick("flux-sim:0,50%;sim:1,50%-True")
def test_latents_are_the_same_bits(checkpoints, expected, kind, text, is_deferred):
    model, clip = load(checkpoints, kind, text, "auto")
    with sim.deferred_copies() if is_deferred else contextlib.nullcontext():
        for _ in range(2):
            assert same(sample(model, clip), expected[kind])
    plan = model.distribution.plan
    assert bool(plan.relayed_units) == (model.distribution.relay is not None)
    if plan.relayed_units:
        assert is_relayed(model)
    else:  # 10 % of it is less than a unit
        assert kind == "sd3_no_clip_weights"


def test_qwen_image(checkpoints, monkeypatch):
    """By itself, since ComfyUI knows it in its full width only."""
    wanted = patched_on_the_cpu(checkpoints, "qwen_image")
    monkeypatch.setattr(sim, "capacity_bytes", [4 * 1024**3] * 2)
    model, clip = load(checkpoints, "qwen_image", HALF, "auto")
    assert same(sample(model, clip), wanted)
    assert len(model.distribution.plan.relayed_units) == 1
    assert is_relayed(model)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shares=st.tuples(st.integers(0, 10), st.integers(1, 10), st.integers(0, 5)), kind=st.sampled_from(["flux", "wan"])
)
def test_any_split(checkpoints, expected, shares, kind):
    text = ";".join(f"{device},{share}%" for device, share in zip(("sim:0", "sim:1", "cpu"), shares))
    model, clip = load(checkpoints, kind, text, "auto")
    plan = model.distribution.asked
    assert plan.relayed_units or plan.streamed
    assert same(sample(model, clip), expected[kind])
    if plan.relayed_units:
        assert is_relayed(model)
    mm.unload_all_models()


@pytest.mark.parametrize("text", ["sim:0,30%;sim:1,40%;cpu,30%", "sim:1,60%;cpu,40%", "cpu,20%;sim:1,30%;sim:0,50%"])
@pytest.mark.parametrize("kind", ["sd3_no_clip_weights", "flux", "sd15_blocks_no_clip", "wan"])
def test_three_devices_compute(checkpoints, expected, kind, text):
    """The host as well, if it is told to."""
    model, clip = load(checkpoints, kind, text, "relay")
    with sim.deferred_copies():
        for _ in range(2):
            assert same(sample(model, clip), expected[kind])
    assert set(model.distribution.plan.relayed_units.values()) == {"sim:1", "cpu"}
    assert is_relayed(model)


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        (HALF, "auto"),
        ("sim:1,100%", "auto"),
        ("sim:0,80%;sim:1,20%", "auto"),
        ("sim:0,30%;sim:1,40%;cpu,30%", "auto"),
        ("sim:0,30%;sim:1,40%;cpu,30%", "relay"),
    ],
)
@pytest.mark.parametrize("kind", ["sd3_no_clip_weights", "flux", "sd15_blocks_no_clip", "wan"])
def test_as_many_bytes_cross_over_as_the_simulator_says(checkpoints, kind, text, mode):
    model, clip = load(checkpoints, kind, "sim:0,*")
    # Outside inference mode writes are counted.
    with torch.inference_mode(False), torch.no_grad(), recorded_units(model.model) as calls:
        sample(model, clip)
    mm.unload_all_models()
    model, clip = load(checkpoints, kind, text, mode)
    sample(model, clip)
    plan, activations = model.distribution.plan, model.distribution.relay.activations
    forecast = forecast_relay(calls, plan.relayed_units)
    assert plan.relayed_units.keys() <= {call.unit for call in calls}
    assert (activations.bytes_sent, activations.bytes_brought) == (forecast.bytes_sent, forecast.bytes_brought)
    assert forecast.bytes_sent > 0 < forecast.bytes_brought


@pytest.mark.parametrize(("compute", "donor"), [("sim:0", "cpu"), ("cpu", "sim:1")])
def test_relay_between_the_host_and_an_accelerator(checkpoints, expected, compute, donor):
    request = ComponentRequest(compute, VirtualVram(0.02, donor), "relay")
    model, clip, _ = load_checkpoint(
        checkpoints("flux"), request, ComponentRequest("cpu", VirtualVram(0, "cpu")), "cpu"
    )
    assert same(sample(model, clip), expected["flux"])
    assert model.distribution.plan.relayed_units
    assert is_relayed(model)


def test_without_being_asked_only_devices_of_one_kind_relay(checkpoints):
    for compute, donor in (("sim:0", "cpu"), ("cpu", "sim:1")):
        request = ComponentRequest(compute, VirtualVram(0.02, donor))
        model, *_ = load_checkpoint(checkpoints("flux"), request, request, "cpu")
        assert not model.distribution.plan.relayed_units
        assert model.distribution.plan.streamed


def test_an_unknown_mode():
    with pytest.raises(PlanError, match="donor mode is 'fast'; use auto, stream, relay"):
        ComponentRequest("cpu", VirtualVram(1.0, "cpu"), "fast")
    with pytest.raises(PlanError, match="pack weights is 'yes'; use auto, on, off"):
        ComponentRequest("cpu", VirtualVram(1.0, "cpu"), pack_weights="yes")


def test_the_text_encoder_relays_as_well(checkpoints, expected):
    resident, request = (
        ComponentRequest("sim:0", VirtualVram(0, "cpu")),
        ComponentRequest("sim:0", VirtualVram(0.1, "sim:1")),
    )
    model, clip, _ = load_checkpoint(checkpoints("sd3"), resident, request, "cpu")
    assert same(sample(model, clip), expected["sd3"])
    assert is_relayed(clip.patcher)


def test_an_activation_that_nobody_changed_is_sent_once(checkpoints, expected, monkeypatch):
    model, clip = load(checkpoints, "flux", "sim:1,100%", "auto")
    assert same(sample(model, clip), expected["flux"])
    crossed = {"sim:0": [], "sim:1": []}
    copy = Crossing.copy

    def recorded(crossing, tensor, device, into=None):
        crossed[str(device)].append(tuple(tensor.shape))
        return copy(crossing, tensor, device, into)

    monkeypatch.setattr(Crossing, "copy", recorded)
    before = sim.counters["diffusion_forwards"]
    assert same(sample(model, clip), expected["flux"])
    num_forwards = sim.counters["diffusion_forwards"] - before
    image, both = (2, 16, 128), (2, 16 + 77, 128)  # with the text, for positive and negative conditioning
    # The image comes home from every block, and goes there again only where the model has made another of it: at the
    # start, and of image and text together.
    assert crossed["sim:0"].count(image) == 12 * num_forwards
    assert crossed["sim:0"].count(both) == 12 * num_forwards
    assert crossed["sim:1"].count(image) == crossed["sim:1"].count(both) == num_forwards


def test_what_is_written_at_home_between_units_reaches_the_next(checkpoints):
    assert is_relayed(patched_as_on_the_cpu(checkpoints, "flux", replaced_blocks))


def replaced_blocks(model):
    def block(arguments, extra):
        arguments["img"] += 0.25
        result = extra["original_block"](arguments)
        result["img"] += 0.5
        return result

    for number in range(12):
        model.set_model_patch_replace(block, "dit", "double_block", number)
        model.set_model_patch_replace(block, "dit", "single_block", number)


def louder_values(model):
    model.set_model_attn1_patch(lambda query, key, value, options: (query, key, value * 1.5))


def patched_on_the_cpu(checkpoints, kind, patch=None, run=sample, **options):
    """Latents of ComfyUI's loader on the CPU, with a patch; nothing computes on sim:0 meanwhile."""
    cpu = torch.device("cpu")
    devices = {"load_device": cpu, "offload_device": cpu}
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(mm, "get_torch_device", lambda: cpu)
        patches.setattr(mm, "text_encoder_device", lambda: cpu)
        model, clip, *_ = comfy.sd.load_checkpoint_guess_config(
            checkpoints(kind), model_options=devices, te_model_options=devices
        )
        model = model.clone()
        if patch is not None:
            patch(model)
        return run(model, clip, **options)


def patched_as_on_the_cpu(checkpoints, kind, patch):
    """The model, with half of it relayed, after a clone of it with the patch has given the same bits."""
    wanted = patched_on_the_cpu(checkpoints, kind, patch)
    model, clip = load(checkpoints, kind, HALF, "auto")
    patched = model.clone()
    patch(patched)
    assert same(sample(patched, clip), wanted)
    return model


def test_what_runs_inside_a_unit():
    """A patch between blocks does not, and neither does a module; a function does, or a patch that nobody knows."""
    assert not _brings_tensors_along([1, torch.zeros(1), torch.nn.Identity(), {"patches": {"single_block": [print]}}])
    assert _brings_tensors_along([{"patches": {"attn1_patch": [print]}}])
    mask = torch.zeros(1)
    assert _brings_tensors_along([mask, lambda query, key, value: value + mask])
    assert _brings_tensors_along([functools.partial(torch.add, mask)])
    assert _brings_tensors_along([mask.add])
    assert _brings_tensors_along([[mask].append])
    assert _brings_tensors_along([lambda query, key, value, mask=mask: value])
    assert _brings_tensors_along([lambda query, *, mask=mask: query])
    scale = 0.5
    assert not _brings_tensors_along([lambda query, key, value, heads=8, mask=None: value * scale])
    assert not _brings_tensors_along([optimized_attention, torch.add, lambda query, key, value: value])

    def holds_itself():
        return holds_itself

    def holds_a_tensor_by_another():
        return holds_itself, holds_the_mask

    def holds_the_mask():
        return mask

    assert not _brings_tensors_along([holds_itself])
    assert _brings_tensors_along([holds_a_tensor_by_another])


def test_units_with_patches_inside_stay_at_home(checkpoints):
    model = patched_as_on_the_cpu(checkpoints, "sd15_blocks_no_clip", louder_values)
    relay = model.distribution.relay
    assert relay.streamer.staging.nbytes > 0
    assert (
        model.loaded_size()
        == model.model_size()
        == model.distribution.plan.compute_bytes + relay.streamer.staging.nbytes
    )
    mm.load_models_gpu([model])
    assert model.loaded_size() == model.distribution.plan.compute_bytes  # until it is needed again


@pytest.mark.parametrize("kind", ["flux", "sd3_no_clip_weights"])
@pytest.mark.quick("sd3_no_clip_weights")
def test_a_lora_gives_the_same_bits(checkpoints, kind):
    wanted = patched_on_the_cpu(checkpoints, kind, lambda model: take_patches(model, lora_for(model)))
    model, clip = load(checkpoints, kind, HALF, "auto", high_precision_loras=False)
    assert same(sample(lora_for(model), clip), wanted)
    assert is_relayed(model)


def take_patches(model, other):
    model.patches = other.patches
    model.patches_uuid = other.patches_uuid


def test_a_share_that_is_evicted_and_comes_back(checkpoints, expected):
    model, clip = load(checkpoints, "flux", HALF, "auto")
    assert same(sample(model, clip), expected["flux"])
    (share,) = model.distribution.shares
    share.partially_unload(torch.device("cpu"), share.loaded_size() / 2)
    assert 0 < share.loaded_size() < share.model_size()
    relay = model.distribution.relay
    assert same(sample_without_loading(model, clip), expected["flux"])
    assert relay.streamer.staging.nbytes > 0
    assert same(sample(model, clip), expected["flux"])
    assert share.loaded_size() == share.model_size()


@pytest.mark.parametrize("mode", ["auto", "stream"])
def test_room_for_inference_is_kept_on_a_donor_that_computes(checkpoints, expected, monkeypatch, mode):
    model, clip = load(checkpoints, "flux", HALF, mode)
    planned = model.distribution.slab_bytes_planned_on(torch.device("sim:1"))
    monkeypatch.setattr(sim, "capacity_bytes", [sim.capacity_bytes[0], planned + INFERENCE_BYTES // 2])
    assert same(sample(model, clip), expected["flux"])
    (share,) = model.distribution.shares
    assert share.model_size() == planned
    assert (share.loaded_size() < planned - INFERENCE_BYTES // 4) == (mode == "auto")


def sample_without_loading(model, clip):
    """ComfyUI would bring the share back first."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(type(model.distribution.shares[0]), "partially_load", lambda *arguments, **options: 0)
        return sample(model, clip)


def test_whatever_is_raised_on_a_donor_leaves_everything_as_it_was(checkpoints, expected):
    model, clip = load(checkpoints, "flux", HALF, "auto")
    assert same(sample(model, clip), expected["flux"])
    units = list(model.distribution.plan.relayed_units)
    leaves = [m for name in units for m in model.model.get_submodule(name).modules() if hasattr(m, "weight")]
    for leaf in leaves[:: max(1, len(leaves) // 12)]:
        parameters = dict(leaf._parameters)

        def fail(*arguments):
            raise Planted

        hook = leaf.register_forward_hook(fail)
        with pytest.raises(Planted):
            sample(model, clip)
        hook.remove()
        assert torch.sim.current_device() == 0
        assert leaf._parameters == parameters
        assert same(sample(model, clip), expected["flux"])


def test_hook_loras_are_written_where_the_weights_lie(checkpoints, expected):
    model, clip = load(checkpoints, "flux", HALF, "auto", high_precision_loras=False)
    hooks = comfy.hooks.create_hook_lora(lora_weights(model), 0.5, 0.0)
    wanted = patched_on_the_cpu(checkpoints, "flux", hooks=hooks)
    assert same(sample(model, clip), expected["flux"])
    assert same(sample(model, clip, hooks=hooks), wanted)
    assert not torch.equal(wanted, expected["flux"])
    assert same(sample(model, clip), expected["flux"])
    assert is_relayed(model)


def test_what_crosses_over_between_devices_that_cannot_reach_each_other(checkpoints, expected, monkeypatch):
    model, clip = load(checkpoints, "flux", HALF, "auto")
    copy, crossed = Crossing.copy, []

    def arrives_wrong(crossing, tensor, device, into=None):
        copied = copy(crossing, tensor, device, into)
        if crossing.is_direct:
            crossed.append(copied.zero_())
        return copied

    monkeypatch.setattr(Crossing, "copy", arrives_wrong)
    assert same(sample(model, clip), expected["flux"])
    assert is_relayed(model)
    assert len(crossed) == 4  # the checks, there and back: of what is relayed, and of the rest, which is streamed


@pytest.mark.parametrize("text", [HALF, "sim:1,100%"])
def test_a_controlnet(tmp_path, text):
    paths = {"unet": str(tmp_path / "unet.safetensors"), "control": str(tmp_path / "control.safetensors")}
    for name, make in (("unet", OWN_KINDS["unet"]), ("control", controlnet)):
        safetensors.torch.save_file(make(), paths[name])

    def with_control(model, clip):
        return controlled(model, clip, comfy.controlnet.load_controlnet(paths["control"], model))

    checkpoints = paths.__getitem__
    plain = patched_on_the_cpu(checkpoints, "unet", run=latents)
    wanted = patched_on_the_cpu(checkpoints, "unet", run=with_control)
    model, clip = load(checkpoints, "unet", text, "auto")
    assert same(with_control(model, clip), wanted)
    assert not torch.equal(wanted, plain)
    assert is_relayed(model)
    assert same(latents(model, clip), plain)


@pytest.mark.parametrize("patched_first", [True, False])
def test_object_patches_of_what_does_not_lie_in_slabs(checkpoints, expected, patched_first):
    def patch(model):
        for number in range(4):
            modulation = torch.nn.Parameter(torch.full((1, 6, 128), 0.3), requires_grad=False)
            model.add_object_patch(f"diffusion_model.blocks.{number}.modulation", modulation)

    wanted = patched_on_the_cpu(checkpoints, "wan", patch)
    model, clip = load(checkpoints, "wan", HALF, "auto")
    patched = model.clone()
    patch(patched)
    for one, made in [(patched, wanted), (model, expected["wan"])][:: 1 if patched_first else -1] * 2:
        assert same(sample(one, clip), made)
    assert is_relayed(model)
    mm.unload_all_models()
    assert same(sample(model, clip), expected["wan"])


class Scaled(torch.nn.Module):
    """Another pack's layer around one of the model's, with a parameter that it does not cast."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.scale = torch.nn.Parameter(torch.full((128,), 1.5), requires_grad=False)

    def forward(self, x):
        return self.inner(x) * self.scale


@pytest.mark.parametrize("is_run_before", [True, False])
def test_what_another_pack_puts_into_a_unit_is_copied_to_the_donor(checkpoints, expected, is_run_before):
    def patch(model):
        for number in range(4):
            ffn = model.model.diffusion_model.blocks[number].ffn
            model.add_object_patch(f"diffusion_model.blocks.{number}.ffn", Scaled(ffn))

    wanted = patched_on_the_cpu(checkpoints, "wan", patch)
    model, clip = load(checkpoints, "wan", HALF, "auto")
    if is_run_before:
        assert same(sample(model, clip), expected["wan"])
    patched = model.clone()
    patch(patched)
    assert same(sample(patched, clip), wanted)
    assert not torch.equal(wanted, expected["wan"])
    assert is_relayed(model)
    assert same(sample(model, clip), expected["wan"])
    assert is_relayed(model)


def test_an_injection_keeps_units_at_home_while_other_clones_die(checkpoints, expected):
    class Injection:
        """Something of its own on the compute device, around a layer's forward."""

        def __init__(self, name):
            self.name, self.half = name, torch.full((1,), 0.5, device="sim:0")

        def inject(self, patcher):
            self.module = patcher.model.get_submodule(self.name)
            self.forward = forward = self.module.forward
            self.module.forward = lambda x: forward(x) + self.half * 0

        def eject(self, patcher):
            self.module.forward = self.forward

    model, clip = load(checkpoints, "flux", "sim:1,100%", "auto")
    assert same(sample(model, clip), expected["flux"])
    injected = model.clone()
    injected.set_injections("test", [Injection("diffusion_model.single_blocks.11.linear2")])
    others = [model.clone()]

    def one_less(arguments):
        others.clear()
        return arguments["denoised"]

    injected.set_model_sampler_post_cfg_function(one_less)
    before = model.distribution.relay.activations.bytes_sent
    assert same(sample(injected, clip), expected["flux"])
    assert model.distribution.relay.activations.bytes_sent == before
    assert same(sample(model, clip), expected["flux"])
    assert model.distribution.relay.activations.bytes_sent > before


def test_what_nobody_sees_keeps_a_unit_at_home(checkpoints, expected, caplog):
    """A block that is handed a tensor by way of an object."""
    model, clip = load(checkpoints, "flux", "sim:1,100%", "auto")
    zero = torch.zeros(1, device="sim:0")
    block = model.model.diffusion_model.single_blocks[5]
    hook = block.linear1.register_forward_hook(lambda module, arguments, output: output + zero)
    assert same(sample(model, clip), expected["flux"])
    hook.remove()
    assert same(sample(model, clip), expected["flux"])
    assert len([r for r in caplog.records if "cannot run on sim:1" in r.getMessage()]) == 1
    assert model.distribution.relay.activations.bytes_sent > 0


def test_evictions_to_a_host_that_relays(checkpoints, expected):
    model, clip = load(checkpoints, "wan", "sim:0,70%;cpu,30%", "relay")
    assert same(sample(model, clip), expected["wan"])
    num_units = len(model.distribution.plan.relayed_units)
    model.partially_unload(torch.device("cpu"), model.loaded_size() * 0.4)
    assert model.distribution.plan.evicted
    assert len(model.distribution.plan.relayed_units) == num_units > 0
    assert same(model_sampled_as_it_is(model, clip), expected["wan"])
    assert same(sample(model, clip), expected["wan"])


def model_sampled_as_it_is(model, clip):
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(mm, "load_models_gpu", lambda *arguments, **options: None)
        return sample(model, clip)


def test_units_with_weight_functions_stay_at_home(checkpoints, expected):
    model, clip = load(checkpoints, "flux", "sim:1,100%", "auto")
    wrapped = model.clone()
    zero = torch.zeros(1, device="sim:0")
    wrapped.add_weight_wrapper("diffusion_model.single_blocks.3.linear1.weight", lambda weight: weight + zero)
    assert same(sample(wrapped, clip), expected["flux"])
    assert model.distribution.relay.streamer.staging.nbytes > 0
    assert same(sample(model, clip), expected["flux"])


# --- what units are called with


@dataclasses.dataclass
class Record:
    tensor: torch.Tensor
    text: str = "text"


class Slots:
    __slots__ = ("tensor",)


def test_arguments_of_any_form_are_on_the_donor_and_come_back(checkpoints):
    model, clip = load(checkpoints, "flux", "sim:1,100%", "auto")
    sample(model, clip)
    visit = Visit(model.distribution.relay.activations, torch.device("sim:1"))
    home, elsewhere = torch.ones(3, device="sim:0"), torch.ones(3)
    slots, record = Slots(), Record(home)
    slots.tensor = home
    options = {"list": [home, None], "nested": {"tuple": (home, 1)}, "self": None}
    options["self"] = options
    arguments = (home, elsewhere, record, slots, options, len, "text", torch.Size([1, 2]))
    there = visit.send(arguments)
    assert there[0].device == torch.device("sim:1")
    assert there[1] is elsewhere
    assert there[2] is record
    assert there[7] == torch.Size([1, 2])
    for twin in (record.tensor, slots.tensor, options["list"][0], options["nested"]["tuple"][0]):
        assert twin is there[0]
    options["list"][1] = options["new"] = there[0] + 1
    options["list"][0] = there[0] + 2
    there[0].add_(1)
    result = visit.bring_home({"same": there[0], "other": (there[0] * 2, elsewhere), "record": Record(there[0] + 0)})
    visit.restore()
    assert torch.equal(home.cpu(), torch.full((3,), 2.0))
    assert result["same"].data_ptr() == home.data_ptr()
    assert result["other"][0].device == result["record"].tensor.device == torch.device("sim:0")
    assert result["other"][1] is elsewhere
    assert record.tensor is slots.tensor is options["nested"]["tuple"][0] is home
    assert options["new"].device == options["list"][0].device == torch.device("sim:1")  # what the unit put there
