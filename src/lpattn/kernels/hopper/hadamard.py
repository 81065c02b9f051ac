"""The Hadamard transform of rows that lie in registers, in float32 and by sums and differences alone.

It undoes what was done to V, since it is its own inverse. Lanes that differ in one bit are added and subtracted, bit by
bit. A bit whose two lanes are in one thread costs no more than that: of a product's result, lanes 8j + 2t + e are in
thread t of four, so that bits 1 and 2 wait for a layout that has them in registers.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _butterfly(x, BIT: gl.constexpr):
    """Sums and differences of lanes that differ in a bit: x of [ROWS, WIDTH], BIT in registers."""
    ROWS: gl.constexpr = x.shape[0]
    WIDTH: gl.constexpr = x.shape[1]
    LOW: gl.constexpr = 2**BIT
    pairs = x.reshape([ROWS, WIDTH // (2 * LOW), 2, LOW]).permute([0, 1, 3, 2])
    first, second = gl.split(pairs)
    done = gl.join(first + second, first - second).permute([0, 1, 3, 2]).reshape([ROWS, WIDTH])
    return gl.convert_layout(done, x.type.layout, assert_trivial=True)


@gluon.jit
def _butterfly_of_parts(parts, DISTANCE: gl.constexpr):
    """The same of whole parts of a row, those whose numbers differ by a power of two."""
    done = ()
    for index in gl.static_range(len(parts)):
        if index // DISTANCE % 2 == 0:
            done = done + (parts[index] + parts[index + DISTANCE],)  # noqa: RUF005 - no kernel can unpack tuples
        else:
            done = done + (parts[index - DISTANCE] - parts[index],)  # noqa: RUF005
    return done


@gluon.constexpr_function
def _bits(n):
    """Of numbers below n, a power of two."""
    return n.bit_length() - 1


@gluon.jit
def transform_parts(parts, LANES: gl.constexpr):
    """Parts [ROWS, WIDTH] of rows, of which the first LANES lanes are transformed, but for bits 1 and 2.

    Args:
        parts: a tuple of one part, or of LANES / WIDTH; in the layout of a product's result.
        LANES: a power of two, at least 8.
    """
    PARTS: gl.constexpr = len(parts)
    WIDTH: gl.constexpr = parts[0].shape[1]
    BITS: gl.constexpr = _bits(LANES if LANES < WIDTH else WIDTH)
    done = ()
    for index in gl.static_range(PARTS):
        part = parts[index]
        for bit in gl.static_range(BITS):
            if bit != 1 and bit != 2:
                part = _butterfly(part, bit)
        done = done + (part,)  # noqa: RUF005
    for bit in gl.static_range(_bits(PARTS)):
        done = _butterfly_of_parts(done, 2**bit)
    return done


@gluon.jit
def transform_rest(part, layout: gl.constexpr):
    """The rest of the transform of a part; returned in a layout that has lanes 0 to 7 in one thread."""
    part = gl.convert_layout(part, layout)
    return _butterfly(_butterfly(part, 1), 2)
