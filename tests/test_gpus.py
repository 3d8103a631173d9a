"""What simulated accelerators cannot show: relay, eviction and placement on real ones, one to three of them."""

import gc

import comfy.model_management as mm
import comfy.multigpu
import comfy.samplers
import comfy.sd
import gguf_files
import pytest
import torch
from placing import inference_mode as inference_mode
from placing import lora_for
from sampling import sample

from allocation_parser import parse_allocation
from distorch2 import machine
from distorch2.components import DIFFUSION_MODEL, load_again
from distorch2.loading import distribute, load_checkpoint
from distorch2.planning.plan import ComponentRequest, VirtualVram
from distorch2.planning.planner import plan_alternating
from distorch2.weights.devices import CPU
from distorch2.weights.packing import PackedSlab
from distorch2.weights.quantised import plain_tensors

KINDS = ["sd3", "flux", "sd15_blocks", "wan", "sd3_fp8_scaled"]


@pytest.fixture(autouse=True)
def unloaded():
    yield
    mm.unload_all_models()
    gc.collect()


def core(checkpoints, kind, device):
    """(model, clip) of ComfyUI's loader, all on one device."""
    options = {"load_device": torch.device(device)}
    path = checkpoints(kind)
    sample(*comfy.sd.load_checkpoint_guess_config(path, model_options=options, te_model_options=options)[:2])  # warm up
    return comfy.sd.load_checkpoint_guess_config(path, model_options=options, te_model_options=options)[:2]


def ours(checkpoints, kind, unet, clip=None, mode="auto", pack_weights="auto", **options):
    """(model, clip); `unet` and `clip` are a compute device and an allocation string."""
    requests = []
    for compute, text in (unet, clip or (unet[0], f"{unet[0]},*")):
        requests.append(ComponentRequest(compute, parse_allocation(text), mode, pack_weights))
    return load_checkpoint(checkpoints(kind), *requests, unet[0], **options)


def bytes_by_device(module):
    found = {}
    for tensor in {id(t): t for t in [*module.parameters(), *module.buffers()]}.values():
        for plain in plain_tensors(tensor):
            found[str(plain.device)] = found.get(str(plain.device), 0) + plain.nbytes
    return found


def is_as_planned(model):
    plan = model.distribution.plan
    return bytes_by_device(model.model) == {device: plan.bytes_on(device) for device in plan.devices}


# --- one GPU


@pytest.mark.gpu
@pytest.mark.parametrize(("compute", "donor"), [("cuda:0", "cpu"), ("cpu", "cuda:0")])
@pytest.mark.parametrize("kind", ["flux", "sd15_blocks"])
def test_relay_between_a_gpu_and_the_host(checkpoints, kind, compute, donor):
    wanted = step_of(*core(checkpoints, kind, compute))
    model, clip, _ = ours(checkpoints, kind, (compute, f"{compute},50%;{donor},50%"), mode="relay")
    found = step_of(model, clip)
    assert model.distribution.plan.relayed_units
    assert model.distribution.relay.activations.bytes_sent > 0 < model.distribution.relay.activations.bytes_brought
    assert is_as_planned(model)
    assert ((found - wanted).norm() / wanted.norm()).item() < 1e-2


def step_of(model, clip):
    """What the model says of pure noise."""
    outputs = []

    def recorded(apply_model, arguments):
        outputs.append(apply_model(arguments["input"], arguments["timestep"], **arguments["c"]))
        return outputs[-1]

    recording = model.clone()
    recording.set_model_unet_function_wrapper(recorded)
    sample(recording, clip, steps=1)
    return outputs[0].cpu()


@pytest.mark.gpu
def test_a_model_on_a_gpu_that_is_nearly_full(checkpoints):
    """ComfyUI grants less than planned, and takes more back for another model; the image stays the same."""
    wanted = sample(*core(checkpoints, "sd15_blocks", "cuda:0"))
    mm.unload_all_models()
    model, clip, _ = ours(checkpoints, "sd15_blocks", ("cuda:0", "cuda:0,80%;cpu,20%"))
    assert torch.equal(sample(model, clip), wanted)
    assert not model.distribution.plan.evicted
    room = model.model_size() // 2
    mm.free_memory(mm.get_free_memory(torch.device("cuda:0")) + room, torch.device("cuda:0"))
    assert model.distribution.plan.evicted
    assert model.loaded_size() <= model.model_size() - room
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(mm, "load_models_gpu", lambda *arguments, **options: None)  # it would bring them back
        assert torch.equal(sample(model, clip), wanted)
    assert torch.equal(sample(model, clip), wanted)
    assert not model.distribution.plan.evicted
    assert is_as_planned(model)


@pytest.mark.gpu
def test_what_a_gpu_runs_out_of_is_said(checkpoints):
    model, clip, _ = ours(checkpoints, "sd15_blocks", ("cuda:0", "cuda:0,80%;cpu,20%"))
    sample(model, clip)
    before = model.model.diffusion_model.forward

    def too_large(*arguments, **options):
        torch.empty(2**50, dtype=torch.uint8, device="cuda:0")

    model.model.diffusion_model.forward = too_large
    with pytest.raises(torch.OutOfMemoryError, match="the plan keeps .* GiB on cuda:0.*keep less of it on cuda:0"):
        sample(model, clip)
    model.model.diffusion_model.forward = before
    sample(model, clip)


@pytest.mark.gpu
@pytest.mark.parametrize("pack_weights", ["auto", "on"])
def test_five_hundred_steps_leave_nothing_behind(checkpoints, pack_weights):
    """With sizes that change, and interrupts and errors in the middle of a step."""
    model, clip, _ = ours(checkpoints, "flux", ("cuda:0", "cuda:0,40%;cpu,60%"), pack_weights=pack_weights)
    sample(model, clip)  # the first forward of a process may take other kernels
    assert bool(packed(model)) == (pack_weights == "on")
    wanted = sample(model, clip)
    leaves = [module for module in model.model.modules() if hasattr(module, "weight")]
    raised = [raising(mm.InterruptProcessingException), raising(ZeroDivisionError)]
    levels = set()
    for number in range(125):
        hook = None
        if number % 3 == 0:
            hook = leaves[number * 37 % len(leaves)].register_forward_hook(raised[number % 2])
        try:
            sample(model, clip, steps=4, seed=number, pixels=64 + 16 * (number % 5))
        except (mm.InterruptProcessingException, ZeroDivisionError):
            assert hook is not None
        finally:
            if hook is not None:
                hook.remove()
        if number % 25 == 24:
            assert torch.equal(sample(model, clip), wanted)
            gc.collect()
            levels.add((torch.cuda.memory_allocated(), model.distribution.pinned.num_bytes))
    assert len(levels) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("text", ["cpu,*", "cuda:0,50%;cpu,*"])
def test_packed_weights_with_and_without_a_lora(checkpoints, text):
    core_model, core_clip = core(checkpoints, "flux", "cuda:0")
    plain, with_lora = sample(core_model, core_clip), sample(lora_for(core_model), core_clip)
    model, clip, _ = ours(checkpoints, "flux", ("cuda:0", text), pack_weights="on")
    for _ in range(2):
        assert torch.equal(sample(model, clip), plain)
        assert len(packed(model)) > 4
        assert torch.equal(sample(lora_for(model), clip), with_lora)
        assert len(packed(model)) > 4
        mm.unload_all_models()
        assert not packed(model)


def packed(model):
    return [group for group in model.distribution.groups.values() if isinstance(group.source, PackedSlab)]


@pytest.mark.gpu
def test_weights_packed_on_the_gpu_for_want_of_room(checkpoints):
    wanted = sample(*core(checkpoints, "flux", "cuda:0"))
    model, clip, _ = ours(checkpoints, "flux", ("cuda:0", "cuda:0,*"), pack_weights="on")
    assert torch.equal(sample(model, clip), wanted)
    size = model.loaded_size()
    for part in (0.95, 0.6):
        model.partially_unload(CPU, model.loaded_size() - part * size)
        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(mm, "load_models_gpu", lambda *arguments, **options: None)  # it would bring them back
            assert torch.equal(sample(model, clip), wanted)
        assert model.loaded_size() <= part * size
        assert {str(group.device) for group in packed(model)} >= {"cuda:0"}


def raising(kind):
    def hook(*arguments):
        raise kind  # a new one each time: one that is raised again keeps the frames of the last time

    return hook


# --- more than one GPU


@pytest.mark.multigpu
@pytest.mark.parametrize("mode", ["stream", "auto"])
@pytest.mark.parametrize("text", ["cuda:0,50%;cuda:1,50%", "cuda:1,100%", "cuda:0,30%;cuda:1,40%;cpu,30%"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_other_gpu_lends_or_computes(checkpoints, kind, text, mode):
    wanted = sample(*core(checkpoints, kind, "cuda:0"))
    model, clip, _ = ours(checkpoints, kind, ("cuda:0", text), mode=mode)
    for _ in range(2):
        assert torch.equal(sample(model, clip), wanted)
    assert is_as_planned(model)
    relay = model.distribution.relay
    assert (relay is not None) == bool(model.distribution.plan.relayed_units)
    if relay is not None:
        for crossing in relay.activations.crossings.values():
            crossing.is_direct = False  # as for GPUs that cannot reach each other
        assert torch.equal(sample(model, clip), wanted)
    assert bool(model.distribution.plan.relayed_units) == (mode == "auto") or kind.startswith("sd3")


@pytest.mark.multigpu
@pytest.mark.parametrize("mode", ["stream", "auto"])
@pytest.mark.parametrize("text", ["cuda:1,100%", "cuda:0,30%;cuda:1,40%;cpu,30%"])
def test_packed_weights_on_the_other_gpu(checkpoints, text, mode):
    wanted = sample(*core(checkpoints, "flux", "cuda:0"))
    model, clip, _ = ours(checkpoints, "flux", ("cuda:0", text), mode=mode, pack_weights="on")
    for _ in range(2):
        assert torch.equal(sample(model, clip), wanted)
        assert {str(group.device) for group in packed(model)} >= ({"cuda:1"} if mode == "stream" else set())
        mm.unload_all_models()


@pytest.mark.multigpu
@pytest.mark.parametrize("pack_weights", ["off", "on"])
@pytest.mark.parametrize("text", ["cuda:0,50%;cpu,50%", "cuda:0,50%;cuda:1,50%", "cpu,*"])
@pytest.mark.parametrize("kind", ["flux", "sd3_no_clip_weights"])
def test_two_gpus_run_a_model_at_once(checkpoints, kind, text, pack_weights, monkeypatch):
    """By ComfyUI's MultiGPU CFG Split, against one conditioning after the other on one GPU."""
    monkeypatch.setattr(comfy.samplers, "can_concat_cond", lambda one, other: one is other)
    core_model, core_clip = core(checkpoints, kind, "cuda:0")
    plain, with_lora = sample(core_model, core_clip), sample(lora_for(core_model), core_clip)
    mm.unload_all_models()
    options = {"mode": "stream", "pack_weights": pack_weights, "high_precision_loras": False}
    model, clip, _ = ours(checkpoints, kind, ("cuda:0", text), **options)
    model = comfy.multigpu.create_multigpu_deepclones(model, 2, reuse_loaded=True)
    for _ in range(2):
        assert torch.equal(sample(model, clip), plain)
        first, second = model, *model.get_additional_models_with_key("multigpu")
        slabs = [
            {group.host_slab.data_ptr() for group in each.distribution.groups.values()} for each in (first, second)
        ]
        assert slabs[0] == slabs[1] != set()  # one copy in main memory
        assert torch.equal(sample(lora_for(model), clip), with_lora)


@pytest.mark.multigpu
@pytest.mark.parametrize("text", ["cuda:0,50%;cpu,50%", "cuda:0,50%;cuda:1,50%"])
def test_two_gpus_run_a_gguf_model_at_once(checkpoints, tmp_path, text, monkeypatch):
    monkeypatch.setattr(comfy.samplers, "can_concat_cond", lambda one, other: one is other)
    path = gguf_files.write_flux(tmp_path / "flux.gguf", "Q8_0")

    def load():
        return gguf_files.load(path, gguf_files.Layers)

    clip, whole, loaded = core(checkpoints, "flux", "cuda:0")[1], load(), load()
    sample(whole, clip)  # warm up
    expected = sample(whole, clip)
    loaded.cached_patcher_init = (load_again, (DIFFUSION_MODEL, (path,), load))
    request = ComponentRequest("cuda:0", parse_allocation(text), "stream")
    model = distribute(loaded, request, is_new=True)
    model = comfy.multigpu.create_multigpu_deepclones(model, 2, reuse_loaded=True)
    for _ in range(2):
        assert torch.equal(sample(model, clip), expected)
        mm.unload_all_models()


@pytest.mark.gpu
def test_what_auto_has_to_know_of_a_gpu_is_measured():
    before = torch.cuda.memory_allocated("cuda:0")
    link = machine.bytes_per_second("cpu", "cuda:0", True)
    assert 1e8 < link < machine.multiplications_per_second("cuda:0", True)
    assert torch.cuda.memory_allocated("cuda:0") == before


@pytest.mark.multigpu
def test_links_between_gpus_are_measured_each_way():
    assert machine._name_of(torch.device("cuda:0")) != machine._name_of(torch.device("cuda:1"))
    for source, target in (("cuda:0", "cuda:1"), ("cuda:1", "cuda:0")):
        assert 1e8 < machine.bytes_per_second(source, target, True) < 2e12


@pytest.mark.multigpu
@pytest.mark.parametrize("kind", ["flux", "sd15_blocks", "wan"])
def test_two_gpus_are_a_relayed_pair(checkpoints, kind, monkeypatch):
    monkeypatch.setattr(comfy.samplers, "can_concat_cond", lambda one, other: one is other)
    core_model, core_clip = core(checkpoints, kind, "cuda:0")
    plain, with_lora = sample(core_model, core_clip), sample(lora_for(core_model), core_clip)
    mm.unload_all_models()
    model, clip, _ = ours(
        checkpoints, kind, ("cuda:0", "cuda:0,50%;cuda:1,50%"), mode="relay", high_precision_loras=False
    )
    model = comfy.multigpu.create_multigpu_deepclones(model, 2, reuse_loaded=True)
    for _ in range(2):
        for _ in range(3):
            assert torch.equal(sample(model, clip), plain)
        assert model._shared.placed.plan == plan_alternating(model.request.plan, model.layers_of(model.model))
        assert torch.equal(sample(lora_for(model), clip), with_lora)
        mm.unload_all_models()


@pytest.mark.multigpu
@pytest.mark.skipif(torch.cuda.device_count() < 3, reason="needs three GPUs")
@pytest.mark.parametrize("kind", ["flux", "sd15_blocks", "wan"])
def test_three_gpus_compute(checkpoints, kind):
    wanted = sample(*core(checkpoints, kind, "cuda:0"))
    model, clip, _ = ours(checkpoints, kind, ("cuda:0", "cuda:0,30%;cuda:1,30%;cuda:2,30%;cpu,10%"))
    for _ in range(2):
        assert torch.equal(sample(model, clip), wanted)
    assert is_as_planned(model)
    assert set(model.distribution.plan.relayed_units.values()) == {"cuda:1", "cuda:2"}


@pytest.mark.multigpu
@pytest.mark.parametrize("mode", ["stream", "auto"])
@pytest.mark.parametrize("kind", ["flux", "sd15_blocks"])
def test_computing_on_the_second_gpu(checkpoints, kind, mode):
    wanted = sample(*core(checkpoints, kind, "cuda:1"))
    model, clip, _ = ours(checkpoints, kind, ("cuda:1", "cuda:1,30%;cuda:0,40%;cpu,30%"), mode=mode)
    assert torch.equal(sample(model, clip), wanted)
    assert is_as_planned(model)
    assert torch.cuda.current_device() == 0


@pytest.mark.multigpu
def test_the_text_encoder_and_the_vae_on_the_second_gpu(checkpoints):
    """`cuda:0,70%;cuda:1,30%` for the diffusion model, `cuda:1,50%;cpu,50%` for the text encoder."""
    model, clip = core(checkpoints, "sd3", "cuda:0")
    clip = core(checkpoints, "sd3", "cuda:1")[1]
    wanted = sample(model, clip)
    requests = [
        ComponentRequest("cuda:0", parse_allocation("cuda:0,70%;cuda:1,30%")),
        ComponentRequest("cuda:1", parse_allocation("cuda:1,50%;cpu,50%")),
    ]
    model, clip, vae = load_checkpoint(checkpoints("sd3"), *requests, "cuda:1")
    assert torch.equal(sample(model, clip), wanted)
    assert is_as_planned(model)
    assert is_as_planned(clip.patcher)
    assert set(bytes_by_device(clip.cond_stage_model)) == {"cuda:1", "cpu"}
    assert torch.isfinite(vae.decode(wanted)).all()
    assert set(bytes_by_device(vae.first_stage_model)) == {"cuda:1"}


@pytest.mark.multigpu
def test_eight_gigabytes_of_virtual_vram(checkpoints):
    """With donor cuda:1, and the text encoder on cuda:1 with 2 GB on the host: more than these models have."""
    model, clip = core(checkpoints, "sd3", "cuda:0")
    clip = core(checkpoints, "sd3", "cuda:1")[1]
    wanted = sample(model, clip)
    requests = [ComponentRequest("cuda:0", VirtualVram(8, "cuda:1")), ComponentRequest("cuda:1", VirtualVram(2, "cpu"))]
    model, clip, _ = load_checkpoint(checkpoints("sd3"), *requests, "cuda:0")
    assert torch.equal(sample(model, clip), wanted)
    assert is_as_planned(model)
    assert model.distribution.plan.bytes_on("cuda:1") > model.distribution.plan.model_bytes / 2
    assert clip.patcher.distribution.plan.bytes_on("cpu") > clip.patcher.distribution.plan.model_bytes / 2


@pytest.mark.multigpu
@pytest.mark.parametrize("mode", ["stream", "auto"])
@pytest.mark.parametrize("kind", ["flux", "sd3_no_clip_weights"])
def test_a_lora_on_two_gpus(checkpoints, kind, mode):
    model, clip = core(checkpoints, kind, "cuda:0")
    plain, wanted = sample(model, clip), sample(lora_for(model), clip)
    model, clip, _ = ours(
        checkpoints, kind, ("cuda:0", "cuda:0,40%;cuda:1,40%;cpu,20%"), mode=mode, high_precision_loras=False
    )
    assert torch.equal(sample(lora_for(model), clip), wanted)
    assert torch.equal(sample(model, clip), plain)


@pytest.mark.multigpu
@pytest.mark.parametrize("kind", ["flux", "sd15_blocks"])
def test_half_of_what_is_streamed_comes_by_way_of_the_other_gpu(checkpoints, monkeypatch, kind):
    """Here for any gain, and for models that are smaller than it is for."""
    wanted = sample(*core(checkpoints, kind, "cuda:0"))
    for name in ("_LEAST_TO_DETOUR_BYTES", "_LEAST_GAIN"):
        monkeypatch.setattr(f"distorch2.serving.detour.{name}", 0)
    monkeypatch.setattr("distorch2.moving.transfer._LEAST_TO_HALVE_BYTES", 0)
    model, clip, _ = ours(checkpoints, kind, ("cuda:0", "cuda:0,20%;cuda:1,5%;cpu,75%"), mode="stream")
    for _ in range(3):
        assert torch.equal(sample(model, clip), wanted)
    detour = model.distribution.transfer.detour
    assert {slot.device for slot in detour.slots} == {torch.device("cuda:1")}
    assert is_as_planned(model)


@pytest.mark.multigpu
@pytest.mark.parametrize("mode", ["stream", "auto"])
def test_a_share_is_evicted_and_comes_back(checkpoints, mode):
    wanted = sample(*core(checkpoints, "flux", "cuda:0"))
    model, clip, _ = ours(checkpoints, "flux", ("cuda:0", "cuda:0,50%;cuda:1,50%"), mode=mode)
    assert torch.equal(sample(model, clip), wanted)
    (share,) = model.distribution.shares
    mm.free_memory(mm.get_free_memory(torch.device("cuda:1")) + share.loaded_size() // 2, torch.device("cuda:1"))
    assert share.loaded_size() < share.model_size()
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(type(share), "partially_load", lambda *arguments, **options: 0)
        assert torch.equal(sample(model, clip), wanted)
    assert torch.equal(sample(model, clip), wanted)
    assert share.loaded_size() == share.model_size()
    mm.unload_all_models()
    assert share.loaded_size() == 0
