"""Everything that runs a network over batches takes inputs of any structure, and a `forward` of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import quantizers as Q
from quantizers.calling import inputs_of


class Body(nn.Module):
    """Two convolutions with a norm between, and a linear layer: what all networks here compute with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.norm, self.b = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3)
        self.norm.running_mean = torch.linspace(-0.2, 0.3, 6)
        self.norm.running_var = torch.linspace(0.2, 0.5, 6)
        self.out = nn.Linear(4, 5)

    def compute(self, images: Tensor) -> Tensor:
        made: Tensor = self.out(self.b(self.norm(self.a(images)).relu()).relu().mean((2, 3)))
        return made


class Plain(Body):
    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x)


class Two(Body):
    """Two inputs, side by side."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.compute(torch.cat([left, right], 3))


class Mapping(Body):
    """One mapping in, one mapping out."""

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"logits": self.compute(torch.cat([batch["left"], batch["right"]], 3))}


class Images(Body):
    """Images of any sizes in, an entry for each of them out, as detectors do."""

    def forward(self, images: list[Tensor], targets: Any = None) -> list[dict[str, Tensor]]:
        return [{"logits": self.compute(image[None])} for image in images]


class Triple(Body):
    """Takes (images, targets, weight) by itself: needs a `forward` that says so."""

    def forward(self, *, pixels: Tensor, scale: float) -> Tensor:
        return self.compute(pixels * scale)


X = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(12) % 5
LEFT, RIGHT = X[..., :4].contiguous(), X[..., 4:].contiguous()
WIDTHS = {"a": (4, 4), "b": (3, 4), "out": (4, 4)}


def scaled(network: nn.Module, batch: Any) -> Any:
    images, _, scale = batch
    return network(pixels=images, scale=scale)


def of_dataset(inputs: Any) -> list[Any]:
    """Items ((left, right), label), as a Dataset gives them."""
    return [((left, right), label) for left, right, label in zip(*inputs, LABELS.tolist(), strict=True)]


FORMS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], Any, Any]] = {
    "pair": (Two, lambda: [((LEFT, RIGHT), LABELS)], ((LEFT, RIGHT),), None),
    "pair alone": (Two, lambda: (LEFT, RIGHT), (LEFT, RIGHT), None),
    "dataset of three": (Two, lambda: TensorDataset(LEFT, RIGHT, LABELS), (LEFT, RIGHT), None),
    "loader of pairs": (Two, lambda: DataLoader(of_dataset((LEFT, RIGHT)), 12), ((LEFT, RIGHT),), None),  # type: ignore[arg-type]
    "names": (Two, lambda: {"right": RIGHT, "left": LEFT, "labels": LABELS}, ({"left": LEFT, "right": RIGHT},), None),
    "mapping": (Mapping, lambda: [({"left": LEFT, "right": RIGHT}, LABELS)], ({"left": LEFT, "right": RIGHT},), None),
    "list": (Images, lambda: [(list(X), [{"labels": label} for label in LABELS])], (list(X),), None),
    "tuple of samples": (Images, lambda: [(tuple(X), tuple({"labels": one} for one in LABELS))], (list(X),), None),
    "forward": (Triple, lambda: [(X / 2, LABELS, 2.0)], ((X / 2, LABELS, 2.0),), scaled),
}


def tensors(network: nn.Module) -> dict[str, Tensor]:
    return {**network.state_dict(), **Q.quantizer_state(network)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


OPTIONS: dict[str, dict[str, Any]] = {
    "pair": {"correction": "sequential"},
    "forward": {"correction": "sequential", "scheme": Q.Linear(calibration="output")},
    "names": {"scheme": Q.Linear(calibration="output")},
}


@pytest.mark.parametrize("form", FORMS)
def test_quantize_finds_the_same_whatever_the_structure(form: str) -> None:
    make, batches, _, forward = FORMS[form]
    options = OPTIONS.get(form, {})
    found = Q.quantize(make(), WIDTHS, calibrate=batches(), forward=forward, **options)
    expected = Q.quantize(Plain(), WIDTHS, calibrate=X, **options)
    if make is Images:
        # Images one by one: sums in another order, and parts of another size of what is looked at.
        for name in ("a", "b", "out"):
            one, other = found.get_submodule(name), expected.get_submodule(name)
            assert torch.allclose(one.activation_scale, other.activation_scale, rtol=1e-3)
        return
    assert same(tensors(found), tensors(expected))


@pytest.mark.parametrize("form", FORMS)
def test_all_that_follows_takes_it_too(form: str) -> None:
    make, batches, _, forward = FORMS[form]
    network, plain = make(), Plain()
    made, other = (
        Q.quantize(one, WIDTHS, calibrate=X if one is plain else batches(), forward=which)
        for one, which in ((network, forward), (plain, None))
    )
    found = Q.correct_bias(made, network, batches(), forward=forward)
    expected = Q.correct_bias(other, plain, X)
    assert found.kept == expected.kept
    assert found.errors == pytest.approx(expected.errors, abs=1e-5)
    learned = Q.reconstruct(made, network, batches(), iterations=2, forward=forward)
    assert [part.layers for part in learned.parts] == [("a",), ("b",), ("out",)]
    assert Q.reestimate_norms(made, batches(), network=network, keep_worse=True, forward=forward) == 1
    Q.reestimate_norms(other, X, network=plain, keep_worse=True)
    assert torch.allclose(made.norm.running_var, other.norm.running_var, rtol=0.2)


@pytest.mark.parametrize("form", FORMS)
def test_networks_are_folded_and_equalized(form: str) -> None:
    make, batches, example, forward = FORMS[form]
    folded = Q.fold_batch_norm(make(), *example, forward=forward)
    assert isinstance(folded.norm, nn.Identity)
    assert torch.allclose(folded.a.weight, Q.fold_batch_norm(Plain(), X).a.weight)
    equalized = Q.equalize(make(), *example, batches=batches(), forward=forward)
    assert torch.allclose(equalized.b.weight, Q.equalize(Plain(), X).b.weight, rtol=1e-4)


class Sum(nn.Module):
    """A norm before a linear layer, for smoothing, and an activation that can be shifted."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.a, self.act, self.b = nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)

    def forward(self, words: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"logits": self.b(self.act(self.a(self.norm(words)))) * mask[..., None]}


def test_smoothing_and_shifts_take_it_too() -> None:
    words, mask = torch.randn(4, 5, 8), torch.ones(4, 5)
    for batch in ({"words": words, "mask": mask}, ((words, mask), None)):
        smoothed = Q.smooth(Sum(), [batch])
        assert not torch.equal(smoothed.a.weight, Sum().a.weight)
        assert torch.allclose(smoothed(words, mask)["logits"], Sum()(words, mask)["logits"], atol=1e-5)
    shifted = Q.fold_shifts(Sum(), {"words": words, "mask": mask})
    assert shifted.act.shift > 0
    by_forward = Q.smooth(Sum(), [(words, mask)], forward=lambda network, batch: network(*batch))
    assert torch.equal(by_forward.a.weight, smoothed.a.weight)


class Text(nn.Module):
    """Token ids, a 1-d convolution over them, and attention-free outputs for every token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.conv, self.out = nn.Embedding(11, 6), nn.Conv1d(6, 6, 3, padding=1), nn.Linear(6, 11)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, None]:
        made = self.out(self.conv(self.words(input_ids).mT).relu().mT)
        if attention_mask is not None:
            made = made * attention_mask[..., None]
        return made, None


def test_token_ids_of_lengths_that_differ_from_batch_to_batch() -> None:
    ids = [torch.randint(11, (4, length), generator=torch.Generator().manual_seed(length)) for length in (5, 9, 7)]

    def loader() -> Iterator[Any]:
        for some in ids:
            yield {"input_ids": some, "attention_mask": torch.ones_like(some), "labels": some}

    policy = {"conv": (4, 4), "out": (4, 4)}
    made = Q.quantize(Text(), policy, calibrate=loader(), correction="sequential")
    other = Q.quantize(Text(), policy, calibrate=ids, correction="sequential")
    assert same(tensors(made), tensors(other))
    assert Q.reconstruct(made, Text(), list(loader()), iterations=2).parts


class Auxiliary(Body):
    """A head that helps training alone, and outputs of another structure then, as GoogLeNet has."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        if not self.training:
            return self.compute(x)
        return self.compute(x), self.aux(self.a(x).mean((2, 3)))


def test_heads_of_training_are_left_in_float_and_trained() -> None:
    network = Auxiliary().train()
    made = Q.quantize(network, WIDTHS, calibrate=X, correction="sequential")
    assert made.training
    Q.reestimate_norms(made, X, network=network)
    with pytest.warns(Q.LeftInFloat, match="'aux' is trained in float"):
        outputs = made(X)
    (outputs[0].sum() + outputs[1].sum()).backward()
    assert made.a.weight.grad is not None
    assert made.eval()(X).shape == (12, 5)
    assert Q.fold_batch_norm(network, X).a.bias is not None


class Ragged(torch.utils.data.Dataset[Any]):
    """Images of different sizes, with boxes."""

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> Any:
        return X[index, :, : 5 + index % 3], {"boxes": torch.rand(index, 4)}


def test_a_dataset_of_images_of_different_sizes() -> None:
    network = Images()
    made = Q.quantize(network, WIDTHS, calibrate=Ragged())
    other = Q.quantize(network, WIDTHS, calibrate=[([image for image, _ in (Ragged()[i] for i in range(5))],)])
    assert same(tensors(made), tensors(other))


@pytest.mark.parametrize(
    ("network", "batches", "forward", "message"),
    [
        (Two(), [(LEFT, LABELS)], None, "can't be called with .* a tuple of 2, first a Tensor of type torch.float32"),
        (Two(), {"left": LEFT}, None, "`calibrate` is of type dict"),
        (Two(), [{"left": LEFT}], None, "can't be called with .* a dict of left"),
        (Plain(), [X], lambda network, batch: network(batch, batch), "`forward` can't run the network on .*TypeError"),
        (Plain(), [(X, LABELS)], lambda network, batch: network(batch[2]), "`forward` .* a tuple of 2"),
        (Plain(), [], lambda network, batch: network(batch), "at least one image"),
    ],
)
def test_what_cannot_be_called_is_one_sentence(network: nn.Module, batches: Any, forward: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        Q.quantize(network, WIDTHS, calibrate=batches, forward=forward)
    assert "\n" not in str(raised.value)


def test_forward_gets_the_batch_as_it_was_given_and_leaves_it_alone() -> None:
    seen: list[Any] = []

    def forward(network: nn.Module, batch: Any) -> Any:
        seen.append(batch)
        return network(batch["x"].add_(1))

    batch = {"x": X.clone(), "labels": LABELS, "names": ["a"] * 12}
    Q.quantize(Plain(), WIDTHS, calibrate=[batch], forward=forward)
    assert list(seen[0]) == ["x", "labels", "names"]
    assert torch.equal(batch["x"], X)
    assert inputs_of(batch).keys() == {"x", "names"}
