"""Things of installed packages and of modules, found by name.

A package offers one in its pyproject.toml:

    [project.entry-points."quantizers.schemes"]
    ternary = "my_package.ternary:Ternary"
"""

from __future__ import annotations

import importlib
import os
import sys
from importlib.metadata import EntryPoint, entry_points
from typing import Any


def installed(group: str) -> dict[str, EntryPoint]:
    """List the entry points of a group by name, in order; nothing is imported."""
    points = sorted(entry_points(group=group), key=lambda point: (point.name, point.value))
    return {point.name: point for point in points}


def origin(point: EntryPoint) -> str:
    """Name the installed package that an entry point is of, with its version."""
    if point.dist is None:
        return "an installed package"
    return f"{point.dist.name} {point.dist.version}"


def description(point: EntryPoint) -> str:
    """Return one line about an entry point without importing it: its package's summary, or what it stands for."""
    summary = None
    if point.dist is not None:
        summary = point.dist.metadata["Summary"]
    return " ".join((summary or point.value).split())


def names_a_module(name: str) -> bool:
    """Say whether a name has the form `module:Name`; a path or an address has not."""
    module, colon, attribute = name.partition(":")
    parts = [*module.split("."), *attribute.split(".")]
    return bool(colon) and all(part.isidentifier() for part in parts)


def import_attribute(place: str, what: str) -> Any:
    """Import what `module:Name` stands for.

    Args:
        place: The module and the name in it. Modules of the current folder are found too, as with `python -m`.
        what: What is imported, for the message: "scheme 'ternary'".

    Returns:
        What has that name.

    Raises:
        ImportError: In one sentence that begins with `what`, if the module fails or has no such name.
    """
    module_name, _, attribute = place.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
        importlib.invalidate_caches()
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ImportError(f"{what} can't be imported from {place}: {reason}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ImportError(f"{what} can't be imported from {place}: module {module_name} has no {attribute!r}")
        found = getattr(found, part)
    return found
