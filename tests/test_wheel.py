"""The package as a machine at the line gets it: a wheel without extras, in an empty environment, on a tree that nobody
may write to, called from elsewhere."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy_onnx import write_toy

ROOT = Path(__file__).parents[1]
MEGABYTES = 450  # of the whole environment; torch alone is ten times that


def pip(*arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources: setuptools writes beside them."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / name)
    pip("wheel", "--quiet", "--no-deps", "--wheel-dir", folder / "dist", folder)
    (made,) = (folder / "dist").glob("*.whl")
    return made


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("empty") / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    pip("--python", folder / "bin" / "python", "install", "--quiet", "-c", ROOT / "constraints.txt", wheel)
    for path in [*folder.rglob("*"), folder]:
        path.chmod(path.stat().st_mode & ~0o222)
    return folder


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """A working directory that cannot be written, and a model and images that cannot either."""
    place = tmp_path / "ro"
    place.mkdir()
    write_toy(place / "model.onnx")
    shutil.copyfile(ROOT / "params.yaml", place / "params.yaml")
    (place / "clip.mp4").touch()
    (place / "parts").mkdir()
    pixels = np.full((48, 64, 3), 40, np.uint8)
    Image.fromarray(pixels).save(place / "parts" / "a.png")
    pixels[12:24, :32] = 220
    Image.fromarray(pixels).save(place / "parts" / "b.png")
    for path in [*place.rglob("*"), place]:
        path.chmod(path.stat().st_mode & ~0o222)
    return place


def call(environment: Path, place: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """`flawsmith ...` as installed, held to the permissions even if root runs the tests, and without this project's
    variables and caches."""
    command = [str(environment / "bin" / "flawsmith"), *map(str, arguments)]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root may write everywhere, and there is no setpriv to give that right up")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all", *command]
    variables = {"PATH": os.environ["PATH"], "HOME": str(place), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True, timeout=300, check=False)


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    package = ROOT / "src"
    ours = {path.relative_to(package).as_posix() for path in (package / "flawsmith").rglob("*") if path.is_file()}
    assert {name for name in ours if "__pycache__" not in name} <= held


def test_the_environment_is_small(environment: Path) -> None:
    size = sum(path.stat().st_size for path in environment.rglob("*") if path.is_file() and not path.is_symlink())
    assert size / 1e6 < MEGABYTES
    packages = {path.name for path in (environment / "lib").glob("python*/site-packages/*")}
    assert not packages & {"torch", "mlflow", "fastapi", "sklearn", "pandas"}


def test_it_predicts_and_writes_nothing_beside_itself(environment: Path, elsewhere: Path, tmp_path: Path) -> None:
    out = tmp_path / "results"
    done = call(environment, elsewhere, "predict", "model.onnx", "parts", "--out", out, "--masks")
    assert (done.returncode, done.stderr) == (0, "")
    assert f"1 good, 1 defective. Computed on cpu. Results: {out}" in done.stdout
    assert [row["verdict"] for row in json.loads((out / "results.json").read_text())["images"]] == ["good", "defective"]
    done = call(environment, elsewhere, "predict", "model.onnx", "parts", "--out", "results")
    (line,) = done.stderr.splitlines()
    assert (done.returncode, line.startswith("flawsmith: ")) == (2, True)
    assert "results" in line
    assert sorted(path.name for path in elsewhere.iterdir()) == ["clip.mp4", "model.onnx", "params.yaml", "parts"]


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["params"], ["doctor"]])
def test_what_explains_it_works(environment: Path, elsewhere: Path, arguments: list[str]) -> None:
    done = call(environment, elsewhere, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("lacks torch" in done.stdout) == (arguments == ["doctor"])


@pytest.mark.parametrize(
    ("arguments", "extra"),
    [
        (["serve", "model.onnx"], "serve"),
        (["ddpm-train", "-c", "plate"], "train"),
        (["validate", "-c", "plate"], "train"),
        (["export", "-c", "plate"], "train"),
        (["monitor", "parts", "-c", "plate"], "train"),
        (["demo-data"], "pipeline"),  # computes with nothing more than `predict`, and is recorded in MLflow
        (["predict", "model.onnx", "clip.mp4", "--out", "results"], "video"),
    ],
)
def test_what_needs_an_extra_names_it(environment: Path, elsewhere: Path, arguments: list[str], extra: str) -> None:
    done = call(environment, elsewhere, *arguments)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 2
    assert f"pip install 'flawsmith[{extra}]'" in line
