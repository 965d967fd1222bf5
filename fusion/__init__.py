"""Rewrite ONNX graphs: find what is computed, fuse it, prove it, explain what was left."""

from fusion.api import Explanation, Place, Result, find, optimize, why
from fusion.diffing.diff import diff
from fusion.errors import FusionError, ModelError, OutputError, PatternError, TargetError
from fusion.models.model import load, save
from fusion.verifying.verify import verify

__all__ = [
    "Explanation", "FusionError", "ModelError", "OutputError", "PatternError", "Place", "Result", "TargetError",
    "diff", "find", "load", "optimize", "save", "verify", "why",
]  # fmt: skip
