"""Make a curated set: sources -> pictures of one size -> scores -> selection -> folder.

    read      batch by batch: decode, crop, drop what is too small or was seen before, score, drop
              what is outside --min and --max, write the pictures, commit
    select    once all is read: the best shares (--top), the pairs
    write     lines, report, histograms, dataset.json; then remove pictures that no line names

Each batch is a transaction of the database (store.py), and every later stage is computed from it
alone. A command that was killed at any moment goes on to the files that it would have written, to
the byte; only "created" in dataset.json is the time of the first start.

The first picture with its content stays and later ones are duplicates, whatever becomes of it, so
that no picture is in two splits. A reward that fails for every image of a batch ends the command,
which can go on later; one that gives no number for an image drops it.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import math
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from fractions import Fraction
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowgrpo import __version__, files
from flowgrpo.config import ConfigError
from flowgrpo.config.validation import require
from flowgrpo.curation import dataset, pictures, report, sources, splits, store
from flowgrpo.curation.options import CurateOptions, difference
from flowgrpo.curation.pictures import Picture, UnreadableError
from flowgrpo.curation.sources import Sample
from flowgrpo.curation.store import Row, Store
from flowgrpo.records import Prompts
from flowgrpo.rewards import RewardError, Scorer
from flowgrpo.rewards.scorer import NOT_FINITE
from flowgrpo.rewards.table import options_of

log = logging.getLogger("flowgrpo")
FULL = (errno.ENOSPC, errno.EDQUOT)
MOST_THREADS = 8

OnProgress = Callable[[int, int], None]
"""Progress: f(images that were read, images that stay so far)."""
Batch = list[tuple[int, Sample, "Future[Picture]"]]
"""Number of the source, sample and its picture, which is being read."""


def curate(options: CurateOptions, on_progress: OnProgress | None = None) -> dict[str, Any]:
    """Make the curated set that `options` describe, or go on with it.

    Returns:
        The content of dataset.json.

    Raises:
        ConfigError: a source, a picture, a caption or a reward cannot be used; the folder holds
            another set; or no image is left.
    """
    folder = Path(options.out)
    rater = Rater(options)
    for name in options.sources:
        sources.check(name)
        _check_outside(folder, name)
    about = _finished(folder, options)
    try:
        if about is not None:
            if (folder / store.FILE).is_file():
                with _opened(folder, options) as database:
                    _tidy(folder, database)
            return about
        fresh = not folder.exists()
        _check_begun(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with _opened(folder, options) as database:
            try:
                _read(options, folder, database, rater, on_progress)
            except BaseException:
                if not database.count():
                    # Nothing was read, so there is nothing to go on with.
                    database.remove()
                    shutil.rmtree(folder / "images", ignore_errors=True)
                    if fresh:
                        folder.rmdir()
                raise
            _select(options, database)
            about = _write(options, folder, database)
            _tidy(folder, database)
            return about
    except (OSError, sqlite3.Error) as error:
        if (reason := _unwritable(folder, error)) is None:
            raise
        raise ConfigError(
            f"--out {str(folder)!r} cannot be written ({reason}), but room for the set is "
            "expected; mend that and repeat the command, which goes on, or choose another."
        ) from error


def _unwritable(folder: Path, error: Exception) -> str | None:
    """Say why `folder` cannot be written; None for an error of something else."""
    if getattr(error, "errno", None) in FULL or "disk is full" in str(error):
        return f"its disk is full: {error}"
    inside = str(getattr(error, "filename", None) or "").startswith(str(folder))
    return str(error) if inside or isinstance(error, sqlite3.Error) else None


class Rater:
    """Scores images by the rewards of `options`, but for scores that are known."""

    def __init__(self, options: CurateOptions) -> None:
        arguments = options_of(options.reward_options, options.rewards)
        self.scorers = {
            name: Scorer({name: 1.0}, options={name: arguments[name]}) for name in options.rewards
        }
        self._prepared: set[str] = set()

    def __call__(
        self, images: Tensor, prompts: Prompts, known: Sequence[Mapping[str, float]]
    ) -> list[tuple[float | None, ...]]:
        """Score images, uint8 [b, 3, H, W], one a prompt; None where a reward gave no number.

        Raises:
            RewardError: a reward cannot judge a prompt, or failed for all images it was asked for.
        """
        columns = [self._column(name, images, prompts, known) for name in self.scorers]
        return list(zip(*columns, strict=True)) if columns else [() for _ in prompts.texts]

    def _column(
        self, name: str, images: Tensor, prompts: Prompts, known: Sequence[Mapping[str, float]]
    ) -> list[float | None]:
        column: list[float | None] = [entry.get(name) for entry in known]
        rows = [number for number, score in enumerate(column) if score is None]
        if not rows:
            return column
        scorer, asked = self.scorers[name], prompts.take(rows)
        if name in self._prepared:
            scorer.check(asked)
        else:
            scorer.prepare(asked)
            self._prepared.add(name)
        scorer.problems.clear()
        scores = scorer.score_each(images[rows], asked, 1)[name]
        problem = scorer.problems.get(name, NOT_FINITE)
        if problem != NOT_FINITE and not scores.isfinite().any():
            raise RewardError(
                f"reward {name!r} failed for all {len(rows)} images of a batch ({problem}), but "
                "scores are expected; mend it and repeat the command, which goes on."
            )
        for number, score in zip(rows, scores.tolist(), strict=True):
            column[number] = score if math.isfinite(score) else None
        return column


@contextmanager
def _opened(folder: Path, options: CurateOptions) -> Iterator[Store]:
    """Open the database of the set in `folder`, and close it at the end.

    Raises:
        ConfigError: it was begun with other options.
    """
    database = Store(folder, tuple(options.rewards))
    try:
        begun = database.get("options")
        if begun is None:
            with database.transaction():
                database.put("options", options.identity())
                database.put("created", datetime.now(timezone.utc).isoformat(timespec="seconds"))
        else:
            _check_same(begun, folder, options, "was begun")
        yield database
    finally:
        database.close()


def _finished(folder: Path, options: CurateOptions) -> dict[str, Any] | None:
    """Read dataset.json of a set that is finished already; None if it is not.

    Raises:
        ConfigError: it was made with other options.
    """
    if not (folder / dataset.FILE).is_file():
        return None
    about = dataset.read_about(folder)
    _check_same(about.get("options", {}), folder, options, "is finished")
    return about


def _check_same(
    before: Mapping[str, Any], folder: Path, options: CurateOptions, state: str
) -> None:
    change = difference(before, options.identity())
    require(
        not change,
        f"the set in {folder} {state} with other options ({change}), but the same are expected; "
        "choose another --out, or remove the folder.",
    )


def _check_begun(folder: Path) -> None:
    """Raise ConfigError unless `folder` is new, empty, or of a command that was stopped."""
    require(
        not folder.exists() or folder.is_dir(),
        f"--out is {str(folder)!r}, which is a file, but a folder is expected; choose another.",
    )
    if not folder.is_dir() or (folder / store.FILE).is_file():
        return
    require(
        next(folder.iterdir(), None) is None,
        f"--out is {str(folder)!r}, which holds other files, but a new or empty folder is "
        "expected; choose another.",
    )


def _check_outside(folder: Path, source: str) -> None:
    """Raise ConfigError if the set would be written into the folder of a source."""
    path = Path(source)
    require(
        not path.is_dir() or not folder.resolve().is_relative_to(path.resolve()),
        f"--out {str(folder)!r} lies in the source {source!r}, whose pictures would be read again, "
        "but a folder beside it is expected; choose another.",
    )


def _read(
    options: CurateOptions,
    folder: Path,
    database: Store,
    rater: Rater,
    on_progress: OnProgress | None,
) -> None:
    """Read all that has not been read: every batch is committed once its pictures are written."""
    if database.get("complete"):
        return
    files.remove_leftovers(folder)
    count, stays = database.count(), database.count("dropped IS NULL")
    if on_progress is not None:
        on_progress(count, stays)
    workers = options.workers or min(MOST_THREADS, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="pictures")
    try:
        for batch in _batches(_unread(options, database), options, pool):
            rows, images = _judge(batch, count, options, database, rater)
            writes = [
                pool.submit(pictures.write, folder / dataset.image_name(row.sha256), image)
                for row, image in images
                if row.stored
            ]
            for write in writes:
                write.result()
            with database.transaction():
                database.add(rows)
                _remember_thumbnails(images, options, database)
            count, stays = count + len(rows), stays + sum(row.dropped is None for row in rows)
            if on_progress is not None:
                on_progress(count, stays)
    finally:
        pool.shutdown(cancel_futures=True)
    with database.transaction():
        database.put("complete", True)


def _unread(options: CurateOptions, database: Store) -> Iterator[tuple[int, Sample]]:
    """Iterate over the samples of all sources behind the last one that is in the database.

    Raises:
        ConfigError: what was read is not what the source has there now.
    """
    last, left = database.last(), math.inf
    if options.limit is not None:
        left = options.limit - database.count()
    for origin, name in enumerate(options.sources):
        skip = 0
        if last is not None:
            if origin < last.origin:
                continue
            # From the last one on, which shows whether the source is what it was.
            skip = database.count("origin = ?", origin)
        rows = sources.samples(name, options, max(skip - 1, 0))
        if skip:
            again = next(rows, None)
            source = None if again is None else again.source
            require(
                source == last.source,
                f"the source {name!r} has {source!r} where {last.source!r} was read before, but "
                "what it was is expected; restore it, or choose another --out.",
            )
        for sample in rows:
            if left <= 0:
                return
            yield origin, sample
            left -= 1
        last = None


def _batches(
    samples: Iterator[tuple[int, Sample]], options: CurateOptions, pool: ThreadPoolExecutor
) -> Iterator[Batch]:
    """Gather samples to batches; the pictures of the next one are read during the last."""
    waiting: Batch = []
    while True:
        batch = [
            (
                origin,
                sample,
                pool.submit(pictures.read, sample.open, options.size, options.upscale),
            )
            for origin, sample in islice(samples, options.batch_size)
        ]
        if waiting:
            yield waiting
        if not batch:
            return
        waiting = batch


def _judge(
    batch: Batch, first: int, options: CurateOptions, database: Store, rater: Rater
) -> tuple[list[Row], list[tuple[Row, Tensor]]]:
    """Decide about the images of a batch, which have the numbers from `first` on.

    Returns:
        All rows; and those that were scored, with their images, uint8 [3, H, W].
    """
    rows: list[Row] = []
    scored: list[tuple[Row, Sample, Tensor]] = []
    contents: set[str] = set()
    for number, (origin, sample, future) in enumerate(batch, start=first):
        row = Row(number, origin, sample.source, sample.prompt)
        row, image = _look_at(row, sample, future, options)
        if row.dropped is None:
            if row.sha256 in contents or database.contains(row.sha256):
                row = dataclasses.replace(row, dropped="duplicate")
            else:
                contents.add(row.sha256)
                scored.append((row, sample, image))
        rows.append(row)
    if not scored:
        return rows, []
    scores = rater(
        torch.stack([image for _, _, image in scored]),
        Prompts.of([s.prompt for _, s, _ in scored], [s.metadata for _, s, _ in scored]),
        [sample.scores for _, sample, _ in scored],
    )
    images = []
    for (row, _, image), values in zip(scored, scores, strict=True):
        row = _decide(dataclasses.replace(row, scores=values), options)
        rows[row.number - first] = row
        images.append((row, image))
    return rows, images


def _look_at(
    row: Row, sample: Sample, future: Future[Picture], options: CurateOptions
) -> tuple[Row, Tensor | None]:
    """Fill in a row before scores: caption, split, picture. The image is None if it is dropped."""
    if sample.prompt is None:
        require(
            options.skip_uncaptioned,
            f"the picture {sample.source} has no caption, but a text in a .txt file beside it, in "
            "metadata.jsonl or captions.jsonl, in its shard or in its column is expected; add it, "
            "name where it is by --caption-column, or leave such pictures out by "
            "--skip-uncaptioned.",
        )
        return dataclasses.replace(row, dropped="no caption"), None
    row = dataclasses.replace(
        row,
        prompt_key=splits.prompt_key(sample.prompt),
        split=splits.split_of(sample.prompt, options.shares, options.split_seed),
        metadata=json.dumps(sample.metadata, ensure_ascii=False) if sample.metadata else None,
    )
    try:
        picture = future.result()
    except UnreadableError as error:
        if not options.skip_unreadable:
            raise ConfigError(
                f"the picture {sample.source} cannot be read ({error}), but a picture is expected; "
                "restore it, or leave such pictures out by --skip-unreadable."
            ) from error
        log.warning("The picture %s cannot be read (%s) and is left out.", sample.source, error)
        return dataclasses.replace(row, dropped="unreadable", note=str(error)), None
    width, height = sample.size or picture.size
    row = dataclasses.replace(row, width=width, height=height)
    if picture.image is None:
        return dataclasses.replace(row, dropped="too small"), None
    return dataclasses.replace(row, sha256=dataset.content_hash(picture.image)), picture.image


def _decide(row: Row, options: CurateOptions) -> Row:
    """Compare the scores of a row with the thresholds, and decide whether its picture is stored."""
    if None in row.scores:
        return dataclasses.replace(row, dropped="no score")
    scores = dict(zip(options.rewards, row.scores, strict=True))
    total = sum(weight * scores[name] for name, weight in options.rewards.items())
    reason = next(
        (
            f"{kind} {name}"
            for name, score in scores.items()
            for kind, outside in (
                ("min", score < options.min.get(name, -math.inf)),
                ("max", score > options.max.get(name, math.inf)),
            )
            if outside
        ),
        None,
    )
    # The worse one of a pair may be outside.
    stored = reason is None or (options.pairs and row.split == "train")
    return dataclasses.replace(
        row, total=float(total) if options.rewards else None, dropped=reason, stored=stored
    )


def _remember_thumbnails(
    images: Iterable[tuple[Row, Tensor]], options: CurateOptions, database: Store
) -> None:
    """Keep small pictures of images that are not stored and that the report may show."""
    absent = [(row, image) for row, image in images if not row.stored and None not in row.scores]
    if not absent:
        return
    shown = report.shown_numbers(options, database)
    database.keep_thumbnails(shown)
    database.add_thumbnails(
        {row.number: pictures.thumbnail(image) for row, image in absent if row.number in shown}
    )


def _select(options: CurateOptions, database: Store) -> None:
    """Apply --top to the images that passed the thresholds, and choose the pairs.

    Raises:
        ConfigError: no image is left.
    """
    with database.transaction():
        # Of a command that was stopped behind this.
        database.update("UPDATE images SET dropped = NULL WHERE dropped LIKE 'top %'")
        database.update("DELETE FROM pairs")
        count = database.count("dropped IS NULL")
        if not count:
            raise ConfigError(_nothing_left(options, database))
        cuts = {}
        for name, share in options.top.items():
            # Exact: 0.1 of 30 images are 3, where 0.1 * 30 in floating point is above.
            stays = math.ceil(Fraction(str(share)) * count)
            order = f"dropped IS NULL ORDER BY {database.column(name)} DESC, number"
            [last] = database.rows(f"{order} LIMIT 1 OFFSET ?", stays - 1)
            cuts[name] = (last.scores[list(options.rewards).index(name)], last.number)
        for name, (score, number) in cuts.items():
            column = database.column(name)
            database.update(
                f"UPDATE images SET dropped = ? WHERE dropped IS NULL AND ({column} < ? OR "
                f"({column} = ? AND number > ?))",
                *(f"top {name}", score, score, number),
            )
        require(
            database.count("dropped IS NULL") > 0,
            f"no image is among the best shares of all of --top {', '.join(cuts)}, but at least "
            "one is expected; raise them, and choose another --out or remove the folder.",
        )
        database.put("cuts", {name: score for name, (score, _) in cuts.items()})
        if options.pairs:
            for chosen, rejected in _choose_pairs(options, database):
                database.update("INSERT INTO pairs VALUES (?, ?)", chosen, rejected)


def _choose_pairs(options: CurateOptions, database: Store) -> Iterator[tuple[int, int]]:
    """Iterate over the numbers (chosen, rejected): of each training prompt the best image that is
    in the set, and the worst of all that were scored; the first of equal ones."""
    scored = database.rows(
        "split = 'train' AND stored AND total IS NOT NULL ORDER BY prompt_key, number"
    )
    for _, group in groupby(scored, lambda row: row.prompt_key):
        rows = list(group)
        best = max((row for row in rows if row.dropped is None), key=_total, default=None)
        worst = min(rows, key=_total)
        if best is None:
            continue
        gap = best.total - worst.total
        if gap > 0 and gap >= options.pair_gap:
            yield best.number, worst.number


def _total(row: Row) -> float:
    return row.total


def _nothing_left(options: CurateOptions, database: Store) -> str:
    """Explain why no image is left."""
    reasons = ", ".join(f"{count} {name}" for name, count in database.counts("dropped").items())
    ranges = []
    for name in options.rewards:
        values = database.values(name)
        if values:
            ranges.append(f"{name} from {min(values):.4g} to {max(values):.4g}")
    scores = f"; scores: {', '.join(ranges)}" if ranges else ""
    return (
        f"none of {database.count()} images is left (dropped: {reasons}{scores}), but at least one "
        "is expected; change the thresholds, the resolution or the source, and choose another "
        "--out or remove the folder."
    )


def _write(options: CurateOptions, folder: Path, database: Store) -> dict[str, Any]:
    """Write the files of the set, dataset.json last, and return its content."""
    for split in dataset.SPLITS:
        rows = database.rows("split = ? AND dropped IS NULL ORDER BY number", split)
        _write_lines(folder / f"{split}.jsonl", (_line(row, options) for row in rows))
    if options.pairs:
        lines = (_pair_line(*pair, options) for pair in database.pairs())
        _write_lines(folder / dataset.PAIRS, lines)
    about = _about(options, database)
    report.write(folder, about, options, database)
    files.write_json(folder / dataset.FILE, about)
    return about


def _line(row: Row, options: CurateOptions) -> dict[str, Any]:
    line = {
        "prompt": row.prompt,
        "image": dataset.image_name(row.sha256),
        "scores": dict(zip(options.rewards, row.scores, strict=True)),
        "source": row.source,
        "size": [row.width, row.height],
    }
    return line if row.metadata is None else {**line, "metadata": json.loads(row.metadata)}


def _pair_line(chosen: Row, rejected: Row, options: CurateOptions) -> dict[str, Any]:
    both = {"chosen": chosen, "rejected": rejected}
    names = {name: dataset.image_name(row.sha256) for name, row in both.items()}
    scores = {
        name: dict(zip(options.rewards, row.scores, strict=True)) for name, row in both.items()
    }
    return {"prompt": chosen.prompt, **names, "scores": scores}


def _write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a JSONL file that is there whole or not at all."""
    with files.replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        files.sync(file.fileno())


def _about(options: CurateOptions, database: Store) -> dict[str, Any]:
    """Assemble the content of dataset.json."""
    cuts = database.get("cuts")
    thresholds: dict[str, dict[str, float]] = {}
    for name in options.rewards:
        bounds = {kind: getattr(options, kind).get(name) for kind in ("min", "max", "top")}
        values = {kind: bound for kind, bound in bounds.items() if bound is not None}
        if name in cuts:
            values["cut"] = cuts[name]
        if values:
            thresholds[name] = values
    by_split = database.counts("split", "dropped IS NULL")
    counts = {
        "read": database.count(),
        "images": database.count("dropped IS NULL"),
        **{split: by_split.get(split, 0) for split in dataset.SPLITS},
        "dropped": database.counts("dropped"),
    }
    if options.pairs:
        counts["pairs"] = database.pair_count()
    return {
        "format": dataset.FORMAT,
        "resolution": list(options.size),
        "rewards": list(options.rewards),
        "weights": options.rewards,
        "thresholds": thresholds,
        "counts": counts,
        "sources": [
            {
                "name": name,
                "read": database.count("origin = ?", origin),
                "images": database.count("origin = ? AND dropped IS NULL", origin),
            }
            for origin, name in enumerate(options.sources)
        ],
        "options": options.identity(),
        "created": database.get("created"),
        "version": __version__,
    }


def _tidy(folder: Path, database: Store) -> None:
    """Remove the pictures that no line names, and the database."""
    # One of the 256 subfolders at a time.
    for subfolder in (folder / "images").glob("*"):
        for path in list(subfolder.iterdir()):
            if not database.is_named(path.stem):
                path.unlink()
        if next(subfolder.iterdir(), None) is None:
            subfolder.rmdir()
    database.remove()
