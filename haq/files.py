"""The files of runs and sweeps: their names, and the schemas that say what is in them. Nothing is imported here, so that what
only reads them is quick to start."""

from __future__ import annotations

from pathlib import Path

# Of a run.
CONFIG, PROBLEM, HISTORY = "config.yaml", "problem.json", "history.csv"
POLICY, RESULT, SENSITIVITY = "policy.json", "result.json", "sensitivity.json"
ROBUSTNESS = Path("robustness")  # a folder
ATTACKED = "robustness.json"  # in it
REPORT = "report.html"
# Of a sweep.
SWEEP = "sweep.json"

RUN_SCHEMA, PROBLEM_SCHEMA, RESULT_SCHEMA = "haq-run-1", "haq-problem-1", "haq-result-1"
ROBUSTNESS_SCHEMA, SWEEP_SCHEMA = "haq-robustness-1", "haq-sweep-1"

COLUMNS = (  # of the history
    "solver",
    "evaluation",
    "weight_bits",
    "activation_bits",
    "accuracy",
    "loss",
    "cost",
    "within_budget",
    "divergence",
)
