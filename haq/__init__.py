"""Hardware-aware mixed-precision quantization: a bit width for every layer, with the hardware as judge."""

import importlib
import os
import sys
from typing import TYPE_CHECKING, Any

from haq.version import __version__ as __version__

if TYPE_CHECKING:
    import haq.solvers.ilp
    from haq.problem.problem import Problem as Problem

# A thread that spins while it waits takes the core another one needs: on a busy machine two threads then run several
# times slower than one. Read once, when torch is first imported.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def __getattr__(name: str) -> Any:
    """`haq.Problem` and `haq.solvers.ilp` are there after `import haq`, but torch is imported when one of them is used: what
    only reads files does without its seconds."""
    if name == "Problem":
        return importlib.import_module("haq.problem.problem").Problem
    if name == "solvers":
        importlib.import_module("haq.solvers.ilp")
        return sys.modules["haq.solvers"]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
