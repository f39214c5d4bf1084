"""A training method is called at its times, found by its name, and goes on exactly where a training was interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from haq import data, networks, train, training
from haq.console.errors import run_command
from haq.store.checkpoint import Checkpoint
from haq.training.methods import METHODS, Method, TrainingState, build_method, forget, parse_method
from hw_models import trust
from tests.conftest import images, small_network

NETWORK = networks.Network("small", small_network(), (1, 8, 8))
CONFIG = training.TrainConfig(epochs=3, learning_rate=0.05, seed=0, batch_size=16)


def split(count: int = 64) -> data.Split:
    x = images(count)
    with torch.no_grad():
        return data.Split(x, NETWORK.module(x).argmax(1))


def fitted(method: Method | str | None, state: Checkpoint | None = None, **options: Any) -> nn.Module:
    module = small_network(1)
    training.fit(NETWORK, split(), CONFIG, module=module, method=method, state=state, **options)
    return module


def same(one: nn.Module, other: nn.Module) -> bool:
    others = other.state_dict()
    return all(torch.equal(value, others[key]) for key, value in one.state_dict().items())


class Diary(Method):
    """Writes down what is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def begin(self, training: TrainingState) -> None:
        assert not training.optimizers
        self.calls.append("begin")

    def before_epoch(self, training: TrainingState) -> None:
        assert training.optimizers
        self.calls.append(f"epoch {training.epoch}")

    def loss(self, training: TrainingState, inputs: Any, targets: Any, outputs: Any, loss: Tensor) -> Tensor:
        assert len(inputs) == len(targets) == len(outputs)
        self.calls.append("loss")
        return loss

    def before_step(self, training: TrainingState) -> None:
        assert all(parameter.grad is not None for parameter in training.module.parameters())
        self.calls.append("gradients")

    def after_step(self, training: TrainingState) -> None:
        self.calls.append(f"step {training.step}")

    def after_epoch(self, training: TrainingState) -> None:
        self.calls.append(f"after {training.epoch}")

    def finish(self, training: TrainingState) -> None:
        self.calls.append("finish")


def test_hooks_are_called_in_order_and_one_that_does_nothing_changes_nothing() -> None:
    diary = Diary()
    assert same(fitted(diary), fitted(None))
    step = ["loss", "gradients"]
    first = ["begin", "epoch 0", *step, "step 1", *step, "step 2", *step, "step 3", *step, "step 4", "after 1", "epoch 1"]
    assert diary.calls[: len(first)] == first
    assert diary.calls[-2:] == ["after 3", "finish"]


class Critic(Method):
    """Has a module, an optimizer and random numbers of its own, and a parameter in the network while it is trained."""

    def __init__(self, weight: float = 0.1, last: int = 2) -> None:
        super().__init__()
        self.weight, self.last, self.noise = weight, last, torch.zeros(4)

    def begin(self, training: TrainingState) -> None:
        self.modules["critic"] = nn.Linear(4, 1)
        nn.init.constant_(self.modules["critic"].weight, 0.1)
        nn.init.zeros_(self.modules["critic"].bias)
        self.optimizers["critic"] = torch.optim.Adam(self.modules["critic"].parameters(), 0.01)
        training.module.register_parameter("temperature", nn.Parameter(torch.ones(())))

    def before_epoch(self, training: TrainingState) -> None:
        self.noise = torch.randn(4, generator=training.generator)

    def loss(self, training: TrainingState, inputs: Any, targets: Any, outputs: Any, loss: Tensor) -> Tensor:
        critic = self.modules["critic"]
        own = critic(outputs.detach() + self.noise).square().mean()
        self.optimizers["critic"].zero_grad()
        own.backward()
        self.optimizers["critic"].step()
        return loss + self.weight * critic(outputs).mean() * training.module.temperature

    def may_keep(self, training: TrainingState) -> bool:
        return training.epoch >= self.last

    def finish(self, training: TrainingState) -> None:
        del training.module.temperature


class Killed(Exception):
    """Somebody pulled the plug."""


def killed_and_resumed(method: Any, folder: Path, after: int, **options: Any) -> nn.Module:
    """Train until so many epochs are saved, and go on in a new training."""
    state = Checkpoint(folder / f"after-{after}.state", {})

    def die(epoch: int, loss: float) -> None:
        if epoch == after:
            raise Killed

    with pytest.raises(Killed):
        fitted(method(), state, on_epoch=die, **options)
    return fitted(method(), state, **options)


def test_modules_optimizers_and_parameters_of_a_method_go_on_exactly(tmp_path: Path) -> None:
    whole = fitted(Critic())
    assert not hasattr(whole, "temperature")
    assert not same(whole, fitted(None))
    for after in (1, 2):
        assert same(whole, killed_and_resumed(Critic, tmp_path, after))


def test_an_epoch_that_may_not_be_kept_is_not(tmp_path: Path) -> None:
    def judge(module: nn.Module) -> training.Judgement:
        judge.epochs += 1  # type: ignore[attr-defined]
        return training.Judgement(0.5, float(judge.epochs))  # type: ignore[attr-defined]

    for method, kept in ((Critic(), 2), (Critic(last=3), 3), (None, 1)):
        judge.epochs = 0  # type: ignore[attr-defined]
        outcome = training.fit(NETWORK, split(), CONFIG, module=small_network(1), method=method, judge=judge)
        assert outcome is not None
        assert outcome.kept == kept


class HalfTime(Method):
    """Goes through the schedule twice."""

    rates: list[float]

    def position(self, training: TrainingState) -> tuple[int, int]:
        half = training.steps // 2
        return training.step % half, half

    def before_step(self, training: TrainingState) -> None:
        self.rates.append(training.optimizers[0].param_groups[0]["lr"])


def test_a_method_says_where_the_schedule_is() -> None:
    method = HalfTime()
    method.rates = []
    fitted(method)
    assert len(method.rates) == 12
    assert method.rates[:6] == method.rates[6:]
    assert method.rates[0] > method.rates[5] > 0


def test_what_is_forgotten_is_as_if_never_trained() -> None:
    weight = nn.Parameter(torch.ones(3, 2))
    optimizers = [torch.optim.SGD([weight], 0.1, momentum=0.9), torch.optim.Adam([weight], 0.1)]
    weight.square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    forget(optimizers, weight, torch.tensor([0, 2]))
    kept = [optimizers[0].state[weight]["momentum_buffer"], optimizers[1].state[weight]["exp_avg_sq"]]
    for average in kept:
        assert (average[[0, 2]] == 0).all()
        assert (average[1] != 0).all()
    assert optimizers[1].state[weight]["step"] == 1
    forget(optimizers, weight)
    assert all((average == 0).all() for average in kept)


def test_descriptions_are_read() -> None:
    assert parse_method("repr") == ("repr", {})
    assert parse_method("repr()") == ("repr", {})
    assert parse_method(" mine:Cuts( share=0.3, at=[1, 2] ,how=linear) ") == (
        "mine:Cuts",
        {"share": 0.3, "at": [1, 2], "how": "linear"},
    )
    for text, message in (
        ("repr(share=0.3", "has no closing bracket"),
        ("repr(0.3)", "has '0.3'; arguments are written NAME=VALUE"),
        ("repr(share=0.3,)", "has ''; arguments are written NAME=VALUE"),
        ("repr(a=1, a=2)", "has a= twice"),
        ("repr(a=1 2)", "has the value '1 2'; it must be a number, a name or a list"),
        ("nothing-like-it(a=1)", "unknown training method 'nothing-like-it'"),
    ):
        with pytest.raises(ValueError, match="^[^\n]*$") as refused:
            build_method(text)
        assert message in str(refused.value)


MODULE = """
import torch
from haq.training.methods import Method
from tests.conftest import images
def splits():
    return {name: (images(n, n), torch.arange(n) % 4) for name, n in (("train", 64), ("search", 16), ("test", 8))}
def network():
    from haq.networks import Network
    from tests.conftest import small_network
    return Network("small", small_network(), (1, 8, 8))
class Noisy(Method):
    needs_all_epochs = True
    def __init__(self, size=0.01):
        super().__init__()
        if not size > 0:
            raise ValueError(f"size is {size!r}; it must be above 0")
        self.size = size
    def after_epoch(self, training):
        for weight in training.module.parameters():
            weight.data += self.size * torch.randn(weight.shape, generator=training.generator)
function = print
"""
JOB = ["--network", "job_of_methods:network", "--data", "job_of_methods:splits", "--epochs", "3", "--batch-size", "16"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "job_of_methods.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(trust, "_named", set())
    return tmp_path


def test_a_method_of_ones_own_on_the_command_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> int:
        return run_command(lambda: train.main([*JOB, *words]))

    method = ["--method", "job_of_methods:Noisy(size=0.02)"]
    assert run(*method, "--out", "a.safetensors") == 0
    assert run("--out", "b.safetensors") == 0
    noisy, plain = (networks.read_state(Path(name)) for name in ("a.safetensors", "b.safetensors"))
    assert any(not torch.equal(noisy[0][key], plain[0][key]) for key in plain[0])
    assert "--method 'job_of_methods:Noisy(size=0.02)'" in noisy[1]["command"]
    assert "--method" not in plain[1]["command"]
    capsys.readouterr()
    for words, message in (
        (["--method", "job_of_methods:Noisy(size=0)"], "size is 0; it must be above 0"),
        (["--method", "job_of_methods:Noisy(length=0)"], "has length=; job_of_methods:Noisy takes size="),
        (["--method", "job_of_methods:function"], "can't be used: it lacks"),
        (["--method", "job_of_methods:nothing"], "nothing"),
        (["--method", "unheard"], "unknown training method 'unheard'"),
        ([*method, "--patience", "2"], "--patience 2: --method job_of_methods:Noisy(size=0.02) needs all epochs"),
    ):
        assert run(*words, "--out", "c.safetensors") == 2
        error = " ".join(capsys.readouterr().err.split())
        assert message in error
        assert "Traceback" not in error


def test_methods_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    from haq import list as listing

    assert {row.name for row in listing.rows_of("methods")} == set(METHODS.names())
