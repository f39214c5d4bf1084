"""Accuracy of a policy on held-out images, fast: at most one forward pass for a policy never seen before, none for one that
was."""

from __future__ import annotations

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
    """Share of images classified correctly (0..1), mean loss (nats), the number of images that both stand on, and, where
    there is a teacher, the mean Kullback-Leibler divergence (nats) of its outputs from the network's.

    Where images are attacked too, one is classified correctly if it is both as it is and attacked, and its loss is the larger
    one of the two; the divergence is that of the images as they are."""

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
        proxy: Callable[[nn.Module, Tensor, Tensor, int], Tensor] | None = None,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        """network: from `quantizers.quantize`.
        inputs: (N, ...), preprocessed.
        labels: int64 (N,); the loss is the cross-entropy.
        teacher: a network; every evaluation then tells the Kullback-Leibler divergence KL(teacher || network). Without labels
            its answers are taken for them: accuracy is the share of equal answers, and the loss is the divergence.
        tune: makes of the network, at a policy's bits, the one that is judged (a copy).
        proxy: an attack, such as `haq.attacks.proxy.ProxyAttack`: takes the network that is judged, the inputs and labels of a
            batch and its number, and returns inputs to judge it by as well. Its result must depend on nothing else. What is
            attacked differs from policy to policy, so nothing is kept from one to the next.
        kept_bytes: limit of the activations kept between evaluations, all batches together.
        """
        count = len(inputs) if labels is None else len(labels)
        if len(inputs) != count or not count:
            raise ValueError(f"evaluation needs as many images as labels, at least one; got {len(inputs)} and {count}")
        if labels is None and teacher is None:
            raise ValueError("give labels or a teacher, or both")
        if labels is None and proxy is not None:
            raise ValueError("an attack makes answers wrong, so it needs labels")
        self.network, self.tune, self.proxy, self.kept_bytes = network.eval(), tune, proxy, kept_bytes
        self.teacher = teacher
        if proxy is not None:
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
        self.labelled = labels is not None
        if labels is None:
            assert self.expected is not None
            labels = self.expected.argmax(1)
        self.labels = labels.cpu()
        self.cache: dict[Q.BitPolicy, Evaluation] = {}
        self.pool: Pool | None = None
        self._prefix: Prefix | None = None
        self._cut = False  # whether it was tried

    def __getstate__(self) -> dict[str, Any]:
        """All that it takes to evaluate policies elsewhere, with the same results: not what is only remembered."""
        return self.__dict__ | {"cache": {}, "pool": None, "teacher": None, "_prefix": None, "_cut": False}

    @property
    def one_batch(self) -> bool:
        """Whether a single batch is evaluated by all threads, so that sums of floats depend on their number."""
        # Unless it is attacked: the sign of a gradient near 0 must not hang on it.
        return len(self._inputs) == 1 and self.proxy is None

    @property
    def worker_threads(self) -> int:
        """The threads of a worker that evaluates elsewhere: one, unless sums of floats depend on their number. Then they are
        as many as here, so that results are those of this process."""
        return torch.get_num_threads() if self.one_batch or self.tune is not None else 1

    @property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        """Inputs and labels, in the order in which they are looked at."""
        return list(zip(self._inputs, self.labels[self.order].split(BATCH), strict=True))

    def evaluate(self, policy: Q.BitPolicy, beat: float | None = None) -> Evaluation:
        """Accuracy and loss of a policy. Raises ValueError if the outputs aren't finite.

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
            resumes = network is self.network and self.proxy is None
            self.cache[policy] = known = self._measure(self._resuming() if resumes else self._forward(network), beat)
        return known

    def expect(self, policies: Iterable[Q.BitPolicy]) -> None:
        """Tell the pool, if there is one, what it will be asked for."""
        if self.pool is not None:
            self.pool.expect(policy for policy in policies if policy not in self.cache)

    def prepared(self, policy: Q.BitPolicy) -> nn.Module:
        """The network that a policy is judged by: at its bits, and tuned if there is a `tune`."""
        Q.set_policy(self.network, policy)
        if self.tune is None:
            return self.network
        tuned = self.tune(self.network).eval()
        return tuned if self.proxy is None else tuned.requires_grad_(False)

    def measure(self, network: nn.Module) -> Evaluation:
        """Accuracy and loss of any network, in evaluation mode, on the same images."""
        return self._measure(self._forward(network), None)

    def measure_teacher(self) -> Evaluation:
        """Accuracy and loss of the teacher, which were computed when it was asked (but for attacked images, which it is asked
        now). Raises ValueError if there is none."""
        if self.expected is None or self.teacher is None:
            raise ValueError("the evaluator has no teacher")
        if self.proxy is not None:
            return self.measure(self.teacher)
        outputs = self.expected[self.order].split(BATCH)
        return self._measure(lambda batch: (outputs[batch],), None)

    def _forward(self, network: nn.Module) -> Forward:
        """Outputs of a network, computed from the input on, and those for attacked images if there is an attack."""
        if self.proxy is None:
            return _whole(network, self._inputs)
        proxy = self.proxy
        with torch.inference_mode(False):  # inference tensors can't be kept for a gradient
            batches = self.batches

        def forward(batch: int) -> tuple[Tensor, ...]:
            inputs, labels = batches[batch]
            with torch.inference_mode(False):
                attacked = proxy(network, inputs, labels, batch)
            with torch.inference_mode():
                return network(inputs), network(attacked)

        return forward

    def _resuming(self) -> Forward:
        """Outputs of the quantized network by batch, computed from where its bits part from those before."""
        if not self._cut:
            self._cut = True
            try:
                with torch.inference_mode(False), torch.no_grad():
                    self._prefix = Prefix(self.network, self._inputs, self.kept_bytes)
            except ValueError:
                pass  # then it is run as a whole, with the same result
        if self._prefix is None:
            return _whole(self.network, self._inputs)
        prefix = self._prefix

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
                if labels.max() >= _scores(outputs[0]).shape[1] or labels.min() < 0:
                    span = f"{int(labels.min())} to {int(labels.max())}"
                    raise ValueError(f"labels from {span} don't fit outputs of shape {tuple(outputs[0].shape)}")
                right += int(torch.stack([part.argmax(1) == labels for part in outputs]).all(0).sum())
                seen += len(labels)
                parts.append(outputs)
                if seen < self.count and self._is_below(Evaluation(right / seen, 0.0, seen), beat):
                    break
        # Summed in the order in which the images were given.
        looked_at = self.order[:seen]
        back, index = looked_at.argsort(), looked_at.sort().values
        clean, *attacked = (torch.cat(part)[back] for part in zip(*parts, strict=True))
        divergence = None if self.expected is None else self._divergence(clean, self.expected[index]) / seen
        loss = self._cross_entropy([clean, *attacked], self.labels[index]) / seen if self.labelled else divergence
        assert loss is not None
        if not math.isfinite(loss):
            raise ValueError("the network's outputs are not finite on the search images")
        return Evaluation(right / seen, loss, seen, divergence)

    def _each(self, forward: Forward) -> Generator[tuple[Tensor, ...]]:
        """The outputs of every batch, in their order, in main memory.

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
        """Whether the part of the images that was looked at tells that the accuracy on all of them is below `beat`."""
        if beat is None:
            return False
        from scipy.stats import hypergeom  # it takes half a second to import

        # Right answers that reach `beat`, which may be such a share itself, rounded.
        needed = min(max(math.ceil(beat * self.count - 1e-6), 0), self.count)
        right, looks = round(part.accuracy * part.images), len(self._inputs) - 1
        return bool(hypergeom.cdf(right, self.count, needed, part.images) <= RISK / looks)

    @staticmethod
    def _cross_entropy(outputs: list[Tensor], labels: Tensor) -> float:
        """The sum over images, of the largest of several outputs' each."""
        total = 0.0
        for *parts, answers in zip(*(part.double().split(BATCH) for part in outputs), labels.split(BATCH), strict=True):
            if len(parts) == 1:
                total += float(F.cross_entropy(parts[0], answers, reduction="sum"))
            else:
                losses = [F.cross_entropy(part, answers, reduction="none") for part in parts]
                total += float(torch.stack(losses).amax(0).sum())
        return total

    @staticmethod
    def _divergence(outputs: Tensor, expected: Tensor) -> float:
        """The sum over images of KL(expected || outputs)."""
        total = 0.0
        for part, of_teacher in zip(outputs.double().split(BATCH), expected.double().split(BATCH), strict=True):
            target = F.log_softmax(of_teacher, 1)
            total += float(F.kl_div(F.log_softmax(part, 1), target, reduction="sum", log_target=True))
        return total


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums of floats depend on the number of threads: with one, they don't depend on the machine's, and small operations don't
    wait for others' threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def device_of(network: nn.Module) -> torch.device:
    """Where a network's parameters are; the CPU if it has none."""
    return next((parameter.device for parameter in network.parameters()), torch.device("cpu"))


def _scores(outputs: Tensor) -> Tensor:
    if not isinstance(outputs, Tensor) or outputs.dim() != 2:
        what = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"the network's outputs are class scores of shape (images, classes), not {what}")
    return outputs


def _whole(network: nn.Module, inputs: list[Tensor]) -> Forward:
    """Outputs of a network by batch, computed from the input on."""

    def forward(batch: int) -> tuple[Tensor, ...]:
        with torch.inference_mode():
            return (network(inputs[batch]),)

    return forward


def _rows(inputs: Tensor, index: Tensor) -> Tensor:
    """Some of the images, in the memory order that they have."""
    rows = torch.empty_like(inputs[: len(index)])
    return torch.index_select(inputs, 0, index.to(inputs.device), out=rows)
