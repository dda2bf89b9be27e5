"""A queue on the disk: a message that was put in is there, in its order, until it is removed.

It is one SQLite file that is synced at each change, so neither a kill nor a power failure loses a message.
"""

import sqlite3
import threading
from pathlib import Path
from typing import Any

from flawsmith.errors import FlawsmithError, UserError

LIMIT = 100_000_000  # bytes, some 100,000 results
PAGE = 4096  # bytes
SETUP = (
    f"PRAGMA page_size={PAGE}",
    "PRAGMA locking_mode=EXCLUSIVE",  # one process sends; and WAL then needs no shared memory, which a share lacks
    "PRAGMA journal_mode=WAL",  # one sync a change
    "PRAGMA synchronous=FULL",
    "CREATE TABLE IF NOT EXISTS waiting (number INTEGER PRIMARY KEY AUTOINCREMENT, message TEXT NOT NULL)",
)


class Spool:
    """The queue in the file `path`, which may grow to `limit` bytes. Threads may share it, processes may not.

    Raises:
        UserError: another process uses the file, it is damaged or no spool, or it cannot be opened.
        FlawsmithError: any method: the file cannot be read or written any more.
    """

    def __init__(self, path: Path, limit: int = LIMIT) -> None:
        self.path = path
        self._lock = threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._database = sqlite3.connect(path, timeout=0, isolation_level=None, check_same_thread=False)
        except sqlite3.Error as error:
            raise UserError(f"{path} cannot be opened ({error}); name another place for the spool.") from error
        try:
            for statement in (*SETUP, f"PRAGMA max_page_count={max(limit // PAGE, 1)}"):
                self._database.execute(statement).fetchall()
        except sqlite3.Error as error:
            self._database.close()
            if _code(error) == sqlite3.SQLITE_BUSY:
                raise UserError(f"Another process sends the results in {path}; end it first.") from error
            raise UserError(f"{path} is damaged or no spool ({error}); remove it, or name another place.") from error

    def put(self, message: str) -> bool:
        """Append a message; False if the file, or its disk, is full. Else the message is on the disk on return."""
        try:
            self._run("INSERT INTO waiting (message) VALUES (?)", message)
        except FlawsmithError as error:
            if _code(error.__cause__) == sqlite3.SQLITE_FULL:
                return False
            raise
        return True

    def first(self, count: int) -> list[tuple[int, str]]:
        """Return the oldest `count` messages with their numbers, the oldest first."""
        return self._run("SELECT number, message FROM waiting ORDER BY number LIMIT ?", count)

    def remove(self, number: int) -> None:
        """Remove the messages up to this number."""
        self._run("DELETE FROM waiting WHERE number <= ?", number)

    def __len__(self) -> int:
        """Count the messages that wait."""
        return int(self._run("SELECT count(*) FROM waiting")[0][0])

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _run(self, statement: str, *values: Any) -> list[Any]:
        try:
            with self._lock:
                return self._database.execute(statement, values).fetchall()
        except sqlite3.Error as error:
            raise FlawsmithError(f"{self.path} cannot be read or written ({error}); see to its disk.") from error


def _code(error: BaseException | None) -> int:
    """SQLite's primary result code of an error."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF
