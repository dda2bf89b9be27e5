from dataclasses import replace
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from flawsmith.lineage import Artefact, Lineage, RunRecord, render_lineage, walk


def artefact(path: str) -> Artefact:
    return Artefact(path.rsplit("/", 1)[-1], path, path.encode().hex().ljust(64, "0"))


def record(run_id: str, reads: tuple[str, ...], writes: tuple[str, ...], dirty: bool = False) -> RunRecord:
    return RunRecord(
        run_id,
        stage=f"stage-{run_id}",
        category="tile",
        started=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
        revision="0123456789abcdef",
        dirty=dirty,
        params_digest="f" * 64,
        inputs=tuple(map(artefact, reads)),
        outputs=tuple(map(artefact, writes)),
    )


def lineage_of(target: str, runs: list[RunRecord]) -> Lineage:
    return walk(
        artefact(target),
        lambda wanted: [run for run in runs if wanted.digest in {item.digest for item in run.outputs}],
        lambda item: item.path.startswith("data/"),
        lambda item: f"nobody wrote {item.path}",
    )


CHAIN = [
    record("ddpm", ("data/tile",), ("artifacts/ddpm",)),
    record("synth", ("artifacts/ddpm", "data/tile"), ("artifacts/triplets",), dirty=True),
    record("model", ("artifacts/triplets", "data/tile"), ("artifacts/model.onnx",)),
]


def test_a_model_leads_back_to_its_data() -> None:
    tree = lineage_of("artifacts/model.onnx", CHAIN)
    assert tree.complete
    assert tree.missing() == ()
    triplets, data = tree.parents
    assert triplets.run == CHAIN[1]
    assert data.is_source
    assert triplets.parents[0].run == CHAIN[0]
    assert triplets.parents[0].parents[0].is_source


def test_the_drawing_says_stage_run_time_revision_and_params() -> None:
    text = render_lineage(lineage_of("artifacts/model.onnx", CHAIN))
    assert "artifacts/model.onnx  [" in text
    assert "<- stage-synth (tile)" in text
    assert "run synth  2026-01-02 03:04:05 UTC  git 0123456789ab + changes  params ffffffffffff" in text
    assert "data/tile" in text
    assert "source data" in text
    assert "Incomplete" not in text


def test_a_missing_link_is_named() -> None:
    tree = lineage_of("artifacts/model.onnx", [CHAIN[0], CHAIN[2]])
    assert not tree.complete
    assert [item.path for item in tree.missing()] == ["artifacts/triplets"]
    text = render_lineage(tree)
    assert "MISSING LINK" in text
    assert "nobody wrote artifacts/triplets" in text
    assert "Incomplete: the origin of artifacts/triplets is not recorded." in text


def test_an_unknown_start_is_a_missing_link() -> None:
    tree = lineage_of("artifacts/other.onnx", CHAIN)
    assert tree.run is None
    assert not tree.complete


def test_of_several_writers_the_newest_counts() -> None:
    tree = lineage_of("artifacts/ddpm", [record("newer", ("data/tile",), ("artifacts/ddpm",)), CHAIN[0]])
    assert tree.run is not None
    assert tree.run.run_id == "newer"
    assert tree.writers == 2
    assert "newest of 2 runs" in render_lineage(tree)


def test_a_shared_run_is_drawn_once() -> None:
    runs = [
        record("first", ("data/tile",), ("artifacts/a", "artifacts/b")),
        record("second", ("artifacts/a", "artifacts/b"), ("artifacts/c",)),
    ]
    text = render_lineage(lineage_of("artifacts/c", runs))
    assert text.count("run first") == 1
    assert text.count("(drawn above)") == 1


NAMES = ("data/x", "artifacts/p", "artifacts/q", "artifacts/r")


@given(
    st.lists(
        st.tuples(st.sets(st.sampled_from(NAMES), max_size=3), st.sets(st.sampled_from(NAMES), max_size=3)), max_size=5
    )
)
def test_any_history_ends_even_where_runs_read_what_they_wrote(history: list[tuple[set[str], set[str]]]) -> None:
    runs = [record(str(i), tuple(sorted(reads)), tuple(sorted(writes))) for i, (reads, writes) in enumerate(history)]
    tree = lineage_of("artifacts/p", runs)
    assert tree.complete == (tree.missing() == ())
    assert render_lineage(tree).count("Incomplete") == (0 if tree.complete else 1)


def test_nodes_hold_everything_behind_a_model_once_and_the_model_first() -> None:
    nodes = lineage_of("artifacts/model.onnx", CHAIN).nodes()
    assert nodes[0].artefact.path == "artifacts/model.onnx"
    assert sorted(node.artefact.path for node in nodes) == [
        "artifacts/ddpm",
        "artifacts/model.onnx",
        "artifacts/triplets",
        "data/tile",
    ]


def test_a_start_without_a_run_is_the_only_node() -> None:
    tree = lineage_of("artifacts/other.onnx", CHAIN)
    assert tree.nodes() == (tree,)


def test_the_drawing_names_the_prefect_run_that_started_a_stage() -> None:
    started = replace(CHAIN[0], flow_run="9f8e7d6c-5b4a-4321-8765-fedcba987654")
    text = render_lineage(lineage_of("artifacts/model.onnx", [started, *CHAIN[1:]]))
    [line] = [line for line in text.splitlines() if "Prefect" in line]
    assert "run ddpm " in line
    assert line.endswith("Prefect 9f8e7d6c-5b4")


@given(
    st.lists(
        st.tuples(st.sets(st.sampled_from(NAMES), max_size=3), st.sets(st.sampled_from(NAMES), max_size=3)), max_size=5
    )
)
def test_nodes_of_any_history_are_distinct_and_hold_every_missing_link(
    history: list[tuple[set[str], set[str]]],
) -> None:
    runs = [record(str(i), tuple(sorted(reads)), tuple(sorted(writes))) for i, (reads, writes) in enumerate(history)]
    tree = lineage_of("artifacts/p", runs)
    nodes = tree.nodes()
    assert nodes[0] == tree
    kinds = [(node.artefact.digest, node.run is None) for node in nodes]
    assert len(set(kinds)) == len(kinds)
    unknown = {node.artefact for node in nodes if node.run is None and not node.is_source}
    assert unknown == set(tree.missing()), "a content known elsewhere in the tree must not hide a missing link"
    for node in nodes:
        assert {parent.artefact.digest for parent in node.parents} <= {digest for digest, _ in kinds}
