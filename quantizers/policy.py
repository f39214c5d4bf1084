"""`BitPolicy`: the bits of every layer, the one object that is handed from room to room."""

from __future__ import annotations

import difflib
import html
import json
import operator
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Real
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from quantizers.files import written_beside
from quantizers.functional import ACCEPTED, MAX_BITS, WIDTHS

SCHEMA, VERSION = "haq-bit-policy", 1
KEEP_VERSION = 2  # of policies that keep a part of some channels, which readers of version 1 would not know of
Bits = tuple["int | None", "int | None"]
FLOAT = "float"  # how a width that stays in float may be written; it is kept as None
QUANTIZABLE = (nn.Conv1d, nn.Conv2d, nn.Linear)
# Of the first and the last layer, where nothing else is said: they suffer most from few bits, and
# cost little.
END_BITS: Bits = (MAX_BITS, MAX_BITS)
SHORT = 4  # policies of at most so many layers are shown in full


def ends(names: Sequence[str]) -> dict[str, Bits]:
    """Return the first and the last layer of a network, by name, at END_BITS.

    Args:
        names: All layers of the network, in order.

    Returns:
        Pairs of widths of the two layers; of one layer, one; of none, nothing.
    """
    if not names:
        return {}
    return {names[0]: END_BITS, names[-1]: END_BITS}


class BitPolicy(Mapping[str, Bits]):
    """An immutable, ordered mapping: layer name -> (weight bits, activation bits).

    The activation is the layer's *input*. Bits are 1..8 or 16, or None to leave that operand in
    float; "float" is taken for None.

    Beside that a policy may say which share of the channels of a group of channels is kept
    (`quantizers.pruning`). Groups that `keep` doesn't name keep all of theirs.
    """

    def __init__(self, bits: Mapping[str, Iterable[int | str | None]], keep: Mapping[str, float] | None = None) -> None:
        """Take the bits of every layer, in order, and what is kept of groups of channels.

        Args:
            bits: Two widths by layer name. Of a `BitPolicy`, what it keeps is not taken along.
            keep: The share of channels that is kept, beyond 0 and at most 1, by the group's name; a share of 1
                is the same as none. None: all channels are kept.

        Raises:
            ValueError: Naming the layer or group and the value, for anything else.
        """
        self._bits: dict[str, Bits] = {name: _checked(name, pair) for name, pair in bits.items()}
        self._keep: dict[str, float] = _checked_keep(keep)

    @property
    def keep(self) -> Mapping[str, float]:
        """Return the share of channels that is kept, by the group's name; groups that keep all aren't named."""
        return MappingProxyType(self._keep)

    def with_keep(self, keep: Mapping[str, float] | None) -> BitPolicy:
        """Return the same bits with other shares of channels.

        Args:
            keep: Shares in (0, 1], by the group's name; None or nothing: all channels are kept.

        Returns:
            A new policy.
        """
        return BitPolicy(self._bits, keep)

    @classmethod
    def uniform(cls, network: nn.Module, w: int | str | None, a: int | str | None) -> BitPolicy:
        """Give every convolution and linear layer of a network the same bits.

        Args:
            network: The network; its modules' order is the policy's.
            w: The bits of weights.
            a: The bits of activations.

        Returns:
            The policy.

        Raises:
            ValueError: If the network has no such layer, or for bits out of range.
        """
        names = [name for name, module in network.named_modules() if isinstance(module, QUANTIZABLE)]
        if not names:
            raise ValueError(f"{type(network).__name__} has no Conv1d, Conv2d or Linear layer to quantize")
        return cls(dict.fromkeys(names, (w, a)))

    @classmethod
    def from_dict(cls, data: Any, source: str = "the policy") -> BitPolicy:
        """Make a policy of what `to_dict` returned.

        Args:
            data: The plain data, from anywhere.
            source: What the messages call it, such as a file's name.

        Returns:
            The policy.

        Raises:
            ValueError: With the reason, if the data are anything but a policy.
        """
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            raise ValueError(f"{source} is not a bit policy: its 'schema' must be {SCHEMA!r}")
        _check_version(data.get("version"), source)
        if ("keep" in data) != (data["version"] == KEEP_VERSION):
            raise ValueError(f"{source}: 'keep' belongs to version {KEEP_VERSION}, and to no other")
        bits: dict[str, tuple[Any, Any]] = {}
        try:
            for layer in data["layers"]:
                if not isinstance(layer["name"], str):
                    raise TypeError("a name isn't text")
                if layer["name"] in bits:
                    raise ValueError(f"{source} names layer {layer['name'][:80]!r} twice")
                bits[layer["name"]] = layer["weight_bits"], layer["activation_bits"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{source}: 'layers' must be a list of objects with name, weight_bits and activation_bits ({error!r})"
            ) from error
        try:
            return cls(bits, data.get("keep"))
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """Return the policy as plain data, in the one encoding that every file uses.

        Returns:
            What JSON can hold: schema, version, layers, and `keep` where channels are pruned.
        """
        layers = [{"name": name, "weight_bits": w, "activation_bits": a} for name, (w, a) in self.items()]
        if not self._keep:
            return {"schema": SCHEMA, "version": VERSION, "layers": layers}
        return {"schema": SCHEMA, "version": KEEP_VERSION, "keep": dict(self._keep), "layers": layers}

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> BitPolicy:
        """Read a policy from a file.

        Args:
            path: The file.

        Returns:
            The policy.

        Raises:
            ValueError: With the reason, if the file is anything but a policy.
        """
        try:
            content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        except RecursionError:
            raise ValueError(f"{path} is nested too deeply to be a bit policy") from None
        return cls.from_dict(content, str(path))

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the policy, a line per layer; beside the target first, then renamed over it.

        Args:
            path: The file.
        """
        data = self.to_dict()
        layers = ",\n".join(f"    {json.dumps(layer)}" for layer in data["layers"])
        keep = ""
        if self._keep:
            keep = f'  "keep": {json.dumps(dict(self._keep))},\n'
        text = f'{{\n  "schema": "{SCHEMA}",\n  "version": {data["version"]},\n{keep}  "layers": [\n{layers}\n  ]\n}}\n'
        with written_beside(path) as partial:
            partial.write_text(text, encoding="utf-8")

    def tied(self, groups: Iterable[Iterable[str]]) -> BitPolicy:
        """Give the layers of each group the widest bits of the group; float (None) is wider than 16 bits.

        Tie layers whose outputs are added, which hardware wants on one grid.

        Args:
            groups: Names of layers that belong together.

        Returns:
            A new policy.

        Raises:
            ValueError: For a layer that the policy doesn't have.
        """
        bits = dict(self._bits)
        for group in groups:
            names = list(group)
            if unknown := [name for name in names if name not in bits]:
                raise ValueError(f"the policy has no layer {unknown[0]!r} to tie")
            if names:
                weights, activations = zip(*(bits[name] for name in names), strict=True)
                bits.update(dict.fromkeys(names, (_widest(weights), _widest(activations))))
        return BitPolicy(bits, self._keep)

    def __getitem__(self, name: str) -> Bits:
        """Return a layer's bits. Raises KeyError with the close names for an unknown layer."""
        try:
            return self._bits[name]
        except KeyError:
            close = difflib.get_close_matches(name, self._bits, n=3)
            raise KeyError(f"no layer {name!r} in this policy; close: {', '.join(close) or 'none'}") from None

    def __iter__(self) -> Iterator[str]:
        """Iterate over the layers' names, in order."""
        return iter(self._bits)

    def __len__(self) -> int:
        """Count the layers."""
        return len(self._bits)

    def __contains__(self, name: object) -> bool:
        """Say whether there is a layer of that name."""
        return name in self._bits

    def __hash__(self) -> int:
        """Hash the layers and their bits, in order, and what is kept."""
        return hash((tuple(self._bits.items()), frozenset(self._keep.items())))

    def __eq__(self, other: object) -> bool:
        """Compare with any mapping; the order doesn't matter. One that isn't a policy keeps all channels."""
        if not isinstance(other, Mapping):
            return False
        keep: Mapping[str, float] = {}
        if isinstance(other, BitPolicy):
            keep = other.keep
        return self._bits == dict(other) and self._keep == keep

    def __repr__(self) -> str:
        """Show a short policy in full, and of a long one the widths and their means."""
        if len(self) <= SHORT:
            return f"BitPolicy({self._bits}{self._keep_words()})"
        weights = [w for w, _ in self.values()]
        activations = [a for _, a in self.values()]
        return (
            f"BitPolicy({len(self)} layers, {_span(weights)} / {_span(activations)} bits, "
            f"mean {_mean(weights)} / {_mean(activations)}{self._keep_words()})"
        )

    def _keep_words(self) -> str:
        """Say of how many groups of channels a part is kept; nothing if all keep theirs."""
        if not self._keep:
            return ""
        low, high = min(self._keep.values()), max(self._keep.values())
        return f", {len(self._keep)} groups of channels keep {low:.3g} to {high:.3g}"

    def _repr_html_(self) -> str:
        """Show the policy as a table, in a notebook."""
        lines = [
            f"<tr><td>{html.escape(name)}</td><td>{_width(w)}</td><td>{_width(a)}</td></tr>" for name, (w, a) in self.items()
        ]
        head = "<tr><th>layer</th><th>weight bits</th><th>input bits</th></tr>"
        table = f"<table><thead>{head}</thead><tbody>{''.join(lines)}</tbody></table>"
        if not self._keep:
            return table
        kept = [f"<tr><td>{html.escape(name)}</td><td>{share:.3g}</td></tr>" for name, share in self._keep.items()]
        head = "<tr><th>group of channels</th><th>share kept</th></tr>"
        return f"{table}<table><thead>{head}</thead><tbody>{''.join(kept)}</tbody></table>"


def _check_version(version: Any, source: str) -> None:
    if version in (VERSION, KEEP_VERSION) and not isinstance(version, bool):
        return
    remedy = ""
    if isinstance(version, int) and version > KEEP_VERSION:
        remedy = ": it was made by a newer one, upgrade to read it"
    raise ValueError(
        f"{source} has version {str(version)[:40]}; this release reads versions {VERSION} and {KEEP_VERSION}{remedy}"
    )


def _widest(widths: Iterable[int | None]) -> int | None:
    widest = 1
    for width in widths:
        if width is None:
            return None
        widest = max(widest, width)
    return widest


def _width(bits: int | None) -> str:
    if bits is None:
        return FLOAT
    return str(bits)


def _span(widths: list[int | None]) -> str:
    """Say which widths there are: 2-8, 4, float, or 2-8+16+float."""
    integers = sorted({bits for bits in widths if bits is not None})
    few = [bits for bits in integers if bits <= MAX_BITS]
    parts = []
    if len(few) > 1:
        parts.append(f"{few[0]}-{few[-1]}")
    elif few:
        parts.append(str(few[0]))
    parts += [str(bits) for bits in integers if bits > MAX_BITS]
    if None in widths:
        parts.append(FLOAT)
    return "+".join(parts)


def _mean(widths: list[int | None]) -> str:
    """Return the mean over the layers that aren't float, to one digit."""
    integers = [bits for bits in widths if bits is not None]
    if not integers:
        return FLOAT
    return f"{sum(integers) / len(integers):.1f}"


def _checked(name: str, pair: Iterable[int | str | None]) -> Bits:
    if isinstance(pair, str) or not isinstance(pair, Iterable):
        raise ValueError(f"layer {name!r} needs (weight bits, activation bits), not {_shown(pair)}")
    values = tuple(pair)
    if len(values) != 2:
        raise ValueError(f"layer {name!r} needs (weight bits, activation bits), not {values!r}")
    return _checked_width(name, values[0]), _checked_width(name, values[1])


def _checked_keep(keep: Any) -> dict[str, float]:
    """Check what is kept of groups of channels, and leave out those that keep all; in the order of their names."""
    if keep is None:
        return {}
    if not isinstance(keep, Mapping):
        raise ValueError(f"keep must be shares by name of a group of channels, not {_shown(keep)}")
    found = {}
    for name in sorted(keep, key=str):
        share = keep[name]
        if not isinstance(name, str):
            raise ValueError(f"keep names {_shown(name)}, which is no name of a group of channels")
        is_number = isinstance(share, Real) and not isinstance(share, bool)
        if not is_number or not 0 < share <= 1:
            raise ValueError(f"group {name!r} keeps {_shown(share)} of its channels; it must be beyond 0 and at most 1")
        if share < 1:
            found[name] = float(share)
    return found


def _checked_width(name: str, value: Any) -> int | None:
    if value is None or (isinstance(value, str) and value == FLOAT):
        return None
    width = _integer(value)
    if width is None or width not in WIDTHS:
        raise ValueError(f"layer {name!r}: bits must be {ACCEPTED}, not {_shown(value)}")
    return width


def _shown(value: Any) -> str:
    """Show a value in a message; of a long one, its type."""
    if isinstance(value, int | float | str) and len(str(value)) <= 40:
        return repr(value)
    return type(value).__name__


def _integer(value: Any) -> int | None:
    """Return an int for any integer type (NumPy's too), None for anything else, True and False included."""
    if isinstance(value, bool):
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None
