"""The model that a server answers with, and how it is exchanged while requests come in.

A request takes the model once and keeps it until it is answered, so an exchange is one assignment: what is under way
ends on the old model, what comes later meets the new one, and the old one goes when the last request lets it go.
"""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from flawsmith.errors import FlawsmithError, UserError
from flawsmith.inference.predictor import Predictor

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Loaded:
    """A model ready to answer, and its version in the registry ("" for a file)."""

    predictor: Predictor
    version: str = ""


class Source(Protocol):
    """Where models come from."""

    def newest(self) -> str:
        """Return a mark that changes whenever the model does. Cheap: it is asked for again and again.

        Raises:
            UserError: there is no model now.
        """

    def load(self, mark: str) -> Loaded:
        """Load the model of a mark.

        Raises:
            UserError: it is gone or damaged.
        """


class FileSource:
    """A `model.onnx` of the export stage; putting another in its place exchanges the model."""

    def __init__(self, path: Path, threads: int | None = None, provider: str | None = None) -> None:
        self._path, self._threads, self._provider = path, threads, provider

    def newest(self) -> str:
        """Return a mark made of the file's inode, size and time."""
        try:
            found = self._path.stat()
        except OSError as error:
            raise UserError(f"{self._path} does not exist; pass the model.onnx of the export stage.") from error
        return f"{found.st_ino}-{found.st_size}-{found.st_mtime_ns}"

    def load(self, mark: str) -> Loaded:
        """Load the file as it is now."""
        predictor = Predictor(self._path, self._threads, provider=self._provider)
        return Loaded(predictor)


class RegistrySource:
    """The champion of a category in MLflow's registry; promoting or rolling back exchanges the model."""

    def __init__(self, root: Path, category: str, threads: int | None = None, provider: str | None = None) -> None:
        from flawsmith.registry.store import Registry

        self._registry, self._threads, self._provider = Registry(root, category), threads, provider

    def newest(self) -> str:
        """Return the champion's version."""
        version = self._registry.champion()
        if not version:
            raise UserError(f"{self._registry.model} has no champion; run `flawsmith promote`.")
        return version

    def load(self, mark: str) -> Loaded:
        """Download a version and check that its model is the one that was registered."""
        expected = self._registry.version(mark).digest
        with self._registry.download(mark) as folder:
            predictor = Predictor(folder / "model.onnx", self._threads, provider=self._provider)
        if predictor.digest != expected:
            raise UserError(
                f"model.onnx of version {mark} of {self._registry.model} is not the file that was registered "
                "(its digest differs); register the model again."
            )
        return Loaded(predictor, mark)


class ModelSlot:
    """Holds the present model and follows its source.

    Args:
        source: where models come from.
        seconds: between two looks at the source.
        on_change: called with the model after an exchange, with None after an exchange that failed.
    """

    def __init__(
        self, source: Source, seconds: float, on_change: Callable[[Loaded | None], None] = lambda loaded: None
    ) -> None:
        self._source, self._seconds, self._on_change = source, seconds, on_change
        self.current: Loaded | None = None  # the model to answer with; None before there is one
        self._mark = ""
        self._refused = ""  # why the newest model cannot be used: it is tried again, but complained of once
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def refresh(self) -> bool:
        """Look at the source once; return whether the model was exchanged.

        Raises:
            FlawsmithError: there is no model, or it cannot be used; the present one stays.
        """
        mark = self._source.newest()
        if mark == self._mark:
            return False
        loaded = self._source.load(mark)
        image = np.zeros((3, *loaded.predictor.input_shape), np.float32)
        loaded.predictor.predict([image])  # allocates, and fails now if it would later
        self.current, self._mark, self._refused = loaded, mark, ""
        self._on_change(loaded)
        return True

    def start(self) -> None:
        """Load the first model and follow the source from then on, until `stop`.

        Raises:
            FlawsmithError: there is no first model.
        """
        self.refresh()
        self._thread = threading.Thread(target=self._follow, name="model", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Follow no more."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _follow(self) -> None:
        while not self._stop.wait(self._seconds):
            try:
                if self.refresh() and self.current is not None:
                    log.info("now answering with %s", self.current.version or self.current.predictor.digest[:12])
            except Exception as error:  # whatever befalls the store, the present model goes on answering
                reason = str(error) if isinstance(error, FlawsmithError) else f"{type(error).__name__}: {error}"
                if reason != self._refused:
                    self._refused = reason
                    self._on_change(None)
                    log.warning("the present model stays: %s", " ".join(reason.split()))
