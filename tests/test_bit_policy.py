"""A BitPolicy is immutable, ordered, checked, and survives a trip through JSON."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import quantizers as Q


def test_round_trip_keeps_order_and_bits(tmp_path: Path) -> None:
    policy = Q.BitPolicy({"b": (4, 8), "a": (None, 1), "c": (2, None)})
    policy.to_json(tmp_path / "policy.json")
    again = Q.BitPolicy.from_json(tmp_path / "policy.json")
    assert again == policy
    assert list(again) == ["b", "a", "c"]
    assert hash(again) == hash(policy)
    assert [file.name for file in tmp_path.iterdir()] == ["policy.json"]


def test_uniform_names_every_layer(network: nn.Module) -> None:
    policy = Q.BitPolicy.uniform(network, w=4, a=6)
    assert dict(policy) == dict.fromkeys(("stem", "depthwise", "pointwise", "hidden", "classifier"), (4, 6))


def test_uniform_of_a_network_without_layers() -> None:
    with pytest.raises(ValueError, match="no Conv1d, Conv2d or Linear"):
        Q.BitPolicy.uniform(nn.ReLU(), w=4, a=4)


def test_integers_of_numpy_are_integers() -> None:
    assert Q.BitPolicy({"a": (np.int64(3), np.int32(8))})["a"] == (3, 8)


@pytest.mark.parametrize("bad", [0, 9, -1, 4.0, "4", True])
def test_bits_out_of_range_name_the_layer_and_the_value(bad: object) -> None:
    with pytest.raises(ValueError, match=r"'conv1'.*1 to 8.*" + str(bad)):
        Q.BitPolicy({"conv1": (bad, 8)})  # type: ignore[dict-item]


def test_unknown_layer_names_the_close_ones() -> None:
    with pytest.raises(KeyError, match="conv1"):
        Q.BitPolicy({"conv1": (8, 8)})["conv2"]


def test_it_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        Q.BitPolicy({"a": (8, 8)})["a"] = (4, 4)  # type: ignore[index]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "schema"),
        ('{"schema": "other"}', "schema"),
        ('{"schema": "haq-bit-policy", "version": 99}', "version 99"),
        ('{"schema": "haq-bit-policy", "version": 1}', "layers"),
        ('{"schema": "haq-bit-policy", "version": 1, "layers": [{"name": "a"}]}', "weight_bits"),
        (
            json.dumps(
                {
                    "schema": "haq-bit-policy",
                    "version": 1,
                    "layers": [{"name": "a", "weight_bits": 4, "activation_bits": 4}] * 2,
                }
            ),
            "twice",
        ),
    ],
)
def test_foreign_files_are_refused_with_the_reason(tmp_path: Path, content: str, reason: str) -> None:
    path = tmp_path / "policy.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=reason):
        Q.BitPolicy.from_json(path)
