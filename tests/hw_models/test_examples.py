"""A network is traced on an example of any structure, and its sizes are those of one sample whatever form that has."""

from __future__ import annotations

from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hw_models


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def compute(self, x: Tensor) -> Tensor:
        made: Tensor = self.out(self.conv(x).mean((2, 3)))
        return made

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x)


class Two(Plain):
    def forward(self, left: Tensor, right: Tensor) -> Tensor:  # type: ignore[override]
        return self.compute(left + right)


class Mapping(Plain):
    def forward(self, batch: Any) -> Any:
        return {"logits": self.compute(batch["left"] + batch["right"])}


class Detector(Plain):
    def forward(self, images: Any, targets: Any = None) -> Any:
        return [{"logits": self.compute(image[None])} for image in images]


class Keyword(Plain):
    def forward(self, *, pixels: Tensor, scale: float) -> Tensor:  # type: ignore[override]
        return self.compute(pixels * scale)


def scaled(network: nn.Module, batch: Any) -> Any:
    return network(pixels=batch[0], scale=batch[1])


X = torch.rand(2, 3, 8, 8)


class Encoding(UserDict):  # type: ignore[type-arg]
    """A mapping that is no dict."""


@pytest.mark.parametrize(
    ("network", "example", "forward"),
    [
        (Two(), (X, X), None),
        (Two(), ((X, X),), None),
        (Two(), ({"right": X, "left": X},), None),
        (Two(), (Encoding(right=X, left=X),), None),
        (Mapping(), ({"left": X, "right": X},), None),
        (Detector(), (list(X),), None),
        (Keyword(), ((X, 2.0),), scaled),
        (Keyword(), (X, 2.0), lambda network, pixels, scale: network(pixels=pixels, scale=scale)),
    ],
)
def test_layers_are_those_of_one_sample(network: nn.Module, example: Any, forward: Any) -> None:
    assert hw_models.trace(network, *example, forward=forward).layers == hw_models.trace(Plain(), X).layers


def test_a_product_in_forward_is_the_networks() -> None:
    """Such as a mean over the words that a mask leaves."""

    def pooled(network: nn.Module, words: Tensor) -> Tensor:
        return (network(words) * torch.ones(*words.shape[:2], 1)).sum(1)

    workload = hw_models.trace(nn.Linear(4, 3), torch.rand(2, 5, 4), forward=pooled)
    assert [(one.name, one.operation) for one in workload.unpriced] == [("", "mul, sum")]


class Text(nn.Module):
    """Token ids, with a layer over each token, an attention, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(11, 6), nn.Linear(6, 11)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        x = self.words(input_ids)
        x = nn.functional.scaled_dot_product_attention(x, x, x)
        return {"logits": self.out(x)}


def test_token_ids_and_sequences() -> None:
    ids = torch.zeros(2, 7, dtype=torch.long)
    (layer,) = hw_models.trace(Text(), {"input_ids": ids, "attention_mask": ids}).layers
    assert layer.macs == 7 * 6 * 11
    (layer,) = hw_models.trace(nn.Sequential(nn.Conv1d(2, 3, 3)), torch.rand(4, 2, 10)).layers
    assert layer.macs == 8 * 3 * 2 * 3


def test_other_outputs_and_heads_of_training_are_left_out() -> None:
    class Auxiliary(Plain):
        def __init__(self) -> None:
            super().__init__()
            self.aux = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Any:
            if self.training:
                return self.compute(x), self.aux(x.mean((2, 3)))
            return self.compute(x)

    network = Auxiliary().train()
    assert [layer.name for layer in hw_models.trace(network, X).layers] == ["conv", "out"]
    assert network.training


@pytest.mark.parametrize("example", [(), (5,), (X[:0],), ({},), ([],), (torch.tensor(1.0),)])
def test_what_has_no_samples_is_refused(example: Any) -> None:
    with pytest.raises(ValueError, match="trace needs an example input"):
        hw_models.trace(Plain(), *example)
