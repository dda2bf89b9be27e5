"""A model whose answers are known (the map is the brightness, the score its largest value), and the shipped teacher."""

from collections.abc import Callable
from pathlib import Path

import pytest
from monitoring_samples import METADATA, part
from toy_onnx import write_toy

from flawsmith.config import load_settings
from flawsmith.data.images import write_png
from flawsmith.detector.teacher import Teacher, build_teacher
from flawsmith.inference.predictor import Predictor
from flawsmith.monitoring.config import MonitorSettings
from flawsmith.monitoring.reference import Measurement, measure

SHIPPED = load_settings(Path(__file__).parents[2] / "params.yaml")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("model") / "model.onnx", **vars(METADATA))


@pytest.fixture(scope="session")
def predictor(model: Path) -> Predictor:
    return Predictor(model, threads=1)


@pytest.fixture(scope="session")
def teacher() -> Teacher:
    return build_teacher(SHIPPED.teacher)


@pytest.fixture(scope="session")
def reference(predictor: Predictor, teacher: Teacher) -> Measurement:
    """Of 40 calibration normals."""
    return measure(predictor, teacher, ((f"{index:03d}.png", part(index)) for index in range(40)))


@pytest.fixture(scope="session")
def settings() -> MonitorSettings:
    return SHIPPED.monitor


@pytest.fixture
def shoot(tmp_path: Path) -> Callable[..., Path]:
    """Write a folder of new parts: `count` normal ones under `light`, then `defects` defective ones."""

    def write(name: str, count: int, light: float = 1.0, defects: int = 0) -> Path:
        folder = tmp_path / name
        for index in range(count + defects):
            bad = index >= count
            write_png(folder / f"{index:03d}{'-bad' if bad else ''}.png", part(1000 + index, light, bad))
        return folder

    return write
