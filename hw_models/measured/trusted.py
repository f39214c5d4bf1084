"""Timings that can be trusted, although other programs use the machine now and then.

What is timed is called a kernel here, whoever computes it. A reference kernel, always the same, is timed before and after
every group of kernels. If it is slower than it ever was, or the readings of a kernel are scattered, the machine was busy:
those kernels are measured again, a few times, and what is no better then is marked. Of what the cache holds, a few kernels
are timed again at every start.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Generic, TypeVar

from hw_models.measured.cache import TimingCache
from hw_models.measured.timing import Say, Timing

Kernel = TypeVar("Kernel", bound=Hashable)
Shape = TypeVar("Shape", bound=Hashable)

OFF = 0.10  # relative: the reference, and what the cache holds, may differ by so much
SPREAD = 0.25  # of the median: the interquartile range of a kernel's readings
AGAIN = 2  # times that a group of kernels is measured again
MOST_AGAIN = 20  # groups measured again in one start: a busy machine ends with a warning
SAMPLE = 4  # kernels of the cache that are timed again at a start
REFERENCE = "reference"  # its name in the cache

# What this process has measured or checked itself, by the path of a cache.
_settled: dict[str, set[str]] = {}


class Trusted(Generic[Kernel]):
    """Measures kernels unless the cache has them, and says which times are to be trusted."""

    def __init__(
        self,
        cache: TimingCache,
        text: Callable[[Kernel], str],
        measure: Callable[[Say, list[Kernel]], Mapping[Kernel, Timing]],
        reference: Callable[[], Callable[[], float]],
    ) -> None:
        """Read the cache.

        Args:
            cache: Where timings are kept.
            text: Names a kernel there.
            measure: Measures kernels.
            reference: Makes what times the reference kernel, in seconds.
        """
        self._cache = cache
        self._text = text
        self._measure = measure
        self._make_reference = reference
        self._known = cache.read()
        self._settled = _settled.setdefault(str(cache.path), set())
        self._forgotten: set[str] = set()  # still in the file
        self._left = MOST_AGAIN
        self.unchecked = False  # whether a check told nothing, as the machine was busy

    def timings(self, say: Say, kernels: Sequence[Kernel]) -> dict[Kernel, Timing]:
        """Return the time of each kernel; what isn't known, or not to be trusted and not tried yet, is measured."""
        missing = [kernel for kernel in kernels if self._text(kernel) not in self._known]
        doubtful = [kernel for kernel in kernels if self._is_doubtful(kernel)]
        if not self._left:
            doubtful = []
        if missing or doubtful:
            found = self._measured(say, missing + doubtful)
            self._keep(found)
            if not all(found[kernel].trusted for kernel in doubtful):
                self._left = max(0, self._left - 1)
        return {kernel: self._known[self._text(kernel)] for kernel in kernels}

    def knows(self, kernel: Kernel) -> bool:
        """Say whether a kernel was measured before, by whatever process."""
        return self._text(kernel) in self._known

    def from_before(self, kernel: Kernel) -> bool:
        """Say whether a kernel's time is of another process, and was not checked by this one."""
        return self._text(kernel) in self._known and self._text(kernel) not in self._settled

    def outdated(self, kept: Mapping[Shape, Kernel], say: Callable[[int], Say]) -> list[Shape]:
        """Check what the cache had: time a few kernels again, and a kernel of every shape if one of these is off.

        All kernels of a shape were measured together, so one tells whether the machine was busy then.

        Args:
            kept: A kernel of each shape whose times are of before.
            say: Given the number of kernels to be timed, returns who is told of it.

        Returns:
            The shapes whose times are off.
        """
        shapes = list(kept)
        if not shapes:
            return []

        def differing(some: list[Shape]) -> list[Shape]:
            of_kernel = {kept[shape]: shape for shape in some}
            return [of_kernel[kernel] for kernel in self.differing(say(len(some)), list(of_kernel))]

        if self.was_slow():
            return differing(shapes)
        sample = shapes[:: -(-len(shapes) // SAMPLE)]
        found = differing(sample)
        if found:
            found += differing([shape for shape in shapes if shape not in sample])
        return found

    def differing(self, say: Say, kernels: Sequence[Kernel]) -> list[Kernel]:
        """Time kernels again, and return those that the cache has by more than 10 % too fast or too slow.

        While the machine is busy, nothing can be said against the cache: it is `unchecked`.
        """
        found = self._measured(say, kernels)
        self.unchecked = not all(timing.trusted for timing in found.values())
        trusted = {kernel: timing for kernel, timing in found.items() if timing.trusted}
        return [kernel for kernel, timing in trusted.items() if not _alike(timing, self._known[self._text(kernel)])]

    def settle(self, kernels: Iterable[Kernel]) -> None:
        """Take what the cache has of these kernels for checked."""
        self._settled |= {self._text(kernel) for kernel in kernels}

    def forget(self, kernels: Iterable[Kernel]) -> None:
        """Have these kernels measured again."""
        for kernel in kernels:
            self._known.pop(self._text(kernel), None)
            self._forgotten.add(self._text(kernel))

    def was_slow(self) -> bool:
        """Say whether the reference is faster now than it ever was, so that the cache was filled on a busy machine."""
        if REFERENCE not in self._known:
            return False
        return self._reference() * (1 + OFF) < self._known[REFERENCE].median_s

    def _is_doubtful(self, kernel: Kernel) -> bool:
        """Whether a kernel was measured on a busy machine, by another process."""
        known = self._known.get(self._text(kernel))
        return known is not None and not known.trusted and self._text(kernel) not in self._settled

    def _measured(self, say: Say, kernels: Sequence[Kernel]) -> dict[Kernel, Timing]:
        """Measure kernels, and again where the machine was busy."""
        best = self._once(say, list(kernels))
        for _ in range(AGAIN):
            busy = [kernel for kernel, timing in best.items() if not timing.trusted]
            if not busy or not self._left:
                break
            self._left -= 1
            for kernel, timing in self._once(say, busy).items():
                # Others only ever make a kernel slower.
                if timing.trusted or timing.median_s < best[kernel].median_s:
                    best[kernel] = timing
        return best

    def _once(self, say: Say, kernels: list[Kernel]) -> dict[Kernel, Timing]:
        before = self._reference()
        timings = self._measure(say, kernels)
        readings = (before, self._reference())
        fastest = min(readings)
        if REFERENCE in self._known:
            fastest = min(fastest, self._known[REFERENCE].median_s)
        calm = max(readings) <= (1 + OFF) * fastest
        self._save({REFERENCE: Timing(fastest, 0.0, 1)})
        return {
            kernel: timing._replace(trusted=calm and timing.spread_s <= SPREAD * timing.median_s)
            for kernel, timing in timings.items()
        }

    def _keep(self, measured: Mapping[Kernel, Timing]) -> None:
        """Save timings; where the cache has one that isn't trusted, the better one."""
        kept = {}
        for kernel, timing in measured.items():
            known = self._known.get(self._text(kernel))
            if known is not None and _alike(timing, known):
                timing = known._replace(trusted=known.trusted or timing.trusted)
            elif known is not None and not timing.trusted and known.median_s < timing.median_s:
                timing = known
            kept[self._text(kernel)] = timing
        self._save(kept)
        self._settled |= set(kept)

    def _save(self, timings: Mapping[str, Timing]) -> None:
        changed = {name: timing for name, timing in timings.items() if self._known.get(name) != timing}
        self._forgotten -= set(timings)
        saved = self._cache.save(changed, replacing=True)
        self._known.update({name: timing for name, timing in saved.items() if name not in self._forgotten})

    @cached_property
    def _reference(self) -> Callable[[], float]:
        return self._make_reference()


def _alike(one: Timing, other: Timing) -> bool:
    low, high = sorted((one.median_s, other.median_s))
    return high <= (1 + OFF) * low
