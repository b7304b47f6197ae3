"""The report of a curated set: report.html, histograms.png, and the table on the terminal.

report.html holds all that it shows: counts, what was dropped and why, and for each reward its
histogram and the best, the worst and the nearest images on both sides of each threshold. The same
set has the same bytes.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from flowgrpo import files
from flowgrpo.curation import dataset, pictures
from flowgrpo.curation.options import CurateOptions
from flowgrpo.curation.store import Row, Store

SHOWN = 8
"""Images in a row of the report."""
NAMED = 100
"""Pictures that cannot be read and are named, at most."""
BINS = 40
LINES = {"min": "-", "max": "-.", "cut": "--"}
"""Threshold -> style of its line in the histogram."""
REASONS = {
    "no caption": "without a caption",
    "unreadable": "could not be read",
    "too small": "smaller than the set's images",
    "duplicate": "the same content as an earlier one",
    "no score": "a reward gave no number",
}
"""Reason of a drop -> its words; those of thresholds have a form of their own."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; max-width: 1080px; margin: 2em auto;
  padding: 0 1em; }
h1, h2, h3 { font-weight: 600; } h2 { margin-top: 2em; }
h3 { font-size: 1em; margin: 1.2em 0 .3em; }
table { border-collapse: collapse; } td, th { padding: .15em 1em .15em 0; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.row { display: flex; flex-wrap: wrap; gap: 10px; }
figure { margin: 0; width: 118px; } figure img { max-width: 112px; border: 3px solid #2da44e; }
figure.dropped img { border-color: #cf222e; }
figcaption { font-size: 11px; line-height: 1.3; overflow-wrap: anywhere; color: #57606a; }
figcaption b { color: #1f2328; } .wide { max-width: 100%; } .faint { color: #57606a; }
"""


def selections(
    options: CurateOptions, database: Store, cuts: Mapping[str, float] | None = None
) -> dict[str, dict[str, list[Row]]]:
    """Choose the images that the report shows: reward -> title -> rows.

    cuts: reward -> lowest score inside its --top; known once all is read.
    """
    shown: dict[str, dict[str, list[Row]]] = {}
    for name in options.rewards:
        column = database.column(name)

        def side(condition: str, *values: float, column: str = column) -> list[Row]:
            query = f"total IS NOT NULL AND {condition} LIMIT {SHOWN}"
            return list(database.rows(query, *values))

        falling, rising = f"ORDER BY {column} DESC, number", f"ORDER BY {column}, number"
        rows = {
            "best": side(f"1 {falling}"),
            "worst": side(f"1 {rising}"),
        }
        for kind, bounds in (("min", options.min), ("max", options.max)):
            if name in bounds:
                bound = bounds[name]
                above, below = (">=", "<") if kind == "min" else (">", "<=")
                rows[f"above {kind} {bound:g}"] = side(f"{column} {above} ? {rising}", bound)
                rows[f"below {kind} {bound:g}"] = side(f"{column} {below} ? {falling}", bound)
        if cuts and name in cuts:
            # Only of those that passed the thresholds, whose order --top went by.
            passed = "(dropped IS NULL OR dropped LIKE 'top %')"
            title = f"top {options.top[name]:g}"
            bound = cuts[name]
            rows[f"last inside {title}"] = side(f"{column} >= ? AND {passed} {rising}", bound)
            rows[f"first outside {title}"] = side(f"{column} < ? AND {passed} {falling}", bound)
        shown[name] = rows
    return shown


def shown_numbers(options: CurateOptions, database: Store) -> set[int]:
    """Numbers of the images that the report would show by now, but for those of --top.

    What is not among them will not be later: better, worse and nearer images only push out.
    """
    return {
        row.number
        for by_title in selections(options, database).values()
        for rows in by_title.values()
        for row in rows
    }


def write(folder: Path, about: Mapping[str, Any], options: CurateOptions, database: Store) -> None:
    """Write histograms.png and report.html."""
    picture = histograms(about, options, database)
    files.write_bytes(folder / "histograms.png", picture)
    files.write_text(folder / "report.html", page(folder, about, options, database, picture))


def histograms(about: Mapping[str, Any], options: CurateOptions, database: Store) -> bytes:
    """Draw the histogram of each reward over all scored images, as a PNG file.

    In colour the images of the set, in grey the others, and a line at each threshold.
    """
    from matplotlib.figure import Figure

    count = max(len(options.rewards), 1)
    figure = Figure(figsize=(8, 2.6 * count), dpi=110, layout="constrained")
    for axes, name in zip(
        figure.subplots(count, squeeze=False)[:, 0], options.rewards, strict=False
    ):
        inside = database.values(name, "dropped IS NULL")
        outside = database.values(name, "dropped IS NOT NULL")
        axes.hist(
            [inside, outside],
            bins=BINS,
            stacked=True,
            color=["#0969da", "#d0d7de"],
            label=[f"in the set ({len(inside)})", f"dropped ({len(outside)})"],
        )
        for kind, bound in about["thresholds"].get(name, {}).items():
            if kind != "top":
                label = f"top {options.top[name]:g}" if kind == "cut" else kind
                line = {"color": "#cf222e", "lw": 1.2, "ls": LINES[kind]}
                axes.axvline(bound, label=f"{label}: {bound:.4g}", **line)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.set_title(name, loc="left", fontsize=10)
        axes.set_ylabel("images", fontsize=8)
        axes.tick_params(labelsize=8)
        for edge in ("top", "right"):
            axes.spines[edge].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    if not options.rewards:
        figure.axes[0].text(0.5, 0.5, "no rewards", ha="center", va="center")
        figure.axes[0].set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def page(
    folder: Path,
    about: Mapping[str, Any],
    options: CurateOptions,
    database: Store,
    picture: bytes,
) -> str:
    """Write the report as one HTML page."""
    height, width = about["resolution"]
    counts = about["counts"]
    title = f"Curated set: {counts['images']} of {counts['read']} images"
    body = [
        f"<h1>{title}</h1>",
        f"<p>{width} x {height} pixels; sources: "
        f"{', '.join(html.escape(source['name']) for source in about['sources'])}.</p>",
        _table([(label, count) for label, count in count_lines(about)]),
    ]
    unreadable = list(database.rows(f"dropped = 'unreadable' ORDER BY number LIMIT {NAMED}"))
    if unreadable:
        body.append("<h2>Pictures that could not be read</h2><ul>")
        body += [
            f"<li>{html.escape(row.source)} <span class=faint>{html.escape(row.note or '')}</span>"
            for row in unreadable
        ]
        body.append("</ul>")
        if (more := counts["dropped"]["unreadable"] - len(unreadable)) > 0:
            body.append(f"<p>and {more} more.</p>")
    if options.rewards:
        address = pictures.data_address(picture, "png")
        body.append(f'<h2>Scores</h2><img class=wide alt="histograms" src="{address}">')
    shown = selections(options, database, database.get("cuts"))
    for number, (name, by_title) in enumerate(shown.items()):
        body.append(f"<h2>{html.escape(name)}</h2>")
        for label, rows in by_title.items():
            body.append(f"<h3>{html.escape(label)}</h3><div class=row>")
            body += [_figure(folder, row, number, database) for row in rows] or ["none"]
            body.append("</div>")
    if options.pairs:
        body.append("<h2>Pairs</h2><p>chosen, rejected</p>")
        for _, (chosen, rejected) in zip(range(SHOWN), database.pairs(), strict=False):
            both = "".join(_figure(folder, row, None, database) for row in (chosen, rejected))
            body.append(f"<div class=row>{both}</div>")
    body.append(
        "<p class=faint>Green: in the set. Red: dropped. "
        f"flowgrpo {html.escape(about['version'])}, format {about['format']}.</p>"
    )
    head = f"<meta charset=utf-8><title>{title}</title><style>{STYLE}</style>"
    lines = "\n".join(body)
    return f"<!doctype html>\n<html lang=en><head>{head}</head><body>\n{lines}\n</body></html>\n"


def _figure(folder: Path, row: Row, number: int | None, database: Store) -> str:
    """Show one image with its score by the reward `number`, or with the weighted sum."""
    if row.stored:
        small = pictures.thumbnail(dataset.read_image(folder / dataset.image_name(row.sha256)))
    else:
        small = database.thumbnail(row.number)
    score = row.total if number is None else row.scores[number]
    prompt = row.prompt if len(row.prompt) <= 90 else f"{row.prompt[:90]} ..."
    reason = "" if row.dropped is None else f" <i>{html.escape(row.dropped)}</i>"
    address = pictures.data_address(small, "jpeg")
    return (
        f"<figure{'' if row.dropped is None else ' class=dropped'}>"
        f'<img src="{address}" alt="" title="{html.escape(row.source)}">'
        f"<figcaption><b>{score:.4g}</b>{reason}<br>{html.escape(prompt)}</figcaption></figure>"
    )


def _table(lines: Sequence[tuple[str, int]]) -> str:
    cells = "\n".join(
        f"<tr><td>{html.escape(label)}</td><td class=number>{count}</td></tr>"
        for label, count in lines
    )
    return f"<table>\n{cells}\n</table>"


def count_lines(about: Mapping[str, Any]) -> list[tuple[str, int]]:
    """List what was read, what was dropped and why, and what is in the set, as (words, count)."""
    counts = about["counts"]
    lines = [("images read", counts["read"])]
    for reason, count in counts["dropped"].items():
        words = REASONS.get(reason) or reason_words(reason, about["thresholds"])
        lines.append((f"dropped: {words}", count))
    lines.append(("images in the set", counts["images"]))
    lines += [(f"  {split}", counts[split]) for split in dataset.SPLITS]
    if "pairs" in counts:
        lines.append(("pairs of training images", counts["pairs"]))
    return lines


def reason_words(reason: str, thresholds: Mapping[str, Mapping[str, float]]) -> str:
    """Write the reason "min NAME", "max NAME" or "top NAME" with its bound."""
    kind, _, name = reason.partition(" ")
    bound = thresholds[name][kind]
    words = {"min": "below", "max": "above", "top": "outside the best"}
    return f"{name} {words[kind]} {bound:g}"


def summary(about: Mapping[str, Any]) -> Table:
    """Make the table of counts for the terminal."""
    table = Table(box=None, padding=(0, 1), show_header=False)
    table.add_column("", no_wrap=True)
    table.add_column("", justify="right", no_wrap=True)
    for label, count in count_lines(about):
        style = "bold" if label.startswith("images") else ""
        table.add_row(label, str(count), style=style)
    return table
