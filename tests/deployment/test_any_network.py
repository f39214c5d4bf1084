"""A network of any operations, inputs and outputs becomes an ONNX file that computes the same, for any number of samples."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantizers as Q
from haq import deploy
from haq.deployment.exporter import AnySamples
from haq.deployment.onnx import OnnxExporter
from haq.deployment.qonnx import QonnxExporter
from quantizers.calling import call, leaves

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


class Tokens(nn.Module):
    """Token ids and a mask in, a mapping out."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.a, self.b = nn.Embedding(11, 8), nn.Linear(8, 8), nn.Linear(8, 11)
        self.norm = nn.LayerNorm(8)

    def forward(self, input_ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        made = self.b(self.norm(self.a(self.words(input_ids))).relu()) * mask[..., None]
        return {"logits": made, "pooled": made.mean(1)}


class Two(nn.Module):
    """Two images side by side, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1)

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        made = self.b(nn.functional.silu(self.a(torch.cat([left, right], 3))))
        return made.sigmoid(), made.mean((2, 3))


class Sequence(nn.Module):
    """A signal in, another operation than deployed networks have."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv1d(2, 6, 3, padding=1), nn.Conv1d(6, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(nn.functional.gelu(self.a(x))).mean(2)


def tokens(count: int, length: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return {"input_ids": torch.randint(11, (count, length), generator=generator), "mask": torch.ones(count, length)}


def pairs(count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    return torch.rand(count, 3, 6, 4, generator=generator), torch.rand(count, 3, 6, 4, generator=generator)


def signals(count: int) -> Tensor:
    return torch.randn(count, 2, 9, generator=torch.Generator().manual_seed(count))


KINDS: dict[str, tuple[Any, Any, list[str], list[str]]] = {
    "tokens": (Tokens, tokens, ["input_ids", "mask"], ["logits", "pooled"]),
    "two": (Two, pairs, ["left", "right"], ["output_0", "output_1"]),
    "sequence": (Sequence, signals, ["input"], ["output"]),
}


def quantized(network: nn.Module, inputs: Any, **options: Any) -> nn.Module:
    policy = {"a": (4, 4), "b": (3, 8)}
    scheme = Q.Linear(calibration="output")
    return Q.quantize(network.eval(), policy, scheme=scheme, calibrate=[(inputs, None)], **options).eval()


@pytest.mark.parametrize("kind", ["tokens", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("two", "sequence"))])
def test_a_file_computes_what_the_network_does(kind: str, tmp_path: Path) -> None:
    make, draw, names, outputs = KINDS[kind]
    network = quantized(make(), draw(8), correction="analytic")
    given = AnySamples((draw(8), None), (draw(20), None))
    path = tmp_path / "network.onnx"
    exporter = OnnxExporter()
    exporter.check(network)
    exporter.export_any(network, given, path)
    verdict = exporter.compare_any(network, given, path)
    assert verdict.same_answers, verdict.rows
    assert "20 of 20" in verdict.rows[0][1]
    assert [row[0].split()[3] for row in verdict.rows[1:]] == outputs
    session = onnxruntime.InferenceSession(str(path))
    assert [entry.name for entry in session.get_inputs()] == names
    # Any number of samples, and any length of token ids.
    for count in (1, 5):
        inputs = draw(count)
        if kind == "tokens":
            inputs = tokens(count, 4)
        feeds = {name: tensor.numpy() for name, tensor in zip(names, leaves(inputs), strict=True)}
        with torch.no_grad():
            expected = leaves(call(network, inputs))
        for one, other in zip(expected, session.run(outputs, feeds), strict=True):
            assert torch.allclose(one, torch.from_numpy(other), atol=1e-5)


def test_weights_are_stored_as_their_integers(tmp_path: Path) -> None:
    network = quantized(Sequence(), signals(8))
    path = tmp_path / "network.onnx"
    OnnxExporter().export_any(network, AnySamples((signals(8), None), (signals(8), None)), path)
    held = {one.name.rpartition("network.")[2]: onnx.numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}
    assert "a.weight" not in held
    assert held["a.weight_integers"].dtype == "int8"
    assert abs(held["a.weight_integers"]).max() <= 8
    assert abs(held["b.weight_integers"]).max() <= 4


@pytest.mark.parametrize("bits", [{"a": (16, None), "b": (8, 16)}, {"a": (None, 16), "b": (None, None)}], ids=str)
def test_sixteen_bits_and_float(bits: Any, tmp_path: Path) -> None:
    """Weights of 16 bits are int16, and what is in float has no integers."""
    network = Q.quantize(Sequence().eval(), bits, calibrate=signals(8)).eval()
    given = AnySamples((signals(8), None), (signals(20), None))
    path = tmp_path / "network.onnx"
    exporter = OnnxExporter()
    exporter.check(network)
    exporter.export_any(network, given, path)
    assert exporter.compare_any(network, given, path).same_answers
    held = {one.name.rpartition("network.")[2]: onnx.numpy_helper.to_array(one) for one in onnx.load(path).graph.initializer}
    for name, (w, _) in bits.items():
        if w is None:
            assert held[f"{name}.weight"].dtype == "float32"
            assert f"{name}.weight_integers" not in held
        else:
            assert held[f"{name}.weight_integers"].dtype == {16: "int16", 8: "int8"}[w]


@pytest.mark.slow
def test_a_forward_runs_it(tmp_path: Path) -> None:
    def forward(network: nn.Module, batch: Any) -> Any:
        return network(batch[0] * 2)

    network = quantized(Sequence(), signals(8))
    given = AnySamples((signals(8), torch.zeros(8)), (signals(12), torch.zeros(12)), forward)
    path = tmp_path / "network.onnx"
    OnnxExporter().export_any(network, given, path)
    assert OnnxExporter().compare_any(network, given, path).same_answers
    session = onnxruntime.InferenceSession(str(path))
    found = torch.from_numpy(session.run(None, {"input": signals(3).numpy()})[0])
    with torch.no_grad():
        assert torch.allclose(found, network(signals(3) * 2), atol=1e-5)


class Branching(Sequence):
    """Looks at values."""

    def forward(self, x: Tensor) -> Tensor:
        if float(x.sum()) > 0:
            x = -x
        return super().forward(x)


def test_what_torch_cannot_write_down_is_one_sentence(tmp_path: Path) -> None:
    network = quantized(Branching(), signals(8))
    with pytest.raises(ValueError, match="Branching can't be deployed: torch can't write down") as raised:
        OnnxExporter().export_any(network, AnySamples((signals(8), None), (signals(8), None)), tmp_path / "network.onnx")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "network.onnx").exists()


def test_integers_from_end_to_end_need_images() -> None:
    assert OnnxExporter.takes_any()
    assert not QonnxExporter.takes_any()


def loaded_with(network: nn.Module, inputs: Any, forward: Any = None) -> Any:
    """Stand in for a loaded network and its data."""
    split = SimpleNamespace(batches=lambda count: iter([(inputs, None)]))
    return SimpleNamespace(
        network=SimpleNamespace(module=network, preprocess=lambda given: given, forward=forward),
        dataset=SimpleNamespace(train=split, test=split, classes=()),
    )


@pytest.mark.parametrize(
    ("inputs", "forward", "said"),
    [
        (tokens(4), None, "takes a dict"),
        (pairs(4), None, "takes a tuple"),
        (torch.rand(4, 3, 2, 6, 6), None, "takes torch.float32 of 5 dimensions"),
        (tokens(4)["input_ids"], None, "takes torch.int64 of 2 dimensions"),
        (torch.rand(4, 3, 6, 6), lambda network, batch: network(batch[0]), "is called by a function of its own"),
    ],
)
def test_what_an_exporter_of_images_cannot_take_is_named(inputs: Any, forward: Any, said: str) -> None:
    with pytest.raises(ValueError, match=f"--to qonnx writes networks that take images.*{said}.*--to onnx takes any"):
        deploy._seen_by(QonnxExporter(), nn.Identity(), loaded_with(nn.Identity(), inputs, forward))
    graph, given = deploy._seen_by(OnnxExporter(), nn.Identity(), loaded_with(nn.Identity(), inputs, forward))
    assert graph is None
    assert isinstance(given, AnySamples)
    assert given.forward is forward


class Detector(nn.Module):
    """Images of any size in a list, and a mapping for each of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 6, 3), nn.Linear(6, 8)

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        found = []
        for image in images:
            boxes = self.b(self.a(image[None]).relu().mean((2, 3))).view(2, 4)
            found.append({"boxes": boxes, "scores": boxes.sum(1).sigmoid()})
        return found


def test_images_in_a_list_are_taken_one_at_a_time_in_any_size(tmp_path: Path) -> None:
    images = [torch.rand(3, 6 + number, 9 - number) for number in range(4)]
    network = quantized(Detector(), images)
    given = AnySamples((images, None), (images, None))
    path = tmp_path / "network.onnx"
    OnnxExporter().export_any(network, given, path)
    verdict = OnnxExporter().compare_any(network, given, path)
    assert verdict.same_answers
    assert "4 of 4" in verdict.rows[0][1]
    assert [row[0].split()[3] for row in verdict.rows[1:]] == ["boxes", "scores"]
