"""CONTRIBUTING.md names the rooms that there are, and the page for each thing to add; test_how_to.py tries these."""

from __future__ import annotations

import re
from pathlib import Path

from tests.test_how_to import POINTS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_there_is_a_page_for_each_thing_that_can_be_added() -> None:
    pages = {page for page, *_ in POINTS}
    assert set(re.findall(r"\]\(docs/how_to/(\w+)\.md\)", TEXT)) == pages


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", TEXT)
    assert len(links) > 8
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_the_rooms_are_those_that_there_are() -> None:
    rooms = {path.parent.name for path in (ROOT / "haq").glob("*/__init__.py")}
    assert {room for room in rooms if f"`{room}/`" not in TEXT} == set()
    named = set(re.findall(r"^\| [^|]+ \| `([^|]*)` \| \[docs", TEXT, re.MULTILINE))
    assert {room for rooms in named for room in rooms.split("`, `") if not (ROOT / room).is_dir()} == set()
