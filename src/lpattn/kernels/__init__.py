"""Attention over quantized operands: kernels that need no knowledge of calls, backends or models.

They read what :mod:`lpattn.quantize.fused` writes. They need triton, and so are imported where they are used; only
:mod:`.hopper` can be asked without it what it can run.
"""
