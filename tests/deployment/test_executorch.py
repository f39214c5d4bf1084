"""`haq deploy RUN --to executorch` writes what the fake-quantized network computes, and XNNPACK runs it in integers."""

from __future__ import annotations

import importlib.util
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from haq.deployment import EXPORTERS, executorch
from haq.deployment.executorch import ExecutorchExporter, Plan, QdqNetwork, Rounding, exported
from haq.deployment.exporter import Samples, Verdict
from haq.deployment.graph import capture
from tests.conftest import images, small_network

Pair = tuple[int | None, int | None]
INSTALLED = importlib.util.find_spec("executorch") is not None


class Everything(nn.Module):
    """An operation of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.act = nn.PReLU(8)
        self.thin = nn.Conv2d(8, 8, 1)
        self.down = nn.Conv2d(16, 8, 3, stride=2, padding=1)
        self.squeeze, self.excite = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.mirrored = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.act(x + self.branch(x))
        z = F.silu(self.thin(y))
        x = torch.cat([F.max_pool2d(y, 3, 2, 1), F.avg_pool2d(z, 3, 2, 1, count_include_pad=False)], 1)
        x = F.interpolate(F.interpolate(x, scale_factor=2), scale_factor=1.5, mode="bilinear")
        x = F.hardswish(self.down(x))
        x = x * torch.sigmoid(self.excite(self.squeeze(F.adaptive_avg_pool2d(x, 1)).relu()))
        first, second = x.chunk(2, 1)
        x = F.channel_shuffle(torch.cat([second, first], 1), 2).roll(1, 3)
        return self.head(self.mirrored(x).relu().mean((2, 3)))


def noise(count: int) -> Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(3)) - 0.3


def everything() -> nn.Module:
    torch.manual_seed(0)
    made = Everything().eval()
    for norm in (made.stem[1], made.branch[1]):
        assert isinstance(norm, nn.BatchNorm2d)
        norm.weight.data = torch.linspace(-1.0, 2.0, 8)  # some channels change their sign
        norm.bias.data = torch.linspace(0.3, -0.3, 8)
    return made


def quantized(network: nn.Module, pair: Pair, x: Tensor) -> nn.Module:
    return Q.quantize(network, dict.fromkeys(Q.BitPolicy.uniform(network, 8, 8), pair), calibrate=x).eval()


def deployed(network: nn.Module, x: Tensor, folder: Path) -> Verdict:
    exporter = ExecutorchExporter()
    exporter.check(network)
    graph = capture(network, x[:1])
    path = folder / exporter.output
    exporter.export(network, graph, x, path, notes={"network": "of a test"}, options={}, on_progress=lambda *told: None)
    return exporter.compare(network, graph, Samples(x, x, lambda: [(x, torch.zeros(len(x)))]), path)


@pytest.mark.parametrize("residuals", [False, True])
@pytest.mark.parametrize("pair", [(8, 8), (3, 4), (1, 1), (16, 16), (8, None), (None, 5)])
def test_operators_compute_what_the_network_does(pair: Pair, residuals: bool) -> None:
    """Before anything is exported: by integers that enter layers, and outputs."""
    x = noise(24)
    network = everything()
    if residuals:
        network = Q.insert_residual_quantizers(network, x)
    network = quantized(network, pair, x)
    graph = capture(network, x[:1])
    exporter = ExecutorchExporter()
    exporter.check_operations(network, graph, x, options={})
    for for_xnnpack in (False, True):
        qdq = QdqNetwork(Plan(graph, network, for_xnnpack=for_xnnpack)).eval()
        found = executorch._compare_integers(qdq, network, x)
        assert not found.fault
        assert found.different <= 0.002 * found.values
        torch.testing.assert_close(qdq(x), network(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["small", "everything"])
def test_the_exported_program_is_the_network(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executorch, "is_installed", lambda: False)
    x, network = images(24), small_network()
    if kind == "everything":
        x, network = noise(24), everything()
    network = quantized(network, (3, 4), x)
    verdict = deployed(network, x, tmp_path)
    rows = dict(verdict.rows)
    assert verdict.same_answers
    assert rows["same answer as in PyTorch"] == "24 of 24 test images"
    assert rows["network.pte"] == "not written: pip install executorch"
    assert "the policy's parameters at their bits: " in rows["size of the file"]
    # Any number of images, in another process for all it knows.
    program = torch.export.load(tmp_path / "network.pt2").module()
    for count in (1, 5):
        torch.testing.assert_close(program(x[:count]), network(x[:count]), rtol=1e-4, atol=1e-4)
    assert not list(tmp_path.glob("*.pte"))


def test_the_file_holds_integers_and_nothing_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executorch, "is_installed", lambda: False)
    x = images(8)
    deployed(quantized(small_network(), (8, 8), x), x, tmp_path)
    program = torch.export.load(tmp_path / "network.pt2", extra_files=(notes := {"haq.json": ""}))
    assert notes["haq.json"] == '{"network": "of a test"}'
    weights = [value for name, value in program.state_dict.items() if name.startswith("integers")]
    assert [value.dtype for value in weights] == [torch.int8] * 5
    operations = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert "quantized_decomposed.quantize_per_tensor.default" in operations
    assert "quantized_decomposed.dequantize_per_channel.default" in operations
    assert not any("batch_norm" in name for name in operations)
    for part in program.example_inputs[0]:
        assert not part.any()
    with zipfile.ZipFile(tmp_path / "network.pt2") as archive:
        assert not any(str(Path.cwd()).encode() in archive.read(name) for name in archive.namelist())


def test_batch_norms_are_folded_and_few_bits_fill_a_byte() -> None:
    x = noise(8)
    network = quantized(everything(), (3, 4), x)
    plan = Plan(capture(network, x[:1]), network)
    assert "batch_norm" not in {node.kind for node in plan.nodes}
    layers = {layer.call: layer for layer in plan.layers.values()}
    integers, steps = layers["stem.0"].weight or (np.zeros(1), np.zeros(1))
    original = Q.quant_layers(network)["stem.0"].quantized_weight().detach().numpy()
    norm = network.get_submodule("stem.1")
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().numpy()  # type: ignore[operator, union-attr]
    assert 64 <= np.abs(integers).max() <= 127
    assert (steps > 0).all()
    np.testing.assert_allclose(
        integers * steps.reshape(-1, 1, 1, 1), original * factor.reshape(-1, 1, 1, 1), rtol=1e-6, atol=1e-7
    )


def test_inputs_of_few_bits_fill_a_byte_for_xnnpack() -> None:
    x = images(8)
    for a, factor in ((8, 1), (7, 2), (4, 16), (2, 64)):
        made = quantized(Q.insert_residual_quantizers(small_network(), x), (8, a), x)
        plan, _ = plan_of(made, x)
        (layer,) = (layer for layer in plan.layers.values() if layer.call == "depthwise")
        assert layer.rounding is not None
        entering = layer.finer or layer.rounding
        assert entering.scale == layer.rounding.scale / factor
        assert entering.integers == (0, (2**a - 1) * factor)
        torch.testing.assert_close(QdqNetwork(plan)(x), made(x), rtol=1e-4, atol=1e-4)


def test_what_is_rounded_lies_in_signed_integers() -> None:
    assert Rounding.placed(0.5, 0, 255) == Rounding(0.5, -128, -128, 127)
    assert Rounding.placed(0.5, 0, 15) == Rounding(0.5, 0, 0, 15)
    assert Rounding.placed(0.5, -40, 215) == Rounding(0.5, -88, -128, 127)
    assert Rounding.placed(0.5, 0, 65535, wide=True) == Rounding(0.5, -32768, -32768, 32767, wide=True)
    assert Rounding.placed(0.5, -127, 127).bounds == (-63.5, 63.5)


def plan_of(network: nn.Module, x: Tensor) -> tuple[Plan, set[str]]:
    plan = Plan(capture(network, x[:1]), network, for_xnnpack=True)
    return plan, {plan.layers[name].call for name in plan.in_integers}


def test_layers_whose_results_are_rounded_at_once_are_in_integers() -> None:
    x = images(16)
    network = small_network()
    names = set(Q.BitPolicy.uniform(network, 8, 8))
    # The pointwise layer's result is averaged, and the last one's is the output.
    made = quantized(network, (8, 8), x)
    assert plan_of(made, x)[1] <= names - {"pointwise", "classifier"}
    assert {"stem", "hidden"} <= plan_of(made, x)[1]
    whole = Q.insert_residual_quantizers(network, x)
    made = Q.quantize(whole, Q.BitPolicy.uniform(network, 4, 8), calibrate=x).eval()
    assert plan_of(made, x)[1] == names - {"classifier"}
    for pair in ((16, 8), (8, 16), (None, 8), (8, None)):
        assert not plan_of(quantized(network, pair, x), x)[1]


def test_a_bias_that_would_be_rounded_too_much_keeps_a_layer_in_float() -> None:
    x = images(16)
    network = small_network()
    for scale, expected in ((1.0, True), (4000.0, False)):
        hidden = network.get_submodule("hidden")
        hidden.weight.data[3, 0] = scale * hidden.weight.data[3, 1:].abs().max()  # type: ignore[operator, union-attr]
        made = quantized(network, (8, 8), x)
        hidden_in_integers = "hidden" in plan_of(made, x)[1]
        made.get_submodule("hidden").bias.data[3] += 0.4 / scale  # type: ignore[operator, union-attr]
        assert hidden_in_integers == expected


@pytest.mark.parametrize(
    "move",
    [
        lambda x: F.interpolate(x, size=(5, 7), mode="nearest-exact"),
        lambda x: F.pad(x, (1, 2, 0, 1), mode="circular"),
        lambda x: F.pixel_shuffle(x, 2),
        lambda x: x.flip(1).transpose(2, 3)[:, 1:, ::2],
        lambda x: x.repeat_interleave(2, 3).repeat(1, 1, 2, 1),
        lambda x: torch.stack([x, x * 2], 2).flatten(1, 2),
    ],
)
def test_moves_in_torchs_words_or_by_index(move: Callable[[Tensor], Tensor]) -> None:
    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.before = nn.Conv2d(3, 8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return move(self.before(x).relu())

    x = noise(3)
    network = quantized(Moving().eval(), (8, 8), x)
    qdq = QdqNetwork(Plan(capture(network, x[:1]), network)).eval()
    program = exported(qdq, x, any_number=True).module()
    torch.testing.assert_close(program(x), network(x), rtol=1e-5, atol=1e-5)


def test_what_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x = images(8)
    network = quantized(small_network(), (8, 8), x)
    monkeypatch.setattr(QdqNetwork, "_clip", lambda self, node, x, clipped: x.clamp(node.low, 0.01))
    with pytest.raises(ValueError, match=r"can't be deployed: as a program of executorch it gives 'depthwise' integers"):
        deployed(network, x, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"layer 'stem' can't be deployed: weights of scheme 'kmeans'"):
        ExecutorchExporter().check(
            Q.quantize(small_network(), Q.BitPolicy.uniform(network, 4, 4), scheme="kmeans", calibrate=x)
        )


def test_without_the_package_an_earlier_program_is_said_to_be_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executorch, "is_installed", lambda: False)
    x = images(8)
    (tmp_path / "network.pte").write_bytes(b"earlier")
    verdict = deployed(quantized(small_network(), (8, 8), x), x, tmp_path)
    assert dict(verdict.rows)["network.pte"].endswith("(the one that is there is of an earlier deployment)")
    assert EXPORTERS.get("executorch") is ExecutorchExporter


def test_what_cannot_be_lowered_is_said_and_the_other_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(program: object) -> None:
        raise RuntimeError("no such operator\nand much more")

    monkeypatch.setattr(executorch, "is_installed", lambda: True)
    monkeypatch.setattr(executorch, "lowered", fail)
    x = images(8)
    verdict = deployed(quantized(small_network(), (8, 8), x), x, tmp_path)
    assert verdict.same_answers
    assert dict(verdict.rows)["network.pte"] == "not written: no such operator"
    assert (tmp_path / "network.pt2").is_file()


@pytest.mark.skipif(not INSTALLED, reason="executorch isn't installed")
@pytest.mark.parametrize(
    "pair", [(8, 8), (1, 1), *(pytest.param(pair, marks=pytest.mark.slow) for pair in ((2, 4), (16, 16), (8, None)))]
)
def test_xnnpack_gives_the_same_answers(pair: Pair, tmp_path: Path) -> None:
    x = images(32)
    network = small_network()
    if pair != (8, None):
        network = Q.insert_residual_quantizers(network, x)
    made = quantized(network, pair, x)
    verdict = deployed(made, x, tmp_path)
    assert verdict.same_answers
    rows = dict(verdict.rows)
    assert rows["layers in integers there"].startswith(f"{len(plan_of(made, x)[1])} of 5; in float32: ")
    taken, _, total = rows["operators in XNNPACK"].partition(";")[0].partition(" of ")
    # Signs are found, and wide integers rounded, by others.
    assert (int(taken) == int(total)) == (pair in ((8, 8), (2, 4), (8, None)))


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="executorch isn't installed")
def test_xnnpack_runs_an_operation_of_every_kind(tmp_path: Path) -> None:
    x = noise(16)
    assert deployed(quantized(everything(), (4, 8), x), x, tmp_path).same_answers
