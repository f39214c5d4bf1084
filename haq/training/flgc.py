"""Learned group convolutions within the training loop: `haq train --method "flgc(groups=8)"`."""

from __future__ import annotations

from typing import Any

from haq.training.methods import Method, TrainingState


class LearnedGroups(Method):
    """Dense convolutions learn which channels belong together, and become group convolutions (Wang et al., CVPR 2019).

    The mathematics is in `quantizers.pruning.flgc`. Every convolution that has no groups yet, and at least as many channels on
    both sides as there are to be groups, gets two matrices of logits, which are trained with its weights. At the end it runs
    in the groups that were learned.
    """

    needs_all_epochs = False

    def __init__(self, groups: int = 8, learned: bool = True, layers: list[str] | None = None) -> None:
        """Say how many groups.

        Args:
            groups: How many each convolution has, G.
            learned: False: groups stay the random ones, as even as can be, that training begins with otherwise.
            layers: The names of the convolutions; None: all that can.

        Raises:
            ValueError: For another number of groups than 2 and more, and what is no list of names.
        """
        super().__init__()
        if isinstance(groups, bool) or not isinstance(groups, int) or groups < 2:
            raise ValueError(f"flgc has groups={groups!r}; it must be an integer of at least 2")
        if not isinstance(learned, bool):
            raise ValueError(f"flgc has learned={learned!r}; it must be True or False")
        if layers is not None and (not isinstance(layers, list) or not all(isinstance(name, str) for name in layers)):
            raise ValueError(f"flgc has layers={layers!r}; it must be a list of names, such as ['conv2', 'conv3']")
        self.groups = groups
        self.learned = learned
        self.layers = layers
        self.groupings: dict[str, Any] = {}

    def begin(self, training: TrainingState) -> None:
        """Put convolutions that learn groups in the place of dense ones."""
        import quantizers as Q
        from quantizers.pruning import learn_groups

        if Q.quant_layers(training.module):
            raise ValueError("flgc learns the groups of a float network: leave out --scheme, and quantize what it makes")
        learn_groups(training.module, self.groups, layers=self.layers, generator=training.generator, learned=self.learned)

    def finish(self, training: TrainingState) -> None:
        """Put ordinary convolutions of the masked weights back, and note the groups."""
        from quantizers.pruning import learned_groups, make_dense

        self.groupings = learned_groups(training.module)
        make_dense(training.module)

    def rebuilt(self, module: Any) -> Any:
        """Return the network whose convolutions run in their groups."""
        from quantizers.pruning import group_convolutions

        return group_convolutions(module, self.groupings)

    def report(self) -> list[str]:
        """Say what groups were learned: weights that are left, and channels that are dead."""
        sentences = []
        for name, grouping in self.groupings.items():
            pairs = len(grouping.inputs) * len(grouping.outputs)
            text = (
                f"{name}: {len(grouping.live)} groups, {100 * grouping.macs(1, 1) / pairs:.1f} % of the weights and "
                "multiplications left"
            )
            if grouping.dead_inputs:
                text += f"; no filter reads input channels {_numbers(grouping.dead_inputs)}"
            if grouping.dead_outputs:
                text += f"; filters {_numbers(grouping.dead_outputs)} read no channel"
            sentences.append(text)
        return sentences


def _numbers(channels: tuple[int, ...]) -> str:
    return ", ".join(map(str, channels))
