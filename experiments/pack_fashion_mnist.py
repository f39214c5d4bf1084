"""Remake `haq/assets/fashion-mnist-12k.npz.xz` from the full data set.

    python -m experiments.pack_fashion_mnist

10,000 images of the official training files (8,000 train + 2,000 search) and 2,000 of the official test files, balanced
over the ten classes, with the row each came from.
"""

from __future__ import annotations

import io
import lzma
from pathlib import Path

import numpy as np
import torch

import haq
from haq.data import fashion_mnist as source


def main() -> None:
    folder = source.find_folder()
    arrays = {name: source.read_idx(folder / f"{name}.gz", sha) for name, sha in source.FILES.items()}
    train_images, train_labels = arrays["train-images-idx3-ubyte"], arrays["train-labels-idx1-ubyte"]
    test_images, test_labels = arrays["t10k-images-idx3-ubyte"], arrays["t10k-labels-idx1-ubyte"]
    train, search, test = (
        rows.numpy() for rows in source.fashion_mnist_12k_rows(torch.from_numpy(train_labels), torch.from_numpy(test_labels))
    )
    buffer = io.BytesIO()
    np.savez(
        buffer,
        images=np.concatenate([train_images[train], train_images[search], test_images[test]]),
        labels=np.concatenate([train_labels[train], train_labels[search], test_labels[test]]),
        row=np.concatenate([train, search, test]).astype(np.uint16),
    )
    target = Path(haq.__file__).parent / "assets" / "fashion-mnist-12k.npz.xz"
    target.write_bytes(lzma.compress(buffer.getvalue(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{target}: {target.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
