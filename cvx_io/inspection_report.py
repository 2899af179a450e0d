"""An inspection as a table on the screen, as CSV, and as one HTML file with a thumbnail per clip."""

from __future__ import annotations

import base64
import csv
import html
import io
from pathlib import Path

from cvx_io.atomic import write_text
from cvx_io.inspection import Finding, Inspection

COLUMNS = (
    "row", "file", "frames", "fps_in", "fps_out", "height", "width", "bucket", "kept", "reason",
    "tokens", "token_limit", "duplicate", "notes", "caption",
)  # fmt: skip
_STYLE = """
body{font:14px/1.4 system-ui,sans-serif;margin:2em;color:#222}table{border-collapse:collapse;width:100%}
td,th{padding:.35em .6em;border-bottom:1px solid #ddd;text-align:left;vertical-align:top}
th{position:sticky;top:0;background:#fff}img{max-width:160px;display:block}.dropped td{background:#fdecea}
.noted td{background:#fff8e1}.small{color:#666;font-size:12px;overflow-wrap:anywhere}
pre{background:#f5f5f5;padding:1em}
"""


def cells(finding: Finding) -> dict[str, str]:
    """Return the values of COLUMNS as text; what is not known is empty."""
    values = {name: getattr(finding, name, None) for name in COLUMNS}
    values |= {"kept": "yes" if finding.is_kept else "no", "notes": "; ".join(finding.notes)}
    return {name: "" if value is None else str(value) for name, value in values.items()}


def write(inspection: Inspection, folder: Path) -> tuple[Path, Path]:
    """Write inspection.csv and inspection.html into a folder; return their paths."""
    table, page = folder / "inspection.csv", folder / "inspection.html"
    write_text(table, to_csv(inspection))
    write_text(page, to_html(inspection))
    return table, page


def to_csv(inspection: Inspection) -> str:
    """Return a line per row under a header of COLUMNS."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(cells(finding) for finding in inspection.findings)
    return text.getvalue()


def to_html(inspection: Inspection) -> str:
    """Return a page that needs nothing but itself."""
    summary = html.escape("\n".join(inspection.summary()))
    rows = "\n".join(_html_row(finding) for finding in inspection.findings)
    head = "".join(
        f"<th>{name}</th>" for name in ("clip", "row", "frames", "fps", "size", "bucket", "tokens", "caption")
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>{html.escape(inspection.source)}</title>"
        f"<style>{_STYLE}</style><h1>{html.escape(inspection.source)}</h1><pre>{summary}</pre>"
        f"<table><thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></html>\n"
    )


def _html_row(finding: Finding) -> str:
    text = {name: html.escape(value) for name, value in cells(finding).items()}
    image = ""
    if finding.thumbnail:
        data = base64.b64encode(finding.thumbnail).decode()
        image = f'<img alt="" src="data:image/jpeg;base64,{data}">'
    kind = "dropped" if not finding.is_kept else "noted" if finding.notes else "kept"
    why = text["reason"] or text["bucket"]
    size = f"{text['height']}x{text['width']}" if text["height"] else ""
    rate = f"{text['fps_in']} &rarr; {text['fps_out']}" if text["fps_in"] else ""
    limit = f" / {text['token_limit']}" if text["token_limit"] else ""
    values = (
        image,
        f'{text["row"]}<div class="small">{text["file"]}</div>',
        text["frames"],
        rate,
        size,
        f'{why}<div class="small">{text["notes"]}</div>',
        f"{text['tokens']}{limit}" if text["tokens"] else "",
        text["caption"],
    )
    return f'<tr class="{kind}">' + "".join(f"<td>{value}</td>" for value in values) + "</tr>"


def to_table(inspection: Inspection) -> str:
    """Return a table for a terminal: a line per row, the summary below."""
    head = ("row", "frames", "fps", "size", "bucket or reason", "tokens", "notes")
    lines = [head, *(_line(finding) for finding in inspection.findings)]
    widths = [min(max(len(line[i]) for line in lines), 60) for i in range(len(head))]
    shown = [
        "  ".join(_cut(text, width).ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join([*shown, "", *inspection.summary()])


def _line(finding: Finding) -> tuple[str, ...]:
    text = cells(finding)
    rate = f"{finding.fps_in:g} -> {finding.fps_out:g}" if finding.fps_in and finding.fps_out else ""
    size = f"{text['height']}x{text['width']}" if text["height"] else ""
    limit = f"/{text['token_limit']}" if text["token_limit"] else ""
    tokens = f"{text['tokens']}{limit}" if text["tokens"] else ""
    notes = "; ".join(note.partition(":")[0] for note in finding.notes)
    return (text["row"], text["frames"], rate, size, text["bucket"] or text["reason"], tokens, notes)


def _cut(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else f"{text[: width - 3]}..."
