"""A whole stack for the tests of this folder: real servers on loopback, real workers, small real projects.

    from stack_workers import at_work

    def test_something(stack, make_checkout):
        checkout = make_checkout("first", categories=["brushed_metal", "woven_fabric"])
        with at_work(stack, checkout):                             # a worker `gpu-0`, and one `control`
            checkout.run("python", "-m", "flows.nightly", **stack.variables())
        stack.api("flow_runs/filter", {"limit": 5})                # Prefect's REST API: POST, or GET without content

Every test here bears the marker `stack` and runs with `make stack-test` alone. PostgreSQL holds the data where it is
installed, else SQLite; what is PostgreSQL's own is skipped then. A test waits for what is to happen, not for a time;
TIMEOUT is for what hangs.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from stack_workers import FAST, load_module

from flows.machine import free_port
from flows.stack import Stack

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent

# A developer's own server, profile or key must never see these tests.
for _name in [name for name in os.environ if name.startswith(("PREFECT_", "MLFLOW_"))]:
    del os.environ[_name]

TIMEOUT = 1800  # seconds for a test with its fixtures, on a machine that does much else
# Models of seconds know nothing, and yet one has to become champion.
LENIENT = {
    "promote": {
        "min_image_auroc": 0.0, "min_aupro": 0.0, "max_false_alarm_rate": 1.0, "margin": 0.5, "pixel_margin": 0.5,
        "defect_margin": 0.5, "max_latency_ms": 600_000.0, "max_latency_ratio": 100.0, "bootstrap": 100,
        "latency_runs": 3,
    }
}  # fmt: skip


small_projects = load_module("small_projects", ROOT / "tests" / "pipeline" / "conftest.py")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker("stack")
            item.add_marker(pytest.mark.timeout(TIMEOUT))


@pytest.fixture(scope="session")
def open_folder() -> Iterator[Callable[[], Path]]:
    """Makes folders that every user can reach into, as a state folder must be when root starts PostgreSQL.

    pytest's own temporary folders are closed to others. They are removed at the end.
    """
    made: list[Path] = []

    def make() -> Path:
        folder = Path(tempfile.mkdtemp(prefix="flawsmith-stack-"))
        folder.chmod(0o755)
        made.append(folder)
        return folder

    yield make
    for folder in made:
        shutil.rmtree(folder)


@pytest.fixture(scope="session")
def stack(open_folder: Callable[[], Path], request: pytest.FixtureRequest) -> Iterator[Stack]:
    """The servers of one stack, healthy, for the whole session; a test adds workers with `at_work`.

    Each `flawsmith` process notes what it opens and saves in watch/opened.tsv of its checkout (`Project.noted`).
    """
    folder = open_folder()
    for name in ("no-config", "watch"):
        (folder / name).mkdir()
    watch = small_projects.WATCH.format(record="watch/opened.tsv")
    (folder / "watch" / "sitecustomize.py").write_text(watch)
    environment = FAST | {"PYTHONPATH": str(folder / "watch")}
    environment |= dict.fromkeys(("DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR"), str(folder / "no-config"))
    ports = {"prefect": free_port(), "mlflow": free_port()}
    stack = Stack(folder / "state", ports=ports, environment=environment)
    try:
        stack.up(setup=False)
        yield stack
    finally:
        if sys.exc_info()[0] or request.session.testsfailed:
            for path in sorted((stack.state / "logs").glob("*.log")):  # what a server or worker died of
                print(f"\n== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-60:]))
        stack.down()


@pytest.fixture(scope="session")
def make_checkout(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Makes a small project with its own git repository: `make_checkout(name, categories=, remote=, cache=)`.

    It holds dvc.yaml, the code, flows/, prefect.yaml and pyproject.toml in one commit, the small settings of
    tests/pipeline, and no data: the pipeline's own stage `demo-data` makes those of each category, which must be names
    of embedded surfaces (brushed_metal, woven_fabric). What is returned has `folder`, `run(*command, **environment)`,
    `stage(name)` and `set_params({section: {key: value}})`; see tests/pipeline/conftest.py.

    Args of the maker:
        name: a name for the folder, once a session.
        categories: default brushed_metal alone.
        remote: a folder that becomes the default DVC remote.
        cache: a folder that becomes the DVC cache, shared by all checkouts that name it.
    """
    base = tmp_path_factory.mktemp("checkouts")

    def make(
        name: str,
        categories: Sequence[str] = ("brushed_metal",),
        remote: Path | None = None,
        cache: Path | None = None,
    ) -> Any:
        folder = base / name
        project = small_projects.Project.create(folder)
        project.set_params(LENIENT)
        params = yaml.safe_load((folder / "params.yaml").read_text()) | {"categories": list(categories)}
        (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        shutil.copytree(ROOT / "flows", folder / "flows", ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("prefect.yaml", "pyproject.toml"):
            shutil.copyfile(ROOT / file, folder / file)
        if remote is not None:
            project.run("dvc", "remote", "add", "--default", "shared", str(remote))
        if cache is not None:
            project.run("dvc", "cache", "dir", str(cache))
        (folder / ".git" / "info" / "exclude").write_text("watch/\n")
        for key, value in {"user.name": "flawsmith tests", "user.email": "tests@localhost"}.items():
            project.run("git", "config", key, value)
        project.run("git", "add", "--all")
        project.run("git", "commit", "--quiet", "--message", "A small project")
        return project

    return make


@pytest.fixture(scope="session")
def bare(make_checkout: Callable[..., Any]) -> Any:
    """As after `make repro` of woven_fabric in a fresh clone: no server, the runs are in the project's own store."""
    checkout = make_checkout("bare", categories=["woven_fabric"])
    checkout.run("dvc", "repro")
    return checkout
