"""An exported network in onnxruntime, without threshold or verdict. `Predictor` and the evaluate stage score with it.

No torch, so that it runs on a small machine at the line.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from flawsmith.errors import FlawsmithError, UserError
from flawsmith.files import restore
from flawsmith.inference import providers
from flawsmith.inference.metadata import INPUT_NAME, OUTPUT_NAMES


class Network:
    """An ONNX file as a function of batches.

    Args:
        path: a file that `export.onnx` wrote, with or without metadata.
        threads: CPU threads of one run; None leaves the choice to onnxruntime (one a physical core).
        provider: where to compute, one of `providers.CHOICES`; None leaves it to the environment and the machine.

    Attributes:
        provider: where it really computes.
        input_shape: height and width in pixels of the images that it takes.
        digest: SHA-256 of the very bytes that were loaded, whatever becomes of the file.

    Raises:
        UserError: the file is missing, no ONNX model, or has another interface than flawsmith's; or the provider
            demanded is not there.
    """

    def __init__(self, path: Path, threads: int | None = None, provider: str | None = None) -> None:
        if threads is not None and threads < 1:
            raise UserError(f"threads is {threads}; it must be 1 or more.")
        content = _read(path)
        self.digest = hashlib.sha256(content).hexdigest()
        self._session, self.provider = _open(content, path, threads, provider)
        self.properties: Mapping[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.input_shape = _input_shape(self._session, path)

    def run(self, batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Images `(B, 3, H, W)` in [0, 1] to anomaly maps `(B, H, W)` and scores `(B,)`, higher = more anomalous.

        Raises:
            FlawsmithError: the network answers with NaN or infinity, which no threshold could judge; or it cannot be
                run where it computes (a GPU has too little memory).
        """
        feed = {INPUT_NAME: np.ascontiguousarray(batch, np.float32)}
        try:
            maps, scores = self._session.run(list(OUTPUT_NAMES), feed)  # (B, 1, H, W), (B,)
        except Exception as error:  # as in `_open`
            reason = " ".join(str(error).split())[:300]
            raise FlawsmithError(
                f"The model failed on {len(batch)} images on {self.provider} ({reason}); score fewer at once (a "
                f"smaller batch), or compute elsewhere ({providers.VARIABLE})."
            ) from error
        if not (np.isfinite(maps).all() and np.isfinite(scores).all()):
            raise FlawsmithError("The model answered with NaN or infinity; export it again and check its certificate.")
        return maps[:, 0], scores


def _read(path: Path) -> bytes:
    if not path.is_file():
        restore(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist or is no file; pass the model.onnx of the export stage.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}); check its permissions.") from error


def _open(content: bytes, path: Path, threads: int | None, provider: str | None) -> tuple[Any, str]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = providers.SILENT
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return providers.open_session(content, options, provider)
    except UserError:
        raise
    except Exception as error:  # onnxruntime raises a class of its own for each status, all derived from Exception
        reason = " ".join(str(error).replace(str(path), "the file").split())
        raise UserError(f"{path} cannot be loaded as an ONNX model ({reason}); export the model again.") from error


def _input_shape(session: Any, path: Path) -> tuple[int, int]:
    inputs = {item.name: item.shape for item in session.get_inputs()}
    outputs = {item.name for item in session.get_outputs()}
    if list(inputs) != [INPUT_NAME] or not outputs.issuperset(OUTPUT_NAMES):
        raise UserError(
            f"{path} takes {sorted(inputs)} and gives {sorted(outputs)}, not `{INPUT_NAME}` and "
            f"{list(OUTPUT_NAMES)}; use the model.onnx of the export stage."
        )
    match inputs[INPUT_NAME]:
        case [str(), 3, int(height), int(width)]:
            return height, width
        case other:
            raise UserError(
                f"{path} takes images of shape {other}, not (batch, 3, height, width); export the model again."
            )
