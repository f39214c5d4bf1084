"""What a policy is worth on held-out samples, fast.

It takes at most one forward pass for a policy never seen before, none for one that was.
"""

from __future__ import annotations

import copy
import functools
import math
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import ThreadpoolController
from torch import Tensor, nn

import quantizers as Q
from haq.data.labels import class_numbers
from haq.problem import racing
from haq.problem.guarding import apart
from haq.problem.objective import (
    Accuracy,
    Agreement,
    BlackBox,
    MetricObjective,
    NotFinite,
    Objective,
    ValueObjective,
    attacked_inputs,
    value_of,
)
from haq.problem.prefix_cache import Prefix
from haq.problem.samples import BATCH as BATCH
from haq.problem.samples import KeptSamples, Samples, outputs_of, samples_in
from haq.problem.snapshot import Snapshot
from haq.problem.tally import Evaluation as Evaluation
from haq.problem.tally import ScoreTally, Tally, ValueTally, check_by_sample, worthless
from quantizers.calling import Forward, call, device_of, inputs_of, leaves, targets_of, to_device

KEPT_BYTES = 1 << 30  # of activations, all batches together; and of the teacher's outputs
KEPT_VALUES = 64 << 20  # bytes of values by sample, of the policies that were evaluated last
RISK = 1e-3  # that an evaluation is stopped although the policy isn't worse than the value to beat

# Of a batch's number and the batch: what the objective looks at of the outputs, and, where they are attacked, of those of the
# attacked samples.
Answers = Callable[[int, Any], tuple[Any, ...]]


Asked = tuple[Q.BitPolicy, float | None]  # of workers: a policy, and what it is to beat


class Judged(NamedTuple):
    """An evaluation, and how it came about.

    Attributes:
        evaluation: What a policy was measured to give.
        goods: By batch that was looked at, how much was good of all samples until then: their number, where values are shares
            of samples. Nothing where no evaluation ends early.
    """

    evaluation: Evaluation
    goods: tuple[float, ...]


class Pool(Protocol):
    """Workers that evaluate policies for an evaluator, each on its own copy of it (`haq.study.workers`)."""

    def expect(self, policies: Iterable[Q.BitPolicy], beat: float | None = None) -> None:
        """Begin with policies that will be asked for, and what they are to beat."""

    def evaluate(self, policy: Q.BitPolicy, beat: float | None = None) -> Judged:
        """Wait for what `Evaluator.judge` finds."""


class Kept:
    """The value of every sample, of the policies that were evaluated last; which are answered rightly takes a bit each."""

    def __init__(self) -> None:
        """Begin with nothing."""
        self._packed: dict[Q.BitPolicy, tuple[int, NDArray[Any] | None]] = {}
        self._size = 0

    def keep(self, policy: Q.BitPolicy, tally: Tally | None) -> None:
        """Take what is known of a policy; the oldest are forgotten beyond `KEPT_VALUES`."""
        self._drop(policy)
        values: Tensor | None = None
        if tally is not None:
            values = tally.by_sample()
        if values is None:
            self._packed[policy] = 0, None
            return
        packed = values.numpy()
        if values.dtype == torch.bool:
            packed = np.packbits(packed)
        self._packed[policy] = len(values), packed
        self._size += packed.nbytes
        while self._size > KEPT_VALUES and len(self._packed) > 2:
            self._drop(next(iter(self._packed)))

    def _drop(self, policy: Q.BitPolicy) -> None:
        """Forget a policy, if it is known."""
        _, packed = self._packed.pop(policy, (0, None))
        if packed is not None:
            self._size -= packed.nbytes

    def clear(self) -> None:
        """Forget everything."""
        self._packed.clear()
        self._size = 0

    def __contains__(self, policy: Q.BitPolicy) -> bool:
        """Say whether a policy is among them."""
        return policy in self._packed

    def __getitem__(self, policy: Q.BitPolicy) -> Tensor | None:
        """Return the value of every sample; None where there is none."""
        count, packed = self._packed[policy]
        if packed is None:
            return None
        if packed.dtype == np.uint8:
            return torch.from_numpy(np.unpackbits(packed, count=count).astype(bool))
        return torch.from_numpy(packed)


class Evaluator:
    """Evaluates policies of one quantized network on one set of samples, kept in memory, where the network is, or streamed.

    Weights are quantized once per (layer, bits) and scales calibrated once; the results are cached by policy. A policy that
    begins with the bits of the one before starts from what was computed then (`prefix_cache`), with the same result. Only
    where samples are attacked, streamed, or given by a `forward` is the whole network run.

    If the network or the samples are changed, by whatever means, all that was kept is forgotten (`snapshot`). The network is
    always judged in evaluation mode, and may change what it is given in place: it is given copies.
    """

    def __init__(
        self,
        network: nn.Module,
        inputs: Tensor | Samples | None,
        labels: Tensor | None = None,
        *,
        teacher: nn.Module | None = None,
        tune: Callable[[nn.Module], nn.Module] | None = None,
        objective: Objective | None = None,
        kept_bytes: int = KEPT_BYTES,
        forward: Forward | None = None,
    ) -> None:
        """Take a network and the samples that its policies are judged on.

        Args:
            network: From `quantizers.quantize`.
            inputs: Shape (samples, ...), preprocessed; or samples of any kind, with their targets. None is enough for an
                objective that is given the network.
            labels: Class numbers of any integer type and of shape (samples,). Without them the teacher's answers are taken.
            teacher: A network; every evaluation then tells the divergence from its outputs.
            tune: Makes of a copy of the network, at a policy's bits, the one that is judged.
            objective: What is correct, and how large the loss is; None is accuracy with labels, agreement without.
            kept_bytes: Limit of the activations kept between evaluations, all batches together.
            forward: Computes outputs of (network, batch), where that takes more than calling the network with the inputs.

        Raises:
            ValueError: If there are no samples, or not as many labels, or neither labels nor a teacher; and for labels that
                are no class numbers.
        """
        samples = _samples_of(inputs, labels)
        has_targets = labels is not None
        if isinstance(inputs, Samples):
            has_targets = targets_of(inputs.example(), network) is not None
        if objective is None:
            objective = Agreement()
            if has_targets:
                objective = Accuracy()
        _check_given(objective, samples, has_targets, teacher is not None)
        self.network = network.eval()
        self.tune = tune
        self.objective = objective
        self.kept_bytes = kept_bytes
        self.teacher = teacher
        self.forward = forward
        if objective.attacked:
            # Gradients go to the inputs alone, so that quantized weights are made once per width as they are without.
            network.requires_grad_(False)
        self.device = device_of(network)
        self.samples = samples
        self.count = 0
        self.order = torch.arange(0)
        if samples is not None:
            self.samples = samples.to(self.device)
            self.count = samples.count
            self.order = samples.order
        self._check_calls()
        self._asked = not has_targets and objective.takes_scores  # whether the teacher's answers are the labels
        self.labels = torch.zeros(0, dtype=torch.long)  # of class scores, in the order in which samples were given
        self.expected: Tensor | None = None  # the teacher's class scores, in the same order
        self.outputs: list[Any] | None = None  # other outputs of the teacher, by batch
        self._ask_teacher()
        self.cache: dict[Q.BitPolicy, Evaluation] = {}
        self._kept: dict[Q.BitPolicy, Judged] = {}  # of what is in the cache and was evaluated for this evaluator
        self.pool: Pool | None = None
        self._values = Kept()
        self._snapshot: Snapshot | None = Snapshot(network, self._stored())

    def _check_calls(self) -> None:
        """Raise ValueError if inputs are to be attacked, and a network is more than called with them."""
        if self.objective.attacked and self.forward is not None and not isinstance(self.objective, BlackBox):
            raise ValueError(
                f"objective {self.objective.name!r} attacks images, which takes a network that is called with them alone: it "
                "can't be had with `forward`"
            )

    def _ask_teacher(self) -> None:
        """Set what the teacher's outputs decide, and the labels."""
        if self.teacher is None and (self.expected is not None or self.outputs is not None):
            raise ValueError("the evaluator's samples were changed, and this copy of it has no teacher to ask anew")
        if self.samples is None:
            return
        if self.objective.takes_scores:
            self._read_scores()
            return
        if self.teacher is None:
            return
        self.outputs = self._kept_outputs(self.teacher)

    def _look_at(self, batch: Any, outputs: Any) -> None:
        """Show the objective the teacher's outputs on the first batch."""
        targets = outputs
        if not self.objective.compares_with_float:
            targets = self._targets(batch)
        check_by_sample(self.objective, outputs, targets, samples_in(batch))
        self.objective.look_at(apart(self.objective, outputs), apart(self.objective, targets))

    def _targets(self, batch: Any) -> Any:
        """Return the targets of a batch, as the objective holds outputs against them."""
        return self.objective.aligned(inputs_of(batch, self.network), targets_of(batch, self.network))

    def _read_scores(self) -> None:
        """Set labels, and the teacher's class scores."""
        back = self.order.argsort()
        if not self._asked:
            assert self.samples is not None
            given = self.samples.labels()
            if given is None:
                given = torch.cat([self._labels_in(batch) for batch in self.samples])[back]
            self.labels = class_numbers(given, "`labels`")
        if self.teacher is None:
            return
        with evaluation_mode(self.teacher):
            outputs = torch.cat([part.cpu() for _, (part,) in self._each(self._plainly(self.teacher))])
        self.expected = outputs[back]
        if self._asked:
            self.labels = self.expected.argmax(1)

    def _labels_in(self, batch: Any) -> Tensor:
        """Return the labels of a batch. Raises ValueError unless there is one for each of its samples."""
        given, count = targets_of(batch, self.network), samples_in(batch)
        if given is None:
            raise ValueError(f"a batch of {count} samples has no labels: there must be one for each sample")
        labels = torch.as_tensor(given).cpu()
        if labels.shape[:1] != (count,):
            raise ValueError(
                f"a batch of {count} samples has labels of shape {tuple(labels.shape)}: there must be one for each sample"
            )
        return labels

    def _kept_outputs(self, teacher: nn.Module) -> list[Any] | None:
        """Return the teacher's outputs by batch, if anything is held against them.

        None if they take more than `kept_bytes`, and are computed anew each time.
        """
        kept: list[Any] = []
        size = 0
        with evaluation_mode(teacher), closing(self._each(self._plainly(teacher))) as each:
            for batch, (outputs,) in each:
                if not kept:
                    self._look_at(batch, outputs)
                if not self._holds_against_teacher:
                    return None
                size += sum(leaf.nbytes for leaf in leaves(outputs))
                if size > self.kept_bytes:
                    return None
                kept.append(outputs)
        return kept

    def _stored(self) -> list[Tensor]:
        """List the tensors that results depend on, beside those of the network."""
        stored = self._kept_samples()
        stored.append(self.labels)
        if self.expected is not None:
            stored.append(self.expected)
        if self.outputs is not None:
            stored += leaves(self.outputs)
        return stored

    def _kept_samples(self) -> list[Tensor]:
        if self.samples is None:
            return []
        return list(self.samples.tensors())

    def _forget_what_changed(self) -> None:
        """Forget all that was kept, if the network or the samples are no longer what it was computed with."""
        if self._snapshot is not None:
            self._snapshot.restore_modes(self.network)
            stored = self._stored()
            if self._snapshot.fits(self.network, stored):
                return
            if not self._snapshot.holds(self._kept_samples(), len(stored)):
                self._ask_teacher()
            self.cache.clear()
            self._kept.clear()
            self._values.clear()
            self.__dict__.pop("prefix", None)
            for layer in Q.quant_layers(self.network).values():
                layer.cache.clear()
            # Its workers have copies of what was.
            self.pool = None
        self._snapshot = Snapshot(self.network, self._stored())

    def __getstate__(self) -> dict[str, Any]:
        """Give all that it takes to evaluate policies elsewhere, with the same results: not what is only remembered."""
        state = self.__dict__ | {"cache": {}, "_kept": {}, "pool": None, "_values": Kept(), "_snapshot": None}
        if not self._asks_again:
            state["teacher"] = None
        state.pop("prefix", None)
        return state

    @property
    def _asks_again(self) -> bool:
        """Say whether the teacher's outputs are computed anew for every policy."""
        if self.teacher is None or self.samples is None or self.objective.takes_scores:
            return False
        if self.outputs is not None:
            return False
        return self._holds_against_teacher

    @property
    def _holds_against_teacher(self) -> bool:
        """Say whether outputs are held against the teacher's."""
        return self.objective.distribution is not None or self.objective.compares_with_float

    @functools.cached_property
    def prefix(self) -> Prefix | None:
        """Cut the network, so that a policy can start where it parts from the one before; None if that can't be done."""
        if self.forward is not None or not isinstance(self.samples, KeptSamples):
            return None
        inputs = [inputs_of(batch, self.network) for batch in self.samples.batches]
        if not all(isinstance(part, Tensor) for part in inputs):
            return None
        try:
            with torch.inference_mode(False), torch.no_grad():
                return Prefix(self.network, inputs, self.kept_bytes)
        except ValueError:
            return None  # then it is run as a whole, with the same result

    @property
    def one_batch(self) -> bool:
        """Say whether a single batch is evaluated by all threads, so that sums of floats depend on their number."""
        # Unless it is attacked: the sign of a gradient near 0 must not hang on it.
        return self.samples is not None and len(self.samples) == 1 and not self.objective.attacked

    @property
    def worker_threads(self) -> int:
        """Tell how many threads a worker that evaluates elsewhere takes.

        One, unless sums of floats depend on their number. Then they are as many as here, so that results are those of this
        process.
        """
        if self.one_batch or self.tune is not None or isinstance(self.objective, BlackBox):
            return torch.get_num_threads()
        return 1

    @property
    def batches(self) -> list[tuple[Any, Any]]:
        """List inputs and targets, in the order in which they are looked at."""
        if self.samples is None:
            return []
        inputs = [inputs_of(batch, self.network) for batch in self.samples]
        if self.objective.takes_scores:
            return list(zip(inputs, self.labels[self.order].split(list(self.samples.sizes)), strict=True))
        return [(one, self._targets(batch)) for one, batch in zip(inputs, self.samples, strict=True)]

    @property
    def races(self) -> bool:
        """Say whether an evaluation can end early: values are shares, of several batches of samples in random order."""
        samples = self.samples
        return samples is not None and samples.is_shuffled and len(samples) > 1 and racing.has_shares(self.objective)

    def evaluate(self, policy: Q.BitPolicy, beat: float | None = None) -> Evaluation:
        """Tell the value and the loss of a policy.

        Given a value to beat, evaluation ends after a part of the samples, taken in random order without replacement, if that
        part tells that the value on all of them is worse than `beat`. A policy that isn't worse is stopped with a probability
        of at most `RISK`, all looks together: after each batch the number of right answers is held against its
        hypergeometric distribution for a policy that just reaches `beat`, at the level RISK / looks (union bound); other
        values from 0 to 1 against Hoeffding's bound. The probability is that of the order of samples, which is drawn once for
        all policies. Only where `races` does an evaluation end early.

        What is known of the policy already answers, if it is whole, or was cut short and is worse than `beat`.
        """
        self._forget_what_changed()
        known = self.cache.get(policy)
        if known is not None:
            good = self._good(known.accuracy) * known.images
            if known.images >= self.count or self._is_below(good, known.images, beat):
                return known
        return self._judged_anew(policy, beat)

    def race(self, policy: Q.BitPolicy, beat: float) -> Evaluation:
        """Tell the value and the loss of a policy that is to beat a value, as `evaluate` does.

        What is returned depends on policy and value alone, and not on what was asked before, as a search's result must not: a
        policy that is known whole, and that a part of the samples tells to be worse, is evaluated on that part once more.
        """
        if not self.races:
            return self.evaluate(policy)
        self._forget_what_changed()
        known, kept = self.cache.get(policy), self._kept.get(policy)
        if known is not None and kept is not None and kept.evaluation == known:
            looks = self._looks(kept.goods, beat)
            if looks is None and known.images >= self.count:
                return known
            if looks == len(kept.goods) and known.images < self.count:
                return known
        return self._judged_anew(policy, beat)

    def _judged_anew(self, policy: Q.BitPolicy, beat: float | None) -> Evaluation:
        """Evaluate a policy here or by the pool, and keep what stands on most samples."""
        if not self.races:
            beat = None
        if self.pool is not None:
            judged = self.pool.evaluate(policy, beat)
        else:
            judged = self.judge(policy, beat)
        known = self.cache.get(policy)
        if known is None or known.images <= judged.evaluation.images:
            self.cache[policy] = judged.evaluation
            self._kept[policy] = judged
        return judged.evaluation

    def judge(self, policy: Q.BitPolicy, beat: float | None = None) -> Judged:
        """Evaluate a policy here, whatever is known of it."""
        self._forget_what_changed()
        goods: list[float] = []
        found, tally = self._run(policy, beat, goods)
        if found.images == self.count:
            self._values.keep(policy, tally)
        return Judged(found, tuple(goods))

    def _run(
        self, policy: Q.BitPolicy, beat: float | None = None, goods: list[float] | None = None
    ) -> tuple[Evaluation, Tally | None]:
        """Run the network at a policy, and judge its outputs; arguments and result are those of `_measured`."""
        network = self.prepared(policy)
        answers = self._answers(network)
        if network is self.network and not self.objective.attacked:
            answers = self._resuming()
        found = self._measured(network, answers, beat, goods)
        assert self._snapshot is not None
        self._snapshot.take_attributes()
        return found

    def by_sample(self, policy: Q.BitPolicy) -> Tensor | None:
        """Tell what a policy is worth on every sample; the mean is the value that `evaluate` tells.

        What was evaluated here lately is remembered. All else is run again, with the same outputs, whoever ran it before.

        Returns:
            In the order in which samples were given: whether each is answered rightly (booleans), or its value (float64).
            None where values aren't means over samples, and for outputs that can't be judged.
        """
        self._forget_what_changed()
        if isinstance(self.objective, BlackBox | MetricObjective):
            return None
        if policy not in self._values:
            self._values.keep(policy, self._run(policy)[1])
        return self._values[policy]

    def expect(self, policies: Iterable[Q.BitPolicy], beat: float | None = None) -> None:
        """Tell the pool, if there is one, what it will be asked for, and what that is to beat."""
        if self.pool is None:
            return
        new = (policy for policy in policies if policy not in self.cache)
        if beat is None or not self.races:
            self.pool.expect(new)
        else:
            self.pool.expect(new, beat)

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
        """Tell the value and the loss of any network, in evaluation mode, on the same samples.

        Raises ValueError for outputs that the objective can't judge.
        """
        return self._measure(network, self._answers(network))

    def measure_by_sample(self, network: nn.Module) -> tuple[Evaluation, Tensor | None]:
        """Tell the value and the loss of any network, as `measure` does, and its value on every sample, as `by_sample`."""
        found, tally = self._measured(network, self._answers(network))
        return found, _values_of(tally)

    def measure_teacher(self) -> Evaluation:
        """Tell the value and the loss of the teacher.

        Its outputs were computed when it was asked, but for those on attacked samples, which it is asked now.

        Raises:
            ValueError: If there is none, if its outputs aren't finite, or if the objective tells no finite number of it.
        """
        if self.teacher is None:
            raise ValueError("the evaluator has no teacher")
        answers = self._answers(self.teacher)
        known: list[Any] | None = self.outputs
        if self.expected is not None:
            assert self.samples is not None
            known = list(self.expected[self.order].split(list(self.samples.sizes)))
        if known is not None and not self.objective.attacked:
            of_batches = known
            answers = lambda number, batch: (of_batches[number],)  # noqa: E731
        with evaluation_mode(self.teacher):
            result, _ = self._judged(self.teacher, answers)
        if not math.isfinite(result.accuracy) or not math.isfinite(result.loss):
            raise ValueError(
                f"objective {self.objective.name!r} gives no finite number for the float network on the search samples: value "
                f"{result.accuracy}, loss {result.loss}"
            )
        return result

    def _answer(self, network: nn.Module, batch: Any) -> Any:
        """Compute what the objective looks at of one batch's outputs."""
        # Of what is streamed nobody asks again, but for a teacher.
        copy = self.forward is not None or self.samples is None or self.samples.is_kept or self._asks_again
        found = self.objective.read(outputs_of(network, batch, self.forward, copy=copy))
        if self.objective.takes_scores and len(found) != samples_in(batch):
            raise ValueError(
                f"the network's outputs have shape {tuple(found.shape)} for {samples_in(batch)} samples: there must be a row "
                "of class scores for each"
            )
        return found

    def _plainly(self, network: nn.Module) -> Answers:
        """Compute outputs of a network from the input on."""

        def answers(number: int, batch: Any) -> tuple[Any, ...]:
            with torch.inference_mode():
                return (self._answer(network, batch),)

        return answers

    def _answers(self, network: nn.Module) -> Answers:
        """Compute outputs of a network from the input on, and those for attacked samples if there is an attack."""
        if not self.objective.attacked:
            return self._plainly(network)
        with torch.inference_mode(False):  # inference tensors can't be kept for a gradient
            labels: list[Any] = []
            if self.objective.takes_scores:
                labels = [part for _, part in self.batches]

        def answers(number: int, batch: Any) -> tuple[Any, ...]:
            inputs = inputs_of(batch, self.network)
            if labels:
                targets = labels[number]
            elif self.objective.compares_with_float:
                targets = self._expected(number, batch)
            else:
                targets = self._targets(batch)
            attacked = attacked_inputs(self.objective, network, inputs, targets, number)
            with torch.inference_mode():
                versions = (inputs, *attacked)
                return tuple(self.objective.read(call(network, one.clone())) for one in versions)

        return answers

    def _resuming(self) -> Answers:
        """Compute outputs of the quantized network by batch, from where its bits part from those before."""
        prefix = self.prefix
        if prefix is None:
            return self._plainly(self.network)

        def answers(number: int, batch: Any) -> tuple[Any, ...]:
            # Not inference mode: what is kept must tell whether it was changed.
            with torch.inference_mode(False), torch.no_grad():
                return (self.objective.read(prefix.forward(number)),)

        return answers

    def _measure(self, network: nn.Module, answers: Answers) -> Evaluation:
        """Judge outputs; those that aren't all finite are worth nothing."""
        return self._measured(network, answers)[0]

    def _measured(
        self, network: nn.Module, answers: Answers, beat: float | None = None, goods: list[float] | None = None
    ) -> tuple[Evaluation, Tally | None]:
        """Judge outputs, as `_measure` does, and return beside it what knows more of them, if they can be judged.

        `beat` and `goods` are those of `_tallied`.
        """
        has_teacher = self.expected is not None or self.outputs is not None or self._asks_again
        try:
            found, tally = self._judged(network, answers, beat, goods)
        except NotFinite:
            return worthless(self.objective, self.count, has_teacher), None
        if math.isnan(found.accuracy) or math.isnan(found.loss) or math.isinf(found.accuracy):
            return worthless(self.objective, self.count, has_teacher), None
        return found, tally

    def _judged(
        self, network: nn.Module, answers: Answers, beat: float | None = None, goods: list[float] | None = None
    ) -> tuple[Evaluation, Tally | None]:
        """Judge outputs, and return beside it what took them. Raises NotFinite for those that can't be."""
        if isinstance(self.objective, BlackBox):
            return self._told(self.objective, network, answers), None
        tally = self._tallied(answers, beat, goods)
        return tally.result(), tally

    def _tallied(self, answers: Answers, beat: float | None, goods: list[float] | None) -> Tally:
        """Take outputs, as many as it needs to judge them.

        Args:
            answers: Computes them.
            beat: As of `evaluate`.
            goods: Is told after every batch how much was good until then, as far as an evaluation can end early.

        Returns:
            What took them.

        Raises:
            NotFinite: For outputs that can't be judged.
        """
        tally: Tally = ScoreTally(self.objective, self.order, self.expected)
        if isinstance(self.objective, ValueObjective):
            tally = ValueTally(self.objective, self.order)
        races = self.races
        with closing(self._each(answers)) as each:
            for number, (batch, outputs) in enumerate(each):
                expected = self._expected(number, batch)
                if self.objective.takes_scores:
                    last = tally.seen + len(outputs[0])
                    targets = self.labels[self.order[tally.seen : last]]
                elif self.objective.compares_with_float:
                    targets = expected
                else:
                    targets = self._targets(batch)
                with torch.inference_mode():
                    tally.add(outputs, targets, expected, samples_in(batch))
                good = tally.good()
                races = races and good is not None and tally.seen < self.count
                if not races:
                    continue
                assert good is not None
                if goods is not None:
                    goods.append(good)
                if self._is_below(good, tally.seen, beat):
                    break
        return tally

    def _told(self, objective: BlackBox, network: nn.Module, answers: Answers) -> Evaluation:
        """Judge by an objective that is given the network; the divergence is told where there are samples to tell it by."""
        value = value_of(objective, network)
        loss = -objective.signed(value)
        if not math.isfinite(value):
            return Evaluation(value, loss, self.count, None, objective.higher_is_better)
        divergence = None
        if self.outputs is not None or self._asks_again:
            parts: list[Tensor] = []
            for number, (batch, outputs) in enumerate(self._each(answers)):
                apart = objective.divergence(outputs[0], self._expected(number, batch))
                parts.append(apart.detach().double().cpu())
            divergence = float(torch.cat(parts).mean())
            if not math.isfinite(divergence):
                raise NotFinite
            loss = divergence
        return Evaluation(value, loss, self.count, divergence, objective.higher_is_better)

    def _expected(self, number: int, batch: Any) -> Any:
        """Return the teacher's outputs on a batch; None where nobody asks, or class scores are kept all together."""
        if self.outputs is not None:
            return self.outputs[number]
        if not self._asks_again:
            return None
        assert self.teacher is not None
        with torch.inference_mode(), evaluation_mode(self.teacher):
            return self._answer(self.teacher, batch)

    def _each(self, answers: Answers) -> Generator[tuple[Any, tuple[Any, ...]]]:
        """Yield every batch and its outputs, in their order.

        Every thread takes whole batches: small networks spend much of their time waiting where all threads share one
        operation. What a result is doesn't depend on who was first.
        """
        assert self.samples is not None
        threads = torch.get_num_threads()
        batches = enumerate(self.samples)
        if threads == 1 or self.one_batch or self.device.type != "cpu":
            for number, batch in batches:
                moved = batch
                if not self.samples.is_kept:
                    moved = to_device(batch, self.device)
                yield moved, answers(number, moved)
            return
        pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        waiting: deque[tuple[Any, Future[tuple[Any, ...]]]] = deque()
        # Of samples that are streamed only so many are in memory.
        most = len(self.samples)
        if not self.samples.is_kept:
            most = 2 * threads
        try:
            for number, batch in batches:
                waiting.append((batch, pool.submit(answers, number, batch)))
                if len(waiting) >= most:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # threads made from now on would have taken over the pool's setting

    def _good(self, value: float) -> float:
        """Return how much of all samples is good, from 0 to 1, for a value that is a share."""
        if self.objective.higher_is_better:
            return value
        return 1 - value

    def _is_below(self, good: float, seen: int, beat: float | None) -> bool:
        """Say whether the part of the samples that was looked at tells that the value of all of them is worse than `beat`.

        Args:
            good: How much of the part was good.
            seen: The samples of the part.
            beat: The value; None is worse than any.

        Returns:
            Whether it is.
        """
        if beat is None or not self.races:
            return False
        assert self.samples is not None
        looks = len(self.samples) - 1
        chance: Callable[[float, int, float, int], float] = racing.chance_of_bounded
        if self.objective.takes_scores:
            chance = racing.chance_of_counted
        return chance(good, seen, self._good(beat), self.count) <= RISK / looks

    def _looks(self, goods: tuple[float, ...], beat: float) -> int | None:
        """Tell after how many batches an evaluation ends; None if those that are known don't tell."""
        assert self.samples is not None
        seen = 0
        for number, (good, size) in enumerate(zip(goods, self.samples.sizes, strict=False), 1):
            seen += size
            if self._is_below(good, seen, beat):
                return number
        return None


def _values_of(tally: Tally | None) -> Tensor | None:
    """Return the value of every sample; None if nothing knows it."""
    if tally is None:
        return None
    return tally.by_sample()


def _samples_of(inputs: Tensor | Samples | None, labels: Tensor | None) -> Samples | None:
    """Make samples of tensors. Raises ValueError if there are none, or not as many labels as inputs."""
    if not isinstance(inputs, Tensor):
        return inputs
    count = len(inputs)
    if labels is not None:
        labels = class_numbers(labels, "`labels`")
        count = len(labels)
    if len(inputs) != count or not count:
        raise ValueError(f"evaluation needs as many images as labels, at least one; got {len(inputs)} and {count}")
    if labels is None:
        return KeptSamples([inputs])
    return KeptSamples([(inputs, labels)])


def _check_given(objective: Objective, samples: Samples | None, has_targets: bool, has_teacher: bool) -> None:
    """Raise ValueError unless an evaluator is given what its objective needs."""
    if samples is None and not isinstance(objective, BlackBox):
        raise ValueError("evaluation needs samples, at least one")
    if not has_targets and objective.attacked and objective.needs_labels:
        raise ValueError("an attack makes answers wrong, so it needs labels")
    if not has_targets and not has_teacher and not isinstance(objective, BlackBox):
        raise ValueError("give labels or a teacher, or both")


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread within, in torch and in the linear algebra of NumPy and SciPy.

    Sums of floats depend on the number of threads: with one, they don't depend on the machine's, and small operations
    don't wait for others' threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with _linear_algebra().limit(limits=1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def _linear_algebra() -> ThreadpoolController:
    """Find the libraries of linear algebra, which takes milliseconds."""
    import scipy.linalg  # noqa: F401  it brings one of its own

    return ThreadpoolController()


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
