"""Where heavy work runs and in which precision: chosen in one place, for training, sampling and distillation alike.

Both are found by what the machine has, and can be forced: by the section `compute` of params.yaml, or for one call by
FLAWSMITH_DEVICE (auto, cpu, cuda) and FLAWSMITH_PRECISION (auto, float32, bfloat16), which count more.
"""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import get_args

import torch

from flawsmith.config import ComputeSettings, Device, Precision
from flawsmith.errors import UserError

DEVICES, PRECISIONS = get_args(Device), get_args(Precision)
AUTO, FLOAT32, BFLOAT16 = PRECISIONS
BEST = ComputeSettings("auto", "auto")
DEVICE_VARIABLE, PRECISION_VARIABLE = "FLAWSMITH_DEVICE", "FLAWSMITH_PRECISION"


@dataclass(frozen=True)
class Compute:
    """A device, and the precision (float32 or bfloat16) of what may be computed coarsely there."""

    device: torch.device
    precision: str = FLOAT32

    @classmethod
    def choose(cls, settings: ComputeSettings = BEST) -> "Compute":
        """What is asked for, or the best that the machine has: a CUDA GPU, and bfloat16 where it is done in hardware.

        bfloat16 may be forced anywhere: emulated it is slow, but right.

        Raises:
            UserError: the device is not there, or an environment variable says something unknown.
        """
        wanted, told_by = _wanted(DEVICE_VARIABLE, DEVICES, settings.device, "compute.device")
        if wanted == "cuda" and not torch.cuda.is_available():
            raise UserError(
                f"{told_by} is cuda, but torch sees no CUDA GPU here; set it to auto or cpu, or mend the driver "
                "(`flawsmith doctor` tells what torch sees)."
            )
        has_gpu = wanted != "cpu" and torch.cuda.is_available()
        device = torch.device("cuda" if has_gpu else "cpu")
        precision, _ = _wanted(PRECISION_VARIABLE, PRECISIONS, settings.precision, "compute.precision")
        if precision == AUTO:
            precision = BFLOAT16 if has_fast_bf16(device) else FLOAT32
        return cls(device, precision)

    def autocast(self) -> AbstractContextManager[object]:
        """What lies inside may be computed in the precision, layer by layer as torch sees fit."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.precision == BFLOAT16 else nullcontext()

    def exactly(self) -> AbstractContextManager[object]:
        """float32 even inside `autocast`: for what is computed once and kept, whoever asks for it first."""
        return torch.autocast(self.device.type, enabled=False)

    @contextmanager
    def fast_math(self) -> Iterator[None]:
        """Switches for heavy work, put back as they were: denormals, which stall a CPU, are flushed; a GPU may use
        TF32."""
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        before = matmul.allow_tf32, cudnn.allow_tf32
        torch.set_flush_denormal(True)
        if self.device.type == "cuda":
            matmul.allow_tf32 = cudnn.allow_tf32 = True
        try:
            yield
        finally:
            torch.set_flush_denormal(False)
            matmul.allow_tf32, cudnn.allow_tf32 = before

    def describe(self) -> dict[str, str]:
        """For records: the kind of device and the precision."""
        return {"device": self.device.type, "precision": self.precision}


CPU = Compute(torch.device("cpu"))  # plain float32 on the CPU, whatever the machine has


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is computed in hardware; emulated bf16 on an older CPU is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    flags = ("avx512_bf16", "amx_bf16")
    return any(torch.cpu.get_capabilities().get(flag, False) for flag in flags)


def _wanted(variable: str, choices: tuple[str, ...], setting: str, key: str) -> tuple[str, str]:
    """What is asked for, and by whom: the environment variable if it says anything, else the key."""
    value = os.environ.get(variable, "")
    if not value:
        return setting, key
    if value not in choices:
        raise UserError(f"{variable} is `{value}`; it must be one of {', '.join(choices)}.")
    return value, variable
