"""Fine-tuning: a quantized network back to its accuracy, with the float network as teacher."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from haq.attacks.proxy import ProxyAttack
from haq.data import UNLABELLED, Split
from haq.data.dataset import batch_count, stratified, without
from haq.data.labels import class_numbers
from haq.networks import Network
from haq.problem.evaluator import one_thread
from haq.problem.objective import class_scores
from haq.store.checkpoint import Checkpoint
from haq.training.adversaries import Adversary
from haq.training.config import (
    Judgement,
    OnEpoch,
    OnJudged,
    OnOutcome,
    OnStep,
    TrainConfig,
    no_epoch,
    no_judgement,
    no_outcome,
    no_step,
    rate_for,
)
from haq.training.loop import Judge, fit
from quantizers.norms import is_frozen, running_norms, take_statistics

TUNING_BATCH = 32  # images of a step: many small steps, since with few images it is their number that counts
TUNING_RATE = 0.005
SMALL = 64  # pixels; a small batch of images up to this size is done sooner by one thread than by several
NORM_BATCH = 500
JUDGED_BATCH = 250
MOST_HELD = 1000  # images that are held out: a twentieth, no more than this
FEW_HELD = 32  # as far as that is no more than a quarter


def finetune(
    network: Network,
    qnetwork: nn.Module,
    split: Split,
    *,
    epochs: int,
    seed: int,
    learning_rate: float | None = None,
    steps: int | None = None,
    norm_images: int = 4000,
    keep_best: bool = True,
    penalty: Callable[[nn.Module], Tensor] | None = None,
    adversary: Adversary | None = None,
    state: Checkpoint | None = None,
    on_epoch: OnEpoch = no_epoch,
    on_step: OnStep = no_step,
    on_judged: OnJudged = no_judgement,
    on_outcome: OnOutcome = no_outcome,
) -> nn.Module:
    """Train a copy of a quantized network at its bits, with the float network as teacher; labels play no part in that.

    What the layers' schemes learn is trained with the weights, and so are activation scales that a scheme keeps fixed by
    itself. Batch norms first take their statistics anew from the quantized network, and then keep them: with few images,
    statistics that wander cost more than they adapt. What is frozen in the float network stays as it is: parameters that
    ask for no gradient, and norms of which all parameters are such, or whose momentum is 0.

    A part of the images is held out (`hold_out`): on them the network is judged before and after every epoch, and the best
    is returned, which may be the one before. See `judge_of`.

    Args:
        network: The float network.
        qnetwork: The quantized one, of any scheme; it is left as it is.
        split: The images.
        epochs: How often they are gone through.
        seed: Of all that is random, but for which images are held out: these depend on nothing but the split.
        learning_rate: The highest; None: `TUNING_RATE`, and less where steps are few (`rate_for`).
        steps: Batches in all, in place of `epochs`.
        norm_images: On how many images of the split batch norms take their statistics.
        keep_best: Whether images are held out, and the best network is kept. With a penalty nothing is: what it is worth
            isn't seen in answers.
        penalty: Of the network: a number that is added to the loss.
        adversary: What it is trained against.
        state: Keeps what it takes to go on after every epoch; what it holds is gone on from.
        on_epoch: Told the epochs done and the last one's mean loss.
        on_step: Told the steps done and in all.
        on_judged: Told the epochs done, 0 at first, and the judgement of the network then.
        on_outcome: Told in the end how all were judged, and which was kept.

    Returns:
        The best network, a copy in evaluation mode.

    Raises:
        FloatingPointError: If the loss stops being a number, and nothing is held out.
        ValueError: For fewer than three images, an adversary on images of unknown range, and a state of something else.
    """
    if len(split) < 3:
        raise ValueError(f"fine-tuning takes at least 3 images, there are {len(split)}")
    class_numbers(split.labels, "what is fine-tuned on")
    keep_best = keep_best and penalty is None
    trained_on, held = split, split
    if keep_best:
        trained_on, held = hold_out(split)
    config = TrainConfig(
        epochs=epochs,
        learning_rate=TUNING_RATE,
        seed=seed,
        batch_size=TUNING_BATCH,
        steps=steps,
        fixed_norms=True,
        train_scales=True,
        penalty=penalty,
        adversary=adversary,
    )
    if learning_rate is None:
        learning_rate = rate_for(TUNING_RATE, steps or epochs * batch_count(len(trained_on), TUNING_BATCH))
    config = dataclasses.replace(config, learning_rate=learning_rate)
    tuned = Q.copy_network(qnetwork)
    keep_frozen(network.module, tuned)
    small = max(network.input_shape[1:], default=0) <= SMALL
    with torch.random.fork_rng(devices=[]), one_thread() if small else nullcontext():
        # What the network itself draws (dropout) comes from the seed too, whatever was computed before.
        torch.manual_seed(seed)
        judge: Judge | None = None
        before: Judgement | None = None
        if keep_best:
            judge = judge_of(network, held, adversary)
            before = judge(tuned)
            on_judged(0, before)
        refresh_norms(network, tuned, trained_on, norm_images)
        outcome = fit(
            network,
            trained_on,
            config,
            module=tuned,
            teacher=network.module.eval(),
            state=state,
            judge=judge,
            before=before,
            on_epoch=on_epoch,
            on_step=on_step,
            on_judged=on_judged,
        )
    if outcome is not None:
        on_outcome(dataclasses.replace(outcome, images=len(held)))
        if not outcome.kept:
            return Q.copy_network(qnetwork).eval()
    return tuned


def hold_out(split: Split) -> tuple[Split, Split]:
    """Divide images into those that are trained on and those by which the training is judged.

    These are a twentieth, of every class its share, and always the same: at most MOST_HELD, and of few images at least
    FEW_HELD as far as that is no more than a quarter.

    Returns:
        The images to train on, and those held out.
    """
    count = len(split)
    held = min(MOST_HELD, max(count // 20, min(FEW_HELD, count // 4), 1))
    chosen = stratified(split.labels, held)
    return split.subset(without(count, chosen)), split.subset(chosen)


def judge_of(network: Network, held: Split, adversary: Adversary | None = None) -> Judge:
    """Make what judges a network by images that it isn't trained on.

    Accuracy is the share of images that are answered as labelled; without labels, as the float network answers. The loss is
    the divergence of the outputs from the float network's. Where a network is trained against an adversary, both are of
    images under a cheap attack (`haq.attacks.proxy`), and an image counts if it is also answered rightly as it is.

    Args:
        network: The float network.
        held: The images.
        adversary: What is trained against.

    Returns:
        A function of the network that is judged, which puts it into evaluation mode.
    """
    teacher = network.module.eval()
    proxy = None
    if adversary is not None:
        proxy = ProxyAttack.of(network, adversary.eps)
    # Without labels, or where all are the same, they tell nothing.
    is_labelled = bool((held.labels != UNLABELLED).all()) and len(held.labels.unique()) > 1

    def judge(module: nn.Module) -> Judgement:
        module.eval()
        right = 0
        total = 0.0
        for number, (images, labels) in enumerate(held.batches(JUDGED_BATCH)):
            inputs = network.preprocess(images)
            with torch.no_grad():
                # Copies, since a network may change its input in place.
                expected, answers = (class_scores(one(inputs.clone())) for one in (teacher, module))
            if not is_labelled:
                labels = expected.argmax(1)
            correct = answers.argmax(1) == labels
            if proxy is not None:
                attacked = proxy(module, inputs, labels, number)
                with torch.no_grad():
                    answers = module(attacked)
                correct &= answers.argmax(1) == labels
            right += int(correct.sum())
            log_answers, log_expected = (F.log_softmax(outputs.double(), 1) for outputs in (answers, expected))
            total += float(F.kl_div(log_answers, log_expected, reduction="sum", log_target=True))
        if not math.isfinite(total):
            return Judgement(0.0, math.inf, len(held))
        return Judgement(right / len(held), total / len(held), len(held))

    return judge


def keep_frozen(of: nn.Module, module: nn.Module) -> None:
    """Let everything in a quantized network be trained but what is frozen in the float network that it is of.

    Args:
        of: The float network.
        module: The quantized one, changed in place.
    """
    floats = dict(of.named_parameters())
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name not in floats or floats[name].requires_grad)


@dataclass(frozen=True)
class ShortTuning:
    """Fine-tuning in the loop of a search, as HAQ does it (Wang et al., CVPR 2019). A callable for `haq.Problem(tune=)`.

    It is some steps of `finetune` from the float weights, for every policy alike and always the same.

    Attributes:
        network: The float network.
        split: The images.
        steps: How many.
        seed: Of all that is random.
        learning_rate: The highest; None: as of `finetune`.
    """

    network: Network
    split: Split
    steps: int
    seed: int
    learning_rate: float | None = None

    def __call__(self, qnetwork: nn.Module) -> nn.Module:
        """Return a trained copy of a quantized network."""
        return finetune(
            self.network,
            qnetwork,
            self.split,
            epochs=0,
            steps=self.steps,
            seed=self.seed,
            norm_images=max(500, TUNING_BATCH * self.steps),
            learning_rate=self.learning_rate,
            keep_best=False,  # the search itself judges what comes out
        )


@torch.no_grad()
def refresh_norms(network: Network, module: nn.Module, split: Split, images: int = 4000) -> None:
    """Give norms with running statistics the mean and variance of what they see now, in place.

    Every image counts the same, however they are divided into batches, and of every class there is its share. All else is in
    evaluation mode. A norm that is frozen (`is_frozen`) keeps its statistics.

    Args:
        network: What preprocesses the images.
        module: What the norms are in; it is left in evaluation mode.
        split: The images.
        images: How many of them are looked at.

    Raises:
        ValueError: If a norm sees a single value of each channel, so that there is no variance.
    """
    module.eval()
    norms = [norm for norm in running_norms(module) if not is_frozen(norm)]
    chosen = stratified(split.labels, min(images, len(split)))
    parts = math.ceil(len(chosen) / NORM_BATCH)
    # Batches of the same size, for what a norm sees depends on how the one before it sees its batch.
    batches = (network.preprocess(split.images[chosen[part::parts]]) for part in range(parts))
    take_statistics(module, norms, batches)
