"""A training method: weights shrink after every epoch."""

from __future__ import annotations

from haq.training.methods import Method, TrainingState


class Shrinking(Method):
    """Makes weights smaller, as a decay once an epoch."""

    def __init__(self, factor: float = 0.9) -> None:
        """Take the factor, above 0 and at most 1."""
        super().__init__()
        if not 0 < factor <= 1:
            raise ValueError(f"factor is {factor!r}; it must be above 0 and at most 1")
        self.factor = factor

    def after_epoch(self, training: TrainingState) -> None:
        """Shrink all parameters."""
        for parameter in training.module.parameters():
            parameter.data *= self.factor
