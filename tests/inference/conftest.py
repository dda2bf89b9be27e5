"""A model whose map is the image's brightness and whose score the map's largest value; the command in this process."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
from line_samples import Score
from toy_onnx import METADATA, write_toy

from flawsmith import cli
from flawsmith.inference.folder import predict_folder
from flawsmith.inference.metadata import ModelMetadata
from flawsmith.inference.options import PredictOptions, PredictReport
from flawsmith.inference.predictor import Predictor


@pytest.fixture(scope="session")
def metadata() -> ModelMetadata:
    return METADATA


@pytest.fixture
def write_model(tmp_path: Path) -> Callable[..., Path]:
    """Write a model; keywords as `write_toy`'s."""
    return lambda **changes: write_toy(tmp_path / "model.onnx", **changes)


@pytest.fixture
def model(write_model: Callable[..., Path]) -> Path:
    return write_model()


@pytest.fixture
def score(model: Path, tmp_path: Path) -> Score:
    def call(*inputs: Path, out: Path | None = None, stdin: int = 0, **options: Any) -> PredictReport:
        chosen = PredictOptions(**options)
        return predict_folder(Predictor(model), inputs or [tmp_path / "in"], out or tmp_path / "out", chosen, stdin)

    return call


@pytest.fixture
def predict(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., "CompletedProcess[str]"]:
    """Call `flawsmith predict ...` in this process."""

    def call(*arguments: object) -> "CompletedProcess[str]":
        monkeypatch.setattr(sys, "argv", ["flawsmith", "predict", *map(str, arguments)])
        monkeypatch.setattr(logging.getLogger("flawsmith"), "handlers", [])  # theirs write to this test's stderr
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return CompletedProcess(sys.argv, int(caught.value.code or 0), *capfd.readouterr())

    return call
