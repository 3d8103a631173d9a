"""In process, on small real checkpoints, against ComfyUI's own loader."""

import gc
import weakref

import comfy.model_management as mm
import comfy.utils
import pytest
import torch
from sampling import core_load, sample

import distorch2.loading as loading
from allocation_parser import parse_allocation
from distorch2.components import reload_component
from distorch2.loading import load_checkpoint, load_components
from distorch2.planning.plan import GIB, ComponentRequest, DeviceMemory, PlanError, VirtualVram
from distorch2.planning.planner import make_plan
from distorch2.weights.checkpoint_file import CheckpointError
from distorch2.weights.inventory import list_layers

DEVICE = str(mm.get_torch_device())
RESIDENT = ComponentRequest(DEVICE, VirtualVram(0.0, "cpu"))
# One file for each thing that loads differently.
KINDS = [
    "sd3",  # with text encoder and VAE
    "sd3_no_clip_weights",
    "sd3_no_vae",
    "sd3_only_model_prefix",  # neither text encoder nor VAE
    "sd3_fp8",
    "sd3_fp8_scaled",
    "sd15_blocks",
    "sd15_ckpt",  # torch.save
    "sdxl_v_pred",  # a key at the root decides the prediction type
    "flux",
    "diffusion_only",  # no prefix: not a checkpoint to ComfyUI
]


@pytest.fixture(autouse=True)
def inference_mode():
    with torch.inference_mode():
        yield


def load(path, unet=RESIDENT, clip=RESIDENT, vae_device=DEVICE, **options):
    return load_checkpoint(path, unet, clip, vae_device, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.quick("sd3")
def test_latents_and_image_equal_those_of_comfyuis_loader(checkpoints, kind):
    core_model, core_clip, core_vae = core_load(checkpoints(kind))
    expected = sample(core_model, core_clip)
    model, clip, vae = load(checkpoints(kind))
    assert (clip is None) == (core_clip is None)
    assert type(model.model) is type(core_model.model)
    assert model.model.model_type == core_model.model.model_type
    assert torch.equal(sample(model, clip), expected)
    if core_vae.first_stage_model is not None:
        assert torch.equal(vae.decode(expected), core_vae.decode(expected))
    else:
        with pytest.raises(RuntimeError, match="VAE is invalid"):
            vae.throw_exception_if_invalid()


@pytest.mark.parametrize("kind", KINDS)
def test_the_inventory_holds_every_byte_that_comfyui_counts(checkpoints, kind):
    model, clip, _ = load(checkpoints(kind))
    patchers = [model] if clip is None else [model, clip.patcher]
    for patcher in patchers:
        # ComfyUI does not count buffers that are not saved, in SDXL those of the size embedding.
        unsaved = sum(
            module.get_buffer(name).nbytes
            for module in patcher.model.modules()
            for name in module._non_persistent_buffers_set
        )
        # It counts the format markers that quantised layers only make up when they are saved.
        markers = sum(t.nbytes for name, t in patcher.model.state_dict().items() if name.endswith(".comfy_quant"))
        expected = mm.module_size(patcher.model) + unsaved - markers
        assert sum(layer.num_bytes for layer in list_layers(patcher.model)) == expected


# Of models with many layers, the largest of them a few percent: else any plan would do.
@pytest.mark.parametrize("kind", ["flux", "sd15_blocks"])
def test_plans_of_real_models_conserve_bytes_and_keep_to_what_was_asked(checkpoints, kind):
    layers = list_layers(load(checkpoints(kind))[0].model)
    model_bytes = sum(layer.num_bytes for layer in layers)
    fixed_bytes = sum(layer.num_bytes for layer in layers if not layer.movable)
    largest = max(layer.num_bytes for layer in layers)
    memory = dict.fromkeys(("cpu", "cuda:0", "cuda:1"), DeviceMemory(model_bytes))
    for text in ("cuda:0,50%;cpu,50%", "cuda:0,1mb;cpu,*", "cpu,100%", "cuda:0,20%;cuda:1,30%;cpu,*", "cuda:0,0.5"):
        allocation = parse_allocation(text)
        plan = make_plan(layers, ComponentRequest("cuda:0", allocation), memory)
        assert [placement.layer for placement in plan.placements] == layers
        assert sum(plan.bytes_on(device) for device in plan.devices) == model_bytes
        for device, asked in allocation.shares(model_bytes, "cuda:0", dict.fromkeys(memory, model_bytes)):
            assert abs(plan.bytes_on(device) - asked) < largest + fixed_bytes, text


def test_twelve_equal_blocks_are_listed_with_their_bytes(checkpoints):
    layers = list_layers(load(checkpoints("sd15_blocks"))[0].model)
    blocks = {}
    for layer in layers:
        head, separator, tail = layer.name.partition("transformer_blocks.")
        if separator:
            name = head + tail.split(".")[0]
            blocks[name] = blocks.get(name, 0) + layer.num_bytes
    # 2,340,160 parameters of 4 bytes each on the CPU, half as many bytes where fp16 is used.
    assert set(blocks.values()) == {2_340_160 * (4 if DEVICE == "cpu" else 2)}
    assert len(blocks) == 12


def test_the_file_is_read_once(checkpoints, monkeypatch):
    opened = []
    read = comfy.utils.load_torch_file
    monkeypatch.setattr(
        comfy.utils, "load_torch_file", lambda path, *a, **k: opened.append(path) or read(path, *a, **k)
    )
    load(checkpoints("sd3"))
    assert opened == [checkpoints("sd3")]


@pytest.mark.skipif(DEVICE != "cpu", reason="names devices that are not there; with a real one, ComfyUI asks for them")
def test_every_component_gets_its_device(checkpoints, monkeypatch):
    """On three devices that this machine does not have: nothing moves there before it is used."""
    devices = ("cuda:5", "cuda:6", "cuda:7")
    memory = dict.fromkeys(("cpu", *devices), DeviceMemory(GIB))
    monkeypatch.setattr(loading, "memory_of", lambda computing, keeping: memory)
    monkeypatch.setattr(mm, "vae_offload_device", lambda: torch.device("cuda", 4))  # as with --gpu-only
    unet, clip = (ComponentRequest(device, VirtualVram(0.0, "cpu")) for device in devices[:2])
    model, clip, vae = load(checkpoints("sd3"), unet, clip, devices[2])
    patchers = (model, clip.patcher, vae.patcher)
    assert [str(patcher.load_device) for patcher in patchers] == list(devices)
    assert [str(patcher.offload_device) for patcher in patchers] == ["cpu"] * 3


@pytest.mark.skipif(DEVICE != "cpu", reason="names devices that are not there; with a real one, ComfyUI asks for them")
@pytest.mark.parametrize(("kind", "component"), [("flux", "model"), ("sd3", "clip"), ("sd15_blocks", "clip")])
def test_what_an_accelerator_computes_with_is_built_of_the_files_own_memory(checkpoints, kind, component, monkeypatch):
    file_tensors = {}
    read = comfy.utils.load_torch_file

    def reading(*arguments, **options):
        state_dict, metadata = read(*arguments, **options)
        file_tensors.update(state_dict)
        return state_dict, metadata

    monkeypatch.setattr(comfy.utils, "load_torch_file", reading)
    monkeypatch.setattr(loading, "memory_of", lambda *_: dict.fromkeys(("cpu", "cuda:5"), DeviceMemory(GIB)))
    monkeypatch.setattr(mm, "unet_dtype", lambda *_, **options: options["weight_dtype"])  # as on a GPU
    request = ComponentRequest("cuda:5", VirtualVram(0.0, "cpu"))
    model, clip, _ = load(checkpoints(kind), request, request)
    weights = (model.model if component == "model" else clip.cond_stage_model).state_dict()
    addresses = {tensor.data_ptr() for tensor in file_tensors.values()}
    elsewhere = {name for name, tensor in weights.items() if tensor.data_ptr() not in addresses}
    # Files lack these, or may do so.
    assert elsewhere <= {
        "model_sampling.sigmas",
        "clip_l.logit_scale",
        "clip_l.transformer.text_projection.weight",
    }
    assert len(weights) > len(elsewhere)


@pytest.mark.gpu
def test_the_components_lie_on_different_devices(checkpoints):
    clip_request = ComponentRequest("cpu", VirtualVram(2.0, "cpu"))
    model, clip, vae = load(checkpoints("sd3"), clip=clip_request, vae_device="cpu")
    latents = sample(model, clip)
    assert {parameter.device for parameter in model.model.parameters()} == {torch.device(DEVICE)}
    assert {parameter.device for parameter in clip.cond_stage_model.parameters()} == {torch.device("cpu")}
    assert torch.isfinite(vae.decode(latents)).all()
    assert {parameter.device for parameter in vae.first_stage_model.parameters()} == {torch.device("cpu")}


@pytest.mark.gpu
def test_the_diffusion_model_computes_on_the_cpu_beside_a_gpu(checkpoints):
    request = ComponentRequest("cpu", parse_allocation("cpu,*"))
    model, clip, _ = load(checkpoints("sd3"), unet=request)
    sample(model, clip)
    assert {parameter.device for parameter in model.model.parameters()} == {torch.device("cpu")}


@pytest.mark.parametrize("kind", ["sd3", "sdxl_v_pred", "sd3_fp8_scaled"])
def test_the_diffusion_model_is_not_built_on_a_gpu_that_it_was_not_meant_for(checkpoints, kind, monkeypatch):
    """ComfyUI builds it on its default GPU when that has more free memory than the host, whatever device was asked."""
    expected = sample(*load(checkpoints(kind))[:2])
    monkeypatch.setattr(mm, "unet_inital_load_device", lambda parameters, dtype: torch.device("cuda", 7))
    model, clip, _ = load(checkpoints(kind))
    assert torch.equal(sample(model, clip), expected)


def test_the_report_lists_every_component(checkpoints):
    report = load_components(checkpoints("sd15_blocks"), RESIDENT, RESIDENT, DEVICE).report.splitlines()
    assert report[0] == "DisTorch2: sd15_blocks.safetensors"
    assert [line.split("  ")[1] for line in report[2:]] == ["diffusion model", "text encoder", "VAE"]
    report = load_components(checkpoints("sd3_only_model_prefix"), RESIDENT, RESIDENT, DEVICE).report
    assert "note: no text encoder in this file\n  note: no VAE in this file" in report


def test_a_missing_device_is_refused_before_the_file_is_read(tmp_path):
    for unet, vae_device in (
        (ComponentRequest("cuda:63", VirtualVram(0.0, "cpu")), DEVICE),
        (ComponentRequest(DEVICE, VirtualVram(0.0, "xpu:5")), DEVICE),
        (ComponentRequest(DEVICE, parse_allocation("cpu,50%;npu:1,50%")), DEVICE),
        (RESIDENT, "mlu:3"),
    ):
        with pytest.raises(PlanError, match=r"there is no device '.*'; this machine has cpu"):
            load(str(tmp_path / "missing.safetensors"), unet=unet, vae_device=vae_device)


class Live:
    """Weak references to what a load makes, and ComfyUI's list of loaded models before it."""

    def __init__(self, monkeypatch):
        self.references = []
        self.loaded_before = list(mm.current_loaded_models)
        for name in ("load_model_and_clip", "load_vae", "read"):
            monkeypatch.setattr(loading, name, self._remembering(getattr(loading, name)))

    def _remembering(self, function):
        def wrapper(*arguments, **options):
            result = function(*arguments, **options)
            parts = result if isinstance(result, tuple) else (result,)
            self.references += [weakref.ref(part) for part in parts if part is not None]
            self.references += [weakref.ref(part.model) for part in parts if hasattr(part, "model")]
            self.references += [
                weakref.ref(part.cond_stage_model) for part in parts if hasattr(part, "cond_stage_model")
            ]
            return result

        return wrapper

    def check_nothing_is_left(self):
        gc.collect()
        assert self.references
        assert [reference for reference in self.references if reference() is not None] == []
        assert [loaded for loaded in mm.current_loaded_models if loaded not in self.loaded_before] == []


@pytest.mark.parametrize("call", range(1, 5))
def test_an_interrupt_while_loading_leaves_nothing_behind(checkpoints, monkeypatch, call):
    """Interrupted at each of the four places where a load asks whether it was."""
    live = Live(monkeypatch)
    calls = []
    interrupted = mm.throw_exception_if_processing_interrupted

    def interrupt_at_the_nth_call():
        calls.append(None)
        if len(calls) == call:
            mm.interrupt_current_processing()
        interrupted()

    monkeypatch.setattr(mm, "throw_exception_if_processing_interrupted", interrupt_at_the_nth_call)
    with pytest.raises(mm.InterruptProcessingException):
        load(checkpoints("sd3"))
    if call > 2:  # before, nothing was made that could be left
        live.check_nothing_is_left()
    monkeypatch.undo()
    sample(*load(checkpoints("sd3"))[:2])


@pytest.mark.parametrize("step", ["load_model_and_clip", "make_plans", "list_layers"])
@pytest.mark.quick
def test_a_failure_while_loading_leaves_nothing_behind(checkpoints, monkeypatch, step):
    live = Live(monkeypatch)

    def fail(*_arguments):
        raise MemoryError("planted")

    monkeypatch.setattr(loading, step, fail)
    with pytest.raises(MemoryError, match="planted"):
        load(checkpoints("sd3"))
    live.check_nothing_is_left()


def test_a_dropped_checkpoint_is_let_go(checkpoints, monkeypatch):
    live = Live(monkeypatch)
    load(checkpoints("sd3"))
    live.check_nothing_is_left()


def test_a_file_that_is_no_checkpoint_is_refused(checkpoints):
    with pytest.raises(CheckpointError, match="is not a checkpoint that ComfyUI .* knows; a LoRA, ControlNet"):
        load(checkpoints("clip_l"))


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04" + b"\0" * 100])
def test_a_damaged_ckpt_is_refused(tmp_path, content):
    path = tmp_path / "damaged.ckpt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="cannot read .*damaged.ckpt .*download it again"):
        load(str(path))


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        {"state_dict": [torch.zeros(1)]},
        {},
        {"a": 1, "b": 2},
        {"epoch": 3, "weight": torch.zeros(1)},
        {"model": {"x": torch.zeros(1)}, "x": torch.zeros(1)},
        {1: torch.zeros(1), 2: torch.zeros(1)},
    ],
)
def test_a_ckpt_without_weights_is_refused(tmp_path, content):
    path = tmp_path / "other.ckpt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"other\.ckpt is not a checkpoint"):
        load(str(path))


def test_a_truncated_ckpt_is_refused(checkpoints, tmp_path):
    path = tmp_path / "cut.ckpt"
    with open(checkpoints("sd15_ckpt"), "rb") as whole:
        path.write_bytes(whole.read(10_000_000))
    with pytest.raises(CheckpointError, match="cannot read .*cut.ckpt"):
        load(str(path))


def test_eject_models_unloads_the_others_from_the_compute_device(checkpoints):
    other = load(checkpoints("sd15_ckpt"))[0]
    sample(other, None)
    loaded = [entry.model for entry in mm.current_loaded_models]
    assert any(patcher is other for patcher in loaded)
    load(checkpoints("flux"), eject_models=False)
    assert any(entry.model is other for entry in mm.current_loaded_models)
    load(checkpoints("flux"), eject_models=True)
    assert not any(entry.model is other for entry in mm.current_loaded_models)


@pytest.mark.parametrize("component", ["diffusion model", "text encoder", "VAE"])
def test_comfyui_can_load_a_component_again(checkpoints, component):
    """It does so to clone a patcher for another device, and to get one without DynamicVRAM."""
    model, clip, vae = load(checkpoints("sd3"))
    patcher = {"diffusion model": model, "text encoder": clip.patcher, "VAE": vae.patcher}[component]
    factory, arguments = patcher.cached_patcher_init
    assert factory is reload_component
    again = factory(*arguments, disable_dynamic=True)
    assert again.model is not patcher.model
    assert again.load_device == patcher.load_device
    ours, theirs = patcher.model.state_dict(), again.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name].cpu(), theirs[name].cpu()) for name in ours)
