"""The gallery shows every pattern of the library as it is now."""

from __future__ import annotations

import runpy
from pathlib import Path

from fusion.api import library

ROOT = Path(__file__).parents[1]


def test_gallery_is_up_to_date():
    pages = runpy.run_path(str(ROOT / "tools" / "gallery.py"))["pages"]()
    written = {path.name: path.read_text() for path in (ROOT / "docs" / "gallery").glob("*.md")}
    assert written == pages, "the patterns have changed: run `python tools/gallery.py`"


def test_gallery_has_a_section_for_every_pattern():
    text = (ROOT / "docs" / "gallery" / "index.md").read_text()
    assert [name for name in library() if f"\n## {name}\n" not in text] == []
