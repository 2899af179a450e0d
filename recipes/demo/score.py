"""Count how many sampled videos show the colour and the direction of their prompt, measured from their
frames.

python recipes/demo/score.py runs/demo
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
from shapes import COLOURS, MOTIONS

from cvx_core import Registry
from cvx_core.registry import Choice
from cvx_io.atomic import write_json

MIN_CONTRAST, MIN_PIXELS, MIN_SHIFT = 60.0, 12, 2.0
"""What counts as the shape: difference from the ground in levels, area in pixels, way in pixels."""


def measure(frames: np.ndarray) -> tuple[str | None, str | None]:
    """Return (colour, direction) of the one shape in frames (F,H,W,3) uint8; None where there is none to see.

    Colour is the nearest hue of the palette as seen against the ground, which is the median pixel; direction
    is where the shape's centre of mass goes from the first frame to the last.
    """
    pixels = frames.astype(np.float64)
    ground = np.median(pixels.reshape(-1, 3), axis=0)
    contrast = abs(pixels - ground).max(axis=-1)
    mask = contrast > MIN_CONTRAST
    if min(mask[0].sum(), mask[-1].sum()) < MIN_PIXELS:
        return None, None
    seen = pixels[mask].mean(axis=0) - ground
    hues = {name: np.array(value) - ground for name, value in COLOURS.items()}
    colour = max(hues, key=lambda name: hues[name] @ seen / np.linalg.norm(hues[name]))
    shift = _centre(contrast[-1] * mask[-1]) - _centre(contrast[0] * mask[0])
    if abs(shift).max() < MIN_SHIFT:
        return colour, None
    return colour, max(MOTIONS, key=lambda name: shift @ np.array(MOTIONS[name]))


def _centre(weight: np.ndarray) -> np.ndarray:
    """Return the centre of mass (x, y) of a picture of weights."""
    y, x = np.mgrid[: weight.shape[0], : weight.shape[1]]
    return np.array([(weight * x).sum(), (weight * y).sum()]) / weight.sum()


def main() -> int:
    """Score every video of a folder; returns 1 where fewer than --need are right, or more than --most."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--need", type=int, default=29, help="right ones that make it a success")
    parser.add_argument("--most", type=int, help="instead: as many as may be right")
    args = parser.parse_args()
    component = Registry.discover().get("reader", "auto")
    assert component.config is not None
    reader = Choice(component, component.config()).build()
    results = []
    for record in sorted(args.folder.glob("[0-9]*.json")):
        prompt = json.loads(record.read_text(encoding="utf-8"))["prompt"]
        clip = reader.open(record.with_suffix(".mp4"))
        colour, direction = measure(clip.frames(range(clip.num_frames)))
        clip.close()
        words = prompt.split()
        right = {"colour": colour == words[1], "direction": direction == words[-1]}
        results.append({"prompt": prompt, "saw": [colour, direction], **right})
    both = sum(r["colour"] and r["direction"] for r in results)
    for result in results:
        if not (result["colour"] and result["direction"]):
            print(f"wrong: {result['prompt']!r} looks like {result['saw']}")
    colours, directions = (sum(r[key] for r in results) for key in ("colour", "direction"))
    print(f"{both} of {len(results)} right: colour {colours}, direction {directions}")
    write_json(args.folder / "score.json", {"right": both, "of": len(results), "videos": results})
    return 0 if (both >= args.need if args.most is None else both <= args.most) else 1


if __name__ == "__main__":
    sys.exit(main())
