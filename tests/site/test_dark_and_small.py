"""The site in the dark and on a phone: what differs there from light pages on a desk is looked at again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.site.opening import complaints, show, window

PHONE = {"width": 360, "height": 740}
LEAST = 12  # pixels of a letter

# Texts that are smaller, and what is cut off at a side: that is, neither on the page nor in something that scrolls.
SMALL = """least => [...document.querySelectorAll("main *, header *, footer *")].filter(one =>
    one.checkVisibility() && [...one.childNodes].some(node => node.nodeType === 3 && node.data.trim())
    && !one.closest("[hidden], svg, .md-search, .md-nav") && parseFloat(getComputedStyle(one).fontSize) < least
).map(one => `${one.outerHTML.slice(0, 120)} ${getComputedStyle(one).fontSize}`).slice(0, 5)"""
CUT = """width => [...document.querySelectorAll(".md-content *")].filter(one => {
    if (!one.checkVisibility() || one.getBoundingClientRect().right <= width + 1) return false;
    for (let box = one.parentElement; box; box = box.parentElement)
        if (["auto", "scroll"].includes(getComputedStyle(box).overflowX)) return false;
    return true;
}).map(one => one.outerHTML.slice(0, 150)).slice(0, 5)"""


def test_everything_has_contrast_in_the_dark(browser: Any, site: Path, pages: list[Path]) -> None:
    found = {}
    with window(browser, color_scheme="dark") as page:
        for file in pages:
            show(page, file)
            assert page.evaluate("document.body.dataset.mdColorScheme") == "slate"
            faults = complaints(page, "color-contrast", "link-in-text-block")
            if faults:
                found[str(file.relative_to(site))] = faults
    assert found == {}


def test_it_is_readable_on_a_phone(browser: Any, site: Path, pages: list[Path]) -> None:
    found = {}
    with window(browser, viewport=PHONE) as page:
        for file in pages:
            show(page, file)
            faults = [f"too small: {text}" for text in page.evaluate(SMALL, LEAST)]
            faults += [f"cut off: {text}" for text in page.evaluate(CUT, PHONE["width"])]
            width = page.evaluate("document.documentElement.scrollWidth")
            if width > PHONE["width"]:
                faults.append(f"{width} pixels wide")
            faults += complaints(page, "scrollable-region-focusable", "target-size", "region", "aria-allowed-role")
            if faults:
                found[str(file.relative_to(site))] = faults
    assert found == {}


def test_a_wide_table_says_that_there_is_more(browser: Any, site: Path) -> None:
    with window(browser, viewport=PHONE) as page:
        show(page, site / "experiments" / "haq_tables.html")
        box = page.locator(".md-typeset__scrollwrap.more-right").first
        assert box.evaluate("box => getComputedStyle(box).boxShadow") != "none"
        assert box.get_attribute("tabindex") == "0"
        box.evaluate("box => { box.scrollLeft = box.scrollWidth; }")
        page.wait_for_selector(".md-typeset__scrollwrap.more-left:not(.more-right)")
