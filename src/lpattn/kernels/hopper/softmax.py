"""Softmax on packed pairs of float16 scores: the row maximum, and P in e4m3 without a single exponential.

A tile of scores S comes out of the tensor cores in float16. Everything here works on int32 tensors whose elements are
two neighbouring scores, so that one instruction does two of them; nothing is left to the compiler's vectorizer.

P = 2^(x - m + 8) is rounded to e4m3, where x = S * c is the logit in powers of two, c a power of two per row, and m the
row's reference. The code of an e4m3 number grows by 8 per power of two, and between powers of two it is linear in the
number. So code = 8 * (x - m + 15), with what is missing between a power of two and its linear interpolation put right.

First t = x + (31 - m) in float16: one fused instruction, and where P is not below e4m3's numbers, t is in [16, 32),
where float16 has 64 steps per unit. The last instruction makes t * 8 - 128 a *subnormal* number: there float16 is fixed
point with the unit 2^-24, so that it rounds to an integer whose bits are at the bottom of the word. Tiny P would be
negative, and are cut off at 0 by the same instruction. NaN is all ones, which is e4m3's NaN.

What is exact: c is a power of two and 31 - m is a float16 by construction (:func:`refer`), so that t is rounded
once; and the factors between tiles follow from the rounded offsets, so that all tiles of a row are weighted alike.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

LINEAR = gl.constexpr(0)
"""2^f by 1 + f: a relative error of P of 2.95 % (standard deviation), where rounding 2^f itself has 2.46 %."""
STEP = gl.constexpr(1)
"""A constant is taken from the middle half of each octave: 2.57 %."""
EX2 = gl.constexpr(2)
"""2^x by the special function unit, rounded: 2.46 %. What the others are measured against."""

QK_MAX = gl.constexpr(5.5)
"""Largest magnitude of q and k in e4m3. With head_dim 256, |S| is then at most 7744: below _MOST, and below 2^13, where
the steps of float16 that m is rounded up by reach 8, and P's largest values would leave e4m3's normal numbers."""

UNSEEN = gl.constexpr(0x7C007C00)
"""31 - m of a row that saw no key yet: twice float16's inf."""

_MOST = gl.constexpr(8000.0)
_LARGEST_FACTOR = gl.constexpr(32768.0)
_SMALLEST_FACTOR = gl.constexpr(2.0**-24)
"""The smallest float16: with a factor of zero, -inf would become NaN. Its logits are all below 0.0005."""
_HIDDEN = gl.constexpr(8192.0)
"""31 - m of a row of which a tile shows nothing: more than any other, and finite, so that -inf stays -inf."""


@gluon.constexpr_function
def top(kind):
    """T of a logit that equals the reference.

    By 1 + f, P would be too large by 4 % on the average, by 2.4 % with STEP, and a row's largest weight right: its code
    is a whole number. So as much is taken off before codes are rounded, 3 and 2 steps of 64: sums are right then, up to
    0.7 % and 0.2 %, and the largest code is rounded to what it was. Where logits are nearly equal, sums are not:
    :class:`lpattn.quantize.Exponential`. With STEP, a quarter more makes a bit tell the middle half of an octave.
    """
    return {LINEAR.value: 31.0 - 3 / 64, STEP.value: 31.25 - 2 / 64, EX2.value: 8.0}[kind]


@gluon.jit
def factor_of(q_scale, k_scale):
    """Powers of two that make logits, in powers of two, of scores: float32 [BM]."""
    return gl.maximum(gl.minimum(q_scale * k_scale, _LARGEST_FACTOR), _SMALLEST_FACTOR)


@gluon.jit
def refer(largest, c, before, KIND: gl.constexpr, MASKED: gl.constexpr):
    """Raise the references of rows to the largest score of a tile.

    Logits beyond 8000 powers of two are not told apart by scores of 11 bits: there the factor becomes 1.

    Args:
        largest: of the tile's scores, float32 [BM]; -inf only where MASKED.
        c: from :func:`factor_of`.
        before: 31 - m so far, twice as float16 in int32 [BM].

    Returns:
        (c; 31 - m in the form of ``before``; the same in float32)
    """
    start: gl.constexpr = top(KIND)
    offset = start - largest * c
    beyond = gl.abs(offset) > _MOST
    c = gl.where(beyond, 1.0, c)
    offset = gl.where(beyond, start - largest, offset)
    if MASKED:
        offset = gl.minimum(offset, _HIDDEN)
    # Rounded to the nearest float16 it may be too large by half a last place: less than an octave up to 2048, where
    # P's largest values are below 448. Beyond, as much is taken off.
    offset = offset - gl.maximum(gl.abs(offset) - 1024.0, 0.0) * 2.0**-10
    after, value = gl.inline_asm_elementwise(
        """{ .reg .b32 new; .reg .b16 low, high;
        cvt.rn.f16x2.f32 new, $2, $2;
        min.f16x2 $0, new, $3;
        mov.b32 {low, high}, $0;
        cvt.f32.f16 $1, low; }""",
        "=&r,=f,f,r", [offset, before], dtype=(gl.int32, gl.float32), is_pure=True, pack=1,
    )  # fmt: skip
    return c, after, value


@gluon.jit
def reference_of(offset, KIND: gl.constexpr):
    """The reference m of a row, in powers of two, of 31 - m in float32."""
    start: gl.constexpr = top(KIND)
    return start - offset


@gluon.jit
def pair_up(s, BM: gl.constexpr, BN: gl.constexpr):
    """float16 scores [BM, BN] to int32 [BM, BN / 2]: neighbours, the first one in the lower half."""
    first, second = gl.split(s.reshape([BM, BN // 2, 2]))
    return gl.inline_asm_elementwise(
        "mov.b32 $0, {$1, $2};", "=r,h,h", [first, second], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def hide(pairs, visible, BM: gl.constexpr, BN: gl.constexpr):
    """-inf for every score from column ``visible`` [BM] on, in the layout of the rows of ``pairs``."""
    layout: gl.constexpr = pairs.type.layout
    column = (2 * gl.arange(0, BN // 2, layout=gl.SliceLayout(0, layout)))[None, :]
    visible = gl.convert_layout(visible, gl.SliceLayout(1, layout))[:, None]
    # 0xFC00 is -inf.
    first_only = (pairs & 0xFFFF) | -67108864
    return gl.where(visible > column + 1, pairs, gl.where(visible > column, first_only, -67044352))


@gluon.jit
def hide_unseen(pairs, words, BM: gl.constexpr, BN: gl.constexpr):
    """-inf for every score whose bit is 0.

    Args:
        pairs: scores, int32 [BM, BN / 2].
        words: int32 [BM, BN / 32], bits as :class:`lpattn.kernels.mask_tiles.MaskTiles` has them, in
            the layout in which ``pairs`` has its rows and blocks of 32 keys.
    """
    # Thread t of four has pairs 4i + t: of a word's byte i, the bits 2t and 2t + 1.
    apart = pairs.reshape([BM, BN // 32, 4, 4])
    layout: gl.constexpr = apart.type.layout
    i = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, layout))))
    t = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, layout))))
    moved = words[:, :, None] >> (2 * t)[None, None, :]
    # The highest bits of bytes, of which prmt makes whole bytes: twice that of the first score, then of the second.
    first = (moved << 7)[:, :, None, :].broadcast_to([BM, BN // 32, 4, 4])
    second = (moved << 6)[:, :, None, :].broadcast_to([BM, BN // 32, 4, 4])
    select = (0xCC88 + 0x1111 * i)[None, None, :, None].broadcast_to([BM, BN // 32, 4, 4])
    # 0xE2: (a & b) | (c & ~b). 0xFC00 is -inf.
    hidden = gl.inline_asm_elementwise(
        "{ .reg .b32 seen; prmt.b32 seen, $2, $3, $4; lop3.b32 $0, $1, seen, 0xFC00FC00, 0xE2; }",
        "=r,r,r,r,r", [apart, first, second, select], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip
    return gl.convert_layout(hidden.reshape([BM, BN // 2]), pairs.type.layout, assert_trivial=True)


@gluon.jit
def row_max(pairs, BM: gl.constexpr, N: gl.constexpr, row_layout: gl.constexpr):
    """Largest score of each row, float32 [BM], of pairs [BM, N]. NaN is left out."""
    if N > 4:
        left, right = gl.split(pairs.reshape([BM, 2, N // 2]).permute([0, 2, 1]))
        larger = gl.inline_asm_elementwise(
            "max.f16x2 $0, $1, $2;", "=r,r,r", [left, right], dtype=gl.int32, is_pure=True, pack=1
        )
        return row_max(larger, BM, N // 2, row_layout)
    else:
        # The last four are in four lanes.
        one = gl.inline_asm_elementwise(
            "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $1; max.f16 lo, lo, hi; cvt.f32.f16 $0, lo; }",
            "=f,r", [pairs], dtype=gl.float32, is_pure=True, pack=1,
        )  # fmt: skip
        return gl.convert_layout(gl.max(one, 1), row_layout)


@gluon.jit
def _over(x, N: gl.constexpr, layout: gl.constexpr):
    """[BM] to [BM, N] in a layout."""
    return gl.convert_layout(x, gl.SliceLayout(1, layout))[:, None].broadcast_to([x.shape[0], N])


@gluon.jit
def exponentials(pairs, offset, c, BM: gl.constexpr, BN: gl.constexpr, KIND: gl.constexpr):
    """P of a tile in e4m3, each number in 16 bits, which may be where the scores were; with EX2 done to the end.

    Args:
        pairs: scores, int32 [BM, BN / 2].
        offset: 31 - m of each row, twice as float16 in int32 [BM].
        c: powers of two per row, such that the logits are S * c.

    Returns:
        (int32 [BM, BN / 4], codes of the first two keys of four in the order of a permuted V; the same of the others)
    """
    # Of 16 keys, a thread has 2t, 2t+1, 8+2t and 9+2t: four bytes that V's permutation makes neighbours.
    grouped = pairs.reshape([BM, BN // 16, 2, 4]).permute([0, 1, 3, 2]).reshape([BM, BN // 4, 2])
    low, high = gl.split(grouped)
    layout: gl.constexpr = low.type.layout
    twice = gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $1, $1;", "=r,f", [c], dtype=gl.int32, is_pure=True, pack=1)
    factor = _over(twice, BN // 4, layout)
    offset = _over(offset, BN // 4, layout)
    if KIND == EX2:
        codes = gl.inline_asm_elementwise(
            """{ .reg .b32 a, b; .reg .b16 first, second;
            fma.rn.f16x2 a, $1, $3, $4; fma.rn.f16x2 b, $2, $3, $4;
            ex2.approx.f16x2 a, a; ex2.approx.f16x2 b, b;
            cvt.rn.satfinite.e4m3x2.f16x2 first, a; cvt.rn.satfinite.e4m3x2.f16x2 second, b;
            mov.b32 $0, {first, second}; }""",
            "=r,r,r,r,r", [low, high, factor, offset], dtype=gl.int32, is_pure=True, pack=1,
        )  # fmt: skip
        return codes, codes
    else:
        return gl.inline_asm_elementwise(
            _assembly(KIND), "=&r,=r,r,r,r,r", [low, high, factor, offset],
            dtype=(gl.int32, gl.int32), is_pure=True, pack=1,
        )  # fmt: skip


@gluon.constexpr_function
def _assembly(kind):
    """PTX for two pairs of scores, a factor and an offset: to two pairs of codes."""
    low, high, factor, offset = ("$2", "$3", "$4", "$5")
    # Numbers of float16, twice: 8 and -128 or -130 steps of 2^-24; -3 / 64 in what makes it of 32 such steps.
    constants = {"eight": 0x0008, "start": 0x8082 if kind == STEP else 0x8080, "three": 0xF600}
    lines = [f".reg .b32 {', '.join(['a', 'b', 'u', *constants])};"]
    lines += [f"mov.b32 {name}, {word * 0x10001:#010x};" for name, word in constants.items()]
    for word, scores in (("a", low), ("b", high)):
        lines.append(f"fma.rn.f16x2 {word}, {scores}, {factor}, {offset};")
        if kind == STEP:
            # Bit 5, a half, is set in the middle half of an octave: there 3 steps of 64 are taken off.
            lines += [f"and.b32 u, {word}, 0x00200020;", f"fma.rn.f16x2 {word}, u, three, {word};"]
        lines.append(f"fma.rn.relu.f16x2 {word}, {word}, eight, start;")
    lines += ["mov.b32 $0, a;", "mov.b32 $1, b;"]
    return f"{{ {' '.join(lines)} }}"


@gluon.jit
def to_codes(low, high, KIND: gl.constexpr):
    """Both parts of :func:`exponentials` in one: int32 [BM, BN / 4], each the codes of four keys."""
    if KIND == EX2:
        return keep(low)
    else:
        return gl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, 0x6420;", "=r,r,r", [low, high], dtype=gl.int32, is_pure=False, pack=1
        )


@gluon.jit
def keep(codes):
    """The same registers, written here: they must not be written while a product still reads their predecessors."""
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [codes], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def as_operand(codes, BM: gl.constexpr, BN: gl.constexpr, layout: gl.constexpr):
    """Codes [BM, BN / 4] as float8e4nv [BM, BN] in the layout of a product's left operand, without an instruction.

    An e4m3 tensor that lives across a loop's iterations would be taken apart into bytes; int32 is not.
    """
    # Of four registers, which hold (row, k), (row + 8, k), (row, k + 16) and (row + 8, k + 16), the asm's output j is
    # register j, and the tensor that it becomes has byte i where register i was.
    r0, r1, r2, r3 = gl.inline_asm_elementwise(
        "mov.b32 $0, $4; mov.b32 $1, $5; mov.b32 $2, $6; mov.b32 $3, $7;",
        "=r,=r,=r,=r,r,r,r,r", [codes],
        dtype=(gl.float8e4nv, gl.float8e4nv, gl.float8e4nv, gl.float8e4nv), is_pure=False, pack=4,
    )  # fmt: skip
    # Axes: rows (16s, bit of the byte, 8), keys (32s, bit of the byte, 4), and the two bits of the register.
    bytes_of = gl.join(gl.join(r0, r1), gl.join(r2, r3)).reshape([BM // 16, 2, 8, BN // 32, 2, 4, 2, 2])
    return gl.convert_layout(bytes_of.permute([0, 6, 2, 3, 7, 5, 4, 1]).reshape([BM, BN]), layout, assert_trivial=True)
