"""Folders of runs and sweeps as they are on disk, written by hand: any number of layers and evaluations, in no time."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

from haq.store.history import COLUMNS

FLOAT = 0.931
LIMIT = 0.5  # of uniform 8 bits
OBJECTIVES = {
    "accuracy": "accuracy",
    "agreement": "agreement with the float network's answers, without labels",
    "accuracy+robust": "worst of clean and PGD-3 at 8/255",
}


def write_run(
    folder: Path,
    *,
    layers: tuple[str, ...] = ("stem", "depthwise", "pointwise", "classifier"),
    evaluations: int = 12,
    solvers: tuple[str, ...] = ("ddpg", "greedy", "ilp"),
    network: str = "small",
    target: str = "edge",
    finished: bool = True,
    metric: str = "latency",
    objective: str = "accuracy",
) -> Path:
    """A run that tried random policies; the first solver's best is what was found."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    unit = {"latency": ("s", 1e-6), "energy": ("J", 1e-6), "storage": ("B", 100.0)}[metric]
    costs = [[[unit[1] * (i + 1) * (w + 1) * (a + 1) for a in range(8)] for w in range(8)] for i in range(len(layers))]
    uniform8 = sum(cost[7][7] for cost in costs)
    problem = {
        "schema": "haq-problem-2",
        "network": network,
        "origin": "written by hand",
        "data": "digits: 10 classes, 100 train / 1,000 search / 1,000 test images",
        "images": 1000,
        "target": {"name": target, "description": "a chip that isn't", "batch": 1, "provenance": "estimated"},
        "metric": metric,
        "unit": unit[0],
        "limit": LIMIT * uniform8,
        "uniform8": uniform8,
        "smallest": 0.1 * uniform8,
        "bits": [2, 8],
        "objective": objective,
        "objective_is": OBJECTIVES[objective],
        "float": FLOAT,
        "layers": [
            {"name": name, "kind": "conv", "macs": 1000, "parameters": 10, "fixed": i == 0, "cost": costs[i]}
            for i, name in enumerate(layers)
        ],
    }
    rows, best = [",".join(COLUMNS)], None
    for solver in solvers:
        for number in range(1, evaluations + 1):
            w, a = ([8] + [draw.randint(2, 8) for _ in layers[1:]] for _ in range(2))
            cost = sum(one[x - 1][y - 1] for one, x, y in zip(costs, w, a, strict=True))
            accuracy = round(FLOAT - 0.4 * draw.random() ** 3, 4)
            within = cost <= LIMIT * uniform8
            cells = [solver, str(number), "-".join(map(str, w)), "-".join(map(str, a)), str(accuracy), "0.3", repr(cost)]
            rows.append(",".join([_quoted(cells[0]), *cells[1:], str(int(within)), "0.01"]))
            if solver == solvers[0] and within and (best is None or (-accuracy, cost) < (-best[0], best[1])):
                best = accuracy, cost, w, a
    settings = {
        "network": network,
        "data": "digits",
        "hw": target,
        "metric": metric,
        "budget": "0.5",
        "solver": solvers[0],
        "evaluations": evaluations,
        "seed": 0,
    }
    config = {
        "schema": "haq-run-2",
        "command": f"python -m haq.search --evaluations {evaluations}",
        "settings": settings,
        "signature": {},
        "versions": {"haq": "0.1.0"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    write(folder / "problem.json", problem)
    (folder / "history.csv").write_text("\n".join(rows) + "\n")
    if best is None:
        return folder
    policy = [{"name": n, "weight_bits": x, "activation_bits": y} for n, x, y in zip(layers, best[2], best[3], strict=True)]
    write(folder / "policy.json", {"schema": "haq-bit-policy", "version": 1, "layers": policy})
    if finished:
        write(folder / "result.json", _result(problem, solvers, evaluations, best))
    return folder


def _result(problem: dict[str, Any], solvers: tuple[str, ...], evaluations: int, best: Any) -> dict[str, Any]:
    def entry(search: float, test: float, cost: float | None) -> dict[str, float | None]:
        costs = {"latency_s": None, "energy_j": None, "storage_bytes": 4096.0}
        key = {"latency": "latency_s", "energy": "energy_j", "storage": "storage_bytes"}[problem["metric"]]
        judged = {f"search_{objective}": search, f"test_{objective}": test}
        plain = {} if objective == "agreement" else {"search_accuracy": search, "test_accuracy": test}
        if objective == "accuracy+robust":
            plain = {name: share + 0.05 for name, share in plain.items()}
        return {**plain, **judged, **costs, key: cost}

    uniform8, objective = problem["uniform8"], problem["objective"]
    return {
        "schema": "haq-result-2",
        "network": problem["network"],
        "data": "digits",
        "target": problem["target"]["name"],
        "solver": solvers[0],
        "evaluations": dict.fromkeys(solvers, evaluations),
        "seed": 0,
        "objective": objective,
        "objective_is": OBJECTIVES[objective],
        "accuracy_is": "measured on a desk",
        "cost_is": "estimated, a chip that isn't, batch 1",
        "budget": {
            "metric": problem["metric"],
            "unit": problem["unit"],
            "limit": problem["limit"],
            "used": best[1],
            "fraction": LIMIT,
            "used_fraction": best[1] / uniform8,
            "holds": True,
        },
        "float": entry(FLOAT, 0.9251, None),
        "uniform8": entry(0.93, 0.9242, uniform8),
        "uniform": [{"bits": b, "cost": uniform8 * b * b / 64, f"search_{objective}": 0.7 + 0.028 * b} for b in range(2, 9)],
        "found": entry(best[0], 0.9133, best[1]),
        "finetuned": entry(best[0], 0.9224, best[1]),
        "rivals": {name: entry(0.9, 0.8915, best[1]) for name in solvers[1:]},
        "rival_policies": {},
    }


def write_robustness(run: Path, masked: bool = True) -> None:
    """What `haq.robustness` writes, of two networks; the second one's gradients are masked, if any are."""
    one = {
        "is": "as it was loaded",
        "threat": {"eps": 8 / 255, "norm": "linf"},
        "effort": "quick",
        "classes": 10,
        "images": 100,
        "clean": 0.91,
        "worst": 0.04,
        "attacks": {"noise": 0.8, "pgd": 0.05, "transfer-twin": 0.06},
        "checks": [{"name": "no gradient is zero", "passed": True, "figures": "0.0 % of images without any"}],
        "curve": [[0.0, 0.91], [4 / 255, 0.4], [8 / 255, 0.05]],
        "curve_images": 100,
        "masked": False,
        "verdict": "worst case over all attacks",
    }
    other = {
        **one,
        "is": "the policy of ddpg",
        "worst": 0.123,
        "attacks": {"noise": 0.8, "pgd": 0.2},
        "deployed": {"images": 100, "right": 12, "different": 0, "reason": None},
    }
    if masked:
        failed = {"name": "no gradient is zero", "passed": False, "figures": "99.0 % of images without any"}
        other |= {"checks": [failed], "masked": True, "verdict": "upper bound: gradients are masked"}
    content = {
        "schema": "haq-robustness-2",
        "source": "run",
        "network": "small",
        "data": "digits",
        "images": 100,
        "threat": "linf, eps 8/255",
        "attacks": "quick",
        "backward": "ste",
        "requantized_input": False,
        "seed": 0,
        "networks": {"float": one, "found": other},
    }
    (run / "robustness").mkdir()
    write(run / "robustness" / "robustness.json", content)


WIDE = [*range(1, 9), 16, 32]
PAIRS = ((8, 8), (4, 8), (8, 16), (16, 16), (32, 32), (4, 32))


def write_wide_run(folder: Path, *, layers: int = 5, evaluations: int = 8, goal: bool = False, budget: bool = True) -> Path:
    """A finished run on a chip of a few pairs, with 16 bits and float, within three budgets.

    Args:
        folder: Where.
        layers: How many; the first and the last are fixed at 8/16, which the reference has there.
        evaluations: Of each of two solvers.
        goal: Whether the cheapest policy was looked for.
        budget: Whether the main metric is limited, too.
    """
    names = tuple(f"layer{i}" for i in range(layers))
    write_run(folder, layers=names, evaluations=evaluations, solvers=("ilp", "greedy"))
    problem, result = (json.loads((folder / name).read_text()) for name in ("problem.json", "result.json"))
    draw = random.Random(1)
    for index, layer in enumerate(problem["layers"]):
        layer["cost"] = [[None] * 10 for _ in range(10)]
        for w, a in PAIRS:
            layer["cost"][WIDE.index(w)][WIDE.index(a)] = 1e-6 * (index + 1) * w * a
        layer["fixed"] = index in (0, layers - 1)
    before = [(8, 16), *[(8, 8)] * (layers - 2), (8, 16)]

    def cost(policy: Any) -> float:
        pairs = zip(problem["layers"], policy, strict=True)
        return sum(layer["cost"][WIDE.index(w)][WIDE.index(a)] for layer, (w, a) in pairs)

    def encoded(policy: Any) -> dict[str, Any]:
        pairs = zip(names, [[None if width == 32 else width for width in pair] for pair in policy], strict=True)
        rows = [{"name": name, "weight_bits": w, "activation_bits": a} for name, (w, a) in pairs]
        return {"schema": "haq-bit-policy", "version": 1, "layers": rows}

    whole, words = cost(before), "8 bits, 8/16 in layer0, 8/16 in layer4, where 8/8 can't be done"
    limit = 1.5 * whole if budget else None
    further = [("storage", "B", 40_000.0, 50_000.0), ("peak_memory", "B", 256_000.0, 300_000.0)]
    rows, tried = [",".join([*COLUMNS, *(metric for metric, *_ in further)])], []
    for solver in ("ilp", "greedy"):
        for number in range(1, evaluations + 1):
            policy = [(8, 16), *(draw.choice(PAIRS) for _ in names[2:]), (8, 16)]
            others = [draw.uniform(0.4, 1.2) * amount for _, _, amount, _ in further]
            accuracy = round(FLOAT - 0.05 * draw.random(), 4)
            within = all(used <= amount for used, (_, _, amount, _) in zip(others, further, strict=True))
            within = within and (limit is None or cost(policy) <= limit) and (not goal or accuracy >= FLOAT - 0.02)
            widths = ["-".join("float" if width == 32 else str(width) for width in side) for side in zip(*policy, strict=True)]
            cells = [solver, str(number), *widths, str(accuracy), "0.3", repr(cost(policy)), str(int(within)), "0.01"]
            rows.append(",".join([*cells, *map(repr, others)]))
            if within and solver == "ilp":
                rank = (cost(policy), -accuracy) if goal else (-accuracy, cost(policy))
                tried.append((rank, policy, accuracy, others))
    _, policy, accuracy, others = min(tried)
    (folder / "history.csv").write_text("\n".join(rows) + "\n")
    write(folder / "policy.json", encoded(policy))
    main = {
        "metric": "latency",
        "unit": "s",
        "amount": limit,
        "reference": whole,
        "smallest": whole / 3,
        "largest": 20 * whole,
    }
    limits = [main] if budget else []
    for metric, unit, amount, reference in further:
        least = {"smallest": amount / 3, "largest": reference}
        limits.append({"metric": metric, "unit": unit, "amount": amount, "reference": reference, **least})
    asked = {"kind": "cheapest", "is": "the cheapest that loses at most 2 points of accuracy", "least": FLOAT - 0.02}
    goals = {"goal": {**asked, "max_drop": 0.02}} if goal else {}
    problem |= {"limit": limit, "uniform8": whole, "bits": [2, 32], "reference": words, "limits": limits, **goals}
    problem["widths"] = {"weights": [4, 8, 16, None], "activations": [8, 16, None]}
    problem["reference_policy"] = encoded(before)
    write(folder / "problem.json", problem)
    used = [("latency", "s", limit, whole, cost(policy))]
    used += [(*one, mine) for one, mine in zip(further, others, strict=True)]
    budgets = []
    for metric, unit, amount, reference, mine in used:
        fraction = None if amount is None else amount / reference
        shares = {"fraction": fraction, "used_fraction": mine / reference, "holds": amount is None or mine <= amount}
        budgets.append({"metric": metric, "unit": unit, "limit": amount, "used": mine, **shares})
    costs = {"latency_s": cost(policy), "storage_bytes": others[0], "peak_memory_bytes": others[1]}
    wholes = {"latency_s": whole, "storage_bytes": further[0][3], "peak_memory_bytes": further[1][3]}
    result["found"] |= {**costs, "search_accuracy": accuracy}
    result["finetuned"] |= costs
    result["uniform8"] |= wholes
    result |= {"budget": budgets[0], "budgets": budgets, "reference": words, "policy": encoded(policy), **goals}
    uniform = [(8, 8), ("8/16", 16), ("float", 1024)]
    result["uniform"] = [
        {"bits": name, "cost": whole * size / 8, "search_accuracy": 0.9 + 0.01 * i} for i, (name, size) in enumerate(uniform)
    ]
    if goal:
        values = {"search": accuracy, "search_holds": True, "test": 0.9033, "test_least": 0.9051, "test_holds": False}
        errors = {"search_error": 0.01, "test_error": 0.0125}
        result["reached"] = {"objective": "accuracy", "least": FLOAT - 0.02, "max_drop": 0.02, **values, **errors}
        result["found"]["test_accuracy"] = 0.9033
    write(folder / "result.json", result)
    return folder


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def change(path: Path, **changes: Any) -> None:
    """Put other values into a JSON file."""
    write(path, {**json.loads(path.read_text(encoding="utf-8")), **changes})


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"' if set(cell) & set(',"') else cell
