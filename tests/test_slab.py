import pytest
import torch
from comfy.quant_ops import QuantizedTensor

from distorch2.weights.slab import ALIGNMENT_BYTES, PAGE_BYTES, SlabLayout, allocate

pytestmark = pytest.mark.quick

SHAPES = {"weight": (3, 5), "bias": (3,), "scale": ()}


def layout_of(dtypes):
    tensors = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    return SlabLayout.of(tensors, {name: [dtype] for name, dtype in dtypes.items()})


def test_tensors_lie_aligned_one_after_another():
    layout = layout_of({"weight": torch.float16, "bias": torch.float32, "scale": torch.float64})
    assert [part.offset for field in layout.fields for part in field.parts] == [0, ALIGNMENT_BYTES, 2 * ALIGNMENT_BYTES]
    assert layout.num_bytes == 3 * ALIGNMENT_BYTES


def test_slabs_on_the_host_share_no_memory_page():
    """A page that is page-locked twice is an error, and unlocking one slab would unlock the other."""
    slabs = [allocate(num_bytes, torch.device("cpu")) for num_bytes in (1, 100, PAGE_BYTES, PAGE_BYTES + 1) * 20]
    pages = set()
    for slab in slabs:
        first, last = slab.data_ptr(), slab.data_ptr() + slab.nbytes - 1
        assert first % PAGE_BYTES == 0
        mine = set(range(first // PAGE_BYTES, last // PAGE_BYTES + 1))
        assert not pages & mine
        pages |= mine


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_weight_that_is_quantised_anew_fits_whatever_the_shape_of_its_scale_was(shape):
    weight = QuantizedTensor.from_float(torch.randn(16, 32), "TensorCoreFP8E4M3Layout")
    anew = weight.requantize_from_float(torch.randn(16, 32), scale="recalculate")
    object.__setattr__(weight._params, "scale", weight._params.scale.reshape(shape))
    layout = SlabLayout.of({"weight": weight}, {"weight": [torch.float8_e4m3fn, torch.float32]})
    assert layout.fits({"weight": anew})
    assert not layout.fits({"weight": anew.dequantize()})
    slab = allocate(layout.num_bytes, torch.device("cpu"))
    layout.fill(slab, {"weight": anew})
    assert torch.equal(layout.parameters(slab)["weight"].dequantize(), anew.dequantize())
