"""Which kernel computes a layer fastest at each pair of widths, without measuring what can't win.

A kernel is named by its family, what it is for, and its tile: "bits w1a2 4x4", "packed4 1x8". Any weights and activations of
at most its widths run on it, so the widest kernels are measured first, and a narrower one has to beat them:

 * within a family, more bits are never faster. Once a member is slower than a kernel that serves wider widths, its
   family's members between the two can't win and are left out;
 * a tile that was clearly slower than another of its family at the same widths isn't tried at wider ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from hw_models.measured.timing import Timing
from hw_models.storage import BITS

if TYPE_CHECKING:
    from hw_models.tvm_cpu.kernel import Kernel

SLOWER_TILE = 1.15  # beyond what two readings of the same kernel differ by

Pair = tuple[int, int]


class Choice(NamedTuple):
    """The fastest kernel of a pair of widths and its time."""

    kernel: Kernel
    timing: Timing


def choose(kernels: Iterable[Kernel], measure: Callable[[list[Kernel]], Mapping[Kernel, Timing]]) -> dict[Pair, Choice]:
    """Find the fastest kernel of a layer at each of 64 pairs (weight bits, activation bits), of the candidates of all.

    `measure` is called with a few kernels at a time. More bits never cost less. Raises ValueError for a pair that no kernel
    serves.
    """
    every = list(dict.fromkeys(kernels))
    serial = {_family(kernel) for kernel in every if _widths(kernel) == (1, 1)}

    def work(kernel: Kernel) -> int:
        """Products of single bits: the time of a bit-serial kernel grows with them. What any bits run on comes first."""
        w, a = _widths(kernel)
        if w * a == BITS * BITS and _family(kernel) not in serial:
            return 0
        return w * a

    timed: dict[Kernel, Timing] = {}
    for _, group in groupby(sorted(every, key=work), key=work):
        if wave := [kernel for kernel in group if not _loses(kernel, timed)]:
            timed |= measure(wave)
    return {pair: Choice(*_best(pair, timed)) for pair in _pairs()}


def uncovered(kernels: Iterable[Kernel]) -> list[Pair]:
    """List the pairs of widths that no kernel serves."""
    widths = {(kernel.w_bits, kernel.a_bits) for kernel in kernels}
    return [(w, a) for w, a in _pairs() if not any(w <= most_w and a <= most_a for most_w, most_a in widths)]


def _pairs() -> list[Pair]:
    return [(w, a) for w in range(1, BITS + 1) for a in range(1, BITS + 1)]


def _loses(kernel: Kernel, timed: Mapping[Kernel, Timing]) -> bool:
    """Whether what was measured says that a kernel isn't the fastest at any pair of widths."""
    widths = (kernel.w_bits, kernel.a_bits)
    rivals = [t.median_s for k, t in timed.items() if k.w_bits >= widths[0] and k.a_bits >= widths[1]]
    narrower = {
        k: t.median_s
        for k, t in timed.items()
        if _family(k) == _family(kernel) and k.w_bits <= widths[0] and k.a_bits <= widths[1] and _widths(k) != widths
    }
    if not (rivals and narrower):
        return False
    best = _fastest(narrower)
    slow_tile = any(_tile(k) == _tile(kernel) and t > SLOWER_TILE * best[_widths(k)] for k, t in narrower.items())
    return slow_tile or max(best.values()) >= min(rivals)


def _fastest(seconds: Mapping[Kernel, float]) -> dict[Pair, float]:
    """The time of the best tile at each pair of widths."""
    best: dict[Pair, float] = {}
    for kernel, time in seconds.items():
        best[_widths(kernel)] = min(time, best.get(_widths(kernel), time))
    return best


def _widths(kernel: Kernel) -> Pair:
    return kernel.w_bits, kernel.a_bits


def _family(kernel: Kernel) -> str:
    return kernel.name.split()[0].rstrip("0123456789")


def _tile(kernel: Kernel) -> str:
    return kernel.name.split()[-1]


def _best(pair: Pair, timed: Mapping[Kernel, Timing]) -> tuple[Kernel, Timing]:
    serving = [(kernel, timing) for kernel, timing in timed.items() if kernel.w_bits >= pair[0] and kernel.a_bits >= pair[1]]
    if not serving:
        raise ValueError(f"no kernel serves w{pair[0]}/a{pair[1]}")
    return min(serving, key=lambda choice: choice[1].median_s)
