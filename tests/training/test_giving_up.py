"""A fine-tuning that brings nothing ends early, and the network before is kept."""

import pytest
import torch

from haq import data, training
from haq.networks import Network
from haq.study.result import tuning_entry
from haq.study.tables import tuning_sentence
from haq.training.config import Judgement, Outcome
from tests.conftest import images, small_network

NETWORK = Network("small", small_network(), (1, 8, 8))
BEFORE = Judgement(0.9, 0.3, 40)


def trained(losses: list[float], before: Judgement | None = BEFORE, after: int | None = 2) -> Outcome:
    """Train with judgements of these losses."""
    rest = iter(losses)
    x = images(32)  # an epoch is one step
    config = training.TrainConfig(len(losses), 0.01, 0, give_up_after=after)
    judge = lambda module: Judgement(0.9, next(rest), 40)  # noqa: E731
    split = data.Split(x, torch.zeros(32, dtype=torch.long))
    outcome = training.fit(NETWORK, split, config, module=small_network(1), judge=judge, before=before)
    assert outcome is not None
    return outcome


def test_it_ends_where_no_epoch_is_better_than_the_network_before() -> None:
    outcome = trained([0.4, 0.3, 0.2, 0.1])
    assert [judged.loss for judged in outcome.epochs] == [0.4, 0.3]
    assert outcome.kept == 0
    assert outcome.stopped


@pytest.mark.parametrize("losses", [[0.2, 0.4, 0.4, 0.4, 0.1], [0.4, 0.2, 0.4, 0.4, 0.1]])
def test_one_that_was_better_goes_on_to_its_end(losses: list[float]) -> None:
    outcome = trained(losses)
    assert len(outcome.epochs) == 5
    assert outcome.kept == 5
    assert not outcome.stopped


def test_nobody_gives_up_unasked_or_without_knowing_what_was_before() -> None:
    assert len(trained([0.4, 0.4, 0.4], after=None).epochs) == 3
    assert len(trained([0.4, 0.4, 0.4], before=None).epochs) == 3
    with pytest.raises(ValueError, match="give_up_after is 0; it must be a number of steps of at least 1"):
        training.TrainConfig(1, 0.1, 0, give_up_after=0)


def test_what_was_tried_is_told() -> None:
    outcome = trained([0.4, 0.3, 0.2])
    names = {"objective_title_is": "accuracy", "objective_unit": "%", "higher_is_better": True, "counts_samples": True}
    entry = names | {"samples_are": "images", "objective": "agreement"} | tuning_entry(outcome, 3)
    entry["images"] = 40
    sentence = tuning_sentence(entry)
    assert "no epoch of 3 until it ended early, after epoch 2, was better than the network before" in sentence
    entry["stopped"] = None
    assert "no epoch of 3 was better" in tuning_sentence(entry)
