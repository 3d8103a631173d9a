"""GGUF files of random weights, and the tensors and layers that read them.

The classes do what those of ComfyUI-GGUF do, as far as a patcher can tell, in the shortest way: a tensor holds the
bytes of the file, says that it has the weight's shape, and carries patches; a layer dequantises and patches it in each
run.
"""

import os

import comfy.lora
import comfy.model_patcher
import comfy.ops
import comfy.sd
import gguf
import numpy
import pytest
import torch
from checkpoints import flux

PACK = os.environ.get("COMFYUI_GGUF_PATH")
NEEDS_PACK = [
    pytest.mark.other_pack,
    pytest.mark.skipif(not PACK, reason="COMFYUI_GGUF_PATH does not say where ComfyUI-GGUF is"),
]
"""Marks of tests with ComfyUI-GGUF's own code."""
QTYPES = ("Q8_0", "Q5_K", "Q4_K", "BF16", "F16")
_NUM_SCALES = {"Q4_K": 2, "Q5_K": 2, "Q8_0": 1}  # numbers in fp16 at the start of a block; other bytes may be any
_HIDDEN, _HEAD = 256, 128


def write_flux(path, qtype_name, double=2, single=2):
    """A Flux whose wide weights are of this type, the other weights F16, and biases F32, as files are published."""
    writer = gguf.GGUFWriter(str(path), "flux")
    generator = numpy.random.default_rng(0)
    for name, tensor in flux(double, single, _HIDDEN).draw(0, torch.float32).items():
        array = tensor.numpy()
        if name.endswith("_norm.scale"):
            array = array[:_HEAD]  # that of one head, of which there are two
        if array.ndim < 2:
            writer.add_tensor(name, array)
        elif array.shape[1] % 256 or qtype_name == "F16":
            writer.add_tensor(name, array.astype(numpy.float16))
        else:
            qtype = gguf.GGMLQuantizationType[qtype_name]
            writer.add_tensor(name, _quantised(array, qtype, generator), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def _quantised(array, qtype, generator):
    """Bytes [rows, bytes of a row]; of types that the package cannot write, random blocks of about the same size."""
    if qtype.name not in ("Q4_K", "Q5_K"):
        return gguf.quants.quantize(array, qtype)
    size, num_bytes = gguf.GGML_QUANT_SIZES[qtype]
    blocks = generator.integers(0, 256, (array.size // size, num_bytes), dtype=numpy.uint8)
    scales = numpy.full((len(blocks), _NUM_SCALES[qtype.name]), 5e-5, dtype=numpy.float16)
    blocks[:, : 2 * scales.shape[1]] = scales.view(numpy.uint8)
    return blocks.reshape(array.shape[0], -1)


class BlockTensor(torch.Tensor):
    """The bytes of a weight in a GGUF file."""

    def to(self, *arguments, **options):
        new = super().to(*arguments, **options)
        if hasattr(self, "tensor_type"):  # what is computed with one lacks it
            new.tensor_type, new.tensor_shape, new.patches = self.tensor_type, self.tensor_shape, self.patches.copy()
        return new

    def detach(self):
        return self

    def clone(self):
        return self

    @property
    def shape(self):
        return getattr(self, "tensor_shape", None) or self.size()


def read(path):
    """The state dict."""
    tensors = {}
    for stored in gguf.GGUFReader(path).tensors:
        shape = torch.Size(int(length) for length in reversed(stored.shape))
        data = torch.from_numpy(numpy.array(stored.data))
        if stored.tensor_type.name in ("F32", "F16"):
            data = data.view(shape)
        tensors[stored.name] = tensor = data.as_subclass(BlockTensor)
        tensor.tensor_type, tensor.tensor_shape, tensor.patches = stored.tensor_type, shape, []
    return tensors


def load(path, layers):
    """A patcher without DynamicVRAM, also where ComfyUI loads for that."""
    loaded = comfy.sd.load_diffusion_model_state_dict(read(path), model_options={"custom_operations": layers})
    return comfy.model_patcher.ModelPatcher(loaded.model, loaded.load_device, loaded.offload_device)


def load_for_dynamic_vram(monkeypatch):
    """Has ComfyUI load as for DynamicVRAM, which needs a GPU: it keeps the tensors of a file as they are."""
    kind = type("Dynamic", (comfy.model_patcher.ModelPatcher,), {"is_dynamic": lambda self: True})
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", kind)


def dequantised(tensor, dtype):
    plain = tensor.as_subclass(torch.Tensor) if isinstance(tensor, BlockTensor) else tensor
    if isinstance(tensor, BlockTensor) and tensor.tensor_type.name not in ("F32", "F16"):
        full = gguf.quants.dequantize(plain.cpu().numpy(), tensor.tensor_type)
        plain = torch.from_numpy(full).view(tensor.tensor_shape).to(plain.device)
    weight = plain.to(dtype)
    for patches, key in getattr(tensor, "patches", ()):
        weight = comfy.lora.calculate_weight(patches, weight, key)
    return weight


class Layers(comfy.ops.manual_cast):
    class Linear(comfy.ops.manual_cast.Linear):
        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features, self.weight, self.bias = in_features, out_features, None, None

        def _load_from_state_dict(self, state_dict, prefix, *_):
            for name in ("weight", "bias"):
                if f"{prefix}{name}" in state_dict:
                    setattr(self, name, torch.nn.Parameter(state_dict[f"{prefix}{name}"], requires_grad=False))

        def forward_comfy_cast_weights(self, x):
            weight, bias = (
                None if each is None else dequantised(each.to(x.device), x.dtype) for each in (self.weight, self.bias)
            )
            return torch.nn.functional.linear(x, weight, bias)
