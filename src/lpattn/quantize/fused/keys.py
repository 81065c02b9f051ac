"""From flags of keys to the list of those that are used, without the host knowing how many there are."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["stride_b", "stride_h", "stride_s", "heads", "length"])
def list_used(flags, indices, counts, stride_b, stride_h, stride_s, heads, length, BLOCK: tl.constexpr):
    """One program per batch entry: positions at which a head has True, in increasing order, and their number."""
    b = tl.program_id(0).to(tl.int64)
    count = 0
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        used = tl.zeros((BLOCK,), tl.int32)
        flag = flags + b * stride_b + at.to(tl.int64) * stride_s
        for _ in range(heads):
            used |= tl.load(flag, mask=at < length, other=0).to(tl.int32)
            flag += stride_h
        place = count + tl.cumsum(used, 0) - used
        tl.store(indices + b * length + place, at, mask=used != 0)
        count += tl.sum(used)
    tl.store(counts + b, count)
