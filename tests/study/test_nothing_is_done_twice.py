"""What a search knows already isn't computed again for its result, and the result is the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from haq import search
from haq.problem.evaluator import Evaluator
from haq.solvers import sensitivity
from haq.study import result
from haq.study.search_run import SearchRun
from tests.commands.test_search_command import SMALL, call, place  # noqa: F401

ASKED = [*SMALL, "--solver", "surrogate", "--evaluations", "14", "--finetune-epochs", "0", "--out", "run"]


def test_gradients_are_taken_once_for_the_search_and_its_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    gradient_increases = sensitivity.gradient_increases

    def noted(*given: Any, **options: Any) -> Any:
        taken.append(1)
        return gradient_increases(*given, **options)

    monkeypatch.setattr(sensitivity, "gradient_increases", noted)
    assert call(search.main, *ASKED) == 0
    assert len(taken) == 1


def test_what_was_evaluated_is_not_measured_again_on_the_search_split(monkeypatch: pytest.MonkeyPatch) -> None:
    assert call(search.main, *ASKED) == 0
    run = SearchRun.load(Path("run"))
    task = run.build()
    evaluator = task.problem.evaluator
    policy = run.load_policy()
    values, by_sample = result.measure(task, evaluator.prepared(policy))
    task.problem.evaluate(policy)
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "measure_by_sample", None)
        again, same = result._measured(task, policy)
    assert again == values
    for split, known in by_sample.items():
        assert known is not None
        assert torch.equal(known, same[split])  # type: ignore[arg-type]
