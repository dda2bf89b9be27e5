import contextlib
import json
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

from flawsmith.errors import FlawsmithError, UserError
from flawsmith.files import digest_path
from flawsmith.layout import Layout
from flawsmith.settings import Settings, load_settings
from flawsmith.tracking import (
    FLUSH_SECONDS,
    check_store,
    current_actor,
    current_flow_run,
    read_lineage,
    render_lineage,
    stage_run,
    tracking_uri,
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


def run_chain(layout: Layout, text: str = "x") -> Path:
    """Three stages that write something and say so; returns the model."""
    data = layout.root / "data" / "tile" / "train"
    with stage_run(layout, "ddpm-train", {"data": data}, {"steps": 3}) as run:
        write(layout.stage("ddpm-train") / "unet.safetensors", f"unet {text}")
        write(layout.stage("ddpm-train") / "config.json", "{}")
        run.set_outputs({"ddpm": layout.stage("ddpm-train")})
    unet = layout.stage("ddpm-train") / "unet.safetensors"  # one file of the folder that was declared
    with stage_run(layout, "synthesize", {"ddpm": unet, "data": data}, {"seed": 0}) as run:
        write(layout.stage("synthesize") / "defect" / "fit-00000.png", f"defect {text}")
        run.set_outputs({"triplets": layout.stage("synthesize")})
    with stage_run(layout, "export", {"triplets": layout.stage("synthesize")}, {"opset": 18}) as run:
        model = write(layout.stage("export") / "model.onnx", f"model {text}")
        run.set_outputs({"model": model})
    return model


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
    with stage_run(layout, "nothing", {}, {}):
        pass
    return layout.root / "mlflow.db"


@pytest.fixture
def layout(tmp_path: Path, empty_store: Path) -> Layout:
    (tmp_path / "mlflow.db").write_bytes(empty_store.read_bytes())
    return project(tmp_path)


def test_a_run_whose_input_is_changed_meanwhile_has_failed(layout: Layout) -> None:
    write(layout.root / "dvc.yaml", "stages: {distill: {deps: [data]}}")
    with pytest.raises(FlawsmithError, match=r"data/tile/train/good/000\.png"), stage_run(layout, "distill", {}, {}):
        write(layout.root / "data/tile/train/good/000.png", "other pixels")
    [run_info] = runs_of(layout)
    assert run_info.info.status == "FAILED"


def test_a_run_holds_params_metrics_figures_and_digests(layout: Layout) -> None:
    with stage_run(layout, "distill", {"data": layout.root / "data" / "tile"}, {"a": {"b": 0.5}, "c": [1, 2]}) as run:
        for step in range(3):
            run.log_metrics({"loss": 1 / (step + 1), "recall@95%": 1.0}, step)
        run.set_tag("provider", "cpu")
        run.log_artifact(write(layout.root / "figure.png", "png"))
        folder = write(layout.root / "docs" / "index.html", "html").parent
        run.log_artifact(folder)
        output = write(layout.stage("distill") / "detector.safetensors", "weights").parent
        run.set_outputs({"detector": output})
    [run_info] = runs_of(layout)
    assert run_info.info.status == "FINISHED"
    assert run_info.data.params == {"a.b": "0.5", "c": "[1, 2]"}
    assert "recall_95_" in run_info.data.metrics
    history = client(layout).get_metric_history(run_info.info.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(0, 1.0), (1, 0.5), (2, 1 / 3)]
    assert {item.path for item in client(layout).list_artifacts(run_info.info.run_id)} == {"figure.png", "docs"}
    assert run_info.data.tags["flawsmith.provider"] == "cpu"
    assert digest_path(output) in run_info.data.tags["flawsmith.outputs"]
    assert digest_path(layout.root / "data" / "tile") in run_info.data.tags["flawsmith.inputs"]
    assert str(layout.root) not in run_info.data.tags["flawsmith.inputs"]


def test_figures_lie_beside_the_default_store(layout: Layout) -> None:
    with stage_run(replace(layout, category="a b"), "distill", {}, {}) as run:
        run.log_artifact(write(layout.root / "figure.png", "png"))
    assert len(list((layout.root / "mlruns" / "a b").rglob("figure.png"))) == 1


def test_git_revision_is_recorded_and_changes_are_told_from_outputs(layout: Layout) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.com")
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=layout.root, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    write(layout.root / "code.py", "1")
    write(layout.root / "dvc.lock", "1")
    git("add", "code.py", "dvc.lock")
    git("commit", "-qm", "start")
    write(layout.root / "dvc.lock", "2")
    with stage_run(layout, "one", {}, {}):
        pass
    write(layout.root / "code.py", "2")
    with stage_run(layout, "two", {}, {}):
        pass
    tags = {run.data.tags["flawsmith.stage"]: run.data.tags for run in runs_of(layout)}
    assert tags["one"]["mlflow.source.git.commit"] == git("rev-parse", "HEAD")
    assert tags["one"]["flawsmith.git_dirty"] == "false"
    assert tags["two"]["flawsmith.git_dirty"] == "true"


def test_a_failed_stage_marks_its_run_failed_with_the_message(layout: Layout) -> None:
    def stage() -> None:
        with stage_run(layout, "ddpm-train", {}, {}) as run:
            run.set_outputs({"never": layout.root / "never"})
            run.log_metrics({"loss": 2.0}, 0)
            raise UserError("too few images")

    with pytest.raises(UserError, match="too few images"):
        stage()
    [run_info] = runs_of(layout)
    assert run_info.info.status == "FAILED"
    assert run_info.data.tags["flawsmith.error"] == "UserError: too few images"
    assert run_info.data.metrics == {"loss": 2.0}
    assert "flawsmith.outputs" not in run_info.data.tags


def test_a_promised_output_that_is_missing_fails_the_run(layout: Layout) -> None:
    with pytest.raises(UserError, match="never"), stage_run(layout, "ddpm-train", {}, {}) as run:
        run.set_outputs({"never": layout.root / "never"})
    assert runs_of(layout)[0].info.status == "FAILED"


def test_hundreds_of_steps_are_sent_in_a_handful_of_batches(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    # Requests are counted, not seconds: what else runs in this process cannot change them.
    from mlflow.tracking import MlflowClient

    batches: list[int] = []
    send = MlflowClient.log_batch

    def counted(self: Any, run_id: str, metrics: Any = (), **others: Any) -> None:
        batches.append(len(metrics))
        send(self, run_id, metrics=metrics, **others)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    with stage_run(layout, "ddpm-train", {}, {}) as run:
        batches.clear()  # those of the params
        began = time.monotonic()
        for step in range(600):
            run.log_metrics({"loss": 1.0 / (step + 1), "lr": 0.1}, step)
        seconds = time.monotonic() - began
    assert sum(batches) == 1200
    assert len(batches) <= 3 + seconds / FLUSH_SECONDS  # every FLUSH_METRICS values, every FLUSH_SECONDS, at the end
    assert len(client(layout).get_metric_history(runs_of(layout)[0].info.run_id, "lr")) == 600


def test_a_model_leads_back_to_its_data(layout: Layout) -> None:
    model = run_chain(layout)
    tree = read_lineage(layout.root, layout.settings, model)
    text = render_lineage(tree)
    assert tree.complete, text
    assert [line.split("<-")[1].split()[0] for line in text.splitlines() if "<-" in line] == [
        "export",
        "synthesize",
        "ddpm-train",
    ]
    assert text.count("data/tile/train") == 2
    assert "source data" in text

    digest = digest_path(model)
    for target in (str(model), digest, digest[:8], digest[:8].upper()):
        same = read_lineage(layout.root, layout.settings, target)
        assert (same.artefact.path, same.run, same.parents) == (tree.artefact.path, tree.run, tree.parents)
    folder = read_lineage(layout.root, layout.settings, layout.stage("ddpm-train"))
    assert folder.run is not None
    assert folder.run.stage == "ddpm-train"


def test_a_record_too_long_for_a_tag_breaks_no_later_question(layout: Layout, caplog: pytest.LogCaptureFixture) -> None:
    with stage_run(layout, "notes", {}, {}) as run:
        many = {f"{number:03}": write(layout.root / "notes" / f"{number:03}-{'n' * 150}", str(number))
                for number in range(60)}  # fmt: skip
        run.set_outputs(many)
    assert "are too many for its record" in caplog.text
    assert read_lineage(layout.root, layout.settings, many["000"]).run is not None
    [recorded] = runs_of(layout)
    outputs = recorded.data.tags["flawsmith.outputs"]
    json.loads(outputs)
    # cut in the middle, as it was once written
    client(layout).set_tag(recorded.info.run_id, "flawsmith.outputs", outputs[:-80])
    assert read_lineage(layout.root, layout.settings, many["000"]).run is not None
    client(layout).set_tag(recorded.info.run_id, "flawsmith.outputs", outputs[:80])
    assert read_lineage(layout.root, layout.settings, run_chain(layout)).complete


def test_a_copy_elsewhere_is_known_by_its_content(layout: Layout, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = tmp_path_factory.mktemp("line") / "installed.onnx"
    copy.write_bytes(run_chain(layout).read_bytes())
    assert read_lineage(layout.root, layout.settings, copy).complete


def test_changed_content_breaks_the_chain_and_is_reported(layout: Layout) -> None:
    model = run_chain(layout)
    write(layout.stage("synthesize") / "defect" / "fit-00000.png", "retouched by hand")
    with stage_run(layout, "export", {"triplets": layout.stage("synthesize")}, {}) as run:
        write(model, "model of retouched triplets")
        run.set_outputs({"model": model})
    tree = read_lineage(layout.root, layout.settings, model)
    assert not tree.complete
    text = render_lineage(tree)
    assert "artifacts/tile/synthesize" in text
    assert "MISSING LINK" in text
    assert "changed or made again" in text

    write(model, "tampered")
    assert read_lineage(layout.root, layout.settings, model).run is None


def test_repeated_runs_of_the_same_content_are_counted(layout: Layout) -> None:
    run_chain(layout)
    newest = read_lineage(layout.root, layout.settings, run_chain(layout))
    assert newest.writers == 2
    assert newest.run is not None
    assert newest.run.run_id == runs_of(layout)[0].info.run_id


def test_a_run_says_which_flow_run_started_it_and_who_acts(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAWSMITH_FLOW_RUN", "9f8e7d6c-5b4a-4321-8765-fedcba987654")
    monkeypatch.setenv("FLAWSMITH_ACTOR", "prefect flow run calm-otter")
    assert current_flow_run() == "9f8e7d6c-5b4a-4321-8765-fedcba987654"
    model = run_chain(layout)
    for run in runs_of(layout):
        assert run.data.tags["flawsmith.flow_run"] == "9f8e7d6c-5b4a-4321-8765-fedcba987654"
        assert run.data.tags["flawsmith.actor"] == "prefect flow run calm-otter"
    tree = read_lineage(layout.root, layout.settings, model)
    assert {node.run.flow_run for node in tree.nodes() if node.run} == {"9f8e7d6c-5b4a-4321-8765-fedcba987654"}
    assert render_lineage(tree).count("Prefect 9f8e7d6c-5b4") == 3


def test_a_run_by_hand_has_no_flow_run_and_names_the_user_on_this_machine(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("getpass.getuser", lambda: "ada")
    monkeypatch.setattr("socket.gethostname", lambda: "line-2")
    with stage_run(layout, "distill", {}, {}) as run:
        write(layout.stage("distill") / "detector.safetensors", "weights")
        run.set_outputs({"distill": layout.stage("distill")})
    [recorded] = runs_of(layout)
    assert recorded.data.tags.get("flawsmith.flow_run", "") == ""
    assert recorded.data.tags["flawsmith.actor"] == "ada@line-2"
    assert "Prefect" not in render_lineage(read_lineage(layout.root, layout.settings, layout.stage("distill")))


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


def test_runs_of_the_other_content_are_not_mixed_up(layout: Layout) -> None:
    first = digest_path(run_chain(layout, "first"))
    second = digest_path(run_chain(layout, "second"))
    trees = [read_lineage(layout.root, layout.settings, digest) for digest in (first, second)]
    assert all(tree.complete for tree in trees)
    assert trees[0].parents[0].artefact.digest != trees[1].parents[0].artefact.digest


@pytest.mark.parametrize(
    ("target", "message"),
    [("nowhere.onnx", "no existing file"), ("abc", "no existing file"), ("0" * 64, "No recorded run")],
)
def test_a_target_that_is_nothing_is_refused(layout: Layout, target: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_lineage(layout.root, layout.settings, target)


def test_without_a_store_lineage_says_so_and_creates_none(tmp_path: Path) -> None:
    layout = project(tmp_path)
    with pytest.raises(UserError, match="no runs are recorded"):
        read_lineage(tmp_path, layout.settings, layout.root / "data")
    assert check_store(tmp_path).startswith("sqlite:///")
    assert not (tmp_path / "mlflow.db").exists()


def switched_off(settings: Settings) -> Settings:
    return replace(settings, tracking=replace(settings.tracking, mode="off"))


def test_mode_off_records_nothing_and_imports_no_mlflow(tmp_path: Path) -> None:
    project(tmp_path)
    program = f"""
import sys
from pathlib import Path
from flawsmith.settings import load_settings
from flawsmith.layout import Layout
from flawsmith.tracking import stage_run
layout = Layout(load_settings(Path({str(PARAMS)!r}), {{"tracking.mode": "off"}}), "tile", Path({str(tmp_path)!r}))
with stage_run(layout, "distill", {{"data": layout.root / "missing"}}, {{"a": 1}}) as run:
    run.log_metrics({{"loss": 1.0}}, 1)
    run.log_artifact(layout.root / "missing.png")
    run.set_outputs({{"x": layout.root / "missing"}})
assert not [name for name in sys.modules if name.partition(".")[0] in ("mlflow", "sqlalchemy", "torch")], "imported"
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert not (tmp_path / "mlflow.db").exists()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_a_dead_port_is_a_quick_and_clear_error(layout: Layout, monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    uri = f"{scheme}://user:secret@127.0.0.1:{free_port()}/x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"tracking\.mode: off") as caught, stage_run(layout, "distill", {}, {}):
        pytest.fail("the stage must not start")
    assert time.monotonic() - start < 10
    assert uri.replace("secret", "***") in str(caught.value)
    assert "secret" not in str(caught.value)
    with pytest.raises(UserError, match="cannot be used"):
        check_store(layout.root)


def test_a_file_store_is_refused(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (layout.root / "mlruns").as_uri())
    with pytest.raises(UserError, match="cannot be used"), stage_run(layout, "distill", {}, {}):
        pass


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
    with stage_run(layout, "evaluate", {}, {"batch": 8}) as run:
        for step in range(300):
            run.log_metrics({"loss": step / 2}, step)
        run.log_artifact(write(tmp_path / "roc.png", "png"))
    [recorded] = runs_of(layout)
    assert recorded.info.status == "FINISHED"
    assert recorded.info.artifact_uri.startswith("mlflow-artifacts:")
    assert [item.path for item in client(layout).list_artifacts(recorded.info.run_id)] == ["roc.png"]
    assert len(client(layout).get_metric_history(recorded.info.run_id, "loss")) == 300
    assert read_lineage(tmp_path, layout.settings, run_chain(layout)).complete
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
    with stage_run(layout, "distill", {}, {}) as run:
        stop(process)
        run.log_metrics({"loss": 1.0}, 0)
        result = write(layout.stage("distill") / "detector.safetensors", "weights")
        run.set_outputs({"detector": result})
    assert result.read_text() == "weights"
    assert "1 metrics of stage distill could not be recorded" in caplog.text
    assert "the end of the run of stage distill not recorded" in caplog.text
