import torch

from distorch2.slab import ALIGNMENT_BYTES, PAGE_BYTES, SlabLayout, allocate

SHAPES = {"weight": (3, 5), "bias": (3,), "scale": ()}


def layout_of(dtypes):
    tensors = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    return SlabLayout.of(tensors, dtypes)


def test_tensors_lie_aligned_one_after_another():
    layout = layout_of({"weight": torch.float16, "bias": torch.float32, "scale": torch.float64})
    assert [field.offset for field in layout.fields] == [0, ALIGNMENT_BYTES, 2 * ALIGNMENT_BYTES]
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
