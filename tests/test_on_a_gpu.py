"""What only a machine with a GPU does, entered here with a fake one: each branch on `cuda` outside of devices.py."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from flawsmith.config import load_settings
from flawsmith.devices import BFLOAT16, Compute
from flawsmith.doctor import _probe_device
from flawsmith.layout import Layout
from flawsmith_lab.bench import anomalib_runner, gpu
from flawsmith_lab.bench.measure import machine, seconds_of
from flawsmith_lab.study.study import measure

CUDA = torch.device("cuda")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked of the fake GPU, in order."""
    asked: list[str] = []

    def fake(name: str, answer: Any) -> Callable[..., Any]:
        def act(*_: object, **__: object) -> Any:
            asked.append(name)
            return answer

        return act

    answers = {
        "is_available": True, "is_initialized": True, "is_bf16_supported": True, "get_device_name": "Fake 9000",
        "synchronize": None, "empty_cache": None, "reset_peak_memory_stats": None, "max_memory_allocated": 3e6,
        "max_memory_reserved": 2**21,
    }  # fmt: skip
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, fake(name, answer))
    monkeypatch.setenv("FLAWSMITH_DEVICE", "auto")
    monkeypatch.setenv("FLAWSMITH_PRECISION", "auto")
    return asked


def test_doctor_names_the_gpu_and_its_precision(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert _probe_device().detail == "Fake 9000, bfloat16"
    monkeypatch.setenv("FLAWSMITH_PRECISION", "float32")
    assert _probe_device().detail == "Fake 9000, float32 (forced)"


def test_a_clock_waits_for_the_gpu_before_and_after(calls: list[str]) -> None:
    seconds_of(lambda: calls.append("work"), CUDA)
    assert calls == ["synchronize", "work", "synchronize"]
    anomalib_runner.wait()
    assert calls[-1] == "synchronize"
    assert anomalib_runner.device() == CUDA


def test_figures_name_the_gpu_and_what_memory_it_took(
    calls: list[str], monkeypatch: pytest.MonkeyPatch, params_path: Path
) -> None:
    assert {"device": "Fake 9000", "bf16": True}.items() <= machine(Compute(CUDA, BFLOAT16)).items()
    assert {"device": "Fake 9000", "peak_device_mb": 2.0}.items() <= measure().items()
    calls.clear()
    monkeypatch.setattr(gpu, "STAGES", {"distill": partial(lambda said, layout: said.append("distill"), calls)})
    layout = Layout(load_settings(params_path), "brushed_metal", params_path.parent)
    assert gpu.run_stages(layout, CUDA)["distill"]["gpu_peak_mb"] == 3.0
    assert calls[:2] == ["empty_cache", "reset_peak_memory_stats"]
    assert calls[-1] == "max_memory_allocated"
