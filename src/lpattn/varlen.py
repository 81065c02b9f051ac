"""Attention of sequences that are packed behind each other: described, checked and run.

What is decided is decided as for other calls; a backend says by its capabilities whether it takes packed sequences.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch

from lpattn.active import outside_redirection
from lpattn.calls import cast_like_autocast, check_scale, default_scale, device_capability, needs_grad
from lpattn.dispatch import choose
from lpattn.errors import BackendError, InvalidArgumentError
from lpattn.execute import account, no_autocast
from lpattn.ledger import Ledger
from lpattn.predicates import is_whole_number
from lpattn.registry import registry
from lpattn.settings import Settings, with_environment
from lpattn.types import AttentionCall, Choice, HadamardMode, Varlen


def attend_varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    *,
    settings: Settings,
    ledger: Ledger | None = None,
    return_lse: bool = False,
) -> Any:
    """Attention of packed sequences: [T_q, H, D_v], contiguous; with return_lse a tuple (output, lse [T_q, H]).

    Raises:
        InvalidArgumentError: on a CPU, lengths that contradict each other.
        UnsupportedCallError: strict settings, and the wanted backend cannot run the call.
    """
    if cu_seqlens_q.device.type == "cpu":
        check_lengths(cu_seqlens_q, query.shape[0], max_q, "q")
        check_lengths(cu_seqlens_k, key.shape[0], max_k, "k")
    gradient = needs_grad(query, key, value)
    query, key, value, _ = cast_like_autocast(query, key, value, None)
    settings = with_environment(settings)
    call = build_call(
        query, key, value, cu_seqlens_q, max_q, max_k, scale, settings.hadamard, return_lse, window_size, gradient
    )
    choice = choose(call, settings)
    account(call, choice, settings, ledger)
    backend = registry.get(choice.backend)
    assert backend is not None
    with outside_redirection(), no_autocast(call):
        result = backend.varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, call)
    out, lse = result if return_lse and isinstance(result, tuple) and len(result) == 2 else (result, None)
    shape = (query.shape[0], call.num_heads, call.head_dim_v)
    out = _checked(out, shape, call.dtype, choice)
    return (out, _checked(lse, shape[:2], torch.float32, choice)) if return_lse else out


def _checked(found: Any, shape: tuple[int, ...], dtype: torch.dtype, choice: Choice) -> torch.Tensor:
    if not isinstance(found, torch.Tensor) or found.shape != shape or found.dtype != dtype:
        got = f"{list(found.shape)} {found.dtype}" if isinstance(found, torch.Tensor) else type(found).__name__
        raise BackendError(f"backend {choice.backend!r} returned {got}; it must be {list(shape)} {dtype}")
    return found.contiguous()


def build_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
    hadamard: HadamardMode,
    return_lse: bool,
    window_size: tuple[int, int],
    requires_grad: bool,
) -> AttentionCall:
    """Describe packed sequences. q, k, v are [T, H, D]; cu_seqlens are those of q or of k."""
    device, head_dim = query.device, query.shape[2]
    return AttentionCall(
        batch=cu_seqlens.shape[0] - 1,
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        q_len=min(max_q, query.shape[0]),
        kv_len=min(max_k, key.shape[0]),
        head_dim=head_dim,
        head_dim_v=value.shape[2],
        dtype=query.dtype,
        device_type=device.type,
        device_index=device.index or 0,
        capability=device_capability(device.type, device.index),
        softmax_scale=default_scale(head_dim) if scale is None else float(scale),
        hadamard=hadamard,
        return_lse=return_lse,
        varlen=Varlen(tuple(max(n, -1) for n in window_size)),  # type: ignore[arg-type]
        contiguous_last_dim=query.stride(2) == key.stride(2) == value.stride(2) == 1,
        requires_grad=requires_grad,
    )


def check_inputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_q: int,
    max_k: int,
    scale: float | None,
    window_size: tuple[int, int],
) -> None:
    """Refuse what no attention of packed sequences could take. The values of cu_seqlens are not looked at.

    Raises:
        InvalidArgumentError: wrong types, shapes, dtypes or devices.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 3:
            got = list(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise InvalidArgumentError(
                f"{name} must be a [T, H, D] tensor of packed sequences; got {got}. "
                "low_precision_sdpa takes [B, H, S, D]"
            )
        if not tensor.dtype.is_floating_point:
            raise InvalidArgumentError(f"{name} must be floating point; got {tensor.dtype}")
        if 0 in tensor.shape[1:]:
            raise InvalidArgumentError(f"{name} must have heads and a head_dim; got {list(tensor.shape)}")
        if tensor.device != query.device or tensor.dtype != query.dtype:
            raise InvalidArgumentError(
                f"{name} must have the dtype and device of query, {query.dtype} on {query.device}; "
                f"got {tensor.dtype} on {tensor.device}"
            )
    if key.shape[2] != query.shape[2] or value.shape[:2] != key.shape[:2]:
        raise InvalidArgumentError(
            f"key must be [T_k, Hkv, {query.shape[2]}] and value [T_k, Hkv, D_v]; got {list(key.shape)} and "
            f"{list(value.shape)}"
        )
    if query.shape[1] % key.shape[1]:
        raise InvalidArgumentError(
            f"query's number of heads must be a multiple of key's; got {query.shape[1]} and {key.shape[1]}"
        )
    for name, tensor in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        good = isinstance(tensor, torch.Tensor) and tensor.dim() == 1 and tensor.shape[0] > 0
        if not good or tensor.dtype not in (torch.int32, torch.int64) or tensor.device != query.device:
            given = isinstance(tensor, torch.Tensor)
            found = f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}" if given else repr(tensor)
            raise InvalidArgumentError(
                f"{name} must be int32 [sequences + 1] on {query.device}, where each sequence starts and the last one "
                f"ends; got {found}"
            )
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise InvalidArgumentError(
            f"cu_seqlens_q and cu_seqlens_k must name as many sequences; got {list(cu_seqlens_q.shape)} and "
            f"{list(cu_seqlens_k.shape)}"
        )
    if not all(is_whole_number(n) and n >= 0 for n in (max_q, max_k)):
        raise InvalidArgumentError(f"max_q and max_k must be whole numbers, 0 or more; got {max_q!r} and {max_k!r}")
    if (
        not isinstance(window_size, (tuple, list))
        or len(window_size) != 2
        or not all(map(is_whole_number, window_size))
    ):
        raise InvalidArgumentError(
            f"window_size must be (left, right), two whole numbers, -1 for no limit; got {window_size!r}"
        )
    check_scale(scale)


def check_lengths(cu_seqlens: torch.Tensor, total: int, largest: int, name: str) -> None:
    """Refuse lengths, on the host, that contradict each other: elsewhere, to look at them would wait for the device.

    Raises:
        InvalidArgumentError: they decrease, reach past the tokens, or one is larger than ``largest``.
    """
    starts = cu_seqlens.tolist()
    lengths = [end - start for start, end in itertools.pairwise(starts)]
    if starts[0] < 0 or min(lengths, default=0) < 0:
        raise InvalidArgumentError(f"cu_seqlens_{name} must not be negative or decrease; got {starts}")
    if starts[-1] > total:
        raise InvalidArgumentError(
            f"cu_seqlens_{name} ends at {starts[-1]}, behind the last of {total} tokens; got {starts}"
        )
    if max(lengths, default=0) > largest:
        raise InvalidArgumentError(
            f"max_{name} is {largest}, and sequence {lengths.index(max(lengths))} has {max(lengths)} tokens; pass the "
            "largest number of tokens of a sequence, or more"
        )
