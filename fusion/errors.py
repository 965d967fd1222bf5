"""What goes wrong, said in one sentence: the file, the place, what was expected, what to do."""

from __future__ import annotations


class FusionError(Exception):
    """Base of every error this package raises on purpose; its message is written for the user."""


class ModelError(FusionError):
    """A model that cannot be read, or is not a valid ONNX model."""


class OutputError(FusionError):
    """A destination that cannot be written."""


class TargetError(FusionError):
    """An unknown target, or one whose runtime cannot be asked."""


class PatternError(FusionError):
    """A pattern that breaks the rules of the language; carries the file and line of the pattern.

    Attributes:
        path: file of the pattern's source.
        line: line of the offending definition.
    """

    def __init__(self, message: str, path: str = "", line: int = 0) -> None:
        self.path, self.line = path, line
        super().__init__(f"{path}:{line}: {message}" if path else message)
