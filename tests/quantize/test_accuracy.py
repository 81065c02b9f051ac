"""How accurate the recipes are on adversarial inputs, and proof that the gates notice when they are not.

The noise gate is two-sided and derived, not tuned: the rounding errors of q, k, v and P are propagated to first order
through exact attention (see conftest), and what is measured must lie near that: above it something is wrong,
below it something was not rounded.
"""

import math
import types
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

import lpattn.quantize.emulate as emulate
import lpattn.quantize.visibility as visibility
from lpattn.quantize import E4M3_MAX, FA3_PER_HEAD, PER_BLOCK, PER_BLOCK_F16, RECIPES, RowSum, emulated_attention
from lpattn.types import HadamardMode

PLAIN = replace(PER_BLOCK, smooth_k=False, smooth_v=False)
PLAIN_PER_HEAD = replace(FA3_PER_HEAD, smooth_k=False, smooth_v=False, power_of_two=False)
GATED = {**RECIPES, "plain": PLAIN, "plain per head": PLAIN_PER_HEAD}


@dataclass
class Case:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    kwargs: dict = field(default_factory=dict)


def _cases() -> dict[str, Case]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    def base(q_len=96, kv_len=300, heads=4, kv_heads=2, dim=32):
        return randn(1, heads, q_len, dim), randn(1, kv_heads, kv_len, dim), randn(1, kv_heads, kv_len, dim)

    cases = {}
    for std in (0.25, 0.5, 1.0, 2.0):
        q, k, v = base()
        cases[f"logits std {std:g}"] = Case(q * std, k, v)
    q, k, v = base(300, 300)
    cases["causal"] = Case(q, k, v, {"is_causal": True})
    q, k, v = base()
    scale = torch.tensor([0.25, 0.5, 1.0, 2.0])[:, None, None]
    cases["heads of different scale"] = Case(q * scale, k, v * torch.tensor([0.1, 10.0])[:, None, None])
    q, k, v = base()
    channel = torch.ones(32).index_fill(0, torch.tensor(3), 20.0)
    cases["outlier channels"] = Case(q * channel * 0.1, k * channel * 0.1, v * channel)
    q, k, v = base()
    growth = torch.logspace(-1.5, 0.5, 300)[:, None]
    cases["scale grows along the keys"] = Case(q, k * growth, v * growth.flip(0))
    q, k, v = base()
    cases["K and V with a mean"] = Case(q, k + 2 * randn(1, 2, 1, 32), v + randn(1, 2, 1, 32))
    q, k, v = base(300, 300, 2, 2)
    cases["needle at the last allowed key"] = Case(q, q * 1.5, v, {"is_causal": True})
    past = q.roll(1, 2)
    past[:, :, 0] = 0
    cases["needle one past the last allowed key"] = Case(q, past * 3, v * 3, {"is_causal": True})
    q, k, v = base(96, 300, 2, 2)
    last = k.clone()
    last[:, :, -1] = randn(1, 2, 32)
    cases["needle at the last key"] = Case(q * 0.3 + last[:, :, -1:], last, v)
    q, k, v = base(64, 1024, 2, 2)
    q, k = torch.zeros_like(q), 0.01 * k
    q[..., 0], k[:, :, 0, 0] = 1.0, 7 * math.sqrt(32)
    cases["one peak and many small tails"] = Case(q, k, v * 0.1 + randn(1, 2, 1, 32))
    q, k, v = base()
    k, v = k * 0.3, v.clone()
    k[:, :, 0] = 4.0
    v[:, :, 0] = 0.01
    cases["attention sink"] = Case(q * 0.3 + 0.4, k, v)
    q, k, v = base(300, 300, 2, 2)
    rows = torch.arange(300)
    cases["one-hot rows"] = Case(q, q[:, :, rows.flip(0)] * 10, v)
    q, k, v = base()
    cases["maximum in the last tile"] = Case(q * 0.2 + 0.5, k * 0.2 + torch.linspace(-1.5, 1.5, 300)[:, None], v)
    q, k, v = base()
    cases["values near the end of float16"] = Case(q, k, (v * 2e4).clamp(-65504, 65504))
    q, k, v = base()
    cases["V of ones"] = Case(q, k, torch.ones_like(v))
    q, k, v = base(96, 300)
    mask = torch.rand(1, 4, 96, 300, generator=generator) < 0.7
    mask[:, :, 5] = False
    mask[..., :40] = False
    junk = torch.where(torch.arange(300)[:, None] < 40, 1e7, 1.0)
    cases["junk under the mask, rows without keys"] = Case(q, k * junk, (v + 1) * junk, {"attn_mask": mask})
    q, k, v = base()
    cases["bias"] = Case(q, k, v, {"attn_mask": 2 * randn(1, 4, 96, 300), "softmax_scale": 0.1})
    return cases


CASES = _cases()


# Thousands of independent rounding errors meet in each of these, so the measured noise lies close to the prediction.
# In the others a few keys dominate; one squared rounding error is at most three times its variance.
AVERAGED = [name for name in CASES if name.startswith("logits std")] + [
    "causal",
    "heads of different scale",
    "scale grows along the keys",
    "maximum in the last tile",
    "values near the end of float16",
    "bias",
]


@pytest.fixture(scope="module")
def expectations(exact, predicted):
    """(case, recipe) -> exact attention and predicted noise; the mutants below ask for the same ones again."""
    known = {}

    def get(name, recipe):
        case = CASES[name]
        if name not in known:
            known[name] = exact(case.q, case.k, case.v, **case.kwargs)
        if (name, recipe) not in known:
            known[name, recipe] = predicted(case.q, case.k, case.v, recipe, **case.kwargs)
        return known[name], known[name, recipe]

    return get


def failures(name, recipe, reference, noise, attend=emulated_attention) -> set[str]:
    """The gates that an implementation of the recipe fails on a case."""
    case = CASES[name]
    out, lse = attend(case.q, case.k, case.v, recipe=recipe, return_lse=True, **case.kwargs)
    failed = set()
    rows = reference.lse > -math.inf
    if not (out.isfinite().all() and lse[rows].isfinite().all()):
        return {"finite"}
    resolution = 4 * torch.finfo(torch.float32).eps ** 2 * reference.out.square().sum()
    ratio = (out - reference.out).square().sum() / (noise.total + resolution)
    if ratio > (1.25 if name in AVERAGED else 2.0):
        failed.add("noise")
    if name in AVERAGED and ratio < 0.7:
        failed.add("too little noise")
    if ((lse - reference.lse).abs()[rows] > noise.lse_budget[rows] + 1e-5).any():
        failed.add("lse")
    if (lse[~rows] != -math.inf).any() or (out[~rows] != 0).any():
        failed.add("rows without keys")
    if name == "V of ones" and recipe.row_sum is RowSum.ROUNDED and (out - 1).abs().max() > 1e-5:
        failed.add("ones")
    return failed


@pytest.mark.parametrize("recipe", GATED.values(), ids=GATED.keys())
@pytest.mark.parametrize("name", CASES)
def test_the_noise_is_what_the_casts_explain(name, recipe, expectations):
    assert not failures(name, recipe, *expectations(name, recipe))


@pytest.mark.parametrize("name", CASES)
def test_lse_from_the_unrounded_sum(name, expectations):
    recipe = replace(PER_BLOCK, row_sum=RowSum.UNROUNDED)  # no allowance for the rounding of P: much tighter
    assert not failures(name, recipe, *expectations(name, recipe))


@pytest.mark.parametrize("recipe", GATED.values(), ids=GATED.keys())
@pytest.mark.parametrize("mode", [HadamardMode.QKV, HadamardMode.V_ONLY])
def test_rotation_costs_nothing_where_there_are_no_outliers(recipe, mode, expectations):
    """randn stays randn under a rotation, so the noise is that of no rotation."""
    for name in ("logits std 1", "causal", "heads of different scale"):
        reference, noise = expectations(name, recipe)
        assert not failures(name, replace(recipe, hadamard=mode), reference, noise) - {"lse"}


def sqnr(name, recipe, expectations):
    case, reference = CASES[name], expectations(name, recipe)[0]
    error = emulated_attention(case.q, case.k, case.v, recipe=recipe, **case.kwargs) - reference.out
    return 10 * math.log10(reference.out.square().sum() / error.square().sum())


def test_named_recipes_on_randn(expectations):
    """Closed form: every operand errs by 2.65 % rms (ulp^2 / 12 over a binade), q and k both in the logit.

    Noise over signal is 0.0265^2 * (1 + 1 + 2 * std^2) for logits of that standard deviation: 25.5 dB at 1. Flatter
    logits do not spread P over a binade, sharper ones leave the first order.
    """
    for std in (0.5, 1.0):
        floor = -10 * math.log10(0.0265**2 * (2 + 2 * std**2)) - 1.0  # 1 dB: 25 % noise more, as AVERAGED admits
        for recipe in RECIPES.values():
            assert sqnr(f"logits std {std:g}", recipe, expectations) > floor


def test_smoothing_pays_where_v_has_a_mean(expectations):
    name = "K and V with a mean"
    assert sqnr(name, PER_BLOCK, expectations) > sqnr(name, PLAIN, expectations) + 3
    sampled = replace(PER_BLOCK, smooth_every=16)
    assert sqnr(name, sampled, expectations) > sqnr(name, PLAIN, expectations) + 3
    assert sqnr(name, FA3_PER_HEAD, expectations) > sqnr(name, PLAIN_PER_HEAD, expectations) + 3


@pytest.mark.parametrize("name", AVERAGED)
def test_headroom_costs_range_and_not_precision(name, expectations):
    """e4m3 is floating point: scales that are 16 times too large move only its subnormals."""
    with_headroom = replace(FA3_PER_HEAD, qk_max=E4M3_MAX / 16, v_max=E4M3_MAX / 16)
    assert abs(sqnr(name, with_headroom, expectations) - sqnr(name, FA3_PER_HEAD, expectations)) < 0.05


def test_finer_scales_pay_where_scales_differ():
    """Keys of one block may be 1000 times those of another; a scale per head would leave nothing of the small ones."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 1, 256, 32, generator=generator) for _ in range(3))
    size = torch.where(torch.arange(256) < 128, 3e-6, 1.0)[:, None]
    mask = torch.arange(256) < 128
    # The large keys are seen by one query only, so that they count but do not matter to the others.
    mask = mask.expand(256, 256).clone()
    mask[0] = True
    reference = torch.nn.functional.scaled_dot_product_attention(q, k, v * size, mask)[:, :, 1:]

    def error(recipe):
        out = emulated_attention(q, k, v * size, recipe=recipe, attn_mask=mask)[:, :, 1:]
        return ((out - reference).square().sum() / reference.square().sum()).item()

    assert error(PLAIN) < 0.01
    assert error(FA3_PER_HEAD) > 0.5


def test_rotation_averages_the_error_of_an_outlier_channel():
    """One product dominates q.k, so its 3.7 % error is the logit's; rotated, 64 independent ones average out."""
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, 256, 64, generator=generator) for _ in range(3))
    q[..., 3] *= 12
    k[..., 3] *= 12
    reference = torch.nn.functional.scaled_dot_product_attention(q, k, v)

    def noise(mode):
        return (emulated_attention(q, k, v, recipe=replace(PLAIN, hadamard=mode)) - reference).square().sum()

    assert noise(HadamardMode.QKV) < noise(HadamardMode.NONE) / 2
    assert noise(HadamardMode.V_ONLY) > noise(HadamardMode.NONE) / 2  # v has no outlier


def test_one_hot_rows_return_the_rounded_value_and_the_exact_logit():
    q = torch.eye(32).expand(1, 1, 32, 32) * 256
    v = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    out, lse = emulated_attention(q, q / 256, v, recipe=PLAIN, softmax_scale=1.0, return_lse=True)
    assert ((out - v).abs() <= v.abs() * 2**-4 + v.abs().max() / 448 * 2**-10).all()
    torch.testing.assert_close(lse, torch.full_like(lse, 256.0))


@pytest.mark.parametrize("factor", [4, 16, 64, 256])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES.keys())
def test_large_logits_stay_finite_and_within_the_values(factor, recipe):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 200, 64, generator=generator) for _ in range(3))
    out, lse = emulated_attention(q * factor, k, v, recipe=recipe, return_lse=True)
    assert out.isfinite().all()
    # A weighted mean cannot leave the range of the values, but for the rounding of v (and of P, where not in the sum).
    assert (out.abs() <= v.abs().amax() * (1 + 2**-3)).all()
    logits = (q.double() * factor) @ k.double().mT / 8
    # Each logit errs by at most 2 * 2^-4 + 2^-8 of the sum of its products' magnitudes.
    slack = (q.double().abs() * factor) @ k.double().abs().mT / 8 * (2**-3 + 2**-8)
    slack = slack.amax(-1) * (2 if recipe.smooth_k else 1) + 2**-4
    assert ((lse - logits.logsumexp(-1)).abs() <= slack).all()


def mutant(edits: list[tuple[types.ModuleType, str, str]]):
    """emulated_attention of source in which the edits were made; the text to replace must occur exactly once."""
    spaces = {}
    for module in (visibility, emulate):
        source = Path(module.__file__).read_text(encoding="utf-8")
        for edited, old, new in edits:
            if edited is module:
                assert source.count(old) == 1, f"{module.__name__} must have exactly one {old!r}"
                source = source.replace(old, new)
        spaces[module] = {"__name__": f"{module.__name__}_mutant"}
        exec(compile(source, module.__file__, "exec"), spaces[module])
    spaces[emulate]["Visibility"] = spaces[visibility]["Visibility"]
    return spaces[emulate]["emulated_attention"]


# What goes wrong, the text and its replacement, and a (case, recipe, gate) that has to notice.
MUTANTS = {
    "P is not scaled": (
        [
            (emulate, ".exp() * recipe.p_scale", ".exp()"),
            (emulate, "(row_sum / recipe.p_scale)", "row_sum"),
        ],
        ("one peak and many small tails", "plain", "noise"),
    ),
    "P clips": (
        [(emulate, "return round_e4m3(p).to(p.dtype)", "return round_e4m3(p * 2).to(p.dtype) / 2")],
        ("attention sink", "plain", "noise"),
    ),
    "P is not rounded": (
        [(emulate, "return round_e4m3(p).to(p.dtype)", "return p")],
        ("logits std 0.25", "per_block", "too little noise"),
    ),
    "the sum counts P before rounding": (
        [(emulate, "summed = rounded if recipe.row_sum is RowSum.ROUNDED else p", "summed = p")],
        ("V of ones", "plain", "ones"),
    ),
    "the sum counts rounded P where it should not": (
        [(emulate, "summed = rounded if recipe.row_sum is RowSum.ROUNDED else p", "summed = rounded")],
        ("logits std 0.25", "fa3_per_head", "lse"),
    ),
    "the output is not rescaled": (
        [(emulate, "output[rows] * alpha + product", "output[rows] + product")],
        ("maximum in the last tile", "per_block", "noise"),
    ),
    "the sum is not rescaled": (
        [(emulate, "row_sum[rows] * alpha + summed", "row_sum[rows] + summed")],
        ("maximum in the last tile", "per_block", "lse"),
    ),
    "the last key is dropped": (
        [(visibility, "min(start + size, self.kv_len), start", "min(start + size, self.kv_len - 1), start")],
        ("needle at the last key", "plain", "noise"),
    ),
    "the diagonal is dropped": (
        [(visibility, "queries[:, None] >= torch", "queries[:, None] > torch")],
        ("needle at the last allowed key", "plain", "finite"),
    ),
    "one key past the diagonal is seen": (
        [(visibility, "queries[:, None] >= torch", "queries[:, None] + 1 >= torch")],
        ("needle one past the last allowed key", "plain", "noise"),
    ),
    "a causal tile starts a row late": (
        [(visibility, "start if self.is_causal else 0", "start + 1 if self.is_causal else 0")],
        ("needle at the last allowed key", "plain", "finite"),
    ),
    "query heads read the wrong KV head": (
        [
            (
                emulate,
                "q = query.data.to(work).unflatten(1, (kv_heads, -1))",
                "q = query.data.to(work).unflatten(1, (-1, kv_heads)).transpose(1, 2)",
            )
        ],
        ("logits std 1", "per_block", "noise"),
    ),
    "all tiles use the first scale of K": (
        [(emulate, "_first(k_scale, start)", "_first(k_scale, 0)")],
        ("scale grows along the keys", "per_block", "noise"),
    ),
    "all tiles use the first scale of V": (
        [(emulate, "_first(v_scale, start)", "_first(v_scale, 0)")],
        ("scale grows along the keys", "per_block", "noise"),
    ),
    "all queries use the first query's scale": (
        [(emulate, "q_scale[rows] * k_scale", "q_scale[..., :1, :] * k_scale")],
        ("logits std 1", "per_block", "noise"),
    ),
    "V's constant is not added back": (
        [(emulate, "output = output + v_mean[:, :, None]", "pass")],
        ("K and V with a mean", "per_block", "noise"),
    ),
    "V's constant is added to rows without keys": (
        [
            (emulate, "output = output.masked_fill(nothing, 0.0)", "pass"),
            (emulate, "output = output / row_sum", "output = output / row_sum.clamp_min(1e-30)"),
        ],
        ("junk under the mask, rows without keys", "per_block", "rows without keys"),
    ),
    "lse lacks K's constant": (
        [(emulate, "lse = lse + ((query * scale)", "lse = lse + 0 * ((query * scale)")],
        ("K and V with a mean", "per_block", "lse"),
    ),
    "lse is in the wrong base": (
        [(emulate, "lse = maximum + (row_sum / recipe.p_scale).log()", "lse = maximum + row_sum.log2()")],
        ("logits std 1", "per_block", "lse"),
    ),
    "masked keys get a large finite logit": (
        [(emulate, "logits.masked_fill(~visible, -torch.inf)", "logits.masked_fill(~visible, -1e4)")],
        ("junk under the mask, rows without keys", "per_block", "rows without keys"),
    ),
    "padding enters the scales": (
        [
            (
                emulate,
                "quantize(k, recipe.k_granularity, recipe.qk_max, used_keys)",
                "quantize(k, recipe.k_granularity, recipe.qk_max, None)",
            ),
            (
                emulate,
                "quantize(v, recipe.v_granularity, recipe.v_max, used_keys)",
                "quantize(v, recipe.v_granularity, recipe.v_max, None)",
            ),
        ],
        ("junk under the mask, rows without keys", "fa3_per_head", "noise"),
    ),
    "padding enters the means": (
        [
            (emulate, "channel_mean(key, used_keys,", "channel_mean(key, None,"),
            (emulate, "channel_mean(value, used_keys,", "channel_mean(value, None,"),
        ],
        ("junk under the mask, rows without keys", "per_block", "noise"),
    ),
    "the scale argument is ignored": (
        [(emulate, "else float(softmax_scale)", "else dim**-0.5")],
        ("bias", "per_block", "noise"),
    ),
    "the bias is ignored": (
        [(emulate, "logits = logits + bias.to(work)", "pass")],
        ("bias", "per_block", "noise"),
    ),
}


@pytest.mark.parametrize("bug", MUTANTS)
def test_the_gates_notice_a_planted_bug(bug, expectations):
    edits, (name, recipe, gate) = MUTANTS[bug]
    attend = mutant(edits)
    assert gate in failures(name, GATED[recipe], *expectations(name, GATED[recipe]), attend=attend)


@pytest.mark.parametrize("name", ["causal", "junk under the mask, rows without keys"])
def test_a_mutant_without_edits_passes(name, expectations):
    assert not failures(name, PER_BLOCK, *expectations(name, PER_BLOCK), attend=mutant([]))


def test_the_float16_recipe_stays_below_the_largest_float16():
    assert PER_BLOCK_F16.qk_max**2 * 256 < torch.finfo(torch.float16).max
