"""Progress in a notebook: the table that a terminal shows, put anew into one output of the cell."""

from __future__ import annotations

import io
import time
from typing import Any

from rich.console import Console

from haq.console.progress import Live

PAUSE = 0.2  # seconds between two pictures
WIDTH = 100  # characters


class NotebookLive(Live):
    """A table that follows a search in the output of a notebook's cell. IPython is what shows it; nothing else is needed."""

    def __init__(self, title: str = "accuracy") -> None:
        """Prepare the table; nothing is shown before `start`. `title` is what the objective is called."""
        super().__init__(Console(file=io.StringIO(), width=WIDTH, force_jupyter=False), title)
        self.disable = True  # rich itself shows nothing
        self._handle: Any = None
        self._shown = 0.0

    def start(self) -> None:
        """Show the table, empty."""
        from IPython.display import display  # type: ignore[import-not-found]

        self._handle = display({"text/html": self._page()}, raw=True, display_id=True)

    def stop(self) -> None:
        """Show the table as it is in the end."""
        self._show()

    def update(self, *arguments: Any, **fields: Any) -> None:
        """Change a line of the table, and show it if it wasn't shown just now."""
        super().update(*arguments, **fields)
        if time.monotonic() - self._shown >= PAUSE:
            self._show()

    def _show(self) -> None:
        self._shown = time.monotonic()
        if self._handle is not None:
            self._handle.update({"text/html": self._page()}, raw=True)

    def _page(self) -> str:
        console = Console(file=io.StringIO(), width=WIDTH, record=True, force_jupyter=False, force_terminal=True)
        console.print(self.get_renderable())
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")
