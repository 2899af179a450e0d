"""Faults of a run that goes on from a checkpoint: each an error in words, and the checkpoints stay."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from cvx_core import CvxError
from cvx_core.recipe import parse
from cvx_core.run import run
from cvx_core.spec import resolve
from tests.conversion.test_fault_permissions import bound_by_permissions
from tests.faults.clips import damage
from tests.io.test_inspection import write_clip, write_sound
from tests.plugins.tasks.conftest import TINY

Recipe = dict[str, Any]


class Fault(NamedTuple):
    """change: breaks something in the folder or the recipe; says: parts of the error, in order."""

    change: Callable[[Path, Recipe], None]
    says: tuple[str, ...]


def line(text: str | bytes) -> Callable[[Path, Recipe], None]:
    """Replace the second row of the listing."""

    def change(folder: Path, _: Recipe) -> None:
        first, _old = (folder / "clips.jsonl").read_bytes().split(b"\n")
        data = text.encode() if isinstance(text, str) else text
        (folder / "clips.jsonl").write_bytes(first + b"\n" + data)

    return change


def row(**fields: Any) -> Callable[[Path, Recipe], None]:
    return line(json.dumps({"file": "b.mp4", "captions": "b", "id": "b", **fields}))


def clip(make: Callable[[Path], Any]) -> Callable[[Path, Recipe], None]:
    """Replace the clip of the second row."""

    def change(folder: Path, _: Recipe) -> None:
        (folder / "b.mp4").unlink()
        make(folder / "b.mp4")

    return change


def cut(path: Path) -> None:
    write_clip(path)
    path.write_bytes(path.read_bytes()[:900])


def set_to(**sections: Any) -> Callable[[Path, Recipe], None]:
    """Set fields of the recipe: section__field=value, or a whole section."""

    def change(_: Path, recipe: Recipe) -> None:
        for name, value in sections.items():
            section, _sep, field = name.partition("__")
            if field:
                recipe[section] = {**recipe[section], field: value}
            else:
                recipe[section] = value

    return change


def listing(name: str, files: dict[str, str | bytes], **fields: str) -> Callable[[Path, Recipe], None]:
    """Use another kind of listing."""

    def change(folder: Path, recipe: Recipe) -> None:
        for file, content in files.items():
            (folder / file).write_bytes(content.encode() if isinstance(content, str) else content)
        recipe["dataset"] = {"use": name, **fields}

    return change


def no_file(folder: Path, _: Recipe) -> None:
    (folder / "clips.jsonl").unlink()


def cut_shard(folder: Path, recipe: Recipe) -> None:
    (folder / "b.txt").write_text("b")
    with tarfile.open(folder / "s.tar", "w") as shard:
        for name in ("b.txt", "b.mp4"):
            shard.add(folder / name, name)
    (folder / "s.tar").write_bytes((folder / "s.tar").read_bytes()[:-9000])
    recipe["dataset"] = {"use": "webdataset", "path": "s.tar"}


def shard_without_its_end(folder: Path, recipe: Recipe) -> None:
    cut_shard(folder, recipe)
    with tarfile.open(folder / "s.tar", "w", format=tarfile.USTAR_FORMAT) as shard:
        shard.add(folder / "b.txt", "b.txt")
        shard.add(folder / "b.mp4", "b.mp4")
        end = shard.offset
    (folder / "s.tar").write_bytes((folder / "s.tar").read_bytes()[:end])


def small_in_buckets(folder: Path, recipe: Recipe) -> None:
    clip(lambda path: write_clip(path, 8, (16, 16)))(folder, recipe)
    recipe |= {"loader": {"buckets": {"32x48": {5: [1.0, 1]}}}, "video": {"fps": 8}}


def bad_image(folder: Path, recipe: Recipe) -> None:
    Image.new("RGB", (48, 32)).save(folder / "i.png")
    (folder / "i.png").write_bytes((folder / "i.png").read_bytes()[:40])
    row(image="i.png")(folder, recipe)


def weights(change: Callable[[Path], None], section: str = "predictor") -> Callable[[Path, Recipe], None]:
    """Have a part's weights from a file that is changed."""

    def apply(folder: Path, recipe: Recipe) -> None:
        part = {"predictor": "transformer", "autoencoder": "vae", "text_encoder": "text_encoder"}[section]
        [file] = (folder / "run/model" / part).glob("*.safetensors")
        change(file)
        recipe[section] = {**recipe[section], "weights": {"use": "hf", "path": str(file.parent)}}
        if section == "predictor":  # else those of the checkpoint would take their place
            recipe["output"] = str(folder / "new")

    return apply


def edit(name: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    def change(file: Path) -> None:
        tensors = load_file(file)
        tensors[name] = how(tensors[name]).contiguous()
        save_file(tensors, file)

    return change


def nan(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * float("nan")


def each_checkpoint(change: Callable[[Path], None]) -> Callable[[Path, Recipe], None]:
    """Break every checkpoint of a copy of the run, and resume from it."""

    def apply(folder: Path, recipe: Recipe) -> None:
        shutil.copytree(folder / "run", folder / "copy")
        for path in (folder / "copy/checkpoints").iterdir():
            change(path)
        recipe["output"] = str(folder / "copy")

    return apply


def shorten(checkpoint: Path) -> None:
    [file] = checkpoint.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-9])


def lora(**fields: Any) -> Callable[[Path, Recipe], None]:
    def change(folder: Path, recipe: Recipe) -> None:
        recipe["adapter"] = {"use": "lora", **fields}
        recipe["output"] = str(folder / "new")

    return change


FAULTS: dict[str, Fault] = {
    "a line that is no JSON": Fault(line("{"), ("clips.jsonl:2: ", "JSON")),
    "a line that is no object": Fault(line("[1]"), ("clips.jsonl:2: ", "object")),
    "a caption of the wrong type": Fault(row(captions=7), ("clips.jsonl:2: ", "caption", "got 7")),
    "a missing caption": Fault(
        line('{"file": "b.mp4", "caption": "b"}'), ("clips.jsonl:2: ", "captions", "Did you mean 'caption'")
    ),
    "a blank caption": Fault(row(captions="  "), ("clips.jsonl:2: ", "caption is blank; write it, or drop")),
    "a caption that is not UTF-8": Fault(
        line(b'{"file": "b.mp4", "captions": "caf\xe9"}'), ("clips.jsonl:2: byte 0xe9 is not UTF-8", "iconv")
    ),
    "a clip that is not there": Fault(
        row(file="c.mp4"), ("clips.jsonl:2: ", "c.mp4' does not exist", "root")
    ),
    "a name that is a number": Fault(row(file=7), ("clips.jsonl:2: ", "file", "7")),
    "an id given twice": Fault(row(id="a"), ("clips.jsonl:2: id 'a' is taken by line 1",)),
    "a listing that is not there": Fault(no_file, ("dataset.path: no such file", "clips.jsonl")),
    "an empty listing": Fault(
        lambda folder, _: (folder / "clips.jsonl").write_text(""), ("clips.jsonl: lists no rows. Add",)
    ),
    "a listing that is a folder": Fault(set_to(dataset__path="."), (": no such file. Correct dataset.path",)),
    "prompts and videos of other numbers": Fault(
        listing(
            "prompts-videos", {"p.txt": "a\n", "v.txt": "a.mp4\nb.mp4\n"}, prompts="p.txt", videos="v.txt"
        ),
        ("p.txt has 1 prompts and", "v.txt has 2 videos"),
    ),
    "a blank line among prompts": Fault(
        listing(
            "prompts-videos", {"p.txt": "a\n\n", "v.txt": "a.mp4\nb.mp4"}, prompts="p.txt", videos="v.txt"
        ),
        ("p.txt:2: blank line",),
    ),
    "a table without its column": Fault(
        listing("csv", {"t.csv": "video,captoin\na.mp4,a\n"}, path="t.csv"),
        ("t.csv:1: no column 'caption'", "captoin"),
    ),
    "a shard that is cut": Fault(
        cut_shard,
        (
            "s.tar: ",
            "unexpected end of data",
            "fetch it again",
        ),
    ),
    "a shard that is cut between two members": Fault(
        shard_without_its_end,
        ("s.tar: truncated: no end is marked after 'b.mp4'. Copy or download it again",),
    ),
    "an empty clip": Fault(clip(Path.touch), ("row 'b'", "b.mp4: the file is empty. Copy or download")),
    "a truncated clip": Fault(clip(cut), ("row 'b'", "b.mp4", "truncated", "fetch it again or drop its row")),
    "a clip damaged in the middle": Fault(
        clip(lambda path: damage(write_clip(path))), ("row 'b'", "b.mp4", "drop its row")
    ),
    "a clip of sound alone": Fault(
        clip(write_sound), ("row 'b'", "b.mp4: has no video stream, only audio. Drop its row")
    ),
    "a text with a clip's ending": Fault(
        clip(lambda path: path.write_text("no video\n" * 99)), ("row 'b'", "b.mp4", "no video; fetch it")
    ),
    "a clip that is too short": Fault(
        clip(lambda path: write_clip(path, 2)),
        ("row 'b'", "b.mp4", "has 2 frames at 8 fps; 5", "Drop the clip"),
    ),
    "a clip of one frame": Fault(
        clip(lambda path: write_clip(path, 1)), ("row 'b'", "has 1 frame at 8 fps", "ask for fewer frames")
    ),
    "a folder in place of a clip": Fault(
        clip(Path.mkdir), ("clips.jsonl:2: ", "b.mp4' is a folder, and a file is needed")
    ),
    "a link that leads to itself": Fault(
        clip(lambda path: path.symlink_to(path)), ("clips.jsonl:2: ", "b.mp4' is a link that leads nowhere")
    ),
    "a pipe in place of a clip": Fault(clip(os.mkfifo), ("clips.jsonl:2: ", "b.mp4' is no regular file")),
    "a clip that may not be read": Fault(
        lambda folder, _: (folder / "b.mp4").chmod(0),
        ("row 'b'", "b.mp4: may not be read: Permission denied. Allow that"),
    ),
    "an image that is cut": Fault(
        bad_image, ("row 'b'", "i.png: cannot be read as an image", "Fetch it again")
    ),
    "fewer rows than a batch": Fault(
        set_to(loader={"batch": 3}), ("2 rows do not fill one batch of 3", "lower")
    ),
    "buckets that drop too much": Fault(
        small_in_buckets,
        (
            "1 of 2 rows (50%) are dropped",
            "loader.max_drop allows 10%",
            "1 too small: first 'b'",
            "Change the",
        ),
    ),
    "NaN in the predictor's weights": Fault(
        weights(edit("transformer_blocks.1.ff.net.2.bias", nan)),
        ("the loss is nan: it begins in 'transformer_blocks.1.ff.net.2', whose bias", "Rows: ", "timestep"),
    ),
    "NaN in the autoencoder's weights": Fault(
        weights(edit("encoder.conv_in.conv.bias", nan), "autoencoder"),
        ("latent of its rows. Rows: ", "timestep"),
    ),
    "NaN in the text encoder's weights": Fault(
        weights(edit("encoder.final_layer_norm.weight", nan), "text_encoder"),
        ("text_embeds of its rows. Rows: ",),
    ),
    "weights that are cut": Fault(
        weights(lambda file: file.write_bytes(file.read_bytes()[:-9])),
        ("diffusion_pytorch_model.safetensors", "It was cut short; download or export it again"),
    ),
    "weights of another shape": Fault(
        weights(edit("norm_final.weight", lambda t: t[:3])), ("norm_final.weight is [3], expected [32]",)
    ),
    "a rate of 0": Fault(set_to(optimizer__lr=0.0), ("changed no parameter", "raise optimizer.lr")),
    "an unknown field": Fault(set_to(task__step=9), ("task.step: ", "no such field. Did you mean 'steps'")),
    "an unknown plugin": Fault(set_to(dataset__use="jsnl"), ("no dataset 'jsnl'. Did you mean 'jsonl'",)),
    "frames that fit no latent": Fault(set_to(video__frames=6), ("video.frames: got 6", "Nearest: 5 or 9")),
    "a size that patches do not fill": Fault(
        set_to(video__height=40), ("video.height: got 40", "Nearest: 32 or 48")
    ),
    "training in float16": Fault(
        set_to(dtype="float16"), ("dtype: is float16", "Train in bfloat16 or float32")
    ),
    "an adapter that matches nothing": Fault(
        lora(targets=["to_z"]), ("adapter.targets: 'to_z' matches no linear layer",)
    ),
    "an adapter of rank 0": Fault(lora(rank=0), ("adapter.rank: got 0", "greater than or equal to 1")),
    "a checkpoint that is not there": Fault(
        set_to(task__resume="gone"), ("task.resume: no such file or folder", "gone")
    ),
    "a folder without a checkpoint": Fault(
        set_to(task__resume="."), (": holds no checkpoint. Give a step-",)
    ),
    "a checkpoint of another model": Fault(
        lambda folder, recipe: set_to(
            task__resume=str(folder / "run"), predictor__num_layers=3, output="new"
        )(folder, recipe),
        ("step-00000002: does not fit this recipe", "transformer_blocks.2", "Resume with the recipe it"),
    ),
    "checkpoints that are all damaged": Fault(
        each_checkpoint(shorten),
        ("all 2 checkpoints are damaged", "step-00000002", "Copy them again, or set another output"),
    ),
    "an output with another run": Fault(set_to(task__resume="none"), ("earlier run", "task.resume=auto")),
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Recipe]:
    """Two clips, and a run on them that was stopped after two of four steps."""
    folder = tmp_path_factory.mktemp("trained")
    for name in "ab":
        write_clip(folder / f"{name}.mp4", 8, (32, 48))
    rows = [{"file": f"{name}.mp4", "captions": name, "id": name} for name in "ab"]
    (folder / "clips.jsonl").write_text("\n".join(map(json.dumps, rows)))
    recipe = yaml.safe_load(TINY)
    recipe |= {
        "video": {"frames": 5, "height": 32, "width": 48, "fps": 8},
        "dataset": {"use": "jsonl", "path": "clips.jsonl"},
        "loader": {"batch": 2},
    }
    recipe["task"] |= {"export": {"use": "hf"}, "export_whole": True, "steps": 2, "save_every": 1}
    launch(folder, recipe)
    recipe["task"] |= {"export": None, "export_whole": False, "steps": 4, "resume": "auto", "keep": 9}
    return folder, recipe


def launch(folder: Path, recipe: Recipe) -> None:
    output = folder / recipe.get("output", "run")
    run(resolve(parse(yaml.safe_dump({**recipe, "output": str(output)}), base=folder)))


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@contextmanager
def refused(folder: Path, *says: str) -> Iterator[None]:
    """Expect an error in these words, and that the checkpoints are as they were."""
    before = digests(folder / "run/checkpoints")
    assert len(before) >= 6
    with pytest.raises(CvxError) as error:
        yield
    said = str(error.value)
    for part in says:
        assert part in said, said
        said = said[said.index(part) + len(part) :]
    assert before.items() <= digests(folder / "run/checkpoints").items()
    assert not [path for path in folder.rglob(".*") if path.name.endswith(".partial")]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_said_and_the_checkpoints_stay(
    name: str, trained: tuple[Path, Recipe], tmp_path: Path
) -> None:
    folder = shutil.copytree(trained[0], tmp_path / "it", symlinks=True)
    recipe = {section: trained[1][section] for section in trained[1]}
    FAULTS[name].change(folder, recipe)
    with bound_by_permissions(), refused(folder, *FAULTS[name].says):
        launch(folder, recipe)


@contextmanager
def full_disk(most: int) -> Iterator[None]:
    """Let no file become larger than this, bytes: every writer, of any library, gets the system's error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("beside", [False, True])
def test_a_disk_that_fills_during_a_save_keeps_the_saves_before_and_the_run_goes_on(
    beside: bool, trained: tuple[Path, Recipe], tmp_path: Path
) -> None:
    folder = shutil.copytree(trained[0], tmp_path / "it")
    recipe = {**trained[1], "task": {**trained[1]["task"], "async_save": beside}}
    says = ("File too large. Make room there", "what was complete before is kept", "task.resume=auto goes on")
    with full_disk(60_000), refused(folder, *says):
        launch(folder, recipe)
    assert not (folder / "run/checkpoints/step-00000003").exists()
    assert "File too large" in ended(folder / "run")
    launch(folder, recipe)
    assert (folder / "run/checkpoints/step-00000004/manifest.json").exists()


def test_a_disk_that_fills_during_the_export_keeps_the_checkpoint_and_the_export_before(
    trained: tuple[Path, Recipe], tmp_path: Path
) -> None:
    folder = shutil.copytree(trained[0], tmp_path / "it")
    recipe = {**trained[1], "task": {**trained[1]["task"], "steps": 2, "export": {"use": "hf"}}}
    before = digests(folder / "run/model")
    with full_disk(60_000), refused(folder, "File too large. Make room there"):
        launch(folder, recipe)
    assert digests(folder / "run/model") == before
    launch(folder, recipe)


@pytest.mark.parametrize("place", ["run", "closed/run", "a.mp4", "a.mp4/run"])
def test_an_output_that_cannot_be_written(place: str, trained: tuple[Path, Recipe], tmp_path: Path) -> None:
    folder = shutil.copytree(trained[0], tmp_path / "it")
    (folder / "closed").mkdir()
    closed = (folder / "closed", folder / "run", folder / "run/checkpoints")
    for path in closed:
        path.chmod(0o555)
    try:
        with bound_by_permissions(), refused(folder, str(folder / place.split("/")[0]), "another output"):
            launch(folder, {**trained[1], "output": place})
    finally:
        for path in closed:
            path.chmod(0o755)


def test_a_damaged_newest_checkpoint_is_set_aside_and_said(
    trained: tuple[Path, Recipe], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shutil.copytree(trained[0], tmp_path / "it")
    shorten(folder / "run/checkpoints/step-00000002")
    caplog.set_level("INFO", logger="cvx")
    launch(folder, trained[1])
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "step-00000002" in warned[0]
    assert f"resumed from {folder / 'run/checkpoints/step-00000001'}" in caplog.text


def test_a_byte_order_mark_and_other_line_ends_change_nothing(
    trained: tuple[Path, Recipe], tmp_path: Path
) -> None:
    folder = shutil.copytree(trained[0], tmp_path / "it")
    launch(folder, {**trained[1], "output": "plain"})
    text = (folder / "clips.jsonl").read_bytes()
    (folder / "clips.jsonl").write_bytes(b"\xef\xbb\xbf" + text.replace(b"\n", b"\r\n") + b"\r\n")
    launch(folder, {**trained[1], "output": "marked"})
    assert losses(folder / "marked") == losses(folder / "plain")


def losses(output: Path) -> list[float]:
    return [json.loads(text)["loss"] for text in (output / "log.jsonl").read_text().splitlines()]


def ended(output: Path) -> str:
    """Return how the last start of a run ended, as its record has it."""
    how: str = json.loads((output / "environment.json").read_text())["starts"][-1]["ended"]["how"]
    return how
