"""The installed SageAttention: its version, what that version can run, and how its functions are called.

The metadata is read at registration; the package itself is imported by the probe or the first call.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from lpattn import Reason

TILE_OF_KEYS = 64
"""Keys per step of the kernels of version 1."""
TILE_OF_QUERIES = 128
"""Queries per block of the kernels of version 1."""

_NOT_INSTALLED = Reason(
    "not_installed", "sageattention is not installed", 'pip install "lpattn-sageattention[v1]", or build version 2'
)
_FUNCTIONS = {
    (8, 0): ("sageattn_qk_int8_pv_fp16_cuda", "SM80_ENABLED", {"pv_accum_dtype": "fp32"}),
    (8, 6): ("sageattn_qk_int8_pv_fp16_triton", "", {}),
    (8, 9): ("sageattn_qk_int8_pv_fp8_cuda", "SM89_ENABLED", {"pv_accum_dtype": "fp32+fp32"}),
    (9, 0): ("sageattn_qk_int8_pv_fp8_cuda_sm90", "SM90_ENABLED", {"pv_accum_dtype": "fp32+fp32"}),
    (12, 0): ("sageattn_qk_int8_pv_fp8_cuda", "SM89_ENABLED", {"pv_accum_dtype": "fp32", "qk_quant_gran": "per_warp"}),
}
"""Version 2, by compute capability: the function, the flag in sageattention.core that says whether it was compiled, and
its options. Accumulation that is less exact than these is faster, and the caller's to choose elsewhere."""


class Wheel:
    """SageAttention of one version.

    Args:
        version: of the distribution; empty where it is not installed.
    """

    def __init__(self, version: str) -> None:
        self.version = version
        # Without it, the declaration is that of the version on PyPI.
        self.major = int(version.partition(".")[0]) if version[:1].isdigit() else 1

    @property
    def label(self) -> str:
        """Name and version; empty where it is not installed."""
        return f"sageattention {self.version}" if self.version else ""

    @property
    def dtypes(self) -> frozenset[torch.dtype]:
        """Of q, k and v."""
        half = frozenset({torch.float16, torch.bfloat16})
        return half | {torch.float32} if self.major == 1 else half

    @property
    def head_dims(self) -> frozenset[int]:
        """Version 2 pads others to 64 or 128."""
        return frozenset({64, 96, 128}) if self.major == 1 else frozenset(range(8, 129, 8))

    @property
    def architectures(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Range of compute capabilities."""
        return ((8, 0), (9, 0)) if self.major == 1 else (min(_FUNCTIONS), max(_FUNCTIONS))

    @property
    def has_lse(self) -> bool:
        """Whether the log-sum-exp can be returned."""
        return self.major > 1

    @property
    def masks_partial_tiles(self) -> bool:
        """Whether the missing keys of the last tile are left out of the row sum; without a wheel it does not matter."""
        return self.major > 1 or not self.version

    def reasons_against(self, capability: tuple[int, int] | None) -> tuple[Reason, ...]:
        """Why it cannot run; empty if it can.

        Args:
            capability: of the GPU; None asks only whether the package is installed.
        """
        if not self.version:
            return (_NOT_INSTALLED,)
        return () if capability is None else self._load_reasons(capability)

    def forward(
        self,
        capability: tuple[int, int] | None,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        is_causal: bool,
        sm_scale: float,
        return_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Call the kernel. Only arguments that its function has are passed: it would swallow any other.

        Args:
            capability: of the GPU.
            query, key, value: [B, H, S, D], the last dimension contiguous; k is smoothed.
            is_causal: top-left aligned; q_len and kv_len are equal.
            sm_scale: softmax scale.
            return_lse: only where :attr:`has_lse`.

        Returns:
            (output, lse): as q, and the natural logarithm [B, H, q_len] or None.
        """
        options: dict[str, Any] = {"tensor_layout": "HND", "is_causal": is_causal, "sm_scale": sm_scale}
        if self.major == 1:
            return self._function("sageattn")(query, key, value, smooth_k=False, **options), None
        assert capability is not None
        name, _, fixed = _FUNCTIONS[capability]
        result = self._function(name)(query, key, value, smooth_k=False, return_lse=return_lse, **options, **fixed)
        return result if return_lse else (result, None)

    @functools.cached_property
    def _module(self) -> Any:
        return importlib.import_module("sageattention")

    def _function(self, name: str) -> Callable[..., Any]:
        return getattr(self._module, name)

    @functools.cache  # noqa: B019 - one wheel lives as long as the process
    def _load_reasons(self, capability: tuple[int, int]) -> tuple[Reason, ...]:
        try:
            module = self._module
        except Exception as error:
            text = " ".join(str(error).split())
            return (Reason("import_failed", f"importing {self.label} raised {type(error).__name__}: {text}"),)
        if self.major == 1:
            return self._missing(module, "sageattn")
        arch = f"sm_{capability[0]}{capability[1]}"
        if capability not in _FUNCTIONS:
            known = ", ".join(f"sm_{major}{minor}" for major, minor in sorted(_FUNCTIONS))
            return (Reason("architecture", f"architecture {arch}: {self.label} has kernels for {known}"),)
        name, flag, _ = _FUNCTIONS[capability]
        if flag and not getattr(importlib.import_module("sageattention.core"), flag, False):
            remedy = f"build it with TORCH_CUDA_ARCH_LIST that contains {capability[0]}.{capability[1]}"
            return (Reason("not_compiled", f"{self.label} was built without kernels for {arch}", remedy),)
        return self._missing(module, name)

    def _missing(self, module: Any, name: str) -> tuple[Reason, ...]:
        if hasattr(module, name):
            return ()
        return (Reason("signature", f"{self.label} has no function {name}", "install version 1.0.6 or 2.2"),)


def installed_wheel() -> Wheel:
    """The installed one. Reads metadata, and imports nothing."""
    if importlib.util.find_spec("sageattention") is None:
        return Wheel("")
    try:
        return Wheel(importlib.metadata.version("sageattention"))
    except importlib.metadata.PackageNotFoundError:
        return Wheel("2")  # a build in place; only version 2 is built
