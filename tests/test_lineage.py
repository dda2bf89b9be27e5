import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from flawsmith.config import load_settings
from flawsmith.dvc import Artefact, LockedStage, content_digest
from flawsmith.errors import UserError
from flawsmith.layout import Layout
from flawsmith.lineage import Lineage, read_lineage, render_lineage, walk
from flawsmith.tracking import Run, stage_run

PARAMS = Path(__file__).parents[1] / "params.yaml"
RUN = Run("0123456789abcdef", datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "fedcba9876543210", True, "9f8e7d6c-5b4a-4321")


def artefact(path: str) -> Artefact:
    return Artefact(path, path.encode().hex().ljust(64, "0"))


def stage(name: str, reads: tuple[str, ...], writes: tuple[str, ...]) -> LockedStage:
    return LockedStage(name, "tile", tuple(map(artefact, reads)), tuple(map(artefact, writes)), "c" * 64, "f" * 64)


def lineage_of(
    target: str, stages: list[LockedStage], run_of: Callable[[LockedStage], Run | None] = lambda stage: None
) -> Lineage:
    return walk(artefact(target), stages, lambda item: item.path.startswith("data/"), run_of)


CHAIN = [
    stage("ddpm", ("data/tile",), ("artifacts/ddpm",)),
    stage("synth", ("artifacts/ddpm", "data/tile"), ("artifacts/triplets",)),
    stage("model", ("artifacts/triplets", "data/tile"), ("artifacts/model.onnx", "artifacts/parity.json")),
]


def test_a_model_leads_back_to_its_data() -> None:
    tree = lineage_of("artifacts/model.onnx", CHAIN)
    assert tree.complete
    triplets, data = tree.parents
    assert triplets.stage == CHAIN[1]
    assert data.is_source
    assert triplets.parents[0].stage == CHAIN[0]
    assert [node.artefact.path for node in tree.nodes()] == [
        "artifacts/model.onnx",
        "artifacts/triplets",
        "artifacts/ddpm",
        "data/tile",
    ]


def test_the_drawing_says_stage_run_time_revision_and_flow() -> None:
    text = render_lineage(lineage_of("artifacts/model.onnx", CHAIN, lambda item: RUN if item.name == "synth" else None))
    assert "artifacts/model.onnx  [" in text
    assert "<- synth (tile)" in text
    assert "run 0123456789ab  2026-01-02 03:04:05 UTC  git fedcba987654 + changes" in text
    assert "params ffffffffffff  Prefect 9f8e7d6c-5b4\n" in text
    assert text.count("proven by dvc.lock, no run recorded here  code cccccccccccc") == 2
    assert "source data" in text
    assert "Incomplete" not in text


@pytest.mark.parametrize(
    ("stages", "note"),
    [
        ([CHAIN[0], CHAIN[2]], "dvc.lock names no stage that made it"),
        ([CHAIN[0], replace(CHAIN[1], outputs=(Artefact("artifacts/triplets", "0"),)), CHAIN[2]], "another content"),
    ],
)
def test_a_missing_link_is_named(stages: list[LockedStage], note: str) -> None:
    tree = lineage_of("artifacts/model.onnx", stages)
    assert not tree.complete
    assert [item.path for item in tree.missing()] == ["artifacts/triplets"]
    text = render_lineage(tree)
    assert "MISSING LINK" in text
    assert note in text
    assert "Incomplete: the origin of artifacts/triplets is not recorded." in text


def test_a_stage_that_left_several_artefacts_is_drawn_once() -> None:
    both = stage("last", ("artifacts/model.onnx", "artifacts/parity.json"), ("artifacts/c",))
    text = render_lineage(lineage_of("artifacts/c", [*CHAIN, both]))
    assert text.count("<- synth (tile)") == 1
    assert text.count("(drawn above)") == 1


@pytest.mark.parametrize(
    ("target", "maker"),
    [("artifacts/triplets/mask/1.png", "synth"), ("data/tile/train", None), ("artifacts", None), ("elsewhere", None)],
)
def test_a_part_of_an_output_is_known_and_a_folder_of_several_stages_is_not(target: str, maker: str | None) -> None:
    found = lineage_of(target, CHAIN)
    assert (found.stage.name if found.stage else None) == maker
    assert found.is_source == target.startswith("data/")


NAMES = ("data/x", "artifacts/p", "artifacts/q", "artifacts/r", "artifacts/s")


@given(st.lists(st.tuples(st.integers(0, 4), st.sets(st.integers(0, 4), max_size=3)), max_size=5))
def test_nodes_are_distinct_and_hold_every_missing_link(history: list[tuple[int, set[int]]]) -> None:
    stages = [
        stage(str(i), tuple(NAMES[j] for j in sorted(reads) if j < writes), (NAMES[writes],))
        for i, (writes, reads) in enumerate(history)
    ]
    tree = lineage_of("artifacts/s", stages)
    nodes = tree.nodes()
    assert nodes[0] == tree
    assert len({node.artefact for node in nodes}) == len(nodes)
    unknown = {node.artefact for node in nodes if node.stage is None and not node.is_source}
    assert unknown == set(tree.missing())
    assert tree.complete == (not unknown)
    assert render_lineage(tree).count("Incomplete") == (0 if tree.complete else 1)


# --- a real project of DVC


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages that DVC has committed and MLflow recorded."""
    root = tmp_path_factory.mktemp("project")
    layout = Layout(load_settings(PARAMS), "tile", root)
    for number in range(3):
        write(root / f"data/tile/train/good/{number:03}.png", f"pixels {number}")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with stage_run(layout, "synthesize", {}) as run:
            for number in range(3):
                write(layout.stage("synthesize") / f"defect/{number}/fit.png", f"defect {number}")
            run.set_output(layout.stage("synthesize") / "defect")
        with stage_run(layout, "export", {}) as run:
            run.set_output(write(layout.stage("export") / "model.onnx", "model"))
            write(layout.stage("export") / "parity.json", "{}")
    made = "artifacts/tile"
    stages = {
        "synthesize": {"deps": ["data/tile/train", "code.py"], "outs": [f"{made}/synthesize/defect"]},
        "export": {
            "deps": [f"{made}/synthesize/defect"],
            "outs": [f"{made}/export/model.onnx", f"{made}/export/parity.json"],
        },
    }
    write(root / "code.py", "code = 1\n")
    matrix = {"matrix": {"category": ["tile"]}, "cmd": "true"}
    write(root / "dvc.yaml", yaml.safe_dump({"stages": {name: matrix | what for name, what in stages.items()}}))
    for words in (["init", "--quiet", "--no-scm"], ["commit", "--quiet", "--force"]):
        subprocess.run([sys.executable, "-m", "dvc", *words], cwd=root, check=True, capture_output=True, timeout=300)
    return root


@pytest.fixture
def layout(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Layout:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = shutil.copytree(template, tmp_path / "project", symlinks=True)
    return Layout(load_settings(PARAMS), "tile", root)


def test_dvc_lock_and_the_recorded_runs_prove_a_model(layout: Layout, tmp_path: Path) -> None:
    model = layout.stage("export") / "model.onnx"
    tree = read_lineage(layout.root, layout.settings, model)
    text = render_lineage(tree)
    assert tree.complete, text
    assert [node.stage.name for node in tree.nodes() if node.stage] == ["export", "synthesize"]
    assert all(node.run for node in tree.nodes() if node.stage), "dvc.lock's digests lead to the runs"
    assert "data/tile/train" in text

    digest = content_digest(model)
    copy = write(tmp_path / "line" / "installed.onnx", "model")
    for target in (copy, digest, digest[:8], digest[:8].upper()):
        assert read_lineage(layout.root, layout.settings, target) == tree
    for target in (layout.stage("synthesize"), layout.stage("synthesize") / "defect" / "0"):
        found = read_lineage(layout.root, layout.settings, target)
        assert found.complete
        assert found.stage is not None
        assert found.stage.name == "synthesize"

    (layout.root / "mlflow.db").unlink()
    without = read_lineage(layout.root, layout.settings, model)
    assert without.complete
    assert "no run recorded here" in render_lineage(without)


def test_changed_content_is_named_with_the_remedy(layout: Layout) -> None:
    model = layout.stage("export") / "model.onnx"
    (layout.root / "code.py").write_text("code = 2\n")  # newer code makes no origin untrue
    assert read_lineage(layout.root, layout.settings, model).complete
    triplet = layout.stage("synthesize") / "defect/1/fit.png"
    for path in (model, triplet, layout.root / "data/tile/train/good/001.png"):
        content = path.read_bytes()
        path.unlink()  # DVC links its cache, or shares blocks with it
        path.write_bytes(content + b" ")
        tree = read_lineage(layout.root, layout.settings, model)
        assert not tree.complete
        [(name, sentence)] = tree.changed
        assert path.relative_to(layout.root).is_relative_to(name)
        assert sentence.endswith("run `dvc repro export@tile`")
        assert f"Changed since: {sentence}." in render_lineage(tree)
        path.write_bytes(content)


def test_a_model_of_another_dvc_lock_names_the_run_that_made_it(layout: Layout, tmp_path: Path) -> None:
    with stage_run(layout, "export", {}) as run:
        run.set_output(write(tmp_path / "earlier.onnx", "an earlier model"))
    tree = read_lineage(layout.root, layout.settings, tmp_path / "earlier.onnx")
    assert not tree.complete
    assert f"Run {run.run_id[:12]} at git unknown made it" in render_lineage(tree)
    unknown = read_lineage(layout.root, layout.settings, write(tmp_path / "alien.onnx", "alien"))
    assert "dvc.lock names no stage that made it" in render_lineage(unknown)


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nowhere.onnx", "no existing file"),
        ("abc", "no existing file"),
        ("0" * 64, r"no content with digest 0+; .*`dvc repro`"),
    ],
)
def test_a_target_that_is_nothing_is_refused(tmp_path: Path, target: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_lineage(tmp_path, load_settings(PARAMS), target)


def test_an_ambiguous_digest_is_refused(tmp_path: Path) -> None:
    outs = [{"path": f"artifacts/{name}", "md5": f"abcdef{name}"} for name in ("1", "2")]
    write(tmp_path / "dvc.lock", yaml.safe_dump({"stages": {"export@tile": {"outs": outs}}}))
    with pytest.raises(UserError, match="ambiguous; give more digits of one of abcdef1, abcdef2"):
        read_lineage(tmp_path, load_settings(PARAMS), "abcdef")


def test_the_digest_of_a_folder_is_dvcs(template: Path) -> None:
    locked = yaml.safe_load((template / "dvc.lock").read_text())["stages"]["synthesize@tile"]
    assert content_digest(template / "data/tile/train") in {item["md5"] for item in locked["deps"]}
    assert content_digest(template / "artifacts/tile/synthesize/defect") == locked["outs"][0]["md5"]
