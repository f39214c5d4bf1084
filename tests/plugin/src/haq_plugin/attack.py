"""An attack: every pixel as far as it may go."""

from __future__ import annotations

import torch
from torch import Tensor

from haq.attacks.base import BLACK, EvaluationAttack


class Corners(EvaluationAttack):
    """Moves every pixel as far as it may, up or down at random."""

    knows = BLACK

    def perturb(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return a random corner of the cube around each image."""
        signs = torch.randn_like(images).sign()
        return (images + self.threat.eps * signs).clamp(0, 1)
