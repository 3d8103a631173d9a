"""Kernels that pack and unpack slabs; each program handles one block of values.

Imported on first use: Triton is slow to import, and not on every machine. Triton looks names up in the module, so its
names cannot be imported inside a function.
"""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _bits_of_block(slab, num_values, BLOCK: tl.constexpr):
    """The values of this program's block, as int32. The slab's last value is repeated to fill the last block."""
    value = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = slab.to(tl.pointer_type(tl.int16))
    return tl.load(values + tl.minimum(value, num_values - 1)).to(tl.int32) & 0xFFFF


@triton.jit
def _escapes_before(packed, first_escapes):
    return tl.load((packed + first_escapes).to(tl.pointer_type(tl.int32)) + tl.program_id(0))


@triton.jit
def count(slab, counts, num_values, BLOCK: tl.constexpr, NUM_EXPONENTS: tl.constexpr):
    exponent = (_bits_of_block(slab, num_values, BLOCK) >> 7) & 0xFF
    of_block = counts + tl.program_id(0).to(tl.int64) * NUM_EXPONENTS + tl.arange(0, NUM_EXPONENTS)
    tl.store(of_block, tl.histogram(exponent, NUM_EXPONENTS))


@triton.jit
def encode(
    slab,
    packed,
    codes,
    bases,
    first_escapes,
    escapes,
    num_values,
    bytes_of_plane,
    WIDTH: tl.constexpr,
    ESCAPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    bits = _bits_of_block(slab, num_values, BLOCK)
    tl.store(packed + block * BLOCK + place, (((bits >> 8) & 0x80) | (bits & 0x7F)).to(tl.uint8))
    exponent = (bits >> 7) & 0xFF
    above = (exponent - tl.load(packed + bases + block).to(tl.int32)) & 0xFF
    is_escape = above >= ESCAPE
    code = tl.where(is_escape, ESCAPE, above)
    if WIDTH == 4:
        pairs = tl.reshape(code << (place % 2 * 4), [BLOCK // 2, 2])
        into = packed + codes + block * (BLOCK // 2) + tl.arange(0, BLOCK // 2)
        tl.store(into, tl.sum(pairs, 1).to(tl.uint8))
    else:
        for bit in tl.static_range(WIDTH):
            of_plane = tl.reshape(((code >> bit) & 1) << (place % 8), [BLOCK // 8, 8])
            into = packed + codes + bit * bytes_of_plane + block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
            tl.store(into, tl.sum(of_plane, 1).to(tl.uint8))
    rank = _escapes_before(packed, first_escapes) + tl.cumsum(is_escape.to(tl.int32), 0) - 1
    tl.store(packed + escapes + rank, exponent.to(tl.uint8), mask=is_escape)


@triton.jit
def decode(
    slab,
    packed,
    codes,
    bases,
    first_escapes,
    escapes,
    num_values,
    bytes_of_plane,
    WIDTH: tl.constexpr,
    ESCAPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    value = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if WIDTH == 4:
        pair = tl.load(packed + codes + value // 2).to(tl.int32)
        code = (pair >> (value % 2 * 4)) & 15
    else:
        code = tl.zeros([BLOCK], tl.int32)
        for bit in tl.static_range(WIDTH):
            of_eight = tl.load(packed + codes + bit * bytes_of_plane + value // 8).to(tl.int32)
            code |= ((of_eight >> (value % 8)) & 1) << bit
    is_escape = code == ESCAPE
    rank = _escapes_before(packed, first_escapes) + tl.cumsum(is_escape.to(tl.int32), 0) - 1
    escaped = tl.load(packed + escapes + rank, mask=is_escape, other=0).to(tl.int32)
    exponent = tl.where(is_escape, escaped, tl.load(packed + bases + block).to(tl.int32) + code)
    rest = tl.load(packed + value).to(tl.int32)
    bits = ((rest & 0x80) << 8) | (exponent << 7) | (rest & 0x7F)
    tl.store(slab.to(tl.pointer_type(tl.int16)) + value, bits.to(tl.int16), mask=value < num_values)
