"""Generative adversarial learning of soft masks within the training loop: `haq train --method "gal(penalty=0.01)"`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from haq.training.methods import Method, TrainingState, forget

if TYPE_CHECKING:
    from torch import Tensor, nn

    from quantizers.pruning.gal import Discriminator, Fista, SoftMasks

RESTART = 0.5  # FISTA begins anew once the learning rate has fallen to this share of what it was
MOMENTUM = 0.9  # of the discriminator's optimizer, as of the network's
DECAY = 2e-4  # of the discriminator's weights (Lin et al. 2019)


class GenerativeAdversarial(Method):
    """Channels get soft masks that are learned against a discriminator, without labels (GAL, Lin et al., CVPR 2019).

    The mathematics is in `quantizers.pruning.gal`. The network must be trained already. In the first epochs it is the
    generator: its outputs are to be those that it had before, while FISTA makes masks zero; targets play no part. In the other
    epochs masks stay as they are, and what is left is fine-tuned by the loss of the training. In the end masks become part of
    the weights, and channels whose masks are zero are removed.

    The discriminator has the learning rate of the network's weights, and masks have it too unless they get one of their own.
    The schedule goes through the generator's epochs, and through those of fine-tuning once more.
    """

    needs_trained = True
    needs_all_epochs = True

    def __init__(
        self,
        penalty: float = 0.01,
        mu: float = 1.0,
        every: int = 1,
        tune: float = 0.5,
        rate: float | None = None,
        blocks: bool = False,
    ) -> None:
        """Say how much is to be pruned.

        Args:
            penalty: lambda, the weight of the masks' sum: the more, the fewer channels are left.
            mu: The weight of the squared distance of outputs.
            every: Steps of training for each step of the masks. (The paper has 200, in hundreds of epochs.)
            tune: The share of the epochs, the last ones, in which what is left is fine-tuned.
            rate: The learning rate of masks, at its highest; None: that of the network's weights.
            blocks: Whether residual blocks have masks too, so that whole blocks can go.

        Raises:
            ValueError: For a value outside that.
        """
        super().__init__()
        for name, value in (("penalty", penalty), ("mu", mu)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise ValueError(f"gal has {name}={value!r}; it must be a number from 0 on")
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise ValueError(f"gal has every={every!r}; it must be a number of steps from 1 on")
        if isinstance(tune, bool) or not isinstance(tune, (int, float)) or not 0 <= tune < 1:
            raise ValueError(f"gal has tune={tune!r}; it must be a share of the epochs, from 0 to below 1")
        if rate is not None and (isinstance(rate, bool) or not isinstance(rate, (int, float)) or not 0 < rate < math.inf):
            raise ValueError(f"gal has rate={rate!r}; it must be a number above 0, or None for that of the weights")
        if not isinstance(blocks, bool):
            raise ValueError(f"gal has blocks={blocks!r}; it must be True or False")
        self.blocks = blocks
        self.penalty = float(penalty)
        self.mu = float(mu)
        self.every = every
        self.tune = float(tune)
        self.rate = rate
        self.highest = 0.0  # learning rate of masks since FISTA began anew
        self.baseline: nn.Module
        self.masks: SoftMasks
        self.discriminator: Discriminator
        self.fista: Fista

    def generator_epochs(self, training: TrainingState) -> int:
        """Return how many epochs, the first ones, masks are learned in: at least one."""
        return max(1, training.epochs - round(self.tune * training.epochs))

    def begin(self, training: TrainingState) -> None:
        """Keep the network as it is for the baseline, and attach masks to it; make the discriminator."""
        import torch

        import quantizers as Q
        from quantizers.pruning import Discriminator, Fista, SoftMasks, channel_groups, residual_blocks

        network = training.network
        if Q.quant_layers(training.module):
            raise ValueError("gal prunes float networks: leave out --scheme, and quantize what it makes")
        if training.config.amp:
            raise ValueError("gal moves masks by their gradients in float32: leave out --amp")
        if self.rate is not None and not training.config.learning_rate > 0:
            raise ValueError(
                f"gal has rate={self.rate!r} for masks, and the learning rate of weights is 0: it must be above 0"
            )
        if not network.input_shape:
            raise ValueError(f"{network.name} doesn't say of which shape its images are, which gal reads its channels from")
        self.baseline = Q.copy_network(training.module).eval().requires_grad_(False)
        example = torch.zeros(1, *network.input_shape, device=network.device)
        with torch.no_grad():
            scores = training.outputs(self.baseline, example)
        if not isinstance(scores, torch.Tensor) or scores.dim() != 2:
            raise ValueError(f"gal holds class scores against each other, and {network.name} returns something else")
        blocks = {}
        if self.blocks:
            blocks = residual_blocks(training.module, example)
            if not blocks:
                raise ValueError(f"gal has blocks=True, and {network.name} has no residual block that could go: leave it out")
        self.masks = SoftMasks(training.module, channel_groups(training.module, example), blocks)
        self.discriminator = Discriminator(scores.shape[1], training.generator).to(network.device)
        self.fista = Fista([*self.masks.masks, *self.masks.block_masks])
        self.modules = {"masks": self.masks, "discriminator": self.discriminator}
        self.optimizers = {
            "discriminator": torch.optim.SGD(self.discriminator.parameters(), lr=0.0, momentum=MOMENTUM, weight_decay=DECAY)
        }

    def is_generator(self, training: TrainingState) -> bool:
        """Say whether the next step, or the one under way, is one in which masks are learned."""
        return training.step < self.generator_epochs(training) * training.steps_per_epoch

    def position(self, training: TrainingState) -> tuple[int, int]:
        """Let the schedule go through the generator's epochs, and then through the others."""
        first = min(self.generator_epochs(training) * training.steps_per_epoch, training.steps)
        if training.step < first:
            return training.step, first
        return training.step - first, training.steps - first

    def before_epoch(self, training: TrainingState) -> None:
        """Extrapolate masks for the next step; where fine-tuning begins, forget the momentum of weights."""
        self.masks.requires_grad_(self.is_generator(training))
        if self.is_generator(training):
            self._prepare(training)
        elif training.epoch == self.generator_epochs(training):
            for parameter in training.module.parameters():
                forget(training.optimizers, parameter)

    def loss(self, training: TrainingState, inputs: Any, targets: Any, outputs: Any, loss: Tensor) -> Tensor:
        """Return the generator's loss, after a step of the discriminator; the usual loss in fine-tuning."""
        import torch

        from quantizers.pruning import discriminator_loss, generator_loss

        if not self.is_generator(training):
            return loss
        with torch.no_grad():
            expected = training.outputs(self.baseline, inputs, targets)
        optimizer = self.optimizers["discriminator"]
        for group in optimizer.param_groups:
            group["lr"] = self._learning_rate(training)
        optimizer.zero_grad()
        discriminator_loss(self.discriminator(expected), self.discriminator(outputs.detach())).backward()
        optimizer.step()
        self.fista.zero_grad()
        return generator_loss(outputs, expected, self.discriminator(outputs), self.mu)

    def after_step(self, training: TrainingState) -> None:
        """Move the masks, where it is their turn, and extrapolate them for the next step."""
        done = training.step
        if done > self.generator_epochs(training) * training.steps_per_epoch:
            return
        if done % self.every == 0:
            rate = self._learning_rate(training)
            if self.rate is not None:
                rate *= self.rate / training.config.learning_rate
            if rate <= RESTART * self.highest:
                self.fista.restart()
                self.highest = rate
            self.highest = max(rate, self.highest)
            self.fista.step(rate, self.penalty)
        self._prepare(training)

    def after_epoch(self, training: TrainingState) -> None:
        """Put masks where they are between steps: so networks are judged."""
        self.fista.settle()
        self.fista.zero_grad()

    def _prepare(self, training: TrainingState) -> None:
        """Extrapolate the masks, if the next step is one of theirs."""
        if self.is_generator(training) and (training.step + 1) % self.every == 0:
            self.fista.extrapolate()

    def may_keep(self, training: TrainingState) -> bool:
        """Allow the networks of fine-tuning; without fine-tuning the last one."""
        return training.epoch > self.generator_epochs(training) or training.epoch == training.epochs

    def finish(self, training: TrainingState) -> None:
        """Make the masks part of the weights."""
        self.masks.fold(training.module)

    def rebuilt(self, module: nn.Module) -> nn.Module:
        """Return the network without the channels and the blocks whose masks are zero."""
        from quantizers.pruning import remove_blocks, remove_channels

        smaller = remove_channels(module, self.masks.groups, self.masks.kept())
        lost = self.masks.lost_blocks()
        if not lost:
            return smaller
        return remove_blocks(smaller, lost)

    def report(self) -> list[str]:
        """Say how many channels are left."""
        groups = self.masks.groups.groups
        kept = self.masks.kept()
        left = sum(len(channels) for channels in kept.values())
        sentences = [f"channels left: {left} of {sum(group.channels for group in groups)}"]
        for group, mask in zip(groups, self.masks.masks, strict=True):
            text = f"{group.name}: {len(kept[group.name])} of {group.channels} channels"
            if not mask.any():
                text += ", which are zeros: no mask is left, so that nothing passes here (a lower penalty leaves some)"
            sentences.append(text)
        if self.masks.blocks:
            lost = ", ".join(self.masks.lost_blocks()) or "none"
            sentences.append(f"residual blocks that are gone, of {len(self.masks.blocks)}: {lost}")
        return sentences

    def tensors(self) -> dict[str, Any]:
        """Return the masks and the discriminator, and where FISTA is."""
        return super().tensors() | {"fista": self.fista.state_dict(), "highest": self.highest}

    def load_tensors(self, content: dict[str, Any]) -> None:
        """Go on from what `tensors` returned."""
        super().load_tensors(content)
        self.fista.load_state_dict(content["fista"])
        self.highest = float(content["highest"])

    @staticmethod
    def _learning_rate(training: TrainingState) -> float:
        return float(training.optimizers[0].param_groups[0]["lr"])
