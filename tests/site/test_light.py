"""Everybody can use the site in its light colours: axe finds nothing to complain of, by any of its rules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.site.opening import complaints, show, window


def test_axe_finds_nothing_to_complain_of(browser: Any, site: Path, pages: list[Path]) -> None:
    found = {}
    with window(browser, color_scheme="light") as page:
        for file in pages:
            show(page, file)
            assert page.evaluate("document.body.dataset.mdColorScheme") == "default"
            assert page.evaluate("document.documentElement.scrollWidth") <= 1100, file
            faults = complaints(page)
            if faults:
                found[str(file.relative_to(site))] = faults
    assert found == {}
