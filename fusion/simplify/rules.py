"""The rules by name: what they are called where patterns are chosen, listed and counted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

GROUP = "simplify"
"""The name that stands for all rules where patterns are chosen."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A simplification, as it is listed and chosen; the fields that a `Pattern` has, too.

    Attributes:
        name: as it is recorded in `Rewritten.pattern`.
        module: where it is written.
        doc: what it does, in a sentence.
        targets: for which it is right.
    """

    name: str
    module: str
    doc: str
    targets: tuple[str, ...] = ("any",)
    line: int = 1

    @property
    def path(self) -> str:
        """The file of the module."""
        return str(Path(__file__).with_name(f"{self.module}.py"))


_ALL = (
    Rule("dead_code", "dead", "Nodes from which no output is reached, and initializers that nobody reads, go."),
    Rule("constant_branch", "branch", "An If whose condition is known becomes the branch that is taken."),
    Rule("constant_node", "simplifier", "A Constant node becomes an initializer."),
    Rule("identity", "identity", "A node whose output is one of its inputs goes."),
    Rule("collapse", "collapse", "Two rearrangements or casts, one behind the other, become one or none."),
    Rule("constant_sizes", "sizes", "Sizes that a Reshape, Expand or Slice reads become numbers, 0 and -1."),
    Rule("constant_folding", "folding", "What follows from small constants or known sizes becomes a constant."),
    Rule("common_subexpression", "common", "What is computed twice is computed once; equal small constants, too."),
)
RULES: dict[str, Rule] = {rule.name: rule for rule in _ALL}
