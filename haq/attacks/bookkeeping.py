"""What an assessment has done so far: kept on disk, so that it goes on after an interruption, and told as it goes on."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from haq.store import npz
from haq.store.files import write

OnProgress = Callable[[float, float, str], None]  # passes done, passes in all, and what is being done
_ENTRIES = {"examples", "fooled_by", "attacks", "right", "figures", "values"}
_OVERHEAD = 2**24  # bytes of a file beyond twice its images


class FinishedAttacks:
    """What is finished of an assessment: in memory, and in a file of its own for what was asked, without pickle.

    Attributes:
        right: Which images each attack left right, by its name, (N,) of bool.
        figures: What checks measured, by name.
        examples: (N, C, H, W): for each image the first that fooled the network, or else the last that was tried.
        fooled_by: The attack that each example is from: "nothing" where the image was wrong to begin with, "" where all
            failed.
    """

    def __init__(self, folder: Path | None, asked: str, images: Tensor, clean: Tensor) -> None:
        """Begin with nothing, or with what the folder holds of the same assessment.

        Args:
            folder: Where files are kept; None: nowhere.
            asked: All that the outcome depends on.
            images: Those that are attacked, (N, C, H, W).
            clean: Which of them are right to begin with, (N,) of bool.

        Raises:
            ValueError: For a damaged file.
        """
        self.path: Path | None = None
        if folder is not None:
            self.path = folder / f"{hashlib.sha256(asked.encode()).hexdigest()[:16]}.npz"
        self.right: dict[str, Tensor] = {}
        self.figures: dict[str, float] = {}
        self.examples = images.clone()
        self.fooled_by = ["" if right else "nothing" for right in clean.tolist()]
        if self.path is not None and self.path.exists():
            try:
                self._read(self.path)
            except (ValueError, OSError, LookupError, EOFError, TypeError) as error:
                raise ValueError(f"{self.path} can't be gone on from ({error}): delete it") from error

    def add(self, name: str, right: Tensor, found: Tensor) -> None:
        """Take in what an attack found.

        Args:
            name: The attack's.
            right: Which images it left right, (N,) of bool.
            found: What it made of the images, (N, C, H, W).
        """
        for i, holds in enumerate(right.tolist()):
            if not self.fooled_by[i]:
                # Those that hold keep the last that was tried.
                self.examples[i] = found[i]
                if not holds:
                    self.fooled_by[i] = name
        self.right[name] = right
        self._write()

    def figure(self, name: str, measure: Callable[[], float]) -> float:
        """Return the figure of a name; what isn't there yet is measured."""
        if name not in self.figures:
            self.figures[name] = measure()
            self._write()
        return self.figures[name]

    def _read(self, path: Path) -> None:
        file = npz.read(path, _ENTRIES, 2 * self.examples.numel() * self.examples.element_size() + _OVERHEAD)
        images = self.examples
        attacks = len(file["attacks"])
        figures = len(file["figures"])
        expected: dict[str, tuple[str, tuple[int, ...]]] = {
            "examples": ("f", tuple(images.shape)),
            "fooled_by": ("U", (len(images),)),
            "attacks": ("U", (attacks,)),
            "right": ("b", (attacks, len(images))),
            "figures": ("U", (figures,)),
            "values": ("f", (figures,)),
        }
        for name, (kind, shape) in expected.items():
            entry = file[name]
            if (entry.dtype.kind, entry.shape) != (kind, shape):
                raise ValueError(f"{name} is {entry.dtype} of shape {entry.shape}")
            if kind == "f" and not np.isfinite(entry).all():
                raise ValueError(f"{name} has values that are not finite")
        self.examples = torch.tensor(file["examples"]).to(images)
        self.fooled_by = [str(name) for name in file["fooled_by"]]
        self.figures = dict(zip(map(str, file["figures"]), map(float, file["values"]), strict=True))
        for number, name in enumerate(map(str, file["attacks"])):
            self.right[name] = torch.tensor(file["right"][number]).to(images.device)

    def _write(self) -> None:
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = io.BytesIO()
        masks = [mask.cpu().numpy() for mask in self.right.values()]
        np.savez(
            file,
            examples=self.examples.cpu().numpy(),
            fooled_by=np.array(self.fooled_by),
            attacks=np.array(list(self.right), dtype=str),
            right=np.array(masks, bool).reshape(len(masks), len(self.fooled_by)),
            figures=np.array(list(self.figures), dtype=str),
            values=np.array(list(self.figures.values()), float),
        )
        write(self.path, file.getvalue())


class PassProgress:
    """Passes done, told as attacks go on."""

    def __init__(self, total: float, on_progress: OnProgress) -> None:
        """Begin with none of a total."""
        self.total = total
        self.on_progress = on_progress
        self.done = 0.0
        self.before = 0.0
        self.size = 0.0
        self.note = ""

    def begin(self, note: str, size: float) -> None:
        """Say what begins, and how many passes it has."""
        self.note = note
        self.before = self.done
        self.size = size
        self.on_progress(self.done, self.total, note)

    def advance(self, part: float) -> None:
        """Say that another part of it, 0..1, is done."""
        self.done = min(self.done + part * self.size, self.before + self.size)
        self.on_progress(self.done, self.total, self.note)

    def end(self) -> None:
        """Say that all of it is done."""
        self.done = self.before + self.size
        self.on_progress(self.done, self.total, self.note)

    def finish(self) -> None:
        """Say that everything is done."""
        self.on_progress(self.total, self.total, "")
