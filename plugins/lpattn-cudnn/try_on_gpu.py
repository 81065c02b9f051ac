"""Try cuDNN's FP8 attention on this machine's GPU, one line per shape: how exact it was, or why it did not run.

It stops after a minute.

PYTHONPATH=src:plugins/lpattn-cudnn/src python plugins/lpattn-cudnn/try_on_gpu.py
"""

from __future__ import annotations

import itertools
import logging
import sys
import time

import torch

from lpattn import AttentionCall, CausalKind
from lpattn.testing import exact_attention, sqnr
from lpattn_cudnn import CudnnBackend
from lpattn_cudnn.graphs import frontend_version, import_reasons, words

SECONDS = 60
WIDTH = 160


def attempt(backend: CudnnBackend, heads: int, kv_heads: int, length: int, dim: int, causal: bool, lse: bool) -> str:
    """One shape: its accuracy, or what went wrong."""
    torch.manual_seed(0)
    q = torch.randn(1, heads, length, dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(1, kv_heads, length, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    call = AttentionCall(
        1, heads, kv_heads, length, length, dim, dim, torch.bfloat16, "cuda",
        capability=torch.cuda.get_device_capability(), softmax_scale=dim**-0.5, return_lse=lse,
        causal=CausalKind.TOP_LEFT if causal else CausalKind.NONE,
    )  # fmt: skip
    if reasons := backend.supports(call):
        return f"DECLINED {reasons[0].message}"
    start = time.perf_counter()
    try:
        result = backend.attention(q, k, v, call)
        torch.cuda.synchronize()
    except Exception as error:
        cause = error.__cause__
        return f"FAILED {words(cause if isinstance(cause, Exception) else error)}"
    seconds = time.perf_counter() - start
    exact, exact_lse = exact_attention(q, k, v, None, causal)
    out = result[0] if isinstance(result, tuple) else result
    quality = sqnr(exact, out)
    text = f"{'ok' if quality > 20 else 'WRONG'} {quality:.1f} dB, first call {seconds:.2f} s"
    if isinstance(result, tuple):
        text += f", lse off by {float((result[1].double() - exact_lse).abs().max()):.3f}"
    return text


def main() -> int:
    """Print everything. Returns 0 if a shape ran and none was wrong or failed."""
    stop = time.monotonic() + SECONDS
    logging.getLogger("cudnn").setLevel(logging.ERROR)  # the frontend logs what is printed here

    def tell(text: str) -> None:
        print(" ".join(text.split())[:WIDTH], flush=True)

    tell(f"torch {torch.__version__}, CUDA {torch.version.cuda}, PyTorch's cuDNN {torch.backends.cudnn.version()}")
    tell("; ".join([frontend_version() or "no nvidia-cudnn-frontend", *map(str, import_reasons())]))
    if not torch.cuda.is_available() or import_reasons():
        tell("nothing to try: no CUDA device, or no frontend")
        return 1
    import cudnn

    tell(f"{torch.cuda.get_device_name()} {torch.cuda.get_device_capability()}, cuDNN {cudnn.backend_version_string()}")
    backend = CudnnBackend()
    tell(f"probe: {'; '.join(map(str, backend.probe(torch.device('cuda', 0)))) or 'can run'}")
    # What matters most comes first.
    shapes = [(4, 4, length, 128, causal, lse) for length in (256, 1024) for causal in (False, True) for lse in (0, 1)]
    shapes += [(8, 2, 512, 128, True, True), (4, 4, 16384, 128, False, False)]
    grid = itertools.product((64, 192, 256), (256, 1024), (False, True), (False, True))
    shapes += [(4, 4, length, dim, causal, lse) for dim, length, causal, lse in grid]
    shapes += [
        (4, 4, length, dim, causal, True) for dim in (128, 64) for length in (1, 100) for causal in (False, True)
    ]
    told = []
    for heads, kv_heads, length, dim, causal, lse in shapes:
        if time.monotonic() > stop:
            tell(f"{SECONDS} s are over: {len(shapes) - len(told)} shapes were not tried")
            break
        told.append(attempt(backend, heads, kv_heads, length, dim, causal, bool(lse)))
        tell(f"heads {heads}/{kv_heads} D {dim} S {length}{' causal' * causal}{' lse' * bool(lse)}: {told[-1]}")
    return (
        0 if any(t.startswith("ok") for t in told) and not any(t.startswith(("FAILED", "WRONG")) for t in told) else 1
    )


if __name__ == "__main__":
    sys.exit(main())
