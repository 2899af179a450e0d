"""The report: one file with everything in it, of a run that ended, goes on, or was killed."""

import base64
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import av
import numpy as np
import pytest

from cvx_core import cli
from cvx_io.record.curves import MAX_POINTS, Curve, describe, note, svg
from cvx_io.report import main, write_report
from cvx_io.video_write import write_mp4

QUANTITIES = ("loss", "lr", "grad_norm", "rows_per_second", "peak_memory_gb")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page(HTMLParser):
    """Collects tags, ids and attribute values, and that tags are closed in order."""

    VOID = {"meta", "br", "line", "circle", "polyline", "polygon", "img"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.open, self.words = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style",):
            self.words.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


def clip(path, level=128, **record):
    frames = np.full((9, 48, 64, 3), level, np.uint8)
    frames[:, 8:24, 8:40] = (250, 30, 60)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_mp4(path, frames, 8)
    if record:
        path.with_suffix(".json").write_text(json.dumps(record))


@pytest.fixture
def run(tmp_path):
    """The folder of a run of 40 steps, of which 30 are done."""
    folder = tmp_path / "foxes"
    folder.mkdir()
    log = [
        {"step": n, "loss": 1 / n, "lr": 1e-4, "grad_norm": 2.0 + n % 3, "rows": ["a"]} for n in range(1, 31)
    ]
    speed = [{"step": n, "seconds": 0.5, "rows_per_second": 4.0, "peak_memory_gb": 1.5} for n in range(1, 31)]
    for name, rows in (("log", log), ("speed", speed)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.resolved.yaml").write_text("name: foxes\ntask: {use: train, steps: 40}\n")
    start = {"time": "2031-02-03T04:05:06+00:00", "step": 0, "device": "cpu", "packages": {"torch": "9.9"}}
    (folder / "environment.json").write_text(json.dumps({"starts": [start]}))
    plugin = {"entry_point": "acme", "package": "acme-cvx", "version": "3.1", "components": ["task:train"]}
    (folder / "plugins.json").write_text(json.dumps({"plugins": [plugin]}))
    fates = [{"row": "a", "bucket": "480p", "reason": None, "detail": ""}]
    fates += [{"row": "b.mp4", "bucket": None, "reason": "short", "detail": "3 frames of <49>"}]
    (folder / "data.json").write_text(json.dumps({"rows": 2, "kept": 1, "dropped": 1, "clips": fates}))
    clip(folder / "0000.mp4", prompt='a <fox> & a "hen"')
    clip(folder / "given/00.mp4", 200, prompt="given to the model")
    return folder


def page_of(folder, **options):
    text = write_report(folder, **options).read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    return page


def data_uri(value):
    kind, _, data = value.partition(";base64,")
    return kind.removeprefix("data:"), base64.b64decode(data, validate=True)


def test_every_quantity_is_a_figure_with_a_drawing_and_words(run):
    page = page_of(run)
    figures = {attrs["id"] for attrs in page.all("figure") if attrs["class"] == "curve"}
    assert figures == {f"curve-{name}" for name in (*QUANTITIES, "seconds")}
    drawings = page.all("svg")
    assert len(drawings) == len(figures)
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in drawings)
    assert "Loss, 30 values from step 1 to 30: first 1, last 0.03333; lowest 0.03333 at step 30" in page.text
    assert len(page.all("figcaption")) == len(page.all("figure"))
    assert all(len(attrs["points"].split()) == 30 for attrs in page.all("polyline"))


def test_nothing_is_fetched_and_what_is_inside_can_be_decoded(run, tmp_path):
    text = write_report(run).read_text(encoding="utf-8")
    words = re.sub(r"base64,[A-Za-z0-9+/=]+", "", text.split("<pre>")[0])  # two slashes are data there
    assert not re.findall(r"https?:|//[a-z]|@import|url\(|<script|<link|<iframe", words)
    page = Page(text)
    sources = [
        v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "poster", "href", "data")
    ]
    assert len(sources) == 4
    assert all(source.startswith("data:") for source in sources)
    for video in page.all("video"):
        kind, data = data_uri(video["src"])
        (tmp_path / "back.mp4").write_bytes(data)
        with av.open(str(tmp_path / "back.mp4")) as container:
            assert kind == "video/mp4"
            assert sum(1 for _ in container.decode(video=0)) == 9
        kind, data = data_uri(video["poster"])
        assert (kind, data[:2]) == ("image/jpeg", b"\xff\xd8")
    [policy] = [m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none';")


def test_account_plugins_environment_and_prompts_are_in_it(run):
    text = page_of(run).text
    for words in (
        "foxes",
        'a <fox> & a "hen"',
        "As the model was given them",
        "acme-cvx 3.1",
        "torch 9.9",
        "1 of 2 clips are in batches",
        "b.mp4 - short 3 frames of <49>",
    ):
        assert words in text, words


def test_a_run_without_an_end_says_so_and_one_with_an_end_says_how(run):
    assert "Step 30 of 40. Started 2031-02-03T04:05:06+00:00; there is no word of an end" in page_of(run).text
    starts = json.loads((run / "environment.json").read_text())["starts"]
    starts[0]["ended"] = {"time": "later", "how": "Ended by an error: the loss is nan"}
    (run / "environment.json").write_text(json.dumps({"starts": starts}))
    assert "Step 30 of 40. Ended by an error: the loss is nan (later)." in page_of(run).text


def test_a_damaged_run_still_has_a_report_that_names_the_damage(run):
    with (run / "log.jsonl").open("a") as file:
        file.write('{"step": 31, "loss": NaN, "lr": 1}\n{"step": 32, "lo')
    (run / "plugins.json").write_text("{")
    (run / "data.json").write_bytes(b"\xff")
    (run / "0000.mp4").write_bytes(b"no video")
    text = page_of(run).text
    assert "log.jsonl: 1 lines cannot be read" in text
    assert "1 values are not finite and left out" in text
    assert "plugins.json: is not JSON" in text
    assert "data.json: cannot be read" in text
    assert "0000.mp4: cannot be decoded" in text


def test_limits_leave_clips_out_and_name_them(run):
    for index in range(3):
        clip(run / f"more/{index}.mp4")
    page = page_of(run, clips=2)
    assert len(page.all("video")) == 2
    assert "3 clips left out" in page.text
    assert "over the limit of 2 clips" in page.text
    page = page_of(run, clip_mb=0.0)
    assert page.all("video") == []
    assert "over the limit of 0 MB for all clips" in page.text


def test_clips_of_checkpoints_and_half_written_ones_are_not_shown(run):
    clip(run / "checkpoints/step/x.mp4")
    clip(run / ".0001.mp4.abcdef01.partial/x.mp4")
    assert len(page_of(run).all("video")) == 2


def test_the_command_writes_where_it_is_told_and_names_the_nearest_folder(run, capsys):
    assert cli.main(["report", str(run), "--to", str(run.parent / "r.html")]) == 0
    assert "<figure" in (run.parent / "r.html").read_text()
    assert main([str(run.parent / "foxs")]) == 2
    assert "Did you mean 'foxes'?" in capsys.readouterr().err
    (run.parent / "empty").mkdir()
    assert main([str(run.parent / "empty")]) == 2
    assert "is no folder of a run" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "cvx report runs/tiny" in capsys.readouterr().out


def curve(values, **options):
    return Curve("x", "X", "", tuple(range(1, len(values) + 1)), tuple(values), **options)


def places(drawing, tag="polyline"):
    [found] = re.findall(rf'<{tag} class="\w+" points="([^"]*)"', drawing)
    return [tuple(map(float, pair.split(","))) for pair in found.split()]


def test_a_curve_goes_up_where_its_values_do():
    (x0, y0), (x1, y1), (x2, y2) = places(svg(curve([1.0, 3.0, 2.0])))
    assert x0 < x1 < x2
    assert y1 < y2 < y0, "y counts from the top"


def test_many_steps_are_drawn_as_means_in_a_band_that_keeps_the_extremes():
    values = [1.0] * 1000
    values[500] = 9.0
    drawing = svg(curve(values))
    assert len(places(drawing)) <= MAX_POINTS
    top = min(y for _, y in places(drawing, "polygon"))
    assert top < min(y for _, y in places(drawing)), "the spike is in the band"
    assert "mean of 4 logged steps" in note(curve(values))


@pytest.mark.parametrize("values", [[5.0], [0.0, 0.0], [-1e-9, 1e-9], [1e30, 2e30], [1.0, float("inf")]])
def test_any_finite_values_can_be_drawn(values):
    drawing = svg(curve(values, may_be_log=True))
    assert "nan" not in drawing
    assert "inf" not in drawing
    assert describe(curve(values))


def test_a_wide_range_is_drawn_on_a_logarithmic_axis_and_says_so():
    wide = curve([1e-3, 1e-2, 1e-1], may_be_log=True)
    (_, a), (_, b), (_, c) = places(svg(wide))
    assert a - b == pytest.approx(b - c, abs=0.2)
    assert note(wide) == "Logarithmic axis."
    assert note(curve([1e-3, 1e-1])) == ""


def browse(path, tmp_path):
    """Open a file in the browser; return its screenshot's pixels and the addresses it asked the network for.

    A page's own requests carry the isolation key of its file; those of the browser for itself do not.
    """
    shot, log = tmp_path / "shot.png", tmp_path / "net.json"
    options = ["headless", "no-sandbox", "disable-gpu", "disable-background-networking", "hide-scrollbars"]
    options += ["disable-component-update", "disable-sync", "host-resolver-rules=MAP * ~NOTFOUND"]
    options += [f"user-data-dir={tmp_path / 'profile'}", "window-size=1300,1500", "timeout=1500"]
    options += [f"log-net-log={log}", f"screenshot={shot}"]
    command = [BROWSER, *(f"--{option}" for option in options), path.as_uri()]
    subprocess.run(command, capture_output=True, timeout=60, check=True, env={**os.environ, "TZ": "UTC"})
    from PIL import Image

    events = json.loads(log.read_text())["events"]
    asked = [event["params"] for event in events if "url" in event.get("params", {})]
    own = [ask["url"] for ask in asked if "file://" in str(ask.get("network_isolation_key"))]
    return np.asarray(Image.open(shot).convert("RGB")).astype(int), own


def near(pixels, colour):
    """Return how many pixels have about this colour."""
    return int((np.abs(pixels - np.array(colour)).max(axis=-1) < 30).sum())


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")
def test_in_a_browser_curves_and_clips_are_seen_and_nothing_is_asked_of_the_network(run, tmp_path):
    pixels, asked = browse(write_report(run), tmp_path)
    assert asked == []
    assert near(pixels, (42, 111, 196)) > 500, "the lines of the curves"
    assert near(pixels, (250, 30, 60)) > 2000, "the rectangle of the clips"
    (tmp_path / "probe.html").write_text('<img src="http://probe.invalid/x.png">')
    _, asked = browse(tmp_path / "probe.html", tmp_path)
    assert asked == ["http://probe.invalid/x.png"], "a request would have been seen"


def test_it_shows_the_last_validation_and_the_loss_of_every_band(run):
    for name in ("step-000000.mp4", "step-000030.mp4", "base/0000-a-fox.mp4", "step-000030/0000-a-fox.mp4"):
        clip(run / "validation" / name, prompt=f"made {name}")
    with (run / "log.jsonl").open("a") as file:
        for step in (0, 30):
            line = {"validation/loss": 1.0, "validation/loss_band_0": 0.5, "validation/loss_band_1": 1.5}
            file.write(json.dumps({"step": step, **line, "validation/weights": "trained"}) + "\n")
    page = Page(write_report(run).read_text())
    shown = [figure.get("aria-label") for figure in page.all("video")]
    assert "made step-000030.mp4" in shown
    assert not {"made step-000000.mp4", "made base/0000-a-fox.mp4"} & set(shown)
    assert "The last validation." in page.text
    titles = ("Held-out loss", "Held-out loss, timesteps 0 to 499", "Held-out loss, timesteps 500 to 999")
    for title in titles:
        assert f"{title}, 2 values from step 0 to 30" in page.text
