"""Pages of the site in a browser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def window(browser: Any, **options: Any) -> Iterator[Any]:
    """A window in which pages are opened one after another; none may ask for anything but files."""
    context = browser.new_context(**{"viewport": {"width": 1100, "height": 900}, **options})
    asked: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    yield context.new_page()
    context.close()
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def show(page: Any, file: Path) -> None:
    """Open a page, and wait until the site's own script is through with it."""
    page.goto(file.as_uri())
    page.wait_for_selector("html[data-ready=true]", state="attached", timeout=60_000)


def complaints(page: Any, *rules: str) -> list[str]:
    """What axe complains of, by all its rules or by some."""
    from axe_playwright_python.sync_playwright import Axe

    options: dict[str, Any] = {"resultTypes": ["violations"]}
    if rules:
        options["runOnly"] = list(rules)
    found = Axe().run(page, options=options)
    return [
        f"{fault['id']}: {node['html'][:160]} {node['failureSummary']}"
        for fault in found.response["violations"]
        for node in fault["nodes"][:5]
    ]
