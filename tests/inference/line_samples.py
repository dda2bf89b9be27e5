"""Plates, videos and the real command, for the tests of what a line needs."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import av
import numpy as np
from PIL import Image

from flawsmith.inference.options import PredictReport

ROOT = Path(__file__).parents[2]
DARK, BRIGHT = 40, 220
PATIENCE = 120.0  # seconds for a process on a busy machine


class Score(Protocol):
    """`predict_folder` of the toy model: inputs, `out` and options as there, by default from in/ to out/."""

    def __call__(self, *inputs: Path, out: Path | None = None, stdin: int = 0, **options: Any) -> PredictReport: ...


def plate(
    path: Path,
    bright: bool = False,
    size: tuple[int, int] = (64, 48),
    shade: int = DARK,
    mode: str = "RGB",
    **save: Any,
) -> Path:
    """A dark plate, `size` = (width, height); a bright one has a bright field: a defect to the toy models."""
    width, height = size
    pixels = np.full((height, width, 3), shade, np.uint8)
    if bright:
        pixels[height // 4 : height // 2, : width // 2] = BRIGHT
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert(mode).save(path, **save)
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def clip(
    path: Path,
    frames: int = 12,
    bright: Callable[[int], bool] = lambda index: False,
    codec: str = "mpeg4",
    size: tuple[int, int] = (64, 48),
    rotation: int = 0,
    options: dict[str, str] | None = None,
) -> Path:
    """A video of plates."""
    width, height = size
    noise = np.random.default_rng(0)
    with av.open(str(path), "w", options=options or {}) as container:
        stream: Any = container.add_stream(codec, rate=10)
        stream.width, stream.height = size
        stream.pix_fmt = {"mjpeg": "yuvj420p", "ffv1": "gray16le"}.get(codec, "yuv420p")
        stream.bit_rate = 4_000_000
        if rotation:
            stream.set_display_rotation(rotation)
        for index in range(frames):
            pixels = noise.integers(DARK, DARK + 20, (height, width, 3), np.uint8)
            if bright(index):
                pixels[height // 4 : height // 2, : width // 2] = BRIGHT
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


INTERRUPTIBLE = "signal.signal(signal.SIGINT, signal.default_int_handler)"


def command(*arguments: object) -> list[str]:
    """`flawsmith predict ...` by this Python, whatever is installed, and interruptible: a shell starts what it runs in
    the background with Ctrl-C ignored, and tests that run there hand that on."""
    code = f"import signal, sys; {INTERRUPTIBLE}; from flawsmith import cli; cli.main()"
    return [sys.executable, "-c", code, "predict", *map(str, arguments)]


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def start(*arguments: object, **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command(*arguments),
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        **{"stdout": subprocess.PIPE, **options},
    )


def wait_until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited in vain for {what}"
        time.sleep(0.05)


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file that may still grow."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
