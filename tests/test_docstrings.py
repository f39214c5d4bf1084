"""Public names say what they do: a verb first, a full stop in the end, what each parameter is, and which errors they raise.

What users call first, the names of the FACES and the methods of their classes, says all of that in sections. Other public
names have Args and Returns from three parameters up, and name the errors that they raise in a section or in a sentence.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

PACKAGES = ("haq", "envs", "hw_models", "quantizers")
FACES = (
    *("haq", "quantizers", "hw_models", "envs", "haq.deploy", "haq.training", "haq.attacks", "haq.networks", "haq.data"),
    *("haq.solvers", "haq.problem"),
)
MANY = 3  # parameters from which on each is described, of what isn't a face's
# How a sentence begins that names a thing, where it should say what is done. Ruff's D401 knows more of these words, but asks
# private functions too.
NOT_A_VERB = {
    *("a", "all", "an", "and", "as", "each", "every", "for", "how", "if", "in", "it", "its", "no", "of", "on", "one", "some"),
    *("that", "the", "there", "these", "this", "two", "what", "when", "where", "whether", "which", "who", "whose", "with"),
}
GIVES_NOTHING = (None, "None", "NoReturn", "Never", "Iterator[None]", inspect.Signature.empty)


def modules(package: str) -> Iterator[Any]:
    """Import a package's modules, but for what runs when it is imported."""
    face = importlib.import_module(package)
    yield face
    for found in pkgutil.walk_packages(face.__path__, f"{package}."):
        if not any(part.startswith("_") for part in found.name.split(".")):
            yield importlib.import_module(found.name)


def public_names(package: str) -> Iterator[tuple[str, Any, type | None]]:
    """Go through the functions, classes and methods that a package defines: name, what it is, the class of a method."""
    for module in modules(package):
        for name, thing in vars(module).items():
            ours = getattr(thing, "__module__", None) == module.__name__ and getattr(thing, "__name__", name) == name
            if name.startswith("_") or not name.isidentifier() or not ours:
                continue
            where = f"{module.__name__}:{name}"
            if inspect.isclass(thing):
                yield where, thing, None
                for method, made in own_methods(thing):
                    yield f"{where}.{method}", made, thing
            elif function := plain(thing):
                yield where, function, None


def plain(thing: Any) -> Callable[..., Any] | None:
    """Find the function inside a method, a property, a cache or a context manager; None where there is none."""
    if isinstance(thing, (staticmethod, classmethod)):
        thing = thing.__func__
    thing = inspect.unwrap(thing) if callable(thing) else thing
    return thing if inspect.isfunction(thing) else None


def own_methods(kind: type) -> Iterator[tuple[str, Any]]:
    """List what a class does that no base of it did before: whoever overrides a method keeps its promise, and its words."""
    for name, thing in vars(kind).items():
        inherited = any(name in vars(base) for base in kind.__mro__[1:] if base is not object)
        is_field = name in getattr(kind, "__dataclass_fields__", ())
        if inherited or is_field or (name.startswith("_") and name != "__init__"):
            continue
        if isinstance(thing, property) or plain(thing):
            yield name, thing


def parameters(function: Callable[..., Any]) -> list[str]:
    """List what a function is given, but for the object that it is a method of."""
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


@functools.cache
def faces() -> frozenset[int]:
    """Collect what users call first, by identity: the names of the faces, and the classes that these are made from."""
    found = set()
    for name in FACES:
        face = importlib.import_module(name)
        offered = getattr(face, "__all__", None)
        if offered is None:
            offered = [
                one for one, thing in vars(face).items() if getattr(thing, "__module__", None) == name and one[0] != "_"
            ]
        for thing in (getattr(face, one) for one in offered):
            found.add(id(thing))
            if inspect.isclass(thing):
                found.update(id(base) for base in thing.__mro__ if base.__module__.startswith(PACKAGES))
    return frozenset(found)


@functools.cache
def functions_of(file: str) -> dict[int, ast.FunctionDef]:
    """Read a file's functions, by the line that each begins in; none of what is no file."""
    if not Path(file).is_file():
        return {}
    nodes = [node for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)]
    return {min([node.lineno, *(one.lineno for one in node.decorator_list)]): node for node in nodes}


def raised(function: Callable[..., Any]) -> tuple[bool, set[str]]:
    """Tell what a function's own body raises.

    Args:
        function: The function.

    Returns:
        Whether it raises anything that its caller sees; and the names of the classes that surely come out, which those don't
        that are raised within a `try` or a `with`, where they may become another.
    """
    code = inspect.unwrap(function).__code__
    body = functions_of(code.co_filename).get(code.co_firstlineno)
    if body is None or not inspect.unwrap(function).__module__.startswith((*PACKAGES, "tests")):
        return False, set()  # a dataclass or a protocol writes functions that are in no file
    names: set[str] = set()
    said = False

    def look(node: ast.AST, caught: bool) -> None:
        nonlocal said
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.Lambda, ast.ClassDef)):
                continue
            if isinstance(child, ast.Raise) and child.exc is not None:
                error = child.exc.func if isinstance(child.exc, ast.Call) else child.exc
                name = ast.unparse(error)
                if name in ("NotImplementedError", "AssertionError"):  # what is abstract, and what can't happen
                    continue
                said = True
                if not caught and name[0].isupper():
                    names.add(name.rpartition(".")[2])
            inside = isinstance(node, ast.Try) and child in node.body and bool(node.handlers)
            look(child, caught or inside or isinstance(child, ast.With))

    look(body, False)
    return said, names


def wanting(where: str, thing: Any, owner: type | None) -> Iterator[str]:
    """Say what a public name's docstring lacks."""
    text = inspect.cleandoc(getattr(thing, "__doc__", None) or "")
    is_face = bool({id(thing), id(owner)} & faces())
    if where.endswith(".__init__"):
        # What an object is made of is said by its class or here; a dataclass says it by its fields.
        text = f"{inspect.cleandoc(owner.__doc__ or '')}\n{text}"
        if not hasattr(owner, "__dataclass_fields__"):
            yield from wanting_sections(text, thing, is_face, returns=False)
        return
    if not text or text.startswith(f"{getattr(thing, '__name__', '')}("):  # what Python itself writes for a named tuple
        yield "has no docstring"
        return
    summary = text.partition("\n\n")[0]
    if not summary.endswith((".", ":")):
        yield f"says {summary!r}, which has no full stop"
    if inspect.isclass(thing):
        check = vars(thing).get("__post_init__")
        if check is not None:
            yield from wanting_errors(text, check, is_face)
        return
    function = plain(thing)
    if function is None:
        if isinstance(thing, property) and thing.fget is not None:
            yield from wanting_errors(text, thing.fget, is_face)
        return
    first = re.split(r"[\s,:;.]", summary, maxsplit=1)[0].lower()
    if first in NOT_A_VERB:
        yield f"says {summary.splitlines()[0]!r}, which begins with no verb"
    gives = function.__annotations__.get("return") not in GIVES_NOTHING
    yield from wanting_sections(text, function, is_face, returns=gives)


def wanting_sections(text: str, function: Any, is_face: bool, returns: bool) -> Iterator[str]:
    """Say which sections are missing from the docstring of a function.

    Args:
        text: The docstring.
        function: The function.
        is_face: Whether it is one that users call first.
        returns: Whether it returns something.

    Yields:
        What is missing.
    """
    function = plain(function) or function
    names = parameters(function)
    asked = is_face or len(names) >= MANY
    if asked and names and not re.search(r"^Args:$", text, re.MULTILINE):
        yield f"has {len(names)} parameters and no Args"
    if asked and returns and not re.search(r"^(Returns|Yields):$", text, re.MULTILINE):
        yield f"has {len(names)} parameters and no Returns"
    _, begun, arguments = text.partition("\nArgs:\n")
    if begun:
        listed = re.split(r"\n\n\S", arguments)[0]
        for name in names:
            if not re.search(rf"^ +[^:]*\b{name}\b[^:]*:", listed, re.MULTILINE):
                yield f"doesn't say what {name!r} is"
    yield from wanting_errors(text, function, is_face)


def wanting_errors(text: str, function: Any, is_face: bool) -> Iterator[str]:
    """Say which errors that a function raises its docstring doesn't name.

    Args:
        text: The docstring.
        function: The function.
        is_face: Whether they must stand in a section, where a sentence does for others.

    Yields:
        What is missing.
    """
    raises, names = raised(function)
    _, section, told = text.partition("\nRaises:\n")
    if raises and not section and (is_face or not re.search(r"\b[Rr]aises?\b|Error\b", text)):
        yield "raises an error and has no Raises"
    elif missing := sorted(name for name in names if not re.search(rf"\b{name}\b", told or text)):
        yield f"raises {', '.join(missing)} and doesn't say so"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of libraries, when everything is imported
@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_say_what_they_do(package: str) -> None:
    names = list(public_names(package))
    assert names
    missing = [f"{where} {sentence}" for where, thing, owner in names for sentence in wanting(where, thing, owner)]
    assert not missing, f"{len(missing)}:\n" + "\n".join(missing)


def test_what_a_docstring_lacks_is_seen() -> None:
    def good(a: int, b: int, c: int) -> int:
        """Add numbers.

        Args:
            a: A number.
            b: Another.
            c: One more.

        Returns:
            Their sum.
        """
        return a + b + c

    def bad(a: int, b: int, c: int) -> int:
        """The sum of numbers"""
        return a + b + c

    def raising(a: int) -> int:
        """Return a number."""
        if a < 0:
            raise ValueError("it is below 0")
        return a

    def prose(a: int) -> int:
        """Return a number. Raises ValueError for one below 0."""
        if a < 0:
            raise ValueError("it is below 0")
        if a > 9:
            raise TypeError("it is above 9")
        return a

    assert list(wanting("good", good, None)) == []
    assert list(wanting("raising", raising, None)) == ["raises an error and has no Raises"]
    assert list(wanting("prose", prose, None)) == ["raises TypeError and doesn't say so"]
    assert [sentence.partition(",")[0] for sentence in wanting("bad", bad, None)] == [
        "says 'The sum of numbers'",
        "says 'The sum of numbers'",
        "has 3 parameters and no Args",
        "has 3 parameters and no Returns",
    ]
