"""Where the image encoder may run in bfloat16. The inner descent and the loss run in float32 everywhere."""

from __future__ import annotations

import torch

# instruction sets with bfloat16 products; without one of them a CPU emulates bfloat16 and is slower than in float32
NATIVE = ("avx512_bf16", "amx_bf16", "avx10_2", "sve_bf16")


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively; False where torch is too old to say."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name, False) for name in NATIVE)


def encoder_autocast(device: torch.device) -> torch.autocast:
    """The context in which evaluation runs a model: bfloat16 for the encoder on a GPU, float32 on a CPU."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def training_precision(accelerator: str) -> str:
    """Lightning's name of the precision for an accelerator option: bfloat16 for the encoder where that is native."""
    gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return "bf16-mixed" if (torch.cuda.is_bf16_supported() if gpu else cpu_has_bfloat16()) else "32-true"
