"""Results to an MQTT broker, at least once each and in their order (`--mqtt`); docs/mqtt.md tells what arrives.

A result lies in a spool before anything else counts its image as done, and leaves it when the broker has acknowledged
it (QoS 1). So a kill between the two sends it twice, with one id, and never not at all. MQTT 5, since a broker says
only there that it refuses a message; an older one acknowledges what it throws away.
"""

import logging
import socket
import ssl
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import yaml

from flawsmith.errors import FlawsmithError, UserError, tell_once
from flawsmith.files import digest_json
from flawsmith.inference.options import MqttOptions
from flawsmith.inference.spool import Spool
from flawsmith.inference.writers import Row, json_line
from flawsmith.sections import nearest

SCHEMA = "flawsmith.result/1"  # docs/result.schema.json
SPOOL = "spool"  # a watch's spool, in its --out
LOGIN, CERTIFICATES = ("username", "password"), ("ca", "certificate", "key")
BATCH = 20  # messages on their way at once: what paho-mqtt keeps in flight
KEEPALIVE = 30  # seconds; a broker that is silent for one and a half of it is gone
ANSWER = 5.0  # seconds that a start waits for the broker's answer
DRAIN = 2.0  # seconds that an end waits for what is still to be sent
RETRY = 5.0  # seconds until a message that was refused is sent again
WRONG = {0x84, 0x86, 0x87, 0x8C}  # refusals that only the user can mend: protocol, login, rights, kind of login

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Somewhere that results go to."""

    def add(self, row: Row) -> None:
        """Take over a result: a row with `model` as `identify` makes it, and the image's `sha256`.

        Raises:
            FlawsmithError: it cannot be kept.
        """


def make_message(row: Row) -> str:
    """Make the JSON text of a result, with its id and the time.

    A file that is scored again because the first line about it was lost gets the same id. A row without `stat` has an
    id of its own. Regions go without their polygons, so that a message stays below 20 kB: brokers have limits.
    """
    told = {key: value for key, value in row.items() if key != "stat"}
    if "regions" in told:
        told["regions"] = [{key: region[key] for key in region if key != "polygon"} for region in told["regions"]]
    known = {key: row.get(key) for key in ("file", "sha256", "stat", "threshold")} | {"model": row["model"]["digest"]}
    identity = digest_json(known)[:32] if "stat" in row else uuid.uuid4().hex
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    return json_line({"schema": SCHEMA, "id": identity, "time": now, **told})


@contextmanager
def open_mqtt(options: MqttOptions, folder: Path) -> Iterator[Sink]:
    """Send results while the block runs, first those that an earlier run has left in the spool in `folder`.

    A broker that cannot be reached is waited for: results lie in the spool meanwhile.

    Raises:
        UserError: the broker refuses the login or speaks no MQTT 5, its certificate or one of ours is not accepted,
            the file of credentials is wrong, or another process uses the spool.
    """
    told = {} if options.credentials is None else read_credentials(options.credentials)
    trust = _trust(options, told)
    away = _probe(options, trust)
    with closing(Spool(folder / "mqtt.sqlite")) as spool, closing(_Sender(options, spool, told, trust)) as sender:
        sender.start(away)
        yield sender


def read_credentials(path: Path) -> dict[str, str]:
    """Read LOGIN and CERTIFICATES from YAML; the paths in it count from its own folder. No error shows a value.

    Raises:
        UserError: it is no YAML of that kind.
        OSError: it cannot be read.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no `key: value` lines; write for example `username: line1`.")
    known = (*LOGIN, *CERTIFICATES)
    for key, value in content.items():
        if key not in known:
            raise UserError(f"{path}: unknown key `{key}`{nearest(str(key), known)}")
        if not isinstance(value, str):
            raise UserError(f"{path}: `{key}` must be text; put it in quotes.")
    return {key: str(path.parent / value) if key in CERTIFICATES else value for key, value in content.items()}


class _Sender:
    """Takes results into the spool, and sends them from a thread of its own."""

    def __init__(
        self, options: MqttOptions, spool: Spool, told: Mapping[str, str], trust: ssl.SSLContext | None
    ) -> None:
        from paho.mqtt.client import CallbackAPIVersion, Client, MQTTv5

        self._options, self._spool, self._place = options, spool, _place(options)
        self._changed = threading.Condition()  # never held while the client is called: its callbacks wait for it
        self._is_connected = self._is_ending = False
        self._refusal: Any = None  # why the broker does not let us in; None: it does, or has not answered
        self._answers: dict[int, Any] = {}  # what the broker said to each message of a batch, by its number there
        self._left_out = 0  # results for which the spool has had no place so far
        self._client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTv5)
        self._client.on_connect, self._client.on_disconnect = self._on_connect, self._on_disconnect
        self._client.on_publish = self._on_publish
        self._client.reconnect_delay_set(1, 30)
        if set(told) & set(LOGIN):
            self._client.username_pw_set(told.get("username", ""), told.get("password"))
        if trust is not None:
            self._client.tls_set_context(trust)
        self._thread = threading.Thread(target=self._forward, name="mqtt", daemon=True)

    def start(self, away: str) -> None:
        """Begin to send; `away` says why the broker cannot be reached now, "" that it can.

        Raises:
            UserError: it does not let us in, and only the user can mend that.
        """
        if away:
            self._tell_away(away)
        self._client.connect_async(*self._options.broker[:2], KEEPALIVE)
        self._client.loop_start()
        if not away:
            with self._changed:
                self._changed.wait_for(lambda: self._is_connected or self._refusal is not None, ANSWER)
            if self._refusal is not None and self._refusal.value in WRONG:
                raise UserError(
                    f"The MQTT broker at {self._place} refuses us ({self._refusal}); correct `username` and "
                    "`password` in the file of --mqtt-credentials, or let it speak MQTT 5."
                )
            if not self._is_connected:
                self._tell_away(str(self._refusal or "it does not answer"))
        self._thread.start()

    def add(self, row: Row) -> None:
        """Put a result into the spool; one that has no place there is left out, and the log tells of it."""
        if self._spool.put(make_message(row)):
            if self._left_out:
                log.error("%s has place again; left out: %d results.", self._spool.path, self._left_out)
            self._left_out = 0
            with self._changed:
                self._changed.notify_all()
        else:
            if not self._left_out:
                log.error("%s is full: results are not sent until the broker has taken some.", self._spool.path)
            self._left_out += 1

    def close(self) -> None:
        """Send what can still be sent within DRAIN seconds, and leave the rest in the spool."""
        is_sending = self._thread.is_alive()
        with self._changed:
            self._changed.wait_for(lambda: not (self._is_connected and self._spool.first(1)), DRAIN * is_sending)
            self._is_ending = True
            self._changed.notify_all()
        if is_sending:
            self._thread.join()
        self._client.disconnect()
        self._client.loop_stop()
        del self._client  # it closes its last sockets when nobody holds it any more
        if left := len(self._spool):
            log.warning("Results that wait in %s: %d; the next start sends them.", self._spool.path, left)

    def _forward(self) -> None:
        """Send batch after batch until the end."""
        while not self._is_ending:
            try:
                with self._changed:
                    self._changed.wait_for(lambda: self._is_ending or (self._is_connected and self._spool.first(1)))
                batch = self._spool.first(BATCH)
                if self._deliver([message for _, message in batch]):
                    self._spool.remove(batch[-1][0])
                    with self._changed:
                        self._changed.notify_all()
            except FlawsmithError as error:  # `add` fails too, where it can be told
                self._stumble(str(error))

    def _deliver(self, messages: Sequence[str]) -> bool:
        """Send messages; return whether the broker has taken all of them. The client sends again after a lost line."""
        if self._is_ending or not messages:
            return False
        self._answers.clear()
        numbers = {self._client.publish(self._options.topic, message, qos=1).mid for message in messages}
        with self._changed:
            self._changed.wait_for(lambda: self._is_ending or numbers <= self._answers.keys())
        refusals = [answer for answer in self._answers.values() if answer.is_failure]
        if refusals:
            self._stumble(f"The broker at {self._place} takes no results on {self._options.topic} ({refusals[0]}).")
        return not refusals and numbers <= self._answers.keys()

    def _stumble(self, reason: str) -> None:
        tell_once(reason, reason)
        with self._changed:
            self._changed.wait_for(lambda: self._is_ending, RETRY)

    def _tell_away(self, reason: str) -> None:
        log.warning(
            "The MQTT broker at %s cannot be reached (%s); results wait in %s.", self._place, reason, self._spool.path
        )

    def _on_connect(self, _client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        with self._changed:
            if reason.is_failure and self._thread.is_alive() and str(reason) != str(self._refusal):
                self._tell_away(str(reason))
            elif not reason.is_failure:
                log.info("Results go to %s on the MQTT broker at %s.", self._options.topic, self._place)
            self._is_connected, self._refusal = not reason.is_failure, reason if reason.is_failure else None
            self._changed.notify_all()

    def _on_disconnect(self, _client: Any, _data: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        with self._changed:
            if self._is_connected and not self._is_ending:
                self._tell_away(str(reason))
            self._is_connected = False

    def _on_publish(self, _client: Any, _data: Any, number: int, reason: Any, _properties: Any) -> None:
        with self._changed:
            self._answers[number] = reason
            self._changed.notify_all()


def _place(options: MqttOptions) -> str:
    return "{}:{}".format(*options.broker)


def _trust(options: MqttOptions, told: Mapping[str, str]) -> ssl.SSLContext | None:
    """The certificates that we accept and show, None without TLS; without `ca` the system's authorities are accepted.

    Raises:
        UserError: a certificate cannot be used, or there are some and no TLS.
    """
    path = options.credentials
    if not options.broker[2]:
        if set(told) & set(CERTIFICATES):
            raise UserError(f"{path} names certificates, but --mqtt is no mqtts:// URL; make it one.")
        return None
    try:
        context = ssl.create_default_context(cafile=told.get("ca"))
        if "certificate" in told:
            context.load_cert_chain(told["certificate"], told.get("key"), password="")  # or a locked key asks for one
    except OSError as error:
        raise UserError(f"A certificate or key that {path} names cannot be used ({error}); correct it.") from error
    return context


def _probe(options: MqttOptions, trust: ssl.SSLContext | None) -> str:
    """Say why the broker cannot be reached now, "" if it can: the client itself tells no reasons.

    Raises:
        UserError: it shows a certificate that we do not accept, or speaks no TLS that we do.
    """
    host, port, _ = options.broker
    try:
        with socket.create_connection((host, port), ANSWER) as plain:
            if trust is not None:
                trust.wrap_socket(plain, server_hostname=host).close()
    except OSError as error:
        if isinstance(error, ssl.SSLError) and not isinstance(error, ssl.SSLEOFError):
            raise UserError(
                f"The MQTT broker at {_place(options)} offers no TLS that is accepted here ({error.args[-1]}); name "
                "the certificate of its authority as `ca` in the file of --mqtt-credentials, or correct --mqtt."
            ) from error
        return error.strerror or str(error)
    return ""
