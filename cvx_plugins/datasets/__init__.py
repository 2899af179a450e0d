"""Built-in datasets: lists of what exists. Neither this file nor listing the rows imports torch."""

from __future__ import annotations

from collections.abc import Iterable

from cvx_core import Component, hookimpl
from cvx_plugins.datasets import cached_config
from cvx_plugins.datasets.config import (
    AnnotationConfig,
    CsvConfig,
    FolderConfig,
    HfFolderConfig,
    JsonlConfig,
    PromptsConfig,
    PromptsVideosConfig,
    SyntheticConfig,
    WebdatasetConfig,
)


@hookimpl
def cvx_components() -> Iterable[Component]:
    yield Component(
        "dataset",
        "jsonl",
        JsonlConfig,
        "cvx_plugins.datasets.tables:JsonLines",
        summary="one JSON object a line: video, captions, image",
    )
    yield Component(
        "dataset",
        "csv",
        CsvConfig,
        "cvx_plugins.datasets.tables:CsvTable",
        summary="a table with a header line",
    )
    yield Component(
        "dataset",
        "annotation",
        AnnotationConfig,
        "cvx_plugins.datasets.annotation:Annotation",
        summary="JSON with records at any depth, such as annotation.json",
    )
    yield Component(
        "dataset",
        "folder",
        FolderConfig,
        "cvx_plugins.datasets.folders:Folder",
        summary="clips with text files of the same stem",
    )
    yield Component(
        "dataset",
        "hf-folder",
        HfFolderConfig,
        "cvx_plugins.datasets.folders:HfFolder",
        summary="a folder with metadata.jsonl or metadata.csv",
    )
    yield Component(
        "dataset",
        "webdataset",
        WebdatasetConfig,
        "cvx_plugins.datasets.shards:Webdataset",
        summary="tar shards, read without unpacking",
    )
    yield Component(
        "dataset",
        "prompts-videos",
        PromptsVideosConfig,
        "cvx_plugins.datasets.texts:PromptsVideos",
        summary="two text files, paired line by line",
    )
    yield Component(
        "dataset",
        "prompts",
        PromptsConfig,
        "cvx_plugins.datasets.texts:Prompts",
        summary="prompts to sample from, with first frames for image-to-video",
    )
    yield Component(
        "dataset",
        "synthetic",
        SyntheticConfig,
        "cvx_plugins.datasets.synthetic:Synthetic",
        summary="moving shapes with captions, drawn on the fly",
    )
    yield from cached_config.components()
