"""The web service: image bytes in, verdict, regions and pictures out.

    POST /v1/predict   an image as the body, or as the one file of a form
    GET  /             a page to drop an image on
    GET  /healthz /readyz /metrics /docs /openapi.json

At most `workers` images are judged at once and `queue` more wait, in memory that is bounded by the limits; who comes
then gets 429 at once. Decoding and drawing go on in the workers' threads beside the model of others.
"""

import asyncio
import hashlib
import io
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import swagger_ui_bundle
from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from flawsmith.data.images import decode_image
from flawsmith.errors import FlawsmithError, UserError
from flawsmith.inference.draw import draw_prediction
from flawsmith.inference.mqtt import Sink
from flawsmith.inference.serialise import describe, encode_map, encode_png, identify
from flawsmith.serve.body import Refusal, discard, read_image_bytes
from flawsmith.serve.models import Loaded, ModelSlot
from flawsmith.serve.schema import REQUEST_BODY, RESPONSES, Answer
from flawsmith.serve.telemetry import Telemetry

PREDICT = "/v1/predict"
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


@dataclass
class Service:
    """What an app's handlers share."""

    slot: ModelSlot
    limits: Limits
    telemetry: Telemetry
    sink: Sink | None = None
    draining: bool = False

    def __post_init__(self) -> None:
        self.pool = ThreadPoolExecutor(self.limits.workers, thread_name_prefix="judge")
        self._places = threading.BoundedSemaphore(self.limits.workers + self.limits.queue)

    async def answer(self, request: Request, with_map: bool, with_overlay: bool) -> dict[str, Any]:
        """Read, judge and describe the image of a request.

        Raises:
            Refusal: there is no place, no image in time, no model, or no verdict in time.
        """
        if not self._places.acquire(blocking=False):
            await discard(request, self.limits.max_bytes)
            raise Refusal(429, "All workers are busy and the queue is full; try again in a second.")
        self.telemetry.admitted.inc()
        task: Future[dict[str, Any]] | None = None
        try:
            async with asyncio.timeout(self.limits.seconds):
                content = await read_image_bytes(request, self.limits.max_bytes)
                loaded = self.slot.current
                if loaded is None:
                    raise Refusal(503, "There is no model yet; try again in a second.")
                task = self.pool.submit(self._judge, loaded, content, with_map, with_overlay)
                # a worker cannot be stopped: its place is free when it is done, not when we no longer wait for it
                task.add_done_callback(lambda _: self._leave())
                return await asyncio.wrap_future(task)
        except TimeoutError:
            if task is None:
                raise Refusal(408, f"The image did not arrive within {self.limits.seconds:g} seconds.") from None
            raise Refusal(504, f"There was no verdict within {self.limits.seconds:g} seconds.") from None
        finally:
            if task is None:
                self._leave()

    def _leave(self) -> None:
        """Give a place back, from any thread."""
        self.telemetry.admitted.dec()
        self._places.release()

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
            answer["model"] = identify(predictor, loaded.version)
            if self.sink is not None:
                self.sink.add({"file": "", **answer, "sha256": hashlib.sha256(content).hexdigest()})
            if with_map:
                answer["anomaly_map"] = encode_map(prediction.anomaly_map)
            if with_overlay:
                answer["overlay"] = encode_png(draw_prediction(image, prediction, predictor))
        self.telemetry.verdicts.labels(answer["verdict"]).inc()
        self.telemetry.margins.observe(prediction.score - predictor.threshold)
        return answer


def create_app(slot: ModelSlot, limits: Limits, telemetry: Telemetry, sink: Sink | None = None) -> FastAPI:
    """The service over a slot that has a model or will have one; `app.state.service` holds what it shares.

    A result has gone to the `sink` before it is answered.
    """
    service = Service(slot, limits, telemetry, sink)

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
        responses=RESPONSES,
        openapi_extra=REQUEST_BODY,
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


async def _on_http_error(_request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    sentence = error.detail if isinstance(error, HTTPException) else str(error)
    return JSONResponse({"error": sentence}, status, getattr(error, "headers", None))


async def _on_bad_query(_request: Request, error: Exception) -> Response:
    found = error.errors() if isinstance(error, RequestValidationError) else []
    words = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in found)
    return JSONResponse({"error": f"The request is not understood ({words})."}, 422)
