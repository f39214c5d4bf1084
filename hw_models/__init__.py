"""What a policy costs on a piece of hardware.

workload = hw_models.trace(network, example)
table = hw_models.load_target("edge").cost_table(workload)
table.latency_s[layer, weight_bits - 1, activation_bits - 1]
"""

from hw_models.cost import METRICS, UNITS, Costs, CostTable, undominated
from hw_models.target import Target, load_target, target_names
from hw_models.workload import Call, Layer, Workload, trace

__all__ = [
    "METRICS",
    "UNITS",
    "Call",
    "CostTable",
    "Costs",
    "Layer",
    "Target",
    "Workload",
    "load_target",
    "target_names",
    "trace",
    "undominated",
]
