"""Projections."""

from fusion.language import optional, pattern


@pattern(x="... C", w="C N", b=optional("N"))
def linear(x, w, b):
    """A projection, MatMul with Add or Gemm. It has no operator of its own; other patterns call it."""
    return x @ w + b
