"""Module names with underscores for dots, as kohya's scripts write them, and turning them back exactly.

A name is read as a sequence of known components, so that an underscore inside one is not taken for a dot.
"""

from __future__ import annotations

import re

from cvx_core import FormatError
from cvx_io.regroup import listed

COMPONENTS = (
    "transformer_blocks.{i}",
    "attn1",
    "to_q",
    "to_k",
    "to_v",
    "to_out.{i}",
    "norm1",
    "norm2",
    "norm_out",
    "linear",
    "linear_1",
    "linear_2",
    "ff",
    "net.{i}",
    "proj",
    "proj_out",
    "patch_embed",
    "text_proj",
    "time_embedding",
    "ofs_embedding",
)
"""What the names of linear layers consist of. A number belongs to the component before it."""

_PATTERNS = [
    re.compile(re.escape(component).replace(r"\.", "_").replace(r"\{i\}", r"(\d+)") + r"(?:_|$)")
    for component in COMPONENTS
]


def to_kohya(module: str) -> str:
    """Return a module's name without dots. Raises FormatError where that could not be turned back."""
    spelled = module.replace(".", "_")
    if _readings(spelled) != [module]:
        raise FormatError(
            f"kohya's naming has no dots, and {module!r} could not be told from {spelled!r} again. "
            "Write another LoRA layout."
        )
    return spelled


def from_kohya(spelled: str) -> str:
    """Return the module's name with dots. Raises FormatError where there is none, or more than one."""
    readings = _readings(spelled)
    if len(readings) != 1:
        said = f"could be {listed(readings)}" if readings else f"does not consist of {', '.join(COMPONENTS)}"
        raise FormatError(f"the module {spelled!r} {said}. Is the LoRA for another model?")
    return readings[0]


def _readings(spelled: str) -> list[str]:
    """Return all names with dots that known components make of a name without."""
    found = []
    for component, pattern in zip(COMPONENTS, _PATTERNS, strict=True):
        if match := pattern.match(spelled):
            first = component.format(i=match[1]) if match.groups() else component
            rest = spelled[match.end() :]
            if rest:
                found += [f"{first}.{reading}" for reading in _readings(rest)]
            elif not match[0].endswith("_"):
                found.append(first)
    return found
