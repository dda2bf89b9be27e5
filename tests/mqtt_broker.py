"""A real broker (mosquitto) in a process of its own, and somebody who reads what is published there."""

import json
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from paho.mqtt.client import CallbackAPIVersion, Client
from ports import free_port

SCHEMA = Path(__file__).parents[1] / "docs" / "result.schema.json"
PATIENCE = 60.0  # seconds, on a busy machine
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin"
MOSQUITTO = shutil.which("mosquitto", path=_PATH) or ""
needs_broker = pytest.mark.skipif(not MOSQUITTO, reason="no mosquitto on this machine: apt-get install mosquitto")


class Broker:
    """mosquitto on a port of its own. It keeps what it must keep on the disk, as one on a line does."""

    def __init__(self, folder: Path, **settings: object) -> None:
        folder.mkdir()
        self.port = free_port()
        lines: Mapping[str, object] = {
            "persistence": "true", "persistence_location": f"{folder}/", "autosave_interval": 1,
            "autosave_on_changes": "true", "listener": f"{self.port} 127.0.0.1", "allow_anonymous": "true", **settings,
        }  # fmt: skip
        self._config = folder / "mosquitto.conf"
        as_root = ["user root"] if os.geteuid() == 0 else []  # else it could not enter pytest's folders
        self._config.write_text("\n".join([*as_root, *(f"{key} {value}" for key, value in lines.items())]) + "\n")
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def start(self) -> None:
        self._process = subprocess.Popen([MOSQUITTO, "-c", self._config], stderr=subprocess.DEVNULL)
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and self._process.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.05)
        raise AssertionError("mosquitto did not start")

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()


@contextmanager
def broker_in(folder: Path, **settings: object) -> Iterator[Broker]:
    broker = Broker(folder, **settings)
    try:
        yield broker
    finally:
        broker.kill()


class Reader:
    """All that has come on the topic of results; each message keeps to the schema. What comes while it is away, the
    broker keeps for it."""

    def __init__(self, broker: Broker, login: tuple[str, str] | None = None, ca: Path | None = None) -> None:
        self.messages: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self._is_subscribed = False
        self.client = Client(CallbackAPIVersion.VERSION2, client_id="reader", clean_session=False)
        if login:
            self.client.username_pw_set(*login)
        if ca:
            self.client.tls_set(str(ca))
        self.client.reconnect_delay_set(1, 1)
        self.client.on_connect = lambda client, *_: client.subscribe("flawsmith/#", qos=1)
        self.client.on_subscribe = self._on_subscribe
        self.client.on_message = self._on_message
        self.client.connect("127.0.0.1", broker.port)
        self.client.loop_start()
        self.wait_for(lambda: self._is_subscribed, "the subscription")

    def _on_subscribe(self, *_: object) -> None:
        self._is_subscribed = True

    def _on_message(self, _client: object, _data: object, message: Any) -> None:
        content = json.loads(message.payload)
        self.problems += [error.message for error in _validator().iter_errors(content)]
        self.messages.append(content)

    @property
    def files(self) -> list[str]:
        """The files told of, each once, in the order of their first messages."""
        return list(dict.fromkeys(message["file"] for message in self.messages))

    def wait_for(self, condition: Any, what: str) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, f"waited in vain for {what}; so far {self.files}"
            time.sleep(0.02)


@contextmanager
def reading(broker: Broker, **access: Any) -> Iterator[Reader]:
    reader = Reader(broker, **access)
    try:
        yield reader
    finally:
        reader.client.disconnect()
        reader.client.loop_stop()
        assert reader.problems == []


@cache
def _validator() -> Draft202012Validator:
    schema = json.loads(SCHEMA.read_text())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)
