"""What is released: files that a wheel and a source distribution have, what an index shows, versions that agree, extras."""

from __future__ import annotations

import re
import runpy
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

from haq.version import __version__
from hw_models import extras

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PACKAGES = ("haq", "envs", "hw_models", "quantizers")


def without_spaces_and_order(requirement: str) -> tuple[str, frozenset[str]]:
    """The name of a requirement and its bounds: builders write bounds in their own order."""
    name, bounds = re.fullmatch(r"([\w.-]+(?:\[[\w,-]+\])?)(.*)", requirement.replace(" ", "")).groups()
    return name, frozenset(bounds.split(","))


def needed(extra: str) -> list[str]:
    """The requirements of an extra, as pyproject.toml has them."""
    found = []
    for requirement in PROJECT["optional-dependencies"][extra]:
        if own := re.fullmatch(r"haq\[(.*)\]", requirement):
            for other in own[1].split(","):
                found += needed(other)
        else:
            found.append(requirement)
    return list(dict.fromkeys(found))


@pytest.fixture
def distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is installed is this file's project, however old the installed metadata are."""
    lines = []
    for extra, requirements in PROJECT["optional-dependencies"].items():
        lines += [f'{requirement}; extra == "{extra}"' for requirement in requirements]
    monkeypatch.setattr(extras.metadata, "requires", lambda name: [*PROJECT["dependencies"], *lines])


@pytest.mark.parametrize("extra", PROJECT["optional-dependencies"])
def test_a_line_installs_what_an_extra_needs(extra: str, distribution: None) -> None:
    line = extras.install_line(extra)
    assert line.startswith("pip install '")
    assert re.findall(r"'([^']*)'", line) == needed(extra)


def test_the_line_is_that_of_the_installed_metadata() -> None:
    named = re.findall(r"'([^']*)'", extras.install_line("tvm"))
    assert [without_spaces_and_order(one) for one in named] == [without_spaces_and_order(one) for one in needed("tvm")]


def test_code_that_was_not_installed_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(extras.metadata, "requires", requires)
    assert extras.install_line("ray") == "install the packages of the extra 'ray' in pyproject.toml"


def test_nothing_asks_an_index_for_this_package() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for package in (*PACKAGES, "experiments"):
        pages += (ROOT / package).rglob("*.py")
    for path in pages:
        assert "install 'haq[" not in path.read_text(encoding="utf-8"), path


def test_what_an_index_shows_has_no_link_into_the_repository() -> None:
    made = runpy.run_path(str(ROOT / "setup.py"))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = made["description"](readme)
    assert readme.split("\n", 1)[0] == shown.split("\n", 1)[0]
    outside_code = re.sub(r"^```.*?^```$", "", shown, flags=re.MULTILINE | re.DOTALL)
    assert all(target.startswith("https:") for target in re.findall(r"\]\(([^)\s]*)\)", outside_code))
    assert all(target.startswith("https:") for target in re.findall(r"(?:src|href)=\"([^\"]*)", outside_code))
    assert "<!--" not in outside_code
    assert set(re.findall(r"^```.*?^```$", readme, re.M | re.S)) == set(re.findall(r"^```.*?^```$", shown, re.M | re.S))


def test_how_links_become_words() -> None:
    made = runpy.run_path(str(ROOT / "setup.py"))
    pictures = '![a picture](docs/a.png)\n\n<img src="docs/a.png">\n\n[![two](docs/a.png)](docs/b.md)\n\n'
    text = f"# A\n\n{pictures}See [a `b`](docs/b.md#c) and [d](https://e.org).\n\n```python\nx[0](y)\n```\n"
    kept = "# A\n\nSee a `b` and [d](https://e.org).\n\n```python\nx[0](y)\n```\n"
    assert made["description"](text) == kept + made["WHERE"]


def test_one_version_everywhere() -> None:
    changes = re.findall(r"^## \[([\d.]+)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert changes[0][0] == __version__
    assert [date for _, date in changes] == sorted((date for _, date in changes), reverse=True)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert str(citation["date-released"]) == changes[0][1]
    assert citation["license"] == PROJECT["license"]


def test_pythons_are_those_that_ci_runs() -> None:
    named = {text.rpartition(":: ")[2] for text in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d", text)}
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    used = {step["with"]["python-version"] for step in steps if "python-version" in step.get("with", {})}
    assert used == named
    assert PROJECT["requires-python"] == f">={min(named, key=lambda version: int(version.partition('.')[2]))}"


def test_the_changelog_has_the_usual_parts() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    parts = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert parts <= {"Breaking", "Added", "Changed", "Deprecated", "Fixed", "Removed", "Security", "Measured"}
    newest = text[text.index(f"## [{__version__}]") :]
    assert re.search(r"^### (.*)$", newest, re.MULTILINE)[1] == "Breaking"
    points = re.findall(r"^\* (.*?)(?=^\* |^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert len(points) == len(set(points))
