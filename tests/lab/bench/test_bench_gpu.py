"""The GPU benchmark, as far as a machine without a GPU can tell."""

from pathlib import Path

import pytest
import torch
import yaml

from flawsmith.errors import UserError
from flawsmith.layout import Layout
from flawsmith_lab.bench import gpu
from flawsmith_lab.bench.gpu import main, read_overlay
from flawsmith_lab.bench.measure import bench_settings

ROOT = Path(__file__).parents[3]
PRESET = ROOT / "docs" / "gpu-params.yaml"


def test_the_preset_passes_the_checks_of_the_settings_and_samples_the_whole_image() -> None:
    overlay = read_overlay(PRESET)
    settings = bench_settings(ROOT / "params.yaml", "brushed_metal", None, overlay)
    assert settings.ddpm_train.steps == overlay["ddpm-train.steps"]
    assert settings.synthesize.windows == (settings.data.image_size,)


def test_without_a_gpu_it_refuses_in_one_sentence_with_the_remedy(
    params: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"no GPU here.*flawsmith doctor") as raised:
        main(["--params", str(ROOT / "params.yaml"), "--overlay", str(PRESET)])
    assert raised.value.exit_code == 2


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("- 1", "must hold sections"), ("data: 3", "must hold sections"),
     ("a: [", "not valid YAML")],
)  # fmt: skip
def test_a_preset_that_cannot_be_used_is_named(tmp_path: Path, content: str, complaint: str) -> None:
    path = tmp_path / "preset.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=complaint):
        read_overlay(path)
    with pytest.raises(UserError, match="name a preset with --overlay"):
        read_overlay(tmp_path / "none.yaml")


def test_stages_run_in_the_pipelines_order_and_each_is_timed(
    params: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert list(gpu.STAGES) == [name for name in pipeline if name not in ("demo-data", "settings")]
    ran: list[tuple[str, Layout]] = []
    monkeypatch.setattr(
        gpu, "STAGES", {name: lambda layout, name=name: ran.append((name, layout)) for name in gpu.STAGES}
    )
    layout = Layout(bench_settings(params, "brushed_metal", None), "brushed_metal", tmp_path)
    found = gpu.run_stages(layout, torch.device("cpu"))
    assert ran == [(name, layout) for name in gpu.STAGES]
    assert list(found) == list(gpu.STAGES)
    assert all(stage["seconds"] > 0 and stage["gpu_peak_mb"] == 0 for stage in found.values())
