"""Precision of the image encoder: bfloat16 where it is fast. The inner descent and the loss run in float32."""

import platform
import re
from contextlib import suppress
from pathlib import Path

import torch

# instruction sets with bfloat16 products; other CPUs emulate bfloat16 and are slower than in float32
NATIVE = ("avx512_bf16", "amx_bf16", "avx10_2", "sve_bf16")
# Intel's fast ones, with matrix units: on a Xeon with avx512_bf16 and no AMX the convolutions of a residual trunk took
# 1.8 times as long in bfloat16 as in float32 (45 against 80 GMAC/s on one core, torch 2.14.1)
FAST_ON_INTEL = ("amx_bf16", "avx10_2")


def cpu_capabilities() -> dict[str, object]:
    """Instruction sets and name of this CPU, from `torch.cpu`; empty with an old torch."""
    return torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}


def processor() -> str:
    """Return the name of the processor, as far as the system knows it."""
    with suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found[1].strip()
    return platform.processor() or platform.machine()


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 faster than float32; False with an old torch."""
    capabilities = cpu_capabilities()
    intel = "intel" in str(capabilities.get("cpu_name", "")).lower()
    return any(capabilities.get(name, False) for name in (FAST_ON_INTEL if intel else NATIVE))


def training_precision(accelerator: str) -> str:
    """Lightning's name of the precision for an accelerator option."""
    gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if (torch.cuda.is_bf16_supported() if gpu else cpu_has_bfloat16()) else "32-true"
