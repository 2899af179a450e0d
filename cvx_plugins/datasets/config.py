"""Configs of the built-in datasets."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from cvx_core import Config
from cvx_core.config import InputPath, NonNegative, Positive
from cvx_core.errors import Problem

if TYPE_CHECKING:
    from cvx_core.spec import Spec

Key = Annotated[str, Field(min_length=1)]


class _IndexConfig(Config):
    """Fields of a dataset kept in one index file."""

    path: InputPath | None = None
    """The index file, UTF-8."""
    root: InputPath | None = None
    """Folder that relative media paths start from; by default the folder of the index file."""

    def check(self, spec: Spec) -> Iterable[Problem]:
        if self.path is None:
            yield Problem("path", "is missing; name the index file.")


class JsonlConfig(_IndexConfig):
    """Fields of `jsonl`. Other keys of a record are kept in the row's meta."""

    video_key: Key = "file"
    """Key of the video's path."""
    caption_key: Key = "captions"
    """Key of the caption: a string, or a list of which one is drawn each epoch."""
    image_key: Key = "image"
    """Key of the first frame's path; a record need not have it."""
    id_key: Key = "id"
    """Key of a unique name of the row; without it the row is named by its file and line."""


class CsvConfig(_IndexConfig):
    """Fields of `csv`. Other columns are kept in the row's meta."""

    video_column: Key = "video"
    """Column of the video's path."""
    caption_column: Key = "caption"
    """Column of the caption."""
    image_column: Key = "image"
    """Column of the first frame's path; a table need not have it."""
    id_column: Key = "id"
    """Column of a unique name of the row; without it the row is named by its file and line."""
    delimiter: Annotated[str, Field(min_length=1, max_length=1)] = ","
    """What separates the columns."""


class AnnotationConfig(_IndexConfig):
    """Fields of `annotation`: JSON with records at any depth, in lists or under names."""

    video_key: Key = "path"
    """Key of the video's path in a record."""
    caption_key: Key = "cap"
    """Key of the caption: a string, or a list of which one is drawn each epoch."""


class FolderConfig(Config):
    """Fields of `folder`: clips and images, each with a text file of the same stem beside it."""

    path: InputPath | None = None
    """The folder; those inside it are searched too."""
    suffixes: tuple[Key, ...] = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".png", ".jpg", ".jpeg", ".webp")
    """Endings of media files; other files are not looked at."""
    caption_suffix: Key = ".txt"
    """Ending of the text files."""

    def check(self, spec: Spec) -> Iterable[Problem]:
        if self.path is None:
            yield Problem("path", "is missing; name the folder.")


class HfFolderConfig(Config):
    """Fields of `hf-folder`: a folder with metadata.jsonl or metadata.csv, as on the Hugging Face hub."""

    path: InputPath | None = None
    """The folder; file names start from it."""
    caption_key: Key = "text"
    """Key, or column, of the caption."""
    file_key: Key = "file_name"
    """Key, or column, of the file's name."""

    def check(self, spec: Spec) -> Iterable[Problem]:
        if self.path is None:
            yield Problem("path", "is missing; name the folder.")


class WebdatasetConfig(Config):
    """Fields of `webdataset`: tar shards whose members with one stem make a row. Nothing is unpacked."""

    path: InputPath | None = None
    """A shard, or a folder of shards (*.tar)."""
    suffixes: tuple[Key, ...] = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".png", ".jpg", ".jpeg", ".webp")
    """Endings of media members."""
    caption_suffix: Key = ".txt"
    """Ending of the members with captions; .json ones are objects, see `caption_key`."""
    caption_key: Key = "caption"
    """Key of the caption where caption_suffix is .json."""

    def check(self, spec: Spec) -> Iterable[Problem]:
        if self.path is None:
            yield Problem("path", "is missing; name a shard or a folder of shards.")


class PromptsVideosConfig(Config):
    """Fields of `prompts-videos`."""

    prompts: InputPath | None = None
    """Text file, one prompt a line."""
    videos: InputPath | None = None
    """Text file, one video path a line; as many lines as prompts."""
    root: InputPath | None = None
    """Folder that relative video paths start from; by default the folder of `videos`."""

    def check(self, spec: Spec) -> Iterable[Problem]:
        for name in ("prompts", "videos"):
            if getattr(self, name) is None:
                yield Problem(name, "is missing; name a text file.")


class PromptsConfig(Config):
    """Fields of `prompts`: the prompts as a file or in the recipe, and first frames likewise."""

    path: InputPath | None = None
    """Text file, one prompt a line."""
    prompts: tuple[str, ...] = ()
    """Prompts given in the recipe, instead of `path`."""
    images_path: InputPath | None = None
    """Text file, one image path a line, as many as prompts; relative paths start from its folder."""
    images: tuple[InputPath, ...] = ()
    """Images given in the recipe, as many as prompts, instead of `images_path`."""

    def check(self, spec: Spec) -> Iterable[Problem]:
        if (self.path is None) == (not self.prompts):
            yield Problem("path", "give either a text file as `path`, or a list as `prompts`.")
        if self.images_path is not None and self.images:
            yield Problem("images_path", "give either a text file as `images_path`, or a list as `images`.")


class SyntheticConfig(Config):
    """Fields of `synthetic`."""

    rows: Positive = 8
    """Number of rows."""
    seed: NonNegative = 0
    """Which shapes, colours and motions."""
