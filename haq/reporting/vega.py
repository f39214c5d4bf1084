"""The libraries that draw charts in a browser, as one script that needs no network.

Vega, Vega-Lite and Vega-Embed come with vl-convert-python, whose bundler takes seconds; what it made is kept in
`$XDG_CACHE_HOME/haq` or ~/.cache/haq for its version.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from pathlib import Path

import vl_convert

from haq.store import files

SNIPPET = "window.vegaEmbed = vegaEmbed;"


def script() -> str:
    """Return the script, which defines `vegaEmbed`. A folder that can't be written only costs the seconds."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "haq"
    path = folder / f"vega-{importlib.metadata.version('vl-convert-python')}.js"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if (kept := path.read_text(encoding="utf-8")).endswith(SNIPPET):
            return kept
    # The snippet once more, at the end, tells a whole file.
    made = f"{vl_convert.javascript_bundle(SNIPPET)}\n//{SNIPPET}"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        files.write(path, made)
    return made
