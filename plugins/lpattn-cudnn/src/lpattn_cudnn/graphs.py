"""cuDNN graphs of FP8 attention: built once per call shape, kept in a bounded cache, run on the current stream."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
import threading
import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch

from lpattn import BackendError, Reason
from lpattn_cudnn.operands import Operands

P_SCALE = 256.0
"""Factor on P before it is rounded to e4m3. P is at most 1; without the factor, weights below 2^-10 vanish."""

_CACHE_SIZE = 128
"""Graphs that are kept. Building one takes much longer than running it."""

_SCALARS = ("descale_q", "descale_k", "descale_v", "descale_s", "scale_s", "scale_o")


@dataclass(frozen=True)
class Signature:
    """What a graph is built for; the names are those of an :class:`lpattn.AttentionCall`.

    Attributes:
        with_stats: whether the log-sum-exp is an output.
        fp8_output: whether the output is e4m3 with a scale; else it is bfloat16.
    """

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
    fp8_output: bool

    @property
    def typical(self) -> Signature:
        """A small one that stands for all that differ in batch, number of heads, scale and ordinary lengths."""
        heads = 1 if self.num_heads == self.num_kv_heads else 2
        q_len, kv_len = (length if length == 1 else 256 for length in (self.q_len, self.kv_len))
        if q_len == kv_len and self.q_len != self.kv_len:
            kv_len = 512
        return dataclasses.replace(
            self, batch=1, num_heads=heads, num_kv_heads=1, q_len=q_len, kv_len=kv_len, softmax_scale=1.0
        )


@dataclass(frozen=True)
class _Built:
    """A graph with its tensors by name and the size of its workspace in bytes."""

    graph: Any
    tensors: dict[str, Any]
    workspace: int


@dataclass(frozen=True)
class _Device:
    """A device's handle, and the numbers that every graph reads there: float32 [1]."""

    handle: Any
    s_descale: torch.Tensor
    s_scale: torch.Tensor
    one: torch.Tensor


class Graphs:
    """The graphs of one process. Thread-safe: one lock for building and launching, since handles hold the stream.

    Nothing is built and no memory is kept while a CUDA graph is captured: cuDNN loads kernels when it builds, and what
    a capture allocates and writes is only there after a replay.
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._devices: dict[int, _Device] = {}
        self._built: OrderedDict[Signature, _Built] = OrderedDict()
        self._refusals: dict[Signature, str] = {}
        # At exit at the latest, and before the interpreter takes the libraries apart that the objects call.
        weakref.finalize(self, _release, self._built, self._devices)

    def refusal(self, signature: Signature) -> str:
        """Why cuDNN has no plan for calls like this one, in its words; empty if it has, or cannot be asked now."""
        typical = signature.typical
        with self._lock:
            if typical not in self._refusals:
                if _is_capturing():
                    return ""
                try:
                    self._get(typical)
                    self._refusals[typical] = ""
                except Exception as error:
                    self._refusals[typical] = words(error)
            return self._refusals[typical]

    def run(self, signature: Signature, operands: Operands) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Launch on the current stream.

        Args:
            signature: of the call.
            operands: on the signature's device.

        Returns:
            (output, stats): [B, q_len, H, D] in bfloat16, or in e4m3 (value = data / o_scale) where the signature has
            ``fp8_output``; and the natural log-sum-exp float32 [B, H, q_len, 1] or None.

        Raises:
            BackendError: cuDNN has no plan for this shape; with its words. Or a graph would have to be built while
                PyTorch captures a CUDA graph.
        """
        device = operands.query.device
        with self._lock, torch.cuda.device(device):
            if signature not in self._built and _is_capturing():
                raise BackendError(
                    f"no cuDNN graph was built for {signature} before the capture of a CUDA graph began, and none can "
                    "be built during it: run the call once before capturing"
                )
            try:
                built = self._get(signature)
            except Exception as error:
                raise BackendError(f"cuDNN builds no graph for {signature}: {words(error)}") from error
            batch, q_len, heads, dim = operands.query.shape
            dtype = torch.float8_e4m3fn if signature.fp8_output else torch.bfloat16
            out = torch.empty(batch, q_len, heads, dim, dtype=dtype, device=device)
            stats = torch.empty(batch, heads, q_len, 1, device=device) if signature.with_stats else None
            # The largest magnitudes of P and of the output are outputs that nobody reads.
            unread = torch.empty(2, device=device)
            workspace = torch.empty(max(built.workspace, 1), dtype=torch.uint8, device=device)
            shared = self._device(signature.device_index)
            buffers = {
                "q": operands.query,
                "k": operands.key,
                "v": operands.value,
                "descale_q": operands.q_descale,
                "descale_k": operands.k_descale,
                "descale_v": operands.v_descale,
                "descale_s": shared.s_descale,
                "scale_s": shared.s_scale,
                "scale_o": operands.o_scale if signature.fp8_output else shared.one,
                "o": out,
                "amax_s": unread[:1],
                "amax_o": unread[1:],
            }
            if stats is not None:
                buffers["stats"] = stats
            pack = {built.tensors[name]: buffer for name, buffer in buffers.items()}
            built.graph.execute(pack, workspace, handle=shared.handle)
            return out, stats

    def _device(self, index: int) -> _Device:
        """The device's handle, set to PyTorch's current stream, and its constants."""
        if index not in self._devices:
            # Copies from the host are complete when torch.tensor returns: any stream may read them.
            numbers = [torch.tensor([x], device=_place(index)) for x in (1.0 / P_SCALE, P_SCALE, 1.0)]
            self._devices[index] = _Device(_cudnn().create_handle(), *numbers)
        device = self._devices[index]
        _cudnn().set_stream(handle=device.handle, stream=_current_stream(index))
        return device

    def _get(self, signature: Signature) -> _Built:
        built = self._built.get(signature)
        if built is None:
            with torch.cuda.device(signature.device_index):
                built = build(_cudnn(), signature, self._device(signature.device_index).handle)
            self._built[signature] = built
            if len(self._built) > _CACHE_SIZE:
                self._built.popitem(last=False)
        self._built.move_to_end(signature)
        return built


def _release(built: OrderedDict[Signature, _Built], devices: dict[int, _Device]) -> None:
    """Destroy graphs and handles, in this order."""
    built.clear()
    while devices:
        _, device = devices.popitem()
        with contextlib.suppress(Exception):  # of a context that is gone, or broken
            _cudnn().destroy_handle(device.handle)


def words(error: Exception) -> str:
    """What cuDNN objects to, on one line; without the frontend's account of the other engines that it asked."""
    text = " ".join(str(error).split())
    _, declined, rest = text.partition("the backend declined: ")
    text = rest.partition("; python engines")[0] if declined else text
    return f"{type(error).__name__}: {text}"[:300]


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _place(index: int) -> torch.device:
    return torch.device("cuda", index)


def _current_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream


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
    output_type = types.FP8_E4M3 if s.fp8_output else types.BFLOAT16
    output.set_output(True).set_dim(shape).set_stride(_bshd(*shape)).set_data_type(output_type)
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
