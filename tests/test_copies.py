"""Copies of what is served: of a module, which computes with its own weights, and of a patcher, which keeps its plan.

And what autograd keeps of a module that is served.
"""

import copy
import functools
import gc
import io
import weakref

import comfy.model_management as mm
import comfy.ops
import pytest
import torch
from placing import (
    COMPUTE,
    DONOR,
    HAS_SIMULATED,
    bytes_on,
    devices_known_to_comfyui,  # noqa: F401
    inference_mode,  # noqa: F401
    on_donor,
)
from sampling import output

from distorch2.comfyui.program import COMFYUI
from distorch2.planning.plan import Placement, Plan
from distorch2.serving.distribution import Distribution
from distorch2.weights.inventory import list_layers

KIND = "flux"


@pytest.fixture
def served(checkpoints):
    """A model all of whose weights are streamed, after a step."""
    model = on_donor(checkpoints, KIND, 100)[0]
    output(model)
    yield model
    mm.unload_all_models()


def block_inputs(dtype, width=128, num_tokens=9):
    generator = torch.Generator().manual_seed(1)
    shapes = {"img": (1, 4, width), "txt": (1, num_tokens - 4, width), "vec": (1, width)}
    inputs = {name: torch.randn(shape, generator=generator).to(COMPUTE, dtype) for name, shape in shapes.items()}
    rotation = torch.eye(2).expand(1, 1, num_tokens, 64, 2, 2).to(COMPUTE)
    return {**inputs, "pe": rotation}


def run_block(block):
    return [part.clone() for part in block(**block_inputs(next(block.parameters()).dtype))]


@pytest.mark.quick
def test_a_deep_copy_of_a_served_block_has_its_own_weights(served):
    block = served.model.diffusion_model.double_blocks[3]
    expected = run_block(block)
    copies = served.distribution.transfer.copies
    with torch.inference_mode(False), torch.no_grad():
        other = copy.deepcopy(block).to(COMPUTE)
    assert same_outputs(run_block(other), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not same_outputs(run_block(other), expected)
    assert served.distribution.transfer.copies == copies
    assert same_outputs(run_block(block), expected)
    copied = copy.deepcopy(vars(served.model)["distorch2"])  # as with a copy of the whole model
    assert dict(copied.distributions) == {}
    assert copied.layers == served.layers_of(served.model)


def same_outputs(found, expected):
    return all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def scaled(module):
    """As another pack does it, before the module is served."""
    own = module.forward
    module.forward = functools.partial(twice, own)


def twice(forward, x):
    return 2 * forward(x)


@pytest.mark.parametrize(("way", "is_wrapped_before"), [("deepcopy", False), ("pickle", False), ("pickle", True)])
def test_a_copy_of_a_served_layer_is_a_layer_of_its_own(way, is_wrapped_before):
    accelerator = "sim:0" if HAS_SIMULATED else COMPUTE
    layer = comfy.ops.manual_cast.Linear(3, 5, dtype=torch.float32)
    torch.nn.init.normal_(layer.weight)
    torch.nn.init.normal_(layer.bias)
    x = torch.randn(2, 3)
    if is_wrapped_before:
        scaled(layer)
    expected = layer(x)
    module = torch.nn.Sequential(layer)
    plan = Plan(accelerator, tuple(Placement(each, "cpu") for each in list_layers(module)))
    distribution = Distribution(module, plan, COMFYUI)
    distribution.place(plan)
    assert torch.allclose(module(x.to(accelerator)).cpu(), expected)
    with torch.inference_mode(False), torch.no_grad():
        if way == "deepcopy":
            other = copy.deepcopy(layer)
        else:
            file = io.BytesIO()
            torch.save(layer, file)
            file.seek(0)
            other = torch.load(file, weights_only=False)
        copies = distribution.transfer.copies
        other.weight.mul_(3)
        other.bias.mul_(3)
        assert torch.allclose(other(x), 3 * expected)
    assert distribution.transfer.copies == copies
    assert torch.allclose(module(x.to(accelerator)).cpu(), expected)
    distribution.release({})
    assert ("forward" in vars(layer)) == is_wrapped_before


# --- clones


@pytest.mark.parametrize("way", ["force_deepcopy", "deepclone_multigpu"])
def test_a_clone_with_a_module_of_its_own_keeps_the_split(checkpoints, way):
    model = on_donor(checkpoints, KIND, 75)[0]
    expected = output(model)
    if way == "force_deepcopy":
        clone = model.clone(force_deepcopy=True)
    else:
        clone = model.deepclone_multigpu(new_load_device=torch.device(COMPUTE))
    assert clone.model is not model.model
    mm.unload_all_models()
    assert torch.equal(output(clone), expected)
    plan = clone.distribution.plan
    assert plan == model.distribution.asked
    on = {device: bytes_on(clone.model, device) for device in (COMPUTE, DONOR)}
    assert on == {device: plan.bytes_on(device) for device in (COMPUTE, DONOR)}
    assert clone.clone().distribution is clone.distribution
    mm.unload_all_models()
    del clone
    gc.collect()
    assert torch.equal(output(model), expected)


# --- gradients


class Stack(torch.nn.Module):
    """Layers, each a group of its own, and a staging buffer with room for three of them."""

    NUM_LAYERS, WIDTH = 40, 32

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        linears = [comfy.ops.manual_cast.Linear(self.WIDTH, self.WIDTH, bias=False) for _ in range(self.NUM_LAYERS)]
        for linear in linears:
            linear.weight = torch.nn.Parameter(torch.randn(self.WIDTH, self.WIDTH, generator=generator) / 5)
            linear.requires_grad_(False)
        self.layers = torch.nn.ModuleList(linears)

    def forward(self, x, checkpoint=None):
        for first, second in zip(self.layers[::2], self.layers[1::2]):
            block = functools.partial(self.block, first, second)
            if checkpoint is None:
                x = block(x)
            else:
                x = torch.utils.checkpoint.checkpoint(block, x, use_reentrant=checkpoint)
        return x

    @staticmethod
    def block(first, second, x):
        return x + torch.nn.functional.silu(second(torch.tanh(first(x))))


def gradient(stack, checkpoint=None):
    """Of the input; a step without gradients has run before, and one runs before the backward pass."""
    x = torch.randn(3, Stack.WIDTH, generator=torch.Generator().manual_seed(1)).to(COMPUTE)
    with torch.inference_mode(False):
        x = x.clone()
        with torch.no_grad():
            expected = stack(x)
        x.requires_grad_(True)
        with torch.enable_grad():
            output = stack(x, checkpoint)
            with torch.no_grad():
                assert torch.equal(stack(x.detach()), expected)
            output.square().sum().backward()
    assert torch.equal(output, expected)
    return x.grad.cpu()


@pytest.mark.parametrize("checkpoint", [None, False, True], ids=["plain", "checkpoint", "reentrant checkpoint"])
def test_gradients_are_those_of_the_resident_model(checkpoint):
    with torch.inference_mode(False):
        stack = Stack().to(COMPUTE)
    expected = gradient(stack, checkpoint)
    with torch.inference_mode(False):
        stack.to("cpu")
    plan = Plan(COMPUTE, tuple(Placement(layer, DONOR) for layer in list_layers(stack)))
    distribution = Distribution(stack, plan, COMFYUI)
    distribution.place(plan)
    assert len(plan.groups) > 3 * plan.staging_bytes / plan.groups[0].slab_bytes
    found = gradient(stack, checkpoint)
    assert torch.equal(found, expected)
    assert found.abs().sum() > 0
    assert distribution.transfer.copies > 0  # of the steps without gradients
    distribution.release({})


def test_a_table_on_a_donor_cannot_be_trained_either(monkeypatch):
    monkeypatch.setattr("distorch2.weights.inventory.LEAST_TABLE_BYTES", 1)
    with torch.inference_mode(False):
        module = torch.nn.Sequential(comfy.ops.manual_cast.Embedding(10, 4, dtype=torch.float32))
        torch.nn.init.normal_(module[0].weight)
    plan = Plan(COMPUTE, tuple(Placement(layer, DONOR) for layer in list_layers(module)))
    assert plan.groups[0].is_table
    distribution = Distribution(module, plan, COMFYUI)
    distribution.place(plan)
    module[0].weight.requires_grad_(True)
    with torch.inference_mode(False), torch.enable_grad(), pytest.raises(RuntimeError, match="train a LoRA"):
        module(torch.tensor([1, 2], device=COMPUTE))
    module[0].weight.requires_grad_(False)
    distribution.release({})


def test_a_dropped_copy_is_let_go_at_once(served):
    with torch.inference_mode(False), torch.no_grad():
        other = copy.deepcopy(served.model.diffusion_model.double_blocks[0])
    reference = weakref.ref(other.img_attn.proj)
    gc.collect()
    gc.disable()
    try:
        del other
        assert reference() is None
    finally:
        gc.enable()


def test_a_weight_on_a_donor_cannot_be_trained_itself(served):
    block = served.model.diffusion_model.double_blocks[0].requires_grad_(True)
    with torch.inference_mode(False), torch.enable_grad(), pytest.raises(RuntimeError, match="train a LoRA"):
        run_block(block)
    block.requires_grad_(False)
