"""Train the quantized network of a run back to its accuracy:  python -m haq.finetune RUN --epochs 20"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

import quantizers as Q
from haq import training
from haq.console import cli
from haq.store.lock import writing
from haq.store.records import ResultRecord
from haq.study import result as summary
from haq.study import tables
from haq.study.search_run import SearchRun
from haq.study.task import adversary_of


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m haq.finetune", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished search")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--learning-rate", type=float, default=0.005)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on with a fine-tuning that was interrupted, exactly")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout, all else on stderr")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        raise ValueError(f"--epochs is {options.epochs}; it must be at least 1")
    if not 0 < options.learning_rate < 10:
        raise ValueError(f"--learning-rate is {options.learning_rate}; it must be above 0 and below 10")
    with ExitStack() as held:
        return go(options, held)


def go(options: argparse.Namespace, held: ExitStack) -> int:
    """What is asked for; `held` holds the run's folder until the end."""
    console = Console(stderr=options.json)
    run = SearchRun.load(options.run)
    held.enter_context(writing(run.folder, f"python -m haq.finetune {run.folder} --epochs {options.epochs}"))
    result, policy = run.load_result().to_dict(), run.load_policy()
    with cli.follow_loading(console, "loading network and data") as follow:
        task = run.build(**follow)
    run.check(task)
    asked = {"epochs": options.epochs, "learning rate": options.learning_rate, "seed": options.seed, "policy": policy}
    state = run.checkpoint("finetune", task, **asked)
    if state.path.exists() and not options.resume:
        raise ValueError(f"{state.path} holds an interrupted fine-tuning: add --resume to go on with it, or delete it")
    network = task.problem.evaluator.network
    Q.set_policy(network, policy)
    try:
        with cli.progress(console) as bar:
            tuned = training.finetune(
                task.network,
                network,
                task.dataset.train,
                epochs=options.epochs,
                seed=options.seed,
                learning_rate=options.learning_rate,
                adversary=adversary_of(run.config),
                state=state,
                **cli.follow_training(bar),
            )
    except KeyboardInterrupt:
        console.print(f"\nInterrupted; {run.folder} is as it was, but for what the finished epochs gave. Go on with --resume.")
        return cli.EXIT_INTERRUPTED
    run.save_checkpoint(tuned, task)
    result.pop("verified", None)  # that was another network
    result["finetuned"] = summary.entry(task, policy, tuned)
    run.save_result(ResultRecord.from_dict(result))
    run.drop_checkpoint("finetune")
    tables.print_result(console, task, policy, result)
    tables.print_next(console, run.folder, (f"evaluate {run.folder}",))
    if options.json:
        print(json.dumps(result, indent=2))
    return 0 if result["budget"]["holds"] else 1


if __name__ == "__main__":
    sys.exit(cli.run_command(main))
