"""The backend `fp8_emulated`, and the shortest complete plugin of lpattn: a class, and a hook that returns it."""

from dataclasses import replace

import torch

from lpattn import AttentionCall, Backend, Capabilities, CausalKind, HadamardMode, MaskKind, Reason, hookimpl
from lpattn.quantize import PER_BLOCK, Recipe, emulated_attention


class EmulatedBackend(Backend):
    """FP8 attention in plain PyTorch, on any device."""

    name = "fp8_emulated"
    automatic = False  # slower than exact attention: only where the user names it
    # lpattn makes users' reasons from this data, and never calls attention() with what is not declared here.
    capabilities = Capabilities(
        dtypes=frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64}),
        head_dim_v_differs=True,
        masks=frozenset(MaskKind),
        causal_rectangular=True,
        lse=True,
        hadamard=frozenset(HadamardMode),
    )
    recipe: Recipe = PER_BLOCK

    def probe(self, device: torch.device) -> list[Reason]:
        """Try what matters: not every device knows the e4m3 type."""
        try:
            torch.zeros(1, device=device).to(torch.float8_e4m3fn).float()
        except Exception as error:  # a probe must not raise, whatever a driver comes up with
            first_line, *_ = str(error).splitlines() or [type(error).__name__]
            return [Reason("e4m3", f"{device} cannot cast to float8_e4m3fn: {first_line}", "run it on the CPU")]
        return []

    def attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        call: AttentionCall,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,  # always 0: capabilities.dropout is False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Run the recipe. The call has what is no tensor; its scale is already a number."""
        return emulated_attention(
            query,
            key,
            value,
            recipe=replace(self.recipe, hadamard=call.hadamard),
            attn_mask=attn_mask,
            is_causal=call.causal is CausalKind.TOP_LEFT,
            softmax_scale=call.softmax_scale,
            return_lse=call.return_lse,
        )


@hookimpl
def lpattn_backends() -> list[Backend]:
    """Called once, at first use of lpattn."""
    return [EmulatedBackend()]
