"""Every difference of two values on the same samples is told with its paired standard error; one below that is called none."""

from __future__ import annotations

import base64
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from haq.problem.paired import error_of_difference
from haq.runs import _below_best
from haq.store.records import AnswersRecord, Measurement, ObjectiveRecord, paired_key
from haq.study.tables import differences_sentence

ACCURACY = ObjectiveRecord(objective="accuracy")
LOSS = ObjectiveRecord(objective="nll", objective_unit="nats", higher_is_better=False, counts_samples=False)


@pytest.mark.parametrize(
    ("judging", "value", "other", "error", "words"),
    [
        (ACCURACY, 0.9158, 0.92, 0.0011, "0.42 ± 0.11 points below float"),
        (ACCURACY, 0.919, 0.92, 0.0025, "0.10 ± 0.25 points below float (no difference)"),
        (ACCURACY, 0.93, 0.92, 0.005, "1.00 ± 0.50 points above float"),
        (ACCURACY, 0.92, 0.92, 0.002, "as good as float (± 0.20 points)"),
        (ACCURACY, 0.92, 0.92, 0.0, "as good as float"),
        (ACCURACY, 0.91, 0.92, None, "1.00 points below float"),
        (LOSS, 0.45, 0.4, 0.02, "0.05 ± 0.02 nats worse than float"),
        (LOSS, 0.39, 0.4, 0.02, "0.01 ± 0.02 nats better than float (no difference)"),
        (LOSS, float("inf"), 0.4, 0.02, "∞ nats worse than float"),
    ],
)
def test_the_words(judging: ObjectiveRecord, value: float, other: float, error: float | None, words: str) -> None:
    assert judging.difference(value, other, error, "float") == words


def test_the_table_of_results_tells_all_of_them() -> None:
    key = "test_accuracy"
    against_float, against_found = paired_key(key, "float"), paired_key(key, "found")
    result: dict[str, Any] = {
        "float": {key: 0.93},
        "uniform8": {key: 0.929, against_found: 0.002},
        "found": {key: 0.92, against_float: 0.003},
        "finetuned": {key: 0.925, against_found: 0.002},
        "rivals": {"ilp": {key: 0.921, against_found: 0.004}, "greedy": {key: 0.91}},
    }
    assert differences_sentence(ACCURACY, result) == (
        "On the test split what was found is 1.00 ± 0.30 points below float; 0.90 ± 0.20 points below uniform 8 bits; "
        "0.10 ± 0.40 points below ilp's (no difference); fine-tuned, 0.50 ± 0.20 points above it (± is the paired standard "
        "error)."
    )
    earlier = {name: {key: 0.9} for name in ("float", "uniform8", "found")} | {"finetuned": None, "rivals": {}}
    assert differences_sentence(ACCURACY, earlier) == ""
    assert Measurement(result["found"]).paired_error("test", "accuracy", "float") == 0.003


def answers(right: torch.Tensor) -> AnswersRecord:
    packed = base64.b64encode(np.packbits(right.numpy()).tobytes()).decode()
    return AnswersRecord(count=len(right), found=packed)


def test_runs_are_compared_sample_by_sample() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.rand(203, generator=generator) < share for share in (0.9, 0.85))
    first, second = answers(one), answers(other)
    error = error_of_difference(one, other)
    assert error is not None
    assert first.paired_error(second) == pytest.approx(error)
    assert first.paired_error(answers(one[:200])) is None
    values = {"a": float(one.double().mean()), "b": float(other.double().mean())}
    runs: Any = []
    for name, record in (("a", first), ("b", second)):
        result = SimpleNamespace(
            answers=record, last=name, value=lambda row, split: values[row], difference=ACCURACY.difference
        )
        runs.append(SimpleNamespace(folder=Path(name), result=result))
    assert _below_best(runs) == {"b": ACCURACY.difference(values["b"], values["a"], error, "a")}
    runs[1].result.answers = None  # of an earlier version
    assert _below_best(runs) == {}


@pytest.mark.parametrize(("count", "found"), [(100, "AAAA"), (8, "???")])
def test_answers_of_another_length_are_refused(count: int, found: str) -> None:
    with pytest.raises(ValueError, match="'answers' holds"):
        AnswersRecord(count=count, found=found)
