"""A BitPolicy is immutable, ordered, checked, and survives a trip through JSON."""

from __future__ import annotations

import json
import pickle
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


def test_plain_data_and_files_are_one_encoding(tmp_path: Path) -> None:
    policy = Q.BitPolicy({"b": (4, 8), "a": (None, 1)})
    data = policy.to_dict()
    assert data == {
        "schema": "haq-bit-policy",
        "version": 1,
        "layers": [
            {"name": "b", "weight_bits": 4, "activation_bits": 8},
            {"name": "a", "weight_bits": None, "activation_bits": 1},
        ],
    }
    again = Q.BitPolicy.from_dict(json.loads(json.dumps(data)))
    assert list(again.items()) == list(policy.items())
    policy.to_json(tmp_path / "policy.json")
    assert json.loads((tmp_path / "policy.json").read_text()) == data


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema": "other"}, "the file's policy is not a bit policy: its 'schema' must be 'haq-bit-policy'"),
        ({"version": 3}, "the file's policy has version 3; this release reads versions 1 and 2: it was made by a newer one"),
        ({"version": 0}, "the file's policy has version 0; this release reads versions 1 and 2$"),
        ({"version": 2}, "the file's policy: 'keep' belongs to version 2, and to no other"),
        ({"keep": {"a": 0.5}}, "the file's policy: 'keep' belongs to version 2, and to no other"),
        ({"version": 2, "keep": {"a": 0}}, "the file's policy: group 'a' keeps 0 of its channels; it must be beyond 0"),
        ({"version": 2, "keep": ["a"]}, "the file's policy: keep must be shares by name"),
        ({"layers": [{"name": "a", "weight_bits": 9, "activation_bits": 1}]}, "the file's policy: layer 'a'.*not 9"),
        ({"layers": {"a": [4, 4]}}, "the file's policy: 'layers' must be a list"),
    ],
)
def test_foreign_data_are_refused_with_their_source(change: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Q.BitPolicy.from_dict({**Q.BitPolicy({"a": (4, 4)}).to_dict(), **change}, "the file's policy")
    with pytest.raises(ValueError, match="the policy is not a bit policy"):
        Q.BitPolicy.from_dict([])


def test_it_shows_itself_in_a_line() -> None:
    assert repr(Q.BitPolicy({"a": (4, None), "b": (8, 8)})) == "BitPolicy({'a': (4, None), 'b': (8, 8)})"
    names = [f"layer{index}" for index in range(20)]
    mixed = Q.BitPolicy({name: (2 + index % 7, 4) for index, name in enumerate(names)})
    assert repr(mixed) == "BitPolicy(20 layers, 2-8 / 4 bits, mean 4.8 / 4.0)"
    some = Q.BitPolicy({**mixed, "layer0": (None, 4)})
    assert repr(some) == "BitPolicy(20 layers, 2-8+float / 4 bits, mean 5.0 / 4.0)"
    assert repr(Q.BitPolicy(dict.fromkeys(names, (3, None)))) == "BitPolicy(20 layers, 3 / float bits, mean 3.0 / float)"
    assert repr(Q.BitPolicy({})) == "BitPolicy({})"


def test_a_notebook_shows_a_table() -> None:
    table = Q.BitPolicy({"<b>": (4, None), "a": (8, 8)})._repr_html_()
    assert "<tr><td>&lt;b&gt;</td><td>4</td><td>float</td></tr>" in table
    assert table.count("<tr>") == 3


def test_the_ends_are_the_first_and_the_last_layer() -> None:
    assert Q.END_BITS == (Q.MAX_BITS, Q.MAX_BITS) == (8, 8)
    assert Q.ends(["a", "b", "c"]) == {"a": (8, 8), "c": (8, 8)}
    assert Q.ends(["a"]) == {"a": (8, 8)}
    assert Q.ends([]) == {}


def test_what_is_kept_of_channels_is_a_part_of_the_policy(tmp_path: Path) -> None:
    bits = {"a": (4, 4), "b": (8, 8)}
    policy = Q.BitPolicy(bits, {"b": 0.5, "a": 0.875, "c": 1})
    assert policy.keep == {"a": 0.875, "b": 0.5}
    assert policy != Q.BitPolicy(bits)
    assert policy != bits
    assert Q.BitPolicy(bits, {"a": 1.0}) == bits
    assert policy == Q.BitPolicy(bits, {"a": 0.875, "b": 0.5})
    assert len({policy, Q.BitPolicy(bits, {"a": 0.875, "b": 0.5}), Q.BitPolicy(bits)}) == 2
    assert policy.with_keep(None) == Q.BitPolicy(bits)
    assert policy.tied([["a", "b"]]).keep == policy.keep
    policy.to_json(tmp_path / "policy.json")
    assert Q.BitPolicy.from_json(tmp_path / "policy.json") == policy
    assert json.loads((tmp_path / "policy.json").read_text()) == policy.to_dict()
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert repr(policy).endswith(", 2 groups of channels keep 0.5 to 0.875)")
    assert "<td>b</td><td>0.5</td>" in policy._repr_html_()


@pytest.mark.parametrize("share", [0, -0.5, 1.5, float("nan"), "half", None, True])
def test_shares_that_are_none_are_refused_by_name(share: object) -> None:
    with pytest.raises(ValueError, match="group 'a' keeps .* of its channels; it must be beyond 0 and at most 1"):
        Q.BitPolicy({"a": (4, 4)}, {"a": share})
