"""Attack the networks of a run, or a model, and say what can be believed of the outcome:  python -m haq.robustness RUN

Compares float, uniform 8 bits, the policy found, and the same policy trained defensively; of a MODEL (a name as in
haq.networks, or a checkpoint) float, uniform bits, and the bits of the checkpoint. The number that counts is the worst case
over all attacks, image by image; checks for masked gradients stand beside it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import queue
import signal
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from haq.attacks import assessment, masking, threat_model
from haq.attacks.assessment import Assessment
from haq.attacks.base import ATTACK_BUDGETS, BACKWARD
from haq.attacks.suite import check_names
from haq.attacks.threat_model import NORMS, ThreatModel
from haq.console import cli
from haq.problem.evaluator import one_thread
from haq.store import files
from haq.store.files import ATTACKED, ROBUSTNESS, ROBUSTNESS_SCHEMA
from haq.store.lock import writing
from haq.study import comparison
from haq.study.comparison import ComparedNetworks, ComparisonSpec, Deployed

PICTURE = "robustness.png"
Examined = tuple[Assessment, Deployed | None]
EPS = {"linf": threat_model.DEFAULT_EPS, "l2": "0.5"}
IMAGES = 1000


@dataclass(frozen=True)
class AttackConfig:
    """What is done to every contender."""

    request: ComparisonSpec
    folder: Path
    threat: ThreatModel
    attacks: str
    images: int
    backward: str
    requantize: bool
    seed: int


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m haq.robustness", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("source", metavar="RUN|MODEL", help="the folder of a search, a network's name as in haq.networks, or a checkpoint")
    add(
        "--attacks",
        default="standard",
        help=f"{', '.join(ATTACK_BUDGETS)}, or names divided by commas, such as fgsm,pgd,square (default: %(default)s)",
    )
    add("--eps", help=f"size of a perturbation of images in [0, 1] (default: {EPS['linf']}, l2: {EPS['l2']})")
    add("--norm", default="linf", choices=list(NORMS))
    add("--images", type=int, default=IMAGES, help="of the test split (default: %(default)s)")
    add("--uniform", default="8", metavar="BITS,...", help="widths of uniform policies to compare with (default: %(default)s)")
    add(
        "--defensive",
        type=float,
        default=comparison.BETA,
        metavar="BETA",
        help="of the penalty in training the found policy once more; 0 leaves that out (default: %(default)s)",
    )
    add("--backward", default="ste", choices=BACKWARD, help="gradients of quantized inputs; hard shows masking (default: ste)")
    add("--requantize-input", action="store_true", help="networks are given images rounded to 8 bits")
    add("--data", help="of a model: a name as in haq.data")
    add("--seed", type=int, default=0)
    add(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="networks attacked at a time; the outcome doesn't depend on it",
    )
    add("--out", type=Path, help=f"folder (default: {ROBUSTNESS}/ in the run's, or runs/robustness-MODEL)")
    add("--json", action="store_true", help="print the result as JSON on stdout, all else on stderr")
    options = parser.parse_args(arguments)
    for name, least in (("images", 10), ("workers", 1), ("seed", 0)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} is {getattr(options, name)}; it must be at least {least}")
    widths = options.uniform.split(",") if options.uniform else []
    if not all(width.strip().isdecimal() and 1 <= int(width) <= 8 for width in widths):
        raise ValueError(f"--uniform is {options.uniform!r}; give widths from 1 to 8, such as 8,4,2")
    options.uniform = tuple(dict.fromkeys(int(width) for width in widths))
    check_names(options.attacks)
    if options.defensive < 0:
        raise ValueError(f"--defensive is {options.defensive}; it must be 0 or above")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with ExitStack() as held:
        return go(options, held)


def go(options: argparse.Namespace, held: ExitStack) -> int:
    """What is asked for; `held` holds the folders that are written, the run's and that of --out, until the end."""
    most = 1.0 if options.norm == "linf" else math.inf
    threat = ThreatModel(threat_model.parse_eps(options.eps or EPS[options.norm], most), options.norm)
    request = ComparisonSpec(options.source, options.data, options.uniform, options.defensive)
    run = request.run
    inside = (
        Path("runs") / f"{ROBUSTNESS}-{Path(options.source).stem.replace(':', '-')}"
        if run is None
        else run.folder / ROBUSTNESS
    )
    folder = options.out or inside
    attempt = AttackConfig(
        request,
        folder,
        threat,
        options.attacks,
        options.images,
        options.backward,
        options.requantize_input,
        options.seed,
    )
    console = Console(stderr=options.json)
    same = "the same command again, which takes up what is finished"
    if run is not None:
        held.enter_context(writing(run.folder, same))
    try:
        with one_thread():
            gathered = _gather(console, request)
            print_plan(console, attempt, gathered)
            if run is None or not folder.resolve().is_relative_to(run.folder.resolve()):
                held.enter_context(writing(folder, same))
            found = examine_all(console, attempt, gathered, min(options.workers, len(gathered.networks)))
    except KeyboardInterrupt:
        console.print(f"\nInterrupted. Finished attacks are kept in {folder}; the same command goes on from there.")
        return cli.EXIT_INTERRUPTED
    content = collect(attempt, gathered, found)
    _write(folder / ATTACKED, json.dumps(content, indent=2) + "\n")
    draw(content, folder / PICTURE)
    print_result(console, content)
    console.print(f"Written: {folder} ({ATTACKED}, {PICTURE}, and the worst images of every network)", soft_wrap=True)
    if options.json:
        print(json.dumps(content, indent=2))
    return 0


def _gather(console: Console, request: ComparisonSpec) -> ComparedNetworks:
    """Load what is compared, with a bar for what has to be trained."""
    bar = cli.progress(console)

    def on_training(name: str) -> dict[str, Any]:
        bar.start()
        console.print(f"{name} isn't there yet: it is trained like the policy that was found")
        return cli.follow_training(bar)

    try:
        return comparison.gather(request, on_training)
    finally:
        bar.stop()


def examine_all(console: Console, attempt: AttackConfig, gathered: ComparedNetworks, workers: int) -> dict[str, Examined]:
    """Attack every contender, so many at a time, with a bar for each."""
    with cli.progress(console) as bar:
        tasks = {name: bar.add_task(name, total=None, note="") for name in gathered.networks}

        def told(name: str, done: float, total: float, note: str) -> None:
            # Thousands of passes over one image each; what a bar counts needs no fractions.
            bar.update(tasks[name], completed=int(done / 1000), total=int(total / 1000) or 1, note=note)

        if workers == 1:
            return {name: examined(attempt, gathered, name, told) for name in gathered.networks}
        return _in_workers(attempt, list(gathered.networks), workers, told)


def examined(
    attempt: AttackConfig, gathered: ComparedNetworks, name: str, told: Callable[[str, float, float, str], None]
) -> Examined:
    """Assess one contender, and run its worst images through its integer network, if it is quantized; what is finished is
    kept in the folder, and taken from there."""
    images, labels = gathered.images(attempt.images)
    sources = gathered.sources(name, attempt.requantize)
    if attempt.attacks == "quick":
        sources = dict(list(sources.items())[:1])
    found = assessment.assess(
        gathered.classifier(gathered.networks[name], attempt.requantize),
        images,
        labels,
        eps=attempt.threat.eps,
        norm=attempt.threat.norm,
        attacks=attempt.attacks,
        sources=sources,
        backward=attempt.backward,
        seed=attempt.seed,
        folder=attempt.folder,
        on_progress=partial(told, name),
    )
    worst = found.examples
    if attempt.requantize:
        worst = (255 * worst).round() / 255
    return found, None if name == "float" else comparison.deployed(gathered, name, worst, labels)


def _in_workers(
    attempt: AttackConfig, names: list[str], workers: int, told: Callable[[str, float, float, str], None]
) -> dict[str, Examined]:
    """The same in processes of their own, which load the contenders again."""
    context = multiprocessing.get_context("spawn")
    stop, news = context.Event(), context.Queue()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (attempt, news, stop))
    try:
        waiting = {name: pool.submit(_attack_in_worker, name) for name in names}
        while not all(future.done() for future in waiting.values()):
            with suppress(queue.Empty):
                told(*news.get(timeout=0.2))
            for future in waiting.values():
                if future.done():
                    future.result()  # raises what it raised
        while not news.empty():
            told(*news.get())
        return {name: future.result() for name, future in waiting.items()}
    except BrokenProcessPool:
        raise ChildProcessError(
            f"a worker was killed, perhaps for want of memory; finished attacks are kept in {attempt.folder}: the same "
            "command with fewer --workers goes on from there"
        ) from None
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


_worker: tuple[AttackConfig, ComparedNetworks, Any, Any] | None = None


def _start_worker(attempt: AttackConfig, news: Any, stop: Any) -> None:
    global _worker
    # Ctrl-C reaches every process; the first one tells the others, by `stop`, what to do.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    _worker = attempt, comparison.gather(attempt.request), news, stop


def _attack_in_worker(name: str) -> Examined:
    assert _worker is not None
    attempt, gathered, news, stop = _worker
    parent = multiprocessing.parent_process()

    def told(*progress: Any) -> None:
        if parent is not None and not parent.is_alive():
            os._exit(1)  # nobody waits for an answer
        if stop.is_set():
            raise InterruptedError("stopped")
        news.put(progress)

    return examined(attempt, gathered, name, told)


def collect(attempt: AttackConfig, gathered: ComparedNetworks, found: Mapping[str, Examined]) -> dict[str, Any]:
    """Everything that is shown, as plain data: what --json prints and robustness.json holds."""
    networks = {}
    for name, (one, deployed) in found.items():
        networks[name] = {"is": gathered.notes[name], **one.summary()}
        if deployed is not None:
            networks[name]["deployed"] = asdict(deployed)
    return {
        "schema": ROBUSTNESS_SCHEMA,
        "source": attempt.request.source,
        "network": gathered.network.name,
        "data": gathered.dataset.name,
        "images": len(next(iter(found.values()))[0].examples),
        "threat": str(attempt.threat),
        "attacks": attempt.attacks,
        "backward": attempt.backward,
        "requantized_input": attempt.requantize,
        "seed": attempt.seed,
        "networks": networks,
    }


def print_plan(console: Console, attempt: AttackConfig, gathered: ComparedNetworks) -> None:
    """The threat model, and who is attacked."""
    effort = ATTACK_BUDGETS.get(attempt.attacks, ATTACK_BUDGETS["standard"])
    white = f"weights, bits and quantizers; gradients by {attempt.backward}"
    rows = {
        "images": f"{min(attempt.images, len(gathered.dataset.test)):,} of the test split of {gathered.dataset.name}",
        "attacker": f"any image in [0, 1] within {attempt.threat}; knows {white}",
        "networks get": "images rounded to 8 bits" if attempt.requantize else "images as the attacker made them",
        "attacks": f"{attempt.attacks}: PGD {effort.steps} steps, {effort.restarts} restarts; APGD {effort.apgd}; Square "
        f"{effort.queries:,} queries; noise {effort.draws} draws; seed {attempt.seed}",
        **gathered.notes,
    }
    table = Table.grid(padding=(0, 2))
    for key, value in rows.items():
        table.add_row(f"[bold]{key}[/]", value)
    console.print(table)


def print_result(console: Console, content: Mapping[str, Any]) -> None:
    """Accuracy under every attack, the checks, and what the deployed networks make of the worst images."""
    networks: Mapping[str, Any] = content["networks"]
    title = f"{content['network']} on {content['images']:,} images of {content['data']}, {content['threat']}"
    table = Table(title=f"Accuracy, measured: {title}", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("attack", no_wrap=True)
    for name in networks:
        table.add_column(name, justify="right")
    table.add_row("none", *(_percent(one["clean"]) for one in networks.values()), end_section=True)
    for attack in dict.fromkeys(attack for one in networks.values() for attack in one["attacks"]):
        table.add_row(attack, *(_percent(one["attacks"].get(attack)) for one in networks.values()))
    table.add_section()
    marked = (f"{'<= ' if one['masked'] else ''}{_percent(one['worst'])}" for one in networks.values())
    table.add_row("[bold]worst case, image by image[/]", *(f"[bold]{cell}[/]" for cell in marked))
    console.print(table)
    checks = Table(title="Signs of masked gradients", box=box.SIMPLE_HEAD, pad_edge=False)
    checks.add_column("what should hold")
    for name in networks:
        checks.add_column(name, justify="right")
    held = [{check["name"]: check["passed"] for check in one["checks"]} for one in networks.values()]
    words = {True: "[green]PASS[/]", False: "[bold red]FAIL[/]", None: "–"}
    for check in dict.fromkeys(itertools.chain(*held)):  # what was asked for by name may leave nothing to compare
        checks.add_row(check, *(words[one.get(check)] for one in held))
    console.print(checks)
    for name, one in networks.items():
        for check in one["checks"]:
            if not check["passed"]:
                console.print(f"{name}: FAIL: {check['name']}: {check['figures']}", soft_wrap=True, markup=False)
        console.print(f"{name}: {_percent(one['worst'])}, {one['verdict']}", soft_wrap=True, markup=False)
    for name, one in networks.items():
        if (deployed := one.get("deployed")) is None:
            continue
        if deployed["reason"]:
            console.print(f"{name}, as an integer network: {deployed['reason']}", soft_wrap=True, markup=False)
            continue
        count = deployed["images"]
        console.print(
            f"{name}, as an integer network, on its worst images: {_percent(deployed['right'] / count)} right, another answer "
            f"than in PyTorch on {deployed['different']} of {count:,}",
            soft_wrap=True,
        )


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Accuracy against eps under PGD, a line for each network, and its worst case over all attacks as a mark."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    norm = content["threat"].partition(",")[0]
    unit = 255 if norm == "linf" else 1
    for color, (name, one) in enumerate(content["networks"].items()):
        eps, accuracy = zip(*one["curve"], strict=True)
        line = [unit * value for value in eps], [100 * value for value in accuracy]
        axes.plot(*line, color=f"C{color}", marker="o", markersize=3, label=name)
        mark = "v" if one["masked"] else "*"
        worst = (unit * one["threat"]["eps"], 100 * one["worst"])
        axes.plot(*worst, color=f"C{color}", marker=mark, markersize=11, linestyle="", clip_on=False, alpha=0.8)
    chance = 100 / next(iter(content["networks"].values()))["classes"]
    axes.axhline(chance, color="grey", linewidth=0.8, linestyle=":")
    axes.text(0, chance + 1, "chance", color="grey", fontsize=8)
    scale = "1/255" if unit == 255 else "of images in [0, 1]"
    axes.set(xlabel=f"eps, {scale} ({norm})", ylabel="accuracy, %", ylim=(0, 100), xlim=(0, None))
    few = next(iter(content["networks"].values()))["curve_images"]
    axes.set_title(
        f"Lines: PGD, {masking.CURVE_STEPS} steps, {few} images. Stars: worst case over all attacks\n"
        "(triangles: an upper bound, gradients are masked)",
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    partial = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(partial, dpi=130, format="png")
    partial.replace(path)


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, text)


if __name__ == "__main__":
    sys.exit(cli.run_command(main))
