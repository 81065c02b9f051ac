"""Rows, heads and batches that differ from the others, wherever that begins: the proof looks at rows of every kind.

Graphs are made without Dynamo, which would take a second each.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from lpattn import ops
from lpattn.compile.blocks import Partition, block_of, elements
from lpattn.compile.graph import fuse_rope
from lpattn.compile.linear import PullBack
from lpattn.compile.proof import dependents
from lpattn.compile.sizes import Sizes
from lpattn.compile.terms import Points
from lpattn.settings import Settings
from lpattn.types import Provenance

REFERENCE = Settings("bf16_reference", provenance=Provenance.MODEL).text
FUSED = (ops.rope_sdpa, ops.rope_sdpa_lse)
B, H, S, D = 2, 6, 300, 8


def traced(run, *inputs):
    return make_fx(
        torch.func.functionalize(run, remove="mutations"),
        tracing_mode="fake",
        decomposition_table=select_decomp_table(),
    )(*inputs)


def rotated(x, cos, sin):
    return x * cos + torch.cat((-x[..., D // 2 :], x[..., : D // 2]), -1) * sin


def with_write(write, before):
    """Attention of rotated q and k [B, H, S, D], q written to before or after that: ``write(q, q as it was)``."""

    def run(q, k, v, cos, sin):
        changed = q.clone() if before else rotated(q, cos, sin).clone()
        write(changed, q)
        changed = rotated(changed, cos, sin) if before else changed
        return ops.sdpa(changed, rotated(k, cos, sin), v, None, 0.0, False, None, None, REFERENCE)

    return run


def inputs():
    torch.manual_seed(0)
    angle = torch.arange(S)[:, None] * 10.0 ** -(torch.arange(D) % (D // 2))
    return *torch.randn(3, B, H, S, D), angle.cos(), angle.sin()


def fused(run, given):
    """The call of attention after the pass; what it computes is what it was before."""
    want, graph = run(*given), traced(run, *given)
    fuse_rope(graph.graph)
    graph.graph.lint()
    graph.recompile()
    torch.testing.assert_close(graph(*given), want, rtol=2e-5, atol=2e-5)
    (call,) = [node for node in graph.graph.nodes if node.target in (*FUSED, ops.sdpa)]
    return call


# Rows are written over that no number in the graph is the place of.
def slice_of_a_slice(y, x):
    y[:, :, 5:][:, :, 7:9] = 0.0


def last_of_a_slice(y, x):
    y[:, :, 10:-40][:, :, -3:-1] = x[:, :, 7:9]


def of_the_transposed(y, x):
    y.transpose(1, 2)[:, 100:][:, 57:58] = 1.0


def of_heads_in_one_dimension(y, x):
    y.flatten(0, 1)[7:][2:3, 50:][:, 31:33] = 1.5 * x[1:2, 3, 81:83]


def of_rows_in_one_dimension(y, x):
    y.view(-1, D)[1000:][217] = 0.0


def of_elements_in_one_dimension(y, x):
    y.view(-1)[12345:][3000:3003] = 0.0


def every_seventh(y, x):
    y[:, :, 11:][:, :, 2::7] = x[:, :, 13::7]


def every_ninth_of_one_head(y, x):
    y[:, 2:][:, 1, 3:][:, 5::9][:, 4] = x[:, 3, 40]


def of_windows(y, x):
    y.view(B, H, 15, 20, D)[:, :, 3:][:, :, 4, 6:][:, :, 7] = x[:, :, 140]


def one_element(y, x):
    y[0, 3, 20, 5] = 0.0


def one_element_of_slices(y, x):
    y[1:][0, 2:][1, 20:][33, 5] = 0.0


def of_one_batch_and_head(y, x):
    y[1:][:, 2:][:, 2, 17:][:, 200:] = x[1, 4, 217:]


WRITES = [
    *(slice_of_a_slice, last_of_a_slice, of_the_transposed, of_heads_in_one_dimension, of_rows_in_one_dimension),
    *(of_elements_in_one_dimension, every_seventh, every_ninth_of_one_head, of_windows, one_element),
    *(one_element_of_slices, of_one_batch_and_head),
]


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_write_after_the_rotation_is_seen(write):
    given = inputs()
    untouched = with_write(lambda y, x: None, False)
    assert fused(untouched, given).target in FUSED
    run = with_write(write, False)
    assert not torch.allclose(run(*given), untouched(*given), rtol=1e-3, atol=1e-3), "these numbers would not show it"
    call = fused(run, given)
    assert call.target is ops.sdpa
    assert call.args[9].startswith("q: ")


@pytest.mark.parametrize("write", WRITES, ids=lambda write: write.__name__)
def test_a_write_before_the_rotation_is_no_matter(write):
    assert fused(with_write(write, True), inputs()).target in FUSED


def test_a_write_of_what_is_there_is_none():
    def write(y, x):
        y[:, :, 5:][:, :, 7:9] = y[:, :, 12:14].clone()

    assert fused(with_write(write, False), inputs()).target in FUSED


def position(x):
    return torch.arange(x.shape[2])[:, None]


def windows(x):
    return x.unflatten(2, (10, 30)).transpose(2, 3).flatten(2, 3)


# By name: what becomes of q after the rotation, and what the reason must name.
NEAR = {
    "index_put": (lambda y, x: y.index_put((torch.tensor([1]), torch.tensor([2])), x[:1, 0]), "index_put"),
    "masked_fill": (lambda y, x: y.masked_fill(position(y) == 12, 0.0), "where"),
    "where": (lambda y, x: torch.where(position(y) < 12 + 5, x, y), "where"),
    "mask": (lambda y, x: y * (position(y) != 40).float(), "multiplies by a second tensor"),
    "bool_mask": (lambda y, x: y * (position(y) != 40), "multiplies by torch.bool"),
    "roll": (lambda y, x: y.roll(1, 2), "index"),
    "flip": (lambda y, x: y.flip(1), "rev"),
    "scatter": (lambda y, x: y.scatter(2, torch.full((B, H, 1, D), 77), 0.3), "scatter"),
    "gather": (lambda y, x: y.gather(2, torch.zeros_like(y, dtype=torch.long)), "gather"),
    "padded": (lambda y, x: torch.nn.functional.pad(y[:, :, 1:], (0, 0, 1, 0)), "constant_pad_nd"),
    "zeros_first": (lambda y, x: torch.cat((torch.zeros_like(y[:, :, :3]), y[:, :, 3:]), 2), "is 0, whatever"),
    "last_row": (lambda y, x: torch.cat((y[:, :, :-1], x[:, :, -1:]), 2), "row 299, head 0, batch 0 is not rotated"),
    "last_head": (lambda y, x: torch.cat((y[:, :-1], -y[:, -1:]), 1), "is not rotated, and in other rows it is"),
    "one_batch": (lambda y, x: torch.cat((y[:1], 2.0 * y[1:]), 0), "is not rotated, and in other rows it is"),
    "other_windows": (lambda y, x: windows(y), "other rows or heads"),
    "heads_swapped": (lambda y, x: y.unflatten(1, (3, 2)).transpose(1, 2).flatten(1, 2), "other rows or heads"),
    "rows_twice": (lambda y, x: y[:, :, :150].repeat(1, 1, 2, 1), "other rows or heads"),
    "one_batch_twice": (lambda y, x: y[:1].expand(2, -1, -1, -1), "other rows or heads"),
    "rows_of_heads": (lambda y, x: y.transpose(1, 2).reshape(B, H, S, D), "other rows or heads"),
    "one_off": (lambda y, x: torch.cat((y[:, :, :200], y[:, :, 199:-1]), 2), "other rows or heads"),
}


@pytest.mark.parametrize("name", NEAR)
def test_what_becomes_of_a_rotation(name):
    change, reason = NEAR[name]

    def run(q, k, v, cos, sin):
        changed = change(rotated(q, cos, sin), q)
        return ops.sdpa(changed, rotated(k, cos, sin), v, None, 0.0, False, None, None, REFERENCE)

    call = fused(run, inputs())
    assert call.target is ops.sdpa
    assert reason in call.args[9]


def heads_apart(x, cos, sin):
    return torch.stack([rotated(x[:, head], cos, sin) for head in range(H)], 1)


def frames_apart(x, cos, sin):
    return torch.cat([rotated(x[:, :, i : i + 60], cos[i : i + 60], sin[i : i + 60]) for i in range(0, S, 60)], 2)


def every_third_row_apart(x, cos, sin):
    out = torch.empty_like(x)
    for i in range(3):
        out[:, :, i::3] = rotated(x[:, :, i::3], cos[i::3], sin[i::3])
    return out


def in_windows(x, cos, sin):
    return windows(rotated(x, cos, sin)).unflatten(2, (30, 10)).transpose(2, 3).flatten(2, 3)


def batch_and_heads_in_one(x, cos, sin):
    return rotated(x.flatten(0, 1), cos, sin).unflatten(0, (B, H))


@pytest.mark.parametrize(
    "rotate", [heads_apart, frames_apart, every_third_row_apart, in_windows, batch_and_heads_in_one]
)
def test_rows_that_are_taken_apart_and_put_together(rotate):
    """Of these, rotated a part at a time, those are fused whose parts all have tables that one table holds."""

    def run(q, k, v, cos, sin):
        q, k = rotate(q, cos, sin), rotated(k, cos, sin)
        return ops.sdpa(q, k, v, None, 0.0, False, None, None, REFERENCE)

    call = fused(run, inputs())
    assert (call.target in FUSED) == (rotate is not every_third_row_apart)


def test_lanes_that_change_places_from_row_to_row():
    """In the first row and the last one, lanes are paired as RoPE pairs them, and in the row between they are not."""

    def along(x, start, step):
        """Three elements that lie a step apart in memory."""
        return x.flatten()[start : start + 2 * step + 1 : step]

    def run(q, k, v, table):
        own, other = (torch.stack([along(q, start, step) for start in s], -1) for step, s in ((5, (0, 1)), (3, (2, 3))))
        behind = q[..., 2:] * table - q[..., :2] * table
        turned = torch.cat(((own * table + other * table)[None, None], behind), -1)
        both = torch.cat((table, table), -1)
        k = k * both + torch.cat((-k[..., 2:], k[..., :2]), -1) * both
        return ops.sdpa(turned, k, v, None, 0.0, False, None, None, REFERENCE)

    torch.manual_seed(0)
    call = fused(run, (*torch.randn(3, 1, 1, 3, 4), torch.rand(3, 2)))
    assert call.args[9] == "q: lanes change places from one row to another"


def test_rows_of_too_many_kinds():
    """Every row is written to by itself: there is no time to look at all of them."""

    def write(y, x):
        for row in range(0, S, 2):
            y[:, :, row] = 2.0 * x[:, :, row]

    call = fused(with_write(write, False), inputs())
    assert "too many kinds of rows" in call.args[9]


# Chains of views and writes at random


@st.composite
def steps(draw):
    """A few of (what to do, a number for where)."""
    names = st.sampled_from(
        ["slice", "step", "transpose", "flatten", "unflatten", "select", "cat", "repeat", "expand", "write", "one"]
    )
    return draw(st.lists(st.tuples(names, st.integers(0, 10**6)), min_size=1, max_size=6))


def changed(x, name, number):
    """x after one step, the number taken as places and dimensions."""
    dim = number % x.dim()
    size = x.shape[dim]
    start, length = number // 7 % size, 1 + number // 5 % size
    if name == "slice":
        return x.narrow(dim, start, min(length, size - start))
    if name == "step":
        return x[(*(slice(None),) * dim, slice(start, None, 2 + number % 3))]
    if name == "transpose":
        return x.transpose(dim, -1)
    if name == "flatten":
        return x.flatten(0, min(1, x.dim() - 1))
    if name == "unflatten":
        divisors = [n for n in range(1, size + 1) if size % n == 0]
        return x.unflatten(dim, (divisors[number // 3 % len(divisors)], -1))
    if name == "select":
        return x.select(dim, start) if x.dim() > 1 else x
    if name == "cat":
        return torch.cat((x.narrow(dim, start, size - start), x.narrow(dim, 0, start)), dim)
    if name == "repeat":
        return x.repeat(*[2 if d == dim else 1 for d in range(x.dim())]) if x.numel() < 500 else x
    if name == "expand":
        return x.unsqueeze(dim).expand(*x.shape[:dim], 2, *x.shape[dim:]) if x.numel() < 500 else x
    out = x.clone()
    part = out.narrow(dim, start, min(length, size - start))
    part = part.select(dim, 0) if name == "one" else part[(*(slice(None),) * dim, slice(None, None, 1 + number % 3))]
    part.copy_(x.flatten()[: part.numel()].view(part.shape))
    return out


VIEWS = ("slice", "step", "transpose", "unflatten", "select")


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.sampled_from(VIEWS), st.integers(0, 10**6)), min_size=2, max_size=6))
def test_a_write_through_any_view(chain):
    def write(y, x):
        for name, number in chain:
            y = changed(y, name, number)
        y.mul_(2.0)

    fused(with_write(write, False), inputs())


def in_all_rows(blocks, terms, rows, lanes):
    """The index in the source of every element [rows, lanes], as the corners of blocks have it."""
    found = torch.full((rows, lanes), -1, dtype=torch.int64)
    corners = terms.index[terms.sample.argsort()].view(len(blocks), lanes, -1)
    for block, at in zip(blocks, corners, strict=True):
        row, index = torch.tensor([block.first]), at[:, 0][None]
        for axis, (count, step) in enumerate(block.axes):
            along = torch.arange(count)[:, None]
            row = (row + along * step).flatten()
            rise = (at[:, 1 + axis] - at[:, 0]) // (count - 1)
            index = (index + along[..., None] * rise).flatten(0, 1)
        assert bool((found[row] == -1).all()), "a row is in two blocks"
        found[row] = index
    return found


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([(2, 3, 8, 2), (1, 4, 15, 3), (24, 2), (6, 7, 1)]), steps())
def test_what_holds_at_corners_holds_in_blocks(shape, chain):
    def run(x):
        for name, number in chain:
            x = changed(x, name, number)
        return x.clone()

    x = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
    graph = traced(run, x).graph
    source, result = next(iter(graph.nodes)), graph.output_node().args[0]
    want = run(x)
    lanes = want.shape[-1]
    rows = want.numel() // lanes

    def attempt(blocks):
        row, lane, counts = elements(blocks, lanes)
        pull = PullBack(source, dependents(result, source), Sizes({}))
        return blocks, pull(result, Points(torch.arange(len(row)), row * lanes + lane, counts))

    found = in_all_rows(*Partition(block_of(0, [(rows, 1)]), lanes).prove(attempt), rows, lanes)
    torch.testing.assert_close(found, want.long().reshape(rows, lanes), rtol=0, atol=0)
