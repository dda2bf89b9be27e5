"""Checkpoints of unfinished training: atomic, bound to what they were made with, loaded without running code.

Random draws come from streams named by the step (see randomness.py), so a checkpoint needs no generator state and a
resumed run continues on the very numbers of one that never stopped.
"""

import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flawsmith.errors import FlawsmithError
from flawsmith.files import atomic_file

Rows = list[list[float]]  # one row of logged values a step


@dataclass(frozen=True)
class ResumePoint:
    """A folder for the checkpoint of one training run; `identity` digests the settings and data that made it."""

    folder: Path
    identity: str

    def load(self, parts: Mapping[str, Any]) -> tuple[int, Rows]:
        """Restore `parts` (name → module or optimizer) and return (next step, rows so far); (0, []) for a fresh start.

        A checkpoint of other settings or data, or one that cannot be read, is ignored: training starts from zero.
        """
        try:
            state = torch.load(self.folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        except FileNotFoundError:
            return 0, []
        except Exception:  # a damaged file is worth no more than none
            return 0, []
        if state.get("identity") != self.identity or set(state["parts"]) != set(parts):
            return 0, []
        for name, part in parts.items():
            part.load_state_dict(state["parts"][name])
        return int(state["step"]), state["rows"]

    def save(self, parts: Mapping[str, Any], step: int, rows: Rows) -> None:
        """Write the state after `step` steps."""
        state = {
            "identity": self.identity,
            "step": step,
            "rows": rows,
            "parts": {name: part.state_dict() for name, part in parts.items()},
        }
        with atomic_file(self.folder / "checkpoint.pt") as temporary:
            torch.save(state, temporary)

    def clear(self) -> None:
        """Remove the checkpoint once the stage's outputs are in place."""
        shutil.rmtree(self.folder, ignore_errors=True)


def check_finite(loss: float, step: int, section: str) -> None:
    """Raise on a loss that is NaN or infinite: everything after it would be noise."""
    if not math.isfinite(loss):
        raise FlawsmithError(
            f"The loss of {section} became {loss} at step {step}; lower `{section}.learning_rate` in params.yaml."
        )
