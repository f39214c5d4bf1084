"""An agent in a file: what `haq pretrain` writes, and what a search with `--agent FILE` starts from.

haq-agent-1     safetensors: the float32 tensors of its actor and critics; what it is, as JSON in the header
                (`haq.store.records.AgentRecord`)

Nothing that a file holds is imported or executed, and the same agent gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from haq.networks.checkpoint import read_header, read_state, write_safetensors
from haq.store.files import AGENT_SCHEMA, check_file, check_schema, quoted
from haq.store.records import AgentRecord
from hw_models.registry import printable

if TYPE_CHECKING:
    from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm

ENDING = ".safetensors"
PARTS = ("actor", "critic")
MOST = 2**28  # bytes of a file that is read
REMEDY = "haq pretrain makes one"


@dataclass(frozen=True)
class AgentFile:
    """A pretrained agent.

    Attributes:
        record: What it is.
        tensors: Its networks' float32 tensors, by name.
        checksum: Of its content, which tells it from any other.
        source: The file that it is from; empty for one that isn't on disk yet.
    """

    record: AgentRecord
    tensors: Mapping[str, Tensor]
    checksum: str = ""
    source: str = ""

    def write(self, path: Path) -> None:
        """Write the file beside its place and rename it."""
        check_ending(path)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in sorted(self.tensors.items())}
        write_safetensors(tensors, path, {"format": AGENT_SCHEMA, "agent": json.dumps(self.record.to_dict())})

    @classmethod
    def read(cls, path: Path) -> AgentFile:
        """Read a file.

        Args:
            path: The file.

        Returns:
            The agent.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: With the first fault, if it is anything else, of another version, or holds values that aren't finite.
        """
        check_ending(path)
        check_file(path, MOST)
        try:
            header = read_header(path)
        except ValueError:
            raise ValueError(f"{path} is no pretrained agent: it is truncated or of another kind; {REMEDY}") from None
        check_schema(path, header.notes.get("format"), AGENT_SCHEMA, "a pretrained agent", "pretrain it anew")
        try:
            content = json.loads(header.notes.get("agent", ""))
        except (ValueError, RecursionError):
            content = None
        if not isinstance(content, dict):
            raise ValueError(f"{path} is no pretrained agent: its header doesn't say what it is; {REMEDY}")
        record = AgentRecord.from_dict(content, path)
        try:
            tensors = read_state(path)[0]
        except ValueError:
            raise ValueError(f"{path} is no pretrained agent: it is truncated; {REMEDY}") from None
        for name, tensor in sorted(tensors.items()):
            if tensor.dtype != torch.float32:
                raise ValueError(f"{path} holds {printable(name)} as {tensor.dtype}; an agent's networks are float32")
            if not bool(tensor.isfinite().all()):
                raise ValueError(
                    f"{path} holds values that are not finite in {printable(name)}: no agent can be started from it; "
                    "pretrain it anew"
                )
        return cls(record, tensors, hashlib.sha256(path.read_bytes()).hexdigest(), str(path))

    def check_kind(self, solver: str) -> None:
        """Raise ValueError unless it is one that a solver of this name can start from."""
        if self.record.kind != solver:
            raise ValueError(
                f"{self.source or 'the agent'} is a pretrained {self.record.kind}, from which {solver} can't start: choose "
                f"--solver {self.record.kind}, or pretrain a {solver}"
            )

    def check_features(self, features: Sequence[str]) -> None:
        """Raise ValueError, naming the first difference, unless it observes just these features in this order."""
        known = self.record.features
        for index in range(max(len(known), len(features))):
            its, ours = known[index : index + 1], list(features[index : index + 1])
            if its != ours:
                raise ValueError(
                    f"{self.source or 'the agent'} observes other features than this version of haq: the one at place "
                    f"{index + 1} of {len(known)} is {_named(its)}, and here it is {_named(ours)}; pretrain it anew"
                )

    def start(self, agent: OffPolicyAlgorithm) -> None:
        """Give an agent these networks; its target networks become copies of them.

        Args:
            agent: The agent, of this kind and of these sizes.

        Raises:
            ValueError: Naming the tensor, if its networks are others.
        """
        self.check_shapes(networks_of(agent))
        for part in PARTS:
            prefix = f"{part}/"
            state = {name.removeprefix(prefix): one for name, one in self.tensors.items() if name.startswith(prefix)}
            getattr(agent, part).load_state_dict(state)
            target = getattr(agent, f"{part}_target", None)
            if target is not None:
                target.load_state_dict(state)

    def check_shapes(self, expected: Mapping[str, Tensor]) -> None:
        """Raise ValueError, naming the first that isn't, unless the tensors are those of networks of its record's sizes.

        Args:
            expected: The tensors of an agent that was made of the record.
        """
        for name in sorted({*expected, *self.tensors}):
            its, ours = (_shape(tensors.get(name)) for tensors in (self.tensors, expected))
            if its != ours:
                raise ValueError(
                    f"{self.source or 'the agent'} doesn't hold the networks that its header tells of: {printable(name)} is "
                    f"{its}, and must be {ours}; pretrain it anew"
                )


def networks_of(agent: OffPolicyAlgorithm) -> dict[str, Tensor]:
    """Return the tensors of an agent's actor and critics, by name; targets are copies and are left out."""
    found = {}
    for part in PARTS:
        for name, tensor in getattr(agent, part).state_dict().items():
            found[f"{part}/{name}"] = tensor
    return found


def check_ending(path: Path) -> None:
    """Raise ValueError unless a path is named as an agent's file is."""
    if path.suffix != ENDING:
        raise ValueError(f"{path} isn't named as an agent's file: its name must end in {ENDING}")


def _named(features: Sequence[str]) -> str:
    if not features:
        return "missing"
    return quoted(features[0])


def _shape(tensor: Tensor | None) -> str:
    if tensor is None:
        return "missing"
    return f"of shape {tuple(tensor.shape)}"
