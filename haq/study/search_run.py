"""A run: one search on disk. What was asked, what was tried, what was found, and enough to go on from there.

    config.yaml         what was asked, and signatures of network, data, target and versions
    problem.json        what is searched: layers, what they cost at every pair of bits, the limit
    history.csv         every evaluation, in order
    sensitivity.json    what is known of single operands, if the search was given it or measured it
    policy.json         the best policy so far; in the end, what was found
    result.json         the summary; there once the run is finished
    policy.png          bits per layer over each layer's share of the cost
    checkpoint/         the fine-tuned network and its scales; agents after their last episode; an interrupted fine-tuning
    robustness/         finished attacks, and networks that were trained to compare with
    report.html         what python -m haq.report makes of all this
    events.*            TensorBoard, where it is installed

A search is deterministic, so an interrupted one is resumed by doing it again with its history at hand: what was evaluated
isn't evaluated anew, and the files come out as if nothing had happened. Only an agent isn't taught anew: it goes on from its
last episode, with its networks, its replay buffer and all random states as they were.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

import quantizers as Q
from haq import networks
from haq.problem.evaluator import Evaluation
from haq.problem.problem import Problem
from haq.problem.sensitivity import Sensitivities, signed
from haq.solvers.base import Session, Trial, solve
from haq.solvers.sensitivity import by_hessian
from haq.store import files, history
from haq.store.checkpoint import Checkpoint
from haq.store.files import CHECKPOINT, CONFIG, HISTORY, POLICY, PROBLEM, RESULT, RUN_SCHEMA, SENSITIVITY
from haq.store.lock import is_held
from haq.study.task import (
    LoadedNetwork,
    SearchConfig,
    SearchTask,
    check_signature,
    check_versions,
    load_target,
    machine_signature,
    versions,
)

logger = logging.getLogger("haq")
CHECKPOINT_FORMAT = "haq-quantized-1"


class Run:
    """The folder of a run, opened with `create` or `load`."""

    def __init__(self, folder: Path, settings: SearchConfig) -> None:
        self.folder, self.config = folder, settings
        self._rows: list[list[str]] = []  # of an interrupted search, still to be met again
        self._met: list[list[str]] = []  # of it, met again
        self._known = 0  # rises in its file of sensitivities, as far as we wrote it
        self._began: dict[str, tuple[int, float]] = {}  # by solver: the first evaluation of this process, and when it was
        self._writer: Any = None

    @classmethod
    def create(cls, folder: Path, task: SearchTask) -> Run:
        """Start a new folder, with a copy of the sensitivities that the run is given. Raises ValueError, touching nothing, if
        there is anything in it, or these are refused."""
        check_unused(folder)
        given = task.config.sensitivity
        sensitivities = None if given is None else task.read_sensitivities(Path(given))
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "schema": RUN_SCHEMA,
            "command": task.config.command(),
            "settings": asdict(task.config),
            "signature": task.signature(),
            "versions": versions(),
        }
        run = cls(folder, task.config)
        run._write(CONFIG, yaml.safe_dump(content, sort_keys=False))
        run._write(PROBLEM, json.dumps(task.outline(), indent=2) + "\n")
        run._write(HISTORY, history.HEADER)
        if sensitivities is not None:
            run.save_sensitivities(sensitivities, task)
        return run

    @classmethod
    def load(cls, folder: Path) -> Run:
        """Open a folder. Raises ValueError with the reason if it isn't a run's."""
        content = files.read_config(folder)
        try:
            settings = SearchConfig.read(content["settings"])
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG} is not the configuration of a run: {error}") from error
        return cls(folder, settings)

    @property
    def finished(self) -> bool:
        return (self.folder / RESULT).exists()

    @property
    def go_on(self) -> str:
        """The command that goes on with the search."""
        return f"python -m haq.search --resume {self.folder}"

    def build(self, **callbacks: Any) -> SearchTask:
        """The job that this run was asked for, where it began. Raises ValueError, before anything is measured, elsewhere."""
        self._check_files("network", "data", "hw")
        target = load_target(self.config, **callbacks)
        signature = files.read_config(self.folder)["signature"]
        before, now = (_machine(self.folder / CONFIG, s) for s in (signature, machine_signature(target)))
        if before != now:
            name = next(name for name in {**before, **now} if before.get(name) != now.get(name))
            raise ValueError(
                f"{self.folder} began with latencies measured with {name} {before.get(name)}, here it is {now.get(name)}: "
                "go on where it began, or start a new run"
            )
        return SearchTask.build(self.config, target)

    def load_network(self) -> LoadedNetwork:
        """The network and data that this run was asked for. Raises ValueError or FileNotFoundError if they aren't here."""
        self._check_files("network", "data")
        return LoadedNetwork.load(self.config)

    def _check_files(self, *names: str) -> None:
        """Raise FileNotFoundError, saying where it is looked for, if a file that settings name isn't here."""
        for name, path in self.config.files().items():
            if name in names and not path.exists():
                where = "" if path.is_absolute() else f" in {Path.cwd()}: paths are relative to where the search was started"
                raise FileNotFoundError(
                    f"{self.folder} was asked for with --{name} {getattr(self.config, name)}, and there is no {path}"
                    f"{where}; go on from there, or put it here"
                )
        for name in ("network", "data"):
            module = str(getattr(self.config, name)).rpartition("@")[0] or str(getattr(self.config, name))
            found = PathFinder.find_spec(module.partition(":")[0].partition(".")[0], [os.getcwd(), *sys.path])
            if found and found.origin and Path(found.origin).resolve().is_relative_to(self.folder.resolve()):
                raise ValueError(
                    f"{self.folder / CONFIG} names {name} {module}, which is code in the run's own folder, and was not run: "
                    "move it out of there if you trust it"
                )

    def check(self, task: LoadedNetwork, *, same_versions: bool = False) -> None:
        """Raise ValueError, with the way out, if network, data or target (of a task) aren't what the run began with, or if the
        policy in the folder is of another network."""
        content = files.read_config(self.folder)
        options = {"target": "hw", "machine": "hw"}
        signature = task.signature()
        called = {name: f"{name} ({getattr(self.config, options.get(name, name))})" for name in signature}
        check_signature(self.folder, content["signature"], signature, called)
        if same_versions:
            check_versions(self.folder, content["versions"])
        if (self.folder / POLICY).exists():
            self.check_policy(self.load_policy(), task, self.folder / POLICY)

    def check_policy(self, policy: Q.BitPolicy, task: LoadedNetwork, source: Path) -> Q.BitPolicy:
        """The policy itself. Raises ValueError, naming its source, unless it gives bits to the layers of the run's network."""
        if isinstance(task, SearchTask):
            layers = set(task.problem.workload.names)
        else:
            layers = set(Q.BitPolicy.uniform(task.network.module, w=8, a=8)) & set(policy)
        if wrong := sorted(set(policy) ^ layers) or sorted(name for name, bits in policy.items() if None in bits):
            raise ValueError(
                f"{source} is of another network than {task.network.name}: layer {wrong[0][:60]!r} is in one of the two only, "
                f"or has no bits; so are {len(wrong)} in all"
            )
        return policy

    def prepare_resume(self, problem: Problem) -> int:
        """Give the problem what was evaluated before; returns how many evaluations that saves."""
        path = self.folder / HISTORY
        self._rows = history.read(path, len(problem.workload)) if path.exists() else []
        for row in self._rows:
            policy = problem.policy(map(int, row[2].split("-")), map(int, row[3].split("-")))
            divergence = float(row[8]) if row[8] else None
            problem.evaluator.cache[policy] = Evaluation(float(row[4]), float(row[5]), problem.evaluator.count, divergence)
        # Without the line that was being written when the run was killed.
        self._write(HISTORY, history.HEADER + "".join(_line(row) for row in self._rows))
        return len(self._rows)

    def complete(self, task: SearchTask) -> None:
        """Write what a kill, just as the folder was made, has left out."""
        if not (self.folder / PROBLEM).exists():
            self._write(PROBLEM, json.dumps(task.outline(), indent=2) + "\n")

    def record(
        self, solver: str, evaluation: int, found: Trial, within_budget: bool, problem: Problem, best: Trial | None = None
    ) -> None:
        """Append one evaluation to the history, and show it to TensorBoard with the best so far and the time left."""
        w, a = problem.bit_arrays(found.policy)
        row = [
            solver,
            str(evaluation),
            "-".join(map(str, w)),
            "-".join(map(str, a)),
            repr(found.result.accuracy),
            repr(found.result.loss),
            repr(found.cost),
            str(int(within_budget)),
            "" if found.result.divergence is None else repr(found.result.divergence),
        ]
        if self._rows:
            if (before := self._rows.pop(0)) == row:
                self._met.append(row)
                return
            if not (self.folder / CHECKPOINT.parent / f"{solver}.state").is_file():
                raise ValueError(
                    f"{self.folder} can't be resumed: evaluation {evaluation} of {solver} came out as {row[2:6]}, "
                    f"its history has {before[2:6]}. Start a new run"
                )
            # On another kind of processor, floats differ in their last bits, and an agent goes another way from its checkpoint
            # on, which is behind by the episodes it was at.
            logger.warning(f"{solver} goes on from evaluation {evaluation} otherwise than it had begun: another processor?")
            self._rows = []
            self._write(HISTORY, history.HEADER + "".join(map(_line, self._met)))
        with (self.folder / HISTORY).open("a", encoding="utf-8") as file:
            file.write(_line(row))
        if writer := self._events():
            writer.add_scalar(f"{solver}/accuracy", found.result.accuracy, evaluation)
            writer.add_scalar(f"{solver}/loss", found.result.loss, evaluation)
            writer.add_scalar(f"{solver}/{problem.metric}_{problem.unit}", found.cost, evaluation)
            writer.add_scalar(f"{solver}/share_of_budget", found.cost / problem.limit, evaluation)
            if best is not None:
                writer.add_scalar(f"{solver}/best_accuracy", best.result.accuracy, evaluation)
            first, began = self._began.setdefault(solver, (evaluation, time.monotonic()))
            if evaluation > first:
                rate = (time.monotonic() - began) / (evaluation - first)
                writer.add_scalar(f"{solver}/seconds_left", rate * (self.config.evaluations - evaluation), evaluation)

    def close(self) -> None:
        if self._writer:
            self._writer.close()

    def search(
        self,
        task: SearchTask,
        solver: str,
        sensitivities: Sensitivities | None = None,
        on_evaluation: Callable[[int, Trial, Trial | None], None] = lambda count, found, best: None,
    ) -> Session:
        """Run a solver, with every evaluation written down, and, if the run is this solver's, its best policy kept on disk.
        `on_evaluation` is told the number of evaluations, the last one, and the best policy so far.
        Returns the session, with what was found."""
        mine = solver == self.config.solver

        def record(count: int, found: Trial, within_budget: bool) -> None:
            if mine and found is session.best and not self._rows:  # what is met again is there, and may still be refused
                self.save_policy(found.policy)
            self.record(solver, count, found, within_budget, task.problem, session.best)
            on_evaluation(count, found, session.best)

        asked = {name: getattr(self.config, name) for name in ("evaluations", "seed", "env", "ahead")}
        session = Session(
            task.problem,
            self.config.evaluations,
            record,
            sensitivities,
            self.config.sensitivity_kind,
            lambda measured: self.save_sensitivities(measured, task),
            env=self.config.env,
            ahead=self.config.ahead,
            checkpoint=self.checkpoint(solver, task, **asked),
        )
        found = solve(solver, session, self.config.seed)
        if mine:
            self.save_policy(found.policy)
        return session

    def checkpoint(self, name: str, task: SearchTask, **asked: Any) -> Checkpoint:
        """Where something of this run, asked for in that way, keeps what it goes on with."""
        belongs = task.signature() | versions() | {key: str(value) for key, value in asked.items()}
        return Checkpoint(self.folder / CHECKPOINT.parent / f"{name}.state", belongs)

    def drop_checkpoint(self, name: str) -> None:
        """What nothing will go on with any more."""
        (self.folder / CHECKPOINT.parent / f"{name}.state").unlink(missing_ok=True)

    def sensitivities(self, task: SearchTask) -> Sensitivities | None:
        """What the run's solvers need not measure: what it was given (once it is there, the copy in its folder), or what costs
        no evaluation. None if they are to measure themselves."""
        if self.config.sensitivity is not None:
            copy = self.folder / SENSITIVITY
            return task.read_sensitivities(copy if copy.exists() else Path(self.config.sensitivity))
        if self.config.sensitivity_kind != "hessian":
            return None
        measured = by_hessian(task.problem)
        self.save_sensitivities(measured, task)
        return measured

    def save_sensitivities(self, measured: Sensitivities, task: SearchTask) -> None:
        """Write sensitivities, unless a solver before knew more of them."""
        if measured.known > self._known:
            signed(measured, task.network_signature()).to_json(self.folder / SENSITIVITY)
            self._known = measured.known

    def save_policy(self, policy: Q.BitPolicy) -> None:
        policy.to_json(self.folder / POLICY)

    def load_policy(self) -> Q.BitPolicy:
        path = self.folder / POLICY
        if not path.exists():
            raise FileNotFoundError(f"{self.folder} has no {POLICY}: nothing was found yet; {self.go_on}")
        files.check_file(path, files.MOST_JSON)
        return Q.BitPolicy.from_json(path)

    def save_result(self, result: dict[str, Any]) -> None:
        self._write(RESULT, json.dumps(result, indent=2) + "\n")

    def load_result(self) -> dict[str, Any]:
        if not self.finished:
            raise FileNotFoundError(f"{self.folder} is not finished: {self.go_on}")
        return files.read_result(self.folder)

    def save_checkpoint(self, qnetwork: nn.Module, task: LoadedNetwork, name: Path = CHECKPOINT) -> Path:
        """Write a quantized network into the folder: weights, scales and bits."""
        tensors: dict[str, Tensor] = {f"network.{key}": value for key, value in qnetwork.state_dict().items()}
        tensors |= {f"quantizer.{key}": value for key, value in Q.quantizer_state(qnetwork).items()}
        notes = {
            "format": CHECKPOINT_FORMAT,
            "policy": json.dumps({name: list(bits) for name, bits in Q.get_policy(qnetwork).items()}),
            **task.signature(),
        }
        path = self.folder / name
        networks.write_safetensors({key: value.contiguous() for key, value in tensors.items()}, path, notes)
        return path

    def load_checkpoint(self, task: LoadedNetwork, name: Path = CHECKPOINT) -> nn.Module | None:
        """The fine-tuned network of this run, or None if it has none. Raises ValueError if it is of another problem."""
        path = self.folder / name
        if not path.exists():
            return None
        # Weights, scales, and what schemes keep: never several times the network.
        held = sum(tensor.numel() * tensor.element_size() for tensor in task.network.module.state_dict().values())
        files.check_file(path, 4 * held + 2**24)
        tensors, notes = networks.read_state(path)
        remedy = f"delete it and use python -m haq.finetune {self.folder}"
        if (later := notes.get("format", "")) != CHECKPOINT_FORMAT and re.fullmatch(r"haq-quantized-[0-9]+", later):
            files.check_schema(path, later, CHECKPOINT_FORMAT, "a checkpoint of this run")
        if later != CHECKPOINT_FORMAT or any(notes.get(k) != v for k, v in task.signature().items()):
            raise ValueError(f"{path} is not a checkpoint of this run: {remedy}")
        state = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith("quantizer.")}
        weights = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith("network.")}
        try:
            policy = self.check_policy(Q.BitPolicy(json.loads(notes["policy"])), task, path)
            qnetwork = Q.quantize(task.network.module, policy, state=state)
            for expected, given in ((Q.quantizer_state(qnetwork), state), (qnetwork.state_dict(), weights)):
                _check_tensors(expected, given)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError, RuntimeError) as error:
            raise ValueError(
                f"{path} doesn't hold the network of this run ({' '.join(str(error).split())}): {remedy}"
            ) from error
        qnetwork.load_state_dict(weights)
        return qnetwork.eval()

    def _events(self) -> Any:
        if self._writer is None and has_tensorboard():
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder))  # type: ignore[no-untyped-call]
        return self._writer

    def _write(self, name: str, text: str) -> None:
        files.write(self.folder / name, text)


def has_tensorboard() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


def check_unused(folder: Path) -> None:
    """Raise ValueError if a folder is in use."""
    if _holds_something(folder):
        unfinished = (folder / CONFIG).is_file() and not (folder / RESULT).is_file()
        remedy = f"go on with it by --resume {folder}, or " if unfinished else ""
        raise ValueError(f"{folder} is in use and is not overwritten: {remedy}name another with --out")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder: name another with --out")


def default_folder(settings: SearchConfig) -> Path:
    """A folder under runs/ that says what is in it and isn't in use."""
    hw = (settings.hw if settings.hw.startswith("rpc:") else Path(settings.hw).stem).replace(":", "-")
    return unused_folder(f"{hw}-{settings.metric}-{settings.budget}-{settings.solver}-seed{settings.seed}")


def unused_folder(name: str) -> Path:
    """A folder of that name under runs/, with a number if there is one already."""
    base = Path("runs") / name
    folder, number = base, 2
    while folder.exists() and (not folder.is_dir() or _holds_something(folder) or is_held(folder)):
        folder, number = base.with_name(f"{base.name}-{number}"), number + 1
    return folder


def _holds_something(folder: Path) -> bool:
    """Whether there is more in a folder than what a process leaves that is killed while it makes it."""
    return folder.is_dir() and any(path.name not in files.LEFTOVERS for path in folder.iterdir())


def _machine(path: Path, signature: dict[str, str]) -> dict[str, Any]:
    """The machine of a signature, by its parts; none for a target that is computed."""
    try:
        found = json.loads(signature.get("machine", "{}"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not the configuration of a run: its signature's machine is not JSON")
    return found


def _check_tensors(expected: dict[str, Tensor], given: dict[str, Tensor]) -> None:
    """Raise ValueError unless tensors have the names, shapes and types that are expected, and finite values."""
    if wrong := sorted(set(expected) ^ set(given)):
        raise ValueError(f"{wrong[0]} is missing, or is one too many; {len(wrong)} are")
    for name, tensor in given.items():
        if (tensor.shape, tensor.dtype) != (expected[name].shape, expected[name].dtype):
            raise ValueError(
                f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, not {expected[name].dtype} of "
                f"{tuple(expected[name].shape)}"
            )
        # What a scheme notes of widths that it doesn't use may be anything.
        if name.endswith(("weight", "bias", "running_mean", "running_var", "_scale")) and not tensor.isfinite().all():
            raise ValueError(f"{name} has values that are not finite")


def _line(values: list[str]) -> str:
    return ",".join(values) + "\n"
