"""Things found by name: our own, those of installed packages, and `module:Name` from the current folder.

    SOLVERS = Registry(
        "solver",
        "haq.solvers",
        {"greedy": ("haq.solvers.greedy:Greedy", "take away the bits that hurt least, one at a time")},
        check=requires("solve"),
    )
    SOLVERS.get("greedy")       # imports haq.solvers.greedy
    SOLVERS.get("mine:Solver")  # imports mine.py of the current folder

A package offers more in its pyproject.toml, and need not import this module:

    [project.entry-points."haq.solvers"]
    annealing = "my_package.annealing:Annealing"

Listing imports nothing, and neither does this module: no torch, no NumPy. Whose names `module:Name` are imported at all is
the rule of `hw_models.trust`.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import Distribution, EntryPoint, distributions, entry_points
from typing import Any, Generic, NamedTuple, TypeVar

from hw_models import trust

Thing = TypeVar("Thing")
BUILT_IN = "built in"
MOST_SHOWN = 200  # characters of a name in a message


class Row(NamedTuple):
    """A name that can be given, where it comes from, and one line about it."""

    name: str
    origin: str  # "built in", or the installed package with its version
    line: str


class Registry(Generic[Thing]):
    """Named things of one kind, each imported only when it is asked for."""

    def __init__(
        self,
        kind: str,
        group: str,
        builtin: Mapping[str, tuple[str | Thing, str | Callable[[], str]]],
        *,
        check: Callable[[Any], str] | None = None,
        forms: Mapping[str, str] | None = None,
    ) -> None:
        """Describe what there is; nothing is imported.

        Args:
            kind: What the things are called in messages, in the singular: "solver".
            group: The group of entry points in which installed packages offer more: "haq.solvers".
            builtin: Our own by name: "package.module:attribute", or the thing itself, and one line about it, or what
                returns that line when it is wanted.
            check: Says what a thing lacks, in words that continue "it lacks"; empty text for nothing. See `requires`.
            forms: Other forms of a name, which the caller handles before it asks here, with a line about each:
                {"timm:NAME": "a network of timm"}. What stands before a colon is then never taken for a module.
        """
        self.kind = kind
        self.group = group
        self._builtin = dict(builtin)
        self._check = check
        self._forms = dict(forms or {})

    def __repr__(self) -> str:
        """Name what there is, on one line."""
        return f"Registry({self.kind}: {', '.join(map(printable, self.names()))})"

    def __iter__(self) -> Iterator[str]:
        """Go through the names."""
        return iter(self.names())

    def __contains__(self, name: object) -> bool:
        """Say whether a name is ours or an installed package's."""
        return name in self.names()

    def names(self) -> tuple[str, ...]:
        """List our own names and those of installed packages; nothing is imported.

        Returns:
            The names, our own first.
        """
        return tuple(dict.fromkeys([*self._builtin, *(point.name for point in self._installed())]))

    def rows(self) -> list[Row]:
        """List what can be given: our own, the other forms of a name, and what is installed; nothing is imported.

        Returns:
            A row for each, with its origin and a line.
        """
        own = []
        for name, (_, line) in self._builtin.items():
            if callable(line):
                line = line()
            own.append(Row(name, BUILT_IN, line))
        forms = [Row(form, BUILT_IN, line) for form, line in self._forms.items()]
        installed = []
        for point in self._installed():
            line = _summary(point)
            if point.name in self._builtin:
                line = f"not used, the name is taken: give {point.value}"
            installed.append(Row(printable(point.name), _origin(point), line))
        return own + forms + installed

    def get(self, name: str, modules: bool = True) -> Thing:
        """Import and return the thing of a name: our own, then an installed one, then `module:Name`.

        Args:
            name: The name.
            modules: Whether `module:Name` may be imported. False for a name that no person gave, such as one from a file.

        Returns:
            The thing.

        Raises:
            ValueError: For an unknown name, with those that are close; for a thing that lacks something, naming it.
            ImportError: For a thing of somebody else's that can't be imported, with the reason.
        """
        thing = self._find(name, modules)
        if self._check and (lacking := self._check(thing)):
            raise ValueError(f"{self.kind} {name!r} can't be used: it lacks {lacking}")
        return thing

    def _find(self, name: str, modules: bool) -> Any:
        if name in self._builtin:
            return self._own(name)
        points = [point for point in self._installed() if point.name == name]
        if len(points) > 1:
            origins = " and ".join(_origin(point) for point in points)
            raise ValueError(f"{self.kind} {name!r} is offered by {origins}: give {points[0].value} or uninstall one")
        if points:
            module, attribute = points[0].module, points[0].attr
            return _import(module, attribute, f"{self.kind} {name!r} of {_origin(points[0])}")
        if modules and self.is_code(name):
            try:
                return import_by_name(name, self.kind)
            except _NoModuleError as error:
                raise ValueError(printable(f"{error}; {self._known(name, modules)}")) from error
        sentence = f"unknown {self.kind} {name[:MOST_SHOWN]!r}; {self._known(name[:MOST_SHOWN], modules)}"
        if not modules and self.is_code(name):
            sentence += "; a module is only imported if you name it yourself, never because a file does"
        raise ValueError(printable(sentence))

    def is_code(self, name: str) -> bool:
        """Say whether a name would be imported as `module:Name`: no registered one, and no other form of a name.

        Args:
            name: What a user gave.

        Returns:
            Whether it is `module:Name` and nothing that is known.
        """
        return _is_module_name(name) and name not in self and not self._is_form(name)

    def _own(self, name: str) -> Any:
        place, _ = self._builtin[name]
        if not isinstance(place, str):
            return place
        module, _, attribute = place.partition(":")
        # What goes wrong in here is no plug-in's fault, and is raised as it is.
        return getattr(importlib.import_module(module), attribute)

    def _installed(self) -> tuple[EntryPoint, ...]:
        return _entry_points(self.group, tuple(sys.path), _here())

    def _is_form(self, name: str) -> bool:
        before = name.partition(":")[0]
        return any(":" in form and form.partition(":")[0] == before for form in self._forms)

    def _known(self, name: str, modules: bool) -> str:
        """Say which names are close to one that nothing has, and what can be given at all."""
        candidates = {known.partition(":")[0]: known for known in (*self.names(), *self._forms)}
        close = difflib.get_close_matches(name.partition(":")[0], candidates, n=3, cutoff=0.41)
        meant = " or ".join(candidates[start] for start in close) or "one of these"
        ways = [*self.names(), *self._forms]
        if modules:
            ways.append("module:Name")
        return f"did you mean {meant}? Known: {join_words(ways, 'or')}"


def requires(*attributes: str) -> Callable[[Any], str]:
    """Make a `check` for `Registry` that names the attributes and methods that a thing doesn't have."""

    def check(thing: Any) -> str:
        return join_words([name for name in attributes if not hasattr(thing, name)])

    return check


def import_by_name(name: str, kind: str) -> Any:
    """Import `module:Name`; the current folder can be imported from, as with `python -m`.

    Args:
        name: The module and, after a colon, what is wanted of it, which may have dots.
        kind: What it is for, in the singular, for messages: "network".

    Returns:
        What has that name.

    Raises:
        ValueError: For what is no such name, for a module of Python itself, for one that isn't there, for one without that
            attribute, naming the close ones, and within a command for one that wasn't typed.
        ImportError: For a module that fails while it is imported, with the reason.
    """
    module_name, _, attribute = name.partition(":")
    if not _is_module_name(name):
        raise ValueError(f"{name!r} is no known {kind}, and no module:Name either")
    if trust.of_python_itself(name):
        raise ValueError(f"{name!r} is of Python itself, where there is no {kind}; give module:Name")
    trust.allow(name, kind)
    # At the end: what lies in the current folder takes the place of nothing that is installed.
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    # The file may be younger than what Python remembers of the folder.
    importlib.invalidate_caches()
    try:
        return _import(module_name, attribute, f"{kind} {name!r}")
    except ImportError as error:
        if error.name and f"{module_name}.".startswith(f"{error.name}."):
            sentence = f"{kind} {name!r} is no known name, and no module {error.name!r} can be imported"
            raise _NoModuleError(sentence) from error
        raise


def printable(text: str) -> str:
    """Escape what would break a line or steer a terminal."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


def join_words(words: list[str], last: str = "and") -> str:
    """Join words as a sentence does: "a, b and c"."""
    if len(words) < 2:
        return "".join(words)
    return f"{', '.join(words[:-1])} {last} {words[-1]}"


class _NoModuleError(ValueError):
    """There is no such module; a registry adds the names that may have been meant."""


def _is_module_name(name: str) -> bool:
    """Whether a name has the form `module:Name`. A path or an address has not."""
    module_name, _, attribute = name.partition(":")
    parts = [*module_name.split("."), *attribute.split(".")]
    return all(part.replace("-", "_").isidentifier() for part in parts)


def _import(module_name: str, attribute: str, what: str) -> Any:
    """Import an attribute (none: the module itself); `what` begins the sentence if that fails."""
    try:
        thing: Any = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        missing = None
        if isinstance(error, ModuleNotFoundError):
            missing = error.name
        raise ImportError(printable(f"{what} can't be imported: {reason}"), name=missing) from error
    for part in filter(None, attribute.split(".")):
        found = getattr(thing, part, None)
        if found is None:
            close = difflib.get_close_matches(part, dir(thing), n=3)
            sentence = f"{what}: module {module_name} has no {attribute!r}; close: {', '.join(close) or 'nothing'}"
            raise ValueError(printable(sentence))
        thing = found
    return thing


# Reading what all packages offer takes milliseconds, once for every folder that Python looks into.
@functools.cache
def _entry_points(group: str, path: tuple[str, ...], here: str) -> tuple[EntryPoint, ...]:
    try:
        points = list(entry_points(group=group))
    except Exception:
        points = _of_sound_packages(group)
    sound = [point for point in points if _is_sound(point) and _is_installed(point, here)]
    return tuple(sorted(sound, key=lambda point: (point.name, point.value)))


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
        _warn_of(f"{point.name!r} of {_origin(point)} is left out: it stands for {point.value!r}, which is no module:Name")
        return False


def _is_installed(point: EntryPoint, here: str) -> bool:
    """Say whether an entry point is of an installed package, not of something that lies in the current folder."""
    return point.dist is None or os.path.realpath(str(point.dist.locate_file(""))) != here


def _here() -> str:
    """Return the current folder; empty text if somebody deleted it."""
    try:
        return os.path.realpath(os.curdir)
    except OSError:
        return ""


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
    # Schemes are looked for by other code, which finds the same packages.
    said = vars(logger).setdefault("said_of_packages", set())
    if sentence not in said:
        said.add(sentence)
        logger.warning("%s", printable(sentence))


def _origin(point: EntryPoint) -> str:
    if point.dist is None:
        return "an installed package"
    try:
        version = point.dist.version
    except Exception:
        version = None
    if not version:
        return printable(f"{_name_of(point.dist)}, whose METADATA is broken")
    return printable(f"{_name_of(point.dist)} {version}")


def _summary(point: EntryPoint) -> str:
    summary = None
    if point.dist is not None:
        try:
            summary = point.dist.metadata["Summary"]
        except Exception:
            summary = None
    return printable(" ".join((summary or "").split()) or point.value)
