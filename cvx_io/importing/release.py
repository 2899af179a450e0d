"""What the released models were made for, as far as a source may train on something else."""

from __future__ import annotations

from collections.abc import Sequence

from cvx_io.importing.draft import Draft

PRECISIONS = {"bf16": "bfloat16", "fp16": "bfloat16", "fp32": "float32", "no": "float32"}
FLOAT16 = (
    "float16 would lose small gradients, for losses are not scaled here; what is trained is kept in float32 "
    "too"
)


def is_1_5(name: str) -> bool:
    """Tell whether a model's name is of 1.5."""
    return "1.5" in name


def frames(draft: Draft, name: str, counts: Sequence[int]) -> None:
    """Allow frame counts that the release was not made for, where the source trains on them."""
    step, most = (16, 161) if is_1_5(name) else (8, 49)
    card = {}
    if any((count - 1) % step for count in counts if count > 1) and not any(
        (count - 1) % 4 for count in counts
    ):
        card["frames_step"] = 4
    if max(counts) > most:
        card["frames_max"] = max(counts)
    for key, value in card.items():
        draft.put(f"predictor.card.{key}", value)
        text = f"predictor.card.{key}: {value}; the model was released for {step}*N+1 up to {most}"
        draft.note("stated", "frames", list(counts), text)


def text_length(draft: Draft, setting: str, name: str, length: int) -> None:
    """Put the number of text tokens, where the release has another."""
    if length != (224 if is_1_5(name) else 226):
        draft.put("predictor.text_length", length)
        draft.note("mapped", setting, length, f"predictor.text_length: {length}")
    else:
        draft.note("mapped", setting, length, "as the model was released")


def dtype(draft: Draft, setting: str, precision: str, text: str) -> None:
    """Put the precision; float16 becomes bfloat16 with weights kept in float32 too.

    setting: of the source, a key of PRECISIONS being its value; text: what is to be said of the others.
    """
    draft.put("dtype", PRECISIONS[precision])
    if precision == "fp16":
        draft.put("optimizer.master_weights", "float32")
        draft.note(
            "differs", setting, precision, f"dtype: bfloat16, optimizer.master_weights: float32; {FLOAT16}"
        )
    else:
        draft.note("mapped", setting, precision, f"dtype: {PRECISIONS[precision]}{text}")
