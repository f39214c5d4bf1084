"""A thread may make the next batches of a fine-tuning: nothing comes out otherwise."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import quantizers as Q
from haq import training
from haq.data import Split
from haq.networks import Network
from haq.training import loop
from haq.training.goals import Goal
from quantizers.calling import leaves


class Drawing(nn.Sequential):
    """A network that draws numbers even in evaluation mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + 1e-3 * torch.rand(()))


def network_and_split(kind: type[nn.Sequential] = nn.Sequential) -> tuple[Network, Split]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = kind(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(4 * 36, 3)).eval()
    draws = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (130, 1, 8, 8), generator=draws).to(torch.uint8)
    return Network("small", module, (1, 8, 8)), Split(images, torch.randint(0, 3, (130,), generator=draws))


def tuned(network: Network, split: Split, threads: int, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, set[int]]:
    """Fine-tune with so many threads; returns the network, and the threads that batches were made by."""
    makers = set()
    prepared = loop.prepared

    def noted(*given: Any) -> Any:
        makers.add(threading.get_ident())
        return prepared(*given)

    policy = Q.BitPolicy.uniform(network.module, w=3, a=3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        qnetwork = Q.quantize(network.module, policy, calibrate=network.preprocess(split.images[:60]))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(loop, "prepared", noted)
            found = training.finetune(network, qnetwork, split, epochs=3, seed=0)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    return found, makers


def state(module: nn.Module) -> list[torch.Tensor]:
    return [*module.state_dict().values(), *leaves(Q.quantizer_state(module))]


@pytest.mark.parametrize("kind", [nn.Sequential, Drawing])
def test_the_result_is_that_of_one_thread_to_the_last_bit(kind: type[nn.Sequential], monkeypatch: pytest.MonkeyPatch) -> None:
    network, split = network_and_split(kind)
    alone, by_one = tuned(network, split, 1, monkeypatch)
    together, by_two = tuned(network, split, 2, monkeypatch)
    assert len(by_one) == 1
    # A network that draws does so in turn with what is trained.
    assert len(by_two) == 1 + (kind is nn.Sequential)
    assert all(map(torch.equal, state(alone), state(together)))


def test_what_is_of_somebody_else_is_called_by_one_thread() -> None:
    network, split = network_and_split()
    config = training.TrainConfig(epochs=1, learning_rate=0.1, seed=0)
    made = loop.Training(network, network.module, network.module, config, len(split))
    made.ahead = True
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert made.can_prepare_ahead(split)
        made.goal = Goal(loss=lambda outputs, targets: outputs.mean())
        assert not made.can_prepare_ahead(split)
        made.goal = Goal()
        streamed: Any = SimpleNamespace(source=SimpleNamespace(is_kept=False))
        assert not made.can_prepare_ahead(streamed)
        made.teacher = None
        assert not made.can_prepare_ahead(split)
    finally:
        torch.set_num_threads(before)
