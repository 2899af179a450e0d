"""What every format must satisfy: reads return what was written, lazily; a failed write leaves nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cvx_core.errors import FormatError
from cvx_core.interfaces import TensorInfo, Tensors
from cvx_core.registry import Registry
from cvx_core.testing import Suite

MIB = 2**20
STREAM = 32
"""Number of 4 MiB tensors in the streams whose memory is measured."""


def suite(
    name: str,
    *,
    file: str = "model",
    config: Mapping[str, Any] | None = None,
    dtypes: Iterable[torch.dtype] = (torch.float16, torch.bfloat16, torch.float32, torch.int64),
    memory: int = 32 * MIB,
    **fields: Any,
) -> Suite:
    """Return the checks of format `name`, made with `fields` on top of its preset.

    file: what to write below a temporary folder; config: the model config given to write, {} by default;
    dtypes: those the format must keep; memory: bytes that reading or writing a stream of 128 MiB may hold.
    """
    config = {} if config is None else config
    example = _example(dtypes)

    def made() -> Any:
        component = Registry.discover().get("format", name)
        assert component.config is not None
        return component.load()(component.config(**{**component.preset, **fields}), None)

    def written(folder: Path) -> Path:
        made().write(folder / file, as_tensors(example), None, config)
        return folder / file

    def reading_returns_what_was_written(tmp_path: Path) -> None:
        _assert_same(dict(made().open(written(tmp_path)).read()), example)

    def index_tells_shapes_and_dtypes(tmp_path: Path) -> None:
        expected = {
            key: TensorInfo(tuple(value.shape), str(value.dtype).removeprefix("torch."))
            for key, value in example.items()
        }
        assert made().open(written(tmp_path)).index == expected

    def only_what_is_asked_for_is_read(tmp_path: Path) -> None:
        path = written(tmp_path)
        for key in example:
            _assert_same(dict(made().open(path).read([key])), {key: example[key]})
        assert list(made().open(path).read([])) == []

    def an_unknown_name_is_refused(tmp_path: Path) -> None:
        path = written(tmp_path)
        with pytest.raises(FormatError, match="no-such"):
            list(made().open(path).read(["no-such-tensor"]))

    def writing_again_replaces(tmp_path: Path) -> None:
        path = written(tmp_path)
        made().write(path, as_tensors({"a.weight": torch.ones(2)}), None, config)
        _assert_same(dict(made().open(path).read()), {"a.weight": torch.ones(2)})

    def a_failed_write_leaves_nothing(tmp_path: Path) -> None:
        source = as_tensors(example)

        def load(key: str) -> Tensor:
            if key == list(example)[-1]:
                raise ConnectionError("the source broke off")
            return source.load(key)

        with pytest.raises(ConnectionError):
            made().write(tmp_path / file, replace(source, load=load), None, config)
        assert list(tmp_path.iterdir()) == []

    def a_source_that_changes_is_refused(tmp_path: Path) -> None:
        other = replace(as_tensors(example), load=lambda _: torch.ones(17, 19))
        with pytest.raises(FormatError, match="announced"):
            made().write(tmp_path / file, other, None, config)
        assert list(tmp_path.iterdir()) == []

    def its_own_files_are_accepted_by_it_alone(tmp_path: Path) -> None:
        path = written(tmp_path)
        accepting = [
            component.name
            for component, _ in Registry.discover().all("format")
            if component.config is not None and component.load()(component.config(), None).accepts(path)
        ]
        assert accepting == [name]

    def strange_paths_are_not_accepted(tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("nothing of the kind")
        for path in (
            tmp_path,
            tmp_path / "notes.txt",
            tmp_path / "missing",
            tmp_path / "missing.safetensors",
        ):
            assert not made().accepts(path)

    def memory_is_bounded(tmp_path: Path) -> None:
        peak = _Peak()
        made().write(tmp_path / file, peak.watch(_stream()), None, config)
        assert peak.growth <= memory, f"writing held {peak.growth / MIB:.0f} MiB"
        peak = _Peak()
        for _, tensor in peak.watch(made().open(tmp_path / file)).read():
            assert tensor.sum() == tensor.numel()
        assert peak.growth <= memory, f"reading held {peak.growth / MIB:.0f} MiB"

    return Suite.of(
        name if file == "model" else f"{name}({file})",
        reading_returns_what_was_written,
        index_tells_shapes_and_dtypes,
        only_what_is_asked_for_is_read,
        an_unknown_name_is_refused,
        writing_again_replaces,
        a_failed_write_leaves_nothing,
        a_source_that_changes_is_refused,
        its_own_files_are_accepted_by_it_alone,
        strange_paths_are_not_accepted,
        memory_is_bounded,
    )


class _Peak:
    """The largest growth of this process's private memory while a stream is consumed, in bytes."""

    def __init__(self) -> None:
        self.start, self.growth = _private_bytes(), 0

    def watch(self, tensors: Tensors) -> Tensors:
        def load(name: str) -> Tensor:
            self.growth = max(self.growth, _private_bytes() - self.start)
            return tensors.load(name)

        return replace(tensors, load=load)


def _private_bytes() -> int:
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("private memory is measured through /proc/self/status")
    line = next(line for line in status.read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def as_tensors(state: Mapping[str, Tensor]) -> Tensors:
    """Return a state dict as a source of tensors."""
    index = {
        name: TensorInfo(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        for name, tensor in state.items()
    }
    return Tensors(index, lambda name: state[name])


def _stream() -> Tensors:
    names = [f"blocks.{i}.weight" for i in range(STREAM)]
    return Tensors(dict.fromkeys(names, TensorInfo((MIB,), "float32")), lambda _: torch.ones(MIB))


def _example(dtypes: Iterable[torch.dtype]) -> dict[str, Tensor]:
    """Return tensors of every dtype and rank, empty ones and a transposed view among them."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for dtype in dtypes:
        at = f"blocks.0.{str(dtype).removeprefix('torch.')}"
        state[f"{at}.weight"] = (torch.rand((3, 5), generator=generator) * 100).to(dtype)
        state[f"{at}.view"] = state[f"{at}.weight"].t()
        state[f"{at}.bias"] = (torch.rand(7, generator=generator) * 100).to(dtype)
        state[f"{at}.scalar"] = torch.tensor(3).to(dtype)
        state[f"{at}.empty"] = torch.zeros((0, 2), dtype=dtype)
    return state


def _assert_same(got: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert torch.equal(got[name], tensor), name
