"""The vocabulary: names of backends and Hadamard modes, one attention call, the reasons why, and the choice.

Everything here is plain data. This module knows no backend, no dispatcher and no model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import torch


class AttentionBackend(str, Enum):
    """Backends that lpattn itself names. Plugins are named by plain strings."""

    FP8_FA3 = "fp8_fa3"
    FP8_TRITON = "fp8_triton"
    BF16_REFERENCE = "bf16_reference"

    __str__ = str.__str__


class HadamardMode(str, Enum):
    """Which operands are rotated by an orthonormal Hadamard matrix along head_dim before they are quantized.

    The rotation spreads outlier channels over all channels, so that one of them no longer sets the scale of the rest.

    * ``NONE``: no rotation.
    * ``QKV``: q and k (their product is unchanged), and v (undone on the output).
    * ``V_ONLY``: only v.
    """

    NONE = "none"
    QKV = "qkv"
    V_ONLY = "v_only"

    __str__ = str.__str__


class MaskKind(str, Enum):
    """What the attn_mask argument of a call is."""

    NONE = "none"
    BOOL = "bool"
    ADDITIVE = "additive"

    __str__ = str.__str__


class CausalKind(str, Enum):
    """Which keys a query may see. Top-left: query i sees keys 0..i, whatever the two lengths are (as SDPA means it)."""

    NONE = "none"
    TOP_LEFT = "top_left"

    __str__ = str.__str__


class Provenance(str, Enum):
    """Which setting decided on the backend, strongest first."""

    ARGUMENT = "argument"
    CONTEXT = "context manager"
    LAYER_RULE = "layer rule"
    MODEL = "model"
    ENVIRONMENT = "environment"
    AUTOMATIC = "automatic"

    __str__ = str.__str__


@dataclass(frozen=True)
class Reason:
    """Why a backend cannot run, or was not chosen.

    Attributes:
        code: short stable identifier, such as ``"head_dim"``; what programs and tests compare.
        message: one line that names the values, such as ``"head_dim 80: this wheel has kernels for 64, 128"``.
        remedy: what the user can do about it; empty when there is nothing.
    """

    code: str
    message: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.message} ({self.remedy})" if self.remedy else self.message


@dataclass(frozen=True)
class Rope:
    """The rotation that a fused call applies to q and k.

    Attributes:
        interleaved: True rotates the pairs (2i, 2i+1), False the pairs (i, i + rotary_dim/2).
        rotary_dim: how many leading lanes of head_dim are rotated; the others pass through.
    """

    interleaved: bool
    rotary_dim: int


@dataclass(frozen=True, eq=False)
class Norm:
    """The RMS norm of q and k that a fused call applies in front of the rotation: see :func:`lpattn.norm.normalize`.

    Either over head_dim, with ``eps``, or over all heads of a token, with ``rstd``, which the caller computes: for
    ``x`` [B, S, H, D] in float32, ``x.flatten(2).square().mean(-1).add(eps).rsqrt()``.

    Attributes:
        eps_q, eps_k: what is added to the mean square over head_dim, at least 0; None leaves that tensor as it is.
        weight_q, weight_k: floating point, on the device of q; None is ones. [head_dim] beside ``eps``. Beside ``rstd``
            [H, head_dim] and [Hkv, head_dim], contiguous or not, both or none.
        rstd_q, rstd_k: floating point [B, S] and [B, S_kv]: one over the root mean square of each token. Both or none,
            and none beside ``eps``.
    """

    eps_q: float | None = None
    eps_k: float | None = None
    weight_q: torch.Tensor | None = None
    weight_k: torch.Tensor | None = None
    rstd_q: torch.Tensor | None = None
    rstd_k: torch.Tensor | None = None

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        """Weights of q and of k, and what their tokens are multiplied with."""
        return (self.weight_q, self.weight_k, self.rstd_q, self.rstd_k)

    @property
    def over_heads(self) -> bool:
        """Whether it is over all heads of a token."""
        return self.rstd_q is not None or self.rstd_k is not None

    @property
    def said(self) -> str:
        """What reports say where it was fused."""
        if self.over_heads or (self.eps_q is not None and self.eps_k is not None):
            return "fused"
        return "fused in q" if self.eps_q is not None else "fused in k"


@dataclass(frozen=True)
class Varlen:
    """That sequences are packed behind each other, and what a query sees of its own.

    Attributes:
        window: (left, right): the query that lies as far from the last one as a key from the last key sees that key,
            ``left`` in front of it and ``right`` behind it; -1: all of them. (-1, 0) is causal, bottom-right aligned.
    """

    window: tuple[int, int] = (-1, -1)


@dataclass(frozen=True)
class AttentionCall:
    """One attention call, without its data: all that a backend may base a decision on. Frozen and hashable.

    Attributes:
        batch, num_heads, num_kv_heads: sizes; ``num_heads`` is a multiple of ``num_kv_heads``.
        q_len, kv_len: number of queries and of keys. Decisions are remembered for a class of lengths (see
            :func:`lpattn.dispatch.length_class`): a backend whose answer depends on more than that sets
            ``Backend.exact_lengths``.
        head_dim: of q and k. ``head_dim_v``: of v and of the output.
        dtype: of q, k, v and of the output.
        device_type: ``"cuda"``, ``"cpu"``, ...; ``device_index``: 0 where the device has no index.
        capability: CUDA compute capability, such as (9, 0); None on other devices.
        softmax_scale: factor on q.k^T; ``scale=None`` is already resolved to 1/sqrt(head_dim).
        mask: kind of attn_mask. ``mask_shape``: its four dimensions, left-padded with ones, and 1 where the mask is
            expanded (has stride 0); None without a mask.
        causal: alignment of the causal mask.
        dropout: True if dropout_p > 0.
        hadamard: requested mode.
        return_lse: True if the log-sum-exp is requested.
        rope: the fused rotation, or None.
        varlen: packed sequences, or None. ``batch`` is then their number, q_len and kv_len are their largest lengths.
        contiguous_last_dim: True if the last dimension of q, k and v has stride 1.
        requires_grad: True if grad is enabled and an input requires it.
    """

    batch: int
    num_heads: int
    num_kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    head_dim_v: int
    dtype: torch.dtype
    device_type: str
    device_index: int = 0
    capability: tuple[int, int] | None = None
    softmax_scale: float = 1.0
    mask: MaskKind = MaskKind.NONE
    mask_shape: tuple[int, int, int, int] | None = None
    causal: CausalKind = CausalKind.NONE
    dropout: bool = False
    hadamard: HadamardMode = HadamardMode.NONE
    return_lse: bool = False
    rope: Rope | None = None
    varlen: Varlen | None = None
    contiguous_last_dim: bool = True
    requires_grad: bool = False

    def __hash__(self) -> int:
        """Of all fields, worked out once: what runs calls remembers things by them, and looks at every call."""
        known: int | None = self.__dict__.get("_hash")
        if known is None:
            known = hash(tuple(getattr(self, name) for name in self.__dataclass_fields__))
            object.__setattr__(self, "_hash", known)
        return known

    def __getstate__(self) -> dict[str, object]:
        """Without the hash: another process has another one."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute: no query, no key, or no output."""
        return 0 in (self.batch, self.num_heads, self.q_len, self.kv_len, self.head_dim_v)

    @property
    def key_padding(self) -> bool:
        """Whether the mask is bool and the same for all heads and queries: [B or 1, 1, 1, kv_len or 1]."""
        return self.mask is MaskKind.BOOL and self.mask_shape is not None and self.mask_shape[1:3] == (1, 1)

    @property
    def device(self) -> torch.device:
        """The device that the call runs on."""
        return torch.device("cpu") if self.device_type == "cpu" else torch.device(self.device_type, self.device_index)

    def describe(self) -> str:
        """The call on one line, as errors and reports print it."""
        dtype = str(self.dtype).removeprefix("torch.")
        q = [self.batch, self.num_heads, self.q_len, self.head_dim]
        parts = [f"q {q} {dtype} on {self.describe_device()}"]
        if self.kv_len != self.q_len:
            parts.append(f"kv_len {self.kv_len}")
        if self.num_kv_heads != self.num_heads:
            parts.append(f"num_kv_heads {self.num_kv_heads}")
        if self.head_dim_v != self.head_dim:
            parts.append(f"head_dim_v {self.head_dim_v}")
        parts.append("causal" if self.causal is CausalKind.TOP_LEFT else "not causal")
        parts.append(f"mask {self.mask}" + (f" {list(self.mask_shape)}" if self.mask_shape else ""))
        if not math.isclose(self.softmax_scale, self.head_dim**-0.5 if self.head_dim else 1.0):
            parts.append(f"scale {self.softmax_scale:g}")
        if self.dropout:
            parts.append("dropout")
        if self.hadamard is not HadamardMode.NONE:
            parts.append(f"hadamard {self.hadamard}")
        if self.return_lse:
            parts.append("with lse")
        if self.requires_grad:
            parts.append("requires grad")
        if self.rope is not None:
            kind = "interleaved" if self.rope.interleaved else "half-split"
            parts.append(f"rope {kind} on {self.rope.rotary_dim} lanes")
        if self.varlen is not None:
            parts.append(f"packed sequences, window {list(self.varlen.window)}")
        return ", ".join(parts)

    def describe_device(self) -> str:
        """The device with its architecture, and its name if it has that one: ``cuda:0 (NVIDIA H200, sm_90)``."""
        if self.capability is None:
            return self.device_type
        arch = f"sm_{self.capability[0]}{self.capability[1]}"
        present = torch.cuda.is_available() and torch.cuda.get_device_capability(self.device) == self.capability
        name = f"{torch.cuda.get_device_name(self.device)}, " if present else ""
        return f"{self.device} ({name}{arch})"


@dataclass(frozen=True)
class Choice:
    """What the dispatcher decided for a call, and why.

    Attributes:
        backend: the name of the backend that runs the call.
        provenance: which setting decided.
        reasons: for every other known backend, all its reasons. Where the call fell back to exact attention although
            a backend was asked for, that backend's reasons are among them.
        exact_reason: why the call runs exactly although low precision was wanted; None where it does not.
        detours: why the backend does not run the call by its fastest kernel; empty where it does.
    """

    backend: str
    provenance: Provenance
    reasons: Mapping[str, tuple[Reason, ...]] = field(default_factory=dict)
    exact_reason: Reason | None = None
    detours: tuple[Reason, ...] = ()
