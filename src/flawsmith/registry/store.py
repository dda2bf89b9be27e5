"""The one module that meets MLflow's model registry: versions, the alias `champion`, and the trail of decisions.

A category's models are versions of `flawsmith-<category>`. Its trail is a registered model of its own,
`flawsmith-<category>-trail`: MLflow numbers versions atomically, so appending one is the compare-and-set that aliases
lack, and the page of that model in MLflow's UI reads as the audit trail.
"""

import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flawsmith.connection import connect, store_errors, tracking_uri, without_password
from flawsmith.errors import UserError
from flawsmith.layout import Layout
from flawsmith.registry.ledger import Entry, Trail, replay

ALIAS = "champion"
PREFIX = "flawsmith"  # of every registered model; also of the tags
MODEL_DIGEST, CONTENT_DIGEST = "flawsmith.model_digest", "flawsmith.content_digest"
LINEAGE_TAG = "flawsmith.lineage"
DONE = "flawsmith.done"
MAX_TAG = 5000  # MLflow's limit for a version's tag
NOT_FOUND = "RESOURCE_DOES_NOT_EXIST"
_GLOBAL_STATE = threading.RLock()  # MLflow's current store is one a process
CONTENT = "content"  # the folder, inside a version, of everything that `package` puts there


@dataclass(frozen=True)
class Version:
    """A registered version: its number, its tags, and the run that registered it."""

    model: str
    number: str
    tags: Mapping[str, str]
    run_id: str
    created: datetime

    @property
    def digest(self) -> str:
        """SHA-256 of its model.onnx."""
        return self.tags.get(MODEL_DIGEST, "")

    @property
    def facts(self) -> dict[str, str]:
        """Its tags by their short names."""
        return _plain(self.tags)


class Registry:
    """The registered models of one category.

    Raises (every method):
        UserError: the store cannot be reached.
    """

    def __init__(self, root: Path, category: str) -> None:
        self.uri = tracking_uri(root)
        self._client = connect(self.uri)
        self.model = f"{PREFIX}-{category}"
        self.trail_model = f"{self.model}-trail"

    def versions(self) -> tuple[Version, ...]:
        """All usable versions, oldest first."""
        found = [self._version(item) for item in self._search(self.model) if item.status == "READY"]
        return tuple(sorted(found, key=lambda version: int(version.number)))

    def version(self, number: str) -> Version:
        """One version.

        Raises:
            UserError: there is none of this number.
        """
        known = {version.number: version for version in self.versions()}
        if number not in known:
            there = f"there are {', '.join(known)}" if known else "run `flawsmith register` first"
            raise UserError(f"{self.model} has no version {number} in {without_password(self.uri)}; {there}.")
        return known[number]

    def champion(self) -> str:
        """The number of the version that carries the alias, "" if none does."""
        from mlflow.exceptions import MlflowException

        with store_errors(self.uri):
            try:
                # `search_model_versions` never fills aliases in; a missing alias asked for by name is an odd error
                aliases = self._client.get_registered_model(self.model).aliases
            except MlflowException as error:
                if error.error_code == NOT_FOUND:
                    return ""
                raise
        return str(aliases.get(ALIAS, ""))

    def add_version(self, model: Any, run_id: str, tags: Mapping[str, str], summary: str) -> Version:
        """Register a logged model with its tags in one step: no version is ever seen without them."""
        with self._fluent(), store_errors(self.uri):
            self._ensure(self.model, "Detectors of one surface; the alias `champion` is the one in use.")
            made = self._client.create_model_version(
                self.model,
                model.model_uri,
                run_id=run_id,
                tags={key: value[:MAX_TAG] for key, value in tags.items()},
                description=summary,
                model_id=model.model_id,
            )
        return self._version(made)

    def delete_version(self, version: str) -> None:
        """Take a version out of the registry; its number is never given again."""
        with store_errors(self.uri):
            self._client.delete_model_version(self.model, version)

    def tag(self, version: str, tags: Mapping[str, str]) -> None:
        """Set tags of a version."""
        with store_errors(self.uri):
            for key, value in tags.items():
                self._client.set_model_version_tag(self.model, version, key, value[:MAX_TAG])

    def move_alias(self, version: str) -> None:
        """Make a version the champion."""
        with store_errors(self.uri):
            self._client.set_registered_model_alias(self.model, ALIAS, version)

    def trail(self) -> Trail:
        """All decisions so far."""
        return replay([_entry(item) for item in self._search(self.trail_model)])

    def append(self, entry: Entry) -> int:
        """Add a decision; its number, which no other entry has."""
        tags = {f"{PREFIX}.{key}": str(value) for key, value in asdict(entry).items() if key not in ("number", "done")}
        source = f"models:/{self.model}/{entry.version}"
        with self._fluent(), store_errors(self.uri):
            self._ensure(self.trail_model, f"Audit trail of {self.model}: one version a decision. Do not edit.")
            made = self._client.create_model_version(
                self.trail_model,
                source,  # with it a server takes no other run than the version's: that of the evidence is a tag
                tags={key: value[:MAX_TAG] for key, value in tags.items()},
                description=f"{entry.kind} of version {entry.version} by {entry.actor}: {entry.reason}",
            )
        return int(made.version)

    def mark_done(self, number: int) -> None:
        """Note that the alias has followed a change."""
        with store_errors(self.uri):
            self._client.set_model_version_tag(self.trail_model, str(number), DONE, "true")

    @contextmanager
    def download(self, version: str) -> Iterator[Path]:
        """The files of a version (model.onnx, parity.json, reference.npz, ...) in a temporary folder.

        Raises:
            UserError: the version was not registered by flawsmith.
        """
        from flawsmith.registry.serving import MODEL, fetch_artifact

        with tempfile.TemporaryDirectory() as name:
            folder, uri = Path(name), f"models:/{self.model}/{version}"
            (folder / "rest").mkdir()
            (folder / "model").mkdir()
            with self._fluent(), store_errors(self.uri):
                content = fetch_artifact(uri, CONTENT, folder / "rest")
                fetch_artifact(uri, MODEL, folder / "model").replace(content / "model.onnx")
            yield content

    @contextmanager
    def fluent_run(self, run_id: str) -> Iterator[None]:
        """MLflow's global state set to this store and an existing run, for the parts of MLflow that only know that."""
        with self._fluent(), store_errors(self.uri):
            import mlflow

            with mlflow.start_run(run_id=run_id):
                yield

    @contextmanager
    def _fluent(self) -> Iterator[None]:
        """MLflow's process-wide store set to this one, and put back."""
        import mlflow

        names = ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI")
        with _GLOBAL_STATE:
            before = {name: os.environ.get(name) for name in names}
            mlflow.set_tracking_uri(self.uri)
            mlflow.set_registry_uri(self.uri)
            try:
                yield
            finally:
                mlflow.set_tracking_uri(before[names[0]])
                mlflow.set_registry_uri(before[names[1]])
                for name, value in before.items():  # MLflow writes these variables itself
                    if value is not None:
                        os.environ[name] = value
                    else:
                        os.environ.pop(name, None)

    def _ensure(self, name: str, description: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name, description=description)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _search(self, name: str) -> list[Any]:
        found: list[Any] = []
        token: str | None = None
        with store_errors(self.uri):
            while True:
                page = self._client.search_model_versions(f"name='{name}'", page_token=token)
                found += page
                token = page.token
                if not token:
                    return found

    def _version(self, item: Any) -> Version:
        return Version(
            self.model,
            str(item.version),
            dict(item.tags),
            item.run_id or "",
            datetime.fromtimestamp(item.creation_timestamp / 1000, UTC),
        )


def open_registry(layout: Layout, what: str) -> Registry:
    """The registry of a layout's category, to do `what` in it.

    Raises:
        UserError: tracking is off, or the store cannot be reached.
    """
    if layout.settings.tracking.mode == "off":
        raise UserError(f"Nothing to {what} with `tracking.mode: off`: the registry lives in MLflow; set it to `on`.")
    return Registry(layout.root, layout.category)


def _plain(tags: Mapping[str, str]) -> dict[str, str]:
    return {key.removeprefix(f"{PREFIX}."): value for key, value in tags.items()}


def _entry(item: Any) -> Entry:
    """A decision from the version of the trail that holds it."""
    tags = _plain(item.tags)
    texts = {field.name: tags.get(field.name, "") for field in fields(Entry) if field.type in (str, "str")}
    return Entry(
        **texts,
        number=int(item.version),
        kind=tags.get("kind", "refusal"),  # type: ignore[arg-type]  # as `append` wrote it
        previous=int(tags.get("previous", "0")),
        done=tags.get("done") == "true",
    )
