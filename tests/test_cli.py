"""The front door: which function a command reaches with what, and how it ends when something is wrong."""

import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flawsmith import __version__, cli, doctor
from flawsmith.cli import pipeline
from flawsmith.cli.common import parse_overrides
from flawsmith.config import SECTIONS
from flawsmith.errors import FlawsmithError, QualityGateError, UserError
from flawsmith.files import write_json
from flawsmith.sections import describe
from flawsmith_lab.study.plan import METHODS

Run = Callable[..., tuple[int, str, str]]
COMMANDS = (
    "demo-data", *pipeline.STAGES, "quick", "study", "predict", "serve", "monitor", "learn", "result", "explain",
    "lineage", "register", "promote", "rollback", "history", "check", "doctor", "fetch", "params",
)  # fmt: skip
Calls = list[tuple[str, Any]]
Fail = Callable[[BaseException], None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Call `main()` as the installed command would; returns exit status, stdout and stderr."""

    def call(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["flawsmith", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "120")
        with pytest.raises(SystemExit) as caught:
            cli.main()
        out, err = capsys.readouterr()
        return int(caught.value.code or 0), out, err

    return call


def in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


@pytest.fixture
def stage_calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """The module and arguments of each stage that a command starts; none runs."""
    calls: Calls = []
    monkeypatch.setattr(
        pipeline, "import_module", lambda name: SimpleNamespace(run=lambda *given: calls.append((name, given)))
    )
    return calls


@pytest.fixture
def failing_stage(monkeypatch: pytest.MonkeyPatch) -> Fail:
    """Let every stage raise an error."""

    def fail_with(error: BaseException) -> None:
        def stage(_: object) -> None:
            raise error

        monkeypatch.setattr(pipeline, "import_module", lambda _: SimpleNamespace(run=stage))

    return fail_with


@pytest.mark.parametrize("stage", pipeline.STAGES)
def test_a_stage_runs_for_every_category_of_the_params(
    run: Run, stage_calls: Calls, params_path: Path, stage: str
) -> None:
    code, _, _ = run(stage, "--params", params_path, "--set", "categories=[a, b]", "--set", "distill.batch=3")
    assert code == 0
    assert [name for name, _ in stage_calls] == [f"flawsmith.stages.{stage.replace('-', '_')}"] * 2
    layouts = [arguments[0] for _, arguments in stage_calls]
    assert [layout.category for layout in layouts] == ["a", "b"]
    assert {layout.root for layout in layouts} == {params_path.parent}
    assert {layout.settings.distill.batch for layout in layouts} == {3}


def test_named_categories_need_not_stand_in_the_params(run: Run, stage_calls: Calls, params_path: Path) -> None:
    code, _, _ = run("distill", "--params", params_path, "-c", "mine", "--category", "other", "-c", "mine")
    assert code == 0
    assert [arguments[0].category for _, arguments in stage_calls] == ["mine", "other"]


def test_demo_data_renders_the_named_surfaces(run: Run, stage_calls: Calls, params_path: Path) -> None:
    assert run("demo-data", "--params", params_path)[0] == 0
    assert [arguments[2:] for _, arguments in stage_calls] == [("brushed_metal", False)]
    stage_calls.clear()
    assert run("demo-data", "--params", params_path, "--surface", "woven_fabric", "--if-category")[0] == 0
    (name, (_, root, surface, if_category)) = stage_calls[0]
    assert (name, root, surface) == ("flawsmith.stages.demo_data", params_path.parent, "woven_fabric")
    assert if_category


def test_every_stage_of_the_command_line_exists() -> None:
    for stage in [*pipeline.STAGES, "demo-data"]:  # looked for, not imported: that would take a minute
        assert find_spec(f"flawsmith.stages.{stage.replace('-', '_')}")


def one_line(err: str) -> str:
    assert err.endswith("\n")
    assert err.count("\n") == 1
    assert err.startswith("flawsmith: ")
    return err


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(28, "No space left on device", "out/a.png"), "out/a.png cannot be written: the disk is full"),
        (OSError(30, "Read-only file system", "out"), "out cannot be written: the file system is read-only"),
        (PermissionError(13, "Permission denied", "out"), "out cannot be used: the rights to do so are missing"),
        (FileNotFoundError(2, "No such file or directory", "x/y"), "x/y cannot be used: it, or the folder"),
        (IsADirectoryError(21, "Is a directory", "out"), "out cannot be used: it is a folder"),
        (OSError(37, "No locks available", "out"), "out cannot be used: the file system cannot lock files"),
        (OSError("16384 requested and 0 written"), "The output cannot be written: the disk is full"),
    ],
)
def test_what_the_system_refuses_is_the_users_to_mend(
    run: Run, failing_stage: Fail, params_path: Path, error: OSError, words: str
) -> None:
    failing_stage(error)
    code, _, err = run("distill", "--params", params_path)
    assert code == 2
    assert one_line(err).startswith(f"flawsmith: {words}")
    assert "; " in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux alone has a disk that is always full")
def test_a_full_disk_behind_standard_output_is_told() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [Path(sys.executable).with_name("flawsmith"), "--version"], stdout=full, stderr=subprocess.PIPE, text=True,
            check=False
        )  # fmt: skip
    assert done.returncode == 2
    assert one_line(done.stderr).startswith("flawsmith: The output cannot be written: the disk is full")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("bad\n   input"), 2),
        (FlawsmithError("broken"), 1),
        (QualityGateError("critical"), 1),
        (KeyboardInterrupt(), 130),
        (RuntimeError("odd\nand long " * 1000), 1),
        (OSError(5, "Input/output error"), 1),
        (ValueError(), 1),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_whatever_goes_wrong_ends_in_one_sentence(
    run: Run, failing_stage: Fail, monkeypatch: pytest.MonkeyPatch, params_path: Path,
    error: BaseException, status: int, debug: bool,
) -> None:  # fmt: skip
    failing_stage(error)
    if debug:
        monkeypatch.setenv("FLAWSMITH_DEBUG", "1")
    code, out, err = run("distill", "--params", params_path)
    assert code == status
    assert out == ""
    if isinstance(error, KeyboardInterrupt):
        assert "Traceback" not in err or debug
        return
    assert ("Traceback" in err) == debug
    if not debug:
        one_line(err)
        assert len(err) < 600
    if not isinstance(error, FlawsmithError):
        assert type(error).__name__ in err
        assert "FLAWSMITH_DEBUG=1" in err
    assert " ".join(str(error).split())[:100] in err


def test_an_interrupt_of_the_real_command_exits_130(params_path: Path) -> None:
    code = (
        "import sys, types; from flawsmith import cli\n"
        "def stage(_): raise KeyboardInterrupt\n"
        "cli.pipeline.import_module = lambda _: types.SimpleNamespace(run=stage)\n"
        f"sys.argv = ['flawsmith', 'distill', '--params', {str(params_path)!r}]\n"
        "cli.main()"
    )
    result = in_a_process(code)
    assert result.returncode == 130
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ddpm-train", "--set", "distill.btach=3"], "did you mean `batch`"),
        (["ddpm-train", "--set", "distill.batch"], "section.key=value"),
        (["ddpm-train", "--set", "=3"], "section.key=value"),
        (["ddpm-train", "--set", "distill.batch=[1"], "not valid YAML"),
        (["ddpm-train", "--category", "../etc"], "plain folder name"),
        (["ddpm-train", "--category", "Teil 7"], "plain folder name"),
        (["distill", "--params", "nowhere/params.yaml"], "pass --params"),
        (["demo-data", "--set", "categories=[mine]"], "names no embedded surface (brushed_metal, woven_fabric); name"),
        (["params", "distil"], "`distil` is no section"),
        (["lineage", "abcdef"], "names no content with digest abcdef"),
        (["fetch", "cifar", "--category", "bottle"], "use mvtec-ad"),
        (["fetch", "mvtec-ad", "--category", "botle"], "bottle"),
        (["explain", "fit-00000", "--set", "categories=[a, b]"], "choose one with --category"),
    ],
)
def test_bad_arguments_are_the_users_fault(run: Run, params_path: Path, arguments: list[str], words: str) -> None:
    given = [] if "--params" in arguments else ["--params", params_path]
    code, _, err = run(*arguments, *given)
    assert code == 2
    assert words in one_line(err)


def test_a_category_without_a_folder(run: Run, monkeypatch: pytest.MonkeyPatch, params_path: Path) -> None:
    monkeypatch.setattr(pipeline, "import_module", lambda _: SimpleNamespace(run=lambda layout: layout.surface()))
    code, _, err = run("ddpm-train", "--params", params_path, "--category", "nowhere")
    assert code == 2
    assert "data/nowhere does not exist; put the images of 'nowhere' there" in one_line(err)


@pytest.mark.parametrize("arguments", [["no-such-command"], ["distill", "--no-such-option"], ["predict", "model.onnx"]])
def test_wrong_usage_exits_2(run: Run, arguments: list[str]) -> None:
    code, _, err = run(*arguments)
    assert code == 2
    assert "Usage: flawsmith" in err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("distill.batch=4", 4),
        ("synthesize.strength=[0.1, 0.2]", [0.1, 0.2]),
        ("ddpm-train.flip=false", False),
        ("teacher.weights=a=b", "a=b"),
        ("teacher.weights=", None),
        ("tracking.mode='off'", "off"),
    ],
)
def test_override_values_are_yaml(text: str, value: object) -> None:
    assert parse_overrides([text]) == {text.partition("=")[0]: value}


def test_later_overrides_win_and_exponents_are_numbers(run: Run, stage_calls: Calls, params_path: Path) -> None:
    settings = ["--set", "distill.learning_rate=5", "--set", "distill.learning_rate=1e-3"]
    assert run("distill", "--params", params_path, *settings)[0] == 0
    assert stage_calls[0][1][0].settings.distill.learning_rate == 1e-3


def test_version_and_help(run: Run) -> None:
    assert run("--version") == (0, f"{__version__}\n", "")
    for option in ("--help", "-h"):
        code, out, _ = run(option)
        assert code == 0
        places = [out.index(f"│ {command} ") for command in COMMANDS]
        assert places == sorted(places)  # stages in the order in which they run


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"Usage: flawsmith {command}" in out


def test_params_prints_every_key_with_value_and_meaning(run: Run, params_path: Path) -> None:
    code, out, _ = run("params", "--params", params_path)
    assert code == 0
    for section in SECTIONS.values():
        for key, item in describe(section).items():
            assert f" {key} " in out
            assert item["description"] in out
    code, out, _ = run("params", "distill", "--params", params_path, "--set", "distill.batch=77")
    assert code == 0
    assert out.startswith("distill: ")
    assert "77" in out
    assert "(a whole number from 1 to 1024; default: 8)" in out
    assert "readiness" not in out


def test_the_study_names_all_its_methods(run: Run) -> None:
    # help may not import the plan, which imports numpy, so it lists them by hand
    _, out, _ = run("study", "--help")
    assert f"Of {', '.join(METHODS)}." in " ".join(out.replace("│", " ").split())


def test_help_imports_nothing_heavy_and_answers_at_once() -> None:
    code = (
        "import sys, time; start = time.process_time(); from flawsmith import cli\n"
        "sys.argv = ['flawsmith', '--help']\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'PIL', 'mlflow', 'dvc', 'pandas', 'onnxruntime', 'matplotlib', 'timm'}\n"
        "print(sorted(heavy & set(sys.modules)), time.process_time() - start, file=sys.stderr)"
    )
    result = in_a_process(code)
    loaded, _, seconds = result.stderr.rpartition(" ")
    assert loaded == "[]"
    assert float(seconds) < 2  # 0.35 s of CPU on the slow machine this was written on


def test_the_result_is_three_lines(run: Run, params_path: Path) -> None:
    stages = params_path.parent / "artifacts" / "brushed_metal"
    code, out, _ = run("result", "--params", params_path, "--category", "brushed_metal")
    assert (code, out.splitlines()) == (
        0, ["brushed_metal: no detector yet.", "Report: none yet", "Next:   make repro"]
    )  # fmt: skip
    write_json(stages / "validate" / "verdict.json", {"passed": False})
    _, out, _ = run("result", "--params", params_path, "--category", "brushed_metal")
    assert "the quality gate refused the triplets" in out
    rates = {"test_detection_rate": 0.966667, "test_false_alarm_rate": 0.05, "n_defective": 30, "n_good": 20}
    write_json(stages / "evaluate" / "metrics.json", {**rates, "scored_on": "labelled test set"})
    model = stages / "export" / "model.onnx"
    model.parent.mkdir()
    model.touch()
    (stages / "evaluate" / "report.html").touch()
    _, out, _ = run("result", "--params", params_path, "--category", "brushed_metal")
    assert out.splitlines() == [
        "brushed_metal: the detector finds 29 of 30 defective images and flags 1 of 20 good ones (labelled test set).",
        f"Report: {stages / 'evaluate' / 'report.html'}",
        f"Next:   flawsmith predict {model} FOLDER --out results",
    ]


@pytest.mark.parametrize(("worst", "status"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_doctor_prints_its_findings_and_fails_on_the_worst(
    run: Run, monkeypatch: pytest.MonkeyPatch, params_path: Path, worst: doctor.Status, status: int
) -> None:
    checks = [doctor.Check("first", "ok", "fine"), doctor.Check("second", worst, "as found", "the remedy")]
    monkeypatch.setattr(doctor, "run_checks", lambda settings, root: checks)
    code, out, _ = run("doctor", "--params", params_path)
    assert code == status
    assert out == doctor.render_checks(checks) + "\n"


def test_the_installed_command_is_this_one() -> None:
    command = Path(sys.executable).with_name("flawsmith")
    result = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, f"{__version__}\n")
