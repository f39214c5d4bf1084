"""Attacks on compared networks: one after the other or in processes of their own, and what comes of it as a record."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import quantizers as Q
from haq.attacks.assessment import Assessment, assess
from haq.attacks.base import effort_of
from haq.deployment import interpreter, lowering
from haq.deployment.graph import capture
from haq.problem.device import spread
from haq.store.files import ROBUSTNESS, ROBUSTNESS_SCHEMA
from haq.store.records import DeployedRecord, RobustnessRecord
from haq.study.attack_config import AttackConfig
from haq.study.comparison import ComparedNetworks, ComparisonSpec
from haq.study.task import CALIBRATION
from haq.study.workers.processes import Crew

FLOAT = "float"
DEPLOYED_BATCH = 500  # images at a time, through the integer program

OnProgress = Callable[[str, float, float, str], None]  # network, passes done, passes in all, and what is being done


@dataclass(frozen=True)
class RobustnessTask:
    """What is attacked, and how.

    Attributes:
        source: The folder of a run, a network's name, or a checkpoint.
        config: How it is attacked.
        out: Where to put what comes of it; None: into the run's folder, or one under runs/.
    """

    source: str
    config: AttackConfig
    out: Path | None = None

    @property
    def spec(self) -> ComparisonSpec:
        """What is compared."""
        config = self.config
        return ComparisonSpec(self.source, config.data, config.widths(), config.defensive, config.scheme, config.device)

    @property
    def folder(self) -> Path:
        """Where to put what comes of it."""
        if self.out is not None:
            return self.out
        run = self.spec.run
        if run is not None:
            return run.folder / ROBUSTNESS
        return Path("runs") / f"{ROBUSTNESS}-{Path(self.source).stem.replace(':', '-')}"


class Examined(NamedTuple):
    """What attacks found of a network, and how its integer program answers the worst images; None for a float network."""

    assessment: Assessment
    deployed: DeployedRecord | None


def examine_all(
    task: RobustnessTask, compared: ComparedNetworks, workers: int, on_progress: OnProgress
) -> dict[str, Examined]:
    """Attack every network.

    Args:
        task: How.
        compared: The networks.
        workers: How many are attacked at a time; the outcome doesn't depend on it.
        on_progress: Told a network's name, passes done and in all, and what is being done.

    Returns:
        What was found, by network.

    Raises:
        ChildProcessError: If workers were killed again and again.
    """
    names = list(compared.networks)
    if min(workers, len(names)) == 1:
        return {name: examine(task, compared, name, on_progress) for name in names}
    return _in_workers(task, compared, min(workers, len(names)), on_progress)


def examine(task: RobustnessTask, compared: ComparedNetworks, name: str, on_progress: OnProgress) -> Examined:
    """Attack one network, and run its worst images through its integer program, if it is quantized.

    What is finished is kept in the task's folder, and taken from there.

    Args:
        task: How.
        compared: The networks.
        name: Which of them.
        on_progress: As of `examine_all`.

    Returns:
        What was found.
    """
    config = task.config
    images, labels = compared.images(config.images)
    sources = compared.sources(name, config.requantize_input)
    if effort_of(config.attacks) == "quick":
        sources = dict(list(sources.items())[:1])
    threat = config.threat()
    found = assess(
        compared.classifier(compared.networks[name], config.requantize_input),
        images,
        labels,
        eps=threat.eps,
        norm=threat.norm,
        attacks=config.attacks,
        sources=sources,
        backward=config.backward,
        seed=config.seed,
        folder=task.folder,
        on_progress=partial(on_progress, name),
    )
    if name == FLOAT:
        return Examined(found, None)
    worst = found.examples
    if config.requantize_input:
        worst = (255 * worst).round() / 255
    return Examined(found, run_deployed(compared, name, worst, labels))


def run_deployed(compared: ComparedNetworks, name: str, images: Tensor, labels: Tensor) -> DeployedRecord:
    """Run images through what a quantized network is deployed as, integer by integer.

    Args:
        compared: The networks.
        name: Which of them.
        images: In [0, 1], (N, C, H, W).
        labels: int64 (N,).

    Returns:
        How many are classified right, and how many otherwise than in PyTorch; or why there is no integer program.
    """
    # Integer programs run on processors, and are held against PyTorch there.
    module = Q.copy_network(compared.networks[name]).cpu()
    images, labels = images.cpu(), labels.cpu()
    network = compared.network
    mean = torch.tensor(network.mean).view(1, -1, 1, 1)
    std = torch.tensor(network.std).view(1, -1, 1, 1)
    inputs = ((images - mean) / std).contiguous()
    train = compared.dataset.train.images[compared.dataset.fair(CALIBRATION)]
    try:
        program = lowering.lower(capture(module, inputs[:1]), module, network.preprocess(train).cpu().contiguous())
    except ValueError as error:
        return DeployedRecord(images=0, right=0, different=0, reason=str(error))
    right = 0
    different = 0
    for x, y in zip(inputs.split(DEPLOYED_BATCH), labels.split(DEPLOYED_BATCH), strict=True):
        outputs, _ = interpreter.run(program, x.numpy())
        answers = torch.from_numpy(outputs).argmax(1)
        with torch.inference_mode():
            different += int((answers != module(x).argmax(1)).sum())
        right += int((answers == y).sum())
    return DeployedRecord(images=len(images), right=right, different=different, reason="")


def collect(task: RobustnessTask, compared: ComparedNetworks, found: Mapping[str, Examined]) -> RobustnessRecord:
    """Put together everything that is shown: what --json prints and robustness.json holds.

    Args:
        task: What was asked for.
        compared: The networks.
        found: What became of each, by name.

    Returns:
        The record.
    """
    config = task.config
    attacked: dict[str, Any] = {}
    for name, one in found.items():
        attacked[name] = {"is": compared.notes[name], **one.assessment.summary()}
        if one.deployed is not None:
            attacked[name]["deployed"] = one.deployed.to_dict()
    content = {
        "schema": ROBUSTNESS_SCHEMA,
        "source": task.source,
        "network": compared.network.name,
        "data": compared.dataset.name,
        "images": len(next(iter(found.values())).assessment.examples),
        "threat": str(config.threat()),
        "attacks": config.attacks,
        "backward": config.backward,
        "requantized_input": config.requantize_input,
        "seed": config.seed,
        "networks": attacked,
    }
    if compared.left_out:
        content["left_out"] = compared.left_out
    return RobustnessRecord.from_dict(content, "the result")


def _in_workers(
    task: RobustnessTask, compared: ComparedNetworks, workers: int, on_progress: OnProgress
) -> dict[str, Examined]:
    """Attack networks in processes of their own. What one that dies had finished is kept, and another goes on from there."""
    crew = Crew(_attacking, (task, compared), workers, on_progress, spread(task.spec.device_name))
    try:
        waiting = {crew.submit(name): name for name in compared.networks}
        found = {}
        while waiting:
            for done in crew.wait(waiting):
                found[waiting.pop(done)] = done.result()
        return {name: found[name] for name in compared.networks}
    except ChildProcessError as error:
        raise ChildProcessError(
            f"{error}; finished attacks are kept in {task.folder}: the same command goes on from there"
        ) from None
    finally:
        crew.close()


def _attacking(tell: OnProgress, task: RobustnessTask, compared: ComparedNetworks) -> Callable[[str], Examined]:
    """Return what a process does with a network."""
    torch.set_num_threads(1)
    return lambda name: examine(task, compared, name, tell)
