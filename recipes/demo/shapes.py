"""The demo's world: one coloured shape that crosses a grey picture; how it is drawn and what it is called."""

from __future__ import annotations

from itertools import product

import numpy as np

SIZE, FRAMES, FPS = 48, 9, 8
BACKGROUND = (120, 120, 120)
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 235),
    "yellow": (235, 215, 50),
    "magenta": (225, 60, 215),
    "cyan": (60, 215, 225),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
NEW = {"diagonally": (0.5**0.5, 0.5**0.5)}
"""A motion that train.yaml's clips do not have: down to the right. A LoRA learns it."""
MOTIONS = {**DIRECTIONS, **NEW}
COMBINATIONS = tuple(product(COLOURS, SHAPES, DIRECTIONS))
NEW_COMBINATIONS = tuple(product(COLOURS, SHAPES, NEW))


def caption(colour: str, shape: str, direction: str) -> str:
    """Return the prompt of a clip."""
    return f"a {colour} {shape} moving {direction}"


def coverage(shape: str, x: float, y: float, radius: float, samples: int = 4) -> np.ndarray:
    """Return how much of each pixel (SIZE,SIZE) a shape at (x, y) covers, by samples^2 points in it."""
    grid = (np.arange(SIZE * samples) + 0.5) / samples
    right, down = grid[None, :] - x, grid[:, None] - y
    if shape == "circle":
        inside = right**2 + down**2 <= radius**2
    elif shape == "square":
        inside = (abs(right) <= 0.9 * radius) & (abs(down) <= 0.9 * radius)
    else:
        inside = (down <= 0.8 * radius) & (abs(right) <= (down + radius) * 0.62)
    return inside.reshape(SIZE, samples, SIZE, samples).mean(axis=(1, 3))[..., None]


def draw(colour: str, shape: str, direction: str, rng: np.random.Generator) -> np.ndarray:
    """Return a clip (FRAMES,SIZE,SIZE,3) uint8; size, speed and position vary with the generator."""
    unit = SIZE / 64
    radius, travel = rng.uniform(9, 12) * unit, rng.uniform(24, 30) * unit
    start, across = rng.uniform(-3, 3) * unit - travel / 2, rng.uniform(-12, 12) * unit
    step_x, step_y = MOTIONS[direction]
    aside_x, aside_y = (-step_y, step_x) if direction in NEW else (abs(step_y), abs(step_x))
    ground, ink = np.array(BACKGROUND, float), np.array(COLOURS[colour], float)
    frames = []
    for frame in range(FRAMES):
        along = start + travel * frame / (FRAMES - 1)
        x = SIZE / 2 + step_x * along + aside_x * across
        y = SIZE / 2 + step_y * along + aside_y * across
        frames.append(ground + (ink - ground) * coverage(shape, x, y, radius))
    return np.round(frames).astype(np.uint8)


def draw_busy(rng: np.random.Generator) -> np.ndarray:
    """Return a clip of several shapes of any colour on any ground: variety for the autoencoder."""
    palette = np.array(list(COLOURS.values()), float)
    ground = np.array(BACKGROUND, float) if rng.random() < 0.5 else rng.uniform(0, 255, 3)
    frames = np.tile(ground, (FRAMES, SIZE, SIZE, 1))
    for _ in range(rng.integers(2, 6)):
        ink = palette[rng.integers(len(palette))] if rng.random() < 0.7 else rng.uniform(0, 255, 3)
        radius, place = rng.uniform(5, 12) * SIZE / 64, rng.uniform(0, SIZE, 2)
        speed, shape = rng.uniform(-4, 4, 2) * SIZE / 64, SHAPES[rng.integers(len(SHAPES))]
        for frame in range(FRAMES):
            x, y = place + speed * frame
            frames[frame] += (ink - frames[frame]) * coverage(shape, x, y, radius, samples=2)
    return np.round(frames).astype(np.uint8)
