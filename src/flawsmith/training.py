"""What every training loop shares: the learning rate, the check of the loss, and checkpoints of unfinished training.

A checkpoint is atomic, bound to what it was made with, and loaded without running code. Random draws come from streams
named by the step (see randomness.py), so a checkpoint needs no generator state and a resumed run continues on the very
numbers of one that never stopped.
"""

import logging
import math
import shutil
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flawsmith.errors import FlawsmithError
from flawsmith.files import atomic_file, digest_json
from flawsmith.processes import is_main_process

Rows = list[list[float]]  # one row of logged values a step
CHECKPOINT = "checkpoint.pt"
LONGEST_REASON = 200  # characters

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ResumePoint:
    """A folder for the checkpoint of one training run; `identity` digests the settings and data that made it."""

    folder: Path
    identity: str

    def load(self, parts: Mapping[str, Any]) -> tuple[int, Rows]:
        """Restore `parts` (name → module or optimizer) and return (next step, rows so far); (0, []) for a fresh start.

        A checkpoint of other settings, data or networks, or one that cannot be read, is named in the log and ignored:
        training starts from zero, with every part as it was.
        """
        path = self.folder / CHECKPOINT
        if not path.exists():
            return 0, []
        before = {name: deepcopy(part.state_dict()) for name, part in parts.items()}
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            self._check(state, before, parts)
            for name, part in parts.items():
                part.load_state_dict(state["parts"][name])
        except Exception as error:  # whatever is wrong with it, it is worth no more than none
            for name, part in parts.items():
                part.load_state_dict(before[name])
            reason = " ".join(str(error).split())[:LONGEST_REASON]
            log.log(
                logging.WARNING if is_main_process() else logging.DEBUG,
                "%s is no use (%s): training starts from zero.",
                path,
                reason or type(error).__name__,
            )
            return 0, []
        return state["step"], state["rows"]

    def save(self, parts: Mapping[str, Any], step: int, rows: Rows) -> None:
        """Write the state after `step` steps."""
        state = {
            "identity": self._identity(parts),
            "step": step,
            "rows": rows,
            "parts": {name: part.state_dict() for name, part in parts.items()},
        }
        for left in self.folder.glob(".*.tmp"):  # of a run that was killed
            left.unlink()
        with atomic_file(self.folder / CHECKPOINT) as temporary, temporary.open("wb") as stream:
            torch.save(state, stream)  # to a stream: a full disk is told as such

    def _check(self, state: Any, before: Mapping[str, Any], parts: Mapping[str, Any]) -> None:
        """Raise whatever comes of a state that is not one of `parts`."""
        if state["identity"] != self._identity(parts):
            raise ValueError("it was left by other settings, other data or another network")
        step, rows = state["step"], state["rows"]
        if len(rows) != step or not all(isinstance(value, int | float) for row in rows for value in row):
            raise ValueError("its steps are damaged")
        for name, known in before.items():
            found = state["parts"][name]
            if {key: type(value) for key, value in found.items()} != {key: type(value) for key, value in known.items()}:
                raise ValueError(f"its {name} is damaged")

    def _identity(self, parts: Mapping[str, Any]) -> str:
        """Covers the networks as well: names and shapes of all their values."""
        shapes = {
            name: {key: list(value.shape) for key, value in part.state_dict().items()}
            for name, part in parts.items()
            if isinstance(part, nn.Module)
        }
        return digest_json({"made with": self.identity, "parts": sorted(parts), "shapes": shapes})

    def clear(self) -> None:
        """Remove the checkpoint once the stage's outputs are in place."""
        shutil.rmtree(self.folder, ignore_errors=True)


def check_finite(loss: float, step: int, section: str) -> None:
    """Raise on a loss that is NaN or infinite: everything after it would be noise."""
    if not math.isfinite(loss):
        raise FlawsmithError(
            f"The loss of {section} became {loss} at step {step}; lower `{section}.learning_rate` in params.yaml."
        )


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then half a cosine down to a hundredth of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))
