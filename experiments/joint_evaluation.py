"""What a policy of channels and widths costs to evaluate, and what its cost takes to look up.

    OMP_NUM_THREADS=1 python -m experiments.joint_evaluation

Policies are random in every group's channels and every layer's widths. An evaluation removes channels, takes the statistics of
norms anew, quantizes the smaller network and judges it on the search images; it is held against one of the float network on
these. Look-ups are of many policies at a time, all of whose layers have been priced before, and of new ones one by one. Times
are of the processor, medians over rounds in which both run once; ratios are what counts.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import haq
import quantizers as Q
from haq.problem.channels import ChannelProblem
from haq.study.config import SearchConfig
from haq.study.task import SearchTask

BAR_RATIO, BAR_US = 2.0, 20.0
TARGETS = ("edge", "bitfusion", "nvidia-a100")
LOOKED_UP = 20_000  # policies


def taken(run: Callable[[], object]) -> float:
    """The processor's seconds that something takes."""
    began = time.process_time()
    run()
    return time.process_time() - began


def drawn(problem: ChannelProblem, draws: np.random.Generator) -> Q.BitPolicy:
    """A policy at random."""
    numbers = [int(draws.integers(len(decision.counts))) for decision in problem.channel_decisions]
    pairs = [decision.pairs[draws.integers(len(decision.pairs))] for decision in problem.decisions]
    return problem.decide(pairs, problem.keep_of(numbers))


def evaluations(problem: ChannelProblem, rounds: int) -> tuple[float, float]:
    """Seconds of the float network's evaluation and of a joint policy's."""
    draws = np.random.default_rng(0)
    problem.evaluate(drawn(problem, draws))
    of_float, of_policy = [], []
    for _ in range(rounds):
        policy = drawn(problem, draws)
        of_float.append(taken(lambda: problem.evaluator.measure(problem.network)))
        of_policy.append(taken(functools.partial(problem.evaluate, policy)))
    return statistics.median(of_float), statistics.median(of_policy)


def looked_up(problem: ChannelProblem) -> tuple[float, float]:
    """Microseconds of the look-up of one policy of many, and seconds until all of their layers are priced."""
    draws = np.random.default_rng(1)
    shape = (LOOKED_UP, len(problem.workload))
    counts = np.array([len(decision.counts) for decision in problem.channel_decisions])
    numbers: NDArray[np.int64] = draws.integers(counts, size=(LOOKED_UP, len(counts)))
    w, a = np.empty(shape, np.int64), np.empty(shape, np.int64)
    for decision in problem.decisions:
        chosen = decision.pairs[draws.integers(len(decision.pairs), size=LOOKED_UP)]
        w[:, decision.layers], a[:, decision.layers] = chosen[:, None].transpose(2, 0, 1)
    priced = taken(lambda: problem.totals(numbers, w, a))
    seconds = statistics.median(taken(lambda: problem.totals(numbers, w, a)) for _ in range(5))
    return 1e6 * seconds / LOOKED_UP, priced


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="of evaluations (default 9)")
    rounds = parser.parse_args().rounds
    console = Console()
    task = SearchTask.build(SearchConfig())
    plain = task.problem
    made = haq.Problem(
        plain.network, plain.calibration, plain.evaluator.samples, "edge", budget=0.3, prune="0.25:1", pinned=plain.pinned
    )
    assert isinstance(made, ChannelProblem)
    of_float, of_policy = evaluations(made, rounds)
    ratio = of_policy / of_float
    rows = [
        ["evaluation of the float network, 2,000 images", f"{of_float:.3f} s", "", ""],
        ["evaluation of a joint policy", f"{of_policy:.3f} s", f"{ratio:.2f} x", f"at most {BAR_RATIO:g} x"],
    ]
    for target in TARGETS:
        few = plain.calibration[0][:64]
        problem = haq.Problem(plain.network, few, few, target, budget=1.0, objective="agreement", prune="0.25:1")
        assert isinstance(problem, ChannelProblem)
        each, priced = looked_up(problem)
        rows.append(
            [f"look-up on {target}", f"{each:.1f} us", f"all layers priced in {priced:.1f} s", f"at most {BAR_US:g} us"]
        )
    table = Table("what", "takes", "", "bar", title="mobilenet-mini, the default job")
    for row in rows:
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
