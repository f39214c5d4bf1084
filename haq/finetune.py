"""Train the quantized network of a run back to its accuracy, or find better biases and roundings for it without training.

The network keeps the bits that the search found. A part of the train split is held out: by it the network is judged after
every epoch, and the best is kept, which may be the one before. It is written into the run's folder, unless the one that was
fine-tuned earlier is better, and what it is worth into the run's result.

What is minimised is the distance of its outputs from the float network's, as the run's objective tells it, or a --loss.

With --method ptq nothing is trained and no labels are needed: biases are corrected layer by layer, then roundings are learned
block by block, in minutes.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from haq.console.commands import command, main_of
from haq.console.errors import EXIT_INTERRUPTED, run_command
from haq.console.options import argument, flag, options_of, output_options, trust_option
from haq.console.output import Output
from haq.console.progress import follow_loading, follow_steps, follow_training, progress
from haq.console.tables import command_line, say
from haq.console.values import FOLDER
from haq.study.config import TUNING, FinetuneConfig

if TYPE_CHECKING:
    from torch import nn

    import quantizers as Q
    from haq.store.checkpoint import Checkpoint
    from haq.study.search_run import SearchRun
    from haq.study.task import SearchTask
    from haq.training.config import Judgement, Outcome


@command(
    "finetune",
    __doc__,
    examples=(
        "haq finetune RUN --epochs 20",
        "haq finetune RUN --method ptq",
        "haq finetune RUN --scheme lsq",
        "haq finetune RUN --optimizer AdamW --schedule linear --patience 5",
        "haq finetune RUN --epochs 20 --resume",
    ),
)
@argument("run", FOLDER, "the folder of a finished search")
@options_of(FinetuneConfig)
@flag("--resume", "go on with a fine-tuning that was interrupted, exactly", group=TUNING)
@trust_option()
@output_options()
def cli(run: Path, given: dict[str, Any], resume: bool, as_json: bool) -> int:
    """Fine-tune what a run found."""
    return run_finetuning(run, FinetuneConfig(**given), Output.open(as_json), resume=resume)


main = main_of(cli)


def run_finetuning(folder: Path, config: FinetuneConfig, output: Output, *, resume: bool = False) -> int:
    """Fine-tune what a run found, and write it into the run's folder.

    Args:
        folder: The folder of a finished search.
        config: How it is fine-tuned.
        output: Where to print.
        resume: Whether to go on with a fine-tuning that was interrupted.

    Returns:
        The exit status: 1 if what was found is not within the budget.

    Raises:
        ValueError: For `resume` with another method than `train`.
    """
    from haq.store.lock import writing
    from haq.store.records import ResultRecord
    from haq.study import result as summary
    from haq.study import tables
    from haq.study.search_run import SearchRun
    from haq.study.task import with_scheme

    if resume and config.method != "train":
        raise ValueError("--resume goes on with a training: leave it out, or choose --method train")
    run = SearchRun.load(folder, config.device)
    asked_for = ["--epochs", str(config.epochs)]
    if config.method != "train":
        asked_for = ["--method", config.method]
    again = command_line("python", "-m", "haq.finetune", folder, *asked_for, *run.config.trust_words())
    with writing(run.folder, again):
        result, policy = run.load_result().to_dict(), run.load_policy()
        with follow_loading(output.notes, "loading network and data") as follow:
            task = run.build(**follow)
            run.check(task)
            result |= _measured_anew(task, policy, result)
            of_found = summary.entry_by_sample(task, policy)[1]
            task = with_scheme(task, config.scheme)
        state: Checkpoint | None = None
        kept = f"\nInterrupted; {folder} is as it was."
        if config.method == "train":
            kept = f"\nInterrupted; {folder} is as it was, but for what the finished epochs gave. Go on with --resume."
            state = _state(run, task, policy, config, output, resume=resume)
        try:
            if state is not None:
                tuned = _train(task, policy, config, state, output)
            else:
                tuned = _reconstruct(task, policy, config, output)
        except KeyboardInterrupt:
            say(output.results, kept, wrap=False)
            return EXIT_INTERRUPTED
        network = tuned.network
        earlier = _better_earlier(run, task, tuned, config)
        if earlier is not None:
            network, tuned.entry["earlier"] = earlier
        else:
            result["finetuned_by"] = config.method
            result.pop("tuning", None)
            result.pop("reconstruction", None)
        result[tuned.key] = summary.judged_by(task.problem, tuned.judged) | tuned.entry
        run.save_checkpoint(network, task)
        # It was another network that was verified.
        result.pop("verified", None)
        result["finetuned"], by_sample = summary.entry_by_sample(task, policy, network, found=of_found)
        result["answers"] = summary.answers_entry(of_found, by_sample)
        result.pop("finetuned_scheme", None)
        if config.scheme is not None:
            result["finetuned_scheme"] = config.scheme
        run.save_result(ResultRecord.from_dict(result))
        if state is not None:
            run.drop_checkpoint("finetune")
    tables.print_result(output.results, task, policy, result)
    tables.print_next(output.notes, folder, [["evaluate", folder, *run.config.trust_words(config.scheme)]])
    output.print_json(result)
    return 0 if result["budget"]["holds"] else 1


class _Tuned(NamedTuple):
    """A network after fine-tuning, how it was judged on held-out images, and what result.json says of it, under a key."""

    network: nn.Module
    judged: Judgement
    key: str
    entry: dict[str, Any]


def _better_earlier(run: SearchRun, task: SearchTask, tuned: _Tuned, config: FinetuneConfig) -> tuple[nn.Module, float] | None:
    """Return the network that was fine-tuned earlier, with its value, if the new one doesn't beat it on the same samples.

    Args:
        run: Whose folder holds it.
        task: The search.
        tuned: The new one.
        config: How that was fine-tuned.
    """
    from haq import training
    from haq.study.comparison import has_schemes, schemes_in
    from haq.study.task import adversary_of
    from haq.training.goals import named_loss

    try:
        earlier = run.load_checkpoint(task)
    except ValueError:
        return None  # it is of another policy, or damaged: it is replaced
    if earlier is None or not has_schemes(earlier, schemes_in(tuned.network)):
        return None
    held = training.hold_out(task.to_train_on)[1]
    judge = training.judge_of(
        task.network, held, adversary_of(task.config), objective=task.problem.objective, loss=named_loss(config.loss)
    )
    judged = judge(earlier)
    if tuned.judged.beats(judged):
        return None
    return earlier, judged.accuracy


def _measured_anew(task: SearchTask, policy: Q.BitPolicy, result: dict[str, Any]) -> dict[str, Any]:
    """Measure what a result says of the policy, if that has become another one since; nothing if it hasn't.

    Args:
        task: The search, with the scheme of the run.
        policy: The policy as it is now.
        result: What result.json holds.
    """
    from haq.study import result as summary
    from haq.study.channels import channels_of

    encoded = policy.to_dict()
    if result.get("policy", encoded) == encoded:
        return {}
    row, of_found = summary.entry_by_sample(task, policy)
    channels = channels_of(task.problem, policy)
    entries = {}
    if channels is not None:
        entries["channels"] = channels.to_dict()
    return {
        **entries,
        **summary.budgets_used(task.problem, policy),
        **summary.goal_entries(task, policy),
        "uniform8": summary.entry(task, task.problem.reference_policy, found=of_found),
        "policy": encoded,
        "found": row,
        "choice": None,  # nobody chose it
    }


def _state(
    run: SearchRun, task: SearchTask, policy: Q.BitPolicy, config: FinetuneConfig, output: Output, *, resume: bool
) -> Checkpoint:
    """Return where a training keeps what it goes on with; ValueError if there is something and it isn't to be gone on with."""
    asked = {"epochs": config.epochs, "learning rate": config.learning_rate, "seed": config.seed, "policy": policy}
    # Earlier versions had no more to tell of.
    for name in ("optimizer", "schedule", "patience", "loss"):
        value = getattr(config, name)
        if value != type(config).model_fields[name].default:
            asked[name] = value
    state = run.checkpoint("finetune", task, **asked, **_mixed(config))
    if state.path.exists() and not resume:
        raise ValueError(f"{state.path} holds an interrupted fine-tuning: add --resume to go on with it, or delete it")
    if resume and not state.path.exists():
        say(output.notes, "no epoch of an interrupted fine-tuning is there: it begins anew")
    return state


def _mixed(config: FinetuneConfig) -> dict[str, Any]:
    """Tell of mixed precision, where it is asked for: earlier versions had none to tell of."""
    if not config.amp:
        return {}
    return {"amp": True}


def _train(task: SearchTask, policy: Q.BitPolicy, config: FinetuneConfig, state: Checkpoint, output: Output) -> _Tuned:
    from haq import training
    from haq.study.result import tuning_entry
    from haq.study.task import adversary_of
    from haq.training.goals import named_loss

    outcomes: list[Outcome] = []
    with progress(output.notes) as bar:
        network = training.finetune(
            task.network,
            task.problem.quantized(policy),
            task.to_train_on,
            epochs=config.epochs,
            seed=config.seed,
            learning_rate=config.learning_rate,
            adversary=adversary_of(task.config),
            objective=task.problem.objective,
            loss=named_loss(config.loss),
            optimizer=config.optimizer,
            schedule=config.schedule,
            patience=config.patience,
            amp=config.amp,
            state=state,
            on_outcome=outcomes.append,
            **follow_training(bar),
        )
    outcome = outcomes[-1]
    return _Tuned(network, outcome.best, "tuning", tuning_entry(outcome, config.epochs))


def _reconstruct(task: SearchTask, policy: Q.BitPolicy, config: FinetuneConfig, output: Output) -> _Tuned:
    from haq.study.result import reconstruction_entry
    from haq.training.goals import named_loss

    with progress(output.notes) as bar:
        found = task.reconstruct(policy, config.seed, follow_steps(bar, "rounding"), loss=named_loss(config.loss))
    return _Tuned(found.network, found.best, "reconstruction", reconstruction_entry(found, config.seed))


if __name__ == "__main__":
    sys.exit(run_command(main))
