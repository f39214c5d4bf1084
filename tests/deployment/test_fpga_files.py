"""Files of QONNX are what tools of FPGAs take: integers are inferred and counted; what one doesn't take is refused by name."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hw_models
import quantizers as Q
from experiments import fpga_flows
from haq import networks
from haq.deployment import qonnx
from haq.deployment.graph import capture
from haq.deployment.qonnx import QonnxExporter
from haq.networks import Residual
from tests.conftest import images, small_network

onnx = pytest.importorskip("onnx")
pytest.importorskip("qonnx")

Bits = tuple[int | None, int | None]
GIVEN: dict[str, Any] = {"notes": {}, "on_progress": lambda *told: None}


def written(network: nn.Module, policy: Any, x: Tensor, path: Path, scheme: Any = "linear") -> Any:
    """The model of a file that computes what the quantized network does."""
    if isinstance(policy, tuple):
        policy = dict.fromkeys(Q.BitPolicy.uniform(network, w=8, a=8), policy)
    quantized = Q.quantize(network, policy, calibrate=x, scheme=scheme).eval()
    qonnx.export(capture(quantized, x), quantized, path)
    found = qonnx.verify(path, quantized, x)
    print(found)
    assert not found.fault
    assert found.same_answers == 1
    return onnx.load(path)


def kinds(model: Any) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


@pytest.mark.parametrize("name", ["small", pytest.param("mobilenet-mini", marks=pytest.mark.slow)])
def test_integers_are_inferred_and_counted_as_in_our_workload(name: str, tmp_path: Path) -> None:
    """Of every quantized tensor; MACs and bits are those that the policy says, one by one."""
    from qonnx.core.datatype import DataType
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.transformation.infer_datatypes import InferDataTypes
    from qonnx.util.inference_cost import inference_cost

    network, x = small_network(), images(4)
    if name != "small":
        network = networks.load(name).module
        x = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    draw = random.Random(2)
    policy = {name: (draw.randint(1, 8), draw.randint(1, 8)) for name in Q.BitPolicy.uniform(network, w=8, a=8)}
    policy[next(iter(policy))] = (1, 8)
    path = tmp_path / "network.onnx"
    model = written(network, policy, x, path)

    wrapper = ModelWrapper(str(path)).transform(InferDataTypes(allow_scaledint_dtypes=True))
    for name, pair in policy.items():
        for tensor, bits in zip((f"{name}:weight", f"{name}:input"), pair, strict=True):
            inferred = wrapper.get_tensor_datatype(tensor)
            assert inferred.bitwidth() == bits
            assert inferred.name in (f"SCALEDINT<{bits}>", "BIPOLAR")
    quantizers = kinds(model)["Quant"] + kinds(model)["BipolarQuant"]
    assert quantizers == 2 * len(policy)

    cost = inference_cost(str(path), discount_sparsity=False)["total_cost"]
    workload = hw_models.trace(network, x[:1])
    macs: Counter[tuple[int, int]] = Counter()
    for layer in workload.layers:
        macs[policy[layer.name]] += layer.macs
    counted: Counter[tuple[int, int]] = Counter()
    for key, value in cost.items():
        if key.startswith("op_mac"):
            of_input, of_weights = (DataType[part].bitwidth() for part in key.split("_")[2:])
            counted[of_weights, of_input] += int(value)
    assert counted == macs
    assert cost["total_macs"] == workload.macs
    assert cost["total_bops"] == sum(w * a * count for (w, a), count in macs.items())
    weights = {name: layer.weight.numel() for name, layer in network.named_modules() if name in policy}
    assert cost["total_mem_w_bits"] == sum(policy[name][0] * count for name, count in weights.items())


def test_the_form_that_tools_take(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 4, bias=False),
        nn.ReLU(),
        nn.Linear(4, 3),
    ).eval()
    model = written(network, (4, 4), images(8), tmp_path / "network.onnx", Q.Linear(per_channel=False))
    assert not kinds(model).keys() & {"Identity", "Gemm", "AveragePool"}
    assert kinds(model)["GlobalAveragePool"] == 1
    assert kinds(model)["MatMul"] == 2
    assert kinds(model)["Add"] == 1  # behind a linear layer, not behind a convolution
    nodes = {node.name: node for node in model.graph.node}
    assert len(nodes) == len(model.graph.node)
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert [len(node.input) for node in convolutions] == [2, 3]
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert held.keys() == {name for node in model.graph.node for name in node.input if name in held}  # none that nobody reads
    for node in model.graph.node:
        if node.op_type == "Quant":
            assert [held[name].shape for name in node.input[1:]] == [()] * 3
    assert model.graph.node[-1].output[0] == model.graph.output[0].name == "output"


def test_scales_of_channels_have_a_dimension_and_files_are_the_same_again(tmp_path: Path) -> None:
    model = written(small_network(), (3, 4), images(8), tmp_path / "network.onnx")
    assert written(small_network(), (3, 4), images(8), tmp_path / "again.onnx") == model
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    assert list(held["stem:weight_scale"].dims) == [16, 1, 1, 1]
    assert list(held["hidden:weight_scale"].dims) == [1, 16]
    assert list(held["hidden.weight"].dims) == [64, 16]


def test_every_quantizer_behind_a_relu_has_its_own(tmp_path: Path) -> None:
    """FINN takes the ReLU away from the addition that reads it, too."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), Residual(nn.Conv2d(4, 4, 3, padding=1)), nn.Conv2d(4, 3, 1))
    model = written(network, (4, 4), torch.randn(4, 2, 8, 8), tmp_path / "network.onnx")
    readers = Counter(name for node in model.graph.node for name in node.input)
    makers = {node.output[0]: node for node in model.graph.node}
    behind = [makers[node.input[0]] for node in model.graph.node if node.op_type == "Quant" and node.input[0] in makers]
    assert [node.op_type for node in behind] == ["Relu"] * len(behind)
    assert len(behind) == 2
    assert all(readers[node.output[0]] == 1 for node in behind)
    assert kinds(model)["Relu"] == 3


def test_a_clamp_is_a_relu_in_front_of_a_quantizer_that_ends_before_it(tmp_path: Path) -> None:
    def network(high: float) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(2, 4, 3), nn.Hardtanh(0, high), nn.Conv2d(4, 3, 1))

    x = torch.randn(16, 2, 8, 8)
    far = written(network(6.0), (4, 4), x, tmp_path / "far.onnx")
    assert kinds(far) >= Counter(Relu=1)
    assert kinds(far)["Clip"] == 0
    scheme = Q.Linear(power_of_two=True, calibration="max")
    near = written(network(0.3), (4, 4), x, tmp_path / "near.onnx", scheme)
    assert kinds(near)["Clip"] == 1


def test_what_a_layer_does_to_its_own_input_and_signals(tmp_path: Path) -> None:
    """It is quantized first; Conv1d has one dimension less."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular"),
        nn.ReLU(),
        nn.MaxPool1d(3, 2, 1),
        nn.Conv1d(4, 4, 3, 2, bias=False, groups=4),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    for policy in [(4, 4), (1, 1)]:
        model = written(network, policy, torch.randn(8, 2, 16), tmp_path / "network.onnx")
        nodes = {node.name: node for node in model.graph.node}
        assert "Quant" in nodes["0:own0"].op_type
        assert "0:input" in {node.input[0] for node in model.graph.node if node.op_type == "Conv"}


def test_quantizers_between_layers(tmp_path: Path) -> None:
    """Those in front of additions and poolings are Quant nodes of 8 bits; hls4ml's have no zero points."""
    x = torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    network = Q.insert_residual_quantizers(fpga_flows.small_network("residual"), x)
    quantized = fpga_flows.quantized_for("hls4ml", network, x, 4)
    graph = capture(quantized, x)
    between = [node for node in graph.nodes if node.kind == "quantize"]
    assert len(between) == 3
    path = tmp_path / "network.onnx"
    QonnxExporter().export(quantized, graph, x, path, options={"flavour": "hls4ml"}, **GIVEN)
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}
    assert [held[f"{node.name}:bits"] for node in between] == [8, 8, 8]
    found = qonnx.verify(path, quantized, x)
    assert not found.fault
    assert found.same_answers == 1


class Branches(nn.Module):
    """Operations of real numbers that stay what they are: functions, products, concatenation, interpolation."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1)
        self.gate = nn.Conv2d(4, 4, 1)
        self.last = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.hardswish(self.first(x))
        y = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        y = nn.functional.interpolate(nn.functional.avg_pool2d(y, 2), scale_factor=2.0)
        return nn.functional.gelu(self.last(torch.cat([x, y], 1)) * 0.5).mean((2, 3))


def test_operations_in_float(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = written(Branches().eval(), (4, 4), torch.randn(8, 2, 8, 8), tmp_path / "network.onnx")
    assert kinds(model) >= Counter(Sigmoid=1, Concat=1, Mul=1, Erf=1, Resize=1)


# --------------------------------------------------------------------------------------------------------------- flows


FOR_HLS4ML = Q.Linear(per_channel=False, power_of_two=True)


def sequence(*modules: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), *modules, nn.Flatten(), nn.Linear(4 * 6 * 6, 3)).eval()


@pytest.mark.parametrize(
    ("flow", "modules", "bits", "scheme", "message"),
    [
        (
            "finn",
            [nn.Sigmoid()],
            (4, 4),
            "linear",
            "layer '2' can't be built by finn: it has no operation 'sigmoid'; it has conv",
        ),
        ("hls4ml", [nn.Upsample(scale_factor=1)], (4, 4), "linear", "layer '0' can't be built by hls4ml: its output channels"),
        (
            "finn",
            [nn.ReLU6(), nn.AvgPool2d(1)],
            (4, 4),
            "linear",
            "layer '2' can't be built by finn: it is a clamp from 0 to 6",
        ),
        ("finn", [nn.ReLU()], (4, None), "linear", "layer '0' can't be built by finn: its weights or its input stay in float"),
        (
            "finn",
            [nn.ReLU()],
            (4, 16),
            "linear",
            "layer '0' can't be built by finn: its input has 16 bits, and it takes up to 8",
        ),
        (
            "finn",
            [nn.ReLU()],
            (4, 4),
            Q.Linear(asymmetric=True),
            "layer '0' .* by finn: its input has a zero point, 7, and it",
        ),
        (
            "hls4ml",
            [nn.ReLU()],
            (4, 4),
            Q.Linear(per_channel=False),
            r"layer '0' can't be built by hls4ml: its weights have scale 0\.\d+, and it takes powers of two: search with --hw",
        ),
        (
            "hls4ml",
            [nn.Conv2d(4, 4, 1, groups=2)],
            (4, 4),
            FOR_HLS4ML,
            "layer '2' can't be built by hls4ml: it has 2 groups of several channels",
        ),
        ("hls4ml", [nn.MaxPool2d(1, dilation=2)], (4, 4), FOR_HLS4ML, "layer '2' can't .*: its window is dilated by 2"),
        ("hls4ml", [nn.AvgPool2d(3, 1, 1)], (4, 4), FOR_HLS4ML, "layer '2' can't .*: it averages over padding, too"),
        ("finn", [nn.AvgPool2d(3, 1, 1, count_include_pad=False)], (4, 4), "linear", "layer '2' can't .* of different sizes"),
    ],
)
def test_what_a_flow_cannot_take_is_refused_by_name(
    flow: str, modules: list[nn.Module], bits: Bits, scheme: Any, message: str, tmp_path: Path
) -> None:
    network, x = sequence(*modules), torch.randn(16, 2, 8, 8)
    policy = dict.fromkeys(Q.BitPolicy.uniform(network, w=8, a=8), bits)
    quantized = Q.quantize(network, policy, calibrate=x, scheme=scheme).eval()
    graph = capture(quantized, x)
    exporter = QonnxExporter()
    exporter.check_operations(quantized, graph, x, options={})
    with pytest.raises(ValueError, match=message):
        exporter.check_operations(quantized, graph, x, options={"flavour": flow})
    with pytest.raises(ValueError, match=message):
        exporter.export(quantized, graph, x, tmp_path / "network.onnx", options={"flavour": flow}, **GIVEN)
    assert not list(tmp_path.iterdir())


def test_signals_are_not_for_hls4ml() -> None:
    network, x = nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)).eval(), torch.randn(8, 2, 8)
    quantized = fpga_flows.quantized_for("hls4ml", network, x)
    graph = capture(quantized, x)
    QonnxExporter().check_operations(quantized, graph, x, options={"flavour": "finn"})
    with pytest.raises(ValueError, match="by hls4ml: it computes with signals, and it takes images and vectors"):
        QonnxExporter().check_operations(quantized, graph, x, options={"flavour": "hls4ml"})


@pytest.mark.parametrize("flow", fpga_flows.SCRIPTS)
def test_what_a_flow_s_target_asks_for_the_flow_takes(flow: str, tmp_path: Path) -> None:
    x = torch.randn(32, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    for bits in (1, 6):
        quantized = fpga_flows.quantized_for(flow, fpga_flows.small_network("residual"), x, bits)
        QonnxExporter().export(quantized, capture(quantized, x), x, tmp_path / "n.onnx", options={"flavour": flow}, **GIVEN)


@pytest.mark.parametrize("flow", ["finn", pytest.param("hls4ml", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["plain", "depthwise", "residual"])
def test_flows_give_the_same_answers(flow: str, kind: str, tmp_path: Path) -> None:
    if fpga_flows.interpreter_of(flow) is None:
        pytest.skip(f"{fpga_flows.INTERPRETERS[flow]} names no Python with {flow}, which can't be installed beside haq")
    x = torch.randn(240, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    quantized = fpga_flows.quantized_for(flow, fpga_flows.small_network(kind), x[:40])
    found = fpga_flows.run_flow(flow, quantized, x[40:], tmp_path)
    print(found)
    assert found.same == found.images == 200
    assert found.difference < 0.05 * found.largest


@pytest.mark.slow
@pytest.mark.parametrize("flow", fpga_flows.SCRIPTS)
def test_flows_give_the_same_answers_of_the_default_network(flow: str, tmp_path: Path) -> None:
    if fpga_flows.interpreter_of(flow) is None:
        pytest.skip(f"{fpga_flows.INTERPRETERS[flow]} names no Python with {flow}, which can't be installed beside haq")
    ((network, calibrate, test),) = fpga_flows.jobs([networks.DEFAULT]).values()
    found = fpga_flows.run_flow(flow, fpga_flows.quantized_for(flow, network, calibrate), test, tmp_path)
    print(found)
    assert found.same == found.images == 200


# ------------------------------------------------------------------------------------------------------------- targets


@pytest.mark.parametrize(("name", "luts"), [("finn", 230_400), ("hls4ml", 1_728_000)])
def test_targets_have_the_peaks_of_their_formula(name: str, luts: int) -> None:
    target = hw_models.load_target(name)
    assert isinstance(target, hw_models.roofline.RooflineTarget)
    assert target.provenance == "estimated"
    for w in range(1, 9):
        for a in range(1, 9):
            per_mac = 1.1 * (w + a) * (2 * np.ceil((w + a) / 6) + 1)
            peak = 2 * 0.7 * luts / per_mac * 200e6 / 1e12
            assert target.peak_tops[f"{w}/{a}"] == pytest.approx(peak, rel=0.005)
    assert len(target.peak_tops) == 64
