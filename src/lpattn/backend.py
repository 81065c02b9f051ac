"""The protocol that a backend implements.

Most of what a backend must say is data (:class:`Capabilities`); the dispatcher turns data into reasons. Code
(``supports``) says only what data cannot. This module knows the vocabulary of :mod:`lpattn.types` and nothing else.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from lpattn.types import AttentionCall, CausalKind, HadamardMode, MaskKind, Norm, Reason

PROTOCOL_VERSION = 1
"""Raised when a change of the protocol breaks existing backends. A backend of another version is not registered."""


@dataclass(frozen=True)
class Capabilities:
    """What a backend can run, as data. A field that is None does not restrict.

    Attributes:
        dtypes: dtypes of q, k, v. All of them are also output dtypes.
        device_types: such as ``{"cuda"}``.
        architectures: inclusive range of CUDA compute capabilities, such as ``((9, 0), (9, 0))``; checked on CUDA only.
        head_dims: of q and k.
        head_dim_v_differs: whether head_dim_v may differ from head_dim.
        masks: kinds of attn_mask. MaskKind.NONE belongs in it.
        key_padding: whether bool masks that are the same for all heads and queries can run
            (:attr:`AttentionCall.key_padding`) where MaskKind.BOOL is not in ``masks``.
        causal: whether causal calls can run. ``causal_rectangular``: also where q_len != kv_len (top-left aligned).
        gqa: whether num_kv_heads may be smaller than num_heads.
        lse, dropout: whether the log-sum-exp can be returned, whether dropout can be applied.
        hadamard: modes that can be applied. HadamardMode.NONE belongs in it.
        rope: whether ``rope_attention`` is implemented. Elsewhere lpattn rotates q and k first.
        rope_from: number of queries from which ``rope_attention`` is faster, without a norm, than to rotate q and k
            first. Compiled graphs leave shorter rotations to the compiler; what is called runs at any length.
        norm: whether ``rope_attention`` takes the keyword ``norm``. Elsewhere lpattn normalizes q and k first.
        norm_over_heads: whether that may be one over all heads, with ``rstd``. Elsewhere lpattn normalizes q and k
            first, and compiled graphs rotate them where they are normalized.
        varlen: whether ``varlen_attention`` is implemented.
        strided_last_dim: whether the last dimension of q, k, v may have a stride other than 1.
        backward: whether gradients flow through the output.
    """

    dtypes: frozenset[torch.dtype]
    device_types: frozenset[str] | None = None
    architectures: tuple[tuple[int, int], tuple[int, int]] | None = None
    head_dims: frozenset[int] | None = None
    head_dim_v_differs: bool = False
    masks: frozenset[MaskKind] = frozenset({MaskKind.NONE})
    key_padding: bool = False
    causal: bool = True
    causal_rectangular: bool = False
    gqa: bool = True
    lse: bool = False
    dropout: bool = False
    hadamard: frozenset[HadamardMode] = frozenset({HadamardMode.NONE})
    rope: bool = False
    rope_from: int = 0
    norm: bool = False
    norm_over_heads: bool = False
    varlen: bool = False
    strided_last_dim: bool = True
    backward: bool = False

    def takes_norm(self, over_heads: bool) -> bool:
        """Whether ``rope_attention`` applies a norm itself: over each head, or over all of them."""
        return self.norm and (self.norm_over_heads or not over_heads)

    def reasons_against(self, call: AttentionCall) -> list[Reason]:
        """All reasons why a backend with these capabilities cannot run the call; empty if it can."""
        reasons = []

        def refuse(code: str, message: str, remedy: str = "") -> None:
            reasons.append(Reason(code, message, remedy))

        if call.requires_grad and not self.backward:
            refuse(
                "requires_grad",
                "inputs require grad: has no backward pass",
                "wrap the forward in torch.no_grad() or torch.inference_mode()",
            )
        reasons += self._reasons_against_hardware(call.device_type, call.capability)
        if call.dtype not in self.dtypes:
            names = _join(str(d).removeprefix("torch.") for d in self.dtypes)
            refuse("dtype", f"dtype {str(call.dtype).removeprefix('torch.')}: takes {names}")
        if self.head_dims is not None and call.head_dim not in self.head_dims:
            dims = ", ".join(str(d) for d in sorted(self.head_dims))
            refuse("head_dim", f"head_dim {call.head_dim}: has kernels for {dims}")
        if call.head_dim_v != call.head_dim and not self.head_dim_v_differs:
            refuse("head_dim_v", f"head_dim_v {call.head_dim_v}: must equal head_dim, which is {call.head_dim}")
        if call.mask not in self.masks and not (self.key_padding and call.key_padding):
            takes, remedy = self._masks_taken()
            refuse("mask", f"{call.mask} attn_mask {list(call.mask_shape or ())}: {takes}", remedy)
        if call.causal is CausalKind.TOP_LEFT:
            if not self.causal:
                refuse("causal", "causal: has no causal kernel")
            elif call.q_len != call.kv_len and not self.causal_rectangular:
                refuse(
                    "causal_alignment",
                    f"causal with q_len {call.q_len} and kv_len {call.kv_len}: "
                    "its causal mask is SDPA's (top-left) only where they are equal",
                )
        if call.num_kv_heads != call.num_heads and not self.gqa:
            refuse("gqa", f"num_kv_heads {call.num_kv_heads}: must equal num_heads, which is {call.num_heads}")
        if call.return_lse and not self.lse:
            refuse("lse", "return_lse: does not return the log-sum-exp")
        if call.dropout and not self.dropout:
            refuse("dropout", "dropout_p > 0: has no dropout", "set dropout_p=0.0, or model.eval()")
        if call.varlen is not None and not self.varlen:
            refuse("varlen", "packed sequences: takes [B, H, S, D] only")
        if call.hadamard not in self.hadamard:
            refuse("hadamard", f"hadamard {call.hadamard}: offers {_join(self.hadamard)}")
        if not call.contiguous_last_dim and not self.strided_last_dim:
            refuse("layout", "last dimension of q, k or v has a stride other than 1", "pass contiguous tensors")
        return reasons

    def reasons_against_device(self, device: torch.device) -> list[Reason]:
        """Why no call can run on the device: it is not there, or has no kernels. What a probe asks first; may ask CUDA.

        Args:
            device: any, also one that this machine lacks.
        """
        missing, capability = [], None
        if device.type == "cuda":
            if not torch.cuda.is_available():
                missing = [Reason("device", f"{device}: PyTorch {torch.__version__} sees no CUDA device")]
            elif (device.index or 0) >= (count := torch.cuda.device_count()):
                missing = [Reason("device", f"{device}: the number of CUDA devices that PyTorch sees is {count}")]
            else:
                capability = torch.cuda.get_device_capability(device)
        return [*missing, *self._reasons_against_hardware(device.type, capability)]

    def _reasons_against_hardware(self, device_type: str, capability: tuple[int, int] | None) -> list[Reason]:
        reasons = []
        if self.device_types is not None and device_type not in self.device_types:
            reasons.append(Reason("device", f"device {device_type}: runs on {_join(self.device_types)}"))
        if self.architectures is not None and capability is not None:
            low, high = self.architectures
            if not low <= capability <= high:
                span = _arch(low) if low == high else f"{_arch(low)} to {_arch(high)}"
                text = f"architecture {_arch(capability)}: has kernels for {span}"
                reasons.append(Reason("architecture", text))
        return reasons

    def _masks_taken(self) -> tuple[str, str]:
        """What a refusal says of the masks that can run, and its remedy."""
        others = self.masks - {MaskKind.NONE}
        if not self.key_padding or MaskKind.BOOL in others:
            return (f"takes {_join(others)} masks" if others else "takes no attn_mask"), ""
        kinds = f"{_join(others)} masks and key-padding masks" if others else "key-padding masks only"
        shape = "bool [B, 1, 1, kv_len]"
        return f"takes {kinds}, {shape}", f"if it hides the same keys from all heads and queries, pass it as {shape}"


class Backend(ABC):
    """An implementation of attention that lpattn can choose.

    A subclass sets ``name`` and ``capabilities`` and implements :meth:`probe` and :meth:`attention`. Creating and
    importing it must not touch a device: what needs one belongs in ``probe``, whose answer is cached per device.

    Attributes:
        name: lower-case identifier that users pass as ``backend=``.
        capabilities: what it can run, as data.
        protocol_version: version of this protocol that the backend was written for.
        automatic: False keeps it out of the automatic choice; it then runs only where it is named.
        exact: True if it computes in the inputs' own precision. Calls that it runs are counted as exact.
        exact_lengths: True if :meth:`supports` depends on q_len and kv_len by more than whether they are equal, 0 or
            1. Its decisions are then remembered per exact length.
    """

    name: ClassVar[str]
    capabilities: Capabilities
    protocol_version: ClassVar[int] = PROTOCOL_VERSION
    automatic: ClassVar[bool] = True
    exact: ClassVar[bool] = False
    exact_lengths: ClassVar[bool] = False

    @property
    def version(self) -> str:
        """Version of what runs underneath (a wheel, a library), for ``lpattn info``; empty where it has none."""
        return ""

    @abstractmethod
    def probe(self, device: torch.device) -> list[Reason]:
        """Why this backend cannot run on the device at all; empty if it can. Must not raise."""

    def supports(self, call: AttentionCall) -> list[Reason]:
        """All reasons why the call cannot run here; empty if it can. Overrides extend ``super().supports(call)``."""
        return self.capabilities.reasons_against(call)

    def rank(self, call: AttentionCall) -> float:
        """Measured speed relative to exact attention on this architecture: 1.0 is as fast, 2.0 takes half the time.

        The automatic choice takes the highest rank, and never a low-precision backend whose rank is 1.0 or below.
        The default, 0.0, means that nothing was measured.
        """
        return 0.0

    def detours(self, call: AttentionCall) -> list[Reason]:
        """Why a call that :meth:`supports` accepted does not run by this backend's fastest kernel; empty if it does.

        For backends of several kernels. Reports (the latest reason of each code) and explanations show it, also where
        it is why the backend is not chosen. It decides nothing: where the other kernel is not worth it, :meth:`rank`
        says so.
        """
        return []

    @abstractmethod
    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: AttentionCall,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of a call that :meth:`supports` accepted.

        Args:
            query: [B, H, q_len, head_dim], any strides, never written to.
            key: [B, Hkv, kv_len, head_dim]. ``value``: [B, Hkv, kv_len, head_dim_v].
            call: shapes, scale (``call.softmax_scale``), causality and options.
            attn_mask: bool (True attends) or additive, of shape ``call.mask_shape``, which broadcasts to
                [B, H, q_len, kv_len].
            dropout_p: probability; only positive where ``capabilities.dropout``.

        Returns:
            The output, [B, H, q_len, head_dim_v] in the dtype of q, of any strides (the caller brings it into
            [B, S, H, D] memory); with ``call.return_lse`` a tuple (output, lse), lse the natural logarithm in
            float32 [B, H, q_len], -inf for rows that attend to nothing.
        """

    def rope_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        call: AttentionCall,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        cos_k: torch.Tensor | None = None,
        sin_k: torch.Tensor | None = None,
        *,
        norm: Norm | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Rotate q and k, then attend; called only where ``capabilities.rope``.

        Args:
            query: [B, S, H, D] (as key and value): the layout in front of the usual transpose.
            cos, sin: broadcastable to [B, S, H, rotary_dim], any strides; ``cos_k``, ``sin_k`` for the keys where
                their positions differ.
            call: ``call.rope`` says how lanes pair up.
            norm: the RMS norm of q and k that comes first. Passed only where ``capabilities.norm`` and there is one,
                with ``rstd`` only where ``capabilities.norm_over_heads``.

        Returns:
            As :meth:`attention`.
        """
        raise NotImplementedError(f"{self.name} declares rope but does not implement rope_attention")

    def varlen_attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        call: AttentionCall,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention of packed sequences; called only where ``capabilities.varlen``.

        Args:
            query: [T_q, H, head_dim], any strides. ``key``: [T_k, Hkv, head_dim]. ``value``: [T_k, Hkv, head_dim_v].
            cu_seqlens_q, cu_seqlens_k: int32 [B + 1]: where each sequence starts, and the last one ends.
            call: ``call.varlen`` says what a query sees of its own sequence.

        Returns:
            The output, [T_q, H, head_dim_v] in the dtype of q; with ``call.return_lse`` a tuple (output, lse), lse the
            natural logarithm in float32 [T_q, H]. Zeros, and -inf, for queries that see no key.
        """
        raise NotImplementedError(f"{self.name} declares varlen but does not implement varlen_attention")


def _join(names: object) -> str:
    return ", ".join(sorted(str(n) for n in names)) or "none"  # type: ignore[attr-defined]


def _arch(capability: tuple[int, int]) -> str:
    return f"sm_{capability[0]}{capability[1]}"
