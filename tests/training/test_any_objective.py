"""Training, fine-tuning and reconstruction by any objective, with inputs and outputs of any structure."""

from __future__ import annotations

import copy
import functools
import json
import math
import re
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import haq
import quantizers as Q
from haq import data, finetune, networks, search, train, training
from haq.console.errors import run_command
from haq.problem.distribution import Categorical
from haq.problem.objective import Accuracy, BlackBox, MetricObjective, Objective, ValueObjective
from haq.problem.tally import measure
from haq.store.checkpoint import Checkpoint
from haq.training.config import Judgement, Outcome
from haq.training.finetuning import HeldOutLoss
from haq.training.optimizers import SCHEDULES, torch_optimizers, torch_schedulers, usual_rate
from haq.training.schedules import share_of_peak
from tests.conftest import brightest, fitted_network, images, small_network

COUNT = 96


class SquaredError(ValueObjective):
    """The mean squared error, which is lower for a better network."""

    name = "squared error"
    higher_is_better = False

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().flatten(1).mean(1)


class Pixels(ValueObjective):
    """The share of pixels that are of the right class."""

    name = "pixels"
    higher_is_better = True
    unit = "%"

    @property
    def distribution(self) -> Categorical:
        return Categorical(1)

    def values(self, outputs: Any, targets: Tensor) -> Tensor:
        return (scores(outputs).argmax(1) == targets).float().flatten(1).mean(1)

    def losses(self, outputs: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(scores(outputs), targets, reduction="none").flatten(1).mean(1)


class MeanIoU(Pixels, MetricObjective):
    """The intersection over union of the pixels of each class."""

    name = "mIoU"

    def metric(self) -> Any:
        return Intersections()


class Intersections:
    """As a metric of torchmetrics, which takes seconds to import."""

    def __init__(self) -> None:
        self.counts = torch.zeros(2, 2)

    def to(self, device: torch.device) -> Intersections:
        return self

    def update(self, outputs: Any, targets: Tensor) -> None:
        answers = scores(outputs).argmax(1)
        for number in range(2):
            of_class, answered = targets == number, answers == number
            self.counts[number] += torch.stack([(of_class & answered).sum(), (of_class | answered).sum()])

    def compute(self) -> Tensor:
        return (self.counts[:, 0] / self.counts[:, 1]).mean()


class Words(ValueObjective):
    """The cross-entropy of the words of a text, in nats; those after its end don't count."""

    name = "nats"
    unit = "nats"
    higher_is_better = False

    @property
    def distribution(self) -> Categorical:
        return Categorical(-1)

    def values(self, outputs: Any, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(scores(outputs).transpose(1, 2), targets, reduction="none", ignore_index=-100)
        return losses.sum(1) / (targets != -100).sum(1)


def scores(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    if "out" in outputs:
        return outputs["out"]
    return outputs["logits"]


class Regressor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 24)
        self.middle = nn.Linear(24, 24)
        self.last = nn.Linear(24, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self.first(x).relu()).relu())


class TwoInputs(Regressor):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(torch.cat([left, right], 1))


class ByName(Regressor):
    def forward(self, *, left: Tensor, right: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(torch.cat([left, right], 1))


class Segmenter(nn.Module):
    """As those of torchvision: a dict, with auxiliary scores."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.aux = nn.Conv2d(8, 2, 1)
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.norm(self.first(x)).relu()
        return {"out": self.last(self.middle(x).relu()), "aux": self.aux(x)}


class TextOutput(dict):  # type: ignore[type-arg]
    """Outputs by name, and as attributes, as Hugging Face has them."""

    __getattr__ = dict.__getitem__


class Reader(nn.Module):
    """Tells the next word; its inputs and outputs are by name."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 12)
        self.first = nn.Linear(12, 16)
        self.last = nn.Linear(16, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Any = None) -> TextOutput:
        assert labels is None  # they are taken out of the call
        x = self.embedding(input_ids)
        if attention_mask is not None:
            x = x * attention_mask[..., None]
        return TextOutput(logits=self.last(self.first(x).relu()), loss=None)


def regression(kind: str = "tensor", count: int = COUNT) -> tuple[Any, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 6, generator=generator)
    targets = torch.stack([x[:, 0] * x[:, 1], x[:, 2:].sum(1)], 1)
    left, right = x.split(3, 1)
    if kind == "tuple":
        return (left, right), targets
    if kind == "dict":
        return {"left": left, "right": right}, targets
    return x, targets


def pixels(count: int = COUNT) -> tuple[Tensor, Tensor]:
    x = images(count)
    return x, (x[:, 0] > 0.4).long()


def texts() -> list[Any]:
    """Batches of texts of different lengths, padded within a batch."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for length in (5, 7, 4, 6, 5, 8):
        words = torch.randint(1, 8, (16, length), generator=generator)
        mask = torch.ones_like(words)
        mask[::2, -1] = 0
        targets = (words + 1) % 8
        targets[mask == 0] = -100
        batches.append({"input_ids": words, "attention_mask": mask, "labels": targets})
    return batches


class Batches:
    """Batches that can be gone through again, and that stay as they are."""

    def __iter__(self) -> Any:
        return iter(texts())


# What is trained, by name: the network, the samples, and what it is judged by.
TASKS: dict[str, tuple[type[nn.Module], Any, Objective]] = {
    "tensor": (Regressor, regression(), SquaredError()),
    "tuple": (TwoInputs, regression("tuple"), SquaredError()),
    "dict": (ByName, regression("dict"), SquaredError()),
    "segmentation": (Segmenter, pixels(), Pixels()),
    "metric": (Segmenter, pixels(), MeanIoU()),
    "texts": (Reader, Batches(), Words()),
}


def made(kind: type[nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind().eval()


def split_of(given: Any) -> data.Split:
    if isinstance(given, Batches):
        from haq.data.sources import source_of

        return data.Split(source_of(given, "texts", 2**30))
    return data.Split(*given)


def network_of(module: nn.Module, shape: tuple[int, ...] = ()) -> networks.Network:
    return networks.Network("own", module, shape)


@functools.cache
def trained(task: str) -> nn.Module:
    kind, given, objective = TASKS[task]
    network = network_of(made(kind))
    config = training.TrainConfig(20, 5e-3, 0, batch_size=16, optimizer="adam")
    training.fit(network, split_of(given), config, objective=objective)
    return network.module


def learned(task: str) -> tuple[networks.Network, data.Split, Objective]:
    """A network that was trained by an objective, its samples, and the objective."""
    _, given, objective = TASKS[task]
    return network_of(copy.deepcopy(trained(task))), split_of(given), objective


def quantized(network: networks.Network, split: data.Split, bits: int = 2) -> nn.Module:
    batches = [(network.preprocess(inputs), targets) for inputs, targets in split.batches(COUNT)]
    policy = dict(Q.BitPolicy.uniform(network.module, w=bits, a=bits + 1))
    if isinstance(network.module, Aided):
        policy["aux"] = (None, None)  # in evaluation mode it isn't called
    return Q.quantize(network.module, Q.BitPolicy(policy), calibrate=batches)


@pytest.mark.parametrize("task", TASKS)
def test_training_by_targets_betters_the_value(task: str) -> None:
    kind = TASKS[task][0]
    network, split, objective = learned(task)
    before, after = (measure(objective, network, split, module) for module in (made(kind), network.module))
    assert objective.signed(after) > objective.signed(before) + 0.1


@pytest.mark.parametrize("task", TASKS)
def test_finetuning_at_few_bits_betters_the_value_on_held_out_samples(task: str) -> None:
    network, split, objective = learned(task)
    qnetwork = quantized(network, split)
    outcomes: list[Outcome] = []
    options: dict[str, Any] = {"epochs": 8, "learning_rate": 0.02, "batch_size": 16, "objective": objective}
    tuned = training.finetune(network, qnetwork, split, seed=0, on_outcome=outcomes.append, **options)
    (outcome,) = outcomes
    assert outcome.kept
    held = training.hold_out(split)[1]
    before, after = (measure(objective, network, held, module) for module in (qnetwork, tuned))
    assert outcome.before is not None
    assert (outcome.before.value, outcome.best.value) == pytest.approx((before, after))
    assert outcome.before.higher_is_better == objective.higher_is_better
    assert objective.signed(after) > objective.signed(before)
    assert outcome.best.beats(outcome.before)
    again = training.finetune(network, qnetwork, split, seed=0, **options)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in tuned.state_dict().items())


@pytest.mark.parametrize("task", ["tensor", "tuple", "dict"])
def test_roundings_are_learned_for_any_structure(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("haq.training.reconstruction.ITERATIONS", 60)
    network, split, objective = learned(task)
    found = training.reconstruct(network, quantized(network, split, 3), split, seed=0, objective=objective)
    assert found.after.higher_is_better == objective.higher_is_better
    assert found.kept
    assert found.best.loss < found.before.loss


def test_the_judge_tells_value_divergence_and_error() -> None:
    network, split, objective = learned("tensor")
    qnetwork = quantized(network, split)
    judged = training.judge_of(network, split, objective=objective)(qnetwork)
    x, targets = regression()
    with torch.no_grad():
        outputs, expected = qnetwork(x), network.module(x)
    errors = (outputs - targets).square().mean(1).double()
    assert judged.value == pytest.approx(float(errors.mean()))
    assert judged.error == pytest.approx(float(errors.std() / COUNT**0.5))
    variance = expected.double().var(correction=0)
    assert judged.loss == pytest.approx(float((outputs - expected).double().square().mean() / variance), rel=1e-5)
    assert not judged.higher_is_better
    assert judged.images == COUNT


def test_a_judgement_knows_what_is_better() -> None:
    before = Judgement(2.0, 1.0, 100, False, 0.1)
    assert Judgement(1.9, 0.9, 100, False, 0.1).beats(before)
    assert Judgement(2.05, 0.9, 100, False, 0.1).beats(before)
    assert not Judgement(2.2, 0.9, 100, False, 0.1).beats(before)
    assert not Judgement(1.0, 1.1, 100, False, 0.1).beats(before)
    assert Judgement(-2.0, 0.9, 100, False).beats(Judgement(-1.0, 1.0, 100, False, math.nan))
    assert (before.value, before.score) == (2.0, -2.0)


def test_classification_by_name_is_classification() -> None:
    """With the objective and without, networks are the same to the last bit."""
    module = fitted_network()
    network = network_of(module, (1, 8, 8))
    x = images(128)
    split = data.Split(x, brightest(x))
    qnetwork = Q.quantize(module, Q.BitPolicy.uniform(module, w=3, a=3), calibrate=x)
    found = []
    for objective in (None, Accuracy()):
        outcomes: list[Outcome] = []
        tuned = training.finetune(network, qnetwork, split, epochs=2, seed=0, objective=objective, on_outcome=outcomes.append)
        trained = small_network(1)
        training.fit(network, split, training.TrainConfig(2, 0.02, 0, batch_size=32), module=trained, objective=objective)
        found.append((tuned.state_dict(), trained.state_dict(), outcomes))
    assert found[0][2] == found[1][2]
    for one, other in zip(found[0][:2], found[1][:2], strict=True):
        assert all(torch.equal(value, other[key]) for key, value in one.items())


@pytest.mark.parametrize("task", TASKS)
def test_a_result_is_finetuned_by_its_objective(task: str) -> None:
    """Of any structure. The outputs come nearer to the float network's on what was searched on; what is better is kept."""
    network, split, objective = learned(task)
    batches = list(split.batches(16))
    problem = haq.Problem(
        network.module,
        [inputs for inputs, _ in batches] if task in ("tensor", "segmentation", "metric") else batches,
        batches,
        "edge",
        budget=1.0,
        bits=(2, 3),
        pinned={},
        objective=objective,
    )
    result = haq.solve(problem, "random", evaluations=1)
    before = result.evaluate(result.quantized)
    tuned = result.finetune(batches, epochs=6, learning_rate=0.02, batch_size=16)
    after = result.evaluate(tuned)
    assert after.divergence < before.divergence
    assert (result.quantized is tuned) == ((-after.score, after.loss) < (-before.score, before.loss))


# Auxiliary outputs.

Answers = namedtuple("Answers", ["logits", "aux_logits2", "aux_logits1"])


class Aided(nn.Module):
    """As GoogLeNet: in training mode there are auxiliary scores."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first = nn.Linear(6, 8)
        self.aux = nn.Linear(8, 2)
        self.last = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Any:
        x = self.first(x).relu()
        answer = self.last(x)
        if self.kind == "named":
            return Answers(answer, self.aux(x), None) if self.training else answer
        if self.kind == "tuple":
            return (answer, self.aux(x)) if self.training else answer
        if self.kind == "by name":
            return {"out": answer, "aux": self.aux(x), "aux_loss": x.sum()} if self.training else {"out": answer}
        return answer


@pytest.mark.parametrize("kind", ["named", "tuple", "by name"])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_auxiliary_outputs_are_trained_with_a_weight(kind: str, weight: float) -> None:
    class Error(SquaredError):
        def values(self, outputs: Any, targets: Tensor) -> Tensor:
            return super().values(outputs if isinstance(outputs, Tensor) else outputs["out"], targets)

    x, targets = regression()
    module = made(lambda: Aided(kind))  # type: ignore[arg-type]
    losses: list[float] = []
    config = training.TrainConfig(1, 0.0, 0, batch_size=COUNT, auxiliary=weight)
    training.fit(
        network_of(module),
        data.Split(x, targets),
        config,
        objective=Error(),
        on_epoch=lambda epoch, loss: losses.append(loss),
    )
    with torch.no_grad():
        hidden = module.first(x).relu()
        main, aux = ((layer(hidden) - targets).square().mean() for layer in (module.last, module.aux))
    assert losses == [pytest.approx(float(main + weight * aux))]


@pytest.mark.parametrize("kind", ["named", "tuple", "by name"])
def test_auxiliary_outputs_play_no_part_with_a_teacher(kind: str) -> None:
    class Error(SquaredError):
        def values(self, outputs: Any, targets: Tensor) -> Tensor:
            return super().values(outputs if isinstance(outputs, Tensor) else outputs["out"], targets)

    x, targets = regression()
    network = network_of(made(lambda: Aided(kind)))  # type: ignore[arg-type]
    split = data.Split(x, targets)
    qnetwork = quantized(network, split)
    tuned = training.finetune(network, qnetwork, split, epochs=3, seed=0, learning_rate=0.02, objective=Error())
    assert torch.equal(tuned.aux.weight, network.module.aux.weight)
    judge = training.judge_of(network, split, objective=Error())
    assert judge(tuned).loss < judge(qnetwork).loss


def test_scores_with_auxiliary_ones_by_name_are_those_of_classes() -> None:
    """GoogLeNet needs no objective."""
    x, targets = regression()
    module = made(lambda: Aided("named"))  # type: ignore[arg-type]
    split = data.Split(x, (targets[:, 1] > 0).long())
    before = training.accuracy(network_of(module), split)
    training.fit(network_of(module), split, training.TrainConfig(10, 0.05, 0, batch_size=16))
    assert training.accuracy(network_of(module), split) > max(before, 0.8)


# Losses of the user's, and objectives without one.


class Told(BlackBox):
    """Says what it is told."""

    name = "told"

    def evaluate(self, network: nn.Module) -> float:
        return 0.5


def test_a_loss_of_the_users_is_minimised_and_judges() -> None:
    network, split, objective = learned("texts")
    qnetwork = quantized(network, split)
    seen = []

    def loss(outputs: TextOutput, targets: Tensor) -> Tensor:
        seen.append(type(outputs))
        return F.cross_entropy(outputs["logits"].transpose(1, 2), targets, ignore_index=-100)

    outcomes: list[Outcome] = []
    tuned = training.finetune(
        network,
        qnetwork,
        split,
        epochs=6,
        seed=0,
        learning_rate=0.02,
        objective=objective,
        loss=loss,
        on_outcome=outcomes.append,
    )
    assert set(seen) == {TextOutput}
    assert outcomes[0].kept
    held = training.hold_out(split)[1]
    with torch.no_grad():
        losses = [(float(loss(tuned(**inputs), targets)), len(targets)) for inputs, targets in held.batches(250)]
    assert outcomes[0].best.loss == pytest.approx(sum(one * count for one, count in losses) / len(held))


def test_a_black_box_is_asked_for_the_value() -> None:
    network, split, _ = learned("tensor")
    outcomes: list[Outcome] = []
    training.finetune(
        network, quantized(network, split), split, epochs=3, seed=0, objective=Told(), on_outcome=outcomes.append
    )
    assert outcomes[0].kept
    assert [judged.value for judged in outcomes[0].epochs] == [0.5] * 3


def test_what_there_is_nothing_to_train_by_is_refused() -> None:
    class Nothing(SquaredError):
        distribution = None  # type: ignore[assignment]

        def losses(self, outputs: Any, targets: Any) -> None:
            return None

    network, split, _ = learned("tensor")
    qnetwork = quantized(network, split)
    config = training.TrainConfig(1, 0.1, 0)
    message = "objective 'Nothing' has no distance between a network's outputs and the float network's"
    for refused in (
        lambda: training.finetune(network, qnetwork, split, epochs=1, seed=0, objective=Nothing()),
        lambda: training.reconstruct(network, qnetwork, split, seed=0, objective=Nothing()),
        lambda: training.fit(network, split, config, teacher=network.module, objective=Nothing()),
    ):
        with pytest.raises(ValueError, match=message):
            refused()
    with pytest.raises(ValueError, match="objective 'Nothing' has no loss that can be trained"):
        training.fit(network, split, config, objective=Nothing())
    with pytest.raises(ValueError, match="objective 'told' is given the network and has no loss"):
        training.fit(network, split, config, objective=Told())
    with pytest.raises(ValueError, match="training by objective 'squared error' takes targets, and the data has none"):
        training.fit(network, data.Split(regression()[0]), config, objective=SquaredError())
    tuned = training.finetune(network, qnetwork, split, epochs=1, seed=0, objective=Nothing(), loss=F.mse_loss)
    assert not tuned.training


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda outputs, targets: 3.0, "`loss` must return a number in a tensor, .* not float"),
        (lambda outputs, targets: targets.argmax(1), "not torch.int64 of shape"),
        (lambda outputs: outputs, "`loss`, a function of .*, failed: TypeError"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss: Any, message: str) -> None:
    network = network_of(made(Regressor))
    with pytest.raises(ValueError, match=message):
        training.fit(network, data.Split(*regression()), training.TrainConfig(1, 0.1, 0), loss=loss)


def test_a_network_is_called_as_the_user_says() -> None:
    network, split, objective = learned("dict")

    def forward(module: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        assert targets.shape[1] == 2
        return module(left=inputs["left"], right=inputs["right"])  # type: ignore[no-any-return]

    own = networks.Network("own", network.module, (), forward=forward)
    qnetwork = quantized(network, split)
    tuned = [training.finetune(one, qnetwork, split, epochs=2, seed=0, objective=objective) for one in (network, own)]
    assert all(torch.equal(value, tuned[1].state_dict()[key]) for key, value in tuned[0].state_dict().items())


def test_a_loss_that_means_nothing_in_evaluation_mode_is_named(caplog: pytest.LogCaptureFixture) -> None:
    def of_both(outputs: Any, targets: Any) -> Tensor:
        return (outputs[0] - targets).square() + outputs[1]

    losses = HeldOutLoss(of_both)
    losses.add([torch.ones(2)], torch.zeros(2), 2)
    losses.add([torch.ones(2)], torch.zeros(2), 2)
    assert losses.mean(3.0) == 3
    (record,) = caplog.records
    assert "judged there by how far their outputs are from the float network's" in record.getMessage()
    sometimes = HeldOutLoss(of_both)
    sometimes.add([torch.ones(2), torch.ones(2)], torch.zeros(2), 2)
    assert sometimes.mean(3.0) == 2
    with pytest.raises(ValueError, match="list index out of range"):
        sometimes.add([torch.ones(2)], torch.zeros(2), 2)


def test_whole_groups_are_held_out() -> None:
    x, targets = regression()
    groups = torch.arange(COUNT) // 8
    kept, held = training.hold_out(data.Split(x, targets, groups))
    assert kept.groups is not None
    assert held.groups is not None
    assert not set(kept.groups.tolist()) & set(held.groups.tolist())
    assert len(kept) + len(held) == COUNT


# Early stopping, optimizers, schedules, half precision.


def test_early_stopping_stops() -> None:
    worth = [0.5, 0.4, 0.45, 0.3, 0.31, 0.32, 0.2, 0.1]
    rest = iter(worth)
    network = network_of(made(Regressor))
    outcome = training.fit(
        network,
        data.Split(*regression()),
        training.TrainConfig(8, 0.01, 0, batch_size=32, patience=2),
        objective=SquaredError(),
        judge=lambda module: Judgement(0.5, next(rest)),
    )
    assert outcome is not None
    assert [judged.loss for judged in outcome.epochs] == worth[:6]
    assert outcome.kept == 4
    assert outcome.stopped
    with pytest.raises(ValueError, match="patience is 2, but nothing is held out"):
        training.fit(network, data.Split(*regression()), training.TrainConfig(1, 0.1, 0, patience=2))
    with pytest.raises(ValueError, match="patience is 0; it must be a number of epochs of at least 1"):
        training.TrainConfig(1, 0.1, 0, patience=0)


@pytest.mark.parametrize("name", [name for name in torch_optimizers() if name != "Muon"])
def test_every_optimizer_of_torch_trains(name: str) -> None:
    module = made(Regressor)
    config = training.TrainConfig(4, usual_rate(name), 0, batch_size=16, optimizer=name, schedule="constant")
    losses: list[float] = []
    training.fit(
        network_of(module),
        data.Split(*regression()),
        config,
        objective=SquaredError(),
        on_epoch=lambda epoch, loss: losses.append(loss),
    )
    assert losses[-1] < losses[0]


def test_names_of_optimizers() -> None:
    assert {"AdamW", "RMSprop", "SGD"} <= set(torch_optimizers())
    training.TrainConfig(1, 0.1, 0, optimizer="adamw")
    for name, message in {
        "AdmW": "unknown optimizer 'AdmW'; known: sgd, adam, and of torch .*did you mean AdamW",
        "LBFGS": "unknown optimizer 'LBFGS' .it takes a loss that is computed anew",
    }.items():
        with pytest.raises(ValueError, match=message):
            training.TrainConfig(1, 0.1, 0, optimizer=name)
    with pytest.raises(ValueError, match="optimizer 'Muon' can't train this network .*2D"):
        training.fit(
            network_of(made(Regressor)),
            data.Split(*regression()),
            training.TrainConfig(1, 0.1, 0, optimizer="Muon"),
            objective=SquaredError(),
        )


def rates_of(schedule: str, epochs: int = 8) -> list[float]:
    """The learning rate of every step, four an epoch."""
    found: list[float] = []

    def optimizers(module: nn.Module) -> list[torch.optim.Optimizer]:
        made = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
        made.register_step_pre_hook(lambda one, *rest: found.append(one.param_groups[0]["lr"]))
        return [made]

    config = training.TrainConfig(epochs, 0.1, 0, batch_size=24, optimizer=optimizers, schedule=schedule)
    training.fit(network_of(made(Regressor)), data.Split(*regression()), config, objective=SquaredError())
    return found


def test_schedules_of_our_own() -> None:
    assert rates_of("cosine")[8:][::8] == pytest.approx([0.1 * 0.5 * (1 + math.cos(math.pi * x / 4)) for x in (1, 2, 3)])
    assert rates_of("linear")[8:][::8] == pytest.approx([0.075, 0.05, 0.025])
    assert rates_of("step")[8:][::8] == pytest.approx([0.1, 0.01, 0.001])
    assert rates_of("constant")[8:][::8] == pytest.approx([0.1, 0.1, 0.1])
    for name in SCHEDULES:
        assert rates_of(name)[0] == pytest.approx(0.025)
        assert share_of_peak(name, 0, 10_000) == 1 / 200


@pytest.mark.parametrize("name", torch_schedulers())
def test_every_schedule_of_torch_is_made(name: str) -> None:
    rates = rates_of(name)
    assert len(rates) == 32
    assert 0 <= min(rates) <= max(rates) <= 0.1 + 1e-9
    if name != "ReduceLROnPlateau":
        assert len(set(rates)) > 1


def test_schedules_of_torch_take_arguments() -> None:
    assert rates_of("StepLR,step_size=2,gamma=0.5")[::8] == pytest.approx([0.1, 0.05, 0.025, 0.0125])
    assert rates_of("MultiStepLR, milestones=[1,4]")[::8] == pytest.approx([0.1, 0.01, 0.001, 0.001])
    for text, message in {
        "cosin": "unknown schedule 'cosin'; known: cosine, linear, step, constant, and of torch",
        "LambdaLR": "unknown schedule 'LambdaLR' .it is made of functions or of other schedulers",
        "StepLR,size=3": "schedule 'StepLR,size=3' has 'size=3'; StepLR takes step_size=, gamma=",
        "StepLR,gamma=2*": "has the value '2.'; it must be a number, a name or a list",
    }.items():
        with pytest.raises(ValueError, match=message):
            training.TrainConfig(1, 0.1, 0, schedule=text)
    with pytest.raises(ValueError, match="schedule 'StepLR,step_size=x' can't be made|has the value"):
        rates_of("StepLR,step_size=x")


@pytest.mark.parametrize(
    ("optimizer", "schedule", "options"),
    [
        ("AdamW", "MultiStepLR,milestones=[1,3]", {}),
        ("NAdam", "OneCycleLR", {"patience": 3}),
        ("RMSprop", "ReduceLROnPlateau,patience=0", {"amp": True}),
        ("sgd", "CyclicLR", {"amp": True}),
    ],
)
@pytest.mark.parametrize("killed", [1, 3])
def test_an_interrupted_training_goes_on_bit_for_bit(
    optimizer: str, schedule: str, options: dict[str, Any], killed: int, tmp_path: Path
) -> None:
    x, targets = regression()
    held = data.Split(x[:16], targets[:16])
    network = network_of(made(Regressor))
    config = training.TrainConfig(4, 0.01, 0, batch_size=16, optimizer=optimizer, schedule=schedule, **options)

    def run(name: str, stop: int = 0) -> nn.Module:
        module = made(Regressor, 1)

        def on_epoch(epoch: int, loss: float) -> None:
            if epoch == stop:
                raise KeyboardInterrupt

        judge = training.judge_of(network, held, objective=SquaredError(), loss=F.mse_loss)
        state = Checkpoint(tmp_path / name, {})
        training.fit(
            network,
            data.Split(x[16:], targets[16:]),
            config,
            module=module,
            objective=SquaredError(),
            judge=judge,
            state=state,
            on_epoch=on_epoch,
        )
        return module

    whole = run("whole")
    with pytest.raises(KeyboardInterrupt):
        run("cut", killed)
    part = run("cut")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "cut").read_bytes()
    assert all(torch.equal(value, part.state_dict()[key]) for key, value in whole.state_dict().items())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", ["linear", "lsq"])
def test_half_precision_trains_and_scales_stay_float32(
    half: torch.dtype, scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("haq.training.loop.half_precision", lambda device: half)
    module = fitted_network()
    network = network_of(module, (1, 8, 8))
    x = images(128)
    split = data.Split(x, brightest(x))
    types: list[torch.dtype] = []
    module.hidden.register_forward_hook(lambda layer, given, output: types.append(output.dtype))
    qnetwork = Q.quantize(module, Q.BitPolicy.uniform(module, w=3, a=3), scheme=scheme, calibrate=x)
    outcomes: list[Outcome] = []
    tuned = training.finetune(network, qnetwork, split, epochs=3, seed=0, amp=True, on_outcome=outcomes.append)
    assert outcomes[0].kept
    assert half in types  # of the teacher in training
    assert torch.float32 in types  # of the judge
    tensors = {**tuned.state_dict(), **Q.quantizer_state(tuned)}
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.float32}
    scales = {key: value for key, value in Q.quantizer_state(tuned).items() if "scale" in key}
    before = Q.quantizer_state(qnetwork)
    assert any(not torch.equal(value, before[key]) for key, value in scales.items())


# The commands.

JOB = """
import torch
from haq.problem.objective import ValueObjective
from tests.training.test_any_objective import ByName, Segmenter, SquaredError, pixels, regression

class Error(SquaredError):
    name = "error"
    title = "mean squared error"
    unit = "m2"

def network():
    torch.manual_seed(0)
    return ByName()

def splits():
    inputs, targets = regression("dict", 160)
    def part(begin, end):
        return {key: value[begin:end] for key, value in inputs.items()}, targets[begin:end]
    return {"train": part(0, 96), "search": part(96, 128), "test": part(128, 160)}

def absolute(outputs, targets):
    return (outputs - targets).abs().mean(1)

nothing = 3
"""
ASKED = ["--network", "own_job:network", "--data", "own_job:splits", "--objective", "own_job:Error", "--batch-size", "16"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with a job of one's own in it."""
    (tmp_path / "own_job.py").write_text(JOB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "own_job", raising=False)
    return tmp_path


def test_the_train_command_takes_an_objective(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is judged, and spoken of, by that; the best epoch is written."""
    options = ["--optimizer", "AdamW", "--learning-rate", "0.01", "--schedule", "linear", "--epochs", "6"]
    assert train.main([*ASKED, *options, "--out", "a.safetensors"]) == 0
    captured = capsys.readouterr()
    printed = " ".join((captured.out + captured.err).split())
    found = networks.load("own_job:network@a.safetensors")
    dataset = data.load("own_job:splits")
    error = measure(SquaredError(), found, dataset.test, found.module)
    assert f"mean squared error on the test split: {error:.4g} m2 of 32 samples" in printed
    assert "accuracy" not in printed
    assert error < measure(SquaredError(), found, dataset.test, networks.load("own_job:network").module)
    notes = networks.read_header(Path("a.safetensors")).notes
    assert (notes["objective"], float(notes["test_value"])) == ("error", pytest.approx(error, rel=1e-4))
    assert "--objective own_job:Error --optimizer AdamW --schedule linear" in notes["command"]
    held_out = re.findall(r"held-out mean squared error (\S+) m2", printed)
    kept = int(re.findall(r"kept: the network after epoch (\d+)", printed)[0])
    assert len(held_out) == 6
    assert float(held_out[kept - 1]) == min(map(float, held_out))


def test_the_train_command_takes_a_loss_patience_and_half_precision(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--loss", "own_job:absolute", "--patience", "2", "--amp", "--learning-rate", "3", "--optimizer", "RMSprop"]
    assert train.main([*ASKED, *options, "--epochs", "40", "--out", "a.safetensors"]) == 0
    captured = capsys.readouterr()
    assert "since 2 in a row were no better (--patience)" in " ".join(captured.out.split())
    assert "epoch 40/40" not in captured.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizer", "LBFGS"], "--optimizer is 'LBFGS'; known: sgd, adam"),
        (["--schedule", "sine"], "unknown schedule 'sine'; known: cosine"),
        (["--patience", "0"], "--patience"),
        (["--loss", "own_job:nothing"], "loss 'own_job:nothing' is a int; it must be a function of (outputs, targets)"),
        (["--objective", "agreement"], "tells"),
        (["--adversarial", "pgd"], "--adversarial pgd attacks images of classes"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(
    options: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if options[0] == "--objective":
        message = "own_job:splits has no labels to train by"
    assert run_command(lambda: train.main([*ASKED, *options, "--out", "a.safetensors"])) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not Path("a.safetensors").exists()


@pytest.mark.parametrize("killed", [1, 2])
def test_the_train_command_goes_on_exactly(killed: int, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--optimizer", "AdamW", "--schedule", "OneCycleLR", "--epochs", "3"]
    assert train.main([*ASKED, *options, "--out", "whole.safetensors"]) == 0
    save = Checkpoint.write
    saved = []

    def save_and_die(self: Checkpoint, *rest: Any) -> None:
        save(self, *rest)
        saved.append(self)
        if len(saved) == killed:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "write", save_and_die)
        with pytest.raises(KeyboardInterrupt):
            train.main([*ASKED, *options, "--out", "part.safetensors"])
    assert train.main([*ASKED, *options, "--resume", "--out", "part.safetensors"]) == 0
    whole, part = (networks.read_state(Path(name))[0] for name in ("whole.safetensors", "part.safetensors"))
    assert all(torch.equal(whole[key], part[key]) for key in whole)


def test_the_finetune_command_takes_the_objective_of_the_run(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a loss, an optimizer and a schedule that are named; what it goes on with belongs to them."""
    of_search = [*ASKED[:-2], "--hw", "edge", "--budget", "0.7", "--bits", "2:4", "--solver", "random", "--evaluations", "1"]
    assert search.main([*of_search, "--finetune-epochs", "0", "--out", "run"]) == 0
    training_options = ["--epochs", "3", "--optimizer", "AdamW", "--schedule", "linear", "--patience", "3", "--amp"]
    capsys.readouterr()
    assert finetune.main(["run", *training_options, "--loss", "own_job:absolute"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "mean squared error measured on this machine" in printed
    assert "accuracy" not in printed
    tuning = json.loads(Path("run/result.json").read_text())["tuning"]
    assert (tuning["images"], tuning["epochs"]) == (24, 3)
    write = Checkpoint.write
    with pytest.MonkeyPatch.context() as patch:

        def write_and_die(self: Checkpoint, *rest: Any) -> None:
            write(self, *rest)
            raise RuntimeError

        patch.setattr(Checkpoint, "write", write_and_die)
        with pytest.raises(RuntimeError):
            finetune.main(["run", *training_options])
    assert run_command(lambda: finetune.main(["run", *training_options, "--optimizer", "RMSprop", "--resume"])) == 2
    assert "optimizer was 'AdamW' and is 'RMSprop' now" in capsys.readouterr().err
    assert finetune.main(["run", *training_options, "--resume"]) == 0
    assert run_command(lambda: finetune.main(["run", "--method", "ptq", "--optimizer", "AdamW"])) == 2
    assert "--optimizer is of training: leave it out" in capsys.readouterr().err
