"""Training: the one loop, fine-tuning, and attackers to train against."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from haq.training.adversaries import Adversary as Adversary
    from haq.training.adversaries import TrainingAttack as TrainingAttack
    from haq.training.config import Judgement as Judgement
    from haq.training.config import OnOutcome as OnOutcome
    from haq.training.config import Outcome as Outcome
    from haq.training.config import TrainConfig as TrainConfig
    from haq.training.finetuning import ShortTuning as ShortTuning
    from haq.training.finetuning import finetune as finetune
    from haq.training.finetuning import hold_out as hold_out
    from haq.training.finetuning import judge_of as judge_of
    from haq.training.finetuning import refresh_norms as refresh_norms
    from haq.training.loop import accuracy as accuracy
    from haq.training.loop import agreement as agreement
    from haq.training.loop import augment as augment
    from haq.training.loop import fit as fit
    from haq.training.loop import fixed_weights as fixed_weights
    from haq.training.methods import METHODS as METHODS
    from haq.training.methods import Method as Method
    from haq.training.methods import build_method as build_method
    from haq.training.reconstruction import reconstruct as reconstruct

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["adversaries", "config", "loop", "finetuning", "methods", "optimizers", "reconstruction"],
    submod_attrs={
        "adversaries": ["Adversary", "TrainingAttack"],
        "config": ["Judgement", "OnOutcome", "Outcome", "TrainConfig"],
        "loop": ["accuracy", "agreement", "augment", "fit", "fixed_weights"],
        "finetuning": ["ShortTuning", "finetune", "hold_out", "judge_of", "refresh_norms"],
        "methods": ["METHODS", "Method", "build_method"],
        "reconstruction": ["reconstruct"],
    },
)
