"""Which device computes, in which precision and memory layout: decided once, by what the machine has."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


def best_device() -> torch.device:
    """A CUDA GPU when there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is computed in hardware; emulated bf16 on an older CPU is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = ("avx512_bf16", "amx_bf16")
    return any(torch.cpu.get_capabilities().get(flag, False) for flag in flags)


def autocast(device: torch.device) -> AbstractContextManager[object]:
    """bf16 autocast where the hardware has bf16, else plain float32."""
    if has_fast_bf16(device):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()


@contextmanager
def fast_math(device: torch.device) -> Iterator[None]:
    """Switches for heavy work, put back afterwards: denormals, which stall a CPU, are flushed; a GPU may use TF32."""
    torch.set_flush_denormal(True)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_flush_denormal(False)
