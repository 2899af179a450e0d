"""The page of a run: one HTML file that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import yaml

from cvx_io.record import curves
from cvx_io.record.clips import Clip, Clips
from cvx_io.record.curves import Curve
from cvx_io.record.files import GIVEN, VALIDATION, Run

TABLE_ROWS = 25
"""Values of a curve that its table shows."""
MAX_ITEMS = 50
"""Entries of a list or mapping that the page shows; the rest is counted."""

# The policy makes the browser itself refuse anything from outside.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; media-src data:"

STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --ink: #1c1c1a; --muted: #5c5b57; --rule: #deddd8;
  --line: #2a6fc4; }
@media (prefers-color-scheme: dark) { :root { --paper: #191918; --ink: #edece8; --muted: #aaa9a3;
  --rule: #3a3936; --line: #6ba6ee; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 84rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p { margin: .3rem 0; max-width: 60rem; overflow-wrap: anywhere; }
.grid { display: grid; gap: 1.5rem; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); }
.clips { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(13rem, 100%), 1fr)); }
.wide { display: block; max-width: 48rem; }
figure { margin: 0; }
figure > strong { display: block; }
figcaption { color: var(--muted); font-size: .85rem; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; }
.line { fill: none; stroke: var(--line); stroke-width: 2; stroke-linejoin: round; }
.dot { fill: var(--line); }
.band { fill: var(--line); opacity: .22; }
.axis { fill: var(--muted); font-size: 14px; }
line.grid { stroke: var(--rule); stroke-width: 1; }
video { display: block; width: 100%; background: #000; }
table { border-collapse: collapse; font-size: .85rem; }
th, td { border-bottom: 1px solid var(--rule); padding: .15rem .8rem .15rem 0; text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 600; }
.scroll { overflow-x: auto; }
pre { overflow-x: auto; font-size: .8rem; }
.fault { border-left: 4px solid #c2591a; padding-left: .7rem; }
summary { cursor: pointer; color: var(--muted); font-size: .85rem; }
"""


def page(run: Run, clips: Clips, written: str) -> str:
    """Return the page of a run as HTML. written: the time, as it is shown."""
    title = escape(str(run.recipe.get("name") or run.folder.name))
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            '<head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{title}</title><style>{STYLE}</style></head>",
            f"<body><header><h1>{title}</h1>{_head(run, written)}</header>",
            _section("Curves", _curves(run)),
            _section("Clips", _clips(clips)),
            _section("Data account", _data(run.data) if run.data else _none("data.json")),
            _section("Plugins", value_html(run.plugins) if run.plugins else _none("plugins.json")),
            _section("Environment", _environment(run)),
            _section("Weights read", value_html(run.weights) if run.weights else _none("weights.json")),
            _section("Recipe", _recipe(run)),
            "</body></html>\n",
        ]
    )


def state(run: Run) -> str:
    """Return how far a run is, and how it ended if it said so."""
    steps = run.recipe.get("task", {}).get("steps") if run.curves else None
    far = f"Step {run.last_step}" + (f" of {steps}" if steps else "") + ". " if run.curves else ""
    if not run.starts:
        return f"{far}The run has left no word of its start."
    ended = run.starts[-1].get("ended")
    if not ended:
        return (
            f"{far}Started {run.starts[-1].get('time', '')}; there is no word of an end: it still goes on, "
            "or it was killed."
        )
    return f"{far}{ended.get('how', '')} ({ended.get('time', '')})."


def value_html(value: Any) -> str:
    """Return plain data as nested tables; what is too long to show is counted."""
    if isinstance(value, Mapping):
        rows = [
            f"<tr><th>{escape(str(key))}</th><td>{value_html(item)}</td></tr>" for key, item in value.items()
        ]
        return _table(_limited(rows, len(value), '<tr><td colspan="2">and {} more</td></tr>'))
    if isinstance(value, list | tuple):
        return _list_html(value)
    if isinstance(value, float):
        return curves.number(value) if value == value and abs(value) != float("inf") else str(value)
    return escape("-" if value is None else str(value))


def _list_html(values: Sequence[Any]) -> str:
    if not values:
        return "none"
    if all(isinstance(item, Mapping) for item in values):
        keys = list(dict.fromkeys(key for item in values for key in item))
        head = "<tr>" + "".join(f"<th>{escape(str(key))}</th>" for key in keys) + "</tr>"
        rows = [
            "<tr>" + "".join(f"<td>{value_html(item.get(key))}</td>" for key in keys) + "</tr>"
            for item in values
        ]
        more = f'<tr><td colspan="{len(keys)}">and {{}} more</td></tr>'
        return _table([head, *_limited(rows, len(values), more)])
    shown = ", ".join(value_html(item) for item in values[:MAX_ITEMS])
    return shown + (f" and {len(values) - MAX_ITEMS} more" if len(values) > MAX_ITEMS else "")


def _limited(rows: list[str], count: int, more: str) -> list[str]:
    return rows if count <= MAX_ITEMS else [*rows[:MAX_ITEMS], more.format(count - MAX_ITEMS)]


def _table(rows: Iterable[str]) -> str:
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def _section(title: str, body: str) -> str:
    return f'<section id="{title.lower().replace(" ", "-")}"><h2>{title}</h2>{body}</section>'


def _none(name: str) -> str:
    return f"<p>The run has left no {escape(name)}.</p>"


def _head(run: Run, written: str) -> str:
    task = run.recipe.get("task", {}).get("use", "")
    lines = [f"<p>{escape(state(run))}</p>"]
    lines.append(f"<p>{escape(f'Task {task}, ' if task else '')}written {escape(written)}.</p>")
    lines += [f'<p class="fault">{escape(fault)}.</p>' for fault in run.faults]
    return "".join(lines)


def _curves(run: Run) -> str:
    if not run.curves:
        return "<p>Nothing was logged.</p>"
    return f'<div class="grid">{"".join(_curve(curve) for curve in run.curves)}</div>'


def _curve(curve: Curve) -> str:
    unit = f" ({escape(curve.unit)})" if curve.unit else ""
    text = escape(curves.describe(curve))
    drawing = f"{curves.svg(curve)}{_curve_table(curve)}" if curve.points else ""
    hint = f" {escape(curves.note(curve))}" if curve.points else ""
    return (
        f'<figure class="curve" id="curve-{escape(curve.key)}"><strong>{escape(curve.title)}{unit}</strong>'
        f"{drawing}<figcaption>{text}{hint}</figcaption></figure>"
    )


def _curve_table(curve: Curve) -> str:
    """Return values at even distances, first and last included, as a table that is closed at first."""
    points = curve.points
    count = min(len(points), TABLE_ROWS)
    places = dict.fromkeys(round(i * (len(points) - 1) / max(count - 1, 1)) for i in range(count))
    rows = [f"<tr><td>{points[i][0]}</td><td>{curves.number(points[i][1])}</td></tr>" for i in places]
    head = f"<tr><th>step</th><th>{escape(curve.key)}</th></tr>"
    return (
        f"<details><summary>{len(places)} of {len(points)} values</summary>{_table([head, *rows])}</details>"
    )


def _clips(clips: Clips) -> str:
    given = [clip for clip in clips.shown if clip.path.parent.name == GIVEN]
    side_by_side = [clip for clip in clips.shown if clip.path.parent.name == VALIDATION]
    made = [clip for clip in clips.shown if clip.path.parent.name not in (GIVEN, VALIDATION)]
    parts = []
    if side_by_side:
        parts.append(
            f'<p>The last validation.</p><div class="wide">{"".join(map(_clip, side_by_side))}</div>'
        )
    if made:
        parts.append(f'<p>Sampled.</p><div class="clips">{"".join(map(_clip, made))}</div>')
    if given:
        parts.append(
            "<p>As the model was given them, cut and resampled; large ones are made smaller.</p>"
            f'<div class="clips">{"".join(map(_clip, given))}</div>'
        )
    if not parts:
        parts.append("<p>There are no clips in the folder that can be shown.</p>")
    if clips.omitted:
        items = "".join(f"<li>{escape(line)}</li>" for line in clips.omitted)
        parts.append(
            f"<details><summary>{len(clips.omitted)} clips left out</summary><ul>{items}</ul></details>"
        )
    return "".join(parts)


def _clip(clip: Clip) -> str:
    return (
        f'<figure class="clip"><video controls loop muted playsinline preload="metadata" src="{clip.video}" '
        f'poster="{clip.poster}" aria-label="{escape(clip.caption)}"></video>'
        f"<figcaption>{escape(clip.caption)}<br>{escape(clip.path.name)}, {escape(clip.text)}</figcaption>"
        "</figure>"
    )


def _data(data: Mapping[str, Any]) -> str:
    """Return sums and counts, then the clips that are in no batch, each with its reason."""
    clips = data.get("clips")
    rest = {key: value for key, value in data.items() if key != "clips" or not isinstance(clips, list)}
    if not isinstance(clips, list):
        return value_html(rest)
    dropped = [clip for clip in clips if isinstance(clip, Mapping) and clip.get("bucket") is None]
    kept = f"<p>{len(clips) - len(dropped)} of {len(clips)} clips are in batches of the first epoch.</p>"
    if not dropped:
        return value_html(rest) + kept
    return f"{value_html(rest)}{kept}<p>{len(dropped)} are in none:</p>{value_html(dropped)}"


def _environment(run: Run) -> str:
    if not run.starts:
        return _none("environment.json")
    *earlier, last = run.starts
    body = value_html(last)
    if earlier:
        body += f"<details><summary>{len(earlier)} earlier starts</summary>{value_html(earlier)}</details>"
    return body


def _recipe(run: Run) -> str:
    if not run.recipe:
        return _none("recipe.resolved.yaml")
    text = yaml.safe_dump(dict(run.recipe), sort_keys=False, allow_unicode=True)
    return f"<details><summary>recipe.resolved.yaml</summary><pre>{escape(text)}</pre></details>"
