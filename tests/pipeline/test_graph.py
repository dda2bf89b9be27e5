"""What DVC runs and what it does not, by the repository's own dvc.yaml; the stages are stubs."""

import json

import numpy as np
import yaml
from conftest import CATEGORY, Project  # type: ignore[import-not-found]
from small_settings import SMALL

from flawsmith.data.images import write_png


def target(stage: str) -> str:
    return f"{stage}@{CATEGORY}"


def test_a_second_repro_runs_nothing(stubbed: Project) -> None:
    before = (stubbed.folder / "dvc.lock").read_bytes()
    result = stubbed.run("dvc", "repro")
    assert stubbed.ran(result) == []
    assert "Data and pipelines are up to date." in result.stdout
    assert (stubbed.folder / "dvc.lock").read_bytes() == before


def test_changing_distill_runs_only_distill_and_later(copied: Project) -> None:
    copied.set_params({"distill": {"head_steps": SMALL["distill"]["head_steps"] + 1}})
    ran = [name for name in copied.ran(copied.run("dvc", "repro")) if not name.startswith("settings")]
    assert ran == [target(stage) for stage in ("distill", "evaluate", "export")]
    assert json.loads(copied.run("dvc", "status", "--json").stdout) == {}


def test_a_failed_gate_stops_what_comes_after(copied: Project) -> None:
    copied.set_params({"validate": {"mask_area": [0.0001, 0.5]}})
    result = copied.run("dvc", "repro", succeeds=False, FAILING_STAGE="validate")
    assert result.returncode != 0
    assert copied.ran(result)[-1] == target("validate")
    assert "flawsmith: refused" in result.stderr


def test_a_users_category_is_seen_by_dvc_and_its_images_are_ignored_by_git(copied: Project) -> None:
    # an ignore pattern such as `/data/*` at the top makes DVC overlook data/*.dvc, and `dvc checkout` delete the images
    image = copied.folder / "data" / "bottle" / "train" / "good" / "000.png"
    write_png(image, np.zeros((8, 8, 3), np.uint8))
    copied.run("dvc", "add", "data/bottle")
    listed = copied.run("git", "ls-files", "--others", "--exclude-standard", "data").stdout.splitlines()
    assert listed == ["data/.gitignore", "data/bottle.dvc"]
    copied.run("dvc", "checkout")
    assert image.exists()
    content = yaml.safe_load((copied.folder / "params.yaml").read_text())
    (copied.folder / "params.yaml").write_text(yaml.safe_dump({**content, "categories": [CATEGORY, "bottle"]}))
    assert "data/bottle.dvc" in copied.run("dvc", "dag", "--dot", "ddpm-train@bottle").stdout


def test_a_value_of_one_category_leaves_the_others_up_to_date(copied: Project) -> None:
    path = copied.folder / "params.yaml"
    content = {**yaml.safe_load(path.read_text()), "categories": [CATEGORY, "woven_fabric"]}
    path.write_text(yaml.safe_dump(content))
    copied.run("dvc", "repro")
    own = {**content, "overrides": {"woven_fabric": {"evaluate": {"false_alarm_rate": 0.02}}}}
    path.write_text(yaml.safe_dump(own))
    settings = [f"settings@{CATEGORY}", "settings@woven_fabric"]
    ran = copied.ran(copied.run("dvc", "repro"))
    assert sorted(ran) == sorted([*settings, "evaluate@woven_fabric", "export@woven_fabric"])
    path.write_text("# a comment\n" + yaml.safe_dump({**own, "monitor": {"alpha": 0.02}}))  # no stage's business
    code = copied.folder / "src" / "flawsmith" / "monitoring" / "config.py"
    code.write_text(code.read_text() + "# as if a default had changed\n")
    assert sorted(copied.ran(copied.run("dvc", "repro"))) == settings
