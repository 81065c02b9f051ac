"""Exponentials that kernels take for exp where e4m3 would round it anyway: P's codes from logits, without an exp.

Plain PyTorch, without the float16 arithmetic in which a kernel does it.
"""

from __future__ import annotations

import math
from enum import Enum

import torch

_SLOPE = 0.3431
"""Of f (f - 1) in 1 + f + _SLOPE * f (f - 1) for 2^f: the mean error over an octave is then zero."""


class Exponential(str, Enum):
    """How P is made of logits.

    The code of an e4m3 number grows by 8 per power of two, and is linear in the number between two of them. So the
    code of 2^x is 8 x and a constant, rounded: up to what makes of 2^f, in an octave, a straight line in f.

    * ``EXACT``: exp, then rounded to e4m3. A weight is off by up to 5.9 %, 2.7 % rms.
    * ``QUADRATIC``: a parabola is taken off the line: up to 6.1 %, 2.7 % rms, and no bias.
    * ``STEP``: a constant is taken off in the middle half of each octave: the mean weight is 2.4 % too large, which the
      division by the row sum takes out but for the largest weight; around that up to 7.2 %, 2.8 % rms.
    * ``LINEAR``: nothing is taken off: 4.0 % too large on the average, around that up to 8.0 %, 3.1 % rms.

    Of a row's largest weight, all of them make ``p_scale``.
    """

    EXACT = "exact"
    QUADRATIC = "quadratic"
    STEP = "step"
    LINEAR = "linear"

    __str__ = str.__str__


def e4m3_weights(logits: torch.Tensor, exponential: Exponential, p_scale: float) -> torch.Tensor:
    """exp(logits) * p_scale in e4m3, by one of the approximations.

    Args:
        logits: natural, at most 0, float32 or float64 of any shape; -inf gives 0, NaN stays.
        exponential: any but EXACT.
        p_scale: a power of two, at most 256.

    Returns:
        Numbers of e4m3 in the dtype and shape of ``logits``.

    Source:
        The line between powers of two: Schraudolph 1999, "A fast, compact approximation of the exponential function".
    """
    x = logits * math.log2(math.e)
    # 2^-7 is where the codes would be 0 if e4m3 had no subnormals.
    code = 8.0 * (x + (math.log2(p_scale) + 7.0))
    place = x - x.floor()
    if exponential is Exponential.STEP:
        code = code - 0.375 * ((place >= 0.25) & (place < 0.75)).to(code.dtype)
    elif exponential is Exponential.QUADRATIC:
        code = code + 8.0 * _SLOPE * place * (place - 1.0)
    # NaN is all ones, and what is -inf has a place that is NaN.
    code = torch.where(x == -torch.inf, 0.0, code.round().clamp(min=0.0)).nan_to_num(nan=127.0)
    return code.to(torch.uint8).view(torch.float8_e4m3fn).to(logits.dtype)
