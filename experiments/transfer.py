"""What an agent that was trained on other problems is worth on a new one.

    python -m experiments.transfer [--problems NAME ...] [--seeds N] [--solver NAME] [--episodes N] [--synthetic N] [--quick]

RAMP (Gautam and Jha, arXiv 2603.17891, 2026) trains a SAC agent, which sees 11 features of a layer, on Llama 2 7B, and reports
that it does well on Llama 2 13B and Mistral 7B without training there, "often surpassing target-specific training". Ours is
trained on enumerated problems (`haq.problem.table_file`), at random budgets and on random hardware, and on made-up ones
(`haq.problem.synthetic`), and judged on the problems of the one network that was left out; `plain` and `low` are one network.

Regret: accuracy of the best policy within the budget minus that of the best found, in points, on the images that judged both;
the mean over seeds, and its standard error. Every seed is an agent trained anew, every allowance a search of its own.

    0 evaluations    what the agent does without noise; the plan's optimum for the calibration errors, which costs no
                     evaluation either, and is the first policy that `surrogate` evaluates
    10, 25, 50       searches that may evaluate so many policies; those of a pretrained agent begin with what it does

The claim of zero-shot transfer holds for us if the pretrained agent's policy, without any evaluation, is not worse than what
the same agent finds that begins with nothing and may evaluate 50. We ask besides whether it is better than the plan, which
needs no agent, and whether searches that start from it find more than those that don't. What doesn't hold is printed like what
does.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table

import envs
from experiments import shared
from haq.console.errors import run_command
from haq.problem.synthetic import Drawn
from haq.problem.table_file import read, shipped
from haq.problem.tabular import TabularProblem
from haq.solvers import actor, pretraining, random_search
from haq.solvers.agent_file import AgentFile, networks_of
from haq.solvers.base import Session, solve
from haq.store.records import AgentRecord

NAME = "transfer"
FOLDER = Path("docs/experiments")
ALLOWED = (10, 25, 50)
SAME = {"low": "plain"}  # problems of one network: none of them is trained on where the other is judged
PLAN, PRETRAINED, UNTRAINED = "plan's optimum", "pretrained", "untrained"
COLUMNS = ("problem", "who", "0", *map(str, ALLOWED))


class Outcome(NamedTuple):
    """One search, or one policy that no evaluation was used for."""

    problem: str
    who: str
    evaluations: int
    seed: int
    regret: float  # points
    seconds: float


def network_of(table: str) -> str:
    return SAME.get(table, table)


def judged(problem: TabularProblem, options: Sequence[int]) -> float:
    """Tell the regret of an option for each decision, in points."""
    policy = random_search.policy(problem, list(options))
    return 100 * (problem.best_value - problem.evaluate(policy).value)


def planned(problem: TabularProblem) -> list[int]:
    """Plan for the calibration errors alone."""
    episodes = envs.Episodes(problem)
    episodes.begin(1)
    while not episodes.is_over:
        episodes.take(episodes.planned())
    chosen: list[int] = episodes.options[0].tolist()
    return chosen


def untrained(kind: str, seed: int) -> AgentFile:
    """Make an agent as a search without a pretrained one begins with it."""
    with actor.kept_random_state():
        made = actor.make_agent(kind, actor.NoProblem(), seed)
        actor.blind(made)
    features = list(envs.FEATURES)
    record = AgentRecord(kind=kind, features=features, hidden=actor.HIDDEN, trained_on=[], episodes=0, seed=seed)  # type: ignore[arg-type]
    return AgentFile(record, networks_of(made))


def searched(
    problem: TabularProblem, solver: str, evaluations: int, seed: int, agent: AgentFile | None
) -> tuple[float, float]:
    """Search; returns the regret in points and the seconds."""
    start = time.perf_counter()
    session = Session(problem, evaluations, agent=agent)
    solve(solver, session, seed)
    assert session.best is not None
    return 100 * (problem.best_value - session.best.value), time.perf_counter() - start


def problems_of(name: str) -> list[tuple[str, TabularProblem]]:
    file = read(name)
    return [(f"{file.name}, budget {budget}", TabularProblem(file, budget)) for budget in file.limits]


def outcomes_of(name: str, seed: int, kind: str, agent: AgentFile) -> list[Outcome]:
    """Judge everybody on the problems of one table, with one seed."""
    found = []
    for title, problem in problems_of(name):
        for who, made in ((PRETRAINED, agent), (UNTRAINED, untrained(kind, seed))):
            regret = judged(problem, pretraining.zero_shot(problem, made))
            found.append(Outcome(title, who, 0, seed, regret, 0.0))
        if seed == 0:
            found.append(Outcome(title, PLAN, 0, seed, judged(problem, planned(problem)), 0.0))
        for evaluations in ALLOWED:
            runs = [(PRETRAINED, kind, agent), (UNTRAINED, kind, None), ("surrogate", "surrogate", None)]
            if seed == 0:
                runs.append(("ilp", "ilp", None))  # nothing in it is random
            for who, solver, start in runs:
                found.append(Outcome(title, who, evaluations, seed, *searched(problem, solver, evaluations, seed, start)))
    return found


# What is printed


def mean_of(outcomes: Sequence[Outcome], problem: str, who: str, evaluations: int) -> tuple[float, float | None]:
    """Return the mean regret over seeds and its standard error; NaN where there is none."""
    regrets = [o.regret for o in outcomes if (o.problem, o.who, o.evaluations) == (problem, who, evaluations)]
    if not regrets:
        return float("nan"), None
    if len(regrets) == 1:
        return regrets[0], None
    return statistics.mean(regrets), statistics.stdev(regrets) / len(regrets) ** 0.5


def rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    made = []
    names = list(dict.fromkeys(o.who for o in outcomes))
    order = [name for name in (PRETRAINED, UNTRAINED, "surrogate", "ilp", PLAN) if name in names]
    problems = list(dict.fromkeys(o.problem for o in outcomes))
    for problem in problems:
        for who in order:
            cells = [written(*mean_of(outcomes, problem, who, evaluations)) for evaluations in (0, *ALLOWED)]
            made.append([problem, who, *cells])
    for who in order:
        cells = []
        for evaluations in (0, *ALLOWED):
            means = [mean_of(outcomes, problem, who, evaluations)[0] for problem in problems]
            cells.append(written(float(np.mean(means)), None))
        made.append(["mean", who, *cells])
    return made


def written(mean: float, error: float | None) -> str:
    if mean != mean:
        return "–"
    if error is None:
        return f"{mean:.2f}"
    return f"{mean:.2f} ± {error:.2f}"


def difference(outcomes: Sequence[Outcome], one: tuple[str, int], other: tuple[str, int]) -> tuple[float, float]:
    """Return by how much the regret of one is larger: the mean over problems, and its standard error over these."""
    problems = list(dict.fromkeys(o.problem for o in outcomes))
    found = [mean_of(outcomes, p, *one)[0] - mean_of(outcomes, p, *other)[0] for p in problems]
    error = 0.0
    if len(found) > 1:
        error = statistics.stdev(found) / len(found) ** 0.5
    return statistics.mean(found), error


def claims(outcomes: Sequence[Outcome], kind: str) -> list[str]:
    made = []

    def say(holds: bool, claim: str, found: tuple[float, float]) -> None:
        words = f"difference of mean regret {found[0]:+.2f} ± {found[1]:.2f} points, the error over problems"
        made.append(f"{shared.verdict(holds)}: {claim} ({words})")

    found = difference(outcomes, (PRETRAINED, 0), (UNTRAINED, 50))
    say(
        found[0] <= found[1],
        f"zero-shot transfer: {kind}, trained on other networks, is without any evaluation not worse than the same agent that "
        "begins with nothing and evaluates 50 policies",
        found,
    )
    found = difference(outcomes, (PRETRAINED, 0), (PLAN, 0))
    say(found[0] < -found[1], "without any evaluation the pretrained agent is better than the plan's optimum", found)
    found = difference(outcomes, (PRETRAINED, 0), (UNTRAINED, 0))
    say(found[0] < -found[1], "without any evaluation the pretrained agent is better than an untrained one", found)
    for evaluations in ALLOWED:
        for other in (UNTRAINED, "surrogate"):
            found = difference(outcomes, (PRETRAINED, evaluations), (other, evaluations))
            say(
                found[0] < -found[1],
                f"with {evaluations} evaluations the search that starts from the pretrained agent is better than {other}",
                found,
            )
    return made


def save(folder: Path, command: str, about: Sequence[str], outcomes: Sequence[Outcome], made: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = [COLUMNS, ["---", "---", *["---:"] * (len(COLUMNS) - 2)], *rows(outcomes)]
    parts = [
        "# What an agent that was trained on other problems is worth on a new one",
        f"Made by `experiments/{NAME}.py`, which says what is compared and how; every search is in `{NAME}.csv`.",
        f"    {command}",
        "\n".join(f"* {line}" for line in about),
        "## What holds",
        "\n".join(f"* {line}" for line in made),
        "## Regret in points after so many evaluations, mean over seeds ± its standard error",
        "\n".join(f"| {' | '.join(line)} |" for line in table),
    ]
    (folder / f"{NAME}.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    with (folder / f"{NAME}.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Outcome._fields)
        writer.writerows(outcomes)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m experiments.{NAME}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", nargs="+", choices=shipped(), default=shipped(), metavar="NAME")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--solver", choices=("ddpg", "td3", "sac"), default="ddpg")
    parser.add_argument("--episodes", type=int, default=pretraining.EPISODES)
    parser.add_argument("--synthetic", type=int, default=64, metavar="N", help="problems that are made up")
    parser.add_argument("--quick", action="store_true", help="only see that it runs: one seed, few episodes; saves nothing")
    parser.add_argument("--out", type=Path, help=f"folder for page and table (default: {FOLDER})")
    options = parser.parse_args(arguments)
    if options.quick:
        options.seeds, options.episodes, options.synthetic = 1, 256, 2
    console = Console()
    if not sys.stdout.isatty():
        console = Console(width=130)
    torch.set_num_threads(1)
    out = shared.folder_for(options.out, options.quick, FOLDER)
    networks = list(dict.fromkeys(map(network_of, options.problems)))
    outcomes: list[Outcome] = []
    kept: list[str] = []
    for seed in range(options.seeds):
        words = [*options.problems, f"{pretraining.SYNTHETIC}:{options.synthetic}"]
        drawn: dict[str, list[Drawn]] = pretraining.read_problems(words, seed)
        for network in networks:
            others = {word: problems for word, problems in drawn.items() if network_of(word) != network}
            start = time.perf_counter()
            made = pretraining.pretrain(others, options.solver, episodes=options.episodes, seed=seed)
            seconds = time.perf_counter() - start
            gained = "; ".join(f"{row.word} {row.gained:+.2f}" for row in made.rows if not row.held_back)
            kept.append(f"seed {seed}, without {network}: kept after {made.kept_at:,} episodes ({gained}), {seconds:.0f} s")
            console.print(kept[-1], markup=False, highlight=False)
            for name in options.problems:
                if network_of(name) == network:
                    outcomes += outcomes_of(name, seed, options.solver, made.agent)
        if out is not None:
            # What takes long is kept as it goes.
            command = " ".join([f"python -m experiments.{NAME}", *sys.argv[1:]])
            about = [
                f"{options.solver}, seeds 0 to {seed}, {options.episodes:,} episodes of training on {len(networks) - 1} of "
                f"{len(networks)} networks and {options.synthetic} made-up problems; one thread",
                f"seconds per evaluation of searches with {max(ALLOWED)}: {per_evaluation(outcomes)}",
                *kept,
            ]
            save(out, command, about, outcomes, claims(outcomes, options.solver))
    table = Table(title="Regret in points after so many evaluations", box=box.SIMPLE_HEAD, pad_edge=False)
    shared.add_columns(table, COLUMNS, left=COLUMNS[:2])
    for row in rows(outcomes):
        table.add_row(*row)
    console.print(table)
    for line in claims(outcomes, options.solver):
        console.print(line, markup=False, highlight=False)
    if out is not None:
        console.print(f"written: {out / NAME}.md and .csv")
    return 0


def per_evaluation(outcomes: Sequence[Outcome]) -> str:
    """Say how many milliseconds an evaluation of the longest searches takes, by who searches."""
    most = max(ALLOWED)
    found = []
    for who in (PRETRAINED, UNTRAINED, "surrogate"):
        seconds = [o.seconds for o in outcomes if (o.who, o.evaluations) == (who, most)]
        found.append(f"{who} {statistics.median(seconds) / most:.3f}")
    return ", ".join(found)


if __name__ == "__main__":
    sys.exit(run_command(main))
