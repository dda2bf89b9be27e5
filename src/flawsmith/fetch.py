"""Fetching public benchmark data: MVTec AD, one archive a category, with checksum, resume and safe unpacking.

    flawsmith fetch mvtec-ad --category bottle

MVTec AD is by MVTec Software GmbH under CC BY-NC-SA 4.0: not for commercial use. Nothing of it comes with this package.

mvtec_ad.json holds the links of MVTec's download page, which have changed twice since 2025, and the archives' SHA-256,
which have not changed since 2020. MVTec publishes no checksums: these are from public loaders. Those of cable,
hazelnut, leather, pill, tile and wood have one source, the others agree between independent ones.
"""

import difflib
import json
import lzma
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from flawsmith.data.walk import SUFFIXES
from flawsmith.errors import UserError
from flawsmith.files import atomic_folder, digest_file
from flawsmith.progress import bar

if TYPE_CHECKING:
    import requests

PAGE = "https://www.mvtec.com/company/research/datasets/mvtec-ad/downloads"
LICENCE = (
    "MVTec AD (Bergmann et al., CVPR 2019) is licensed CC BY-NC-SA 4.0: non-commercial use only, with attribution; "
    "see https://creativecommons.org/licenses/by-nc-sa/4.0/ and the licence file in the archive."
)
ARCHIVES: dict[str, dict[str, str]] = json.loads(Path(__file__).with_name("mvtec_ad.json").read_text())

CHUNK = 1 << 16  # what a broken connection may cost: the chunk it broke in is read again
ATTEMPTS = 5  # downloads that break off are taken up again this often in one call
PAUSE = 1.0  # seconds between two attempts
TIMEOUT = 30.0  # seconds without a byte
MAX_UNPACKED = 8 << 30  # the largest category unpacks to less than 1 GB
MAX_MEMBERS = 100_000
SPARE = 64 << 20  # bytes left free on the disk


def mvtec_ad_url(category: str, base_url: str | None = None) -> str:
    """The address of a category's archive: MVTec's own, or `<base_url>/<category>.tar.xz` on a mirror.

    Raises:
        UserError: MVTec AD has no such category; the nearest name is given.
    """
    if category not in ARCHIVES:
        close = difflib.get_close_matches(category, ARCHIVES, n=1, cutoff=0.4)
        hint = f"did you mean `{close[0]}`?" if close else f"known are {', '.join(ARCHIVES)}."
        raise UserError(f"MVTec AD has no category `{category}`; {hint}")
    return f"{base_url.rstrip('/')}/{category}.tar.xz" if base_url else ARCHIVES[category]["url"]


def fetch_mvtec_ad(
    category: str,
    root: Path,
    base_url: str | None = None,
    url: str | None = None,
    sha256: str | None = None,
    progress: bool = True,
    notify: Callable[[str], None] = print,
) -> Path:
    """Download one MVTec AD category into `root/<category>`; returns that folder.

    The archive is kept in `root/.downloads` until it is unpacked, so a call that was interrupted resumes where it
    stopped. The folder appears complete or not at all, and an existing one is never touched.

    Args:
        category: a key of `ARCHIVES`.
        root: the folder of the categories (`data.root` of params.yaml).
        base_url: a mirror that holds `<category>.tar.xz`.
        url: the archive's own address instead, for when MVTec has moved it.
        sha256: the checksum to demand instead of the known one, as 64 hex digits.
        progress: whether to draw a progress bar.
        notify: where the licence notice goes.

    Raises:
        UserError: the category is unknown or already there, the server cannot be reached or has no such file, the
            checksum differs, the archive is unsafe or no MVTec AD category, or the disk is full.
    """
    known_url = mvtec_ad_url(category, base_url)  # names an unknown category even when `url` is given
    source, expected = url or known_url, (sha256 or ARCHIVES[category]["sha256"]).lower()
    if len(expected) != 64 or set(expected) - set("0123456789abcdef"):
        raise UserError(f"`{sha256}` is no SHA-256; give 64 hex digits.")
    target = root / category
    if target.exists():
        raise UserError(f"{target} exists already; remove or rename it to fetch it again.")
    notify(LICENCE)
    archive = root / ".downloads" / f"{category}.tar.xz.part"
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        if not archive.exists() or digest_file(archive) != expected:
            download(source, archive, progress)
            found = digest_file(archive)
            if found != expected:
                archive.unlink()
                raise UserError(
                    f"{source} has SHA-256 {found}, not {expected}. Try again; if it stays so, compare with {PAGE} and "
                    "pass the new checksum with --sha256, if you trust it."
                )
        unpack_category(archive, category, target)
        archive.unlink()
        if not any(archive.parent.iterdir()):
            archive.parent.rmdir()
    except OSError as error:
        raise UserError(
            f"{category} cannot be stored in {root} ({error}); free disk space or correct the path."
        ) from error
    return target


def download(url: str, part: Path, progress: bool = False) -> None:
    """Download `url` to the file `part`, after what it holds already, over several connections if need be.

    Raises:
        UserError: the server cannot be reached, has no such file or breaks off again and again, or the disk is full.
    """
    for attempt in range(ATTEMPTS):
        before = _size(part)
        reason = _continue(url, part, progress)
        if not reason:
            return
        if _size(part) == before and attempt:  # two connections in a row without a byte: no use in more
            break
        time.sleep(PAUSE)
    raise UserError(
        f"{url} broke off after {_size(part) / 1e6:.1f} MB ({reason}); run the same command again to resume."
    )


def _continue(url: str, part: Path, progress: bool) -> str:
    """Append what one connection gives (HTTP Range, RFC 9110, section 14); returns why the file is still incomplete,
    or nothing when it is whole."""
    import requests

    have = _size(part)
    # identity: a compressed transfer would make offsets and lengths mean something else
    headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
            sent = answer.headers.get("Content-Range", "")
            if answer.status_code == 416:  # nothing lies beyond what we have
                if sent == f"bytes */{have}":
                    return ""
                part.unlink()
                return "the file on the server is another one now"
            if answer.status_code >= 500:
                return f"HTTP status {answer.status_code}"
            if answer.status_code >= 400:
                raise UserError(
                    f"{url} answers with HTTP status {answer.status_code}; MVTec moves its files now and then: "
                    f"copy the category's link from {PAGE} and pass it with --url."
                )
            if not (answer.status_code == 206 and sent.startswith(f"bytes {have}-")):
                have = 0  # a server without Range sends all of it again
            total = _write(answer, part, have, progress)
    except requests.RequestException as error:
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        if isinstance(error, requests.ConnectionError) and _size(part) == 0:
            raise UserError(
                f"{url} cannot be reached ({reason}); check the network, or download the archive elsewhere and "
                "unpack it into data/<category>."
            ) from error
        return reason
    return "" if total is None or _size(part) == total else f"{_size(part)} of {total} bytes came"


def _write(answer: "requests.Response", part: Path, have: int, progress: bool) -> int | None:
    """Write an answer's body behind the first `have` bytes of `part`; returns the size of the whole, if it is told."""
    length = answer.headers.get("Content-Length")
    total = have + int(length) if length else None
    free = shutil.disk_usage(part.parent).free
    need = (total or 0) * 2 - have + SPARE  # the rest of the archive, and its images, which xz hardly shrinks
    if free < need:
        raise UserError(f"{part.parent} has {free / 1e6:.0f} MB free and {need / 1e6:.0f} MB are needed; free some.")
    name = part.name.removesuffix(".part")
    with (
        part.open("ab" if have else "wb") as stream,
        bar(what=name, total=total, unit="B", done=have, is_shown=progress) as shown,
    ):
        for chunk in answer.iter_content(CHUNK):
            stream.write(chunk)
            shown.update(len(chunk))
    return total


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def unpack_category(
    archive: Path, category: str, target: Path, max_bytes: int = MAX_UNPACKED, max_members: int = MAX_MEMBERS
) -> None:
    """Unpack the folder `<category>/` of a tar archive as `target`, which appears complete or not at all.

    Only plain files and folders are written: a link, a device, an absolute path or one with `..` is refused, and so is
    more than `max_bytes` in all.

    Raises:
        UserError: the archive is damaged or unsafe, or holds no `<category>/train/good` images.
    """
    left, images = max_bytes, 0
    try:
        with tarfile.open(archive) as tar, atomic_folder(target) as folder:
            for count, member in enumerate(tar):
                parts = PurePosixPath(member.name).parts
                if not (member.isfile() or member.isdir()) or member.name.startswith("/") or ".." in parts:
                    raise UserError(f"{archive} holds `{member.name}`, which is a link, a device or leads outside.")
                left -= member.size
                if left < 0 or count >= max_members:
                    raise UserError(
                        f"{archive} unpacks to more than {max_bytes:,} bytes or {max_members:,} files; this is no "
                        "MVTec AD category."
                    )
                if parts[:1] != (category,) or len(parts) < 2:
                    continue
                inside = PurePosixPath(*parts[1:])
                tar.extract(member.replace(name=str(inside), deep=False), folder, filter="data")
                images += inside.parts[:2] == ("train", "good") and inside.suffix.lower() in SUFFIXES
            if not images:
                raise UserError(f"{archive} holds no images in {category}/train/good; this is no MVTec AD category.")
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise UserError(f"{archive} cannot be unpacked ({error}); remove it and fetch it again.") from error
