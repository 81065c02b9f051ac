"""The pass itself: fuse the rotations in front of each attention operator of a functional graph, or say why not."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import unset_fake_temporarily

from lpattn import ops
from lpattn.compile.emit import Emitter
from lpattn.compile.linear import args_of, is_transparent
from lpattn.compile.norm import Normalized, is_of_norm, prove_norm
from lpattn.compile.proof import Prover
from lpattn.compile.rotation import Rotation
from lpattn.compile.sizes import Sizes, UnknownSizeError, assignments, value_of
from lpattn.compile.terms import RefusedError
from lpattn.compile.worth import reason_against, reason_against_norm, reason_against_rotation_alone

aten = torch.ops.aten

log = logging.getLogger(__name__)

_FUSED = {ops.sdpa: ops.rope_sdpa, ops.sdpa_lse: ops.rope_sdpa_lse}
_REASON = 9
"""Position of the argument that says why nothing was fused."""


def fuse_rope(graph: fx.Graph) -> None:
    """Replace attention operators whose q and k are proven to be rotations by the operator that rotates.

    The others get the reason as their last argument, which they hand to the report when they run, so that the reason is
    there too when the graph comes out of a cache. Does nothing in a graph without lpattn's operators.

    Args:
        graph: functional, after decomposition, with fake values.
    """
    calls = [node for node in graph.nodes if node.op == "call_function" and node.target in _FUSED]
    if not calls:
        return
    sizes: list[Sizes] = []
    unknown = ""
    try:
        sizes = assignments(graph.nodes)
    except UnknownSizeError as refused:
        unknown = str(refused)
    fused = norms = 0
    reasons: dict[str, None] = {}
    for call in calls:
        found = unknown or _fuse(call, sizes)
        if isinstance(found, str):
            call.args = (*call.args[:_REASON], found)
            _keep_strides(call)
            reasons[found] = None
            continue
        fused += 1
        norms += any(norm is not None for norm in found.norms)
        if found.unfused:
            reasons[f"norm of {found.unfused}"] = None
    because = f": {'; '.join(reasons)}" if reasons else ""
    log.debug("RoPE fused into %d of %d attention calls, a norm into %d%s", fused, len(calls), norms, because)


def _fuse(call: fx.Node, sizes: Sequence[Sizes]) -> _Found | str:
    """Replace one call by what was proven of it, or say why not and leave the graph as it was."""
    emitter = Emitter(call)
    try:
        # The proofs compute on plain tensors, whatever mode surrounds the compiler.
        with unset_fake_temporarily():
            found = _prove(call, sizes)
        _replace(call, found, emitter)
    except (RefusedError, UnknownSizeError) as refused:
        emitter.undo()
        return str(refused)
    except Exception as error:
        # A defect of this pass: the model still compiles, and the report tells.
        log.warning("RoPE is not fused: the proof failed", exc_info=True)
        emitter.undo()
        return f"the proof failed: {type(error).__name__}: {error}"
    return found


class _Found:
    """What was proven of the three operands of one call.

    Attributes:
        query, key, value: rotations, and what v is a view of.
        norms: of q and of k, where there is one to fuse.
        unfused: why other norms in front of the rotations are not fused; empty if there are none.
    """

    def __init__(self, query: list[Rotation], key: list[Rotation], value: Rotation) -> None:
        self.query, self.key, self.value = query, key, value
        self.norms: list[Normalized | None] = [None, None]
        self.unfused = ""
        q, k = (next(r for r in rotations if r.rotary_dim) for rotations in (query, key))
        self.rotary_dim = q.rotary_dim
        for name, rotations in (("q", query), ("k", key)):
            for rotation in rotations:
                if rotation.rotary_dim not in (0, self.rotary_dim):
                    raise RefusedError(
                        f"{rotation.rotary_dim} lanes of {name} are rotated, and {self.rotary_dim} lanes of q"
                    )
        kinds = {r.interleaved for r in (*query, *key) if r.interleaved is not None}
        if len(kinds) > 1:
            one, other = ("interleaved" if r.interleaved else "half-split" for r in (q, k))
            raise RefusedError(f"q is rotated {one}, k {other}" if one != other else "streams are rotated differently")
        self.interleaved = kinds.pop() if kinds else False


def _prove(call: fx.Node, sizes: Sequence[Sizes]) -> _Found:
    if (reason := reason_against(call, sizes[0])) is not None:
        raise RefusedError(reason)
    query, key, value = args_of(call)[:3]
    if not isinstance(head_dim := value_of(query).shape[3], int):
        raise RefusedError(f"head_dim is {head_dim}, which is no constant of the graph")
    values = Prover(value, sizes)
    groups = values.repeats()
    q = _rotations("q", Prover(query, sizes), 1)
    keys = Prover(key, sizes)
    try:
        k = _rotations("k", keys, groups)
    except RefusedError as refused:
        k = _rotations_otherwise(keys, groups, refused)
        groups = 1
    found = _Found(q, k, values.view(groups))
    _add_norms(call, found, sizes)
    if found.norms == [None, None] and (reason := reason_against_rotation_alone(call, sizes[0])) is not None:
        raise RefusedError(reason)
    return found


def _add_norms(call: fx.Node, found: _Found, sizes: Sequence[Sizes]) -> None:
    """Look for norms in front of the rotations that were found.

    Raises:
        RefusedError: there is one over all heads, which the backend does not take. It is a pass over q and k in any
            case: the compiler rotates them there for nothing.
    """
    reasons = []
    for number, rotations in enumerate((found.query, found.key)):
        name = "qk"[number]
        try:
            norm = prove_norm(call, args_of(call)[number], rotations, sizes, _over_heads(found.norms[0]))
        except (RefusedError, UnknownSizeError) as refused:
            reasons.append(f"{name}: {refused}")
            continue
        against = None if norm is None else reason_against_norm(call, sizes[0], norm.over_heads)
        if against is None:
            found.norms[number] = norm
        elif _over_heads(norm):
            raise RefusedError(f"{name}: {against}: the compiler rotates where it normalizes")
        else:
            reasons.append(f"{name}: {against}")
    if (reason := _apart(*found.norms)) is not None:
        found.norms = [None if _over_heads(norm) else norm for norm in found.norms]
        reasons.append(reason)
    found.unfused = "; ".join(reasons)


def _over_heads(norm: Normalized | None) -> bool:
    return norm is not None and norm.over_heads


def _apart(q: Normalized | None, k: Normalized | None) -> str | None:
    """Why norms over all heads cannot be handed over, which go together; None where they can, or there are none."""
    of_q, of_k = _over_heads(q), _over_heads(k)
    if of_q != of_k:
        one, other = "qk" if of_q else "kq"
        return f"{one} is normalized over all heads, and {other} is not"
    if q is not None and k is not None and of_q and (q.weight is None) != (k.weight is None):
        one, other = "kq" if q.weight is None else "qk"
        return f"the norm over all heads of {one} has a weight, and that of {other} has none"
    return None


def _rotations_otherwise(keys: Prover, groups: int, refused: RefusedError) -> list[Rotation]:
    """The keys, where their heads are not repeated as those of v are: with repeated heads, or the best reason."""
    if groups > 1:
        try:
            return _rotations("k", keys, 1)
        except RefusedError as other:
            refused = max(refused, other, key=lambda found: found.progress)
    for number in range(2, keys.heads + 1):
        if keys.heads % number == 0 and number != groups:
            try:
                _rotations("k", keys, number)
            except RefusedError as other:
                refused = max(refused, other, key=lambda found: found.progress)
            else:
                raise RefusedError(f"k: each of its heads is repeated {number} times, and v's are not")
    raise refused


def _rotations(name: str, prover: Prover, groups: int) -> list[Rotation]:
    try:
        return prover.rotations(groups)
    except RefusedError as refused:
        raise RefusedError(f"{name}: {refused}", refused.progress) from None


def _replace(call: fx.Node, found: _Found, emitter: Emitter) -> None:
    query, key, value, *rest = args_of(call)
    before_norm = [
        rotations if norm is None else [replace(rotations[0], source=norm.source, order=norm.order)]
        for rotations, norm in zip((found.query, found.key), found.norms, strict=True)
    ]
    q = _streams(emitter, query, before_norm[0])
    k = _streams(emitter, key, before_norm[1])
    shared = _described(found.query) == _described(found.key)
    tables = [
        *_tables(emitter, found.query, q, found),
        *((None, None) if shared else _tables(emitter, found.key, k, found)),
    ]
    v = emitter.heads_last(found.value, _shape(value, found.value.groups))
    operands = (_joined(emitter, q), _joined(emitter, k), v)
    eps = [None if norm is None else norm.eps for norm in found.norms]
    of_norms = [_of_norm(emitter, norm, x) for norm, x in zip(found.norms, (q[0], k[0]), strict=True)]
    weights, rstd = zip(*of_norms, strict=True)
    with call.graph.inserting_before(call):
        fused = call.graph.call_function(
            _FUSED[call.target],  # type: ignore[index]
            (*operands, *tables, found.interleaved, *rest[: _REASON - 3], *eps, *weights, *rstd, found.unfused),
        )
    fused.meta = dict(call.meta)
    _keep_strides(fused)
    call.replace_all_uses_with(fused)
    inputs = call.all_input_nodes
    call.graph.erase_node(call)
    _erase_unused(inputs)


def _keep_strides(call: fx.Node) -> None:
    """Have inductor hand over inputs with the strides that they have in the graph, as for any operator."""
    if "eager_input_vals" in call.meta:
        values = fx.node.map_aggregate(call.args, lambda a: a.meta["val"] if isinstance(a, fx.Node) else a)
        call.meta["eager_input_vals"] = (values, {})


def _described(rotations: Sequence[Rotation]) -> list[Any]:
    """What tables depend on; a single stretch has no length of its own."""
    found: list[Any] = []
    for rotation in rotations:
        shape = value_of(rotation.source).shape if len(rotations) > 1 else ()
        found.append((rotation.cos, rotation.sin, [n if isinstance(n, int) else n.node.expr for n in shape]))
    return found


def _streams(emitter: Emitter, operand: fx.Node, rotations: Sequence[Rotation]) -> list[fx.Node]:
    """What an operand was before rotation, [B, S, H, D] for each stretch of rows."""
    batch, rows, heads, dim = _shape(operand, rotations[0].groups)
    if len(rotations) == 1:
        return [emitter.heads_last(rotations[0], (batch, rows, heads, dim))]
    return [
        emitter.heads_last(r, (batch, value_of(r.source).numel() // (batch * heads * dim), heads, dim))
        for r in rotations
    ]


def _of_norm(emitter: Emitter, norm: Normalized | None, x: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The weight of a norm of x [B, S, H, D], and one over the root mean squares, as :class:`lpattn.Norm` has them."""
    if norm is None:
        return None, None
    weight = None if norm.weight is None else emitter.flat(norm.weight)
    if norm.rstd is None:
        return weight, None
    if weight is not None:
        weight = emitter.call(aten.reshape.default, weight, [emitter.size(x, 2), emitter.size(x, 3)])
    rstd = emitter.call(aten.reshape.default, norm.rstd, [emitter.size(x, 0), emitter.size(x, 1)])
    # A root of float16 may have a reciprocal that is none.
    rstd = emitter.cast(rstd, torch.promote_types(value_of(rstd).dtype, torch.float32))
    return weight, emitter.call(aten.reciprocal.default, rstd) if norm.divides else rstd


def _joined(emitter: Emitter, streams: Sequence[fx.Node]) -> fx.Node:
    return streams[0] if len(streams) == 1 else emitter.call(aten.cat.default, list(streams), 1)


def _tables(
    emitter: Emitter, rotations: Sequence[Rotation], streams: Sequence[fx.Node], found: _Found
) -> tuple[fx.Node, fx.Node]:
    """Cosines and sines of an operand; 1 and 0 for the stretches that are not rotated."""
    cos, sin = [], []
    for rotation, x in zip(rotations, streams, strict=True):
        if rotation.cos is None or rotation.sin is None:
            count = emitter.size(x, 1)
            c, s = (emitter.constant(number, count, found.rotary_dim, x) for number in (1.0, 0.0))
        else:
            c, s = (emitter.table(t, found.rotary_dim, found.interleaved, x) for t in (rotation.cos, rotation.sin))
        cos.append(c)
        sin.append(s)
    if len(streams) > 1:
        counts = [emitter.size(x, 1) for x in streams]
        cos, sin = [emitter.stacked(cos, counts)], [emitter.stacked(sin, counts)]
    # Tables of twice the width would slow everything down that reads them.
    wide = value_of(streams[0]).dtype == torch.float64
    both = torch.promote_types(value_of(cos[0]).dtype, value_of(sin[0]).dtype)
    dtype = torch.float32 if both == torch.float64 and not wide else both
    return emitter.cast(cos[0], dtype), emitter.cast(sin[0], dtype)


def _shape(operand: fx.Node, groups: int) -> tuple[Any, Any, Any, Any]:
    """(B, S, H, D) of what an operand [B, H, S, D] is made of."""
    batch, heads, rows, dim = value_of(operand).shape
    return batch, rows, heads // groups, dim


def _erase_unused(nodes: Sequence[fx.Node]) -> None:
    """Erase nodes that nothing reads any more, and what only they have read."""
    stack = list(nodes)
    while stack:
        node = stack.pop()
        erasable = node.op == "call_function" and (is_transparent(node) or is_of_norm(node))
        if node.users or not erasable or node._erased:
            continue
        stack += node.all_input_nodes
        node.graph.erase_node(node)
