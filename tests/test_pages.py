"""README and docs/: commands exist, code of the guide runs, and every figure stands in a file that is linked to."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import quantizers as Q
from haq.__main__ import cli
from tests.conftest import brightest, images, small_network

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = [README, *sorted(path for path in DOCS.rglob("*.md") if "experiments" not in path.relative_to(DOCS).parts)]
GUIDE = sorted((DOCS / "guide").glob("*.md"))
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
CODE = re.compile(r"`[^`\n]*`")
FIGURE = re.compile(r"(?<![\w.])\d+\.\d+(?![\w.]*\.\d)")
VERSION = re.compile(r"(?:Python|Apache|MCT|AIMET|ModelOpt|NNCF|Brevitas|TVM|PyTorch|version)[ -]\d+\.\d+")
FROM = re.compile(r"<!-- from (\S+) -->")  # a file of the repository that the site doesn't show
MOST_LINES = 150  # of the README


def name_of(path: Path) -> str:
    """A page, as it is called in a test's name."""
    return str(path.relative_to(ROOT))


def commands(text: str) -> Iterator[list[str]]:
    """Find the lines of bash blocks that call `haq`, without what the shell does with their output."""
    for block in re.findall(r"^```bash[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            called = re.match(r"\s*(?:\S+=\S+ )*haq (.*)", line)
            if called:
                yield shlex.split(re.split(r"\s(?:\||>|2>|&&|;)", called[1])[0], comments=True)


def check_command(words: list[str]) -> None:
    """Look for a command and its options. Raises click.UsageError where there is none of that name."""
    context = click.Context(cli, info_name="haq", resilient_parsing=True)
    found: Any = cli
    while isinstance(found, click.Group):
        _, found, words = found.resolve_command(context, words)
        assert found is not None, words
    known = {option for param in found.params for option in (*param.opts, *param.secondary_opts)} | {"-h", "--help"}
    for word in words:
        option = word.partition("=")[0]
        assert not option.startswith("-") or option in known, f"{found.name} has no option {option}"


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_commands_exist(path: Path) -> None:
    for words in commands(path.read_text(encoding="utf-8")):
        check_command(words)


def test_a_command_that_does_not_exist_is_seen() -> None:
    (words,) = commands("```bash\nhaq search --no-such-option 1 | head  # a remark\n```\n")
    assert words == ["search", "--no-such-option", "1"]
    with pytest.raises(AssertionError, match="search has no option --no-such-option"):
        check_command(words)


def stand_ins() -> dict[str, Any]:
    """What the guide's code takes for given."""
    x = images(64, 0)
    y = brightest(x)
    loader = DataLoader(TensorDataset(x, y), batch_size=32)
    net = small_network()
    names = list(Q.BitPolicy.uniform(net, w=4, a=4))
    return {
        **{"net": net, "network": net, "x": x, "y": y, "images": x, "labels": y, "torch": torch, "Q": Q},
        **{"loader": loader, "train_loader": loader, "held_out_loader": loader, "criterion": nn.CrossEntropyLoss()},
        "policy": Q.BitPolicy(dict.fromkeys(names, (4, 4))),
    }


def test_code_of_the_guide_on_quantizers_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = stand_ins()
    given["policy"].to_json("policy.json")
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "guide" / "quantizers.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(block, given)
    assert given["loss"].requires_grad
    assert torch.equal(given["again"](given["x"]), given["qnet"](given["x"]))


def test_code_of_the_guide_on_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first, *_ = re.findall(r"```python\n(.*?)```", (DOCS / "guide" / "python.md").read_text(encoding="utf-8"), re.DOTALL)
    given = stand_ins()
    exec(first.replace("evaluations=200", "evaluations=6").replace("epochs=5", "epochs=1"), given)
    assert given["result"].trial.accuracy > 0
    assert given["network"](given["x"]).shape == given["net"](given["x"]).shape


def paragraphs(text: str) -> Iterator[str]:
    """Cut a page into paragraphs; a table belongs to the paragraph before it, and blocks of code are left out."""
    parts = [part for part in FENCE.sub("", text).split("\n\n") if part.strip() and not part.startswith("    ")]
    together: list[str] = []
    for part in parts:
        if part.startswith("|") and together:
            together[-1] += "\n" + part
        else:
            together.append(part.strip())
    yield from together


def unsupported(path: Path) -> list[str]:
    """List the figures of a page that no file holds to which their paragraph links."""
    missing = []
    for part in paragraphs(path.read_text(encoding="utf-8")):
        held = "".join((ROOT / file).read_text(encoding="utf-8") for file in FROM.findall(part))
        for link in LINK.findall(part):
            file = path.parent / link
            if "://" not in link and file.is_file() and file.suffix in (".md", ".csv", ".json", ".txt", ".yaml"):
                held += file.read_text(encoding="utf-8")
                if file.suffix == ".md" and file.with_suffix(".csv").is_file():
                    held += file.with_suffix(".csv").read_text(encoding="utf-8")
        prose = CODE.sub("", VERSION.sub("", LINK.sub("]", part)))
        unknown = [one for one in FIGURE.findall(prose) if not re.search(rf"(?<![\d.]){re.escape(one)}(?!\d)", held)]
        missing += [f"{figure} in {part[:80]!r}" for figure in unknown]
    return missing


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_every_figure_stands_in_a_file_that_is_linked_to(path: Path) -> None:
    assert not unsupported(path)


def test_a_figure_from_nowhere_is_seen(tmp_path: Path) -> None:
    (tmp_path / "source.md").write_text("It was 91.25 %.")
    page = tmp_path / "page.md"
    page.write_text("The accuracy is 91.25 % ([all](source.md)).\n\nIt is 1.25 times as fast ([all](source.md)).\n")
    assert unsupported(page) == ["1.25 in 'It is 1.25 times as fast ([all](source.md)).'"]


def test_the_readme_is_short_and_shows_what_the_main_job_printed() -> None:
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_LINES
    printed = (DOCS / "main_job.txt").read_text(encoding="utf-8").strip()
    assert "found by ddpg" in printed
    assert printed in text
