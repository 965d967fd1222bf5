"""The rules by name: what they are called where patterns are chosen, listed and counted."""

from __future__ import annotations

from dataclasses import dataclass

GROUP = "simplify"
"""The name that stands for all rules where patterns are chosen."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A simplification, as it is listed and chosen.

    Attributes:
        name: as it is recorded in `Rewritten.pattern`.
        doc: what it does, in a sentence.
    """

    name: str
    doc: str


_ALL = (
    Rule("dead_code", "Nodes from which no output is reached, and initializers that nobody reads, go."),
    Rule("constant_branch", "An If whose condition is known becomes the branch that is taken."),
    Rule("constant_node", "A Constant node becomes an initializer."),
    Rule("identity", "A node whose output is one of its inputs goes."),
    Rule("collapse", "Two rearrangements or casts, one behind the other, become one or none."),
    Rule("constant_sizes", "Sizes that a Reshape, Expand or Slice reads become numbers, 0 and -1."),
    Rule("constant_folding", "What follows from small constants or known sizes becomes a constant."),
    Rule("common_subexpression", "What is computed twice is computed once, and equal small constants are kept once."),
)
RULES: dict[str, Rule] = {rule.name: rule for rule in _ALL}
