"""The site as files: no link leads nowhere, nothing is loaded from a network, pictures have words, pages were executed."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import pytest

from tests.site.conftest import REQUIRED

TAG = re.compile(r"<([a-zA-Z][\w-]*)((?:\s+[^\s=<>\"'/]+(?:\s*=\s*(?:\"[^\"]*\"|'[^']*'|[^\s\"'>]+))?)*)\s*/?>")
ATTRIBUTE = re.compile(r"([^\s=<>\"'/]+)(?:\s*=\s*(?:\"([^\"]*)\"|'([^']*)'|([^\s\"'>]+)))?")
HIDDEN = re.compile(r"<(script|style)\b([^>]*)>.*?</\1>|<!--.*?-->", re.DOTALL)
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src", "audio": "src", "link": "href"}
FETCHED = ("stylesheet", "icon", "preload", "preconnect", "modulepreload", "manifest", "dns-prefetch", "prefetch")
ELSEWHERE = re.compile(r"^(?:https?:)?//")


@cache
def tags(file: Path) -> list[tuple[str, dict[str, str]]]:
    """All elements of a page with their attributes, without what stands in scripts and styles."""
    text = HIDDEN.sub(lambda hidden: f"<{hidden[1]}{hidden[2]}>" if hidden[1] else "", file.read_text(encoding="utf-8"))
    found = []
    for name, attributes in TAG.findall(text):
        values = {}
        for key, *given in ATTRIBUTE.findall(attributes):
            values[key.lower()] = html.unescape("".join(given))
        found.append((name.lower(), values))
    return found


@cache
def anchors(file: Path) -> frozenset[str]:
    return frozenset(value for _, given in tags(file) for key in ("id", "name") if (value := given.get(key)))


def files_of(site: Path) -> Iterator[Path]:
    return (file for file in sorted(site.rglob("*.html")) if file.name != "404.html")  # whose addresses begin at the root


def test_every_link_leads_somewhere(site: Path) -> None:
    broken = set()
    for file in files_of(site):
        for _, given in tags(file):
            for address in (given.get("href"), given.get("src")):
                if not address or re.match(r"[a-z][a-z+.-]*:|//", address):
                    continue
                path, _, anchor = address.partition("#")
                path = unquote(path.partition("?")[0])
                there = file
                if path:
                    there = (file.parent / path).resolve()
                if there.is_dir():
                    there /= "index.html"
                lost = not there.is_file()
                if not lost and anchor and there.suffix == ".html":
                    lost = unquote(anchor) not in anchors(there) and anchor != "__top"
                if lost:
                    broken.add(f"{file.relative_to(site)}: {address}")
    assert sorted(broken)[:20] == []


def test_nothing_is_loaded_from_a_network(site: Path) -> None:
    loaded = set()
    for file in files_of(site):
        for name, given in tags(file):
            address = given.get(LOADED.get(name, ""), "")
            if name == "link" and not set(given.get("rel", "").split()) & set(FETCHED):
                continue
            if ELSEWHERE.match(address):
                loaded.add(address)
        assert not re.search(r"style=[\"'][^\"']*url\(\s*[\"']?(?:https?:)?//", file.read_text(encoding="utf-8")), file
    for style in site.rglob("*.css"):
        loaded |= set(re.findall(r"(?:@import\s+|url\(\s*)[\"']?((?:https?:)?//[^\"')]+)", style.read_text(encoding="utf-8")))
    assert loaded == set()


def test_every_picture_has_words(site: Path) -> None:
    without = {
        f"{file.relative_to(site)}: {given.get('src')}"
        for file in files_of(site)
        for name, given in tags(file)
        if name == "img" and not given.get("alt", "").strip() and given.get("aria-hidden") != "true"
    }
    assert without == set()


def test_every_page_to_follow_was_executed(site: Path) -> None:
    to_follow = [site / "start.html"]
    for folder in ("tutorials", "how_to"):
        to_follow += [page for page in sorted((site / folder).glob("*.html")) if page.name != "index.html"]
    notebooks = [page.with_suffix(".ipynb") for page in to_follow]
    if not REQUIRED and not any(notebook.is_file() for notebook in notebooks):
        pytest.skip("the site was built without executing its pages")
    idle = []
    for notebook in notebooks:
        cells = []
        if notebook.is_file():
            cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        if not any(cell["cell_type"] == "code" and cell["outputs"] for cell in cells):
            idle.append(str(notebook.relative_to(site)))
    assert idle == []
