"""What every answer has in common: a table for a person, data for a program."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, ClassVar

from rich.box import HEAVY_HEAD
from rich.console import Console
from rich.table import Table


class Report:
    """An answer; a dataclass of what there is to say, with `show` to say it."""

    DERIVED: ClassVar[tuple[str, ...]] = ()
    """Properties that belong to the data."""

    def show(self, out: Console) -> None:
        """Print it for a person."""
        raise NotImplementedError

    def print(self, console: Console | None = None) -> None:
        """Print it, to standard output by default."""
        self.show(console or Console())

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain data, ready for JSON (infinity becomes null)."""
        return {**{name: plain(getattr(self, name)) for name in self.DERIVED}, **plain(self)}

    def to_json(self) -> str:
        """Return `to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)


def plain(value: Any) -> Any:
    """Return a value as JSON has it; of a dataclass the fields that its repr shows."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value) if f.repr}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Enum):
        return value.value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(*columns: str, title: str | None = None, boxed: bool = False) -> Table:
    """Return an empty table; ">" before a column's title stands for numbers. Print it with `markup=False`."""
    box = HEAVY_HEAD if boxed else None
    made = Table(title=title, title_justify="left", box=box, header_style="bold", pad_edge=boxed)
    for column in columns:
        made.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    return made


def counted(number: int, what: str) -> str:
    """A number of things in words: 1 output, 2 outputs."""
    return f"{number} {what}{'' if number == 1 else 's'}"
