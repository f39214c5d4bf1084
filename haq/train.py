"""Train a network, in float or quantized, and write a checkpoint that a search can take up.

What is minimised is the loss of the objective, the cross-entropy if nothing else is said. After every epoch the network is
judged by the objective on the search split, which isn't trained on, and the best is written.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import field_validator, model_validator

from haq import data, networks
from haq.attacks.threat_model import DEFAULT_EPS, check_images, parse_eps
from haq.console.commands import command, main_of
from haq.console.errors import run_command
from haq.console.options import flag, option, options_of, output_options, setting, trust_option
from haq.console.output import Output
from haq.console.progress import progress
from haq.console.tables import command_line, say, say_next
from haq.console.values import FILE, FOLDER
from haq.data.memory import allowed_bytes, parse_bytes
from haq.problem import OBJECTIVES
from haq.problem.chance import guessing_share, is_chance, with_error
from haq.problem.device import CPU, WRITTEN, find_device
from haq.store.units import PERCENT, percent, show
from haq.study.config import (
    DEVICE_KINDS,
    FOLDERS,
    LINEAR,
    WORK,
    AnotherScheme,
    check_name,
    check_rate,
    forward_setting,
    known_schemes,
    optimizer_setting,
    read_channels,
    schedule_setting,
    scheme_parts,
)
from haq.training.adversaries import STEPS, Adversary
from haq.training.methods import METHODS, as_method, build_method
from haq.training.optimizers import SCHEDULES, check_optimizer, check_schedule, usual_rate
from hw_models import trust
from hw_models.extras import install_line

if TYPE_CHECKING:
    from torch import Tensor, nn

    import quantizers as Q
    from haq.data import Dataset, Split
    from haq.networks import Network
    from haq.problem.objective import Objective
    from haq.store.checkpoint import Checkpoint
    from haq.training.config import Outcome
    from haq.training.loop import Judge
    from haq.training.methods import Method

TRAINED = "What is trained"
QUANTIZATION = "Quantization"
ATTACK = "Training against attacks"
TRAINING = "Training"

CALIBRATION_IMAGES = 500
REPORT_STEPS = 10  # of the attack that is reported after training against one
RATES = {"float": 0.2, "quantized": 0.02, "adam": 1e-3}
ACCURACY = "accuracy"
# What a training was before there was a choice: such a one can still be gone on with.
BEFORE = {
    "objective": ACCURACY,
    "loss": None,
    "schedule": SCHEDULES[0],
    "patience": None,
    "amp": False,
    "device": CPU,
    "forward": None,
    "search_images": None,
    "method": None,
}
BATCH = 128  # images of a step
STEPS_OF_EPOCH = 10  # at least, of few images: these are what trains
LEAST_BATCH = 16
FIRST = ("network", "data", "pretrained")  # in the help
STATE = ".state"  # ends the name of the file that an interrupted training goes on from

Widths = tuple[int | None, int | None]


class TrainOptions(AnotherScheme):
    """How a network is trained: the options of `haq train`."""

    network: str = setting(
        networks.DEFAULT,
        "a name as `haq list networks` shows them, or module:Name",
        group=TRAINED,
        metavar="NAME",
        names=lambda: networks.NETWORKS.names(),
    )
    data: str = setting(
        "fashion-mnist",
        "a name as `haq list data` shows them, or module:Name",
        group=TRAINED,
        metavar="NAME",
        names=lambda: data.DATASETS.names(),
    )
    search_images: int | None = setting(
        None,
        "samples by which networks are judged, where they are cut from the train split",
        group=TRAINED,
        least=1,
        metavar="N",
        default_words="a fifth of it; of photographs 2000 at most",
    )
    memory: str | None = setting(
        None,
        "that samples may take, such as 4GB or 500MB; what doesn't fit is read, or decoded, when it is needed",
        group=TRAINED,
        metavar="AMOUNT",
        default_words="a quarter of the machine's",
    )
    mean: str | None = setting(
        None,
        "of the images, of each channel and on the scale of images in [0, 1], such as 0.485,0.456,0.406",
        group=TRAINED,
        metavar="NUMBERS",
        default_words="the network's own; 0 for module:Name",
    )
    std: str | None = setting(
        None,
        "their standard deviation",
        group=TRAINED,
        metavar="NUMBERS",
        default_words="the network's own; 1 for module:Name",
    )
    forward: str | None = forward_setting(TRAINED)
    objective: str = setting(
        ACCURACY,
        "whose loss is minimised, and by what networks are judged: a name as `haq list objectives` shows them, or module:Name",
        group=TRAINED,
        metavar="NAME",
        names=lambda: OBJECTIVES.names(),
    )
    loss: str | None = setting(
        None,
        "module:function of (outputs, targets) that is minimised in its place",
        group=TRAINED,
        metavar="NAME",
        default_words="the objective's",
        names=lambda: (),  # it is code, that whoever types it may have imported
    )
    pretrained: bool = setting(False, "start from the network's weights, not from random ones", group=TRAINED)
    scheme: str | None = setting(
        None,
        "train quantized, with this scheme: NAME or NAME,LAYER=NAME, as of haq search",
        group=QUANTIZATION,
        metavar="NAME",
        default_words="in float",
        names=lambda: known_schemes(),
    )
    bits: str = setting(
        "4/4", "weight/activation bits of a quantized network, 1 to 8 or float", group=QUANTIZATION, metavar="W/A"
    )
    ends: str = setting(
        "8/8",
        "bits of its first and last layer, which keep the linear scheme unless they are named",
        group=QUANTIZATION,
        metavar="W/A",
    )
    lipschitz: float = setting(0.0, "weight of defensive quantization's penalty", group=QUANTIZATION, metavar="BETA")
    clip_weights: bool = setting(False, "keep the float weights behind one-bit ones in [-1, 1]", group=QUANTIZATION)
    adversarial: str | None = setting(
        None,
        f"train on images attacked in this way: {', '.join(sorted(STEPS))}",
        group=ATTACK,
        metavar="KIND",
        default_words="as they are",
        names=lambda: sorted(STEPS),
    )
    eps: str | None = setting(
        None,
        "largest change of a pixel by the attack, on the scale of images in [0, 1], such as 8/255 or 0.03",
        group=ATTACK,
        metavar="SIZE",
        default_words=DEFAULT_EPS,
    )
    attack_steps: int | None = setting(
        None,
        "of the attack; for free, how often a batch is replayed",
        group=ATTACK,
        metavar="N",
        default_words=", ".join(f"{kind} {count}" for kind, count in STEPS.items()),
    )
    optimizer: str = optimizer_setting(TRAINING)
    schedule: str = schedule_setting(TRAINING)
    method: str | None = setting(
        None,
        "what is done beside the steps: a name as `haq list methods` shows them, or module:Name, with arguments if need be, "
        "such as NAME(share=0.3)",
        group=TRAINING,
        metavar="NAME",
        default_words="nothing",
        names=lambda: METHODS.names(),
    )
    patience: int | None = setting(
        None,
        "epochs in a row without a better network after which training ends",
        group=TRAINING,
        metavar="N",
        least=1,
        default_words="none end it",
    )
    epochs: int = setting(40, "passes over the train images", group=TRAINING, metavar="N")
    learning_rate: float | None = setting(
        None,
        "at its highest",
        group=TRAINING,
        metavar="RATE",
        default_words=f"{RATES['float']} in float, {RATES['quantized']} quantized, less if the batch is; with adam "
        f"{RATES['adam']}, with others torch's",
    )
    batch_size: int | None = setting(
        None, "images of a step", group=TRAINING, metavar="N", default_words=f"{BATCH}, less of few images"
    )
    seed: int = setting(0, "of everything random but the data's splits", group=TRAINING, metavar="N")
    amp: bool = setting(False, "in mixed precision, float16 or bfloat16 where that does no harm", group=TRAINING)
    device: str = setting(CPU, f"where networks are run: {WRITTEN}", group=WORK, metavar="NAME", names=lambda: DEVICE_KINDS)

    @field_validator("optimizer")
    @classmethod
    def _check_optimizer(cls, name: str) -> str:
        try:
            check_optimizer(name)
        except ValueError as error:
            known = str(error).partition("known: ")[2]
            raise ValueError(f"--optimizer is {name!r}; known: {known}") from None
        return name

    @field_validator("schedule")
    @classmethod
    def _check_schedule(cls, text: str) -> str:
        check_schedule(text)
        return text

    @field_validator("method")
    @classmethod
    def _check_method(cls, text: str | None) -> str | None:
        if text is not None:
            build_method(text)
        return text

    @field_validator("objective")
    @classmethod
    def _check_objective(cls, name: str) -> str:
        return check_name(OBJECTIVES, name)

    @field_validator("adversarial")
    @classmethod
    def _check_adversarial(cls, kind: str | None) -> str | None:
        if kind is not None and kind not in STEPS:
            raise ValueError(f"--adversarial is {kind!r}; known: {', '.join(sorted(STEPS))}")
        return kind

    @model_validator(mode="after")
    def _check_together(self) -> TrainOptions:
        if self.epochs < 1 or (self.batch_size is not None and self.batch_size < 2):
            raise ValueError(f"--epochs {self.epochs} --batch-size {self.batch_size}: need at least 1 and 2")
        if self.adversarial is None:
            for name, value in (("--eps", self.eps), ("--attack-steps", self.attack_steps)):
                if value is not None:
                    kinds = "|".join(STEPS)
                    raise ValueError(f"{name} {value} is of an attack: choose one with --adversarial {kinds}")
        else:
            self.adversary()
        if self.method is not None and self.patience is not None and build_method(self.method).needs_all_epochs:
            raise ValueError(f"--patience {self.patience}: --method {self.method} needs all epochs, leave --patience out")
        if self.memory is not None:
            parse_bytes(self.memory)
        read_channels("mean", self.mean)
        read_channels("std", self.std)
        check_rate(self.learning_rate)
        read_widths("--bits", self.bits)
        read_widths("--ends", self.ends)
        return self

    def adversary(self) -> Adversary | None:
        """Return what is trained against. Raises ValueError for an attack that can't be."""
        if self.adversarial is None:
            return None
        return Adversary(self.adversarial, parse_eps(self.eps or DEFAULT_EPS), self.attack_steps)

    def batch(self, images: int) -> int:
        """Return the size of a batch for so many images, its default included."""
        if self.batch_size is not None:
            return self.batch_size
        return min(BATCH, max(LEAST_BATCH, images // STEPS_OF_EPOCH))

    def rate(self, images: int) -> float:
        """Return the learning rate for so many images, its default included."""
        if self.learning_rate is not None:
            return self.learning_rate
        if self.optimizer == "adam":
            return RATES["adam"]
        if self.optimizer != "sgd":
            return usual_rate(self.optimizer)
        rate = RATES["float"]
        if self.scheme is not None:
            rate = RATES["quantized"]
        if self.batch_size is None:
            rate *= self.batch(images) / BATCH
        return rate

    def asked(self, images: int) -> dict[str, Any]:
        """Return all that a training on so many images depends on, defaults included, by the names of the options."""
        asked = self.to_dict() | {"learning_rate": self.rate(images), "batch_size": self.batch(images)}
        del asked["memory"]  # nothing depends on where samples are
        adversary = self.adversary()
        if adversary is not None:
            asked |= {"eps": self.eps or DEFAULT_EPS, "attack_steps": adversary.count}
        # What was trained before there was a choice was trained so, and can be gone on with.
        for name, before in BEFORE.items():
            if asked[name] == before:
                del asked[name]
        return asked

    def loading_words(self) -> list[Any]:
        """Write the options by which network and data are loaded, as `haq search` takes them too, word by word."""
        words: list[Any] = []
        for name in ("search_images", "memory", "mean", "std", "forward"):
            value = getattr(self, name)
            if value is not None:
                words += [f"--{name.replace('_', '-')}", value]
        return words

    def words(self, out: Path, images: int) -> list[Any]:
        """Write the command that asks for this, word by word.

        Args:
            out: The checkpoint.
            images: How many are trained on.

        Returns:
            The words, defaults included.
        """
        asked = self.asked(images)
        words: list[Any] = ["python", "-m", "haq.train", "--network", self.network, "--data", self.data]
        words += self.loading_words()
        if self.pretrained:
            words.append("--pretrained")
        if self.scheme is not None:
            words += ["--scheme", self.scheme, "--bits", self.bits, "--ends", self.ends]
        if self.lipschitz:
            words += ["--lipschitz", self.lipschitz]
        if self.adversarial is not None:
            words += ["--adversarial", self.adversarial, "--eps", asked["eps"], "--attack-steps", asked["attack_steps"]]
        if self.clip_weights:
            words.append("--clip-weights")
        usual_values = {"objective": ACCURACY, "loss": None, "optimizer": "sgd", "schedule": SCHEDULES[0], "method": None}
        for name, usual in usual_values.items():
            if getattr(self, name) != usual:
                words += [f"--{name}", getattr(self, name)]
        if self.patience is not None:
            words += ["--patience", self.patience]
        words += ["--epochs", self.epochs, "--learning-rate", asked["learning_rate"], "--batch-size", asked["batch_size"]]
        if self.amp:
            words.append("--amp")
        if self.device != CPU:
            words += ["--device", self.device]
        return [*words, "--seed", self.seed, "--out", out.name]


@command(
    "train",
    __doc__,
    examples=(
        "haq train --network mobilenet-mini --data fashion-mnist-12k --epochs 30 --out net.safetensors",
        "haq train --pretrained --scheme lsq --bits 4/4 --out quantized.safetensors",
        "haq train --pretrained --adversarial free --eps 8/255 --out robust.safetensors",
        "haq train --network mynet:build --data mydata:load --objective mytask:Score --optimizer AdamW --out net.safetensors",
    ),
)
@options_of(TrainOptions, only=FIRST)
@options_of(TrainOptions, leave_out=FIRST)
@option("--out", FILE, "checkpoint to write, .safetensors", group=FOLDERS)
@flag("--resume", "go on with a training that was interrupted, exactly", group=FOLDERS)
@option("--log", FOLDER, "write TensorBoard events there", group=FOLDERS)
@trust_option()
@output_options(json=None)
def cli(given: dict[str, Any], out: Path | None, resume: bool, log: Path | None) -> int:
    """Train a network."""
    options = TrainOptions(**given)
    if out is None:
        raise ValueError("--out is missing: name the checkpoint to write, such as --out network.safetensors")
    if out.suffix != ".safetensors":
        raise ValueError(f"--out {out}: a checkpoint's name ends in .safetensors")
    return run_training(options, out, Output.open(), resume=resume, log=log)


main = main_of(cli)


def read_widths(name: str, text: str) -> Widths:
    """Read (4, 8) from "4/8", (1, None) from "1/float".

    Args:
        name: The option, for messages.
        text: Its value.

    Returns:
        Weight and activation bits; None: float.

    Raises:
        ValueError: For anything else.
    """
    parts = text.split("/")
    if len(parts) != 2 or not all(part == "float" or (part.isdecimal() and 1 <= int(part) <= 8) for part in parts):
        raise ValueError(f"{name} is {text!r}; give W/A, each from 1 to 8 or float")
    return _width(parts[0]), _width(parts[1])


def _width(word: str) -> int | None:
    if word == "float":
        return None
    return int(word)


def run_training(options: TrainOptions, out: Path, output: Output, *, resume: bool = False, log: Path | None = None) -> int:
    """Train a network and write its checkpoint.

    Args:
        options: How.
        out: The checkpoint.
        output: Where to print.
        resume: Whether to go on with a training that was interrupted.
        log: The folder of TensorBoard events; None: none are written.

    Returns:
        The exit status.
    """
    import torch

    from haq.store.checkpoint import Checkpoint
    from haq.store.lock import check_can_be_made, holding

    check_can_be_made(out.parent)
    method = _method(options)
    state = Checkpoint(out.with_suffix(STATE), {})
    _check_unused(out, state, resume)
    with torch.random.fork_rng(devices=[]), ExitStack() as held:
        torch.manual_seed(options.seed)
        dataset, network, objective = _load(options)
        say(output.notes, dataset.describe())
        asked = {key: str(value) for key, value in options.asked(len(dataset.train)).items()}
        state = Checkpoint(state.path, {**asked, "torch": str(torch.__version__)})
        if options.scheme is not None:
            network = replace(network, module=quantized(network, dataset, options))
            _check_penalty(network, options)
        out.parent.mkdir(parents=True, exist_ok=True)
        held.enter_context(holding(out.with_name(f".{out.name}.lock"), out, "the same command and --resume"))
        _check_unused(out, state, resume)  # another process may have begun meanwhile
        outcome = _train(network, dataset, objective, options, method, state, output, log)
        # What it makes smaller is another network, and the one that is measured and written.
        network = replace(network, module=method.rebuilt(network.module).eval())
        values = {name: _measured(objective, network, getattr(dataset, name)) for name in ("search", "test")}
        notes = {
            "trained_on": f"the train split of {dataset.describe()}",
            "command": command_line(*options.words(out, len(dataset.train))),
        }
        if objective.name == ACCURACY:
            notes["test_accuracy"] = f"{values['test']:.4f}"
        else:
            notes |= {"objective": objective.name, "test_value": f"{values['test']:.6g}"}
        attacked = _attacked(network, dataset, options)
        if attacked is not None:
            notes["test_accuracy_attacked"] = f"{attacked[1]:.4f} (worst of clean and {attacked[0]})"
        networks.save_checkpoint(network, out, notes)
        state.path.unlink(missing_ok=True)
    source = networks.name_of_checkpoint(network.name, out)
    trusting = trust.trust_words(name for name in scheme_parts(options.scheme or LINEAR) if ":" in name)
    _print_outcome(output, options, outcome)
    for name, value in values.items():
        split = getattr(dataset, name)
        say(output.results, f"{objective.title} on the {name} split: {_shown(objective, value, len(split))} {_of(split)}")
    if objective.name == ACCURACY:
        _say_if_chance(output, dataset, values["test"])
    if attacked is not None:
        say(
            output.results,
            f"accuracy on the test split, worst of clean and {attacked[0]}: {percent(attacked[1])} (a cheap attack, not an "
            f"evaluation: {command_line('python', '-m', 'haq.robustness', source, *trusting)})",
            wrap=False,
        )
    say(output.notes, f"written: {out} ({out.stat().st_size:,} bytes)", wrap=False)
    following = options.loading_words()
    if options.objective != ACCURACY:
        following += ["--objective", options.objective]
    say_next(
        output.notes, "python", "-m", "haq.search", "--hw", "edge", "--network", source, "--data", options.data, *following
    )
    return 0


def _method(options: TrainOptions) -> Method:
    """Make the method that is asked for. Raises ValueError if it needs a trained network, and none is given."""
    method = as_method(options.method)
    if method.needs_trained and not options.pretrained and networks.path_of_checkpoint(options.network) is None:
        raise ValueError(
            f"--method {options.method} begins with a trained network, and the weights of {options.network} are random here: "
            "add --pretrained, or give a checkpoint, --network FILE or NAME@FILE"
        )
    return method


def _measured(objective: Objective, network: Network, split: Split) -> float:
    """Measure a network on samples by an objective."""
    from haq import training
    from haq.problem.tally import measure

    if objective.name == ACCURACY:
        return training.accuracy(network, split)
    return measure(objective, network, split, network.module)


def _shown(objective: Objective, value: float, count: int) -> str:
    """Write the value of an objective, with its unit; of a share of few samples with its standard error."""
    if objective.takes_scores and objective.unit == PERCENT:
        return with_error(value, count)
    return show(value, objective.unit)


def _of(split: Split) -> str:
    """Say of how many samples a value is."""
    return f"of {len(split):,} {split.samples_are}"


def _say_if_chance(output: Output, dataset: Dataset, accuracy: float) -> None:
    """Warn of an accuracy that guessing gives too."""
    labels = dataset.test.labels
    guessing = guessing_share(labels, len(dataset.classes))
    if guessing == 1:
        say(
            output.results,
            f"WARNING: all {dataset.test.samples_are} of the test split are of one class, so that accuracy says nothing",
        )
    elif is_chance(accuracy, guessing, len(labels)):
        say(
            output.results,
            f"WARNING: that is no more than guessing gives ({percent(guessing)}): the network learned nothing. Try another "
            "--learning-rate, more --epochs, or look at the labels",
        )


def _check_unused(out: Path, state: Checkpoint, resume: bool) -> None:
    if out.exists():
        if resume:  # it may have been killed just before it did so itself
            state.path.unlink(missing_ok=True)
        raise ValueError(f"{out} exists and is not overwritten")
    if state.path.exists() and not resume:
        raise ValueError(f"{state.path} holds an interrupted training: add --resume to go on with it, or delete it")


def _load(options: TrainOptions) -> tuple[Dataset, Network, Objective]:
    """Load the data, a network with as many classes, and the objective.

    Images that may have any size get that of the network's input.
    """
    import torch

    from haq.problem.objective import build_objective
    from haq.study.task import check_scale, named_forward

    device = find_device(options.device)
    most = allowed_bytes(options.memory)
    dataset = data.load(options.data, memory=most, search_images=options.search_images)
    # What is only a function isn't of classes.
    takes_scores = getattr(OBJECTIVES.get(options.objective), "takes_scores", False)
    if takes_scores and not dataset.classes and options.loss is None:
        raise ValueError(f"{dataset.name} has no labels to train by; python -m haq.search --objective agreement needs none")
    classes = len(dataset.classes) or None
    network = networks.load(options.network, classes=classes, pretrained=options.pretrained)
    network = network.normalized(read_channels("mean", options.mean), read_channels("std", options.std))
    if options.forward is not None:
        network = replace(network, forward=named_forward(options.forward))
    if data.has_any_size(options.data):
        with torch.random.fork_rng(devices=[]):
            dataset = data.load(options.data, image_size=network.image_size, memory=most, search_images=options.search_images)
    networks.check_fits(network, dataset, takes_scores)
    check_scale(dataset, options.mean, options.std)
    if options.adversarial is not None:
        if not takes_scores:
            raise ValueError(
                f"--adversarial {options.adversarial} attacks images of classes: it goes with --objective {ACCURACY}, not "
                f"{options.objective}"
            )
        for split in (dataset.train, dataset.test):
            check_images(split, dataset.name)
    network = network.to(device)
    objective = build_objective(options.objective, network, dataset, parse_eps(options.eps or DEFAULT_EPS))
    if objective.compares_with_float and options.loss is None:
        raise ValueError(
            f"--objective {options.objective} compares with the float network, so that there is nothing to train by: choose "
            "another, or give a --loss"
        )
    return dataset, network, objective


def quantized(network: Network, dataset: Dataset, options: TrainOptions) -> nn.Module:
    """Quantize a network at the bits asked for; its first and last layer at theirs, as almost everyone does.

    Args:
        network: The float network.
        dataset: Whose train split calibrates.
        options: Scheme and bits.

    Returns:
        The quantized network.

    Raises:
        ValueError: For an unknown scheme, and for bits that mean nothing in it.
    """
    from torch import Tensor

    import quantizers as Q
    from haq.study.config import SearchConfig
    from haq.study.task import schemes_of

    names = list(Q.BitPolicy.uniform(network.module, w=None, a=None))
    bits = read_widths("--bits", options.bits)
    ends = read_widths("--ends", options.ends)
    policy = dict.fromkeys(names, bits) | dict.fromkeys(Q.ends(names), ends)
    schemes = schemes_of(SearchConfig(scheme=options.scheme or LINEAR), names)
    inputs, targets = next(dataset.train.batches(CALIBRATION_IMAGES))
    inputs = network.preprocess(inputs)
    calibrate: Any = [(inputs, targets)]
    if isinstance(inputs, Tensor) and network.forward is None:
        calibrate = inputs
    return Q.quantize(network.module, Q.BitPolicy(policy), scheme=schemes, calibrate=calibrate, forward=network.forward)


def _print_outcome(output: Output, options: TrainOptions, outcome: Outcome) -> None:
    """Say which epoch's network is written."""
    kept = f"kept: the network after epoch {outcome.kept}, the best on the search split"
    if not outcome.kept:
        kept = "kept: the network as it was before, since no epoch was better on the search split: try a lower --learning-rate"
    if outcome.diverged:
        kept += "; training ended early, since its loss was no number any more: try a lower --learning-rate"
    if outcome.stopped:
        epochs = len(outcome.epochs)
        kept += f"; training ended after epoch {epochs}, since {options.patience} in a row were no better (--patience)"
    say(output.results, kept)


def _judge(network: Network, dataset: Dataset, objective: Objective, adversary: Adversary | None) -> Judge:
    """Make what judges the network after every epoch: the objective on the search split, under attack if it is trained so."""
    from haq import training
    from haq.attacks.proxy import ProxyAttack, worst_case

    proxy: ProxyAttack | None = None
    if adversary is not None:
        proxy = ProxyAttack.of(network, adversary.eps)

    def judge(module: nn.Module) -> training.Judgement:
        if proxy is not None:
            value = worst_case(network, dataset.search, module, proxy)
        else:
            value = _measured(objective, replace(network, module=module), dataset.search)
        return training.Judgement(value, -objective.signed(value), higher_is_better=objective.higher_is_better)

    return judge


def _train(
    network: Network,
    dataset: Dataset,
    objective: Objective,
    options: TrainOptions,
    method: Method,
    state: Checkpoint,
    output: Output,
    log: Path | None,
) -> Outcome:
    """Train the network in place, with a bar and a line for every epoch.

    Args:
        network: The network.
        dataset: The data.
        objective: What is minimised, and by what the network is judged.
        options: How.
        method: What is done beside the steps.
        state: Keeps what it takes to go on.
        output: Where to print.
        log: The folder of TensorBoard events; None: none are written.

    Returns:
        What became of it.
    """
    import quantizers as Q
    from haq import training
    from haq.training.goals import named_loss

    events = _events(log)
    clipping: Q.WeightClipping | None = None
    if options.clip_weights:
        clipping = Q.clip_weights(network.module)
    adversary = options.adversary()
    epochs = options.epochs
    if adversary is not None:
        epochs = adversary.passes(options.epochs)
    config = training.TrainConfig(
        epochs=options.epochs,
        learning_rate=options.rate(len(dataset.train)),
        seed=options.seed,
        batch_size=options.batch(len(dataset.train)),
        optimizer=options.optimizer,
        penalty=_penalty(options.lipschitz),
        clipping=clipping,
        adversary=adversary,
        schedule=options.schedule,
        patience=options.patience,
        amp=options.amp,
    )
    judge = _judge(network, dataset, objective, adversary)
    before: training.Judgement | None = None
    untrained = network.module
    # What training is to make of a network beside its accuracy isn't seen in how it was before.
    if options.pretrained and adversary is None and not options.lipschitz and options.method is None:
        untrained = Q.copy_network(network.module)
        before = judge(network.module)
    held_out = f"held-out {objective.title}"
    if adversary is not None:
        held_out = "held-out accuracy in the worst case"
    with progress(output.notes) as bar:
        task = bar.add_task("training", total=None, note="")

        values: dict[int, float] = {}

        def on_judged(epoch: int, judgement: training.Judgement) -> None:
            values[epoch] = judgement.value

        def on_epoch(epoch: int, loss: float) -> None:
            value = _shown(objective, values[epoch], len(dataset.search))
            say(output.notes, f"epoch {epoch}/{epochs}: mean loss {loss:.4f}, {held_out} {value}")
            if events is not None:
                events.add_scalar("loss", loss, epoch)
                events.add_scalar(f"{held_out} on the search split", values[epoch], epoch)

        def on_step(step: int, steps: int) -> None:
            bar.update(task, completed=step, total=steps)

        outcome = training.fit(
            network,
            dataset.train,
            config,
            objective=objective,
            loss=named_loss(options.loss),
            method=method,
            state=state,
            judge=judge,
            before=before,
            on_epoch=on_epoch,
            on_step=on_step,
            on_judged=on_judged,
        )
    assert outcome is not None
    if not outcome.kept:
        network.module.load_state_dict(untrained.state_dict())
        if Q.quant_layers(untrained):
            Q.load_quantizer_state(network.module, Q.quantizer_state(untrained))
    if events is not None:
        events.close()
    for sentence in method.report():
        say(output.results, sentence)
    if clipping is not None:
        share = percent(clipping.mean_share, 3)
        say(output.results, f"one-bit weights that clipping changed: {share} at each step, on average")
    return outcome


def _check_penalty(network: Network, options: TrainOptions) -> None:
    """Raise ValueError for a penalty on float weights that the scheme doesn't train."""
    from haq import training

    fixed = training.fixed_weights(network.module)
    if options.lipschitz and fixed:
        raise ValueError(
            f"--lipschitz {options.lipschitz} is on float weights, which --scheme {options.scheme} keeps in layer "
            f"{fixed[0]!r}: leave it out"
        )


def _penalty(beta: float) -> Any:
    """Return defensive quantization's penalty on a network; nothing for a weight of 0."""
    import quantizers as Q

    if not beta:
        return None

    def penalty(module: nn.Module) -> Tensor:
        return Q.lipschitz_penalty(module, beta=beta)

    return penalty


def _attacked(network: Network, dataset: Dataset, options: TrainOptions) -> tuple[str, float] | None:
    """Name a cheap attack and the accuracy that it leaves, if the network was trained against one."""
    from haq.attacks.proxy import ProxyAttack, worst_case

    adversary = options.adversary()
    if adversary is None:
        return None
    attack = ProxyAttack.of(network, adversary.eps, REPORT_STEPS)
    return str(attack), worst_case(network, dataset.test, network.module, attack)


def _events(folder: Path | None) -> Any:
    """Open the events of TensorBoard, if there is a folder for them."""
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError(f"--log needs TensorBoard: {install_line('report')}") from error
    return SummaryWriter(str(folder))  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    sys.exit(run_command(main))
