from __future__ import annotations

import pytest


@pytest.mark.parametrize("kv_len", [1, 63, 64, 65, 200])
def test_lengths(kernel, kv_len) -> None:
    kernel.check(*kernel.make(kv_len=kv_len, q_len=20))
