"""Settings of MindSpeed-MM that have one value here, follow from others, or have no effect."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cvx_core.errors import FormatError
from cvx_io.importing.draft import Draft
from cvx_io.importing.mindspeed_training import DATA, MODEL

FIXED: Mapping[str, Any] = {
    "predictor.attention_bias": True,
    "predictor.activation_fn": "gelu-approximate",
    "predictor.norm_type": "qk_ln",
    "predictor.norm_elementwise_affine": True,
    "predictor.norm_eps": 1e-5,
    "predictor.concat_text_embed": True,
    "predictor.dropout": 0.0,
    "predictor.out_channels": 16,
    "predictor.interpolation_scale": [1.0, 1.0, 1.0],
    "text_encoder.use_attention_mask": False,
    "ae.z_channels": 16,
    "ae.num_res_blocks": 3,
    "ae.hidden_size_mult": [1, 2, 2, 4],
    "ae.use_quant_layer": False,
    "ae.encoder_gather_norm": True,
    "ae.decoder_gather_norm": True,
    "ae.i2v_processor.noised_image_all_concat": False,
}
"""Values of the model json that this family has one of here."""
BOOKKEEPING = (
    "frames", "resolution", "allow_internal_format", "load_video_features", "load_text_features",
    "predictor.model_id", "predictor.from_pretrained", "predictor.dtype", "predictor.input_size",
    "predictor.patch_size", "predictor.in_channels", "predictor.use_rope", "predictor.num_embeds_ada_norm",
    "predictor.cross_attention_dim", "predictor.caption_channels", "diffusion.model_id",
    "text_encoder.model_id", "text_encoder.hub_backend", "text_encoder.dtype",
    "text_encoder.low_cpu_mem_usage",
    "ae.model_id", "ae.dtype", "ae.conv_padding", "ae.i2v_processor.processor_id",
)  # fmt: skip
"""Settings that follow from others here, or have no effect there."""
PLACEHOLDERS = (
    "--num-layers", "--hidden-size", "--num-attention-heads", "--seq-length", "--max-position-embeddings",
    "--attention-dropout", "--hidden-dropout", "--tokenizer-type", "--vocab-size",
    "--position-embedding-type", "--rotary-base", "--swiglu", "--no-masked-softmax-fusion",
)  # fmt: skip
"""Flags of language models, which older scripts state."""


def rest(draft: Draft) -> None:
    """Take what is left. Raises FormatError for a value that this family has not."""
    for name, only in FIXED.items():
        given = draft.has(f"{MODEL}{name}")
        value = draft.pop(f"{MODEL}{name}", lambda value: value, only)
        if value != only:
            raise FormatError(
                f"{draft.source}: {name} is {value!r} in the model json; it is always {only!r} here."
            )
        if given:
            draft.note("mapped", f"{MODEL}{name}", value, "the only value here")
    for name in (f"{MODEL}{name}" for name in BOOKKEEPING):
        if draft.has(name):
            value = draft.pop(name, lambda value: value)
            draft.note("mapped", name, value, "nothing: it follows from others, or has no effect there")
    blocks = (f"{MODEL}ae.encoder_", f"{MODEL}ae.decoder_")
    for name in [name for name in draft.given if name.startswith(blocks)]:
        value = draft.pop(name, lambda value: value)
        draft.note("mapped", name, value, "the blocks of cogvideox-vae, whatever is named")
    draft.drop(
        [
            "--mm-tool",
            "--qk-layernorm",
            "--no-gradient-accumulation-fusion",
            "--overlap-grad-reduce",
            "--overlap-param-gather",
            "--distributed-backend",
            "--ckpt-format",
            "--optimization-level",
            "--use-multiparameter-pipeline-model-parallel",
        ],
        "is not needed, and changes no result",
    )
    draft.drop(["--allow-tf32"], "changes nothing in bfloat16; float32 is computed in float32")
    draft.drop(["--no-load-optim", "--no-load-rng"], "weights alone are read; task.resume goes on from a run")
    draft.drop(["--no-save-optim", "--no-save-rng"], "checkpoints are always complete")
    draft.drop(["--eval-interval", "--eval-iters"], "measure with the task `evaluate`")
    draft.drop(PLACEHOLDERS, "the model json holds; it is there for Megatron's own checks")
    draft.drop([f"{DATA}dataset_param.preprocess_parameters.dataloader_num_workers"], "--num-workers holds")
    draft.drop(["--ai-framework"], "belongs to the source")
