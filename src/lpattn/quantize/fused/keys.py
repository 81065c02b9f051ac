"""From a key-padding mask to the list of the keys that are used, without the host knowing how many there are."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["stride_b", "stride_s", "length"])
def list_used(mask, indices, counts, stride_b, stride_s, length, BLOCK: tl.constexpr):
    """One program per batch entry: positions of True in increasing order, and their number."""
    b = tl.program_id(0).to(tl.int64)
    count = 0
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        used = tl.load(mask + b * stride_b + at.to(tl.int64) * stride_s, mask=at < length, other=0).to(tl.int32)
        place = count + tl.cumsum(used, 0) - used
        tl.store(indices + b * length + place, at, mask=used != 0)
        count += tl.sum(used)
    tl.store(counts + b, count)
