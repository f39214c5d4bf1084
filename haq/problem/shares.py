"""Which shares of its channels a group may keep, as users write it: "0.25:1", "1,0.75,0.5"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

STEPS = 8  # shares of a range are multiples of 1 / STEPS
SHOWN = 40  # characters of a wrong value in a message
ACCEPTED = "give a range such as 0.25:1 (multiples of 1/8), or shares such as 1,0.75,0.5"


def read_shares(prune: Any) -> tuple[float, ...]:
    """Read the shares of channels that may be kept.

    Args:
        prune: "LOW:HIGH" or a tuple of these two, for the multiples of 1/8 within; or a text "1,0.75,0.5" or a sequence of
            numbers, for just these.

    Returns:
        The shares from small to large; the last is 1.

    Raises:
        ValueError: For shares that aren't beyond 0 and at most 1, without 1, which is always a choice, or without another.
    """
    shown = str(prune)[:SHOWN]
    if isinstance(prune, str):
        low, colon, high = prune.partition(":")
        if colon:
            shares = _within(_number(low, shown), _number(high, shown), shown)
        else:
            shares = [_number(part, shown) for part in prune.split(",")]
    elif isinstance(prune, tuple) and len(prune) == 2:
        shares = _within(_number(prune[0], shown), _number(prune[1], shown), shown)
    elif isinstance(prune, Sequence):
        shares = [_number(part, shown) for part in prune]
    else:
        raise ValueError(f"prune is {shown!r}; {ACCEPTED}")
    found = tuple(sorted(set(shares)))
    if 1.0 not in found:
        raise ValueError(f"prune is {shown!r}, and must reach 1: a group of channels may always keep all of them; {ACCEPTED}")
    if len(found) < 2:
        raise ValueError(f"prune is {shown!r}, which leaves nothing to choose; {ACCEPTED}")
    return found


def shares_words(shares: Sequence[float]) -> str:
    """Write shares as `read_shares` takes them, those of a whole range as such: "0.25:1"."""
    if list(shares) == _multiples(shares[0], shares[-1]):
        return f"{shares[0]:g}:{shares[-1]:g}"
    return ",".join(f"{share:.6g}" for share in reversed(shares))


def _within(low: float, high: float, shown: str) -> list[float]:
    """List the multiples of 1 / STEPS from one share to another."""
    if low > high:
        raise ValueError(f"prune is {shown!r}: the smaller share comes first; {ACCEPTED}")
    return _multiples(low, high)


def _multiples(low: float, high: float) -> list[float]:
    return [step / STEPS for step in range(1, STEPS + 1) if low <= step / STEPS <= high]


def _number(value: Any, shown: str) -> float:
    """Read a share. Raises ValueError for anything but a number beyond 0 and at most 1."""
    number = float("nan")
    if not isinstance(value, bool):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = float("nan")
    if not 0 < number <= 1:
        raise ValueError(
            f"prune is {shown!r}: a share of channels must be a number beyond 0 and at most 1, not "
            f"{str(value).strip()[:SHOWN]!r}; {ACCEPTED}"
        )
    return number
