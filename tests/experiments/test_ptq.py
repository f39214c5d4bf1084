"""Our post-training quantization beside other tools: tables on tiny networks, and what the tools are told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import quantizers as Q
from experiments import ptq, ptq_rivals
from experiments.ptq_rivals import Column
from tests.conftest import images, small_network

COLUMNS = (Column("W4A8", 4, 8, False), Column("average 4", 4, 8, True))


def study() -> ptq.Study:
    network = Q.fold_batch_norm(small_network(), images(2))
    return ptq.Study("mini", network, images(48, 1), images(40, 2), None, COLUMNS)


class Mixed(nn.Module):
    """What the networks of the experiment are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, 2, 1)
        self.activation = nn.ReLU6(inplace=True)  # called twice
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.norm = nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.activation(self.stem(x))
        x = torch.relu_(self.norm(self.depthwise(self.activation(x))) + x)
        return self.classifier(self.pool(x).view(x.size(0), -1))


def test_a_tool_gets_the_network_and_its_images(tmp_path: Path) -> None:
    given = study()
    given.network = Mixed().eval()
    given.logits = ptq.answers(given.network, given.test)
    ptq.write_job(tmp_path / "job.npz", given, COLUMNS)
    job = ptq_rivals.Job(tmp_path / "job.npz")
    assert job.columns == list(COLUMNS)
    assert torch.equal(job.calibrate, given.calibrate)
    assert job.layers == ["stem", "depthwise", "classifier"]
    assert job.bits(COLUMNS[0]) == {"stem": (8, 8), "depthwise": (4, 8), "classifier": (8, 8)}
    assert torch.allclose(torch.from_numpy(ptq_rivals.answers(job.network(), job.test)), given.logits, atol=1e-6)


def test_a_network_that_tools_cannot_be_told_is_named() -> None:
    with pytest.raises(ValueError, match="1: no tool could be told what a GELU is"):
        ptq.describe(nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU()))


def test_a_column_that_fails_does_not_end_the_others(tmp_path: Path) -> None:
    given = study()
    ptq.write_job(tmp_path / "job.npz", given, COLUMNS)
    job = ptq_rivals.Job(tmp_path / "job.npz")

    def quantize(job: ptq_rivals.Job, column: Column) -> ptq_rivals.Quantized:
        if not column.mixed:
            raise ValueError("no such\nbits")
        return job.network(), {}

    failed, worked = ptq_rivals.results(job, quantize, tmp_path)
    assert failed == {"column": "W4A8", "error": "ValueError: no such bits"}
    assert worked["column"] == "average 4"
    assert (tmp_path / "average 4.npy").is_file()


def test_rows_of_tools_that_are_not_there_or_fail(tmp_path: Path) -> None:
    given = study()
    rows = list(ptq.rows_of_tool(given, "MCT", tmp_path))
    assert [(row.column, row.note) for row in rows] == [("W4A8", "not installed"), ("average 4", "not installed")]
    python = ptq.python_of(ptq.TOOLS["Brevitas"], tmp_path)
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 'no module of this name' >&2\nexit 1\n")
    python.chmod(0o755)
    (row,) = ptq.rows_of_tool(given, "Brevitas", tmp_path)  # which isn't asked for mixed bits
    assert (row.column, row.note, row.divergence) == ("W4A8", "failed: no module of this name", None)
    assert ptq.cell(row) == "failed"


@pytest.mark.parametrize("method", ptq.recipes())
def test_ours(method: str) -> None:
    given = study()
    alike, chosen = ptq.rows_of(given, method, Path())
    for row in (alike, chosen):
        assert row.divergence > 0
        assert 0 <= row.accuracy <= 100
    layers = [module for module in given.network.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    bits = [int(width) for width in chosen.note.split()]
    assert bits[0] == bits[-1] == 8
    middle = list(zip(layers, bits, strict=True))[1:-1]
    sizes = sum(layer.weight.numel() for layer, _ in middle)
    assert sum(layer.weight.numel() * width for layer, width in middle) <= 4 * sizes


def test_what_is_kept_and_what_is_made_anew(tmp_path: Path) -> None:
    first = [
        ptq.our_row(study(), "ours: analytic", COLUMNS[0]),
        ptq.Row("mini", 40, "MCT", "W4A8", None, None, None, "not installed"),
    ]
    ptq.save(tmp_path, "words", first)
    assert {path.name for path in tmp_path.iterdir()} == {"ptq.md", "ptq.csv", "ptq.png"}
    assert "not installed" in (tmp_path / "ptq.md").read_text()
    read = ptq.load_rows(tmp_path)
    assert [row[:4] for row in read] == [row[:4] for row in first]
    assert read[1] == first[1]
    assert read[0].divergence == pytest.approx(first[0].divergence, abs=1e-6)
    made = ptq.Row("mini", 40, "MCT", "W4A8", 90.0, 0.1, 1.0)
    every = [*ptq.recipes(), *ptq.TOOLS]
    assert ptq.merged(read, [made], every) == [read[0], made]
    # Rows that were tested on other images say nothing beside these.
    assert ptq.merged(read, [made._replace(images=50)], every) == [made._replace(images=50)]
