"""Try cuDNN's FP8 attention on this machine's GPU, shape by shape, and print what builds, how exact it is, what fails.

PYTHONPATH=src:plugins/lpattn-cudnn/src python plugins/lpattn-cudnn/try_on_gpu.py
"""

from __future__ import annotations

import itertools
import sys
import time
import traceback

import torch

from lpattn import AttentionCall, CausalKind
from lpattn.testing import exact_attention, sqnr
from lpattn_cudnn import CudnnBackend
from lpattn_cudnn.graphs import frontend_version, import_reasons


def attempt(backend: CudnnBackend, heads: int, kv_heads: int, length: int, dim: int, causal: bool, lse: bool) -> str:
    """One shape: its accuracy, or the last line of what went wrong."""
    torch.manual_seed(0)
    q = torch.randn(1, heads, length, dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, kv_heads, length, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    capability = torch.cuda.get_device_capability()
    kind = CausalKind.TOP_LEFT if causal else CausalKind.NONE
    call = AttentionCall(
        1, heads, kv_heads, length, length, dim, dim, torch.bfloat16, "cuda",
        capability=capability, softmax_scale=dim**-0.5, causal=kind, return_lse=lse,
    )  # fmt: skip
    start = time.perf_counter()
    try:
        result = backend.attention(q, k, v, call)
        torch.cuda.synchronize()
    except Exception as error:
        return f"FAILED {type(error).__name__}: {' '.join(str(error).split())[:400]}"
    seconds = time.perf_counter() - start
    exact, exact_lse = exact_attention(q, k, v, None, causal)
    out = result[0] if isinstance(result, tuple) else result
    text = f"{sqnr(exact, out):6.1f} dB, first call {seconds:.2f} s"
    if isinstance(result, tuple):
        text += f", lse off by {float((result[1].double() - exact_lse).abs().max()):.3f}"
    return text


def main() -> int:
    """Print everything. Returns 0 if any shape ran."""
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, PyTorch's cuDNN {torch.backends.cudnn.version()}")
    print(frontend_version() or "nvidia-cudnn-frontend is not installed", *map(str, import_reasons()))
    if not torch.cuda.is_available():
        print("no CUDA device")
        return 1
    print(torch.cuda.get_device_name(), torch.cuda.get_device_capability())
    try:
        import cudnn

        print("cuDNN that the frontend loaded:", cudnn.backend_version_string())
    except Exception:
        traceback.print_exc()
    backend = CudnnBackend()
    print("probe:", [str(reason) for reason in backend.probe(torch.device("cuda", 0))] or "can run")
    ran = 0
    for dim, length, causal, lse in itertools.product(
        (64, 128, 192, 256), (256, 1024, 100, 1), (False, True), (False, True)
    ):
        text = attempt(backend, 4, 4, length, dim, causal, lse)
        ran += not text.startswith("FAILED")
        print(f"head_dim {dim:3d} length {length:4d} causal {causal!s:5s} lse {lse!s:5s}: {text}", flush=True)
    print("grouped heads, 8 on 2:", attempt(backend, 8, 2, 512, 128, True, True))
    print("long, 16384:", attempt(backend, 4, 4, 16384, 128, False, False))
    return 0 if ran else 1


if __name__ == "__main__":
    sys.exit(main())
