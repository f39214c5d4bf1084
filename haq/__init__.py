"""Hardware-aware mixed-precision quantization: a bit width for every layer, with the hardware as judge.

    problem = haq.Problem(net, calibrate=train_loader, search=held_out_loader, target="edge", budget=0.5)
    result = haq.solve(problem, "ddpg", evaluations=200)

What is listed here is imported when it is first used, so `import haq` costs nothing and imports no torch.
"""

import os
import sys
from typing import TYPE_CHECKING

import lazy_loader

from haq.version import __version__ as __version__

if TYPE_CHECKING:
    from haq import attacks as attacks
    from haq import data as data
    from haq import deploy as deploy
    from haq import deployment as deployment
    from haq import networks as networks
    from haq import problem as problem
    from haq import solvers as solvers
    from haq import training as training
    from haq.problem.evaluator import Evaluation as Evaluation
    from haq.problem.objective import Objective as Objective
    from haq.problem.problem import Problem as Problem
    from haq.problem.sensitivity import Sensitivities as Sensitivities
    from haq.solvers.base import Session as Session
    from haq.solvers.base import Solver as Solver
    from haq.solvers.base import Trial as Trial
    from haq.study.solving import Result as Result
    from haq.study.solving import load as load
    from haq.study.solving import solve as solve

# A thread that spins while it waits takes the core another one needs: on a busy machine two threads then run several
# times slower than one. Read once, when torch is first imported.
if "torch" not in sys.modules:
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["attacks", "data", "deploy", "deployment", "networks", "problem", "solvers", "training"],
    submod_attrs={
        "problem.evaluator": ["Evaluation"],
        "problem.objective": ["Objective"],
        "problem.problem": ["Problem"],
        "problem.sensitivity": ["Sensitivities"],
        "solvers.base": ["Session", "Solver", "Trial"],
        "study.solving": ["Result", "load", "solve"],
    },
)
__all__ += ["__version__"]
