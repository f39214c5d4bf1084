"""Attacks on networks, and what can be believed of their outcome.

An attack of your own is one file with one class in it; `EvaluationAttack` in haq/attacks/base.py says what it has:

    # corners.py
    import torch
    from haq.attacks.base import BLACK, EvaluationAttack

    class Corners(EvaluationAttack):
        \"\"\"Every pixel moves as far as it may, up or down at random.\"\"\"

        knows = BLACK

        def perturb(self, images, labels):
            return (images + self.threat.eps * torch.randn_like(images).sign()).clamp(0, 1)

    python -m haq.robustness RUN --attacks standard,corners:Corners

A package offers one under a name of its own in its pyproject.toml, and with `efforts = ("standard", "full")` in the class it
belongs to these efforts wherever the package is installed:

    [project.entry-points."haq.attacks"]
    corners = "corners:Corners"
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lazy_loader

from hw_models.registry import Registry, join_words, requires

if TYPE_CHECKING:
    from haq.attacks.assessment import Assessment as Assessment
    from haq.attacks.assessment import assess as assess
    from haq.attacks.base import EvaluationAttack as EvaluationAttack
    from haq.attacks.proxy import ProxyAttack as ProxyAttack
    from haq.attacks.threat_model import ThreatModel as ThreatModel

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "assessment": ["Assessment", "assess"],
        "base": ["EvaluationAttack"],
        "proxy": ["ProxyAttack"],
        "threat_model": ["ThreatModel"],
    },
)
__all__ += ["ATTACKS"]

_HERE = "haq.attacks.evaluation_attacks"


def _lacking(attack: Any) -> str:
    """Say what something must have to be an attack, and hasn't."""
    missing = requires("make", "run", "perturb", "passes", "knows", "efforts", "least_classes")(attack)
    return missing or join_words(sorted(getattr(attack, "__abstractmethods__", ())))


# In the order in which an assessment tries them: an image is kept from the first attack that fools the network.
ATTACKS: Registry[type[EvaluationAttack]] = Registry(
    "attack",
    "haq.attacks",
    {
        "noise": (f"{_HERE}:Noise", "signs at random (l2: directions), as large as the ball; the worst of some draws"),
        "fgsm": (f"{_HERE}:FGSM", "one step along the gradient's sign (Goodfellow et al., ICLR 2015)"),
        "rfgsm": (f"{_HERE}:RFGSM", "half of the way at random, then one such step (Tramer et al., ICLR 2018)"),
        "pgd": (f"{_HERE}:PGD", "many steps, from random starts (Madry et al., ICLR 2018)"),
        "pgd-dlr": (f"{_HERE}:PGDOnDLR", "the same on the DLR loss, which no scale of the logits changes"),
        "pgd-temperature": (
            f"{_HERE}:PGDWithTemperatures",
            "the same with logits times a temperature of each image's own (Gupta and Ajanthan, AAAI 2022)",
        ),
        "apgd-ce": (f"{_HERE}:APGDOnCrossEntropy", "steps that adapt (Croce and Hein, ICML 2020)"),
        "apgd-dlr": (f"{_HERE}:APGDOnDLR", "the same on the DLR loss"),
        "apgd-dlr-targeted": (f"{_HERE}:APGDTargeted", "the same towards one class after the other"),
        "square": (f"{_HERE}:Square", "random search without gradients (Andriushchenko et al., ECCV 2020)"),
        "transfer": (f"{_HERE}:Transfer", "what fools other networks, tried on this one"),
        "pgd-ste": (f"{_HERE}:PGDThrough", "pgd with straight-through gradients, where other attacks have others"),
        "pgd-bpda-identity": (f"{_HERE}:PGDThrough", "pgd as if inputs of layers weren't quantized, on the way back"),
        "pgd-bpda-soft": (f"{_HERE}:PGDThrough", "pgd with the slopes of a smooth staircase on the way back"),
        "pgd-twin": (f"{_HERE}:PGDThrough", "pgd with the gradient of the float network"),
    },
    check=_lacking,
    forms={"transfer-NAME": "what fools the network of that name, such as twin, tried on this one"},
)
