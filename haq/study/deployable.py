"""Whether a network could be deployed, without deploying it: what `haq deploy --check` and `haq search --check-deploy` say.

Nothing is compiled or written. An exporter is asked what it is asked before it writes: `Exporter.check` of the quantized
network, and `Exporter.check_operations` of its operations.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import hw_models
import quantizers as Q
from haq import networks
from haq.console.values import did_you_mean
from haq.deployment import EXPORTERS
from haq.deployment.exporter import Exporter
from haq.deployment.graph import DEPLOYABLE, Graph, capture
from haq.networks.network import Network
from haq.problem.device import CPU
from haq.problem.problem import Problem
from haq.study.config import FLOAT, MEASURED, SearchConfig
from haq.study.task import LoadedNetwork, SearchTask, schemes_of
from hw_models.widths import ACCEPTED, read_pair
from hw_models.widths import FLOAT as WIDEST
from quantizers.calling import count_of, samples, to_device

CHECKED = 4  # samples on which operations are looked at
SEED = 0  # of made-up images
RESIDUALS = str(Q.MAX_BITS)


class Quantized(NamedTuple):
    """A quantized network with policies that it may have, and samples of what it takes.

    Attributes:
        network: The network.
        policies: The policies; the operations are looked at with the first and the last.
        inputs: Samples, preprocessed.
        forward: What calls the network; None if that is by its inputs.
        residuals: "8" or "float".
    """

    network: nn.Module
    policies: tuple[Q.BitPolicy, ...]
    inputs: Any
    forward: Any = None
    residuals: str = FLOAT


class Answer(NamedTuple):
    """Whether an exporter can write a network.

    Attributes:
        exporter: Its name, as it was asked for.
        flavour: What the file is for (`--for`); None where that wasn't asked.
        reason: Why not, in a sentence that names the layer and the operation; nothing if it can.
    """

    exporter: str
    flavour: str | None
    reason: str


def options_of_exporter(exporter: Exporter, to: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Take the options that are for an exporter.

    Args:
        exporter: The exporter.
        to: Its name, as it was asked for.
        given: Options of `haq deploy` by name, None where they weren't given.

    Returns:
        Those that `Exporter.export` is given.

    Raises:
        ValueError: For one that it doesn't take, or not with this value.
    """
    options = {name: given[name] for name in (*MEASURED, "flavour") if given.get(name) is not None}
    if foreign := [name for name in options if name in MEASURED and name not in exporter.options]:
        raise ValueError(f"--{foreign[0]} is for networks whose kernels are measured (--to tvm), not for --to {to}")
    flavour = options.get("flavour")
    if flavour is not None and "flavour" not in exporter.options:
        raise ValueError(f"--for {flavour} is for formats that have files of several kinds; --to {to} has one: leave it out")
    if flavour is not None and flavour not in exporter.flavours:
        close = did_you_mean(flavour, exporter.flavours)
        raise ValueError(f"--for is {flavour!r}{close} What --to {to} can write for: {', '.join(exporter.flavours)}")
    return options


def check_residuals(exporter: Exporter, to: str, residuals: str) -> None:
    """Check that an exporter can write what enters additions and average poolings.

    Args:
        exporter: The exporter.
        to: Its name, as it was asked for.
        residuals: "8" or "float".

    Raises:
        ValueError: If that is to have 8 bits, and the exporter has it in float.
    """
    if residuals == RESIDUALS and "residuals" not in exporter.options:
        raise ValueError(f"--residuals 8 can't be written by --to {to}, which has additions and poolings in float")


def unlike_images(forward: Any, inputs: Any) -> str:
    """Say what of a network's inputs is unlike a tensor of images or vectors; nothing if they are one.

    Args:
        forward: What calls the network; None if that is by its inputs.
        inputs: Samples of what it takes.

    Returns:
        Words that continue "this network".
    """
    if forward is not None:
        return "is called by a function of its own"
    if not isinstance(inputs, Tensor):
        return f"takes a {type(inputs).__name__}"
    if inputs.dim() not in (2, 3, 4) or not inputs.is_floating_point():
        return f"takes {inputs.dtype} of {inputs.dim()} dimensions"
    return ""


def check_inputs(exporter: Exporter, to: str, unlike: str) -> None:
    """Check that an exporter takes what a network takes.

    Args:
        exporter: The exporter.
        to: Its name, as it was asked for.
        unlike: What `unlike_images` says of the network's inputs.

    Raises:
        ValueError: If it takes images and vectors alone, and these are others.
    """
    if unlike and not exporter.takes_any():
        raise ValueError(
            f"--to {to} writes networks that take images, or vectors, as one tensor, and this one {unlike}: "
            "--to onnx takes any inputs"
        )


def ask(given: Quantized, names: Sequence[str], flavour: str | None = None) -> list[Answer]:
    """Ask exporters whether they could write a network.

    Args:
        given: The network.
        names: Exporters by name; without any, all of them, for all that they can write for.
        flavour: What a file is to be for (`--for`).

    Returns:
        An answer of each.

    Raises:
        ValueError: For an unknown exporter, and for a flavour that one doesn't have.
    """
    captured = _Captured(given)
    answers = []
    for name, one in _asked(names, flavour):
        try:
            exporter = EXPORTERS.get(name)()
        except (ValueError, ImportError) as error:
            # Somebody else's, that can't be used, is told of among others; asked for by name it is an error.
            if names:
                raise
            answers.append(Answer(name, one, str(error)))
            continue
        options = options_of_exporter(exporter, name, {"flavour": one})
        answers.append(Answer(name, one, _reason(exporter, name, options, captured)))
    return answers


def _asked(names: Sequence[str], flavour: str | None) -> Iterator[tuple[str, str | None]]:
    """Yield names of exporters and what their files are to be for."""
    for name in names or tuple(EXPORTERS):
        yield name, flavour
        if flavour is None and not names:
            yield from ((name, one) for one in getattr(_class_of(name), "flavours", ()))


def _class_of(name: str) -> Any:
    try:
        return EXPORTERS.get(name)
    except (ValueError, ImportError):
        return None


class _Captured:
    """The operations of a network, looked at once and only if somebody asks."""

    def __init__(self, given: Quantized) -> None:
        self.given = given
        self.unlike = unlike_images(given.forward, given.inputs)
        self._found: Graph | ValueError | None = None

    def graph(self) -> Graph:
        """Return them. Raises ValueError for a network that has others than are known."""
        if self._found is None:
            try:
                self._found = capture(self.given.network, self.given.inputs[:1].contiguous())
            except ValueError as error:
                self._found = error
        if isinstance(self._found, ValueError):
            raise self._found
        return self._found


def _reason(exporter: Exporter, name: str, options: Mapping[str, Any], captured: _Captured) -> str:
    """Return the sentence by which an exporter refuses a network; nothing if it doesn't."""
    try:
        _check(exporter, name, options, captured)
    except (ValueError, ImportError) as error:
        return str(error).partition(f"; deployable are {DEPLOYABLE}")[0]
    return ""


def _check(exporter: Exporter, name: str, options: Mapping[str, Any], captured: _Captured) -> None:
    """Do what `haq deploy` does before it writes, in the same order."""
    network, policies, inputs, _, residuals = captured.given
    check_residuals(exporter, name, residuals)
    for policy in policies:
        Q.set_policy(network, policy)
        exporter.check(network)
    check_inputs(exporter, name, captured.unlike)
    if captured.unlike:
        return
    try:
        graph = captured.graph()
    except ValueError:
        if exporter.takes_any():
            return
        raise
    for policy in dict.fromkeys((policies[0], policies[-1])):
        Q.set_policy(network, policy)
        exporter.check_operations(network, graph, inputs, options=options)


def read_pairs(text: str) -> list[tuple[int | None, int | None]]:
    """Read pairs of widths from "8/8,4/8,float", None being float. Raises ValueError naming the one that isn't."""
    pairs: list[tuple[int | None, int | None]] = []
    for part in text.split(","):
        word = part.strip()
        if word.isdecimal():
            word = f"{word}/{word}"
        try:
            w, a = read_pair(word)
            pairs.append((_width(w), _width(a)))
        except ValueError:
            raise ValueError(
                f"--bits has {part!r}; give widths from {ACCEPTED}, such as 8/8 or 8/8,4/8 for weights/activations"
            ) from None
    return pairs


def _width(width: int) -> int | None:
    if width == WIDEST:
        return None
    return width


def quantized_by_name(
    name: str,
    *,
    pairs: Sequence[tuple[int | None, int | None]] = ((Q.MAX_BITS, Q.MAX_BITS),),
    data: str | None = None,
    config: SearchConfig | None = None,
) -> Quantized:
    """Quantize a network by name, to ask whether it could be deployed.

    Args:
        name: As `haq.networks.load` takes it; its weights aren't needed unless there is data.
        pairs: Widths of weights and activations, None being float; layers take them in turn.
        data: A data set by name, for a network that doesn't say what it takes; None: images are made up.
        config: Its scheme, residuals, and function that calls the network.

    Returns:
        The network at that policy.

    Raises:
        ValueError: As its parts do, and for a network that doesn't say what it takes, without data.
    """
    config = config or SearchConfig()
    if data is not None:
        return _quantized_on_data(LoadedNetwork.load(config.replace(network=name, data=data)), pairs)
    network = networks.load(name, pretrained=False)
    if not network.input_shape:
        raise ValueError(f"{name} doesn't say what it takes: give --data NAME besides")
    networks.answer_to_zeros(network)
    images = _made_up(network)
    module = network.module
    workload = hw_models.trace(module, images[:1].clone())
    if config.residuals != FLOAT:
        module = Q.insert_residual_quantizers(module, images)
    made = Q.quantize(
        module, _in_turn(workload.names, pairs), scheme=schemes_of(config, workload.names), calibrate=images
    ).eval()
    return Quantized(made, (Q.get_policy(made),), images, residuals=config.residuals)


def _made_up(network: Network) -> Tensor:
    """Make images, or what else a network takes, of noise."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (CHECKED, *network.input_shape)
    if len(shape) != 4:
        return torch.rand(shape, generator=generator)
    images: Tensor = network.preprocess(torch.randint(256, shape, generator=generator, dtype=torch.uint8))
    return images.contiguous()


def _in_turn(names: Sequence[str], pairs: Sequence[tuple[int | None, int | None]]) -> Q.BitPolicy:
    return Q.BitPolicy({name: pairs[number % len(pairs)] for number, name in enumerate(names)})


def _quantized_on_data(loaded: LoadedNetwork, pairs: Sequence[tuple[int | None, int | None]]) -> Quantized:
    names = loaded.traced(loaded.calibration()).names
    made = loaded.quantized(_in_turn(names, pairs), schemes_of(loaded.config, names))
    return Quantized(made, (Q.get_policy(made),), _first(loaded), loaded.network.forward, loaded.config.residuals)


def _first(loaded: LoadedNetwork) -> Any:
    """Return some samples of the train split, as the network takes them, on the CPU."""
    inputs, _ = next(loaded.dataset.train.batches(CHECKED))
    inputs = to_device(loaded.network.preprocess(inputs), CPU)
    inputs = samples(inputs, count_of(inputs), 0, CHECKED)
    if isinstance(inputs, Tensor):
        return inputs.contiguous()
    return inputs


def check_search(task: SearchTask, names: Sequence[str]) -> None:
    """Check before a search that exporters could write whatever it may find.

    They are asked of policies in which every width occurs that the search may choose.

    Args:
        task: The search.
        names: Exporters by name.

    Raises:
        ValueError: In a sentence with the exporter's reason, for the first that couldn't, and for an unknown one.
    """
    policies = _spanning(task.problem)
    network = task.problem.quantized(policies[0]).cpu()
    given = Quantized(network, policies, _first(task), task.network.forward, task.config.residuals)
    for answer in ask(given, names):
        if answer.reason:
            raise ValueError(f"--check-deploy {answer.exporter}: what this search may find can't be deployed; {answer.reason}")


def _spanning(problem: Problem) -> tuple[Q.BitPolicy, ...]:
    """List policies in which all widths occur that may be chosen."""
    found: dict[Q.BitPolicy, None] = {}
    for operand in (0, 1):
        widths = sorted({int(width) for decision in problem.decisions for width in decision.pairs[:, operand]})
        for width in widths:
            # The first pair with that width, or else the nearest to it.
            nearest = [np.abs(decision.pairs[:, operand] - width).argmin() for decision in problem.decisions]
            chosen = [decision.pairs[place] for decision, place in zip(problem.decisions, nearest, strict=True)]
            found[problem.decide(chosen)] = None
    return tuple(found)
