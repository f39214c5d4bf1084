"""Files from the web, checksummed, kept in one folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

TIMEOUT_S = 60
TRIES = 3


def cache_folder() -> Path:
    """Return where downloaded data sets are kept: $HAQ_DATA, or ~/.cache/haq.

    Returns:
        The folder; it need not exist yet.
    """
    return Path(os.environ.get("HAQ_DATA") or Path.home() / ".cache" / "haq")


def download(url: str, path: Path, checksum: str) -> None:
    """Download a file, with a progress bar, unless it is there already; what was cut short or differs is never kept.

    Args:
        url: Where it is, over http or https.
        path: Where it is put; its folder is made.
        checksum: What it must have: "sha256:..." or "md5:...".

    Raises:
        FileNotFoundError: If it can't be had, with what to do.
        ValueError: If what came isn't the published file.
    """
    import pooch

    pooch.get_logger().setLevel("ERROR")
    store = pooch.create(
        path.parent, base_url="", registry={path.name: checksum}, urls={path.name: url}, retry_if_failed=TRIES - 1
    )
    with _bar() as progress:
        reporting = _Reporting(progress, path.name)
        try:
            store.fetch(path.name, downloader=pooch.HTTPDownloader(progressbar=reporting, timeout=TIMEOUT_S))
        except OSError as error:
            reason = " ".join(str(error).split())
            raise FileNotFoundError(f"{url} could not be downloaded ({reason}); put the file at {path} yourself") from error
        except ValueError as error:
            raise ValueError(
                f"what {url} sent isn't the published file (its checksum differs): try again later, or put the file at "
                f"{path} yourself"
            ) from error


def _bar() -> Progress:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


class _Reporting:
    """What pooch wants of a progress bar, on top of rich's."""

    def __init__(self, progress: Progress, name: str) -> None:
        self._progress = progress
        self._task = progress.add_task(name, total=None)

    def __setattr__(self, name: str, value: Any) -> None:
        # pooch assigns the size once the server has said it.
        super().__setattr__(name, value)
        if name == "total":
            self._progress.update(self._task, total=value)

    def update(self, count: int) -> None:
        self._progress.update(self._task, advance=count)

    def reset(self) -> None:
        self._progress.update(self._task, completed=0)

    def close(self) -> None:
        self._progress.update(self._task, visible=False)
