"""Schedules: what sets the learning rates of a training, step by step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from haq.training.optimizers import SCHEDULES, scheduler_class

WARMUP_STEPS = 200  # at most; a tenth of all steps where that is fewer
BY_BATCH = ("OneCycleLR", "CyclicLR")  # the others step after every epoch, as torch's documentation shows them
FALL = 0.01  # of the learning rate over a whole training, for a schedule that falls exponentially


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

    def __init__(self, optimizers: Sequence[Optimizer], schedule: str, length: Length) -> None:
        """Make it for optimizers.

        Args:
            optimizers: Their learning rates are the highest.
            schedule: Its name, and arguments for one of torch's.
            length: Of the training.

        Raises:
            ValueError: For arguments that torch's scheduler refuses.
        """
        self.optimizers = optimizers
        self.name = schedule
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

    def before_step(self, step: int, steps: int | None = None) -> None:
        """Set the learning rates for a step, counted from 0, of so many; None: of all steps of the training."""
        if self.schedulers:
            return
        rate = share_of_peak(self.name, step, steps or self.length.steps)
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
