import comfy.ops
import pytest
import torch

from distorch2.planning.plan import Layer
from distorch2.weights.inventory import list_layers

pytestmark = pytest.mark.quick

ops = comfy.ops.manual_cast


class Block(torch.nn.Module):
    """One of everything that decides whether a layer may leave the compute device."""

    def __init__(self):
        super().__init__()
        self.modulation = torch.nn.Parameter(torch.zeros(7))  # 28 bytes, of a module with children
        self.linear = ops.Linear(3, 5, dtype=torch.float16)  # 30 + 10 bytes, each of them 256 in a slab
        self.plain = torch.nn.Linear(3, 5)  # 60 + 20 bytes, without ComfyUI's casting
        self.with_buffer = ops.Linear(3, 1, bias=False, dtype=torch.float32)  # 12 + 8 bytes
        self.with_buffer.register_buffer("scale", torch.zeros(1, dtype=torch.float64))
        self.tied = ops.Linear(2, 2, bias=False, dtype=torch.float32)  # 16 bytes, of which
        self.tied_too = ops.Linear(2, 2, bias=False, dtype=torch.float32)  # these are the same
        self.tied_too.weight = self.tied.weight
        self.nothing = torch.nn.SiLU()
        self.loaded_smaller = ops.Linear(2, 3, bias=False, dtype=torch.float32)  # 12 bytes once loaded
        self.loaded_smaller.weight_comfy_model_dtype = torch.float16


def test_what_may_move_and_its_bytes():
    assert list_layers(Block()) == [
        Layer("", 28, movable=False),
        Layer("linear", 40, movable=True, slab_bytes=512),
        Layer("plain", 80, movable=False),
        Layer("with_buffer", 20, movable=False),
        Layer("tied", 16, movable=False),
        Layer("tied_too", 0, movable=False),
        Layer("loaded_smaller", 12, movable=True, slab_bytes=256),
    ]


def test_quantised_layers_are_counted_as_the_bytes_that_they_are(checkpoints):
    from sampling import core_load

    model = core_load(checkpoints("sd3_fp8_scaled"))[0].model
    layers = {layer.name: layer for layer in list_layers(model)}
    quantised = {name: layer for name, layer in layers.items() if name.endswith("attn.qkv")}
    assert quantised
    for name, layer in quantised.items():
        module = model.get_submodule(name)
        assert layer.movable
        assert layer.num_bytes == module.weight.numel() + 4 + module.bias.nbytes  # fp8, one scale in float32
