"""What a policy costs on a piece of hardware.

workload = hw_models.trace(network, example)
table = hw_models.load_target("edge").cost_table(workload)
table.latency_s[layer, weight_bits - 1, activation_bits - 1]
"""

from hw_models.cost import METRICS, UNITS, Costs, CostTable, undominated
from hw_models.storage import float_bytes, peak_activation_bytes, storage_bytes, storage_parts
from hw_models.target import MEASURED, Target, load_target, target_names
from hw_models.workload import Call, Layer, Workload, trace

__all__ = [
    "MEASURED",
    "METRICS",
    "UNITS",
    "Call",
    "CostTable",
    "Costs",
    "Layer",
    "Target",
    "Workload",
    "float_bytes",
    "load_target",
    "peak_activation_bytes",
    "storage_bytes",
    "storage_parts",
    "target_names",
    "trace",
    "undominated",
]
