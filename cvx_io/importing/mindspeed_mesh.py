"""How MindSpeed-MM's flags share the work among devices."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cvx_core.errors import FormatError
from cvx_io.importing.draft import Draft, whole
from cvx_io.importing.launcher import Launch
from cvx_io.importing.mindspeed_training import MODEL
from cvx_io.importing.shell import find_file

LAYERZERO_PRECISIONS = {"bf16": "bfloat16", "fp32": "float32"}


def mesh(draft: Draft, launch: Launch, script: Path) -> int:
    """Add the strategies; return how many ranks read different rows."""
    world = launch.devices(draft)
    sizes = {axis: draft.pop(f"--{axis}-model-parallel-size", whole, 1) for axis in ("tensor", "pipeline")}
    context = draft.pop("--context-parallel-size", whole, 1)
    shared = sizes["tensor"] * sizes["pipeline"] * context
    if world % shared:
        raise FormatError(
            f"{draft.source}: {world} devices are no multiple of tp x pp x cp, which is {shared}."
        )
    _data_axis(draft, world // shared, script)
    sequence = draft.pop("--sequence-parallel", bool, False)
    if sizes["tensor"] > 1:
        draft.strategy("tp", size=sizes["tensor"], sequence=sequence)
    draft.note(
        "mapped",
        "--tensor-model-parallel-size, --sequence-parallel",
        [sizes["tensor"], sequence],
        "parallel: tp" if sizes["tensor"] > 1 else "nothing with one rank",
    )
    stages = draft.pop(f"{MODEL}predictor.pipeline_num_layers", lambda value: value)
    if sizes["pipeline"] > 1:
        draft.strategy("pp", **({"stages": stages} if stages else {"size": sizes["pipeline"]}))
    draft.note(
        "mapped",
        "--pipeline-model-parallel-size",
        sizes["pipeline"],
        "parallel: pp" if sizes["pipeline"] > 1 else "nothing with one rank",
    )
    _context(draft, context)
    if draft.pop(f"{MODEL}enable_encoder_dp", bool, False):
        alone = sizes["tensor"] * context == 1
        if not alone:
            draft.strategy("encoder-dp")
        draft.note(
            "mapped",
            f"{MODEL}enable_encoder_dp",
            True,
            "nothing: no ranks see the same rows" if alone else "parallel: encoder-dp",
        )
    rounds = draft.pop(f"{MODEL}encoder_offload_interval", whole, 1)
    if rounds > 1:
        draft.strategy("interleave", rounds=rounds)
        draft.note(
            "mapped", f"{MODEL}encoder_offload_interval", rounds, f"parallel: interleave, rounds: {rounds}"
        )
    _recompute(draft)
    return world // shared


def _data_axis(draft: Draft, ranks: int, script: Path) -> None:
    sharded = draft.pop("--use-distributed-optimizer", bool, False)
    if draft.pop("--layerzero", bool, False):
        draft.strategy("layerzero", **_layerzero(draft, ranks, script))
        if sharded:
            draft.note(
                "mapped", "--use-distributed-optimizer", True, "layerzero shares the state out as well"
            )
        return
    draft.drop(["--layerzero-config"], "is read with --layerzero alone")
    if ranks > 1:
        use = "zero1" if sharded else "ddp"
        draft.strategy(use)
        draft.note("mapped", "--use-distributed-optimizer", sharded, f"parallel: {use}")
    elif sharded:
        draft.note("mapped", "--use-distributed-optimizer", True, "nothing with one data rank")


def _layerzero(draft: Draft, ranks: int, script: Path) -> dict[str, Any]:
    """Return the strategy's fields, from the file that the source names. Raises FormatError."""
    name = draft.pop("--layerzero-config")
    if name is None:
        raise FormatError(
            f"{draft.source}: --layerzero without --layerzero-config. Add it: its file says how many ranks "
            "share parameters."
        )
    path = find_file(name, script)
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FormatError(f"{path}: cannot be read as YAML: {error}. Correct it.") from error
    if not isinstance(given, dict):
        raise FormatError(f"{path}: is no mapping, such as `zero3_size: 8`. Correct it.")
    draft.note("mapped", "--layerzero, --layerzero-config", name, "parallel: layerzero, from the file")
    fields: dict[str, Any] = {"zero3_size": int(given.pop("zero3_size", 8))}
    if ranks % fields["zero3_size"]:
        raise FormatError(
            f"{path}: zero3_size is {fields['zero3_size']}, which does not divide the {ranks} data ranks. "
            "Correct it."
        )
    for key in ("param_dtype", "reduce_dtype"):
        value = given.pop(key, None)
        if value is not None and value not in LAYERZERO_PRECISIONS:
            expected = ", ".join(LAYERZERO_PRECISIONS)
            raise FormatError(f"{path}: {key} is {value!r}; expected {expected}. Correct it.")
        if value is not None:
            fields[key] = LAYERZERO_PRECISIONS[value]
    if "forward_prefetch" in given:
        fields["forward_prefetch"] = bool(given.pop("forward_prefetch"))
    ignored = [str(one) for one in given.pop("ignored_modules", None) or []]
    ours = [one.removeprefix("predictor.") for one in ignored if one.startswith("predictor.")]
    if ours:
        fields["ignored_modules"] = ours
    kept = [one for one in ignored if not one.startswith("predictor.")]
    if kept:
        text = "not trained, and whole on every rank here too"
        draft.note("mapped", f"ignored_modules of {name}", kept, text)
    for key, value in given.items():
        text = "has no counterpart: blocks are units, and gathering keeps one ahead"
        draft.note("no counterpart", f"{key} of {name}", value, text)
    shown = ", ".join(f"{key}: {value}" for key, value in fields.items())
    draft.note("mapped", f"fields of {name}", "", f"parallel: layerzero, {shown}")
    return fields


def _context(draft: Draft, size: int) -> None:
    algorithm = draft.pop("--context-parallel-algo", str, "ulysses_cp_algo")
    inner = draft.pop("--ulysses-degree-in-cp", whole, 1)
    if size > 1:
        fields = {
            "ulysses_cp_algo": {"ulysses": size},
            "megatron_cp_algo": {"ring": size},
            "hybrid_cp_algo": {"ulysses": inner, "ring": size // inner},
        }
        if algorithm not in fields:
            raise FormatError(
                f"{draft.source}: --context-parallel-algo is {algorithm!r}; expected {', '.join(fields)}."
            )
        draft.strategy("cp", **fields[algorithm])
    draft.note(
        "mapped",
        "--context-parallel-size, --context-parallel-algo",
        [size, algorithm],
        "parallel: cp" if size > 1 else "nothing with one rank",
    )
    draft.drop(
        ["--cp-window-size", "--use-cp-send-recv-overlap", "--megatron-cp-in-bnsd", "--attention-mask-type"],
        "one ring, overlapped; it changes no result",
    )


def _recompute(draft: Draft) -> None:
    granularity = draft.pop("--recompute-granularity")
    method, layers = draft.pop("--recompute-method"), draft.pop("--recompute-num-layers", whole)
    if granularity is not None:
        draft.strategy("recompute", mode="full" if granularity == "full" else "selective")
        draft.note(
            "mapped",
            "--recompute-granularity, --recompute-method, --recompute-num-layers",
            [granularity, method, layers],
            "parallel: recompute, of every block; results are the same",
        )
