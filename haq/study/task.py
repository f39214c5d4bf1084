"""What a search is asked to do, and what it takes to do it: network, data and problem, loaded, priced and signed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hw_models
import quantizers as Q
from haq import data, networks, training
from haq.attacks.threat_model import parse_eps
from haq.problem import OBJECTIVES
from haq.problem.problem import Problem
from haq.problem.sensitivity import Sensitivities
from haq.store.files import MOST_JSON, PROBLEM_SCHEMA, SENSITIVITY, check_file
from haq.study.config import SearchConfig
from haq.training.adversaries import Adversary
from haq.version import __version__
from hw_models.tvm_cpu.target import CpuTarget

CALIBRATION = 512  # images of the train split


@dataclass(frozen=True)
class LoadedNetwork:
    """The network and data that settings name, loaded: what is quantized, wherever it is to run."""

    config: SearchConfig
    network: networks.Network
    dataset: data.Dataset

    @classmethod
    def load(cls, config: SearchConfig) -> LoadedNetwork:
        """Load network and data, which need no hardware; raises what its parts raise."""
        network = networks.load(config.network)
        dataset = data.load(config.data, image_size=network.input_shape[-1])
        networks.check_fits(network, dataset)
        return LoadedNetwork(config, network, dataset)

    def signature(self) -> dict[str, str]:
        """What must be the same for a run's policy and checkpoint to belong to it."""
        return {"network": self.network.signature(), "data": self.dataset.signature()}

    def calibration(self) -> Tensor:
        """Preprocessed images of the train split (N, C, H, W), of all classes, that set the activation scales."""
        return self.network.preprocess(self.dataset.train.images[self.dataset.fair(CALIBRATION)])


@dataclass(frozen=True)
class SearchTask(LoadedNetwork):
    """A search with everything that it names, loaded and priced."""

    problem: Problem
    # Accuracies on the search and the test split by policy (None: the float network), as far as they were measured.
    judged: dict[Q.BitPolicy | None, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def build(cls, config: SearchConfig, target: hw_models.Target | None = None) -> SearchTask:
        """Load network and data and put the problem together; raises what its parts raise."""
        loaded = LoadedNetwork.load(config)
        network, dataset = loaded.network, loaded.dataset
        objective = OBJECTIVES.get(config.objective).build(network, dataset, parse_eps(config.eps))
        tuning = None
        if config.finetune_steps:
            tuning = training.ShortTuning(network, dataset.train, config.finetune_steps, config.seed)
        search = [(network.preprocess(images), labels) for images, labels in dataset.search.batches(250)]
        problem = Problem(
            network.module,
            calibrate=loaded.calibration(),
            search=search,
            target=target or load_target(config),
            metric=config.metric,
            budget=config.budget,
            bits=config.bit_range(),
            objective=objective,
            tune=tuning,
        )
        return SearchTask(config, network, dataset, problem)

    def on(self, config: SearchConfig, target: hw_models.Target) -> SearchTask:
        """The same network and data on another target or within another budget; all that was evaluated is shared."""
        return replace(self, config=config, problem=self.problem.on(target, config.budget))

    def network_signature(self) -> dict[str, str]:
        """What doesn't depend on the hardware: sensitivities belong to it."""
        return super().signature()

    def outline(self) -> dict[str, Any]:
        """What is searched, as plain data: enough to price every policy without loading anything."""
        problem = self.problem
        return {
            "schema": PROBLEM_SCHEMA,
            **priced(problem),
            "network": self.network.name,
            "origin": self.network.origin,
            "data": self.dataset.describe(),
            "images": len(self.dataset.search),
            "objective": problem.objective.name,
            "objective_is": problem.objective.words,
            "float": problem.float_accuracy,
        }

    def read_sensitivities(self, source: Path) -> Sensitivities:
        """Sensitivities from a file or from the folder of a run. Raises ValueError with one reason if they are of another
        network, other data or other bits, FileNotFoundError if there are none."""
        path = source / SENSITIVITY if source.is_dir() else source
        if not path.exists():
            lacks = f"{source} has no {SENSITIVITY}: its search measured none" if source.is_dir() else f"there is no {source}"
            raise FileNotFoundError(f"{lacks}; give the folder of a run that did, or its {SENSITIVITY}")
        check_file(path, MOST_JSON)
        sensitivities = Sensitivities.from_json(path)
        sensitivities.check(self.problem, self.network_signature(), path)
        return sensitivities

    def signature(self) -> dict[str, str]:
        """What must be the same for a run to be continued."""
        table = self.problem.table
        costs = hashlib.sha256(self.problem.cost.tobytes() + table.storage_bytes.tobytes()).hexdigest()[:16]
        return {**super().signature(), "target": costs, **machine_signature(self.problem.target)}


def priced(problem: Problem) -> dict[str, Any]:
    """Return what every policy of a problem costs, as plain data (`haq.store.records.PricedProblem`)."""
    target, table = problem.target, problem.table
    layers = []
    for layer, cost in zip(problem.workload.layers, problem.cost, strict=True):
        layers.append(
            {
                "name": layer.name,
                "kind": layer.kind,
                "macs": layer.macs,
                "parameters": layer.parameters,
                "fixed": layer.name in problem.pinned,
                "cost": cost.tolist(),  # [weight bits - 1][activation bits - 1], in the unit
            }
        )
    return {
        "target": {
            "name": target.name,
            "description": target.description,
            "batch": table.batch,
            "provenance": table.provenance,
        },
        "metric": problem.metric,
        "unit": problem.unit,
        "limit": problem.limit,
        "uniform8": problem.reference,
        "smallest": problem.smallest,
        "bits": list(problem.bits),
        "layers": layers,
    }


def load_target(config: SearchConfig, **callbacks: Any) -> hw_models.Target:
    """Load the hardware of a search; `callbacks` and errors are those of `hw_models.load_target`."""
    return hw_models.load_target(config.hw, threads=config.threads, target=config.target, cold=bool(config.cold), **callbacks)


def adversary_of(config: SearchConfig) -> Adversary | None:
    """Tell what fine-tuning trains against: where policies are judged under attack, R+FGSM of the same eps. Without it, what
    they were chosen for would be trained away."""
    if config.objective != "accuracy+robust":
        return None
    return Adversary("rfgsm", parse_eps(config.eps))


def machine_signature(target: hw_models.Target) -> dict[str, str]:
    """Where latencies were measured; nothing for a target that is computed."""
    return {"machine": json.dumps(target.key)} if isinstance(target, CpuTarget) else {}


def versions() -> dict[str, str]:
    """The versions on which the result of a search depends to the last bit."""
    packages = ("torch", "numpy", "scipy", "gymnasium", "stable-baselines3")
    return {"haq": __version__, **{name: importlib.metadata.version(name) for name in packages}}


def check_signature(folder: Path, before: dict[str, str], now: dict[str, str], called: dict[str, str]) -> None:
    """Raise ValueError, with the way out, if something isn't what the run or sweep of a folder began with. `called`: names of
    the signature's parts, for the user."""
    for name, value in now.items():
        if before.get(name) != value:
            raise ValueError(f"the {called[name]} is no longer what {folder} began with: put it back, or start a new run")


def check_versions(folder: Path, before: dict[str, str]) -> None:
    """Raise ValueError if the versions, on which results depend to the last bit, aren't those a folder began with."""
    now = versions()
    if name := next((name for name in now if before.get(name) != now[name]), None):
        raise ValueError(
            f"{folder} began with {name} {before.get(name)}, this is {name} {now[name]}, so it would not go on "
            "as it began: install that version, or start a new run"
        )


def threads() -> str:
    """Where accuracy is measured, in words."""
    return f"this machine's CPU, {torch.get_num_threads()} threads"
