"""Layers of 16 bits, in float, or with one operand in float are exported like any other, beside layers of few bits.

Weights of 16 bits are stored as 16-bit integers, what is in float has no integers at all, and every back end computes what the
fake-quantized network does: integers from the same ones before are equal, but for ties.
"""

from __future__ import annotations

import copy
import functools
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from haq import deploy
from haq.deployment import interpreter, qonnx
from haq.deployment import tvm as tvm_code
from haq.deployment.exporter import Samples
from haq.deployment.graph import Graph, capture
from haq.deployment.lowering import integer_activations, integer_weights, lower
from haq.deployment.onnx import OnnxExporter, export, verify
from haq.deployment.program import Codes, Convolution, FloatConvolution
from haq.store.records import LayerRecord
from hw_models.tvm_cpu.conv import Conv, reference

Bits = tuple[int | None, int | None]
LAYERS = ("stem", "depthwise", "pointwise", "shared", "hidden", "last")
EVEN: list[Bits] = [(16, 16), (8, 16), (16, 8), (None, None), (4, None), (None, 8), (16, None), (None, 16)]
ALL: list[Bits] = [*EVEN, (8, 8), (4, 4), (16, 2), (1, 16)]


class Every(nn.Module):
    """A dense, a depthwise and a pointwise layer, one that is called twice, an addition, both poolings, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.pointwise = nn.Conv2d(8, 8, 1)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.hidden, self.last = nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.norm(self.stem(x)).relu(), 2)
        x = (x + self.pointwise(F.relu6(self.depthwise(x)))).relu()
        x = self.shared(self.shared(x).relu())
        made: Tensor = self.last(self.hidden(F.avg_pool2d(x, 2).flatten(1)).relu())
        return made


def mixed(seed: int) -> dict[str, Bits]:
    draw = random.Random(seed)
    return {name: draw.choice(ALL) for name in LAYERS}


@functools.cache
def calibrated(scheme: str) -> tuple[nn.Module, Tensor, Graph]:
    """The network at 8 bits, images, and its operations, which don't depend on bits."""
    torch.manual_seed(0)
    network = Every()
    x = torch.randn(6, 3, 8, 8)
    network(x)  # batch statistics
    made = Q.quantize(network.eval(), dict.fromkeys(LAYERS, (8, 8)), calibrate=x, scheme=scheme).eval()
    return made, x, capture(made, x)


def quantized(policy: Bits | dict[str, Bits], scheme: str = "linear") -> tuple[nn.Module, Tensor, Graph]:
    made, x, graph = calibrated(scheme)
    made = copy.deepcopy(made)
    if isinstance(policy, tuple):
        policy = dict.fromkeys(LAYERS, policy)
    Q.set_policy(made, policy)
    return made, x, graph


POLICIES = [*EVEN, *(mixed(seed) for seed in range(6))]


# ------------------------------------------------------------------------------------------------------------ programs


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("scheme", ["linear", "linear-asymmetric"])
def test_programs_compute_what_the_network_does(policy: Any, scheme: str) -> None:
    network, x, graph = quantized(policy, scheme)
    program = lower(graph, network, x)
    found = interpreter.compare(network, program, x)
    assert not found.fault
    assert found.same_answers == 1
    assert found.own <= 2e-3 * found.values  # of 16 bits more lie beside a tie than of 8
    in_integers = {step.layer for step in program.steps if isinstance(step, Convolution)}
    in_float = {step.layer for step in program.steps if isinstance(step, FloatConvolution)}
    bits = dict(Q.get_policy(network))
    assert in_float == {name for name in LAYERS if None in bits[name]}
    assert in_integers == set(LAYERS) - in_float
    for step in program.steps:
        if isinstance(step, Convolution):
            assert (step.w_bits, step.a_bits) == bits[step.layer]
            assert step.weights.dtype == (np.int16 if step.w_bits == 16 else np.int8)
        if isinstance(step, Convolution | FloatConvolution) and bits[step.layer][1] is not None:
            codes = program.values[step.input].representation
            assert isinstance(codes, Codes)
            assert (codes.bits, codes.dtype) == (bits[step.layer][1], "uint16" if codes.bits == 16 else "uint8")


def test_sums_of_products_of_16_bits_are_exact() -> None:
    """They need more than 32 bits, and more than the 24 that float32 has."""
    conv = Conv(3000, 2, (1, 1), (1, 1))
    generator = np.random.default_rng(0)
    weights = generator.integers(32000, 32768, (2, 3000, 1, 1)).astype(np.int16)
    codes = generator.integers(65000, 65536, (1, 1, 1, 3000)).astype(np.int32)
    expected = reference(conv, weights, codes)
    assert expected.min() > 2**32
    assert np.array_equal(interpreter._convolve(conv, codes, weights, torch.float64), expected)


def test_integers_of_16_bits_times_their_scales_are_the_values() -> None:
    network, _, _ = quantized((16, 16))
    for name, layer in Q.quant_layers(network).items():
        weights, scale, bits = integer_weights(name, layer)
        assert (weights.dtype, bits) == (np.int16, 16)
        real = torch.from_numpy(weights).float().flatten(1) * torch.from_numpy(scale).float()[:, None]
        assert torch.equal(real, layer.quantized_weight().detach().flatten(1))
        assert int(abs(weights.astype(int)).max()) > 2**13
        codes = integer_activations(name, layer)
        assert codes.bits == 16
        assert codes.zero == (2**15 if codes.signed else 0)


# ---------------------------------------------------------------------------------------------------------------- ONNX


def contents(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    onnx = pytest.importorskip("onnx")
    model = onnx.load(path)
    return model, {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_onnx(policy: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    network, x, graph = quantized(policy)
    path = tmp_path / "network.onnx"
    with patch("haq.deployment.onnx.compacted", lambda model, layers: model):  # with the names that large files have
        export(graph, network, path)
    found = verify(path, network, x)
    assert not found.fault
    assert found.same_answers == 1
    assert found.different <= 1e-2 * found.values  # ties, and what follows from them
    assert found.steps <= 1
    assert found.output_difference <= 1e-4 * found.largest_output
    bits = dict(Q.get_policy(network))
    model, held = contents(path)
    expected = {None: np.float32, 16: np.int16, 8: np.int8}
    for name, (w, _) in bits.items():
        # Fewer bits are packed.
        assert w not in expected or held[f"{name}.weight"].dtype == expected[w]
    wide = any(a == 16 for _, a in bits.values())
    assert model.opset_import[0].version == (21 if wide else 17)
    made = {output for node in model.graph.node for output in node.output}
    calls = {name: name for name in LAYERS} | {"shared@2": "shared"}
    assert {name for name in calls if f"{name}:input" in made} == {call for call, name in calls.items() if bits[name][1]}
    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and ":input" in node.output[0]:
            layer = node.output[0].partition(":")[0].partition("@")[0]
            assert (held[node.input[2]].dtype.itemsize == 2) == (bits[layer][1] == 16)


def test_onnx_clips_what_is_beyond_signed_16_bits(tmp_path: Path) -> None:
    """The narrow range leaves -32768 out, and ONNX Runtime clips no integers of 16 bits."""
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 3))
    network = Q.quantize(layer, {"0": (16, 16)}, calibrate=torch.randn(50, 4)).eval()
    x = torch.randn(64, 4) * 20
    path = tmp_path / "network.onnx"
    export(capture(network, x), network, path)
    assert not verify(path, network, x).fault
    (made,) = runtime.InferenceSession(str(path)).run(None, {"input": x.numpy()})
    assert np.allclose(made, network(x).detach().numpy(), rtol=1e-6, atol=1e-7 * float(abs(made).max()))
    step = float(Q.quant_layers(network)["0"].scheme.activation_step(Q.quant_layers(network)["0"], 16))
    assert float(x.min()) < -32768 * step
    assert float(x.max()) > 32767 * step


@pytest.mark.parametrize("policy", [(16, 16), (16, None), (None, 16), mixed(2)], ids=str)
def test_qonnx(policy: Any, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("qonnx")
    network, x, graph = quantized(policy)
    path = tmp_path / "network.onnx"
    qonnx.export(graph, network, path)
    found = qonnx.verify(path, network, x)
    assert not found.fault
    assert found.same_answers == 1
    model, held = contents(path)
    widths = {}
    for node in model.graph.node:
        if node.op_type in ("Quant", "BipolarQuant"):
            widths[node.output[0]] = int(held[node.input[3]].item()) if node.op_type == "Quant" else 1
    for name, (w, a) in Q.get_policy(network).items():
        assert widths.get(f"{name}:weight") == w
        assert widths.get(f"{name}:input") == a


def test_files_hold_weights_in_their_bits(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(100, 100, bias=False))
    x = torch.randn(4, 100)
    sizes = {}
    for w in (8, 16, None):
        network = Q.quantize(layer, {"0": (w, None)}, calibrate=x).eval()
        export(capture(network, x), network, tmp_path / "network.onnx")
        sizes[w] = (tmp_path / "network.onnx").stat().st_size
    assert 0 < sizes[8] - 100 * 100 < 2000
    assert 0 < sizes[16] - 2 * 100 * 100 < 2000
    assert 0 < sizes[None] - 4 * 100 * 100 < 2000


def test_weights_alone_that_are_no_integers_name_the_back_end_that_takes_them() -> None:
    network = Q.quantize(nn.Sequential(nn.Linear(8, 4)), {"0": (4, None)}, calibrate=torch.randn(8, 8), scheme="kmeans").eval()
    with pytest.raises(ValueError, match=r"layer '0' can't be deployed: .*kmeans.*\(4/float\).*--to tvm computes it"):
        OnnxExporter().check(network)
    tvm_code.TvmExporter().check(network)


# ------------------------------------------------------------------------------------------------------- compiled code


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compile no kernel to measure it."""
    pytest.importorskip("tvm")
    from hw_models.tvm_cpu.target import CpuTarget
    from tests.deployment.test_deployment import chosen_unmeasured

    monkeypatch.setattr(CpuTarget, "fastest", chosen_unmeasured)


COMPILED: dict[str, Bits] = {
    "stem": (16, 16),
    "depthwise": (8, 16),
    "pointwise": (4, 4),
    "shared": (16, 8),
    "hidden": (4, None),
    "last": (None, 16),
}


def test_compiled(tmp_path: Path, unmeasured: None) -> None:
    """What has 16 bits is summed in float32, and all others are integers as ever."""
    network, x, graph = quantized(COMPILED)
    deployed = tvm_code.compile_network(network, graph, x, tmp_path / "deployed", reuse=False)
    program = lower(graph, network, x)
    assert tvm_code.computed_in_float(program) == ["stem", "depthwise", "shared", "shared@2", "hidden", "last"]
    expected, entered = interpreter.run(program, x.numpy())
    assert np.allclose(deployed(x.numpy()), expected, rtol=1e-4, atol=1e-4 * float(abs(expected).max()))
    for step in program.steps:
        codes = program.values[step.input].representation
        if not isinstance(step, Convolution | FloatConvolution) or not isinstance(codes, Codes):
            continue
        found = deployed.value(step.input).astype(int) - codes.zero
        apart = np.abs(found.transpose(2, 0, 1) - entered[step.name][-1].reshape(found.transpose(2, 0, 1).shape))
        assert apart.max() <= 1
        assert (apart > 0).mean() < 0.02
    kinds = {step["name"]: step["code"].split()[0] for step in deployed.description["steps"]}
    assert kinds["pointwise"] != "float"
    assert kinds["stem"] == kinds["last"] == "float"
    # The folder is read as one of 8 bits is.
    again = deploy.load(tmp_path / "deployed")
    assert Q.BitPolicy.from_dict(again.description["policy"]) == COMPILED
    assert np.array_equal(again(x.numpy()), deployed(x.numpy()))


def test_the_largest_of_codes_of_16_bits(tmp_path: Path, unmeasured: None) -> None:
    """A max pooling between layers hands codes on; signed ones are stored from 1 to 65,535."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 5, 3), nn.MaxPool2d(3, 2, 1), nn.Conv2d(5, 4, 1), nn.AvgPool2d(3), nn.Flatten())
    x = torch.randn(4, 3, 8, 8)
    made = Q.quantize(network.eval(), {"0": (8, 8), "2": (8, 16)}, calibrate=x).eval()
    deployed = deploy.to_tvm(made, x, tmp_path / "deployed")
    with torch.inference_mode():
        assert torch.allclose(deployed(x), made(x), rtol=1e-4, atol=1e-5)


def test_layers_in_float32_are_told(tmp_path: Path, unmeasured: None) -> None:
    network, x, graph = quantized(COMPILED)
    exporter = tvm_code.TvmExporter()
    exporter.check(network)
    exporter.export(network, graph, x, tmp_path / "made", notes={}, options={}, on_progress=lambda done, of, what: None)
    samples = Samples(x, x, lambda: [(x, torch.zeros(len(x), dtype=torch.long))], labelled=False)
    verdict = exporter.compare(network, graph, samples, tmp_path / "made")
    assert verdict.same_answers
    assert dict(verdict.rows)["layers computed in float32"] == "6 of 7: stem, depthwise, shared, ..."


# ---------------------------------------------------------------------------------------------------------- its latency


def test_the_latency_of_16_bits_and_float_is_looked_up_in_their_places() -> None:
    costs = np.arange(100.0).reshape(10, 10).tolist()
    costs[9][7] = None  # float/8 isn't done

    def layer(cost: Any) -> LayerRecord:
        return LayerRecord(name="a", kind="conv", macs=1, parameters=1, fixed=False, cost=cost)

    record = SimpleNamespace(metric="latency", unit="us", layers=[layer(costs)])

    def predicted(bits: Bits, given: Any = record) -> float | None:
        run = SimpleNamespace(load_policy=lambda: Q.BitPolicy({"a": bits}))
        found: float | None = deploy._predicted_latency_s(run, given)  # type: ignore[arg-type]
        return found

    assert predicted((8, 8)) == pytest.approx(77e-6)
    assert predicted((8, 16)) == pytest.approx(78e-6)
    assert predicted((16, None)) == pytest.approx(89e-6)
    assert predicted((None, None)) == pytest.approx(99e-6)
    assert predicted((None, 8)) is None
    # An older run has costs of 1 to 8 bits.
    few = [row[:8] for row in costs[:8]]
    older = SimpleNamespace(metric="latency", unit="us", layers=[layer(few)])
    assert predicted((8, 8), older) == pytest.approx(77e-6)
    assert predicted((16, 8), older) is None
