"""Where networks are written: nothing of anybody's is written over, and what turns out wrong doesn't stay."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import quantizers as Q
from haq.deployment import EXPORTERS, executorch, fixed_point
from haq.deployment.c import CExporter
from haq.deployment.exporter import Samples
from haq.deployment.graph import capture


@pytest.mark.parametrize("to", ["onnx", "qonnx", "executorch"])
def test_a_folder_where_a_file_is_written(to: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"is a folder, and --to {to} writes a file"):
        EXPORTERS.get(to)().check_path(tmp_path)
    EXPORTERS.get(to)().check_path(tmp_path / EXPORTERS.get(to).output)


@pytest.mark.parametrize("to", ["c", "tvm"])
def test_a_folder_of_somebody_else(to: str, tmp_path: Path) -> None:
    """Folders of earlier deployments are written over, damaged ones too."""
    exporter = EXPORTERS.get(to)()
    exporter.check_path(tmp_path / "new")
    exporter.check_path(tmp_path)
    description = tmp_path / "network.json"
    description.write_text('{"layers": []}')
    with pytest.raises(ValueError, match=r"network.json isn't of an earlier --to .*give another folder"):
        exporter.check_path(tmp_path)
    other = {"c": "haq-deployed-3", "tvm": "haq-c-1"}
    description.write_text(json.dumps({"format": other[to]}))
    with pytest.raises(ValueError, match="network.json isn't of an earlier --to"):
        exporter.check_path(tmp_path)
    for content in (json.dumps({"format": other[{"c": "tvm", "tvm": "c"}[to]]}), '{"form'):
        description.write_text(content)
        exporter.check_path(tmp_path)
    with pytest.raises(ValueError, match=f"network.json is a file; --to {to} writes a folder"):
        exporter.check_path(description)


def test_a_program_of_somebody_else_is_kept(tmp_path: Path) -> None:
    (tmp_path / "main.c").write_text("int main(void) { return 0; }")
    with pytest.raises(ValueError, match="main.c isn't of an earlier --to c"):
        CExporter().check_path(tmp_path)


@pytest.mark.parametrize("name", ["net", "net.v1", "net.onnx"])
def test_names_of_exported_programs(name: str, tmp_path: Path) -> None:
    """An end that isn't theirs would be replaced, and net.v1 and net.v2 be one file."""
    with pytest.raises(ValueError, match=r"--to executorch writes NAME.pt2, and NAME.pte beside it, and .*ends otherwise"):
        EXPORTERS.get("executorch")().check_path(tmp_path / name)


def samples(x: torch.Tensor) -> Samples:
    return Samples(x, x, lambda: [(x, torch.zeros(len(x)))], labelled=False)


@pytest.mark.parametrize("to", ["onnx", "executorch", "c"])
def test_what_is_wrong_on_test_images_does_not_stay(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is found on images that weren't looked at when it was written."""
    if to == "onnx":
        pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    x = torch.rand(4, 2, 5, 5)
    network = Q.quantize(
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 1)), {"0": (8, 8), "2": (8, 8)}, calibrate=x
    )
    network.eval()
    exporter = EXPORTERS.get(to)()
    path = tmp_path / exporter.output
    graph = capture(network, x[:1])
    exporter.export(network, graph, x, path, notes={}, options={}, on_progress=lambda *of: None)
    if to == "c":
        monkeypatch.setattr(fixed_point, "_fault", lambda *given: "gives layer '2' others")
        with pytest.raises(ValueError, match="its program without floats gives layer '2' others"):
            exporter.compare(network, graph, samples(x), path)
        with pytest.raises(ValueError, match="deploy the network again"):
            exporter.compare(network, graph, samples(x), path)
        exporter.check_path(path)  # it may be deployed there again
        return
    if to == "executorch":
        found = executorch._Integers(fault="gives layer '2' others")
        monkeypatch.setattr(executorch, "_compare_integers", lambda *given: found)
    else:
        network[2].weight.data += 1.0  # type: ignore[index, operator]
    with pytest.raises(ValueError, match="can't be deployed: as a"):
        exporter.compare(network, graph, samples(x), path)
    assert not path.exists()
