"""Lottery tickets: weights of small magnitude are masked, the others put back to what they were early, and trained again.

Frankle and Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks", ICLR 2019, arXiv 1803.03635;
of rewinding to a later step: Frankle, Dziugaite, Roy, Carbin, "Stabilizing the Lottery Ticket Hypothesis", 2019, arXiv
1903.01611.

    haq train --method "lottery(rounds=5, share=0.2)" --epochs 60 --out network.safetensors
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from haq.training.methods import Method, TrainingState
from haq.training.optimizers import SCHEDULES
from quantizers.pruning.lottery_ticket import LAYER, NETWORK, Masks, magnitude_masks, mask_density, maskable_weights


class MaskedWeights(Method):
    """Trains a network with masks of its weights: what is masked is zero from the beginning, and stays it.

    Attributes:
        masks: True where a weight survives, by the weight's name, such as `conv1.weight`.
    """

    def __init__(self, masks: Mapping[str, Tensor] | None = None) -> None:
        """Take the masks; None: everything survives."""
        super().__init__()
        self.masks: Masks = dict(masks or {})
        self._weights: dict[str, nn.Parameter] = {}

    def begin(self, training: TrainingState) -> None:
        """Find the weights, and mask them.

        Raises ValueError for masks of other weights.
        """
        self._weights = maskable_weights(training.module)
        for name, mask in self.masks.items():
            if name not in self._weights or self._weights[name].shape != mask.shape:
                raise ValueError(f"the mask of {name!r} fits no weight of the network: {', '.join(self._weights)}")
        self._apply()

    def before_step(self, training: TrainingState) -> None:
        """Let nothing move what is masked."""
        for name, mask in self.masks.items():
            gradient = self._weights[name].grad
            if gradient is not None:
                gradient.masked_fill_(~mask, 0)

    def after_step(self, training: TrainingState) -> None:
        """Keep what is masked at zero, whatever an optimizer does without a gradient."""
        self._apply()

    def tensors(self) -> dict[str, Any]:
        """Add the masks."""
        return {**super().tensors(), "masks": dict(self.masks)}

    def load_tensors(self, content: dict[str, Any]) -> None:
        """Go on with the masks."""
        super().load_tensors(content)
        self.masks = {name: mask.to(self._weights[name].device) for name, mask in content["masks"].items()}

    def report(self) -> list[str]:
        """Say how many weights survive."""
        return [f"weights that survive: {100 * mask_density(self.masks):.2f} % of those of convolutions and linear layers"]

    @torch.no_grad()
    def _apply(self) -> None:
        for name, mask in self.masks.items():
            self._weights[name].masked_fill_(~mask, 0)


class LotteryTicket(MaskedWeights):
    """Finds a lottery ticket by iterative magnitude pruning with rewinding, and trains it.

    The epochs are divided evenly: one training of the whole network, then as many as there are rounds. Before each of these a
    share of the surviving weights, those of the smallest magnitude, is masked; everything else in the network is put back to
    what it was in the beginning, or after some steps of the first training; optimizers begin anew, and so does the schedule of
    the learning rate, or goes on from that step. Only networks of the last training are kept.

    Attributes:
        masks: As of `MaskedWeights`; those of the last round in the end.
        rewound: The network that survivors are put back to.
    """

    needs_all_epochs = True

    def __init__(
        self,
        rounds: int = 5,
        share: float = 0.2,
        last: float | None = None,
        across: str = LAYER,
        rewind: int = 0,
    ) -> None:
        """Say how weights are masked.

        Args:
            rounds: How often.
            share: How many of the surviving weights are masked in a round.
            last: The same of the last layer; None: half of the share, as in the paper.
            across: `layer`: so many of every layer. `network`: so many of all but the last, whichever are the smallest.
            rewind: The step of the first training to which survivors are put back; 0: its beginning.

        Raises:
            ValueError: For a value out of range.
        """
        super().__init__()
        for name, count, least in (("rounds", rounds, 1), ("rewind", rewind, 0)):
            if isinstance(count, bool) or not isinstance(count, int) or count < least:
                raise ValueError(f"lottery: {name} is {count!r}; it must be an integer of at least {least}")
        if last is None and isinstance(share, int | float):
            last = share / 2
        for name, part in (("share", share), ("last", last)):
            if isinstance(part, bool) or not isinstance(part, int | float) or not 0 <= part < 1:
                raise ValueError(f"lottery: {name} is {part!r}; it must be a share of the weights, from 0 to below 1")
        if across not in (LAYER, NETWORK):
            raise ValueError(f"lottery: across is {across!r}; it must be {LAYER} or {NETWORK}")
        assert last is not None
        self.rounds, self.share, self.last, self.across, self.rewind = rounds, float(share), float(last), across, rewind
        self.rewound: dict[str, Any] = {}

    def begin(self, training: TrainingState) -> None:
        """Check the lengths, and keep what survivors are put back to if that is the beginning."""
        super().begin(training)
        if not self._weights:
            raise ValueError("lottery: the network has no convolution or linear layer whose weights could be masked")
        parts = self.rounds + 1
        if training.epochs % parts or training.steps != training.epochs * training.steps_per_epoch:
            raise ValueError(
                f"lottery: a training of the whole network and {self.rounds} rounds are {parts} trainings of equal length: "
                f"the epochs must be a multiple of {parts}, and are {training.steps / training.steps_per_epoch:g}"
            )
        if self.rewind >= self._steps(training):
            raise ValueError(
                f"lottery: rewind is {self.rewind}; it must be below the {self._steps(training)} steps of a round"
            )
        if training.config.schedule not in SCHEDULES:
            raise ValueError(
                f"lottery: the schedule {training.config.schedule!r} can't begin anew in every round; give one of "
                f"{', '.join(SCHEDULES)}"
            )
        if self.rewind == 0:
            self.rewound = training.tensors()

    def before_epoch(self, training: TrainingState) -> None:
        """Mask and rewind where a round begins."""
        if training.epoch and training.epoch % (training.epochs // (self.rounds + 1)) == 0:
            self._go_back(training)

    def after_step(self, training: TrainingState) -> None:
        """Keep what is masked at zero; note what survivors are put back to when that step is done."""
        super().after_step(training)
        if self.rewind and training.step == self.rewind:
            self.rewound = training.tensors()

    def may_keep(self, training: TrainingState) -> bool:
        """Keep only networks of the last training."""
        return training.step > self.rounds * self._steps(training)

    def position(self, training: TrainingState) -> tuple[int, int]:
        """Begin the schedule anew in every round; after the first, what is left of it from the step that was gone back to."""
        steps = self._steps(training)
        done, step = divmod(training.step, steps)
        if done:
            step = self.rewind + step * (steps - self.rewind) // steps
        return step, steps

    def tensors(self) -> dict[str, Any]:
        """Add what survivors are put back to."""
        return {**super().tensors(), "rewound": self.rewound}

    def load_tensors(self, content: dict[str, Any]) -> None:
        """Go on with what survivors are put back to."""
        super().load_tensors(content)
        self.rewound = content["rewound"]

    def _steps(self, training: TrainingState) -> int:
        return training.steps // (self.rounds + 1)

    def _go_back(self, training: TrainingState) -> None:
        last = list(self._weights)[-1]
        before = self.masks or None
        self.masks = magnitude_masks(self._weights, self.share, before, across=self.across, shares={last: self.last})
        training.load_tensors(self.rewound)
        self._apply()
        for optimizer in training.optimizers:
            optimizer.state.clear()
