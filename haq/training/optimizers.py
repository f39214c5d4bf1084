"""Names of optimizers and schedules of the learning rate: our own, and all of torch's that fit into the one training loop.

Torch is imported only when a name isn't one of our own.
"""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

OPTIMIZERS = ("sgd", "adam")  # beside those of torch, by the names of their classes
SCHEDULES = ("cosine", "linear", "step", "constant")  # of the learning rate; beside those of torch
USUAL_RATE = 1e-3
# What the loop can't give them: a closure, sparse gradients.
OTHER_OPTIMIZERS = ("Optimizer", "LBFGS", "SparseAdam")
# What can't be said in words: functions, and schedulers made of others.
OTHER_SCHEDULERS = ("LRScheduler", "_LRScheduler", "LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler")


def check_optimizer(name: str) -> None:
    """Raise ValueError unless there is an optimizer of a name, naming those that there are."""
    if name not in OPTIMIZERS:
        optimizer_class(name)


def check_schedule(text: str) -> None:
    """Raise ValueError unless there is a schedule of a name, which may have arguments, naming those that there are."""
    if text not in SCHEDULES:
        scheduler_class(text)


def torch_optimizers() -> list[str]:
    """List the optimizers of torch that can train here."""
    import torch

    return _classes(torch.optim, torch.optim.Optimizer, OTHER_OPTIMIZERS)


def torch_schedulers() -> list[str]:
    """List the schedulers of torch that can be had by name."""
    from torch.optim import lr_scheduler

    return _classes(lr_scheduler, lr_scheduler.LRScheduler, OTHER_SCHEDULERS)


def _classes(module: Any, base: type, others: Sequence[str]) -> list[str]:
    found = [name for name, made in vars(module).items() if isinstance(made, type) and issubclass(made, base)]
    return sorted(name for name in found if name not in others)


def optimizer_class(name: str) -> type[Optimizer]:
    """Return the class of torch's optimizers that a name, in upper or lower case, is of.

    Raises:
        ValueError: If there is none, with those that there are.
    """
    import torch

    known = torch_optimizers()
    found = _find(name, known)
    if found is None:
        why = ""
        if name in OTHER_OPTIMIZERS:
            why = " (it takes a loss that is computed anew within a step, or sparse gradients)"
        raise ValueError(f"unknown optimizer {name!r}{why}; known: {_listed(OPTIMIZERS, known)}{_close(name, known)}")
    made: type[Optimizer] = getattr(torch.optim, found)
    return made


def usual_rate(name: str) -> float:
    """Return the learning rate that a class of torch's optimizers has as its default."""
    given = inspect.signature(optimizer_class(name)).parameters["lr"].default
    if isinstance(given, (int, float)):
        return float(given)
    return USUAL_RATE


def scheduler_class(text: str) -> tuple[type[LRScheduler], dict[str, Any]]:
    """Read the name of one of torch's schedulers, with arguments: "StepLR,step_size=10,gamma=0.5".

    Args:
        text: The name and the arguments.

    Returns:
        The class, and the arguments by name.

    Raises:
        ValueError: For an unknown name, with those that there are, and for arguments that it doesn't take.
    """
    from torch.optim import lr_scheduler

    name, *given = split_at_commas(text)
    known = torch_schedulers()
    found = _find(name, known)
    if found is None:
        why = ""
        if name in OTHER_SCHEDULERS:
            why = " (it is made of functions or of other schedulers)"
        raise ValueError(f"unknown schedule {name!r}{why}; known: {_listed(SCHEDULES, known)}{_close(name, known)}")
    made: type[LRScheduler] = getattr(lr_scheduler, found)
    taken = [one for one in inspect.signature(made).parameters if one not in ("optimizer", "last_epoch", "scale_fn")]
    arguments: dict[str, Any] = {}
    for part in given:
        key, is_set, value = part.partition("=")
        if not is_set or key.strip() not in taken:
            raise ValueError(f"schedule {text!r} has {part!r}; {found} takes {', '.join(f'{one}=' for one in taken)}")
        arguments[key.strip()] = argument_value(value.strip(), f"schedule {text!r}")
    return made, arguments


def _find(name: str, known: Sequence[str]) -> str | None:
    if name in known:
        return name
    by_lower = {one.lower(): one for one in known}
    return by_lower.get(str(name).lower())


def _listed(own: Sequence[str], of_torch: Sequence[str]) -> str:
    return f"{', '.join(own)}, and of torch {', '.join(of_torch)}"


def _close(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), known, 1)
    if not close:
        return ""
    return f"; did you mean {close[0]}?"


def split_at_commas(text: str) -> list[str]:
    """Divide at commas that aren't within brackets: "MultiStepLR,milestones=[10,20]"."""
    parts = [""]
    depth = 0
    for letter in str(text):
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def argument_value(text: str, whole: str) -> Any:
    """Read the value of an argument: a number, a name or a list.

    Args:
        text: As it is written.
        whole: What it is an argument of, to begin the message: "schedule 'StepLR,gamma=x y'".

    Returns:
        The value; a name, such as `linear`, is a text.

    Raises:
        ValueError: For anything else.
    """
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if text.isidentifier():
            return text  # anneal_strategy=linear
        raise ValueError(f"{whole} has the value {text!r}; it must be a number, a name or a list") from None
