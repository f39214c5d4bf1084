"""Training learns, repeats itself for a seed, and ends in a checkpoint that a search can take up."""

from __future__ import annotations

import copy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import quantizers as Q
from haq import data, networks, train, training
from haq.console.errors import run_command
from haq.store.checkpoint import Checkpoint
from haq.training.loop import make_optimizers, trainable_scales
from tests.conftest import images, small_network

NETWORK = networks.Network("small", small_network(), (1, 8, 8))


def split(count: int = 256) -> data.Split:
    x = images(count)
    with torch.no_grad():
        return data.Split(x, NETWORK.module(x).argmax(1))


def fitted(seed: int, **options: object) -> nn.Module:
    module = small_network(1)
    config = training.TrainConfig(epochs=4, learning_rate=0.05, seed=seed, batch_size=32, **options)  # type: ignore[arg-type]
    training.fit(NETWORK, split(), config, module=module)
    return module


def test_training_raises_accuracy_and_repeats_itself() -> None:
    before = training.accuracy(NETWORK, split(), small_network(1))
    once, twice, other = fitted(0), fitted(0), fitted(1)
    assert training.accuracy(NETWORK, split(), once) > before + 0.1
    for key, value in once.state_dict().items():
        assert torch.equal(value, twice.state_dict()[key])
    assert any(not torch.equal(value, other.state_dict()[key]) for key, value in once.state_dict().items())


def test_a_teacher_is_approached_without_labels() -> None:
    """Given a teacher the labels play no part, and outputs come nearer to its."""
    x = images(64, 5)

    def distance(module: nn.Module) -> float:
        with torch.no_grad():
            return (module(x).softmax(1) - NETWORK.module(x).softmax(1)).abs().mean().item()

    shuffled = data.Split(split().images, split().labels.flip(0))
    module = small_network(1)
    config = training.TrainConfig(epochs=4, learning_rate=0.05, seed=0, batch_size=32)
    training.fit(NETWORK, shuffled, config, module=module, teacher=NETWORK.module)
    assert distance(module) < 0.7 * distance(small_network(1))


def test_finetuning_changes_a_copy_at_the_same_bits() -> None:
    module = small_network()
    training.refresh_norms(NETWORK, module, split())  # as a trained network's are
    network = networks.Network("small", module, (1, 8, 8))
    policy = Q.BitPolicy(dict.fromkeys(Q.BitPolicy.uniform(module, w=2, a=3), (2, 3)))
    qnetwork = Q.quantize(module, policy, calibrate=images(32))
    before = copy.deepcopy(qnetwork.state_dict())
    threads = torch.get_num_threads()
    tuned = training.finetune(network, qnetwork, split(), epochs=8, seed=0, learning_rate=0.02)
    assert torch.get_num_threads() == threads
    assert all(torch.equal(value, before[key]) for key, value in qnetwork.state_dict().items())
    assert Q.get_policy(tuned) == policy
    assert not tuned.training
    x = images(128, 9)
    with torch.no_grad():
        errors = [(net(x).softmax(1) - module(x).softmax(1)).abs().mean().item() for net in (tuned, qnetwork)]
    assert errors[0] < 0.8 * errors[1]
    scales = [layer.activation_scale for layer in Q.quant_layers(tuned).values()]
    assert all((scale > 0).all() and not scale.requires_grad for scale in scales)


def test_refreshed_norms_have_the_statistics_of_the_images() -> None:
    module = small_network()
    training.refresh_norms(NETWORK, module, split())
    with torch.no_grad():
        expected = module.stem(split().images[torch.arange(256)]).mean((0, 2, 3))
    torch.testing.assert_close(module.norm.running_mean, expected, atol=1e-5, rtol=1e-4)
    assert module.norm.momentum == 0.1
    assert not module.training


def test_a_loss_that_is_no_number_stops_training() -> None:
    with pytest.raises(FloatingPointError, match=r"nan in epoch 1: lower the learning rate"):
        training.fit(
            NETWORK,
            data.Split(images(8) * float("nan"), torch.zeros(8).long()),
            training.TrainConfig(epochs=1, learning_rate=1.0, seed=0),
            module=small_network(),
        )


def test_augmentation_moves_and_mirrors_but_keeps_what_is_in_the_middle() -> None:
    picture = torch.zeros(64, 1, 9, 9)
    picture[:, :, 4, 4] = 1
    moved = training.augment(picture, torch.Generator().manual_seed(0))
    assert moved.shape == picture.shape
    assert torch.equal(moved.sum((1, 2, 3)), torch.ones(64))
    assert len({tuple(image.flatten().tolist()) for image in moved}) > 10


MODULE = """
import torch
from tests.conftest import images
def splits():
    return {name: (images(n, n), torch.arange(n) % 4) for name, n in (("train", 64), ("search", 16), ("test", 8))}
def network():
    from haq.networks import Network
    from tests.conftest import small_network
    return Network("small", small_network(), (1, 8, 8))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with a small job of one's own in it."""
    (tmp_path / "train_job.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "train_job", raising=False)
    return tmp_path


def test_the_train_command(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--network", "train_job:network", "--data", "train_job:splits", "--epochs", "2", "--out", "a.safetensors"]
    assert run_command(lambda: train.main(arguments)) == 0
    out = capsys.readouterr().out
    assert "accuracy on the test split" in out
    assert "Next: python -m haq.search" in " ".join(out.split())
    again = networks.load("train_job:network@a.safetensors")
    assert again.signature() != networks.load("train_job:network").signature()
    assert networks.load("a.safetensors").signature() == again.signature()
    for change, message in (
        ([], "exists and is not overwritten"),
        (["--out", "b.txt"], "ends in .safetensors"),
        (["--epochs", "0"], "--epochs 0"),
    ):
        assert run_command(lambda change=change: train.main([*arguments, *change])) == 2  # type: ignore[misc]
        assert message in capsys.readouterr().err


JOB = ["--network", "train_job:network", "--data", "train_job:splits", "--epochs", "4", "--batch-size", "16"]


@pytest.mark.parametrize(
    "options",
    [
        ["--learning-rate", "0.05"],
        ["--scheme", "linear", "--bits", "4/4", "--pretrained"],
        ["--scheme", "lsq", "--bits", "2/3", "--pretrained", "--lipschitz", "1e-3"],
        ["--scheme", "binary", "--bits", "1/1", "--ends", "float/float", "--optimizer", "adam", "--clip-weights"],
        ["--method", "repr(cycles=1, full=1, reduced=2)"],
        ["--method", "lottery(rounds=1, share=0.5)", "--optimizer", "adam"],
    ],
)
def test_an_interrupted_training_goes_on_exactly(
    options: list[str], place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*JOB, *options, "--out", "whole.safetensors"]) == 0

    class Killed(Exception):
        pass

    save, saved = Checkpoint.write, []

    def save_and_die(self: Checkpoint, *rest: object) -> None:
        save(self, *rest)  # type: ignore[arg-type]
        saved.append(self)
        if len(saved) == 2:
            raise Killed

    monkeypatch.setattr(Checkpoint, "write", save_and_die)
    with pytest.raises(Killed):
        train.main([*JOB, *options, "--out", "part.safetensors"])
    monkeypatch.undo()
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "path", [str(place), *sys.path])
    assert run_command(lambda: train.main([*JOB, *options, "--out", "part.safetensors"])) == 2
    assert "add --resume to go on" in capsys.readouterr().err
    changed = [*JOB, *options, "--seed", "1", "--resume", "--out", "part.safetensors"]
    assert run_command(lambda: train.main(changed)) == 2
    assert "seed was '0' and is '1' now" in capsys.readouterr().err
    assert train.main([*JOB, *options, "--resume", "--out", "part.safetensors"]) == 0
    assert "epoch 2/4" not in capsys.readouterr().out
    whole, part = (networks.read_state(Path(name))[0] for name in ("whole.safetensors", "part.safetensors"))
    assert whole.keys() == part.keys()
    assert all(torch.equal(whole[key], part[key]) for key in whole)
    assert not Path("part.state").exists()


def test_a_quantized_training_ends_in_a_quantized_checkpoint(place: Path) -> None:
    assert train.main([*JOB, "--scheme", "linear", "--bits", "3/2", "--pretrained", "--out", "q.safetensors"]) == 0
    quantized = networks.load_quantized(Path("q.safetensors"))
    policy = Q.get_policy(quantized)
    assert list(policy.values()) == [(8, 8), (3, 2), (3, 2), (3, 2), (8, 8)]
    float_one = networks.load("q.safetensors")
    assert not Q.quant_layers(float_one.module)
    again = Q.quantize(float_one.module, policy, state=Q.quantizer_state(quantized))
    assert torch.equal(again(images(8)), quantized(images(8)))
    networks.save_checkpoint(float_one, Path("f.safetensors"))
    with pytest.raises(ValueError, match="holds a float network"):
        networks.load_quantized(Path("f.safetensors"))


def test_tensorboard_events_are_written(place: Path) -> None:
    assert train.main([*JOB, "--learning-rate", "0.05", "--log", "events", "--out", "a.safetensors"]) == 0
    assert list(Path("events").glob("events.*"))


@pytest.mark.parametrize("bits", ["4", "9/4", "0/4", "4/x", "4/4/4"])
def test_bits_that_are_none_are_named(bits: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [*JOB, "--scheme", "linear", "--bits", bits, "--out", "a.safetensors"]
    assert run_command(lambda: train.main(arguments)) == 2
    assert f"--bits is {bits!r}; give W/A" in capsys.readouterr().err


SCHEMES = {
    "linear": (Q.Linear(), 2, 3, {"activation_scale"}),
    "kmeans": (Q.KMeans(), 2, 4, {"activation_scale", "codebook"}),
    "pact": (Q.PACT(clip=None), 4, 4, {"activation_clip"}),
    "dorefa": (Q.DoReFa(), 4, 4, set()),
    "lsq": (Q.LSQ(), 3, 3, {"activation_scale", "weight_scale"}),
    "lsqplus": (Q.LSQPlus(), 3, 3, {"activation_scale", "weight_scale", "activation_offset"}),
    "binary": (Q.Binary(), 1, 4, {"activation_scale"}),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_is_finetuned(scheme: str) -> None:
    """The outputs come nearer to the float network's, and of a scheme's tensors just those move that it learns, or that
    are the scales of its inputs."""
    chosen, weight, activation, moving = SCHEMES[scheme]
    module = small_network()
    training.refresh_norms(NETWORK, module, split())
    network = networks.Network("small", module, (1, 8, 8))
    names = list(Q.BitPolicy.uniform(module, w=None, a=None))
    policy = Q.BitPolicy(dict.fromkeys(names, (weight, activation)) | {names[0]: (8, 8), names[-1]: (8, 8)})
    linear = Q.Linear()
    schemes = {**dict.fromkeys(names, chosen), names[0]: linear, names[-1]: linear}
    qnetwork = Q.quantize(module, policy, scheme=schemes, calibrate=images(32))
    tuned = training.finetune(network, qnetwork, split(), epochs=6, seed=0, learning_rate=0.02)
    assert Q.get_policy(tuned) == policy

    before, after = Q.quantizer_state(qnetwork), Q.quantizer_state(tuned)
    moved = {key.rpartition(".")[2] for key in before if not torch.equal(before[key], after[key]) and names[1] in key}
    assert moved == moving
    x = images(128, 9)
    with torch.no_grad():
        errors = [(net(x).softmax(1) - module(x).softmax(1)).abs().mean().item() for net in (tuned, qnetwork)]
    assert errors[0] < 0.9 * errors[1]
    again = training.finetune(network, qnetwork, split(), epochs=6, seed=0, learning_rate=0.02)
    assert all(torch.equal(value, after[key]) for key, value in Q.quantizer_state(again).items())


def test_codebooks_are_trained_at_a_lower_rate() -> None:
    """A centroid's gradient is the sum over its weights; the rest is trained at the rate that was asked for."""
    made = Q.quantize(small_network(), Q.BitPolicy.uniform(small_network(), w=2, a=8), scheme="kmeans", calibrate=images(32))
    config = training.TrainConfig(epochs=1, learning_rate=0.5, seed=0)
    (optimizer,) = make_optimizers(made, trainable_scales(made), config)
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    codebooks = {id(parameter) for parameter in Q.learned_parameters(made)}
    assert {rates.pop(one) for one in codebooks} == {0.05}
    assert set(rates.values()) == {0.5}
    decay = {id(parameter): group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert {decay[one] for one in codebooks} == {0.0}


def test_an_unknown_optimizer_is_named() -> None:
    with pytest.raises(ValueError, match="unknown optimizer 'sdg'; known: sgd, adam"):
        training.TrainConfig(epochs=1, learning_rate=0.1, seed=0, optimizer="sdg")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_weights_that_training_keeps_are_known(scheme: str) -> None:
    """Only those behind a codebook; asking leaves the network and torch's generator as they were."""
    chosen, weight, activation, _ = SCHEMES[scheme]
    policy = Q.BitPolicy.uniform(small_network(), w=weight, a=activation)
    made = Q.quantize(small_network(), policy, scheme=chosen, calibrate=images(32))
    made.get_submodule("hidden").weight.requires_grad_(False)
    frozen = [name for name, p in made.named_parameters() if not p.requires_grad]
    state = torch.get_rng_state()
    with torch.no_grad():
        assert training.fixed_weights(made) == (list(policy) if scheme == "kmeans" else [])
    assert torch.equal(torch.get_rng_state(), state)
    assert [name for name, p in made.named_parameters() if not p.requires_grad] == frozen


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scheme", "kmeans", "--lipschitz", "0.1"], "--lipschitz 0.1 is on float weights, which --scheme kmeans keeps in"),
        (["--scheme", "lsk"], "unknown scheme 'lsk'; did you mean lsq"),
        (["--scheme", "lsq,nothing=linear"], "names 'nothing', which is no layer"),
        (["--scheme", "lsq", "--bits", "1/4"], "lsq has no weights of 1 bit"),
        (["--optimizer", "sdg"], "--optimizer is 'sdg'; known: sgd, adam"),
        (["--adversarial", "fgsm"], "--adversarial is 'fgsm'; known: free, pgd, rfgsm"),
        (["--epochs", "many"], "--epochs is 'many'; it must be an integer"),
    ],
)
def test_bad_options_are_named(options: list[str], message: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(lambda: train.main([*JOB, *options, "--out", "a.safetensors"])) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not Path("a.safetensors").exists()


def test_a_checkpoint_says_how_it_was_trained(place: Path) -> None:
    """By a command that a shell reads as it was meant, defaults included."""
    scheme = ["--scheme", "lsq,hidden=kmeans", "--bits", "3/4", "--pretrained"]
    assert train.main([*JOB, *scheme, "--out", "my net.safetensors"]) == 0
    notes = networks.read_header(Path("my net.safetensors")).notes
    words = shlex.split(notes["command"])
    assert words[:3] == ["python", "-m", "haq.train"]
    assert words[-2:] == ["--out", "my net.safetensors"]
    assert {"--pretrained", "lsq,hidden=kmeans", "3/4", "8/8", "0.02"} <= set(words)
    loaded = networks.load_quantized(Path("my net.safetensors"), small_network())
    assert [layer.scheme.name for layer in Q.quant_layers(loaded).values()] == ["linear", "lsq", "lsq", "kmeans", "linear"]
