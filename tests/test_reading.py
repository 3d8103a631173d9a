"""Layers whose weights the module around them reads, without calling the layer."""

import copy
import gc
import json
import weakref

import comfy.model_management as mm
import comfy.ops
import comfy.quant_ops
import pytest
import safetensors.torch
import torch
from checkpoints import MODEL, minimax_h3
from placing import (
    COMPUTE,
    DONOR,
    RESIDENT,
    devices_known_to_comfyui,  # noqa: F401
    inference_mode,  # noqa: F401
    lora_for,
    on_donor,
    partly_on_donor,
)
from sampling import core_load

from distorch2.comfyui.program import COMFYUI
from distorch2.loading import load_checkpoint
from distorch2.planning.plan import Placement, Plan
from distorch2.serving.distribution import Distribution
from distorch2.serving.forwards import Forwards, set_by
from distorch2.serving.reading import modules_around
from distorch2.weights.inventory import list_layers

try:
    import comfy.ldm.minimax.model
except ImportError:
    pytest.skip("this ComfyUI has no MiniMax-H3, whose modules read weights", allow_module_level=True)

# ComfyUI's name of a format -> its class of weights, with what `QuantizedTensor.from_float` and the marker are told.
FORMATS = {
    "int8_tensorwise": ({}, {}),
    "int8_tensorwise convrot": (
        {"per_channel": True, "convrot": True, "convrot_groupsize": 64},
        {"convrot": True, "convrot_groupsize": 64},
    ),
    "nvfp4": ({"scale": "recalculate"}, {}),
    "mxfp8": ({}, {}),
    "convrot_w4a4": ({"convrot_groupsize": 64}, {"convrot_groupsize": 64}),
    "asym_w4a8_int8": ({"convrot_groupsize": 64}, {"convrot_groupsize": 64}),
}
FORMATS = {name: each for name, each in FORMATS.items() if name.partition(" ")[0] in comfy.quant_ops.QUANT_ALGOS}
READ_BY_FORMAT = {name: "mlp.fc2" for name in FORMATS if name.startswith("int8")}
"""The layer that ComfyUI computes together with the activation in front of it."""


def output(patcher):
    """Of one forward of the diffusion model."""
    mm.load_models_gpu([patcher])
    generator = torch.Generator().manual_seed(1)
    shapes = ((1, 24, 2, 4, 4), (1, 32, 2, 5), (1, 7, 256))
    dtype = patcher.model.get_dtype_inference()
    video, audio, text = (torch.randn(shape, generator=generator).to(patcher.load_device, dtype) for shape in shapes)
    timestep = torch.tensor([500.0], device=patcher.load_device)
    return [part.cpu() for part in patcher.model.diffusion_model([video, audio], timestep, text)]


def same(one, other):
    return all(map(torch.equal, one, other))


def file_in(format_name, folder):
    """A MiniMax-H3 whose linear layers in blocks are quantised by ComfyUI's own classes."""
    name = format_name.partition(" ")[0]
    options, marker = FORMATS[format_name]
    layout = comfy.quant_ops.QUANT_ALGOS[name]["comfy_tensor_layout"]
    tensors = minimax_h3().draw(0, torch.bfloat16, prefix=MODEL)
    for key, weight in list(tensors.items()):
        if key.endswith(".weight") and weight.dim() == 2 and ".blocks." in key and "adaln" not in key:
            layer = key.removesuffix(".weight")
            quantised = comfy.quant_ops.QuantizedTensor.from_float(weight, layout, **options)
            del tensors[key]
            tensors |= {f"{layer}.weight{suffix}": part.contiguous() for suffix, part in quantised.state_dict().items()}
            text = json.dumps({"format": name, **marker}).encode()
            tensors[f"{layer}.comfy_quant"] = torch.tensor([*text], dtype=torch.uint8)
    path = folder / "minimax.safetensors"
    safetensors.torch.save_file(tensors, path)
    return str(path)


def groups_of(model):
    return [group for group in model.distribution.plan.groups if group.is_streamed]


@pytest.mark.quick("int8_tensorwise-100")
@pytest.mark.parametrize("percent", [50, 100])
@pytest.mark.parametrize("format_name", FORMATS)
def test_every_format_gives_comfyuis_bits_and_every_group_is_copied_once_a_pass(format_name, percent, tmp_path):
    path = file_in(format_name, tmp_path)
    core = core_load(path)[0]
    expected = output(core)
    assert any(comfy.quant_ops.QuantizedTensor is type(p) for p in core.model.diffusion_model.parameters())
    model = load_checkpoint(path, partly_on_donor(percent), RESIDENT, COMPUTE)[0]
    for _ in range(5):
        assert same(output(model), expected)
    copies = model.distribution.transfer.copies
    for _ in range(3):
        assert same(output(model), expected)
    assert groups_of(model)
    assert model.distribution.transfer.copies - copies == 3 * len(groups_of(model))

    only_read = {name.partition("blocks.0.")[2] for name in model.distribution.reading.only_read if "ks.0." in name}
    if percent == 100:  # small layers are streamed too
        assert only_read == {"attn.q_norm", "attn.k_norm", *filter(None, [READ_BY_FORMAT.get(format_name)])}


@pytest.mark.parametrize("is_unloaded", [False, True])
@pytest.mark.parametrize("percent", [50, 100])
def test_once_it_is_known_nothing_is_read_from_a_donor(checkpoints, percent, is_unloaded, monkeypatch):
    """A text encoder may be unloaded after every pass."""
    model = on_donor(checkpoints, "minimax_h3_int8", percent)[0]
    for _ in range(1 if is_unloaded else 3):
        output(model)
    if is_unloaded:
        mm.unload_all_models()
        mm.load_models_gpu([model])
    read, cast = [], comfy.ops.cast_bias_weight

    def watched(layer, *arguments, **options):
        read.append((layer.weight.device, type(layer._parameters)))
        return cast(layer, *arguments, **options)

    monkeypatch.setattr(comfy.ops, "cast_bias_weight", watched)
    output(model)
    assert len(read) == 40
    assert {device for device, _ in read} == {torch.device(COMPUTE)}
    assert is_unloaded or {kind for _, kind in read} == {dict}


def test_what_is_noted_is_kept_while_forwards_are_taken_back(checkpoints):
    """As for object patches, before every prompt: a prompt may be shorter than it takes to learn."""
    model = on_donor(checkpoints, "minimax_h3_int8", 100)[0]
    for _ in range(5):
        output(model)
        with model.distribution.unserved():
            assert all(type(module._parameters) is dict for module in model.model.modules())
    assert len(model.distribution.reading.only_read) == 10


@pytest.mark.parametrize("raised", [KeyboardInterrupt, mm.InterruptProcessingException])
@pytest.mark.parametrize("where", ["mlp.fc1", "mlp.fc2"])
def test_whatever_is_raised_while_they_are_bound_leaves_every_parameter_where_it_was(
    checkpoints, raised, where, monkeypatch
):
    model = on_donor(checkpoints, "minimax_h3_int8", 100)[0]
    expected = [output(model) for _ in range(3)][-1]
    module = model.model.diffusion_model
    before = dict(module.named_parameters())
    layer = module.blocks[1].get_submodule(where)
    cast = comfy.ops.cast_bias_weight

    def raising(other, *arguments, **options):
        if other is layer:
            raise raised
        return cast(other, *arguments, **options)

    with monkeypatch.context() as patches:
        patches.setattr(comfy.ops, "cast_bias_weight", raising)
        with pytest.raises(raised):
            output(model)
    assert all(parameter is before[name] for name, parameter in module.named_parameters())
    assert same(output(model), expected)


def test_a_lora_gives_the_same_bits_before_with_and_after(checkpoints):
    core = core_load(checkpoints("minimax_h3_int8"))[0]
    expected, patched = output(core), output(lora_for(core))
    assert not same(expected, patched)
    model = on_donor(checkpoints, "minimax_h3_int8", 100)[0]
    with_lora = lora_for(model)
    for patcher, wanted in ((model, expected), (with_lora, patched), (model, expected)):
        for _ in range(4):
            assert same(output(patcher), wanted)


def test_a_layer_that_a_lora_makes_one_that_is_called_is_copied_once_a_pass(checkpoints):
    """Its patched weight is kept in full precision, with which ComfyUI calls the layer."""

    def patched(percent):
        model = load_checkpoint(checkpoints("minimax_h3_int8"), partly_on_donor(percent), RESIDENT, COMPUTE)[0]
        for _ in range(4):
            output(model)  # without it first: then the layer is only read
        return lora_for(model)

    expected = output(patched(0))
    clone = patched(100)
    for _ in range(6):
        assert same(output(clone), expected)
    assert not [name for name in clone.distribution.reading.only_read if name.endswith("fc2")]
    copies = clone.distribution.transfer.copies
    assert same(output(clone), expected)
    assert clone.distribution.transfer.copies - copies == len(groups_of(clone))


def test_letting_go_gives_back_what_was_there(checkpoints):
    model = on_donor(checkpoints, "minimax_h3_int8", 100)[0]
    for num_passes in (0, 1, 3):  # watched, and bound around
        for _ in range(num_passes):
            output(model)
        model.detach()
        for module in model.model.modules():
            assert "forward" not in vars(module)
            assert type(module._parameters) is dict


@pytest.mark.parametrize("kind", ["minimax_h3", "minimax_h3_int8"])
def test_a_lora_that_is_there_from_the_start_changes_nothing(checkpoints, kind):
    """Patching looks weights up, too."""
    plain, patched = (on_donor(checkpoints, kind, 100)[0] for _ in range(2))
    for _ in range(3):
        output(plain)
    expected = plain.distribution.reading.only_read
    clone = lora_for(patched)
    for _ in range(3):
        output(clone)
    assert expected
    assert clone.distribution.reading.only_read == expected


def test_what_a_module_reads_in_addition_is_learnt_and_all_is_given_back(reader, monkeypatch):
    module, distribution = reader
    x, forward = torch.ones(1, 64, device=COMPUTE), Reader.forward

    def reads_more(self, x):
        return torch.nn.functional.linear(forward(self, x), self.unused.weight.to(COMPUTE))

    with torch.no_grad():
        module(x)
        plan = distribution.plan
        distribution.release({})
        monkeypatch.setattr(Reader, "forward", reads_more)
        distribution.place(plan)
        for _ in range(3):
            module(x)
    assert set(distribution.reading.only_read) == {f"{i}.{name}" for i in (0, 1) for name in ("rows.0", "unused")}
    streamer = weakref.ref(distribution.streamer)
    distribution.release({})
    assert not any("forward" in vars(child) for child in module.modules())
    assert streamer() is None


def test_forwards_that_were_set_twice_are_both_taken_off():
    forwards, layers = Forwards("a test"), [torch.nn.Linear(1, 1) for _ in range(2)]
    for name in ("first", "second"):
        for layer in layers:
            forwards.set(layer, lambda previous, name=name: lambda: name)
    assert [layer.forward() for layer in layers] == ["second", "second"]
    forwards.give_back(layers[0])
    assert ["forward" in vars(layer) for layer in layers] == [False, True]
    forwards.give_back()
    assert ["forward" in vars(layer) for layer in layers] == [False, False]


def test_whose_forwards_are_set_can_be_listed():
    layer, one, other = torch.nn.Linear(1, 1), Forwards("one"), Forwards("other")
    assert set_by(layer) == []
    one.set(layer, lambda previous: lambda x: x)
    other.set(layer, lambda previous: previous)
    assert set_by(layer) == ["other", "one"]
    one.give_back()  # below another, which stays
    assert set_by(layer) == ["other"]
    other.give_back()
    assert set_by(layer) == []


def test_a_run_that_breaks_off_decides_nothing(reader, monkeypatch):
    module, distribution = reader
    with monkeypatch.context() as patches, torch.no_grad():
        patches.setattr(torch.nn.functional, "linear", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            module(torch.ones(1, 64, device=COMPUTE))
    assert distribution.reading.only_read == []
    assert all(type(layer._parameters) is dict for layer in module.modules())
    with torch.no_grad():
        for _ in range(2):
            module(torch.ones(1, 64, device=COMPUTE))
    assert distribution.reading.only_read == ["0.rows.0", "1.rows.0"]


def test_a_module_of_which_all_layers_are_called_is_left_alone(checkpoints):
    model = on_donor(checkpoints, "minimax_h3_int8", 100)[0]
    output(model)
    with_forward = {name for name, module in model.model.named_modules() if "forward" in vars(module)}
    streamed = {item.layer.name for item in model.distribution.plan.streamed}
    around = {name.rpartition(".")[0] for name in model.distribution.reading.only_read}
    assert with_forward == streamed | around
    by_name = dict(model.model.named_modules())
    assert all(set_by(by_name[name]) == ["streaming"] for name in streamed - around)
    assert all(set_by(by_name[name]) == ["reading"] for name in around - streamed)


def test_a_dropped_model_that_is_watched_is_let_go_at_once(checkpoints):
    model = on_donor(checkpoints, "minimax_h3_int8", 100)[0]
    gc.collect()
    gc.disable()
    try:
        output(model)
        mm.unload_all_models()
        mm.load_models_gpu([model])
        layer = weakref.ref(model.distribution.streamer.layers[0])
        mm.current_loaded_models.clear()
        del model
        assert layer() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("num_passes", [0, 1, 3])
def test_copies_have_plain_parameters_of_their_own(checkpoints, num_passes):
    model = on_donor(checkpoints, "minimax_h3_int8", 100)[0]
    mm.load_models_gpu([model])
    for _ in range(num_passes):
        output(model)
    layer = model.model.diffusion_model.blocks[0].attn.q_norm
    deep, shallow = copy.deepcopy(layer), copy.copy(layer)
    output(model)
    mm.unload_all_models()
    for copied in (deep, shallow):
        assert type(copied._parameters) is dict
        assert torch.equal(copied.weight.cpu(), layer.weight.cpu())


# --- one module of each kind


class Reader(torch.nn.Module):
    """Calls a layer, reads the weight of another, and has one that it does not use."""

    def __init__(self):
        super().__init__()
        make = comfy.ops.manual_cast.Linear
        self.called, self.unused = make(64, 64, dtype=torch.float32), make(64, 64, dtype=torch.float32)
        self.rows = torch.nn.Sequential(make(64, 64, dtype=torch.float32))  # not called either
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter)
            parameter.requires_grad_(False)

    def forward(self, x):
        x = self.called(x)
        weight, bias, stream = comfy.ops.cast_bias_weight(self.rows[0], x, offloadable=True)
        x = torch.nn.functional.linear(x, weight, bias)
        comfy.ops.uncast_bias_weight(self.rows[0], weight, bias, stream)
        return x


@pytest.fixture
def reader(monkeypatch):
    """(module, its distribution), with each layer a group of its own on the donor."""
    monkeypatch.setattr("distorch2.planning.sizing.GROUP_BYTES", 1)
    with torch.inference_mode(False):
        module = torch.nn.Sequential(Reader(), Reader())
        placements = tuple(Placement(layer, DONOR) for layer in list_layers(module))
        plan = Plan(COMPUTE, placements)
        distribution = Distribution(module, plan, COMFYUI)
        distribution.place(plan)
        yield module, distribution
        distribution.release({})


def test_a_layer_that_is_not_used_is_not_streamed(reader):
    module, distribution = reader
    x = torch.ones(1, 64, device=COMPUTE)
    with torch.no_grad():
        for _ in range(5):
            module(x)
        assert distribution.reading.only_read == ["0.rows.0", "1.rows.0"]
        copies = distribution.transfer.copies
        module(x)
    assert distribution.transfer.copies - copies == 4  # of six groups, the two that are not used left out


def test_gradients_flow_through_a_layer_that_is_only_read(reader):
    module, _ = reader
    with torch.no_grad():
        for _ in range(3):
            module(torch.ones(1, 64, device=COMPUTE))
    weights = [layer.weight.detach().to(COMPUTE) for part in module for layer in (part.called, part.rows[0])]
    x = torch.ones(1, 64, device=COMPUTE, requires_grad=True)
    module(x).sum().backward()
    expected = torch.ones(1, 64, device=COMPUTE)
    for weight in reversed(weights):
        expected = expected @ weight
    assert torch.allclose(x.grad, expected, rtol=1e-3)
    assert all(layer.weight.device == torch.device(DONOR) for part in module for layer in (part.called, part.rows[0]))


def test_the_modules_that_may_read_a_layer():
    mlp = torch.nn.Sequential(torch.nn.Linear(1, 1))
    reader = Reader()
    reader.list = torch.nn.ModuleList([mlp])
    root = torch.nn.ModuleDict({"model": torch.nn.Sequential(reader)})
    found = list(modules_around(root, "model.0.list.0.0"))
    assert [id(module) for module in found] == [id(mlp), id(reader)]
    assert list(modules_around(root, "model")) == []
    assert list(modules_around(root, "model.1.missing.0")) == []


def test_a_forward_that_lay_on_ours_while_it_was_given_back_puts_nothing_of_ours_back(reader, monkeypatch):
    """ComfyUI's injections and gradient checkpointing put back the forward that they found."""
    module, distribution = reader
    plan, x, streamers = distribution.plan, torch.ones(1, 64, device=COMPUTE), []
    with torch.no_grad():
        for _ in range(3):
            streamers.append(weakref.ref(distribution.streamer))
            for child in (module[1], module[1].unused):  # one is given back while it runs, one with the rest
                monkeypatch.setattr(child, "forward", lambda *arguments, found=child.forward: found(*arguments))
            module(x)
            module(x)
            distribution.release({})
            monkeypatch.undo()
            assert torch.equal(module[1](x), Reader.forward(module[1], x))
            distribution.place(plan)
        distribution.release({})
    assert not any(streamer() for streamer in streamers)


def test_a_layer_that_is_replaced_in_the_first_run(reader, monkeypatch):
    module, _ = reader

    def replaces(self, x, forward=Reader.forward):
        self.unused = torch.nn.Identity()
        return forward(self, x)

    monkeypatch.setattr(Reader, "forward", replaces)
    with torch.no_grad():
        module(torch.ones(1, 64, device=COMPUTE))
    assert all(type(layer._parameters) is dict for layer in module.modules())


def test_a_copy_that_is_made_in_the_first_run_has_parameters_of_its_own(reader, monkeypatch):
    module, _ = reader
    made = []

    def copies(self, x, forward=Reader.forward):
        made.append(copy.deepcopy(self.unused))
        return forward(self, x)

    monkeypatch.setattr(Reader, "forward", copies)
    with torch.no_grad():
        module(torch.ones(1, 64, device=COMPUTE))
    assert [type(each._parameters) for each in made] == [dict, dict]
    assert torch.equal(made[0].weight.cpu(), module[0].unused.weight.cpu())


def test_a_layer_that_is_not_used_at_first_is_learnt_when_it_is(reader, monkeypatch):
    module, distribution = reader
    x, forward = torch.ones(1, 64, device=COMPUTE), Reader.forward
    with torch.no_grad():
        module(x)
        monkeypatch.setattr(Reader, "forward", lambda self, x: forward(self, x) + self.unused.weight.to(COMPUTE).sum())
        module(x)
    assert "0.unused" in distribution.reading.only_read


def test_what_is_called_while_training_only_is_learnt_afterwards(checkpoints, monkeypatch):
    model = on_donor(checkpoints, "minimax_h3_int8", 100)[0]
    with monkeypatch.context() as patches:
        patches.setattr(mm, "in_training", True)
        output(model)
    assert model.distribution.reading.only_read == []
    output(model)
    assert len(model.distribution.reading.only_read) == 10
