"""A FlashAttention-3 that runs on the CPU: the real schema in a namespace of its own, and it keeps its inputs.

With it and Triton's interpreter, the whole of fp8_fa3 runs on the CPU.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import lpattn
from lpattn.backends.fa3 import FA3Backend, wheel
from lpattn.backends.fa3.wheel import Build

NAMESPACE = "lpattn_spy_fa3"
BUILD = Build("spy-fa3", "spy_fa3_interface", "spy_fa3_config", NAMESPACE)

# As the wheel fa3-fwd 0.0.3 registers it.
SCHEMA = """fwd(Tensor q, Tensor k, Tensor v, Tensor(k_new!)? k_new = None, Tensor(v_new!)? v_new = None,
Tensor? q_v = None, Tensor(out!)? out = None, Tensor? cu_seqlens_q = None, Tensor? cu_seqlens_k = None,
Tensor? cu_seqlens_k_new = None, Tensor? seqused_q = None, Tensor? seqused_k = None, int? max_seqlen_q = None,
int? max_seqlen_k = None, Tensor? page_table = None, Tensor? kv_batch_idx = None, Tensor? leftpad_k = None,
Tensor? rotary_cos = None, Tensor? rotary_sin = None, Tensor? seqlens_rotary = None, Tensor? q_descale = None,
Tensor? k_descale = None, Tensor? v_descale = None, float? softmax_scale = None, bool is_causal = False,
int window_size_left = -1, int window_size_right = -1, int attention_chunk = 0, float softcap = 0.0,
bool is_rotary_interleaved = False, Tensor? scheduler_metadata = None, int num_splits = 0, bool? pack_gqa = None,
int sm_margin = 0) -> (Tensor(out!), Tensor, Tensor, Tensor)"""


class FA3OnTheCPU(FA3Backend):
    """fp8_fa3 as it is, but on tensors of the CPU."""

    name = "fp8_fa3_on_cpu"
    capabilities = dataclasses.replace(FA3Backend.capabilities, device_types=frozenset({"cpu"}))


@dataclass
class Spy:
    """The operator's side of the latest call.

    Attributes:
        given: what it was given, by name, where that is not the schema's default.
        dtype: what it returns. The kernel returns bfloat16, whose products Triton's interpreter gets wrong.
        calls: how many there were.
    """

    given: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    calls: int = 0


spy_of_this_process = Spy()


def _forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    # The dispatcher hands named arguments on by position.
    arguments = torch.ops.lpattn_spy_fa3.fwd.default._schema.arguments
    named = dict(zip((a.name for a in arguments), args, strict=False)) | kwargs
    defaults = {a.name: a.default_value for a in arguments}
    given = {n: x for n, x in named.items() if isinstance(x, torch.Tensor) or x != defaults[n]}
    spy_of_this_process.given = given
    spy_of_this_process.calls += 1
    q, k, v = (given[name].float().transpose(1, 2) for name in "qkv")
    groups = q.shape[1] // k.shape[1]
    k, v = k * given["k_descale"][..., None, None], v * given["v_descale"][..., None, None]
    q = (q.unflatten(1, (-1, groups)) * given["q_descale"][..., None, None, None]).flatten(1, 2)
    logits = q @ k.repeat_interleave(groups, 1).mT * given["softmax_scale"]
    q_len, kv_len = logits.shape[-2:]
    lengths = given.get("seqused_k", torch.full((len(q),), kv_len))[:, None, None, None]
    seen = (torch.arange(kv_len) < lengths).expand(-1, 1, q_len, -1)
    if given.get("is_causal"):
        # Bottom right, as the kernel's.
        seen = seen & (torch.arange(kv_len) <= torch.arange(q_len)[:, None] + lengths - q_len)
    logits = logits.masked_fill(~seen, -torch.inf)
    # What lies past the used keys has weight 0; as in the kernel's product, a NaN there would come through.
    weights = logits.softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    out = (weights @ v.repeat_interleave(groups, 1)).transpose(1, 2)
    lse = logits.logsumexp(-1).nan_to_num(nan=-torch.inf)
    return out.to(spy_of_this_process.dtype).contiguous(), lse, torch.empty(0), torch.empty(0)


_library = torch.library.Library(NAMESPACE, "DEF")
_library.define(" ".join(SCHEMA.split()))
_library.impl("fwd", _forward, "CPU")


@pytest.fixture
def spy() -> Spy:
    spy_of_this_process.__init__()  # type: ignore[misc]
    return spy_of_this_process


@pytest.fixture
def backend(install, spy) -> FA3Backend:
    """fp8_fa3 on the CPU, with the spy for a kernel; lpattn knows it by ``backend.name``."""
    pytest.importorskip("triton", reason="triton, in which q, k and v are quantized, is not installed")
    from lpattn.quantize.fused.launcher import INTERPRETED

    if not INTERPRETED:
        pytest.skip("Triton compiles for the GPU here: TRITON_INTERPRET=1 runs this test, tests/gpu has its like")
    install({})
    backend = FA3OnTheCPU()
    lpattn.register_backend(backend)
    return backend


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Install the spy's build as the only one: ``install(flags, interface=code of the module, version=...)``."""

    def install(
        flags: dict[str, bool] | None = None, interface: str = "", version: str = "1.2.3", build: Build = BUILD
    ) -> None:
        (tmp_path / f"{build.interface}.py").write_text(interface)
        if flags is not None:
            (tmp_path / f"{build.config}.py").write_text(f"CONFIG = {{'build_flags': {flags!r}}}\n")
        metadata = tmp_path / f"{build.distribution.replace('-', '_')}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {build.distribution}\nVersion: {version}\n")
        monkeypatch.setattr(wheel, "BUILDS", (*(b for b in wheel.BUILDS if b.namespace.startswith("lpattn_")), build))
        for module in (build.interface, build.config):
            monkeypatch.delitem(__import__("sys").modules, module, raising=False)

    monkeypatch.setattr(wheel, "BUILDS", ())
    monkeypatch.syspath_prepend(str(tmp_path))
    return install
