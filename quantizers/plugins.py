"""Things of installed packages and of modules, found by name.

A package offers one in its pyproject.toml:

    [project.entry-points."quantizers.schemes"]
    ternary = "my_package.ternary:Ternary"
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
import sys
from collections.abc import Mapping
from importlib.metadata import Distribution, EntryPoint, distributions, entry_points
from typing import Any, NamedTuple


class PluginRow(NamedTuple):
    """A name by which something can be given, where it comes from, and one line about it."""

    name: str
    origin: str  # "built in", or the installed package with its version
    line: str


def is_ours(kind: type) -> bool:
    """Say whether a class is of this package."""
    return kind.__module__.partition(".")[0] == __name__.partition(".")[0]


def rows_of(known: Mapping[str, Any], group: str) -> list[PluginRow]:
    """List all that is known or installed, with where it comes from and a line each; no plug-in is imported.

    Args:
        known: Classes with a `summary`, by name.
        group: The group of entry points of such classes.

    Returns:
        A row for each name.
    """
    points = installed(group)
    offered = {point.name for point in points}
    rows = []
    for name, kind in known.items():
        if is_ours(kind):
            rows.append(PluginRow(name, "built in", kind.summary))
        elif name not in offered:
            rows.append(PluginRow(name, kind.__module__, kind.summary))
    taken = {row.name for row in rows}
    for point in points:
        line = description(point)
        if point.name in taken:
            line = f"not used, the name is taken: give {place(point)}"
        rows.append(PluginRow(point.name, origin(point), line))
    return rows


def unknown(kind: str, name: str, names: list[str], modules: bool) -> str:
    """Say which names are close to one that nothing has, and what can be given at all.

    Args:
        kind: What is looked for, in words: "scheme".
        name: What was given.
        names: All that there are.
        modules: Whether `module:Name` would be imported.

    Returns:
        The sentence.
    """
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.3)
    hint = ";"
    if close:
        hint = f"; did you mean {' or '.join(close)}?"
    sentence = f"unknown {kind} {name!r}{hint} known: {', '.join(names)}"
    if modules:
        return f"{sentence}, or module:Name"
    if names_a_module(name):
        return f"{sentence}; a module is only imported if you name it yourself, never because a file does"
    return sentence


def installed(group: str) -> list[EntryPoint]:
    """List the entry points of a group, in the order of their names; nothing is imported."""
    try:
        points = list(entry_points(group=group))
    except Exception:
        points = _of_sound_packages(group)
    sound = [point for point in points if _is_sound(point) and _is_installed(point)]
    return sorted(sound, key=lambda point: (point.name, point.value))


def find_installed(group: str, name: str, kind: str) -> EntryPoint | None:
    """Find an entry point by name; nothing is imported.

    Args:
        group: The group that it is of.
        name: Its name.
        kind: What it is, for the message: "scheme".

    Returns:
        The entry point; None if there is none.

    Raises:
        ValueError: If several packages offer one of that name.
    """
    points = [point for point in installed(group) if point.name == name]
    if len(points) > 1:
        origins = " and ".join(origin(point) for point in points)
        raise ValueError(f"{kind} {name!r} is offered by {origins}: give {place(points[0])}, or uninstall one")
    return next(iter(points), None)


def place(point: EntryPoint) -> str:
    """Return what an entry point stands for, as `module:Name`."""
    return f"{point.module}:{point.attr}"


def origin(point: EntryPoint) -> str:
    """Name the installed package that an entry point is of, with its version."""
    if point.dist is None:
        return "an installed package"
    try:
        version = point.dist.version
    except Exception:
        version = None
    if not version:
        return f"{_name_of(point.dist)}, whose METADATA is broken"
    return f"{_name_of(point.dist)} {version}"


def description(point: EntryPoint) -> str:
    """Return one line about an entry point without importing it: its package's summary, or what it stands for."""
    summary = None
    if point.dist is not None:
        try:
            summary = point.dist.metadata["Summary"]
        except Exception:
            summary = None
    return " ".join((summary or point.value).split())


def names_a_module(name: str) -> bool:
    """Say whether a name has the form `module:Name`; a path or an address has not."""
    module, colon, attribute = name.partition(":")
    parts = [*module.split("."), *attribute.split(".")]
    return bool(colon) and all(part.isidentifier() for part in parts)


def look_into_current_folder() -> None:
    """Let modules of the current folder be imported too; none takes the place of an installed one."""
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    # A file may be younger than what Python remembers of the folder.
    importlib.invalidate_caches()


def import_attribute(name: str, what: str) -> Any:
    """Import what `module:Name` stands for.

    Args:
        name: The module and the name in it, which may have dots.
        what: What is imported, for the message: "scheme 'ternary'".

    Returns:
        What has that name.

    Raises:
        ValueError: For a module of Python itself, which isn't imported.
        ImportError: In one sentence that begins with `what`, if the module fails or has no such
            name.
    """
    module_name, _, attribute = name.partition(":")
    if module_name.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(f"{what} can't be imported: {name} is of Python itself; give module:Name")
    try:
        found: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ImportError(f"{what} can't be imported from {name}: {reason}") from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ImportError(f"{what} can't be imported from {name}: module {module_name} has no {attribute!r}")
        found = getattr(found, part)
    return found


def _of_sound_packages(group: str) -> list[EntryPoint]:
    """List the entry points of the packages that can be read, and warn of the others."""
    points: list[EntryPoint] = []
    seen: set[str] = set()
    for package in distributions():
        name = _name_of(package)
        # The first of a name is the one that is imported.
        if name in seen:
            continue
        seen.add(name)
        try:
            points += package.entry_points.select(group=group)
        except Exception as error:
            _warn_of(f"installed package {name} is broken and left out, its entry_points.txt can't be read: {error}")
    return points


def _is_sound(point: EntryPoint) -> bool:
    """Say whether an entry point has the form module:Name; warn of one that hasn't."""
    try:
        return bool(point.module)
    except Exception:
        _warn_of(f"{point.name!r} of {origin(point)} is left out: it stands for {point.value!r}, which is no module:Name")
        return False


def _is_installed(point: EntryPoint) -> bool:
    """Say whether an entry point is of an installed package, not of something that lies in the current folder."""
    try:
        here = os.path.realpath(os.curdir)
    except OSError:  # somebody deleted it
        return True
    return point.dist is None or os.path.realpath(str(point.dist.locate_file(""))) != here


def _name_of(package: Distribution) -> str:
    """Name an installed package; one whose METADATA can't be read, by its folder."""
    try:
        name = package.name
    except Exception:
        name = ""
    folder: Any = getattr(package, "_path", package.locate_file(""))
    return name or str(folder.name)


def _warn_of(sentence: str) -> None:
    """Log a warning, once in a process."""
    logger = logging.getLogger("haq")
    # `hw_models.registry` finds the same packages.
    said = vars(logger).setdefault("said_of_packages", set())
    if sentence not in said:
        said.add(sentence)
        logger.warning("%s", sentence.encode("unicode_escape").decode())
