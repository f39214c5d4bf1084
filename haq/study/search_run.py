"""A run: one search on disk. What was asked, what was tried, what was found, and enough to go on from there.

    config.yaml         what was asked, and signatures of network, data, target and versions
    problem.json        what is searched: layers, what they cost at every pair of bits, the limit
    history.csv         every evaluation, in order
    sensitivity.json    what is known of single operands, if the search was given it or measured it
    trials.csv          trials of earlier searches that it was given, as a history has them
    policy.json         the best policy so far; in the end the one that was chosen (`haq.solvers.choice`)
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
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

import quantizers as Q
from haq import networks
from haq.problem.device import find_device
from haq.problem.evaluator import Evaluation
from haq.problem.goal import CHEAPEST, TRADEOFF
from haq.problem.objective import Objective
from haq.problem.problem import Problem
from haq.problem.schemes import obeying
from haq.problem.sensitivity import Sensitivities, signed
from haq.solvers import PLAN
from haq.solvers.agent_file import AgentFile
from haq.solvers.base import Session, Trial, find_solver, solve
from haq.solvers.sensitivity import computed
from haq.store import files, history
from haq.store.checkpoint import Checkpoint
from haq.store.files import CHECKPOINT, CONFIG, HISTORY, POLICY, PROBLEM, RESULT, RUN_SCHEMA, SENSITIVITY, TRIALS
from haq.store.history import SHARED, HistoryRow
from haq.store.lock import check_can_be_made, is_held
from haq.store.records import ConfigRecord, PolicyRecord, ProblemRecord, ResultRecord
from haq.store.shell import command_line
from haq.study import known_trials
from haq.study.channels import check_keep, check_keeps, group_count, group_names, is_joint, kept_shares
from haq.study.known_trials import KnownTrial, KnownTrials
from haq.study.task import (
    LoadedNetwork,
    SearchConfig,
    SearchTask,
    check_signature,
    check_versions,
    load_target,
    machine_signature,
    objective_of,
    read_agent,
    schemes_of,
    signature_of_schemes,
    versions,
)
from hw_models import trust
from hw_models.cost import describe_pairs
from hw_models.widths import pair_words, place_of, width_words
from quantizers.observers import no_progress

logger = logging.getLogger("haq")


class SearchRun:
    """The folder of a run, opened with `create` or `load`."""

    def __init__(self, folder: Path, config: SearchConfig) -> None:
        """Open a folder without reading it; use `create` or `load`."""
        self.folder, self.config = folder, config
        self._expected: list[HistoryRow] = []  # of an interrupted search, still to be met again
        self._met: list[HistoryRow] = []  # of it, met again
        self._recorded: dict[str, dict[Q.BitPolicy, Evaluation]] = {}  # what it was told, by solver
        self._tells_images: bool | None = None  # whether its history has a column for that; None until it is looked at
        self._known = 0  # loss increases in its file of sensitivities, as far as we wrote it
        self._began: dict[str, tuple[int, float]] = {}  # by solver: the first evaluation of this process, and when it was
        self._writer: Any = None

    @classmethod
    def create(cls, folder: Path, task: SearchTask, known: KnownTrials | None = None, searches: int = 0) -> SearchRun:
        """Start a new folder, with a copy of the sensitivities and the trials that the run is given.

        Args:
            folder: Where; made if need be.
            task: What is searched.
            known: The trials that it is given; None: those of the folders that its settings name.
            searches: How many searches of a sweep share what they try, if it is one of them.

        Returns:
            The run.

        Raises:
            ValueError: Touching nothing, if there is anything in the folder, or the sensitivities or trials are refused.
        """
        check_unused(folder)
        sensitivities = None
        if task.config.sensitivity is not None:
            sensitivities = task.read_sensitivities(Path(task.config.sensitivity))
        if known is None and task.config.trials is not None:
            known = known_trials.read(task.config.trial_folders, task)
        folder.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {
            "schema": RUN_SCHEMA,
            "command": task.config.command(),
            "settings": task.config.to_dict(),
            "signature": task.signature(),
            "versions": versions(task.network.device),
        }
        if searches:
            content["searches"] = searches
        run = cls(folder, task.config)
        if known is not None and task.config.trials is not None:
            # Before the file that says that there is a run: the folders they are from may be gone when it goes on.
            write_trials(folder / TRIALS, known.trials, task.problem)
        ConfigRecord.from_dict(content).write(folder / CONFIG)
        run._write_problem(task)
        history.write(
            folder / HISTORY,
            others=other_metrics(task.problem),
            tells_images=run._may_race(task.problem),
            tells_keep=is_joint(task.problem),
        )
        if sensitivities is not None:
            run.save_sensitivities(sensitivities, task)
        return run

    @classmethod
    def load(cls, folder: Path, device: str | None = None) -> SearchRun:
        """Open a folder.

        Args:
            folder: The folder of a run.
            device: Where its networks are to be run; None for where they were.

        Returns:
            The run.

        Raises:
            ValueError: With the reason, if it isn't a run's, and for a device that isn't here.
        """
        record = ConfigRecord.read(folder / CONFIG)
        try:
            config = SearchConfig.read(record.settings)
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG} is not the configuration of a run: {error}") from error
        if device is not None:
            find_device(device)
            config = config.replace(device=device)
        return cls(folder, config)

    @property
    def finished(self) -> bool:
        """Tell whether the search has come to its end."""
        return os.path.lexists(self.folder / RESULT)

    @property
    def is_behind(self) -> bool:
        """Tell whether some of an interrupted search's history is still to be met again."""
        return bool(self._expected)

    @property
    def go_on(self) -> str:
        """Return the command that goes on with the search."""
        return command_line("python", "-m", "haq.search", "--resume", self.folder, *self.config.trust_words())

    def build(self, **callbacks: Any) -> SearchTask:
        """Load what this run was asked for, where it began.

        Args:
            callbacks: Those of `hw_models.load_target`.

        Returns:
            Network, data and problem.

        Raises:
            ValueError: Before anything is measured, if latencies were measured on another machine.
            FileNotFoundError: If a file that it was asked for with isn't here.
        """
        self._check_files("network", "data", "hw")
        target = load_target(self.config, **callbacks)
        path = self.folder / CONFIG
        before = _machine(path, ConfigRecord.read(path).signature)
        now = _machine(path, machine_signature(target))
        if before != now:
            name = next(name for name in {**before, **now} if before.get(name) != now.get(name))
            raise ValueError(
                f"{self.folder} began with latencies measured with {name} {before.get(name)}, here it is {now.get(name)}: "
                "go on where it began, or start a new run"
            )
        return SearchTask.build(self.config, target, callbacks.get("progress", no_progress))

    def read_agent(self) -> AgentFile | None:
        """Read the agent that this run was asked for with, if any; raises what `haq.study.task.read_agent` does."""
        self._check_files("agent")
        return read_agent(self.config, [self.config.solver])

    def load_network(self) -> LoadedNetwork:
        """Load the network and data that this run was asked for; ValueError or FileNotFoundError if they aren't here."""
        self._check_files("network", "data")
        return LoadedNetwork.load(self.config)

    def _check_files(self, *names: str) -> None:
        """Raise FileNotFoundError, saying where it is looked for, if a file that settings name isn't here; or their device."""
        find_device(self.config.device, f"the device of {self.folder}")
        for name, path in self.config.files().items():
            if name in names and not path.exists():
                where = "" if path.is_absolute() else f" in {Path.cwd()}: paths are relative to where the search was started"
                raise FileNotFoundError(
                    f"{self.folder} was asked for with --{name} {getattr(self.config, name)}, and there is no {path}"
                    f"{where}; go on from there, or put it here"
                )
        self.config.check_code(self.folder / CONFIG)

    def check(self, task: LoadedNetwork, *, same_versions: bool = False) -> None:
        """Check that network, data and target (of a task) are what the run began with, and its policy of this network.

        Raises ValueError, with what to do, if they aren't; with `same_versions` also if the versions aren't, on which results
        depend to the last bit.
        """
        began = ConfigRecord.read(self.folder / CONFIG)
        options = {"target": "hw", "machine": "hw", "criterion": "criterion_name"}
        signature = task.signature()
        called = {name: f"{name} ({getattr(self.config, options.get(name, name))})" for name in signature}
        check_signature(self.folder, began.signature, signature, called)
        if same_versions:
            check_versions(self.folder, began.versions, task.network.device)
        if isinstance(task, SearchTask) and (self.folder / PROBLEM).exists():
            self._check_objective(task.problem.objective)
        if (self.folder / POLICY).exists():
            self.check_policy(self.load_policy(), task, self.folder / POLICY)

    def _check_objective(self, objective: Objective) -> None:
        """Raise ValueError if an objective says another direction or unit than when the run began."""
        began = self.load_problem()
        directions = {True: "larger values are better", False: "smaller values are better"}
        if began.higher_is_better != objective.higher_is_better:
            was, now = directions[began.higher_is_better], directions[objective.higher_is_better]
        elif began.objective_unit != objective.unit:
            was, now = f"its unit is {began.objective_unit!r}", f"it is {objective.unit!r}"
        else:
            return
        raise ValueError(
            f"objective {objective.name!r} said that {was} when {self.folder} began, and says now that {now}: put it back, or "
            "start a new run"
        )

    def schemes(self, layer_names: Sequence[str], scheme: str | None = None) -> dict[str, Q.Scheme]:
        """Find the schemes by which the run's network is quantized: those asked for, as far as its hardware has them.

        The hardware is loaded only if the schemes that are asked for aren't what the run began with as they are.

        Args:
            layer_names: The layers, in the order in which they are called.
            scheme: Another scheme than the run's own; None for that.

        Returns:
            A scheme by layer.

        Raises:
            ValueError: As `schemes_of` and `obeying` do, and if the hardware wants something else than when the run began.
        """
        began = ConfigRecord.read(self.folder / CONFIG).signature.get("scheme")
        if scheme is not None:
            asked = schemes_of(self.config.replace(scheme=scheme), layer_names)
            return obeying(asked, load_target(self.config))
        asked = schemes_of(self.config, layer_names)
        if signature_of_schemes(asked) == began:
            return asked
        made = obeying(asked, load_target(self.config))
        if signature_of_schemes(made) != began:
            raise ValueError(
                f"the scheme ({self.config.scheme}), as {self.config.hw} has it, is no longer what {self.folder} began with: "
                "put the hardware back, or start a new run"
            )
        return made

    def check_policy(self, policy: Q.BitPolicy, task: LoadedNetwork, source: Path) -> Q.BitPolicy:
        """Check that a policy gives bits to the layers of the run's network.

        Args:
            policy: The policy.
            task: The run's network, or its search.
            source: The file that the policy is from, for messages.

        Returns:
            The policy itself.

        Raises:
            ValueError: If it is of another network, has a layer at widths that the run's target can't do, or keeps a share of
                channels that isn't searched.
        """
        if isinstance(task, SearchTask):
            layers = set(task.problem.workload.names)
        else:
            layers = set(Q.BitPolicy.uniform(task.network.module, w=8, a=8)) & set(policy)
        wrong = sorted(set(policy) ^ layers)
        if wrong:
            raise ValueError(
                f"{source} is of another network than {task.network.name}: layer {wrong[0][:60]!r} is in one of the two only; "
                f"so are {len(wrong)} in all"
            )
        if isinstance(task, SearchTask):
            _check_can_be_done(policy, task.problem, source)
            check_keep(policy, task.problem, source)
        elif (self.folder / PROBLEM).exists():
            # Nothing is priced here, and the run says what could be.
            self.load_problem().check_policy(policy, source)
            self.load_problem().check_keep(policy.keep, source)
        return policy

    def prepare_resume(self, problem: Problem) -> int:
        """Give the problem what was evaluated before; returns how many evaluations that saves.

        What was cut short is no answer to whoever asks for the policy: only the same solver is told it again.
        """
        path = self.folder / HISTORY
        self._expected = []
        self._recorded = {}
        self._tells_images = self._may_race(problem)
        if path.exists():
            limits = history.Limits.of(objective_of(problem))
            self._expected = history.read(path, len(problem.workload), limits, other_metrics(problem), group_count(problem))
            self._tells_images = history.tells_images(path)
        names, groups = problem.workload.names, group_names(problem)
        for solver, policy, evaluation in known_trials.of_rows(self._expected, names, problem, groups):
            self._recorded.setdefault(solver, {})[policy] = evaluation
            if evaluation.images == problem.evaluator.count:
                problem.evaluator.cache[policy] = evaluation
        # Without the line that was being written when the run was killed.
        history.write(path, self._expected, other_metrics(problem), self._tells_images, is_joint(problem))
        return len(self._expected)

    def _may_race(self, problem: Problem) -> bool:
        """Say whether evaluations of a new run may end early: if its solver and its problem allow it, and it is wanted."""
        solver = find_solver(self.config.solver)
        if self.config.env != PLAN and getattr(solver, "takes_agent", False):
            return False  # HAQ evaluates all that it plays whole
        may = getattr(solver, "races", False) and self.config.race is not False
        return bool(may and problem.evaluator.races and problem.goal.kind != TRADEOFF)

    @property
    def races(self) -> bool:
        """Say whether evaluations may end early: if the history has a column for that, as those of earlier versions hadn't."""
        if self._tells_images is None:
            self._tells_images = history.tells_images(self.folder / HISTORY)
        return self._tells_images

    def complete(self, task: SearchTask) -> None:
        """Write what a kill, just as the folder was made, has left out."""
        if not (self.folder / PROBLEM).exists():
            self._write_problem(task)

    def record(self, solver: str, evaluation: int, trial: Trial, problem: Problem, best: Trial | None = None) -> None:
        """Append one evaluation to the history, and show it to TensorBoard unless it is another search's.

        Args:
            solver: Who asked for it.
            evaluation: Its number, from 1.
            trial: The policy with what it gives and costs.
            problem: What is searched.
            best: The best so far.

        Raises:
            ValueError: If an interrupted search goes on otherwise than its history says.
        """
        row = history_row(solver, evaluation, trial, problem)
        if self._expected:
            if self._expected[0].line(True) == row.line(True):
                self._met.append(self._expected.pop(0))
                return
            self._leave_history(self._expected[0], row, problem)
        history.append(self.folder / HISTORY, row, self.races)
        if solver != SHARED:
            self._show(row, problem, best)

    def close(self) -> None:
        """Close what TensorBoard reads."""
        if self._writer:
            self._writer.close()

    def search(
        self,
        task: SearchTask,
        solver: str,
        sensitivities: Sensitivities | None = None,
        on_evaluation: Callable[[int, Trial, Trial | None], None] = lambda count, trial, best: None,
        problem: Problem | None = None,
    ) -> Session:
        """Run a solver, with every evaluation written down, and, if the run is this solver's, its best policy kept on disk.

        Args:
            task: What is searched.
            solver: Its name.
            sensitivities: What it need not measure.
            on_evaluation: Told the number of evaluations, the last one, and the best policy so far.
            problem: What the solver searches, if that is a part of the task's problem only; it must share its evaluations.

        Returns:
            The session, with what was found: nothing, if a rival found no policy that is good enough.
        """
        mine = solver == self.config.solver

        def record(trial: Trial) -> None:
            if mine and trial is session.best and not self._expected:  # what is met again may still be refused
                self.save_policy(trial.policy)
            self.record(solver, session.used, trial, task.problem, session.best)
            on_evaluation(session.used, trial, session.best)

        asked = {name: getattr(self.config, name) for name in ("evaluations", "seed", "env", "ahead")}
        session = Session(
            problem or task.problem,
            task.evaluations,
            record,
            sensitivities,
            self.config.sensitivity_kind,
            lambda measured: self.save_sensitivities(measured, task),
            known=self._known_by(solver, task.problem),
            env=self.config.env,
            ahead=self.config.ahead,
            checkpoint=self.checkpoint(solver, task, **asked),
            confirm=task.confirm,
            race=self.races,
            recorded=self.recorded(solver),
        )
        if mine:
            session.agent = task.agent
        try:
            found = solve(find_solver(solver, mine and self.config.iterate), session, self.config.seed)
        except ValueError:
            # What the run's own solver found isn't lost for a rival that found nothing good enough.
            if mine or not _found_nothing(session):
                raise
            return session
        if mine:
            self.save_policy(found.policy)
        return session

    def recorded(self, solver: str) -> dict[Q.BitPolicy, Evaluation]:
        """Return what a solver was told before the search was interrupted, by policy."""
        return self._recorded.get(solver, {})

    def _known_by(self, solver: str, problem: Problem) -> list[tuple[Q.BitPolicy, Evaluation]]:
        """Return what a solver is told of earlier searches: rivals, which the run's own is held against, nothing."""
        if solver != self.config.solver:
            return []
        return self.known(problem).pairs

    def checkpoint(self, name: str, task: SearchTask, **asked: Any) -> Checkpoint:
        """Return where something of this run, asked for in that way, keeps what it goes on with.

        Args:
            name: Of the file.
            task: The search.
            **asked: What else must be the same to go on with it.

        Returns:
            The file, which may not be there yet.
        """
        belongs = task.signature() | versions(task.network.device) | {key: str(value) for key, value in asked.items()}
        return Checkpoint(self._state(name), belongs)

    def drop_checkpoint(self, name: str) -> None:
        """Delete what `checkpoint` kept, once it has come to its end."""
        self._state(name).unlink(missing_ok=True)

    def sensitivities(self, task: SearchTask) -> Sensitivities | None:
        """Return what the run's solvers need not measure.

        That is what it was given (once it is there, the copy in its folder), or what costs no evaluation; None if they are to
        measure themselves.
        """
        if self.config.sensitivity is not None:
            source = self.folder / SENSITIVITY
            if not source.exists():
                source = Path(self.config.sensitivity)
            return task.read_sensitivities(source)
        known = computed(task.problem, self.config.sensitivity_kind)
        if known is not None:
            self.save_sensitivities(known, task)
        return known

    def known(self, problem: Problem) -> KnownTrials:
        """Return the trials of earlier searches that the run was given: what stands in its folder."""
        if self.config.trials is None:
            return KnownTrials()
        return read_trials(self.folder / TRIALS, problem)

    def save_sensitivities(self, measured: Sensitivities, task: SearchTask) -> None:
        """Write sensitivities, unless a solver before knew more of them."""
        if measured.known > self._known:
            signed(measured, task.network_signature()).to_json(self.folder / SENSITIVITY)
            self._known = measured.known

    def save_policy(self, policy: Q.BitPolicy) -> None:
        """Write the best policy so far."""
        PolicyRecord.of(policy).write(self.folder / POLICY)

    def load_policy(self) -> Q.BitPolicy:
        """Read the best policy so far.

        Raises:
            FileNotFoundError: If there is none yet.
        """
        path = self.folder / POLICY
        if not path.exists():
            raise FileNotFoundError(f"{self.folder} has no {POLICY}: nothing was found yet; {self.go_on}")
        return policy_of(PolicyRecord.read(path))

    def save_result(self, result: ResultRecord) -> None:
        """Write what was found; the run is finished then."""
        result.write(self.folder / RESULT)

    def load_result(self) -> ResultRecord:
        """Read what was found.

        Raises:
            FileNotFoundError: If the run isn't finished.
        """
        if not self.finished:
            raise FileNotFoundError(f"{self.folder} is not finished: {self.go_on}")
        return ResultRecord.read(self.folder / RESULT)

    def is_found(self, result: ResultRecord, policy: Q.BitPolicy) -> bool:
        """Tell whether a policy is the one that a result was measured of, as far as the result says."""
        return result.policy is None or policy == policy_of(result.policy)

    def check_found(self, result: ResultRecord, policy: Q.BitPolicy) -> None:
        """Raise ValueError if what was measured in the end was another policy than the one that policy.json has now.

        Args:
            result: What was found, as result.json has it.
            policy: The policy of policy.json.
        """
        if result.policy is not None:
            measured = policy_of(result.policy)
            remedy = f"use {self._finetune_command}, which measures it"
            check_same_policy(self.folder / POLICY, policy, self.folder / RESULT, measured, remedy)

    def load_problem(self) -> ProblemRecord:
        """Read what is searched."""
        return ProblemRecord.read(self.folder / PROBLEM)

    def save_checkpoint(self, qnetwork: nn.Module, task: LoadedNetwork, name: Path = CHECKPOINT) -> Path:
        """Write a quantized network into the folder: weights, scales and bits.

        Args:
            qnetwork: The network.
            task: What the run is of.
            name: The file, relative to the run's folder.

        Returns:
            The file's path.
        """
        path = self.folder / name
        networks.save_quantized(path, qnetwork, task.network, _notes(task))
        return path

    def load_checkpoint(self, task: LoadedNetwork, name: Path = CHECKPOINT) -> nn.Module | None:
        """Load the fine-tuned network of this run.

        Args:
            task: What the run is of.
            name: The file, relative to the run's folder.

        Returns:
            The network, in evaluation mode; None if there is no such file.

        Raises:
            ValueError: If it is of another problem, damaged, or doesn't fit the run's network in every tensor; for the network
                that was fine-tuned also if its bits aren't those of policy.json.
        """
        path = self.folder / name
        if not path.exists():
            return None
        # Weights, scales, and what schemes keep: never several times the network.
        held = sum(tensor.numel() * tensor.element_size() for tensor in task.network.module.state_dict().values())
        files.check_file(path, 4 * held + 2**24)
        header = networks.read_header(path)
        remedy = f"delete it and use {self._finetune_command}"
        if header.notes.get("format") != networks.QUANTIZED_FORMAT:
            try:
                networks.load_quantized(path, task.network.module)  # says what it is, or of which version
            except trust.UntrustedError:
                raise
            except ValueError as error:
                raise ValueError(f"{path} is not a checkpoint of this run ({error}): {remedy}") from error
            raise ValueError(f"{path} is not a checkpoint of this run: {remedy}")
        if any(header.notes.get(key) != value for key, value in _notes(task).items()):
            raise ValueError(f"{path} is not a checkpoint of this run: {remedy}")
        try:
            qnetwork = networks.load_quantized(path, task.network.module)
            self.check_policy(Q.get_policy(qnetwork), task, path)
        except trust.UntrustedError:
            raise
        except ValueError as error:
            raise ValueError(f"{path} doesn't hold the network of this run ({error}): {remedy}") from error
        if name == CHECKPOINT:
            remedy = f"delete {path} and use {self._finetune_command}"
            check_network(self.folder / POLICY, self.load_policy(), path, qnetwork, remedy)
        return qnetwork

    @property
    def _finetune_command(self) -> str:
        return command_line("python", "-m", "haq.finetune", self.folder)

    def _state(self, name: str) -> Path:
        return self.folder / CHECKPOINT.parent / f"{name}.state"

    def _write_problem(self, task: SearchTask) -> None:
        ProblemRecord.from_dict(task.outline()).write(self.folder / PROBLEM)

    def _leave_history(self, before: HistoryRow, row: HistoryRow, problem: Problem) -> None:
        """Go on otherwise than an interrupted search began, if an agent's checkpoint allows it; ValueError if not."""
        if not self._state(row.solver).is_file():
            raise ValueError(
                f"{self.folder} can't be resumed: evaluation {row.evaluation} of {row.solver} came out as {_short(row)}, "
                f"its history has {_short(before)}. Start a new run"
            )
        # On another kind of processor, floats differ in their last bits, and an agent goes another way from its checkpoint
        # on, which is behind by the episodes it was at.
        logger.warning(
            f"{row.solver} goes on from evaluation {row.evaluation} otherwise than it had begun: another processor?"
        )
        self._expected = []
        history.write(self.folder / HISTORY, self._met, other_metrics(problem), self.races, is_joint(problem))

    def _show(self, row: HistoryRow, problem: Problem, best: Trial | None) -> None:
        """Show an evaluation to TensorBoard, if it is there, with the best so far and the time left."""
        writer = self._events()
        if not writer:
            return
        solver, evaluation = row.solver, row.evaluation
        writer.add_scalar(f"{solver}/accuracy", row.accuracy, evaluation)
        writer.add_scalar(f"{solver}/loss", row.loss, evaluation)
        writer.add_scalar(f"{solver}/{problem.metric}_{problem.unit}", row.cost, evaluation)
        for limit, cost in zip(problem.limits[1:], row.others, strict=True):
            writer.add_scalar(f"{solver}/{limit.metric}_{limit.unit}", cost, evaluation)
        if problem.limits[0].is_given:
            writer.add_scalar(f"{solver}/share_of_budget", row.cost / problem.limit, evaluation)
        if best is not None:
            writer.add_scalar(f"{solver}/best_accuracy", best.accuracy, evaluation)
        first, began = self._began.setdefault(solver, (evaluation, time.monotonic()))
        if evaluation > first:
            rate = (time.monotonic() - began) / (evaluation - first)
            left = (self.config.evaluations or evaluation) - evaluation
            writer.add_scalar(f"{solver}/seconds_left", rate * left, evaluation)

    def _events(self) -> Any:
        if self._writer is None and has_tensorboard():
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self.folder))  # type: ignore[no-untyped-call]
        return self._writer


def _found_nothing(session: Session) -> bool:
    """Tell whether a solver did what it could, and no policy that it tried is good enough."""
    return session.problem.goal.kind == CHEAPEST and session.best is None and session.failure is None


def policy_of(record: PolicyRecord) -> Q.BitPolicy:
    """Return the policy of a record, with what it keeps of channels."""
    return Q.BitPolicy(record.widths(), record.kept)


def check_same_policy(path: Path, policy: Q.BitPolicy, other: Path, its: Q.BitPolicy, remedy: str) -> None:
    """Raise ValueError, naming the first layer or group of channels that differs, unless two files have the same policy.

    Args:
        path: The file of the policy.
        policy: The policy.
        other: The file that must have the same.
        its: The policy that it has.
        remedy: What to do but put the first file back.
    """
    differing = [name for name in (*policy, *its) if policy.get(name) != its.get(name)]
    if not differing:
        _check_same_keep(path, policy.keep, other, its.keep, remedy)
        return
    name = differing[0]
    raise ValueError(
        f"{path} has {_widths(policy.get(name))} bits for layer {name[:60]!r}, {other} is of {_widths(its.get(name))}: put "
        f"{path.name} back as it was, or {remedy}"
    )


def check_network(path: Path, policy: Q.BitPolicy, other: Path, qnetwork: nn.Module, remedy: str) -> None:
    """Raise ValueError, naming what differs, unless the network of a file has the bits and channels of a policy.

    Args:
        path: The file of the policy.
        policy: The policy.
        other: The file of the network.
        qnetwork: The network.
        remedy: What to do but put the first file back.
    """
    check_same_policy(path, policy.with_keep(None), other, Q.get_policy(qnetwork), remedy)
    try:
        check_keeps(qnetwork, policy)
    except ValueError as error:
        raise ValueError(f"{path} and {other}: {error}; put {path.name} back as it was, or {remedy}") from error


def _check_same_keep(path: Path, keep: Mapping[str, float], other: Path, its: Mapping[str, float], remedy: str) -> None:
    """Raise ValueError, naming the first group of channels that differs, unless two files keep the same of all groups."""
    differing = [name for name in (*keep, *its) if keep.get(name) != its.get(name)]
    if not differing:
        return
    name = differing[0]
    shares = (keep.get(name, 1.0), its.get(name, 1.0))
    mine, others = (history.share_words(share) for share in shares)
    raise ValueError(
        f"{path} keeps {mine} of group {name[:60]!r} of channels, {other} is of {others}: put {path.name} back as it was, or "
        f"{remedy}"
    )


def _check_can_be_done(policy: Q.BitPolicy, problem: Problem, source: Path) -> None:
    """Raise ValueError, naming the layer and what is possible, for widths that a target can't do.

    Args:
        policy: The widths of all layers of the problem.
        problem: What they are of.
        source: The file that the policy is from, for messages.
    """
    table = problem.table
    for index, name in enumerate(problem.workload.names):
        w, a = policy[name]
        if not table.supported[index, place_of(w), place_of(a)]:
            raise ValueError(
                f"{source} has layer {name[:60]!r} at {pair_words(w, a)} (weights/activations), which {problem.target.name} "
                f"can't do; it can do {describe_pairs(table.pairs_of(index))}"
            )


def other_metrics(problem: Problem) -> tuple[str, ...]:
    """List the metrics that are limited beside the main one, in the order in which a history tells what they cost."""
    return tuple(limit.metric for limit in problem.limits[1:])


def _widths(bits: tuple[int | None, int | None] | None) -> str:
    """Write the bits of a layer into a message: weights/activations."""
    if bits is None:
        return "no"
    return pair_words(*bits)


def has_tensorboard() -> bool:
    """Tell whether events can be written for TensorBoard."""
    return importlib.util.find_spec("tensorboard") is not None


def check_unused(folder: Path) -> None:
    """Raise ValueError if a folder is in use, or can't be made."""
    check_can_be_made(folder)
    if _holds_something(folder):
        remedy = ""
        if (folder / CONFIG).is_file() and not (folder / RESULT).is_file():
            remedy = f"go on with it by {command_line('--resume', folder)}, or "
        raise ValueError(f"{folder} is in use and is not overwritten: {remedy}name another with --out")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, not a folder: name another with --out")


def default_folder(config: SearchConfig) -> Path:
    """Name a folder under runs/ that says what is in it and isn't in use."""
    hw = config.hw
    if not hw.startswith("rpc:"):
        hw = Path(hw).stem
    name = "-".join([hw, *_question(config), config.solver, f"seed{config.seed}"])
    return unused_folder(name.replace(":", "-"))


def _question(config: SearchConfig) -> list[str]:
    """Say what is asked for of costs and values, word by word."""
    words = [config.metric]
    for metric, limit in config.budgets().items():
        if metric != config.metric:
            words.append(metric)
        words.append(limit)
    for name in ("max_drop", "at_least", "tradeoff", "prune"):
        value = getattr(config, name)
        if value is not None:
            words += [name.replace("_", "-"), str(value)]
    return words


def unused_folder(name: str) -> Path:
    """Name a folder under runs/, with a number if there is one of that name already."""
    base = Path("runs") / name
    folder, number = base, 2
    while folder.exists() and (not folder.is_dir() or _holds_something(folder) or is_held(folder)):
        folder = base.with_name(f"{base.name}-{number}")
        number += 1
    return folder


def _holds_something(folder: Path) -> bool:
    """Tell whether there is more in a folder than what a process leaves that is killed while it makes it."""
    return folder.is_dir() and any(path.name not in files.LEFTOVERS for path in folder.iterdir())


def history_row(solver: str, evaluation: int, trial: Trial, problem: Problem) -> HistoryRow:
    """Make the row of a trial.

    Args:
        solver: Who asked for it.
        evaluation: Its number, from 1.
        trial: The policy with what it gives and costs.
        problem: What is searched.

    Returns:
        The row.
    """
    weight_bits, activation_bits = problem.bit_arrays(trial.policy)
    images = None
    if not trial.whole:
        images = trial.evaluation.images
    return HistoryRow(
        solver,
        evaluation,
        tuple(map(int, weight_bits)),
        tuple(map(int, activation_bits)),
        trial.accuracy,
        trial.loss,
        trial.cost,
        trial.feasible,
        trial.evaluation.divergence,
        tuple(problem.costs(trial.policy).values())[1:],
        images,
        kept_shares(problem, trial.policy),
    )


def known_rows(known: Iterable[KnownTrial], problem: Problem) -> list[HistoryRow]:
    """Write trials as the rows of a history, at what they cost here.

    Args:
        known: The trials.
        problem: What is searched with them.

    Returns:
        The rows; those of each solver are numbered from 1.
    """
    numbers: Counter[str] = Counter()
    found = []
    for solver, policy, evaluation in known:
        numbers[solver] += 1
        found.append(history_row(solver, numbers[solver], Trial.of(problem, policy, evaluation), problem))
    return found


def write_trials(path: Path, known: Iterable[KnownTrial], problem: Problem) -> None:
    """Write trials of earlier searches into a file, as a history has them.

    Args:
        path: The file.
        known: The trials.
        problem: What is searched now.
    """
    history.write(path, known_rows(known, problem), other_metrics(problem), tells_keep=is_joint(problem))


def read_trials(path: Path, problem: Problem) -> KnownTrials:
    """Read what `write_trials` wrote, for the same network and metrics; ValueError for anything else."""
    limits = history.Limits.of(objective_of(problem))
    rows = history.read(path, len(problem.workload), limits, other_metrics(problem), group_count(problem))
    return KnownTrials(tuple(known_trials.of_rows(rows, problem.workload.names, problem, group_names(problem))))


def _short(row: HistoryRow) -> str:
    """Write an evaluation into a message."""
    widths = ["-".join(map(width_words, bits)) for bits in (row.weight_bits, row.activation_bits)]
    if row.keep:
        widths.append("-".join(map(history.share_words, row.keep)))
    return f"{[*widths, repr(row.accuracy), repr(row.loss)]}"


def _notes(task: LoadedNetwork) -> dict[str, str]:
    """Return what a checkpoint's header says of the run that it belongs to; which schemes it has, it says itself."""
    return {f"run.{name}": value for name, value in task.signature().items() if name != "scheme"}


def _machine(path: Path, signature: dict[str, str]) -> dict[str, Any]:
    """Return the machine of a signature, by its parts; none for a target that is computed."""
    try:
        found = json.loads(signature.get("machine", "{}"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not the configuration of a run: its signature's machine is not JSON")
    return found
