import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ports import free_port

from flawsmith.config import Settings, load_settings
from flawsmith.connection import check_store, tracking_uri
from flawsmith.dvc import content_digest
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.layout import Layout
from flawsmith.tracking import (
    FLUSH_SECONDS,
    RunFinder,
    current_actor,
    current_flow_run,
    stage_run,
)

PARAMS = Path(__file__).parents[1] / "params.yaml"


def project(root: Path) -> Layout:
    """A project with one category's data and nothing else."""
    normal = root / "data" / "tile" / "train" / "good" / "000.png"
    normal.parent.mkdir(parents=True)
    normal.write_bytes(b"pixels")
    return Layout(load_settings(PARAMS), "tile", root)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def train(layout: Layout, text: str = "weights") -> Path:
    """A stage that leaves one file and says so."""
    with stage_run(layout, "distill", {"steps": 3}) as run:
        weights = write(layout.stage("distill") / "detector.safetensors", text)
        run.set_output(weights)
    return weights


def client(layout: Layout) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri(layout.root))


def runs_of(layout: Layout) -> list[Any]:
    mlflow = client(layout)
    experiment = mlflow.get_experiment_by_name("flawsmith/tile")
    return list(mlflow.search_runs([experiment.experiment_id]))


@pytest.fixture(autouse=True)
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "FLAWSMITH_FLOW_RUN", "FLAWSMITH_ACTOR"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An initialised SQLite store: creating its tables takes seconds, copying it does not."""
    layout = replace(project(tmp_path_factory.mktemp("template")), category="template")
    with stage_run(layout, "nothing", {}):
        pass
    return layout.root / "mlflow.db"


@pytest.fixture
def layout(tmp_path: Path, empty_store: Path) -> Layout:
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    return project(tmp_path)


def test_a_run_holds_params_metrics_figures_and_the_digest_of_its_output(layout: Layout) -> None:
    with stage_run(layout, "distill", {"a": {"b": 0.5}, "c": [1, 2]}) as run:
        for step in range(3):
            run.log_metrics({"loss": 1 / (step + 1), "recall@95%": 1.0}, step)
        run.set_tag("provider", "cpu")
        run.log_artifact(write(layout.root / "figure.png", "png"))
        run.log_artifact(write(layout.root / "docs" / "index.html", "html").parent)
        output = write(layout.stage("distill") / "detector.safetensors", "weights")
        run.set_output(output)
    [run_info] = runs_of(layout)
    assert run_info.info.status == "FINISHED"
    assert run_info.data.params == {"a.b": "0.5", "c": "[1, 2]"}
    assert "recall_95_" in run_info.data.metrics
    history = client(layout).get_metric_history(run_info.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert {item.path for item in client(layout).list_artifacts(run_info.info.run_id)} == {"figure.png", "docs"}
    assert run_info.data.tags["flawsmith.provider"] == "cpu"
    assert run_info.data.tags["flawsmith.output"] == content_digest(output)
    assert len(list((layout.root / "mlruns" / "tile").rglob("figure.png"))) == 1  # beside the default store


@pytest.mark.parametrize(
    ("fault", "status"), [("raise", "FAILED"), ("interrupt", "KILLED"), ("input", "FAILED"), ("output", "FAILED")]
)
def test_a_stage_that_fails_marks_its_run_with_the_message(layout: Layout, fault: str, status: str) -> None:
    write(layout.root / "dvc.yaml", "stages: {distill: {deps: [data]}}")
    normal = layout.root / "data/tile/train/good/000.png"
    errors = {"raise": UserError, "interrupt": KeyboardInterrupt, "input": FlawsmithError, "output": FileNotFoundError}
    with pytest.raises(errors[fault]), stage_run(layout, "distill", {}) as run:
        run.log_metrics({"loss": 2.0}, 0)
        if fault == "raise":
            raise UserError("too few images")
        if fault == "interrupt":
            raise KeyboardInterrupt
        if fault == "input":
            write(normal, "other pixels")
        run.set_output(layout.root / "never")
    [run_info] = runs_of(layout)
    assert run_info.info.status == status
    assert run_info.data.metrics == {"loss": 2.0}
    assert "flawsmith.output" not in run_info.data.tags
    named = {"raise": "UserError: too few images", "input": "000.png", "output": "never"}.get(
        fault, "KeyboardInterrupt"
    )
    assert named in run_info.data.tags["flawsmith.error"]


def test_a_run_of_a_process_that_died_is_marked_by_the_next(layout: Layout) -> None:
    train(layout)
    [dead] = runs_of(layout)
    client(layout).update_run(dead.info.run_id, "RUNNING")
    client(layout).set_tag(dead.info.run_id, "flawsmith.pid", "99999999")
    train(layout)
    assert sorted(run.info.status for run in runs_of(layout)) == ["FINISHED", "KILLED"]


def test_hundreds_of_steps_are_sent_in_a_handful_of_batches(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    # Requests are counted, not seconds: what else runs in this process cannot change them.
    from mlflow.tracking import MlflowClient

    batches: list[int] = []
    send = MlflowClient.log_batch

    def counted(self: Any, run_id: str, metrics: Any = (), **others: Any) -> None:
        batches.append(len(metrics))
        send(self, run_id, metrics=metrics, **others)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    with stage_run(layout, "ddpm-train", {}) as run:
        began = time.monotonic()
        for step in range(600):
            run.log_metrics({"loss": 1.0 / (step + 1), "lr": 0.1}, step)
        seconds = time.monotonic() - began
    assert sum(batches) == 1200
    assert len(batches) <= 2 + seconds / FLUSH_SECONDS  # every FLUSH_SECONDS, and 1,000 at a time at the end
    assert len(client(layout).get_metric_history(runs_of(layout)[0].info.run_id, "lr")) == 600


def test_a_run_is_found_again_by_the_content_it_left(layout: Layout) -> None:
    first, second, again = (content_digest(train(layout, text)) for text in ("first", "second", "first"))
    finder = RunFinder(layout.root, layout.settings)
    newest, *_, oldest = runs_of(layout)
    found = finder.newest("tile", "distill", {"0" * 32, again})
    assert found is not None
    assert (first, found.run_id) == (again, newest.info.run_id) != (second, oldest.info.run_id)
    assert finder.newest_of_any(first) == found
    assert finder.newest("tile", "export", {first}) is None
    assert finder.newest("another", "distill", {first}) is None
    assert finder.newest_of_any("0" * 32) is None
    assert RunFinder(layout.root, switched_off(layout.settings)).newest_of_any(first) is None


def test_runs_of_the_projects_own_store_are_found_beside_a_server(
    layout: Layout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digest = content_digest(train(layout))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"postgresql://user:secret@127.0.0.1:{free_port()}/x")
    found = RunFinder(tmp_path, layout.settings).newest("tile", "distill", {digest})
    assert found is not None
    assert found.store == f"sqlite:///{tmp_path}/mlflow.db"
    assert "When and by which runs is not told" in caplog.text
    assert "secret" not in caplog.text


def test_a_run_says_which_flow_run_started_it_and_who_acts(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    monkeypatch.setattr("socket.gethostname", lambda: "line-2")
    train(layout)
    monkeypatch.setenv("FLAWSMITH_FLOW_RUN", "9f8e7d6c")
    monkeypatch.setenv("FLAWSMITH_ACTOR", "prefect flow run calm-otter")
    assert current_flow_run() == "9f8e7d6c"
    digest = content_digest(train(layout))
    assert [(run.data.tags["flawsmith.flow_run"], run.data.tags["flawsmith.actor"]) for run in runs_of(layout)] == [
        ("9f8e7d6c", "prefect flow run calm-otter"),
        ("", "ada@line-2"),
    ]
    found = RunFinder(layout.root, layout.settings).newest_of_any(digest)
    assert found is not None
    assert found.flow_run == "9f8e7d6c"


@pytest.mark.parametrize("error", [KeyError("getpwuid(): uid not found: 1234"), OSError("No username set")])
def test_a_user_without_a_name_acts_under_a_number(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """As in a container that runs under any user id; Python 3.13 raises OSError where 3.11 raises KeyError."""

    def nameless() -> str:
        raise error

    monkeypatch.setattr("getpass.getuser", nameless)
    assert current_actor() == f"uid {os.getuid()}@{socket.gethostname()}"


def test_an_empty_name_of_an_actor_counts_as_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAWSMITH_ACTOR", "")
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    assert current_actor() == f"ada@{socket.gethostname()}"


def switched_off(settings: Settings) -> Settings:
    return replace(settings, tracking=replace(settings.tracking, mode="off"))


def test_mode_off_records_nothing_and_imports_no_mlflow(tmp_path: Path) -> None:
    project(tmp_path)
    program = f"""
import sys
from pathlib import Path
from flawsmith.config import load_settings
from flawsmith.layout import Layout
from flawsmith.tracking import stage_run
layout = Layout(load_settings(Path({str(PARAMS)!r}), {{"tracking.mode": "off"}}), "tile", Path({str(tmp_path)!r}))
with stage_run(layout, "distill", {{"a": 1}}) as run:
    run.log_metrics({{"loss": 1.0}}, 1)
    run.log_artifact(layout.root / "missing.png")
    run.set_output(layout.root / "missing")
assert not [name for name in sys.modules if name.partition(".")[0] in ("mlflow", "sqlalchemy", "torch")], "imported"
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert not (tmp_path / "mlflow.db").exists()


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, empty_store: Path
) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A real `mlflow server` on loopback, answering before the first test uses it."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "server.db").write_bytes(empty_store.read_bytes())
    port = free_port()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
            + ["--backend-store-uri", f"sqlite:///{folder / 'server.db'}"]
            + ["--artifacts-destination", str(folder / "artifacts")],
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        )
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}", process, folder / "log")
            yield f"http://127.0.0.1:{port}", process
        finally:
            stop(process)


def wait_until_healthy(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + 500  # some 12 s of CPU time; a busy machine takes minutes
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=1) as answer:  # noqa: S310
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"mlflow server did not come up: {log.read_text()[-2000:]}")


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End the server and its workers (a session of its own), and reap it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=10)


def test_a_server_records_the_chain(
    tmp_path: Path, server: tuple[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server[0])
    layout = project(tmp_path)
    with stage_run(layout, "evaluate", {"batch": 8}) as run:
        for step in range(300):
            run.log_metrics({"loss": step / 2}, step)
        run.log_artifact(write(tmp_path / "roc.png", "png"))
    [recorded] = runs_of(layout)
    assert recorded.info.status == "FINISHED"
    assert recorded.info.artifact_uri.startswith("mlflow-artifacts:")
    assert [item.path for item in client(layout).list_artifacts(recorded.info.run_id)] == ["roc.png"]
    assert len(client(layout).get_metric_history(recorded.info.run_id, "loss")) == 300
    assert RunFinder(tmp_path, layout.settings).newest_of_any(content_digest(train(layout))) is not None
    assert check_store(tmp_path) == server[0]
    assert not (tmp_path / "mlflow.db").exists()


def test_a_server_that_dies_costs_warnings_and_not_the_stage(
    tmp_path: Path,
    server: tuple[str, "subprocess.Popen[bytes]"],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Last of all: it ends the module's server."""
    url, process = server
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    layout = project(tmp_path)
    with stage_run(layout, "distill", {}) as run:
        stop(process)
        run.log_metrics({"loss": 1.0}, 0)
        result = write(layout.stage("distill") / "detector.safetensors", "weights")
        run.set_output(result)
    assert result.read_text() == "weights"
    assert "1 metrics of stage distill could not be recorded" in caplog.text
    assert "the end of the run of stage distill not recorded" in caplog.text
