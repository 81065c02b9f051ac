"""From an :class:`AttentionCall` and :class:`Settings` to a :class:`Choice`, with every backend's reasons; cached.

Decisions are remembered per class of lengths, not per length, in a bounded cache.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

from lpattn.errors import UnsupportedCallError
from lpattn.registry import checked_reasons, registry
from lpattn.settings import BACKEND_VARIABLE, OnUnsupported, Settings, with_environment
from lpattn.types import AttentionBackend, AttentionCall, Choice, Provenance, Reason

REFERENCE = AttentionBackend.BF16_REFERENCE.value
POLICY_CODES = frozenset({"not_faster", "not_measured"})
"""Codes of reasons that are lpattn's own choice, not a limit: they warrant no warning and no error."""

ASKED_CODES = frozenset({"requested", "layer_rule"})
"""Codes of reasons that are the user's wish."""

_EMPTY = Reason("empty", "an empty dimension: nothing to compute")
_CACHE_SIZE = 4096
_cache: dict[object, Choice] = {}


def choose(call: AttentionCall, settings: Settings) -> Choice:
    """Pick the backend that runs the call.

    Args:
        call: the call.
        settings: what the user asked for; ``LPATTN_BACKEND`` is consulted where no backend is named.

    Returns:
        The choice. Where low precision was wanted but cannot run, exact attention with ``exact_reason``.

    Raises:
        UnsupportedCallError: strict settings, and the wanted backend cannot run the call; with every backend's reasons.
    """
    settings = with_environment(settings)
    key = (length_class(call), settings, registry.generation)
    choice = _cache.get(key)
    if choice is None:
        choice = _decide(call, settings)
        if _is_fallback(choice):
            return choice  # its reasons name this call's values, and must not be told of another
        if len(_cache) >= _CACHE_SIZE:
            _cache.clear()
        _cache[key] = choice
    return _with_detours(choice, call)


def _is_fallback(choice: Choice) -> bool:
    return choice.exact_reason is not None and choice.exact_reason.code not in POLICY_CODES | ASKED_CODES


def length_class(call: AttentionCall) -> AttentionCall:
    """The call with lengths (and batch) rounded down to a quarter of an octave, q_len == kv_len kept as it is.

    Small lengths stay exact. With a backend whose decisions need exact lengths, the call itself.
    """
    if any(b.exact_lengths for b in registry.backends().values()):
        return call
    q_len, kv_len = _floor(call.q_len), _floor(call.kv_len)
    if call.q_len != call.kv_len and q_len == kv_len:
        # Keep them apart, on the side where they are: causal alignment depends on it.
        q_len += 1 if call.q_len > call.kv_len else -1
    batch = _floor(call.batch)
    mask_shape = call.mask_shape
    if mask_shape is not None:
        full = (batch, call.num_heads, q_len, kv_len)
        mask_shape = tuple(1 if m == 1 else f for m, f in zip(mask_shape, full, strict=True))  # type: ignore[assignment]
    return dataclasses.replace(call, batch=batch, q_len=q_len, kv_len=kv_len, mask_shape=mask_shape)


def _floor(length: int) -> int:
    shift = max(length.bit_length() - 3, 0)
    return length if length < 16 else length >> shift << shift


def reasons_against(name: str, call: AttentionCall) -> tuple[Reason, ...]:
    """Why the backend cannot run the call: its probe's reasons and, whether or not it has any, the call's."""
    probed = registry.probe(name, call.device)
    backend = registry.get(name)
    if backend is None:
        return probed
    try:
        supported = checked_reasons(backend.supports(call))
    except Exception as error:  # a plugin's bug must not stop calls that others can run
        supported = (Reason("supports_failed", f"its supports() raised {type(error).__name__}: {error}"),)
    # The probe and the capabilities may both object to the device.
    return tuple(dict.fromkeys((*probed, *supported)))


def _decide(call: AttentionCall, settings: Settings) -> Choice:
    if call.is_empty:
        return Choice(REFERENCE, settings.provenance, {}, _EMPTY)
    return _decide_named(call, settings) if settings.backend is not None else _decide_automatic(call, settings)


def _decide_named(call: AttentionCall, settings: Settings) -> Choice:
    wanted = settings.backend
    assert wanted is not None
    variable = settings.provenance is Provenance.ENVIRONMENT
    text = f"{BACKEND_VARIABLE}={wanted}" if variable else f'backend="{wanted}"'
    excluded = (Reason("excluded", f"excluded by {text}"),)
    others = {name: excluded for name in registry.names() if name != wanted}
    if not (against := reasons_against(wanted, call)):
        return Choice(wanted, settings.provenance, others, asked_for_exact(settings))
    reasons = {wanted: against, **others}
    if settings.strict:
        raise _unsupported(call, reasons)
    del reasons[REFERENCE]
    return Choice(REFERENCE, settings.provenance, reasons, against[0])


def _with_detours(choice: Choice, call: AttentionCall) -> Choice:
    """The choice, and why its backend does not run the call by its fastest kernel: of this call, not of its class."""
    detours = _detours(choice.backend, call) if choice.exact_reason is None else ()
    return dataclasses.replace(choice, detours=detours) if detours else choice


def _detours(name: str, call: AttentionCall) -> tuple[Reason, ...]:
    backend = registry.get(name)
    if backend is None:
        return ()
    try:
        return checked_reasons(backend.detours(call))
    except Exception as error:  # a plugin's bug must not stop a call that runs
        return (Reason("detours_failed", f"its detours() raised {type(error).__name__}: {error}"),)


def asked_for_exact(settings: Settings) -> Reason | None:
    """Why exact attention is what the settings ask for; None if they do not."""
    name = settings.backend
    backend = registry.get(name) if name is not None else None
    if backend is None or not backend.exact:
        return None
    if settings.provenance is Provenance.LAYER_RULE:
        return Reason("layer_rule", "a layer rule keeps this layer exact")
    return Reason("requested", f'backend="{name}" is exact attention')


def _decide_automatic(call: AttentionCall, settings: Settings) -> Choice:
    reasons: dict[str, tuple[Reason, ...]] = {}
    ranks: dict[str, float] = {}
    typical = length_class(call)
    for name in registry.names():
        backend = registry.get(name)
        if backend is not None and backend.exact:
            continue
        against = reasons_against(name, call)
        if backend is not None and not backend.automatic:
            against = (Reason("not_automatic", "runs only where it is named"), *against)
        elif backend is not None and not against:
            try:
                # The class, not the call: the answer must not depend on which length of a class came first.
                rank = float(backend.rank(typical))
            except Exception as error:
                against = (Reason("rank_failed", f"its rank() raised {type(error).__name__}: {error}"),)
            else:
                if 1.0 < rank < math.inf:
                    ranks[name] = rank
                    continue
                against = (_not_worth_it(name, rank, _detours(name, typical)),)
        reasons[name] = against
    if ranks:
        best = max(ranks, key=ranks.__getitem__)
        for name in (*ranks, REFERENCE):
            if name != best:
                rank = ranks.get(name, 1.0)
                text = f"expected x{rank:.2f} as fast as exact attention, {best} x{ranks[best]:.2f}"
                reasons[name] = (Reason("slower", text),)
        return Choice(best, settings.provenance, reasons)
    exact = _why_exact(call, reasons)
    if settings.strict and exact.code not in POLICY_CODES:
        reasons[REFERENCE] = (Reason("exact", f"exact, where on_unsupported={OnUnsupported.RAISE.value!r} wants low"),)
        raise _unsupported(call, reasons)
    return Choice(REFERENCE, settings.provenance, reasons, exact)


def _not_worth_it(name: str, rank: float, detours: tuple[Reason, ...]) -> Reason:
    why = f", where its fastest kernel does not run: {'; '.join(d.message for d in detours)}" if detours else ""
    named = f'name it to run it all the same: backend="{name}"'
    remedy = "; or ".join([*(d.remedy for d in detours if d.remedy), named])
    if rank > 0.0:
        return Reason("not_faster", f"not faster than exact attention here: x{rank:.2f} expected{why}", remedy)
    return Reason("not_measured", f"nobody measured whether it is faster than exact attention here{why}", remedy)


def _why_exact(call: AttentionCall, reasons: Mapping[str, tuple[Reason, ...]]) -> Reason:
    """The one reason that says most: of the backends that this device has, the one that came closest."""
    able = {n: r for n, r in reasons.items() if not registry.probe(n, call.device)}
    present = {n: r for n, r in able.items() if r[0].code != "not_automatic"}
    if not present:
        named = f", except where it is named: {', '.join(able)}" if able else ""
        return Reason("no_backend", f"no low-precision backend can run on {call.describe_device()}{named}")
    name, closest = min(present.items(), key=lambda item: (item[1][0].code not in POLICY_CODES, len(item[1])))
    return dataclasses.replace(closest[0], message=f"{name}: {closest[0].message}")


def _unsupported(call: AttentionCall, reasons: Mapping[str, tuple[Reason, ...]]) -> UnsupportedCallError:
    error = UnsupportedCallError(error_text(call, reasons))
    error.reasons = reasons
    return error


def error_text(call: AttentionCall, reasons: Mapping[str, tuple[Reason, ...]]) -> str:
    """Inputs first, then every backend with all its reasons, then the remedy."""
    lines = [f"No backend can run this attention call: {call.describe()}", *reason_lines(reasons)]
    about_hadamard = any(reason.code == "hadamard" for against in reasons.values() for reason in against)
    instead = 'hadamard="none"' if about_hadamard else "backend=None to let lpattn choose"
    return "\n".join([*lines, f'Use {instead}, or on_unsupported="fallback" to run such calls exactly.'])


def reason_lines(reasons: Mapping[str, tuple[Reason, ...]]) -> list[str]:
    """One line per reason, backends in a column."""
    width = max([14, *(len(name) for name in reasons)])
    return [
        f"  {name if index == 0 else '':{width}s} {reason}"
        for name, against in reasons.items()
        for index, reason in enumerate(against)
    ]


@dataclass(frozen=True)
class Explanation:
    """What lpattn would do with a call, and why. ``str()`` gives the text.

    Attributes:
        call: the call.
        choice: the decision; None where strict settings make it an error.
        reasons: for every known backend that would not run it, all its reasons.
    """

    call: AttentionCall
    choice: Choice | None
    reasons: Mapping[str, tuple[Reason, ...]]

    def __str__(self) -> str:
        if self.choice is None:
            return error_text(self.call, self.reasons)
        lines = [self.call.describe(), f"  {self.choice.backend:14s} chosen ({self.choice.provenance})"]
        if self.choice.exact_reason is not None:
            lines[-1] += f", exact: {self.choice.exact_reason}"
        lines += [f"  {'':14s} not by its fastest kernel: {detour}" for detour in self.choice.detours]
        return "\n".join([*lines, *reason_lines(self.reasons)])


def explain_call(call: AttentionCall, settings: Settings) -> Explanation:
    """Explain the decision on a call, also where it is an error. Never launches a kernel."""
    settings = with_environment(settings)
    try:
        choice = _with_detours(_decide(call, settings), call)
    except UnsupportedCallError as error:
        return Explanation(call, None, error.reasons)
    reasons = {}
    for name in registry.names():
        if name != choice.backend:
            decided = choice.reasons.get(name, ())
            reasons[name] = tuple(dict.fromkeys((*decided, *reasons_against(name, call))))
    return Explanation(call, choice, reasons)
