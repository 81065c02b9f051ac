"""The command ``lpattn``: what this machine can run, what would happen to a call, and a model to try it on."""

from lpattn.cli.parser import build_parser, main

__all__ = ["build_parser", "main"]
