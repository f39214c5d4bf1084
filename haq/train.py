"""Train a network, in float or quantized:  python -m haq.train --network N --data D --out F.safetensors [--scheme lsq ...]"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import quantizers as Q
from haq import data, networks, training
from haq.attacks import proxy, threat_model
from haq.console import cli
from haq.store.checkpoint import Checkpoint
from haq.store.lock import holding
from haq.training import adversaries

CALIBRATION_IMAGES = 500
REPORT_STEPS = 10  # of the attack that is reported after training against one
RATES = {"float": 0.2, "quantized": 0.02, "adam": 1e-3}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m haq.train", description=__doc__)
    add = parser.add_argument
    add("--network", default=networks.DEFAULT, help="a name as in haq.networks (default: %(default)s)")
    add("--data", default="fashion-mnist", help="a name as in haq.data (default: %(default)s)")
    add("--pretrained", action="store_true", help="start from the network's weights, not from random ones")
    add("--scheme", choices=sorted(Q.Scheme.known), help="train quantized, with this scheme (default: in float)")
    add("--bits", default="4/4", help="weight/activation bits of a quantized network, 1 to 8 or float (default: 4/4)")
    add("--ends", default="8/8", help="bits of its first and last layer, with the linear scheme's rules (default: 8/8)")
    add("--lipschitz", type=float, default=0.0, metavar="BETA", help="weight of defensive quantization's penalty (default: 0)")
    add("--adversarial", choices=sorted(adversaries.STEPS), help="train on images attacked in this way (default: as they are)")
    add(
        "--eps",
        help="largest change of a pixel by the attack, on the scale of images in [0, 1], such as 8/255 or 0.03 "
        f"(default: {threat_model.DEFAULT_EPS})",
    )
    steps = ", ".join(f"{kind} {count}" for kind, count in adversaries.STEPS.items())
    add("--attack-steps", type=int, help=f"of the attack; for free, how often a batch is replayed (default: {steps})")
    add("--clip-weights", action="store_true", help="keep the float weights behind one-bit ones in [-1, 1]")
    add("--optimizer", default="sgd", choices=("sgd", "adam"))
    add("--epochs", type=int, default=40)
    add(
        "--learning-rate",
        type=float,
        help=f"default: {RATES['float']} in float, {RATES['quantized']} quantized, with adam 0.001",
    )
    add("--batch-size", type=int, default=128)
    add("--seed", type=int, default=0)
    add("--out", type=Path, required=True, help="checkpoint to write, .safetensors")
    add("--resume", action="store_true", help="go on with a training that was interrupted, exactly")
    add("--log", type=Path, metavar="FOLDER", help="write TensorBoard events there")
    options = parser.parse_args(arguments)
    if options.epochs < 1 or options.batch_size < 2:
        raise ValueError(f"--epochs {options.epochs} --batch-size {options.batch_size}: need at least 1 and 2")
    if options.out.suffix != ".safetensors":
        raise ValueError(f"--out {options.out}: a checkpoint's name ends in .safetensors")
    if options.learning_rate is None:
        kind = "adam" if options.optimizer == "adam" else "quantized" if options.scheme else "float"
        options.learning_rate = RATES[kind]
    if options.adversarial:
        options.eps = options.eps or threat_model.DEFAULT_EPS
        options.attack_steps = adversary(options).count
    elif options.eps is not None or options.attack_steps is not None:
        name, value = ("--eps", options.eps) if options.eps is not None else ("--attack-steps", options.attack_steps)
        raise ValueError(f"{name} {value} is of an attack: choose one with --adversarial {'|'.join(adversaries.STEPS)}")
    options.bits, options.ends = parse_bits("--bits", options.bits), parse_bits("--ends", options.ends)
    return options


def adversary(options: argparse.Namespace) -> adversaries.Adversary:
    """What is trained against. Raises ValueError for an attack that can't be."""
    return adversaries.Adversary(options.adversarial, threat_model.parse_eps(options.eps), options.attack_steps)


def parse_bits(option: str, text: str) -> tuple[int | None, int | None]:
    """(4, 8) from "4/8", (1, None) from "1/float"."""
    parts = text.split("/")
    if len(parts) != 2 or not all(part == "float" or (part.isdecimal() and 1 <= int(part) <= 8) for part in parts):
        raise ValueError(f"{option} is {text!r}; give W/A, each from 1 to 8 or float")
    weight, activation = (None if part == "float" else int(part) for part in parts)
    return weight, activation


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    with ExitStack() as held:
        return go(options, held)


def go(options: argparse.Namespace, held: ExitStack) -> int:
    """What is asked for; `held` holds the checkpoint that is written, by a lock beside it, until the end."""
    state = Checkpoint(options.out.with_suffix(".state"), _asked(options))
    _check_unused(options, state)
    console = Console()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        dataset = data.load(options.data)
        if not dataset.classes:
            raise ValueError(
                f"{dataset.name} has no labels to train by; python -m haq.search --objective agreement needs none"
            )
        network = networks.load(options.network, classes=len(dataset.classes), pretrained=options.pretrained)
        networks.check_fits(network, dataset)
        if options.adversarial:
            for split in (dataset.train, dataset.test):
                threat_model.check_images(split, dataset.name)
        console.print(dataset.describe())
        if options.scheme:
            network = replace(network, module=quantized(network, dataset, options))
        options.out.parent.mkdir(parents=True, exist_ok=True)
        lock = options.out.with_name(f".{options.out.name}.lock")
        held.enter_context(holding(lock, options.out, "the same command and --resume"))
        _check_unused(options, state)  # another process may have begun meanwhile
        _train(console, network, dataset, options, state)
    result = {name: training.accuracy(network, getattr(dataset, name)) for name in ("search", "test")}
    notes = {
        "trained_on": f"the train split of {dataset.describe()}",
        "command": " ".join(["python -m haq.train", *_command(options)]),
        "test_accuracy": f"{result['test']:.4f}",
    }
    if options.adversarial:
        attack = proxy.ProxyAttack.of(network, threat_model.parse_eps(options.eps), REPORT_STEPS)
        attacked = proxy.worst_case(network, dataset.test, network.module, attack)
        notes["test_accuracy_attacked"] = f"{attacked:.4f} (worst of clean and {attack})"
    networks.save_checkpoint(network, options.out, notes)
    state.path.unlink(missing_ok=True)
    for name, value in result.items():
        console.print(f"accuracy on the {name} split: {100 * value:.2f} % of {len(getattr(dataset, name)):,} images")
    if options.adversarial:
        console.print(
            f"accuracy on the test split, worst of clean and {attack}: {100 * attacked:.2f} % (a cheap attack, not an "
            f"evaluation: python -m haq.robustness {options.out})",
            soft_wrap=True,
        )
    console.print(f"written: {options.out} ({options.out.stat().st_size:,} bytes)")
    console.print(f"next: python -m haq.search --hw edge --network {options.out} --data {options.data}", soft_wrap=True)
    return 0


def _check_unused(options: argparse.Namespace, state: Checkpoint) -> None:
    if options.out.exists():
        if options.resume:  # it may have been killed just before it did so itself
            state.path.unlink(missing_ok=True)
        raise ValueError(f"{options.out} exists and is not overwritten")
    if state.path.exists() and not options.resume:
        raise ValueError(f"{state.path} holds an interrupted training: add --resume to go on with it, or delete it")


def quantized(network: networks.Network, dataset: data.Dataset, options: argparse.Namespace) -> nn.Module:
    """The network at the bits asked for; its first and last layer at theirs, as almost everyone does."""
    names = list(Q.BitPolicy.uniform(network.module, w=None, a=None))
    policy = Q.BitPolicy({name: options.ends if name in (names[0], names[-1]) else options.bits for name in names})
    images, _ = next(dataset.train.batches(CALIBRATION_IMAGES))
    schemes = {name: "linear" if name in (names[0], names[-1]) else options.scheme for name in names}
    return Q.quantize(network.module, policy, scheme=schemes, calibrate=network.preprocess(images))


def _train(
    console: Console,
    network: networks.Network,
    dataset: data.Dataset,
    options: argparse.Namespace,
    state: Checkpoint,
) -> None:
    events = _events(options.log)
    penalty: Callable[[nn.Module], Tensor] | None = None
    if options.lipschitz:
        penalty = lambda module: Q.lipschitz_penalty(module, beta=options.lipschitz)  # noqa: E731
    clipping = Q.clip_weights(network.module) if options.clip_weights else None

    attacker = adversary(options) if options.adversarial else None
    passes = attacker.passes(options.epochs) if attacker else options.epochs

    def on_epoch(epoch: int, loss: float) -> None:
        bar.console.print(f"epoch {epoch}/{passes}: mean loss {loss:.4f}")
        if events is not None:
            events.add_scalar("loss", loss, epoch)
            events.add_scalar("accuracy on the search split", training.accuracy(network, dataset.search), epoch)

    with cli.progress(console) as bar:
        task = bar.add_task("training", total=None, note="")
        training.fit(
            network,
            dataset.train,
            epochs=options.epochs,
            learning_rate=options.learning_rate,
            batch_size=options.batch_size,
            optimizer=options.optimizer,
            seed=options.seed,
            penalty=penalty,
            clipping=clipping,
            adversary=attacker,
            state=state,
            on_epoch=on_epoch,
            on_step=lambda step, steps: bar.update(task, completed=step, total=steps),
        )
    if events is not None:
        events.close()
    if clipping is not None:
        console.print(f"one-bit weights that clipping changed: {100 * clipping.mean_share:.3f} % at each step, on average")


def _events(folder: Path | None) -> Any:
    if folder is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ImportError("--log needs TensorBoard: pip install 'haq[report]'") from error
    return SummaryWriter(str(folder))  # type: ignore[no-untyped-call]


def _asked(options: argparse.Namespace) -> dict[str, str]:
    """What must be the same for a training to go on."""
    free = ("out", "resume", "log")
    return {key: str(value) for key, value in vars(options).items() if key not in free} | {"torch": str(torch.__version__)}


def _command(options: argparse.Namespace) -> list[str]:
    words = [f"--network {options.network} --data {options.data}"]
    if options.pretrained:
        words.append("--pretrained")
    if options.scheme:
        bits, ends = ("/".join("float" if b is None else str(b) for b in pair) for pair in (options.bits, options.ends))
        words.append(f"--scheme {options.scheme} --bits {bits} --ends {ends}")
    words += [f"--lipschitz {options.lipschitz}"] if options.lipschitz else []
    if options.adversarial:
        words.append(f"--adversarial {options.adversarial} --eps {options.eps} --attack-steps {options.attack_steps}")
    words += ["--clip-weights"] if options.clip_weights else []
    words += [f"--optimizer {options.optimizer}"] if options.optimizer != "sgd" else []
    words.append(f"--epochs {options.epochs} --learning-rate {options.learning_rate} --batch-size {options.batch_size}")
    return [*words, f"--seed {options.seed} --out {options.out.name}"]


if __name__ == "__main__":
    sys.exit(cli.run_command(main))
