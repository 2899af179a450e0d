"""Datasets kept in plain text files, one item a line, or in the recipe itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cvx_core.errors import FormatError
from cvx_core.interfaces import Row
from cvx_plugins.datasets.config import PromptsConfig, PromptsVideosConfig
from cvx_plugins.datasets.listing import Listing, read_lines, required


class PromptsVideos:
    """Rows of two text files, paired line by line."""

    def __init__(self, cfg: PromptsVideosConfig, deps: Any = None):
        self.cfg = cfg

    def rows(self) -> tuple[Row, ...]:
        """Return the rows in file order. Raises FormatError on unequal files, blank lines, missing videos."""
        prompts_path = required(self.cfg.prompts, "prompts")
        videos_path = required(self.cfg.videos, "videos")
        prompts, videos = read_lines(prompts_path), read_lines(videos_path)
        _check_counts(prompts_path, len(prompts), "prompts", videos_path, len(videos), "videos")
        listing = Listing(videos_path, self.cfg.root)
        for line, (prompt, video) in enumerate(zip(prompts, videos, strict=True), start=1):
            if not prompt:
                listing.problem(
                    line, "blank line; write the prompt, or drop the line in both files.", prompts_path
                )
            if not video:
                listing.problem(line, "blank line; write the path, or drop the line in both files.")
            path = listing.media(video, line, "video") if video else None
            if prompt and path is not None:
                listing.add(Row(f"{video}#{line}", (prompt,), path), line)
        return listing.finish()


class Prompts:
    """Rows of prompts, with an image each for image-to-video."""

    def __init__(self, cfg: PromptsConfig, deps: Any = None):
        self.cfg = cfg

    def rows(self) -> tuple[Row, ...]:
        """Return the rows in order. Raises FormatError on unequal counts, blank lines and missing images."""
        cfg = self.cfg
        if (cfg.path is None) == (not cfg.prompts):
            raise FormatError("dataset: give either a text file as `path`, or a list as `prompts`.")
        if cfg.images_path is not None and cfg.images:
            raise FormatError("dataset: give either a text file as `images_path`, or a list as `images`.")
        source: Path | str = required(cfg.path, "path") if cfg.path is not None else "dataset.prompts"
        prompts = [prompt.strip() for prompt in cfg.prompts] if cfg.path is None else read_lines(cfg.path)
        stem = "prompt" if cfg.path is None else cfg.path.name
        listing = Listing(source)
        images = self._images(listing, source, len(prompts))
        for line, prompt in enumerate(prompts, start=1):
            if prompt:
                image = images[line - 1] if images else None
                listing.add(Row(f"{stem}#{line}", (prompt,), image=image), line)
            else:
                listing.problem(line, "blank line; write the prompt, or drop the line.")
        return listing.finish()

    def _images(self, listing: Listing, source: Path | str, count: int) -> list[Path | None]:
        cfg = self.cfg
        if cfg.images_path is not None:
            place: Path | str = required(cfg.images_path, "images_path")
            root, texts = cfg.images_path.parent, read_lines(cfg.images_path)
        elif cfg.images:
            place, root, texts = "dataset.images", Path(), [str(image) for image in cfg.images]
        else:
            return []
        _check_counts(source, count, "prompts", place, len(texts), "images")
        paths = []
        for line, text in enumerate(texts, start=1):
            if not text:
                listing.problem(line, "blank line; write the image's path.", place)
            paths.append(listing.media(text, line, "image", root) if text else None)
        return paths


def _check_counts(a: Path | str, num_a: int, what_a: str, b: Path | str, num_b: int, what_b: str) -> None:
    if num_a != num_b:
        raise FormatError(
            f"{a} has {num_a} {what_a} and {b} has {num_b} {what_b}; they are paired line by line. "
            f"Complete the shorter one: its line {min(num_a, num_b) + 1} is missing."
        )
