"""`haq deploy --check` and `haq search --check-deploy` say what can't be deployed, and why, as a deployment itself would."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import haq
import quantizers as Q
from haq import deploy, search
from haq.console.errors import EXIT_BAD_INPUT, run_command
from haq.deployment import EXPORTERS
from haq.deployment.graph import capture
from haq.study.deployable import Quantized, _spanning, ask
from tests.commands.test_search_command import MODULE, SMALL
from tests.conftest import enter, images, small_network

JOB = f"""{MODULE}
from torch import nn

class Sorting(nn.Module):
    def forward(self, x):
        return x.sort(1).values

def sorting():
    made = small_network()
    made.relu3 = Sorting()
    return Network("sorting", made, (1, 8, 8))

def shapeless():
    return small_network()
"""
PACKAGES = {"tvm": "tvm", "onnx": "onnxruntime", "qonnx": "qonnx", "c": "torch", "executorch": "torch"}


class Sorting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sort(1).values


class Residual(nn.Module):
    """An addition, a product with what a sigmoid makes of it, and a concatenation."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, 2, 1)
        self.branch = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(8 * 16, 4)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        y = (x + self.branch(x)).relu()
        return self.head(self.last(torch.cat([y, x * y.sigmoid()], 1).flatten(1)))


def network_of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    made = {
        "plain": small_network,
        "residual": lambda: Residual(nn.Identity()),
        "sorting": lambda: Residual(Sorting()),
        "two outputs": TwoOutputs,
    }
    return made[kind]().eval()


class TwoOutputs(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(OrderedDict(layer=nn.Conv2d(1, 4, 3), last=nn.Conv2d(4, 4, 3)))

    def forward(self, x: Tensor) -> Any:
        x = self.layer(x)
        return x, self.last(x)


@pytest.fixture
def nothing_is_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty current folder, and no compiler."""
    tvm = pytest.importorskip("tvm")
    monkeypatch.setattr(tvm, "compile", lambda *given, **others: pytest.fail("compiled"))
    monkeypatch.setattr(torch.onnx, "export", lambda *given, **others: pytest.fail("exported"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(name: str, quantized: nn.Module, x: Tensor, path: Path, **options: str) -> str:
    """Deploy a network, and return the sentence by which that is refused."""
    try:
        exporter = EXPORTERS.get(name)()
        exporter.check(quantized)
        graph = capture(quantized, x[:1])
        exporter.export(quantized, graph, x, path, notes={}, options=options, on_progress=lambda *told: None)
    except ValueError as error:
        return str(error)
    return ""


CASES = [
    ("plain", (8, 8), "linear", ""),
    ("plain", (16, 8), "linear", "layer 'stem' can't be written in C: its weights are of 16 bits; --to c takes 1 to 8 bits"),
    ("plain", (None, 8), "linear", "layer 'stem' can't be written in C: its weights are in float; --to c takes 1 to 8 bits"),
    ("plain", (4, 4), "kmeans", "layer 'stem' can't be deployed: weights of scheme 'kmeans'"),
    ("residual", (4, 8), "linear", ""),
    ("sorting", (8, 8), "linear", "layer 'last' (Sorting) can't be deployed: operation aten.sort"),
    ("two outputs", (8, 8), "linear", "a network with 2 outputs can't be deployed: it must return one tensor"),
]


@pytest.mark.parametrize(("kind", "pair", "scheme", "sentence"), CASES)
def test_yes_is_said_exactly_where_it_can_be_written(
    kind: str, pair: tuple[int | None, int | None], scheme: str, sentence: str, nothing_is_compiled: Path
) -> None:
    x = images(16)
    network = network_of(kind)
    policy = Q.BitPolicy(dict.fromkeys(Q.BitPolicy.uniform(network, 8, 8), pair))
    quantized = Q.quantize(network, policy, scheme=scheme, calibrate=x).eval()
    names = ["qonnx", "c", "executorch"]
    for name in names:
        pytest.importorskip(PACKAGES[name])
    answers = ask(Quantized(quantized, (policy,), x), names)
    assert not list(nothing_is_compiled.iterdir())
    assert [answer.exporter for answer in answers] == names
    for answer in answers:
        refusal = refused(answer.exporter, quantized, x, nothing_is_compiled / answer.exporter)
        assert bool(refusal) == bool(answer.reason), (answer, refusal)
        assert refusal.startswith(answer.reason)
    if sentence:
        assert sentence in answers[1].reason
        assert "deployable are" not in answers[1].reason


def test_what_a_file_is_for_is_asked_too(nothing_is_compiled: Path) -> None:
    pytest.importorskip("onnxruntime")
    x = images(8)
    network = network_of("plain")
    quantized = Q.quantize(network, Q.BitPolicy.uniform(network, 1, 8), calibrate=x).eval()
    given = Quantized(quantized, (Q.get_policy(quantized),), x)
    (openvino,) = ask(given, ["onnx"], "openvino")
    (tensorrt,) = ask(given, ["onnx"], "tensorrt")
    assert not openvino.reason
    assert "1 bit" in tensorrt.reason
    assert refused("onnx", quantized, x, nothing_is_compiled / "net.onnx", flavour="tensorrt") == tensorrt.reason


def test_every_exporter_is_asked_unless_some_are_named(nothing_is_compiled: Path) -> None:
    x = images(8)
    quantized = Q.quantize(network_of("plain"), Q.BitPolicy.uniform(network_of("plain"), 8, 8), calibrate=x).eval()
    given = Quantized(quantized, (Q.get_policy(quantized),), x)
    answers = ask(given, [])
    assert {answer.exporter for answer in answers} == set(EXPORTERS)
    assert not any(answer.reason for answer in answers if answer.exporter == "tvm")
    for name in EXPORTERS:
        flavours = [answer.flavour for answer in answers if answer.exporter == name]
        assert flavours == [None, *EXPORTERS.get(name).flavours]
    with pytest.raises(ValueError, match=r"unknown exporter 'tvn'; did you mean tvm"):
        ask(given, ["tvn"])
    with pytest.raises(ValueError, match="--for vanilla is for formats that have files of several kinds; --to c has one"):
        ask(given, ["c"], "vanilla")


def test_what_no_format_knows_onnx_writes_with_torchs_operations(nothing_is_compiled: Path) -> None:
    x = images(8)
    network = network_of("sorting")
    quantized = Q.quantize(network, Q.BitPolicy.uniform(network, 8, 8), calibrate=x).eval()
    onnx, tvm = ask(Quantized(quantized, (Q.get_policy(quantized),), x), ["onnx", "tvm"])
    assert not onnx.reason
    assert "aten.sort" in tvm.reason


def test_every_policy_is_asked_about() -> None:
    x = images(8)
    network = network_of("plain")
    narrow = Q.BitPolicy.uniform(network, 2, 2)
    wide = Q.BitPolicy({**narrow, "pointwise": (8, 16)})
    quantized = Q.quantize(network, narrow, calibrate=x).eval()
    (answer,) = ask(Quantized(quantized, (narrow, wide, narrow), x), ["c"])
    assert answer.reason == "layer 'pointwise' can't be written in C: its activations are of 16 bits; --to c takes 1 to 8 bits"


def test_before_a_search_every_width_is_looked_at(problem: haq.Problem) -> None:
    policies = _spanning(problem)
    for operand in (0, 1):
        chosen = {pair[operand] for policy in policies for pair in policy.values()}
        assert chosen == {int(width) for decision in problem.decisions for width in decision.pairs[:, operand]}
    assert len(policies) < 20
    assert all(problem.allows(policy) for policy in policies)


def call(main: Any, *words: str) -> int:
    return run_command(lambda: main(list(words)))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    enter(tmp_path, monkeypatch, JOB)
    return tmp_path


def test_the_command_says_it_in_a_table_and_by_its_exit_status(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(deploy.main, "--check", "small_job:network", "--to", "c", "--to", "executorch", "--bits", "8/8,2/4") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "small_job:network at 8/8,2/4" in printed
    assert "c yes executorch yes" in printed
    words = ["--check", "small_job:sorting", "--json"]
    assert call(deploy.main, *words, "--to", "c") == 1
    found = json.loads(capsys.readouterr().out)
    assert found["exporters"] == [
        {
            "exporter": "c",
            "flavour": None,
            "deployable": False,
            "reason": "layer 'relu3' (Sorting) can't be deployed: operation aten.sort",
        }
    ]
    assert call(deploy.main, *words) == 0
    assert {entry["exporter"] for entry in json.loads(capsys.readouterr().out)["exporters"]} == set(EXPORTERS)
    assert sorted(path.name for path in place.iterdir() if path.name != "__pycache__") == ["small_job.py"]


def test_residuals_of_8_bits_and_data_of_ones_own(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--check", "small_job:network", "--to", "executorch", "--residuals", "8"]
    assert call(deploy.main, *words, "--data", "small_job:splits") == 0
    assert call(deploy.main, "--check", "small_job:shapeless", "--to", "c", "--data", "small_job:splits") == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--check", "small_job:network", "--out", "x"], "--out doesn't go with --check, which writes nothing"),
        (["run", "--check", "small_job:network"], "RUN doesn't go with --check, which writes nothing"),
        (["--check", "small_job:network", "--threads", "2"], "--threads doesn't go with --check, which runs nothing"),
        (["--check", "small_job:network", "--bits", "9"], "--bits has '9'; give widths from 1 to 8, 16 or float"),
        (["--check", "small_job:netwrk"], "module small_job has no 'netwrk'; close: network"),
        (["--check", "small_job:network", "--to", "tvn"], "unknown exporter 'tvn'; did you mean tvm"),
        (["--check", "small_job:shapeless"], "small_job:shapeless doesn't say what it takes: give --data NAME besides"),
        (["run", "--bits", "4"], "--bits goes with --check; a run has its own"),
        (["run", "--to", "c", "--to", "tvm"], "--to is given 2 times, and a run is deployed to one format at a time"),
        ([], "RUN is missing, the folder of a search; or give --check NETWORK"),
    ],
)
def test_what_does_not_go_together_is_told_in_a_sentence(
    words: list[str], sentence: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(deploy.main, *words) == EXIT_BAD_INPUT
    assert sentence in " ".join(capsys.readouterr().err.split())


def test_a_search_whose_outcome_could_not_be_deployed_is_not_begun(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = [*SMALL, "--solver", "ilp", "--evaluations", "4", "--finetune-epochs", "0", "--out", "run"]
    refused = [
        (["--check-deploy", "tvm,c,cc"], "unknown exporter 'cc'; did you mean c"),
        (
            ["--check-deploy", "c", "--network", "small_job:sorting"],
            "--check-deploy c: what this search may find can't be deployed; layer 'relu3' (Sorting) can't be deployed: "
            "operation aten.sort",
        ),
        (["--check-deploy", "c", "--scheme", "kmeans", "--metric", "storage"], "weights of scheme 'kmeans'"),
    ]
    for words, sentence in refused:
        assert call(search.main, *plan, *words) == EXIT_BAD_INPUT
        assert sentence in " ".join(capsys.readouterr().err.split())
        assert not Path("run").exists()
    assert call(search.main, *plan, "--check-deploy", "tvm,c", "--dry-run") == 0
    assert call(search.main, "--resume", "run", "--check-deploy", "c") == EXIT_BAD_INPUT
