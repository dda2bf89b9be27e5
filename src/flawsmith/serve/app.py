"""The web service: image bytes in, verdict, regions and pictures out.

    POST /v1/predict   an image as the body, or as the one file of a form
    GET  /             a page to drop an image on
    GET  /healthz /readyz /metrics /docs /openapi.json

At most `workers` images are judged at once and `queue` more wait, in memory that is bounded by the limits; who comes
then gets 429 at once. Decoding and drawing go on in the workers' threads beside the model of others.
"""

import asyncio
import io
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import swagger_ui_bundle
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel
from pydantic.json_schema import SkipJsonSchema
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from flawsmith.data.images import decode_image
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.inference.draw import draw_prediction
from flawsmith.inference.serialise import describe, encode_map, encode_png
from flawsmith.serve.models import Loaded, ModelSlot
from flawsmith.serve.telemetry import Telemetry

PREDICT = "/v1/predict"
FORM, BINARY = "multipart/form-data", "application/octet-stream"
CURL = "application/x-www-form-urlencoded"  # what `curl --data-binary @part.png` calls the bytes it sends
PAGE = Path(__file__).with_name("page.html")
# The page is one file, with its style and script inside and nothing from elsewhere.
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline'; frame-ancestors 'none'"
)


@dataclass(frozen=True)
class Limits:
    """What a server takes on.

    Attributes:
        workers: images judged at once.
        queue: requests that wait beside them.
        max_bytes: of a request's body.
        max_pixels: of an image, before it is decoded.
        seconds: a request may take, the reading of its body included.
    """

    workers: int = 2
    queue: int = 16
    max_bytes: int = 32_000_000
    max_pixels: int = 25_000_000
    seconds: float = 10.0


class Region(BaseModel):
    """A connected area above the pixel threshold, in pixels of the image, origin top left."""

    x: int
    y: int
    width: int
    height: int
    area: float
    peak: float
    peak_x: int
    peak_y: int
    polygon: list[tuple[float, float]]


class Model(BaseModel):
    """Which model answered."""

    category: str
    version: str
    digest: str
    provider: str


class Picture(BaseModel):
    """The anomaly map as 16-bit gray PNG in base64: a value is `low + pixel / 65535 * (high - low)`."""

    png: str
    low: float
    high: float


class Answer(BaseModel):
    """The verdict on one image: defective if `score` lies above `threshold`, which is `relative_score` above 1. Regions
    are those of a defective image alone."""

    verdict: Literal["good", "defective"]
    score: float
    threshold: float
    relative_score: float
    peak_x: int
    peak_y: int
    peak_value: float
    width: int
    height: int
    region_count: int
    regions: list[Region]
    model: Model
    anomaly_map: Picture | SkipJsonSchema[None] = None
    overlay: str | SkipJsonSchema[None] = None


class Problem(BaseModel):
    """Why there is no verdict, in one sentence."""

    error: str


class Refusal(Exception):  # noqa: N818 an answer, not a fault of ours
    """An answer other than a verdict."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Gate:
    """Counts who is inside. Thread-safe: workers let go of their place from their own thread."""

    def __init__(self, places: int, on_change: Callable[[int], None] = lambda inside: None) -> None:
        self._places, self._on_change = places, on_change
        self._inside = 0
        self._lock = threading.Lock()

    def enter(self) -> bool:
        """Take a place; False if there is none."""
        return self._move(1)

    def leave(self) -> None:
        """Give it back."""
        self._move(-1)

    def _move(self, step: int) -> bool:
        with self._lock:
            if self._inside + step > self._places:
                return False
            self._inside += step
            self._on_change(self._inside)
            return True


@dataclass
class Service:
    """What an app's handlers share."""

    slot: ModelSlot
    limits: Limits
    telemetry: Telemetry
    draining: bool = False
    gate: Gate = field(init=False)
    pool: ThreadPoolExecutor = field(init=False)

    def __post_init__(self) -> None:
        self.gate = Gate(self.limits.workers + self.limits.queue, self.telemetry.admitted.set)
        self.pool = ThreadPoolExecutor(self.limits.workers, thread_name_prefix="judge")

    async def answer(self, request: Request, with_map: bool, with_overlay: bool) -> dict[str, Any]:
        """Read, judge, describe.

        Raises:
            Refusal: for each reason not to.
        """
        if not self.gate.enter():
            await _discard(request, self.limits.max_bytes)
            raise Refusal(429, "All workers are busy and the queue is full; try again in a second.")
        leave: Callable[[], None] | None = self.gate.leave
        reading = True
        try:
            async with asyncio.timeout(self.limits.seconds):
                content = await _image_bytes(request, self.limits.max_bytes)
                loaded = self.slot.current
                if loaded is None:
                    raise Refusal(503, "There is no model yet; try again in a second.")
                reading = False
                task = self.pool.submit(self._judge, loaded, content, with_map, with_overlay)
                # a worker cannot be stopped: its place is free when it is done, not when we no longer wait for it
                task.add_done_callback(lambda _: self.gate.leave())
                leave = None
                return await asyncio.wrap_future(task)
        except TimeoutError:
            if reading:
                raise Refusal(408, f"The image did not arrive within {self.limits.seconds:g} seconds.") from None
            raise Refusal(504, f"There was no verdict within {self.limits.seconds:g} seconds.") from None
        finally:
            if leave is not None:
                leave()

    def _judge(self, loaded: Loaded, content: bytes, with_map: bool, with_overlay: bool) -> dict[str, Any]:
        predictor = loaded.predictor
        with self.telemetry.phases.labels("decode").time():
            image = decode_image(
                io.BytesIO(content), "The image", predictor.reading(self.limits.max_pixels, "--max-megapixels")
            )
        with self.telemetry.phases.labels("infer").time():
            (prediction,) = predictor.predict([image])
        with self.telemetry.phases.labels("draw").time():
            answer = describe(prediction, predictor, image.shape[1], image.shape[2])
            answer["model"] = {
                "category": predictor.metadata.category, "version": loaded.version, "digest": loaded.digest,
                "provider": predictor.provider,
            }  # fmt: skip
            if with_map:
                answer["anomaly_map"] = encode_map(prediction.anomaly_map)
            if with_overlay:
                answer["overlay"] = encode_png(draw_prediction(image, prediction, predictor))
        self.telemetry.verdicts.labels(answer["verdict"]).inc()
        self.telemetry.margins.observe(prediction.score - predictor.threshold)
        return answer


def create_app(slot: ModelSlot, limits: Limits, telemetry: Telemetry) -> FastAPI:
    """The service over a slot that has a model or will have one; `app.state.service` holds what it shares."""
    service = Service(slot, limits, telemetry)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        service.pool.shutdown(cancel_futures=True)

    app = FastAPI(
        title="flawsmith",
        version=version("flawsmith"),
        description="Finds surface defects in images of parts.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.openapi_version = "3.0.3"  # the newest that the bundled page can draw
    app.state.service = service
    app.mount("/swagger", StaticFiles(directory=str(swagger_ui_bundle.swagger_ui_path)), name="swagger")
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(RequestValidationError, _on_bad_query)

    @app.post(
        PREDICT,
        response_model=Answer,
        response_model_exclude_none=True,
        responses={status: {"model": Problem, "description": words} for status, words in _REFUSALS.items()},
        openapi_extra=_REQUEST_BODY,
        summary="Judge one image",
    )
    async def predict(
        request: Request,
        anomaly_map: Annotated[bool, Query(alias="map", description="Answer with the anomaly map.")] = False,
        overlay: Annotated[bool, Query(description="Answer with the heat map drawn over the image.")] = False,
    ) -> Response:
        began = time.perf_counter()
        try:
            answer = await service.answer(request, anomaly_map, overlay)
        except ClientDisconnect:
            status, content = 400, {"error": "The client went away."}
        except Refusal as refusal:
            status, content = refusal.status, {"error": str(refusal)}
        except FlawsmithError as error:
            status, content = 422 if isinstance(error, UserError) else 500, {"error": str(error)}
        else:
            status, content = 200, answer
            telemetry.seconds.observe(time.perf_counter() - began)
        telemetry.answers.labels(str(status)).inc()
        return JSONResponse(content, status, {"Retry-After": "1"} if status in (429, 503) else None)

    @app.get("/healthz", response_class=PlainTextResponse, summary="Whether the process lives")
    async def healthz() -> str:
        return "ok"

    @app.get(
        "/readyz",
        response_class=PlainTextResponse,
        responses={503: {"description": "No model yet, or the server is going down."}},
        summary="Whether to send images here",
    )
    async def readyz() -> Response:
        ready = slot.current is not None and not service.draining
        return PlainTextResponse("ready" if ready else "not ready", 200 if ready else 503)

    @app.get("/metrics", response_class=PlainTextResponse, summary="For Prometheus")
    async def metrics() -> Response:
        return Response(telemetry.page(), media_type="text/plain; version=0.0.4")

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers={"Content-Security-Policy": POLICY})

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> Response:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title="flawsmith",
            swagger_js_url="/swagger/swagger-ui-bundle.js",
            swagger_css_url="/swagger/swagger-ui.css",
            swagger_favicon_url="/swagger/favicon-32x32.png",
        )

    return app


_REFUSALS: dict[int | str, str] = {
    400: "No image in the request, or a damaged form.",
    408: "The image did not arrive in time.",
    413: "The body is too large.",
    415: "The content type is no image's.",
    422: "The image cannot be read, or has too many pixels.",
    429: "All workers are busy and the queue is full.",
    503: "There is no model yet.",
    504: "There was no verdict in time.",
}
_BYTES = {"schema": {"type": "string", "format": "binary"}}
_REQUEST_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            **dict.fromkeys(("image/png", "image/jpeg", "image/bmp", "image/tiff", BINARY), _BYTES),
            FORM: {
                "schema": {
                    "type": "object",
                    "properties": {"image": {"type": "string", "format": "binary"}},
                    "required": ["image"],
                }
            },
        },
    }
}


async def _on_http_error(_request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    sentence = error.detail if isinstance(error, HTTPException) else str(error)
    return JSONResponse({"error": sentence}, status, getattr(error, "headers", None))


async def _on_bad_query(_request: Request, error: Exception) -> Response:
    found = error.errors() if isinstance(error, RequestValidationError) else []
    words = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in found)
    return JSONResponse({"error": f"The request is not understood ({words})."}, 422)


async def _image_bytes(request: Request, limit: int) -> bytes:
    """The image of a request, from its body or its form."""
    kind = request.headers.get("content-type", BINARY).partition(";")[0].strip().lower()
    if kind not in (FORM, BINARY, CURL) and not kind.startswith("image/"):
        await _discard(request, limit)
        raise Refusal(415, f"{kind or 'No type'} is no image; send image/* or {BINARY}, or a form ({FORM}).")
    body = await _body(request, limit)
    content = await _from_form(request, body) if kind == FORM else body
    if not content:
        raise Refusal(400, "The request holds no image; send the bytes of a PNG, JPEG, BMP or TIFF file.")
    return content


async def _body(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "")
    parts, size = [], int(declared) if declared.isdigit() else 0
    if size <= limit:
        size = 0
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit:
                break
            parts.append(chunk)
    if size > limit:
        await _discard(request, limit)
        raise Refusal(413, f"The body is larger than {limit:,} bytes; send a smaller image.")
    return b"".join(parts)


async def _from_form(request: Request, body: bytes) -> bytes:
    """The one file of a multipart form that was read already: the parser by itself knows no limit of the whole."""

    async def once() -> AsyncIterator[bytes]:
        yield body
        yield b""

    try:
        form = await MultiPartParser(request.headers, once(), max_files=1, max_fields=8).parse()  # type: ignore[arg-type]
    except MultiPartException as error:
        raise Refusal(400, f"The form is damaged ({error.message}).") from None
    except (KeyError, ValueError) as error:
        raise Refusal(400, f"The form is damaged ({error}).") from None
    try:
        files = [value for value in form.values() if isinstance(value, UploadFile)]
        if len(files) != 1:
            raise Refusal(400, "The form holds no file; send the image as its one file: `curl -F image=@part.png`.")
        return await files[0].read()
    finally:
        await form.close()  # its files may lie on disk


async def _discard(request: Request, limit: int) -> None:
    """Read what a client is sending and forget it, up to a limit: if we closed before it had sent all, its system might
    throw our answer away."""
    size = 0
    try:
        async with asyncio.timeout(2):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    return
    except (TimeoutError, ClientDisconnect, RuntimeError):  # RuntimeError: the stream was read before
        return
