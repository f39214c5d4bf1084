"""A report in a browser: it asks nobody for anything, and everybody can read it, on any screen, on paper, by keyboard."""

from __future__ import annotations

import io
import itertools
import re
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from haq import report
from haq.reporting.reading import RunFolder, read_folder
from haq.store.units import percent
from tests.browser import launched
from tests.reporting.test_report import HOSTILE
from tests.reporting.written_runs import write_robustness, write_run

DEEP = tuple(f"features.{i}.conv.{part}" for i in range(18) for part in ("expand", "depthwise", "project"))
EVALUATIONS = 400
A4 = {"width": 718, "height": 1047}  # within margins of 10 mm, at 96 pixels per inch
LARGEST = 5e6  # bytes


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with launched() as opened:
        yield opened


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 54 layers and 400 evaluations by each of three solvers, attacked, with its report."""
    folder = write_run(tmp_path_factory.mktemp("report") / "run", layers=DEEP, evaluations=EVALUATIONS)
    write_robustness(folder)
    assert report.main([str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of an attacked run, of one with hostile names, and of one that has only begun."""
    place = tmp_path_factory.mktemp("several")
    attacked = write_run(place / "attacked", layers=DEEP)
    write_robustness(attacked)
    hostile = write_run(place / "<b>hostile", layers=("stem", HOSTILE), network=HOSTILE)
    begun = write_run(place / "begun", layers=DEEP, finished=False)
    out = place / "several.html"
    assert report.main([*map(str, (attacked, hostile, begun)), "--out", str(out)]) == 0
    return out


@contextmanager
def opened(browser: Any, file: Path, **options: Any) -> Iterator[Any]:
    """A page in a window of its own, drawn; in the end it must have asked for nothing but itself and complained of nothing."""
    context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
    page, asked, complaints = context.new_page(), [], []

    def on_request(route: Any) -> None:
        asked.append(route.request.url)
        route.continue_() if len(asked) == 1 else route.abort()

    context.route("**/*", on_request)
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(file.as_uri())
    if options.get("java_script_enabled", True):
        page.wait_for_selector("html[data-charts=drawn]", timeout=60_000)
    yield page
    context.close()
    assert asked == [file.as_uri()]
    assert complaints == []


def test_it_is_complete_in_itself_and_every_chart_is_drawn(browser: Any, run: Path) -> None:
    file = run / "report.html"
    assert file.stat().st_size < LARGEST
    with opened(browser, file) as page:
        boxes = page.locator(".chart")
        assert boxes.count() == 5  # bits, shares, policies, convergence, attacks
        marks = [
            page.evaluate("box => box.querySelectorAll('svg [class*=mark-] path, svg [class*=mark-] line').length", box)
            for box in boxes.element_handles()
        ]
        layers = len(DEEP)
        assert marks[0] >= 2 * layers
        assert marks[1] >= 2 * layers
        assert marks[2] >= 3 * EVALUATIONS
        assert min(marks) > 5
        assert page.evaluate(
            "[...document.querySelectorAll('.chart svg')].every(svg => svg.getBoundingClientRect().width > 100)"
        )
        paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
        ready = page.evaluate("performance.now()")
    print(f"{file.stat().st_size / 1e6:.2f} MB, first contentful paint {paint:.0f} ms, all drawn by {ready:.0f} ms")


def test_nothing_but_its_own_script_may_run(browser: Any, several: Path) -> None:
    with opened(browser, several) as page:
        assert page.evaluate("window.hacked") is None
        assert page.locator("img").count() == 0
        assert page.get_by_text(HOSTILE).count() > 3  # shown as it is written
        assert page.locator("svg text", has_text="script").count() >= 1
    context = browser.new_context()
    page, complaints = context.new_page(), []
    page.on("console", lambda message: complaints.append(message.text))
    page.goto(several.as_uri())
    page.evaluate(
        """() => {
            const script = document.createElement("script");
            script.textContent = "window.hacked = 1";
            document.body.append(script);
            const image = new Image();
            image.src = "https://example.org/image.png";
            document.body.append(image);
            document.body.setAttribute("onclick", "window.hacked = 1");
            document.body.click();
            return fetch("https://example.org").catch(() => null);
        }"""
    )
    assert page.evaluate("window.hacked") is None
    assert sum("Content Security Policy" in complaint for complaint in complaints) >= 4
    context.close()


def test_hovering_tells_the_value(browser: Any, run: Path) -> None:
    found = read_folder(run)
    assert isinstance(found, RunFolder)
    assert found.policy is not None
    with opened(browser, run / "report.html") as page:
        tooltip = page.locator("#vg-tooltip-element.visible")
        bar = page.locator("#chart-0-0 .mark-rect path").nth(2)
        bar.hover()
        tooltip.wait_for()
        text = " ".join(tooltip.inner_text().split())
        assert text == f"layer {DEEP[1]} kind conv operand weights bits {found.policy[1][0]} chosen searched"
        page.mouse.move(0, 0)
        # Of many points some lie under others: whichever is met tells a policy that was tried.
        page.locator("#chart-1-0 .mark-symbol path").nth(7).hover(force=True)
        tooltip.wait_for()
        text = " ".join(tooltip.inner_text().split())
        shares = {percent(one.accuracy) for one in found.history}
        told = re.search(r"accuracy \(measured\) ([\d.]+ %)", text)
        assert told
        assert told[1] in shares


def test_it_is_light_or_dark_as_the_reader_likes(browser: Any, run: Path) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        with opened(browser, run / "report.html", color_scheme=scheme) as page:
            seen[scheme] = page.evaluate(COLORS)
    for name in ("paper", "ink", "axis", "series", "note", "link"):
        assert seen["light"][name] != seen["dark"][name], name
    for scheme, colors in seen.items():
        paper = colors["paper"]
        for name in ("ink", "note", "link", "axis", "stamp", "fact"):
            behind = {"stamp": colors["stamp-paper"], "fact": colors["fact-paper"]}.get(name, paper)
            assert contrast(colors[name], behind) >= 4.5, (scheme, name)
        for color in colors["all"]:
            assert contrast(color, paper) >= 3, (scheme, color)
    assert luminance(seen["light"]["paper"]) > 0.9
    assert luminance(seen["dark"]["paper"]) < 0.05


COLORS = """() => {
    const color = (selector, property) => getComputedStyle(document.querySelector(selector))[property];
    const probe = document.body.appendChild(document.createElement("i"));
    const all = [];
    for (const name of ["weights", "activations", "after", ...Array(8).keys()]) {
        probe.style.color = `var(--${typeof name === "number" ? `series-${name}` : name})`;
        all.push(getComputedStyle(probe).color);
    }
    return {
        "paper": color("body", "backgroundColor"), "ink": color("body", "color"), "note": color(".note", "color"),
        "link": color("a[href]", "color"), "axis": color(".chart svg .role-axis-label text", "fill"),
        "series": color("#chart-0-0 .mark-rect path", "stroke"), "stamp": color(".stamp", "color"),
        "stamp-paper": color(".stamp", "backgroundColor"), "fact": color(".facts span", "color"),
        "fact-paper": color(".facts > div", "backgroundColor"), all,
    };
}"""


def luminance(color: str) -> float:
    """Relative luminance as WCAG defines it, of "rgb(r, g, b)"."""
    channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_colour_is_never_the_only_mark(browser: Any, run: Path) -> None:
    with opened(browser, run / "report.html") as page:
        for box in ("#chart-1-0", "#chart-2-0", "#chart-3-0"):
            symbols = page.eval_on_selector_all(
                f"{box} .role-legend-symbol path",
                "paths => paths.map(path => [path.getAttribute('d'), path.getAttribute('stroke')])",
            )
            assert len(symbols) > 1
            assert len({shape for shape, _ in symbols}) == len({color for _, color in symbols}) == len(symbols), box


@pytest.mark.parametrize("width", [320, 360, 768, 1100, 1280])
def test_the_page_never_scrolls_sideways(width: int, browser: Any, several: Path) -> None:
    with opened(browser, several, viewport={"width": width, "height": 740}) as page:
        page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        wide = page.locator(".charts").nth(1)  # the first is the joint one
        inner, outer = (
            wide.evaluate(f"charts => {what}") for what in ("charts.scrollWidth", "charts.parentElement.clientWidth")
        )
        assert (inner > outer) is (width < 900)  # 54 layers have room of their own
        # Nothing is cut off but what scrolls in a box of its own.
        assert page.evaluate(OUTSIDE, width) == []


OUTSIDE = """width => [...document.querySelectorAll("body *")].filter(one =>
    !one.closest(".scroll, .hidden, .skip, #vg-tooltip-element") && one.getBoundingClientRect().right > width + 1
).map(one => one.outerHTML.slice(0, 200))"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_table_that_scrolls_on_a_phone_shows_that_there_is_more(scheme: str, browser: Any, run: Path) -> None:
    with opened(browser, run / "report.html", viewport={"width": 360, "height": 740}, color_scheme=scheme) as page:
        box = page.locator(".scroll:has(> table)").first
        assert box.evaluate("box => box.scrollWidth > box.clientWidth + 20")
        paper = luminance(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert abs(edge(box, "left") - paper) < 0.03
        assert abs(edge(box, "right") - paper) > 0.1
        box.evaluate("box => { box.scrollLeft = box.scrollWidth; }")
        assert abs(edge(box, "left") - paper) > 0.1
        assert abs(edge(box, "right") - paper) < 0.03


def edge(box: Any, side: str) -> float:
    """The luminance of most of what is seen in the outermost columns of a box; text covers less than half of it."""
    with Image.open(io.BytesIO(box.screenshot())) as picture:
        columns = {"left": (1, 3), "right": (picture.width - 3, picture.width - 1)}[side]
        colors = [picture.convert("RGB").getpixel((x, y)) for x in range(*columns) for y in range(picture.height)]
    return statistics.median(luminance(f"rgb{color}") for color in colors)


def test_on_paper_it_is_light_and_nothing_is_cut_off(browser: Any, run: Path) -> None:
    with opened(browser, run / "report.html", viewport=A4, color_scheme="dark") as page:
        page.emulate_media(media="print", color_scheme="dark")
        colors = page.evaluate(COLORS)
        assert luminance(colors["ink"]) < 0.05
        assert luminance(colors["axis"]) < 0.3
        cut = """width => [...document.querySelectorAll("main *, header *")].filter(one =>
            one.checkVisibility() && one.getBoundingClientRect().right > width + 1).map(one => one.outerHTML.slice(0, 200))"""
        assert page.evaluate(cut, A4["width"]) == []
        assert not page.locator("nav").is_visible()
        assert page.pdf(format="A4").startswith(b"%PDF")


def test_the_keyboard_reaches_everything(browser: Any, run: Path) -> None:
    with opened(browser, run / "report.html") as page:
        reached, outlines = [], []
        for _ in range(200):
            page.keyboard.press("Tab")
            tag = page.evaluate("document.activeElement.tagName")
            if tag == "BODY":
                break
            reached.append(page.evaluate("document.activeElement.innerText.slice(0, 40) + document.activeElement.className"))
            outlines.append(page.evaluate("getComputedStyle(document.activeElement).outlineStyle"))
            if tag == "SUMMARY":
                page.keyboard.press("Enter")
        assert "Skip to the content" in reached[0]
        assert set(outlines) == {"solid"}
        assert page.locator("details").count() == 4
        assert page.locator("details:not([open])").count() == 0
        assert page.locator("details table").first.is_visible()
        everything = page.locator("a[href], summary, [tabindex='0']").count()
        assert len(reached) == everything


def test_a_screen_reader_finds_its_way(browser: Any, several: Path) -> None:
    with opened(browser, several) as page:
        assert page.evaluate("document.documentElement.lang") == "en"
        assert page.title() == "3 searches, side by side · haq"
        for landmark in ("header", "nav[aria-label]", "main", "footer"):
            assert page.locator(f"body > {landmark}").count() == 1
        levels = page.eval_on_selector_all("h1, h2, h3, h4, h5, h6", "all => all.map(one => Number(one.tagName[1]))")
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
        charts = page.locator(".charts")
        assert charts.count() == page.locator("figure details table").count() == page.locator("figure").count()
        for said in charts.evaluate_all("all => all.map(one => [one.getAttribute('role'), one.getAttribute('aria-label')])"):
            assert said[0] == "img"
            assert re.search(r"\d", said[1])  # what it shows, not only what it is called
        assert page.locator("th:not([scope])").count() == 0
        assert page.locator("table:not(:has(caption))").count() == 0
        assert page.locator("tbody tr:not(:has(th[scope=row]))").count() == 0
        ids = page.eval_on_selector_all("[id]", "all => all.map(one => one.id)")
        assert len(ids) == len(set(ids))
        referred = page.eval_on_selector_all("[aria-labelledby]", "all => all.map(one => one.getAttribute('aria-labelledby'))")
        assert set(" ".join(referred).split()) <= set(ids)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_to_complain_of(scheme: str, browser: Any, several: Path) -> None:
    from axe_playwright_python.sync_playwright import Axe

    with opened(browser, several, color_scheme=scheme) as page:
        page.eval_on_selector_all("details", "all => all.forEach(one => one.open = true)")
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        assert len(found.response["passes"]) > 30


def test_without_javascript_words_and_tables_stand(browser: Any, run: Path) -> None:
    with opened(browser, run / "report.html", java_script_enabled=False) as page:
        assert "Charts are drawn by JavaScript, which is off" in page.locator("noscript").text_content()
        assert page.get_by_text("The policy found by ddpg has").is_visible()
        assert page.locator("table").first.is_visible()
        page.locator("summary").first.click()
        assert page.locator("details table").first.is_visible()
        assert page.locator(".chart svg").count() == 0
