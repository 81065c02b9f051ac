"""The backend under test, on one device: what it declares, and how it is called.

Everything runs through the public functions of lpattn, as a user's call does.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

import lpattn
from lpattn.backend import Backend, Capabilities
from lpattn.registry import local_devices, registry
from lpattn.testing.inputs import Problem, Sizes, make_problem
from lpattn.testing.outcome import CheckFailed, NotApplicable
from lpattn.types import HadamardMode, MaskKind, Reason

Emulation = Callable[[Problem], tuple[torch.Tensor, torch.Tensor]]
"""(output, lse) of a problem by the backend's own quantization recipe in plain PyTorch, in float32 or wider."""

_DTYPE_ORDER = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_TELLING_HEAD_DIMS = frozenset({40, 64, 72, 96, 128, 192})
"""Powers of two, their sums, and ones that fill no tile."""
_USUAL_HEAD_DIMS = (64, 16, 40, 128)
"""Tried where a backend restricts none; the first is used where one is enough."""

ONE_OF_EACH_KIND = ("key padding [B, 1, 1, kv_len]", "bool [B, 1, q_len, kv_len]", "additive with -inf")
"""Of :meth:`Subject.masks`, where not all are needed."""


class Subject:
    """One backend on one device.

    Args:
        name: of a registered backend.
        device: where it runs; None is the first device of this machine that its probe admits.
        floor_db: least SQNR in dB against exact attention on normal data, in low precision. Other kinds of data are
            allowed to be worse, by fixed amounts.
        allowances: such amounts in dB by kind of data, where the suite's own are not enough.
        emulate: the backend's recipe in plain PyTorch; with it, the kernel is held to twice the recipe's error.
    """

    def __init__(
        self,
        name: str,
        device: torch.device | str | None = None,
        *,
        floor_db: float = 20.0,
        allowances: Mapping[str, float] | None = None,
        emulate: Emulation | None = None,
    ) -> None:
        self.name = registry.resolve(name)
        self.floor_db = floor_db
        self.allowances = dict(allowances or {})
        self.emulate = emulate
        devices = local_devices() if device is None else [torch.device(device)]
        self.probed: dict[torch.device, tuple[Reason, ...]] = {d: registry.probe(self.name, d) for d in devices}
        self._fitting: dict[int, int] = {}
        self._device = next((d for d, reasons in self.probed.items() if not reasons), None)

    @property
    def backend(self) -> Backend:
        """The registered instance."""
        found = registry.get(self.name)
        if found is None:
            reasons = "; ".join(str(reason) for reason in registry.absence(self.name))
            raise NotApplicable(f"{self.name} is a name without a backend: {reasons}")
        return found

    @property
    def capabilities(self) -> Capabilities:
        """What it declares."""
        return self.backend.capabilities

    @property
    def device(self) -> torch.device:
        """Where it runs.

        Raises:
            NotApplicable: no device can run it; with the probe's reasons.
        """
        if self._device is None:
            told = "; ".join(f"{d}: {reason}" for d, reasons in self.probed.items() for reason in reasons)
            raise NotApplicable(f"no device of this machine can run it: {told}")
        return self._device

    @property
    def gpu(self) -> torch.device:
        """The device, where it is a GPU.

        Raises:
            NotApplicable: it is none.
        """
        if self.device.type != "cuda":
            raise NotApplicable(f"runs on {self.device}: needs a CUDA device")
        return self.device

    # What to try

    @property
    def dtypes(self) -> list[torch.dtype]:
        """The declared dtypes, the usual one first."""
        return sorted(self.capabilities.dtypes, key=lambda d: (*_DTYPE_ORDER, d).index(d))

    @property
    def dtype(self) -> torch.dtype:
        """One dtype, where one is enough: the widest, whose own rounding hides least."""
        return self.dtypes[-1] if torch.float64 not in self.dtypes[1:] else self.dtypes[-2]

    @property
    def head_dims(self) -> list[int]:
        """Declared head_dims, or some usual ones; of many, those that kernels treat differently."""
        declared = self.capabilities.head_dims
        if declared is None:
            return list(_USUAL_HEAD_DIMS)
        return sorted(
            declared if len(declared) <= 8 else declared & _TELLING_HEAD_DIMS | {min(declared), max(declared)}
        )

    @functools.cached_property
    def head_dim(self) -> int:
        """One head_dim, where one is enough: 64, or the smallest that the backend accepts."""
        candidates = sorted(self.head_dims, key=lambda d: (d != 64, d))
        for candidate in candidates:
            if not self.refusal(self.problem(head_dim=candidate, length=64)):
                return candidate
        return candidates[0]

    def fitting(self, length: int) -> int:
        """The length, or the next multiple of 64 or 128 where the backend refuses it: for checks that need just any."""
        if length not in self._fitting:
            candidates = (length, *(-(-length // tile) * tile for tile in (64, 128)))
            taken = (n for n in candidates if not self.refusal(self.problem(length=n)))
            self._fitting[length] = next(taken, length)
        return self._fitting[length]

    @property
    def causal_kinds(self) -> list[bool]:
        """Whether calls may be causal."""
        return [False, True] if self.capabilities.causal else [False]

    def sizes(self, **changes: Any) -> Sizes:
        """Sizes of a middling call; ``length`` sets q_len and kv_len, ``head_dim`` that of v too."""
        groups = changes.pop("groups", 2 if self.capabilities.gqa else 1)
        length = changes.pop("length", None) or self.fitting(160)
        dim = changes.pop("head_dim", None) or self.head_dim
        plain = Sizes(2, 4, 4 // groups, length, length, dim, dim)
        return dataclasses.replace(plain, **changes)

    def problem(
        self,
        kind: str = "normal",
        *,
        dtype: torch.dtype | None = None,
        attn_mask: torch.Tensor | None = None,
        hadamard: HadamardMode = HadamardMode.NONE,
        seed: int = 0,
        **sizes: Any,
    ) -> Problem:
        """A problem on the device (the CPU where there is none), of :meth:`sizes` with changes."""
        device = self._device or torch.device("cpu")
        return make_problem(
            kind,
            self.sizes(**sizes),
            dtype or self.dtype,
            device,
            attn_mask=attn_mask,
            hadamard=hadamard,
            seed=seed,
        )

    def masks(self, sizes: Sizes) -> Iterator[tuple[str, torch.Tensor]]:
        """(description, mask) of every kind that is declared, with and without broadcasting; every row sees a key."""
        generator = torch.Generator().manual_seed(1)
        batch, heads, q_len, kv_len = sizes.batch, sizes.num_heads, sizes.q_len, sizes.kv_len

        def random(*shape: int) -> torch.Tensor:
            mask = torch.rand(shape, generator=generator) > 0.4
            mask[..., 0] = True
            return mask

        padding = torch.arange(kv_len) < torch.randint(kv_len // 3, kv_len, (batch, 1, 1, 1), generator=generator)
        taken = self.capabilities.masks
        if MaskKind.BOOL in taken or self.capabilities.key_padding:
            yield "key padding [B, 1, 1, kv_len]", padding
            yield "scattered keys [B, 1, 1, kv_len]", random(batch, 1, 1, kv_len)
            yield "scattered keys [kv_len]", random(kv_len)
        shapes = {
            "[B, 1, q_len, kv_len]": (batch, 1, q_len, kv_len),
            "[1, H, 1, kv_len]": (1, heads, 1, kv_len),
            "[B, H, q_len, kv_len]": (batch, heads, q_len, kv_len),
            "[q_len, kv_len]": (q_len, kv_len),
        }
        if MaskKind.BOOL in taken:
            for text, shape in shapes.items():
                yield f"bool {text}", random(*shape)
        if MaskKind.ADDITIVE in taken:
            for text, shape in shapes.items():
                bias = torch.randn(shape, generator=generator)
                yield f"additive {text}", bias
            bias = torch.randn(batch, 1, q_len, kv_len, generator=generator)
            yield "additive with -inf", bias.masked_fill(~random(batch, 1, q_len, kv_len), -torch.inf)

    def masked(
        self,
        kind: str = "normal",
        *,
        mask_dtype: torch.dtype | None = None,
        only: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        **sizes: Any,
    ) -> Iterator[Problem]:
        """A problem with each of :meth:`masks`, or only those described; additive masks in q's dtype or another."""
        for text, mask in self.masks(self.sizes(**sizes)):
            if only is None or text in only:
                cast = mask if mask.dtype == torch.bool else mask.to(mask_dtype or dtype or self.dtype)
                problem = self.problem(kind, dtype=dtype, attn_mask=cast, **sizes)
                yield problem.changed(label=f"{problem.label}, {text}")

    # How it is called

    def refusal(self, problem: Problem, return_lse: bool = False) -> tuple[Reason, ...]:
        """Why the backend would not run the problem; empty if it would."""
        told = lpattn.explain(
            *self._tensors(problem), **self._options(problem), on_unsupported="raise", return_lse=return_lse
        )
        return () if told.choice is not None else tuple(told.reasons[self.name])

    def accepted(self, problems: Iterable[Problem], return_lse: bool = False) -> list[Problem]:
        """Those of the problems that the backend runs.

        Raises:
            NotApplicable: none; with the reasons.
        """
        self.device  # noqa: B018 - says why, where there is none
        found, reasons = [], {}
        for problem in problems:
            refused = self.refusal(problem, return_lse)
            reasons.update(dict.fromkeys(map(str, refused)))
            if not refused:
                found.append(problem)
        if not found:
            raise NotApplicable(f"declines all such calls: {'; '.join(reasons)}" if reasons else "declares none of it")
        return found

    def run(self, problem: Problem) -> torch.Tensor:
        """The output, through ``low_precision_sdpa``."""
        return self.call(problem)

    def run_with_lse(self, problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
        """(output, lse), through ``low_precision_sdpa``."""
        return self.call(problem, return_lse=True)

    def call(self, problem: Problem, **options: Any) -> Any:
        """What ``low_precision_sdpa`` returns; strict.

        Raises:
            CheckFailed: it raised something.
        """
        settings = {**self._options(problem), "on_unsupported": "raise", **options}
        try:
            return lpattn.low_precision_sdpa(*self._tensors(problem), **settings)
        except Exception as error:
            raise CheckFailed(f"{problem}: raised {type(error).__name__}: {error}") from error

    @staticmethod
    def _tensors(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return problem.query, problem.key, problem.value

    def _options(self, problem: Problem) -> dict[str, Any]:
        return {
            "attn_mask": problem.attn_mask,
            "is_causal": problem.is_causal,
            "scale": problem.scale,
            "enable_gqa": problem.query.shape[1] != problem.key.shape[1],
            "backend": self.name,
            "hadamard": problem.hadamard,
        }
