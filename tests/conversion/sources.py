"""Sources by name, running the command on them, and damaging them: shared by the tests of faults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from cvx_io import convert

SAT = "sat/t2v_2b/transformer"
SAT_FILE = "1/mp_rank_00_model_states.pt"
VAE = "sat/vae/3d-vae.pt"
HF = "sat/t2v_2b/hf/transformer"
HF_FILE = "diffusion_pytorch_model.safetensors"
MM = "megatron/golden/sat_i2v10_L2/tp2_pp2_1-1"
MM_FILE = "release/mp_rank_01_000/model_optim_rng.pt"
MM_FIRST = "release/mp_rank_00_000/model_optim_rng.pt"
TRACKER = "latest_checkpointed_iteration.txt"
LZ = "megatron/src/layerzero_t2v15_L4_w2"
LZ_FILE = "iter_0000200/model_1.pt"
LORA = "sat/lora/transformer"
LORA_HF = "sat/lora/hf/pytorch_lora_weights.safetensors"
MM_LORA = "megatron/src/lora_sat_t2v15_L4__tp2_pp1_r8_a4"
WITHIN = "model.diffusion_model."
"""What the names of a SAT transformer start with."""


def convert_main(words: list[str]) -> int:
    """Run the command; argparse's own refusals count as exit codes."""
    try:
        return convert.main(words)
    except SystemExit as stop:
        return int(str(stop.code))


def says(error: str, *parts: object) -> None:
    """Assert that an error message contains all parts."""
    for part in parts:
        assert str(part) in error, f"{part} is not in: {error}"


def cut(path: Path, keep: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def edit(path: Path, change: Callable[[dict[str, Any]], object], key: str | None = None) -> None:
    """Change what a .safetensors or .pt file holds, or holds under a key."""
    if path.suffix == ".safetensors":
        state = load_file(path)
        change(state)
        save_file(state, path)
        return
    tree = torch.load(path, weights_only=False)
    change(tree if key is None else tree[key])
    torch.save(tree, path)
