"""The experiment on more images than memory holds runs, on few of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from experiments import data_size
from haq.problem.samples import StreamedSamples


def test_streamed_photographs_are_worth_what_kept_ones_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAQ_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(data_size, "POLICIES", (4,))
    data_size.write_photographs(tmp_path / "photographs", 12)
    assert len(list((tmp_path / "photographs").rglob("*.jpg"))) == 36
    kept, streamed = (data_size.searched(tmp_path / "photographs", 10, memory) for memory in ("1GB", "1MB"))
    assert isinstance(data_size.build(tmp_path / "photographs", 10, "1MB").problem.evaluator.samples, StreamedSamples)
    for key in ("float", "values", "loss", "images"):
        assert streamed[key] == kept[key]
    assert kept["images"] == 10
    floor = data_size.unavoidable(tmp_path / "photographs", 10)
    assert floor["decoding"] > 0
    assert floor["passes"] > 0
    assert data_size.peak_bytes() > 10**8
    assert torch.equal(data_size.network()[0].weight, data_size.network()[0].weight)  # type: ignore[index]
