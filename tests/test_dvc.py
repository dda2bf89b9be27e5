"""DVC as the flows use it: a real DVC on a pipeline of two echoing stages."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from flawsmith import dvc
from flawsmith.config import Settings, load_settings
from flawsmith.connection import check_store
from flawsmith.dvc import GateFailed, InfrastructureError, failure
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.processes import Finished

ROOT = Path(__file__).parents[1]

DVC_YAML = """
stages:
  demo-data:
    matrix:
      surface: [wool]
    cmd: mkdir -p data/${item.surface} && echo demo > data/${item.surface}/image
    outs:
      - data/${item.surface}
  learn:
    matrix:
      category: ${categories}
    cmd: echo learning ${item.category} && sh learn.sh ${item.category}
    deps:
      - data/${item.category}
    outs:
      - artifacts/${item.category}/model
  score:
    matrix:
      category: ${categories}
    cmd: echo 0.9 > artifacts/${item.category}/score.json && cp learn.sh artifacts/${item.category}/report
    deps:
      - artifacts/${item.category}/model
    outs:
      - artifacts/${item.category}/report
      - artifacts/${item.category}/score.json:
          cache: false
  validate:
    matrix:
      category: ${categories}
    cmd: sh validate.sh ${item.category}
    deps:
      - artifacts/${item.category}/model
    outs:
      - artifacts/${item.category}/validate/verdict.json:
          cache: false
"""
CONFIG = "[core]\n    analytics = false\n    check_update = false\n"
LEARN = "mkdir -p artifacts/$1; cat data/$1/image > artifacts/$1/model; echo 1 >> artifacts/$1/model\n"
PASSES = "mkdir -p artifacts/$1/validate; echo '{\"passed\": true}' > artifacts/$1/validate/verdict.json\n"


def run(folder: Path, *command: str) -> str:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.fixture
def quiet_dvc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of the machine's user get into the tests."""
    for name in ("DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "no-config"))
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, os.devnull)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project before anything ran: each process of DVC's costs a second, copying does not."""
    folder = tmp_path_factory.mktemp("template")
    run(folder, "git", "init", "--quiet", "--initial-branch", "main")
    run(folder, "dvc", "init", "--quiet")
    (folder / ".dvc" / "config").write_text(CONFIG)
    (folder / "dvc.yaml").write_text(DVC_YAML)
    (folder / "learn.sh").write_text(LEARN)
    (folder / "validate.sh").write_text(PASSES)
    (folder / ".gitignore").write_text("/artifacts/*/model\n/artifacts/*/report\n/data/*\n!/data/*.dvc\n")
    (folder / "params.yaml").write_text("categories: [steel, wool]\n")
    (folder / "data" / "steel").mkdir(parents=True)
    (folder / "data" / "steel" / "image").write_text("a picture")
    run(folder, "dvc", "add", "--quiet", "data/steel")
    commit(folder, "start")
    return folder


@pytest.fixture
def project(template: Path, tmp_path: Path, quiet_dvc: None) -> Path:
    return shutil.copytree(template, tmp_path / "project", symlinks=True)


def commit(folder: Path, message: str) -> None:
    run(folder, "git", "add", "--all")
    run(folder, "git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "-m", message)


@pytest.fixture
def with_remote(project: Path, tmp_path: Path) -> Path:
    (tmp_path / "remote").mkdir()
    remote = f"    remote = shared\n['remote \"shared\"']\n    url = {tmp_path / 'remote'}\n"
    (project / ".dvc" / "config").write_text(CONFIG + remote)
    commit(project, "a remote")
    return project


def quiet(line: str) -> None:
    pass


def settings_with(*categories: str) -> Settings:
    return load_settings(ROOT / "params.yaml", {"categories": list(categories)})


def test_stages_stand_in_the_order_of_dvc_yaml() -> None:
    demo = settings_with("brushed_metal")
    names = [target.partition("@")[0] for target in dvc.stages_of(ROOT, demo, "brushed_metal")]
    assert names == [
        "demo-data",
        "demo-data",
        "settings",
        "ddpm-train",
        "synthesize",
        "validate",
        "distill",
        "evaluate",
        "export",
    ]


def test_the_surfaces_stages_belong_to_every_category_so_that_all_of_dvc_lock_can_be_pulled() -> None:
    targets = dvc.stages_of(ROOT, settings_with("my_bolts"), "my_bolts")
    assert targets[:3] == ["demo-data@brushed_metal", "demo-data@woven_fabric", "settings@my_bolts"]
    assert all(target.endswith("@my_bolts") for target in targets[2:])


def test_an_unknown_category_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"`rust` is no category of params.yaml \(known are brushed_metal\)"):
        dvc.stages_of(ROOT, settings_with("brushed_metal"), "rust")


@pytest.mark.parametrize("content", ["stages: [", "nothing: here", "stages: text", ""])
def test_a_dvc_yaml_that_cannot_be_read_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "dvc.yaml").write_text(content)
    with pytest.raises(UserError, match=r"dvc\.yaml"):
        dvc.stages_of(tmp_path, settings_with("steel"), "steel")


def test_a_stage_runs_is_unchanged_and_is_restored_from_the_run_cache(project: Path) -> None:
    heard: list[str] = []
    first = dvc.reproduce(project, "learn@steel", heard.append)
    assert first.did == "ran"
    assert "learning steel" in heard
    assert not [line for line in heard if "git" in line], "advice for a person is left out"
    assert first.seconds > 0
    assert dvc.reproduce(project, "learn@steel", quiet).did == "unchanged"
    (project / "artifacts" / "steel" / "model").unlink()
    assert dvc.reproduce(project, "learn@steel", quiet).did == "restored"
    assert (project / "artifacts" / "steel" / "model").read_text() == "a picture1\n"


def test_a_stage_is_told_what_the_caller_says(project: Path) -> None:
    (project / "learn.sh").write_text('echo "by $FLAWSMITH_ACTOR"\n' + LEARN)
    heard: list[str] = []
    dvc.reproduce(project, "learn@steel", heard.append, {"FLAWSMITH_ACTOR": "the night"})
    assert "by the night" in heard


def test_the_gate_s_refusal_carries_its_verdict_and_leaves_the_model_alone(project: Path) -> None:
    dvc.reproduce(project, "learn@steel", quiet)
    refuse = PASSES.replace("true", "false") + "echo 'flawsmith: 3 triplets are no good' >&2; exit 1\n"
    (project / "validate.sh").write_text(refuse)
    with pytest.raises(GateFailed, match="3 triplets are no good") as caught:
        dvc.reproduce(project, "validate@steel", quiet)
    assert caught.value.verdict == {"passed": False}


def test_status_1_of_the_gate_without_a_verdict_is_no_refusal(project: Path) -> None:
    """A verdict of an earlier night must not be taken for tonight's: DVC removes it before it runs the stage."""
    dvc.reproduce(project, "learn@steel", quiet)
    (project / "artifacts" / "steel" / "validate").mkdir()
    (project / "artifacts" / "steel" / "validate" / "verdict.json").write_text('{"passed": false}')
    (project / "validate.sh").write_text("echo 'flawsmith: the disk is odd' >&2; exit 1\n")
    with pytest.raises(FlawsmithError, match="the disk is odd") as caught:
        dvc.reproduce(project, "validate@steel", quiet)
    assert not isinstance(caught.value, GateFailed | InfrastructureError | UserError)


ENDINGS: list[tuple[int, str, type[FlawsmithError], str]] = [
    (2, "data/steel is empty", UserError, "data/steel is empty"),
    (-9, "", InfrastructureError, "signal 9"),
    (137, "", InfrastructureError, "signal 9"),
    (1, "unexpected OSError: gone", InfrastructureError, "unexpected OSError"),
    (2, "x: full (No space left on device)", InfrastructureError, "No space left"),
    (1, "no such layer", FlawsmithError, "no such layer"),
]


@pytest.mark.parametrize(("status", "said", "kind", "words"), ENDINGS)
def test_a_failed_stage_is_blamed_on_whoever_is_at_fault(
    status: int, said: str, kind: type[FlawsmithError], words: str
) -> None:
    own = (f"flawsmith: {said}",) if said else ()
    finished = Finished(255, (*own, f"ERROR: failed to reproduce 'x': failed to run: y, exited with {status}"))
    error = failure("Stage `x`", finished)
    assert type(error) is kind
    assert words in str(error)


@pytest.mark.parametrize(
    ("ending", "kind"), [("echo 'flawsmith: empty' >&2; exit 2", UserError), ("kill -9 $$", InfrastructureError)]
)
def test_dvc_reports_how_a_stage_ended(project: Path, ending: str, kind: type[FlawsmithError]) -> None:
    """Bound to the words that DVC really says."""
    (project / "learn.sh").write_text(ending + "\n")
    with pytest.raises(FlawsmithError) as caught:
        dvc.reproduce(project, "learn@steel", quiet)
    assert type(caught.value) is kind


def test_a_store_that_is_away_is_infrastructure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Bound to the sentence that flawsmith.connection really says."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://127.0.0.1:1/mlflow")
    with pytest.raises(UserError) as caught:
        check_store(tmp_path)
    said = Finished(
        255, (f"flawsmith: {caught.value}", "ERROR: failed to reproduce 'x': failed to run: y, exited with 2")
    )
    assert type(failure("Stage `x`", said)) is InfrastructureError


def test_a_checkout_that_another_dvc_is_at_work_in_is_infrastructure(project: Path) -> None:
    """What is tried here is DVC's own lock, held by a stage that waits for us."""
    go = project / "go"
    (project / "learn.sh").write_text("while [ ! -e go ]; do sleep 0.05; done\n" + LEARN)
    first = subprocess.Popen(
        [sys.executable, "-m", "dvc", "repro", "--single-item", "learn@steel"],
        cwd=project, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert first.stdout is not None
    with first, first.stdout:
        for line in first.stdout:
            if line.startswith("learning"):
                break
        try:
            with pytest.raises(InfrastructureError, match="blocked"):
                dvc.reproduce(project, "learn@steel", quiet)
        finally:
            go.touch()
        first.stdout.read()
    assert first.returncode == 0


def test_a_target_that_dvc_does_not_know_is_said_so(project: Path) -> None:
    with pytest.raises(FlawsmithError, match="nothing@steel") as caught:
        dvc.reproduce(project, "nothing@steel", quiet)
    assert not isinstance(caught.value, InfrastructureError)


def test_a_second_checkout_gets_data_and_results_without_computing(with_remote: Path, tmp_path: Path) -> None:
    assert dvc.has_remote(with_remote)
    targets = ["learn@steel", "score@steel"]
    assert [dvc.reproduce(with_remote, target, quiet).did for target in targets] == ["ran", "ran"]
    dvc.push(with_remote, "steel", "data", targets, quiet)
    commit(with_remote, "results")
    second = tmp_path / "second"
    run(tmp_path, "git", "clone", "--quiet", str(with_remote), str(second))
    dvc.pull(second, "steel", "data", targets, quiet, remote=True)
    assert (second / "data" / "steel" / "image").read_text() == "a picture"
    assert [dvc.reproduce(second, target, quiet).did for target in targets] == ["unchanged", "unchanged"]


def test_what_a_failed_stage_left_does_not_stop_the_next_run(with_remote: Path) -> None:
    targets = ["learn@steel", "score@steel"]
    for target in targets:
        dvc.reproduce(with_remote, target, quiet)
    (with_remote / "artifacts" / "steel" / "report").write_text("half a report")
    dvc.pull(with_remote, "steel", "data", targets, quiet, remote=True)
    assert dvc.reproduce(with_remote, "score@steel", quiet).did == "ran"
    assert (with_remote / "artifacts" / "steel" / "report").read_text() == LEARN


def test_results_that_were_never_pushed_do_not_stop_a_run_but_data_do(with_remote: Path, tmp_path: Path) -> None:
    dvc.reproduce(with_remote, "learn@steel", quiet)
    run(with_remote, "dvc", "push", "--quiet", "data/steel.dvc")
    commit(with_remote, "results that nobody pushed")
    second = tmp_path / "second"
    run(tmp_path, "git", "clone", "--quiet", str(with_remote), str(second))
    dvc.pull(second, "steel", "data", ["learn@steel"], quiet, remote=True)
    assert dvc.reproduce(second, "learn@steel", quiet).did == "ran"

    for file in (tmp_path / "remote").rglob("*"):
        if file.is_file():
            file.unlink()
    third = tmp_path / "third"
    run(tmp_path, "git", "clone", "--quiet", str(with_remote), str(third))
    with pytest.raises(FlawsmithError, match="dvc pull"):
        dvc.pull(third, "steel", "data", ["learn@steel"], quiet, remote=True)


def test_data_changed_by_hand_are_not_overwritten(with_remote: Path) -> None:
    (with_remote / "data" / "steel" / "new").write_text("a picture of today")
    with pytest.raises(UserError, match="dvc add"):
        dvc.pull(with_remote, "steel", "data", [], quiet, remote=True)
    assert (with_remote / "data" / "steel" / "new").exists()


def test_without_a_remote_data_come_from_the_cache(project: Path) -> None:
    assert not dvc.has_remote(project)
    (project / "data" / "steel" / "image").unlink()
    (project / "data" / "steel").rmdir()
    dvc.pull(project, "steel", "data", [], quiet, remote=False)
    assert (project / "data" / "steel" / "image").read_text() == "a picture"


def test_a_remote_that_is_away_is_infrastructure(with_remote: Path) -> None:
    run(with_remote, "dvc", "remote", "modify", "shared", "url", "http://127.0.0.1:1/nowhere")
    (with_remote / "data" / "steel" / "image").unlink()
    (with_remote / "data" / "steel").rmdir()
    for file in (with_remote / ".dvc" / "cache").rglob("*"):
        if file.is_file():
            file.unlink()
    with pytest.raises(InfrastructureError):
        dvc.pull(with_remote, "steel", "data", [], quiet, remote=True)


def test_the_lock_s_digest_follows_the_results(tmp_path: Path) -> None:
    assert dvc.lock_digest(tmp_path) is None
    seen = set()
    for content in ("schema: '2.0'", "schema: '2.0'\nstages: {}"):
        (tmp_path / "dvc.lock").write_text(content)
        seen.add(dvc.lock_digest(tmp_path))
    assert len(seen) == 2


def state(folder: Path) -> tuple[str, str, str]:
    """What publishing must leave alone: the branch, the index, and which files differ from them."""
    return (
        run(folder, "git", "symbolic-ref", "HEAD") + run(folder, "git", "rev-parse", "HEAD"),
        run(folder, "git", "ls-files", "--stage"),
        run(folder, "git", "status", "--porcelain", "--ignored"),
    )


def learn_and_score(folder: Path) -> None:
    """What the two stages leave for git, without the seconds that DVC's processes take."""
    (folder / "artifacts" / "steel").mkdir(parents=True, exist_ok=True)
    (folder / "artifacts" / "steel" / "score.json").write_text("0.9\n")
    (folder / "dvc.lock").write_text("schema: '2.0'\n")


def publish(folder: Path, branch: str = "results") -> str | None:
    return dvc.publish(folder, "steel", "data", branch, "steel: version 1")


def test_publishing_commits_lock_and_metrics_and_nothing_else(project: Path) -> None:
    learn_and_score(project)
    (project / "learn.sh").write_text("half a thought\n")
    (project / "staged").write_text("x")
    run(project, "git", "add", "staged")
    before = state(project)
    commit_id = publish(project)
    assert commit_id is not None
    assert state(project) == before
    changed = run(project, "git", "diff", "--name-only", "HEAD", "results").splitlines()
    assert changed == ["artifacts/steel/score.json", "dvc.lock"]
    assert run(project, "git", "show", "results:dvc.lock") == (project / "dvc.lock").read_text().strip()
    assert publish(project) is None, "nothing new, no commit"


def test_publishing_again_keeps_both_histories(project: Path) -> None:
    learn_and_score(project)
    first = publish(project)
    (project / "learn.sh").write_text(LEARN + "# better\n")
    commit(project, "better code")
    second = publish(project)
    assert first
    assert second
    parents = run(project, "git", "rev-parse", f"{second}^@").splitlines()
    assert parents == [first, run(project, "git", "rev-parse", "HEAD")]
    assert "# better" in run(project, "git", "show", "results:learn.sh")


def test_publishing_pushes_to_origin(project: Path, tmp_path: Path) -> None:
    run(tmp_path, "git", "init", "--quiet", "--bare", "origin.git")
    run(project, "git", "remote", "add", "origin", str(tmp_path / "origin.git"))
    learn_and_score(project)
    assert run(tmp_path / "origin.git", "git", "branch", "--list") == ""
    assert publish(project) == run(tmp_path / "origin.git", "git", "rev-parse", "results")
    (tmp_path / "origin.git").rename(tmp_path / "gone.git")
    (project / "artifacts" / "steel" / "score.json").write_text("0.95\n")
    with pytest.raises(InfrastructureError, match="origin"):
        publish(project)


def test_the_branch_that_is_checked_out_is_not_moved(project: Path) -> None:
    with pytest.raises(UserError, match="`main` is checked out"):
        publish(project, "main")


def test_publishing_outside_a_repository_is_refused(tmp_path: Path, quiet_dvc: None) -> None:
    with pytest.raises(UserError, match="git"):
        publish(tmp_path)


def test_small_outputs_are_those_that_dvc_leaves_to_git(project: Path) -> None:
    learn_and_score(project)
    assert dvc.small_outputs(project, "steel") == [Path("artifacts/steel/score.json")]
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert "evaluate" in stages  # the shipped pipeline's ones are found too, metrics included
    shipped = {path.name for path in dvc.small_outputs(ROOT, "brushed_metal")}
    assert {"verdict.json", "metrics.json", "detector.json"} <= shipped
