"""``lpattn explain``: the decision on a call that is described, not made."""

from __future__ import annotations

from argparse import Namespace

import torch

from lpattn.calls import default_scale, device_capability
from lpattn.cli import compiled
from lpattn.cli.text import explanation_data, print_json
from lpattn.dispatch import explain_call
from lpattn.registry import local_devices
from lpattn.settings import make_settings
from lpattn.types import AttentionCall, CausalKind, HadamardMode, MaskKind, Provenance

KEY_PADDING = "key_padding"
"""Value of ``--mask``: bool, and the same for all heads and queries."""

_OF_THE_CALL = ("kv_heads", "kv_len", "head_dim_v", "causal", "mask", "dtype", "device", "arch", "scale", "lse")
"""Options that go with ``--shape``. Those that are not given are None or False."""


def run(arguments: Namespace) -> int:
    """Print the explanation. Returns 0 where the call runs, 1 where it would be an error.

    Raises:
        UnknownBackendError, InvalidArgumentError: of the settings.
    """
    if arguments.compiled is not None:
        _check_compiled(arguments)
        return compiled.run(arguments)
    _check(arguments)
    settings = make_settings(arguments.backend, arguments.hadamard, arguments.on_unsupported, Provenance.ARGUMENT)
    explanation = explain_call(describe(arguments, settings.hadamard), settings)
    if arguments.json:
        print_json({**explanation_data(explanation), "hypothetical": arguments.arch is not None})
    else:
        print(explanation)
        if arguments.arch is not None:
            print("The architecture is hypothetical: capabilities are judged for it, probes speak of this machine.")
    return 0 if explanation.choice is not None else 1


def describe(arguments: Namespace, hadamard: HadamardMode) -> AttentionCall:
    """The call that the options describe. Allocates nothing."""
    batch, heads, q_len, head_dim = arguments.shape
    kv_len = arguments.kv_len or q_len
    where = _device(arguments)
    padding = arguments.mask == KEY_PADDING
    mask = MaskKind.BOOL if padding else MaskKind(arguments.mask or "none")
    return AttentionCall(
        batch=batch,
        num_heads=heads,
        num_kv_heads=arguments.kv_heads or heads,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=head_dim,
        head_dim_v=arguments.head_dim_v or head_dim,
        dtype=arguments.dtype or torch.bfloat16,
        device_type=where.type,
        device_index=where.index or 0,
        capability=arguments.arch or device_capability(where.type, where.index),
        softmax_scale=default_scale(head_dim) if arguments.scale is None else arguments.scale,
        mask=mask,
        mask_shape=None if mask is MaskKind.NONE else (batch, 1, 1 if padding else q_len, kv_len),
        causal=CausalKind.TOP_LEFT if arguments.causal else CausalKind.NONE,
        hadamard=hadamard,
        return_lse=arguments.lse,
    )


def _check_compiled(arguments: Namespace) -> None:
    values = {name: getattr(arguments, name) for name in _OF_THE_CALL}
    given = [name for name, value in values.items() if value is not None and value is not False]
    if given:
        options = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        arguments.parser.error(
            f"{options}: only with --shape, which describes a call; the calls of --compiled are its model's"
        )


def _check(arguments: Namespace) -> None:
    heads, kv_heads = arguments.shape[1], arguments.kv_heads
    if kv_heads is not None and heads % kv_heads:
        arguments.parser.error(f"argument --kv-heads: {heads} heads must be a multiple of it; got {kv_heads}")
    if arguments.causal and arguments.mask not in (None, "none"):
        arguments.parser.error(f"--causal and --mask {arguments.mask} contradict each other: SDPA takes one of them")
    where, here = arguments.device, local_devices()
    if where is None:
        return
    if arguments.arch is not None and where.type != "cuda":
        arguments.parser.error(f"--arch is an architecture of CUDA devices; got --device {where} with it")
    # Without any GPU, an architecture stands for one.
    imagined = arguments.arch is not None and here == [torch.device("cpu")]
    if (torch.device("cuda", 0) if str(where) == "cuda" else where) not in here and not imagined:
        arguments.parser.error(
            f"argument --device: this machine has no {where}; it has {', '.join(map(str, here))}. "
            "--arch sm_90 asks about an architecture that it does not have"
        )


def _device(arguments: Namespace) -> torch.device:
    if arguments.device is not None:
        return torch.device(arguments.device)
    return torch.device("cuda", 0) if arguments.arch is not None else local_devices()[0]
