"""Write what a run found as something that runs with those bits.

    c       a folder with a C99 file for microcontrollers, integers from end to end; layers of 1 to 8 bits
    tvm     a folder with one library for this machine's processor; layers of 16 bits and float are computed in float32
    onnx    a file with QuantizeLinear and DequantizeLinear; with layers of 16 bits it is of opset 21
    qonnx   a file of QONNX, for tools of FPGAs
    executorch  a program of torch.export with Q/DQ operators, and one for ExecuTorch's runtime where that is installed

What installed packages offer besides is listed by `haq list exporters`. `haq.deploy.load(FOLDER)(images)` runs what --to tvm
writes.

The fine-tuned network is written if there is one. The run may come from another machine: kernels are chosen by what they take
on this one. What was written is run on test images beside the network in PyTorch, and the largest difference is printed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from haq import data, networks
from haq.console.commands import command, main_of
from haq.console.errors import run_command
from haq.console.options import argument, option, options_of, output_options, trust_option
from haq.console.output import Output
from haq.console.progress import follow_loading
from haq.console.tables import Column, command_line, key_table, print_columns, say
from haq.console.values import FOLDER, TEXT, ChoiceType, TextType
from haq.deployment import EXPORTERS
from haq.store.records import FINETUNED
from haq.store.units import UNITS, percent
from haq.study.config import LINEAR, MEASURED, AnotherScheme, SearchConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

    from haq.deployment.exporter import AnySamples, Exporter, Samples, Verdict
    from haq.deployment.tvm import Deployed
    from haq.store.records import ProblemRecord
    from haq.study.search_run import SearchRun
    from haq.study.task import LoadedNetwork

COMPARED = 200  # test images whose integers are compared layer by layer
BATCH = 250  # test images at once
LATENCY_APART = 0.2  # beyond which a measured latency is said to be other than the run's
WRITTEN = "What is written"  # the heading of options
CHECKED = "Whether a network could be deployed"  # another heading
DEFAULT = "tvm"
EIGHT = "8/8"
RESIDUALS = ("8", "float")  # widths of what enters additions and average poolings


def load(path: str | Path) -> Deployed:
    """Load a network that `--to tvm` wrote.

    Args:
        path: The folder.

    Returns:
        A function of float32 images, shape (N, C, H, W), that returns the network's outputs.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: For what isn't such a folder, is damaged, or was made for another processor.
    """
    from haq.deployment.tvm import Deployed

    return Deployed(path)


def to_tvm(
    qnetwork: nn.Module,
    images: Tensor,
    folder: str | Path,
    *,
    threads: int | None = None,
    target: str | None = None,
    cold: bool = False,
    notes: Mapping[str, Any] | None = None,
    on_progress: Callable[[int, int, str], None] = lambda done, of, what: None,
    reuse: bool = True,
) -> Deployed:
    """Compile a network that `quantizers.quantize` made, at its present bits, for this machine's processor.

    Args:
        qnetwork: The network.
        images: A batch (N, C, H, W), to find how large the sums of residual additions become.
        folder: Where it is written.
        threads: How many threads it computes with; None for one.
        target: JSON of a TVM target, or a processor's name; None for this machine's.
        cold: Whether kernels are measured with their data out of the caches.
        notes: What the description in the folder says besides bits and schemes.
        on_progress: Told what is done, of how much, and what it is.
        reuse: False keeps all values in places of their own, so that `Deployed.value` can show them.

    Returns:
        The compiled network.

    Raises:
        ValueError: Naming the layer and the reason, before anything is compiled, for what no kernel covers.
    """
    from haq.deployment.graph import capture
    from haq.deployment.tvm import compile_network

    return compile_network(
        qnetwork,
        capture(qnetwork, images),
        images,
        Path(folder),
        threads=threads,
        target=target,
        cold=cold,
        notes=notes,
        on_progress=on_progress,
        reuse=reuse,
    )


@command(
    "deploy",
    __doc__,
    examples=(
        "haq deploy RUN",
        "haq deploy RUN --to onnx",
        "haq deploy RUN --to mymodule:MyExporter --out net.bin",
        "haq deploy --check mobilenetv2_100 --to tvm --to c --bits 8/8,4/8",
    ),
)
@argument("run", FOLDER, "the folder of a search; none with --check", required=False)
@option(
    "--to",
    TextType(EXPORTERS.names),
    "the format: a name as `haq list exporters` shows them, or module:Name; with --check it may be given several times",
    group=WRITTEN,
    metavar="NAME",
    default_words=f"{DEFAULT}; with --check all there are",
    multiple=True,
)
@option("--out", FOLDER, "folder or file to write", group=WRITTEN, metavar="PATH", default_words="in the run's folder")
@option(
    "--for",
    TEXT,
    "what the file is for, where a format has several kinds of files",
    group=WRITTEN,
    metavar="NAME",
    default_words="whatever reads the format",
    parameter="flavour",
)
@option(
    "--residuals",
    ChoiceType(RESIDUALS),
    "what enters additions and average poolings: integers of 8 bits, or as it is",
    group=WRITTEN,
    default_words="as in the run; float with --check",
)
@options_of(AnotherScheme)
@options_of(SearchConfig, only=MEASURED)
@option(
    "--check",
    TextType(networks.NETWORKS.names),
    "say for which formats this network could be deployed, and why not; nothing is written, and its weights aren't needed",
    group=CHECKED,
    metavar="NETWORK",
)
@option("--bits", TEXT, "widths W/A that its layers have, in turn", group=CHECKED, metavar="LIST", default_words="8/8")
@option(
    "--data",
    TextType(data.DATASETS.names),
    "what it takes, if it doesn't say so itself",
    group=CHECKED,
    metavar="NAME",
    default_words="images of noise",
)
@trust_option()
@output_options()
def cli(
    run: Path | None,
    to: tuple[str, ...],
    check: str | None,
    given: dict[str, Any],
    as_json: bool,
    **others: Any,
) -> int:
    """Deploy what a run found, or say whether a network could be deployed."""
    asked = {**given, **{name: others[name] for name in ("flavour", "residuals")}}
    of_check = {name: others[name] for name in ("bits", "data")}
    if check is not None:
        _refuse({"RUN": run, "--out": others["out"]}, "doesn't go with --check, which writes nothing")
        _refuse(
            {f"--{name}": given.get(name) for name in (*MEASURED, "device")}, "doesn't go with --check, which runs nothing"
        )
        return run_check(check, to, {**asked, **of_check}, Output.open(as_json))
    _refuse({f"--{name}": value for name, value in of_check.items()}, "goes with --check; a run has its own")
    if run is None:
        raise ValueError("RUN is missing, the folder of a search; or give --check NETWORK; see haq deploy --help")
    if len(to) > 1:
        raise ValueError(f"--to is given {len(to)} times, and a run is deployed to one format at a time")
    return run_deployment(run, (*to, DEFAULT)[0], others["out"], asked, Output.open(as_json))


def _refuse(given: Mapping[str, Any], why: str) -> None:
    """Raise ValueError for the first option that was given, and may not be."""
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name} {why}")


main = main_of(cli)


def run_deployment(folder: Path, to: str, out: Path | None, given: Mapping[str, Any], output: Output) -> int:
    """Write what a run found, and compare it with the network in PyTorch.

    Args:
        folder: The run's folder.
        to: The name of an exporter.
        out: The file or folder to write; None for one in the run's folder.
        given: The options that the user gave: scheme, device, threads, target, cold, flavour (--for) and residuals.
        output: Where to print.

    Returns:
        The exit status: 1 if an answer differs from PyTorch's.

    Raises:
        ValueError: For options that the exporter doesn't take, and for a network that it can't write, naming the layer.
    """
    from haq.deployment.exporter import AnySamples
    from haq.store.lock import writing
    from haq.study.deployable import options_of_exporter
    from haq.study.residuals import with_residuals
    from haq.study.search_run import SearchRun

    exporter = EXPORTERS.get(to)()
    options = options_of_exporter(exporter, to, given)
    asked = AnotherScheme.model_validate({"scheme": given.get("scheme"), "device": given.get("device")})
    run = SearchRun.load(folder, asked.device)
    _check_residuals(exporter, to, given.get("residuals"), run.config.residuals)
    path = out or run.folder / exporter.output
    exporter.check_path(path)
    with ExitStack() as held:
        if path.resolve().is_relative_to(run.folder.resolve()):
            again = command_line("python", "-m", "haq.deploy", folder, "--to", to, *run.config.trust_words())
            held.enter_context(writing(run.folder, again))
        with follow_loading(output.notes, "loading network and data") as follow:
            loaded = run.load_network()
            run.check(loaded)
            network, tuned = _quantized(run, loaded, asked.scheme)
            residuals = with_residuals(loaded, network, given.get("residuals"))
            network = residuals.network
            # It was quantized where the run was; what is written runs on processors, and is compared there.
            network.cpu()
            loaded.network.to("cpu")
            exporter.check(network)
            graph, samples = _seen_by(exporter, network, loaded)
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(samples, AnySamples):
                if options.get("flavour") is not None:
                    raise ValueError(
                        f"--for {options['flavour']} is for networks that take images and whose operations --to {to} knows, "
                        "which this one isn't: leave it out"
                    )
                exporter.export_any(network, samples, path)
            else:
                exporter.export(
                    network,
                    graph,
                    samples.calibration,
                    path,
                    notes=loaded.signature(),
                    options=options,
                    on_progress=follow["progress"],
                )
        how = "not fine-tuned"
        if tuned:
            how = FINETUNED[run.load_result().finetuned_by]
        with output.notes.status("comparing with the network in PyTorch"):
            if isinstance(samples, AnySamples):
                verdict = exporter.compare_any(network, samples, path)
            else:
                verdict = exporter.compare(network, graph, samples, path)
        # Not before: what computes something else is taken away again.
        say(output.results, f"written: {path} ({how})", wrap=False)
    latency = _compare_latency(run, verdict)
    rows = [*residuals.rows, *verdict.rows, *latency.rows]
    output.results.print(key_table(rows))
    if latency.warning:
        say(output.results, latency.warning)
    output.print_json(
        {"written": str(path), "exporter": to, "fine_tuned": tuned, "same_answers": verdict.same_answers}
        | {"compared": dict(rows), "latency_s": verdict.latency_s, "by_residuals": residuals.values}
        | {"predicted_latency_s": latency.predicted_s, "latency_warning": latency.warning}
    )
    if not verdict.same_answers:
        return 1
    return 0


def run_check(name: str, to: Sequence[str], given: Mapping[str, Any], output: Output) -> int:
    """Say for which formats a network could be deployed; nothing is compiled or written.

    Args:
        name: The network, by name.
        to: Exporters by name; without any, all of them.
        given: The options that the user gave: scheme, flavour (--for), residuals, bits and data.
        output: Where to print.

    Returns:
        The exit status: 1 if one of the exporters that are named can't write it.
    """
    from haq.deployment.graph import DEPLOYABLE
    from haq.study.deployable import ask, quantized_by_name, read_pairs

    chosen = {key: given[key] for key in ("scheme", "residuals") if given.get(key) is not None}
    pairs = read_pairs(given.get("bits") or EIGHT)
    with follow_loading(output.notes, "loading the network and looking at its operations"):
        answers = ask(
            quantized_by_name(name, pairs=pairs, data=given.get("data"), config=SearchConfig(**chosen)),
            to,
            given.get("flavour"),
        )
    written = [f"{answer.exporter} --for {answer.flavour}" if answer.flavour else answer.exporter for answer in answers]
    columns = [
        Column("--to", written),
        Column("deployable", ["no" if answer.reason else "yes" for answer in answers]),
        Column("why not", [answer.reason for answer in answers], least=40),
    ]
    print_columns(output.results, f"{name} at {given.get('bits') or EIGHT}", columns)
    if any("can't be deployed: operation" in answer.reason for answer in answers):
        say(output.results, f"Deployable are {DEPLOYABLE}.")
    output.print_json(
        {"network": name, "bits": given.get("bits") or EIGHT, "scheme": given.get("scheme") or LINEAR}
        | {"exporters": [{**answer._asdict(), "deployable": not answer.reason} for answer in answers]}
    )
    return int(bool(to) and any(answer.reason for answer in answers))


class _ComparedLatency(NamedTuple):
    """What a run predicted of the latency, a line about it, and what is to be said if the measured one is far off."""

    predicted_s: float | None = None
    rows: tuple[tuple[str, str], ...] = ()
    warning: str = ""


def _compare_latency(run: SearchRun, verdict: Verdict) -> _ComparedLatency:
    """Hold a measured latency against what the run's costs said of its policy."""
    from haq.store.files import CONFIG, PROBLEM
    from haq.store.records import ConfigRecord, ProblemRecord

    if verdict.latency_s is None or not (run.folder / PROBLEM).exists():
        return _ComparedLatency()
    problem = ProblemRecord.read(run.folder / PROBLEM)
    predicted = _predicted_latency_s(run, problem)
    if predicted is None:
        return _ComparedLatency()
    target = problem.target
    kind = target.provenance.split(" ")[0]
    where = target.name
    if target.provenance != kind:
        where = f"{target.name}, {target.provenance}"
    rows = ((f"latency, {kind} by the run", f"{1e6 * predicted:.1f} us ({where})"),)
    apart = verdict.latency_s / predicted - 1
    if abs(apart) <= LATENCY_APART:
        return _ComparedLatency(predicted, rows)
    above = "above"
    if apart < 0:
        above = "below"
    warning = (
        f"The latency that was measured here, {1e6 * verdict.latency_s:.1f} us, is {percent(abs(apart))} {above} the "
        f"{1e6 * predicted:.1f} us that the run has for this policy, {kind} for {target.name}"
    )
    if kind != "measured":
        return _ComparedLatency(predicted, rows, f"{warning}: that is other hardware than this machine.")
    if ConfigRecord.read(run.folder / CONFIG).signature.get("machine") != json.dumps(verdict.machine):
        return _ComparedLatency(predicted, rows, f"{warning}, on another machine, with other options or versions than here.")
    return _ComparedLatency(
        predicted, rows, f"{warning} on this machine: it was busy then or is now, and the policy may be chosen by wrong times."
    )


def _predicted_latency_s(run: SearchRun, problem: ProblemRecord) -> float | None:
    """Return what a run has for the latency of its policy; None where it has nothing."""
    policy = run.load_policy()
    if problem.metric != "latency":
        if not run.finished or not run.is_found(run.load_result(), policy):
            return None
        return run.load_result().found.cost("latency")
    total = 0.0
    for layer in problem.layers:
        cost = layer.cost_at(*policy[layer.name])
        if cost is None:
            return None
        total += cost
    return total * UNITS["latency"][problem.unit]


def _check_residuals(exporter: Exporter, to: str, asked: str | None, of_run: str) -> None:
    """Raise ValueError if additions and average poolings are to have 8 bits, and an exporter has them in float."""
    from haq.study.deployable import check_residuals

    try:
        check_residuals(exporter, to, asked or of_run)
    except ValueError as error:
        if asked is not None:
            raise
        raise ValueError(f"{error}: the run was searched with it; give --residuals float, and see what that changes") from None


def _quantized(run: SearchRun, loaded: LoadedNetwork, scheme: str | None) -> tuple[nn.Module, bool]:
    """Make the quantized network of a run, and say whether it is fine-tuned.

    Args:
        run: The run.
        loaded: Its network and data.
        scheme: Another scheme than the run's own; a network that was fine-tuned in it is taken as it is.

    Returns:
        The network, in evaluation mode, and whether it is the fine-tuned one.
    """
    import quantizers as Q

    policy = run.load_policy()
    schemes = run.schemes(list(policy), scheme)
    tuned = run.load_checkpoint(loaded)
    if tuned is not None:
        # Options can't be given here, so that schemes are the same if their names are.
        of_tuned = {name: layer.scheme.name for name, layer in Q.quant_layers(tuned).items()}
        if scheme is None or of_tuned == {name: given.name for name, given in schemes.items()}:
            return tuned.eval(), True
    return loaded.quantized(policy, schemes), False


def _seen_by(exporter: Exporter, network: nn.Module, loaded: LoadedNetwork) -> tuple[Any, Samples | AnySamples]:
    """Return a network's operations and images for an exporter; or, of what has none of these, samples of any structure.

    Raises ValueError, naming what an exporter can't write.
    """
    from haq.deployment.exporter import AnySamples
    from haq.deployment.graph import capture
    from haq.study.deployable import check_inputs, unlike_images

    inputs, targets = next(loaded.dataset.test.batches(COMPARED))
    inputs = loaded.network.preprocess(inputs)
    forward = getattr(loaded.network, "forward", None)
    others = unlike_images(forward, inputs)
    check_inputs(exporter, exporter.name, others)
    if not others:
        try:
            return capture(network, inputs[:1].contiguous()), _samples(loaded)
        except ValueError:
            if not exporter.takes_any() or not inputs.isfinite().all():
                raise
    examples, of_examples = next(loaded.dataset.train.batches(COMPARED))
    return None, AnySamples((loaded.network.preprocess(examples), of_examples), (inputs, targets), forward)


def _samples(loaded: LoadedNetwork) -> Samples:
    from haq.deployment.exporter import Samples

    def test() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in loaded.dataset.test.batches(BATCH):
            yield loaded.network.preprocess(images).contiguous(), labels

    calibration = _images(loaded, "train", COMPARED)
    return Samples(calibration, _images(loaded, "test", COMPARED), test, bool(loaded.dataset.classes))


def _images(loaded: LoadedNetwork, split: str, count: int) -> Tensor:
    """Take the first images of a split, as the network takes them."""
    images, _ = next(getattr(loaded.dataset, split).batches(count))
    return loaded.network.preprocess(images).contiguous()


if __name__ == "__main__":
    sys.exit(run_command(main))
