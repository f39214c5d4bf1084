"""What a search takes: network, data and problem, loaded, priced and signed."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import hw_models
import quantizers as Q
from haq import data, networks, training
from haq.attacks.threat_model import parse_eps
from haq.data.dataset import Split, stratified, whole_groups, without
from haq.data.memory import allowed_bytes
from haq.data.sources import Stream
from haq.problem import OBJECTIVES
from haq.problem.batches import Owned
from haq.problem.device import CPU, describe_device, find_device, kind_of
from haq.problem.evaluator import Evaluator
from haq.problem.goal import BEST, TRADEOFF
from haq.problem.objective import BlackBox, build_objective
from haq.problem.problem import Problem
from haq.problem.samples import KeptSamples, pieces, samples_in, samples_of
from haq.problem.schemes import AnyScheme, describe_schemes, linear_for, roundings_by_layer, schemes_by_layer
from haq.problem.sensitivity import Sensitivities
from haq.solvers.agent_file import AgentFile
from haq.solvers.base import check_takes_agent, find_solver
from haq.solvers.spending import proposed
from haq.store.files import MOST_JSON, PROBLEM_SCHEMA, SENSITIVITY, check_file
from haq.store.records import UNIFORM_8, ObjectiveRecord
from haq.store.units import counted, finite
from haq.study.channels import check_installed, pruning_entry, smaller_evaluator, smaller_float
from haq.study.config import ADAROUND, BEFORE, FLOAT, LINEAR, NONE, SearchConfig
from haq.training.adversaries import Adversary
from haq.training.finetuning import classes_of
from haq.training.goals import UserLoss
from haq.training.reconstruction import Reconstructed
from haq.version import __version__
from hw_models.registry import import_by_name
from hw_models.storage import BITS
from hw_models.widths import FLOAT as FLOAT_WIDTH
from quantizers.calling import Forward, inputs_of, leaves
from quantizers.observers import OnProgress, no_progress

CALIBRATION = 512  # images of the train split
FEW_SAMPLES = 8  # that are looked at where nothing is judged


@dataclass(frozen=True)
class LoadedNetwork:
    """The network and data that settings name, loaded: what is quantized, wherever it is to run.

    Attributes:
        config: The settings.
        network: The network, with what it wants to see.
        dataset: Its data, in three splits.
    """

    config: SearchConfig
    network: networks.Network
    dataset: data.Dataset

    @classmethod
    def load(cls, config: SearchConfig) -> LoadedNetwork:
        """Load network and data, which need no hardware; raises what its parts raise."""
        device = find_device(config.device)
        network = networks.load(config.network).normalized(*config.normalization())
        if config.forward is not None:
            network = replace(network, forward=named_forward(config.forward))
        most = allowed_bytes(config.memory)
        dataset = data.load(config.data, image_size=network.image_size, memory=most, search_images=config.search_images)
        # What is only a function isn't of classes.
        takes_scores = getattr(OBJECTIVES.get(config.objective), "takes_scores", False)
        networks.check_fits(network, dataset, takes_scores)
        check_scale(dataset, config.mean, config.std)
        return LoadedNetwork(config, network.to(device), dataset)

    def signature(self) -> dict[str, str]:
        """Tell what must be the same for a run's policy and checkpoint to belong to it."""
        network = self.network.signature()
        if any(self.config.normalization()):
            network += f", mean {self.network.mean}, std {self.network.std}"
        if self.config.forward is not None:
            network += f", called by {self.config.forward}"
        return {"network": network, "data": self.dataset.signature()}

    def calibration(self) -> Any:
        """Preprocess samples of the train split, of all classes, that set the activation scales.

        Returns:
            Images (N, C, H, W), or a tensor of other inputs; a list of batches (inputs, targets), where inputs are of another
            structure, or the network is called by a `forward`.
        """
        train = self.dataset.train
        if isinstance(train.source, Stream):
            return list(self._first_batches())
        inputs, targets = train.take(self.dataset.fair(CALIBRATION))
        inputs = self.network.preprocess(inputs)
        if isinstance(inputs, Tensor) and self.network.forward is None:
            return inputs
        return [(inputs, targets)]

    @property
    def to_train_on(self) -> Split:
        """Return the train split without what is set apart to judge the best few policies again (`--confirm`)."""
        return self._parted[0]

    @property
    def to_confirm(self) -> Split | None:
        """Return the samples by which the best few policies are judged again; None if none were asked for."""
        return self._parted[1]

    @functools.cached_property
    def _parted(self) -> tuple[Split, Split | None]:
        if self.config.confirm is None:
            return self.dataset.train, None
        return set_apart(self.dataset, self.config.confirm)

    def _first_batches(self) -> Iterator[Any]:
        """Yield preprocessed batches of samples that can't be had by index, in the order in which they come."""
        seen = 0
        for inputs, targets in self.dataset.train.batches(CALIBRATION):
            yield self.network.preprocess(inputs), targets
            seen += samples_in(inputs)
            if seen >= CALIBRATION:
                return

    def quantized(self, policy: Q.BitPolicy, schemes: Mapping[str, Q.Scheme]) -> nn.Module:
        """Quantize the network as the search does: with the same calibration, correction, rounding, residuals and channels."""
        images = self.calibration()
        workload = self.traced(images)
        module = self.network.module
        if self.config.residuals != FLOAT:
            module = Q.insert_residual_quantizers(module, images, **self.called_by())
        roundings = roundings_by_layer(self.config.searched_rounding, schemes, workload, _count(images))
        if policy.keep:
            return self._smaller(module, policy, schemes, roundings, images)
        return Q.quantize(
            module,
            policy,
            scheme=schemes,
            calibrate=images,
            correction=correction_of(self.config),
            rounding=roundings,
            **self.called_by(),
        ).eval()

    def _smaller(
        self,
        module: nn.Module,
        policy: Q.BitPolicy,
        schemes: Mapping[str, Q.Scheme],
        roundings: Mapping[str, str],
        calibration: Any,
    ) -> nn.Module:
        """Quantize the network with the channels that a policy keeps, as a `ChannelProblem` does.

        Args:
            module: The float network, with residual quantizers where there are to be some.
            policy: What it is quantized at.
            schemes: Of every layer.
            roundings: Of every layer.
            calibration: What `calibration` returned.
        """
        check_installed(self.config)
        config = self.config
        objective = build_objective(config.objective, self.network, self.dataset, parse_eps(config.eps))
        inputs, targets = self.dataset.search.take(torch.arange(min(FEW_SAMPLES, len(self.dataset.search))))
        evaluator = smaller_evaluator(
            module,
            self.network.module,
            list(owned(calibration)),
            KeptSamples([(self.network.preprocess(inputs), targets)]),
            criterion=config.criterion_name,
            objective=objective,
            schemes=schemes,
            correction=correction_of(config),
            roundings=roundings,
            forward=self.network.forward,
        )
        made = evaluator.quantized(policy)
        Q.set_policy(made, policy)
        return made.eval()

    def traced(self, calibration: Any) -> hw_models.Workload:
        """List the layers of the network, as it is run on the first sample of those that `calibration` returned."""
        if isinstance(calibration, Tensor):
            return hw_models.trace(self.network.module, calibration[:1].clone())
        first = next(pieces(calibration[0], 1))[0]
        if self.network.forward is not None:
            return hw_models.trace(self.network.module, first, forward=self.network.forward)
        return hw_models.trace(self.network.module, inputs_of(first, self.network.module))

    def called_by(self) -> dict[str, Any]:
        """Return the arguments that say how the network is called, if that isn't by its inputs."""
        if self.network.forward is None:
            return {}
        return {"forward": self.network.forward}


@dataclass(frozen=True)
class SearchTask(LoadedNetwork):
    """A search with everything that it names, loaded and priced.

    Attributes:
        problem: What is searched.
        agent: What the solver starts from, which `read_agent` reads; None where nobody searches.
        measured: Values on the search and the test split by policy (None: the float network), as far as they were measured.
        by_sample: The value of every sample of a split, by policy and split, where values are means over samples.
    """

    problem: Problem
    agent: AgentFile | None = None
    measured: dict[Q.BitPolicy | None, dict[str, float | None]] = field(default_factory=dict)
    by_sample: dict[Q.BitPolicy | None, dict[str, Tensor | None]] = field(default_factory=dict)

    @classmethod
    def build(
        cls, config: SearchConfig, target: hw_models.Target | None = None, on_progress: OnProgress = no_progress
    ) -> SearchTask:
        """Load network and data and put the problem together.

        Args:
            config: What is asked for.
            target: The hardware, if it is loaded already.
            on_progress: Told how many of how many steps of calibration are done.

        Returns:
            What is searched.

        Raises:
            ValueError, FileNotFoundError, ImportError: As the parts do.
        """
        check_installed(config)
        loaded = LoadedNetwork.load(config)
        network = loaded.network
        dataset = loaded.dataset
        objective = build_objective(config.objective, network, dataset, parse_eps(config.eps))
        if loaded.to_confirm is not None and isinstance(objective, BlackBox):
            raise ValueError(
                f"objective {objective.name!r} is given the network and looks at samples of its own, so there are no others "
                "to judge policies by again: leave --confirm out"
            )
        tuning = None
        if config.finetune_steps:
            tuning = training.ShortTuning(
                network, loaded.to_train_on, config.finetune_steps, config.seed, config.learning_rate, objective
            )
        # It is sent to other processes, which have the network already.
        preprocess = replace(network, module=nn.Identity(), forward=None).preprocess
        search = samples_of(dataset.search, preprocess, allowed_bytes(config.memory))
        calibration = loaded.calibration()
        scheme: AnyScheme = LINEAR
        if config.scheme != LINEAR:
            scheme = schemes_of(config, loaded.traced(calibration).names)
            if config.rounding == ADAROUND:
                _check_adaround(scheme)
        problem = Problem(
            network.module,
            calibrate=owned(calibration),
            search=search,
            target=target or load_target(config),
            metric=config.metric,
            budget=config.limits(),
            bits=config.bits,
            reference=config.reference,
            max_drop=config.max_drop,
            at_least=config.at_least,
            tradeoff=config.tradeoff,
            objective=objective,
            scheme=scheme,
            tune=tuning,
            correction=correction_of(config),
            rounding=config.searched_rounding,
            residuals=config.residuals,
            on_progress=on_progress,
            **loaded.called_by(),
            **pruning_of(config),
        )
        if config.evaluations is None:
            config = config.replace(evaluations=proposed(problem))
        return SearchTask(config, network, dataset, problem)

    @property
    def evaluations(self) -> int:
        """Return how many policies a solver may evaluate."""
        return self.config.evaluations or proposed(self.problem)

    @functools.cached_property
    def confirm(self) -> Evaluator | None:
        """Return what judges the best few policies again; None if that wasn't asked for."""
        if self.to_confirm is None:
            return None
        preprocess = replace(self.network, module=nn.Identity(), forward=None).preprocess
        return self.problem.judging(samples_of(self.to_confirm, preprocess, allowed_bytes(self.config.memory)))

    def on(self, config: SearchConfig, target: hw_models.Target) -> SearchTask:
        """Put the same network and data on another target or within another budget; all that was evaluated is shared."""
        return replace(self, config=config, problem=self.problem.on(target, config.limits(), max_drop=config.max_drop))

    def reconstruct(
        self, policy: Q.BitPolicy, seed: int, on_progress: OnProgress = no_progress, loss: UserLoss | None = None
    ) -> Reconstructed:
        """Correct biases and learn roundings for one policy (`haq.training.reconstruct`).

        Args:
            policy: The policy.
            seed: Of all that is random.
            on_progress: Told how many of how many parts are done.
            loss: By which networks are judged in place of the distance from the float network's outputs.

        Returns:
            The better network, reconstructed or not, and how both were judged.
        """
        return training.reconstruct(
            self.network,
            self.problem.quantized(policy),
            self.to_train_on,
            seed=seed,
            adversary=adversary_of(self.config),
            objective=self.problem.objective,
            loss=loss,
            source=smaller_float(self.problem, policy),
            on_progress=on_progress,
        )

    def check_finetuning(self) -> None:
        """Raise ValueError, saying what to do, if networks are to be fine-tuned and there is nothing to fine-tune them by."""
        if not self.config.finetune_epochs and not self.config.finetune_steps:
            return
        if self.problem.objective.distribution is not None:
            return
        raise ValueError(
            f"objective {self.problem.objective.name!r} has no distance between a network's outputs and the float network's, "
            "which fine-tuning would lessen: search with --finetune-epochs 0, and give a loss of your own afterwards, with "
            "haq finetune RUN --loss MODULE:FUNCTION"
        )

    def network_signature(self) -> dict[str, str]:
        """Tell what doesn't depend on the hardware: sensitivities belong to it."""
        return super().signature() | self._schemes_signature()

    def outline(self) -> dict[str, Any]:
        """Describe what is searched as plain data: enough to price every policy without loading anything."""
        described = outline(self.problem, self.network.name, self.network.origin, self.dataset.describe())
        return described | {"scheme": self.config.scheme}

    def read_sensitivities(self, source: Path) -> Sensitivities:
        """Read sensitivities from a file or from the folder of a run.

        Raises:
            ValueError: With one reason, if they are of another network, other data or other bits.
            FileNotFoundError: If there are none.
        """
        path = source
        lacks = f"there is no {source}"
        if source.is_dir():
            path = source / SENSITIVITY
            lacks = f"{source} has no {SENSITIVITY}: its search measured none"
        if not path.exists():
            raise FileNotFoundError(f"{lacks}; give the folder of a run that did, or its {SENSITIVITY}")
        check_file(path, MOST_JSON)
        sensitivities = Sensitivities.from_json(path)
        sensitivities.check(self.problem, self.network_signature(), path)
        return sensitivities

    def signature(self) -> dict[str, str]:
        """Tell what must be the same for a run to be continued."""
        parts = [told_places(self.problem, array) for array in (self.problem.cost, self.problem.table.storage_bytes)]
        found = {"target": hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()[:16]}
        if self.config.reference_file is not None:
            widths = json.dumps(self.problem.reference_policy.to_dict())
            found["reference"] = hashlib.sha256(widths.encode()).hexdigest()[:16]
        if self.agent is not None:
            found["agent"] = self.agent.checksum
        if self.config.prune is not None:
            found["criterion"] = self.config.criterion_name
        return {**self.network_signature(), **found, **machine_signature(self.problem.target)}

    def _schemes_signature(self) -> dict[str, str]:
        """Tell how layers are quantized, where it isn't the linear scheme, rounded to nearest, without correction."""
        found = {}
        schemes = signature_of_schemes(self.problem.schemes)
        if schemes is not None:
            found["scheme"] = schemes
        # Nothing for what runs had before they could have anything else: their signatures stay what they are.
        for name, before in BEFORE.items():
            value = getattr(self.config, name)
            if value != before:
                found[name] = value
        if self.config.residuals != FLOAT:
            found["residuals"] = self.config.residuals
        return found


def read_agent(config: SearchConfig, solvers: Iterable[str]) -> AgentFile | None:
    """Read the agent that is asked for.

    Args:
        config: What is asked for.
        solvers: The solvers that are asked for; those that are no agents do without it, but not all of them.

    Returns:
        The agent; None if none is asked for.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: For a file that is no agent, or of another kind or version, and if none of the solvers is an agent.
    """
    if config.agent is None:
        return None
    agent = AgentFile.read(Path(config.agent))
    found = [find_solver(name) for name in solvers]
    takers = [solver for solver in found if getattr(solver, "takes_agent", False)]
    for solver in takers or found[:1]:
        check_takes_agent(solver, agent, config.env)
    return agent


def set_apart(dataset: data.Dataset, count: int) -> tuple[Split, Split]:
    """Set samples of the train split apart, to judge policies by that neither calibration nor training has seen.

    Those that set the scales stay in the train split, so that a search is the same with and without.

    Args:
        dataset: The data.
        count: How many samples: of every class its share. Where there are groups, whole groups with at least so many.

    Returns:
        What is left to train on, and what is set apart. The choice never changes.

    Raises:
        ValueError: If there are too few, or they can't be had by number.
    """
    train = dataset.train
    if isinstance(train.source, Stream):
        raise ValueError(
            f"--confirm sets samples of the train split apart, and those of {dataset.name} come one after the other: leave it "
            "out"
        )
    taken = dataset.fair(CALIBRATION)
    free = without(len(train), taken)
    grouped = train.groups is not None and len(train.groups.unique()) > 1
    if grouped:
        assert train.groups is not None
        free = (~torch.isin(train.groups, train.groups[taken].unique())).nonzero().flatten()
    most = len(free) // 2
    if count > most:
        words = f"it must be at most {most:,}"
        if most < 1:
            words = "leave it out"
        raise ValueError(
            f"--confirm is {count:,}, and of the {len(train):,} {train.samples_are} of the train split {len(free):,} are "
            f"neither used to set scales nor of a group with such; half of them are left to train on: {words}"
        )
    if grouped:
        assert train.groups is not None
        chosen = free[whole_groups(train.groups[free], count, "the train split")]
    else:
        chosen = free[stratified(classes_of(train)[free], count)]
    return train.subset(without(len(train), chosen)), train.subset(chosen.sort().values)


def owned(calibration: Any) -> Owned:
    """Return what `LoadedNetwork.calibration` returned as batches that needn't be copied."""
    if isinstance(calibration, Tensor):
        return Owned([calibration])
    return Owned(calibration)


def _count(calibration: Any) -> int:
    """Count the samples that set the activation scales."""
    if isinstance(calibration, Tensor):
        return len(calibration)
    return sum(map(samples_in, calibration))


def named_forward(name: str) -> Forward:
    """Import what calls the network. Raises ValueError for what can't be found, and for what is no function."""
    found: Forward = import_by_name(name, "forward")
    if not callable(found):
        raise ValueError(f"forward {name!r} is a {type(found).__name__}; it must be a function of (network, batch)")
    return found


def check_scale(dataset: data.Dataset, mean: str | None, std: str | None) -> None:
    """Raise ValueError if a mean or deviation is given for images that are taken as they are.

    Args:
        dataset: The images.
        mean: What was given, if anything.
        std: The same.
    """
    if mean is None and std is None:
        return
    found = leaves(dataset.search.take(torch.arange(1))[0])
    kind = found[0].dtype
    if len(found) != 1 or kind != torch.uint8:
        raise ValueError(
            f"--mean and --std are of uint8 images; those of {dataset.name} are {kind}, and are taken as they are"
        )


def outline(problem: Problem, network: str = "", origin: str = "", data: str = "") -> dict[str, Any]:
    """Describe a problem as plain data: what problem.json holds (`haq.store.records.ProblemRecord`).

    Args:
        problem: The problem.
        network: What the network is called; its class, if nothing is given.
        origin: Where its weights are from.
        data: The data set, in words.

    Returns:
        The description.
    """
    table = problem.table
    target = problem.target
    costs = told_places(problem, np.where(table.supported, problem.cost, np.nan))
    main = problem.limits[0]
    amount = None
    if main.is_given:
        amount = main.amount
    return {
        "schema": PROBLEM_SCHEMA,
        **objective_of(problem).differences(),
        "network": network or problem.network_words,
        "origin": origin,
        "data": data,
        "images": problem.evaluator.count,
        "target": {
            "name": target.name,
            "description": target.description,
            "batch": table.batch,
            "provenance": table.provenance,
        },
        "metric": problem.metric,
        "unit": problem.unit,
        "limit": amount,
        "uniform8": problem.reference,
        "smallest": problem.smallest,
        "bits": list(problem.bits),
        "scheme": describe_schemes(problem.schemes),
        "objective": problem.objective.name,
        "objective_is": problem.objective.words,
        "float": finite(problem.float_accuracy),
        "layers": [
            {
                "name": layer.name,
                "kind": layer.kind,
                "macs": layer.macs,
                "parameters": layer.parameters,
                "fixed": layer.name in problem.pinned,
                "cost": [
                    list(map(finite, row)) for row in cost.tolist()
                ],  # by weight width, then activation width, in the unit
            }
            for layer, cost in zip(problem.workload.layers, costs, strict=True)
        ],
        **_further(problem),
    }


def _further(problem: Problem) -> dict[str, Any]:
    """Describe of a problem what most do without: sets of widths, another reference, further budgets, another goal."""
    found: dict[str, Any] = {}
    weights, activations = (_as_in_policies(operand) for operand in problem.widths)
    low, high = problem.bits
    if not weights == activations == list(range(low, high + 1)):
        found["widths"] = {"weights": weights, "activations": activations}
    if problem.reference_words != UNIFORM_8:
        found |= {"reference": problem.reference_words, "reference_policy": problem.reference_policy.to_dict()}
    if len(problem.limits) > 1:
        found["limits"] = [
            {
                "metric": limit.metric,
                "unit": limit.unit,
                "amount": limit.amount,
                "reference": limit.reference,
                "smallest": limit.smallest,
                "largest": limit.largest,
            }
            for limit in problem.limits
            if limit.is_given
        ]
    goal = goal_of(problem)
    if goal is not None:
        found["goal"] = goal
    return found | pruning_entry(problem)


def _as_in_policies(widths: Iterable[int]) -> list[int | None]:
    """Return widths as policies say them, float being None."""
    found: list[int | None] = list(widths)
    return [*(width for width in found if width != FLOAT_WIDTH), *(None for width in found if width == FLOAT_WIDTH)]


def goal_of(problem: Problem) -> dict[str, Any] | None:
    """Describe what is looked for as plain data (`haq.store.records.GoalRecord`); None for the best policy."""
    goal = problem.goal
    if goal.kind == BEST.kind:
        return None
    found: dict[str, Any] = {"kind": goal.kind, "is": goal.words(problem.objective)}
    if goal.kind == TRADEOFF:
        alpha, beta = goal.exponents
        return found | {"alpha": alpha, "beta": beta, "target": problem.tradeoff_target}
    least = goal.threshold(problem.objective, problem.float_result.value)
    return found | {"least": least, "max_drop": goal.max_drop}


def told_places(problem: Problem, array: NDArray[np.float64]) -> NDArray[np.float64]:
    """Leave out of an array (layers, 10, 10) the places of 16 bits and float, where the target does neither.

    Files and signatures of such targets are as they were before there were these places.
    """
    wide = problem.table.supported[:, BITS:].any() or problem.table.supported[:, :, BITS:].any()
    if wide:
        return array
    return np.ascontiguousarray(array[:, :BITS, :BITS])


def objective_of(problem: Problem) -> ObjectiveRecord:
    """Return the record of what policies of a problem are judged by: how values are shown, and which are better."""
    return ObjectiveRecord.of(problem.objective, problem.samples_are)


def schemes_of(config: SearchConfig, layer_names: Sequence[str]) -> dict[str, Q.Scheme]:
    """Find the scheme of every layer: `NAME`, `NAME,layer=NAME,layer=NAME`, or `layer=NAME` alone.

    The first and the last layer, which are fixed at 8 bits, keep the linear scheme unless they are named.

    Args:
        config: What is asked for; its `scheme`.
        layer_names: The layers, in the order in which they are called.

    Raises:
        ValueError: For an unknown scheme or layer, naming the close ones.
        ImportError: For a scheme of somebody else's that can't be imported.
    """
    of_all, named = config.scheme_names()
    ends = dict.fromkeys(Q.ends(layer_names), LINEAR)
    linear = linear_for(correction_of(config), config.searched_rounding)
    return schemes_by_layer(dict.fromkeys(layer_names, of_all) | ends | named, layer_names, linear)


def signature_of_schemes(schemes: Mapping[str, Q.Scheme]) -> str | None:
    """Return a digest of the schemes of all layers; None where all are the linear one."""
    others = {
        name: {"name": scheme.name, "options": scheme.options()} for name, scheme in schemes.items() if scheme != Q.Linear()
    }
    if not others:
        return None
    return hashlib.sha256(json.dumps(others, sort_keys=True).encode()).hexdigest()[:16]


def _check_adaround(schemes: Mapping[str, Q.Scheme]) -> None:
    """Raise ValueError, before a search begins, for layers whose rounding can't be learned afterwards."""
    for name, scheme in schemes.items():
        if not scheme.takes_offsets:
            raise ValueError(
                f"rounding 'adaround' means nothing to scheme {scheme.name!r} of layer {name!r}: choose another "
                "--rounding, or --scheme linear"
            )


def pruning_of(config: SearchConfig) -> dict[str, Any]:
    """Return the arguments of a problem that say which channels may be pruned; none where none are."""
    if config.prune is None:
        return {}
    return {"prune": config.prune, "criterion": config.criterion_name}


def correction_of(config: SearchConfig) -> str | None:
    """Return the correction that is asked for, as `quantizers.quantize` takes it."""
    if config.correction == NONE:
        return None
    return config.correction


def with_scheme(task: SearchTask, scheme: str | None) -> SearchTask:
    """Quantize the network of a task with another scheme (None: its own); raises what `SearchTask.build` raises."""
    if scheme is None or scheme == task.config.scheme:
        return task
    return SearchTask.build(task.config.replace(scheme=scheme), task.problem.target)


def load_target(config: SearchConfig, **callbacks: Any) -> hw_models.Target:
    """Load the hardware of a search; `callbacks` and errors are those of `hw_models.load_target`."""
    return hw_models.load_target(config.hw, threads=config.threads, target=config.target, cold=bool(config.cold), **callbacks)


def adversary_of(config: SearchConfig) -> Adversary | None:
    """Tell what fine-tuning trains against: where policies are judged under attack, R+FGSM of the same eps.

    Without it, what they were chosen for would be trained away.
    """
    if not OBJECTIVES.get(config.objective).attacked:
        return None
    return Adversary("rfgsm", parse_eps(config.eps))


def machine_signature(target: hw_models.Target) -> dict[str, str]:
    """Tell where latencies were measured; nothing for a target that is computed."""
    key = getattr(target, "key", None)
    if not isinstance(key, Mapping):
        return {}
    return {"machine": json.dumps(dict(key))}


@functools.cache
def _version_of(package: str) -> str:
    """Look up the version of an installed package, which takes a while, once: in a process it stays what it is."""
    return importlib.metadata.version(package)


def versions(device: torch.device | None = None) -> dict[str, str]:
    """Tell the versions on which the result of a search depends to the last bit, and the device, if that isn't the CPU."""
    packages = ("torch", "numpy", "scipy", "gymnasium", "stable-baselines3")
    found = {"haq": __version__, **{name: _version_of(name) for name in packages}}
    if device is not None and device.type != CPU:
        found["device"] = describe_device(device)
    return found


def check_signature(folder: Path, before: dict[str, str], now: dict[str, str], called: dict[str, str]) -> None:
    """Check that everything is what the run or sweep of a folder began with.

    Args:
        folder: The folder.
        before: The signature that it holds.
        now: The signature of what is here.
        called: Names of the signature's parts, for the user.

    Raises:
        ValueError: Naming the first thing that isn't, and what to do.
    """
    for name, value in now.items():
        if before.get(name) != value:
            machine = name.replace("target", "machine")
            if machine != name and machine in now and before.get(machine) == now[machine]:
                raise ValueError(
                    f"the {called[name]} has other times than {folder} began with, as they were measured anew: start a new run"
                )
            raise ValueError(f"the {called[name]} is no longer what {folder} began with: put it back, or start a new run")


def check_versions(folder: Path, before: dict[str, str], device: torch.device | None = None) -> None:
    """Raise ValueError if the versions, on which results depend to the last bit, aren't those a folder began with.

    Args:
        folder: The folder.
        before: The versions that it holds.
        device: Where networks are run here; None is the CPU.
    """
    now = versions(device)
    if before.get("device", CPU) != now.get("device", CPU):
        raise ValueError(
            f"{folder} began on {before.get('device', CPU)}, this is {now.get('device', CPU)}, so it would not go on as it "
            "began: go on where it began, or start a new run"
        )
    for name, version in now.items():
        if before.get(name) != version:
            raise ValueError(
                f"{folder} began with {name} {before.get(name)}, this is {name} {version}, so it would not go on "
                "as it began: install that version, or start a new run"
            )


def check_same_kind(folder: Path, began: str, asked: str | None) -> None:
    """Check that what was begun on one device is gone on with on one of its kind.

    Args:
        folder: The folder of the run or sweep.
        began: The device that it was asked for with.
        asked: The device that is asked for now, if any is.

    Raises:
        ValueError: For another kind, on which results would be others in their last bits.
    """
    if asked is not None and kind_of(asked) != kind_of(began):
        raise ValueError(
            f"{folder} began on {began}, so it would not go on as it began on {asked}: leave --device out, or start a new run"
        )


def threads(device: torch.device | None = None) -> str:
    """Say where accuracy is measured: on a device, the CPU if none is given."""
    if device is not None and device.type != CPU:
        return f"this machine's {describe_device(device)}"
    return f"this machine's CPU, {counted(torch.get_num_threads(), 'threads')}"
