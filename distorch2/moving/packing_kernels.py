"""Kernels that pack and unpack slabs. Imported when the first is packed: Triton takes time to import, and is not on
every machine. It looks names up in the module, so that they cannot be imported in a function.

A program of each handles one block of values.
"""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def _bits_of_block(slab, num_values, BLOCK: tl.constexpr):
    """Of its values, as int32; the last one again fills the last block."""
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
def _code(of_row, value: tl.constexpr, WIDTH: tl.constexpr):
    """Of one of the eight values of each row. `of_row` has their 4 bits in order, or a byte of each of 3 planes."""
    if WIDTH == 4:
        return (of_row >> (4 * value)) & 15
    return ((of_row >> value) & 1) | ((of_row >> (7 + value)) & 2) | ((of_row >> (14 + value)) & 4)


@triton.jit
def _bits(of_row, rest, rank, base, escapes, value: tl.constexpr, WIDTH: tl.constexpr, ESCAPE: tl.constexpr):
    """Of one of the eight values of each row, as int64."""
    code = _code(of_row, value, WIDTH)
    escaped = tl.load(escapes + rank, mask=code == ESCAPE, other=0).to(tl.int32)
    exponent = tl.where(code == ESCAPE, escaped, base + code)
    own = (rest >> (8 * value)).to(tl.int32)
    return (((own & 0x80) << 8) | (exponent << 7) | (own & 0x7F)).to(tl.int64)


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
    """In rows of eight values, which are read and written as words."""
    block = tl.program_id(0).to(tl.int64)
    row = block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    if WIDTH == 4:
        of_row = tl.load((packed + codes).to(tl.pointer_type(tl.int32)) + row)
    else:
        of_row = tl.load(packed + codes + row).to(tl.int32)
        of_row |= tl.load(packed + codes + bytes_of_plane + row).to(tl.int32) << 8
        of_row |= tl.load(packed + codes + 2 * bytes_of_plane + row).to(tl.int32) << 16
    num_escapes = tl.zeros([BLOCK // 8], tl.int32)
    for value in tl.static_range(8):
        num_escapes += (_code(of_row, value, WIDTH) == ESCAPE).to(tl.int32)
    rank = _escapes_before(packed, first_escapes) + tl.cumsum(num_escapes, 0) - num_escapes
    base = tl.load(packed + bases + block).to(tl.int32)
    rest = tl.load(packed.to(tl.pointer_type(tl.int64)) + row)
    words = slab.to(tl.pointer_type(tl.int64))
    values = slab.to(tl.pointer_type(tl.int16))
    is_whole = (block + 1) * BLOCK <= num_values
    for half in tl.static_range(2):
        word = tl.zeros([BLOCK // 8], tl.int64)
        for quarter in tl.static_range(4):
            bits = _bits(of_row, rest, rank, base, packed + escapes, 4 * half + quarter, WIDTH, ESCAPE)
            rank += (_code(of_row, 4 * half + quarter, WIDTH) == ESCAPE).to(tl.int32)
            word |= bits << (16 * quarter)
        if is_whole:
            tl.store(words + 2 * row + half, word)
        else:
            for quarter in tl.static_range(4):
                number = 8 * row + 4 * half + quarter
                tl.store(values + number, (word >> (16 * quarter)).to(tl.int16), mask=number < num_values)
