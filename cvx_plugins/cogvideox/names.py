"""What other worlds call the tensors of CogVideoX, how they fuse and split them. Our names are diffusers'.

Sources: THUDM/CogVideo sat/ (names in released checkpoints), MindSpeed-MM examples/cogvideox (converters).
"""

from __future__ import annotations

from collections.abc import Iterable

from cvx_core import Component
from cvx_io.rename import Cat, Chunks, Drop, Names, Rename

BLOCK = "transformer_blocks.{i}"
QKV = [f"{BLOCK}.attn1.to_{x}.{{p}}" for x in "qkv"]
MODULATION = {
    f"{BLOCK}.norm1.linear.{{p}}": (0, 1, 2, 6, 7, 8),
    f"{BLOCK}.norm2.linear.{{p}}": (3, 4, 5, 9, 10, 11),
}
"""Twelve chunks: shift, scale, gate of attention and of the feed-forward layer, for video, then for text."""

POSITIONS = "patch_embed.pos_embedding"
FREQUENCIES = ("pos_embed.freqs_sin", "pos_embed.freqs_cos")
"""Rotary tables: no parameters of ours, but files may hold them."""

_LAYER = "transformer.layers.{i}"
_ADALN = "mixins.adaln_layer"
_FINAL = "mixins.final_layer"

SAT = Names(
    prefix="model.diffusion_model.",
    insists=(POSITIONS, *FREQUENCIES),
    rules=(
        Rename("time_embed.0.{p}", "time_embedding.linear_1.{p}"),
        Rename("time_embed.2.{p}", "time_embedding.linear_2.{p}"),
        Rename("ofs_embed.0.{p}", "ofs_embedding.linear_1.{p}"),
        Rename("ofs_embed.2.{p}", "ofs_embedding.linear_2.{p}"),
        Rename("mixins.patch_embed.proj.{p}", "patch_embed.proj.{p}"),
        Rename("mixins.patch_embed.text_proj.{p}", "patch_embed.text_proj.{p}"),
        Rename("mixins.pos_embed.pos_embedding", POSITIONS),
        Rename("mixins.pos_embed.freqs_{x}", "pos_embed.freqs_{x}"),
        Drop("transformer.position_embeddings.{p}", "left over from the base model, not used"),
        Drop("transformer.word_embeddings.{p}", "left over from the base model, not used"),
        Chunks(f"{_ADALN}.adaLN_modulations.{{i}}.1.{{p}}", 12, MODULATION),
        Rename(f"{_ADALN}.query_layernorm_list.{{i}}.{{p}}", f"{BLOCK}.attn1.norm_q.{{p}}"),
        Rename(f"{_ADALN}.key_layernorm_list.{{i}}.{{p}}", f"{BLOCK}.attn1.norm_k.{{p}}"),
        Rename(f"{_LAYER}.input_layernorm.{{p}}", f"{BLOCK}.norm1.norm.{{p}}"),
        Rename(f"{_LAYER}.post_attention_layernorm.{{p}}", f"{BLOCK}.norm2.norm.{{p}}"),
        Cat(f"{_LAYER}.attention.query_key_value.{{p}}", QKV),
        Cat(f"{_LAYER}.attention.query_key_value.original.{{p}}", QKV),
        Rename(f"{_LAYER}.attention.dense.{{p}}", f"{BLOCK}.attn1.to_out.0.{{p}}"),
        Rename(f"{_LAYER}.attention.dense.original.{{p}}", f"{BLOCK}.attn1.to_out.0.{{p}}"),
        Rename(f"{_LAYER}.mlp.dense_h_to_4h.{{p}}", f"{BLOCK}.ff.net.0.proj.{{p}}"),
        Rename(f"{_LAYER}.mlp.dense_4h_to_h.{{p}}", f"{BLOCK}.ff.net.2.{{p}}"),
        Rename("transformer.final_layernorm.{p}", "norm_final.{p}"),
        Rename(f"{_FINAL}.norm_final.{{p}}", "norm_out.norm.{p}"),
        Rename(f"{_FINAL}.adaLN_modulation.1.{{p}}", "norm_out.linear.{p}"),
        Rename(f"{_FINAL}.linear.{{p}}", "proj_out.{p}"),
    ),
)

_MM = "videodit_blocks.{i}"

MEGATRON = Names(
    blocks="videodit_blocks.",
    last=("norm_final.", "norm_out.", "proj_out_linear.", "proj_out.", "adaLN_modulation."),
    keeps=FREQUENCIES,
    rules=(
        Drop("{rest}._extra_state", "state of a module, no weight"),
        Rename("time_embed.time_embed.0.{p}", "time_embedding.linear_1.{p}"),
        Rename("time_embed.time_embed.2.{p}", "time_embedding.linear_2.{p}"),
        Rename("ofs_embed.0.{p}", "ofs_embedding.linear_1.{p}"),
        Rename("ofs_embed.2.{p}", "ofs_embedding.linear_2.{p}"),
        Rename("patch_embed.proj.{p}", "patch_embed.proj.{p}"),
        Rename("caption_projection.{p}", "patch_embed.text_proj.{p}"),
        Rename("pos_embed.pos_embedding", POSITIONS),
        Rename("rope.pos_embedding", POSITIONS),  # the module's name from version 2.0.0 on
        Drop(f"{_MM}.rope.pos_embedding", "a copy of rope.pos_embedding"),
        Drop(f"{_MM}.self_atten.rope.pos_embedding", "a copy of rope.pos_embedding"),
        Rename("pos_embed.freqs_{x}", "pos_embed.freqs_{x}"),
        Chunks(f"{_MM}.scale_shift_table.1.{{p}}", 12, MODULATION, tp="column"),
        Rename(f"{_MM}.norm1.{{p}}", f"{BLOCK}.norm1.norm.{{p}}"),
        Rename(f"{_MM}.norm2.{{p}}", f"{BLOCK}.norm2.norm.{{p}}"),
        Rename(f"{_MM}.self_atten.q_norm.{{p}}", f"{BLOCK}.attn1.norm_q.{{p}}"),
        Rename(f"{_MM}.self_atten.k_norm.{{p}}", f"{BLOCK}.attn1.norm_k.{{p}}"),
        Cat(f"{_MM}.self_atten.proj_qkv.{{p}}", QKV, tp="per_part"),
        Rename(f"{_MM}.self_atten.proj_out.weight", f"{BLOCK}.attn1.to_out.0.weight", tp="row"),
        Rename(f"{_MM}.self_atten.proj_out.bias", f"{BLOCK}.attn1.to_out.0.bias"),
        Rename(f"{_MM}.ff.net.0.proj.{{p}}", f"{BLOCK}.ff.net.0.proj.{{p}}", tp="column"),
        Rename(f"{_MM}.ff.net.2.weight", f"{BLOCK}.ff.net.2.weight", tp="row"),
        Rename(f"{_MM}.ff.net.2.bias", f"{BLOCK}.ff.net.2.bias"),
        Rename("norm_final.{p}", "norm_final.{p}"),
        Rename("norm_out.{p}", "norm_out.norm.{p}"),
        Rename("adaLN_modulation.1.{p}", "norm_out.linear.{p}", tp="column", whole=(2, "norm_out.weight")),
        Rename("proj_out_linear.{p}", "proj_out.{p}"),
        Rename("proj_out.{p}", "proj_out.{p}"),  # the layer's name up to version 2.0.0
    ),
)

_SAT_DOWN, _DOWN = "encoder.down.{i}", "encoder.down_blocks.{i}"
_SAT_UP, _UP = "decoder.up.{i}", "decoder.up_blocks.{~i}"

VAE_SAT = Names(
    rules=(
        Drop("loss.{rest}", "weights of the loss it was trained with"),
        *(
            rule
            for sat, ours in (
                (f"{_SAT_DOWN}.block.{{j}}", f"{_DOWN}.resnets.{{j}}"),
                (f"{_SAT_UP}.block.{{j}}", f"{_UP}.resnets.{{j}}"),
            )
            for rule in (
                Rename(f"{sat}.nin_shortcut.{{p}}", f"{ours}.conv_shortcut.{{p}}"),
                Rename(f"{sat}.{{rest}}", f"{ours}.{{rest}}"),
            )
        ),
        Rename(f"{_SAT_DOWN}.downsample.{{rest}}", f"{_DOWN}.downsamplers.0.{{rest}}"),
        Rename(f"{_SAT_UP}.upsample.{{rest}}", f"{_UP}.upsamplers.0.{{rest}}"),
        Rename("{x}.mid.block_1.{rest}", "{x}.mid_block.resnets.0.{rest}"),
        Rename("{x}.mid.block_2.{rest}", "{x}.mid_block.resnets.1.{rest}"),
        *(
            Rename(f"{{x}}.{part}.{{rest}}", f"{{x}}.{part}.{{rest}}")
            for part in ("conv_in", "norm_out", "conv_out")
        ),
    )
)


FUSED = {f"{BLOCK}.attn1.to_qkv": [f"{BLOCK}.attn1.to_{x}" for x in "qkv"]}
"""The one layer that Megatron fuses and adapts, by our names."""

_ATTENTION, _OURS = f"{_LAYER}.attention", f"{BLOCK}.attn1"

SAT_LORA = Names(
    prefix="model.diffusion_model.",
    rules=(
        *(
            Rename(f"{_ATTENTION}.query_key_value.matrix_{m}.{number}", f"{_OURS}.to_{x}.lora_{m}.weight")
            for m in "AB"
            for number, x in enumerate("qkv")
        ),
        *(Rename(f"{_ATTENTION}.dense.matrix_{m}.0", f"{_OURS}.to_out.0.lora_{m}.weight") for m in "AB"),
        Drop("{rest}", "a weight of the base model, not of the LoRA"),
    ),
)

_QKV, _OUT = f"{_MM}.self_atten.proj_qkv", f"{_MM}.self_atten.proj_out"
_UP_LAYER, _DOWN_LAYER = "ff.net.0.proj", "ff.net.2"

MEGATRON_LORA = Names(
    blocks="videodit_blocks.",
    fused=FUSED,
    rules=(
        Drop("{rest}._extra_state", "state of a module, no weight"),
        Rename(f"{_QKV}.lora_A.default.weight", f"{_OURS}.to_qkv.lora_A.weight"),
        Chunks(
            f"{_QKV}.lora_B.default.weight", 3, {f"{_OURS}.to_qkv.lora_B.weight": (0, 1, 2)}, tp="per_part"
        ),
        Rename(f"{_OUT}.lora_A.default.weight", f"{_OURS}.to_out.0.lora_A.weight", tp="row"),
        Rename(f"{_OUT}.lora_B.default.weight", f"{_OURS}.to_out.0.lora_B.weight"),
        Rename(f"{_MM}.{_UP_LAYER}.lora_A.default.weight", f"{BLOCK}.{_UP_LAYER}.lora_A.weight"),
        Rename(f"{_MM}.{_UP_LAYER}.lora_B.default.weight", f"{BLOCK}.{_UP_LAYER}.lora_B.weight", tp="column"),
        Rename(
            f"{_MM}.{_DOWN_LAYER}.lora_A.default.weight", f"{BLOCK}.{_DOWN_LAYER}.lora_A.weight", tp="row"
        ),
        Rename(f"{_MM}.{_DOWN_LAYER}.lora_B.default.weight", f"{BLOCK}.{_DOWN_LAYER}.lora_B.weight"),
    ),
)


def names_components() -> Iterable[Component]:
    """Yield the tables; LayerZero shards hold Megatron names."""
    here = "cvx_plugins.cogvideox.names:"
    yield Component("names", "cogvideox:sat", None, f"{here}SAT")
    yield Component("names", "cogvideox:megatron", None, f"{here}MEGATRON")
    yield Component("names", "cogvideox:layerzero", None, f"{here}MEGATRON")
    yield Component("names", "cogvideox:sat-lora", None, f"{here}SAT_LORA")
    yield Component("names", "cogvideox:megatron-lora", None, f"{here}MEGATRON_LORA")
    yield Component("names", "cogvideox-vae:sat", None, f"{here}VAE_SAT")
