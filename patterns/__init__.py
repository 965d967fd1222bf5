"""The library of patterns: one idea per file, the docstring is the formula and its origin."""

from __future__ import annotations

from fusion.patterns import activations, attention, convolutions, linear, norms, rotary, softmax

from fusion.language import Pattern

MODULES = (activations, softmax, norms, linear, convolutions, rotary, attention)


def registry() -> dict[str, Pattern]:
    """All patterns of the library, by name."""
    found = [value for module in MODULES for value in vars(module).values() if isinstance(value, Pattern)]
    return {pattern.name: pattern for pattern in sorted(found, key=lambda pattern: (pattern.path, pattern.line))}
