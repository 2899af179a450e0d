"""Conversions that are killed, stopped or out of disk: nothing half written passes for weights."""

from __future__ import annotations

import errno
import itertools
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed.checkpoint  # noqa: F401  children inherit it

from cvx_core.errors import FormatError
from cvx_io import atomic, convert
from cvx_io.conversion import job
from cvx_io.conversion.detect import find_format, formats_of

SAT = "fixtures/sat/t2v_2b/transformer"
LORA = "fixtures/sat/lora/transformer"
WAYS = {
    "hf": (SAT, "out", ["--to", "hf"]),
    "hf-shards": (SAT, "out", ["--to", "hf", "--set", "shard_limit=100000"]),
    "hf-file": (SAT, "out.safetensors", ["--to", "hf"]),
    "sat": (SAT, "out", ["--to", "sat"]),
    "sat-file": (SAT, "out.pt", ["--to", "sat"]),
    "megatron": (SAT, "out", ["--to", "megatron", "--set", "tp=3", "--set", "pp=2"]),
    "dcp": (SAT, "out", ["--to", "dcp"]),
    "diffusers-lora": (LORA, "out", ["--to", "diffusers-lora", "--alpha", "1"]),
    "comfyui": (LORA, "out.safetensors", ["--to", "comfyui", "--alpha", "1"]),
}
each_way = pytest.mark.parametrize("way", WAYS)


@pytest.fixture
def run(shared, tmp_path):
    """Return a function that runs the command for one of WAYS and gives its exit code."""

    def run(way: str, *more: str, folder: Path = tmp_path) -> int:
        source, name, options = WAYS[way]
        return convert.main([str(shared / source), str(folder / name), *options, "--verify", *more])

    return run


def killed(action: Callable[[], object], patch: Callable[[], None]) -> bool:
    """Run an action in a child process after `patch`, which makes it kill itself; tell whether it did."""
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        try:
            patch()
            action()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert not os.WIFSIGNALED(status) or os.WTERMSIG(status) == signal.SIGKILL
    return os.WIFSIGNALED(status)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def instead_of_call(number: int, act: Callable[[], object], call: Callable) -> Callable:
    """Return `call`, but its number-th call does `act` first."""
    calls = itertools.count(1)

    def counted(*args: object, **options: object) -> object:
        if next(calls) == number:
            act()
        return call(*args, **options)

    return counted


def at_tensor(number: int, act: Callable[[], object] = kill) -> Callable[[], None]:
    """Return a patch: `act` happens when the number-th tensor is asked for, to be written."""
    watched = job._watched

    def patch() -> None:
        def fatal(tensors, bar):
            found = watched(tensors, bar)
            make = instead_of_call(number, act, found.load.make)
            return replace(found, load=replace(found.load, make=make))

        job._watched = fatal

    return patch


def at_rename(number: int) -> Callable[[], None]:
    """Return a patch: the process kills itself instead of renaming for the number-th time."""

    def patch() -> None:
        os.rename = os.replace = instead_of_call(number, kill, os.replace)

    return patch


def renames(way: str) -> int:
    """Return how many renames a conversion to a new target makes; the last one is what makes it visible."""
    return 6 if way == "dcp" else 4 if "." in WAYS[way][1] else 5  # torch renames .metadata itself


def everything_in(folder: Path) -> list[Path]:
    return [folder, *sorted(folder.rglob("*"))]


def held(folder: Path) -> dict[str, bytes]:
    """Return the content of all files in a folder, but for what states the folder, or has an id by torch."""
    files = (path for path in everything_in(folder) if path.is_file() and path.name != ".metadata")
    files = (path for path in files if "conversion.json" not in path.name)
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def accepted(folder: Path, registry) -> list[Path]:
    """Return all below a folder, itself included, that any format takes for weights."""
    return [path for path in everything_in(folder) if formats_of(path, registry)]


@each_way
@pytest.mark.parametrize("point", ["first tensor", "halfway", "rename 1", "rename 3", "last rename"])
def test_a_killed_conversion_leaves_nothing_that_passes_for_weights(way, point, run, tmp_path, registry):
    patch = {
        "first tensor": at_tensor(1),
        "halfway": at_tensor(12),
        "rename 1": at_rename(1),
        "rename 3": at_rename(3),
        "last rename": at_rename(renames(way)),
    }[point]
    assert killed(lambda: run(way), patch)
    assert any(item.suffix == ".partial" for item in tmp_path.iterdir())
    assert not (tmp_path / WAYS[way][1]).exists()
    assert accepted(tmp_path, registry) == []


@each_way
def test_after_the_last_rename_all_is_there(way, run, tmp_path, registry):
    assert not killed(lambda: run(way), at_rename(renames(way) + 1))
    assert not any(item.name.startswith(".") for item in tmp_path.iterdir())
    assert find_format(tmp_path / WAYS[way][1], registry)


@each_way
def test_a_conversion_after_a_killed_one_is_complete_and_removes_what_is_left(
    way, run, tmp_path, capsys, registry
):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert killed(lambda: run(way, folder=tmp_path / "a"), at_rename(renames(way)))
    (left,) = tmp_path.glob("a/.*")
    told = f"left over from an interrupted write, and removed by the next: {left}"
    assert run(way, "--dry-run", folder=tmp_path / "a") == 0
    assert told in capsys.readouterr().out
    assert left.exists()
    assert run(way, folder=tmp_path / "a") == 0
    assert told in capsys.readouterr().out
    assert not left.exists()
    assert run(way, folder=tmp_path / "b") == 0
    assert held(tmp_path / "a") == held(tmp_path / "b")


@pytest.mark.parametrize("way", ["hf", "hf-file", "megatron"])
@pytest.mark.parametrize("point", ["halfway", "report", "aside", "last rename"])
def test_a_killed_overwrite_loses_nothing(way, point, run, tmp_path, capsys):
    target = tmp_path / WAYS[way][1]
    assert run(way) == 0
    before, last = held(tmp_path), renames(way) + 1  # one more puts the old target aside
    moved = 2 if way == "hf-file" else 1  # a file has its report beside it
    rename = {"report": last - moved - 1, "aside": last - moved, "last rename": last}
    patch = at_tensor(12) if point == "halfway" else at_rename(rename[point])
    assert killed(lambda: run(way, "--overwrite", "--dtype", "float16"), patch)
    (partial,) = tmp_path.glob(".*.partial")
    if point != "last rename":
        shutil.rmtree(partial)
        assert held(tmp_path) == before
        return
    (old,) = tmp_path.glob(".*.old")
    assert not target.exists()
    capsys.readouterr()
    assert run(way, "--dry-run") == 0
    told = capsys.readouterr().out
    assert f"an interrupted write put aside what was at {target}: {old}; rename it to have it back" in told
    shutil.rmtree(partial)
    old.rename(target)
    assert held(tmp_path) == before


def test_what_a_killed_conversion_left_is_refused_by_name(run, tmp_path, capsys):
    assert killed(lambda: run("hf"), at_rename(5))
    (left,) = tmp_path.glob(".*.partial")
    for path in (left, left / "out", left / "out/diffusion_pytorch_model.safetensors"):
        for more in ([], ["--from", "hf"]):
            assert convert.main([str(path), str(tmp_path / "new"), "--to", "sat", *more]) == 2
            assert f"{path}: left over from an interrupted write" in capsys.readouterr().err


@each_way
def test_an_interrupt_leaves_nothing_behind(way, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, "_watched", job._watched)

    def interrupt():
        raise KeyboardInterrupt

    at_tensor(12, interrupt)()
    assert run(way, folder=tmp_path / "new/folder") == 130
    assert list(tmp_path.iterdir()) == []
    assert "nothing is left behind" in capsys.readouterr().err


@each_way
def test_a_termination_leaves_nothing_behind(way, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, "_watched", job._watched)
    handler = signal.getsignal(signal.SIGTERM)
    at_tensor(12, lambda: os.kill(os.getpid(), signal.SIGTERM))()
    assert run(way, folder=tmp_path / "new/folder") == 143
    assert list(tmp_path.iterdir()) == []
    assert "terminated; nothing is left behind" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == handler


def test_what_a_running_conversion_writes_is_not_removed_by_another(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, "_watched", job._watched)
    seen: list[Path] = []

    def convert_too():
        monkeypatch.undo()
        seen.extend(tmp_path.glob(".out.*.partial"))
        assert run("hf") == 0
        assert f"unless another is still running; remove {seen[0]}" in capsys.readouterr().out
        assert seen[0].exists()

    at_tensor(12, convert_too)()
    assert run("hf", "--dtype", "float16") == 2
    assert len(seen) == 1
    assert not seen[0].exists()


@pytest.mark.parametrize("way", ["hf", "hf-file"])
def test_of_two_conversions_to_one_target_the_later_fails(way, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, "_watched", job._watched)

    def convert_too():
        monkeypatch.undo()
        assert run(way) == 0

    at_tensor(12, convert_too)()
    assert run(way, "--dtype", "float16") == 2
    assert f"{tmp_path / WAYS[way][1]}: appeared meanwhile" in capsys.readouterr().err
    kept = held(tmp_path)
    assert run(way, "--overwrite") == 0
    assert held(tmp_path) == kept


def test_what_differs_when_it_is_read_again_is_not_kept(run, tmp_path, monkeypatch, capsys):
    assert run("sat") == 0
    before = held(tmp_path)
    check = job.Job._checked

    def damage(self, place, verified):
        file = place / "1/mp_rank_00_model_states.pt"
        data = bytearray(file.read_bytes())
        data[200_000] ^= 1
        file.write_bytes(data)
        return check(self, place, verified)

    monkeypatch.setattr(job.Job, "_checked", damage)
    assert run("sat", "--overwrite") == 2
    assert f"{tmp_path / 'out'}: " in capsys.readouterr().err
    assert held(tmp_path) == before


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Make the system refuse to let files grow beyond a size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@each_way
def test_a_write_that_the_system_refuses_halfway_leaves_nothing(way, run, tmp_path, capsys):
    size = 4_000 if "LORA" in way or way in ("diffusers-lora", "comfyui") else 30_000
    with largest_file(size):
        assert run(way) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / WAYS[way][1]}: not written: {os.strerror(errno.EFBIG)}" in error
    assert "make room" in error
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path, monkeypatch):
    """A folder on a disk of 256 KiB that claims to be larger; a stand-in where nothing can be mounted."""
    folder = tmp_path / "disk"
    folder.mkdir()
    options = ["-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 0, 2**40))
    mount = shutil.which("mount")
    is_real = mount is not None and subprocess.run([mount, *options], capture_output=True).returncode == 0
    if not is_real:

        def full(handle):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", full)
    yield folder
    if is_real:
        subprocess.run(["umount", str(folder)], check=True)


@each_way
def test_a_disk_that_fills_up_is_left_empty(way, run, small_disk, capsys):
    if WAYS[way][0] == LORA:
        (small_disk / "ballast").write_bytes(bytes(250 * 1024))
    before = sorted(small_disk.iterdir())
    assert run(way, folder=small_disk) == 2
    error = capsys.readouterr().err
    assert f"{small_disk / WAYS[way][1]}: not written: {os.strerror(errno.ENOSPC)}" in error
    assert "make room" in error
    assert sorted(small_disk.iterdir()) == before


def test_room_is_checked_before_anything_is_written(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**40, 2**40, 300_000))
    assert run("hf") == 2
    assert f"{tmp_path / 'out'}: needs 413.9 kB, but {tmp_path} has 300.0 kB free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_target_that_was_to_be_replaced(run, tmp_path, capsys):
    assert run("hf") == 0
    before = held(tmp_path)
    with largest_file(30_000):
        assert run("hf", "--overwrite") == 2
    assert held(tmp_path) == before
    assert (tmp_path / "out/conversion.json").exists()


def test_staging_puts_all_back_where_the_last_rename_fails(tmp_path, monkeypatch):
    path = tmp_path / "out.bin"
    path.write_text("old")
    move = Path.replace

    def fail(self, target):
        if self.name == "out.bin":
            raise OSError("power cut")
        return move(self, target)

    monkeypatch.setattr(Path, "replace", fail)

    def write():
        with atomic.staged(path) as place:
            place.write_text("new")

    with pytest.raises(OSError, match="power cut"):
        write()
    assert held(tmp_path) == {"out.bin": b"old"}


def test_names_of_left_overs_are_told_from_others(tmp_path):
    for name in (".out.0123abcd.partial", ".a b.c.0123abcd.manifest", ".out.0123abcd.old"):
        assert atomic.is_left_over(tmp_path / name)
        assert atomic.is_left_over(tmp_path / name / "in/it")
    for name in (
        "out.0123abcd.partial",
        ".out.0123abc.partial",
        ".out.partial",
        ".out.0123abcd.part",
        ".old",
    ):
        assert not atomic.is_left_over(tmp_path / name)


def test_a_source_that_shrinks_meanwhile_is_refused(shared, tmp_path, monkeypatch, capsys):
    source = tmp_path / "model.safetensors"
    shutil.copyfile(shared / "fixtures/sat/t2v_2b/hf/transformer/diffusion_pytorch_model.safetensors", source)
    monkeypatch.setattr(job, "_watched", job._watched)

    def cut():
        os.truncate(source, 50_000)

    at_tensor(1, cut)()
    options = ["--model", str(shared / "fixtures/sat/t2v_2b/hf/transformer/config.json")]
    assert convert.main([str(source), str(tmp_path / "out"), "--to", "hf", *options]) == 2
    error = capsys.readouterr().err
    assert str(source) in error
    assert "changed meanwhile" in error
    assert list(tmp_path.iterdir()) == [source]


def test_an_error_while_writing_is_put_under_the_target(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, "_watched", job._watched)

    def fail():
        raise FormatError("'a.weight' broke")

    at_tensor(3, fail)()
    assert run("hf") == 2
    assert capsys.readouterr().err.endswith("transformer: 'a.weight' broke\n")
