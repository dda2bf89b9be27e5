"""Fetching public benchmark data: MVTec AD, one archive a category, with checksum, resume and safe unpacking.

    flawsmith fetch mvtec-ad --category bottle

MVTec AD is by MVTec Software GmbH under CC BY-NC-SA 4.0: not for commercial use. Nothing of it comes with this package.
"""

import difflib
import lzma
import shutil
import tarfile
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import IO, Any

from flawsmith.data.walk import SUFFIXES
from flawsmith.errors import UserError
from flawsmith.files import atomic_folder
from flawsmith.progress import bar

PAGE = "https://www.mvtec.com/company/research/datasets/mvtec-ad/downloads"
LICENCE = (
    "MVTec AD (Bergmann et al., CVPR 2019) is licensed CC BY-NC-SA 4.0: non-commercial use only, with attribution; "
    "see https://creativecommons.org/licenses/by-nc-sa/4.0/ and the licence file in the archive."
)

# The links of MVTec's download page, which have changed twice since 2025, and the archives' SHA-256, which have not
# changed since 2020. MVTec publishes no checksums: these are from public loaders; those of bottle, capsule, carpet,
# grid, metal_nut, screw, toothbrush, transistor and zipper agree between independent ones, the others have one source.
_HOST = "https://www.mydrive.ch/shares"
_ARCHIVES = {
    "bottle": (
        "150452/132a93367fb17cdf968dfb5c4013f6e7/download/420937370-1629958698",
        "726512129cb3b1f47d4f6cd7c7fc9170db7fc209132249c788fec06029cb5dc3",
    ),
    "cable": (
        "150453/10f960e07fec2838b2cd512586633a32/download/420937413-1629958794",
        "1e3d59b80a6a8da5adf32fb0cf311c7b964cde146d6920aef9ca66380999a9cd",
    ),
    "capsule": (
        "150454/e0ce6dd74eb150f46c0d98131b3703f2/download/420937454-1629958872",
        "f6a41cb11f1589d552888fe9c43a1adcbcae15b70073e19093322f836d00a2b6",
    ),
    "carpet": (
        "150455/eac7fbce84d93a5094e13f391170eca4/download/420937484-1629959013",
        "d9dd5064515a20bd75cf24d223c570579141abd72388beef892780b74dbaa85d",
    ),
    "grid": (
        "150456/bb0b2e3dc804ccb8b4485e01f8e4493b/download/420937487-1629959044",
        "d94a9a651cbfaee22c94d06cf8fa8204a590c872362de0489eb34f1645328de8",
    ),
    "hazelnut": (
        "150457/51d49f65e84bdc100ff8035d7dd783ea/download/420937545-1629959162",
        "a7f4e7d65a60a235def7236a46fcb854d62e6c6917c16b1ec9cb4ff089d3b0da",
    ),
    "leather": (
        "150458/923030ce14e10a7d147e95d0f8885f6b/download/420937607-1629959262",
        "704ffa48b1dc2fc44824aa50442d9febc399dd92a5d6fd8156f8aa0373d15f24",
    ),
    "metal_nut": (
        "150459/c68856a21dca589b0f8ff6d4ee0f18f4/download/420937637-1629959294",
        "86e3c8e163ceb19146ad3ddc408e85cc34ae02e0da430e07a73bac6bbb48532a",
    ),
    "pill": (
        "150460/d4f1c04da67034ccc8d8b5fa3e73f244/download/420938129-1629960351",
        "ac6ce9ec4ec2a5d67c906d82147bd7431980cf00b78f25d63201a5f17e3a2038",
    ),
    "screw": (
        "150461/242f454cc6385e5693c4fd4b94567d1e/download/420938130-1629960389",
        "0a27a365a21e472d19b9fb48cb8e4002b49fabe083bff7f4c16fa57d78154f10",
    ),
    "tile": (
        "150462/5479f0fdc97bc6fa16eab0cb0cf0109f/download/420938133-1629960456",
        "392228153b96d0db9f179d3f7c2d63e131e907154883b57309fcbf798643173c",
    ),
    "toothbrush": (
        "150463/895a1a5fb84b958f07417784b060434b/download/420938134-1629960477",
        "fe72a34b4b0d074f84e844be7ef8c4f64f7f02f20e25f19c9e3b4a231c8bea77",
    ),
    "transistor": (
        "150464/99b8ea0332438d64fcc2475ee73f9c29/download/420938166-1629960554",
        "146b2166c35a1d0cf37ded091366ac01a50338b4ac704632f1239890eaca4449",
    ),
    "wood": (
        "150465/d5b4115b720cdb54d217e75636e6e374/download/420938383-1629960649",
        "3757297ac2a266072eb4f25a97f805f5b37fd583492b20bd709f310736c1ea47",
    ),
    "zipper": (
        "150466/bd155b557520edaf692d9bfdb915c24a/download/420938385-1629960680",
        "7ab46e0e195da145db30052baea3d3a5d14c5f0e710137c968e0423f02cb942d",
    ),
}
MVTEC_AD_CATEGORIES = tuple(_ARCHIVES)

CHUNK = 1 << 16  # what a broken connection may cost: the chunk it broke in is read again
ATTEMPTS = 5  # downloads that break off are taken up again this often in one call
TIMEOUT = 30.0  # seconds without a byte
MAX_UNPACKED = 8 << 30  # the largest category unpacks to less than 1 GB
MAX_MEMBERS = 100_000
SPARE = 64 << 20  # bytes left free on the disk


def mvtec_ad_url(category: str, base_url: str | None = None) -> str:
    """The address of a category's archive: MVTec's own, or `<base_url>/<category>.tar.xz` on a mirror.

    Raises:
        UserError: MVTec AD has no such category; the nearest name is given.
    """
    if category not in _ARCHIVES:
        close = difflib.get_close_matches(category, _ARCHIVES, n=1, cutoff=0.4)
        hint = f"did you mean `{close[0]}`?" if close else f"known are {', '.join(_ARCHIVES)}."
        raise UserError(f"MVTec AD has no category `{category}`; {hint}")
    folder = base_url.rstrip("/") if base_url else f"{_HOST}/{_ARCHIVES[category][0]}"
    return f"{folder}/{category}.tar.xz"


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
        category: one of `MVTEC_AD_CATEGORIES`.
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
    import pooch

    pooch.get_logger().setLevel("WARNING")
    source = url or mvtec_ad_url(category, base_url)
    mvtec_ad_url(category)  # names an unknown category even when `url` is given
    expected = (sha256 or _ARCHIVES[category][1]).lower()
    if len(expected) != 64 or set(expected) - set("0123456789abcdef"):
        raise UserError(f"`{sha256}` is no SHA-256; give 64 hex digits.")
    target = root / category
    if target.exists():
        raise UserError(f"{target} exists already; remove or rename it to fetch it again.")
    notify(LICENCE)
    downloads = root / ".downloads"
    part = downloads / f"{category}.tar.xz.part"
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        archive = Path(
            pooch.retrieve(
                source,
                known_hash=f"sha256:{expected}",
                fname=f"{category}.tar.xz",
                path=downloads,
                downloader=ResumingDownloader(part, progress),
            )
        )
        unpack_category(archive, category, target)
    except ValueError as error:  # pooch's word for a checksum that differs; it has dropped the file
        raise UserError(
            f"{source} is not the archive with SHA-256 {expected} ({error}). Try again; if it stays so, compare with "
            f"{PAGE} and pass the new checksum with --sha256, if you trust it."
        ) from error
    except OSError as error:
        raise UserError(
            f"{category} cannot be stored in {root} ({error}); free disk space or correct the path."
        ) from error
    archive.unlink()
    if not any(downloads.iterdir()):
        downloads.rmdir()
    return target


class ResumingDownloader:
    """A pooch downloader that keeps what it has in `part` and asks only for the rest (HTTP Range, RFC 9110, 14)."""

    def __init__(self, part: Path, progress: bool = False, pause: float = 1.0) -> None:
        self.part, self.progress, self.pause = part, progress, pause

    def __call__(self, url: str, output_file: str, pooch: Any) -> None:
        """Write the body of `url` to `output_file`, over several connections if need be."""
        for attempt in range(ATTEMPTS):
            had = self._size()
            reason = self._continue(url)
            if not reason:
                self.part.replace(output_file)
                return
            if self._size() == had and attempt:  # two connections in a row without a byte: no use in more
                break
            time.sleep(self.pause)
        raise UserError(
            f"{url} broke off after {self._size() / 1e6:.1f} MB ({reason}); run the same command again to resume."
        )

    def _size(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _continue(self, url: str) -> str:
        """Append what one connection gives; returns why the file is still incomplete, or nothing when it is whole."""
        import requests

        have = self._size()
        # identity: a compressed transfer would make offsets and lengths mean something else
        headers = {"Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
        try:
            with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
                if answer.status_code == 416:  # nothing lies beyond what we have
                    if answer.headers.get("Content-Range", "") == f"bytes */{have}":
                        return ""
                    self.part.unlink()
                    return "the file on the server is another one now"
                if answer.status_code >= 500:
                    return f"HTTP status {answer.status_code}"
                if answer.status_code >= 400:
                    raise UserError(
                        f"{url} answers with HTTP status {answer.status_code}; MVTec moves its files now and then: "
                        f"copy the category's link from {PAGE} and pass it with --url."
                    )
                resumed = answer.status_code == 206 and answer.headers.get("Content-Range", "").startswith(
                    f"bytes {have}-"
                )
                if not resumed:
                    have = 0  # a server without Range sends all of it again
                length = answer.headers.get("Content-Length")
                total = have + int(length) if length else None
                self._check_space(total, have)
                with self.part.open("ab" if resumed else "wb") as stream:
                    self._copy(answer, stream, have, total)
        except requests.RequestException as error:
            if have == 0 and isinstance(error, requests.ConnectionError) and self._size() == 0:
                raise UserError(
                    f"{url} cannot be reached ({_short(error)}); check the network, or download the archive elsewhere "
                    f"and unpack it into data/<category>."
                ) from error
            return _short(error)
        size = self._size()
        return "" if total is None or size == total else f"{size} of {total} bytes came"

    def _copy(self, answer: Any, stream: IO[bytes], have: int, total: int | None) -> None:
        name = self.part.name.removesuffix(".part")
        with bar(what=name, total=total, unit="B", done=have, is_shown=self.progress) as shown:
            for chunk in answer.iter_content(CHUNK):
                stream.write(chunk)
                shown.update(len(chunk))

    def _check_space(self, total: int | None, have: int) -> None:
        """The archive's rest, and its images, which xz hardly shrinks, must fit."""
        free = shutil.disk_usage(self.part.parent).free
        need = (total or 0) * 2 - have + SPARE
        if free < need:
            raise UserError(f"{self.part.parent} has {free / 1e6:.0f} MB free and {need / 1e6:.0f} MB are needed.")


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


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:400] or type(error).__name__
