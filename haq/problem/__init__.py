"""What is searched: a problem, what a policy of it costs, and what a policy is worth."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

from hw_models.registry import Registry, requires

if TYPE_CHECKING:
    from haq.problem.chance import standard_error as standard_error
    from haq.problem.evaluator import Evaluation as Evaluation
    from haq.problem.objective import Objective as Objective
    from haq.problem.problem import Problem as Problem

# What a solver can know of single layers. The last two are computed, without an evaluation.
KINDS = ("loss", "kl", "hessian", "gradient")
# What calibration does about the errors of rounding weights, and how it rounds them (`quantizers.quantize`).
CORRECTIONS = ("analytic",)
ROUNDINGS = ("nearest", "gptq")
lacking = requires("words", "needs_labels", "correct", "loss", "build")
OBJECTIVES: Registry[type[Objective]] = Registry(
    "objective",
    "haq.objectives",
    {
        "accuracy": ("haq.problem.objective:Accuracy", "the share of images that are classified correctly"),
        "agreement": (
            "haq.problem.objective:Agreement",
            "the share of the float network's answers that are kept, without labels",
        ),
        "accuracy+robust": (
            "haq.problem.objective:RobustAccuracy",
            "the share of images that are classified correctly both as they are and attacked",
        ),
    },
    check=lacking,
)

__getattr__, _, __all__ = lazy_loader.attach(
    __name__,
    submodules=["budget", "chance", "decision", "evaluator", "objective", "prefix_cache", "problem", "sensitivity"],
    submod_attrs={
        "chance": ["standard_error"],
        "evaluator": ["Evaluation"],
        "objective": ["Objective"],
        "problem": ["Problem"],
    },
)
__all__ += ["CORRECTIONS", "KINDS", "OBJECTIVES", "ROUNDINGS"]


def __dir__() -> list[str]:
    return sorted(__all__)
