"""Where samples come from: tensors and files, a data set that gives them by index, batches that are gone through again."""

from __future__ import annotations

import multiprocessing
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    default_collate,
)
from torch.utils.data import Dataset as TorchDataset

from haq.data.memory import show_bytes
from haq.data.structures import (
    Batch,
    as_sample,
    bytes_of,
    class_numbers_in,
    columns,
    divides,
    each_column,
    entries,
    fingerprint,
    is_array,
    is_lazy,
    is_number,
    joined,
    length,
    normal,
    rows,
    without_files,
)
from quantizers.calling import leaves, map_tensors, targets_of

BATCH = 250  # samples of a data set that are put together at a time, where nobody says otherwise
PROBED = 8  # samples that are read twice, to see whether they are the same
AHEAD = 2  # batches that are made before they are asked for
SEED = 0  # of whatever a loader's workers draw


class Source(ABC):
    """Samples that can be had again and again.

    Attributes:
        called: What they are called in messages: "`search`", "the train split of mydata".
        count: The number of samples.
        is_kept: Whether they are in memory.
        is_indexed: Whether any sample can be had without those before it.
        size: Samples of a batch, as they were given.
        is_of_list: Whether they came in a list of batches, which may have been meant as one of samples.
    """

    called: str
    count: int
    is_kept: bool
    is_indexed: bool = True
    size: int = BATCH
    is_of_list: bool = False

    @abstractmethod
    def take(self, index: Tensor) -> Batch:
        """Return a batch of the samples of these indices, in this order."""

    @abstractmethod
    def subset(self, index: Tensor) -> Source:
        """Return the samples of these indices alone."""

    @abstractmethod
    def kept(self, most: int) -> Source:
        """Return the samples in memory, if they take `most` bytes at most there; otherwise as they are."""

    def batches(self, parts: Sequence[Tensor]) -> Iterator[Batch]:
        """Yield a batch for each of these parts, indices of samples; what isn't in memory is made ahead of time."""
        if self.is_kept:
            yield from map(self.take, parts)
            return
        yield from made_ahead(self.take, parts)

    @cached_property
    def labels(self) -> Tensor | None:
        """Return class numbers, int64 (N,), if targets are such; it may take going through all samples."""
        found = []
        for part in torch.arange(self.count).split(self.size):
            numbers = class_numbers_in(targets_of(self.take(part)), len(part))
            if numbers is None:
                return None
            found.append(numbers)
        return torch.cat(found)

    @property
    def known_labels(self) -> Tensor | None:
        """Return class numbers if they are at hand without reading all samples; the same whatever was read before."""
        return self.labels

    @cached_property
    def is_even(self) -> bool:
        """Say whether any samples can be put into one batch: those at both ends and in the middle are of the same shapes."""
        ends = [self.take(torch.tensor([number])) for number in (0, self.count // 2, self.count - 1)]
        shapes = {tuple((leaf.shape[1:], leaf.dtype) for leaf in leaves(batch)) for batch in ends}
        return len(shapes) == 1 and divides(ends[0])

    @cached_property
    def nbytes(self) -> int:
        """Return the bytes that all samples take in memory, about."""
        few = torch.arange(min(PROBED, self.count))
        return bytes_of(self.take(few)) * self.count // len(few)


class Columns(Source):
    """Samples in a structure of tensors, lists and other things with an entry for each sample, such as files."""

    def __init__(self, batch: Batch, called: str = "the data") -> None:
        """Take a batch of all samples.

        Args:
            batch: Tensors (N, ...), lists of N entries, or what gives its entries by index.
            called: What they are called in messages.
        """
        self.batch = batch
        self.called = called
        self.count = length(batch)
        self.is_kept = not any(map(is_lazy, columns(batch)))

    @cached_property
    def labels(self) -> Tensor | None:
        """Return class numbers, if targets are such."""
        return class_numbers_in(targets_of(without_files(self.batch)), self.count)

    def take(self, index: Tensor) -> Batch:
        """Return a batch of the samples of these indices."""
        return each_column(self.batch, lambda column: entries(column, index))

    def subset(self, index: Tensor) -> Columns:
        """Return the samples of these indices alone; files stay undecoded."""

        def part(column: Any) -> Any:
            if is_lazy(column) and hasattr(column, "subset"):
                return column.subset(index)
            return entries(column, index)

        made = Columns(each_column(self.batch, part), self.called)
        made.is_of_list = self.is_of_list
        return made

    def kept(self, most: int) -> Source:
        """Return the samples as they are: files are decoded when they are looked at."""
        return self


class Items(Source):
    """The samples of a map-style data set, put together by a function."""

    def __init__(
        self,
        dataset: Any,
        called: str,
        *,
        index: Tensor | None = None,
        collate: Callable[[list[Any]], Batch] | None = None,
        size: int = BATCH,
        workers: Mapping[str, Any] | None = None,
    ) -> None:
        """Take a data set.

        Args:
            dataset: Has a length, and gives samples by index.
            called: What it is called in messages.
            index: Which of its samples, in which order; None: all.
            collate: Makes a batch of a list of samples; None: as torch does.
            size: Samples of a batch.
            workers: Options of a DataLoader whose processes read samples; None: they are read here.

        Raises:
            ValueError: In one sentence, for samples that can't be read or put together.
        """
        self.dataset = dataset
        self.called = called
        if index is None:
            index = torch.arange(len(dataset))
        self.index = index
        self.count = len(self.index)
        self.collate = collate
        self.size = size
        self.workers = dict(workers or {})
        self.is_kept = isinstance(dataset, list)

    def take(self, index: Tensor) -> Batch:
        """Return a batch of the samples of these indices."""
        return self._together([self._item(number) for number in self.index[index].tolist()])

    def _item(self, number: int) -> Any:
        """Read a sample. Raises ValueError, in one sentence, for whatever the data set raises."""
        try:
            return self.dataset[number]
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(f"{self.called} raised {type(error).__name__} for sample {number} ({reason}): mend it") from error

    def subset(self, index: Tensor) -> Items:
        """Return the samples of these indices alone."""
        made = Items(
            self.dataset,
            self.called,
            index=self.index[index],
            collate=self.collate,
            size=self.size,
            workers=self.workers,
        )
        labels = self.__dict__.get("labels")
        if labels is not None:
            made.__dict__["labels"] = labels[index]
        return made

    def kept(self, most: int) -> Source:
        """Return the samples in memory, if they fit."""
        if self.is_kept:
            return self
        probe = [self._item(number) for number in self.index[:PROBED].tolist()]
        if sum(map(bytes_of, probe)) * self.count > most * len(probe):
            return self
        items = []
        size = 0
        for number in self.index.tolist():
            # Copies: some data sets fill the same memory again.
            items.append(map_tensors(self._item(number), torch.clone))
            size += bytes_of(items[-1])
            if size > most:
                return self
        made = Items(items, self.called, collate=self.collate, size=self.size)
        if "labels" in self.__dict__:
            made.__dict__["labels"] = self.labels
        return made

    def batches(self, parts: Sequence[Tensor]) -> Iterator[Batch]:
        """Yield a batch for each of these parts."""
        processes = self.workers.get("num_workers", 0)
        if self.is_kept or not processes or multiprocessing.current_process().daemon:
            yield from super().batches(parts)
            return
        wanted = [self.index[part].tolist() for part in parts]
        # Own generator: torch's is nobody's to draw from.
        generator = torch.Generator().manual_seed(SEED)
        loader = DataLoader(self.dataset, batch_sampler=wanted, collate_fn=self._together, generator=generator, **self.workers)
        yield from loader

    @property
    def known_labels(self) -> Tensor | None:
        """Return class numbers if samples are in memory, or the data set lists them."""
        if self.is_kept or self._listed() is not None:
            return self.labels
        return None

    def check_same(self) -> None:
        """Raise ValueError, naming the data, if the first samples are others when they are read again."""
        first = torch.arange(min(PROBED, self.count))
        if not self.is_kept and fingerprint(self.take(first)) != fingerprint(self.take(first)):
            raise changed(self.called, "its first samples")

    @cached_property
    def labels(self) -> Tensor | None:
        """Return class numbers, if targets are such: what the data set lists itself, if that is so, or by reading all."""
        few = torch.linspace(0, self.count - 1, min(64, self.count)).long()
        listed = self._listed()
        if listed is not None:
            seen = class_numbers_in(targets_of(self.take(few)), len(few))
            if seen is not None and torch.equal(seen, listed[few]):
                return listed
        elif class_numbers_in(targets_of(self.take(few[:1])), 1) is None:
            return None
        found = []
        for part, batch in self._all_batches():
            numbers = class_numbers_in(targets_of(batch), len(part))
            if numbers is None:
                return None
            found.append(numbers)
        return torch.cat(found)

    def _all_batches(self) -> Iterator[tuple[Tensor, Batch]]:
        parts = torch.arange(self.count).split(self.size)
        return zip(parts, self.batches(parts), strict=True)

    def _listed(self) -> Tensor | None:
        """Return the class numbers that a data set lists beside its samples, as those of torchvision do."""
        listed = getattr(self.dataset, "targets", None)
        if not isinstance(listed, (list, np.ndarray, Tensor)) or len(listed) != len(self.dataset):
            return None
        try:
            numbers = torch.as_tensor(listed)
        except (TypeError, ValueError, RuntimeError):
            return None
        classes = class_numbers_in(numbers, len(numbers))
        if classes is None:
            return None
        return classes[self.index]

    def _together(self, items: list[Any]) -> Batch:
        """Put samples together. Raises ValueError for those that make no batch."""
        try:
            if self.collate is None:
                batch = default_collate([_with_tensors(item) for item in items])
            else:
                batch = self.collate(items)
        except (TypeError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"{self.called} is a Dataset whose entries make no batch ({reason}); they must be tensors or arrays of one "
                "shape, or come with a collate_fn (torch.utils.data.DataLoader)"
            ) from error
        return normal(as_sample(batch, items[0]), self.called)


class Stream(Source):
    """Batches that are gone through from the beginning whenever a sample is asked for.

    They are gone through once when it is made, which tells how many samples there are. Whoever goes through them again finds
    out if they are no longer the same.
    """

    is_indexed = False

    def __init__(self, data: Iterable[Batch], called: str, most: int) -> None:
        """Go through all batches, and keep them if they fit.

        Args:
            data: Gives batches, from the beginning whenever it is asked to.
            called: What it is called in messages.
            most: How many bytes may be kept in memory.

        Raises:
            ValueError: If it gives nothing, gives other data when it is asked again, or can be gone through once only and
                doesn't fit.
        """
        self.data = data
        self.called = called
        self.is_of_list = isinstance(data, list)
        self.selected: Tensor | None = None
        self.given: list[Batch] | None = []
        self.counts: list[int] = []
        self.fingerprints: list[tuple[Any, ...]] = []
        self._read(most)
        self.count = sum(self.counts)
        self.is_kept = self.given is not None
        self.size = max(self.counts, default=BATCH)
        if not self.count:
            raise ValueError(f"{called} gave no samples")

    def _read(self, most: int) -> None:
        batches = iter(self.data)
        once = batches is self.data
        self.__dict__["nbytes"] = 0
        size = 0
        numbers: list[Tensor] | None = []
        for given in batches:
            batch = normal(given, self.called)
            count = length(batch)
            if not count:
                continue  # the last batch of some loaders is empty
            self.counts.append(count)
            self.fingerprints.append(fingerprint(batch))
            if numbers is not None:
                found = class_numbers_in(targets_of(batch), count)
                if found is None:
                    numbers = None
                else:
                    numbers.append(found.clone())
            self.__dict__["nbytes"] += bytes_of(batch)
            if self.given is None:
                continue
            size += bytes_of(batch)
            if size > most:
                self.given = None
                if once:
                    raise ValueError(
                        f"{self.called} can be gone through only once (it is a {type(self.data).__name__}), and doesn't fit "
                        f"into the {show_bytes(most)} that samples may take: give what can be gone through again, such as a "
                        "DataLoader, or more --memory"
                    )
                continue
            # Copies: some loaders fill the same memory again with every batch.
            self.given.append(map_tensors(batch, torch.clone))
        self.__dict__["labels"] = None
        if numbers:
            self.__dict__["labels"] = torch.cat(numbers)
        if not once:
            again = (normal(given, self.called) for given in self.data)
            first = next((batch for batch in again if length(batch)), None)
            if self.fingerprints and (first is None or fingerprint(first) != self.fingerprints[0]):
                raise changed(self.called, "its first batch")

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches as they were given, of the selected samples alone. Raises ValueError if they are others now."""
        if self.given is not None:
            yield from self._chosen(self.given)
            return
        yield from self._chosen(self._checked())

    def _checked(self) -> Iterator[Batch]:
        seen = 0
        for batch in made_ahead(lambda given: normal(given, self.called), self.data):
            if not length(batch):
                continue
            number = seen
            seen += 1
            if number >= len(self.fingerprints) or fingerprint(batch) != self.fingerprints[number]:
                raise changed(self.called, f"batch {number + 1}")
            yield batch
        if seen != len(self.fingerprints):
            raise changed(self.called, f"{seen} batches instead of {len(self.fingerprints)}")

    def _chosen(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        if self.selected is None:
            yield from batches
            return
        first = 0
        for batch, count in zip(batches, self.counts, strict=True):
            index = self.selected[first : first + count].nonzero().flatten()
            first += count
            if len(index) == count:
                yield batch
            elif len(index):
                yield rows(batch, count, index)

    def shuffled(self, generator: torch.Generator | None) -> Iterator[Batch]:
        """Yield the batches in another order, if they are in memory; those that are streamed come as they come.

        Args:
            generator: Shuffles; None: in order.
        """
        if self.given is None or generator is None:
            yield from self
            return
        batches = list(self)
        for number in torch.randperm(len(batches), generator=generator).tolist():
            yield batches[number]

    def sizes(self) -> list[int]:
        """Count the samples of every batch that iterating gives."""
        if self.selected is None:
            return self.counts
        return [found for part in self.selected.split(self.counts) if (found := int(part.sum()))]

    def take(self, index: Tensor) -> Batch:
        """Return the samples of these indices, in this order, going through all up to the last of them.

        Raises ValueError for samples of several batches that can't be put together, such as sentences of other lengths.
        """
        wanted, order = index.sort()
        found = []
        first = 0
        for batch, count in zip(self, self.sizes(), strict=False):
            inside = wanted[(wanted >= first) & (wanted < first + count)] - first
            if len(inside):
                found.append(rows(batch, count, inside))
            first += count
            if not len(wanted) or first > int(wanted[-1]):
                break
        together = joined(found, self.called)
        return rows(together, len(index), order.argsort())

    def batches(self, parts: Sequence[Tensor]) -> Iterator[Batch]:
        """Yield a batch for each of these parts; those that are asked for in order are read in one pass."""
        if self.given is not None or not _ascending(parts):
            yield from super().batches(parts)
            return
        yield from self._in_one_pass(parts)

    def _in_one_pass(self, parts: Sequence[Tensor]) -> Iterator[Batch]:
        waiting = deque(parts)
        held: list[tuple[int, int, Batch]] = []  # where it begins, how many there are, and the batch
        first = 0
        for batch, count in zip(self, self.sizes(), strict=True):
            held.append((first, count, batch))
            first += count
            while waiting and int(waiting[0][-1]) < first:
                part = waiting.popleft()
                held = [one for one in held if one[0] + one[1] > int(part[0])]
                found = []
                for begin, count_of_one, one in held:
                    inside = part[(part >= begin) & (part < begin + count_of_one)] - begin
                    if len(inside):
                        found.append(rows(one, count_of_one, inside))
                yield joined(found, self.called)
            if not waiting:
                # Going on to the end finds out whether all is the same.
                held = []

    def subset(self, index: Tensor) -> Stream:
        """Return the samples of these indices alone, in the order in which they come."""
        made = object.__new__(Stream)
        made.__dict__.update(self.__dict__)
        selected = torch.zeros(sum(self.counts), dtype=torch.bool)
        everything = torch.arange(len(selected))
        if self.selected is not None:
            everything = everything[self.selected]
        selected[everything[index]] = True
        made.selected = selected
        made.count = int(selected.sum())
        labels = self.known_labels
        if labels is not None:
            made.__dict__["labels"] = labels[index.sort().values]
        return made

    def kept(self, most: int) -> Stream:
        """Return it as it is: what fits was kept when it was made."""
        return self


def source_of(data: Any, called: str, most: int, *, is_pair: bool = False) -> Source:
    """Make a source of whatever a user has.

    Args:
        data: A tensor or an array of inputs, a mapping of such, or a pair (inputs, targets); a map-style Dataset, or whatever
            else has a length and gives samples by index, such as those of Hugging Face; a list of samples with a number as
            target each; a DataLoader; an IterableDataset; or any other iterable of batches.
        called: What it is called in messages.
        most: How many bytes of it may be kept in memory.
        is_pair: Whether a tuple or list of two can be nothing but (inputs, targets), and not two batches.

    Returns:
        Where samples come from, in memory if they fit.

    Raises:
        TypeError: For what gives no samples.
        ValueError: For what gives none, or others each time.
    """
    if isinstance(data, Source):
        return data
    if _is_whole(data) or (is_pair and isinstance(data, (tuple, list)) and len(data) == 2):
        return _columns_of(data, called)
    if isinstance(data, DataLoader):
        return _of_loader(data, called, most)
    if isinstance(data, TorchDataset) and not isinstance(data, IterableDataset):
        return _opened(Items(data, called), most)
    if isinstance(data, IterableDataset):
        data = DataLoader(data, BATCH)
    if gives_samples(data):
        return _opened(Items(data, called), most)
    if not hasattr(data, "__iter__") and not hasattr(data, "__getitem__"):
        raise TypeError(
            f"{called} is {_shown(data)}; it must be a tensor, a pair (inputs, targets) of tensors, a Dataset, a DataLoader, "
            "or an iterable of batches"
        )
    return _together_if_possible(Stream(data, called, most))


def gives_samples(data: Any) -> bool:
    """Say whether data is a data set that gives samples by index, or a list of samples, and not of batches.

    A batch has a target for each of its samples, so that one number is the target of a single sample.
    """
    if isinstance(data, Sequence):
        return len(data) > 0 and _is_one_number(targets_of(data[0]))
    return isinstance(data, Sized) and hasattr(data, "__getitem__")


def _is_one_number(targets: Any) -> bool:
    if isinstance(targets, Tensor):
        return targets.dim() == 0
    return is_number(targets)


def _together_if_possible(stream: Stream) -> Source:
    """Put kept batches into one, if that can be done."""
    if stream.given is None or not all(map(divides, stream.given)):
        return stream
    shapes = {tuple((shape[1:], kind) for shape, kind, _ in one) for one in stream.fingerprints}
    if len(shapes) > 1:
        return stream
    made = Columns(joined(stream.given, stream.called), stream.called)
    made.size = stream.size
    made.is_of_list = stream.is_of_list
    return made


def _opened(items: Items, most: int) -> Source:
    if not items.count:
        raise ValueError(f"{items.called} gave no samples")
    items.check_same()
    return items.kept(most)


def _of_loader(loader: DataLoader[Any], called: str, most: int) -> Source:
    """Read a loader's data set in order where its own order is a plain one, and its batches as they come where it isn't."""
    index = _plain_order(loader)
    if index is None:
        return _together_if_possible(Stream(loader, called, most))
    workers: dict[str, Any] = {"num_workers": loader.num_workers}
    if loader.num_workers:
        workers |= {"worker_init_fn": loader.worker_init_fn, "multiprocessing_context": loader.multiprocessing_context}
    collate = loader.collate_fn
    items = Items(loader.dataset, called, index=index, collate=collate, size=loader.batch_size or BATCH, workers=workers)
    return _opened(items, most)


def _plain_order(loader: DataLoader[Any]) -> Tensor | None:
    """Return the indices that a loader goes through, if it goes in order or shuffles them; None if it has ways of its own."""
    sampler = loader.sampler
    usual = type(loader).__iter__ is DataLoader.__iter__ and type(loader.batch_sampler) is BatchSampler
    if not usual or isinstance(loader.dataset, IterableDataset) or not isinstance(loader.dataset, Sized):
        return None
    count = len(loader.dataset)
    if type(sampler) is SequentialSampler:
        return torch.arange(count)
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == count:
        return torch.arange(count)
    if type(sampler) is SubsetRandomSampler:
        return torch.as_tensor(list(sampler.indices), dtype=torch.long)
    return None


def _with_tensors(sample: Any) -> Any:
    """Return a sample that is a mapping, such as those of Hugging Face, with tensors in place of lists of numbers."""
    if not isinstance(sample, Mapping):
        return sample
    found = {}
    for key, value in sample.items():
        if isinstance(value, list) and value and all(map(is_number, value)):
            value = torch.tensor(value)
        found[key] = value
    return found


def made_ahead(make: Callable[[Any], Any], parts: Iterable[Any], ahead: int = AHEAD) -> Iterator[Any]:
    """Yield what a function makes of each part, in order; a thread makes the next ones while one is looked at.

    One thread alone, as data sets of others may not be made for several.

    Args:
        make: The function.
        parts: What it is given; the thread goes through them too.
        ahead: How many are made in advance.

    Returns:
        What was made, one after the other.
    """
    following = iter(parts)
    end = object()

    def one() -> Any:
        part = next(following, end)
        if part is end:
            return end
        return make(part)

    with ThreadPoolExecutor(1) as thread:
        waiting: deque[Future[Any]] = deque(thread.submit(one) for _ in range(ahead))
        try:
            while True:
                made = waiting.popleft().result()
                if made is end:
                    return
                waiting.append(thread.submit(one))
                yield made
        finally:
            for future in waiting:
                future.cancel()


def _ascending(parts: Sequence[Tensor]) -> bool:
    """Say whether indices only grow, from part to part."""
    index = torch.cat([*parts, torch.zeros(0, dtype=torch.long)])
    return bool((index.diff() > 0).all())


def _is_whole(data: Any) -> bool:
    """Say whether data are all samples at once: inputs, or a pair of inputs and targets, in tensors or arrays."""
    if is_array(data) or isinstance(data, Mapping):
        return True
    if not isinstance(data, tuple) or len(data) != 2:
        return False
    inputs, targets = data
    if is_array(targets):
        # A tuple of batches looks alike, where each is a tensor: these are a pair, as they have always been.
        return is_array(inputs) or isinstance(inputs, (Mapping, tuple))
    if isinstance(targets, Mapping):
        return not isinstance(inputs, Mapping) or set(inputs) != set(targets)
    # Boxes of each picture, and the like.
    return isinstance(targets, list) and bool(targets) and all(isinstance(one, Mapping) for one in targets)


def _columns_of(data: Any, called: str) -> Columns:
    """Take all samples at once. Raises ValueError for parts of different length."""
    batch = normal(data, called)
    if isinstance(batch, tuple) and isinstance(batch[1], list) and all(map(is_number, batch[1])):
        batch = (batch[0], torch.tensor(batch[1]))
    made = Columns(batch, called)
    lengths = {len(column) for column in columns(batch) if not isinstance(column, Tensor) or column.dim()}
    if len(lengths) > 1:
        few, many = min(lengths), max(lengths)
        raise ValueError(f"{called} has parts of {few:,} and of {many:,} samples; it must have as many of each")
    if not made.count:
        raise ValueError(f"{called} gave no samples")
    return made


def changed(called: str, what: str) -> ValueError:
    """Make the error for data that are others when they are read again.

    Args:
        called: What the data are called.
        what: What is another.
    """
    return ValueError(
        f"{called} gives other data each time it is read ({what} differs from the first time): policies can be held against "
        "each other on the same samples only, so leave shuffling and random augmentation out"
    )


def _shown(value: Any) -> str:
    """Show a value on one line, in few words."""
    words = " ".join(repr(value).split())
    if len(words) > 60:
        return f"a {type(value).__name__}"
    return words
