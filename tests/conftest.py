"""What every test relies on: no store, debug switch or random seed from outside, and no help from the network."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings as hypothesis_settings
from small_settings import write_params

# Deterministic and without a clock: a slow machine must not fail a property, and a red run must be red again.
for _profile, _examples in (("quick", 20), ("thorough", 200)):
    hypothesis_settings.register_profile(
        _profile, deadline=None, derandomize=True, database=None, max_examples=_examples
    )
hypothesis_settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))

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


# What is dear to run, in seconds of CPU, roughly: each worker of `make test` begins with its share of it.
DEAR = {
    "tests/pipeline": 200,
    "tests/test_house.py": 70,
    "tests/registry": 60,
    "tests/flows": 60,
    "tests/stages/test_tiled_pipeline.py": 45,
    "tests/test_wheel.py": 45,
    "tests/export": 40,
    "tests/evaluation/test_evaluate_stage.py": 40,
    "tests/serve": 40,
    "tests/monitoring": 30,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Dear folders first, shared out evenly: xdist gives each worker a run of equally many tests, and whoever is done
    takes some from the end of another's."""
    groups: dict[str, list[pytest.Item]] = {}
    for item in items:
        groups.setdefault(next((name for name in DEAR if item.nodeid.startswith(name)), ""), []).append(item)
    cheap = groups.pop("", [])
    shares: list[list[pytest.Item]] = [[] for _ in range(int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))]
    costs = [0] * len(shares)
    for name in sorted(groups, key=lambda name: -DEAR[name]):
        least = costs.index(min(costs))
        shares[least] += groups[name]
        costs[least] += DEAR[name]
    left = len(items)
    for place, share in enumerate(shares):
        wanted = left // (len(shares) - place)  # as xdist counts
        share += [cheap.pop(0) for _ in range(min(len(cheap), max(0, wanted - len(share))))]
        left -= len(share)
    items[:] = [item for share in shares for item in share] + cheap


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
