"""A real DVC on a small pipeline."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small_settings import write_params

from flawsmith.data.images import write_png

STAGES = """
stages:
  ddpm-train:
    matrix:
      category: ${categories}
    cmd: sh learn.sh
    outs:
      - artifacts/${item.category}/ddpm-train
  validate:
    matrix:
      category: ${categories}
    cmd: sh validate.sh
    deps:
      - artifacts/${item.category}/ddpm-train
    outs:
      - artifacts/${item.category}/validate/verdict.json:
          cache: false
"""
LEARN = "mkdir -p artifacts/steel/ddpm-train; echo weights > artifacts/steel/ddpm-train/model\n"
GOOD = "mkdir -p artifacts/steel/validate; echo '{\"passed\": true}' > artifacts/steel/validate/verdict.json\n"


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages of a category `steel`, as shell scripts that a test may replace, in a git repository with DVC."""
    folder = tmp_path_factory.mktemp("flows") / "project"
    subprocess.run(["git", "init", "--quiet", folder], check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet"], cwd=folder, check=True)
    (folder / ".dvc" / "config").write_text("[core]\n    analytics = false\n    check_update = false\n")
    (folder / "dvc.yaml").write_text(STAGES)
    (folder / "learn.sh").write_text(LEARN)
    (folder / "validate.sh").write_text(GOOD)
    for seed in range(10):
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
        write_png(folder / "data" / "steel" / "train" / "good" / f"{seed}.png", pixels)
    write_params(folder / "params.yaml", {"tracking": {"mode": "off"}}, categories=["steel"])
    return folder


@pytest.fixture
def project(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the template, as the current folder."""
    folder = shutil.copytree(template, tmp_path / "project")
    for name in ("DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "no-config"))
    monkeypatch.chdir(folder)
    return folder
