"""cuDNN graphs of FP8 attention: built once per call shape, kept in a bounded cache, run on the current stream."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from lpattn import BackendError, Reason

P_SCALE = 256.0
"""Factor on P before it is rounded to e4m3. P is at most 1; without the factor, weights below 2^-10 vanish."""

_CACHE_SIZE = 128
"""Graphs that are kept. Building one takes much longer than running it."""

_SCALARS = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")


@dataclass(frozen=True)
class Signature:
    """What a graph is built for; the names are those of an :class:`lpattn.AttentionCall`."""

    device_index: int
    batch: int
    num_heads: int
    num_kv_heads: int
    q_len: int
    kv_len: int
    head_dim: int
    softmax_scale: float
    causal: bool
    with_stats: bool


class _Built:
    """A graph with its tensors and the size of its workspace."""

    def __init__(self, graph: Any, tensors: dict[str, Any], workspace: int) -> None:
        self.graph, self.tensors, self.workspace = graph, tensors, workspace


class Graphs:
    """The graphs of one process. Thread-safe: one lock for building and launching, since handles hold the stream."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._handles: dict[int, Any] = {}
        self._built: OrderedDict[Signature, _Built] = OrderedDict()
        self._refusals: dict[tuple[int, int], str] = {}
        self._constants: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def refusal(self, device_index: int, head_dim: int) -> str:
        """Why cuDNN has no plan for a plain call with this head_dim on the device, in its words; empty if it has."""
        key = (device_index, head_dim)
        with self._lock:
            if key not in self._refusals:
                signature = Signature(device_index, 1, 1, 1, 256, 256, head_dim, head_dim**-0.5, False, True)
                try:
                    self._get(signature)
                    self._refusals[key] = ""
                except Exception as error:
                    self._refusals[key] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
            return self._refusals[key]

    def run(
        self,
        signature: Signature,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        q_descale: torch.Tensor,
        k_descale: torch.Tensor,
        v_descale: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Launch on the current stream.

        Args:
            signature: of the call.
            query, key, value: e4m3, [B, S, H, D] contiguous.
            q_descale, k_descale, v_descale: float32 [1].

        Returns:
            (output, stats): bfloat16 [B, q_len, H, D], and the natural log-sum-exp float32 [B, H, q_len, 1] or None.

        Raises:
            BackendError: cuDNN has no plan for this shape; with its words.
        """
        device = query.device
        with self._lock, torch.cuda.device(device):
            try:
                built = self._get(signature)
            except Exception as error:
                raise BackendError(f"cuDNN builds no graph for {signature}: {type(error).__name__}: {error}") from error
            batch, q_len, heads, dim = query.shape
            out = torch.empty(batch, q_len, heads, dim, dtype=torch.bfloat16, device=device)
            stats = torch.empty(batch, heads, q_len, 1, device=device) if signature.with_stats else None
            # The largest magnitudes of P and of the output are outputs that nobody reads.
            unread = torch.empty(2, device=device)
            workspace = torch.empty(max(built.workspace, 1), dtype=torch.uint8, device=device)
            s_descale, s_scale, one = self._constants_of(device)
            buffers = {"q": query, "k": key, "v": value, "o": out, "amax_s": unread[:1], "amax_o": unread[1:]}
            buffers |= {"descale_q": q_descale, "descale_k": k_descale, "descale_v": v_descale}
            buffers |= {"descale_s": s_descale, "scale_s": s_scale, "scale_o": one}
            if stats is not None:
                buffers["stats"] = stats
            pack = {built.tensors[name]: buffer for name, buffer in buffers.items()}
            built.graph.execute(pack, workspace, handle=self._handle(device.index))
            return out, stats

    def _constants_of(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if device.index not in self._constants:
            values = (1.0 / P_SCALE, P_SCALE, 1.0)
            made = tuple(torch.full((1,), value, device=device) for value in values)
            self._constants[device.index] = made  # type: ignore[assignment]
        return self._constants[device.index]

    def _handle(self, device_index: int) -> Any:
        """The device's handle, set to PyTorch's current stream."""
        cudnn = _cudnn()
        if device_index not in self._handles:
            self._handles[device_index] = cudnn.create_handle()
        handle = self._handles[device_index]
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(device_index).cuda_stream)
        return handle

    def _get(self, signature: Signature) -> _Built:
        built = self._built.get(signature)
        if built is None:
            with torch.cuda.device(signature.device_index):
                built = build(_cudnn(), signature, self._handle(signature.device_index))
            self._built[signature] = built
            if len(self._built) > _CACHE_SIZE:
                self._built.popitem(last=False)
        self._built.move_to_end(signature)
        return built


def build(cudnn: Any, signature: Signature, handle: Any) -> _Built:
    """Build and finalize a graph.

    Args:
        cudnn: the module.
        signature: of the call.
        handle: of the device.

    Raises:
        Exception: whatever cuDNN says where it has no plan.
    """
    types = cudnn.data_type
    graph = cudnn.pygraph(
        io_data_type=types.FP8_E4M3,
        intermediate_data_type=types.FLOAT,
        compute_data_type=types.FLOAT,
        handle=handle,
    )
    s = signature

    def tensor(name: str, heads: int, length: int) -> Any:
        # Shapes are [B, H, S, D], memory is [B, S, H, D].
        dim = (s.batch, heads, length, s.head_dim)
        return graph.tensor(name=name, dim=dim, stride=_bshd(*dim), data_type=types.FP8_E4M3)

    tensors = {"q": tensor("q", s.num_heads, s.q_len)}
    tensors |= {name: tensor(name, s.num_kv_heads, s.kv_len) for name in ("k", "v")}
    for name in _SCALARS:
        tensors[name] = graph.tensor(name=name, dim=(1,) * 4, stride=(1,) * 4, data_type=types.FLOAT)
    output, stats, amax_s, amax_o = graph.sdpa_fp8(
        **tensors,
        generate_stats=s.with_stats,
        attn_scale=s.softmax_scale,
        use_causal_mask=s.causal,
        name="lpattn_sdpa_fp8",
    )
    shape = (s.batch, s.num_heads, s.q_len, s.head_dim)
    output.set_output(True).set_dim(shape).set_stride(_bshd(*shape)).set_data_type(types.BFLOAT16)
    tensors["o"] = output
    if s.with_stats:
        rows = (s.batch, s.num_heads, s.q_len, 1)
        strides = (s.num_heads * s.q_len, s.q_len, 1, 1)
        stats.set_output(True).set_dim(rows).set_stride(strides).set_data_type(types.FLOAT)
        tensors["stats"] = stats
    for name, amax in (("amax_s", amax_s), ("amax_o", amax_o)):
        amax.set_output(True).set_dim((1,) * 4).set_stride((1,) * 4).set_data_type(types.FLOAT)
        tensors[name] = amax
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return _Built(graph, tensors, int(graph.get_workspace_size()))


def _bshd(batch: int, heads: int, length: int, dim: int) -> tuple[int, int, int, int]:
    """Strides of a [B, H, S, D] view of contiguous [B, S, H, D] memory."""
    return (length * heads * dim, dim, heads * dim, 1)


def frontend_version() -> str:
    """``nvidia-cudnn-frontend 1.32.0``; empty where it is not installed."""
    try:
        return f"nvidia-cudnn-frontend {importlib.metadata.version('nvidia-cudnn-frontend')}"
    except importlib.metadata.PackageNotFoundError:
        return ""


def _cudnn() -> Any:
    return importlib.import_module("cudnn")


@functools.cache
def import_reasons() -> tuple[Reason, ...]:
    """Why the frontend cannot be used, whatever the device; empty if it can. Imports it."""
    if importlib.util.find_spec("cudnn") is None:
        remedy = 'pip install "lpattn-cudnn[cudnn]"'
        return (Reason("not_installed", "nvidia-cudnn-frontend is not installed", remedy),)
    try:
        module = _cudnn()
    except Exception as error:
        text = f"importing nvidia-cudnn-frontend raised {type(error).__name__}: {' '.join(str(error).split())}"
        return (Reason("import_failed", text),)
    if not hasattr(module, "pygraph") or not hasattr(module.pygraph, "sdpa_fp8"):
        remedy = "pip install --upgrade nvidia-cudnn-frontend"
        return (Reason("signature", f"{frontend_version() or 'cudnn'} has no pygraph.sdpa_fp8", remedy),)
    return ()
