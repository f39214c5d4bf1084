"""Write what a run found as something that runs with those bits:  python -m haq.deploy RUN --to tvm|onnx|qonnx

tvm     a folder with one library for this machine's processor, integers from end to end: `haq.deploy.load(FOLDER)(images)`
onnx    a file with QuantizeLinear and DequantizeLinear, for ONNX Runtime and others
qonnx   a file of QONNX, for tools of FPGAs

The fine-tuned network is written if there is one. The run may come from another machine: kernels are chosen by what they take
on this one. What was written is run on test images beside the network in PyTorch, and the largest difference is printed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import quantizers as Q
from haq.console import cli
from haq.deployment import interpreter
from haq.deployment import onnx as onnx_deployment
from haq.deployment.graph import Graph, capture
from haq.deployment.lowering import lower
from haq.deployment.tvm import Deployed, compile_program
from haq.store.lock import writing
from haq.study.search_run import SearchRun
from haq.study.task import LoadedNetwork
from hw_models import load_target

FORMATS = ("tvm", "onnx", "qonnx")
COMPARED = 200  # test images whose integers are compared layer by layer
TIMED = 200  # calls


def load(path: str | Path) -> Deployed:
    """A network that `--to tvm` wrote: called with float32 images (N, C, H, W) it returns its outputs.

    Raises FileNotFoundError and ValueError for what isn't one, or is for another processor.
    """
    return Deployed(path)


def to_tvm(
    qnetwork: nn.Module,
    images: Tensor,
    folder: str | Path,
    *,
    threads: int | None = None,
    target: str | None = None,
    notes: Mapping[str, Any] | None = None,
    progress: Callable[[int, int, str], None] = lambda done, of, what: None,
    reuse: bool = True,
) -> Deployed:
    """Compile a network that `quantizers.quantize` made, at its present bits, for this machine's processor.

    images: a batch (N, C, H, W), to find how large the sums of residual additions become.
    reuse: False keeps all values in places of their own, so that `Deployed.value` can show them.

    Raises ValueError naming the layer and the reason, before anything is compiled, for what no kernel covers.
    """
    program = lower(capture(qnetwork, images), qnetwork, images)
    measured: Any = load_target("cpu", threads=threads, target=target, progress=progress)
    policy = {name: list(bits) for name, bits in Q.get_policy(qnetwork).items()}
    notes = {"policy": policy, **(notes or {})}
    return compile_program(program, measured, Path(folder), notes, reuse=reuse, progress=progress)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m haq.deploy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="the folder of a finished search")
    parser.add_argument("--to", choices=FORMATS, default="tvm")
    parser.add_argument("--out", type=Path, help="folder or file to write (default: in the run's folder)")
    cli.add_measuring(parser)
    options = parser.parse_args(arguments)
    with ExitStack() as held:
        return go(options, held)


def go(options: argparse.Namespace, held: ExitStack) -> int:
    """What is asked for; `held` holds the run's folder until the end, if that is where it is written."""
    console = Console()
    run = SearchRun.load(options.run)
    policy = run.load_policy()
    out = options.out or run.folder / ("deployed" if options.to == "tvm" else f"{options.to}.onnx")
    if out.resolve().is_relative_to(run.folder.resolve()):
        held.enter_context(writing(run.folder, f"python -m haq.deploy {run.folder} --to {options.to}"))
    if options.to != "tvm" and (options.threads or options.target or options.cold):
        raise ValueError(f"--threads, --target and --cold are for --to tvm, not for {options.to}")
    with cli.follow_loading(console, "loading network and data") as follow:
        loaded = run.load_network()
        run.check(loaded)
        network = run.load_checkpoint(loaded)
        tuned = network is not None
        if network is None:
            network = Q.quantize(loaded.network.module, policy, calibrate=loaded.calibration())
        network = network.eval()
        graph = capture(network, _images(loaded, 1))
        if options.to == "tvm":
            deployed = to_tvm(
                network,
                _images(loaded, COMPARED, "train"),
                out,
                threads=options.threads,
                target=options.target,
                notes=loaded.signature(),
                progress=follow["progress"],
            )
        else:
            out.parent.mkdir(parents=True, exist_ok=True)
            onnx_deployment.export(graph, network, out, flavour=options.to)
    console.print(f"written: {out} ({'fine-tuned' if tuned else 'not fine-tuned'})", soft_wrap=True, markup=False)
    with console.status("comparing with the network in PyTorch"):
        if options.to == "tvm":
            return _check_compiled(console, loaded, network, graph, deployed)
        found = onnx_deployment.verify(out, network, _images(loaded, COMPARED))
    console.print(str(found), soft_wrap=True, markup=False)
    return 0 if found.same_answers == 1 else 1


def _images(loaded: LoadedNetwork, count: int, split: str = "test") -> Tensor:
    images, _ = next(getattr(loaded.dataset, split).batches(count))
    return loaded.network.preprocess(images).contiguous()


def _check_compiled(console: Console, loaded: LoadedNetwork, network: nn.Module, graph: Graph, deployed: Deployed) -> int:
    """Compare on all test images, layer by layer on some of them, and time it. 0 if all answers are the same."""
    same = right = right_before = 0
    for images, labels in loaded.dataset.test.batches(250):
        x = loaded.network.preprocess(images).contiguous()
        with torch.inference_mode():
            expected = network(x).argmax(1)
        answers = deployed(x).argmax(1)
        same += int((answers == expected).sum())
        right += int((answers == labels).sum())
        right_before += int((expected == labels).sum())
    count = len(loaded.dataset.test)
    some = _images(loaded, COMPARED)
    program = lower(graph, network, _images(loaded, COMPARED, "train"))
    comparison = interpreter.compare(network, program, some)
    reference, _ = interpreter.run(program, some.numpy())
    unequal = int((deployed(some).numpy() != reference).sum())
    seconds = []
    for _ in range(TIMED):
        start = time.perf_counter()
        deployed.run()
        seconds.append(time.perf_counter() - start)
    table = Table(box=box.SIMPLE_HEAD, show_header=False, pad_edge=False)
    table.add_row("same answer as in PyTorch", f"{same:,} of {count:,} test images")
    if loaded.dataset.classes:
        table.add_row("accuracy", f"{right / count:.2%} (in PyTorch {right_before / count:.2%})")
    table.add_row("integers that enter layers", f"{comparison.values:,}, of {len(some)} images")
    table.add_row("  other than in PyTorch", f"{comparison.different:,}, {comparison.own:,} of them by a layer's own rounding")
    table.add_row("outputs other than the integer program's", f"{unequal:,} of {reference.size:,}")
    table.add_row("largest difference of outputs from PyTorch's", f"{comparison.output_difference:.3g}")
    machine = deployed.description["machine"]
    table.add_row(
        "latency, measured", f"{1e6 * statistics.median(seconds):.1f} us ({machine['processor']}, median of {TIMED})"
    )
    console.print(table)
    return 0 if same == count else 1


if __name__ == "__main__":
    sys.exit(cli.run_command(main))
