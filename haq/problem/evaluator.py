"""Accuracy of a policy on held-out images, fast.

It takes at most one forward pass for a policy never seen before, none for one that was.
"""

from __future__ import annotations

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
from haq.problem.objective import Accuracy, Agreement, Objective, attacked_inputs, count_correct, mean_loss
from haq.problem.prefix_cache import Prefix

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
            labels: Integers of shape (images,). Without them the teacher's answers are taken.
            teacher: A network; every evaluation then tells the Kullback-Leibler divergence KL(teacher || network).
            tune: Makes of the network, at a policy's bits, the one that is judged (a copy).
            objective: What is correct, and how large the loss is; None is accuracy with labels, agreement without.
            kept_bytes: Limit of the activations kept between evaluations, all batches together.

        Raises:
            ValueError: If there are no images, or not as many labels, or neither labels nor a teacher.
        """
        count = len(inputs)
        if labels is not None:
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
        if teacher is not None:
            outputs = torch.cat([_scores(part) for (part,) in self._each(_whole(teacher, self._inputs))])
            self.expected = outputs[self.order.argsort()]
        if labels is None:
            assert self.expected is not None
            labels = self.expected.argmax(1)
        self.labels = labels.cpu()
        self.cache: dict[Q.BitPolicy, Evaluation] = {}
        self.pool: Pool | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Give all that it takes to evaluate policies elsewhere, with the same results: not what is only remembered."""
        state = self.__dict__ | {"cache": {}, "pool": None, "teacher": None}
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
        """Tell accuracy and loss of a policy. Raises ValueError if the outputs aren't finite.

        Given an accuracy to beat, evaluation ends after a part of the images, taken in random order without replacement, if
        that part tells that the accuracy on all of them is below `beat`. A policy that isn't below it is stopped with a
        probability of at most `RISK`, all looks together: after each batch the number of right answers is held against its
        hypergeometric distribution for a policy that just reaches `beat`, at the level RISK / looks (union bound). The
        probability is that of the order of images, which is drawn once for all policies.
        """
        known = self.cache.get(policy)
        if self.pool is not None and beat is None and (known is None or known.images < self.count):
            self.cache[policy] = known = self.pool.evaluate(policy)
        if known is None or (known.images < self.count and not self._is_below(known, beat)):
            network = self.prepared(policy)
            forward = self._forward(network)
            if network is self.network and not self.objective.attacked:
                forward = self._resuming()
            self.cache[policy] = known = self._measure(forward, beat)
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
        tuned = self.tune(self.network).eval()
        if self.objective.attacked:
            tuned.requires_grad_(False)
        return tuned

    def measure(self, network: nn.Module) -> Evaluation:
        """Tell accuracy and loss of any network, in evaluation mode, on the same images."""
        return self._measure(self._forward(network), None)

    def measure_teacher(self) -> Evaluation:
        """Tell accuracy and loss of the teacher. Raises ValueError if there is none.

        They were computed when it was asked, but for attacked images, which it is asked now.
        """
        if self.expected is None or self.teacher is None:
            raise ValueError("the evaluator has no teacher")
        if self.objective.attacked:
            return self.measure(self.teacher)
        outputs = self.expected[self.order].split(BATCH)
        return self._measure(lambda batch: (outputs[batch],), None)

    def _forward(self, network: nn.Module) -> Forward:
        """Compute outputs of a network from the input on, and those for attacked images if there is an attack."""
        if not self.objective.attacked:
            return _whole(network, self._inputs)
        with torch.inference_mode(False):  # inference tensors can't be kept for a gradient
            batches = self.batches

        def forward(batch: int) -> tuple[Tensor, ...]:
            inputs, labels = batches[batch]
            with torch.inference_mode(False):
                attacked = attacked_inputs(self.objective, network, inputs, labels, batch)
            with torch.inference_mode():
                return network(inputs), *map(network, attacked)

        return forward

    def _resuming(self) -> Forward:
        """Compute outputs of the quantized network by batch, from where its bits part from those before."""
        prefix = self.prefix
        if prefix is None:
            return _whole(self.network, self._inputs)

        def forward(batch: int) -> tuple[Tensor, ...]:
            # Not inference mode: what is kept must tell whether it was changed.
            with torch.inference_mode(False), torch.no_grad():
                return (prefix.forward(batch),)

        return forward

    def _measure(self, forward: Forward, beat: float | None) -> Evaluation:
        parts: list[tuple[Tensor, ...]] = []
        right = seen = 0
        with closing(self._each(forward)) as each:
            for outputs in each:
                labels = self.labels[self.order[seen : seen + len(outputs[0])]]
                right += count_correct(self.objective, [_scores(part) for part in outputs], labels)
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
            total += float(F.kl_div(F.log_softmax(part, 1), target, reduction="sum", log_target=True))
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


def device_of(network: nn.Module) -> torch.device:
    """Tell where a network's parameters are; the CPU if it has none."""
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def _scores(outputs: Tensor) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        what = type(outputs).__name__
        if isinstance(outputs, Tensor):
            what = f"shape {tuple(outputs.shape)}"
        raise ValueError(f"the network's outputs are class scores of shape (images, classes), not {what}")
    return outputs


def _whole(network: nn.Module, inputs: list[Tensor]) -> Forward:
    """Compute outputs of a network by batch, from the input on."""

    def forward(batch: int) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return (network(inputs[batch]),)

    return forward


def _rows(inputs: Tensor, index: Tensor) -> Tensor:
    """Take some of the images, in the memory order that they have."""
    rows = torch.empty_like(inputs[: len(index)])
    return torch.index_select(inputs, 0, index.to(inputs.device), out=rows)
