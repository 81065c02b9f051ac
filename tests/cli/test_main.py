"""The command as a whole: usage, exit codes, and that it runs as a program."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

import lpattn

Cli = Any


def test_version(cli: Cli) -> None:
    result = cli("--version")
    assert (result.code, result.out) == (0, f"lpattn {lpattn.__version__}\n")


def test_without_a_command_it_shows_the_commands(cli: Cli) -> None:
    result = cli()
    assert result.code == 2
    assert all(command in result.out for command in ("info", "explain", "demo"))


@pytest.mark.parametrize("arguments", [("--help",), ("info", "--help"), ("explain", "--help"), ("demo", "--help")])
def test_help(cli: Cli, arguments: tuple[str, ...]) -> None:
    result = cli(*arguments)
    assert result.code == 0
    assert result.out.startswith("usage: lpattn")


def test_an_unknown_command_is_bad_usage(cli: Cli) -> None:
    result = cli("inform")
    assert result.code == 2
    assert "inform" in result.err


def test_options_are_not_abbreviated(cli: Cli) -> None:
    result = cli("info", "--verb")
    assert result.code == 2
    assert "unrecognized arguments: --verb" in result.err


def test_python_dash_m_runs_the_command() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "LPATTN_BACKEND"}
    command = [sys.executable, "-m", "lpattn", "explain", "--shape", "1,16,4096,128", "--device", "cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("q [1, 16, 4096, 128] bfloat16 on cpu, not causal, mask none\n")


def run(arguments: tuple[str, ...], stdout: int, *program: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, by a program that starts it or as a module."""
    command = [sys.executable, *(program or ("-m", "lpattn")), *arguments]
    # Buffered, as output is where nobody sets this: it then fails as late as at exit.
    environment = {k: v for k, v in os.environ.items() if k not in ("LPATTN_BACKEND", "PYTHONUNBUFFERED")}
    return subprocess.run(command, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False)


OUTPUTS = pytest.mark.parametrize(
    "arguments",
    [
        ("info",),
        ("info", "--json"),
        ("explain", "--shape", "1,1,1,64"),
        ("explain", "--help"),
        ("check", "bf16_reference", "--only", "probe"),
    ],
)


@OUTPUTS
def test_nobody_reads_the_output(arguments: tuple[str, ...]) -> None:
    """As with `lpattn info | head -0`: it ends without a word."""
    read, write = os.pipe()
    os.close(read)
    done = run(arguments, write)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


@OUTPUTS
def test_a_closed_output(arguments: tuple[str, ...]) -> None:
    """As with `lpattn info >&-`: the exit code says what there is to say."""
    program = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, '-m', 'lpattn', *sys.argv[1:]])"
    done = run(arguments, subprocess.DEVNULL, "-c", program)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
@OUTPUTS
def test_an_output_without_space(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = run(arguments, full.fileno())
    message = "lpattn: the output cannot be written: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, message)
