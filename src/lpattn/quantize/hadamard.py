"""The orthonormal Walsh-Hadamard rotation along head_dim.

It spreads an outlier channel over all channels before the cast. It knows nothing of quantization.
"""

from __future__ import annotations

import torch


def hadamard_transform(x: torch.Tensor) -> torch.Tensor:
    """Multiply by the orthonormal Hadamard matrix H_n / sqrt(n) along the last dimension (natural order).

    The matrix is symmetric and orthogonal, so the transform is its own inverse, and it preserves dot products:
    rotating both q and k leaves q.k as it is.

    Args:
        x: [..., d], float32 or float64, any d >= 1.

    Returns:
        [..., n], n the next power of two, in x's dtype. Where d < n, x is padded with zeros: dot products stay, and
        the first d lanes of a second transform give x back.

    Precision:
        log2(n) additions per element in x's dtype. Values above about max / sqrt(n) of that dtype overflow.

    Source:
        Sylvester's construction, H_2n = [[H_n, H_n], [H_n, -H_n]], applied as a butterfly.
    """
    dim = x.shape[-1]
    n = 1 << max(dim - 1, 0).bit_length()
    x = torch.nn.functional.pad(x, (0, n - dim))
    half = 1
    while half < n:
        pairs = x.unflatten(-1, (n // (2 * half), 2, half))
        low, high = pairs.unbind(-2)
        x = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        half *= 2
    return x * n**-0.5
