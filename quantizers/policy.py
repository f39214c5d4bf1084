"""`BitPolicy`: the bits of every layer, the one object that is handed from room to room."""

from __future__ import annotations

import difflib
import json
import operator
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from quantizers.functional import MAX_BITS

SCHEMA, VERSION = "haq-bit-policy", 1
Bits = tuple["int | None", "int | None"]
QUANTIZABLE = (nn.Conv1d, nn.Conv2d, nn.Linear)


class BitPolicy(Mapping[str, Bits]):
    """An immutable, ordered mapping: layer name -> (weight bits, activation bits).

    The activation is the layer's *input*. Bits are 1..8, or None to leave that operand in float. Raises ValueError naming
    the layer and the value for anything else.
    """

    def __init__(self, bits: Mapping[str, Iterable[int | None]]) -> None:
        self._bits: dict[str, Bits] = {name: _checked(name, pair) for name, pair in bits.items()}

    @classmethod
    def uniform(cls, network: nn.Module, w: int | None, a: int | None) -> BitPolicy:
        """The same bits for every convolution and linear layer of a network, in the order of its modules."""
        names = [name for name, module in network.named_modules() if isinstance(module, QUANTIZABLE)]
        if not names:
            raise ValueError(f"{type(network).__name__} has no Conv1d, Conv2d or Linear layer to quantize")
        return cls(dict.fromkeys(names, (w, a)))

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> BitPolicy:
        """Read a policy. Raises ValueError with the reason if the file is anything but one."""
        try:
            content: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is not JSON: {error}") from error
        except RecursionError:
            raise ValueError(f"{path} is nested too deeply to be a bit policy") from None
        if not isinstance(content, dict) or content.get("schema") != SCHEMA:
            raise ValueError(f"{path} is not a bit policy: its 'schema' must be {SCHEMA!r}")
        if content.get("version") != VERSION:
            version = content.get("version")
            newer = isinstance(version, int) and version > VERSION
            way_out = ": it was made by a newer one, upgrade to read it" if newer else ""
            raise ValueError(f"{path} has version {str(version)[:40]}; this release reads version {VERSION}{way_out}")
        bits: dict[str, tuple[Any, Any]] = {}
        try:
            for layer in content["layers"]:
                if not isinstance(layer["name"], str):
                    raise TypeError("a name isn't text")
                if layer["name"] in bits:
                    raise ValueError(f"{path} names layer {layer['name'][:80]!r} twice")
                bits[layer["name"]] = layer["weight_bits"], layer["activation_bits"]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: 'layers' must be a list of objects with name, weight_bits and activation_bits ({error!r})"
            ) from error
        try:
            return cls(bits)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def tied(self, groups: Iterable[Iterable[str]]) -> BitPolicy:
        """The same policy with the layers of each group at the widest bits of the group: for layers whose outputs are added,
        which hardware wants on one grid. Float (None) is wider than 8 bits. Raises ValueError for a layer it doesn't have."""
        bits = dict(self._bits)
        for group in (list(group) for group in groups):
            if unknown := [name for name in group if name not in bits]:
                raise ValueError(f"the policy has no layer {unknown[0]!r} to tie")
            pairs = [bits[name] for name in group]
            widest = tuple(None if None in widths else max(w for w in widths if w) for widths in zip(*pairs, strict=True))
            bits.update((name, (widest[0], widest[1])) for name in group)
        return BitPolicy(bits)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write the policy, beside the target first, then renamed over it."""
        layers = [{"name": name, "weight_bits": w, "activation_bits": a} for name, (w, a) in self.items()]
        rows = ",\n".join(f"    {json.dumps(layer)}" for layer in layers)
        text = f'{{\n  "schema": "{SCHEMA}",\n  "version": {VERSION},\n  "layers": [\n{rows}\n  ]\n}}\n'
        partial = Path(f"{os.fspath(path)}.part")
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)

    def __getitem__(self, name: str) -> Bits:
        try:
            return self._bits[name]
        except KeyError:
            close = difflib.get_close_matches(name, self._bits, n=3)
            raise KeyError(f"no layer {name!r} in this policy; close: {', '.join(close) or 'none'}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._bits)

    def __len__(self) -> int:
        return len(self._bits)

    def __contains__(self, name: object) -> bool:
        return name in self._bits

    def __hash__(self) -> int:
        return hash(tuple(self._bits.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mapping) and self._bits == dict(other)

    def __repr__(self) -> str:
        return f"BitPolicy({self._bits})"


def _checked(name: str, pair: Iterable[int | None]) -> Bits:
    values = tuple(pair)
    if len(values) != 2:
        raise ValueError(f"layer {name!r} needs (weight bits, activation bits), not {values!r}")
    widths: list[int | None] = []
    for value in values:
        width = None if value is None or isinstance(value, bool) else _index(value)
        if value is not None and (width is None or not 1 <= width <= MAX_BITS):
            raise ValueError(f"layer {name!r}: bits must be an integer from 1 to {MAX_BITS}, or None, not {_shown(value)}")
        widths.append(width)
    return widths[0], widths[1]


def _shown(value: Any) -> str:
    """A value in a message; of a long one, its type."""
    return repr(value) if isinstance(value, (int, float, str, type(None))) and len(str(value)) <= 40 else type(value).__name__


def _index(value: Any) -> int | None:
    """An int from any integer type (NumPy's too), None from anything else."""
    try:
        return operator.index(value)
    except TypeError:
        return None
