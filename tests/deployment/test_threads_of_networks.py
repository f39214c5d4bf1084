"""Several threads compute what one does, bit for bit, and there are as many as were asked for."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import quantizers as Q
from haq import deploy
from hw_models.tvm_cpu.builder import Shares
from hw_models.tvm_cpu.target import CpuTarget
from tests.deployment.test_deployment import chosen_unmeasured, small

tvm = pytest.importorskip("tvm")


@pytest.fixture(autouse=True)
def unmeasured() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CpuTarget, "fastest", chosen_unmeasured)
        yield


@pytest.mark.parametrize(("w", "a"), [(8, 8), (1, 3)])
def test_networks_are_equal_for_any_number_of_threads(w: int, a: int, tmp_path: Path) -> None:
    """To be compiled, a network must compute what its integer program does; several images show what a race would."""
    network, images = small()
    quantized = Q.quantize(network, Q.BitPolicy.uniform(network, w=w, a=a), calibrate=images).eval()
    expected = deploy.to_tvm(quantized, images, tmp_path / "1")(images.numpy())
    for threads in (2, 3):
        deployed = deploy.to_tvm(quantized, images, tmp_path / str(threads), threads=threads)
        for _ in range(5):
            assert np.array_equal(deployed(images.numpy()), expected)
        assert tvm.get_global_func("runtime.NumThreads")() >= min(threads, os.cpu_count() or 1)


def test_other_settings_do_not_take_threads_away() -> None:
    """OMP_NUM_THREADS is for others; by itself TVM takes it, and else one thread for two processors."""
    code = (
        "import tvm\n"
        "from hw_models.tvm_cpu.cpu import use_threads\n"
        "threads = tvm.get_global_func('runtime.NumThreads')\n"
        "use_threads(1)\nfirst = threads()\nuse_threads(2)\nprint(first, threads())"
    )

    def printed(**environment: str) -> str:
        inherited = {name: value for name, value in os.environ.items() if not name.endswith("NUM_THREADS")}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=inherited | environment, check=True, capture_output=True, text=True).stdout

    assert printed(OMP_NUM_THREADS="1") == "1 2\n"
    assert printed(TVM_NUM_THREADS="1") == "1 1\n"


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_shares_are_complete_and_even(threads: int) -> None:
    rng = np.random.default_rng(threads)
    for _ in range(200):
        loops = tuple((int(rng.integers(1, 9)), int(rng.integers(1, 7))) for _ in range(rng.integers(1, 4)))
        shares = Shares(loops, threads)
        for loop, (rounds, _) in enumerate(loops):
            bounds = [shares.first(loop, thread) for thread in range(threads + 1)]
            assert bounds[0] == 0
            assert bounds[-1] == rounds
            assert bounds == sorted(bounds)
        total = sum(rounds * cost for rounds, cost in loops)
        most = max(cost for _, cost in loops)
        # No thread has more than its part and one round.
        assert total / shares.gain <= total / threads + most
    assert Shares(((4, 3), (1, 1)), 2).gain == pytest.approx(13 / 7)
    assert Shares(((1, 5),), 2).gain == 1
