"""Dtype of arithmetic: a half-precision model computes in float32 where a CPU multiplies that faster and memory allows.

A CPU without instructions for bfloat16 (AVX512-BF16, AMX) or float16 (AVX512-FP16, AMX-FP16) emulates them: products of
many rows then take 2 to 5 times as long as in float32. Whatever a model computes in, its weights are written in the
dtype of the checkpoint, and an accelerator computes in that dtype.

What x86 processors can do is read from their features, so the answer is the same in every run; on others one product
is timed.
"""

import logging
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from spinquant.compute.memory import available_memory
from spinquant.compute.torchrun import processes_here

HALVES = (torch.bfloat16, torch.float16)
# Share of the available memory that weights may take in float32: activations and logits take memory too.
SHARE = 1 / 2
# Values of ONEDNN_MAX_CPU_ISA that rule out instructions for a dtype.
_NEITHER = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI")
_WITHOUT = {torch.bfloat16: _NEITHER, torch.float16: (*_NEITHER, "AVX512_CORE_BF16")}
_SLOWER = 1.2  # ratio of measured times from which a dtype is slow: below it, the memory that it saves counts

_log = logging.getLogger("spinquant")


@dataclass(frozen=True)
class Arithmetic:
    """The dtype that a model computes in, and why."""

    dtype: torch.dtype
    reason: str

    def __str__(self):
        return f"{named(self.dtype)} ({self.reason})"

    def to_dict(self) -> dict[str, str]:
        """Dtype and reason, ready for JSON."""
        return {"dtype": named(self.dtype), "reason": self.reason}

    @classmethod
    def from_dict(cls, data: Mapping[str, str]) -> "Arithmetic":
        """The choice that another process has made."""
        return cls(getattr(torch, data["dtype"]), data["reason"])


def arithmetic(
    what: str, stored: torch.dtype, numbers: int, device: torch.device | str, *, wanted: torch.dtype | None = None
) -> Arithmetic:
    """Choose the dtype that a model computes in; a choice that a user would not expect is logged (INFO).

    Args:
        what: the model or the work, for the log.
        stored: dtype of the checkpoint.
        numbers: how many weights are in memory at once.
        device: device to compute on.
        wanted: the dtype that the user asks for, which settles it.
    """
    found = _chosen(stored, numbers, torch.device(device), wanted)
    if wanted is None and stored in HALVES and torch.device(device).type == "cpu" and not multiplies_fast(stored):
        other = stored if found.dtype == torch.float32 else torch.float32
        _log.info("%s: computing in %s. --dtype %s overrides", what, found, named(other))
    return found


def _chosen(stored: torch.dtype, numbers: int, device: torch.device, wanted: torch.dtype | None) -> Arithmetic:
    if wanted is not None:
        return Arithmetic(wanted, "as asked")
    if stored not in HALVES:
        return Arithmetic(stored, "the dtype of the checkpoint")
    if device.type != "cpu":
        return Arithmetic(stored, f"the dtype of the checkpoint, on {device.type}")
    name = named(stored)
    if multiplies_fast(stored):
        return Arithmetic(stored, "the dtype of the checkpoint, which this processor multiplies fast")
    needed, there = 4 * numbers * processes_here(), available_memory()
    if needed > SHARE * there:
        return Arithmetic(
            stored,
            f"slow on this processor, which has no instructions for {name}, but weights in float32 would take "
            f"{_gigabytes(needed)} of {_gigabytes(there)} available",
        )
    return Arithmetic(torch.float32, f"faster on this processor, which has no instructions for {name}")


def multiplies_fast(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of a half-precision dtype at least as fast as those of float32."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    if limit in _WITHOUT[dtype]:
        return False
    if platform.machine().lower() in ("x86_64", "amd64"):
        return _has_instructions(dtype)
    return _measured_fast(dtype)


def _has_instructions(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return _asked("_is_avx512_bf16_supported") or _asked("_is_amx_tile_supported")
    capabilities: Callable[[], Any] = getattr(torch.cpu, "get_capabilities", dict)  # torch 2.10 and later
    return _asked("_is_amx_fp16_supported") or bool(capabilities().get("avx512_fp16"))


def _asked(name: str) -> bool:
    return bool(getattr(torch.cpu, name)())


@cache
def _measured_fast(dtype: torch.dtype) -> bool:
    """Whether one product takes no longer in a dtype than in float32; the best of five, some milliseconds each."""
    times = {}
    for kind in (torch.float32, dtype):
        x, weight = torch.ones(256, 1024, dtype=kind), torch.ones(1024, 1024, dtype=kind)
        torch.nn.functional.linear(x, weight)
        spent = []
        for _ in range(5):
            start = time.perf_counter()
            torch.nn.functional.linear(x, weight)
            spent.append(time.perf_counter() - start)
        times[kind] = min(spent)
    return times[dtype] < _SLOWER * times[torch.float32]


def named(dtype: torch.dtype) -> str:
    """The name of a dtype, without the module: float32."""
    return str(dtype).removeprefix("torch.")


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
