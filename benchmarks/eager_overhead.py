"""What lpattn costs outside attention: an eager Llama decode step and a FLUX step, untouched and applied, in turn.

Decode steps and short sequences run exactly whatever is applied, so that the difference is lpattn's own. Weights are
random; no model is downloaded. Times are medians on the host with the device drained, per layer that attends.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch
from common import host_timer, interleaved, median, parser, spread, table, write
from torch import nn

import lpattn

APPLIED = {"automatic": None, "bf16_reference": "bf16_reference"}


def llama(device: str, quick: bool) -> tuple[nn.Module, Callable[[nn.Module], Callable[[], Any]], int]:
    """A Llama of few lanes and many layers, as host time is what is measured: one decode step after 128 tokens."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    layers = 4 if quick else 16
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)

    def step(model: nn.Module) -> Callable[[], Any]:
        cache = DynamicCache(config=config)
        prompt = torch.randint(512, (1, 128), device=device)
        model(prompt, past_key_values=cache)
        token = torch.randint(512, (1, 1), device=device)

        def decode() -> Any:
            out = model(token, past_key_values=cache, use_cache=True)
            cache.crop(-1)  # the same step again and again
            return out

        return decode

    return model, step, layers


def flux(device: str, quick: bool) -> tuple[nn.Module, Callable[[nn.Module], Callable[[], Any]], int]:
    """A FLUX transformer with two blocks of each kind (quick: one), 64 image and 16 text tokens."""
    from diffusers import FluxTransformer2DModel

    blocks = 1 if quick else 2
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=blocks,
        num_single_layers=blocks,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(16, 24, 24),
    )

    def step(model: nn.Module) -> Callable[[], Any]:
        kind = {"device": device, "dtype": torch.bfloat16}
        inputs = {
            "hidden_states": torch.randn(1, 64, 16, **kind),
            "encoder_hidden_states": torch.randn(1, 16, 64, **kind),
            "pooled_projections": torch.randn(1, 64, **kind),
            "timestep": torch.tensor([0.5], **kind),
            "img_ids": torch.zeros(64, 3, **kind),
            "txt_ids": torch.zeros(16, 3, **kind),
        }
        return lambda: model(**inputs)

    return model, step, 2 * blocks


@torch.inference_mode()
def measure(name: str, build: Callable[..., Any], device: str, quick: bool, seconds: float) -> dict[str, Any]:
    torch.manual_seed(0)
    model, step, layers = build(device, quick)
    untouched = model.to(device, torch.bfloat16).eval()
    variants = {"untouched": step(untouched)}
    models = {}
    for label, backend in APPLIED.items():
        twin, _, _ = build(device, quick)
        twin.load_state_dict(untouched.state_dict())
        models[label] = lpattn.apply_low_precision_attention(twin.to(device, torch.bfloat16).eval(), backend)
        variants[label] = step(models[label])
    for run in variants.values():
        run()
    times = interleaved(variants, host_timer(1), 20 if quick else 400, seconds)
    base = median(times["untouched"])
    calls = {
        label: sum(sum(r.low.values()) + sum(r.exact.values()) for r in lpattn.attention_report(m).values())
        for label, m in models.items()
    }
    assert all(calls.values()), f"{name}: nothing was intercepted, {calls}"
    return {
        "model": name,
        "layers": layers,
        "milliseconds": {label: median(t) * 1e3 for label, t in times.items()},
        "spread": {label: spread(t) for label, t in times.items()},
        "overhead": {label: median(times[label]) / base - 1 for label in APPLIED},
        "microseconds_per_layer": {label: (median(times[label]) - base) / layers * 1e6 for label in APPLIED},
        "rounds": len(times["untouched"]),
    }


def main() -> int:
    given = parser(__doc__ or "", budget=120.0).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    # Exact attention is what is meant here.
    warnings.simplefilter("ignore", lpattn.LpattnWarning)
    results, rows = [], [["eager step", "untouched ms", "applied", "ms", "overhead", "us per layer", "+-"]]
    for name, build in (("Llama decode", llama), ("FLUX", flux)):
        try:
            result = measure(name, build, device, given.quick, given.budget / 2)
        except ImportError as error:
            print(f"{name}: left out, {error}")
            continue
        results.append(result)
        for label in APPLIED:
            rows.append(
                [
                    f"{name}, {result['layers']} layers",
                    f"{result['milliseconds']['untouched']:.3f}",
                    label,
                    f"{result['milliseconds'][label]:.3f}",
                    f"{result['overhead'][label]:+.1%}",
                    f"{result['microseconds_per_layer'][label]:+.1f}",
                    f"{result['spread'][label]:.0%}",
                ]
            )
    print(table(rows))
    write(given.out, {"results": results, "device": device})
    return 0


if __name__ == "__main__":
    sys.exit(main())
