"""What the service answers to good images, to bad ones, and when it has enough to do."""

import base64
import http.client
import io
import json
import re
import signal
import socket
import struct
import subprocess
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from served import COMMAND, PREDICT, Server, asking, encoded, form, plate, serving
from toy_onnx import METADATA, SIZE, write_toy

from flawsmith.cli import app
from flawsmith.data.images import read_image
from flawsmith.errors import UserError
from flawsmith.files import digest_file
from flawsmith.inference.predictor import Predictor
from flawsmith.inference.serialise import describe

GOOD, DEFECTIVE = encoded(plate(defect=False)), encoded(plate())
MAX_PIXELS, MAX_BYTES = 40_000, 200_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("model") / "model.onnx")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Server]:
    limits = ("--max-megapixels", str(MAX_PIXELS / 1e6), "--max-megabytes", str(MAX_BYTES / 1e6))
    with serving(model, *limits) as running:
        yield running


def test_the_answer_is_that_of_the_predictor(server: Server, model: Path, tmp_path: Path) -> None:
    predictor = Predictor(model)
    for name, content, verdict in (("good", GOOD, "good"), ("defective", DEFECTIVE, "defective")):
        (tmp_path / name).write_bytes(content)
        image = read_image(tmp_path / name)
        (prediction,) = predictor.predict([image])
        reply = server.ask(body=content)
        assert reply.status == 200
        answer = reply.json
        assert answer.pop("model") == {
            "category": METADATA.category, "version": "", "digest": digest_file(model), "provider": "cpu",
        }  # fmt: skip
        assert answer == describe(prediction, predictor, *image.shape[1:])
        assert answer["verdict"] == verdict


@pytest.mark.parametrize("kind", ["application/octet-stream", "image/x-odd", "application/x-www-form-urlencoded"])
def test_the_bytes_decide_whatever_they_are_called(server: Server, kind: str) -> None:
    assert server.ask(body=DEFECTIVE, kind=kind).json == server.ask(body=DEFECTIVE).json


def test_a_type_that_is_no_image_is_refused(server: Server) -> None:
    for kind in ("application/json", "text/plain"):
        assert server.ask(body=b"hello", kind=kind).status == 415


def test_an_image_in_a_form(server: Server) -> None:
    body, kind = form(DEFECTIVE, field="anything")
    assert server.ask(body=body, kind=kind).json == server.ask(body=DEFECTIVE).json


def test_map_and_overlay_come_on_wish(server: Server, model: Path, tmp_path: Path) -> None:
    assert not {"anomaly_map", "overlay"} & set(server.ask(body=DEFECTIVE).json)
    answer = server.ask(f"{PREDICT}?map=true&overlay=true", DEFECTIVE).json
    overlay = Image.open(io.BytesIO(base64.b64decode(answer["overlay"])))
    assert overlay.size == (64, 48)
    coded = answer["anomaly_map"]
    levels = np.asarray(Image.open(io.BytesIO(base64.b64decode(coded["png"]))), np.float64)
    (tmp_path / "image").write_bytes(DEFECTIVE)
    (prediction,) = Predictor(model).predict([read_image(tmp_path / "image")])
    found = coded["low"] + levels / 65535 * (coded["high"] - coded["low"])
    np.testing.assert_allclose(found, prediction.anomaly_map, atol=1e-4)
    assert found.shape == (SIZE, SIZE)


@pytest.mark.parametrize(
    ("form_name", "mode"), [("JPEG", "RGB"), ("JPEG", "CMYK"), ("JPEG", "L"), ("BMP", "RGB"), ("TIFF", "RGB"),
                            ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "1"), ("PNG", "I;16"), ("TIFF", "I;16")]
)  # fmt: skip
def test_every_common_kind_of_image_is_judged(server: Server, form_name: str, mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(plate()[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(plate()).convert(mode)
    reply = server.ask(body=encoded(image, form_name))
    assert reply.status == 200
    assert (reply.json["width"], reply.json["height"]) == (64, 48)


def bomb(width: int, height: int) -> bytes:
    """A PNG that says it is huge and holds next to nothing."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


def malformed() -> Iterator[tuple[bytes, str]]:
    """Over 500 requests that are not quite an image, from a fixed seed; some are one nevertheless."""
    random = np.random.default_rng(0)
    pixels = plate()
    whole = [encoded(pixels, name) for name in ("PNG", "JPEG", "BMP", "TIFF")]
    whole.append(encoded(Image.fromarray(pixels), "TIFF", compression="tiff_lzw"))
    whole.append(encoded(Image.fromarray(pixels).convert("CMYK"), "JPEG"))
    whole.append(encoded(Image.fromarray(pixels), "PNG", save_all=True, append_images=[Image.fromarray(pixels[::-1])]))
    for content in whole:
        for share in np.linspace(0, 0.98, 24):  # truncated
            yield content[: int(share * len(content))], "image/png"
        for count in (1, 2, 8, 64, 512):  # damaged
            for _ in range(8):
                damaged = bytearray(content)
                for place in random.integers(0, len(content), count):
                    damaged[place] = random.integers(256)
                yield bytes(damaged), "image/jpeg"
        for place in range(0, 64, 4):  # damaged where formats keep their sizes
            damaged = bytearray(content)
            damaged[place : place + 4] = b"\xff\xff\xff\xff"
            yield bytes(damaged), "application/octet-stream"
    for width, height in ((30_000, 30_000), (2**31 - 1, 2**31 - 1), (0, 0), (0, 5), (1_000_000, 1)):
        yield bomb(width, height), "image/png"
    for size in (0, 1, 7, 100, 10_000):
        yield random.bytes(size), "image/png"
        yield bytes(size), "image/tiff"
    for form_name in ("GIF", "WEBP", "PPM", "ICO"):
        yield encoded(pixels, form_name), "image/gif"
    yield b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>", "image/svg+xml"
    yield b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "image/x-eps"
    yield b'{"image": 1}', "application/json"
    yield b"hello", "text/plain"
    for cut in range(0, 200, 10):  # forms that end too soon
        body, kind = form(DEFECTIVE)
        yield body[:cut], kind
    body, _ = form(DEFECTIVE)
    for kind in ("multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=other",
                 "multipart/form-data; boundary=" + "x" * 5000):  # fmt: skip
        yield body, kind
    yield b"--edge\r\n\r\n--edge--\r\n", "multipart/form-data; boundary=edge"
    two, kind = form(DEFECTIVE)
    yield two.replace(b"--edge--\r\n", b"") + two, kind


@pytest.mark.parametrize("every", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_malformed_requests_are_answered_and_none_brings_the_server_down(server: Server, every: int) -> None:
    cases = list(malformed())
    assert len(cases) >= 500
    seen = set()
    for number, (body, kind) in enumerate(cases[::every]):
        reply = server.ask(body=body, kind=kind)
        assert reply.status == 200 or 400 <= reply.status < 500, (number, kind, reply)
        if reply.status != 200:
            sentence = reply.json["error"]
            assert sentence.endswith((".", ")")), sentence
            assert "/tmp" not in sentence  # noqa: S108 no path of ours is told
            assert "\n" not in sentence
        seen.add(reply.status)
    assert server.process.poll() is None
    assert seen >= {200, 400, 422}
    assert server.ask(body=DEFECTIVE).json["verdict"] == "defective"
    assert server.metric("flawsmith_admitted") == 0


def test_what_is_too_large_is_refused(server: Server) -> None:
    many = encoded(np.zeros((201, 200, 3), np.uint8))
    assert server.ask(body=many).status == 422
    assert "pixels" in server.ask(body=many).json["error"]
    assert server.ask(body=bytes(MAX_BYTES + 1)).status == 413
    connection = server.connect()  # without Content-Length: the body says nothing of its size beforehand
    connection.request("POST", PREDICT, iter([bytes(50_000)] * 5), {"Content-Type": "image/png"}, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def test_what_is_no_http_is_refused(server: Server) -> None:
    for request in (b"NONSENSE\r\n\r\n", b"POST /v1/predict HTTP/1.1\r\nX: " + b"y" * 200_000 + b"\r\n\r\n"):
        with socket.create_connection(server.address, timeout=30) as place:
            place.sendall(request)
            assert place.recv(100).startswith(b"HTTP/1.1 400")
    assert server.ask("/readyz").status == 200
    assert server.ask(PREDICT).status == 405
    assert server.ask(f"{PREDICT}?map=perhaps", DEFECTIVE).status == 422


def test_pages_and_descriptions(server: Server) -> None:
    assert server.ask("/healthz").body == b"ok"
    assert server.ask("/readyz").status == 200
    description = server.ask("/openapi.json").json
    operation = description["paths"][PREDICT]["post"]
    assert {"multipart/form-data", "image/png"} <= set(operation["requestBody"]["content"])
    assert {"200", "400", "408", "413", "415", "422", "429", "503", "504"} <= set(operation["responses"])
    docs = server.ask("/docs").body.decode()
    for name in ("swagger-ui-bundle.js", "swagger-ui.css"):
        assert f"/swagger/{name}" in docs
        assert server.ask(f"/swagger/{name}").status == 200
    page = server.ask("/")
    assert not re.search(r"(src|href)=.?https?:|url\(|import ", page.body.decode())  # nothing from elsewhere
    assert "default-src 'self'" in page.headers["content-security-policy"]
    before = server.metric('flawsmith_verdicts_total{verdict="defective"}')
    server.ask(body=DEFECTIVE)
    assert server.metric('flawsmith_verdicts_total{verdict="defective"}') == before + 1


def begin_upload(server: Server) -> http.client.HTTPConnection:
    """A client that has sent half of its image and takes its time."""
    connection = server.connect()
    connection.putrequest("POST", PREDICT)
    connection.putheader("Content-Type", "image/png")
    connection.putheader("Content-Length", str(len(DEFECTIVE)))
    connection.endheaders()
    connection.send(DEFECTIVE[: len(DEFECTIVE) // 2])
    return connection


def end_upload(connection: http.client.HTTPConnection) -> tuple[int, bytes]:
    connection.send(DEFECTIVE[len(DEFECTIVE) // 2 :])
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


def test_a_full_queue_is_told_at_once_and_emptied_again(model: Path) -> None:
    with serving(model, "--workers", "1", "--queue", "1") as server:
        clients = [begin_upload(server) for _ in range(2)]
        server.wait_for("flawsmith_admitted", 2)
        refused = server.ask(body=DEFECTIVE)
        assert refused.status == 429
        assert refused.headers["retry-after"] == "1"
        assert server.ask("/healthz").status == 200
        assert [end_upload(client)[0] for client in clients] == [200, 200]
        assert server.ask(body=DEFECTIVE).status == 200


def test_a_slow_client_loses_its_place(model: Path) -> None:
    with serving(model, "--workers", "1", "--queue", "0", "--timeout", "0.5") as server:
        client = begin_upload(server)
        answer = client.getresponse()
        assert answer.status == 408
        client.close()
        gone = begin_upload(server)
        server.wait_for("flawsmith_admitted", 1)
        gone.close()
        server.wait_for("flawsmith_admitted", 0)
        assert server.ask(body=DEFECTIVE).status == 200


def test_what_was_taken_on_is_finished_before_the_end(model: Path) -> None:
    with serving(model, "--drain", "1") as server:
        client = begin_upload(server)
        server.wait_for("flawsmith_admitted", 1)
        server.process.send_signal(signal.SIGTERM)
        end = time.monotonic() + 10
        while server.ask("/readyz").status == 200:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert server.ask(body=DEFECTIVE).status == 200  # drained, not yet closed
        time.sleep(1.2)
        with pytest.raises(ConnectionError):
            server.ask("/healthz")
        status, body = end_upload(client)
        assert (status, json.loads(body)["verdict"]) == (200, "defective")
        assert server.process.wait(timeout=30) == 0


def test_another_file_in_its_place_is_the_new_model_and_no_request_fails(tmp_path: Path) -> None:
    model = write_toy(tmp_path / "model.onnx")
    digests = [digest_file(model)]
    with serving(model, "--poll", "0.1", "--queue", "64") as server:
        with asking(server, DEFECTIVE, clients=4) as replies:
            for gain in (2.0, 3.0, 4.0):
                other = write_toy(tmp_path / "other.onnx", gain)
                digests.append(digest_file(other))
                other.replace(model)
                server.wait_for('flawsmith_model_changes_total{outcome="done"}', len(digests))
            model.write_bytes(b"torn")  # half a copy: the present one stays
            server.wait_for('flawsmith_model_changes_total{outcome="failed"}', 1)
            time.sleep(0.3)
        assert {reply.status for reply in replies} == {200}
        assert set(digests) == {reply.json["model"]["digest"] for reply in replies}
        assert server.ask(body=DEFECTIVE).json["model"]["digest"] == digests[-1]
        assert server.ask("/readyz").status == 200


@pytest.mark.parametrize(("content", "word"), [(None, "does not exist"), (b"no model", "cannot be loaded")])
def test_without_a_usable_model_it_does_not_start(tmp_path: Path, content: bytes | None, word: str) -> None:
    model = tmp_path / "model.onnx"
    if content is not None:
        model.write_bytes(content)
    with pytest.raises(UserError, match=word):
        app(["serve", str(model)], standalone_mode=False)


def test_an_address_in_use_is_one_clear_sentence(server: Server, model: Path) -> None:
    command = [*COMMAND, str(model), "--port", str(server.address[1])]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert ended.returncode == 2
    assert "choose another --host or --port" in ended.stderr
