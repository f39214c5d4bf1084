"""Scales of batch norms: a channel that its batch norm multiplies by little does little.

Liu, Li, Shen, Huang, Yan and Zhang, "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017, section
3: channels of the smallest |gamma| are removed. Ye, Lu, Lin and Wang, "Rethinking the Smaller-Norm-Less-Informative Assumption
in Channel Pruning of Convolution Layers", ICLR 2018, remove by gamma as well; they differ in how it is driven to zero.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from quantizers.pruning.channels import ChannelGroup
from quantizers.pruning.criteria.norm import relative
from quantizers.pruning.criterion import Criterion
from quantizers.pruning.weights import gathered


class BatchNormScale(Criterion, name="bn-scale"):
    """Scores a channel by the magnitude of its batch norm's scale: relative to the norm's mean; of several norms the mean.

    It means most for networks that were trained with a penalty on the scales, as both papers do. Units: multiples of a norm's
    mean |gamma|.
    """

    summary = "magnitude of the batch norm's scale (Liu et al. 2017, network slimming; Ye et al. 2018)"

    def scores(self, network: nn.Module, group: ChannelGroup) -> Tensor:
        """Return the mean over the group's batch norms of their channels' relative |gamma|.

        Raises:
            ValueError: Naming the group, if no batch norm with a scale is in it.
        """
        made = []
        modules = dict(network.named_modules())
        for member in group.members:
            module = modules.get(member.module)
            if not isinstance(module, _BatchNorm) or module.weight is None:
                continue
            scales = module.weight.detach().double().cpu().abs()[:, None]
            made.append(relative(gathered(scales, group, member.module, member.dim).sum(1)))
        if not made:
            raise ValueError(
                f"criterion {self.name!r} can't rank group {group.name!r}: it has no batch norm with a scale; use another "
                "criterion, such as 'l1'"
            )
        return torch.stack(made).mean(0)
