"""An exporter: the bits of every layer, one on each line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

import quantizers as Q
from haq.deployment import Exporter
from haq.deployment.exporter import OnProgress, Samples, Verdict
from haq.deployment.graph import Graph


class Listing(Exporter):
    """Writes a text: name, weight bits and activation bits of every layer."""

    name = "plugin_exporter"
    summary = "the bits of every layer as a text"
    output = "listing.txt"

    def check(self, network: nn.Module) -> None:
        """Take any network."""

    def export(
        self,
        network: nn.Module,
        graph: Graph,
        images: Tensor,
        path: Path,
        *,
        notes: Mapping[str, Any],
        options: Mapping[str, Any],
        on_progress: OnProgress,
    ) -> None:
        """Write the text; for the arguments see `Exporter.export`."""
        path.write_text(listing(network))

    def compare(self, network: nn.Module, graph: Graph, samples: Samples, path: Path) -> Verdict:
        """Say whether the text is of this network."""
        same = path.read_text() == listing(network)
        return Verdict(same, (("the text", "is of this network"),))


def listing(network: nn.Module) -> str:
    """Write the bits of every layer, one on each line."""
    lines = [f"{name}: {weights} {activations}" for name, (weights, activations) in Q.get_policy(network).items()]
    return "\n".join([*lines, ""])
