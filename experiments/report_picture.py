"""The picture of a report that the README shows: a run's page down to its first chart, 1,100 pixels wide.

    python -m experiments.report_picture RUN        # a finished run, such as that of `haq search --hw edge`

needs Chromium and the extra `dev`. It writes docs/report.png.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from haq import report

WIDTH, HEIGHT = 1100, 900  # of the window
OUT = Path(__file__).resolve().parents[1] / "docs" / "report.png"


def photograph(page: Path, out: Path) -> None:
    """Write a page as a PNG file down to its first chart, once all are drawn.

    Args:
        page: The report.
        out: The file.

    Raises:
        FileNotFoundError: If there is no Chromium.
    """
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        raise FileNotFoundError("there is no Chromium here; install it")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        window = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        window.goto(page.as_uri())
        window.wait_for_selector("html[data-charts=drawn]")
        end = window.evaluate("document.querySelector('.drawn').getBoundingClientRect().bottom")
        window.screenshot(path=out, full_page=True, clip={"x": 0, "y": 0, "width": WIDTH, "height": end + 16})
        browser.close()


def main() -> int:
    """Write the picture of the run that the command line names."""
    parser = argparse.ArgumentParser(description="Write docs/report.png.")
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        page = Path(place) / "report.html"
        status = report.main([str(options.run), "--out", str(page)])
        if status:
            return status
        photograph(page, options.out)
    print(f"Written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
