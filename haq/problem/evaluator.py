"""Accuracy of a policy on held-out images, fast.

It takes at most one forward pass for a policy never seen before, none for one that was.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import quantizers as Q
from haq.data.labels import class_numbers
from haq.problem.objective import (
    Accuracy,
    Agreement,
    NotFinite,
    Objective,
    attacked_inputs,
    class_scores,
    count_correct,
    mean_loss,
)
from haq.problem.prefix_cache import Prefix
from haq.problem.snapshot import Snapshot, same_bits

BATCH = 125  # images; small enough for a layer's activations to stay in the processor's cache
KEPT_BYTES = 1 << 30  # of activations, all batches together
RISK = 1e-3  # that an evaluation is stopped although the policy isn't below the accuracy to beat
SHUFFLE_SEED = 0

# Of a batch's number: class scores (images, classes), and, where they are attacked, those of the attacked images.
Forward = Callable[[int], tuple[Tensor, ...]]


class Pool(Protocol):
    """Workers that evaluate policies for an evaluator, each on its own copy of it (`haq.study.workers`)."""

    def expect(self, policies: Iterable[Q.BitPolicy]) -> None:
        """Begin with policies that will be asked for."""

    def evaluate(self, policy: Q.BitPolicy) -> Evaluation:
        """Wait for a policy's evaluation."""


class Evaluation(NamedTuple):
    """What a policy was measured to give.

    A network whose outputs aren't all finite is worth nothing: its accuracy is 0, and its loss and divergence are infinite.

    Attributes:
        accuracy: Share of images that the objective counts as correct, 0 to 1.
        loss: The objective's mean loss (nats).
        images: The number of images that both stand on.
        divergence: Where there is a teacher, the mean Kullback-Leibler divergence (nats) of its outputs from the network's, on
            the images as they are.
    """

    accuracy: float
    loss: float
    images: int
    divergence: float | None = None


class Evaluator:
    """Evaluates policies of one quantized network on one set of images, which it keeps in memory, where the network is.

    Weights are quantized once per (layer, bits) and scales calibrated once; the results are cached by policy. A policy that
    begins with the bits of the one before starts from what was computed then (`prefix_cache`), with the same result. Only
    where images are attacked is the whole network run, several times, forwards and backwards.

    If the network or the images are changed, by whatever means, all that was kept is forgotten (`snapshot`). The network is
    always judged in evaluation mode, and may change what it is given in place: it is given copies.
    """

    def __init__(
        self,
        network: nn.Module,
        inputs: Tensor,
        labels: Tensor | None = None,
        *,
        teacher: nn.Module | None = None,
        tune: Callable[[nn.Module], nn.Module] | None = None,
        objective: Objective | None = None,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        """Take a network and the images that its policies are judged on.

        Args:
            network: From `quantizers.quantize`.
            inputs: Shape (images, ...), preprocessed.
            labels: Class numbers of any integer type and of shape (images,). Without them the teacher's answers are taken.
            teacher: A network; every evaluation then tells the Kullback-Leibler divergence KL(teacher || network).
            tune: Makes of a copy of the network, at a policy's bits, the one that is judged.
            objective: What is correct, and how large the loss is; None is accuracy with labels, agreement without.
            kept_bytes: Limit of the activations kept between evaluations, all batches together.

        Raises:
            ValueError: If there are no images, or not as many labels, or neither labels nor a teacher; and for labels that
                are no class numbers.
        """
        count = len(inputs)
        if labels is not None:
            labels = class_numbers(labels, "`labels`")
            count = len(labels)
        if len(inputs) != count or not count:
            raise ValueError(f"evaluation needs as many images as labels, at least one; got {len(inputs)} and {count}")
        if labels is None and teacher is None:
            raise ValueError("give labels or a teacher, or both")
        if objective is None:
            objective = Agreement()
            if labels is not None:
                objective = Accuracy()
        if labels is None and objective.attacked:
            raise ValueError("an attack makes answers wrong, so it needs labels")
        self.network = network.eval()
        self.tune = tune
        self.objective = objective
        self.kept_bytes = kept_bytes
        self.teacher = teacher
        if objective.attacked:
            # Gradients go to the inputs alone, so that quantized weights are made once per width as they are without.
            network.requires_grad_(False)
        self.count = count
        self.device = device_of(network)
        # Whatever part of them is looked at first is a fair sample.
        self.order = torch.from_numpy(np.random.RandomState(SHUFFLE_SEED).permutation(count))
        with torch.inference_mode(False), torch.no_grad():  # changes of inference tensors can't be noticed
            self._inputs = [_rows(inputs, index).to(self.device) for index in self.order.split(BATCH)]
        self.expected: Tensor | None = None  # the teacher's outputs, in the order of `inputs`
        if labels is not None:
            self.labels = labels.cpu()
        self._labelled = labels is not None
        self._ask_teacher()
        self.cache: dict[Q.BitPolicy, Evaluation] = {}
        self.pool: Pool | None = None
        self._snapshot: Snapshot | None = Snapshot(network, self._stored())

    def _ask_teacher(self) -> None:
        """Set what the teacher's outputs decide."""
        if self.teacher is None:
            if self.expected is not None:
                raise ValueError("the evaluator's images were changed, and this copy of it has no teacher to ask anew")
            return
        with evaluation_mode(self.teacher):
            outputs = torch.cat([part for (part,) in self._each(_whole(self.teacher, self._inputs))])
        self.expected = outputs[self.order.argsort()]
        if not self._labelled:
            self.labels = self.expected.argmax(1).cpu()

    def _stored(self) -> list[Tensor]:
        """List the tensors that results depend on, beside those of the network."""
        stored = [*self._inputs, self.labels]
        if self.expected is not None:
            stored.append(self.expected)
        return stored

    def _forget_what_changed(self) -> None:
        """Forget all that was kept, if the network or the images are no longer what it was computed with."""
        if self._snapshot is not None:
            self._snapshot.restore_modes(self.network)
            if self._snapshot.fits(self.network, self._stored()):
                return
            before = self._snapshot.copies[-len(self._stored()) :]
            if not all(map(same_bits, self._inputs, before)):
                self._ask_teacher()
            self.cache.clear()
            self.__dict__.pop("prefix", None)
            for layer in Q.quant_layers(self.network).values():
                layer.cache.clear()
            # Its workers have copies of what was.
            self.pool = None
        self._snapshot = Snapshot(self.network, self._stored())

    def __getstate__(self) -> dict[str, Any]:
        """Give all that it takes to evaluate policies elsewhere, with the same results: not what is only remembered."""
        state = self.__dict__ | {"cache": {}, "pool": None, "teacher": None, "_snapshot": None}
        state.pop("prefix", None)
        return state

    @functools.cached_property
    def prefix(self) -> Prefix | None:
        """Cut the network, so that a policy can start where it parts from the one before; None if that can't be done."""
        try:
            with torch.inference_mode(False), torch.no_grad():
                return Prefix(self.network, self._inputs, self.kept_bytes)
        except ValueError:
            return None  # then it is run as a whole, with the same result

    @property
    def one_batch(self) -> bool:
        """Say whether a single batch is evaluated by all threads, so that sums of floats depend on their number."""
        # Unless it is attacked: the sign of a gradient near 0 must not hang on it.
        return len(self._inputs) == 1 and not self.objective.attacked

    @property
    def worker_threads(self) -> int:
        """Tell how many threads a worker that evaluates elsewhere takes.

        One, unless sums of floats depend on their number. Then they are as many as here, so that results are those of this
        process.
        """
        if self.one_batch or self.tune is not None:
            return torch.get_num_threads()
        return 1

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """List inputs and labels, in the order in which they are looked at."""
        return list(zip(self._inputs, self.labels[self.order].split(BATCH), strict=True))

    def evaluate(self, policy: Q.BitPolicy, beat: float | None = None) -> Evaluation:
        """Tell accuracy and loss of a policy.

        Given an accuracy to beat, evaluation ends after a part of the images, taken in random order without replacement, if
        that part tells that the accuracy on all of them is below `beat`. A policy that isn't below it is stopped with a
        probability of at most `RISK`, all looks together: after each batch the number of right answers is held against its
        hypergeometric distribution for a policy that just reaches `beat`, at the level RISK / looks (union bound). The
        probability is that of the order of images, which is drawn once for all policies.
        """
        self._forget_what_changed()
        known = self.cache.get(policy)
        if self.pool is not None and beat is None and (known is None or known.images < self.count):
            self.cache[policy] = known = self.pool.evaluate(policy)
        if known is None or (known.images < self.count and not self._is_below(known, beat)):
            network = self.prepared(policy)
            forward = self._forward(network)
            if network is self.network and not self.objective.attacked:
                forward = self._resuming()
            self.cache[policy] = known = self._measure(forward, beat)
            assert self._snapshot is not None
            self._snapshot.take_attributes()
        return known

    def expect(self, policies: Iterable[Q.BitPolicy]) -> None:
        """Tell the pool, if there is one, what it will be asked for."""
        if self.pool is not None:
            self.pool.expect(policy for policy in policies if policy not in self.cache)

    def prepared(self, policy: Q.BitPolicy) -> nn.Module:
        """Give the network that a policy is judged by: at its bits, and tuned if there is a `tune`."""
        Q.set_policy(self.network, policy)
        if self.tune is None:
            return self.network
        tuned = self.tune(copy.deepcopy(self.network)).eval()
        if self.objective.attacked:
            tuned.requires_grad_(False)
        return tuned

    def measure(self, network: nn.Module) -> Evaluation:
        """Tell accuracy and loss of any network, in evaluation mode, on the same images.

        Raises ValueError for outputs that are no class scores.
        """
        return self._measure(self._forward(network), None)

    def measure_teacher(self) -> Evaluation:
        """Tell accuracy and loss of the teacher. Raises ValueError if there is none, or if its outputs aren't finite.

        They were computed when it was asked, but for attacked images, which it is asked now.
        """
        if self.expected is None or self.teacher is None:
            raise ValueError("the evaluator has no teacher")
        if self.objective.attacked:
            return self._judged(self._forward(self.teacher), None)
        outputs = self.expected[self.order].split(BATCH)
        return self._judged(lambda batch: (outputs[batch],), None)

    def _forward(self, network: nn.Module) -> Forward:
        """Compute outputs of a network from the input on, and those for attacked images if there is an attack."""
        if not self.objective.attacked:
            return _whole(network, self._inputs)
        with torch.inference_mode(False):  # inference tensors can't be kept for a gradient
            batches = self.batches

        def forward(batch: int) -> tuple[Tensor, ...]:
            inputs, labels = batches[batch]
            with torch.inference_mode(False):
                attacked = attacked_inputs(self.objective, network, inputs.clone(), labels, batch)
            with torch.inference_mode():
                return tuple(class_scores(network(one.clone())) for one in (inputs, *attacked))

        return forward

    def _resuming(self) -> Forward:
        """Compute outputs of the quantized network by batch, from where its bits part from those before."""
        prefix = self.prefix
        if prefix is None:
            return _whole(self.network, self._inputs)

        def forward(batch: int) -> tuple[Tensor, ...]:
            # Not inference mode: what is kept must tell whether it was changed.
            with torch.inference_mode(False), torch.no_grad():
                return (class_scores(prefix.forward(batch)),)

        return forward

    def _measure(self, forward: Forward, beat: float | None) -> Evaluation:
        """Judge outputs; those that aren't all finite are worth nothing."""
        try:
            return self._judged(forward, beat)
        except NotFinite:
            divergence = None
            if self.expected is not None:
                divergence = math.inf
            return Evaluation(0.0, math.inf, self.count, divergence)

    def _judged(self, forward: Forward, beat: float | None) -> Evaluation:
        """Judge outputs. Raises NotFinite for those that can't be."""
        parts: list[tuple[Tensor, ...]] = []
        right = seen = 0
        with closing(self._each(forward)) as each:
            for outputs in each:
                labels = self.labels[self.order[seen : seen + len(outputs[0])]]
                if any(bool(part.isnan().any()) for part in outputs):
                    raise NotFinite
                right += count_correct(self.objective, outputs, labels)
                seen += len(labels)
                parts.append(outputs)
                if seen < self.count and self._is_below(Evaluation(right / seen, 0.0, seen), beat):
                    break
        # Summed in the order in which the images were given.
        looked_at = self.order[:seen]
        back, index = looked_at.argsort(), looked_at.sort().values
        outputs = tuple(torch.cat(part)[back] for part in zip(*parts, strict=True))
        divergence = None
        if self.expected is not None:
            divergence = self._divergence(outputs[0], self.expected[index]) / seen
        loss = mean_loss(self.objective, outputs, self.labels[index], divergence)
        return Evaluation(right / seen, loss, seen, divergence)

    def _each(self, forward: Forward) -> Generator[tuple[Tensor, ...]]:
        """Yield the outputs of every batch, in their order, in main memory.

        Every thread takes whole batches: small networks spend much of their time waiting where all threads share one
        operation. What a result is doesn't depend on who was first.
        """
        threads, batches = torch.get_num_threads(), range(len(self._inputs))
        if threads == 1 or self.one_batch or self.device.type != "cpu":
            yield from (tuple(part.cpu() for part in forward(batch)) for batch in batches)
            return
        pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        try:
            yield from pool.map(forward, batches)
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # threads made from now on would have taken over the pool's setting

    def _is_below(self, part: Evaluation, beat: float | None) -> bool:
        """Say whether the part of the images that was looked at tells that the accuracy on all of them is below `beat`."""
        if beat is None:
            return False
        from scipy.stats import hypergeom  # it takes half a second to import

        # Right answers that reach `beat`, which may be such a share itself, rounded.
        needed = min(max(math.ceil(beat * self.count - 1e-6), 0), self.count)
        right, looks = round(part.accuracy * part.images), len(self._inputs) - 1
        return bool(hypergeom.cdf(right, self.count, needed, part.images) <= RISK / looks)

    @staticmethod
    def _divergence(outputs: Tensor, expected: Tensor) -> float:
        """Sum KL(expected || outputs) over the images."""
        total = 0.0
        for part, of_teacher in zip(outputs.double().split(BATCH), expected.double().split(BATCH), strict=True):
            target = F.log_softmax(of_teacher, 1)
            given = F.log_softmax(part, 1)
            summed = float(F.kl_div(given, target, reduction="sum", log_target=True))
            if math.isnan(summed):
                # A class that is impossible (a score of minus infinity) adds nothing.
                summed = float((target.exp() * (target - given)).where(target > -math.inf, 0.0).sum())
            total += summed
        return total


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread within.

    Sums of floats depend on the number of threads: with one, they don't depend on the machine's, and small operations
    don't wait for others' threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Put a network into evaluation mode within, and every one of its modules back into its own mode afterwards."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        # Not train(mode): norms that are frozen within a training network stay frozen.
        for module, mode in modes:
            module.training = mode


def device_of(network: nn.Module) -> torch.device:
    """Tell where a network's parameters are; the CPU if it has none."""
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def _whole(network: nn.Module, inputs: list[Tensor]) -> Forward:
    """Compute outputs of a network by batch, from the input on."""

    def forward(batch: int) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            # A copy: some networks normalise their input in place.
            return (class_scores(network(inputs[batch].clone())),)

    return forward


def _rows(inputs: Tensor, index: Tensor) -> Tensor:
    """Take some of the images, in the memory order that they have."""
    rows = torch.empty_like(inputs[: len(index)])
    return torch.index_select(inputs, 0, index.to(inputs.device), out=rows)
