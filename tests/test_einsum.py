"""Einsum: contractions in any order of the letters, attention written with them, and what is no contraction."""

from __future__ import annotations

import numpy as np
import pytest
from building import Build, numbers, operators, run, same
from fusion.patterns.linear import linear

import fusion

EINSUMS = {
    "heads behind the sequence": ("bshd,bthd->bhst", "bhst,bthd->bshd", "bshd", "bthd", "bshd"),
    "operands exchanged": ("bthd,bshd->bhst", "bthd,bhst->bshd", "bshd", "bthd", "bshd"),
    "heads first": ("bhsd,bhtd->bhst", "bhst,bhtd->bhsd", "bhsd", "bhtd", "bhsd"),
    "sequence first": ("sbhd,tbhd->bhst", "bhst,tbhd->sbhd", "sbhd", "tbhd", "sbhd"),
    "heads last": ("bsdh,btdh->bhst", "bhst,btdh->bsdh", "bsdh", "btdh", "bsdh"),
    "one head of keys": ("bshd,btd->bhst", "bhst,btd->bshd", "bshd", "btd", "bshd"),
}


@pytest.mark.parametrize("square", [False, True])
@pytest.mark.parametrize("form", EINSUMS)
def test_an_attention_of_einsums(form, square):
    scores, attended, *axes = EINSUMS[form]
    sizes = dict.fromkeys("bsthd", 4) if square else {"b": 2, "s": 3, "t": 5, "h": 6, "d": 4}
    b = Build()
    names = {letter: sizes[letter] if letter in "hd" else letter.upper() for letter in sizes}
    read = (axes[0], axes[1], axes[1])
    q, k, v = (b.input(name, [names[c] for c in own]) for name, own in zip("qkv", read, strict=True))
    exchanged = form == "operands exchanged"
    p = b.softmax(b.mul(b.node("Einsum", *((k, q) if exchanged else (q, k)), equation=scores), 0.3), axis=-1)
    y = b.node("Einsum", *((v, p) if exchanged else (p, v)), equation=attended)
    feeds = {n: numbers(*(sizes[c] for c in own), seed=ord(n)) for n, own in zip("qkv", read, strict=True)}
    result = same(b.model(y), feeds)
    assert result.counts == {"multi_head_attention": 1}
    assert "Einsum" not in operators(result.model)
    s = 0.3 * np.einsum(scores, *(feeds[name] for name in ("kq" if exchanged else "qk")))
    e = np.exp(s - s.max(-1, keepdims=True))
    expected = np.einsum(f"bhst,{axes[1]}->{axes[2]}", e / e.sum(-1, keepdims=True), feeds["v"])
    np.testing.assert_allclose(run(result.model, feeds)[y], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("scores", "attended"),
    [
        ("bshd,bshd->bhs", None),  # nothing of the keys is left
        ("bshd,bthd->bhst", "bhst,bshd->bthd"),  # transposed: the sum is over queries
        ("bshd,bthd->hbst", "bhst,bthd->bshd"),  # batch and heads exchanged between the two
        ("bshd,bthh->bhst", "bhst,bthd->bshd"),  # a diagonal, and d summed in one operand alone
        ("bshd,bthd->bst", None),  # summed over the heads
    ],
)
def test_einsums_that_are_no_attention(scores, attended):
    b = Build()
    q, k, v = (b.input(name, [4, 4, 4, 4]) for name in "qkv")
    y = b.softmax(b.node("Einsum", q, k, equation=scores), axis=-1)
    if attended is not None:
        y = b.node("Einsum", y, v, equation=attended)
    result = same(b.model(y), {name: numbers(4, 4, 4, 4, seed=ord(name)) for name in "qkv"})
    assert "multi_head_attention" not in result.counts or scores == "bshd,bthd->hbst"


def test_a_projection_that_sums_over_heads_and_their_size():
    b = Build()
    x = b.input("x", ["B", "S", 2, 4])
    y = b.add(b.node("Einsum", x, numbers(2, 4, 5, seed=1), equation="abcd,cde->abe"), numbers(5, seed=2))
    model = b.model(b.node("Gelu", y, domain="com.microsoft"))
    same(model, {"x": numbers(2, 3, 2, 4)})
    (found,) = fusion.find(b.model(y), [linear])
    assert set(found.nodes)
