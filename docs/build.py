"""Build the site into site/: execute the pages, write the reference, run mkdocs.

    python docs/build.py                                # what `make docs` does
    python docs/build.py --pages tutorials/binary       # execute only this page; others are shown as they are written
    python docs/build.py --pages                        # execute none

A page of `start.md`, tutorials/ and how_to/ is a notebook in Markdown, as jupytext reads it: its `python` and `bash` blocks
are cells. Each runs in a folder of its own. What a cell prints, shows or draws stands below it on the site, and the notebook
is beside the page. A block whose fence says `python no-execute` or `bash no-execute` is only shown.
"""

from __future__ import annotations

import argparse
import html
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbconvert import MarkdownExporter
from nbconvert.filters import strip_ansi
from nbconvert.preprocessors import CoalesceStreamsPreprocessor
from reference_pages import write_reference

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "docs"
BUILT = ROOT / "build" / "docs"
WORK = ROOT / "build" / "work"
PATIENCE = 600  # seconds that a cell may take
AT_ONCE = 2  # pages that are executed at the same time
NOT_EXECUTED = re.compile(r"^```(python|bash) no-execute$", re.MULTILINE)
SHOWN_ONLY = r"```{.\1}"  # a fence that jupytext takes for text
PROGRESS = "<pre><span"  # how it begins in a notebook
# Otherwise the language of most blocks is that of the notebook.
IN_PYTHON = """\
---
jupyter:
  kernelspec:
    name: python3
    display_name: Python 3
    language: python
---
"""


def pages() -> list[str]:
    """List the pages that are executed, by their path without the ending, in the order of the navigation."""
    found = ["start"]
    for folder in ("tutorials", "how_to"):
        found += [f"{folder}/{path.stem}" for path in sorted((SOURCE / folder).glob("*.md"))]
    return [name for name in found if name != "tutorials/index" and name != "how_to/index"]


def execute(name: str) -> float:
    """Execute a page, and write its notebook and what stands on the site.

    Args:
        name: The page, such as "tutorials/binary".

    Returns:
        Seconds that it took.

    Raises:
        ValueError: Where a cell fails, with the page and the cell.
    """
    begin = time.monotonic()
    text = (SOURCE / f"{name}.md").read_text(encoding="utf-8")
    notebook = jupytext.reads(IN_PYTHON + NOT_EXECUTED.sub(SHOWN_ONLY, text), fmt="md")
    folder = WORK / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        NotebookClient(notebook, timeout=PATIENCE, resources={"metadata": {"path": str(folder)}}).execute()
    except CellExecutionError as error:
        raise ValueError(f"docs/{name}.md: {error}") from None
    notebook, _ = CoalesceStreamsPreprocessor().preprocess(notebook, {})
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.output_type == "stream":
                output.text = strip_ansi(output.text)  # a kernel asks programs for colours
    check_outputs(name, notebook)
    write_page(name, notebook)
    return time.monotonic() - begin


def check_outputs(name: str, notebook: nbformat.NotebookNode) -> None:
    """Refuse what a reader shouldn't see: warnings on the error stream, and pages without a cell."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not cells:
        raise ValueError(f"docs/{name}.md has no block that runs")
    for cell in cells:
        for output in cell.outputs:
            if output.output_type == "stream" and "Warning" in output.text:
                raise ValueError(f"docs/{name}.md: a block warns:\n{cell.source}\n{output.text}")


def write_page(name: str, notebook: nbformat.NotebookNode) -> None:
    """Write a page for mkdocs and its notebook beside it; pictures get the words that a cell gives as `alt="..."`."""
    page = BUILT / f"{name}.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(notebook, page.with_suffix(".ipynb"))
    for cell in notebook.cells:
        if cell.source.startswith("%%bash"):
            cell.source = cell.source.partition("\n")[2]
            cell.metadata["magics_language"] = "bash"
        for output in cell.get("outputs", ()):
            show_as_text(output.get("data", {}))
    words = [
        cell.metadata["alt"] for cell in notebook.cells for output in cell.get("outputs", ()) if drawn(name, cell, output)
    ]
    text, resources = MarkdownExporter().from_notebook_node(notebook)
    pictures = page.parent / page.stem
    for file, content in resources["outputs"].items():
        pictures.mkdir(exist_ok=True)
        (pictures / file).write_bytes(content)
    given = iter(words)
    text = re.sub(r"!\[(?:png|svg)\]\((\w+\.(?:png|svg))\)", lambda found: f"![{next(given)}]({page.stem}/{found[1]})", text)
    here = f"[This page as a notebook]({page.stem}.ipynb){{ .notebook }}\n"
    page.write_text(f"{text}\n\n{here}", encoding="utf-8")


def show_as_text(data: dict[str, str]) -> None:
    """Take the colours from the progress of a search: a terminal's have too little contrast on a page."""
    if data.get("text/html", "").startswith(PROGRESS):
        data["text/plain"] = html.unescape(re.sub("<[^>]+>", "", data.pop("text/html")))


def drawn(name: str, cell: nbformat.NotebookNode, output: nbformat.NotebookNode) -> bool:
    """Say whether an output is a picture. Raises ValueError for one without words for who can't see it."""
    if not {"image/png", "image/svg+xml"} & set(output.get("data", {})):
        return False
    if "alt" not in cell.metadata:
        raise ValueError(f'docs/{name}.md: a block draws and has no alt="what is to be seen":\n{cell.source}')
    return True


def build(executed: Sequence[str]) -> None:
    """Build the site, with some of its pages executed."""
    shutil.rmtree(BUILT, ignore_errors=True)
    shutil.copytree(SOURCE, BUILT, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # a page has a core
    os.environ.setdefault("COLUMNS", "100")
    os.environ["TTY_COMPATIBLE"] = "0"  # a kernel asks programs for colours, with which progress would be printed, too
    os.environ["NO_MKDOCS_2_WARNING"] = "1"
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for name, seconds in zip(executed, pool.map(execute, executed), strict=True):
            print(f"{seconds:6.1f} s  {name}", flush=True)
    write_reference(BUILT)
    subprocess.run([sys.executable, "-m", "mkdocs", "build"], cwd=ROOT, check=True)
    print(f"Written: {ROOT / 'site' / 'index.html'}")


def main() -> int:
    """Build what the command line asks for, and return the exit status."""
    parser = argparse.ArgumentParser(description="Build the site.")
    parser.add_argument("--pages", nargs="*", metavar="PAGE", help="execute only these (default: all)")
    options = parser.parse_args()
    chosen = pages() if options.pages is None else options.pages
    for name in chosen:
        if name not in pages():
            parser.error(f"there is no page {name!r}: choose from {', '.join(pages())}")
    try:
        build(chosen)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
