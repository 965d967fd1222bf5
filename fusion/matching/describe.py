"""Parts of a formula and of a graph in words, for explanations."""

from __future__ import annotations

from fusion import plan as p
from fusion.language import ELLIPSIS, Dims
from fusion.terms import Atom, Contract, Item, Reduce, Ref, Sum

WORDS: dict[type, str] = {
    Sum: "a sum",
    p.MatMul: "a MatMul",
    Contract: "a MatMul",
    p.Softmax: "Softmax",
    p.Join: "a Concat",
    p.Concat: "a Concat",
}


def spell_dims(dims: Dims | None) -> str:
    return " ".join(token if isinstance(token, str) else f"({' '.join(token)})" for token in dims or (ELLIPSIS,))


def describe(atom: Atom, exponent: float = 1.0) -> str:
    """An atom in the words of the graph, or of the pattern."""
    if isinstance(atom, Ref):
        node = atom.value.producer
        text = f"{node.op}({atom.value.name})" if node is not None else atom.value.name
    elif isinstance(atom, p.Var | p.Op):
        text = atom.name
    elif isinstance(atom, p.Reduction | Reduce):
        text = f"a {atom.kind}"
    elif isinstance(atom, p.Operator):
        text = " or ".join(sorted(atom.names))
    elif isinstance(atom, p.Fused):
        text = " or ".join(atom.pattern.readers)
    else:
        text = WORDS.get(type(atom), "a product")
    return text if exponent == 1.0 else f"{text} ** {exponent:g}"


def describe_item(item: Item) -> str:
    text = " * ".join(describe(atom, exponent) for atom, exponent in item.factors)
    return text if item.coef == 1.0 else f"{item.coef:g} * {text}"
