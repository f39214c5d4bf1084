"""Measure what a run found again, from its files:  python -m haq.evaluate RUN"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console

import quantizers as Q
from haq.console import cli
from haq.store.files import RESULT
from haq.study import result as summary
from haq.study import tables
from haq.study.search_run import SearchRun


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m haq.evaluate", description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a search")
    parser.add_argument("--json", action="store_true", help="print the result as JSON on stdout, all else on stderr")
    options = parser.parse_args(arguments)
    console = Console(stderr=options.json)
    run = SearchRun.load(options.run)
    policy = run.load_policy()
    earlier = run.load_result().to_dict() if run.finished else {"rival_policies": {}, "evaluations": {}}
    with cli.follow_loading(console, "loading and measuring") as follow:
        task = run.build(**follow)
        run.check(task)
        tuned = run.load_checkpoint(task)
        rivals = {
            name: run.check_policy(Q.BitPolicy.from_dict(bits), task, run.folder / RESULT)
            for name, bits in earlier["rival_policies"].items()
        }
        result = summary.collect(task, policy, tuned, rivals, earlier["evaluations"], earlier.get("saturated_actions"))
    if "verified" in earlier:  # under attack, by the search; python -m haq.robustness does it again
        result["verified"] = earlier["verified"]
    if not run.finished:
        console.print(f"{run.folder} is not finished: this is the best policy so far")
    tables.print_result(console, task, policy, result)
    if options.json:
        print(json.dumps(result, indent=2))
    return 0 if result["budget"]["holds"] else 1


if __name__ == "__main__":
    sys.exit(cli.run_command(main))
