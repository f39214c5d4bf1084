"""Ensembles of small networks, binary ones above all (BENN: Zhu, Dong and Su, CVPR 2019, arXiv 1806.07550).

Members are trained by whoever has a training loop: a function `train_member(samples, seed) ->
module`. `bagging` and `boosting` say what each is trained on, and how much its vote counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

TrainMember = Callable[[Tensor, int], nn.Module]


class Ensemble(nn.Module):
    """Networks that vote: sum_k alpha_k v_k(x) / sum_k alpha_k, for every class.

    The result are probabilities, not logits; dimension 1 is that of the classes. The whole costs
    `cost_factor` times what a member costs, in operations and in bytes.

    Attributes:
        vote: `soft`: v_k is the softmax of the member's logits. `hard`: 1 at its largest logit and
            0 elsewhere, without gradient.
        alphas: The members' weights, positive. Kept in the `state_dict`, up to a common factor.
    """

    alphas: Tensor

    def __init__(self, members: Iterable[nn.Module], alphas: Iterable[float] | None = None, vote: str = "soft") -> None:
        """Take the members, at least one.

        Args:
            members: The networks.
            alphas: Their weights, positive and finite; all 1 by default.
            vote: `soft` or `hard`.

        Raises:
            ValueError: For no members, for weights that don't fit them, and for an unknown vote.
        """
        super().__init__()
        self.members = nn.ModuleList(members)
        if alphas is None:
            alphas = [1.0] * len(self.members)
        weights = [float(alpha) for alpha in alphas]
        if not self.members:
            raise ValueError("an ensemble needs at least one member")
        if len(weights) != len(self.members):
            raise ValueError(f"{len(self.members)} members can't have {len(weights)} weights")
        for alpha in weights:
            if not 0 < alpha < math.inf:
                raise ValueError(f"a member's weight must be positive and finite, not {alpha}: it would vote against itself")
        if vote not in ("soft", "hard"):
            raise ValueError(f"unknown vote {vote!r}; known: soft, hard")
        self.vote = vote
        self.register_buffer("alphas", torch.tensor(weights))

    @property
    def cost_factor(self) -> int:
        """How many times a member's operations and bytes the ensemble costs."""
        return len(self.members)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the probabilities of the classes for a batch."""
        shares = self.alphas / self.alphas.sum()
        # Every member gets a copy: one that changes its input in place would change that of the next.
        votes = [share * self._vote(member(x.clone())) for share, member in zip(shares, self.members, strict=True)]
        return torch.stack(votes).sum(0)

    def _vote(self, logits: Tensor) -> Tensor:
        if self.vote == "soft":
            return logits.softmax(1)
        return torch.zeros_like(logits).scatter(1, logits.argmax(1, keepdim=True), 1.0)


def bagging_indices(count: int, seed: int) -> Tensor:
    """Draw as many sample numbers as there are samples, uniformly with replacement (Breiman 1996)."""
    return torch.randint(count, (count,), generator=torch.Generator().manual_seed(seed))


def bagging(train_member: TrainMember, count: int, members: int, *, seed: int = 0, vote: str = "soft") -> Ensemble:
    """Make an ensemble each member of which is trained on samples of its own.

    Args:
        train_member: Trains a member, given the numbers of `count` samples and a seed.
        count: How many samples there are.
        members: How many members to train.
        seed: The first member's; the others count on.
        vote: As in `Ensemble`.

    Returns:
        The ensemble.
    """
    seeds = range(seed, seed + members)
    return Ensemble([train_member(bagging_indices(count, s), s) for s in seeds], vote=vote)


def samme(error: float, classes: int) -> float:
    """Compute ln((1 - err) / err) + ln(K - 1): positive where a member is better than guessing, err < 1 - 1/K.

    Zhu et al., "Multi-class AdaBoost", Statistics and Its Interface 2, 2009, algorithm 2.
    """
    return math.log((1 - error) / error) + math.log(classes - 1)


def adaboost(error: float, classes: int = 2) -> float:
    """Compute ln((1 - err) / err) / 2, whatever the number of classes: negative from err = 1/2 on.

    Freund and Schapire 1997; BENN's variant A uses it for ten classes.
    """
    return math.log((1 - error) / error) / 2


RULES: dict[str, Callable[[float, int], float]] = {"samme": samme, "adaboost": adaboost}


def member_weight(error: float, classes: int, rule: str = "samme") -> float:
    """Compute a member's alpha.

    Args:
        error: Its weighted training error, between 0 and 1.
        classes: The number of classes, 2 or more.
        rule: A name in `RULES`.

    Returns:
        The weight of its vote.

    Raises:
        ValueError: Where it isn't positive: the member would count for nothing, or against what it
            says.
    """
    if rule not in RULES:
        raise ValueError(f"unknown rule {rule!r}; known: {', '.join(RULES)}")
    if classes < 2 or not 0 < error < 1:
        raise ValueError(f"there is no weight for error {error} over {classes} classes: 0 < error < 1, and 2 classes or more")
    alpha = RULES[rule](error, classes)
    if alpha <= 0:
        bound = 0.5
        if rule == "samme":
            bound = 1 - 1 / classes
        raise ValueError(f"rule {rule!r} gives an error of {error:.3g} the weight {alpha:.3g}: it must be below {bound:.3g}")
    return alpha


def updated_weights(weights: Tensor, wrong: Tensor, alpha: float, rule: str = "samme") -> Tensor:
    """Compute the samples' weights for the next member.

    Args:
        weights: Those that the last one was trained with.
        wrong: Where it was wrong.
        alpha: Its weight.
        rule: `samme`: times exp(alpha) where it was wrong. `adaboost`: also times exp(-alpha) where
            it was right.

    Returns:
        Weights of sum 1.
    """
    exponent = wrong.to(weights.dtype)
    if rule != "samme":
        exponent = 2 * exponent - 1
    weights = weights * (alpha * exponent).exp()
    return weights / weights.sum()


def boosting(
    train_member: TrainMember,
    predict: Callable[[nn.Module], Tensor],
    labels: Tensor,
    classes: int,
    members: int,
    *,
    rule: str = "samme",
    resample: bool = True,
    seed: int = 0,
    vote: str = "soft",
) -> Ensemble:
    """Make an ensemble each member of which minds what those before it got wrong.

    Errors below 1 / (2 samples), nought among them, count as that, so that a member's weight stays
    finite. Boosted members are weak by themselves: compare the ensemble with a network trained on
    all samples alike.

    Args:
        train_member: Gets the numbers of as many samples, drawn by weight with replacement, and a
            seed; without `resample` the weights themselves instead, of mean 1 and in the order of
            `labels`.
        predict: Says a member's class for every training sample, in the order of `labels`.
        labels: The classes of the training samples.
        classes: How many classes there are.
        members: How many members to train.
        rule: `samme`, or `adaboost`, for two classes.
        resample: Whether members get samples, or weights.
        seed: Of the draws, and the first member's; the others count on.
        vote: As in `Ensemble`.

    Returns:
        The ensemble.

    Raises:
        ValueError: For a member whose weight would not be positive (`member_weight`).
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(labels)
    weights = torch.full((count,), 1 / count, dtype=torch.double)
    made, alphas = [], []
    for number in range(members):
        if resample:
            samples = torch.multinomial(weights, count, True, generator=generator)
        else:
            samples = (weights * count).float()
        member = train_member(samples, seed + number)
        wrong = (predict(member) != labels).cpu()
        error = max(float(weights[wrong].sum()), 0.5 / count)
        try:
            alpha = member_weight(error, classes, rule)
        except ValueError as reason:
            raise ValueError(f"member {number}: {reason}") from reason
        weights = updated_weights(weights, wrong, alpha, rule)
        made.append(member)
        alphas.append(alpha)
    return Ensemble(made, alphas, vote)
