"""Store of what a command knows so far, in SQLite beside the set: a transaction a batch.

A process that is killed leaves the batches that were committed, and the next one goes on behind
them. Everything that the finished files need is asked here, so memory does not grow with the set.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowgrpo.config import ConfigError

FILE = "curating.sqlite"
"""The file of a set that is not finished."""
SYNCHRONOUS = "FULL"
"""SQLite's setting by which a committed batch is on the disk."""
SIDE_FILES = ("", "-journal", "-wal", "-shm")
"""Endings of the files that SQLite writes."""
SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE images (
    number INTEGER PRIMARY KEY, origin INTEGER NOT NULL, source TEXT NOT NULL, prompt TEXT,
    prompt_key TEXT, split TEXT, sha256 TEXT, width INTEGER, height INTEGER, metadata TEXT,
    note TEXT, total REAL, dropped TEXT, stored INTEGER NOT NULL {scores}
);
CREATE INDEX contents ON images (sha256);
CREATE INDEX outcomes ON images (dropped, split);
CREATE TABLE thumbnails (number INTEGER PRIMARY KEY, picture BLOB NOT NULL);
CREATE TABLE pairs (chosen INTEGER PRIMARY KEY, rejected INTEGER NOT NULL);
CREATE INDEX rejections ON pairs (rejected);
"""


@dataclass(frozen=True)
class Row:
    """An image of a source and what became of it."""

    number: int
    """Position among the images of all sources, from 0."""
    origin: int
    """Number of its source."""
    source: str
    """Name of the source, and of the picture in it."""
    prompt: str | None = None
    prompt_key: str | None = None
    split: str | None = None
    sha256: str | None = None
    """Content hash of the fitted image."""
    width: int | None = None
    """Pixels in the source."""
    height: int | None = None
    metadata: str | None = None
    """JSON of the metadata; None without."""
    note: str | None = None
    """Reason why a picture cannot be read."""
    total: float | None = None
    """Weighted sum of the scores."""
    dropped: str | None = None
    """Reason why it is not in the set; None for one that is."""
    stored: bool = False
    """True: its picture is in images/."""
    scores: tuple[float | None, ...] = ()
    """One for each reward; None where it was not asked, or gave no number."""


class Store:
    """The database of one set that is being made; one process at a time."""

    def __init__(self, folder: Path, rewards: Sequence[str]) -> None:
        """Open or create the database in `folder`.

        Raises:
            ConfigError: another process has it, or it cannot be read.
        """
        self.path, self.rewards = folder / FILE, tuple(rewards)
        self.columns = [f"score_{number}" for number in range(len(self.rewards))]
        self._names = [name for name in Row.__dataclass_fields__ if name != "scores"]
        try:
            # One thread at a time uses it, which need not be the one that opened it.
            self.database = sqlite3.connect(
                self.path, timeout=0, isolation_level=None, check_same_thread=False
            )
            # Locked from the first transaction until it is closed.
            self.database.execute("PRAGMA locking_mode = EXCLUSIVE")
            self.database.execute(f"PRAGMA synchronous = {SYNCHRONOUS}")
            with self.transaction():
                self._create()
        except sqlite3.Error as error:
            locked = "locked" in str(error)
            raise ConfigError(
                f"{folder} is in use by another process, but one process at a time writes a "
                "curated set; stop that one or choose another --out."
                if locked
                else f"{self.path} cannot be used ({error}), but the database of a set that is "
                "being made is expected; remove the folder, or choose another --out."
            ) from error

    def _create(self) -> None:
        if self._one("SELECT count(*) FROM sqlite_master WHERE name = 'images'"):
            return
        scores = "".join(f", {column} REAL" for column in self.columns)
        for statement in SCHEMA.format(scores=scores).split(";"):
            self.database.execute(statement)
        for column in self.columns:
            self.database.execute(f"CREATE INDEX by_{column} ON images ({column}, number)")

    def close(self) -> None:
        """Close the database, which another process may open then."""
        self.database.close()

    def remove(self) -> None:
        """Close the database and remove its files."""
        self.close()
        for ending in SIDE_FILES:
            self.path.with_name(FILE + ending).unlink(missing_ok=True)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit all that is written inside, or, after an error, nothing."""
        self.database.execute("BEGIN EXCLUSIVE")
        try:
            yield
        except BaseException:
            self.database.execute("ROLLBACK")
            raise
        self.database.execute("COMMIT")

    def get(self, name: str) -> Any:
        """Read a value that `put` wrote; None if there is none."""
        text = self._one("SELECT value FROM meta WHERE name = ?", name)
        return None if text is None else json.loads(text)

    def put(self, name: str, value: Any) -> None:
        """Write a JSON value under `name`."""
        self.database.execute("REPLACE INTO meta VALUES (?, ?)", (name, json.dumps(value)))

    def count(self, condition: str = "1", *values: Any) -> int:
        """Count the images for which `condition` (SQL) holds."""
        return self._one(f"SELECT count(*) FROM images WHERE {condition}", *values)

    def last(self) -> Row | None:
        """Find the image that was read last."""
        return next(self.rows("1 ORDER BY number DESC LIMIT 1"), None)

    def contains(self, sha256: str) -> bool:
        """Tell whether an image of this content was read."""
        return self._one("SELECT 1 FROM images WHERE sha256 = ? LIMIT 1", sha256) is not None

    def add(self, rows: Iterable[Row]) -> None:
        """Add images."""
        names = [*self._names, *self.columns]
        marks = ", ".join("?" * len(names))
        self.database.executemany(
            f"INSERT INTO images ({', '.join(names)}) VALUES ({marks})",
            (
                (*(getattr(row, name) for name in self._names), *self._scores(row.scores))
                for row in rows
            ),
        )

    def _scores(self, scores: Sequence[float | None]) -> Sequence[float | None]:
        return scores or (None,) * len(self.columns)

    def rows(self, condition: str = "1 ORDER BY number", *values: Any) -> Iterator[Row]:
        """Iterate over the images for which `condition` holds; it may state an order."""
        names = [*self._names, *self.columns]
        # A cursor of its own, so that others can be read at the same time.
        cursor = self.database.cursor()
        query = f"SELECT {', '.join(names)} FROM images WHERE {condition}"
        for values_of_row in cursor.execute(query, values):
            fields = dict(zip(self._names, values_of_row, strict=False))
            fields["stored"] = bool(fields["stored"])
            yield Row(**fields, scores=values_of_row[len(self._names) :])

    def column(self, reward: str) -> str:
        """Name of the column with the scores of a reward."""
        return self.columns[self.rewards.index(reward)]

    def values(self, reward: str, condition: str = "1") -> list[float]:
        """List the scores of one reward, in the order of the images."""
        column = self.column(reward)
        query = f"SELECT {column} FROM images WHERE {column} IS NOT NULL AND {condition}"
        return [value for (value,) in self.database.execute(f"{query} ORDER BY number")]

    def counts(self, column: str, condition: str = "1") -> dict[str, int]:
        """Count the images of each value of `column`, null apart, in the order of the first."""
        query = (
            f"SELECT {column}, count(*) FROM images WHERE {column} IS NOT NULL AND {condition} "
            f"GROUP BY {column} ORDER BY min(number)"
        )
        return dict(self.database.execute(query))

    def update(self, statement: str, *values: Any) -> None:
        """Execute a statement that changes the database."""
        self.database.execute(statement, values)

    def add_thumbnails(self, pictures: Mapping[int, bytes]) -> None:
        """Add small pictures of images that are not stored, by number."""
        self.database.executemany("REPLACE INTO thumbnails VALUES (?, ?)", pictures.items())

    def keep_thumbnails(self, numbers: Iterable[int]) -> None:
        """Remove all small pictures but those of `numbers`."""
        present = {number for (number,) in self.database.execute("SELECT number FROM thumbnails")}
        for number in present - set(numbers):
            self.database.execute("DELETE FROM thumbnails WHERE number = ?", (number,))

    def thumbnail(self, number: int) -> bytes | None:
        """Read a small picture; None if there is none."""
        return self._one("SELECT picture FROM thumbnails WHERE number = ?", number)

    def is_named(self, sha256: str) -> bool:
        """Tell whether a line of the finished set names the picture of this content."""
        query = (
            "SELECT 1 FROM images WHERE sha256 = ? AND stored AND (dropped IS NULL OR EXISTS "
            "(SELECT 1 FROM pairs WHERE rejected = number)) LIMIT 1"
        )
        return self._one(query, sha256) is not None

    def pair_count(self) -> int:
        """Count the pairs."""
        return self._one("SELECT count(*) FROM pairs")

    def pairs(self) -> Iterator[tuple[Row, Row]]:
        """Iterate over the pairs (chosen, rejected), in the order of the chosen images."""
        for numbers in self.database.execute("SELECT chosen, rejected FROM pairs ORDER BY chosen"):
            chosen, rejected = (next(self.rows("number = ?", number)) for number in numbers)
            yield chosen, rejected

    def _one(self, query: str, *values: Any) -> Any:
        row = self.database.execute(query, values).fetchone()
        return None if row is None else row[0]
