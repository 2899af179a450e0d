"""Video files to frames, beside decord and PyAV called directly: python -m benchmarks.decode [--clips DIR].

Every side opens a file, reads the frames asked for into one array and closes it, with one thread, in turns.
Ratios are of medians of CPU seconds: theirs over ours.
"""

from __future__ import annotations

import argparse
import os
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import av
import numpy as np

from benchmarks.harness import hardware, save_record, versions
from cvx_core import Registry
from cvx_core.interfaces import Reader
from cvx_core.registry import Choice
from cvx_io.video import Pick, pick_frames

CLIPS = Path(os.environ.get("CVX_SHARED", Path(__file__).resolve().parents[2] / "shared")) / "data/clips"
PICK = Pick(25, 8, short="repeat")
Read = Callable[[Path, Sequence[int]], np.ndarray]


def ours() -> Read:
    """Return the reader that recipes have by default as a function."""
    component = Registry.discover().get("reader", "auto")
    assert component.config is not None
    reader: Reader = Choice(component, component.config(threads=1)).build()

    def read(path: Path, indices: Sequence[int]) -> np.ndarray:
        with closing(reader.open(path)) as clip:
            found: np.ndarray = clip.frames(indices)
            return found

    return read


def with_decord(path: Path, indices: Sequence[int]) -> np.ndarray:
    """Read frames as decord's manual does."""
    import decord  # here, for the other benchmarks do without

    found: np.ndarray = decord.VideoReader(str(path), num_threads=1).get_batch(indices).asnumpy()
    return found


def with_pyav(path: Path, indices: Sequence[int]) -> np.ndarray:
    """Read frames as PyAV's manual does: from the start, keeping those that are wanted."""
    wanted, kept = set(indices), {}
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        for index, frame in enumerate(container.decode(stream)):
            if index in wanted:
                kept[index] = frame.to_ndarray(format="rgb24")
            if index == indices[-1]:
                break
    return np.stack([kept[index] for index in indices])


THEIRS: Mapping[str, Read] = {"decord": with_decord, "pyav": with_pyav}


def compare(mine: Read, other: Read, path: Path, indices: Sequence[int], repeats: int) -> dict[str, Any]:
    """Time both in turns; CPU seconds. Raises AssertionError where they read frames of another shape."""
    assert mine(path, indices).shape == other(path, indices).shape
    samples: dict[str, list[float]] = {"ours": [], "theirs": []}
    sides = [("ours", mine), ("theirs", other)]
    for number in range(repeats):
        for side, read in sides if number % 2 else sides[::-1]:
            began = time.process_time()
            read(path, indices)
            samples[side].append(time.process_time() - began)
    medians = {side: statistics.median(found) for side, found in samples.items()}
    return {**medians, "ratio": medians["theirs"] / medians["ours"], "frames": len(indices)}


def run(folder: Path, repeats: int) -> dict[str, Any]:
    """Return {library: {case: figures}} for every clip of a folder that both sides read, whole and picked."""
    results: dict[str, Any] = {library: {} for library in THEIRS}
    mine = ours()
    for path in sorted(folder.iterdir()):
        with closing(_auto().open(path)) as clip:
            count, fps = clip.num_frames, clip.fps
        cases = {"all": list(range(count)), "picked": sorted(set(pick_frames(count, fps, PICK)))}
        for library, other in THEIRS.items():
            for case, indices in cases.items():
                results[library][f"{path.name}, {case}"] = compare(mine, other, path, indices, repeats)
    return results


def _auto() -> Reader:
    component = Registry.discover().get("reader", "auto")
    assert component.config is not None
    reader: Reader = Choice(component, component.config()).build()
    return reader


def ratios(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the CPU seconds of each library over all cases, over ours."""
    return {
        library: sum(found["theirs"] for found in cases.values())
        / sum(found["ours"] for found in cases.values())
        for library, cases in results.items()
    }


def table(record: Mapping[str, Any]) -> list[str]:
    """Return the lines of the table in docs/benchmarks.md."""
    lines = ["| | frames | decord over ours | PyAV over ours |", "|---|---|---|---|"]
    results = record["results"]
    for case, found in results["pyav"].items():
        beside = results["decord"][case]
        lines.append(f"| {case} | {found['frames']} | {beside['ratio']:.2f} | {found['ratio']:.2f} |")
    total = record["ratios"]
    return [*lines, f"| all of them | | {total['decord']:.2f} | {total['pyav']:.2f} |"]


def main(arguments: list[str] | None = None) -> int:
    """Print the table and write the record; returns 1 where a library is faster over all cases."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--clips", type=Path, default=CLIPS, help="a folder of video files")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args(arguments)
    results = run(options.clips, options.repeats)
    record = {
        "command": shlex.join(["python", "-m", "benchmarks.decode", *sys.argv[1:]]),
        "hardware": {**hardware("cpu"), "threads": 1},
        "versions": {**versions(), "av": version("av"), "decord": version("decord")},
        "results": results,
        "ratios": ratios(results),
    }
    print("\n".join(table(record)))
    save_record("decode-cpu", record)
    return int(min(record["ratios"].values()) < 1)


if __name__ == "__main__":
    sys.exit(main())
