"""The champion behind the service: promoting another exchanges the model under load, without a failed request."""

from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import yaml
from mlflow.tracking import MlflowClient
from served import asking, encoded, plate, serving
from toy_onnx import write_toy

from flawsmith.cli import app
from flawsmith.errors import UserError
from flawsmith.files import digest_file
from flawsmith.registry.serving import log_serving_model
from flawsmith.registry.store import CONTENT, MODEL_DIGEST
from flawsmith.serve.models import ModelSlot, RegistrySource

ROOT = Path(__file__).parents[2]
NAME = "flawsmith-plate"


class Store:
    """A project whose MLflow store holds versions of one category."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        content = yaml.safe_load((ROOT / "params.yaml").read_text())
        content["categories"] = ["plate"]
        (folder / "params.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        self.uri = f"sqlite:///{folder}/mlflow.db"
        mlflow.set_tracking_uri(self.uri)
        self.experiment = mlflow.create_experiment("serving", artifact_location=(folder / "store").as_uri())
        self.client = MlflowClient()
        self.client.create_registered_model(NAME)

    def add(self, gain: float, digest: str = "") -> tuple[str, str]:
        """A version whose model has this gain: its number and its model's digest."""
        model = write_toy(self.folder / "model.onnx", gain)
        (self.folder / CONTENT).mkdir(exist_ok=True)
        (self.folder / CONTENT / "parity.json").write_text("{}")
        with mlflow.start_run(experiment_id=self.experiment) as run:
            info = log_serving_model(model, {CONTENT: self.folder / CONTENT})
        found = digest_file(model)
        made = self.client.create_model_version(
            NAME, info.model_uri, run_id=run.info.run_id, model_id=info.model_id, tags={MODEL_DIGEST: digest or found}
        )
        return str(made.version), found

    def promote(self, version: str) -> None:
        self.client.set_registered_model_alias(NAME, "champion", version)


@pytest.fixture(scope="module")
def whole_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    yield Store(tmp_path_factory.mktemp("project"))
    mlflow.set_tracking_uri(None)


@pytest.fixture
def store(whole_store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", whole_store.uri)
    return whole_store


@pytest.mark.slow
def test_promotion_under_load_fails_no_request(store: Store) -> None:
    first, second = store.add(1.0), store.add(2.0)
    store.promote(first[0])
    content = encoded(plate())
    with serving("--params", store.folder / "params.yaml", "--poll", "0.2", folder=store.folder) as server:
        told = {"category": "plate", "version": first[0], "digest": first[1], "provider": "cpu"}
        assert server.ask(body=content).json["model"] == told
        with asking(server, content, clients=3) as replies:
            store.promote(second[0])
            server.wait_for('flawsmith_model_changes_total{outcome="done"}', 2)
            store.promote(first[0])  # and back again
            server.wait_for('flawsmith_model_changes_total{outcome="done"}', 3)
        assert {reply.status for reply in replies} == {200}
        assert {reply.json["model"]["version"] for reply in replies} == {first[0], second[0]}
        labels = f'{{category="plate",digest="{first[1]}",provider="cpu",version="{first[0]}"}}'
        assert server.metric(f"flawsmith_model{labels}") == 1


def test_a_file_that_is_not_the_registered_one_is_never_answered_with(store: Store) -> None:
    first, forged = store.add(1.0), store.add(2.0, digest="0" * 64)
    store.promote(first[0])
    slot = ModelSlot(RegistrySource(store.folder, "plate"), 60)
    assert slot.refresh()
    assert not slot.refresh()
    store.promote(forged[0])
    with pytest.raises(UserError, match="is not the file that was registered"):
        slot.refresh()
    assert slot.current is not None
    assert slot.current.version == first[0]


def test_without_a_champion_it_does_not_start(store: Store) -> None:
    store.promote(store.add(1.0)[0])
    store.client.delete_registered_model_alias(NAME, "champion")
    with pytest.raises(UserError, match="flawsmith-plate has no champion; run `flawsmith promote`"):
        app(["serve", "--params", str(store.folder / "params.yaml")], standalone_mode=False)
