"""Operators of com.microsoft: the shapes of their outputs, as onnxruntime's documentation of them says."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fusion.dims import Dim, divide
from fusion.facts.common import Dims, attribute_int, attribute_ints, input_shape
from fusion.facts.products import divided, matmul
from fusion.facts.windows import RULES as WINDOWS
from fusion.models.graph import Node

if TYPE_CHECKING:
    from fusion.facts import Facts


def _same(facts: Facts, node: Node, slot: int) -> Dims | None:
    return input_shape(facts, node, 0) if slot == 0 else None


def _skip_normalisation(facts: Facts, node: Node, slot: int) -> Dims | None:
    """Outputs: normalised, mean, inverse deviation, input + skip + bias. The skip broadcasts to the input."""
    dims = input_shape(facts, node, 0)
    if dims is None or slot in (0, 3):
        return dims
    return [*dims[:-1], 1]


def _embed_layer_normalisation(facts: Facts, node: Node, slot: int) -> Dims | None:
    """(B, S) tokens and a table of words (V, D) → (B, S, D), mask index (B), embedding sum (B, S, D)."""
    ids, words = input_shape(facts, node, 0), input_shape(facts, node, 2)
    if ids is None or len(ids) != 2 or words is None or len(words) != 2:
        return None
    return [ids[0]] if slot == 1 else [*ids, words[1]]


def _attention(facts: Facts, node: Node, slot: int) -> Dims | None:
    """x (B, S, D) and packed weights (D, Nq + Nk + Nv) → (B, S, Nv); present (2, B, H, T, Nk / H)."""
    x, weights = input_shape(facts, node, 0), input_shape(facts, node, 1)
    sizes, heads = attribute_ints(node, "qkv_hidden_sizes"), attribute_int(node, "num_heads")
    if x is None or len(x) != 3:
        return None
    packed = weights[1] if weights is not None and len(weights) == 2 else None
    width = sizes[2] if sizes is not None and len(sizes) == 3 else divided(packed, 3)
    if slot == 0:
        return [x[0], x[1], width]
    return [2, x[0], heads, None, None] if slot == 1 else None


def _multi_head_attention(facts: Facts, node: Node, slot: int) -> Dims | None:
    """Query (B, S, D) or packed (B, S, H, 3, E); value (B, T, N), (B, H, T, E), or with the key (B, T, H, 2, E)."""
    query, key, value = (input_shape(facts, node, i) for i in range(3))
    heads = attribute_int(node, "num_heads")
    if query is None or len(query) not in (3, 5):
        return None
    if slot in (1, 2):
        return [query[0], heads, None, None]
    if slot != 0:
        return None
    if len(query) == 5:
        width = _times(query[4], heads)
    elif node.input(2) is not None:
        width = None if value is None else value[2] if len(value) == 3 else _times(value[-1], heads)
    else:
        width = query[2] if key is not None and len(key) == 5 else None
    return [query[0], query[1], width]


def _times(dim: Dim | None, by: int | None) -> Dim | None:
    return None if dim is None or by is None else dim * by


def _grouped_query_attention(facts: Facts, node: Node, slot: int) -> Dims | None:
    """Query (B, S, H E), or packed with key and value (B, S, (H + 2 K) E); caches (B, K, T, E)."""
    query = input_shape(facts, node, 0)
    heads, kv_heads = attribute_int(node, "num_heads"), attribute_int(node, "kv_num_heads")
    if query is None or len(query) != 3 or not heads or not kv_heads:
        return None
    packed = node.input(1) is None
    size = None if query[2] is None else divide(query[2], heads + 2 * kv_heads if packed else heads)
    if slot == 0:
        return [query[0], query[1], _times(size, heads)]
    return [query[0], kv_heads, None, size] if slot in (1, 2) else None


def _fused_matmul(facts: Facts, node: Node, slot: int) -> Dims | None:
    sides = []
    for i, name in enumerate(("transA", "transB")):
        dims = input_shape(facts, node, i)
        if dims is not None and len(dims) > 2 and attribute_int(node, f"transBatch{name[-1]}"):
            dims = [*dims[1:-1], dims[0], dims[-1]]
        if dims is not None and len(dims) > 1 and attribute_int(node, name):
            dims = [*dims[:-2], dims[-1], dims[-2]]
        sides.append(dims)
    return matmul(*sides)


def _fused_gemm(facts: Facts, node: Node, slot: int) -> Dims | None:
    a, b = input_shape(facts, node, 0), input_shape(facts, node, 1)
    rows = None if a is None or len(a) != 2 else a[1 if attribute_int(node, "transA") else 0]
    columns = None if b is None or len(b) != 2 else b[0 if attribute_int(node, "transB") else 1]
    return [rows, columns]


def _matmul_n_bits(facts: Facts, node: Node, slot: int) -> Dims | None:
    a = input_shape(facts, node, 0)
    return None if a is None else [*a[:-1], attribute_int(node, "N")]


def _half(facts: Facts, node: Node, slot: int) -> Dims | None:
    dims = input_shape(facts, node, 0)
    return None if dims is None or not dims else [*dims[:-1], divided(dims[-1], 2)]


RULES = {
    f"com.microsoft::{op}": rule
    for op, rule in {
        **dict.fromkeys(
            """BiasAdd BiasGelu BiasSoftmax FastGelu Gelu GroupNorm QuickGelu RotaryEmbedding""".split(),  # noqa: SIM905
            _same,
        ),
        "Attention": _attention,
        "BiasSplitGelu": _half,
        "EmbedLayerNormalization": _embed_layer_normalisation,
        "FusedConv": WINDOWS["Conv"],
        "FusedGemm": _fused_gemm,
        "FusedMatMul": _fused_matmul,
        "GroupQueryAttention": _grouped_query_attention,
        "MatMulNBits": _matmul_n_bits,
        "MultiHeadAttention": _multi_head_attention,
        "SkipGroupNorm": _same,
        "SkipLayerNormalization": _skip_normalisation,
        "SkipSimplifiedLayerNormalization": _skip_normalisation,
        "TransposeMatMul": _fused_matmul,
    }.items()
}
