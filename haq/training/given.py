"""What a user gives to fine-tune with in Python: samples of the kind that a problem is of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from haq.data import Split
from haq.data.memory import default_bytes
from haq.data.sources import source_of
from haq.networks import Network
from haq.problem.batches import read_tensors
from haq.problem.objective import Objective
from haq.training.goals import IMAGE_DIMS, UserLoss

if TYPE_CHECKING:
    from haq.problem.problem import Problem


def given_to_tune(problem: Problem, loader: Any, loss: UserLoss | None) -> tuple[Network, Split, Objective | None]:
    """Make of a problem, and of samples like its own, what `finetune` takes.

    Args:
        problem: The problem.
        loader: Samples: a DataLoader, a Dataset, tensors, batches.
        loss: What is minimised in place of the distance from the float network's outputs.

    Returns:
        The float network, the samples, and the objective; None for images of classes, whose labels play no part.

    Raises:
        TypeError: For what gives no samples.
        ValueError: For inputs that are no images, where the problem is of such.
    """
    name = type(problem.network).__name__
    objective = problem.objective
    first = problem.calibration[0]
    is_of_images = isinstance(first, Tensor) and first.dim() == IMAGE_DIMS
    if objective.takes_scores and is_of_images and loss is None and problem.forward is None:
        images, _ = read_tensors(loader, "loader", with_labels=False)
        if images.dim() != IMAGE_DIMS:
            raise ValueError(f"fine-tuning takes images (N, C, H, W), the loader gives inputs of shape {tuple(images.shape)}")
        network = Network(name, problem.network, tuple(images.shape[1:]))
        return network, Split(images, images.new_zeros(len(images)).long()), None
    split = Split(source_of(loader, "`loader`", default_bytes()))
    return Network(name, problem.network, (), forward=problem.forward), split, objective
