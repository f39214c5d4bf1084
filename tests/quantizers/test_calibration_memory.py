"""Calibration takes memory that doesn't grow with the number of images, and finds what it finds with all at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import quantizers as Q
from quantizers import batches, moments
from quantizers.calling import count_of, leaves
from quantizers.moments import InputMoments
from quantizers.rounding import gptq


class Watched(nn.Module):
    """Notes how many images it is called with."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 3)
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        made: Tensor = self.b(self.a(x).relu())
        return made


X = torch.rand(21, 2, 24, 24, generator=torch.Generator().manual_seed(1))
POLICY = {"a": (4, 4), "b": (4, 4)}
# Layer a has 2 + 4 channels of 24 x 24 float32 values in and out.
IMAGE = 6 * 24 * 24 * 4


def calibrated(monkeypatch: pytest.MonkeyPatch, given: Any, images: int, **options: Any) -> tuple[Any, list[int]]:
    """Quantize with room for some images' activations."""
    monkeypatch.setattr(batches, "MOST_BYTES", images * IMAGE)
    network = Watched()
    made: Any = Q.quantize(network, POLICY, calibrate=given, **options)
    return made, made.seen


@pytest.mark.parametrize("given", [X, [X], (X, torch.zeros(21)), [(X, torch.zeros(21))], [{"x": X}]])
def test_a_batch_is_gone_through_in_parts_that_fit(given: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, seen = calibrated(monkeypatch, given, 5)
    # One image to measure, one and two to see that they don't depend on each other, and then the parts.
    assert seen == [1, 1, 2, 5, 5, 5, 5, 1]
    whole, seen = calibrated(monkeypatch, given, 100)
    assert seen == [1, 21]
    for name in POLICY:
        one, other = parts.get_submodule(name), whole.get_submodule(name)
        assert torch.allclose(one.activation_scale, other.activation_scale, rtol=1e-4)
        assert torch.equal(one.weight_scale, other.weight_scale)


def test_moments_and_corrections_are_those_of_all_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "ENOUGH", 10**9)  # every patch counts, whatever batch it is in
    for options in ({"scheme": Q.Linear(calibration="output")}, {"correction": "analytic"}, {"correction": "sequential"}):
        found = []
        for images in (4, 100):
            made, seen = calibrated(monkeypatch, X, images, **options)
            if images == 4 and options != {"correction": "sequential"}:
                assert max(seen) == 4
            found.append({**made.state_dict(), **Q.quantizer_state(made)})
        for key, tensor in found[0].items():
            assert torch.allclose(tensor.float(), found[1][key].float(), rtol=1e-3, atol=1e-4), key


def test_small_tensors_are_not_looked_at_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    _, seen = calibrated(monkeypatch, X[:4], 1)
    assert seen == [4]


def test_what_depends_on_other_images_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    class Together(Watched):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    monkeypatch.setattr(batches, "MOST_BYTES", 5 * IMAGE)
    made = Q.quantize(Together(), POLICY, calibrate=X)
    assert made.seen == [1, 1, 2, 21]


def test_random_numbers_are_drawn_as_if_nothing_had_been_measured() -> None:
    class Noisy(Watched):
        def forward(self, x: Tensor) -> Tensor:
            self.noise = torch.rand(1)
            return super().forward(x + self.noise)

    network = Noisy()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    made = Q.quantize(network, POLICY, calibrate=X)
    assert made.seen == [1, 21]
    assert torch.equal(made.noise, expected)


def test_a_batch_of_a_forward_is_divided_with_its_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[list[int]] = []

    def forward(network: nn.Module, batch: Any) -> Any:
        sizes.append([len(tensor) for tensor in leaves(batch)])
        return network(batch["x"])

    calibrated(monkeypatch, [{"x": X, "labels": torch.zeros(21), "scale": torch.ones(2)}], 10, forward=forward)
    assert sizes[-3:] == [[10, 10, 2], [10, 10, 2], [1, 1, 2]]


def test_lists_of_images_are_divided(monkeypatch: pytest.MonkeyPatch) -> None:
    class Each(Watched):
        def forward(self, images: list[Tensor]) -> list[Tensor]:  # type: ignore[override]
            self.counted = [*getattr(self, "counted", []), count_of(images)]
            return [super(Each, self).forward(image[None])[0] for image in images]

    monkeypatch.setattr(batches, "MOST_BYTES", 5 * IMAGE)
    made = Q.quantize(Each(), POLICY, calibrate=[(list(X),)])
    # Each image is a call of its own: the largest module has one at a time, and so do the parts.
    assert made.counted == [1, 1, 2, 5, 5, 5, 5, 1]


def test_folding_keeps_no_activations_but_of_one_image() -> None:
    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
            self.hooked: list[int] = []

        def forward(self, x: Tensor) -> Tensor:
            if self.norm._forward_pre_hooks:
                self.hooked.append(len(x))
            made: Tensor = self.norm(self.conv(x))
            return made

    assert Q.fold_batch_norm(Held(), X).hooked == [1]


def test_sums_of_layers_with_many_inputs_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    for inputs, groups in ((8192, 1), (25088, 1), (100352, 1), (1 << 18, 1), (8192 * 64, 64)):
        found = InputMoments("layer", nn.Conv1d(inputs, 64, 1, groups=groups, device="meta"))
        assert found.bytes <= moments.MOST_BYTES
        assert found.parts * found.inputs * groups == inputs
    assert InputMoments("layer", nn.Linear(8192, 1, device="meta")).parts == 1
    # In parts, products within a part are those of all.
    layer, x = nn.Linear(48, 3), torch.randn(200, 48)
    whole = InputMoments("layer", layer)
    monkeypatch.setattr(moments, "MOST_BYTES", 4 * 48 * 12)
    parts = InputMoments("layer", layer)
    for one in (whole, parts):
        one(layer, (x,))
    assert (parts.parts, parts.inputs) == (4, 12)
    assert torch.allclose(parts.covariance()[1], whole.covariance()[0, 12:24, 12:24], atol=1e-4)
    assert gptq(layer.weight, torch.full((8, 3), 0.05), parts).shape == (8, 3, 48)


@pytest.mark.parametrize("centred", [True, False])
def test_covariances_are_computed_in_pieces_bit_for_bit(centred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.Linear(300, 3), torch.randn(500, 300) + 1
    seen = InputMoments("layer", layer, centred)
    seen(layer, (x,))
    expected = seen.covariance()
    monkeypatch.setattr(moments, "ROWS", 70)
    assert torch.equal(seen.covariance(), expected)
