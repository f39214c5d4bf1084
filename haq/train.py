"""Train a network in float:  python -m haq.train --network mobilenet-mini --data fashion-mnist --out FILE.safetensors"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from rich.console import Console

from haq import cli, data, models, training


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m haq.train", description=__doc__)
    parser.add_argument("--network", default=models.DEFAULT, help="a name as in haq.models (default: %(default)s)")
    parser.add_argument("--data", default="fashion-mnist", help="a name as in haq.data (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--learning-rate", type=float, default=0.2)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write, .safetensors")
    options = parser.parse_args(arguments)
    if options.epochs < 1 or options.batch_size < 2:
        raise ValueError(f"--epochs {options.epochs} --batch-size {options.batch_size}: need at least 1 and 2")
    if options.out.suffix != ".safetensors":
        raise ValueError(f"--out {options.out}: a checkpoint's name ends in .safetensors")
    if options.out.exists():
        raise ValueError(f"{options.out} exists and is not overwritten")

    console = Console()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        dataset = data.load(options.data)
        network = models.load(options.network, classes=len(dataset.classes), pretrained=False)
    models.check_fits(network, dataset)
    console.print(dataset.describe())
    with cli.progress(console) as bar:
        task = bar.add_task("training", total=None, note="")
        training.fit(
            network,
            dataset.train,
            epochs=options.epochs,
            learning_rate=options.learning_rate,
            batch_size=options.batch_size,
            seed=options.seed,
            on_epoch=lambda epoch, loss: bar.console.print(f"epoch {epoch}/{options.epochs}: mean loss {loss:.4f}"),
            on_step=lambda step, steps: bar.update(task, completed=step, total=steps),
        )
    result = {name: training.accuracy(network, getattr(dataset, name)) for name in ("search", "test")}
    notes = {
        "trained_on": f"the train split of {dataset.describe()}",
        "command": f"python -m haq.train --network {options.network} --data {options.data} --epochs {options.epochs} "
        f"--learning-rate {options.learning_rate} --batch-size {options.batch_size} --seed {options.seed} "
        f"--out {options.out.name}",
        "test_accuracy": f"{result['test']:.4f}",
    }
    models.save_checkpoint(network, options.out, notes)
    for name, value in result.items():
        console.print(f"accuracy on the {name} split: {100 * value:.2f} % of {len(getattr(dataset, name)):,} images")
    console.print(f"written: {options.out} ({options.out.stat().st_size:,} bytes)")
    console.print(f"next: python -m haq.search --hw edge --network {options.out} --data {options.data}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.run_command(main))
