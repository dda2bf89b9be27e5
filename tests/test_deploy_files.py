"""docs/deploy could not be run where it was written; at least it is well-formed and its names agree with the code."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flawsmith import __version__
from flows.postgres import DATABASES

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "docs" / "deploy"
FILES = {path.name: path.read_text() for path in DEPLOY.rglob("*") if path.is_file()}
OBJECTS = [
    item
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    for item in yaml.safe_load_all(path.read_text())
    if path.name != "kustomization.yaml"
]
CODE = "".join(path.read_text() for folder in ("src", "flows") for path in (ROOT / folder).rglob("*.py"))
POOLS = {item["work_pool"]["name"] for item in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}


def found(content: Any, key: str) -> Iterator[Any]:
    """Every value of a key, however deep."""
    for name, value in content.items() if isinstance(content, dict) else enumerate(content):
        if name == key:
            yield value
        if isinstance(value, dict | list):
            yield from found(value, key)


def test_manifests_refer_to_what_is_there() -> None:
    known = {(item["kind"], item["metadata"]["name"]): item for item in OBJECTS}
    assert len(known) == len(OBJECTS) >= 15
    template = json.loads(FILES["base-job-template.json"])
    everything = [*OBJECTS, template]
    for kind, key in (("ConfigMap", "configMapRef"), ("Secret", "secretRef")):
        assert {item["name"] for item in found(everything, key)} <= {
            name for found_kind, name in known if found_kind == kind
        }
    for item in found(everything, "secretKeyRef"):
        assert item["key"] in known["Secret", item["name"]]["stringData"]
    for name in yaml.safe_load(FILES["kustomization.yaml"])["resources"]:
        assert name in FILES
    images = {image for image in found(everything, "image") if isinstance(image, str)} - {"{{ image }}"}
    assert images == {f"registry.example.com/flawsmith:{__version__}"}
    gaps = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template["job_configuration"])))
    assert gaps == set(template["variables"]["properties"])
    for host, port in re.findall(r"http://(prefect|mlflow):(\d+)", str(everything)):
        assert known["Service", host]["spec"]["ports"][0]["port"] == int(port)


def test_the_compose_file_makes_the_databases_that_make_up_uses() -> None:
    compose = yaml.safe_load(FILES["compose.yaml"])
    (service,) = compose["services"].values()
    made = {service["environment"]["POSTGRES_DB"], *re.findall(r"CREATE DATABASE (\w+);", str(compose["configs"]))}
    assert made == set(DATABASES)
    assert {item["source"] for item in service["configs"]} == set(compose["configs"])
    assert "FLAWSMITH_STACK_DATABASE" in CODE


def test_every_variable_of_ours_is_read_and_every_copied_file_is_there() -> None:
    code = CODE + FILES["worker.sh"] + (ROOT / "prefect.yaml").read_text()
    for file, text in FILES.items():
        unknown = {name for name in re.findall(r"\bFLAWSMITH_[A-Z_]+", text) if not re.search(rf"{name}\b", code)}
        assert not unknown, f"{file} names {unknown}, which nothing reads"
    for line in re.findall(r"^COPY (.+) \S+$", FILES["Dockerfile"], re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split())
    for name in POOLS:
        assert re.search(rf"^(\w+ \| )*{name}( \| \w+)*\)", FILES["worker.sh"], re.MULTILINE)
        assert any(
            f"/docs/deploy/worker.sh {name}\n" in text for file, text in FILES.items() if file.endswith(".service")
        )


def worker(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("FLAWSMITH_", "PREFECT_"))}
    clean["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["sh", DEPLOY / "worker.sh", *arguments]
    return subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=False)


def git(folder: Path, *words: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
    return subprocess.run(["git", "-C", folder, *who, *words], check=True, capture_output=True, text=True).stdout


def test_the_script_keeps_its_checkout_up_to_date(tmp_path: Path) -> None:
    origin, checkout = tmp_path / "origin", tmp_path / "checkout"
    (origin / ".dvc").mkdir(parents=True)
    git(origin, "init", "--quiet")
    for name, text in {".dvc/config": "", "dvc.yaml": "stages: {}\n", "dvc.lock": "schema: '2.0'\n"}.items():
        (origin / name).write_text(text)
    settings = {"FLAWSMITH_CHECKOUT": str(checkout), "FLAWSMITH_REPOSITORY": str(origin)}
    git(origin, "add", "--all")
    git(origin, "commit", "--quiet", "--message", "first")
    for _ in range(2):
        made = worker("checkout", FLAWSMITH_DVC_REMOTE="s3://bucket/dvc", **settings)
        assert made.returncode == 0, made.stderr
        if (text := (checkout / "dvc.lock").read_text()) == "schema: '2.0'\n":
            (checkout / "dvc.lock").write_text("what a retraining left\n")
    assert text == "what a retraining left\n"  # the same revision: nothing is lost
    assert "url = s3://bucket/dvc" in (checkout / ".dvc" / "config.local").read_text()
    (origin / "params.yaml").write_text("categories: []\n")
    git(origin, "add", "--all")
    git(origin, "commit", "--quiet", "--message", "second")
    assert worker("checkout", **settings).returncode == 0
    assert git(checkout, "rev-parse", "HEAD") == git(origin, "rev-parse", "HEAD")
    assert (checkout / "dvc.lock").read_text() == "schema: '2.0'\n"


@pytest.mark.parametrize(("role", "said"), [("cpu", "say what to be"), ("gpu", "FLAWSMITH_GPU: is not set")])
def test_the_script_says_what_it_lacks(role: str, said: str) -> None:
    refused = worker(role)
    assert (refused.returncode, said in refused.stderr) == (2, True)
