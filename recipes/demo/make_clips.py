"""Write the demo's data set: mp4 clips of moving shapes, clips.jsonl with their captions, and prompts.txt.

python recipes/demo/make_clips.py runs/demo/clips
python recipes/demo/make_clips.py runs/demo/lora-clips --new --each 3
python recipes/demo/make_clips.py runs/demo/autoencoder-clips --busy 300
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from shapes import COMBINATIONS, FPS, NEW_COMBINATIONS, caption, draw, draw_busy

from cvx_io.atomic import write_text
from cvx_io.video_write import write_mp4

PROMPTS = 32


def clips(
    combinations: Sequence[tuple[str, str, str]], each: int, busy: int, rng: np.random.Generator
) -> Iterator[tuple[str, str, np.ndarray]]:
    """Yield (file name, caption, frames): every combination `each` times, then the busy ones."""
    for combination in combinations:
        for number in range(each):
            yield f"{'-'.join(combination)}-{number}.mp4", caption(*combination), draw(*combination, rng)
    for number in range(busy):
        yield f"busy-{number}.mp4", "many shapes", draw_busy(rng)


def main() -> None:
    """Write the data set; the same seed writes the same clips."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--each", type=int, default=6, help="clips per combination of colour, shape, direction"
    )
    parser.add_argument("--busy", type=int, default=0, help="further clips of many shapes")
    parser.add_argument("--new", action="store_true", help="clips of the new motion alone")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    combinations = NEW_COMBINATIONS if args.new else COMBINATIONS
    rows = []
    for name, text, frames in clips(combinations, args.each, args.busy, np.random.default_rng(args.seed)):
        write_mp4(args.folder / name, frames, FPS, crf=12)
        rows.append(json.dumps({"file": name, "captions": text}))
    chosen = np.random.default_rng(args.seed + 1).permutation(len(combinations))[:PROMPTS]
    prompts = [caption(*combinations[i]) for i in chosen]
    write_text(args.folder / "prompts.txt", "".join(prompt + "\n" for prompt in prompts))
    write_text(args.folder / "clips.jsonl", "".join(row + "\n" for row in rows))
    print(f"{len(rows)} clips and {len(prompts)} prompts in {args.folder}")


if __name__ == "__main__":
    main()
