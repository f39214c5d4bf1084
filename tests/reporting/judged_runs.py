"""Runs and sweeps as they are on disk, judged by something else than accuracy: written by hand, in no time."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from haq.store import history
from haq.store.history import HistoryRow
from tests.reporting.written_runs import change, write, write_run


class Judged(NamedTuple):
    """An objective, and what stands for an accuracy of nothing and of everything."""

    name: str
    title: str
    unit: str
    higher_is_better: bool
    worst: float
    best: float
    samples_are: str = "images"

    @property
    def fields(self) -> dict[str, Any]:
        """What files have beside its name."""
        return {
            "objective_title_is": self.title,
            "objective_unit": self.unit,
            "higher_is_better": self.higher_is_better,
            "counts_samples": False,
            "samples_are": self.samples_are,
        }

    def of(self, accuracy: float) -> float:
        return self.worst + accuracy * (self.best - self.worst)


PSNR = Judged("psnr", "PSNR", "dB", True, 12.0, 31.0)
LOSS = Judged("nll", "negative log-likelihood", "nats", False, 4.0, 0.5, "samples")
ERROR = Judged("my_error", "my_error", "", False, 0.9, 0.01, "samples")
DICE = Judged("miou", "mIoU", "%", True, 0.0, 1.0)
ALL = (PSNR, LOSS, ERROR, DICE)


def write_judged(folder: Path, judged: Judged, *, finished: bool = True, target: str = "edge", worthless: bool = True) -> Path:
    """A run as `write_run` writes it, judged by something else; 2 bits, and a policy that was tried, are worth nothing."""
    write_run(folder, finished=finished, target=target)
    problem = json.loads((folder / "problem.json").read_text())
    judging = {"objective": judged.name, "objective_is": judged.title}
    change(folder / "problem.json", **judging, **judged.fields, float=judged.of(problem["float"]))
    rows = [row._replace(accuracy=judged.of(row.accuracy)) for row in history.read(folder / "history.csv")]
    if worthless:
        rows[5] = _worthless(rows[5], judged)
    history.write(folder / "history.csv", rows)
    if finished:
        result = json.loads((folder / "result.json").read_text())
        result |= {**judging, **judged.fields}
        for key in ("float", "uniform8", "found", "finetuned"):
            result[key] = _renamed(result[key], judged)
        result["rivals"] = {name: _renamed(row, judged) for name, row in result["rivals"].items()}
        result["uniform"] = [_renamed(row, judged) for row in result["uniform"]]
        if worthless and judged.unit != "%":
            result["uniform"][0][f"search_{judged.name}"] = None
        write(folder / "result.json", result)
    return folder


def _renamed(row: dict[str, Any], judged: Judged) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in row.items():
        split, _, name = key.partition("_")
        if name == "accuracy":
            found[f"{split}_{judged.name}"] = judged.of(value)
        else:
            found[key] = value
    return found


def _worthless(row: HistoryRow, judged: Judged) -> HistoryRow:
    value = -math.inf if judged.higher_is_better else math.inf
    if judged.unit == "%":
        value = 0.0
    return row._replace(accuracy=value, loss=math.inf, divergence=math.inf)


def write_sweep(folder: Path, judged: Judged) -> Path:
    """A sweep of two targets, two budgets, two solvers and two seeds, with uniform policies."""
    folder.mkdir(parents=True)
    keys = [f"search_{judged.name}", f"test_{judged.name}"]

    def values(accuracy: float) -> dict[str, float]:
        return dict.fromkeys(keys, judged.of(accuracy))

    policy = {"schema": "haq-bit-policy", "version": 1, "layers": [{"name": "a", "weight_bits": 4, "activation_bits": 4}]}
    targets = {}
    for number, hw in enumerate(("edge", "cloud")):
        found = []
        for budget in (0.3, 0.5, 0.7):
            for solver, less in (("ilp", 0.0), ("ddpg", 0.02)):
                accuracy = 0.9 - 0.3 * (0.8 - budget) ** 2 - less - 0.01 * number
                runs = []
                for seed in range(2):
                    one = {"seed": seed, "folder": f"{hw}-{budget}-{solver}-{seed}", "evaluations": 9, "policy": policy}
                    runs.append({**one, "cost": budget, "fraction": budget, **values(accuracy + 0.01 - 0.02 * seed)})
                row = {"budget": str(budget), "solver": solver, "limit": budget, "cost": budget, "fraction": budget}
                found.append({**row, **values(accuracy), "runs": runs, "pareto": solver == "ilp"})
        uniform = [
            {"bits": bits, "cost": bits**2 / 64, "fraction": bits**2 / 64, "pareto": bits > 6, **values(0.2 + 0.0875 * bits)}
            for bits in range(2, 9)
        ]
        targets[hw] = {
            "name": hw,
            "cost_is": "estimated, a chip that isn't, batch 1",
            "kind": "estimated",
            "uniform8": 1.0,
            "left_out": "",
            "uniform": uniform,
            "found": found,
        }
    best = {"folder": "edge-0.5-ilp-0", "solver": "ilp", **values(0.88), "fractions": {"edge": 0.5, "cloud": 0.6}}
    content = {
        "schema": "haq-sweep-2",
        "finished": True,
        "asked": {
            "settings": {"network": "small", "data": "digits", "metric": "latency", "objective": judged.name},
            "hw": ["edge", "cloud"],
            "budgets": ["0.3", "0.5", "0.7"],
            "solvers": ["ilp", "ddpg"],
            "seeds": 2,
        },
        "signature": {},
        "versions": {},
        "network": "small",
        "data": "digits",
        "objective": judged.name,
        "objective_is": judged.title,
        **judged.fields,
        "metric": "latency",
        "unit": "s",
        "accuracy_is": "measured on a desk",
        "images": {"test": 1000, "search": 1000},
        "float": values(0.92),
        "sensitivities": None,
        "targets": targets,
        "specialisation": {"budget": "0.5", "policies": {"edge": best, "cloud": best}},
    }
    write(folder / "sweep.json", content)
    return folder
