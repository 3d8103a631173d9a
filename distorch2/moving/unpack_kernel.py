"""The kernel that unpacks slabs. Imported when the first is unpacked: Triton takes time to import, and is not on
every machine. It looks names up in the module, so that they cannot be imported in a function."""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def unpack(
    packed,
    first_escapes,
    target,
    codes,
    bases,
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
    rank = tl.load(first_escapes + block) + tl.cumsum(is_escape.to(tl.int32), 0) - 1
    escaped = tl.load(packed + escapes + rank, mask=is_escape, other=0).to(tl.int32)
    exponent = tl.where(is_escape, escaped, tl.load(packed + bases + block).to(tl.int32) + code)
    rest = tl.load(packed + value).to(tl.int32)
    bits = ((rest & 0x80) << 8) | (exponent << 7) | (rest & 0x7F)
    tl.store(target + value, bits.to(tl.int16), mask=value < num_values)
