"""Runs the service until it is told to stop, and then lets it finish what it has taken on."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import uvicorn

from flawsmith.errors import FlawsmithError, UserError
from flawsmith.inference.mqtt import Sink
from flawsmith.serve.app import Limits, create_app
from flawsmith.serve.models import ModelSlot, Source
from flawsmith.serve.telemetry import Telemetry

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Address:
    """Where to listen; port 0 lets the system choose."""

    host: str = "127.0.0.1"
    port: int = 8080


class _Server(uvicorn.Server):
    """Answers /readyz with 503 for `drain` seconds before it stops listening: a balancer then looks elsewhere first."""

    def __init__(self, config: uvicorn.Config, drain: float) -> None:
        super().__init__(config)
        self._drain = drain
        self._timer: threading.Timer | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        service = self.config.app.state.service  # type: ignore[union-attr]
        if self._drain > 0 and not service.draining and sig == signal.SIGTERM:
            self._timer = threading.Timer(self._drain, super().handle_exit, (sig, frame))
            self._timer.daemon = True
            self._timer.start()
        else:
            super().handle_exit(sig, frame)
        service.draining = True

    async def startup(self, sockets: list[object] | None = None) -> None:  # type: ignore[override]
        await super().startup(sockets)  # type: ignore[arg-type]
        loaded = self.config.app.state.service.slot.current  # type: ignore[union-attr]
        for server in getattr(self, "servers", []):
            for place in server.sockets:
                host, port = place.getsockname()[:2]
                print(
                    f"flawsmith serves on http://{host}:{port}/ (API: /docs), computing on "
                    f"{loaded.predictor.provider}; stop it with Ctrl-C.",
                    flush=True,
                )


@contextmanager
def _ended_quietly() -> Iterator[None]:
    """uvicorn, when it has finished, raises the signals again that ended it; to be stopped is a server's normal end."""
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def serve(
    source: Source, limits: Limits, address: Address, poll: float, drain: float, sink: Sink | None = None
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        source: where the model comes from.
        limits: what is taken on.
        address: where to listen.
        poll: seconds between two looks for another model.
        drain: seconds between SIGTERM and the end of listening.
        sink: where results go beside their answers.

    Raises:
        FlawsmithError: there is no model to begin with.
        UserError: the address cannot be had.
    """
    telemetry = Telemetry()
    slot = ModelSlot(source, poll, telemetry.note_change)
    slot.start()
    try:
        config = uvicorn.Config(
            create_app(slot, limits, telemetry, sink),
            host=address.host,
            port=address.port,
            log_level="warning",
            access_log=False,
            timeout_graceful_shutdown=round(limits.seconds + 5),
            server_header=False,
        )
        server = _Server(config, drain)
        try:
            with _ended_quietly():
                server.run()
        except SystemExit as error:  # uvicorn's way to say that it could not start; it has logged why
            raise UserError(
                f"http://{address.host}:{address.port} cannot be listened on; choose another --host or --port."
            ) from error
        if not server.started:
            raise FlawsmithError("The server did not start.")
    finally:
        slot.stop()
