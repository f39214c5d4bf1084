"""Hardware-aware mixed-precision quantization: a bit width for every layer, with the hardware as judge.

    problem = haq.Problem(net, calibrate=train_loader, search=held_out_loader, target="edge", budget=0.5)
    result = haq.solve(problem, "ddpg", evaluations=200)

What is listed here is imported when it is first used, so `import haq` costs nothing and imports no torch.
"""

import os
import sys

import lazy_loader

from haq.version import __version__ as __version__

# A thread that spins while it waits takes the core another one needs: on a busy machine two threads then run several
# times slower than one. Read once, when torch is first imported.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# The names stand in __init__.pyi.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
