"""The targets `onnxruntime` and `openvino`: layers are computed in integers where a pair says so, measured as they are in a
network, kept in the cache, and what the runtime would turn into float is not supported."""

from __future__ import annotations

import gc
import json
import pickle
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import hw_models
from haq import hardware, search
from haq.console.errors import EXIT_BAD_INPUT, run_command
from haq.study.config import SearchConfig, SweepConfig
from haq.study.sweep_run import settings_on
from hw_models.extras import install_line
from hw_models.measured import trusted as trust
from hw_models.measured.timing import Timing
from hw_models.runtimes import measure as measuring
from hw_models.runtimes import openvino, operators, runtime, target
from hw_models.runtimes.measure import COPIES, FOOTPRINT, copies_of, measure
from hw_models.runtimes.operators import INTEGER, WHOLE_FLOAT, Operator
from hw_models.runtimes.runtime import possible_pairs
from hw_models.tvm_cpu.conv import Conv
from hw_models.widths import FLOAT, place_of
from tests.commands.test_search_command import MODULE
from tests.conftest import enter

NAMES = ("onnxruntime", "openvino")
SAME = (1, 1)
LAYERS = {
    "conv": (Conv(3, 8, (9, 9), (5, 5), (3, 3), (2, 2), SAME), "conv"),
    "pointwise": (Conv(8, 16, (4, 4), (2, 2), (1, 1), (2, 2)), "conv"),
    "depthwise": (Conv(8, 8, (5, 5), (5, 5), (3, 3), padding=SAME, groups=8), "conv"),
    "grey": (Conv(1, 8, (9, 9), (9, 9), (3, 3), padding=SAME), "conv"),
    "grouped": (Conv(8, 8, (5, 5), (5, 5), (3, 3), padding=SAME, groups=2), "conv"),
    "conv1d": (Conv(8, 4, (1, 9), (1, 9), (1, 3), padding=(0, 1)), "conv1d"),
    "linear": (Conv(32, 10, (1, 1), (1, 1)), "linear"),
    "rows": (Conv(32, 10, (7, 1), (7, 1)), "linear"),
}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(trust, "_settled", {})


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    pytest.importorskip("onnx")
    pytest.importorskip(request.param)
    return request.param


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Operator]:
    """No clock: layers take as long as their products and widths say. The list has what was measured."""
    measured: list[Operator] = []

    def fake(some: list[Operator], *_: object, **__: object) -> dict[Operator, Timing]:
        measured.extend(some)
        return {operator: seconds(operator) for operator in some}

    monkeypatch.setattr(target, "measure", fake)
    monkeypatch.setattr(target, "Reference", lambda *_: lambda: 1e-4)
    return measured


def seconds(operator: Operator) -> Timing:
    return Timing(1e-9 * operator.conv.macs * sum(operator.pair), 1e-12, 3)


def small() -> hw_models.Workload:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Flatten(), nn.Linear(64, 3))
    return hw_models.trace(network, torch.zeros(1, 1, 8, 8))


# What a runtime computes


@pytest.mark.parametrize("layer", LAYERS)
def test_every_pair_is_computed_at_its_widths(name: str, layer: str) -> None:
    conv, form = LAYERS[layer]
    able = target.RUNTIMES[name]()
    assert [pair for pair in possible_pairs(form) if able.computes(Operator(conv, form, pair))] == [*possible_pairs(form)]


@pytest.mark.parametrize("layer", ["conv", "conv1d", "rows"])
def test_what_would_be_turned_into_float_is_not_supported(
    name: str, layer: str, counted: list[Operator], monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = operators._Graph._begin

    def in_between(self: Any) -> str:
        x = begin(self)
        if self._operator.pair != INTEGER:
            return x
        return str(self._add("Sigmoid", [x], "curved"))

    monkeypatch.setattr(operators._Graph, "_begin", in_between)
    conv, form = LAYERS[layer]
    able = target.RUNTIMES[name]()
    assert not able.computes(Operator(conv, form, INTEGER))
    assert able.computes(Operator(conv, form, WHOLE_FLOAT))
    table = hw_models.load_target(name).cost_table(small())
    assert np.isnan(table.metric("latency")[:, 7, 7]).all()
    assert np.isfinite(table.metric("latency")[:, 9, 9]).all()
    with pytest.raises(ValueError, match=f"{name} can't do layer '0' at"):
        table.price([8, 8, 8], [8, 8, 8])


def test_the_graph_computes_the_layer() -> None:
    """With activations of the scale and zero point that its input has, 8/8 is the rounded result of the float product."""
    pytest.importorskip("onnxruntime")
    import onnxruntime

    conv, form = LAYERS["rows"]
    operator = Operator(conv, form, INTEGER, 2)
    session = onnxruntime.InferenceSession(operator.model(), providers=["CPUExecutionProvider"])
    # Without VNNI, ONNX Runtime adds products of bytes by pairs in 16 bits: below 128 these are enough.
    x = np.random.default_rng(1).integers(0, 128, (7, 32), np.uint8)
    first, second = session.run(None, {"x": x})
    assert not np.array_equal(first, second)
    graph = operators._Graph(operator, False)
    graph.model()
    weights = graph._constants["weight0"].astype(np.float64) * operators.WEIGHT_SCALE
    real = (x.astype(np.float64) - operators.X_ZERO) * operators.X_SCALE @ weights.T + graph._constants["bias0"]
    wanted = np.clip(np.round(real / operators.X_SCALE) + operators.X_ZERO, 0, 255)
    assert np.abs(wanted - first).max() <= 1


def test_copies_take_as_many_bytes_as_the_network() -> None:
    layer = Operator(Conv(64, 64, (8, 8), (8, 8), (3, 3), padding=SAME), "conv", INTEGER)
    assert layer.weight_bytes == 36864
    assert copies_of(layer, 300_000) == -(-(2**19) // 36864)
    assert copies_of(layer, 1) == COPIES[0] == -(-FOOTPRINT[0] // 36864)
    assert copies_of(layer, 10**12) == COPIES[1]
    assert Operator(layer.conv, "linear", (4, FLOAT)).weight_bytes == 18432
    vast = Operator(Conv(2**16 - 1, 2**16, (1, 1), (1, 1)), "linear", WHOLE_FLOAT)
    with pytest.raises(ValueError, match="more than an ONNX file holds"):
        vast.model()


@pytest.mark.skipif(sys.platform != "linux", reason="sigaltstack is looked at as Linux has it")
def test_signals_are_handled_after_openvino_as_before() -> None:
    pytest.importorskip("openvino")

    def stack() -> tuple[object, ...]:
        found = openvino.SignalStack.present()
        return found.start, found.flags, found.size

    before = stack()
    conv, form = LAYERS["linear"]
    openvino.OpenVino().load(Operator(conv, form, INTEGER), 1)()
    gc.collect()
    assert stack() == before
    rung: list[int] = []
    handler = signal.signal(signal.SIGUSR1, lambda number, frame: rung.append(number))
    signal.raise_signal(signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, handler)
    assert rung == [signal.SIGUSR1]


# Measuring


def test_a_layer_of_more_work_takes_longer(name: str) -> None:
    able = target.RUNTIMES[name]()
    few = Operator(Conv(16, 16, (4, 4), (4, 4)), "conv", INTEGER, 4)
    many = Operator(Conv(64, 256, (16, 16), (16, 16)), "conv", INTEGER, 2)
    for cold in (False, True):
        said: list[str] = []
        timings = measure([few, many, few], able, 1, say=said.append, cold=cold)
        assert said == ["loading", "measuring"] * 2
        assert list(timings) == [few, many]
        assert 0 < timings[few].median_s < timings[many].median_s
        assert all(timing.repeats >= 3 and timing.spread_s >= 0 for timing in timings.values())
    assert measure([], able, 1) == {}


def test_threads_are_timed_by_the_clock_on_the_wall() -> None:
    import time

    assert measuring.clock_of(2) is time.perf_counter
    if time.get_clock_info("process_time").resolution <= 1e-6:
        assert measuring.clock_of(1) is time.process_time


# The target


def test_the_table_of_a_network(name: str, counted: list[Operator]) -> None:
    seen: list[tuple[int, int, str]] = []
    here: Any = hw_models.load_target(name, progress=lambda *report: seen.append(report))
    table = here.cost_table(small())
    assert table.target == name
    title = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}[name]
    assert table.provenance.startswith("measured on ")
    assert table.provenance.endswith(f", {title} {here.runtime.version}, 1 thread")
    assert "have no cost" in here.description
    assert here.zero_points
    supported = {(8, 8), (FLOAT, FLOAT)}
    assert set(table.pairs_of(0)) == set(table.pairs_of(1)) == supported
    assert set(table.pairs_of(2)) == supported | {(2, FLOAT), (4, FLOAT), (8, FLOAT)}
    for operator in counted:
        index = [Conv.of(layer) for layer in table.workload.layers].index(operator.conv)
        w, a = operator.pair
        assert table.metric("latency")[index, place_of(w), place_of(a)] == seconds(operator).median_s
    assert {done for done, _, _ in seen} == {0, 1, 2, 3}
    # Once is enough, for another process too; other conditions are another cache.
    before = len(counted)
    again = hw_models.load_target(name).cost_table(small())
    assert len(counted) == before
    assert np.array_equal(again.metric("latency"), table.metric("latency"), equal_nan=True)
    hw_models.load_target(name, threads=2).cost_table(small())
    hw_models.load_target(name, cold=True).cost_table(small())
    assert len(counted) == 3 * before
    assert pickle.loads(pickle.dumps(here)).key == here.key


def test_what_was_measured_before_is_checked(name: str, counted: list[Operator], monkeypatch: pytest.MonkeyPatch) -> None:
    first = hw_models.load_target(name).cost_table(small())
    counted.clear()
    trust._settled.clear()
    hw_models.load_target(name).cost_table(small())
    assert [operator.pair for operator in counted] == [WHOLE_FLOAT] * 3  # one of every shape, as there are so few

    def twice(some: list[Operator], *_: object, **__: object) -> dict[Operator, Timing]:
        return {operator: seconds(operator)._replace(median_s=2 * seconds(operator).median_s) for operator in some}

    monkeypatch.setattr(target, "measure", twice)
    trust._settled.clear()
    again = hw_models.load_target(name).cost_table(small())
    assert again.metric("latency")[:, 7, 7] == pytest.approx(2 * first.metric("latency")[:, 7, 7])


def test_calls_add_up_and_rows_are_a_batch(name: str, counted: list[Operator]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv1d(4, 4, 3, padding=1), nn.Linear(9, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(self.first(x)))

    workload = hw_models.trace(Twice(), torch.zeros(1, 4, 9))
    table = hw_models.load_target(name).cost_table(workload, batch=2)
    assert {operator.form for operator in counted} == {"conv1d", "linear"}
    one = next(operator for operator in counted if operator.form == "conv1d" and operator.pair == INTEGER)
    assert one.conv.batch == 2
    assert table.metric("latency")[0, 7, 7] == 2 * seconds(one).median_s
    assert {operator.conv.input_size for operator in counted if operator.form == "linear"} == {(8, 1)}


def test_what_can_not_be_had_is_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in NAMES:
        with monkeypatch.context() as patch:
            patch.setattr(runtime.importlib.util, "find_spec", lambda module: None)
            assert run_command(partial(hardware.main, ["show", name])) == EXIT_BAD_INPUT
        error = capsys.readouterr().err
        assert error == f"error: the target {name} needs onnx and {name}: {install_line('runtimes')}\n"
        with pytest.raises(
            ValueError, match=rf"target is for kernels that are compiled \(cpu, rpc:HOST:PORT\), not for {name}"
        ):
            hw_models.load_target(name, target="generic")
    pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match="threads must be a positive integer, not 0"):
        hw_models.load_target("onnxruntime", threads=0)
    network = nn.Sequential(nn.Linear(70000, 2))
    with pytest.raises(ValueError, match="onnxruntime can't compute layer '0': a sum of 70000 products"):
        hw_models.load_target("onnxruntime").cost_table(hw_models.trace(network, torch.zeros(1, 70000)))


# The commands


def test_targets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert hardware.main(["list"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "Measured are cpu, rpc:HOST:PORT, onnxruntime and openvino; all others" in words


def test_a_sweep_keeps_to_each_target_what_it_takes() -> None:
    settings = SearchConfig(finetune_epochs=0, threads=2, target="generic", cold=True)
    sweep = SweepConfig(hw=("cpu", "onnxruntime", "edge"), settings=settings)
    asked = [settings_on(sweep, name) for name in sweep.hw]
    assert [(one.threads, one.target, one.cold) for one in asked] == [
        (2, "generic", True),
        (2, None, True),
        (None, None, None),
    ]


def test_a_search(
    counted: list[Operator], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    enter(tmp_path, monkeypatch, MODULE)
    asked = ["--network", "small_job:network", "--data", "small_job:splits", "--hw", "onnxruntime", "--budget", "1.0"]
    asked += ["--finetune-epochs", "0", "--evaluations", "5"]
    assert run_command(lambda: search.main([*asked, "--out", "run"])) == 0
    out, err = capsys.readouterr()
    assert not err
    assert "ONNX Runtime" in " ".join(out.split())
    layers = json.loads(Path("run/policy.json").read_text())["layers"]
    found = {(layer["weight_bits"], layer["activation_bits"]) for layer in layers}
    assert found <= {(8, 8), (None, None), (2, None), (4, None), (8, None)}
    # A run doesn't go on with the times of another version.
    Path("run/result.json").unlink()
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    machine = json.loads(config["signature"]["machine"])
    config["signature"]["machine"] = json.dumps({**machine, "version": "0.1"})
    Path("run/config.yaml").write_text(yaml.safe_dump(config))
    assert run_command(lambda: search.main(["--resume", "run"])) == EXIT_BAD_INPUT
    assert "latencies measured with version 0.1" in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_layers_add_up_to_the_whole(capsys: pytest.CaptureFixture[str]) -> None:
    """The bar is printed, not asserted: it is another machine's business how busy it is."""
    for module in ("onnxscript", "torchvision", "timm", *NAMES):
        pytest.importorskip(module)
    from experiments import runtime_speed

    assert runtime_speed.main(["--quick"]) == 0
    with capsys.disabled():
        print(capsys.readouterr().out)
