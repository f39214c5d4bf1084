"""What a search is asked to do, and what it takes to do it: network, data and problem, loaded, priced and signed."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor

import hw_models
import quantizers as Q
from haq import data, networks, training
from haq.attacks.proxy import ProxyAttack
from haq.attacks.threat_model import DEFAULT_EPS, check_images, parse_eps
from haq.problem.problem import Problem, check_reward
from haq.problem.sensitivity import Sensitivities, check_kind
from haq.solvers.base import check_env, check_name
from haq.store.files import MOST_JSON, PROBLEM_SCHEMA, SENSITIVITY, check_file
from haq.training.adversaries import Adversary
from haq.version import __version__
from hw_models.tvm_cpu.target import CpuTarget

CALIBRATION = 512  # images of the train split


@dataclass(frozen=True)
class SearchConfig:
    """What a search is asked to do: the options of `python -m haq.search`."""

    network: str = networks.DEFAULT
    data: str = data.DEFAULT
    hw: str = "edge"
    metric: str = "latency"
    budget: str = "0.5"
    bits: str = "2:8"
    solver: str = "ddpg"
    evaluations: int = 200
    env: str = "plan"
    ahead: int = 1
    seed: int = 0
    finetune_epochs: int = 12
    finetune_steps: int = 0
    reward: str = "accuracy"
    eps: str = DEFAULT_EPS  # of the attack of reward accuracy+robust
    sensitivity_kind: str = "loss"
    sensitivity: str | None = None
    threads: int | None = None
    target: str | None = None
    cold: bool | None = None

    def __post_init__(self) -> None:
        check_name(self.solver)
        check_env(self.env)
        check_reward(self.reward)
        check_kind(self.sensitivity_kind)
        for name, least in (("evaluations", 1), ("ahead", 1), ("seed", 0), ("finetune_epochs", 0), ("finetune_steps", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"--{name.replace('_', '-')} is {value!r}; it must be an integer of at least {least}")
        self.bit_range()
        parse_eps(self.eps)
        if self.reward != "accuracy+robust" and self.eps != DEFAULT_EPS:
            raise ValueError(f"--eps {self.eps} is of an attack: it goes with --reward accuracy+robust, not {self.reward}")

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> SearchConfig:
        """Settings from a file. Raises ValueError for a name that there isn't, and for a value of the wrong type."""
        kinds = get_type_hints(cls)
        for name, value in content.items():
            if name not in kinds:
                raise ValueError(
                    f"unknown setting {name[:40]!r}: it may be of a newer version of haq; known: {', '.join(kinds)}"
                )
            if not isinstance(value, kinds[name]) or (isinstance(value, bool) and name != "cold"):
                wanted = {str: "text", int: "an integer"}.get(kinds[name], str(kinds[name]))
                raise ValueError(f"setting {name!r} is {str(value)[:40]!r}, a {type(value).__name__}; it must be {wanted}")
        return cls(**content)

    def files(self) -> dict[str, Path]:
        """The files and folders of the user's own that are named, by setting."""
        found = {}
        network = Path(self.network.rpartition("@")[2])
        if "@" in self.network or network.suffix in networks.CHECKPOINT_ENDINGS:
            found["network"] = network
        if self.data.startswith(("imagefolder:", "images:")):
            found["data"] = Path(self.data.partition(":")[2])
        if self.hw.startswith("lut:") or self.hw.endswith((".yaml", ".yml")):
            found["hw"] = Path(self.hw.removeprefix("lut:"))
        return found

    def bit_range(self) -> tuple[int, int]:
        """Smallest and largest width. Raises ValueError if that isn't what `bits` says."""
        if not (match := re.fullmatch(r"([1-8]):([1-8])", str(self.bits))) or match[1] > match[2]:
            raise ValueError(f"--bits is {self.bits!r}; it must be SMALLEST:LARGEST within 1:8, such as 2:8")
        return int(match[1]), int(match[2])

    def command(self) -> str:
        """The command that asks for this; options that are as they come are left out."""
        words = ["python -m haq.search"]
        for one in fields(self):
            value = getattr(self, one.name)
            # Sensitivities that are given bring their kind along.
            brought = one.name == "sensitivity_kind" and self.sensitivity is not None
            if value != one.default and not brought:
                option = f"--{one.name.replace('_', '-')}"
                words.append(option if value is True else f"{option} {shlex.quote(str(value))}")
        return " ".join(words)

    @property
    def adversary(self) -> Adversary | None:
        """What fine-tuning trains against: where policies are judged under attack, R+FGSM of the same eps. Without it, what
        they were chosen for would be trained away."""
        return Adversary("rfgsm", parse_eps(self.eps)) if self.reward == "accuracy+robust" else None

    def load_target(self, **callbacks: Any) -> hw_models.Target:
        """The hardware; `callbacks` and errors are those of `hw_models.load_target`."""
        options = {"threads": self.threads, "target": self.target, "cold": bool(self.cold)}
        return hw_models.load_target(self.hw, **options, **callbacks)  # type: ignore[arg-type]

    def load(self) -> LoadedNetwork:
        """Load network and data, which need no hardware; raises what its parts raise."""
        network = networks.load(self.network)
        dataset = data.load(self.data, image_size=network.input_shape[-1])
        networks.check_fits(network, dataset)
        return LoadedNetwork(self, network, dataset)

    def build(self, target: hw_models.Target | None = None) -> SearchTask:
        """Load network and data and put the problem together; raises what its parts raise."""
        target = target or self.load_target()
        subject = self.load()
        network, dataset = subject.network, subject.dataset
        if not dataset.classes and self.reward != "agreement":
            raise ValueError(f"{dataset.name} has no labels to tell the accuracy by: search with --reward agreement")
        proxy = None
        if self.reward == "accuracy+robust":
            for split in (dataset.search, dataset.test):
                check_images(split, dataset.name)
            proxy = ProxyAttack.of(network, parse_eps(self.eps))
        tuning = training.ShortTuning(network, dataset.train, self.finetune_steps, self.seed) if self.finetune_steps else None
        search = [(network.preprocess(images), labels) for images, labels in dataset.search.batches(250)]
        problem = Problem(
            network.module,
            calibrate=subject.calibration(),
            search=search,
            target=target,
            metric=self.metric,
            budget=self.budget,
            bits=self.bit_range(),
            reward=self.reward,
            tune=tuning,
            proxy=proxy,
        )
        return SearchTask(self, network, dataset, problem)


@dataclass(frozen=True)
class LoadedNetwork:
    """The network and data that settings name, loaded: what is quantized, wherever it is to run."""

    settings: SearchConfig
    network: networks.Network
    dataset: data.Dataset

    def signature(self) -> dict[str, str]:
        """What must be the same for a run's policy and checkpoint to belong to it."""
        return {"network": self.network.signature(), "data": self.dataset.signature()}

    def calibration(self) -> Tensor:
        """Preprocessed images of the train split (N, C, H, W), of all classes, that set the activation scales."""
        return self.network.preprocess(self.dataset.train.images[self.dataset.fair(CALIBRATION)])


@dataclass(frozen=True)
class SearchTask(LoadedNetwork):
    """Settings with everything they name, loaded and priced."""

    problem: Problem
    # Accuracies on the search and the test split by policy (None: the float network), as far as they were measured.
    judged: dict[Q.BitPolicy | None, dict[str, float]] = field(default_factory=dict)

    def on(self, settings: SearchConfig, target: hw_models.Target) -> SearchTask:
        """The same network and data on another target or within another budget; all that was evaluated is shared."""
        return replace(self, settings=settings, problem=self.problem.on(target, settings.budget))

    def subject_signature(self) -> dict[str, str]:
        """What doesn't depend on the hardware: sensitivities belong to it."""
        return super().signature()

    def outline(self) -> dict[str, Any]:
        """What is searched, as plain data: enough to price every policy without loading anything."""
        problem, table = self.problem, self.problem.table
        target = problem.target
        return {
            "schema": PROBLEM_SCHEMA,
            "network": self.network.name,
            "origin": self.network.origin,
            "data": self.dataset.describe(),
            "images": len(self.dataset.search),
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
            "reward": problem.reward,
            "reward_is": problem.reward_is,
            "float": problem.float_accuracy,
            "layers": [
                {
                    "name": layer.name,
                    "kind": layer.kind,
                    "macs": layer.macs,
                    "parameters": layer.parameters,
                    "fixed": layer.name in problem.pinned,
                    "cost": cost.tolist(),  # [weight bits - 1][activation bits - 1], in the unit
                }
                for layer, cost in zip(problem.workload.layers, problem.cost, strict=True)
            ],
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
        sensitivities.check(self.problem, self.subject_signature(), path)
        return sensitivities

    def signature(self) -> dict[str, str]:
        """What must be the same for a run to be continued."""
        table = self.problem.table
        costs = hashlib.sha256(self.problem.cost.tobytes() + table.storage_bytes.tobytes()).hexdigest()[:16]
        return {**super().signature(), "target": costs, **machine_signature(self.problem.target)}


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
