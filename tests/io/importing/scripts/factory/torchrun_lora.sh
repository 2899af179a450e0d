#!/bin/bash
MODEL=${1:-THUDM/CogVideoX-5b}
LR=${LR:-1e-4}
export CUDA_VISIBLE_DEVICES=0,1,2,3
mkdir -p logs && cat > logs/notes.txt <<'NOTES'
don't read this: "an open quote
NOTES
torchrun --nproc_per_node=4 --master_port 29500 training/cogvideox_text_to_video_lora.py \
  --pretrained_model_name_or_path "$MODEL" --data_root clips --caption_column prompt.txt \
  --video_column videos.txt --height_buckets 480 --width_buckets 720 --frame_buckets 49 \
  --train_batch_size 1 --max_train_steps 100 --learning_rate $LR --scale_lr \
  --gradient_accumulation_steps 2 --mixed_precision fp16 --optimizer adamw --seed 1 \
  --output_dir out --weight_decay 1e-2 "$@"
