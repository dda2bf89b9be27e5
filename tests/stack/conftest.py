"""A whole stack for the tests of this folder: real servers on loopback, real workers, small real projects.

    def test_something(stack, make_checkout):
        checkout = make_checkout("first", categories=["brushed_metal", "woven_fabric"])
        stack.set_up(checkout.folder)                              # pools, limits, deployments, automations
        stack.start_worker("gpu", "gpu-0", checkout.folder, gpu="gpu-0")
        stack.api("flow_runs/filter", {"limit": 5})                # Prefect's REST API: POST, or GET without content
        checkout.run("python", "-m", "flows.nightly", **stack.variables())
        stack.kill_worker("gpu-0")                                 # SIGKILL, flow runs and stages included

Every test here bears the marker `stack` and runs with `make stack-test` alone, this folder's beside those of `nights`,
each with servers of their own. A test waits for what is to happen, not for a time; TIMEOUT is for what hangs.
"""

import importlib.util
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.processes import free_port
from flows.stack import Stack

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent

# A developer's own server, profile or key must never see these tests.
for _name in [name for name in os.environ if name.startswith(("PREFECT_", "MLFLOW_"))]:
    del os.environ[_name]

# The server's loops, shortened so that a test does not wait for them.
FAST = {
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",
    "PREFECT_SERVER_SERVICES_LATE_RUNS_LOOP_SECONDS": "5",
    "PREFECT_SERVER_SERVICES_FOREMAN_LOOP_SECONDS": "5",
    "PREFECT_WORKER_QUERY_SECONDS": "1",
    "OMP_NUM_THREADS": "1",
}

TIMEOUT = 2400  # seconds for a test with its fixtures, on a machine that does much else
SURFACES = ("brushed_metal", "woven_fabric")
# Models of seconds know nothing, and yet one has to become champion.
LENIENT = {
    "promote": {
        "min_image_auroc": 0.0, "min_aupro": 0.0, "max_false_alarm_rate": 1.0, "margin": 0.5, "pixel_margin": 0.5,
        "defect_margin": 0.5, "max_latency_ms": 600_000.0, "max_latency_ratio": 100.0, "bootstrap": 100,
        "latency_runs": 3,
    }
}  # fmt: skip


def _load_small_projects() -> Any:
    """tests/pipeline/conftest.py as a module: pytest gives no other way to share what a conftest defines."""
    path = ROOT / "tests" / "pipeline" / "conftest.py"
    specification = importlib.util.spec_from_file_location("small_projects", path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[specification.name] = module  # dataclasses look their module up
    specification.loader.exec_module(module)
    return module


small_projects = _load_small_projects()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker("stack")
            item.add_marker(pytest.mark.timeout(TIMEOUT))


@pytest.fixture(scope="session")
def open_folder() -> Iterator[Callable[[], Path]]:
    """Makes folders that every user can reach into, as a state folder must be when root starts PostgreSQL.

    pytest's own temporary folders are closed to others. They are removed at the end, unless a test failed.
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
    """The servers of one stack, healthy, for the whole session: PostgreSQL where it is installed, else SQLite.

    No pools, deployments or workers yet: a test calls `stack.set_up(checkout.folder)` (it may be repeated) and
    `stack.start_worker(...)`, and stops its workers with `stack.stop_worker(name)`.
    """
    folder = open_folder()
    (folder / "no-config").mkdir()
    environment = FAST | {
        name: str(folder / "no-config") for name in ("DVC_GLOBAL_CONFIG_DIR", "DVC_SYSTEM_CONFIG_DIR")
    }
    stack = Stack(folder / "state", prefect_port=free_port(), mlflow_port=free_port(), environment=environment)
    stack.up(setup=False)
    try:
        yield stack
        if request.session.testsfailed:
            print_logs(stack)
    finally:
        stack.down()


def print_logs(stack: Stack) -> None:
    """The ends of the logs, into the report of the last test: enough to see what a server or worker died of."""
    for path in sorted((stack.state / "logs").glob("*.log")):
        print(f"\n== {path.name}\n" + "\n".join(path.read_text(errors="replace").splitlines()[-60:]))


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
        params = yaml.safe_load((folder / "params.yaml").read_text())
        params["categories"] = list(categories)
        (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
        shutil.copytree(ROOT / "flows", folder / "flows", ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("prefect.yaml", "pyproject.toml"):
            if (ROOT / file).exists():
                shutil.copyfile(ROOT / file, folder / file)
        if remote is not None:
            remote.mkdir(parents=True, exist_ok=True)
            project.run("dvc", "remote", "add", "--default", "shared", str(remote))
        if cache is not None:
            cache.mkdir(parents=True, exist_ok=True)
            project.run("dvc", "cache", "dir", str(cache))
        (folder / ".git" / "info" / "exclude").write_text("watch/\n")
        for key, value in {"user.name": "flawsmith tests", "user.email": "tests@localhost"}.items():
            project.run("git", "config", key, value)
        project.run("git", "add", "--all")
        project.run("git", "commit", "--quiet", "--message", "A small project")
        return project

    return make


@dataclass(frozen=True)
class Bare:
    """A checkout in which `dvc repro` has made both surfaces, and how long it took for the first of them."""

    checkout: Any
    seconds: float


@pytest.fixture(scope="session")
def bare(make_checkout: Callable[..., Any]) -> Bare:
    """As after `make repro` in a fresh clone: no server, the runs are in the project's own store."""
    checkout = make_checkout("bare", categories=SURFACES)
    # a new store costs seconds, once in a project's life
    checkout.run("python", "-c", "from flawsmith.connection import connect; connect('sqlite:///mlflow.db')")
    begun = time.monotonic()
    checkout.run("dvc", "repro", f"export@{SURFACES[0]}")
    seconds = time.monotonic() - begun
    checkout.run("dvc", "repro")
    return Bare(checkout, seconds)
