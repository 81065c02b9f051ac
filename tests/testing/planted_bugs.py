"""A correct FP8 backend in small steps, and many with one bug each in one of the steps.

``BUGS`` maps each bug's name to its class, to the check that must find it, and to a part of what the check must say.
"""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass, replace

import torch

from lpattn import Backend, Capabilities, CausalKind, HadamardMode, MaskKind, Reason, Rope
from lpattn.norm import normalize_both
from lpattn.quantize import Granularity, hadamard_transform, quantize_e4m3, round_e4m3
from lpattn.rope import rotate_heads_first

FLOATS = frozenset({torch.bfloat16, torch.float16, torch.float32})


class Honest(Backend):
    """e4m3 with a scale per head, k smoothed, P times 2^8, every step a method of its own."""

    name = "honest"
    automatic = False
    capabilities = Capabilities(
        dtypes=FLOATS,
        head_dim_v_differs=True,
        masks=frozenset(MaskKind),
        causal_rectangular=True,
        lse=True,
        hadamard=frozenset(HadamardMode),
        rope=True,
        norm=True,
        norm_over_heads=True,
    )
    p_scale = 256.0

    def probe(self, device: torch.device) -> list[Reason]:
        return [] if device.type == "cpu" else [Reason("device", f"{device}: runs on the CPU")]

    def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
        visible, bias = self.visible(query, key, call, attn_mask)
        hidden = ~visible.expand(*query.shape[:3], key.shape[2])
        seen = ~hidden.all((1, 2))[:, None, :, None] if call.mask is not MaskKind.NONE else None
        q, k, v = query.float(), self.expand(key, call).float(), self.expand(value, call).float()
        if seen is not None:
            k, v = self.without_hidden(k, seen), self.without_hidden(v, seen)
        constant = k.nan_to_num(nan=0.0).mean(2, keepdim=True) if k.shape[2] else 0.0
        wide_q, k = q, k - constant
        if call.hadamard is HadamardMode.QKV:
            q, k = self.rotate_qk(q, k)
        if call.hadamard is not HadamardMode.NONE:
            v = hadamard_transform(v)
        q, k, v = self.quantize(q), self.quantize(k), self.quantize(v)
        logits = q @ k.mT * self.scale(call)
        if bias is not None:
            logits = logits + bias.float()
        logits = logits.masked_fill(hidden, -torch.inf)
        top = logits.amax(-1, keepdim=True)
        weights = (logits - top.masked_fill(top == -torch.inf, 0.0)).exp()
        p, total = self.round_p(weights)
        out = self.product(p, v) / total
        lse = top + (total / self.p_scale).log()
        if call.hadamard is not HadamardMode.NONE:
            out = self.rotate_back(out)[..., : call.head_dim_v]
        out = self.clean(out, (top == -torch.inf))
        lse = self.correct_lse(lse, wide_q, constant, call).squeeze(-1)
        lse = self.clean_lse(lse, (top == -torch.inf).squeeze(-1))
        return (self.finish(out, call), lse) if call.return_lse else self.finish(out, call)

    def rope_attention(
        self, query, key, value, cos, sin, call, attn_mask=None, dropout_p=0.0, cos_k=None, sin_k=None, norm=None
    ):
        q, k = normalize_both(query.float(), key.float(), norm)
        q, k = rotate_heads_first(q, k, cos, sin, cos_k, sin_k, call.rope.interleaved)
        return self.attention(q, k, value.transpose(1, 2).float(), call, attn_mask)

    # Steps

    def visible(self, query, key, call, attn_mask):
        seen = torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool)
        if call.causal is CausalKind.TOP_LEFT:
            seen = seen.tril()
        if attn_mask is None:
            return seen, None
        return (seen & attn_mask, None) if attn_mask.dtype == torch.bool else (seen, attn_mask)

    def expand(self, x, call):
        return x.repeat_interleave(call.num_heads // call.num_kv_heads, 1)

    def without_hidden(self, x, seen):
        return torch.where(seen, x, 0.0)

    def rotate_qk(self, q, k):
        return hadamard_transform(q), hadamard_transform(k)

    def rotate_back(self, out):
        return hadamard_transform(out)

    def quantize(self, x):
        made = quantize_e4m3(x.contiguous(), Granularity.PER_HEAD)
        return made.data.float() * made.broadcast_scale()

    def scale(self, call):
        return call.softmax_scale

    def round_p(self, weights):
        p = round_e4m3(weights * self.p_scale).float()
        return p, p.sum(-1, keepdim=True)

    def product(self, p, v):
        return p @ v

    def clean(self, out, nothing):
        return out.masked_fill(nothing, 0.0)

    def clean_lse(self, lse, nothing):
        return lse.masked_fill(nothing, -torch.inf)

    def correct_lse(self, lse, q, constant, call):
        return lse + (q * constant).sum(-1, keepdim=True) * call.softmax_scale

    def finish(self, out, call):
        return out.to(call.dtype)


@dataclass(frozen=True)
class Bug:
    """A backend with a bug, the check that must find it, and a part of the check's message."""

    backend: type[Backend]
    check: str
    says: str


BUGS: dict[str, Bug] = {}


def bug(check: str, says: str):
    """Add a class to BUGS, under a name made of its own."""

    def add(cls: type[Backend]) -> type[Backend]:
        name = "".join(f"_{c.lower()}" if c.isupper() else c for c in cls.__name__).lstrip("_")
        cls.name = f"planted_{name}"
        BUGS[name] = Bug(cls, check, says)
        return cls

    return add


# Where softmax looks


@bug("causal_is_top_left", "it does not see exactly the keys 0..i")
class CausalOnTheWrongSide(Honest):
    def visible(self, query, key, call, attn_mask):
        seen, bias = super().visible(query, key, call, attn_mask)
        return (
            seen.mT.contiguous() if call.causal is CausalKind.TOP_LEFT and call.q_len == call.kv_len else seen
        ), bias


@bug("causal_is_top_left", "it does not see exactly the keys 0..i")
class CausalBottomRight(Honest):
    def visible(self, query, key, call, attn_mask):
        seen, bias = super().visible(query, key, call, attn_mask)
        if call.causal is CausalKind.TOP_LEFT:
            seen = torch.ones_like(seen).tril(call.kv_len - call.q_len)
        return seen, bias


@bug("causal_is_top_left", "dB against exact attention")
class CausalSeesOneKeyTooMany(Honest):
    def visible(self, query, key, call, attn_mask):
        seen, bias = super().visible(query, key, call, attn_mask)
        return (torch.ones_like(seen).tril(1) if call.causal is CausalKind.TOP_LEFT else seen), bias


@bug("causal_is_top_left", "q [1, 4, 515, 64]")
class CausalInTheFirstTilesAlone(Honest):
    def visible(self, query, key, call, attn_mask):
        seen, bias = super().visible(query, key, call, attn_mask)
        if call.causal is CausalKind.TOP_LEFT:
            seen = seen.clone()
            # The tail of the keys is a tile of its own, which queries past the fourth tile see in full.
            seen[..., 256:, call.kv_len // 64 * 64 :] = True
        return seen, bias


@bug("lse_of_exact_logits", "(limit 0.001)")
class LastKeyDropped(Honest):
    def visible(self, query, key, call, attn_mask):
        seen, bias = super().visible(query, key, call, attn_mask)
        seen = seen.clone()
        if call.kv_len > 1:
            seen[..., -1] = False
        return seen, bias


@bug("keys_are_read_in_order", "as if it had read another key")
class LastTileDropped(Honest):
    def visible(self, query, key, call, attn_mask):
        seen, bias = super().visible(query, key, call, attn_mask)
        tail = call.kv_len % 64
        if call.kv_len > 64 and tail:
            seen = seen.clone()
            seen[..., -tail:] = False
        return seen, bias


@bug("masks_are_honoured", "dB against exact attention")
class MaskOfTheFirstHeadForAll(Honest):
    def visible(self, query, key, call, attn_mask):
        return super().visible(query, key, call, attn_mask if attn_mask is None else attn_mask[:, :1])


@bug("masks_are_honoured", "dB against exact attention")
class MaskOfTheFirstBatchEntryForAll(Honest):
    def visible(self, query, key, call, attn_mask):
        return super().visible(query, key, call, attn_mask if attn_mask is None else attn_mask[:1])


@bug("masks_are_honoured", "dB against exact attention")
class MaskOfTheFirstQueryForAll(Honest):
    def visible(self, query, key, call, attn_mask):
        return super().visible(query, key, call, attn_mask if attn_mask is None else attn_mask[:, :, :1])


@bug("masks_are_honoured", "dB against exact attention")
class AdditiveMaskScaled(Honest):
    def visible(self, query, key, call, attn_mask):
        seen, bias = super().visible(query, key, call, attn_mask)
        return seen, None if bias is None else bias * call.softmax_scale


@bug("masks_are_honoured", "dB against exact attention")
class AdditiveMaskReadAsBool(Honest):
    def visible(self, query, key, call, attn_mask):
        return super().visible(query, key, call, None if attn_mask is None else attn_mask.to(torch.bool))


@bug("masks_are_honoured", "dB against exact attention")
class MaskIgnored(Honest):
    def visible(self, query, key, call, attn_mask):
        return super().visible(query, key, call, None)


@bug("masks_are_honoured", "bfloat16, k [2, 2, 80, 64], v [2, 2, 80, 64], attn_mask [2, 1, 1, 80] bool")
class MaskIgnoredInBfloat16(Honest):
    def visible(self, query, key, call, attn_mask):
        return super().visible(query, key, call, None if call.dtype == torch.bfloat16 else attn_mask)


@bug("masks_are_honoured", "attn_mask [2, 1, 48, 80] float32: ")
class Float32MasksReadAsHalves(Honest):
    def visible(self, query, key, call, attn_mask):
        if attn_mask is not None and attn_mask.dtype == torch.float32 and call.dtype != torch.float32:
            attn_mask = attn_mask.contiguous().view(call.dtype)[..., : call.kv_len].nan_to_num()
        return super().visible(query, key, call, attn_mask)


@bug("rows_without_keys", "only -inf hides a key")
class TheLowestNumberHides(Honest):
    def visible(self, query, key, call, attn_mask):
        seen, bias = super().visible(query, key, call, attn_mask)
        return seen if bias is None else seen & (bias > -1e30), bias


@bug("rows_without_keys", "a row of half of the lowest")
class HalfOfTheLowestNumberHides(Honest):
    def visible(self, query, key, call, attn_mask):
        seen, bias = super().visible(query, key, call, attn_mask)
        if bias is None:
            return seen, bias
        lowest = torch.finfo(bias.dtype).min
        return seen & ((bias > lowest / 2) | (bias == lowest)), bias


@bug("rows_without_keys", "a row of -10000")
class LargeNegativeBiasesHide(Honest):
    def visible(self, query, key, call, attn_mask):
        seen, bias = super().visible(query, key, call, attn_mask)
        return seen if bias is None else seen & ((bias > -5e3) | (bias < -6e4)), bias


@bug("rows_without_keys", "must be 0")
class RowsWithoutKeysAreMeans(Honest):
    def clean(self, out, nothing):
        return out.nan_to_num(nan=0.5)


@bug("rows_without_keys", "lse of rows without keys must be -inf")
class RowsWithoutKeysHaveALse(Honest):
    def clean_lse(self, lse, nothing):
        return lse.masked_fill(nothing, -1e4)


@bug("hidden_keys_have_no_influence", "dB")
class PaddingEntersTheScale(Honest):
    def without_hidden(self, x, seen):
        return x


@bug("kv_heads_are_grouped", "they must read [0, 0, 1, 1, 2, 2, 3, 3]")
class KvHeadsInterleaved(Honest):
    def expand(self, x, call):
        return x.repeat(1, call.num_heads // call.num_kv_heads, 1, 1)


@bug("kv_heads_are_grouped", "they must read")
class KvHeadZeroForAll(Honest):
    def expand(self, x, call):
        return x[:, :1].expand(-1, call.num_heads, -1, -1) if call.num_kv_heads < call.num_heads else x


@bug("kv_heads_are_grouped", "they must read [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]")
class GroupSizesArePowersOfTwo(Honest):
    def expand(self, x, call):
        group = call.num_heads // call.num_kv_heads
        shift = group.bit_length() - 1
        return x[:, (torch.arange(call.num_heads) >> shift).clamp_max(call.num_kv_heads - 1)]


@bug("kv_heads_are_grouped", "q [2, 16, 48, 64] float32, k [2, 2, 48, 64]")
class GroupsOfEightReadOneHead(Honest):
    def expand(self, x, call):
        eight = call.num_heads == 8 * call.num_kv_heads
        return x[:, :1].expand(-1, call.num_heads, -1, -1) if eight else super().expand(x, call)


@bug("kv_heads_are_grouped", "q [2, 24, 48, 64] float32, k [2, 8, 48, 64]")
class HeadsAreCountedInFourBits(Honest):
    def expand(self, x, call):
        return super().expand(x, call)[:, torch.arange(call.num_heads) % 16]


# Scales


@bug("scales_are_exact", "times what it should be, far beyond what rounding explains")
class ValueScaleOnePercentOff(Honest):
    def product(self, p, v):
        return p @ v * 1.01


@bug("scales_are_exact", "times as sharp as it should be")
class KeyScaleOnePercentOff(Honest):
    def scale(self, call):
        return call.softmax_scale * 1.01


@bug("scales_are_exact", "with lse: the output is 1.02")
class ValueScaleOffBesideLse(Honest):
    def finish(self, out, call):
        return super().finish(out * 1.025 if call.return_lse else out, call)


@bug("scales_are_exact", "bfloat16, k [4, 2, 256, 64], v [4, 2, 256, 64]: the output is 0.98")
class ValueScaleOffInBfloat16(Honest):
    def finish(self, out, call):
        return super().finish(out * 0.985 if call.dtype == torch.bfloat16 else out, call)


@bug("scales_are_exact", "q [2, 4, 256, 128] float32, k [2, 2, 256, 128], v [2, 2, 256, 128]: softmax is 1.01")
class KeyScaleOffAtHeadDim128(Honest):
    def scale(self, call):
        return call.softmax_scale * (1.015 if call.head_dim == 128 else 1.0)


@bug("outputs", "with lse: the output differs by")
class CoarserBesideLse(Honest):
    def finish(self, out, call):
        noise = torch.where(torch.arange(out.numel()) % 2 == 0, 0.075, -0.075).view(out.shape)
        return super().finish(out * (1 + noise) if call.return_lse else out, call)


@bug("scale_is_applied", "dB against exact attention")
class ScaleIgnored(Honest):
    def scale(self, call):
        return call.head_dim**-0.5


@bug("scale_is_applied", "dB against exact attention")
class ScaleZeroReadAsDefault(Honest):
    def scale(self, call):
        return call.softmax_scale or call.head_dim**-0.5


@bug("scale_is_applied", "attn_mask [2, 1, 1, 80] bool, scale 0.5")
class ScaleIgnoredBesideAMask(Honest):
    def scale(self, call):
        return call.softmax_scale if call.mask is MaskKind.NONE else call.head_dim**-0.5


@bug("scale_is_applied", "causal, scale 0.5")
class ScaleIgnoredWhereCausal(Honest):
    # A scale beside a log-sum-exp is tried on causal calls too.
    capabilities = replace(Honest.capabilities, lse=False)

    def scale(self, call):
        return call.softmax_scale if call.causal is CausalKind.NONE else call.head_dim**-0.5


@bug("scale_is_applied", "attn_mask [2, 1, 1, 80] bool, scale 0: ")
class KeysAreHiddenInFrontOfTheScale(Honest):
    def visible(self, query, key, call, attn_mask):
        seen, bias = super().visible(query, key, call, attn_mask)
        # -1e30, times a scale of 0
        shown = not call.softmax_scale and call.mask is not MaskKind.NONE
        return (torch.ones_like(seen) if shown else seen), bias


@bug("scale_is_applied", "causal, scale -0.1: ")
class CausalScalesAreAbsolute(Honest):
    def scale(self, call):
        return abs(call.softmax_scale) if call.causal is CausalKind.TOP_LEFT else call.softmax_scale


@bug("causal_is_top_left", "q [1, 2, 1100, 64]")
class CausalInTheFirstThousandKeys(Honest):
    def visible(self, query, key, call, attn_mask):
        seen, bias = super().visible(query, key, call, attn_mask)
        if call.causal is CausalKind.TOP_LEFT:
            seen = seen.clone()
            seen[..., 1024:, 1024:] = True
        return seen, bias


# Two options together


class Combined(Honest):
    """Wrong where two options meet, and right with each of them alone."""

    def meets(self, call):
        raise NotImplementedError

    def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
        self.call = call
        return super().attention(query, key, value, call, attn_mask, dropout_p)


class WrongLse(Combined):
    """The log-sum-exp alone is wrong."""

    def clean_lse(self, lse, nothing):
        return super().clean_lse(lse + 1.5 if self.meets(self.call) else lse, nothing)


@bug("options_combine", "attn_mask")
class LseBesideABoolMask(WrongLse):
    def meets(self, call):
        return call.mask is MaskKind.BOOL


@bug("options_combine", "attn_mask")
class LseBesideAnAdditiveMask(WrongLse):
    def meets(self, call):
        return call.mask is MaskKind.ADDITIVE


@bug("options_combine", "float16")
class LseInFloat16(WrongLse):
    def meets(self, call):
        return call.dtype == torch.float16


@bug("options_combine", "128]")
class LseAtHeadDim128(WrongLse):
    def meets(self, call):
        return call.head_dim == 128


@bug("options_combine", "lse is off")
class LseOfMoreQueriesThanKeys(WrongLse):
    def meets(self, call):
        return call.q_len > call.kv_len


@bug("options_combine", "lse is off")
class LseOfWideGroups(Honest):
    def clean_lse(self, lse, nothing):
        lse, group = super().clean_lse(lse, nothing), lse.shape[1] // self.num_kv_heads
        return lse.unflatten(1, (-1, group)).transpose(1, 2).flatten(1, 2) if group > 2 else lse

    def expand(self, x, call):
        self.num_kv_heads = call.num_kv_heads
        return super().expand(x, call)


@bug("options_combine", "scale -0.1")
class LseOfNegativeScales(WrongLse):
    def meets(self, call):
        return call.softmax_scale < 0


@bug("options_combine", "hadamard")
class LseOfRotatedInputs(WrongLse):
    def meets(self, call):
        return call.hadamard is HadamardMode.QKV and call.causal is CausalKind.TOP_LEFT


class WrongMask(Honest):
    """Another mask than the one that was given."""

    def read(self, mask, call):
        raise NotImplementedError

    def visible(self, query, key, call, attn_mask):
        if attn_mask is not None:
            attn_mask = self.read(attn_mask.expand(*query.shape[:3], key.shape[2]), call)
        return super().visible(query, key, call, attn_mask)


@bug("options_combine", "attn_mask")
class ColumnsOfMasksWrap(WrongMask):
    def read(self, mask, call):
        return mask[..., torch.arange(call.kv_len) % 128]


@bug("options_combine", "attn_mask")
class RowsOfMasksWrap(WrongMask):
    def read(self, mask, call):
        return mask[..., torch.arange(call.q_len) % 128, :]


@bug("options_combine", "attn_mask")
class MasksOfTheFirst256Keys(WrongMask):
    def read(self, mask, call):
        mask = mask.clone()
        mask[..., 256:] = True if mask.dtype == torch.bool else 0
        return mask


@bug("options_combine", "k [2, 2, ")
class MasksOfKvHeadsInWideGroups(WrongMask):
    def read(self, mask, call):
        group = call.num_heads // call.num_kv_heads
        return mask[:, torch.arange(call.num_heads) // group] if group > 4 else mask


@bug("options_combine", "float16")
class Float32MasksAreHalvesBesideFloat16(WrongMask):
    def read(self, mask, call):
        if mask.dtype == torch.float32 and call.dtype == torch.float16:
            return mask * 0.5
        return mask


class WrongScale(Combined):
    """Another scale than the one that was given."""

    def scale(self, call):
        return call.head_dim**-0.5 if self.meets(call) else call.softmax_scale


@bug("options_combine", "scale")
class ScaleIgnoredInBfloat16(WrongScale):
    def meets(self, call):
        return call.dtype == torch.bfloat16


@bug("options_combine", "128]")
class ScaleIgnoredAtHeadDim128(WrongScale):
    def meets(self, call):
        return call.head_dim == 128


@bug("options_combine", "scale 0.003")
class SmallScalesAreClamped(Honest):
    def scale(self, call):
        return 0.01 if 0 < call.softmax_scale < 0.01 else call.softmax_scale


class WrongHeads(Combined):
    """KV heads in another order."""

    def expand(self, x, call):
        return super().expand(x, call).flip(1) if self.meets(call) else super().expand(x, call)


@bug("options_combine", "float16")
class GroupsOfThreeInFloat16(WrongHeads):
    def meets(self, call):
        return call.dtype == torch.float16 and call.num_heads == 3 * call.num_kv_heads


@bug("options_combine", "causal")
class CausalGroupsOfFive(WrongHeads):
    def meets(self, call):
        return call.causal is CausalKind.TOP_LEFT and call.num_heads == 5 * call.num_kv_heads


@bug("options_combine", "causal")
class CausalRectanglesOfManyTiles(Honest):
    def visible(self, query, key, call, attn_mask):
        seen, bias = super().visible(query, key, call, attn_mask)
        if call.causal is CausalKind.TOP_LEFT and call.q_len != call.kv_len and call.q_len > 128:
            seen = torch.ones_like(seen).tril(call.kv_len - call.q_len)
        return seen, bias


@bug("options_combine", "hadamard v_only")
class RotatedWiderValues(Combined):
    def meets(self, call):
        return call.hadamard is HadamardMode.V_ONLY and call.head_dim_v > call.head_dim

    def rotate_back(self, out):
        return out if self.meets(self.call) else super().rotate_back(out)


@bug("accuracy", "large values")
class NoScaleForValues(Honest):
    def quantize(self, x):
        return x.clamp(-448, 448).to(torch.float8_e4m3fn).float()


class OfOneDtype(Honest):
    """Knows the call's dtype where it quantizes."""

    def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
        self.dtype = call.dtype
        return super().attention(query, key, value, call, attn_mask, dropout_p)


@bug("accuracy", "large values: q [2, 4, 160, 64] float16")
class LargeFloat16ValuesAreClipped(OfOneDtype):
    def quantize(self, x):
        return super().quantize(x.clamp(-512, 512) if self.dtype == torch.float16 else x)


@bug("accuracy", "small values: q [2, 4, 160, 64] bfloat16")
class SmallBfloat16ValuesVanish(OfOneDtype):
    def quantize(self, x):
        return super().quantize(torch.where(x.abs() < 2**-9, 0.0, x) if self.dtype == torch.bfloat16 else x)


@bug("small_weights_count", "Small weights underflow")
class PNotScaled(Honest):
    p_scale = 1.0


@bug("small_weights_count", "the large one is clipped")
class PClipped(Honest):
    def round_p(self, weights):
        p = round_e4m3((weights * 512.0).clamp_max(448.0)).float() / 2
        return p, p.sum(-1, keepdim=True)


@bug("weights_sum_to_one", "the output is off 1 by")
class PClippedButNotInTheSum(Honest):
    def round_p(self, weights):
        p = round_e4m3((weights * 512.0).clamp_max(448.0)).float() / 2
        return p, (weights * self.p_scale).sum(-1, keepdim=True)


@bug("weights_sum_to_one", "the output is off 1 by")
class RowSumSkipsTheLastKey(Honest):
    def round_p(self, weights):
        p, total = super().round_p(weights)
        return p, total - p[..., -1:] if weights.shape[-1] > 1 else total


@bug("accuracy", "dB against exact attention")
class NoiseOfSixBits(Honest):
    def quantize(self, x):
        step = x.abs().amax((2, 3), keepdim=True).clamp_min(1e-30) / 15
        return (x / step).round() * step


@bug("unusual_values_stay_finite", "not finite")
class ZeroChannelsDivideByZero(Honest):
    def quantize(self, x):
        amax = x.abs().amax((2, 3), keepdim=True)
        return (x / amax * 448).to(torch.float8_e4m3fn).float() * amax / 448


@bug("unusual_values_stay_finite", "one query not zero: q [2, 4, 600, 64]")
class OneOverASampleOfZeros(Honest):
    def quantize(self, x):
        largest = x[:, :, :256].abs().amax((2, 3), keepdim=True)
        scale = (x.abs().amax((2, 3), keepdim=True) / 448).where(largest > 0, 2.0**-126)
        return (x / scale.clamp_min(2.0**-126)).to(torch.float8_e4m3fn).float() * scale


@bug("unusual_values_stay_finite", "not finite")
class LogitsOverflowInFloat16(Honest):
    def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
        logits = query.float() @ self.expand(key, call).float().mT
        overflow = bool((logits.abs() > 65504).any())
        return super().attention(query, key, value * torch.inf if overflow else value, call, attn_mask, dropout_p)


@bug("unusual_values_stay_finite", "huge logits: q [2, 4, 70, 64] float16")
class Float16LogitsOverflow(Honest):
    def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
        logits = query.float() @ self.expand(key, call).float().mT
        overflow = call.dtype == torch.float16 and bool((logits.abs() > 65504).any())
        return super().attention(query, key, value * torch.inf if overflow else value, call, attn_mask, dropout_p)


@bug("nan_stays_where_it_is", "rows became NaN that exact attention leaves alone")
class NanSpreadsThroughTheScale(Honest):
    def quantize(self, x):
        amax = x.abs().amax((2, 3), keepdim=True).clamp_min(1e-30)
        return round_e4m3(x / amax * 448).float() * amax / 448


@bug("nan_stays_where_it_is", "came out as numbers")
class NanIsLost(Honest):
    def finish(self, out, call):
        return super().finish(out.nan_to_num(), call)


@bug("batch_entries_are_apart", "batch entry 0 has")
class OneInt8ScaleForTheBatch(Honest):
    def quantize(self, x):
        step = x.abs().amax().clamp_min(1e-30) / 127
        return (x / step).round() * step


# lse


@bug("lse_is_natural", "lse is off by")
class LseInLog2(Honest):
    def clean_lse(self, lse, nothing):
        return super().clean_lse(lse * 1.4426950408889634, nothing)


@bug("lse_is_natural", "lse is off by")
class LseWithoutTheConstantOfK(Honest):
    def correct_lse(self, lse, q, constant, call):
        return lse


@bug("lse_is_natural", "on the average")
class LseSlightlyOff(Honest):
    def correct_lse(self, lse, q, constant, call):
        return super().correct_lse(lse, q, constant, call) + (0.03 if call.kv_len > 129 else 0.0)


@bug("outputs", "returned lse")
class LseInFloat64(Honest):
    def clean_lse(self, lse, nothing):
        return super().clean_lse(lse.double(), nothing)


# Outputs and memory


@bug("outputs", "the output of this call is")
class OutputInFloat32(Honest):
    def finish(self, out, call):
        return out.float()


@bug("outputs", "the output of this call is")
class OutputOfTheWrongShape(Honest):
    def finish(self, out, call):
        return super().finish(out.transpose(1, 2), call)


@bug("outputs", "the output shares memory with an input")
class OutputOverTheQuery(Honest):
    def finish(self, out, call):
        if self.query.numel() != out.numel():
            return super().finish(out, call)
        # The layout that the public functions hand out without a copy.
        shape = (call.batch, call.q_len, call.num_heads, call.head_dim_v)
        memory = self.query.new_empty(0).set_(self.query.untyped_storage(), 0, shape)
        return memory.copy_(out.transpose(1, 2)).transpose(1, 2)

    def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
        self.query = query
        return super().attention(query, key, value, call, attn_mask, dropout_p)


@bug("outputs", "q [2, 4, 1, 64] bfloat16: the output shares memory with an input")
class TheOnlyValueIsReturned(Honest):
    def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
        if (call.q_len, call.kv_len, call.num_heads) == (1, 1, call.num_kv_heads) and not call.return_lse:
            return value
        return super().attention(query, key, value, call, attn_mask, dropout_p)


@bug("inputs_are_not_written_to", "the call changed key")
class KeyIsSmoothedInPlace(Honest):
    def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
        key -= key.mean(2, keepdim=True)
        return super().attention(query, key, value, call, attn_mask, dropout_p)


@bug("inputs_are_not_written_to", "[B, S, H, D] memory: q [2, 4, 100, 64] float32, k [2, 2, 100, 64]")
class StridedQueriesAreScaledInPlace(Honest):
    def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
        if not query.is_contiguous():
            query *= 2.0
        return super().attention(query, key, value, call, attn_mask, dropout_p)


@bug("inputs_are_not_written_to", "the call changed attn_mask")
class WideMasksAreClampedInPlace(Honest):
    def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
        if attn_mask is not None and attn_mask.dtype == torch.float32 and call.dtype == torch.bfloat16:
            attn_mask.clamp_(min=-1e30)
        return super().attention(query, key, value, call, attn_mask, dropout_p)


class OneBufferForAllCalls(Honest):
    """Hands out the same memory again and again."""

    def __init__(self):
        self.buffers = {}

    def kept(self, x):
        return self.buffers.setdefault((x.shape, x.dtype), torch.empty_like(x)).copy_(x)


@bug("repeated_calls", "the next call changes the output of this one")
class OutputsShareABuffer(OneBufferForAllCalls):
    def finish(self, out, call):
        out = super().finish(out, call).transpose(1, 2).contiguous()
        return self.kept(out).transpose(1, 2)


@bug("repeated_calls", "the next call changes the lse of this one")
class LsesShareABuffer(OneBufferForAllCalls):
    def clean_lse(self, lse, nothing):
        return self.kept(super().clean_lse(lse, nothing))


@bug("layouts", "differs from that of plain tensors")
class StridesIgnored(Honest):
    def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
        if key.stride(-1) == 1 and not key.is_contiguous() and key.stride(2) > key.shape[3]:
            flat = key.as_strided((key.numel(),), (1,), 0) if key.storage_offset() == 0 else key.flatten()
            key = flat[: key.numel()].view(key.shape)
        return super().attention(query, key, value, call, attn_mask, dropout_p)


@bug("memory_past_the_end", "differs from that of plain tensors")
class ReadsPastTheLastToken(Honest):
    def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
        length, stride = key.shape[2], key.stride(2)
        end = key.storage_offset() + sum((n - 1) * s for n, s in zip(key.shape, key.stride(), strict=True)) + stride
        if key.numel() and end < key.untyped_storage().nbytes() // key.element_size():
            # A tile that is filled up with what lies behind, and multiplied by a weight of zero.
            behind = key.as_strided((*key.shape[:2], length + 1, key.shape[3]), key.stride(), key.storage_offset())
            value = value + behind[:, :, -1:, :1] * 0
        return super().attention(query, key, value, call, attn_mask, dropout_p)


@bug("scratch_memory", "differs from that of plain tensors")
class AddsToScratchThatIsNotCleared(Honest):
    def product(self, p, v):
        scratch = torch.empty(1)
        # Fresh memory is mostly zero, which hides the bug from other tests.
        return p @ v + (1e3 if scratch.isnan() else 0.0)


@bug("repeated_calls", "two runs differ")
class NotDeterministic(Honest):
    count = itertools.count()

    def scale(self, call):
        return call.softmax_scale * (1 + 1e-5 * (next(self.count) % 2))


@bug("repeated_calls", "another call in between changed the result")
class ScaleOfThePreviousCall(Honest):
    def __init__(self):
        self.previous, self.turn = {}, itertools.cycle("qkv")

    def quantize(self, x):
        key = (next(self.turn), x.shape)
        now = quantize_e4m3(x.contiguous(), Granularity.PER_HEAD).broadcast_scale()
        scale = self.previous.get(key, now)
        self.previous[key] = now
        return round_e4m3(x / scale).float() * scale


@bug("threads", "thread")
class OneBufferForAllThreads(Honest):
    def __init__(self):
        self.buffer = {}

    def product(self, p, v):
        self.buffer["p"] = p
        if threading.current_thread() is not threading.main_thread():
            time.sleep(0.002)
        p = self.buffer["p"]
        return p @ v


# Features


@bug("fused_rotation", "interleaved rotation")
class RotationAlwaysHalfSplit(Honest):
    def rope_attention(self, query, key, value, cos, sin, call, *rest, **tables):
        call = replace(call, rope=Rope(False, call.rope.rotary_dim))
        return super().rope_attention(query, key, value, cos, sin, call, *rest, **tables)


@bug("fused_rotation", "own tables for the keys")
class KeysRotatedByTheTablesOfQueries(Honest):
    def rope_attention(self, query, key, value, cos, sin, call, attn_mask=None, dropout_p=0.0, **tables):
        return super().rope_attention(query, key, value, cos, sin, call, attn_mask)


@bug("fused_norm", "norm in q and k, half-split rotation")
class NormWithoutItsWeights(Honest):
    def rope_attention(self, *args, norm=None, **tables):
        norm = norm and replace(norm, weight_q=None, weight_k=None)
        return super().rope_attention(*args, norm=norm, **tables)


@bug("fused_norm", "norm in q, half-split rotation")
class KeysAreNormalizedWhereQueriesAre(Honest):
    def rope_attention(self, *args, norm=None, **tables):
        norm = norm and replace(norm, eps_k=norm.eps_q if norm.eps_k is None else norm.eps_k)
        return super().rope_attention(*args, norm=norm, **tables)


@bug("fused_norm", "norm in q and k over all heads, half-split rotation")
class NormOverAllHeadsIsForgotten(Honest):
    def rope_attention(self, *args, norm=None, **tables):
        return super().rope_attention(*args, norm=norm if norm and norm.rstd_q is None else None, **tables)


@bug("fused_norm", "norm in q and k over all heads, half-split rotation")
class AllHeadsHaveTheWeightsOfTheFirst(Honest):
    def rope_attention(self, *args, norm=None, **tables):
        if norm and norm.rstd_q is not None and norm.weight_q is not None:
            norm = replace(norm, weight_q=norm.weight_q[:1], weight_k=norm.weight_k[:1])
        return super().rope_attention(*args, norm=norm, **tables)


@bug("fused_norm", "norm in q and k, half-split rotation")
class NormIsTakenAndForgotten(Honest):
    def rope_attention(self, *args, norm=None, **tables):
        return super().rope_attention(*args, **tables)


@bug("hadamard", "hadamard qkv")
class HadamardOfQAlone(Honest):
    def rotate_qk(self, q, k):
        return hadamard_transform(q), k


@bug("hadamard", "hadamard")
class HadamardNotUndone(Honest):
    def rotate_back(self, out):
        return out


class Packed(Honest):
    """Honest, with packed sequences one by one; a bug is in one of the steps."""

    capabilities = replace(Honest.capabilities, varlen=True)

    def varlen_attention(self, query, key, value, cu_seqlens_q, cu_seqlens_k, call):
        out = query.new_zeros(*query.shape[:2], call.head_dim_v)
        lse = torch.full(query.shape[:2], self.unseen, dtype=torch.float32)
        starts = zip(itertools.pairwise(cu_seqlens_q.tolist()), itertools.pairwise(cu_seqlens_k.tolist()), strict=True)
        for (first, last), (first_key, last_key) in starts:
            rows, keys = slice(first, last), slice(first_key, last_key + self.keys_too_many)
            q, k, v = (x.transpose(0, 1)[None] for x in (query[rows], key[keys], value[keys]))
            sizes = {"q_len": q.shape[2], "kv_len": k.shape[2]}
            if 0 in sizes.values():
                continue
            mask = self.window(**sizes, window=call.varlen.window)
            one = replace(
                call, batch=1, **sizes, varlen=None, mask=MaskKind.BOOL, mask_shape=(1, 1, *mask.shape), return_lse=True
            )
            found, of_rows = self.attention(q, k, v, one, mask[None, None])
            out[rows], lse[rows] = found[0].transpose(0, 1), of_rows[0].T
        return (out, lse) if call.return_lse else out

    keys_too_many = 0
    unseen = -torch.inf

    def window(self, q_len, kv_len, window):
        left, right = (n if n >= 0 else 10**6 for n in window)
        ahead = torch.arange(kv_len) - (torch.arange(q_len)[:, None] + self.first_position(q_len, kv_len))
        return (ahead <= right) & (ahead >= -left)

    def first_position(self, q_len, kv_len):
        return kv_len - q_len


@bug("packed_sequences", "dB against exact attention")
class WindowAlignedAtTheStart(Packed):
    def first_position(self, q_len, kv_len):
        return 0


@bug("packed_sequences", "not finite")
class SequencesSeeTheirNeighbours(Packed):
    keys_too_many = 1


@bug("packed_sequences", "a NaN in the first sequence reaches others")
class PackedSequencesShareAScale(Packed):
    def varlen_attention(self, query, key, value, cu_seqlens_q, cu_seqlens_k, call):
        used = key[: cu_seqlens_k[-1]]
        key = key * (used.abs().amax() / used.abs().amax())
        return super().varlen_attention(query, key, value, cu_seqlens_q, cu_seqlens_k, call)


@bug("packed_sequences", "must be 0")
class PackedRowsWithoutKeysAreMeans(Packed):
    def clean(self, out, nothing):
        return out.masked_fill(nothing, 1.0)


@bug("packed_sequences", "lse must be -inf")
class PackedRowsWithoutKeysHaveALse(Packed):
    unseen = 0.0


@bug("dropout", "dropped the same weights")
class DropoutIgnored(Honest):
    capabilities = replace(Honest.capabilities, dropout=True)


@bug("gradients", "the gradient of query has")
class GradientsOfRoundedScores(Honest):
    capabilities = replace(Honest.capabilities, backward=True)

    def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
        out = torch.nn.functional.scaled_dot_product_attention(
            query * 0.5 + query.detach() * 0.5,
            key,
            value,
            is_causal=call.causal is CausalKind.TOP_LEFT,
            scale=call.softmax_scale,
            enable_gqa=True,
        )
        return out


# What it says


@bug("probe", "probe(cuda:99) raised RuntimeError")
class ProbeRaises(Honest):
    def probe(self, device):
        if device.type == "cuda":
            raise RuntimeError("no NVIDIA driver")
        return []


@bug("probe", "must return a list of lpattn.Reason")
class ProbeReturnsText(Honest):
    def probe(self, device):
        return [] if device.type == "cpu" else ["no such device"]


@bug("undeclared_is_refused", "Extend super().supports(call)")
class SupportsForgetsTheData(Honest):
    def supports(self, call):
        return []


@bug("undeclared_is_refused", "must name 'float64'")
class ReasonsWithoutValues(Honest):
    def supports(self, call):
        return [Reason(r.code, "not supported") for r in super().supports(call)]


@bug("declared_is_taken", "capabilities declare lse, but supports() refuses all such calls")
class DeclaresWhatItNeverTakes(Honest):
    def supports(self, call):
        extra = [Reason("lse", "return_lse: not yet")] if call.return_lse else []
        return super().supports(call) + extra


@bug("decisions", "set exact_lengths = True")
class ReasonsThatDependOnTheExactLength(Honest):
    def supports(self, call):
        odd = [Reason("length", f"kv_len {call.kv_len}: takes even lengths")] if call.kv_len % 2 else []
        return super().supports(call) + odd


@bug("decisions", "gave two answers")
class ReasonsThatChange(Honest):
    count = itertools.count()

    def supports(self, call):
        return [Reason("busy", f"try {next(self.count)}")]


@bug("decisions", "must be one finite number")
class RankIsNotANumber(Honest):
    def rank(self, call):
        return float("nan")


@bug("decisions", "gave two answers")
class DetoursThatChange(Honest):
    count = itertools.count()

    def detours(self, call):
        return [Reason("busy", f"try {next(self.count)}")]


@bug("decisions", "the limit is 1 ms")
class SlowDecisions(Honest):
    def supports(self, call):
        time.sleep(0.0015)
        return super().supports(call)


@bug("registration", "masks must contain MaskKind.NONE")
class NoCallsWithoutAMask(Honest):
    capabilities = replace(Honest.capabilities, masks=frozenset({MaskKind.BOOL}))


@bug("registration", "dtypes must be floating point")
class DtypesOfItsKernel(Honest):
    capabilities = replace(Honest.capabilities, dtypes=frozenset({torch.bfloat16, torch.int8}))


@bug("head_dim_v_may_differ", "returned [2, 4, 160, 64]")
class HeadDimOfQForTheOutput(Honest):
    def finish(self, out, call):
        return super().finish(torch.nn.functional.pad(out, (0, max(call.head_dim - out.shape[3], 0))), call)


@bug("lengths_at_the_edges", "raised")
class NeedsWholeTiles(Honest):
    exact_lengths = True

    def attention(self, query, key, value, call, attn_mask=None, dropout_p=0.0):
        if call.kv_len == 129:
            raise ValueError("kv_len must be a multiple of 128")
        return super().attention(query, key, value, call, attn_mask, dropout_p)


@bug("strict_compile", "the compiled result differs")
class AsksWhetherGradientsAreOn(Honest):
    def scale(self, call):
        return call.softmax_scale * (1.0 if torch.is_grad_enabled() else 1.2)
