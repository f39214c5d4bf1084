"""The site as docs/build.py has built it. Without one its tests are skipped, unless HAQ_SITE=1 says that there must be one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import launched

SITE = Path(__file__).parents[2] / "site"
REQUIRED = os.environ.get("HAQ_SITE") == "1"
PACKAGES = ("quantizers", "hw_models", "envs", "haq")
MODULES = 5  # so many pages of modules are looked at in a browser, from the largest to the smallest
FOLDERS = ("tutorials", "how_to", "guide", "explanation", "experiments")


@pytest.fixture(scope="session")
def site() -> Path:
    if not (SITE / "index.html").is_file():
        if REQUIRED:
            pytest.fail(f"there is no {SITE / 'index.html'}; python docs/build.py writes it")
        pytest.skip("the site is not built")
    return SITE


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    with launched() as opened:
        yield opened


@pytest.fixture(scope="session")
def pages(site: Path) -> list[Path]:
    """What is looked at in a browser: all pages that are written by hand, and some of those of modules."""
    found = [page for page in sorted(site.glob("*.html")) if page.name != "404.html"]  # whose addresses begin at the root
    found += [page for folder in FOLDERS for page in sorted((site / folder).glob("*.html"))]
    found += sorted((site / "reference").glob("*.html"))
    modules = sorted((site / "reference" / "python").glob("*.html"), key=lambda page: page.stat().st_size)
    # The very largest says nothing that the next ones don't, and takes as long as all others together.
    some = [modules[place * (len(modules) - 2) // (MODULES - 1)] for place in range(MODULES)]
    some += [page for page in modules if page.stem in PACKAGES]
    return [*found, *dict.fromkeys(some)]
