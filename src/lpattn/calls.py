"""From tensors to an :class:`AttentionCall`, or to the reason why lpattn leaves them to PyTorch."""

from __future__ import annotations

import functools
import math
import sys

import torch

from lpattn.errors import InvalidArgumentError
from lpattn.predicates import broadcasts, is_number
from lpattn.types import AttentionCall, CausalKind, HadamardMode, MaskKind, Reason, Rope


def outside(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> Reason | None:
    """Why an AttentionCall cannot describe these inputs, so that only PyTorch's own SDPA can take (or refuse) them."""
    if query.is_nested or key.is_nested or value.is_nested:
        return Reason("nested", "nested tensors: lpattn takes plain tensors")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return Reason("functorch", "inside of a torch.func transform, such as vmap")
    for tensor in (query, key, value, *([] if attn_mask is None else [attn_mask])):
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return Reason("tensor_subclass", f"{type(tensor).__name__}: lpattn takes plain tensors")
    if any(t.dim() != 4 for t in (query, key, value)):
        dims = ", ".join(str(t.dim()) for t in (query, key, value))
        return Reason("dimensions", f"q, k, v of {dims} dimensions: lpattn takes [B, H, S, D]")
    if attn_mask is not None and is_causal:
        return Reason("mask_and_causal", "both attn_mask and is_causal=True")
    if attn_mask is not None and attn_mask.dim() > 4:
        return Reason("mask", f"attn_mask of {attn_mask.dim()} dimensions")
    if problem := problem_with(query, key, value, attn_mask):
        return Reason("shapes", problem)
    if not 0.0 <= dropout_p <= 1.0:
        return Reason("dropout", f"dropout_p {dropout_p}: must lie in [0, 1]")
    if scale is not None and not math.isfinite(scale):
        return Reason("scale", f"scale {scale}: must be finite")
    return Reason("head_dim", "head_dim 0") if query.shape[3] == 0 else None


def is_grouped(query: torch.Tensor, key: torch.Tensor) -> bool:
    """Whether SDPA takes the heads only with enable_gqa: fewer of k than of q, but not the one that broadcasts."""
    if query.is_nested or not query.dim() == key.dim() == 4:
        return False
    return bool(1 < key.shape[1] < query.shape[1])  # torch.jit.trace makes tensors of sizes


def without_causal_bias(
    attn_mask: torch.Tensor | None, is_causal: bool, query: torch.Tensor
) -> tuple[torch.Tensor | None, bool]:
    """``attn_mask`` and ``is_causal`` in plain tensors, where a ``torch.nn.attention.bias.CausalBias`` says both.

    Aligned at the lower right, it becomes a bool mask [q_len, kv_len]; other masks come back as they are.

    Raises:
        InvalidArgumentError: together with ``is_causal``.
    """
    if attn_mask is None or type(attn_mask) is torch.Tensor:
        return attn_mask, is_causal
    from torch.nn.attention.bias import CausalBias, CausalVariant

    if not isinstance(attn_mask, CausalBias):
        return attn_mask, is_causal
    if is_causal:
        raise InvalidArgumentError("is_causal goes without a CausalBias, which says where the causal mask is aligned")
    q_len, kv_len = attn_mask.seq_len_q, attn_mask.seq_len_kv
    if attn_mask.variant is CausalVariant.UPPER_LEFT or q_len == kv_len:
        return None, True
    return torch.ones(q_len, kv_len, dtype=torch.bool, device=query.device).tril(kv_len - q_len), False


def problem_with(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None
) -> str | None:
    """What is wrong with four-dimensional inputs, naming the values and the limit; None if nothing is."""
    if not query.dtype == key.dtype == value.dtype:
        return f"q, k, v must have one dtype; got {query.dtype}, {key.dtype}, {value.dtype}"
    if not query.dtype.is_floating_point:
        return f"q, k, v must be floating point; got {query.dtype}"
    if not query.device == key.device == value.device:
        return f"q, k, v must be on one device; got {query.device}, {key.device}, {value.device}"
    (batch, heads, q_len, dim), (kv_batch, kv_heads, kv_len, k_dim) = query.shape, key.shape
    if not batch == kv_batch == value.shape[0]:
        return f"q, k, v must have one batch size; got {batch}, {kv_batch}, {value.shape[0]}"
    if k_dim != dim:
        return f"q and k must have one head_dim; got {dim} and {k_dim}"
    if value.shape[1:3] != key.shape[1:3]:
        return (
            f"k and v must have the same heads and length; got [H, S] = {list(key.shape[1:3])} and "
            f"{list(value.shape[1:3])}"
        )
    if kv_heads == 0 or heads % kv_heads:
        return f"num_heads must be a multiple of num_kv_heads; got {heads} and {kv_heads}"
    if attn_mask is None:
        return None
    if attn_mask.device != query.device:
        return f"attn_mask must be on {query.device} as q is; got {attn_mask.device}"
    if attn_mask.dtype not in (torch.bool, torch.float32, query.dtype):
        return f"attn_mask must be bool, float32 or of q's dtype, {query.dtype}; got {attn_mask.dtype}"
    full = (batch, heads, q_len, kv_len)
    shape = (1,) * (4 - attn_mask.dim()) + tuple(attn_mask.shape)
    if not broadcasts(shape, full):
        return f"attn_mask {list(attn_mask.shape)} must broadcast to [B, H, q_len, kv_len] = {list(full)}"
    return None


def usual_types(
    query: object,
    key: object,
    value: object,
    attn_mask: object,
    dropout_p: object,
    is_causal: object,
    scale: object,
) -> bool:
    """Whether arguments have the very types that SDPA is usually called with.

    Then all that can be wrong about them is among the facts by which a plan is remembered.
    """
    return (
        isinstance(query, torch.Tensor)
        and isinstance(key, torch.Tensor)
        and isinstance(value, torch.Tensor)
        and (attn_mask is None or isinstance(attn_mask, torch.Tensor))
        and type(dropout_p) in (float, int)
        and type(is_causal) is bool
        and (scale is None or type(scale) is float)
    )


def check_inputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> None:
    """Refuse what no attention could run, with a text that names the value and the limit.

    Raises:
        InvalidArgumentError: wrong types, shapes, dtypes or devices, or options that contradict each other.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask)):
        if not isinstance(tensor, torch.Tensor) and not (name == "attn_mask" and tensor is None):
            raise InvalidArgumentError(f"{name} must be a torch.Tensor; got {type(tensor).__name__}")
    if not isinstance(is_causal, (bool, torch.SymBool)):
        raise InvalidArgumentError(f"is_causal must be True or False; got {is_causal!r} ({type(is_causal).__name__})")
    if not isinstance(dropout_p, (int, float, torch.SymInt, torch.SymFloat)):
        raise InvalidArgumentError(f"dropout_p must be a number; got {dropout_p!r} ({type(dropout_p).__name__})")
    check_scale(scale)
    if query.is_nested or key.is_nested or value.is_nested:
        return  # their shapes are not numbers; PyTorch checks them
    if attn_mask is not None and is_causal:
        raise InvalidArgumentError(
            "attn_mask and is_causal=True contradict each other; pass one, or fold the causal part into the mask"
        )
    if not 0.0 <= dropout_p <= 1.0:
        raise InvalidArgumentError(f"dropout_p must lie in [0, 1]; got {dropout_p}")
    query, key, value, attn_mask = cast_like_autocast(query, key, value, attn_mask)
    if query.dim() == key.dim() == value.dim() == 4 and (attn_mask is None or attn_mask.dim() <= 4):
        if _broadcast_by_sdpa(query, key, value):
            return
        if problem := problem_with(query, key, value, attn_mask):
            raise InvalidArgumentError(f"{problem}{_layout_hint(query, key)}")
    elif query.dim() < 2 or key.dim() < 2 or value.dim() < 2:
        raise InvalidArgumentError(
            f"q, k, v must be [B, H, S, D]; got {list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )


def _broadcast_by_sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether batch sizes or heads differ, but for some that are 1, so that PyTorch's own SDPA makes them equal."""
    for dim in (0, 1):
        q, k, v = query.shape[dim], key.shape[dim], value.shape[dim]
        # One head of k and v for many of q is grouped attention. Not by a set: Dynamo and export would have a graph for
        # each size.
        if q == k == v or (dim == 1 and k == v == 1):
            continue
        others = [size for size in (q, k, v) if size != 1]
        if all(size == others[0] for size in others):
            return True
    return False


def check_scale(scale: float | None) -> None:
    """Refuse what is not a softmax scale.

    Raises:
        InvalidArgumentError: not a number, a bool, or not finite.
    """
    if scale is None:
        return
    # Not by math.isfinite, which Dynamo does not trace where the scale is an input of the graph; and 10**400 is an int.
    if not is_number(scale) or not -sys.float_info.max <= scale <= sys.float_info.max:
        raise InvalidArgumentError(
            f"scale must be a finite number, or None for 1/sqrt(head_dim); got {scale!r} ({type(scale).__name__})"
        )


def _layout_hint(query: torch.Tensor, key: torch.Tensor) -> str:
    if query.shape[3] == key.shape[3] and query.shape[2] == key.shape[2] and query.shape[1] != key.shape[1]:
        return "\nIf your tensors are [B, S, H, D], pass x.transpose(1, 2)"
    return ""


def build_call(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    hadamard: HadamardMode,
    return_lse: bool,
    rope: Rope | None = None,
    requires_grad: bool = False,
) -> AttentionCall:
    """Describe inputs that :func:`outside` let pass. q, k, v are [B, H, S, D].

    The mask must not have been cast for autocast: that copies an expanded one in full, and nothing shows any more that
    it was one.
    """
    batch, num_heads, q_len, head_dim = query.shape
    device = query.device
    mask = MaskKind.NONE
    mask_shape = None
    if attn_mask is not None:
        mask = MaskKind.BOOL if attn_mask.dtype == torch.bool else MaskKind.ADDITIVE
        mask_shape = tuple(narrowed_mask(attn_mask).shape)
    return AttentionCall(
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=key.shape[1],
        q_len=q_len,
        kv_len=key.shape[2],
        head_dim=head_dim,
        head_dim_v=value.shape[3],
        dtype=query.dtype,
        device_type=device.type,
        device_index=device.index or 0,
        capability=device_capability(device.type, device.index),
        softmax_scale=default_scale(head_dim) if scale is None else float(scale),
        mask=mask,
        mask_shape=mask_shape,  # type: ignore[arg-type]
        causal=CausalKind.TOP_LEFT if is_causal else CausalKind.NONE,
        dropout=dropout_p > 0.0,
        hadamard=hadamard,
        return_lse=return_lse,
        rope=rope,
        contiguous_last_dim=query.stride(3) == key.stride(3) == value.stride(3) == 1,
        requires_grad=requires_grad,
    )


def narrowed_mask(attn_mask: torch.Tensor) -> torch.Tensor:
    """The mask as backends receive it: four dimensions, and of size 1 where it is expanded.

    A stride of 0 proves, without a look at the values, that the mask is the same along that dimension. A mask that
    requires grad is not narrowed: its gradient has an entry for every element.
    """
    if attn_mask.dim() != 4:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    strides = attn_mask.stride()
    if 0 not in strides or attn_mask.requires_grad:
        return attn_mask
    shape = [min(size, 1) if stride == 0 else size for size, stride in zip(attn_mask.shape, strides, strict=True)]
    # Not by slices: this takes a third of the time.
    return attn_mask.as_strided(shape, strides)


def default_scale(head_dim: int) -> float:
    """SDPA's default softmax scale, 1/sqrt(head_dim)."""
    return 1.0 / math.sqrt(head_dim) if head_dim else 1.0


@functools.cache
def device_capability(device_type: str, index: int | None) -> tuple[int, int] | None:
    """CUDA compute capability of a device, such as (9, 0); None on other devices."""
    if device_type != "cuda" or not torch.cuda.is_available():
        return None
    return torch.cuda.get_device_capability(index or 0)


def needs_grad(*tensors: torch.Tensor | None) -> bool:
    """Whether grad is enabled and any of the tensors requires it."""
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # noqa: SIM110 - a generator takes longer than everything else here
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast casts to on the device; None where autocast is not enabled."""
    if not torch._C._is_any_autocast_enabled() or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def cast_like_autocast(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Cast as SDPA casts its inputs under autocast: floating point but not float64, to the autocast dtype."""
    dtype = autocast_dtype(query.device)
    if dtype is None:
        return query, key, value, attn_mask
    device_type = query.device.type

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        eligible = (
            tensor.dtype.is_floating_point and tensor.dtype != torch.float64 and tensor.device.type == device_type
        )
        return tensor.to(dtype) if eligible else tensor

    return cast(query), cast(key), cast(value), None if attn_mask is None else cast(attn_mask)
