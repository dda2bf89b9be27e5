"""Reads the image of a request, from its body or its form, in bounded memory."""

import asyncio
from collections.abc import AsyncIterator

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from flawsmith.serve.schema import BINARY, CURL, FORM


class Refusal(Exception):  # noqa: N818 an answer, not a fault of ours
    """An answer other than a verdict, with its HTTP status."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


async def read_image_bytes(request: Request, limit: int) -> bytes:
    """Read the bytes of an image file, at most `limit` of them.

    Raises:
        Refusal: the content type is no image's, the body is too large, or it holds no image.
    """
    kind = request.headers.get("content-type", BINARY).partition(";")[0].strip().lower()
    if kind not in (FORM, BINARY, CURL) and not kind.startswith("image/"):
        await discard(request, limit)
        raise Refusal(415, f"{kind or 'No type'} is no image; send image/* or {BINARY}, or a form ({FORM}).")
    body = await _read(request, limit)
    content = await _from_form(request, body) if kind == FORM else body
    if not content:
        raise Refusal(400, "The request holds no image; send the bytes of a PNG, JPEG, BMP or TIFF file.")
    return content


async def discard(request: Request, limit: int) -> None:
    """Read what a client is sending and forget it, up to a limit.

    If we closed before it had sent all, its system might throw our answer away.
    """
    size = 0
    try:
        async with asyncio.timeout(2):
            async for chunk in request.stream():
                size += len(chunk)
                if size > limit:
                    return
    except (TimeoutError, ClientDisconnect, RuntimeError):  # RuntimeError: the stream was read before
        return


async def _read(request: Request, limit: int) -> bytes:
    declared = request.headers.get("content-length", "")
    is_small, body = not declared.isdigit() or int(declared) <= limit, bytearray()
    if is_small:
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                break
    if not is_small or len(body) > limit:
        await discard(request, limit)
        raise Refusal(413, f"The body is larger than {limit:,} bytes; send a smaller image.")
    return bytes(body)


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
