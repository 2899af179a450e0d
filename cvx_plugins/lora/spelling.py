"""How LoRA files spell modules and factors, and going from there to canonical names and back. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cvx_core import FormatError
from cvx_core.interfaces import Tensors
from cvx_io.lora_state import ALPHA, A, B, Made, assembled, is_lora, modules
from cvx_io.regroup import listed
from cvx_io.tensors.header import read_header

DIFFUSERS, PEFT, COMFYUI, KOHYA = "transformer.", "base_model.model.", "diffusion_model.", "lora_unet_"
"""What every name in a file of each layout starts with."""

ENDS = {
    ".lora_A.weight": A,
    ".lora_A.default.weight": A,
    ".lora_down.weight": A,
    ".lora.down.weight": A,
    ".lora_B.weight": B,
    ".lora_B.default.weight": B,
    ".lora_up.weight": B,
    ".lora.up.weight": B,
    ".alpha": ALPHA,
}
"""{what follows the module in files: what does in canonical names}; every layout is read in any of these."""


@dataclass(frozen=True)
class Spelling:
    """One layout's names. ends: {canonical end: the one written}; what is not in it is not written.

    to_foreign, to_canonical: spell one module; both raise FormatError on one they do not know.
    """

    prefix: str
    ends: Mapping[str, str] = field(default_factory=lambda: {A: A, B: B})
    to_foreign: Callable[[str], str] = str
    to_canonical: Callable[[str], str] = str

    def read(self, stored: Tensors, where: str) -> Tensors:
        """Return a file's tensors under canonical names. Raises FormatError on names of other tensors."""
        names: dict[str, str] = {}
        strange = []
        for foreign in stored.index:
            if (name := self._canonical(foreign, where)) is None:
                strange.append(foreign)
            elif name in names:
                raise FormatError(
                    f"{where}: {names[name]!r} and {foreign!r} are the same. Remove one of them."
                )
            else:
                names[name] = foreign
        if strange:
            raise FormatError(
                f"{where}: {len(strange)} names are not of a plain LoRA in this layout: {listed(strange)}. "
                f"Expected {self.prefix}<module> with lora_A, lora_B (lora_down, lora_up) and alpha only."
            )
        found = assembled(stored, {name: _same(stored, foreign) for name, foreign in names.items()})
        modules(found, where)
        return found

    def write(self, tensors: Tensors) -> Tensors:
        """Return canonical tensors under this layout's names."""
        names = {
            f"{self.prefix}{self.to_foreign(module)}{end}": module + canonical
            for module in modules(tensors)
            for canonical, end in self.ends.items()
        }
        return assembled(tensors, {foreign: _same(tensors, name) for foreign, name in names.items()})

    def _canonical(self, foreign: str, where: str) -> str | None:
        for end, canonical in ENDS.items():
            if foreign.startswith(self.prefix) and foreign.endswith(end):
                try:
                    return self.to_canonical(foreign[len(self.prefix) : -len(end)]) + canonical
                except FormatError as error:
                    raise FormatError(f"{where}: {foreign!r}: {error}") from None
        return None


def prefix_in(path: Path) -> str | None:
    """Return the layout's prefix that all names in a LoRA file start with; None for any other file."""
    if path.suffix != ".safetensors" or not path.is_file():
        return None
    try:
        names = list(read_header(path).tensors)
    except FormatError:
        return None
    if not is_lora(names):
        return None
    prefixes = (DIFFUSERS, PEFT, COMFYUI, KOHYA)
    return next((prefix for prefix in prefixes if all(name.startswith(prefix) for name in names)), None)


def _same(tensors: Tensors, name: str) -> Made:
    return Made(tensors.index[name], partial(tensors.load, name), [name])
