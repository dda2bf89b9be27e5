"""What a study would run: sharing, addresses, and what is refused before an hour is spent."""

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import yaml
from study_samples import create_project

from flawsmith.errors import UserError
from flawsmith_lab.study.plan import METHODS, PATCHCORE, PIPELINE, READS, SHARED, build_plan, code_digest, parse_grid

ROOT = Path(__file__).parents[3]


@pytest.fixture
def project(tmp_path):
    return create_project(tmp_path / "project")


def stages(plan):
    return Counter(run.stage for run in plan.runs)


def digests(plan):
    return {run.stage: run.folder.name for run in plan.runs}


def test_a_diffusion_model_is_trained_once_a_seed_and_only_for_methods_that_diffuse(project):
    plan = build_plan(project.request(methods=tuple(METHODS), seeds=(0, 1), parts=("all", "research", "report")))
    assert len(plan.cells) == 6 * 2 * 3
    assert stages(plan) == {
        "ddpm-train": 2, "synthesize": 10, "validate": 10, "distill": 10, "evaluate": 30, PATCHCORE: 6,
    }  # fmt: skip
    without = {run.stage for cell in plan.cells if cell.method == "no-diffusion" for run in cell.runs}
    assert without == set(PIPELINE) - {"ddpm-train"}


def test_a_grid_shares_every_stage_before_the_first_that_reads_its_key(project):
    grid = parse_grid(["distill.head_steps=2,4,6", "evaluate.false_alarm_rate=0.05,0.1"])
    plan = build_plan(project.request(grid=grid))
    assert len({cell.label for cell in plan.cells}) == 6
    assert stages(plan) == {"ddpm-train": 1, "synthesize": 1, "validate": 1, "distill": 3, "evaluate": 6}


def test_a_method_gets_no_row_for_a_key_that_it_does_not_read(project):
    grid = parse_grid(["ddpm-train.steps=4,8", "distill.batch=2,3"])
    plan = build_plan(project.request(methods=("flawsmith", "cutpaste", PATCHCORE), grid=grid))
    rows = Counter(cell.method for cell in plan.cells)
    assert rows == {"flawsmith": 4, "cutpaste": 2, PATCHCORE: 1}
    assert stages(plan)["synthesize"] == 3


def test_the_seed_is_every_stages_and_the_splits(project):
    (cell,) = build_plan(project.request(seeds=(7,))).cells
    settings = cell.runs[-1].layout.settings
    sections = (settings.ddpm_train, settings.synthesize, settings.distill, settings.evaluate)
    assert [settings.data.split_seed, *(section.seed for section in sections)] == [7] * 5
    assert settings.tracking.mode == "off"
    (cell,) = build_plan(project.request(replaced={"tracking.mode": "on"})).cells
    assert cell.runs[0].layout.settings.tracking.mode == "on"


def test_the_teacher_and_the_place_of_the_data_do_not_train_the_diffusion_model_again(project, tmp_path):
    before = digests(build_plan(project.request()))
    other = digests(build_plan(project.request(replaced={"teacher.backbone": "resnet18"})))
    assert {name for name in before if before[name] != other[name]} == {"distill", "evaluate"}
    (project.folder / "data").rename(tmp_path / "elsewhere")
    assert digests(build_plan(project.request(data=tmp_path / "elsewhere"))) == before


def test_an_image_changes_what_reads_it(project):
    before = digests(build_plan(project.request(methods=("flawsmith", PATCHCORE))))
    tiles = project.folder / "data" / "tiles"
    (tiles / "test" / "good" / "000.png").write_bytes((tiles / "test" / "good" / "001.png").read_bytes())
    tested = digests(build_plan(project.request(methods=("flawsmith", PATCHCORE))))
    assert {name for name in before if before[name] != tested[name]} == {"evaluate", PATCHCORE}
    (tiles / "train" / "good" / "000.png").write_bytes((tiles / "train" / "good" / "001.png").read_bytes())
    trained = digests(build_plan(project.request(methods=("flawsmith", PATCHCORE))))
    assert all(trained[name] != tested[name] for name in before)


def test_grid_values_are_yaml_and_may_be_lists():
    grid = parse_grid(["synthesize.strength=[0.1,0.4], [0.2, 0.2]", "ddpm-train.flip=true,false", "x.y=a"])
    assert grid == {"synthesize.strength": ([0.1, 0.4], [0.2, 0.2]), "ddpm-train.flip": (True, False), "x.y": ("a",)}


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        *(([text], "write it as section") for text in ("distill.batch", "batch=2", "a.b=", "a.b=[2", "a.b=1,,2")),
        (["distill.batch=2,2"], "stands there twice"),
        (["distill.batch=2,3", "distill.batch=4"], "names .* twice"),
    ],
)
def test_a_grid_of_another_form_or_that_repeats_itself_is_refused(texts, words):
    with pytest.raises(UserError, match=words):
        parse_grid(texts)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ("knn",)}, "--methods knn: there is no such one; known are flawsmith"),
        ({"parts": ("half",)}, "--part half"),
        ({"categories": ("bolts",)}, "bolts does not exist"),
        ({"categories": ("tiles", "tiles")}, "--categories names one twice"),
        ({"seeds": ()}, "--seeds is empty"),
        ({"seeds": (-1,)}, "`seed` is -1; it must be a whole number of 0 or more"),
        ({"data": Path("nowhere")}, "nowhere/tiles does not exist"),
        ({"reference": "best"}, "--reference best: no such row; known are flawsmith"),
        ({"replaced": {"distill.seed": 3}}, "use --seeds"),
        ({"replaced": {"data.root": "x"}}, "use --data"),
        ({"grid": {"evaluate.part": ("all", "report")}}, "use --part"),
        ({"grid": {"distill.bach": (1, 2)}}, "did you mean `batch`"),
        ({"grid": {"distill.batch": (1, 0)}}, "flawsmith distill.batch=0: .*must be a whole number from 1"),
        ({"grid": {"export.latency_runs": (17, 18)}}, "no stage of flawsmith reads it"),
        ({"grid": {"distill.batch": (1, 2)}, "replaced": {"distill.batch": 2}}, "in --set and in --grid"),
        ({"grid": {"synthesize.mask": ("perlin", "noise")}, "methods": ("random-mask",)}, "random-mask sets it"),
    ],
)
def test_what_cannot_be_run_is_refused_in_a_sentence(project, changes, words):
    with pytest.raises(UserError, match=words):
        build_plan(project.request(**changes))


def test_without_a_labelled_test_set_there_is_no_patchcore_and_no_part(project):
    (project.folder / "data" / "tiles" / "test").rename(project.folder / "gone")
    assert len(build_plan(project.request()).cells) == 1
    for changes in ({"methods": (PATCHCORE,)}, {"parts": ("report",)}):
        with pytest.raises(UserError, match="no labelled test set"):
            build_plan(project.request(**changes))


def test_the_reference_is_patchcore_unless_another_is_named(project):
    assert build_plan(project.request(methods=("flawsmith", PATCHCORE))).reference == PATCHCORE
    assert build_plan(project.request()).reference == "flawsmith"
    named = project.request(grid={"distill.batch": (2, 3)}, reference="flawsmith distill.batch=3")
    assert build_plan(named).reference == "flawsmith distill.batch=3"


def test_a_request_does_not_depend_on_where_it_is_called(project, monkeypatch, tmp_path):
    monkeypatch.chdir(project.folder)
    request = dataclasses.replace(project.request(), params=Path("params.yaml"), data=Path("data"))
    here = build_plan(request)
    monkeypatch.chdir(tmp_path)
    assert [run.folder for run in here.runs] == [run.folder for run in build_plan(project.request()).runs]
    assert all(Path(run.layout.settings.data.root).is_absolute() for run in here.runs)


def test_every_section_that_dvc_yaml_names_of_a_stage_decides_its_runs():
    stated = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    read = set(SHARED)
    for name in PIPELINE:
        read |= set(READS[name])
        (sections,) = stated[name]["params"][0].values()
        assert set(sections) - read <= ({"teacher"} if name == "ddpm-train" else {"synthesize.mixture"})


def test_code_that_leaves_a_result_counts_and_what_uses_a_model_does_not(tmp_path):
    for name in ("detector/patchcore.py", "serve/app.py", "devices.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("before")
    before = code_digest(tmp_path)
    (tmp_path / "serve" / "app.py").write_text("after")
    (tmp_path / "detector" / "patchcore.pyc").write_text("compiled")
    assert code_digest(tmp_path) == before
    (tmp_path / "devices.py").write_text("after")
    assert code_digest(tmp_path) != before


def test_a_category_s_own_settings_decide_its_stages(project):
    params = project.params.read_text()
    assert "overrides: {}" in params
    project.params.write_text(params.replace("overrides: {}", "overrides: {tiles: {synthesize: {mixture: {own: 1}}}}"))
    assert "ddpm-train" not in stages(build_plan(project.request()))
