"""Reads frames of video files, one after the other in bounded memory. Needs PyAV, the optional extra `video`."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flawsmith.data.images import FloatImage, Reading
from flawsmith.errors import UserError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.video.stream import VideoStream

SUFFIXES = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".wmv")
MISSING_END = 0.5  # seconds by which a video may end before the length it declares


@dataclass(frozen=True)
class Frame:
    """A decoded frame, still in the video's own pixel format, and its place in the video (from 0)."""

    index: int
    picture: "VideoFrame"

    def count_pixels(self) -> int:
        """Return width times height."""
        return int(self.picture.width * self.picture.height)

    def convert(self) -> FloatImage:
        """Convert to RGB `(3, H, W)` in [0, 1], upright as the camera says. More than 8 bits are kept."""
        is_deep = any(component.bits > 8 for component in self.picture.format.components)
        pixels = self.picture.to_ndarray(format="rgb48le" if is_deep else "rgb24")  # (H, W, 3)
        turned = np.rot90(pixels, round(self.picture.rotation / 90))
        scale = np.float32(65535 if is_deep else 255)
        return np.ascontiguousarray(turned.transpose(2, 0, 1), np.float32) / scale


def is_video(path: Path) -> bool:
    """Tell a video by its suffix."""
    return path.suffix.lower() in SUFFIXES


def check_installed() -> None:
    """Raise a UserError where PyAV is missing."""
    if find_spec("av") is None:
        from flawsmith.extras import missing

        raise missing("av", "video")


def read_frames(path: Path, every: int, reading: Reading) -> Iterator[Frame]:
    """Decode a video's first video stream and yield frames 0, `every`, 2 `every`, ...

    Raises:
        UserError: PyAV is missing; the file is missing, no video, or its frames are too large for `reading`; or, after
            the frames before that place, it is damaged or ends before the length it declares.
    """
    check_installed()
    import av

    index = 0
    try:
        with av.open(os.fspath(path)) as container:
            stream = next(iter(container.streams.video), None)
            # without codec parameters FFmpeg's decoder would take the whole process down
            if stream is None or stream.codec_context is None or not stream.codec_context.width:
                raise UserError(f"{path} cannot be read as a video (it holds no picture); replace or remove it.")
            last = 0.0
            for picture in _decode(container, stream):
                if picture.width * picture.height > reading.max_pixels:
                    raise UserError(
                        f"{path} has frames of {picture.width} x {picture.height} pixels, over the limit of "
                        f"{reading.max_pixels / 1e6:g} megapixels; crop it, or raise {reading.limit}."
                    )
                if picture.is_corrupt:
                    raise UserError(f"{path} is damaged at frame {index}; the frames before it were read.")
                if index % every == 0:
                    yield Frame(index, picture)
                index += 1
                last = max(last, picture.time or 0.0)
            _check_end(path, container, stream, index, last)
    except UserError:
        raise
    except Exception as error:  # FFmpeg's errors derive from OSError, ValueError, EOFError and others
        if isinstance(error, FileNotFoundError):
            raise UserError(f"{path} does not exist; check the path.") from error
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if index:
            raise UserError(
                f"{path} is damaged after frame {index - 1} ({reason}); the frames before it were read."
            ) from error
        raise UserError(f"{path} cannot be read as a video ({reason}); replace or remove it.") from error


def _decode(container: Any, stream: "VideoStream") -> Iterator["VideoFrame"]:
    """All frames; of a damaged stream those that the decoder still holds before the error."""
    for packet in container.demux(stream):
        try:
            pictures = packet.decode()
        except Exception:
            if packet.size:
                yield from _held_back(stream)
            raise
        yield from pictures


def _held_back(stream: "VideoStream") -> list["VideoFrame"]:
    try:
        return stream.codec_context.decode(None)
    except Exception:  # it has an error to tell already
        return []


def _check_end(path: Path, container: Any, stream: "VideoStream", count: int, last: float) -> None:
    """A file cut off between two packets decodes without an error; only what its header declares tells."""
    if not count:
        raise UserError(f"{path} cannot be read as a video (it holds no frame); replace or remove it.")
    if count < stream.frames:
        raise UserError(f"{path} is cut off or damaged: {count} of its {stream.frames} frames were found and read.")
    is_short = False
    if not stream.frames and container.duration and len(container.streams) == 1:  # sound may be longer than pictures
        start = (container.start_time or 0) / 1e6
        step = 1 / float(stream.average_rate) if stream.average_rate else 0.0
        is_short = last - start + step < container.duration / 1e6 - MISSING_END
    if is_short:
        raise UserError(f"{path} is cut off after frame {count - 1}; the frames before it were read.")
