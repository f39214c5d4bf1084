"""Residuals of 8 bits are deployed as they are evaluated: captured, in integer programs, and by `haq deploy`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import quantizers as Q
from haq import deploy, search
from haq.deployment import fixed_point
from haq.deployment.exporter import AnySamples
from haq.deployment.graph import capture
from haq.deployment.interpreter import check, compare
from haq.deployment.lowering import lower
from haq.deployment.onnx_any import compare_any, export_any
from haq.deployment.program import Convolution, Fixed, Program
from hw_models.trust import trust
from tests.conftest import enter, images
from tests.quantizers.test_residual_quantizers import Net
from tests.study.test_residuals_of_runs import MODULE, QUICK, call, residual_network


def gated_network() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


NETWORKS = {"residual": (residual_network, (1, 8, 8)), "gated": (gated_network, (3, 8, 8))}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", NETWORKS)
def test_programs_of_integers_compute_what_was_evaluated(name: str, bits: int) -> None:
    make, shape = NETWORKS[name]
    network = make()
    x = torch.randn(16, *shape, generator=torch.Generator().manual_seed(1))
    inserted = Q.insert_residual_quantizers(network, x)
    qnetwork = Q.quantize(inserted, Q.BitPolicy.uniform(network, w=bits, a=bits), calibrate=x)
    graph = capture(qnetwork, x)
    grids = [(float(node.scale), node.zero_point, node.low, node.high) for node in graph.nodes if node.kind == "quantize"]
    assert sorted(grids) == sorted(tuple(quantizer.grid) for quantizer in Q.residual_quantizers(qnetwork).values())
    # Operands of additions, and what is pooled, are integers of 8 bits.
    for node in graph.nodes:
        if node.kind in ("add", "avg_pool"):
            assert {graph[source].kind for source in node.inputs} == {"quantize"}
    program = lower(graph, qnetwork, x)
    check(qnetwork, program, x)
    assert compare(qnetwork, program, x).same_answers == 1
    if bits == 8 and name == "residual":
        # Where a layer reads the tensor, its integers are the layer's own: nothing else is held of it.
        assert not any(isinstance(value.representation, Fixed) for value in program.values.values())


class Coarse(nn.Module):
    """What is added reaches far below zero, so that a step of its grid is several of the layer's that reads the sum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third = nn.Conv2d(1, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1)
        self.last = nn.Linear(8, 4)
        with torch.no_grad():
            self.second.weight.mul_(6)
            self.second.bias.copy_(torch.linspace(-14, 0.5, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x) + x)
        return self.last(torch.relu(self.third(x)).mean((2, 3)))


def moved(program: Program, layer: str, steps: float) -> Program:
    """Move what a layer gives by steps of the grid on which it is rounded, as a tie does to one of its values."""
    made = []
    for step in program.steps:
        if isinstance(step, Convolution) and step.name == layer:
            (output,) = step.epilogue.outputs
            offset = step.epilogue.offset + np.float32(steps / output.factor)
            step = replace(step, epilogue=replace(step.epilogue, offset=offset))
        made.append(step)
    return replace(program, steps=tuple(made))


def test_a_step_between_layers_may_be_several_of_the_layer_s() -> None:
    network, x = Coarse().eval(), torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    inserted = Q.insert_residual_quantizers(network, x)
    qnetwork = Q.quantize(inserted, Q.BitPolicy.uniform(network, w=8, a=8), calibrate=x).eval()
    program = lower(capture(qnetwork, x), qnetwork, x)
    for steps, refused in ((0, False), (1, False), (3, True)):
        other = moved(program, "second", steps)
        for found in (compare(qnetwork, other, x), fixed_point.compare(qnetwork, program, fixed_point.fixed_point(other), x)):
            (third,) = (layer for layer in found.layers if layer.layer == "third")
            assert third.own_largest >= 3 * steps
            assert found.fault.startswith("gives layer 'third' integers that are off by up to") == refused


def test_exporters_with_additions_in_float_are_refused() -> None:
    exporter: Any = SimpleNamespace(options=())
    deploy._check_residuals(exporter, "other", None, "float")
    deploy._check_residuals(exporter, "other", "float", "8")
    with pytest.raises(ValueError, match="--residuals 8 can't be written by --to other"):
        deploy._check_residuals(exporter, "other", "8", "float")
    with pytest.raises(ValueError, match="the run was searched with it; give --residuals float"):
        deploy._check_residuals(exporter, "other", None, "8")
    exporter.options = ("residuals",)
    deploy._check_residuals(exporter, "other", "8", "float")


class Tokens(nn.Module):
    """What can't be captured as a graph of images, and is written as any network is."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Linear(8, 16), nn.LayerNorm(16)
        self.mix, self.head = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        x = x + torch.softmax(x @ x.transpose(1, 2), -1) @ self.mix(self.norm(x))
        return self.head(x.mean(1))


@pytest.mark.slow
def test_files_of_any_network_have_them_too(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    network, x = Tokens().eval(), torch.randn(16, 6, 8, generator=torch.Generator().manual_seed(0))
    inserted = Q.insert_residual_quantizers(network, x)
    qnetwork = Q.quantize(inserted, Q.BitPolicy.uniform(network, w=8, a=8), calibrate=x).eval()
    given = AnySamples((x, torch.zeros(16)), (x, torch.zeros(16)))
    export_any(qnetwork, given, tmp_path / "any.onnx")
    assert len(Q.residual_quantizers(qnetwork)) == 3
    assert compare_any(qnetwork, given, tmp_path / "any.onnx").same_answers


@pytest.mark.slow
@pytest.mark.parametrize("searched", ["float", "8"])
def test_a_run_is_deployed_with_them(
    searched: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    enter(tmp_path, monkeypatch, MODULE)
    trust("small_job:network", "small_job:splits")
    assert call(search.main, *QUICK, "--residuals", searched, "--out", "run") == 0
    capsys.readouterr()
    assert call(deploy.main, "run", "--to", "tvm", "--residuals", "8", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["same_answers"]
    assert set(told["by_residuals"]) == {"float": {"float", "8"}, "8": set()}[searched]
    assert deploy.load(told["written"])(images(2).numpy()).shape == (2, 4)
