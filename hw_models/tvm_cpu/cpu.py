"""The processor that kernels are compiled for, and what its instructions can do."""

from __future__ import annotations

import json
import os
import threading
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from hw_models.measured.processor import kept_processors

_used = threading.local()


def use_threads(threads: int) -> None:
    """Let what the calling thread runs of TVM's compute with so many threads.

    Every thread has a pool of its own, made when it is first needed: as large as TVM_NUM_THREADS says, else OMP_NUM_THREADS,
    else one for two processors. What is asked for beyond that would be ignored without a word. So the pool is made as large as
    the machine, unless TVM_NUM_THREADS says otherwise.
    """
    if getattr(_used, "threads", 0) == threads:
        return
    import tvm

    size = os.environ.get("TVM_NUM_THREADS", "")
    workers = max(threads, os.cpu_count() or 1)
    if size.isdigit():
        workers = max(1, int(size))
    with kept_processors():
        # As many workers as processors are named, whichever these are.
        tvm.get_global_func("runtime.config_threadpool")(1, threads, [str(index) for index in range(workers)])
    _used.threads = threads


@dataclass(frozen=True)
class Cpu:
    """A target of TVM's LLVM backend, as the JSON of its dictionary, and the number of threads."""

    target_json: str
    threads: int = 1

    @staticmethod
    def host(threads: int = 1) -> Cpu:
        """Return this very machine."""
        from tvm.target import codegen

        return Cpu.of({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()}, threads)

    @staticmethod
    def of(target: dict[str, Any] | str, threads: int = 1) -> Cpu:
        """Make one of a dictionary such as {"kind": "llvm", "mcpu": "znver4"}, of its JSON, or of a processor's name.

        Raises ValueError, saying why, for one that TVM doesn't take.
        """
        import tvm
        from tvm.target import codegen

        def refused(reason: object) -> ValueError:
            return ValueError(f"TVM refuses the target {text!r}: {reason}")

        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise ValueError(f"threads must be a positive integer, not {threads!r}")
        text = target
        if not isinstance(text, str):
            text = json.dumps(text)
        content = {"kind": "llvm", "mcpu": text}
        if text.lstrip().startswith("{"):
            try:
                content = json.loads(text)
            except ValueError as error:
                raise refused(f"it is not JSON ({error})") from None
        if content.get("kind") != "llvm":
            raise refused(f"its kind must be 'llvm', not {content.get('kind')!r}")
        try:
            made = tvm.target.Target(content)
        except Exception as error:
            raise refused(str(error).strip().splitlines()[-1].strip()) from None
        # LLVM by itself would go on with a generic processor, and without a feature.
        triple = content.get("mtriple", codegen.llvm_get_system_triple())
        if not codegen.llvm_is_valid_cpu("generic", triple) and not codegen.llvm_is_valid_cpu("generic-rv64", triple):
            raise refused(f"LLVM knows no machine {triple!r}")
        if "mcpu" in content and not codegen.llvm_is_valid_cpu(content["mcpu"], triple):
            raise refused(f"LLVM knows no processor {content['mcpu']!r} for {triple}")
        known = codegen.llvm_get_cpu_features(made)
        for attribute in map(str, content.get("mattr", ())):
            if attribute[:1] not in ("+", "-") or (attribute[0] == "+" and attribute[1:] not in known):
                raise refused(f"LLVM knows no feature {attribute!r} for {triple}")
        return Cpu(json.dumps(content, sort_keys=True), threads)

    @property
    def target(self) -> dict[str, Any]:
        """The target as TVM takes it."""
        made: dict[str, Any] = json.loads(self.target_json)
        return made

    def has(self, feature: str) -> bool:
        """Say whether LLVM may use a feature, by its name there, such as avx512vnni or dotprod."""
        import tvm
        from tvm.target import codegen

        return bool(codegen.target_has_features(feature, tvm.target.Target(self.target)))

    @cached_property
    def dot(self) -> str:
        """How four products of bytes are summed.

        At once by `vnni` (unsigned by signed) or `sdot` (signed by signed), two of 16 bits at a time by `madd` (any x86),
        or by `plain` multiplications.
        """
        if self.has("avx512vnni"):
            return "vnni"
        if self.has("dotprod"):
            return "sdot"
        if self.has("sse2"):
            return "madd"
        return "plain"

    @cached_property
    def madd(self) -> tuple[str, int]:
        """The instruction that multiplies 16-bit numbers and adds pairs, by LLVM's name, and how many sums it makes."""
        if self.has("avx512bw"):
            return "llvm.x86.avx512.pmaddw.d.512", 16
        if self.has("avx2"):
            return "llvm.x86.avx2.pmadd.wd", 8
        return "llvm.x86.sse2.pmadd.wd", 4

    @cached_property
    def vectors(self) -> int:
        """How many vectors of 16 sums its registers hold."""
        if self.has("avx512f"):
            return 32
        return 8

    @cached_property
    def gathers_signs(self) -> bool:
        """Whether one instruction takes the top bits of 32 bytes."""
        return self.has("avx2")
