"""Exponentials that kernels take for exp where e4m3 would round it anyway: P's codes from logits, without an exp.

Plain PyTorch, without the float16 arithmetic in which a kernel does it.
"""

from __future__ import annotations

import math
from enum import Enum

import torch


class Exponential(str, Enum):
    """How P is made of logits.

    The code of an e4m3 number grows by 8 per power of two, and is linear in the number between two of them. So the
    code of 2^x is 8 x and a constant, rounded: up to what makes of 2^f, in an octave, a straight line in f.

    Errors of a weight, where logits are spread evenly:

    * ``EXACT``: exp, then rounded to e4m3. Up to 5.9 %, 2.7 % rms.
    * ``STEP``: the line, from which a constant is taken off in the middle half of each octave. Up to 7.4 % (7.2 %
      around the mean), 2.8 % rms.
    * ``LINEAR``: the line. Up to 7.3 % (8.0 % around the mean), 3.2 % rms.

    By the line, weights would be 4 % too large on the average (with STEP 2.4 %), but for a row's largest one, whose
    code is a whole number. So 3/8 (with STEP 1/4) is taken off before rounding: of the largest, all of them still make
    ``p_scale``, and of the others that takes out the bias, all but 0.7 % (0.2 %), where logits are spread over an
    octave or more: normal ones with a standard deviation from about 0.3 on.

    Of logits that are nearly equal, all codes are near the largest one, and rounded to the same side. Of 4096 normal
    ones with a standard deviation of 0.002 to 0.1, the sum is off by up to 4.0 % with LINEAR, 2.3 % with STEP and
    1.8 % with EXACT, averaged over rows. The log-sum-exp is off by that; of outputs, divided by the sum of the rounded
    weights, what the weights have in common is gone.
    """

    EXACT = "exact"
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
    if exponential is Exponential.STEP:
        code = code - 0.25
        # Where the code has the middle half of an octave's 8 codes: that of 2^f begins 1/32 later.
        place = code / 8.0 - torch.floor(code / 8.0)
        code = code - 0.375 * ((place >= 0.25) & (place < 0.75)).to(code.dtype)
    else:
        code = code - 0.375
    # NaN is all ones, and what is -inf has a place that is NaN.
    code = torch.where(x == -torch.inf, 0.0, code.round().clamp(min=0.0)).nan_to_num(nan=127.0)
    return code.to(torch.uint8).view(torch.float8_e4m3fn).to(logits.dtype)
