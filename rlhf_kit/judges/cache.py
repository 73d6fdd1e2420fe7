"""Record and replay: answers of a judge in an SQLite file, so that the same question has the same answer."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rlhf_kit.errors import RunError
from rlhf_kit.judges.base import Answer

_BUSY_SECONDS = 30.0
_KEYS_A_QUERY = 500  # SQLite takes 999 variables or more


def request_key(request: Mapping[str, Any]) -> bytes:
    """SHA-256 of the canonical JSON of what determines an answer."""
    canonical = json.dumps(request, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).digest()


class AnswerCache:
    """Answers by the key of their question, in a file that the processes of one machine share.

    It holds keys and answers, no questions. A process may be killed at any moment: what it recorded before stays, and
    the file stays whole. A loss of power may take the last answers with it, which are then asked for again.
    """

    def __init__(self, path: Path) -> None:
        """Opens the file, and makes it where it is not there.

        Raises:
            RunError: it cannot be opened, or is something else.
        """
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = _open(path)
        except (OSError, sqlite3.Error) as error:
            raise RunError(
                f"cannot use '{path}' as a judge's cache ({error}): name another file, on a disk of this machine"
            ) from error

    def get(self, keys: Sequence[bytes]) -> dict[bytes, Answer]:
        """The answers that are there."""
        found: dict[bytes, Answer] = {}
        for start in range(0, len(keys), _KEYS_A_QUERY):
            part = keys[start : start + _KEYS_A_QUERY]
            query = f"SELECT key, answer FROM answers WHERE key IN ({','.join('?' * len(part))})"
            with self._lock:
                rows = self._connection.execute(query, part).fetchall()
            found.update({key: _read(answer) for key, answer in rows})
        return found

    def put(self, key: bytes, answer: Answer) -> Answer:
        """Record an answer; gives the one that is on record, which is another process's where that was first."""
        written = json.dumps({"text": answer.text, "log_probs": list(answer.log_probs)})
        with self._lock:
            self._connection.execute("INSERT OR IGNORE INTO answers VALUES (?, ?)", (key, written))
            with closing(self._connection.execute("SELECT answer FROM answers WHERE key = ?", (key,))) as rows:
                return _read(rows.fetchone()[0])


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
    for statement in (
        "PRAGMA journal_mode = WAL",  # readers and a writer do not wait for each other
        "PRAGMA synchronous = NORMAL",
        "CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID",
    ):
        _execute_patiently(connection, statement)
    return connection


def _execute_patiently(connection: sqlite3.Connection, statement: str) -> None:
    """SQLite does not wait for a lock while it changes the journal's mode: two processes that begin may collide."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            connection.execute(statement).fetchall()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _read(written: str) -> Answer:
    answer = json.loads(written)
    return Answer(text=answer["text"], log_probs=tuple(answer["log_probs"]))
