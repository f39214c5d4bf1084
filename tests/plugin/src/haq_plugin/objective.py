"""An objective: the share of images whose label is among the two best answers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from haq.problem.objective import Objective


class TopTwo(Objective):
    """Counts an image if its label is among the two largest class scores."""

    name = "plugin_objective"
    words = "the share of images whose label is among the two best answers"

    def correct(self, outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Say which images count."""
        return (outputs[0].topk(2).indices == labels[:, None]).any(1)
