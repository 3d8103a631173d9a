"""Packed slabs: every bit comes back, and weights become as small as they should."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from distorch2.moving.transfer import Copy, Transfer
from distorch2.moving.unpacking import Kernels, reason_against
from distorch2.weights import packing
from distorch2.weights.packing import BLOCK_VALUES, WIDTHS, PackedSlab, Reference, pack, prepared, unpack

SPECIAL = [0, -0x8000, 0x7F80, -0x80, 0x7FC1, -0x3F, 1, -0x7FFF, 0x007F]
"""Zeros and infinities of both signs, NaNs with a payload, subnormals."""


def bits_of(values):
    return values.contiguous().view(torch.uint8)


def slabs():
    """Of bf16: name -> bytes. The lengths are not multiples of a block's, but for one."""
    generator = torch.Generator().manual_seed(0)

    def normal(number, scale=0.02):
        return torch.randn(number, generator=generator).mul(scale).bfloat16()

    mixed = normal(10_000).view(torch.int16)
    some = torch.rand(10_000, generator=generator) < 0.05
    mixed[some] = torch.tensor(SPECIAL, dtype=torch.int16)[torch.randint(9, (int(some.sum()),), generator=generator)]
    steps = torch.cat([normal(1500, 10.0**exponent) for exponent in range(-30, 30, 5)])
    return {
        "normal": bits_of(normal(50 * BLOCK_VALUES)),
        "short": bits_of(normal(1)),
        "one more than a block": bits_of(normal(BLOCK_VALUES + 1)),
        "special values among others": bits_of(mixed),
        "special values alone": bits_of(torch.tensor(SPECIAL * 1000, dtype=torch.int16)),
        "zeros": torch.zeros(99_998, dtype=torch.uint8),
        "from very small to very large": bits_of(steps),
        "any bits": torch.randint(0, 256, (77_776,), dtype=torch.uint8, generator=generator),
        "fp32": bits_of(torch.randn(9_999, generator=generator)),
    }


def in_width(slab, width, coder=None):
    """Packed whether that gains anything or not."""
    coder = coder or Reference()
    packed = prepared(slab, coder, [width])
    coder.encode(slab, packed)
    return packed


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", slabs())
@pytest.mark.quick
def test_every_bit_comes_back(name, width):
    slab = slabs()[name]
    packed = in_width(slab, width)
    assert packed.buffer.nbytes == packed.layout.num_bytes
    assert torch.equal(unpack(packed), slab)


def test_any_length_and_scale():
    generator = torch.Generator().manual_seed(1)
    for number in torch.randint(1, 4000, (100,), generator=generator).tolist():
        values = torch.randn(number, generator=generator) * 10 ** float(torch.randn(1, generator=generator) * 10)
        for width in WIDTHS:
            assert torch.equal(unpack(in_width(bits_of(values.bfloat16()), width)), bits_of(values.bfloat16()))


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [
        ("normal", 0.69, 0.71),  # 3 bits: 11/16 of the size, 5 bytes for each block of 2,048, 3% escapes
        ("zeros", 0.68, 0.705),
        ("special values among others", 0.69, 0.78),
    ],
)
def test_how_small_it_becomes(name, least, most):
    slab = slabs()[name]
    assert least < pack(slab).buffer.nbytes / slab.nbytes < most


@pytest.mark.parametrize("name", ["any bits", "fp32", "short"])
def test_what_gains_too_little_stays_as_it_is(name):
    assert pack(slabs()[name]) is None
    assert pack(torch.empty(0, dtype=torch.uint8)) is None


def test_the_width_is_the_one_that_is_smaller():
    assert pack(slabs()["normal"]).layout.width == 3
    spread = torch.arange(12).repeat(20_000).add(100).to(torch.int16) << 7  # 12 exponents, equally frequent
    assert pack(bits_of(spread)).layout.width == 4


def test_what_would_not_come_back_stays_as_it_is():
    class Wrong(Reference):
        def decode(self, packed, slab):
            slab.zero_()

    assert pack(slabs()["normal"], Wrong()) is None


def test_several_pieces_at_a_time_give_the_same(monkeypatch):
    before = pack(slabs()["normal"])
    monkeypatch.setattr(packing, "_VALUES_AT_A_TIME", 3 * BLOCK_VALUES)
    assert torch.equal(pack(slabs()["normal"]).buffer, before.buffer)


def test_where_there_are_no_kernels_the_reason_is_said():
    assert reason_against("cpu") == "no kernels are made for cpu"


@pytest.mark.gpu
def test_kernels_give_the_same_bits_on_a_gpu():
    device = torch.device("cuda")
    assert reason_against("cuda") == ""
    for name, slab in slabs().items():
        for width in WIDTHS:
            compare(slab.to(device), width, name)
        on_device, of_host = pack(slab.to(device), Kernels()), pack(slab)
        assert (on_device is None) == (of_host is None)
        assert on_device is None or on_device.nbytes == of_host.nbytes


@pytest.mark.gpu
def test_waiting_for_copies_is_timed_on_a_gpu():
    device = torch.device("cuda:0")
    transfer, source = Transfer(device), torch.ones(64 * 1024**2, dtype=torch.uint8, pin_memory=True)
    copy = Copy(source, torch.empty_like(source, device=device))
    with transfer.timed() as waiting:
        transfer.submit([copy])
        transfer.use(copy)
        copy.target.sum()
    with transfer.timed() as without:
        transfer.use(copy)  # it is there
        copy.target.sum()
    torch.cuda.synchronize()
    assert 0 < waiting.waiting_part() < 1
    assert without.waiting_part() == 0


def compare(slab, width, name):
    """The kernels and the definition, on the device of the slab. Where several bases are as good, any is."""
    kernels, reference = Kernels(), Reference()
    assert torch.equal(kernels.counts(slab), reference.counts(slab)), name
    packed = in_width(slab, width, kernels)
    with_reference = PackedSlab(packed.layout, packed.buffer.clone())
    reference.encode(slab, with_reference)
    assert torch.equal(packed.buffer, with_reference.buffer), name
    assert torch.equal(unpack(packed, kernels), slab), name


if importlib.util.find_spec("triton") is not None:

    def test_kernels_give_the_same_bits_in_tritons_interpreter():
        """On the CPU, in a process of its own: Triton decides when it is imported."""
        script = "import test_packing; test_packing.run_kernels_on_the_cpu()"
        paths = [str(ROOT), str(Path(__file__).parent), *sys.path]
        environment = dict(os.environ, TRITON_INTERPRET="1", PYTHONPATH=os.pathsep.join(paths))
        subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=300)


def run_kernels_on_the_cpu():
    for name, slab in slabs().items():
        for width in WIDTHS:
            compare(slab[: 20 * 2 * BLOCK_VALUES], width, name)
