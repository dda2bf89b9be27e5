"""docs/deploy: files that could not be run where they were written; at least their names agree with the code."""

import configparser
import json
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from flawsmith import __version__

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "docs" / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").glob("*.yaml"))
UNITS = sorted(DEPLOY.glob("*.service"))
IMAGE = f"registry.example.com/flawsmith:{__version__}"

# Read by tools that have no list of their own to ask.
DOCUMENTED = {
    "AWS_ACCESS_KEY_ID",  # boto3
    "AWS_SECRET_ACCESS_KEY",
    "CUDA_VISIBLE_DEVICES",
    "DO_NOT_TRACK",  # Prefect, and others
    "DVC_NO_ANALYTICS",
    "GX_ANALYTICS_ENABLED",
    "OMP_NUM_THREADS",
    "PATH",
    "PREFECT_INTEGRATIONS_KUBERNETES_OBSERVER_NAMESPACES",  # prefect-kubernetes, which is not installed here
    "PYTHONPATH",
    "PYTHONUNBUFFERED",
}


@cache
def manifests() -> list[tuple[str, dict[str, Any]]]:
    return [
        (path.name, document)
        for path in MANIFESTS
        for document in yaml.safe_load_all(path.read_text())
        if path.name != "kustomization.yaml"
    ]


@cache
def template() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DEPLOY / "kubernetes" / "base-job-template.json").read_text())
    return content


def pods() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every pod specification, with the name of what makes it."""
    for _, document in manifests():
        if "template" in document.get("spec", {}):
            yield document["metadata"]["name"], document["spec"]["template"]["spec"]
    yield "job template", template()["job_configuration"]["job_manifest"]["spec"]["template"]["spec"]


def containers() -> Iterator[tuple[str, dict[str, Any]]]:
    for name, pod in pods():
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            yield name, container


def object_named(kind: str, name: str) -> dict[str, Any]:
    found = [item for _, item in manifests() if item["kind"] == kind and item["metadata"]["name"] == name]
    assert len(found) == 1, f"{kind} {name} is there {len(found)} times"
    return found[0]


def pools() -> set[str]:
    deployments = yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]
    return {deployment["work_pool"]["name"] for deployment in deployments}


def script() -> str:
    return (DEPLOY / "worker.sh").read_text()


def unit(path: Path) -> list[tuple[str, str, str]]:
    """(section, key, value) of a systemd unit; keys may repeat, which configparser alone would refuse."""
    rows, section = [], ""
    for line in path.read_text().splitlines():
        if line.startswith("[") and line.endswith("]"):
            section = line[1:-1]
        elif line and not line.startswith("#"):
            key, sign, value = line.partition("=")
            assert sign, f"{path.name}: {line!r} is no setting"
            rows.append((section, key, value))
    return rows


def test_every_file_says_how_far_it_was_tried() -> None:
    files = [path for path in DEPLOY.rglob("*") if path.is_file()]
    assert len(files) >= 15
    for path in files:
        head = path.read_text() if path.suffix == ".json" else "\n".join(path.read_text().splitlines()[:12])
        assert "UNTESTED" in head or "Tried by hand" in head, path


def test_every_manifest_is_an_object_of_kubernetes() -> None:
    assert len(manifests()) >= 15
    for file, document in manifests():
        assert {"apiVersion", "kind", "metadata"} <= set(document), file
    names = [(item["kind"], item["metadata"]["name"]) for _, item in manifests()]
    assert len(set(names)) == len(names)


def test_the_kustomization_names_files_that_are_there() -> None:
    content = yaml.safe_load((DEPLOY / "kubernetes" / "kustomization.yaml").read_text())
    assert all((DEPLOY / "kubernetes" / name).is_file() for name in content["resources"])
    (image,) = content["images"]
    assert f"{image['name']}:{image['newTag']}" == IMAGE
    assert not any("secret" in name for name in content["resources"])  # secrets are made apart, never from here
    assert content["namespace"] == object_named("Namespace", "flawsmith")["metadata"]["name"]


def test_one_image_everywhere() -> None:
    images = {container["image"] for _, container in containers()} - {"{{ image }}"}
    assert images == {IMAGE}
    assert template()["variables"]["properties"]["image"]["default"] == IMAGE
    assert IMAGE in (DEPLOY / "Dockerfile").read_text()


def test_the_image_is_made_of_what_the_repository_has() -> None:
    lines = (DEPLOY / "Dockerfile").read_text().splitlines()
    copied = [name for line in lines if line.startswith("COPY ") for name in line.split()[1:-1]]
    assert {"constraints.txt", "pyproject.toml", "docs/deploy/worker.sh"} <= set(copied)
    assert all((ROOT / name).exists() for name in copied)
    assert any("-c constraints.txt" in line for line in lines)
    user = next(int(line.split()[1]) for line in lines if line.startswith("USER "))
    for name, pod in pods():
        assert pod["securityContext"]["runAsUser"] == user, name


def test_every_pool_has_a_worker() -> None:
    served = {
        container["args"][0]: name
        for name, container in containers()
        if name.startswith("flawsmith-") and "command" not in container
    }
    assert set(served) == pools()
    started = {row[2].split()[1] for path in UNITS for row in unit(path) if row[1] == "ExecStart"}
    assert started == pools()
    assert all(re.search(rf"^(\w+ \| )*{role}( \| \w+)*\)", script(), re.MULTILINE) for role in pools())
    worker = next(item for name, item in containers() if name == "flawsmith-job-worker")
    assert worker["command"][worker["command"].index("--pool") + 1] in pools()


def test_only_the_workers_that_compute_take_a_gpu() -> None:
    taken = {
        name: container["resources"]["limits"].get("nvidia.com/gpu", 0)
        for name, container in containers()
        if "resources" in container
    }
    assert taken.pop("flawsmith-gpu") == 1  # one retraining a worker: more would lie idle
    assert taken.pop("job template") == "{{ gpus }}"
    assert not any(taken.values())


def test_addresses_lead_to_services() -> None:
    ports = {
        item["metadata"]["name"]: item["spec"]["ports"][0]["port"]
        for _, item in manifests()
        if item["kind"] == "Service" and item["spec"].get("ports")
    }
    named = "\n".join(path.read_text() for path in MANIFESTS)
    for host, port in re.findall(r"http://(prefect|mlflow):(\d+)", named):
        assert ports[host] == int(port)
    for name, service in ports.items():
        (container,) = object_named("Deployment", name)["spec"]["template"]["spec"]["containers"]
        command = container["command"] + container.get("args", [])
        assert command[command.index("--port") + 1] == str(service)
        assert container["ports"] == [{"name": "http", "containerPort": service}]
        assert container["readinessProbe"]["httpGet"]["port"] == "http"


def test_what_is_referred_to_is_there() -> None:
    referred = 0
    for name, container in containers():
        for source in container.get("envFrom", []):
            kind = "ConfigMap" if "configMapRef" in source else "Secret"
            assert object_named(kind, next(iter(source.values()))["name"]), name
            referred += 1
        for entry in container.get("env", []) if isinstance(container.get("env"), list) else []:
            key = entry.get("valueFrom", {}).get("secretKeyRef")
            if key:
                assert key["key"] in object_named("Secret", key["name"])["stringData"], name
                referred += 1
    assert referred >= 10
    for _, item in manifests():
        if item["kind"] == "StatefulSet":
            assert object_named("Service", item["spec"]["serviceName"])


def test_no_file_holds_a_secret() -> None:
    for path in DEPLOY.rglob("*"):
        text = path.read_text() if path.is_file() else ""
        for key, value in re.findall(r"(SECRET_ACCESS_KEY|PASSWORD|AUTH_STRING|auth-string)[=:] ?(\S+)", text):
            assert "change-me" in value, f"{path}: {key}"
        assert set(re.findall(r"postgresql[^\s:]*://\w+:([^@]+)@", text)) <= {"change-me"}, path


def environment_names() -> dict[str, str]:
    """Every variable that docs/deploy sets, and where."""
    names: dict[str, str] = {}
    for name, container in containers():
        if isinstance(container.get("env"), list):
            names.update({entry["name"]: name for entry in container["env"]})
    names.update(dict.fromkeys(template()["variables"]["properties"]["env"]["default"], "base-job-template.json"))
    names.update(dict.fromkeys(object_named("ConfigMap", "flawsmith-workers")["data"], "config.yaml"))
    names.update(dict.fromkeys(object_named("Secret", "flawsmith-s3")["stringData"], "secrets.example.yaml"))
    for path in UNITS:
        names.update({row[2].partition("=")[0]: path.name for row in unit(path) if row[1] == "Environment"})
    names.update(
        dict.fromkeys(re.findall(r"^#?([A-Z_]+)=", (DEPLOY / "flawsmith.env").read_text(), re.MULTILINE), "env")
    )
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    block = dockerfile[dockerfile.index("\nENV ") :].partition("\n\n")[0]
    names.update(dict.fromkeys(re.findall(r"([A-Z_]+)=", block), "Dockerfile"))
    return names


def test_every_variable_is_read_by_someone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of importing MLflow's command line
        import mlflow.cli
        import mlflow.environment_variables
        import prefect.settings
    mlflow_names = {option.envvar for option in mlflow.cli.server.params} | set(dir(mlflow.environment_variables))
    code = "\n".join(
        path.read_text() for folder in ("src", "flows") for path in (ROOT / folder).rglob("*.py") if path.is_file()
    )
    code += script() + (ROOT / "prefect.yaml").read_text()
    names = environment_names()
    assert {"FLAWSMITH_GPU", "FLAWSMITH_CHECKOUT", "PREFECT_API_URL", "MLFLOW_TRACKING_URI"} <= set(names)
    for name, where in names.items():
        known = (
            name in DOCUMENTED
            or (name.startswith("FLAWSMITH_") and name in code)
            or (name.startswith("PREFECT_") and hasattr(prefect.settings, name))
            or name in mlflow_names
        )
        assert known, f"{where} sets {name}, which nothing reads"


def test_the_worker_script_explains_what_it_reads() -> None:
    head, _, body = script().partition("set -eu")
    explained = set(re.findall(r"^# ([A-Z_]+) ", head, re.MULTILINE))
    read = set(re.findall(r"\$\{?(FLAWSMITH_[A-Z_]+)", body))
    assert {name for name in explained if name.startswith("FLAWSMITH_")} == read
    template_names = set(re.findall(r"^([A-Z_]+)=", (DEPLOY / "flawsmith.env").read_text(), re.MULTILINE))
    assert read - template_names <= {"FLAWSMITH_CHECKOUT", "FLAWSMITH_GPU"}  # these are of one worker, in its unit


def test_the_job_template_fills_every_gap() -> None:
    gaps = set(re.findall(r"\{\{ (\w+) \}\}", json.dumps(template()["job_configuration"])))
    assert gaps == set(template()["variables"]["properties"])


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_units_start_the_script_in_the_checkout(path: Path) -> None:
    rows = unit(path)
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(path.read_text())
    assert parser.sections() == ["Unit", "Service", "Install"]
    (command,) = [value for _, key, value in rows if key == "ExecStart"]
    folder = parser["Service"]["WorkingDirectory"]
    assert command.split()[0] == f"{folder}/docs/deploy/worker.sh"
    assert ("Service", "Environment", f"FLAWSMITH_CHECKOUT={folder}") in rows
    assert parser["Service"]["EnvironmentFile"] == "/etc/flawsmith/worker.env"
    assert os.access(DEPLOY / "worker.sh", os.X_OK)


class Origin:
    """A git repository that holds as much of a project as the script looks at."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run(["git", "init", "-q", folder], check=True)
        (folder / ".dvc").mkdir()
        (folder / ".dvc" / "config").write_text("[core]\n    analytics = false\n")
        (folder / ".dvc" / ".gitignore").write_text("/config.local\n/tmp\n/cache\n")
        (folder / "dvc.yaml").write_text("stages: {}\n")
        (folder / "dvc.lock").write_text("schema: '2.0'\n")
        self.commit("first")

    def commit(self, message: str) -> str:
        who = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
        subprocess.run(["git", "-C", self.folder, "add", "-A"], check=True)
        subprocess.run(["git", "-C", self.folder, *who, "commit", "-q", "-m", message], check=True)
        return self.revision(self.folder)

    @staticmethod
    def revision(folder: Path) -> str:
        return subprocess.run(
            ["git", "-C", folder, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
        ).stdout.strip()


def worker(*arguments: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("FLAWSMITH_", "PREFECT_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["sh", DEPLOY / "worker.sh", *arguments],
        env=clean | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_script_keeps_its_checkout_up_to_date(tmp_path: Path) -> None:
    origin, checkout = Origin(tmp_path / "origin"), tmp_path / "checkout"
    settings = {
        "FLAWSMITH_CHECKOUT": str(checkout),
        "FLAWSMITH_REPOSITORY": str(origin.folder),
        "FLAWSMITH_DVC_REMOTE": "s3://bucket/dvc",
        "FLAWSMITH_DVC_ENDPOINT": "https://s3.example.com",
        "FLAWSMITH_DVC_CACHE": str(tmp_path / "cache"),
    }
    made = worker("checkout", **settings)
    assert made.returncode == 0, made.stderr
    assert Origin.revision(checkout) == Origin.revision(origin.folder)
    config = configparser.ConfigParser()
    config.read_string(re.sub(r"^\s+", "", (checkout / ".dvc" / "config.local").read_text(), flags=re.MULTILINE))
    assert config["core"]["remote"] == "shared"
    assert dict(config["'remote \"shared\"'"]) == {"url": "s3://bucket/dvc", "endpointurl": "https://s3.example.com"}
    assert config["cache"]["dir"] == str(tmp_path / "cache")

    (checkout / "dvc.lock").write_text("what a retraining left\n")
    assert worker("checkout", **settings).returncode == 0
    assert (checkout / "dvc.lock").read_text() == "what a retraining left\n"  # the same revision: nothing is lost

    (origin.folder / "params.yaml").write_text("categories: []\n")
    revision = origin.commit("second")
    assert worker("checkout", **settings).returncode == 0
    assert Origin.revision(checkout) == revision
    assert (checkout / "dvc.lock").read_text() == "schema: '2.0'\n"


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        ((), {}, "say what to be: gpu, control, setup or checkout"),
        (("cpu",), {}, "say what to be"),
        (("gpu",), {"FLAWSMITH_CHECKOUT": "/nowhere"}, "FLAWSMITH_GPU: is not set; give its GPU a name"),
        (("control",), {}, "FLAWSMITH_CHECKOUT: is not set; name the folder"),
    ],
)
def test_the_script_says_what_it_lacks(arguments: tuple[str, ...], environment: dict[str, str], said: str) -> None:
    refused = worker(*arguments, **environment)
    assert refused.returncode == 2
    assert said in refused.stderr
