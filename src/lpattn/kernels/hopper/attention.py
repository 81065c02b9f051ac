"""The kernel: one producer warp that loads tiles, and consumers of four warps, 64 query rows each, that attend.

The grid is persistent. For each tile of queries the key tiles are gone through from the last one, where causal masks
and the end of the keys lie, down to the first, so that the loop over most of them has no mask. An iteration starts
S = Q K^T of one tile together with the P V of the tile before, and computes P from S while P V is in flight.

Every tile's P V goes into an accumulator of its own and is added in float32: the tensor cores' own accumulation is
coarser, and would lose a V with a mean. The row sum counts what P V consumes: it is a product of P, as it was rounded,
with a tile of ones.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from lpattn.kernels.hopper.hadamard import transform_parts, transform_rest
from lpattn.kernels.hopper.softmax import (
    UNSEEN,
    as_operand,
    exponentials,
    factor_of,
    hide,
    hide_unseen,
    keep,
    pair_up,
    refer,
    reference_of,
    row_max,
    to_codes,
)

# Renamed in Triton 3.8.
load_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

KEYS = gl.constexpr(128)
"""Keys that share a scale, and that V is stored by."""

ROWS = gl.constexpr(64)
"""Query rows of a consumer."""

QUERIES = gl.constexpr(2)
"""Tiles of queries that are there at a time: the next one is loaded while the consumers still have the last one."""

_LN2 = gl.constexpr(0.6931471805599453)


@gluon.constexpr_function
def store_layout(width, bits, across):
    """Of a consumer's output [ROWS, width], with elements of so many bits, for stores of 16 bytes per thread.

    Each warp keeps the 16 rows that it has of a product's result, so that no other one is waited for. ``across`` of its
    threads are side by side on a row.
    """
    each = 128 // bits
    columns = [[0, 1 << i] for i in range(width.bit_length() - 1)]
    rows = [[1 << i, 0] for i in range(4)]
    start = each.bit_length() - 1
    end = start + min(across, width // each).bit_length() - 1
    lanes = [*columns[start:end], *rows][:5]
    registers = [*columns[:start], *columns[end:], *rows[5 - (end - start) :]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [ROWS.value, width])


@gluon.jit
def _stage(step, STAGES: gl.constexpr):
    """Where a step's tiles are, and the parity of its turn there."""
    number = step.to(gl.uint32)
    return (number % STAGES).to(gl.int32), (number // STAGES & 1).to(gl.int32)


@gluon.jit
def _release(empty, step, STAGES: gl.constexpr):
    """Say that a step's tiles may be overwritten."""
    stage, _ = _stage(step, STAGES)
    mbarrier.arrive(empty.index(stage), count=1)


@gluon.jit
def _back_and_forth(turn):
    """The tile of a program in a turn: the first program comes first in one turn, and last in the next."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    return turn * programs + gl.where(turn % 2 == 1, programs - 1 - program, program)


@gluon.jit
def _turns(tiles, CAUSAL: gl.constexpr):
    """Where a program's turns end: it goes from its own number on, in steps of the number of programs."""
    end = tiles
    if CAUSAL:
        all_have = tiles // gl.num_programs(0)
        one_more = gl.where(_back_and_forth(all_have) < tiles, 1, 0)
        end = gl.program_id(0) + (all_have + one_more) * gl.num_programs(0)
    return end


@gluon.jit
def _query_tile(index, turn, sizes, CAUSAL: gl.constexpr):
    """Which head (b * heads + h), which tile of its queries, and which KV head a program attends to in a turn."""
    heads, kv_heads, q_len, kv_len, q_tiles, tiles = sizes
    if CAUSAL:
        # The longest tiles of all heads first: what is left over at the end is short. And what a program has more of in
        # one turn it has less of in the next.
        index = _back_and_forth(turn)
        of_head = tiles // q_tiles
        head, tile = index % of_head, q_tiles - 1 - index // of_head
    else:
        head, tile = index // q_tiles, index % q_tiles
    b, h = head // heads, head % heads
    return b, head, tile, b * kv_heads + h // (heads // kv_heads)


@gluon.jit
def _listed(b, head, tile, mask, sizes):
    """Where the key tiles of a query tile are listed, how many it sees in part or whole, and how many whole."""
    lists, list_counts, words, list_b, list_h, list_q, room, word_b, word_h, word_q = mask
    heads, kv_heads, q_len, kv_len, q_tiles, tiles = sizes
    at = b.to(gl.int64) * list_b + head % heads * list_h + tile * list_q
    whole = gl.load(list_counts + at * 2)
    return lists + at * 2 * room, whole + gl.load(list_counts + at * 2 + 1), whole


@gluon.jit
def _of_list(i, its_list, listed, whole, mask):
    """The i-th key tile of a list: those first of which something is hidden. Where none is listed, the first of all."""
    lists, list_counts, words, list_b, list_h, list_q, room, word_b, word_h, word_q = mask
    part = listed - whole
    return gl.load(its_list + gl.where(i < part, room + i, i - part), mask=i < listed, other=0)


@gluon.jit
def _key_tiles(b, tile, counts, sizes, ALL_ROWS: gl.constexpr, BN: gl.constexpr, CAUSAL: gl.constexpr):
    """Number of keys, of key tiles that a query tile sees, and of those that all of its rows see whole."""
    heads, kv_heads, q_len, kv_len, q_tiles, tiles = sizes
    keys = kv_len
    if counts is not None:
        keys = gl.load(counts + b)
    last, first = keys, keys
    if CAUSAL:
        last = gl.minimum(keys, tile * ALL_ROWS + ALL_ROWS)
        first = gl.minimum(keys, tile * ALL_ROWS + 1)
    return keys, gl.maximum((last + BN - 1) // BN, 1), first // BN


@gluon.jit
def _produce(descriptors, buffers, barriers, counts, mask, sizes, SHAPE: gl.constexpr):
    """Load Q, and per iteration a tile of K and the tile of V that belongs to the K before."""
    q_desc, k_desc, v_desc = descriptors
    q_buffer, k_buffer, v_buffer, ones = buffers
    q_full, q_empty, full, empty = barriers
    heads, kv_heads, q_len, kv_len, q_tiles, tiles = sizes
    BN: gl.constexpr = SHAPE[0]
    D: gl.constexpr = SHAPE[1]
    STAGES: gl.constexpr = SHAPE[2]
    CONSUMERS: gl.constexpr = SHAPE[3]
    CAUSAL: gl.constexpr = SHAPE[4]
    V_ROWS: gl.constexpr = SHAPE[14]
    LISTED: gl.constexpr = SHAPE[13]
    PARTS: gl.constexpr = KEYS // BN
    ALL_ROWS: gl.constexpr = CONSUMERS * ROWS
    blocks = (kv_len + KEYS - 1) // KEYS
    step = 0
    turn = 0
    for index in range(gl.program_id(0), _turns(tiles, CAUSAL), gl.num_programs(0)):
        b, head, tile, kv_head = _query_tile(index, turn, sizes, CAUSAL)
        keys, count, whole = _key_tiles(b, tile, counts, sizes, ALL_ROWS, BN, CAUSAL)
        if LISTED:
            its_list, listed, whole = _listed(b, head, tile, mask, sizes)
            count = gl.maximum(listed, 1)
        place, parity = _stage(turn, QUERIES)
        arrived = q_full.index(place)
        mbarrier.wait(q_empty.index(place), parity ^ 1)
        mbarrier.expect(arrived, ALL_ROWS * D)
        for w in gl.static_range(CONSUMERS):
            q_row = head * q_len + tile * ALL_ROWS + w * ROWS
            load_tile(q_desc, [q_row, 0], arrived, q_buffer.index(place * CONSUMERS + w))
        k_tile = count
        for i in range(count + 1):
            stage, parity = _stage(step, STAGES)
            v_tile = k_tile
            if LISTED:
                k_tile = _of_list(i, its_list, listed, whole, mask)
            else:
                k_tile = count - 1 - i
            has_k = i < count
            has_v = i > 0
            mbarrier.wait(empty.index(stage), parity ^ 1)
            mbarrier.expect(full.index(stage), BN * D, pred=has_k != has_v)
            mbarrier.expect(full.index(stage), 2 * BN * D, pred=has_k & has_v)
            k_row = kv_head * blocks * KEYS + k_tile * BN
            load_tile(k_desc, [k_row, 0], full.index(stage), k_buffer.index(stage), pred=has_k)
            v_row = (kv_head * blocks + v_tile // PARTS) * V_ROWS
            load_tile(v_desc, [v_row, v_tile % PARTS * BN], full.index(stage), v_buffer.index(stage), pred=has_v)
            step += 1
        turn += 1


@gluon.jit
def _attend_values(p, values, ones, zero, zero_sum, PART: gl.constexpr, PARTS: gl.constexpr):
    """Start P V, of a part of head_dim, and with the first part P times ones."""
    WIDTH: gl.constexpr = zero.shape[1]
    if PARTS > 1:
        values = values.slice(PART * WIDTH, WIDTH, 0)
    sums = zero_sum
    if PART == 0:
        LAYOUT: gl.constexpr = gl.DotOperandLayout(0, zero_sum.type.layout, 4)
        again = gl.convert_layout(p, LAYOUT, assert_trivial=True)
        sums = warpgroup_mma(again, ones.permute((1, 0)), zero_sum, use_acc=False, is_async=True)
    return warpgroup_mma(p, values.permute((1, 0)), zero, use_acc=False, is_async=True), sums


@gluon.jit
def _add(acc, part, factor):
    return acc * gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout))[:, None] + part


@gluon.jit
def _one_of_two(sums):
    """Of the equal columns [ROWS, 8] of P times ones, one for each thread."""
    first, _ = gl.split(sums.reshape([ROWS, 4, 2]))
    return first


@gluon.jit
def _add_rest(done, accs, p, values, ones, zero, zero_sum, factor):
    """All accumulators, of which the first are done: P V of the parts of the others is added, one after another."""
    FIRST: gl.constexpr = len(done)
    PARTS: gl.constexpr = len(accs)
    for index in gl.static_range(FIRST, PARTS):
        part, _ = _attend_values(p, values, ones, zero, zero_sum, index, PARTS)
        part = warpgroup_mma_wait(0, deps=[part])
        done = done + (_add(accs[index], part, factor),)  # noqa: RUF005 - no kernel can unpack tuples
    return done


@gluon.jit
def _quotient(a, b):
    """A / b, where that is a power of two: both are one, times the same factor."""
    return (a.to(gl.int32, bitcast=True) - b.to(gl.int32, bitcast=True) + 0x3F800000).to(gl.float32, bitcast=True)


@gluon.jit
def _consume(w: gl.constexpr, buffers, barriers, scales, outputs, counts, mask, sizes, SHAPE: gl.constexpr):
    """Attend with 64 rows of every query tile."""
    q_buffer, k_buffer, v_buffer, ones = buffers
    q_full, q_empty, full, empty = barriers
    heads, kv_heads, q_len, kv_len, q_tiles, tiles = sizes
    q_scale, k_scale, v_scale, v_constant = scales
    out, lse, lse_shift = outputs
    BN: gl.constexpr = SHAPE[0]
    D: gl.constexpr = SHAPE[1]
    STAGES: gl.constexpr = SHAPE[2]
    CONSUMERS: gl.constexpr = SHAPE[3]
    CAUSAL: gl.constexpr = SHAPE[4]
    KIND: gl.constexpr = SHAPE[5]
    PARTS: gl.constexpr = SHAPE[6]
    DIM: gl.constexpr = SHAPE[8]
    LANES: gl.constexpr = SHAPE[9]
    ACROSS: gl.constexpr = SHAPE[10]
    AHEAD: gl.constexpr = SHAPE[11]
    LISTED: gl.constexpr = SHAPE[13]
    HADAMARD: gl.constexpr = SHAPE[15]
    BLOCK_PARTS: gl.constexpr = KEYS // BN
    ALL_ROWS: gl.constexpr = CONSUMERS * ROWS
    WIDTH: gl.constexpr = D // PARTS
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 32])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    l_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, 32])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 4)
    s_rows: gl.constexpr = gl.SliceLayout(1, s_layout)
    o_rows: gl.constexpr = gl.SliceLayout(1, o_layout)
    out_layout: gl.constexpr = store_layout(WIDTH, out.dtype.element_ty.primitive_bitwidth, ACROSS)
    eight_layout: gl.constexpr = store_layout(WIDTH, 16, ACROSS)
    blocks = (kv_len + KEYS - 1) // KEYS
    s_zero = gl.zeros([ROWS, BN], gl.float16, s_layout)
    o_zero = gl.zeros([ROWS, WIDTH], gl.float32, o_layout)
    l_zero = gl.zeros([ROWS, 8], gl.float32, l_layout)
    step = 0
    turn = 0
    for index in range(gl.program_id(0), _turns(tiles, CAUSAL), gl.num_programs(0)):
        b, head, tile, kv_head = _query_tile(index, turn, sizes, CAUSAL)
        keys, count, whole = _key_tiles(b, tile, counts, sizes, ALL_ROWS, BN, CAUSAL)
        k_scales = k_scale + kv_head * blocks
        v_scales = v_scale + kv_head * blocks
        start = tile * ALL_ROWS + w * ROWS
        row = start + gl.arange(0, ROWS, layout=s_rows)
        q_scales = gl.load(q_scale + head.to(gl.int64) * q_len + row, mask=row < q_len, other=1.0)
        # How many keys each row sees.
        seen = gl.full([ROWS], 0, gl.int32, s_rows) + keys
        if CAUSAL:
            seen = gl.minimum(seen, row + 1)
        k_tile = count - 1
        if LISTED:
            its_list, listed, whole = _listed(b, head, tile, mask, sizes)
            count = gl.maximum(listed, 1)
            seen = _words_of_rows(b, head, start, mask, sizes, s_zero)
            k_tile = _of_list(0, its_list, listed, whole, mask)
        place, parity = _stage(turn, QUERIES)
        q = q_buffer.index(place * CONSUMERS + w)
        mbarrier.wait(q_full.index(place), parity)

        # The first tile has no P V beside it.
        stage, parity = _stage(step, STAGES)
        mbarrier.wait(full.index(stage), parity)
        s = warpgroup_mma(q, k_buffer.index(stage).permute((1, 0)), s_zero, use_acc=False, is_async=True)
        c = factor_of(q_scales, gl.load(k_scales + k_tile // BLOCK_PARTS))
        v_unit = gl.load(v_scales + k_tile // BLOCK_PARTS)
        s = warpgroup_mma_wait(0, deps=[s])
        step += 1
        pairs = _hidden(pair_up(s, ROWS, BN), seen, k_tile, s_zero, LISTED)
        unseen = gl.full([ROWS], UNSEEN, gl.int32, s_rows)
        c, offset, offset_value = refer(row_max(pairs, ROWS, BN // 2, s_rows), c, unseen, KIND, True)
        first, second = exponentials(pairs, offset, c, ROWS, BN, KIND)
        codes = to_codes(first, second, KIND)
        sums = _one_of_two(l_zero)
        accs = (o_zero,) * PARTS
        factor = gl.full([ROWS], 1.0, gl.float32, s_rows)
        change = 1.0
        if AHEAD:
            stage, parity = _stage(step, STAGES)
            mbarrier.wait(full.index(stage), parity)
        if LISTED | CAUSAL & (ALL_ROWS > BN):
            for i in range(1, gl.maximum(count - whole, 1)):
                if LISTED:
                    k_tile = _of_list(i, its_list, listed, whole, mask)
                else:
                    k_tile -= 1
                accs, sums, codes, offset, offset_value, factor, change, v_unit = _iterate(
                    q, buffers, barriers, k_scales, v_scales, q_scales, seen, step, k_tile,
                    accs, sums, codes, offset, offset_value, factor, change, v_unit,
                    s_zero, o_zero, l_zero, SHAPE, True,
                )  # fmt: skip
                step += 1
        for i in range(gl.maximum(count - whole, 1), count):
            if LISTED:
                k_tile = _of_list(i, its_list, listed, whole, mask)
            else:
                k_tile -= 1
            accs, sums, codes, offset, offset_value, factor, change, v_unit = _iterate(
                q, buffers, barriers, k_scales, v_scales, q_scales, seen, step, k_tile,
                accs, sums, codes, offset, offset_value, factor, change, v_unit,
                s_zero, o_zero, l_zero, SHAPE, False,
            )  # fmt: skip
            step += 1
        mbarrier.arrive(q_empty.index(place), count=1)

        # The last tile's P V.
        stage, parity = _stage(step, STAGES)
        p = as_operand(codes, ROWS, BN, p_layout)
        _release(empty, step - 1, STAGES)
        if not AHEAD:
            mbarrier.wait(full.index(stage), parity)
        part, part_sum = _attend_values(p, v_buffer.index(stage), ones, o_zero, l_zero, 0, PARTS)
        part, part_sum = warpgroup_mma_wait(0, deps=[part, part_sum])
        sums = _add(sums, _one_of_two(part_sum), factor)
        lowest = (_add(accs[0], part, factor * change),)
        accs = _add_rest(lowest, accs, p, v_buffer.index(stage), ones, o_zero, l_zero, factor * change)
        _release(empty, step, STAGES)
        step += 1
        turn += 1

        total = gl.convert_layout(gl.max(sums, 1), s_rows)
        # A row that sees no key is 0. NaN is not equal to 0.
        empty_row = total == 0.0
        inverse = gl.where(empty_row, 0.0, v_unit / total)
        if lse is not None:
            log = reference_of(offset_value, KIND) - 8.0 + gl.log2(total)
            at = head.to(gl.int64) * q_len + row
            if lse_shift is not None:
                log += gl.load(lse_shift + at, mask=row < q_len, other=0.0)
            gl.store(lse + at, gl.where(empty_row, -float("inf"), log * _LN2), mask=row < q_len)
        inverse = gl.convert_layout(inverse, o_rows)
        rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, out_layout))[:, None]
        base = out + ((b * q_len + start).to(gl.int64) * heads + head % heads) * DIM
        constants = v_constant + kv_head * LANES
        sees_none = gl.convert_layout(empty_row, o_rows)
        if HADAMARD:
            parts = ()
            for index in gl.static_range(PARTS):
                part = _attended(accs[index], inverse, constants, sees_none, index, LANES, LISTED)
                parts = parts + (part * LANES**-0.5,)  # noqa: RUF005
            parts = transform_parts(parts, LANES)
        for part_index in gl.static_range(PARTS):
            if HADAMARD:
                value = transform_rest(parts[part_index], eight_layout)
            else:
                value = _attended(accs[part_index], inverse, constants, sees_none, part_index, LANES, LISTED)
            if out.dtype.element_ty == gl.float16:
                # Rounding of V must not make inf of what exact attention keeps finite; nor a number of NaN.
                value = gl.where(gl.abs(value) > 65504.0, gl.where(value > 0.0, 65504.0, -65504.0), value)
            value = gl.convert_layout(value.to(out.dtype.element_ty), out_layout)
            columns = part_index * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, out_layout))[None, :]
            at = base + rows * (heads * DIM) + columns
            gl.store(at, value, mask=(start + rows < q_len) & (columns < DIM))


@gluon.jit
def _attended(acc, inverse, constants, sees_none, PART: gl.constexpr, LANES: gl.constexpr, LISTED: gl.constexpr):
    """What a part of an accumulator says: weighted by the inverse of row sums, with V's constant."""
    WIDTH: gl.constexpr = acc.shape[1]
    lanes = PART * WIDTH + gl.arange(0, WIDTH, layout=gl.SliceLayout(0, acc.type.layout))
    value = acc * inverse[:, None] + gl.load(constants + lanes, mask=lanes < LANES, other=0.0)[None, :]
    if LISTED:
        # Without a mask, who sees no key is in a batch entry without any, and the constant is 0.
        value = gl.where(sees_none[:, None], 0.0, value)
    return value


@gluon.jit
def _words_of_rows(b, head, start, mask, sizes, s_zero):
    """Where a mask's words of a head begin, and the number of the first one of each row from ``start`` on."""
    lists, list_counts, words, list_b, list_h, list_q, room, word_b, word_h, word_q = mask
    heads, kv_heads, q_len, kv_len, q_tiles, tiles = sizes
    BN: gl.constexpr = s_zero.shape[1]
    apart: gl.constexpr = pair_up(s_zero, ROWS, BN).reshape([ROWS, BN // 32, 4, 4]).type.layout
    layout: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(2, apart))
    # Rows behind the last one are not written: they may see what that one sees.
    row = gl.minimum(start + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout)), q_len - 1)
    return words + b.to(gl.int64) * word_b + (head % heads).to(gl.int64) * word_h, row * word_q


@gluon.jit
def _hidden(pairs, seen, k_tile, s_zero, LISTED: gl.constexpr):
    """Scores of a tile of keys, -inf where a row does not see its key.

    ``seen``: how many keys each row sees; with LISTED, a mask's words, and the first one of each row.
    """
    BN: gl.constexpr = s_zero.shape[1]
    if LISTED:
        words, rows = seen
        word = gl.arange(0, BN // 32, layout=gl.SliceLayout(0, rows.type.layout.parent))[None, :]
        hidden = hide_unseen(pairs, gl.load(words + (rows[:, None] + (word + k_tile * (BN // 32)))), ROWS, BN)
    else:
        hidden = hide(pairs, seen - k_tile * BN, ROWS, BN)
    return hidden


@gluon.jit
def _iterate(
    q, buffers, barriers, k_scales, v_scales, q_scales, seen, step, k_tile,
    accs, sums, codes, offset, offset_value, factor, change, v_unit,
    s_zero, o_zero, l_zero, SHAPE: gl.constexpr, MASKED: gl.constexpr,
):  # fmt: skip
    """S of a key tile and P V of the one before; P of this one.

    ``codes`` are P of the tile before, ``factor`` is what all that was added before it is multiplied with, and
    ``change`` what V's unit did at that point.
    """
    q_buffer, k_buffer, v_buffer, ones = buffers
    q_full, q_empty, full, empty = barriers
    BN: gl.constexpr = SHAPE[0]
    STAGES: gl.constexpr = SHAPE[2]
    KIND: gl.constexpr = SHAPE[5]
    PARTS: gl.constexpr = SHAPE[6]
    LATE: gl.constexpr = SHAPE[7]
    AHEAD: gl.constexpr = SHAPE[11]
    EARLY: gl.constexpr = SHAPE[12]
    LISTED: gl.constexpr = SHAPE[13]
    BLOCK_PARTS: gl.constexpr = KEYS // BN
    s_rows: gl.constexpr = gl.SliceLayout(1, s_zero.type.layout)
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_zero.type.layout, 4)
    stage, parity = _stage(step, STAGES)
    p = as_operand(codes, ROWS, BN, p_layout)
    if not AHEAD:
        _release(empty, step - 1, STAGES)
        mbarrier.wait(full.index(stage), parity)
    s = warpgroup_mma(q, k_buffer.index(stage).permute((1, 0)), s_zero, use_acc=False, is_async=True)
    part, part_sum = _attend_values(p, v_buffer.index(stage), ones, o_zero, l_zero, 0, PARTS)
    k_unit = gl.load(k_scales + k_tile // BLOCK_PARTS)
    next_v = gl.load(v_scales + k_tile // BLOCK_PARTS)
    # Only P V, and P times ones, may still run.
    s = warpgroup_mma_wait(2, deps=[s])
    pairs = pair_up(s, ROWS, BN)
    if MASKED:
        pairs = _hidden(pairs, seen, k_tile, s_zero, LISTED)
    # In this order: with the factor in front of the maximum, the compiler's schedule is slower at head_dim 128.
    largest = row_max(pairs, ROWS, BN // 2, s_rows)
    c, offset, next_value = refer(largest, factor_of(q_scales, k_unit), offset, KIND, MASKED)
    if PARTS > 1:
        part, part_sum = warpgroup_mma_wait(0, deps=[part, part_sum])
        sums = _add(sums, _one_of_two(part_sum), factor)
        lowest = _add(accs[0], part, factor * change)
        part, _ = _attend_values(p, v_buffer.index(stage), ones, o_zero, l_zero, 1, PARTS)
    # Made beside P: where that is late, the compiler's schedule is better so.
    if not LATE:
        next_factor = gl.exp2(next_value - offset_value)
        first, second = exponentials(pairs, offset, c, ROWS, BN, KIND)
        if EARLY:
            codes = to_codes(first, second, KIND)
    if AHEAD:
        # What the step before has read is released as late as here, next to a wait: the compiler has the warps meet in
        # front of either, and once less if these are neighbours. A wait is a branch: without one, ptxas would move the
        # end of P V in front of the lines above.
        _release(empty, step - 1, STAGES)
        after, parity = _stage(step + 1, STAGES)
        mbarrier.wait(full.index(after), parity)
    if PARTS > 1:
        part = warpgroup_mma_wait(0, deps=[part])
        done = (lowest, _add(accs[1], part, factor * change))
        accs = _add_rest(done, accs, p, v_buffer.index(stage), ones, o_zero, l_zero, factor * change)
    else:
        part, part_sum = warpgroup_mma_wait(0, deps=[part, part_sum])
        sums = _add(sums, _one_of_two(part_sum), factor)
        accs = (_add(accs[0], part, factor * change),)
    if LATE:
        next_factor = gl.exp2(next_value - offset_value)
        first, second = exponentials(pairs, offset, c, ROWS, BN, KIND)
    if EARLY:
        codes = keep(codes)
    else:
        codes = to_codes(first, second, KIND)
    return accs, sums, codes, offset, next_value, next_factor, _quotient(v_unit, next_v), next_v


_VARYING = [
    "heads", "kv_heads", "q_len", "kv_len", "q_tiles", "tiles",
    "list_b", "list_h", "list_q", "room", "word_b", "word_h", "word_q",
]  # fmt: skip


@gluon.jit(do_not_specialize=_VARYING)
def attention(
    q_scale, k_scale, v_scale, v_constant, out, lse, lse_shift, counts, lists, list_counts, words,
    q_desc, k_desc, v_desc, heads, kv_heads, q_len, kv_len, q_tiles, tiles,
    list_b, list_h, list_q, room, word_b, word_h, word_q,
    BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CONSUMERS: gl.constexpr, CAUSAL: gl.constexpr,
    KIND: gl.constexpr, PARTS: gl.constexpr, LATE: gl.constexpr, DIM: gl.constexpr, LANES: gl.constexpr,
    ACROSS: gl.constexpr, AHEAD: gl.constexpr, EARLY: gl.constexpr, REGISTERS: gl.constexpr, V_ROWS: gl.constexpr,
    HADAMARD: gl.constexpr,
):  # fmt: skip
    """Attention of quantized q, k and v; see :mod:`lpattn.kernels.hopper`.

    Args:
        q_scale: [B, H, q_len]. k_scale, v_scale: [B, Hkv, blocks]. v_constant: [B, Hkv, LANES]. All float32.
        out: [B, q_len, H, DIM]. lse, lse_shift: float32 [B, H, q_len], or None. counts: int32 [B], or None.
        lists, list_counts, words: of :class:`lpattn.kernels.mask_tiles.MaskTiles`, or None. Key tiles of a head's tile
            of queries are the (b * list_b + h * list_h + tile * list_q)-th pair of lists, with room for ``room`` each;
            words of a query begin at b * word_b + h * word_h + query * word_q.
        q_desc: e4m3 [B * H * q_len, PITCH], tiles of [ROWS, D]. k_desc: [B * Hkv * blocks * KEYS, PITCH], of [BN, D].
        v_desc: [B * Hkv * blocks * V_ROWS, KEYS], of [D, BN].
        HADAMARD: V, and V's constant, are transformed over their LANES lanes: the output is transformed back.
    """
    q_buffer = gl.allocate_shared_memory(gl.float8e4nv, [QUERIES * CONSUMERS, ROWS, D], q_desc.layout)
    k_buffer = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, BN, D], k_desc.layout)
    v_buffer = gl.allocate_shared_memory(gl.float8e4nv, [STAGES, D, BN], v_desc.layout)
    one_layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [4, 1], [1, 0])
    # 0x38 is 1. ptxas 12.8 makes garbage of a cast of 1.0.
    one = gl.full([8, BN], 0x38, gl.int8, one_layout).to(gl.float8e4nv, bitcast=True)
    ones = gl.allocate_shared_memory(gl.float8e4nv, [8, BN], v_desc.layout, one)
    barrier: gl.constexpr = mbarrier.MBarrierLayout()
    q_full = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], barrier)
    q_empty = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], barrier)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], barrier)
    for i in gl.static_range(QUERIES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=CONSUMERS)
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=CONSUMERS)
    fence_async_shared()
    descriptors = (q_desc, k_desc, v_desc)
    buffers = (q_buffer, k_buffer, v_buffer, ones)
    barriers = (q_full, q_empty, full, empty)
    scales = (q_scale, k_scale, v_scale, v_constant)
    outputs = (out, lse, lse_shift)
    mask = (lists, list_counts, words, list_b, list_h, list_q, room, word_b, word_h, word_q)
    sizes = (heads, kv_heads, q_len, kv_len, q_tiles, tiles)
    SHAPE: gl.constexpr = (
        BN, D, STAGES, CONSUMERS, CAUSAL, KIND, PARTS, LATE, DIM, LANES, ACROSS, AHEAD, EARLY, lists is not None,
        V_ROWS, HADAMARD,
    )  # fmt: skip
    # The second and third arguments: warps and registers of all but the first.
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (_consume, (0, buffers, barriers, scales, outputs, counts, mask, sizes, SHAPE)),
                (_consume, (1, buffers, barriers, scales, outputs, counts, mask, sizes, SHAPE)),
                (_produce, (descriptors, buffers, barriers, counts, mask, sizes, SHAPE)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consume, (0, buffers, barriers, scales, outputs, counts, mask, sizes, SHAPE)),
                (_consume, (1, buffers, barriers, scales, outputs, counts, mask, sizes, SHAPE)),
                (_consume, (2, buffers, barriers, scales, outputs, counts, mask, sizes, SHAPE)),
                (_produce, (descriptors, buffers, barriers, counts, mask, sizes, SHAPE)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )
