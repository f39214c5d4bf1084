"""Objectives of other tasks than image classification, with the metrics of torchmetrics.

Each takes what isn't known of it (how many classes there are) from outputs and targets, where that is safe. Where it isn't, a
sentence says what to give instead of the name, such as `haq.problem.metrics.Psnr(data_range=255)`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from haq.networks.zoo import import_declared
from haq.problem.distribution import Bernoulli, Categorical, Distribution, Gaussian, main_output
from haq.problem.objective import MetricObjective, Objective, ValueObjective, described
from hw_models.extras import install_line
from quantizers.calling import leaves

if TYPE_CHECKING:
    from torchmetrics import Metric

LOST = 1e-12  # of a sum of squares: what is lost to rounding
IGNORED = -100  # a target that doesn't count, as torch's losses have it
BEST = 5  # answers among which a label must be
# What outputs by name call an embedding, the first that there is.
EMBEDDINGS = ("sentence_embedding", "embeddings", "text_embeds", "image_embeds", "pooler_output", "last_hidden_state")


def import_torchmetrics(module: str = "torchmetrics") -> Any:
    """Import a module of torchmetrics, on torch builds without torchvision's compiled operators as well.

    Raises ImportError, with what to install, if it isn't there.
    """
    try:
        import_declared("torchmetrics")
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed: pip install torchmetrics") from error


class Top5(Objective):
    """The share of images whose label is among the five best answers; the loss is the cross-entropy."""

    name = "top5"
    words = "the share of images whose label is among the five best answers"
    title = "top-5 accuracy"
    short = "top 5"

    def correct(self, outputs: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Say whose label is among the five best answers; see `Objective.correct`."""
        self._check_classes(outputs[0], labels)
        classes = outputs[0].shape[1]
        if classes <= BEST:
            raise ValueError(
                f"objective {self.name!r} needs a network with {BEST + 1} outputs or more, not {classes}, of which the label "
                "is always among the five best"
            )
        return torch.stack([(part.topk(BEST, 1).indices == labels[:, None]).any(1) for part in outputs]).all(0)


class _OfNumbers(ValueObjective):
    """Of numbers, which should be those of the targets."""

    def read(self, outputs: Any) -> Any:
        """Return the tensor that stands for the answer."""
        return main_output(outputs)


class Mse(_OfNumbers):
    """The squared difference from the targets, the mean over all numbers of a sample."""

    name = "mse"
    words = "mean squared error"
    title = "mean squared error"
    short = "MSE"
    higher_is_better = False

    def values(self, outputs: Any, targets: Any) -> Tensor:
        """Tell every sample's mean squared error."""
        return squared_errors(self, outputs, targets)


class Mae(_OfNumbers):
    """The absolute difference from the targets, the mean over all numbers of a sample."""

    name = "mae"
    words = "mean absolute error"
    title = "mean absolute error"
    short = "MAE"
    higher_is_better = False

    def values(self, outputs: Any, targets: Any) -> Tensor:
        """Tell every sample's mean absolute error."""
        given, wanted = numbers_of(self, outputs, targets)
        return (given - wanted).abs().reshape(len(given), -1).mean(1)


class R2(MetricObjective):
    """The share of the targets' variance that is explained, the mean over the numbers of an answer.

    It is torchmetrics' `R2Score`; the loss is the squared error.
    """

    name = "r2"
    words = "the coefficient of determination R²"
    title = "R²"
    short = "R²"

    def read(self, outputs: Any) -> Any:
        """Return the tensor that stands for the answer."""
        return main_output(outputs)

    def metric(self) -> Metric:
        """Make the metric."""
        return import_torchmetrics("torchmetrics.regression").R2Score()

    def update(self, metric: Metric, outputs: Any, targets: Any) -> None:
        """Give a batch to the metric, with answers in rows."""
        given, wanted = numbers_of(self, outputs, targets)
        given, wanted = given.reshape(len(given), -1), wanted.reshape(len(wanted), -1)
        if given.shape[1] == 1:
            given, wanted = given[:, 0], wanted[:, 0]
        if given.device.type != "mps":
            # Sums of squares of numbers far from 0 lose the variance in float32.
            given, wanted = given.double(), wanted.double()
        super().update(metric, given, wanted)

    def compute(self, metric: Metric) -> Any:
        """Tell the share. Raises ValueError if the targets have no variance of which there could be one."""
        state: Any = metric
        summed, squared, count = state.sum_error, state.sum_squared_error, state.total
        if int(count) > 1 and bool((squared - summed * summed / count <= LOST * squared).all()):
            raise ValueError(
                f"objective {self.name!r} takes targets that differ from sample to sample, and all {int(count)} are the same"
            )
        return super().compute(metric)

    def losses(self, outputs: Any, targets: Any) -> Tensor | None:
        """Tell every sample's mean squared error."""
        return squared_errors(self, outputs, targets)


class _OfPictures:
    """What is of pictures whose range must be known."""

    name: str

    def __init__(self, data_range: float | None = None) -> None:
        """Take the range.

        Args:
            data_range: From the smallest to the largest value that a picture may have. None: 1, of pictures from 0 to 1.

        Raises:
            ValueError: Unless it is above 0.
        """
        if data_range is not None and not data_range > 0:
            raise ValueError(f"data_range is {data_range!r}; it must be above 0, such as 255")
        self.data_range = data_range

    def range_of(self, targets: Tensor) -> float:
        """Return the range. Raises ValueError if it wasn't given, and can't be 1."""
        if self.data_range is not None:
            return float(self.data_range)
        low, high = float(targets.min()), float(targets.max())
        if low < 0 or high > 1:
            raise ValueError(
                f"objective {self.name!r} takes targets from 0 to 1, and there are some from {low:.4g} to {high:.4g}: give "
                f"their range, haq.problem.metrics.{type(self).__name__}(data_range=...)"
            )
        return 1.0

    def pictures(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return pictures and what they should be. Raises ValueError unless they are of one shape and of known range."""
        given, wanted = numbers_of(self, outputs, targets)
        self.range_of(wanted)
        return given, wanted


class Psnr(_OfPictures, MetricObjective):
    """The ratio of the largest squared value to the squared error of all pixels, in dB.

    It is torchmetrics' `PeakSignalNoiseRatio` with its mean over all pixels of all pictures; the loss is the squared error.
    """

    name = "psnr"
    words = "the peak signal-to-noise ratio"
    title = "PSNR"
    short = "PSNR"
    unit = "dB"

    def read(self, outputs: Any) -> Any:
        """Return the tensor that stands for the answer."""
        return main_output(outputs)

    def metric_for(self, outputs: Any, targets: Any) -> Metric:
        """Make the metric for pictures of the range of these."""
        _, wanted = self.pictures(outputs, targets)
        return import_torchmetrics("torchmetrics.image").PeakSignalNoiseRatio(data_range=self.range_of(wanted))

    def update(self, metric: Metric, outputs: Any, targets: Any) -> None:
        """Give a batch to the metric."""
        super().update(metric, *self.pictures(outputs, targets))

    def losses(self, outputs: Any, targets: Any) -> Tensor | None:
        """Tell every picture's mean squared error."""
        return squared_errors(self, outputs, targets)


class Ssim(_OfPictures, _OfNumbers):
    """The structural similarity of pictures to the targets, torchmetrics' with its defaults; the loss is the squared error."""

    name = "ssim"
    words = "the structural similarity"
    title = "SSIM"
    short = "SSIM"
    least = 11  # pixels: the width of the window

    def values(self, outputs: Any, targets: Any) -> Tensor:
        """Tell every picture's similarity."""
        given, wanted = self.pictures(outputs, targets)
        if given.dim() != 4 or min(given.shape[2:]) < self.least:
            raise ValueError(
                f"objective {self.name!r} takes pictures (N, C, H, W) of {self.least} pixels or more in height and width, not "
                f"{tuple(given.shape)}"
            )
        similarity = import_torchmetrics("torchmetrics.functional.image").structural_similarity_index_measure
        found = similarity(given, wanted, reduction="none", data_range=self.range_of(wanted))
        return found.reshape(len(given))

    def losses(self, outputs: Any, targets: Any) -> Tensor | None:
        """Tell every picture's mean squared error."""
        return squared_errors(self, outputs, targets)


class MeanIoU(MetricObjective):
    """The mean over classes of intersection over union, of pixels.

    Classes are counted over all samples, those that neither occur nor are answered are left out: torchmetrics'
    `MulticlassJaccardIndex`. The loss is the cross-entropy, the mean over a sample's pixels.
    """

    name = "miou"
    words = "the mean intersection over union of the classes"
    title = "mIoU"
    short = "mIoU"
    unit = "%"

    def __init__(self, ignore_index: int = IGNORED) -> None:
        """Take what doesn't count.

        Args:
            ignore_index: The target of pixels that don't count.
        """
        self.ignore_index = ignore_index

    @property
    def distribution(self) -> Distribution | None:
        """Return what outputs say of answers: scores of classes for every pixel."""
        return Categorical()

    def read(self, outputs: Any) -> Any:
        """Return the scores."""
        return main_output(outputs)

    def metric_for(self, outputs: Any, targets: Any) -> Metric:
        """Make the metric for as many classes as there are scores."""
        scores, _ = self.maps(outputs, targets)
        metrics = import_torchmetrics("torchmetrics.classification")
        return metrics.MulticlassJaccardIndex(scores.shape[1], ignore_index=self.ignore_index)

    def update(self, metric: Metric, outputs: Any, targets: Any) -> None:
        """Give a batch to the metric."""
        scores, classes = self.maps(outputs, targets)
        super().update(metric, scores.argmax(1), classes)

    def losses(self, outputs: Any, targets: Any) -> Tensor | None:
        """Tell the mean cross-entropy of every sample's pixels (nats)."""
        return mean_cross_entropy(*self.maps(outputs, targets), self.ignore_index)

    def maps(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return scores (N, classes, ...) and class numbers (N, ...). Raises ValueError unless they fit each other."""
        scores = floats_of(self, outputs)
        if scores.dim() < 3 or scores.shape[1] < 2:
            raise ValueError(
                f"objective {self.name!r} takes scores of two classes or more for every pixel, (N, classes, H, W), not "
                f"outputs of shape {tuple(scores.shape)}"
            )
        classes = integers_of(self, targets)
        if classes.dim() == scores.dim() and classes.shape[1] == 1:
            classes = classes[:, 0]
        if classes.shape != scores.shape[:1] + scores.shape[2:]:
            raise ValueError(
                f"objective {self.name!r} takes a class number for every pixel: targets of shape {tuple(classes.shape)} don't "
                f"fit outputs of shape {tuple(scores.shape)}"
            )
        check_range(self, classes, scores.shape[1], self.ignore_index, tuple(scores.shape))
        return scores, classes


class MeanAP(MetricObjective):
    """The mean average precision of detected boxes, as COCO has it: torchmetrics' `MeanAveragePrecision`.

    Outputs are a list of dicts with `boxes` (n, 4), `scores` (n,) and `labels` (n,), one for each image, and targets likewise,
    without scores. There is no loss.
    """

    name = "map"
    words = "the mean average precision of COCO"
    title = "mAP"
    short = "mAP"
    unit = "%"

    def __init__(self, **options: Any) -> None:
        """Take options.

        Args:
            **options: Of torchmetrics' `MeanAveragePrecision`, such as iou_thresholds=[0.5].
        """
        self.options = options

    @property
    def distribution(self) -> Distribution | None:
        """Return nothing: two lists of boxes can't be held against each other."""
        return None

    def metric(self) -> Metric:
        """Make the metric. Raises ImportError, with what to install, if pycocotools or torchvision isn't there."""
        metrics = import_torchmetrics("torchmetrics.detection")
        try:
            made = metrics.MeanAveragePrecision(**self.options)
        except ModuleNotFoundError as error:
            raise ImportError(
                f"objective {self.name!r} needs pycocotools and torchvision: {install_line('detection')}"
            ) from error
        made.warn_on_many_detections = False
        return made

    def update(self, metric: Metric, outputs: Any, targets: Any) -> None:
        """Give a batch to the metric."""
        what = "boxes"
        if "segm" in str(self.options.get("iou_type", "bbox")):
            what = "masks"
        answers = self._dicts(outputs, "outputs", (what, "scores", "labels"))
        wanted = self._dicts(targets, "targets", (what, "labels"))
        if len(answers) != len(wanted):
            raise ValueError(
                f"objective {self.name!r} takes a dict for each image: there are {len(answers)} outputs and {len(wanted)} "
                "targets"
            )
        super().update(metric, answers, wanted)

    def compute(self, metric: Metric) -> Any:
        """Tell the precision. Raises ValueError if there are no boxes in any target."""
        value = super().compute(metric)["map"]
        if value < 0:
            raise ValueError(f"objective {self.name!r} finds no boxes in the targets")
        return value

    def _dicts(self, given: Any, called: str, keys: tuple[str, ...]) -> list[Any]:
        """Return a list of dicts. Raises ValueError for anything else, and for a missing key."""
        known = f"a list of dicts, one for each image, of {', '.join(keys)}"
        if not isinstance(given, list | tuple) or not all(isinstance(one, Mapping) for one in given):
            raise ValueError(f"objective {self.name!r} takes {called} that are {known}, not {described(given)}")
        for one in given:
            for key in keys:
                if not isinstance(one.get(key), Tensor):
                    raise ValueError(
                        f"objective {self.name!r} takes {called} that are {known}: a dict of {', '.join(map(str, one))} has "
                        f"no tensor {key!r}"
                    )
        return list(given)


class F1(MetricObjective):
    """The F1 score of labels, each of which may be right; the mean over labels: torchmetrics' `MultilabelF1Score`.

    Outputs are scores before the sigmoid, above 0 for a label that is answered; targets of the same shape are 0 and 1. The
    loss is the binary cross-entropy, the mean over a sample's labels.
    """

    name = "f1"
    words = "the F1 score, the mean over labels"
    title = "F1"
    short = "F1"
    unit = "%"

    def __init__(self, probabilities: bool = False) -> None:
        """Take what outputs are.

        Args:
            probabilities: Whether the network itself ends in a sigmoid.
        """
        self.probabilities = probabilities

    @property
    def distribution(self) -> Distribution | None:
        """Return what outputs say of answers: scores of labels."""
        if self.probabilities:
            return Gaussian()
        return Bernoulli()

    def read(self, outputs: Any) -> Any:
        """Return the scores."""
        return main_output(outputs)

    def look_at(self, outputs: Any, targets: Any) -> None:
        """Raise ValueError for outputs that are no scores before a sigmoid."""
        scores, _ = self.scores(outputs, targets)
        if not self.probabilities and scores.numel() > 16 and scores.min() >= 0 and scores.max() <= 1:
            raise ValueError(
                f"objective {self.name!r} takes scores before the sigmoid, and the float network's outputs are all from 0 to "
                "1: give haq.problem.metrics.F1(probabilities=True) if it ends in one"
            )

    def metric_for(self, outputs: Any, targets: Any) -> Metric:
        """Make the metric for as many labels as there are scores."""
        scores, _ = self.scores(outputs, targets)
        metrics = import_torchmetrics("torchmetrics.classification")
        if scores.dim() < 2 or scores.shape[1] == 1:
            return metrics.BinaryF1Score()
        return metrics.MultilabelF1Score(scores.shape[1])

    def update(self, metric: Metric, outputs: Any, targets: Any) -> None:
        """Give a batch to the metric: 1 for every label that is answered."""
        scores, labels = self.scores(outputs, targets)
        super().update(metric, (scores > self._threshold).long(), labels.long())

    def compute(self, metric: Metric) -> Any:
        """Tell the score. Raises ValueError if no target is 1, so that there is nothing to be found."""
        state: Any = metric
        if not bool((state.tp + state.fn).any()):
            raise ValueError(f"objective {self.name!r} takes targets some of which are 1, and all are 0")
        return super().compute(metric)

    def losses(self, outputs: Any, targets: Any) -> Tensor | None:
        """Tell the mean binary cross-entropy of every sample's labels (nats)."""
        scores, labels = self.scores(outputs, targets)
        if self.probabilities:
            found = F.binary_cross_entropy(scores, labels, reduction="none")
        else:
            found = F.binary_cross_entropy_with_logits(scores, labels, reduction="none")
        return found.reshape(len(found), -1).mean(1)

    @property
    def _threshold(self) -> float:
        if self.probabilities:
            return 0.5
        return 0.0

    def scores(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return scores and labels of one shape. Raises ValueError unless labels are 0 and 1."""
        scores = floats_of(self, outputs)
        if isinstance(targets, Tensor) and targets.dim() == 1 and scores.dim() == 2 and scores.shape[1] > 1:
            raise ValueError(
                f"objective {self.name!r} is of labels of which several may be right, targets of shape {tuple(scores.shape)}, "
                f"not {tuple(targets.shape)}: for class numbers give a metric, such as torchmetrics.F1Score('multiclass', "
                f"num_classes={scores.shape[1]})"
            )
        scores, labels = numbers_of(self, scores, targets)
        wrong = labels[(labels != 0) & (labels != 1)]
        if len(wrong):
            raise ValueError(f"objective {self.name!r} takes targets of 0 and 1, not {float(wrong[0]):.4g}")
        return scores, labels


class Perplexity(MetricObjective):
    """The exponential of the mean cross-entropy of tokens, torchmetrics' `Perplexity`; smaller is better.

    Outputs are scores (N, T, V) of all tokens at every place. Where the targets are the input's own tokens, as they are for
    the causal models of Hugging Face, every place is held against the token behind it. The loss is the cross-entropy in nats
    per token, the mean over a sample's tokens.
    """

    name = "perplexity"
    words = "the perplexity of tokens"
    title = "perplexity"
    short = "perplexity"
    higher_is_better = False

    def __init__(self, ignore_index: int = IGNORED) -> None:
        """Take what doesn't count.

        Args:
            ignore_index: The target of places that don't count.
        """
        self.ignore_index = ignore_index

    @property
    def distribution(self) -> Distribution | None:
        """Return what outputs say of answers: scores of tokens for every place."""
        return Categorical(-1)

    def read(self, outputs: Any) -> Any:
        """Return the scores."""
        return main_output(outputs)

    def aligned(self, inputs: Any, targets: Any) -> Any:
        """Return the token behind every place, if targets are the input's own tokens; otherwise the targets themselves."""
        if not isinstance(targets, Tensor) or targets.dim() != 2:
            return targets
        for ids in leaves(inputs):
            if ids.shape != targets.shape or ids.is_floating_point():
                continue
            counts = targets != self.ignore_index
            if bool((ids == targets.to(ids.device))[counts.to(ids.device)].all()) and bool(counts.any()):
                last = torch.full_like(targets[:, :1], self.ignore_index)
                return torch.cat([targets[:, 1:], last], 1)
        return targets

    def metric(self) -> Metric:
        """Make the metric."""
        return import_torchmetrics("torchmetrics.text").Perplexity(ignore_index=self.ignore_index)

    def update(self, metric: Metric, outputs: Any, targets: Any) -> None:
        """Give a batch to the metric."""
        super().update(metric, *self.tokens(outputs, targets))

    def losses(self, outputs: Any, targets: Any) -> Tensor | None:
        """Tell the mean cross-entropy of every sample's tokens (nats)."""
        scores, tokens = self.tokens(outputs, targets)
        return mean_cross_entropy(scores.transpose(1, 2), tokens, self.ignore_index)

    def tokens(self, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
        """Return scores (N, T, V) and tokens (N, T). Raises ValueError unless they fit each other."""
        scores = floats_of(self, outputs)
        if scores.dim() != 3:
            raise ValueError(
                f"objective {self.name!r} takes scores of tokens of shape (N, T, V), not outputs of shape "
                f"{tuple(scores.shape)}"
            )
        tokens = integers_of(self, targets)
        if tokens.shape != scores.shape[:2]:
            raise ValueError(
                f"objective {self.name!r} takes a token for every place: targets of shape {tuple(tokens.shape)} don't fit "
                f"outputs of shape {tuple(scores.shape)}"
            )
        check_range(self, tokens, scores.shape[2], self.ignore_index, tuple(scores.shape))
        return scores, tokens


class Cosine(ValueObjective):
    """The cosine between embeddings and those of the float network, without targets.

    It is torchmetrics' `CosineSimilarity`, the mean over samples. Of answers that are no rows it is that of all numbers of a
    sample. The loss is 1 minus it.
    """

    name = "cosine"
    words = "the cosine similarity to the float network's embeddings, without targets"
    title = "cosine similarity"
    short = "cosine"
    needs_labels = False
    compares_with_float = True

    def read(self, outputs: Any) -> Any:
        """Return the embeddings: of outputs by name those that are called so."""
        if hasattr(outputs, "keys"):
            for name in EMBEDDINGS:
                if name in outputs.keys() and isinstance(outputs[name], Tensor):  # noqa: SIM118
                    return outputs[name]
        return main_output(outputs)

    def values(self, outputs: Any, targets: Any) -> Tensor:
        """Tell the cosine of every sample."""
        given, wanted = numbers_of(self, self.read(outputs), self.read(targets))
        found = F.cosine_similarity(given.reshape(len(given), -1), wanted.reshape(len(wanted), -1), dim=1)
        return found.clamp(-1, 1)

    def losses(self, outputs: Any, targets: Any) -> Tensor | None:
        """Tell 1 minus the cosine of every sample."""
        return 1 - self.values(outputs, targets)


def floats_of(objective: Any, outputs: Any) -> Tensor:
    """Return outputs, as float32 where they are of fewer bits. Raises ValueError unless they are a tensor of floats."""
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
        raise ValueError(f"objective {objective.name!r} takes outputs that are a tensor of floats, not {described(outputs)}")
    if outputs.dtype == torch.float64:
        return outputs
    return outputs.float()


def integers_of(objective: Any, targets: Any) -> Tensor:
    """Return targets as int64. Raises ValueError unless they are a tensor of integers."""
    if not isinstance(targets, Tensor) or targets.is_floating_point() or targets.is_complex():
        raise ValueError(f"objective {objective.name!r} takes targets that are a tensor of integers, not {described(targets)}")
    return targets.long()


def numbers_of(objective: Any, outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """Return outputs and targets as floats of one shape.

    Args:
        objective: Who asks, for messages.
        outputs: Shape (N, ...).
        targets: The same shape; dimensions of size 1 behind the first may be missing in either.

    Returns:
        Both, of the shape of `outputs`.

    Raises:
        ValueError: Naming both shapes, for anything else.
    """
    given = floats_of(objective, outputs)
    if not isinstance(targets, Tensor) or targets.is_complex():
        raise ValueError(f"objective {objective.name!r} takes targets that are a tensor of numbers, not {described(targets)}")
    if _proper(given) != _proper(targets):
        raise ValueError(
            f"objective {objective.name!r} takes targets of the shape of outputs: {tuple(targets.shape)} doesn't fit "
            f"{tuple(given.shape)}"
        )
    return given, targets.to(given.dtype).reshape(given.shape)


def _proper(tensor: Tensor) -> list[int]:
    """List the sizes of a tensor: the first, and the others but 1."""
    return [*tensor.shape[:1], *(size for size in tensor.shape[1:] if size != 1)]


def squared_errors(objective: Any, outputs: Any, targets: Any) -> Tensor:
    """Tell the mean squared error of every sample.

    Args:
        objective: As `numbers_of` takes it.
        outputs: Likewise.
        targets: Likewise.

    Returns:
        Shape (samples,).
    """
    given, wanted = numbers_of(objective, outputs, targets)
    return (given - wanted).square().reshape(len(given), -1).mean(1)


def mean_cross_entropy(scores: Tensor, classes: Tensor, ignored: int) -> Tensor:
    """Tell the mean cross-entropy over the answers of every sample.

    Args:
        scores: Shape (N, classes, ...).
        classes: Class numbers, shape (N, ...).
        ignored: The class number of what doesn't count.

    Returns:
        Nats, shape (N,); 0 where nothing counts.
    """
    found = F.cross_entropy(scores, classes, ignore_index=ignored, reduction="none").reshape(len(scores), -1)
    counts = (classes != ignored).reshape(len(scores), -1).sum(1)
    return found.sum(1) / counts.clamp(min=1)


def check_range(objective: Any, classes: Tensor, count: int, ignored: int, shape: tuple[int, ...]) -> None:
    """Raise ValueError for targets that no output stands for.

    Args:
        objective: Who asks, for messages.
        classes: Class numbers.
        count: How many classes there are.
        ignored: The class number of what doesn't count.
        shape: Of the outputs.
    """
    outside = classes[((classes < 0) | (classes >= count)) & (classes != ignored)]
    if len(outside):
        first = int(outside[0])
        raise ValueError(
            f"objective {objective.name!r}: targets such as {first} don't fit outputs of shape {shape}: they must be from 0 "
            f"to {count - 1}, or {ignored} where nothing counts; if {first} means that, give haq.problem.metrics."
            f"{type(objective).__name__}(ignore_index={first}), to a command as module:NAME of a file of yours that holds it"
        )
