"""LoRA: the adapter, and files of other tools. What their tensors mean is in cvx_io/lora_state.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from cvx_core import Component, Config, hookimpl
from cvx_core.config import InputPath
from cvx_plugins.lora.adapter_config import LoraConfig, MergedLoraConfig


class LoraFileConfig(Config):
    """LoRA weights with an alpha for every module; a file that states none needs one to be given."""

    holds: ClassVar[str] = "lora"
    canonical: ClassVar[bool] = True  # modules have our names, behind what each layout puts before them

    path: InputPath | None = None
    """The file, or the folder that holds it. Needed to read."""


class LoraSingleFileConfig(LoraFileConfig):
    """LoRA weights in one .safetensors file."""

    files: ClassVar[tuple[str, ...]] = (".safetensors",)
    is_file: ClassVar[bool] = True


@hookimpl
def cvx_components() -> Iterable[Component]:
    def component(name: str, target: str, summary: str, config: type[Config] = LoraFileConfig) -> Component:
        return Component("format", name, config, f"cvx_plugins.lora.{target}", summary=summary)

    yield component(
        "diffusers-lora",
        "diffusers_file:diffusers_lora",
        "LoRA that diffusers pipelines load: pytorch_lora_weights.safetensors, alphas in its metadata",
    )
    yield component(
        "peft",
        "peft_folder:peft_folder",
        "LoRA folder of PEFT: adapter_config.json with adapter_model.safetensors",
    )
    yield component(
        "comfyui",
        "single_file:comfyui",
        "LoRA file of ComfyUI: diffusion_model.* with alpha tensors",
        LoraSingleFileConfig,
    )
    yield component(
        "kohya",
        "single_file:kohya",
        "LoRA file in kohya's naming: lora_unet_* with alpha tensors",
        LoraSingleFileConfig,
    )
    yield Component(
        "adapter",
        "lora",
        LoraConfig,
        "cvx_plugins.lora.adapter:Lora",
        summary="low-rank changes of linear layers; everything else is frozen",
    )
    yield Component(
        "adapter",
        "merged-lora",
        MergedLoraConfig,
        "cvx_plugins.lora.merged:MergedLora",
        summary="LoRA weights of a file, merged into the predictor's while these are loaded",
    )
