#!/usr/bin/env bash
set -euo pipefail
ARGS=(
  --pretrained_model_name_or_path THUDM/CogVideoX-2b   # the author's base
  --data_root "clips"
  --caption_column prompt.txt --video_column videos.txt
  --height_buckets 256 480 --width_buckets 256 720 --frame_buckets 49
  --rank 64 --lora_alpha 64
  --mixed_precision no
  --train_batch_size=2
  --max_train_steps 1000 --scale_lr --learning_rate 1e-3
  --lr_scheduler cosine_with_restarts --lr_warmup_steps 200
  --optimizer AdamW --video_reshape_mode center
)
accelerate launch --gpu_ids all --config_file configs/eight.yaml \
  training/cogvideox_text_to_video_lora.py "${ARGS[@]}" \
  --output_dir out2b --max_grad_norm 1.0
