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

import csv
import importlib.util
import io
import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn

import quantizers as Q
from haq import models
from haq.checkpoint import Checkpoint
from haq.evaluator import Evaluation
from haq.files import COLUMNS, CONFIG, HISTORY, POLICY, PROBLEM, RESULT, RUN_SCHEMA, SENSITIVITY
from haq.job import Job, Settings, Subject, check_signature, check_versions, machine_signature, versions
from haq.problem import Problem
from haq.solvers import Found, Session, solve
from haq.solvers.sensitivity import Sensitivities, by_hessian, signed

logger = logging.getLogger("haq")
CHECKPOINT = Path("checkpoint") / "quantized.safetensors"
CHECKPOINT_FORMAT = "haq-quantized-1"


class Run:
    """The folder of a run, opened with `create` or `load`."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.folder, self.settings = folder, settings
        self._rows: list[list[str]] = []  # of an interrupted search, still to be met again
        self._met: list[list[str]] = []  # of it, met again
        self._known = 0  # rises in its file of sensitivities, as far as we wrote it
        self._began: dict[str, tuple[int, float]] = {}  # by solver: the first evaluation of this process, and when it was
        self._writer: Any = None

    @classmethod
    def create(cls, folder: Path, job: Job) -> Run:
        """Start a new folder, with a copy of the sensitivities that the run is given. Raises ValueError, touching nothing, if
        there is anything in it, or these are refused."""
        check_unused(folder)
        given = job.settings.sensitivity
        sensitivities = None if given is None else job.read_sensitivities(Path(given))
        folder.mkdir(parents=True, exist_ok=True)
        content = {
            "schema": RUN_SCHEMA,
            "command": job.settings.command(),
            "settings": asdict(job.settings),
            "signature": job.signature(),
            "versions": versions(),
        }
        run = cls(folder, job.settings)
        run._write(CONFIG, yaml.safe_dump(content, sort_keys=False))
        run._write(PROBLEM, json.dumps(job.outline(), indent=2) + "\n")
        run._write(HISTORY, _line(COLUMNS))
        if sensitivities is not None:
            run.save_sensitivities(sensitivities, job)
        return run

    @classmethod
    def load(cls, folder: Path) -> Run:
        """Open a folder. Raises ValueError with the reason if it isn't a run's."""
        path = folder / CONFIG
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is not the folder of a run: it has no {CONFIG}")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
            if content["schema"] != RUN_SCHEMA:
                raise ValueError(f"schema is {content['schema']!r}, not {RUN_SCHEMA!r}")
            settings = Settings(**content["settings"])
        except (yaml.YAMLError, TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is not the configuration of a run: {' '.join(str(error).split())}") from error
        return cls(folder, settings)

    @property
    def finished(self) -> bool:
        return (self.folder / RESULT).is_file()

    def build(self, **callbacks: Any) -> Job:
        """The job that this run was asked for, where it began. Raises ValueError, before anything is measured, elsewhere."""
        target = self.settings.load_target(**callbacks)
        signature = yaml.safe_load((self.folder / CONFIG).read_text(encoding="utf-8"))["signature"]
        before, now = (json.loads(s.get("machine", "{}")) for s in (signature, machine_signature(target)))
        if before != now:
            name = next(name for name in {**before, **now} if before.get(name) != now.get(name))
            raise ValueError(
                f"{self.folder} began with latencies measured with {name} {before.get(name)}, here it is {now.get(name)}: "
                "go on where it began, or start a new run"
            )
        return self.settings.build(target)

    def check(self, job: Subject, *, same_versions: bool = False) -> None:
        """Raise ValueError, with the way out, if network, data or target (of a Job) aren't what the run began with."""
        content = yaml.safe_load((self.folder / CONFIG).read_text(encoding="utf-8"))
        options = {"target": "hw", "machine": "hw"}
        signature = job.signature()
        called = {name: f"{name} ({getattr(self.settings, options.get(name, name))})" for name in signature}
        check_signature(self.folder, content["signature"], signature, called)
        if same_versions:
            check_versions(self.folder, content["versions"])

    def prepare_resume(self, problem: Problem) -> int:
        """Give the problem what was evaluated before; returns how many evaluations that saves."""
        path = self.folder / HISTORY
        text = path.read_text(encoding="utf-8") if path.is_file() else _line(COLUMNS)
        # A line without its end was being written when the run was killed.
        lines = text[: text.rfind("\n") + 1].splitlines()
        if lines[:1] != [",".join(COLUMNS)]:
            raise ValueError(f"{path} has the columns {' '.join(lines[:1])}, not {','.join(COLUMNS)}: start a new run")
        self._rows = [row for row in csv.reader(lines[1:]) if len(row) == len(COLUMNS)]
        for row in self._rows:
            policy = problem.policy(map(int, row[2].split("-")), map(int, row[3].split("-")))
            divergence = float(row[8]) if row[8] else None
            problem.evaluator.cache[policy] = Evaluation(float(row[4]), float(row[5]), problem.evaluator.count, divergence)
        self._write(HISTORY, "".join(f"{line}\n" for line in lines))
        return len(self._rows)

    def record(
        self, solver: str, evaluation: int, found: Found, within_budget: bool, problem: Problem, best: Found | None = None
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
            self._write(HISTORY, "".join(map(_line, [COLUMNS, *self._met])))
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
                writer.add_scalar(f"{solver}/seconds_left", rate * (self.settings.evaluations - evaluation), evaluation)

    def close(self) -> None:
        if self._writer:
            self._writer.close()

    def search(
        self,
        job: Job,
        solver: str,
        sensitivities: Sensitivities | None = None,
        on_evaluation: Callable[[int, Found, Found | None], None] = lambda count, found, best: None,
    ) -> Session:
        """Run a solver, with every evaluation written down, and, if the run is this solver's, its best policy kept on disk.
        `on_evaluation` is told the number of evaluations, the last one, and the best policy so far.
        Returns the session, with what was found."""
        mine = solver == self.settings.solver

        def record(count: int, found: Found, within_budget: bool) -> None:
            if mine and found is session.best:
                self.save_policy(found.policy)
            self.record(solver, count, found, within_budget, job.problem, session.best)
            on_evaluation(count, found, session.best)

        asked = {name: getattr(self.settings, name) for name in ("evaluations", "seed", "env", "ahead")}
        session = Session(
            job.problem,
            self.settings.evaluations,
            record,
            sensitivities,
            self.settings.sensitivity_kind,
            lambda measured: self.save_sensitivities(measured, job),
            env=self.settings.env,
            ahead=self.settings.ahead,
            checkpoint=self.checkpoint(solver, job, **asked),
        )
        found = solve(solver, session, self.settings.seed)
        if mine:
            self.save_policy(found.policy)
        return session

    def checkpoint(self, name: str, job: Job, **asked: Any) -> Checkpoint:
        """Where something of this run, asked for in that way, keeps what it goes on with."""
        belongs = job.signature() | versions() | {key: str(value) for key, value in asked.items()}
        return Checkpoint(self.folder / CHECKPOINT.parent / f"{name}.state", belongs)

    def drop_checkpoint(self, name: str) -> None:
        """What nothing will go on with any more."""
        (self.folder / CHECKPOINT.parent / f"{name}.state").unlink(missing_ok=True)

    def sensitivities(self, job: Job) -> Sensitivities | None:
        """What the run's solvers need not measure: what it was given (once it is there, the copy in its folder), or what costs
        no evaluation. None if they are to measure themselves."""
        if self.settings.sensitivity is not None:
            copy = self.folder / SENSITIVITY
            return job.read_sensitivities(copy if copy.is_file() else Path(self.settings.sensitivity))
        if self.settings.sensitivity_kind != "hessian":
            return None
        measured = by_hessian(job.problem)
        self.save_sensitivities(measured, job)
        return measured

    def save_sensitivities(self, measured: Sensitivities, job: Job) -> None:
        """Write sensitivities, unless a solver before knew more of them."""
        if measured.known > self._known:
            signed(measured, job.subject_signature()).to_json(self.folder / SENSITIVITY)
            self._known = measured.known

    def save_policy(self, policy: Q.BitPolicy) -> None:
        policy.to_json(self.folder / POLICY)

    def load_policy(self) -> Q.BitPolicy:
        if not (self.folder / POLICY).is_file():
            raise FileNotFoundError(
                f"{self.folder} has no {POLICY}: nothing was found yet; python -m haq.search --resume {self.folder}"
            )
        return Q.BitPolicy.from_json(self.folder / POLICY)

    def save_result(self, result: dict[str, Any]) -> None:
        self._write(RESULT, json.dumps(result, indent=2) + "\n")

    def load_result(self) -> dict[str, Any]:
        if not self.finished:
            raise FileNotFoundError(f"{self.folder} is not finished: python -m haq.search --resume {self.folder}")
        try:
            content: dict[str, Any] = json.loads((self.folder / RESULT).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.folder / RESULT} is not JSON: {error}") from error
        return content

    def save_checkpoint(self, qnetwork: nn.Module, job: Subject, name: Path = CHECKPOINT) -> Path:
        """Write a quantized network into the folder: weights, scales and bits."""
        tensors: dict[str, Tensor] = {f"network.{key}": value for key, value in qnetwork.state_dict().items()}
        tensors |= {f"quantizer.{key}": value for key, value in Q.quantizer_state(qnetwork).items()}
        notes = {
            "format": CHECKPOINT_FORMAT,
            "policy": json.dumps({name: list(bits) for name, bits in Q.get_policy(qnetwork).items()}),
            **job.signature(),
        }
        path = self.folder / name
        models.write_safetensors({key: value.contiguous() for key, value in tensors.items()}, path, notes)
        return path

    def load_checkpoint(self, job: Subject, name: Path = CHECKPOINT) -> nn.Module | None:
        """The fine-tuned network of this run, or None if it has none. Raises ValueError if it is of another problem."""
        path = self.folder / name
        if not path.is_file():
            return None
        tensors, notes = models.read_state(path)
        if notes.get("format") != CHECKPOINT_FORMAT or any(notes.get(k) != v for k, v in job.signature().items()):
            raise ValueError(f"{path} is not a checkpoint of this run: delete it and use python -m haq.finetune {self.folder}")
        policy = Q.BitPolicy(json.loads(notes["policy"]))
        state = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith("quantizer.")}
        qnetwork = Q.quantize(job.network.module, policy, state=state)
        weights = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith("network.")}
        qnetwork.load_state_dict(weights)
        return qnetwork.eval()

    def _events(self) -> Any:
        if self._writer is None and has_tensorboard():
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder))  # type: ignore[no-untyped-call]
        return self._writer

    def _write(self, name: str, text: str) -> None:
        partial = self.folder / f"{name}.part"
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.folder / name)


def has_tensorboard() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


def check_unused(folder: Path) -> None:
    """Raise ValueError if a folder is in use."""
    if folder.is_dir() and any(folder.iterdir()):
        unfinished = (folder / CONFIG).is_file() and not (folder / RESULT).is_file()
        way_out = f"go on with it by --resume {folder}, or " if unfinished else ""
        raise ValueError(f"{folder} is in use and is not overwritten: {way_out}name another with --out")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder: name another with --out")


def default_folder(settings: Settings) -> Path:
    """A folder under runs/ that says what is in it and isn't in use."""
    hw = (settings.hw if settings.hw.startswith("rpc:") else Path(settings.hw).stem).replace(":", "-")
    return unused_folder(f"{hw}-{settings.metric}-{settings.budget}-{settings.solver}-seed{settings.seed}")


def unused_folder(name: str) -> Path:
    """A folder of that name under runs/, with a number if there is one already."""
    base = Path("runs") / name
    folder, number = base, 2
    while folder.exists():
        folder, number = base.with_name(f"{base.name}-{number}"), number + 1
    return folder


def _line(values: Any) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerow(values)
    return buffer.getvalue()
