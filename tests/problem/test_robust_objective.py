"""With --objective accuracy+robust a policy is judged by images that are right both as they are and under a cheap attack."""

from __future__ import annotations

import copy
import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F

import haq
import quantizers as Q
from haq import data, evaluate, finetune, search, sweep
from haq.attacks import base
from haq.attacks.proxy import ProxyAttack
from haq.attacks.threat_model import PerturbationBall
from haq.console.errors import EXIT_BAD_INPUT, EXIT_INTERRUPTED, run_command
from haq.networks import Network
from haq.problem.evaluator import BATCH, Evaluator
from haq.problem.objective import RobustAccuracy
from haq.study import search_steps
from haq.study.config import SearchConfig
from haq.study.search_run import SearchRun
from haq.study.task import SearchTask
from quantizers.schemes import Linear
from tests.conftest import images, small_network
from tests.training.test_finetuning_in_the_loop import tuning

EPS = 0.15
OBJECTIVE = "accuracy+robust"
MEAN, STD = (0.4,), (0.5,)
CALIBRATION = (images(32, 1) - MEAN[0]) / STD[0]


def described(network: nn.Module) -> Network:
    return Network("small", network, (1, 8, 8), MEAN, STD)


def labelled(network: nn.Module, count: int = 300) -> tuple[Tensor, Tensor]:
    """Inputs, and the network's own answers to them, but for every tenth."""
    inputs = (images(count) - MEAN[0]) / STD[0]
    with torch.no_grad():
        labels = copy.deepcopy(network).eval()(inputs).argmax(1)
    labels[::10] = (labels[::10] + 1) % 4
    return inputs, labels


def robust(network: nn.Module, count: int = 300, **options: Any) -> haq.Problem:
    proxy = options.pop("proxy", None) or ProxyAttack.of(described(network), EPS)
    return haq.Problem(
        network, CALIBRATION, labelled(network, count), "edge", budget=0.6, objective=RobustAccuracy(proxy), **options
    )


def by_hand(network: nn.Module, evaluator: Evaluator, inputs: Tensor, labels: Tensor, eps: float) -> tuple[float, float]:
    """Accuracy and loss, with three steps of PGD written down plainly, in pixels."""
    right, losses = [], []
    for number, batch in enumerate(evaluator.order.split(BATCH)):
        pixels, answers = inputs[batch] * STD[0] + MEAN[0], labels[batch]
        start = 2 * torch.rand(pixels.shape, generator=torch.Generator().manual_seed(number)) - 1
        x = (pixels + eps * start).clamp(0, 1)
        for _ in range(3):
            x = x.clone().requires_grad_()
            F.cross_entropy(network((x - MEAN[0]) / STD[0]), answers, reduction="sum").backward()
            step = x + 2.5 * eps / 3 * x.grad.sign()
            x = torch.minimum(torch.maximum(step, pixels - eps), pixels + eps).clamp(0, 1).detach()
        with torch.no_grad():
            scores = [network((p - MEAN[0]) / STD[0]).double() for p in (pixels, x)]
        right += ((scores[0].argmax(1) == answers) & (scores[1].argmax(1) == answers)).tolist()
        losses += torch.maximum(*(F.cross_entropy(part, answers, reduction="none") for part in scores)).tolist()
    return sum(right) / len(right), sum(losses) / len(losses)


def test_accuracy_and_loss_are_those_of_their_definitions(network: nn.Module) -> None:
    problem = robust(network)
    inputs, labels = labelled(network)
    for policy in (problem.uniform(3), problem.uniform(6), None):
        judged = network
        if policy is not None:
            scheme = Q.Linear("output")
            judged = Q.quantize(network, policy, scheme=scheme, calibrate=CALIBRATION, correction="analytic")
        result = problem.float_result if policy is None else problem.evaluate(policy)
        accuracy, loss = by_hand(judged, problem.evaluator, inputs, labels, EPS)
        # Computed in pixels, a value may round the other way, and a gradient near 0 have another sign.
        assert result.accuracy == pytest.approx(accuracy, abs=1.5 / 300)
        assert result.loss == pytest.approx(loss, rel=5e-3)
        assert result.images == 300


def test_no_policy_is_better_under_attack(network: nn.Module) -> None:
    plain = haq.Problem(network, CALIBRATION, labelled(network), "edge", budget=0.6)
    attacked = robust(network)
    for bits in range(1, 9):
        before, after = (problem.evaluate(problem.uniform(bits)) for problem in (plain, attacked))
        assert after.accuracy <= before.accuracy
        assert after.loss > before.loss
        assert after.divergence == pytest.approx(before.divergence, rel=1e-6)  # of the clean images
    assert after.accuracy < before.accuracy - 0.02
    assert attacked.float_accuracy < plain.float_accuracy - 0.02
    # Less eps finds less, and more steps find more.
    less, more = (robust(network, proxy=ProxyAttack.of(described(network), *how)) for how in ((EPS / 3, 3), (EPS, 20)))
    assert less.float_accuracy > attacked.float_accuracy > more.float_accuracy + 0.1
    assert less.float_result.loss < attacked.float_result.loss < more.float_result.loss


def test_an_image_is_right_if_it_is_so_both_times() -> None:
    """A network that answers with its input, and an attack that is written down: of four images one is right twice, one only
    clean, one only attacked, one never."""
    right, wrong = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 1.0])
    clean, attacked = torch.stack([right, right, wrong, wrong]), torch.stack([right, wrong, right, wrong])

    def attack(network: nn.Module, inputs: Tensor, labels: Tensor, number: int) -> Tensor:
        return attacked[evaluator.order]

    evaluator = Evaluator(nn.Identity(), clean, torch.zeros(4, dtype=torch.long), objective=RobustAccuracy(attack))
    result = evaluator.measure(evaluator.network)
    at_worst = F.cross_entropy(torch.stack([right, wrong, wrong, wrong]), torch.zeros(4, dtype=torch.long))
    assert result.accuracy == 1 / 4
    assert result.loss == pytest.approx(at_worst.item())


@pytest.mark.parametrize("count", [300, 60])
def test_neither_threads_nor_order_change_a_result(network: nn.Module, count: int) -> None:
    """Of three batches, or one."""
    policies = [haq.Problem(network, CALIBRATION, labelled(network), "edge").uniform(bits) for bits in (2, 3, 5, 8)]
    before, found = torch.get_num_threads(), []
    random = torch.get_rng_state()
    try:
        for threads, order in ((1, 1), (2, -1), (3, 1)):
            torch.set_num_threads(threads)
            problem = robust(network, count)
            results = {policy: problem.evaluate(policy) for policy in policies[::order]}
            problem.evaluator.cache.clear()
            assert problem.evaluate(policies[1]) == results[policies[1]]
            found.append([problem.float_result, *(results[policy] for policy in policies)])
    finally:
        torch.set_num_threads(before)
    assert found[1:] == found[:1] * 2
    assert len({result.loss for result in found[0]}) == 5
    assert torch.equal(torch.get_rng_state(), random)


def test_evaluation_in_inference_mode_or_without_gradients_is_the_same(network: nn.Module) -> None:
    problem = robust(network)
    policy = problem.uniform(4)
    results = [problem.evaluate(policy)]
    for mode in (torch.no_grad, torch.inference_mode):
        problem.evaluator.cache.clear()
        with mode():
            results.append(problem.evaluate(policy))
    assert results[0] == results[1] == results[2]


def test_weights_are_quantized_once_per_width(network: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, made = robust(network), []
    weight = Linear.weight
    monkeypatch.setattr(Linear, "weight", lambda self, layer, bits: made.append(bits) or weight(self, layer, bits))
    for bits in (3, 5, 3):
        problem.evaluator.cache.clear()
        problem.evaluate(problem.uniform(bits))
    assert made == [3] * 5 + [5] * 5


def test_the_network_given_is_left_as_it_was(network: nn.Module) -> None:
    network.train()
    state = {key: value.clone() for key, value in network.state_dict().items()}
    problem = robust(network)
    problem.evaluate(problem.uniform(4))
    assert network.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())


def test_an_accuracy_to_beat_ends_early_too(network: nn.Module) -> None:
    problem = robust(network, 1000)
    policy = problem.uniform(1)
    stopped = problem.evaluator.evaluate(policy, beat=0.9)
    assert stopped.images < 1000
    assert problem.evaluate(policy).images == 1000
    assert problem.evaluate(policy).accuracy < 0.9


def test_a_tuned_network_is_attacked_as_it_is_after_tuning(network: nn.Module) -> None:
    problem, other = robust(network, 60, tune=tuning(network)), robust(network, 60)
    policy = problem.uniform(2)
    tuned = problem.evaluator.prepared(policy)
    assert problem.evaluate(policy) == problem.evaluator.measure(tuned)
    assert problem.evaluate(policy).loss != other.evaluate(policy).loss


def test_attacks_stay_within_eps_and_the_range_of_images(network: nn.Module) -> None:
    inputs, labels = labelled(network, 60)
    ball = PerturbationBall.of(described(network), EPS)
    attacked = ProxyAttack(ball)(network, inputs, labels, 0)
    pixels, before = (x * STD[0] + MEAN[0] for x in (attacked, inputs))
    assert (pixels - before).abs().max() <= EPS + 1e-6
    assert pixels.min() >= -1e-6
    assert pixels.max() <= 1 + 1e-6
    assert not torch.equal(attacked, ProxyAttack(ball)(network, inputs, labels, 1))
    assert not torch.equal(attacked, ProxyAttack(ball, seed=5)(network, inputs, labels, 0))
    assert str(ProxyAttack.of(described(network), 8 / 255, 4)) == "PGD-4 at eps 8/255"


def test_what_belongs_together_is_asked_for(network: nn.Module) -> None:
    given = network, images(8), labelled(network, 8), "edge"
    proxy = ProxyAttack.of(described(network), EPS)
    with pytest.raises(ValueError, match=r'objective="accuracy\+robust" needs `proxy`, .*haq.attacks.proxy.ProxyAttack.of'):
        haq.Problem(*given, objective=OBJECTIVE)
    with pytest.raises(ValueError, match="no labels to tell the accuracy by"):
        haq.Problem(network, images(8), images(8), "edge", objective=RobustAccuracy(proxy))
    with pytest.raises(ValueError, match="an attack makes answers wrong, so it needs labels"):
        Evaluator(network, images(8), teacher=network, objective=RobustAccuracy(proxy))


def test_eps_is_of_this_objective_only() -> None:
    assert SearchConfig(objective=OBJECTIVE).eps == "8/255"
    assert SearchConfig(objective=OBJECTIVE, eps="0.1").eps == "0.1"
    with pytest.raises(
        ValueError, match=r"--eps 4/255 is of an attack: it goes with --objective accuracy\+robust, not accuracy"
    ):
        SearchConfig(eps="4/255")
    for eps, message in (("8", "8/255, not 8; .* not 8$"), ("much", "eps 'much' is not understood")):
        with pytest.raises(ValueError, match=message):
            SearchConfig(objective=OBJECTIVE, eps=eps)


MODULE = """
import torch
from haq import data
from tests.conftest import images

def some():
    shipped = data.load()
    splits = {"train": (shipped.train, 96), "search": (shipped.search, 80), "test": (shipped.test, 60)}
    return {name: (split.images[:count], split.labels[:count]) for name, (split, count) in splits.items()}

def small(dtype=torch.uint8):
    sizes = (("train", 64), ("search", 140), ("test", 40))
    return {name: ((255 * images(n, n)).to(dtype), torch.arange(n) % 4) for name, n in sizes}

def floats():
    return small(torch.float32)

def network():
    from haq.networks import Network
    from tests.conftest import small_network
    return Network("small", small_network(), (1, 8, 8))
"""
SMALL = ["--network", "robust_job:network", "--data", "robust_job:small", "--budget", "0.6", "--objective", OBJECTIVE]
QUICK = [*SMALL, "--solver", "greedy", "--evaluations", "12", "--finetune-epochs", "0"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty current folder with small jobs of one's own in it."""
    (tmp_path / "robust_job.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "robust_job", raising=False)
    monkeypatch.setitem(base.ATTACK_BUDGETS, "full", base.AttackBudget(3, 1, 4, 1, 5, 2))
    monkeypatch.setattr(search_steps, "VERIFIED", 24)


def call(main: Any, *arguments: str) -> int:
    return run_command(lambda: main(list(arguments)))


@pytest.mark.slow
@pytest.mark.usefixtures("place")
def test_a_search_of_the_default_network(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["--data", "robust_job:some", "--objective", OBJECTIVE, "--solver", "random", "--evaluations", "8"]
    assert call(search.main, *asked, "--finetune-epochs", "1", "--eps", "4/255", "--out", "run") == 0
    out, err = capsys.readouterr()
    assert not err
    words = " ".join(out.split())
    assert "objective worst of clean and PGD-3 at eps 4/255" in words
    assert "float accuracy (worst of clean and PGD-3 at eps 4/255)" in words
    assert "worst case: worst of clean and PGD-3 at eps 4/255, right both times, a cheap attack and no evaluation" in words
    assert "on the search split (worst of clean and PGD-3 at eps 4/255)" in words
    headings = out[out.index("* fixed") : out.index("\n float ")].split()
    for split, count in (("test", 2), ("search", 1), ("worst", 2), ("case", 2), ("accuracy", 1)):
        assert headings.count(split) == count, split
    assert "Next: python -m haq.evaluate run" in words
    assert "Next: python -m haq.robustness run --attacks full" in words
    verified = json.loads(Path("run/result.json").read_text())["verified"]
    assert f"Verified by the full suite on 24 test images: {100 * verified['worst']:.2f} % right in the worst case" in words
    assert verified["threat"] == {"eps": 4 / 255, "norm": "linf"}
    assert verified["worst"] <= min(verified["attacks"].values())
    assert {"pgd", "apgd-ce", "square", "transfer-twin", "pgd-twin", "pgd-bpda-soft"} <= set(verified["attacks"])
    assert yaml.safe_load(Path("run/config.yaml").read_text())["settings"]["eps"] == "4/255"
    result = json.loads(Path("run/result.json").read_text())
    assert result["objective"] == OBJECTIVE
    assert result["objective_is"] == "worst of clean and PGD-3 at eps 4/255"
    for row in (result["float"], result["uniform8"], result["found"], result["finetuned"], *result["rivals"].values()):
        for split in ("search", "test"):
            assert 0 <= row[f"{split}_{OBJECTIVE}"] < row[f"{split}_accuracy"] <= 1
    with Path("run/history.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["solver"] == "random" and row["within_budget"] == "1"]
    assert result["found"][f"search_{OBJECTIVE}"] == max(float(row["accuracy"]) for row in rows)
    assert call(evaluate.main, "run", "--json") == 0
    assert json.loads(capsys.readouterr().out) == result


@pytest.mark.usefixtures("place")
def test_an_interrupted_search_goes_on_exactly(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(search.main, *QUICK, "--out", "whole") == 0
    record, count = SearchRun.record, []

    def interrupted(self: SearchRun, *arguments: Any) -> None:
        record(self, *arguments)
        count.append(1)
        if len(count) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SearchRun, "record", interrupted)
        assert call(search.main, *QUICK, "--out", "cut") == EXIT_INTERRUPTED
    assert call(search.main, "--resume", "cut") == 0
    for file in ("policy.json", "history.csv", "result.json"):
        assert Path("whole", file).read_bytes() == Path("cut", file).read_bytes()
    # The attack makes a difference, and so does its eps.
    for name, change in (("plain", ["--objective", "accuracy"]), ("less", ["--eps", "2/255"])):
        assert call(search.main, *QUICK, *change, "--out", name) == 0
        assert Path("whole/history.csv").read_bytes() != Path(name, "history.csv").read_bytes()
    capsys.readouterr()
    assert call(finetune.main, "whole", "--epochs", "1") == 0
    assert "worst of clean and PGD-3 at eps 8/255" in " ".join(capsys.readouterr().out.split())
    assert call(search.main, *QUICK, "--objective", "accuracy", "--out", "again") == 0
    assert "robustness" not in capsys.readouterr().out


@pytest.mark.usefixtures("place")
def test_a_sweep_for_robustness(capsys: pytest.CaptureFixture[str]) -> None:
    asked = [word for word in SMALL if word not in ("--budget", "0.6")]
    more = ["--hw", "edge,cloud", "--budgets", "0.7", "--solvers", "ilp", "--evaluations", "10", "--eps", "4/255"]
    assert call(sweep.main, *asked, *more, "--out", "sweep") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "accuracy+robust (worst of clean and PGD-3 at eps 4/255)" in out
    content = json.loads(Path("sweep/sweep.json").read_text())
    assert content["objective_is"] == "worst of clean and PGD-3 at eps 4/255"
    assert content["asked"]["settings"]["eps"] == "4/255"
    row = content["targets"]["edge"]["found"][0]
    found = json.loads(Path("sweep", row["runs"][0]["folder"], "result.json").read_text())["found"]
    assert row[f"test_{OBJECTIVE}"] == found[f"test_{OBJECTIVE}"]


@pytest.mark.usefixtures("place")
def test_what_the_commands_refuse(capsys: pytest.CaptureFixture[str]) -> None:
    for options, message in (
        (["--data", "robust_job:floats"], "the images of robust_job:floats are float32, taken as they are"),
        (["--eps", "8"], "eps is on the scale of images in [0, 1]: 8/255, not 8"),
        (
            ["--objective", "accuracy", "--eps", "8/255"],
            "--eps 8/255 is of an attack: it goes with --objective accuracy+robust",
        ),
        (
            ["--objective", "robust"],
            "unknown objective 'robust'; did you mean accuracy+robust? Known: accuracy, agreement, accuracy+robust",
        ),
    ):
        for main in (search.main, sweep.main):
            arguments = [*SMALL, *options, "--out", "run"]
            if main is sweep.main:
                arguments = [word for word in arguments if word not in ("--budget", "0.6")]
            assert call(main, *arguments) == EXIT_BAD_INPUT
            assert message in capsys.readouterr().err
    assert not Path("run").exists()


def test_photographs_without_labels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    network = described(small_network())
    pictures = (255 * images(9)).to(torch.uint8).split(3)
    unlabelled = data.Dataset("photos", (), *(data.Split(part, torch.full((3,), data.UNLABELLED)) for part in pictures))
    monkeypatch.setattr("haq.networks.load", lambda name: network)
    monkeypatch.setattr("haq.data.load", lambda name, image_size, **options: unlabelled)
    with pytest.raises(ValueError, match="photos has no labels to tell the accuracy by: search with --objective agreement"):
        SearchTask.build(SearchConfig(objective=OBJECTIVE))
