import time
from pathlib import Path

import pytest
from ports import free_port

from flawsmith.connection import check_store, connect, tracking_uri
from flawsmith.errors import UserError


def test_checking_a_store_creates_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert check_store(tmp_path) == tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert not (tmp_path / "mlflow.db").exists()


@pytest.mark.parametrize("scheme", ["http", "postgresql"])
def test_a_dead_port_is_a_quick_and_clear_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, scheme: str) -> None:
    uri = f"{scheme}://user:secret@127.0.0.1:{free_port()}/x"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be used.*tracking\.mode: off") as caught:
        check_store(tmp_path)
    assert time.monotonic() - start < 20
    assert uri.replace("secret", "***") in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_file_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be used"):
        connect((tmp_path / "mlruns").as_uri())
