"""What a policy costs on a piece of hardware.

workload = hw_models.trace(network, example)
table = hw_models.load_target("edge").cost_table(workload)
table.latency_s[layer, weight_bits - 1, activation_bits - 1]   # for 1 to 8 bits; then 16 bits and float

What is listed here is imported when it is first used, so `import hw_models` costs nothing and imports no torch.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hw_models.capabilities import Capabilities
    from hw_models.cost import Costs, CostTable, undominated
    from hw_models.function import FunctionTarget
    from hw_models.metrics import METRICS, UNITS
    from hw_models.registry import Registry
    from hw_models.storage import BITS, float_bytes, peak_activation_bytes, storage_bytes, storage_parts
    from hw_models.target import HARDWARE_MODELS, MEASURED, TARGETS, Target, load_target, target_names, target_rows
    from hw_models.tracing import trace
    from hw_models.workload import Call, Layer, Workload

__all__ = [
    "BITS",
    "HARDWARE_MODELS",
    "MEASURED",
    "METRICS",
    "TARGETS",
    "UNITS",
    "Call",
    "Capabilities",
    "CostTable",
    "Costs",
    "FunctionTarget",
    "Layer",
    "Registry",
    "Target",
    "Workload",
    "float_bytes",
    "load_target",
    "peak_activation_bytes",
    "storage_bytes",
    "storage_parts",
    "target_names",
    "target_rows",
    "trace",
    "undominated",
]

_MODULES = {
    "capabilities": ("Capabilities",),
    "cost": ("Costs", "CostTable", "undominated"),
    "metrics": ("METRICS", "UNITS"),
    "function": ("FunctionTarget",),
    "registry": ("Registry",),
    "storage": ("BITS", "float_bytes", "peak_activation_bytes", "storage_bytes", "storage_parts"),
    "target": ("HARDWARE_MODELS", "MEASURED", "TARGETS", "Target", "load_target", "target_names", "target_rows"),
    "tracing": ("trace",),
    "workload": ("Call", "Layer", "Workload"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"hw_models.{_HOMES[name]}"), name)
        globals()[name] = value  # the next time it is simply there
        return value
    # hw_models.bitfusion.Shape and the like work without an import of the module.
    if not name.startswith("_") and importlib.util.find_spec(f"hw_models.{name}"):
        return importlib.import_module(f"hw_models.{name}")
    raise AttributeError(f"module 'hw_models' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
