"""Subcommands and options. Owns usage errors and exit codes; what a command does lies in the module of its name.

Exit codes: 0 done, 1 an error of lpattn, 2 bad usage.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence

import lpattn
from lpattn.cli import check, demo, explain, info, new_plugin
from lpattn.cli.values import architecture, device, dtype, finite, positive, shape
from lpattn.errors import LpattnError
from lpattn.types import MaskKind


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: arguments without the program's name; None takes those of the process.

    Returns:
        The exit code.
    """
    try:
        code = _run(argv)
        if sys.stdout is not None:  # None where it is closed, as by `>&-`: what is printed then goes nowhere
            sys.stdout.flush()
    except BrokenPipeError:  # who read the output, such as `head`, has left
        _drop_output()
        return 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _drop_output()
        print(f"lpattn: the output cannot be written: {error.strerror}", file=sys.stderr)
        return 1
    return code


def _drop_output() -> None:
    """What is still buffered goes nowhere: at exit it would fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(argv: Sequence[str] | None) -> int:
    parser = build_parser()
    try:
        arguments = parser.parse_args(argv)
        if "run" not in arguments:
            parser.print_help()
            return 2
        return int(arguments.run(arguments))
    except SystemExit as stop:  # argparse has printed its message
        return stop.code if isinstance(stop.code, int) else 2
    except LpattnError as error:
        print(f"lpattn: {error}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """The parser with all subcommands."""
    parser = argparse.ArgumentParser(
        prog="lpattn", description="Low-precision attention for PyTorch models.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"lpattn {lpattn.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for add in (_add_info, _add_explain, _add_demo, _add_check, _add_new_plugin):
        command = add(commands)
        command.add_argument("--json", action="store_true", help="print one JSON document instead of text")
        command.set_defaults(parser=command)
    return parser


_Commands = argparse._SubParsersAction  # argparse gives the type no public name


def _add(commands: _Commands[argparse.ArgumentParser], name: str, text: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=text, description=text, allow_abbrev=False)


def _add_info(commands: _Commands[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = _add(commands, "info", "Show the backends, what each can run on this machine, and why not.")
    parser.add_argument("--verbose", action="store_true", help="show tracebacks of plugins that failed to load")
    parser.set_defaults(run=info.run)
    return parser


def _add_explain(commands: _Commands[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = _add(commands, "explain", "Say which backend would run an attention call, and why the others would not.")
    parser.epilog = (
        "Allocates no tensors, but with --compiled. "
        "Exit status: 0 if the call runs, 1 if it or its settings would be an error, 2 for bad usage."
    )
    subject = parser.add_mutually_exclusive_group(required=True)
    subject.add_argument("--shape", type=shape, metavar="B,H,S,D", help="shape of the queries")
    subject.add_argument(
        "--compiled",
        metavar="MODULE:FUNCTION",
        help="instead of a call: run the model that this function returns, with its inputs, under torch.compile",
    )
    parser.add_argument("--kv-heads", type=positive, metavar="N", help="heads of k and v (default: H)")
    parser.add_argument("--kv-len", type=positive, metavar="N", help="length of k and v (default: S)")
    parser.add_argument("--head-dim-v", type=positive, metavar="N", help="head_dim of v (default: D)")
    parser.add_argument("--causal", action="store_true", help="is_causal=True")
    parser.add_argument(
        "--mask",
        choices=[*(kind.value for kind in MaskKind), explain.KEY_PADDING],
        help="attn_mask, [B, 1, q_len, kv_len]; key_padding is bool, [B, 1, 1, kv_len] (default: none)",
    )
    parser.add_argument("--dtype", type=dtype, help="of q, k and v (default: bfloat16)")
    parser.add_argument("--device", type=device, help="such as cuda:0 or cpu (default: the first GPU, else the CPU)")
    parser.add_argument(
        "--arch",
        type=architecture,
        metavar="sm_NN",
        help="judge the call for this CUDA architecture; probes still speak of this machine",
    )
    parser.add_argument("--scale", type=finite, metavar="X", help="softmax scale (default: 1/sqrt(D))")
    parser.add_argument("--lse", action="store_true", help="the log-sum-exp is wanted too")
    _add_choice(parser)
    parser.add_argument("--on-unsupported", metavar="POLICY", help="fallback or raise")
    parser.set_defaults(run=explain.run)
    return parser


def _add_demo(commands: _Commands[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = _add(commands, "demo", "Apply lpattn to a small model and show what ran, how exact it is, and how fast.")
    _add_choice(parser)
    parser.add_argument("--seq-len", type=positive, metavar="N", help="tokens (default: 8192 on a GPU, 1024 on a CPU)")
    parser.set_defaults(run=demo.run)
    return parser


def _add_check(commands: _Commands[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = _add(commands, "check", "Run the conformance suite on a backend: what it declares, and whether it is so.")
    parser.epilog = "Exit status: 0 if nothing fails (what cannot run here is skipped), 1 if something does."
    parser.add_argument("backend", metavar="NAME", help="the backend, built-in or of an installed plugin")
    parser.add_argument("--device", type=device, help="such as cuda:0 or cpu (default: the first that its probe takes)")
    parser.add_argument("--only", metavar="CHECK,...", help="these checks alone")
    parser.add_argument("--skip", metavar="CHECK,...", help="all but these checks")
    parser.add_argument(
        "--suite", metavar="MODULE:CLASS", help="a subclass of lpattn.testing.BackendTests (default: lpattn's own)"
    )
    parser.set_defaults(run=check.run)
    return parser


def _add_new_plugin(commands: _Commands[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    parser = _add(commands, "new-plugin", "Write a folder with a plugin that builds, is found and passes the checks.")
    parser.add_argument("name", metavar="NAME", help="of its backend, such as my_fp8")
    parser.add_argument("--into", metavar="FOLDER", default=".", help="where the folder goes (default: here)")
    parser.set_defaults(run=new_plugin.run)
    return parser


def _add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backend", metavar="NAME", help="only this backend (default: lpattn chooses)")
    parser.add_argument("--hadamard", metavar="MODE", help="none, qkv or v_only (default: none)")
