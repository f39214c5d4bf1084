"""What is searched: a problem, what a policy of it costs, and what a policy is worth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lazy_loader

from hw_models import trust
from hw_models.registry import BUILT_IN, Registry, Row, requires

if TYPE_CHECKING:
    from haq.problem.chance import standard_error as standard_error
    from haq.problem.channels import ChannelProblem as ChannelProblem
    from haq.problem.evaluator import Evaluation as Evaluation
    from haq.problem.objective import Objective as Objective
    from haq.problem.problem import Problem as Problem
    from haq.problem.tabular import TabularProblem as TabularProblem

# What a solver can know of single layers. The last two are computed, without an evaluation.
KINDS = ("loss", "kl", "hessian", "gradient")
# What calibration does about the errors of rounding weights, and how it rounds them (`quantizers.quantize`).
CORRECTIONS = ("analytic",)
ROUNDINGS = ("nearest", "gptq")
lacking = requires("words", "needs_labels", "correct", "loss", "build")
ROBUST = "+robust"  # what is behind the name of an objective that is attacked too


class Objectives(Registry["type[Objective] | Objective"]):
    """Objectives by name; `NAME+robust` is the worst of inputs as they are and attacked."""

    def is_code(self, name: str) -> bool:
        """Say whether a name would be imported; see `Registry.is_code`."""
        return super().is_code(name.removesuffix(ROBUST))

    def rows(self) -> list[Row]:
        """List what can be given; see `Registry.rows`."""
        line = "any of these: the worst of images as they are and under a cheap attack"
        return [*super().rows(), Row(f"NAME{ROBUST}", BUILT_IN, line)]

    def read(self, thing: Any) -> Any:
        """Return the objective that a thing of somebody's stands for; the thing itself where it stands for none."""
        from haq.problem.given import read_objective

        return read_objective(thing)

    def _find(self, name: str, modules: bool) -> type[Objective] | Objective:
        plain = name.removesuffix(ROBUST)
        if plain == name or name in self:
            return self.read(super()._find(name, modules))
        from haq.problem.given import robust

        if modules and self.is_code(name) and plain not in trust.named():
            # Whoever has named the whole has named the part.
            trust.allow(name, self.kind)
            trust.trust(plain)
        return robust(self._find(plain, modules))


# Objectives by name.
OBJECTIVES = Objectives(
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
        "top5": ("haq.problem.metrics:Top5", "the share of images whose label is among the five best answers"),
        "miou": ("haq.problem.metrics:MeanIoU", "segmentation: mean intersection over union of the classes"),
        "map": ("haq.problem.metrics:MeanAP", "detection: mean average precision of boxes"),
        "f1": ("haq.problem.metrics:F1", "several labels a sample: F1 score, the mean over labels"),
        "mse": ("haq.problem.metrics:Mse", "numbers: mean squared error"),
        "mae": ("haq.problem.metrics:Mae", "numbers: mean absolute error"),
        "r2": ("haq.problem.metrics:R2", "numbers: coefficient of determination"),
        "psnr": ("haq.problem.metrics:Psnr", "pictures: peak signal-to-noise ratio in dB"),
        "ssim": ("haq.problem.metrics:Ssim", "pictures: structural similarity"),
        "perplexity": ("haq.problem.metrics:Perplexity", "language models: perplexity of tokens"),
        "cosine": ("haq.problem.metrics:Cosine", "embeddings: cosine similarity to the float network's, without targets"),
    },
    check=lacking,
)

__getattr__, _, __all__ = lazy_loader.attach(
    __name__,
    submodules=["budget", "chance", "decision", "evaluator", "objective", "prefix_cache", "problem", "sensitivity"],
    submod_attrs={
        "chance": ["standard_error"],
        "channels": ["ChannelProblem"],
        "evaluator": ["Evaluation"],
        "objective": ["Objective"],
        "problem": ["Problem"],
        "tabular": ["TabularProblem"],
    },
)
__all__ += ["CORRECTIONS", "KINDS", "OBJECTIVES", "ROBUST", "ROUNDINGS"]


def __dir__() -> list[str]:
    return sorted(__all__)
