"""What every test relies on: no store, debug switch or random seed from outside, and no help from the network."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from small_settings import write_params
from xdist.scheduler import LoadScopeScheduling

# Deterministic and without a clock: a slow machine must not fail a property, and a red run must be red again.
hypothesis_settings.register_profile("flawsmith", deadline=None, derandomize=True, database=None, max_examples=50)
hypothesis_settings.load_profile("flawsmith")

# A developer's own servers must never see the tests' runs.
for _name in [name for name in os.environ if name.startswith(("MLFLOW_", "PREFECT_"))]:
    del os.environ[_name]
os.environ.pop("FLAWSMITH_DEBUG", None)
# The same results on every machine; tests/pipeline/test_precision.py runs the whole pipeline in bfloat16.
os.environ["FLAWSMITH_DEVICE"], os.environ["FLAWSMITH_PRECISION"] = "cpu", "float32"
os.environ["DVC_NO_ANALYTICS"] = "1"
os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
os.environ["GX_ANALYTICS_ENABLED"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

# Workers share the cores: threads of one that wait for a core which another holds cost more than they earn.
if _workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // _workers)))


class FolderScheduling(LoadScopeScheduling):
    """A folder's tests run in one worker, since they share what is dear to make."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        folder = file.rpartition("/")[0]
        return file if folder == "tests" else folder


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> FolderScheduling:
    """xdist's question how to share out the tests (`make test` starts several workers)."""
    return FolderScheduling(config, log)


@pytest.fixture
def params_path(tmp_path: Path) -> Path:
    """The shipped params.yaml in a folder of its own, with tracking off."""
    path = tmp_path / "params.yaml"
    write_params(path, {"tracking": {"mode": "off"}})
    return path


@pytest.fixture(scope="module", autouse=True)
def no_store_from_another_module() -> Iterator[None]:
    """MLflow's current store is one a process, and it tells child processes too: none may outlive a module."""
    yield
    mlflow = sys.modules.get("mlflow")
    if mlflow is not None:
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """One temporary Prefect server a session (ten seconds to start): the client sends events to its first one alone."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield
