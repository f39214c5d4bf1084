"""A file with what it takes to go on exactly where something was interrupted; reading one can't execute anything."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Checkpoint:
    """Where it is, and what it belongs to: `asked`, by name. A file of something else is refused with the difference."""

    path: Path
    asked: dict[str, str]

    def write(self, content: dict[str, Any]) -> None:
        """Write tensors, numbers, strings and containers of them, beside and renamed."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_name(f"{self.path.name}.part")
        torch.save({"asked": self.asked, **content}, partial)
        partial.replace(self.path)

    def read(self) -> dict[str, Any] | None:
        """What was written last; None if nothing was. Raises ValueError, with the way out, for a file that can't be read or is
        of something else."""
        if not self.path.is_file():
            return None
        try:
            content: dict[str, Any] = torch.load(self.path, weights_only=True)
            asked = dict(content["asked"])
        except Exception as error:
            raise ValueError(f"{self.path} can't be resumed from ({type(error).__name__}); delete it to start anew") from error
        for key in sorted(set(asked) | set(self.asked)):
            if asked.get(key) != self.asked.get(key):
                raise ValueError(
                    f"{self.path} is of something else: {key} was {asked.get(key)!r} and is {self.asked.get(key)!r} now; "
                    "ask for the same again, or delete it to start anew"
                )
        return content
