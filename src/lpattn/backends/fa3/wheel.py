"""Builds of FlashAttention-3 on this machine: which are installed, what they were built with, whether they load.

Nothing is looked for at import. Build flags come from a plain Python file of the wheel; the library itself is loaded
only where CUDA is there.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from lpattn.types import Reason

HEAD_DIMS = frozenset({64, 96, 128, 192, 256})
"""Head dims that FlashAttention-3 has kernels for, where none is disabled."""

_ARGUMENTS = (
    "q",
    "k",
    "v",
    "q_descale",
    "k_descale",
    "v_descale",
    "softmax_scale",
    "is_causal",
    "num_splits",
    "seqused_k",
)

_HAS_WHEEL = (platform.system(), platform.machine()) == ("Linux", "x86_64")
_INSTALL = 'pip install "lpattn[fa3]"'

NOT_INSTALLED = Reason(
    "not_installed",
    "neither the wheel fa3-fwd nor flash_attn_interface (FlashAttention-3) is installed",
    _INSTALL
    if _HAS_WHEEL
    else f"fa3-fwd ships for Linux x86_64 only, and this is {platform.system()} "
    f"{platform.machine()}: build FlashAttention-3 from source",
)


@dataclass(frozen=True)
class Build:
    """One way in which FlashAttention-3 is distributed.

    Attributes:
        distribution: its name for pip.
        interface: module whose import registers the operators.
        config: module with the build flags.
        namespace: of its operators in torch.ops.
    """

    distribution: str
    interface: str
    config: str
    namespace: str


BUILDS = (
    Build("fa3-fwd", "fa3_fwd_interface", "fa3_fwd_config", "fa3_fwd"),
    Build("flash-attn-3", "flash_attn_interface", "flash_attn_config", "flash_attn_3"),
)


class Wheel:
    """An installed build.

    Args:
        build: which one.
    """

    def __init__(self, build: Build) -> None:
        self.build = build

    @functools.cached_property
    def version(self) -> str:
        """Version of the distribution; empty where it has no metadata (a build in place)."""
        try:
            return importlib.metadata.version(self.build.distribution)
        except importlib.metadata.PackageNotFoundError:
            return ""

    @property
    def label(self) -> str:
        """Distribution and version, such as ``fa3-fwd 0.0.3``."""
        return f"{self.build.distribution} {self.version}".strip()

    @functools.cached_property
    def flags(self) -> Mapping[str, bool]:
        """The build flags; empty where the build does not state them."""
        try:
            return dict(importlib.import_module(self.build.config).CONFIG["build_flags"])
        except Exception:
            return {}

    @property
    def head_dims(self) -> frozenset[int]:
        """Head dims with kernels."""
        return frozenset(d for d in HEAD_DIMS if not self.flags.get(f"FLASHATTENTION_DISABLE_HDIM{d}"))

    def reasons_against(self, load: bool) -> tuple[Reason, ...]:
        """Why this build cannot run FP8 attention; empty if it can.

        Args:
            load: whether to load the library. Without it, only what the build flags say is known.
        """
        reasons = []
        if self.flags.get("FLASHATTENTION_DISABLE_FP8"):
            reasons.append(Reason("no_fp8", f"{self.label} is built without FP8", f"install one with it: {_INSTALL}"))
        if not self.head_dims:
            reasons.append(Reason("head_dim", f"{self.label} is built without kernels for any of {sorted(HEAD_DIMS)}"))
        return (*reasons, *self._load_reasons) if load else tuple(reasons)

    def forward(self) -> torch._ops.OpOverload:
        """The forward operator of a build that :meth:`reasons_against` found nothing against."""
        importlib.import_module(self.build.interface)
        return getattr(torch.ops, self.build.namespace).fwd.default

    @functools.cached_property
    def _load_reasons(self) -> tuple[Reason, ...]:
        try:
            importlib.import_module(self.build.interface)
        except Exception as error:
            return (self._import_reason(error),)
        try:
            operator = self.forward()
        except AttributeError:
            name = f"torch.ops.{self.build.namespace}.fwd"
            return (Reason("no_operator", f"{self.label} registers no {name}", f"install another build: {_INSTALL}"),)
        known = {argument.name for argument in operator._schema.arguments}
        if lacking := [name for name in _ARGUMENTS if name not in known]:
            text = f"the forward of {self.label} has no argument {', '.join(lacking)}"
            return (Reason("signature", text, "install another version of it"),)
        return ()

    def _import_reason(self, error: Exception) -> Reason:
        text = " ".join(str(error).split())
        here = f"PyTorch {torch.__version__}"
        wants = re.search(r"libcudart\.so\.(\d+)", text)
        has = torch.version.cuda
        if wants is not None and (has is None or has.split(".")[0] != wants[1]):
            for_cuda = f"is for CUDA {has}" if has else "has no CUDA"
            return Reason(
                "cuda_version",
                f"{self.label} is built for CUDA {wants[1]}, and this {here} {for_cuda} ({text})",
                f"install PyTorch for CUDA {wants[1]}, or a build of {self.build.distribution} for yours",
            )
        if "undefined symbol" in text:
            return Reason(
                "torch_version",
                f"{self.label} is built for another PyTorch than this {here} ({text})",
                f"pip install --upgrade torch {self.build.distribution}",
            )
        return Reason(
            "import_failed", f"{self.label}: importing {self.build.interface} raised {type(error).__name__}: {text}"
        )


def installed_wheels() -> tuple[Wheel, ...]:
    """The builds that are installed, the preferred one first."""
    return tuple(Wheel(build) for build in BUILDS if is_installed(build.interface))


def is_installed(module: str) -> bool:
    """Whether a top-level module can be found. It is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # ValueError: a module without a spec, put into sys.modules by somebody
        return False
