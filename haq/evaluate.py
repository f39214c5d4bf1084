"""Measure what a run found again, from its files.

A run that isn't finished is measured as far as it is there: its best policy so far.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from haq.console.commands import command, main_of
from haq.console.errors import run_command
from haq.console.options import argument, options_of, output_options, trust_option
from haq.console.output import Output
from haq.console.progress import follow_loading
from haq.console.tables import say
from haq.console.values import FOLDER
from haq.study.config import AnotherScheme

if TYPE_CHECKING:
    from haq.store.records import ResultRecord


@command("evaluate", __doc__, examples=("haq evaluate RUN", "haq evaluate RUN --scheme lsq", "haq evaluate RUN --json"))
@argument("run", FOLDER, "the folder of a search")
@options_of(AnotherScheme)
@trust_option()
@output_options()
def cli(run: Path, given: dict[str, Any], as_json: bool) -> int:
    """Measure what a run found."""
    asked = AnotherScheme(**given)
    return run_evaluation(run, Output.open(as_json), asked.scheme, asked.device)


main = main_of(cli)


def run_evaluation(folder: Path, output: Output, scheme: str | None = None, device: str | None = None) -> int:
    """Measure what a run found, and print it.

    Args:
        folder: The folder of a search.
        output: Where to print.
        scheme: The scheme that the found policy is applied with; None for the run's own. A fine-tuned network keeps its own.
        device: Where networks are run; None for where the run's were.

    Returns:
        The exit status: 1 if what was found is not within the budget.
    """
    import quantizers as Q
    from haq.store.files import POLICY, RESULT
    from haq.study import result as summary
    from haq.study import tables
    from haq.study.search_run import SearchRun
    from haq.study.task import with_scheme

    run = SearchRun.load(folder, device)
    policy = run.load_policy()
    found: ResultRecord | None = None
    earlier: dict[str, Any] = {"rival_policies": {}, "evaluations": {}}
    if run.finished:
        found = run.load_result()
        earlier = found.to_dict()
    with follow_loading(output.notes, "loading and measuring") as follow:
        task = run.build(**follow)
        run.check(task)
        tuned = run.load_checkpoint(task)
        rivals = {}
        for name, bits in earlier["rival_policies"].items():
            rivals[name] = run.check_policy(Q.BitPolicy.from_dict(bits), task, folder / RESULT)
        task = with_scheme(task, scheme)
        result = summary.collect(task, policy, tuned, rivals, earlier["evaluations"], earlier.get("saturated_actions"))
    for name in ("finetuned_scheme", "finetuned_by", "tuning", "reconstruction", "bits_only"):
        if name in earlier:
            result[name] = earlier[name]
    changed = found is not None and not run.is_found(found, policy)
    # Under attack it was measured by the search; python -m haq.robustness does it again.
    if scheme is None and not changed:
        result |= {name: earlier[name] for name in ("verified", "choice", "racing", "contribution") if name in earlier}
    if not run.finished:
        say(output.results, f"{folder} is not finished: this is the best policy so far", wrap=False)
    if changed:
        sentence = f"{folder / POLICY} is another policy than the one that was found; it is measured as it is now"
        say(output.results, sentence, wrap=False)
    tables.print_result(output.results, task, policy, result)
    output.print_json(result)
    return 0 if result["budget"]["holds"] else 1


if __name__ == "__main__":
    sys.exit(run_command(main))
