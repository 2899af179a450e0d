"""The dataset `npz-cache`: latents and embeddings that other trainers have kept in .npz files."""

from __future__ import annotations

import csv
import io
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cvx_core.errors import FormatError, did_you_mean
from cvx_core.interfaces import Deps, Row
from cvx_io.cache.items import Encoded, Moments, Text
from cvx_plugins.datasets.cached_config import NpzCacheConfig
from cvx_plugins.datasets.listing import Listing, read_utf8, required

if TYPE_CHECKING:
    from torch import Tensor

STRIDES = (4, 8, 8)
"""Frames, pixel rows and columns of a latent element, of every autoencoder of the family."""


@dataclass(frozen=True)
class NpzFeatures:
    """Reads one row's files. shape: (C,T,h,w) that the recipe asks for, None where it says nothing."""

    latent: Path
    text: Path | None
    shape: tuple[int, ...] | None
    layout: str
    fps: float | None

    def __call__(self, caption: str) -> Encoded:
        """Return moments, and text where there is a file for it. Raises FormatError on what does not fit."""
        return Encoded(self._moments(), text=read_text(self.text) if self.text is not None else None)

    def _moments(self) -> Moments:
        """Return the moments; without a latent_std its mean is all there is to draw from."""
        import torch

        with _opened(self.latent) as file:
            mean = self._ordered(_array(self.latent, file, "latent_mean"))
            has_std = "latent_std" in file.files
            std = (
                self._ordered(_array(self.latent, file, "latent_std")) if has_std else torch.zeros_like(mean)
            )
            fps = _number(file, "fps")
        if self.fps is not None and fps is not None and abs(fps - self.fps) > 0.01:
            raise FormatError(
                f"{self.latent}: was made at {fps:g} fps, the recipe's video.fps is {self.fps:g}. Encode it "
                "again, set video.fps, or dataset.fps: ignore."
            )
        if std.shape != mean.shape:
            raise FormatError(
                f"{self.latent}: latent_std {list(std.shape)} is not like latent_mean. Make it again."
            )
        return Moments(mean, std)

    def _ordered(self, tensor: Tensor) -> Tensor:
        if tensor.ndim == 5 and tensor.shape[0] == 1:
            tensor = tensor[0]
        if tensor.ndim == 4 and self.layout == "tchw":
            tensor = tensor.transpose(0, 1)
        if tensor.ndim != 4 or (self.shape is not None and tuple(tensor.shape) != self.shape):
            other = "cthw" if self.layout == "tchw" else "tchw"
            raise FormatError(
                f"{self.latent}: a latent {list(tensor.shape)} (read as {self.layout}); the recipe's video "
                f"asks for {list(self.shape or ('C', 'T', 'h', 'w'))}. Set video, or dataset.layout: {other}."
            )
        if not tensor.isfinite().all():
            raise FormatError(f"{self.latent}: holds values that are not finite. Encode the clip again.")
        return tensor.float().contiguous()


class NpzCache:
    """Rows of a CSV table whose latents lie in .npz files."""

    def __init__(self, cfg: NpzCacheConfig, deps: Deps | None = None):
        self.cfg = cfg
        self._spec = deps.spec if deps is not None else None

    def rows(self) -> tuple[Row, ...]:
        """Return the rows in file order. Raises FormatError with every bad line and missing file."""
        cfg = self.cfg
        path = required(cfg.path, "path")
        listing = Listing(path, cfg.latents)
        table = csv.reader(io.StringIO(read_utf8(path), newline=""), delimiter=cfg.delimiter, strict=True)
        try:
            header = [column.strip() for column in next(table, [])]
            for name in (cfg.video_column, cfg.caption_column):
                if name not in header:
                    raise FormatError(
                        f"{path}:1: no column {name!r} among {header}.{did_you_mean(name, header)} Name it "
                        "by dataset.video_column or dataset.caption_column."
                    )
            for cells in table:
                if cells and len(cells) == len(header):
                    self._add(listing, table.line_num, dict(zip(header, cells, strict=True)))
                elif cells:
                    listing.problem(table.line_num, f"has {len(cells)} cells, the header has {len(header)}.")
        except csv.Error as error:
            raise FormatError(
                f"{path}:{table.line_num}: not valid CSV: {error}. Check its quotes."
            ) from error
        return listing.finish()

    @property
    def scale_factor(self) -> float:
        """What a latent is multiplied by. Raises FormatError where nothing says it."""
        stated = None
        if self._spec is not None:
            stated = getattr(self._spec.config("autoencoder"), "scale_factor", self._spec.card.latent_scale)
        if not stated:
            raise FormatError("dataset: nothing says what to multiply latents by. Add `autoencoder`.")
        return float(stated)

    def unconditional(self) -> Text:
        """Return what stands for no prompt. Raises FormatError where the recipe names no file for it."""
        if self.cfg.unconditional is None:
            raise FormatError(
                "dataset.unconditional: training with text_dropout needs what stands for no prompt. Name its "
                ".npz file, or set task.text_dropout: 0."
            )
        return read_text(self.cfg.unconditional)

    def _add(self, listing: Listing, line: int, record: dict[str, str]) -> None:
        cfg, video = self.cfg, record[self.cfg.video_column].strip()
        caption = record[cfg.caption_column].strip()
        if not caption or not video:
            listing.problem(line, "a blank caption or video. Write it, or drop the row.")
            return
        name = str(Path(video).with_suffix(".npz"))
        latent = listing.media(name, line, "latents")
        text = listing.media(name, line, "embeddings", cfg.texts) if cfg.texts is not None else None
        if latent is None or (cfg.texts is not None and text is None):
            return
        fps = self._spec.video.fps if self._spec is not None and cfg.fps == "check" else None
        features = NpzFeatures(latent, text, self._shape(), cfg.layout, fps)
        listing.add(Row(f"{video}#{line}", (caption,), features=features), line)

    def _shape(self) -> tuple[int, ...] | None:
        if self._spec is None:
            return None
        video, strides = self._spec.video, STRIDES
        channels = self._spec.card.latent_channels or getattr(
            self._spec.config("autoencoder"), "latent_channels", None
        )
        if channels is None:
            return None
        frames = (video.frames - 1) // strides[0] + 1
        return channels, frames, video.height // strides[1], video.width // strides[2]


def read_text(path: Path) -> Text:
    """Return the embeddings (L,D) and mask (L,) of a file. Raises FormatError where they do not fit."""
    with _opened(path) as file:
        embeds, mask = _array(path, file, "text_emb"), _array(path, file, "mask")
    if embeds.ndim == 3 and embeds.shape[0] == 1:
        embeds = embeds[0]
    mask = mask.reshape(-1).bool()
    if embeds.ndim != 2 or len(embeds) != len(mask):
        raise FormatError(
            f"{path}: text_emb {list(embeds.shape)} and mask {list(mask.shape)}; expected (L,D) and (L,). "
            "Make it again."
        )
    return Text(embeds, mask)


def _opened(path: Path) -> Any:
    """Open an .npz file; nothing in it is executed."""
    import numpy as np

    try:
        file = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise FormatError(f"{path}: cannot be read as .npz: {error}. Make it again.") from error
    if not hasattr(file, "files"):
        raise FormatError(f"{path}: is a single array, not an .npz file. Make it again with numpy.savez.")
    return file


def _array(path: Path, file: Any, name: str) -> Tensor:
    import torch

    if name not in file.files:
        raise FormatError(f"{path}: has no {name!r}, but {', '.join(file.files)}. Make it again.")
    try:
        return torch.from_numpy(file[name])
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise FormatError(f"{path}: {name} cannot be read: {error}. Make it again.") from error


def _number(file: Any, name: str) -> float | None:
    """Return a stored number; None where there is none, such as the pickled None of an unknown fps."""
    try:
        return float(file[name].reshape(-1)[0]) if name in file.files else None
    except (ValueError, IndexError, TypeError):
        return None
