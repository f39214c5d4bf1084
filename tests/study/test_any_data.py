"""Networks that take anything, on samples of any structure: from the settings to the objective's value on every split."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from haq import networks
from haq.problem.objective import ValueObjective
from haq.problem.samples import StreamedSamples
from haq.store.records import share_key
from haq.study import result
from haq.study.config import SearchConfig
from haq.study.task import SearchTask

HERE = Path(__file__).stem
N = 60
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.rand(N, 3, 8, 8, generator=GENERATOR)
MASKS = (IMAGES.mean(1) > 0.5).long()
WORDS = torch.randint(0, 20, (N, 6), generator=GENERATOR)


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 2, 1))


class TakesTwo(nn.Module):
    """An image and words; gives two values by name."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(20, 8), nn.Sequential(nn.Linear(200, 16), nn.ReLU(), nn.Linear(16, 8))
        self.last = nn.Linear(8, 1)

    def forward(self, pixels: Tensor, words: Tensor) -> dict[str, Tensor]:
        both = torch.cat([pixels.flatten(1), self.words(words).mean(1)], 1)
        return {"value": self.last(self.body(both))[:, 0]}


class Tells(nn.Module):
    """Sentences of any length; one value for each."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        spread = self.words(input_ids) * attention_mask[..., None]
        return self.body(spread.sum(1) / attention_mask.sum(1, keepdim=True))[:, 0]


def two() -> nn.Module:
    torch.manual_seed(0)
    return TakesTwo()


def tells() -> nn.Module:
    torch.manual_seed(0)
    return Tells()


class Pixels(ValueObjective):
    """Which share of an image's pixels is in its class."""

    unit = "%"
    higher_is_better = True

    def values(self, outputs: Any, targets: Any) -> Tensor:
        return (outputs.argmax(1) == targets).flatten(1).double().mean(1)


class Squares(ValueObjective):
    """Squared errors."""

    higher_is_better = False

    def values(self, outputs: Any, targets: Any) -> Tensor:
        if isinstance(outputs, dict):
            outputs = outputs["value"]
        return (outputs - targets) ** 2


def masks() -> dict[str, Any]:
    return {"train": (IMAGES, MASKS), "groups": torch.arange(N) // 4}


def bytes_and_masks() -> dict[str, Any]:
    return {"train": DataLoader(TensorDataset((IMAGES * 255).byte(), MASKS), 16, shuffle=True)}


def pairs_of_inputs() -> dict[str, Any]:
    return {"train": ((IMAGES, WORDS), IMAGES.mean((1, 2, 3)))}


def by_name() -> dict[str, Any]:
    return {"train": {"pixels": IMAGES, "words": WORDS, "targets": IMAGES.mean((1, 2, 3))}}


class Sentences:
    """Batches of sentences, each batch as long as its longest."""

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for number in range(15):
            words = WORDS[4 * number : 4 * number + 4, : 3 + number % 4]
            yield {"input_ids": words, "attention_mask": torch.ones(words.shape), "labels": words.double().mean(1) / 20}


def sentences() -> dict[str, Any]:
    return {"train": Sentences()}


class Single(Dataset[dict[str, Tensor]]):
    """One sentence at a time."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        words = WORDS[index, : 3 + index % 4]
        return {"input_ids": words, "labels": words.double().mean() / 20}


def padded(samples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    words = nn.utils.rnn.pad_sequence([sample["input_ids"] for sample in samples], batch_first=True)
    lengths = torch.tensor([len(sample["input_ids"]) for sample in samples])
    mask = (torch.arange(words.shape[1]) < lengths[:, None]).float()
    return {"input_ids": words, "attention_mask": mask, "labels": torch.stack([sample["labels"] for sample in samples])}


def padded_sentences() -> dict[str, Any]:
    return {"train": DataLoader(Single(), 8, collate_fn=padded)}


CASES = {
    "segmentation": ("convolutions", "masks", "Pixels"),
    "bytes": ("convolutions", "bytes_and_masks", "Pixels"),
    "two inputs": ("two", "pairs_of_inputs", "Squares"),
    "by name": ("two", "by_name", "Squares"),
    "ragged batches": ("tells", "sentences", "Squares"),
    "padded by a loader": ("tells", "padded_sentences", "Squares"),
}


def build(case: str, **options: Any) -> SearchTask:
    network, dataset, objective = (f"{HERE}:{name}" for name in CASES[case])
    config = SearchConfig(network=network, data=dataset, objective=objective, budget="1.0", **options)
    return SearchTask.build(config)


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


@pytest.mark.parametrize("case", CASES)
def test_the_value_on_every_split_is_that_of_the_quantized_network(case: str) -> None:
    task = build(case)
    policy = task.problem.uniform(4)
    module = task.problem.quantized(policy)
    found = result.measure(task, module)[0]
    objective = task.problem.objective
    for name, split in (("search", task.dataset.search), ("test", task.dataset.test)):
        values = []
        for inputs, targets in split.batches(7):
            inputs = task.network.preprocess(inputs)
            with torch.inference_mode():
                if isinstance(inputs, dict):
                    outputs = module(**inputs)
                elif isinstance(inputs, tuple):
                    outputs = module(*inputs)
                else:
                    outputs = module(inputs)
            values.append(objective.values(outputs, targets))  # type: ignore[attr-defined]
        assert found[share_key(name, objective.name)] == pytest.approx(float(torch.cat(values).double().mean()), rel=1e-5)
        assert torch.cat(values).std() > 0
    assert task.problem.evaluate(policy).value == found[share_key("search", objective.name)]


@pytest.mark.parametrize("case", CASES)
def test_streamed_they_are_worth_the_same(case: str) -> None:
    kept, streamed = build(case), build(case, memory="1kB")
    assert isinstance(streamed.problem.evaluator.samples, StreamedSamples)
    assert not isinstance(kept.problem.evaluator.samples, StreamedSamples)
    policy = kept.problem.uniform(3)
    assert streamed.problem.evaluate(policy).value == pytest.approx(kept.problem.evaluate(policy).value, rel=1e-6)
    assert streamed.problem.float_result.value == pytest.approx(kept.problem.float_result.value, rel=1e-6)


def test_a_network_that_cannot_take_the_samples_is_named() -> None:
    with pytest.raises(
        ValueError, match=r":two can't take the samples of .*:masks \(\(1, 3, 8, 8\) torch.float32\): TypeError"
    ):
        SearchTask.build(SearchConfig(network=f"{HERE}:two", data=f"{HERE}:masks", objective=f"{HERE}:Squares", budget="1.0"))
    with pytest.raises(ValueError, match="has targets that are no classes to tell the accuracy by"):
        SearchTask.build(SearchConfig(network=f"{HERE}:convolutions", data=f"{HERE}:masks", budget="1.0"))


def test_a_checkpoint_of_a_network_without_a_shape(tmp_path: Path) -> None:
    network = networks.load(f"{HERE}:tells")
    networks.save_checkpoint(network, tmp_path / "it.safetensors")
    again = networks.load(f"{HERE}:tells@{tmp_path / 'it.safetensors'}")
    assert again.input_shape == ()
    assert again.signature() == network.signature()


def test_a_search_on_masks_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from haq import search

    monkeypatch.chdir(tmp_path)
    network, dataset, objective = (f"{HERE}:{name}" for name in CASES["segmentation"])
    asked = ["--network", network, "--data", dataset, "--objective", objective, "--budget", "0.9", "--solver", "greedy"]
    assert search.main([*asked, "--evaluations", "10", "--finetune-epochs", "0", "--memory", "30kB", "--out", "run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "disjoint by group (15 groups)" in shown + " ".join((tmp_path / "run" / "problem.json").read_text().split())
