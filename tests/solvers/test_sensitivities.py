"""Sensitivities: measured once, kept in a file, taken by later searches; those that are computed are what they should be."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import haq
import quantizers as Q
from haq import search
from haq.console.errors import EXIT_INTERRUPTED
from haq.problem.sensitivity import KINDS, Sensitivities, signed
from haq.solvers import SOLVERS, greedy, ilp, sensitivity
from haq.solvers.base import Session, solve
from haq.solvers.hessian import curvature
from haq.solvers.layer_outputs import gradient_increases, remaining_errors
from haq.study.search_run import SearchRun
from tests.commands.test_search_command import MODULE, SMALL, call, history
from tests.conftest import images, make_problem, small_network

QUICK = [*SMALL, "--finetune-epochs", "0", "--evaluations", "40"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "small_job.py").write_text(MODULE + OTHERS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "small_job", raising=False)
    return tmp_path


OTHERS = """
def other():
    return Network("other", small_network(1), (1, 8, 8))

def other_splits():
    return splits() | {"search": splits()["train"], "train": splits()["search"]}
"""


# ---- Hessians


def exact_traces(network: nn.Module, x: Tensor) -> tuple[float, float]:
    """Of a network with one layer "layer" as its first: Hessian traces of the mean loss in its weight, over its entries, and
    of an image's loss in its input, over the entries; by automatic differentiation, from the definition."""
    p = network(x).softmax(1).detach()
    layer = network.get_submodule("layer")
    weight = layer.get_parameter("weight").detach()

    def of_weight(w: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(network, {"layer.weight": w}, (x,)), p)

    h = torch.autograd.functional.hessian(of_weight, weight).reshape(weight.numel(), -1)
    by_image = [
        torch.autograd.functional.hessian(lambda one, i=i: F.cross_entropy(network(one), p[i : i + 1]), x[i : i + 1])
        for i in range(len(x))
    ]
    traces = [float(one.reshape(x[0].numel(), -1).trace()) / x[0].numel() for one in by_image]
    return float(h.trace()) / weight.numel(), float(np.mean(traces))


def with_weights(*modules: tuple[str, nn.Module]) -> nn.Module:
    network = nn.Sequential()
    generator = torch.Generator().manual_seed(3)
    for name, module in modules:
        network.add_module(name, module)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.5
    return network.double().eval()


def test_traces_of_a_linear_softmax_model_are_those_of_its_closed_form() -> None:
    network = with_weights(("layer", nn.Linear(5, 4)))
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()
    p, w = network(x).softmax(1).detach(), network.get_submodule("layer").get_parameter("weight").detach()
    # H = (diag p - p p^T) (x) x x^T in the weight, W^T (diag p - p p^T) W in the input.
    of_outputs = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    weight = float((of_outputs.diagonal(dim1=1, dim2=2).sum(1) * x.square().sum(1)).mean()) / w.numel()
    inputs = float((w.T @ of_outputs @ w).diagonal(dim1=1, dim2=2).sum(1).mean()) / 5
    assert exact_traces(network, x) == pytest.approx((weight, inputs))
    found = curvature(network, ["layer"], [x], draws=4000)["layer"]
    assert found.weight == pytest.approx(weight, rel=0.03)
    ((trace, power),) = found.inputs
    assert trace == pytest.approx(inputs, rel=0.03)
    assert power == pytest.approx(float(x.square().sum(1).mean()))


def test_traces_of_a_deep_model_are_those_of_its_hessian() -> None:
    network = with_weights(
        ("layer", nn.Conv2d(1, 2, 3, 2)), ("tanh", nn.Tanh()), ("flatten", nn.Flatten()), ("out", nn.Linear(8, 3))
    )
    x = torch.randn(4, 1, 5, 5, generator=torch.Generator().manual_seed(1)).double()
    weight, inputs = exact_traces(network, x)
    found = curvature(network, ["layer", "out"], [x[:1], x[1:]], draws=4000)["layer"]
    assert found.weight == pytest.approx(weight, rel=0.05)
    assert found.inputs[0][0] == pytest.approx(inputs, rel=0.05)


def test_zeros_stay_zero_and_every_call_counts() -> None:
    """An entry that is always zero has no part in the average; a layer called twice has two inputs."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.layer(torch.relu_(self.layer(x)))
            return result

    network = Twice().double().eval()
    network.layer.weight.data = torch.diag(torch.tensor([1.0, 2.0, -1.0, 1.0])).double()
    x = torch.ones(2, 4).double()
    (_, (trace, power)) = curvature(network, ["layer"], [x], draws=4000)["layer"].inputs
    p = network(x)[0].softmax(0)
    w = network.layer.weight
    h = (w.T @ (torch.diag(p) - p[:, None] * p) @ w).diagonal().detach()
    assert trace == pytest.approx(float(h[[0, 1, 3]].mean()), rel=0.05)
    assert power == pytest.approx(1 + 4 + 1)
    assert not network.layer.weight.grad


def test_second_order_rises_are_half_the_trace_times_the_squared_error() -> None:
    problem = make_problem(small_network(), correction=None)
    found = sensitivity.by_hessian(problem)
    layer = problem.evaluator.network.get_submodule("pointwise")
    bend = curvature(problem.network, problem.workload.names, problem.calibration)["pointwise"]
    assert isinstance(layer, Q.QuantConv2d)
    errors = []
    for bits in (3, 8):
        layer.weight_bits = bits
        errors.append(float((layer.quantized_weight() - layer.weight).square().sum().detach()))
    rises = found.loss_increases[found.layers.index(("pointwise",))]
    assert rises[0, 2] == pytest.approx(0.5 * bend.weight * (errors[0] - errors[1]), rel=1e-3)
    assert rises[1, 1] > rises[1, 3] > 0
    assert problem.evaluator.cache == {}  # not one policy was evaluated
    again = sensitivity.by_hessian(make_problem(small_network(), correction=None))
    assert np.array_equal(again.loss_increases, found.loss_increases, equal_nan=True)


def test_of_an_error_that_is_corrected_counts_what_is_left_in_the_output() -> None:
    network = small_network()
    scheme = Q.Linear("output")
    plain, corrected = (make_problem(network, correction=correction, scheme=scheme) for correction in (None, "analytic"))
    layer = Q.quant_layers(corrected.evaluator.network)["hidden"]
    names = corrected.workload.names
    left = remaining_errors(network, corrected.evaluator.network, names, corrected.calibration)["hidden"]
    seen: list[Tensor] = []
    handle = network.get_submodule("hidden").register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for part in corrected.calibration:
            network(part)
        handle.remove()
        x = torch.cat(seen)
        layer.weight_bits, layer.activation_bits = 3, None
        change = layer(x) - network.get_submodule("hidden")(x)
        # What was there before is what is left and the square of its mean, which was taken out.
        assert left[2] == pytest.approx(float(change.square().sum() / (change - layer.bias_shift[2]).square().sum()), rel=1e-4)
    assert left[2] < 1
    assert all((share == 1).all() for share in remaining_errors(network, plain.evaluator.network, names, []).values())
    rises = [sensitivity.by_hessian(problem).loss_increases[names.index("hidden"), :, 2] for problem in (plain, corrected)]
    assert rises[1][0] < rises[0][0]
    assert rises[1][1] == rises[0][1]


# ---- gradients


class Twice(nn.Module):
    """A layer that is called twice, between them what overwrites its output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(torch.relu_(self.layer(x)))
        return result


def quantized_twice() -> tuple[Twice, nn.Module, Tensor]:
    generator = torch.Generator().manual_seed(3)
    network = Twice().double().eval()
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).double()
    x = torch.randn(6, 5, generator=generator).double()
    return network, Q.quantize(network, {"layer": (8, 8)}, calibrate=x), x


@pytest.mark.parametrize(("operand", "pair"), [(0, (3, None)), (1, (None, 3))])
def test_gradients_tell_the_divergence_to_second_order(operand: int, pair: tuple[int | None, int | None]) -> None:
    network, qnetwork, x = quantized_twice()
    found = gradient_increases(network, qnetwork, ["layer"], [x[:4], x[4:]], draws=1000)["layer"]
    with torch.no_grad():
        first = network.layer(x)
        hidden, p = first.relu(), network(x).softmax(1)
        Q.set_policy(qnetwork, {"layer": pair})
        changes = [qnetwork.layer(x) - first, qnetwork.layer(hidden) - network.layer(hidden)]
        # What the outputs change by, to first order.
        d = (changes[0] * (first > 0)) @ network.layer.weight.T + changes[1]
        exact = 0.5 * ((p * d.square()).sum(1) - (p * d).sum(1).square()).mean()
    assert found[operand, 2] == pytest.approx(float(exact), rel=0.1)


def test_gradients_leave_the_networks_as_they_were_and_know_widths_that_a_scheme_lacks() -> None:
    network, qnetwork, x = quantized_twice()
    before = {name: tensor.clone() for name, tensor in qnetwork.state_dict().items()}
    again = [gradient_increases(network, qnetwork, ["layer"], [x])["layer"] for _ in range(2)]
    assert np.array_equal(again[0], again[1], equal_nan=True)
    assert (again[0][:, 1] > again[0][:, 7]).all()
    assert Q.get_policy(qnetwork) == {"layer": (8, 8)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in qnetwork.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())
    without_1_bit = Q.quantize(network, {"layer": (4, 4)}, scheme="lsq", calibrate=x)
    unknown = np.isnan(gradient_increases(network, without_1_bit, ["layer"], [x])["layer"])
    assert unknown[0].tolist() == [True] + 7 * [False]


def test_gradients_of_16_bits_are_measured_and_not_those_of_8() -> None:
    network, qnetwork, x = quantized_twice()
    few = gradient_increases(network, qnetwork, ["layer"], [x])["layer"]
    wide = gradient_increases(network, qnetwork, ["layer"], [x], widths=Q.WIDTHS)["layer"]
    assert few.shape == (2, 8)
    assert wide.shape == (2, 9)
    assert np.array_equal(wide[:, :8], few)
    assert (wide[:, 8] < few[:, 7] / 1000).all()
    corrected = Q.quantize(network, {"layer": (8, 8)}, calibrate=x, correction="analytic")
    assert remaining_errors(network, corrected, ["layer"], [x], widths=Q.WIDTHS)["layer"].shape == (9,)


def test_gradients_of_tied_layers_add_up_and_cost_no_evaluation() -> None:
    network = small_network()
    problem = make_problem(network)
    found = sensitivity.by_gradient(problem)
    alone = gradient_increases(network, problem.evaluator.network, problem.workload.names, problem.calibration)
    rises = found.loss_increases[found.layers.index(("pointwise",))]
    assert rises[:, 2] == pytest.approx(alone["pointwise"][:, 2] - alone["pointwise"][:, 7])
    assert problem.evaluator.cache == {}
    both = ("pointwise", "hidden")
    tied = haq.Problem(network, images(32, 1), images(8), "edge", objective="agreement", tied=[both], correction=None)
    of_both = sensitivity.by_gradient(tied)
    rises = of_both.loss_increases[of_both.layers.index(both)]
    assert rises[0, 2] == pytest.approx(sum(alone[name][0, 2] - alone[name][0, 7] for name in both))


# ---- kinds


def test_divergences_are_those_of_the_evaluations(problem: haq.Problem) -> None:
    found = sensitivity.by_evaluation(problem, Session(problem, 200, sensitivity_kind="kl"), 1)
    assert found.kind == "kl"
    highest = dict.fromkeys(problem.workload.names, (8, 8))
    lowered = problem.policy(*problem.bit_arrays(highest | {"hidden": (3, 8)}))
    with torch.inference_mode():
        inputs = images(96)
        expected = problem.network(inputs).double().log_softmax(1)
    gaps = []
    for policy in (lowered, problem.uniform(8)):
        with torch.inference_mode():
            outputs = problem.evaluator.prepared(policy)(inputs).double().log_softmax(1)
        gaps.append(float((expected.exp() * (expected - outputs)).sum(1).mean()))
    rise = found.loss_increases[found.layers.index(("hidden",)), 0, 2]
    assert rise == pytest.approx(gaps[0] - gaps[1], rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_back_what_was_measured(kind: str, tmp_path: Path) -> None:
    problem = make_problem(small_network())
    session = Session(problem, 30, sensitivity_kind=kind)
    table = sensitivity.measure(problem, session, keep=1)
    assert session.sensitivities is not None
    assert session.used == (0 if kind in sensitivity.COMPUTED else 29)
    kept = signed(session.sensitivities, {"network": "n", "data": "d"})
    kept.to_json(tmp_path / "a.json")
    read = Sensitivities.from_json(tmp_path / "a.json")
    assert np.array_equal(read.loss_increases, kept.loss_increases, equal_nan=True)
    assert (read.kind, read.layers, read.bits, read.base, read.signature) == (
        kind,
        kept.layers,
        (2, 8),
        kept.base,
        kept.signature,
    )
    assert np.array_equal(read.table(problem), table)
    read.to_json(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_they_serve_other_targets_and_budgets_without_an_evaluation(problem: haq.Problem) -> None:
    session = Session(problem, 200)
    sensitivity.measure(problem, session, keep=1)
    for target, budget in (("edge", 0.4), ("cloud", 0.5), ("bitfusion", 0.98)):
        other = problem.on(target, budget)
        for module, name in ((ilp, "ilp"), (greedy, "greedy")):
            lean = Session(other, 200, sensitivities=session.sensitivities)
            assert solve(name, lean, 0).policy == module.propose(other, session.sensitivities.table(other))
            assert lean.used == 1
    free = Session(problem, 12, sensitivities=session.sensitivities)
    solve("ddpg", free, 0)
    before = make_problem(small_network())
    assert not {before.decide(d.pairs.max(0) for d in before.decisions)} & set(free._seen)


# ---- through the command


def test_a_search_leaves_them_and_others_take_them(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, *QUICK, "--solver", "ilp", "--evaluations", "99", "--out", "first") == 0
    written = json.loads(Path("first/sensitivity.json").read_text())
    assert written["kind"] == "loss"
    assert not any(None in row["weights"][2:7] for row in written["loss_increases"] if row["layers"] == ["pointwise"])
    given = ["--sensitivity", "first", "--hw", "cloud", "--budget", "0.5"]
    assert call(search.main, *QUICK, *given, "--solver", "greedy", "--out", "second") == 0
    assert [row["solver"] for row in history(Path("second"))] == ["greedy", "ilp"]
    assert Path("second/sensitivity.json").read_bytes() == Path("first/sensitivity.json").read_bytes()
    assert call(search.main, *QUICK, "--sensitivity", "second/sensitivity.json", "--solver", "ilp", "--out", "third") == 0
    assert Path("third/policy.json").read_bytes() == Path("first/policy.json").read_bytes()
    capsys.readouterr()
    assert call(search.main, *QUICK, "--solver", "random", "--out", "drawn", "--sensitivity-kind", "hessian") == 0
    assert "hessian, computed" in " ".join(capsys.readouterr().out.split())
    assert {row["solver"] for row in history(Path("drawn"))} == {"random", "greedy", "ilp"}
    assert len(history(Path("drawn"))) == 42
    assert Sensitivities.from_json(Path("drawn/sensitivity.json")).kind == "hessian"


# What is computed at once leaves less to interrupt than what is measured.
@pytest.mark.parametrize("kind", ["kl", pytest.param("hessian", marks=pytest.mark.slow)])
def test_interrupted_searches_go_on_with_them(kind: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = [*QUICK, "--evaluations", "16", "--solver", "ilp", "--sensitivity-kind", kind]
    assert call(search.main, *arguments, "--out", "whole") == 0
    assert call(search.main, *QUICK, "--sensitivity", "whole", "--solver", "random", "--out", "given") == 0
    record, count = SearchRun.record, []

    def interrupted(self: SearchRun, *rest: Any) -> None:
        record(self, *rest)
        count.append(1)
        if len(count) == 5:
            raise KeyboardInterrupt

    for name, asked in (("cut", arguments), ("cut2", [*QUICK, "--sensitivity", "whole", "--solver", "random"])):
        count.clear()
        with monkeypatch.context() as patch:
            patch.setattr(SearchRun, "record", interrupted)
            assert call(search.main, *asked, "--out", name) == EXIT_INTERRUPTED
    Path("whole/sensitivity.json").rename("moved.json")  # a run has a copy of its own
    assert call(search.main, "--resume", "cut") == call(search.main, "--resume", "cut2") == 0
    Path("moved.json").rename("whole/sensitivity.json")
    for one, other in (("whole", "cut"), ("given", "cut2")):
        for file in ("policy.json", "history.csv", "sensitivity.json"):
            assert Path(one, file).read_bytes() == Path(other, file).read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--network", "small_job:other"], "of another network: its signature is"),
        (["--data", "small_job:other_splits"], "of another data: its signature is"),
        (["--bits", "1:8"], "has sensitivities of bits 2:8, here they are 1:8"),
        (["--bits", "2:6"], "choose --bits within 2:8 that end at 8"),
        (["--sensitivity", "nowhere"], "there is no nowhere; give the folder of a run"),
        (["--sensitivity", "."], "has no sensitivity.json"),
        (["--sensitivity", "first/config.yaml"], "first/config.yaml is not a file of sensitivities"),
        (["--sensitivity", "wrong.json"], "wrong.json is not a file of sensitivities"),
        (["--sensitivity-kind", "kl"], "leave --sensitivity-kind out"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(
    arguments: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(search.main, *QUICK, "--solver", "ilp", "--evaluations", "3", "--out", "first") == 0
    wrong = json.loads(Path("first/sensitivity.json").read_text())
    wrong["loss_increases"][0]["weights"] = [0.0]
    Path("wrong.json").write_text(json.dumps(wrong))
    capsys.readouterr()
    assert call(search.main, *QUICK, "--sensitivity", "first", *arguments, "--out", "second") == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not Path("second").exists()


def test_kinds_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(search.main, "--sensitivity-kind", "hesse") == 2
    assert "unknown kind of sensitivities 'hesse'; it can be loss, kl, hessian, gradient" in capsys.readouterr().err
    assert {"ilp", "greedy"} <= set(SOLVERS)
