"""Public names say what they do: a verb first, a full stop in the end, and from three parameters up what each one is."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

PACKAGES = ("haq", "envs", "hw_models", "quantizers")
MANY = 3  # parameters from which on each is described
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


def wanting(where: str, thing: Any, owner: type | None) -> Iterator[str]:
    """Say what a public name's docstring lacks."""
    text = inspect.cleandoc(getattr(thing, "__doc__", None) or "")
    if where.endswith(".__init__"):
        # What an object is made of is said by its class or here; a dataclass says it by its fields.
        text = f"{inspect.cleandoc(owner.__doc__ or '')}\n{text}"
        if not hasattr(owner, "__dataclass_fields__"):
            yield from wanting_sections(text, thing, returns=False)
        return
    if not text or text.startswith(f"{getattr(thing, '__name__', '')}("):  # what Python itself writes for a named tuple
        yield "has no docstring"
        return
    summary = text.partition("\n\n")[0]
    if not summary.endswith((".", ":")):
        yield f"says {summary!r}, which has no full stop"
    function = plain(thing)
    if inspect.isclass(thing) or function is None:
        return
    first = re.split(r"[\s,:;.]", summary, maxsplit=1)[0].lower()
    if first in NOT_A_VERB:
        yield f"says {summary.splitlines()[0]!r}, which begins with no verb"
    yield from wanting_sections(text, function, returns=function.__annotations__.get("return") not in GIVES_NOTHING)


def wanting_sections(text: str, function: Any, returns: bool) -> Iterator[str]:
    """Say which sections are missing from the docstring of a function of many parameters."""
    names = parameters(plain(function) or function)
    if len(names) < MANY:
        return
    if not re.search(r"^Args:$", text, re.MULTILINE):
        yield f"has {len(names)} parameters and no Args"
    if returns and not re.search(r"^(Returns|Yields):$", text, re.MULTILINE):
        yield f"has {len(names)} parameters and no Returns"


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

    assert list(wanting("good", good, None)) == []
    assert [sentence.partition(",")[0] for sentence in wanting("bad", bad, None)] == [
        "says 'The sum of numbers'",
        "says 'The sum of numbers'",
        "has 3 parameters and no Args",
        "has 3 parameters and no Returns",
    ]
