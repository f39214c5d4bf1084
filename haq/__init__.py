"""Hardware-aware mixed-precision quantization: a bit width for every layer, with the hardware as judge."""

import os
import sys

# A thread that spins while it waits takes the core another one needs: on a busy machine two threads then run several
# times slower than one. Read once, when torch is first imported.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# `import haq` is enough for haq.solvers.ilp.allocate.
import haq.solvers.ilp
from haq.problem import Problem as Problem
from haq.version import __version__ as __version__
