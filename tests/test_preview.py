"""What a node shows before it runs: that it is what a load does, and that the route gives nothing else away."""

import http.client
import json
import random
import types
import urllib.parse
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import comfy.model_management
import comfy.sd1_clip
import comfy.utils
import gguf_files
import pytest
import torch
from comfy.ldm.flux.model import Flux
from comfy.taesd.taesd import TAESD
from conftest import ROOT
from placing import COMPUTE, DONOR, devices_known_to_comfyui, inference_mode  # noqa: F401
from safetensors.torch import load_file, save_file
from sampling import core_load
from serving import ACCELERATOR, DEVICES, NEWEST, prompt_for, start

from allocation_parser import parse_allocation
from distorch2 import machine, preview
from distorch2.comfyui import memory, without_memory
from distorch2.components import DIFFUSION_MODEL, TEXT_ENCODER
from distorch2.loading import distribute, distribute_clip, load_checkpoint, load_diffusion_model, load_text_encoder
from distorch2.moving import speed
from distorch2.moving.transfer import Timing
from distorch2.planning.plan import GIB, ComponentRequest, Plan, VirtualVram
from distorch2.report import rows_of_plan
from distorch2.serving.distribution import Distribution
from distorch2.serving.pace import Pace
from distorch2.weights.checkpoint_file import CheckpointError

NUM_REQUESTS = 10_000


def request(percent):
    text = f"{COMPUTE},{100 - percent}%;{DONOR},{percent}%" if percent else f"{COMPUTE},*"
    return ComponentRequest(COMPUTE, parse_allocation(text))


def shown(source, asked):
    return preview.preview_loader(source, asked, asked, COMPUTE)


def of_checkpoint(path, *settings):
    return preview.preview_loader(preview.checkpoint(path), *settings)


def parts_of(found, name):
    (component,) = (each for each in found["components"] if each["name"] == name)
    return [(part["device"], part["served"], part["layers"], part["bytes"]) for part in component["parts"]]


def parts_of_plan(plan):
    return [(row.device, row.served, row.num_layers, row.num_bytes) for row in rows_of_plan("", plan)]


@pytest.mark.parametrize("percent", [0, 25, 50, 90, 100])
def test_a_diffusion_model_lies_as_shown(checkpoints, percent):
    path = checkpoints("diffusion_only")
    found = shown(preview.diffusion_model(path), request(percent))
    model = load_diffusion_model(path, request(percent))
    assert parts_of(found, DIFFUSION_MODEL) == parts_of_plan(model.distribution.asked)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_a_diffusion_model_in_another_dtype_lies_as_shown(checkpoints, dtype):
    path = checkpoints("diffusion_only")
    found = shown(preview.diffusion_model(path, dtype), request(50))
    model = load_diffusion_model(path, request(50), model_options={"dtype": dtype})
    assert parts_of(found, DIFFUSION_MODEL) == parts_of_plan(model.distribution.asked)
    assert found["components"][0]["bytes"] < shown(preview.diffusion_model(path), request(50))["components"][0]["bytes"]


@pytest.mark.parametrize("percent", [0, 50, 100])
@pytest.mark.parametrize(("num_files", "clip_type"), [(1, "stable_diffusion"), (1, "sd3"), (2, "sd3")])
def test_a_text_encoder_of_files_of_its_own_lies_as_shown(checkpoints, num_files, clip_type, percent):
    files = (checkpoints("clip_l"),) * num_files
    found = shown(preview.text_encoder(files, clip_type), request(percent))
    clip = load_text_encoder(files, clip_type, request(percent))
    assert parts_of(found, TEXT_ENCODER) == parts_of_plan(clip.patcher.distribution.asked)
    comfy.model_management.load_models_gpu([clip.patcher])
    now = shown(preview.text_encoder(files, clip_type), request(percent))["components"][0]["now"]
    assert now == found["components"][0]["parts"]
    clip.patcher.detach()


def test_a_file_that_is_no_text_encoder_is_said(tmp_path):
    path = tmp_path / "t5.safetensors"
    save_file({"encoder.block.23.layer.1.DenseReluDense.wi_1.weight": torch.zeros(10240, 2)}, path)
    with pytest.raises(CheckpointError, match="no text encoder that ComfyUI"):
        shown(preview.text_encoder((str(path),), "flux"), request(0))


def test_a_text_encoder_of_another_size_is_said_before_and_in_the_run(checkpoints, tmp_path):
    path, state_dict = tmp_path / "clip_l.safetensors", load_file(checkpoints("clip_l"))
    name = next(name for name in state_dict if name.endswith("position_embedding.weight"))
    save_file({**state_dict, name: state_dict[name][:, :-1].contiguous()}, path)
    for fail in (
        lambda: shown(preview.text_encoder((str(path),), "sd3"), request(0)),
        lambda: load_text_encoder((str(path),), "sd3", request(0)),
    ):
        with pytest.raises(CheckpointError, match=r"clip_l\.safetensors: no text encoder that ComfyUI") as caught:
            fail()
        assert len(str(caught.value).splitlines()) == 1


class Drawing(torch.nn.Module):
    """Whose weights are drawn where models of ComfyUI draw theirs: PixArt, Cosmos, TripoSplat, layers of torch."""

    def __init__(self):
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(3, 4) / 2 + torch.rand(4))
        self.like = torch.nn.Parameter(torch.rand_like(torch.zeros(5)) + torch.zeros(5))
        self.layers = torch.nn.ModuleList([torch.nn.Linear(2, 3), torch.nn.Embedding(2, 3), torch.nn.Conv2d(1, 1, 1)])
        self.filled = torch.nn.Parameter(torch.empty(2).normal_())
        self.numbers = torch.randint(5, (2,)), torch.randperm(3)
        for fill in ("uniform_", "normal_", "trunc_normal_", "kaiming_normal_", "xavier_uniform_", "orthogonal_"):
            getattr(torch.nn.init, fill)(torch.empty(2, 2))
        torch.empty(2).exponential_()
        torch.rand(3, out=torch.empty(3))
        self.of_its_own_generator = torch.quasirandom.SobolEngine(3, scramble=True, seed=123).draw(4)


def test_nothing_is_drawn_from_the_random_numbers_of_a_prompt_beside_it():
    before = torch.get_rng_state()
    with without_memory._Undrawn():
        module = Drawing()
    assert torch.equal(torch.get_rng_state(), before)
    drawn = Drawing()
    assert not torch.equal(torch.get_rng_state(), before)
    shapes = [(tensor.shape, tensor.device) for tensor in drawn.parameters()]
    assert [(tensor.shape, tensor.device) for tensor in module.parameters()] == shapes
    assert torch.equal(module.of_its_own_generator, drawn.of_its_own_generator)


def test_a_prompt_beside_it_can_be_compiled():
    """Torch before 2.10 asks these globals, whatever thread it is in."""
    with without_memory._Undrawn():
        assert not torch.utils._python_dispatch.is_in_torch_dispatch_mode(include_infra_modes=False)
        assert torch.utils._python_dispatch.is_in_torch_dispatch_mode(include_infra_modes=True)


@pytest.mark.parametrize(
    ("drawing", "source"),
    [
        (Flux, lambda checkpoints: preview.checkpoint(checkpoints("flux"))),
        (comfy.sd1_clip.SDClipModel, lambda checkpoints: preview.checkpoint(checkpoints("sd3"))),
        (comfy.sd1_clip.SDClipModel, lambda checkpoints: preview.text_encoder((checkpoints("clip_l"),), "sd3")),
        (TAESD, lambda checkpoints: preview.checkpoint(checkpoints("sd3"))),
    ],
)
def test_a_preview_draws_no_random_numbers(checkpoints, monkeypatch, drawing, source):
    build, drawn = drawing.__init__, []

    def draw_and_build(*arguments, **options):
        drawn.append(torch.randn(3, device="cpu"))
        build(*arguments, **options)

    monkeypatch.setattr(drawing, "__init__", draw_and_build)
    preview._read.cache_clear()
    before = torch.get_rng_state()
    shown(source(checkpoints), request(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn


@pytest.mark.parametrize("is_dynamic", [False, True], ids=["", "DynamicVRAM"])
@pytest.mark.parametrize("has_metadata", [False, True])
@pytest.mark.parametrize("percent", [0, 50, 100])
def test_a_gguf_file_lies_as_shown(tmp_path, percent, has_metadata, is_dynamic, monkeypatch):
    """Newer versions of ComfyUI-GGUF read metadata, too. With DynamicVRAM it has ComfyUI keep tensors of the file."""

    def read(path):
        return (gguf_files.read(path), {"metadata": {}}) if has_metadata else gguf_files.read(path)

    path = gguf_files.write_flux(tmp_path / "flux.gguf", "Q8_0")
    loaders = types.ModuleType("loaders")
    loaders.gguf_sd_loader, loaders.GGMLOps = read, lambda: gguf_files.Layers
    # As on a GPU; in the file some are not.
    monkeypatch.setattr(comfy.model_management, "unet_dtype", lambda **arguments: torch.float16)
    if is_dynamic:
        gguf_files.load_for_dynamic_vram(monkeypatch)
    found = shown(preview.gguf_diffusion_model(path, loaders), request(percent))
    model = distribute(gguf_files.load(path, gguf_files.Layers), request(percent))
    assert parts_of(found, DIFFUSION_MODEL) == parts_of_plan(model.distribution.asked)


@pytest.mark.parametrize("part", [0, 0.01, 0.5])
def test_a_damaged_gguf_file_is_said(tmp_path, part):
    path = tmp_path / "flux.gguf"
    whole = Path(gguf_files.write_flux(path, "Q8_0")).read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    loaders = types.ModuleType("loaders")
    loaders.gguf_sd_loader = gguf_files.read
    with pytest.raises(CheckpointError, match=r"ComfyUI-GGUF cannot read .*flux\.gguf \("):
        shown(preview.gguf_diffusion_model(str(path), loaders), request(0))


@pytest.mark.parametrize("percent", [0, 25, 50, 90, 100])
def test_what_is_distributed_lies_as_shown(checkpoints, percent):
    path, asked = checkpoints("sd3"), request(percent)
    model, clip, _ = core_load(path)
    for component, patcher in (
        (DIFFUSION_MODEL, distribute(model, asked)),
        (TEXT_ENCODER, distribute_clip(clip, asked).patcher),
    ):
        found = preview.preview_component(preview.checkpoint(path), component, asked)
        assert parts_of(found, component) == parts_of_plan(patcher.distribution.asked)


def test_what_lies_where_now_is_shown_while_it_does(checkpoints):
    path, asked = checkpoints("sd3"), request(50)

    def now():
        found = of_checkpoint(path, asked, request(0), COMPUTE)
        return {component["name"]: component["now"] for component in found["components"]}

    assert {*now().values()} == {None}
    model, clip, _ = load_checkpoint(path, asked, request(0), COMPUTE)
    assert {*now().values()} == {None}  # nothing is on its devices before it runs
    comfy.model_management.load_models_gpu([model])
    found = of_checkpoint(path, asked, request(0), COMPUTE)["components"][0]
    assert found["now"] == found["parts"]
    assert now()[TEXT_ENCODER] is None
    elsewhere = replace(asked, compute_device=DONOR)  # as a copy for another device would be, this model is not shown
    assert of_checkpoint(path, elsewhere, request(0), COMPUTE)["components"][0]["now"] is None
    comfy.model_management.load_models_gpu([clip.patcher])
    assert now()[TEXT_ENCODER] is not None
    model.detach()
    clip.patcher.detach()
    distributed = distribute_clip(core_load(path)[1], asked)
    comfy.model_management.load_models_gpu([distributed.patcher])
    assert (now()[DIFFUSION_MODEL] is None, now()[TEXT_ENCODER] is None) == (True, False)
    distributed.patcher.detach()


def test_to_how_much_weights_are_packed_is_shown(checkpoints, monkeypatch):
    path, asked = checkpoints("flux"), replace(request(50), donor_mode="stream")
    model, *_ = load_checkpoint(path, asked, request(0), COMPUTE)
    comfy.model_management.load_models_gpu([model])
    monkeypatch.setattr(Distribution, "packed_part", 0.714)
    monkeypatch.setattr(Plan, "is_streamed_packed", lambda self, placement: self.how_served(placement) == "streamed")
    found = of_checkpoint(path, asked, request(0), COMPUTE)["components"][0]
    assert [part["served"] for part in found["now"]] == ["resident", "streamed, packed to 71%"]
    assert [part["served"] for part in found["parts"]] == ["resident", "streamed, packed"]
    model.detach()


def test_a_replaced_file_is_read_again(checkpoints, tmp_path):
    path = tmp_path / "model.safetensors"
    found = []
    for kind in ("sd3_no_clip_weights", "flux"):
        path.unlink(missing_ok=True)
        path.symlink_to(checkpoints(kind))
        found.append(of_checkpoint(str(path), request(0), request(0), COMPUTE)["components"][0]["bytes"])
    assert found[0] != found[1]


def test_layers_of_a_few_files_are_kept(checkpoints, tmp_path):
    for number in range(3 * preview._KEPT_READINGS):
        path = tmp_path / f"{number}.safetensors"
        path.symlink_to(checkpoints("sd3_no_clip_weights"))
        of_checkpoint(str(path), request(50), request(0), COMPUTE)
    assert preview._read.cache_info().currsize == preview._KEPT_READINGS


def test_a_component_that_is_not_there_is_said(checkpoints):
    with pytest.raises(CheckpointError, match="there is no text encoder in"):
        preview.preview_component(preview.checkpoint(checkpoints("flux")), TEXT_ENCODER, request(0))


def test_what_is_copied_and_read_and_does_not_fit_is_said(checkpoints, monkeypatch):
    whole = ComponentRequest(COMPUTE, VirtualVram(0.0, DONOR))
    asked = ComponentRequest(COMPUTE, parse_allocation(f"{COMPUTE},20%;{DONOR},30%;disk,50%"), "stream")
    found = of_checkpoint(checkpoints("flux"), asked, whole, COMPUTE)
    model = found["components"][0]
    assert 0.25 * model["bytes"] < model["copied"] < 0.35 * model["bytes"]
    assert 0.45 * model["bytes"] < model["read"] < 0.55 * model["bytes"]
    monkeypatch.setattr("distorch2.comfyui.core.spare_host_memory", lambda: 2**20)
    asked = ComponentRequest(DONOR, parse_allocation(f"{DONOR},20%;cpu,*"))
    found = of_checkpoint(checkpoints("flux"), asked, whole, COMPUTE)
    assert any("main memory has room for 1.0 MiB" in warning for warning in found["warnings"])


def test_how_long_copies_take_is_said_where_it_can_be_known(checkpoints, monkeypatch):
    path, asked = checkpoints("flux"), ComponentRequest(COMPUTE, parse_allocation(f"{DONOR},10%;cpu,*"), "stream")
    asked = replace(asked, compute_device=DONOR)

    def times(may_measure=True):
        model = of_checkpoint(path, asked, request(0), COMPUTE, may_measure)["components"][0]
        return model["copying_s"], model["computing_s"], model["copied"], model["hidden"]

    monkeypatch.setattr(type(preview.COMFYUI), "can_pin_for", lambda *arguments: False)
    assert times()[:2] == (None, None)
    monkeypatch.setattr(type(preview.COMFYUI), "can_pin_for", lambda *arguments: True)
    known = {}
    monkeypatch.setattr(machine, "_known", lambda: known)
    monkeypatch.setattr(machine, "_write", lambda known: None)
    monkeypatch.setattr(speed, "link_bytes_per_second", lambda source, target: 1e6)
    assert times(may_measure=False)[0] is None
    with monkeypatch.context() as patches:
        patches.setattr(preview, "is_started", lambda device: False)
        assert times()[0] is None  # a preview does not begin to use a card
    copying, computing, copied, hidden = times()
    assert (copying, computing, hidden) == (pytest.approx(copied / 1e6, rel=0.01), None, None)
    assert times(may_measure=False)[0] == copying  # known from then on
    model, *_ = load_checkpoint(path, asked, request(0), COMPUTE)
    comfy.model_management.load_models_gpu([model])
    monkeypatch.setattr(Pace, "computing_seconds", lambda self: 0.25)
    assert times()[1::2] == (0.25, 250_000)
    model.detach()


def test_what_a_pass_computes_is_timed_apart_from_waiting():
    class Event:
        def __init__(self, milliseconds):
            self.milliseconds = milliseconds

        def query(self):
            return True

        def elapsed_time(self, later):
            return later.milliseconds - self.milliseconds

    timing = Timing([(Event(10), Event(40)), (Event(50), Event(60))])
    assert timing.computing_seconds() is None
    timing.whole = Event(0), Event(100)
    assert timing.computing_seconds() == pytest.approx(0.06)
    assert timing.waiting_part() == pytest.approx(0.4)


def test_comfyui_is_told_how_far_placing_is(checkpoints, monkeypatch):
    told = []
    hook = lambda value, total, preview, node_id=None: told.append((value, total))  # noqa: E731
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    model, *_ = load_checkpoint(checkpoints("flux"), request(90), request(0), COMPUTE)
    comfy.model_management.load_models_gpu([model])
    number = len(model.distribution.groups)
    assert told[0] == (1, number)
    assert told[-1] == (number, number)
    told.clear()
    comfy.model_management.load_models_gpu([model])
    assert not told
    model.detach()


def test_a_gpu_that_this_process_does_not_use_is_not_asked(monkeypatch):
    """To ask it would take some hundred MiB of it."""

    def refused(*arguments):
        raise AssertionError("asked")

    monkeypatch.setattr(memory.mm, "get_all_torch_devices", lambda: [torch.device("cuda:1")])
    monkeypatch.setattr(memory.mm, "get_free_memory", refused)
    monkeypatch.setattr(memory, "is_started", lambda device: False)
    properties = types.SimpleNamespace(total_memory=8 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    asked = ComponentRequest("cpu", VirtualVram(1.0, "cuda:1"), "stream")
    found = memory.memory_of([asked], may_start=False)["cuda:1"]
    assert found.total_bytes == 8 * GIB
    assert 7 * GIB < found.free_bytes < 8 * GIB


# --- the route, on a real server


@pytest.fixture(scope="module")
def server(checkpoints, tmp_path_factory):
    base = tmp_path_factory.mktemp("comfyui")
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "opened_files").symlink_to(ROOT / "tests" / "opened_files")
    (base / "models" / "diffusion_models").mkdir(parents=True)
    (base / "models" / "diffusion_models" / "model.safetensors").symlink_to(checkpoints("diffusion_only"))
    with start(NEWEST, base, checkpoints) as running:
        yield running


def ask(server, widgets):
    """(HTTP status, what is answered)."""
    address = urllib.parse.urlsplit(server.url)
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    connection.request("GET", "/distorch2/preview?" + urllib.parse.urlencode(widgets))
    answer = connection.getresponse()
    found = answer.status, json.loads(answer.read())
    connection.close()
    return found


def widgets_of(checkpoint="sd3.safetensors", **widgets):
    given = {
        "ckpt_name": checkpoint,
        "unet_compute_device": ACCELERATOR,
        "unet_virtual_vram_gb": "0.001",
        "unet_donor_device": "cpu",
        "clip_compute_device": "cpu",
        "clip_virtual_vram_gb": "0",
        "clip_donor_device": "cpu",
        "vae_device": ACCELERATOR,
        "unet_expert_mode_allocations": "",
        "clip_expert_mode_allocations": "",
        "donor_mode": "auto",
        "pack_weights": "auto",
    }
    return {**given, **widgets}


def test_the_route_shows_what_the_log_says_of_the_load(server):
    widgets = widgets_of(unet_expert_mode_allocations=f"{ACCELERATOR},40%;disk,60%", clip_compute_device=ACCELERATOR)
    status, found = ask(server, widgets)
    assert status == 200
    log_before = server.log
    chosen = {name: float(value) if name.endswith("_gb") else value for name, value in widgets.items()}
    server.run(prompt_for(server, chosen.pop("ckpt_name"), **chosen))
    table = server.log[len(log_before) :].partition("DisTorch2: ")[2]
    rows = [" ".join(line.split()) for line in table.splitlines()]
    for component in found["components"]:
        for part in component["parts"]:
            row = f"{component['name']} {part['device']} {part['served']} {part['layers']} "
            assert any(line.startswith(row) for line in rows), (row, rows)


@pytest.mark.parametrize(
    ("changes", "name", "text"),
    [
        (
            {"ckpt_name": "../../x.safetensors"},
            "ckpt_name",
            "there is no '../../x.safetensors' in the list of checkpoints",
        ),
        ({"unet_expert_mode_allocations": "cpu,2q"}, "unet_expert_mode_allocations", "unknown unit 'q'"),
        ({"clip_expert_mode_allocations": "cpu"}, "clip_expert_mode_allocations", "cpu"),
        ({"unet_virtual_vram_gb": "much"}, "unet_virtual_vram_gb", "unet_virtual_vram_gb is 'much'; use a number"),
        ({"unet_virtual_vram_gb": "-1"}, "", "use 0 or more"),
        ({"unet_compute_device": "cuda:77"}, "unet_compute_device", "unet_compute_device is 'cuda:77'; use cpu"),
        ({"clip_donor_device": "cuda:77"}, "clip_donor_device", f"use {', '.join(DEVICES)}, disk"),
        ({"vae_device": "disk"}, "vae_device", "vae_device is 'disk'; use cpu"),
        ({"donor_mode": "fast"}, "", "donor mode is 'fast'; use auto, stream, relay"),
    ],
)
def test_mistakes_are_said_with_the_name_of_the_input(server, changes, name, text):
    status, found = ask(server, widgets_of(**changes))
    assert (status, found["input"]) == (400, name)
    assert text in found["error"]


def test_one_component(server):
    of_one = {"compute_device": "cpu", "virtual_vram_gb": "0", "donor_device": "cpu"}
    whole = {"ckpt_name": "sd3.safetensors"}
    alone = {"unet_name": "model.safetensors"}
    text = {"clip_name1": "clip_l.safetensors", "clip_name2": "clip_l.safetensors", "type": "sd3"}
    given = {"component": "diffusion model"}
    for asked, names in (
        (whole, ["diffusion model", "text encoder", "VAE"]),
        (whole | given, ["diffusion model"]),
        (whole | {"component": "text encoder"}, ["text encoder"]),
        (alone, ["diffusion model"]),
        (alone | given, ["diffusion model"]),
        (alone | {"weight_dtype": "fp8_e4m3fn_fast"}, ["diffusion model"]),
        (text, ["text encoder"]),
        (text | {"component": "text encoder"}, ["text encoder"]),
    ):
        status, found = ask(server, of_one | asked)
        assert status == 200
        assert [each["name"] for each in found["components"]] == names
    for asked, mistake in (
        (whole | {"component": "vae"}, "component is 'vae'"),
        (text | given, "there is no diffusion model in"),
        (text | {"clip_name2": "x.gguf"}, "there is no 'x.gguf' in the list of text_encoders"),
        (alone | {"weight_dtype": "fp4"}, "weight_dtype is 'fp4'; use default, fp8_e4m3fn"),
        ({"unet_name": "x.gguf"}, "there is no 'x.gguf' in the list of unet_gguf"),
    ):
        status, found = ask(server, of_one | asked)
        assert (status, mistake in found["error"]) == (400, True), found


FILES = [f"{kind}.safetensors" for kind in ("sd3", "sd3_fp8", "sd3_no_clip_weights", "sd15_blocks", "flux")]
NAMES = [*FILES, "x.safetensors", "../checkpoints/sd3.safetensors", "/etc/passwd", "sd15_ckpt.ckpt", "\0", ""]
TEXTS = ["", "cpu,*", f"{ACCELERATOR},50%;cpu,*", "cpu,1gb;disk,*", "cpu,2q", ";;", "cuda:9,1%", "a" * 3000, "ü,1%"]
VALUES = {
    "name": NAMES,
    "allocations": [*TEXTS, "cpu,*;cpu,*", "auto", "auto;keep=1gb", "auto;keep="],
    "gb": ["0", "4", "-1", "nan", "inf", "1e400", "", "x", "0x10", "9" * 400],
    "device": [*DEVICES, "disk", "cuda:99", "mps", "", "cpu:0", "../x", "%00"],
    "mode": ["auto", "relay", "x"],
    "weights": ["on", ""],
    "dtype": ["default", "fp8_e5m2", "int8", ""],
    "type": ["sd3", "flux", "wan", "x", ""],
}
"""By the end of the input's name."""


def random_widgets(rng):
    """The right inputs, of which some are changed, missing, or of another node."""
    widgets = widgets_of(rng.choice(FILES))
    if rng.random() < 0.4:
        names = rng.choice([["ckpt_name"], ["unet_name"], ["clip_name"], ["clip_name1", "clip_name2"]])
        files = [*NAMES, "model.safetensors", "x.gguf", *["clip_l.safetensors"] * 9]
        widgets = {name: rng.choice(files) for name in names}
        widgets |= rng.choice([{}, {"type": "sd3"}, {"weight_dtype": "fp8_e4m3fn"}])
        widgets |= {"compute_device": "cpu", "virtual_vram_gb": "1", "donor_device": "cpu"}
        if rng.random() < 0.5:
            widgets["component"] = rng.choice(["diffusion model", "text encoder", "VAE", ""])
    for name in rng.sample([*widgets], rng.randrange(4)):
        widgets[name] = rng.choice(next((values for end, values in VALUES.items() if name.endswith(end)), ["x"]))
        if rng.random() < 0.1:
            del widgets[name]
    return widgets


def test_no_request_fails_or_reads_another_file(server):
    rng = random.Random(25)
    address = urllib.parse.urlsplit(server.url)
    server.get("/opened_files")
    statuses = {}

    def send(requests):
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
        for widgets in requests:
            connection.request("GET", "/distorch2/preview?" + urllib.parse.urlencode(widgets))
            answer = connection.getresponse()
            answer.read()
            statuses.setdefault(answer.status, widgets)
            if answer.status not in (200, 400):
                break
        connection.close()

    requests = [random_widgets(rng) for _ in range(NUM_REQUESTS)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(send, [requests[number::4] for number in range(4)]))
    assert {*statuses} == {200, 400}, statuses
    models = Path(server.base, "models")
    folders = "checkpoints", "diffusion_models", "text_encoders"
    listed = {str(path) for folder in folders for path in (models / folder).iterdir()}
    opened = server.get("/opened_files")
    assert any(path in listed for path in opened)
    assert {path for path in opened if path.endswith((".safetensors", ".ckpt", "passwd"))} <= listed


def test_one_preview_at_a_time_is_made_beside_the_servers_loop(server):
    """All of 80 are answered, or refused while others wait; another route is not kept waiting."""
    with ThreadPoolExecutor(40) as pool:
        answers = [pool.submit(ask, server, widgets_of("flux.safetensors", vae_device="cpu")) for _ in range(80)]
        server.get("/system_stats")
        statuses = Counter(answer.result()[0] for answer in answers)
    assert {*statuses} == {200, 429}, statuses
    assert ask(server, widgets_of("flux.safetensors", vae_device="cpu"))[0] == 200
