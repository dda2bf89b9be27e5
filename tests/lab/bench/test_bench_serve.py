"""The load test of the web service, for two seconds."""

import json
from pathlib import Path

import numpy as np
import pytest
from toy_onnx import write_toy

from flawsmith.data.images import write_png
from flawsmith.errors import UserError
from flawsmith_lab.bench.serve import growth, main


def test_every_client_is_answered_and_a_full_queue_is_no_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = write_toy(tmp_path / "model.onnx")
    image = tmp_path / "a.png"
    write_png(image, np.random.default_rng(0).integers(0, 255, (400, 400, 3), np.uint8))
    main([str(model), str(image), "--clients", "8", "--seconds", "2", "--workers", "1", "--queue", "2"])
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert found["errors"] == 0
    assert found["failures"] == []
    assert set(found["statuses"]) == {"200", "429"}  # 8 clients, 3 places
    assert 0 < found["p50_ms"] <= found["p95_ms"] <= found["p99_ms"] < 10_000
    assert found["answers_per_second"] > 1
    assert found["memory_mb"] > 20
    assert found["model_exchanges"] == 1


def test_growth_sees_a_leak_and_no_single_peak() -> None:
    assert growth([100.0] * 30 + [400.0] + [100.0] * 29) == 0
    assert growth([100.0 + sample for sample in range(60)]) == pytest.approx(40)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.onnx does not exist"):
        main([str(tmp_path / "none.onnx"), str(tmp_path / "a.png")])
