"""A real DVC on a small pipeline."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from flawsmith.data.images import write_png

ROOT = Path(__file__).parents[2]

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


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder: two stages of a category `steel`, as shell scripts that a test may replace."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    for name in ("DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "no-config"))
    subprocess.run(["git", "init", "--quiet"], check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "--quiet"], check=True)
    (folder / ".dvc" / "config").write_text("[core]\n    analytics = false\n    check_update = false\n")
    (folder / "dvc.yaml").write_text(STAGES)
    (folder / "learn.sh").write_text(LEARN)
    (folder / "validate.sh").write_text(GOOD)
    for seed in range(10):
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
        write_png(folder / "data" / "steel" / "train" / "good" / f"{seed}.png", pixels)
    content = yaml.safe_load((ROOT / "params.yaml").read_text())
    content["categories"] = ["steel"]
    content["tracking"]["mode"] = "off"
    (folder / "params.yaml").write_text(yaml.safe_dump(content))
    return folder
