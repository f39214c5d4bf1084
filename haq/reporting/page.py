"""The page itself: one HTML file that needs nothing else and asks nobody for anything.

Every name and number passes through Jinja's escaping; the data of charts are JSON in which no tag can end. The page's own
script and style are let in by their hashes, and the Content-Security-Policy lets in nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from jinja2 import Environment, StrictUndefined

from haq.reporting import vega
from haq.reporting.drawing import Picture
from haq.reporting.overview import overview
from haq.reporting.reading import RunFolder, SweepFolder
from haq.reporting.run_part import of_run
from haq.reporting.sections import Part
from haq.reporting.sweep_part import of_sweep
from haq.version import __version__

GENERATOR = "haq.report"


def render(sources: Sequence[RunFolder | SweepFolder]) -> str:
    """Write the page of some runs and sweeps, in their order. The same folders give the same page, byte for byte."""
    called = names([source.folder for source in sources])
    parts = []
    for number, (source, name) in enumerate(zip(sources, called, strict=True), 1):
        parts.append(_part(source, name, f"part-{number}"))
    title, first = parts[0].title, None
    sections = [section for part in parts for section in part.sections]
    if len(parts) > 1:
        title, first = f"{len(parts)} searches, side by side", overview(sources, parts)
        sections.insert(0, first)
    pictures: list[Picture] = [picture for section in sections for picture in section.pictures]
    boxes = {id(picture): f"chart-{number}" for number, picture in enumerate(pictures)}
    specs = {f"{boxes[id(picture)]}-{i}": spec for picture in pictures for i, spec in enumerate(picture.specs)}
    style, script = _asset("report.css"), _asset("report.js")
    # No file of ours may end the element that it stands in.
    library = vega.script().replace("</script", "<\\/script")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "allow_nan": False}
    return environment.from_string(_asset("report.html.jinja")).render(
        title=title,
        parts=parts,
        overview=first,
        box=lambda picture: boxes[id(picture)],
        specs=specs,
        style=style,
        library=library,
        script=script,
        policy=_policy(style, library, script),
        generator=GENERATOR,
        version=__version__,
    )


def names(folders: Sequence[Path]) -> list[str]:
    """Name folders on the page: as little of their paths as tells them apart, and nobody's home."""
    paths = [folder.resolve() for folder in folders]
    if len(paths) == 1:
        return [paths[0].name]
    shared = os.path.commonpath([path.parent for path in paths])
    return [path.relative_to(shared).as_posix() for path in paths]


def _part(source: RunFolder | SweepFolder, name: str, anchor: str) -> Part:
    if isinstance(source, RunFolder):
        return of_run(source, name, anchor)
    return of_sweep(source, name, anchor)


def _policy(style: str, *scripts: str) -> str:
    """Say what a browser lets this page do: draw, with its own script and style.

    Nothing is fetched, framed, sent or evaluated.
    """
    hashes = " ".join(_hash(script) for script in scripts)
    allowed = f"script-src {hashes}; style-src {_hash(style)}; img-src data:"
    return f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _asset(name: str) -> str:
    return resources.files("haq.reporting").joinpath(name).read_text(encoding="utf-8")
