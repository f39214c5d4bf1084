"""The processor that kernels are compiled for, and what its instructions can do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Cpu:
    """A target of TVM's LLVM backend, as the JSON of its dictionary, and the number of threads."""

    target_json: str
    threads: int = 1

    @staticmethod
    def host(threads: int = 1) -> Cpu:
        """This very machine."""
        from tvm.target import codegen

        return Cpu.of({"kind": "llvm", "mcpu": codegen.llvm_get_system_cpu()}, threads)

    @staticmethod
    def of(target: dict[str, Any] | str, threads: int = 1) -> Cpu:
        """A target as a dictionary such as {"kind": "llvm", "mcpu": "znver4"}, as the JSON of one, or a processor's name.

        Raises ValueError, saying why, for one that TVM doesn't take.
        """
        import tvm
        from tvm.target import codegen

        if isinstance(target, str):
            try:
                target = json.loads(target) if target.lstrip().startswith("{") else {"kind": "llvm", "mcpu": target}
            except json.JSONDecodeError as reason:
                raise ValueError(f"the target {target!r} is neither a processor's name nor JSON: {reason}") from None
        assert isinstance(target, dict)
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise ValueError(f"threads must be a positive integer, not {threads!r}")
        if target.get("kind") != "llvm":
            raise ValueError(f"the target {json.dumps(target)} must be of kind llvm")
        try:
            made = tvm.target.Target(target)
        except Exception as reason:
            raise ValueError(f"TVM refuses the target {json.dumps(target)}: {str(reason).strip().splitlines()[-1]}") from None
        # LLVM would take an unknown processor for a generic one.
        known = {str(name) for name in codegen.llvm_get_cpu_archlist(tvm.target.Target(_without_cpu(target)))}
        if "mcpu" in target and target["mcpu"] not in known:
            raise ValueError(
                f"TVM refuses the target {json.dumps(target)}: LLVM knows no processor {target['mcpu']!r} of that kind"
            )
        del made
        return Cpu(json.dumps(target, sort_keys=True), threads)

    @property
    def target(self) -> dict[str, Any]:
        made: dict[str, Any] = json.loads(self.target_json)
        return made

    def has(self, feature: str) -> bool:
        """Whether LLVM may use a feature, by its name there, such as avx512vnni or dotprod."""
        import tvm
        from tvm.target import codegen

        return bool(codegen.target_has_features(feature, tvm.target.Target(self.target)))

    @cached_property
    def dot(self) -> str:
        """How four products of bytes are summed: at once by `vnni` (unsigned by signed) or `sdot` (signed by signed), two of
        16 bits at a time by `madd` (any x86), or by `plain` multiplications."""
        if self.has("avx512vnni"):
            return "vnni"
        return "sdot" if self.has("dotprod") else "madd" if self.has("sse2") else "plain"

    @cached_property
    def madd(self) -> tuple[str, int]:
        """The instruction that multiplies 16-bit numbers and adds pairs, by LLVM's name, and how many sums it makes."""
        if self.has("avx512bw"):
            return "llvm.x86.avx512.pmaddw.d.512", 16
        return ("llvm.x86.avx2.pmadd.wd", 8) if self.has("avx2") else ("llvm.x86.sse2.pmadd.wd", 4)

    @cached_property
    def vectors(self) -> int:
        """How many vectors of 16 sums its registers hold."""
        return 32 if self.has("avx512f") else 8

    @cached_property
    def gathers_signs(self) -> bool:
        """Whether one instruction takes the top bits of 32 bytes."""
        return self.has("avx2")


def _without_cpu(target: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in target.items() if key not in ("mcpu", "mattr")}
