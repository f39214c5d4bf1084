"""MTCNN with the weights that facenet-pytorch carries: the face detector of experiments/tasks.py."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from experiments import shared


class FaceDetector(nn.Module):
    """MTCNN: a network proposes windows at several scales, a second refines them, and a third decides.

    Zhang et al., "Joint face detection and alignment using multitask cascaded convolutional networks", 2016. The three
    networks and the arithmetic of boxes are facenet-pytorch's. Its own cascade fails where no window is left, which a network
    with few bits may come to.
    """

    SMALLEST = 20  # pixels, of a face
    STEP = 0.709  # from one scale to the next
    THRESHOLDS = (0.6, 0.7, 0.7)  # of the three networks' scores
    MOST_WINDOWS = 60  # of an image, that the second network is given

    def __init__(self) -> None:
        super().__init__()
        mtcnn = _facenet("mtcnn")
        self.propose: nn.Module = mtcnn.PNet(pretrained=False)
        self.refine: nn.Module = mtcnn.RNet(pretrained=False)
        self.decide: nn.Module = mtcnn.ONet(pretrained=False)
        for part, name in ((self.propose, "pnet"), (self.refine, "rnet"), (self.decide, "onet")):
            file = shared.package_file("facenet_pytorch", f"data/{name}.pt")
            part.load_state_dict(torch.load(file, weights_only=True))

    def forward(self, images: Tensor) -> list[dict[str, Tensor]]:
        """Find faces.

        Args:
            images: Shape (N, 3, H, W), values -1 to 1.

        Returns:
            For every image `boxes` (faces, 4), in pixels, as left, top, right and bottom, `scores` (faces,) and `labels`
            (faces,), which are 0.
        """
        helpers = _facenet("utils.detect_face")
        windows, owners = self._proposals(images)
        crops, windows, owners = _crops(images, windows, owners, 24)
        shifts, scores = _answers(self.refine, crops)
        kept = scores[:, 1] > self.THRESHOLDS[1]
        boxes, scores, shifts, owners = windows[kept], scores[kept, 1], shifts[kept], owners[kept]
        kept = helpers.batched_nms_numpy(boxes, scores, owners, 0.7, "Union")
        windows, owners = helpers.rerec(helpers.bbreg(boxes[kept], shifts[kept])), owners[kept]
        crops, windows, owners = _crops(images, windows, owners, 48)
        shifts, scores = _answers(self.decide, crops)
        kept = scores[:, 1] > self.THRESHOLDS[2]
        boxes, scores, shifts, owners = windows[kept], scores[kept, 1], shifts[kept], owners[kept]
        boxes = helpers.bbreg(boxes, shifts)
        kept = helpers.batched_nms_numpy(boxes, scores, owners, 0.7, "Min")
        boxes, scores, owners = boxes[kept], scores[kept], owners[kept]
        found = []
        for number in range(len(images)):
            mine = owners == number
            found.append({"boxes": boxes[mine], "scores": scores[mine], "labels": torch.zeros_like(owners[mine])})
        return found

    def _proposals(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return squares that may hold a face, (windows, 4), and the number of the image that each is in, (windows,)."""
        helpers = _facenet("utils.detect_face")
        found = []
        scale = 12 / self.SMALLEST
        while min(images.shape[2:]) * scale >= 12:
            height, width = (int(side * scale + 1) for side in images.shape[2:])
            shifts, scores = self.propose(helpers.imresample(images, (height, width)))
            boxes, owners = helpers.generateBoundingBox(shifts, scores[:, 1], scale, self.THRESHOLDS[0])
            kept = helpers.batched_nms_numpy(boxes[:, :4], boxes[:, 4], owners, 0.5, "Union")
            found.append((boxes[kept], owners[kept]))
            scale *= self.STEP
        boxes, owners = torch.cat([part for part, _ in found]), torch.cat([part for _, part in found])
        kept = helpers.batched_nms_numpy(boxes[:, :4], boxes[:, 4], owners, 0.7, "Union")
        # From the highest score down, as they come: bits that are too few make windows everywhere.
        best = [kept[owners[kept] == number][: self.MOST_WINDOWS] for number in range(len(images))]
        kept = torch.cat(best)
        boxes, owners = boxes[kept], owners[kept]
        sizes = boxes[:, 2:4] - boxes[:, :2]
        corners = torch.cat([boxes[:, :2] + boxes[:, 5:7] * sizes, boxes[:, 2:4] + boxes[:, 7:9] * sizes], 1)
        return helpers.rerec(corners), owners


def _answers(network: nn.Module, crops: Tensor) -> tuple[Tensor, Tensor]:
    """Return how windows should move, (windows, 4), and the scores of no face and of a face, (windows, 2)."""
    if not len(crops):
        return crops.new_zeros(0, 4), crops.new_zeros(0, 2)
    answers = network(crops)
    return answers[0], answers[-1]


def _crops(images: Tensor, windows: Tensor, owners: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cut windows out of images, scaled to (windows, 3, size, size); those outside of their image are left out."""
    helpers = _facenet("utils.detect_face")
    height, width = images.shape[2:]
    finite = windows.isfinite().all(1)
    windows, owners = windows[finite], owners[finite]
    top, bottom, left, right = helpers.pad(windows.clone(), width, height)
    made, kept = [], []
    for number, owner in enumerate(owners.tolist()):
        cut = images[owner : owner + 1, :, top[number] - 1 : bottom[number], left[number] - 1 : right[number]]
        if cut.numel():
            made.append(helpers.imresample(cut, (size, size)))
            kept.append(number)
    made.append(images.new_zeros(0, 3, size, size))
    return torch.cat(made), windows[kept], owners[kept]


def _facenet(module: str) -> Any:
    """Import a module of facenet-pytorch's."""
    return shared.imported(f"facenet_pytorch.models.{module}")


def face_detector() -> nn.Module:
    """Load MTCNN with facenet-pytorch's weights: images (N, 3, H, W), values -1 to 1, to a list of dictionaries."""
    return FaceDetector().eval()
