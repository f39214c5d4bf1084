"""`python -m haq.robustness` attacks every network alike, keeps what is finished, and says what can be believed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from multiprocessing import resource_tracker, spawn
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import quantizers as Q
from haq import networks, robustness, search
from haq.attacks import base, masking
from haq.console.errors import run_command
from haq.study.comparison import ComparisonSpec, gather
from tests.conftest import enter, images

MODULE = """
import torch
from haq.networks import Network
from tests.conftest import images, small_network

def splits():
    network = small_network()
    parts = {}
    for seed, (name, count) in enumerate((("train", 64), ("search", 64), ("test", 64))):
        x = (255 * images(count, seed)).round().to(torch.uint8)
        with torch.no_grad():
            y = network((x.float() / 255 - 0.4) / 0.5).argmax(1)
        y[:4] = torch.arange(4)  # every class at least once
        parts[name] = (x, y)
    return parts

def floats():
    return {name: (x.float(), y) for name, (x, y) in splits().items()}

def network():
    return Network("small", small_network(), (1, 8, 8), (0.4,), (0.5,))
"""
JOB = ["--network", "small_job:network", "--data", "small_job:splits", "--budget", "0.6", "--solver", "random"]
TINY = base.AttackBudget(3, 1, 4, 0, 5, 2)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty current folder with a small job in it."""
    enter(tmp_path, monkeypatch, MODULE)


def lessen(patch: pytest.MonkeyPatch) -> None:
    """Let attacks and their checks take no time."""
    for name in ("quick", "standard"):
        patch.setitem(base.ATTACK_BUDGETS, name, TINY)
    patch.setattr(masking, "CURVE", (0.5, 1, 4))
    patch.setattr(masking, "CURVE_STEPS", 4)


@pytest.fixture(autouse=True)
def little_effort() -> Iterator[pytest.MonkeyPatch]:
    """Undone where worker processes, which know nothing of it, must find the same."""
    with pytest.MonkeyPatch.context() as patch:
        lessen(patch)
        yield patch


def call(*arguments: str) -> int:
    return run_command(lambda: robustness.main([*arguments, "--images", "32"]))


def searched(*more: str) -> None:
    assert run_command(lambda: search.main([*JOB, "--evaluations", "3", "--out", "run", *more])) == 0


def result(folder: str = "run/robustness") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((Path(folder) / "robustness.json").read_text())
    return content


def test_a_run_is_compared_with_float_uniform_bits_and_a_defence(capsys: pytest.CaptureFixture[str]) -> None:
    searched("--finetune-epochs", "1")
    assert call("run", "--attacks", "quick", "--uniform", "8,2", "--workers", "1") == 0
    out, err = capsys.readouterr()
    assert not err
    content = result()
    assert list(content["networks"]) == ["float", "uniform 8", "uniform 2", "found", "defensive"]
    for name, one in content["networks"].items():
        assert {"noise", "fgsm", "rfgsm", "pgd", "apgd-ce", "apgd-dlr", "square"} <= set(one["attacks"])
        assert sum(attack.startswith("transfer-") for attack in one["attacks"]) == 1
        assert one["worst"] <= min(one["attacks"].values())
        assert one["worst"] <= one["clean"]
        assert len(one["checks"]) == 9
        assert one["masked"] == any(not check["passed"] for check in one["checks"])
        assert ("upper bound: gradients are masked" in one["verdict"]) == one["masked"]
        if name != "float":
            # The integer network answers the worst images as the fake-quantized one does.
            deployed = one["deployed"]
            assert deployed["images"] == 32
            assert deployed["different"] <= 1
            assert abs(deployed["right"] / 32 - one["worst"]) <= deployed["different"] / 32 + 1e-9
    for word in ("attacker", "worst case, image by image", "Signs of masked gradients", "as an integer network"):
        assert word in " ".join(out.split())
    assert (Path("run/robustness") / "robustness.png").read_bytes().startswith(b"\x89PNG")

    policies = {
        name: Q.get_policy(net)
        for name, net in gather(ComparisonSpec("run", None, (8, 2))).networks.items()
        if name != "float"
    }
    assert set(policies["uniform 8"].values()) == {(8, 8)}
    assert policies["uniform 2"]["stem"] == policies["uniform 2"]["classifier"] == (8, 8)
    assert policies["uniform 2"]["hidden"] == (2, 2)
    assert policies["defensive"] == policies["found"]


def test_the_defence_is_trained_once_and_lowers_the_norms(capsys: pytest.CaptureFixture[str]) -> None:
    searched("--finetune-epochs", "4")
    with pytest.raises(FileNotFoundError, match="defensive"):
        gather(ComparisonSpec("run", uniform=(), beta=0.5))
    assert call("run", "--attacks", "fgsm", "--defensive", "0.5", "--workers", "1") == 0
    assert "defensive0.5 isn't there yet" in capsys.readouterr().out
    gathered = gather(ComparisonSpec("run", beta=0.5)).networks
    penalties = {name: Q.lipschitz_penalty(gathered[name], beta=1.0).item() for name in ("found", "defensive")}
    assert penalties["defensive"] < 0.9 * penalties["found"]
    assert call("run", "--attacks", "fgsm", "--defensive", "0.5", "--workers", "1") == 0
    assert "isn't there yet" not in capsys.readouterr().out


def test_without_fine_tuning_there_is_no_defence(capsys: pytest.CaptureFixture[str]) -> None:
    searched("--finetune-epochs", "0")
    assert call("run", "--attacks", "fgsm", "--workers", "1") == 0
    assert list(result()["networks"]) == ["float", "uniform 8", "found"]
    assert "calibrated, not fine-tuned" in " ".join(capsys.readouterr().out.split())


def test_interrupted_it_goes_on_without_losing_finished_attacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("small_job:network", "--data", "small_job:splits", "--attacks", "quick", "--workers", "1")
    assert call(*asked, "--out", "whole") == 0
    run, ran = base.EvaluationAttack.run, []

    def counted(self: base.EvaluationAttack, *rest: Any) -> Tensor:
        if len(ran) == 5:
            raise KeyboardInterrupt
        ran.append(self.name)
        return run(self, *rest)

    monkeypatch.setattr(base.EvaluationAttack, "run", counted)
    assert call(*asked, "--out", "parts") == 130
    assert "goes on from there" in " ".join(capsys.readouterr().out.split())
    before = ran.copy()
    ran[:] = [""] * 6  # no longer interrupted
    assert call(*asked, "--out", "parts") == 0
    # The rest of the first network's, then the second's from the first on.
    plans = [list(one["attacks"]) for one in result("whole")["networks"].values()]
    assert before + ran[6:] == plans[0] + plans[1]
    assert result("parts") == result("whole")


@pytest.mark.slow  # with an attack of the user's, below, it isn't
def test_the_number_of_workers_changes_nothing(little_effort: pytest.MonkeyPatch) -> None:
    little_effort.undo()
    asked = ("small_job:network", "--data", "small_job:splits", "--attacks", "fgsm", "--uniform", "8")
    assert call(*asked, "--out", "one", "--workers", "1") == 0
    assert call(*asked, "--out", "two", "--workers", "2") == 0
    assert result("one") == result("two")


def test_unknown_attacks_are_refused_before_anything_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    searched("--finetune-epochs", "1")
    capsys.readouterr()
    assert call("run", "--attacks", "fgsm,pdg") == 2
    out, err = capsys.readouterr()
    assert not out
    assert "unknown attack 'pdg'; known: quick, standard, full" in err
    assert not Path("run/robustness").exists()


def test_a_killed_worker_is_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    resource_tracker.ensure_running()
    monkeypatch.setattr(spawn, "_python_exe", b"/bin/false")
    assert call("small_job:network", "--data", "small_job:splits", "--attacks", "fgsm", "--workers", "2", "--out", "o") == 2
    err = capsys.readouterr().err
    assert "a worker was killed" in err
    assert "finished attacks are kept in o" in err


def test_another_norm_has_another_scale() -> None:
    asked = ("small_job:network", "--data", "small_job:splits", "--attacks", "fgsm", "--workers", "1", "--norm", "l2")
    for eps, folder in ((None, "default"), ("2.5", "large")):
        assert call(*asked, "--out", folder, *(("--eps", eps) if eps else ())) == 0
        assert result(folder)["threat"] == f"l2, eps {eps or '0.5'}"


def test_hard_gradients_are_stamped(capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("small_job:network", "--data", "small_job:splits", "--attacks", "fgsm,pgd", "--uniform", "3", "--workers", "1")
    assert call(*asked, "--backward", "hard", "--eps", "0.2", "--out", "hard") == 0
    masked = result("hard")["networks"]
    assert not masked["float"]["masked"] or masked["uniform 3"]["masked"]
    failed = [check["name"] for check in masked["uniform 3"]["checks"] if not check["passed"]]
    assert "no gradient is zero" in failed
    assert "uniform 3: FAIL: no gradient is zero: 100.0 % of images without any" in " ".join(capsys.readouterr().out.split())
    assert call(*asked, "--eps", "0.2", "--out", "ste") == 0
    honest = result("ste")["networks"]["uniform 3"]
    assert honest["worst"] < masked["uniform 3"]["worst"]


def test_a_quantized_checkpoint_is_attacked_at_its_bits() -> None:
    network = networks.load("mobilenet-mini", pretrained=False)
    qnetwork = Q.quantize(network.module, Q.BitPolicy.uniform(network.module, w=4, a=4), calibrate=torch.rand(16, 1, 28, 28))
    networks.save_checkpoint(networks.Network("mobilenet-mini", qnetwork, (1, 28, 28)), Path("four.safetensors"))
    gathered = gather(ComparisonSpec("four.safetensors"))
    assert list(gathered.networks) == ["float", "quantized", "uniform 8"]
    assert set(Q.get_policy(gathered.networks["quantized"]).values()) == {(4, 4)}
    assert list(gathered.sources("quantized")) == ["twin", "8bits"]
    assert list(gathered.sources("float")) == ["quantized", "uniform8"]


def test_requantized_input_is_what_the_network_sees() -> None:
    gathered = gather(ComparisonSpec("small_job:network", "small_job:splits"))
    x = images(4, 3)
    levels = (x * 255).round() / 255
    assert not torch.equal(x, levels)
    for name, net in gathered.networks.items():
        exact = gathered.classifier(net, True)(x)
        of_levels = gathered.classifier(net, False)(levels)
        assert torch.allclose(exact, of_levels, atol=1e-5), name


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["small_job:network", "--eps", "8"], "eps is on the scale of images in [0, 1]: 8/255, not 8"),
        (["small_job:network", "--norm", "l2", "--eps", "0"], "eps must be above 0 and finite, not 0"),
        (["small_job:network", "--eps", "much"], "eps 'much' is not understood"),
        (["small_job:network", "--attacks", "pdg"], "unknown attack 'pdg'; known: quick, standard, full"),
        (["small_job:network", "--uniform", "9"], "--uniform is '9'; give widths from 1 to 8"),
        (["small_job:network", "--defensive", "-1"], "--defensive is -1.0; it must be 0 or above"),
        (["small_job:network", "--data", "small_job:floats"], "of unknown range; attacks need uint8 images"),
        (["no_such_network"], "no_such_network"),
        (["small_job:network", "--seed", "-1"], "--seed is -1; it must be at least 0"),
    ],
)
def test_bad_input(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = [] if "--data" in arguments else ["--data", "small_job:splits"]
    assert call(*arguments, *more, "--workers", "1", "--out", "nowhere") == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert not Path("nowhere/robustness.json").exists()


def test_a_run_that_found_nothing_yet(capsys: pytest.CaptureFixture[str]) -> None:
    searched("--finetune-epochs", "0")
    Path("run/policy.json").unlink()
    assert call("run") == 2
    assert "run has no policy.json: nothing was found yet" in capsys.readouterr().err


def schemes(folder: str) -> dict[str, str]:
    """What is said of each network's scheme."""
    return {name: one["is"] for name, one in result(folder)["networks"].items()}


def test_a_run_is_compared_in_its_own_scheme(capsys: pytest.CaptureFixture[str]) -> None:
    """Uniform bits, what was found and the defence are all of the run's scheme; what it can't do is named."""
    searched("--finetune-epochs", "1", "--scheme", "lsq")
    asked = ("run", "--attacks", "fgsm", "--uniform", "4,1", "--workers", "1", "--defensive", "0.1")
    assert call(*asked) == 0
    said = schemes("run/robustness")
    assert list(said) == ["float", "uniform 4", "found", "defensive"]
    assert ", scheme linear and lsq" in said["uniform 4"]
    assert ", scheme linear and lsq" in said["found"]
    reason = result()["left_out"]["uniform 1"]
    assert "lsq has no weights of 1 bit" in reason
    assert "left out: layer 'depthwise': lsq has no weights of 1 bit" in " ".join(capsys.readouterr().out.split())
    for name, net in gather(ComparisonSpec("run", None, (4, 1), 0.1)).networks.items():
        if name != "float":
            kinds = [layer.scheme.name for layer in Q.quant_layers(net).values()]
            assert kinds == ["linear", "lsq", "lsq", "lsq", "linear"], name


def test_another_scheme_than_the_runs_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Everything is trained once more with it, in files of its own, and what was trained before stays."""
    searched("--finetune-epochs", "1")
    assert call("run", "--attacks", "fgsm", "--workers", "1", "--defensive", "0") == 0
    own = result()
    assert call("run", "--attacks", "fgsm", "--workers", "1", "--defensive", "0", "--scheme", "kmeans", "--out", "other") == 0
    assert "found isn't there yet" in capsys.readouterr().out
    said = schemes("other")
    assert "scheme" not in schemes("run/robustness")["found"]
    assert ", scheme linear and kmeans" in said["uniform 8"]
    assert ", scheme linear and kmeans" in said["found"]
    deployed = result("other")["networks"]["found"]["deployed"]
    assert deployed["images"] == 0
    assert "kmeans" in deployed["reason"]
    assert call("run", "--attacks", "fgsm", "--workers", "1", "--defensive", "0") == 0
    assert "isn't there yet" not in capsys.readouterr().out
    assert result() == own


def test_a_model_in_a_scheme_with_one_for_a_layer() -> None:
    asked = ("small_job:network", "--data", "small_job:splits", "--attacks", "fgsm", "--workers", "1", "--uniform", "3")
    assert call(*asked, "--scheme", "lsq,hidden=dorefa", "--out", "mixed") == 0
    assert ", scheme linear and lsq and dorefa, calibrated, not fine-tuned" in schemes("mixed")["uniform 3"]


STEP = """
import torch
from haq.attacks.base import EvaluationAttack


class Climb(EvaluationAttack):
    def perturb(self, images, labels):
        found = images.clone()
        for _ in range(20):
            x = found.requires_grad_()
            loss = torch.nn.functional.cross_entropy(self.victim(x), labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, x)
            change = x.detach() + 0.05 * gradient.sign() - images
            found = (images + change.clamp(-self.threat.eps, self.threat.eps)).clamp(0, 1)
        return found
"""


def test_an_attack_of_the_users_is_run_on_every_network(little_effort: pytest.MonkeyPatch) -> None:
    """In worker processes too, where no number of them changes it. This one finds more than FGSM does."""
    little_effort.undo()
    Path("mine.py").write_text(STEP)
    asked = ("small_job:network", "--data", "small_job:splits", "--attacks", "fgsm,mine:Climb", "--eps", "0.3")
    assert call(*asked, "--out", "one", "--workers", "1") == 0
    assert call(*asked, "--out", "two", "--workers", "2") == 0
    assert result("one") == result("two")
    for one in result("one")["networks"].values():
        assert list(one["attacks"])[-1] == "mine:Climb"
        assert one["worst"] <= one["attacks"]["mine:Climb"] < one["attacks"]["fgsm"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--scheme", "lsk"], "unknown scheme 'lsk'; did you mean lsq"),
        (["--scheme", "lsq,nothing=linear"], "names 'nothing', which is no layer"),
        (["--attacks", "no_such:Gone"], "attack 'no_such:Gone' is no known name, and no module 'no_such' can be imported"),
        (["--norm", "l3"], "--norm is 'l3'; known: linf, l2"),
        (["--backward", "none"], "--backward is 'none'; known: ste, bpda-identity"),
        (["--workers", "0"], "--workers is 0; it must be at least 1"),
        (["--atacks", "quick"], "--atacks"),
    ],
)
def test_bad_options(arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("small_job:network", "--data", "small_job:splits", *arguments, "--out", "nowhere") == 2
    err = capsys.readouterr().err
    assert sentence in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
