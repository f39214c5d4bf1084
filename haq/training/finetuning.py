"""Fine-tuning: a quantized network back to its accuracy, with the float network as teacher."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from haq.attacks.proxy import ProxyAttack
from haq.data import UNLABELLED, Split
from haq.data.dataset import stratified, whole_groups, without
from haq.data.labels import class_numbers
from haq.data.sources import Stream
from haq.networks import Network
from haq.problem.evaluator import one_thread
from haq.problem.objective import (
    BlackBox,
    NotFinite,
    Objective,
    ValueObjective,
    attacked_inputs,
    value_of,
)
from haq.problem.tally import ValueTally
from haq.store.checkpoint import Checkpoint
from haq.training.adversaries import Adversary
from haq.training.config import (
    SHARE_OF_USUAL,
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
from haq.training.goals import Called, Goal, UserLoss, network_inputs, user_loss
from haq.training.loop import Judge, batches_in, fit
from haq.training.optimizers import usual_rate
from quantizers.calling import count_of, leaves, to_device
from quantizers.norms import is_frozen, running_norms, take_statistics

logger = logging.getLogger("haq")

TUNING_BATCH = 32  # images of a step: many small steps, since with few images it is their number that counts
TUNING_RATE = 0.005
SMALL = 64  # pixels; a small batch of images up to this size is done sooner by one thread than by several
NORM_BATCH = 500
JUDGED_BATCH = 250
JUDGED_VALUES = 2**24  # of the inputs that are judged at a time, where they are no images of classes
SGD = "sgd"
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
    objective: Objective | None = None,
    loss: UserLoss | None = None,
    batch_size: int = TUNING_BATCH,
    optimizer: str = SGD,
    schedule: str = "cosine",
    patience: int | None = None,
    give_up_after: int | None = None,
    amp: bool = False,
    state: Checkpoint | None = None,
    on_epoch: OnEpoch = no_epoch,
    on_step: OnStep = no_step,
    on_judged: OnJudged = no_judgement,
    on_outcome: OnOutcome = no_outcome,
) -> nn.Module:
    """Train a copy of a quantized network at its bits, with the float network as teacher; targets play no part in that.

    What is lessened is the distance of the outputs from the float network's, as the objective tells it
    (`Objective.divergence`), or a loss of the user's, of outputs and targets. Inputs and outputs may be of any structure.

    What the layers' schemes learn is trained with the weights, and so are activation scales that a scheme keeps fixed by
    itself. Batch norms first take their statistics anew from the quantized network, and then keep them: with few images,
    statistics that wander cost more than they adapt. What is frozen in the float network stays as it is: parameters that
    ask for no gradient, and norms of which all parameters are such, or whose momentum is 0.

    A part of the samples is held out (`hold_out`): on them the network is judged before and after every epoch, and the best
    is returned, which may be the one before. See `judge_of`.

    Args:
        network: The float network.
        qnetwork: The quantized one, of any scheme; it is left as it is.
        split: The samples.
        epochs: How often they are gone through.
        seed: Of all that is random, but for which samples are held out: these depend on nothing but the split.
        learning_rate: The highest; None: `tuning_rate`, and less where steps are few (`rate_for`).
        steps: Batches in all, in place of `epochs`.
        norm_images: On how many samples of the split batch norms take their statistics.
        keep_best: Whether samples are held out, and the best network is kept. With a penalty nothing is: what it is worth
            isn't seen in answers.
        penalty: Of the network: a number that is added to the loss.
        adversary: What it is trained against.
        objective: What the network is judged by; None: classification of images.
        loss: A function of (outputs, targets) that is minimised in place of the distance from the float network's outputs,
            and that judges the network on what is held out.
        batch_size: Samples of a step.
        optimizer: `sgd`, `adam` or a class of torch.optim by name; see `TrainConfig`.
        schedule: Of the learning rate, by name; see `TrainConfig`.
        patience: So many epochs in a row without a lower loss on what is held out end the training.
        give_up_after: The training ends after the epoch in which it has taken so many steps, if no epoch until then has a
            lower loss there than the network before; None: it doesn't.
        amp: Whether networks compute in half precision; see `TrainConfig`. They are judged in float32.
        state: Keeps what it takes to go on after every epoch; what it holds is gone on from.
        on_epoch: Told the epochs done and the last one's mean loss.
        on_step: Told the steps done and in all.
        on_judged: Told the epochs done, 0 at first, and the judgement of the network then.
        on_outcome: Told in the end how all were judged, and which was kept.

    Returns:
        The best network, a copy in evaluation mode.

    Raises:
        FloatingPointError: If the loss stops being a number, and nothing is held out.
        ValueError: For fewer than three samples, an objective without a distance between outputs and no loss, an adversary on
            images of unknown range, and a state of something else.
    """
    goal = Goal(objective, loss)
    check_samples(network, split, goal)
    keep_best = keep_best and penalty is None
    trained_on, held = split, split
    if keep_best:
        trained_on, held = hold_out(split)
    config = TrainConfig(
        epochs=epochs,
        learning_rate=TUNING_RATE,
        seed=seed,
        batch_size=batch_size,
        steps=steps,
        fixed_norms=True,
        train_scales=True,
        penalty=penalty,
        adversary=adversary,
        optimizer=optimizer,
        schedule=schedule,
        patience=patience,
        give_up_after=give_up_after,
        amp=amp,
    )
    if learning_rate is None:
        learning_rate = rate_for(tuning_rate(optimizer), steps or epochs * batches_in(trained_on, batch_size))
    config = dataclasses.replace(config, learning_rate=learning_rate)
    tuned = Q.copy_network(qnetwork)
    several = torch.get_num_threads() > 1
    keep_frozen(network.module, tuned)
    with torch.random.fork_rng(devices=own_random(network)), threads_for(network):
        # What the network itself draws (dropout) comes from the seed too, whatever was computed before.
        torch.manual_seed(seed)
        judge: Judge | None = None
        before: Judgement | None = None
        if keep_best:
            judge = judge_of(network, held, adversary, objective=objective, loss=loss)
            before = judge(tuned)
            on_judged(0, before)
        refresh_norms(network, tuned, trained_on, norm_images)
        outcome = fit(
            network,
            trained_on,
            config,
            module=tuned,
            teacher=network.module.eval(),
            objective=objective,
            loss=loss,
            state=state,
            judge=judge,
            before=before,
            ahead=several,
            on_epoch=on_epoch,
            on_step=on_step,
            on_judged=on_judged,
        )
    if outcome is not None:
        on_outcome(dataclasses.replace(outcome, images=len(held)))
        if not outcome.kept:
            return Q.copy_network(qnetwork).eval()
    return tuned


def check_samples(network: Network, split: Split, goal: Goal) -> None:
    """Check that samples can be fine-tuned on.

    Args:
        network: The float network.
        split: The samples.
        goal: What is minimised.

    Raises:
        ValueError: For too few of them, labels that are no classes, and an objective that has nothing to fine-tune by.
    """
    if len(split) < 3:
        raise ValueError(f"fine-tuning takes at least 3 {split.samples_are}, there are {len(split)}")
    goal.check_teacher(network, split)
    labels = split.labels
    if labels is None:
        labels = split.targets
    # Class scores may be of texts, too, whose answers are as many as words: only labels can be checked.
    if goal.objective is None and goal.loss is None and labels is not None:
        class_numbers(labels, "what is fine-tuned on")


def tuning_rate(optimizer: str) -> float:
    """Return the learning rate that fine-tuning has by default, with an optimizer."""
    if optimizer == SGD:
        return TUNING_RATE
    return SHARE_OF_USUAL * usual_rate(optimizer)


def threads_for(network: Network) -> AbstractContextManager[object]:
    """Use one thread where images are small."""
    if network.device.type == "cpu" and max(network.input_shape[1:], default=SMALL + 1) <= SMALL:
        return one_thread()
    return nullcontext()


def own_random(network: Network) -> list[torch.device]:
    """List the devices beside the CPU whose random numbers a training draws from."""
    if network.device.type == "cuda":
        return [network.device]
    return []


def classes_of(split: Split) -> Tensor:
    """Return the class of every sample, by which a part can be fair; one for all, where nobody knows without reading them.

    Returns:
        Integers, shape (samples,).
    """
    labels = split.source.known_labels
    if labels is None:
        return torch.zeros(len(split), dtype=torch.long)
    return labels


def hold_out(split: Split) -> tuple[Split, Split]:
    """Divide samples into those that are trained on and those by which the training is judged.

    These are a twentieth, of every class its share, and always the same: at most MOST_HELD, and of few samples at least
    FEW_HELD as far as that is no more than a quarter. Where there are several groups, whole groups are held out.

    Args:
        split: The samples that a network is to be fine-tuned on.

    Returns:
        The samples to train on, and those held out.
    """
    count = len(split)
    held = min(MOST_HELD, max(count // 20, min(FEW_HELD, count // 4), 1))
    if split.groups is not None and len(split.groups.unique()) > 1:
        chosen = whole_groups(split.groups, held, "what is fine-tuned on")
    else:
        chosen = stratified(classes_of(split), held)
    return split.subset(without(count, chosen)), split.subset(chosen)


def judge_of(
    network: Network,
    held: Split,
    adversary: Adversary | None = None,
    *,
    objective: Objective | None = None,
    loss: UserLoss | None = None,
) -> Judge:
    """Make what judges a network by samples that it isn't trained on.

    The value is the objective's, without one the share of images that are answered as labelled; without labels, as the float
    network answers. The loss is the divergence of the outputs from the float network's, or the mean of a loss of the user's.
    Where a network is trained against an adversary, both are of images under a cheap attack (`haq.attacks.proxy`), and an
    image counts if it is also answered rightly as it is.

    Args:
        network: The float network.
        held: The samples.
        adversary: What is trained against.
        objective: What networks are judged by; None: classification of images.
        loss: A function of (outputs, targets). Where it fails for outputs in evaluation mode, as those of detectors are, the
            divergence counts, and where there is none the value alone.

    Returns:
        A function of the network that is judged, which puts it into evaluation mode.

    Raises:
        ValueError: If the objective has no distance between outputs, and there is no loss.
    """
    goal = Goal(objective, loss)
    goal.check_teacher(network, held)
    if goal.is_classification:
        return _judge_of_scores(network, held, adversary, goal)
    return _judge_of_values(network, held, goal)


def _judge_of_scores(network: Network, held: Split, adversary: Adversary | None, goal: Goal) -> Judge:
    """Make what judges class scores; see `judge_of`."""
    teacher = network.module.eval()
    proxy = None
    if adversary is not None:
        proxy = ProxyAttack.of(network, adversary.eps)
    objective = goal.objective
    own_correct: Objective | None = None
    if objective is not None and type(objective).correct is not Objective.correct:
        own_correct = objective
    labels_known = classes_of_targets(held)
    # Without labels, or where all are the same, they tell nothing.
    is_labelled = labels_known is not None and bool((labels_known != UNLABELLED).all()) and len(labels_known.unique()) > 1
    if objective is not None and objective.compares_with_float:
        is_labelled = False

    def judge(module: nn.Module) -> Judgement:
        module.eval()
        right = 0
        total = 0.0
        losses = HeldOutLoss(goal.loss)
        for number, (images, targets) in enumerate(held.batches(JUDGED_BATCH)):
            inputs = network_inputs(network, images)
            with torch.no_grad():
                given = network.run(module, inputs, targets)
                # Read in this order: what can't be read of the float network is its own fault.
                expected = goal.read(network.run(teacher, inputs, targets))
                answers = goal.read(given)
            labels = expected.argmax(1)
            if is_labelled:
                labels = to_device(targets, labels.device)
            correct = _are_correct(own_correct, answers, labels)
            if proxy is not None:
                attacked = proxy(Called(network, module, targets), inputs, labels, number)
                with torch.no_grad():
                    given = network.run(module, attacked, targets)
                answers = goal.read(given)
                correct &= _are_correct(own_correct, answers, labels)
            right += int(correct.sum())
            losses.add(given, to_device(targets, network.device), len(labels))
            log_answers, log_expected = (F.log_softmax(outputs.double(), 1) for outputs in (answers, expected))
            total += float(F.kl_div(log_answers, log_expected, reduction="sum", log_target=True))
        if not math.isfinite(total):
            return Judgement(0.0, math.inf, len(held))
        return Judgement(right / len(held), losses.mean(total / len(held)), len(held))

    return judge


def _are_correct(objective: Objective | None, answers: Tensor, labels: Tensor) -> Tensor:
    if objective is not None:
        return objective.correct((answers,), labels)
    return answers.argmax(1) == labels


def classes_of_targets(split: Split) -> Tensor | None:
    """Return class numbers, if targets are such."""
    labels: Tensor | None = split.labels
    return labels


def _judge_of_values(network: Network, held: Split, goal: Goal) -> Judge:
    """Make what judges by an objective that isn't of class scores; see `judge_of`."""
    teacher = network.module.eval()
    objective = goal.objective
    assert objective is not None
    size = judged_at_a_time(held)
    has_targets = held.take(torch.arange(1))[1] is not None
    is_valued = isinstance(objective, ValueObjective) and (has_targets or not objective.needs_labels)

    def judge(module: nn.Module) -> Judgement:
        module.eval()
        tally = None
        if is_valued:
            tally = ValueTally(objective)  # type: ignore[arg-type]
        losses = HeldOutLoss(goal.loss)
        divergences = []
        for number, (given, targets) in enumerate(held.batches(size)):
            inputs = network_inputs(network, given)
            targets = to_device(targets, network.device)
            with torch.no_grad():
                expected = objective.read(network.run(teacher, inputs, targets))
            wanted = objective.aligned(inputs, targets)
            if objective.compares_with_float:
                wanted = expected
            versions = (inputs,)
            if objective.attacked:
                attacked = attacked_inputs(objective, Called(network, module, targets), inputs, wanted, number)
                versions = (inputs, *attacked)
            with torch.no_grad():
                returned = [network.run(module, one, targets) for one in versions]
                outputs = tuple(map(objective.read, returned))
                count = count_of(inputs)
                try:
                    if tally is not None:
                        tally.add(outputs, wanted, None, count)
                except NotFinite:
                    return worthless(objective, len(held))
                losses.add(returned[-1], targets, count)
                if objective.distribution is not None:
                    divergences.append(objective.divergence(outputs[-1], expected).double().cpu())
        divergence = math.nan
        if divergences:
            divergence = float(torch.cat(divergences).mean())
            if not math.isfinite(divergence):
                return worthless(objective, len(held))
        return _judged(objective, module, tally, losses.mean(divergence), len(held))

    return judge


def _judged(objective: Objective, module: nn.Module, tally: ValueTally | None, loss: float, count: int) -> Judgement:
    """Judge a network by what was told of it.

    Args:
        objective: What it is judged by.
        module: The network.
        tally: Of its values; None: there are none.
        loss: Its loss on held-out samples; NaN if there is none but the value.
        count: How many samples there are.

    Returns:
        The judgement. Without targets, by which it could have a value, that is the loss.
    """
    higher = objective.higher_is_better
    error: float | None = 0.0
    if tally is not None:
        result = tally.result()
        value, error = result.accuracy, result.error
        if error is None and objective.unit != "%":
            error = 0.0  # nobody knows it
    elif isinstance(objective, BlackBox):
        value = value_of(objective, module)
    else:
        value, higher = loss, False
    if math.isnan(value):
        return worthless(objective, count)
    if math.isnan(loss):
        loss = -objective.signed(value)
    return Judgement(value, loss, count, higher, error)


def worthless(objective: Objective, count: int) -> Judgement:
    """Judge a network whose outputs aren't finite."""
    return Judgement(objective.worst, math.inf, count, objective.higher_is_better, 0.0)


def judged_at_a_time(split: Split) -> int:
    """Return how many samples are judged at a time, so that large ones don't take all memory."""
    inputs, _ = split.take(torch.arange(1))
    values = sum(leaf.numel() for leaf in leaves(inputs))
    return max(1, min(JUDGED_BATCH, JUDGED_VALUES // max(1, values)))


class HeldOutLoss:
    """The mean of a loss of the user's over held-out samples."""

    def __init__(self, loss: UserLoss | None) -> None:
        """Take the loss; None: there is none."""
        self.loss = loss
        self.total = 0.0
        self.seen = 0

    def add(self, outputs: Any, targets: Any, count: int) -> None:
        """Add the loss of a batch.

        Args:
            outputs: In evaluation mode.
            targets: Of the batch.
            count: The number of samples.

        Raises:
            ValueError: If the loss can't be computed, but could on samples before.
        """
        if self.loss is None:
            return
        try:
            with torch.no_grad():
                found = float(user_loss(self.loss, outputs, targets))
        except ValueError as error:
            if self.seen:
                raise  # a mean over some of the samples can't be held against one over all
            logger.warning(
                f"{error}; that is in evaluation mode, on held-out samples: networks are judged there by how far their "
                "outputs are from the float network's instead"
            )
            self.loss = None
            return
        self.total += found * count
        self.seen += count

    def mean(self, otherwise: float) -> float:
        """Return the mean; another number if there is none, and infinity for one that isn't finite."""
        if self.loss is None or not self.seen:
            return otherwise
        mean = self.total / self.seen
        if not math.isfinite(mean):
            return math.inf
        return mean


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
        objective: Whose distance between outputs is lessened; None: classification of images.
        loss: As of `finetune`.
    """

    network: Network
    split: Split
    steps: int
    seed: int
    learning_rate: float | None = None
    objective: Objective | None = None
    loss: UserLoss | None = None

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
            objective=self.objective,
            loss=self.loss,
            keep_best=False,  # the search itself judges what comes out
        )


@torch.no_grad()
def refresh_norms(network: Network, module: nn.Module, split: Split, images: int = 4000) -> None:
    """Give norms with running statistics the mean and variance of what they see now, in place.

    Every sample counts the same, however they are divided into batches, and of every class there is its share. All else is in
    evaluation mode. A norm that is frozen (`is_frozen`) keeps its statistics.

    Args:
        network: What preprocesses the inputs.
        module: What the norms are in; it is left in evaluation mode.
        split: The samples.
        images: How many of them are looked at.

    Raises:
        ValueError: If a norm sees a single value of each channel, so that there is no variance.
    """
    module.eval()
    norms = [norm for norm in running_norms(module) if not is_frozen(norm)]
    if not norms:
        return
    caller = Called(network, module)
    batches = caller.given(some_batches(split, images, NORM_BATCH))
    take_statistics(caller, norms, batches, forward=lambda called, inputs: called(inputs))


def some_batches(split: Split, count: int, size: int) -> Iterator[tuple[Any, Any]]:
    """Yield (inputs, targets) of some samples, of every class its share.

    Args:
        split: The samples.
        count: How many.
        size: Of a batch, at most. Batches are of about the same size: what a norm sees depends on how the one before it sees
            its batch. Of samples that come in batches of their own, the first ones are taken.

    Yields:
        Batches.
    """
    if isinstance(split.source, Stream):
        seen = 0
        for inputs, targets in split.batches(size):
            yield inputs, targets
            seen += count_of(inputs)
            if seen >= count:
                return
        return
    chosen = stratified(classes_of(split), min(count, len(split)))
    parts = math.ceil(len(chosen) / size)
    for part in range(parts):
        yield split.take(chosen[part::parts])
