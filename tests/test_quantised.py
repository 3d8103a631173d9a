import pytest
import torch
from comfy.quant_ops import QuantizedTensor

from distorch2.weights.quantised import description, is_quantised, plain_tensors, rebuilder, to_device

pytestmark = pytest.mark.quick


@pytest.fixture(params=[True, False], ids=["inference", "normal"])
def weight(request):
    with torch.inference_mode(request.param):
        yield QuantizedTensor.from_float(torch.randn(16, 32), "TensorCoreFP8E4M3Layout")


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_moved_weight_stays_quantised(weight, wrapped):
    if wrapped:
        weight = torch.nn.Parameter(weight, requires_grad=False)
    assert not is_quantised(torch.zeros(1))
    assert is_quantised(weight)
    moved = to_device(weight, torch.device("meta"))
    assert [(part.device.type, part.dtype) for part in plain_tensors(moved)] == [
        ("meta", torch.float8_e4m3fn),
        ("meta", torch.float32),
    ]
    assert description(moved) == description(weight)
    assert torch.equal(to_device(weight, torch.device("cpu"), copy=True).dequantize(), weight.dequantize())


def test_a_rebuilt_parameter_refers_to_its_parts(weight):
    """A copied scale would be that of whatever was in the staging buffer when the parameter was made."""
    parts = [torch.zeros_like(part) for part in plain_tensors(weight)]
    rebuilt = rebuilder(weight)(parts)
    assert isinstance(rebuilt, torch.nn.Parameter)
    for part, plain in zip(parts, plain_tensors(weight), strict=True):
        part.copy_(plain)
    assert torch.equal(rebuilt.dequantize(), weight.dequantize())
