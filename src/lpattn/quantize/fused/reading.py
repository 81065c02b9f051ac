"""How inputs are read: their strides as a pass takes them, and what is compiled in."""

from __future__ import annotations

from lpattn.quantize.fused.inputs import Alike, Turns
from lpattn.quantize.fused.tile import HALF_SPLIT, HALF_SPLIT_PARTIAL, INTERLEAVED, NO_NORM, NO_ROPE
from lpattn.types import HadamardMode


def how_to_read(dim: int, inputs: Alike, hadamard: HadamardMode) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """How inputs are read: the strides, and what is compiled in."""
    q_strides, k_strides, v_strides, _, turns, norms, _ = inputs
    lanes = lanes_of(dim)
    strides, unit, dense = _in_units((*q_strides, *k_strides, *v_strides))
    rotary, turn_unit, turn_dense = 0, 1, True
    turn_strides: tuple[int, ...] = (0,) * 8
    if turns is not None:
        _, rotary, turn_q, turn_k = turns
        (q_b, q_s, q_h, q_d), (k_b, k_s, k_h, k_d) = turn_q, turn_k
        turn_strides, turn_unit, turn_dense = _in_units((q_b, q_h, q_s, q_d, k_b, k_h, k_s, k_d))
    norm = NO_NORM.value if norms is None else norms.kind
    transforms = (hadamard is HadamardMode.QKV, hadamard is not HadamardMode.NONE)
    read = (unit, dense, turn_unit, turn_dense, dim, lanes, kind_of(turns, dim), rotary, norm, *transforms)
    return (*strides, *turn_strides), read


def kind_of(turns: Turns | None, dim: int) -> int:
    """Which rotation is compiled in."""
    if turns is None:
        return NO_ROPE.value
    interleaved, rotary, _, _ = turns
    whole = rotary == dim == lanes_of(dim)
    return (INTERLEAVED if interleaved else HALF_SPLIT if whole else HALF_SPLIT_PARTIAL).value


def _in_units(strides: tuple[int, ...]) -> tuple[tuple[int, ...], int, bool]:
    """(B, H, S, D) strides of some tensors, the unit that all but D's are given in, and whether D's are all 1.

    In units of 8 elements, where that can be, the compiler sees that loads are aligned whatever the strides are.
    """
    dense = all(stride == 1 for stride in strides[3::4])
    unit = 8 if dense and not any(stride % 8 for axis in range(3) for stride in strides[axis::4]) else 1
    return tuple(s if i % 4 == 3 else s // unit for i, s in enumerate(strides)), unit, dense


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(n - 1, 0).bit_length()


def lanes_of(dim: int) -> int:
    """What a pass takes a head_dim for: the next power of two, at least 32."""
    return max(power_of_two(dim), 32)  # a matrix product of half of them needs 16
