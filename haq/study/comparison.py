"""The networks whose robustness is compared: of a run, float, uniform bits, the policy found, and the same trained
defensively; of a model, float and uniform bits, and what a quantized checkpoint holds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import quantizers as Q
from haq import data, networks, training
from haq.attacks.classifier import Classifier
from haq.deployment import interpreter, lowering
from haq.deployment.graph import capture
from haq.store.files import CONFIG, ROBUSTNESS
from haq.study.search_run import SearchRun
from haq.study.task import CALIBRATION, adversary_of

BETA = 2e-3  # of the penalty: fixed before anything was attacked (docs/experiments/defensive_quantization.md)
PINNED = (8, 8)  # first and last layer of uniform policies below 8 bits, as in a search
FEW = 500  # images at a time, through the integer program

OnTraining = Callable[[str], dict[str, Any]]


@dataclass(frozen=True)
class ComparisonSpec:
    """What is to be compared: of a run's folder, or of a model's name on a data set.

    uniform: widths of the uniform policies. beta: of the Lipschitz penalty that the found policy is trained with once more;
    0 leaves that out.
    """

    source: str
    data: str | None = None
    uniform: tuple[int, ...] = (8,)
    beta: float = BETA

    @property
    def run(self) -> SearchRun | None:
        """The run, if it is one."""
        folder = Path(self.source)
        return SearchRun.load(folder) if folder.is_dir() or (folder / CONFIG).is_file() else None


@dataclass(frozen=True)
class ComparedNetworks:
    """Networks by name, on the same images. `notes`: how each was made."""

    network: networks.Network
    dataset: data.Dataset
    networks: dict[str, nn.Module]
    notes: dict[str, str]

    def images(self, count: int) -> tuple[Tensor, Tensor]:
        """The first images of the test split, float (N, C, H, W) in [0, 1] as the network takes them, and their labels.

        Raises ValueError for a data set without labels, or whose images aren't bytes, so that nobody knows their range.
        """
        if not self.dataset.classes:
            raise ValueError(f"{self.dataset.name} has no labels: there is no accuracy that an attack could lower")
        images, labels = next(self.dataset.test.batches(min(count, len(self.dataset.test))))
        if images.dtype != torch.uint8:
            raise ValueError(
                f"the images of {self.dataset.name} are {images.dtype}, of unknown range; attacks need uint8 images"
            )
        if images.shape[1] == 1 and self.network.input_shape[0] > 1:
            images = images.expand(-1, self.network.input_shape[0], -1, -1)
        return (images.float() / 255).contiguous(), labels

    def classifier(self, module: nn.Module, requantize: bool = False) -> Classifier:
        """A network that takes images in [0, 1]."""
        net = self.network
        return Classifier(module, net.mean, net.std, requantize=requantize, memory_format=net.memory_format)

    def sources(self, name: str, requantize: bool = False) -> dict[str, Classifier]:
        """Where attacks on a network are transferred from: its float twin and other bits of the same weights; for the float
        network, its uniform policies."""
        module = self.networks[name]
        made: dict[str, nn.Module] = {}
        if Q.quant_layers(module):
            made["twin"] = Q.float_copy(module)
            for bits in (8, 4):
                other = at_bits(module, bits)
                if other is not None and Q.get_policy(other) != Q.get_policy(module):
                    made[f"{bits}bits"] = other
        else:
            made = {other: net for other, net in self.networks.items() if Q.quant_layers(net)}
            made = {other.replace(" ", ""): net for other, net in list(made.items())[:2]}
        return {other: self.classifier(net, requantize) for other, net in made.items()}


def at_bits(module: nn.Module, bits: int) -> nn.Module | None:
    """A copy of a quantized network at the same bits everywhere; None if its schemes have no such bits."""
    made = copy.deepcopy(module)
    try:
        Q.set_policy(made, dict.fromkeys(Q.quant_layers(made), (bits, bits)))
    except ValueError:
        return None
    return made


def gather(request: ComparisonSpec, on_training: OnTraining | None = None) -> ComparedNetworks:
    """Load what is compared, and train what isn't there yet: `on_training` is told what begins, and gives the callbacks of
    `training.finetune`; without it nothing is trained, and what is missing raises FileNotFoundError.

    Every quantized network of a run has the budget of the run's own fine-tuning, and its seed. Raises what its parts raise.
    """
    run = request.run
    return _of_model(request) if run is None else _of_run(request, run, on_training)


def _of_run(request: ComparisonSpec, run: SearchRun, on_training: OnTraining | None) -> ComparedNetworks:
    if request.data is not None:
        raise ValueError(f"--data goes with a model; {request.source} is a run on {run.config.data}")
    policy, loaded = run.load_policy(), run.load_network()
    run.check(loaded)
    epochs, seed = run.config.finetune_epochs, run.config.seed
    plain = Q.quantize(loaded.network.module, policy, calibrate=loaded.calibration())
    networks: dict[str, nn.Module] = {"float": loaded.network.module}
    notes = {"float": "as it was loaded"}
    against = " against R+FGSM" if adversary_of(run.config) else ""
    budget = f"fine-tuned{against} for {epochs} epochs, seed {seed}" if epochs else "calibrated, not fine-tuned"

    def tuned(name: str, bits: Q.BitPolicy, beta: float = 0.0) -> nn.Module:
        path = ROBUSTNESS / f"{name}-{epochs}-epochs.safetensors"
        kept = run.load_checkpoint(loaded, path)
        if kept is not None and Q.get_policy(kept) == bits:
            return kept
        network = copy.deepcopy(plain)
        Q.set_policy(network, bits)
        if not epochs:
            return network
        if on_training is None:
            raise FileNotFoundError(f"{run.folder / path} isn't there")
        made = training.finetune(
            loaded.network,
            network,
            loaded.dataset.train,
            epochs=epochs,
            seed=seed,
            adversary=adversary_of(run.config),
            penalty=(lambda module: Q.lipschitz_penalty(module, beta=beta)) if beta else None,
            **on_training(name),
        )
        run.save_checkpoint(made, loaded, path)
        return made

    for bits in request.uniform:
        networks[f"uniform {bits}"] = tuned(f"uniform{bits}", uniform(plain, bits))
        notes[f"uniform {bits}"] = f"{bits} bits{'' if bits == 8 else ', first and last layer 8'}, {budget}"
    found = run.load_checkpoint(loaded)
    networks["found"] = plain if found is None else found
    notes["found"] = f"the policy of {run.config.solver}, {'calibrated, not fine-tuned' if found is None else budget}"
    if request.beta and epochs:
        networks["defensive"] = tuned(f"defensive{request.beta:g}", policy, request.beta)
        notes["defensive"] = f"the same policy, {budget}, with the Lipschitz penalty, beta {request.beta:g}"
    return ComparedNetworks(loaded.network, loaded.dataset, {name: net.eval() for name, net in networks.items()}, notes)


def _of_model(request: ComparisonSpec) -> ComparedNetworks:
    network = networks.load(request.source)
    dataset = data.load(request.data or data.DEFAULT, image_size=network.input_shape[-1])
    networks.check_fits(network, dataset)
    compared: dict[str, nn.Module] = {"float": network.module}
    notes = {"float": "as it was loaded"}
    path = Path(request.source)
    if path.is_file() and networks.holds_quantized(path):
        held = networks.load_quantized(path)
        compared["quantized"], notes["quantized"] = held, "at the bits of the checkpoint, trained as its header says"
    inputs = network.preprocess(dataset.train.images[dataset.fair(CALIBRATION)])
    names = list(Q.BitPolicy.uniform(network.module, w=None, a=None))
    plain = Q.quantize(network.module, dict.fromkeys(names, PINNED), calibrate=inputs)
    for bits in request.uniform:
        compared[f"uniform {bits}"] = copy.deepcopy(plain)
        Q.set_policy(compared[f"uniform {bits}"], uniform(plain, bits))
        notes[f"uniform {bits}"] = f"{bits} bits{'' if bits == 8 else ', first and last layer 8'}, calibrated, not fine-tuned"
    return ComparedNetworks(network, dataset, {name: net.eval() for name, net in compared.items()}, notes)


def uniform(module: nn.Module, bits: int) -> Q.BitPolicy:
    """The same bits everywhere, but for the first and the last layer, which keep 8 as in a search."""
    names = list(Q.quant_layers(module))
    return Q.BitPolicy({name: PINNED if name in (names[0], names[-1]) else (bits, bits) for name in names})


@dataclass(frozen=True)
class Deployed:
    """How the integer program of a quantized network answers images, beside the network in PyTorch.

    right: images that it classifies as labelled. different: those that it answers differently. reason: why there is none.
    """

    images: int
    right: int
    different: int
    reason: str = ""


def deployed(contenders: ComparedNetworks, name: str, images: Tensor, labels: Tensor) -> Deployed:
    """Run images (N, C, H, W) in [0, 1] through what a quantized network is deployed as (haq.deploy), integer by integer."""
    module, net = contenders.networks[name], contenders.network
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (net.mean, net.std))
    inputs = ((images - mean) / std).contiguous()
    try:
        calibrate = net.preprocess(contenders.dataset.train.images[contenders.dataset.fair(CALIBRATION)]).contiguous()
        program = lowering.lower(capture(module, inputs[:1]), module, calibrate)
    except ValueError as error:
        return Deployed(0, 0, 0, str(error))
    right = different = 0
    for x, y in zip(inputs.split(FEW), labels.split(FEW), strict=True):
        outputs, _ = interpreter.run(program, x.numpy())
        answers = torch.from_numpy(outputs).argmax(1)
        with torch.inference_mode():
            different += int((answers != module(x).argmax(1)).sum())
        right += int((answers == y).sum())
    return Deployed(len(images), right, different)
