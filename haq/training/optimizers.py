"""Optimizers and schedules of the learning rate by name: our own, and all of torch's that fit into the one training loop."""

from __future__ import annotations

import ast
import difflib
import inspect
import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from haq.training.config import OPTIMIZERS, SCHEDULES, TrainConfig

WARMUP_STEPS = 200  # at most; a tenth of all steps where that is fewer
USUAL_RATE = 1e-3
# What the loop can't give them: a closure, sparse gradients.
OTHER_OPTIMIZERS = ("Optimizer", "LBFGS", "SparseAdam")
# What can't be said in words: functions, and schedulers made of others.
OTHER_SCHEDULERS = ("LRScheduler", "_LRScheduler", "LambdaLR", "MultiplicativeLR", "SequentialLR", "ChainedScheduler")
BY_BATCH = ("OneCycleLR", "CyclicLR")  # the others step after every epoch, as torch's documentation shows them
FALL = 0.01  # of the learning rate over a whole training, for a schedule that falls exponentially


def torch_optimizers() -> list[str]:
    """List the optimizers of torch that can train here."""
    return _classes(torch.optim, Optimizer, OTHER_OPTIMIZERS)


def torch_schedulers() -> list[str]:
    """List the schedulers of torch that can be had by name."""
    return _classes(lr_scheduler, LRScheduler, OTHER_SCHEDULERS)


def _classes(module: Any, base: type, others: Sequence[str]) -> list[str]:
    found = [name for name, made in vars(module).items() if isinstance(made, type) and issubclass(made, base)]
    return sorted(name for name in found if name not in others)


def optimizer_class(name: str) -> type[Optimizer]:
    """Return the class of torch's optimizers that a name, in upper or lower case, is of.

    Raises:
        ValueError: If there is none, with those that there are.
    """
    known = torch_optimizers()
    found = _find(name, known)
    if found is None:
        why = ""
        if name in OTHER_OPTIMIZERS:
            why = " (it takes a loss that is computed anew within a step, or sparse gradients)"
        raise ValueError(
            f"unknown optimizer {name!r}{why}; known: {', '.join(OPTIMIZERS)}, and of torch {', '.join(known)}{_close(name, known)}"
        )
    made: type[Optimizer] = getattr(torch.optim, found)
    return made


def default_rate(name: str) -> float:
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
    name, *given = _parts(text)
    known = torch_schedulers()
    found = _find(name, known)
    if found is None:
        why = ""
        if name in OTHER_SCHEDULERS:
            why = " (it is made of functions or of other schedulers)"
        raise ValueError(
            f"unknown schedule {name!r}{why}; known: {', '.join(SCHEDULES)}, and of torch {', '.join(known)}{_close(name, known)}"
        )
    made: type[LRScheduler] = getattr(lr_scheduler, found)
    taken = [one for one in inspect.signature(made).parameters if one not in ("optimizer", "last_epoch", "scale_fn")]
    arguments: dict[str, Any] = {}
    for part in given:
        key, is_set, value = part.partition("=")
        if not is_set or key.strip() not in taken:
            raise ValueError(f"schedule {text!r} has {part!r}; {found} takes {', '.join(f'{one}=' for one in taken)}")
        arguments[key.strip()] = _value(value.strip(), text)
    return made, arguments


def _find(name: str, known: Sequence[str]) -> str | None:
    if name in known:
        return name
    by_lower = {one.lower(): one for one in known}
    return by_lower.get(str(name).lower())


def _close(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(str(name), known, 1)
    if not close:
        return ""
    return f"; did you mean {close[0]}?"


def _parts(text: str) -> list[str]:
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


def _value(text: str, whole: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        if text.isidentifier():
            return text  # anneal_strategy=linear
        raise ValueError(f"schedule {whole!r} has the value {text!r}; it must be a number, a name or a list") from None


class Length(NamedTuple):
    """How long a training is."""

    steps: int
    epochs: int


class Schedule:
    """What sets the learning rates of optimizers, step by step.

    Attributes:
        peaks: The highest learning rate of every group of every optimizer.
        schedulers: Of torch, one for each optimizer; none where the schedule is one of ours.
    """

    def __init__(self, optimizers: Sequence[Optimizer], config: TrainConfig, length: Length) -> None:
        """Make it for optimizers.

        Args:
            optimizers: Their learning rates are the highest.
            config: Names the schedule.
            length: Of the training.

        Raises:
            ValueError: For arguments that torch's scheduler refuses.
        """
        self.optimizers = optimizers
        self.name = config.schedule
        self.length = length
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
        self.schedulers: list[LRScheduler] = []
        if self.name not in SCHEDULES:
            made, arguments = scheduler_class(self.name)
            self.schedulers = [self._made(made, arguments, number) for number in range(len(optimizers))]

    def _made(self, made: type[LRScheduler], given: dict[str, Any], number: int) -> LRScheduler:
        arguments = self._defaults(made, self.peaks[number]) | given
        if made is lr_scheduler.OneCycleLR and {"epochs", "steps_per_epoch"} <= set(given):
            del arguments["total_steps"]
        try:
            _try_out(made, arguments, self.optimizers[number])
            return made(self.optimizers[number], **arguments)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"schedule {self.name!r} can't be made ({reason})") from error

    def _defaults(self, made: type[LRScheduler], peaks: list[float]) -> dict[str, Any]:
        """Return what torch's schedulers can't do without, so that it suits the training's length."""
        steps, epochs = self.length
        cycles = any("momentum" in group or "betas" in group for group in self.optimizers[0].param_groups)
        by_name: dict[str, dict[str, Any]] = {
            "StepLR": {"step_size": max(1, epochs // 3)},
            "MultiStepLR": {"milestones": sorted({max(1, epochs // 2), max(1, 3 * epochs // 4)})},
            "ExponentialLR": {"gamma": FALL ** (1 / max(1, epochs))},
            "CosineAnnealingLR": {"T_max": max(1, epochs)},
            "CosineAnnealingWarmRestarts": {"T_0": max(1, epochs)},
            "OneCycleLR": {"max_lr": peaks, "total_steps": max(2, steps), "cycle_momentum": cycles},
            "CyclicLR": {
                "base_lr": [peak / 10 for peak in peaks],
                "max_lr": peaks,
                "step_size_up": max(1, steps // 4),
                "cycle_momentum": cycles,
            },
        }
        return by_name.get(made.__name__, {})

    @property
    def _by_batch(self) -> bool:
        return bool(self.schedulers) and type(self.schedulers[0]).__name__ in BY_BATCH

    def before_step(self, step: int) -> None:
        """Set the learning rates for a step, counted from 0."""
        if self.schedulers:
            return
        rate = share_of_peak(self.name, step, self.length.steps)
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * rate

    def after_step(self, step: int) -> None:
        """Go on after a step; `step` of them are done."""
        # OneCycleLR refuses to be asked beyond its last step.
        if self._by_batch and step < self.length.steps:
            for scheduler in self.schedulers:
                scheduler.step()

    def after_epoch(self, loss: float) -> None:
        """Go on after an epoch.

        Args:
            loss: On held-out samples, if there are any, otherwise on those that are trained on.
        """
        if self._by_batch:
            return
        for scheduler in self.schedulers:
            if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
                scheduler.step(loss)
            else:
                scheduler.step()

    def state(self) -> list[dict[str, Any]]:
        """Return what torch's schedulers go on with, as plain data."""
        return [_plain(scheduler.state_dict()) for scheduler in self.schedulers]

    def restore(self, states: Sequence[dict[str, Any]]) -> None:
        """Go on from what `state` returned."""
        for scheduler, state in zip(self.schedulers, states, strict=True):
            milestones = getattr(scheduler, "milestones", None)
            if isinstance(milestones, Counter):
                state = {**state, "milestones": Counter(state["milestones"])}
            scheduler.load_state_dict(state)


def _try_out(made: Callable[..., LRScheduler], arguments: dict[str, Any], like: Optimizer) -> None:
    """Take two steps of a scheduler on an optimizer of nothing: some look at their arguments only then."""
    groups = [{**group, "params": [torch.zeros(1, requires_grad=True)]} for group in like.param_groups]
    optimizer = torch.optim.SGD(groups, lr=0.0)
    scheduler = made(optimizer, **arguments)
    for _ in range(2):
        optimizer.step()
        if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
            scheduler.step(0.0)
        else:
            scheduler.step()


def share_of_peak(schedule: str, step: int, steps: int) -> float:
    """Return the share of the highest learning rate that a schedule of ours has at a step.

    Args:
        schedule: One of `SCHEDULES`.
        step: Counted from 0.
        steps: How many there are.

    Returns:
        The share, 0 to 1; it rises over the first steps.
    """
    warmup = min(WARMUP_STEPS, steps // 10 + 1)
    return min((step + 1) / warmup, _FALLS[schedule](step, steps))


def _cosine(step: int, steps: int) -> float:
    return 0.5 * (1 + math.cos(math.pi * step / steps))


def _linear(step: int, steps: int) -> float:
    return 1 - step / steps


def _step(step: int, steps: int) -> float:
    if 2 * step < steps:
        return 1.0
    if 4 * step < 3 * steps:
        return 0.1
    return 0.01


def _constant(step: int, steps: int) -> float:
    return 1.0


_FALLS: dict[str, Callable[[int, int], float]] = {"cosine": _cosine, "linear": _linear, "step": _step, "constant": _constant}


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """Leave out functions, which no file is read with; nothing that goes on needs them."""
    return {key: value for key, value in state.items() if not callable(value)}
