import hashlib
import io
import shutil
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from flawsmith import fetch
from flawsmith.errors import UserError
from flawsmith.fetch import ARCHIVES, fetch_mvtec_ad, mvtec_ad_url, unpack_category


def member(name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, mode: int = 0o644) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.mode = len(content), kind, mode
    return info


def archive_of(files: dict[str, bytes], extra: tuple[tarfile.TarInfo, ...] = ()) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
        for name, content in files.items():
            tar.addfile(member(name, content), io.BytesIO(content))
        for info in extra:
            tar.addfile(info)
    return buffer.getvalue()


# noise, so that xz does not shrink it to one chunk
NOISE = b"".join(hashlib.sha256(i.to_bytes(4, "big")).digest() for i in range(6_000))
FILES = {
    "bottle/train/good/000.png": NOISE,
    "bottle/test/broken_large/000.png": b"defect",
    "bottle/ground_truth/broken_large/000_mask.png": b"mask",
    "bottle/license.txt": b"CC BY-NC-SA 4.0",
}
ARCHIVE = archive_of(FILES)
SHA256 = hashlib.sha256(ARCHIVE).hexdigest()


@dataclass
class Server:
    """A file server whose behaviour a test can change."""

    url: str = ""
    content: dict[str, bytes] = field(default_factory=lambda: {"/bottle.tar.xz": ARCHIVE})
    ranges: list[str | None] = field(default_factory=list)  # the Range headers that it saw
    allowances: list[int] = field(default_factory=list)  # bytes after which the next connections break off
    honours_range: bool = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body, wanted = state.content.get(self.path), self.headers.get("Range")
            state.ranges.append(wanted)
            if body is None:
                self.send_error(404)
                return
            start = 0
            if wanted and state.honours_range:
                start = int(wanted.removeprefix("bytes=").rstrip("-"))
                self.send_response(206 if start < len(body) else 416)
                span = f"{start}-{len(body) - 1}" if start < len(body) else "*"
                self.send_header("Content-Range", f"bytes {span}/{len(body)}")
            else:
                self.send_response(200)
            rest = body[start:]
            self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            allowed = state.allowances.pop(0) if state.allowances else len(rest)
            self.wfile.write(rest[:allowed])  # fewer than promised: the client sees the connection break

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        state.url = f"http://127.0.0.1:{http.server_address[1]}"
        yield state
        http.shutdown()
        thread.join()


@pytest.fixture
def get(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    monkeypatch.setattr(fetch, "PAUSE", 0)

    def call(category: str = "bottle", sha256: str | None = SHA256, **options: str) -> Path:
        options.setdefault("base_url", server.url)
        notices: list[str] = []
        folder = fetch_mvtec_ad(category, tmp_path / "data", sha256=sha256, notify=notices.append, **options)  # type: ignore[arg-type]
        assert "CC BY-NC-SA 4.0" in notices[0]
        return folder

    return call


def contents(folder: Path) -> dict[str, bytes]:
    return {
        f"{folder.name}/{file.relative_to(folder).as_posix()}": file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file()
    }


def test_a_category_arrives_whole_and_leaves_nothing_else(get: Callable[..., Path], tmp_path: Path) -> None:
    folder = get()
    assert folder == tmp_path / "data" / "bottle"
    assert contents(folder) == FILES
    assert list((tmp_path / "data").iterdir()) == [folder]


def test_a_broken_connection_is_taken_up_where_it_stopped(get: Callable[..., Path], server: Server) -> None:
    server.allowances.extend([fetch.CHUNK + 10, fetch.CHUNK + 10])
    assert contents(get()) == FILES
    assert server.ranges == [None, f"bytes={fetch.CHUNK}-", f"bytes={2 * fetch.CHUNK}-"]


def test_a_later_call_resumes_what_an_earlier_one_left(
    get: Callable[..., Path], server: Server, tmp_path: Path
) -> None:
    server.allowances.extend([fetch.CHUNK] + [0] * 10)
    with pytest.raises(UserError, match="run the same command again to resume"):
        get()
    part = tmp_path / "data" / ".downloads" / "bottle.tar.xz.part"
    assert part.read_bytes() == ARCHIVE[: fetch.CHUNK]
    assert not (tmp_path / "data" / "bottle").exists()

    server.allowances.clear()
    server.ranges.clear()
    assert contents(get()) == FILES
    assert server.ranges == [f"bytes={fetch.CHUNK}-"]


@pytest.mark.parametrize(
    ("left", "honours_range", "ranges"),
    [
        (ARCHIVE, True, []),  # whole already
        (b"x" * 1000, False, ["bytes=1000-"]),  # the server sends all of it again
        (b"x" * (len(ARCHIVE) + 1), True, [f"bytes={len(ARCHIVE) + 1}-", None]),  # of another file
    ],
)
def test_what_lies_there_already_is_used_or_replaced(
    get: Callable[..., Path], server: Server, tmp_path: Path, left: bytes, honours_range: bool, ranges: list[str | None]
) -> None:
    server.honours_range = honours_range
    part = tmp_path / "data" / ".downloads" / "bottle.tar.xz.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(left)
    assert contents(get()) == FILES
    assert server.ranges == ranges


def test_a_wrong_checksum_is_refused_and_the_file_dropped(
    get: Callable[..., Path], server: Server, tmp_path: Path
) -> None:
    for sha256 in (None, "0" * 64):  # None: the official checksum, which this archive does not have
        with pytest.raises(UserError, match=SHA256):
            get(sha256=sha256)
        assert not (tmp_path / "data" / "bottle").exists()
        assert list((tmp_path / "data" / ".downloads").iterdir()) == []
    with pytest.raises(UserError, match="64 hex digits"):
        get(sha256="abc")


def test_what_cannot_succeed_is_found_before_the_download(
    get: Callable[..., Path], server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data" / "bottle").mkdir(parents=True)
    with pytest.raises(UserError, match="exists already"):
        get()
    assert server.ranges == []
    (tmp_path / "data" / "bottle").rmdir()
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="MB are needed"):
        get()


def test_a_server_that_is_away_or_has_no_such_file_names_the_remedy(get: Callable[..., Path], server: Server) -> None:
    with pytest.raises(UserError, match=r"cannot be reached.*check the network"):
        get(base_url="http://127.0.0.1:1")
    with pytest.raises(UserError, match=r"404.*--url"):
        get("cable")
    server.content["/elsewhere/1234"] = ARCHIVE
    assert contents(get(url=f"{server.url}/elsewhere/1234")) == FILES


def test_an_unknown_category_names_the_nearest() -> None:
    for name, said in (("botle", "did you mean `bottle`"), ("qqqq", "known are bottle")):
        with pytest.raises(UserError, match=said):
            mvtec_ad_url(name)


def test_every_category_has_an_official_address_and_a_checksum_of_its_own() -> None:
    assert len(ARCHIVES) == len({archive["sha256"] for archive in ARCHIVES.values()}) == 15
    for name, archive in ARCHIVES.items():
        assert mvtec_ad_url(name).startswith("https://www.mydrive.ch/shares/")
        assert mvtec_ad_url(name).endswith(f"/{name}.tar.xz")
        assert len(bytes.fromhex(archive["sha256"])) == 32


def linked(kind: bytes, target: str) -> tarfile.TarInfo:
    info = member("bottle/train/good/link.png", kind=kind)
    info.linkname = target
    return info


@pytest.mark.parametrize(
    "evil",
    [
        member("../outside.png"),
        member("bottle/../../outside.png"),
        member("/tmp/outside.png"),  # noqa: S108
        linked(tarfile.SYMTYPE, "/etc/passwd"),
        linked(tarfile.SYMTYPE, "000.png"),
        linked(tarfile.LNKTYPE, "bottle/train/good/000.png"),
        member("bottle/device", kind=tarfile.CHRTYPE),
        member("bottle/fifo", kind=tarfile.FIFOTYPE),
    ],
    ids=lambda info: f"{info.type.decode()} {info.name} {info.linkname}",
)
def test_an_archive_that_leads_outside_is_refused(tmp_path: Path, evil: tarfile.TarInfo) -> None:
    archive = tmp_path / "bottle.tar.xz"
    archive.write_bytes(archive_of(FILES, (evil,)))
    with pytest.raises(UserError, match="leads outside"):
        unpack_category(archive, "bottle", tmp_path / "in" / "bottle")
    assert [path.name for path in tmp_path.iterdir() if path.name != "in"] == ["bottle.tar.xz"]
    assert list((tmp_path / "in").iterdir()) == []


def test_a_bomb_is_refused_before_it_fills_the_disk(tmp_path: Path) -> None:
    archive = tmp_path / "bottle.tar.xz"
    archive.write_bytes(archive_of({**FILES, "bottle/zeros.bin": bytes(2_000_000)}))
    assert archive.stat().st_size < 500_000
    for limits in ({"max_bytes": 1_000_000}, {"max_members": 2}):
        with pytest.raises(UserError, match="unpacks to more than"):
            unpack_category(archive, "bottle", tmp_path / "in" / "bottle", **limits)
        assert list((tmp_path / "in").iterdir()) == []


@pytest.mark.parametrize("content", [ARCHIVE[: len(ARCHIVE) // 2], b"no archive", b"", archive_of({"cable/a": b"1"})])
def test_damaged_or_foreign_archives_are_refused(tmp_path: Path, content: bytes) -> None:
    archive = tmp_path / "bottle.tar.xz"
    archive.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot be unpacked|no images"):
        unpack_category(archive, "bottle", tmp_path / "in" / "bottle")
    assert not (tmp_path / "in" / "bottle").exists()


def test_one_category_is_taken_out_of_the_archive_of_all_with_usable_permissions(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
        tar.addfile(member("bottle/train", kind=tarfile.DIRTYPE, mode=0o555))  # MVTec's archives are read-only
        for name, content in {**FILES, "cable/train/good/000.png": b"cable"}.items():
            tar.addfile(member(name, content, mode=0o400), io.BytesIO(content))
    archive = tmp_path / "all.tar.xz"
    archive.write_bytes(buffer.getvalue())
    unpack_category(archive, "bottle", tmp_path / "data" / "bottle")
    assert contents(tmp_path / "data" / "bottle") == FILES
    assert not (tmp_path / "data" / "cable").exists()
    folder = tmp_path / "data" / "bottle" / "train"
    assert folder.stat().st_mode & 0o700 == 0o700
    assert (folder / "good" / "000.png").stat().st_mode & 0o600 == 0o600
