"""The networks whose robustness is compared.

Of a run: float, uniform bits, the policy found, and the same trained defensively. Of a model: float, uniform bits, and what a
quantized checkpoint holds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quantizers as Q
from haq import data, networks, training
from haq.attacks.classifier import Classifier
from haq.problem.device import CPU, find_device
from haq.store.files import CONFIG, ROBUSTNESS
from haq.store.units import counted
from haq.study.attack_config import BETA
from haq.study.channels import check_keeps
from haq.study.config import SearchConfig
from haq.study.search_run import SearchRun
from haq.study.task import CALIBRATION, LoadedNetwork, adversary_of, schemes_of
from haq.training.config import GIVE_UP_AFTER

SOURCE_BITS = (8, 4)  # of the networks with the same weights that attacks are transferred from

OnTraining = Callable[[str], dict[str, Any]]


@dataclass(frozen=True)
class ComparisonSpec:
    """What is to be compared.

    Attributes:
        source: The folder of a run, a network's name, or a checkpoint.
        data: The data set of a model; None: the one that comes with the project.
        uniform: Widths of the uniform policies.
        beta: Of the Lipschitz penalty that the found policy is trained with once more; 0 leaves that out.
        scheme: Of the quantized networks, NAME or NAME,LAYER=NAME; None: the run's own, and `linear` for a model.
        device: Where networks are run; None: the run's own, and the CPU for a model.
    """

    source: str
    data: str | None = None
    uniform: tuple[int, ...] = (8,)
    beta: float = BETA
    scheme: str | None = None
    device: str | None = None

    @property
    def device_name(self) -> str:
        """Where networks are run."""
        if self.device is not None:
            return self.device
        run = self.run
        if run is not None:
            return run.config.device
        return CPU

    @property
    def run(self) -> SearchRun | None:
        """The run, if it is one."""
        folder = Path(self.source)
        if folder.is_dir() or (folder / CONFIG).is_file():
            return SearchRun.load(folder, self.device)
        return None


@dataclass(frozen=True)
class ComparedNetworks:
    """Networks on the same images.

    Attributes:
        network: The float network, which says what images look like.
        dataset: Where images are from.
        networks: What is compared, by name.
        notes: How each was made.
        left_out: What was asked for and can't be, with the reason.
    """

    network: networks.Network
    dataset: data.Dataset
    networks: dict[str, nn.Module]
    notes: dict[str, str]
    left_out: dict[str, str] = field(default_factory=dict)

    def images(self, count: int) -> tuple[Tensor, Tensor]:
        """Return the first images of the test split, float (N, C, H, W) in [0, 1], and their labels.

        Raises:
            ValueError: For a data set without labels, or whose images aren't bytes, so that nobody knows their range.
        """
        if not self.dataset.classes:
            raise ValueError(f"{self.dataset.name} has no labels: there is no accuracy that an attack could lower")
        images, labels = next(self.dataset.test.batches(min(count, len(self.dataset.test))))
        if images.dtype != torch.uint8:
            raise ValueError(
                f"the images of {self.dataset.name} are {images.dtype}, of unknown range; attacks need uint8 images"
            )
        channels = images.shape[1]
        if self.network.input_shape:
            channels = self.network.input_shape[0]
        if images.shape[1] == 1 and channels > 1:
            images = images.expand(-1, channels, -1, -1)
        return (images.float() / 255).contiguous(), labels

    def classifier(self, module: nn.Module, requantize: bool = False) -> Classifier:
        """Make a network that takes images in [0, 1]; with `requantize` it rounds them to 8 bits."""
        net = self.network
        return Classifier(module, net.mean, net.std, requantize=requantize, memory_format=net.memory_format)

    def sources(self, name: str, requantize: bool = False) -> dict[str, Classifier]:
        """Make the networks that attacks on one of them are transferred from.

        They are its float twin and other bits of the same weights; for the float network, its uniform policies.

        Args:
            name: The network's.
            requantize: Whether they round images to 8 bits.

        Returns:
            Networks by the names that attacks have for them.
        """
        module = self.networks[name]
        made: dict[str, nn.Module] = {}
        if Q.quant_layers(module):
            made["twin"] = Q.float_copy(module)
            for bits in SOURCE_BITS:
                policy = everywhere(module, bits)
                if policy != Q.get_policy(module) and not fault_of(module, policy):
                    made[f"{bits}bits"] = with_policy(module, policy)
        else:
            others = [other for other, net in self.networks.items() if Q.quant_layers(net)]
            for other in others[:2]:
                made[other.replace(" ", "")] = self.networks[other]
        return {other: self.classifier(net, requantize) for other, net in made.items()}

    def missing_sources(self) -> dict[str, str]:
        """Tell which networks attacks can't be transferred from, with the reason: widths that their schemes don't have."""
        missing = {}
        for name, module in self.networks.items():
            for bits in SOURCE_BITS:
                if reason := fault_of(module, everywhere(module, bits)):
                    missing[f"transfer to {name} from {bits} bits"] = reason
        return missing


def everywhere(module: nn.Module, bits: int) -> Q.BitPolicy:
    """Return the policy of the same bits in every layer."""
    return Q.BitPolicy(dict.fromkeys(Q.quant_layers(module), (bits, bits)))


def uniform(module: nn.Module, bits: int) -> Q.BitPolicy:
    """Return the policy of the same bits everywhere; at few bits the first and the last layer keep 8, as in a search."""
    policy = everywhere(module, bits)
    if bits > Q.MAX_BITS:
        return policy
    return Q.BitPolicy({**policy, **Q.ends(list(policy))})


def fault_of(module: nn.Module, policy: Mapping[str, tuple[int | None, int | None]]) -> str:
    """Say why a quantized network can't have the widths of a policy; nothing if it can."""
    for name, layer in Q.quant_layers(module).items():
        try:
            layer.scheme.check(*policy[name], signed=layer.signed)
        except ValueError as error:
            return f"layer {name!r}: {error}"
    return ""


def with_policy(module: nn.Module, policy: Q.BitPolicy) -> nn.Module:
    """Return a copy of a quantized network at other bits."""
    made = Q.copy_network(module)
    Q.set_policy(made, policy)
    return made


def is_of(module: nn.Module, policy: Q.BitPolicy) -> bool:
    """Say whether a quantized network has the bits of a policy, and the channels that it keeps."""
    try:
        check_keeps(module, policy)
    except ValueError:
        return False
    return Q.get_policy(module) == policy.with_keep(None)


def schemes_in(module: nn.Module) -> dict[str, Q.Scheme]:
    """Return the scheme of every layer of a quantized network."""
    return {name: layer.scheme for name, layer in Q.quant_layers(module).items()}


def has_schemes(module: nn.Module, schemes: Mapping[str, Q.Scheme]) -> bool:
    """Tell whether the layers of a quantized network have these schemes, with the same options."""
    return _described(schemes_in(module)) == _described(schemes)


def _described(schemes: Mapping[str, Q.Scheme]) -> dict[str, tuple[str, dict[str, Any]]]:
    # Two schemes of somebody's own needn't be equal, though they do the same.
    return {name: (scheme.name, scheme.options()) for name, scheme in schemes.items()}


def gather(spec: ComparisonSpec, on_training: OnTraining | None = None) -> ComparedNetworks:
    """Load what is compared, and train what isn't there yet.

    Every quantized network of a run has the budget of the run's own fine-tuning, and its seed.

    Args:
        spec: What is compared.
        on_training: Told what begins, and gives the callbacks of `training.finetune`. Without it nothing is trained.

    Returns:
        The networks, in evaluation mode.

    Raises:
        FileNotFoundError: For what is missing, if nothing is to be trained.
        ValueError: As its parts do.
    """
    run = spec.run
    if run is None:
        compared = _of_model(spec)
    else:
        compared = _RunNetworks(spec, run, on_training).gather()
    for module in compared.networks.values():
        module.eval()
    compared.left_out.update(compared.missing_sources())
    return compared


class _RunNetworks:
    """What a run is compared with, trained as far as it isn't there."""

    def __init__(self, spec: ComparisonSpec, run: SearchRun, on_training: OnTraining | None) -> None:
        """Load the run's network and data, and quantize the network at the policy that was found."""
        if spec.data is not None:
            raise ValueError(f"--data goes with a model; {spec.source} is a run on {run.config.data}")
        self.spec = spec
        self.run = run
        self.on_training = on_training
        self.policy = run.load_policy()
        self.loaded: LoadedNetwork = run.load_network()
        run.check(self.loaded)
        self.schemes = run.schemes(list(self.policy), spec.scheme)
        self.plain = self.loaded.quantized(self.policy, self.schemes)
        # Uniform policies are of all channels.
        self.whole = self.plain
        if self.policy.keep:
            self.whole = self.loaded.quantized(self.policy.with_keep(None), self.schemes)

    def gather(self) -> ComparedNetworks:
        """Put everything together."""
        epochs = self.run.config.finetune_epochs
        made: dict[str, nn.Module] = {"float": self.loaded.network.module}
        notes = {"float": "as it was loaded"}
        left_out = {}
        for bits in self.spec.uniform:
            name = f"uniform {bits}"
            policy = uniform(self.whole, bits)
            if reason := fault_of(self.whole, policy):
                left_out[name] = reason
                continue
            made[name] = self.tuned(f"uniform{bits}", policy)
            notes[name] = f"{uniform_words(bits)}{scheme_words(made[name])}, {self.budget()}"
        made["found"], tuning = self.found()
        notes["found"] = f"the policy of {self.run.config.solver}{scheme_words(made['found'])}, {tuning}"
        if self.spec.beta and epochs:
            beta = self.spec.beta
            if fixed := training.fixed_weights(self.plain):
                scheme = self.schemes[fixed[0]].name
                reason = f"the penalty is on float weights, which scheme {scheme!r} of layer {fixed[0]!r} keeps"
                left_out["defensive"] = reason
            else:
                made["defensive"] = self.tuned(f"defensive{beta:g}", self.policy, beta)
                notes["defensive"] = f"the same policy, {self.budget()}, with the Lipschitz penalty, beta {beta:g}"
        return ComparedNetworks(self.loaded.network, self.loaded.dataset, made, notes, left_out)

    def budget(self) -> str:
        """Say how networks of the run are trained."""
        config = self.run.config
        if not config.finetune_epochs:
            return "calibrated, not fine-tuned"
        against = ""
        if adversary_of(config):
            against = " against R+FGSM"
        return f"fine-tuned{against} for {counted(config.finetune_epochs, 'epochs')}, seed {config.seed}"

    def found(self) -> tuple[nn.Module, str]:
        """Return the network of the policy found, and how it was trained.

        It is the run's own, if it has one of the schemes that are asked for. With other schemes it is trained like the rest.
        """
        kept = self.run.load_checkpoint(self.loaded)
        if kept is not None and (self.spec.scheme is None or has_schemes(kept, self.schemes)):
            return kept, self.budget()
        if kept is None:
            return self.plain, "calibrated, not fine-tuned"
        return self.tuned("found", self.policy), self.budget()

    def tuned(self, name: str, policy: Q.BitPolicy, beta: float = 0.0) -> nn.Module:
        """Return the network at the bits of a policy, from the run's folder or trained now.

        Args:
            name: Of its file.
            policy: The bits.
            beta: Of the Lipschitz penalty.

        Returns:
            The network.

        Raises:
            FileNotFoundError: If it isn't there, and nothing is to be trained.
        """
        config = self.run.config
        path = ROBUSTNESS / f"{name}{self._suffix()}-{config.finetune_epochs}-epochs.safetensors"
        kept = self.run.load_checkpoint(self.loaded, path)
        if kept is not None and is_of(kept, policy) and has_schemes(kept, self.schemes):
            return kept
        base = self.whole
        if policy.keep:
            base = self.plain
        network = with_policy(base, policy)
        if not config.finetune_epochs:
            return network
        if self.on_training is None:
            raise FileNotFoundError(f"{self.run.folder / path} isn't there")
        penalty: Callable[[nn.Module], Tensor] | None = None
        if beta:
            penalty = lambda module: Q.lipschitz_penalty(module, beta=beta)  # noqa: E731
        trained = training.finetune(
            self.loaded.network,
            network,
            self.loaded.to_train_on,
            epochs=config.finetune_epochs,
            seed=config.seed,
            amp=config.amp,
            adversary=adversary_of(config),
            penalty=penalty,
            give_up_after=GIVE_UP_AFTER,
            **self.on_training(name),
        )
        self.run.save_checkpoint(trained, self.loaded, path)
        return trained

    def _suffix(self) -> str:
        """Keep networks of another scheme than the run's own apart, by the names of their files."""
        if self.spec.scheme is None:
            return ""
        return "-" + re.sub(r"[^A-Za-z0-9.]+", "-", self.spec.scheme)


def _of_model(spec: ComparisonSpec) -> ComparedNetworks:
    device = find_device(spec.device_name)
    network = networks.load(spec.source)
    dataset = data.load(spec.data or data.DEFAULT, image_size=network.image_size)
    networks.check_fits(network, dataset)
    network.to(device)
    compared: dict[str, nn.Module] = {"float": network.module}
    notes = {"float": "as it was loaded"}
    left_out = {}
    path = networks.path_of_checkpoint(spec.source)
    if path is not None and networks.holds_quantized(path):
        held = networks.load_quantized(path, network.module)
        compared["quantized"] = held
        notes["quantized"] = f"at the bits of the checkpoint{scheme_words(held)}, trained as its header says"
    inputs = network.preprocess(dataset.train.images[dataset.fair(CALIBRATION)])
    names = list(Q.BitPolicy.uniform(network.module, w=None, a=None))
    schemes = schemes_of(SearchConfig(scheme=spec.scheme or "linear"), names)
    plain = Q.quantize(network.module, dict.fromkeys(names, Q.END_BITS), scheme=schemes, calibrate=inputs)
    for bits in spec.uniform:
        name = f"uniform {bits}"
        policy = uniform(plain, bits)
        if reason := fault_of(plain, policy):
            left_out[name] = reason
            continue
        compared[name] = with_policy(plain, policy)
        notes[name] = f"{uniform_words(bits)}{scheme_words(plain)}, calibrated, not fine-tuned"
    return ComparedNetworks(network, dataset, compared, notes, left_out)


def uniform_words(bits: int) -> str:
    """Describe a uniform policy."""
    if bits >= Q.MAX_BITS:
        return f"{bits} bits"
    return f"{bits} bits, first and last layer {Q.END_BITS[0]}"


def scheme_words(module: nn.Module) -> str:
    """Name the schemes of a quantized network, unless all of it is linear, to follow its bits in a sentence."""
    names = list(dict.fromkeys(scheme.name for scheme in schemes_in(module).values()))
    if names == ["linear"]:
        return ""
    return f", scheme {' and '.join(names)}"
