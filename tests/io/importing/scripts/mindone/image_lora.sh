#!/bin/bash
# Where this lies
SCRIPT_DIR="$( cd -- "$( dirname -- "${BASH_SOURCE[0]}" )" &> /dev/null && pwd )"
PROJECT_DIR="$(dirname "${SCRIPT_DIR}")"
export PYTHONPATH="${PROJECT_DIR}:${PYTHONPATH}"

NUM_NPUS=8
MIXED_PRECISION="bf16"
LEARNING_RATES=("2e-5")
LR_SCHEDULES=("cosine_with_restarts")
OPTIMIZERS=("adamw_bf16")
MAX_TRAIN_STEPS=("3000")
DATA_ROOT="clips"
MODEL_PATH="THUDM/CogVideoX1.5-5B-I2V"
VAE_CACHE=0
EMBEDDINGS_CACHE=0

if [ "$NUM_NPUS" -eq 1 ]; then
    LAUNCHER="python"
    EXTRA_ARGS=""
    SP=False
else
    LAUNCHER="msrun --bind_core=True --worker_num=$NUM_NPUS --local_worker_num=$NUM_NPUS --log_dir="./log_lora" --join=True"
    EXTRA_ARGS="--distributed"
fi
if [[ $VAE_CACHE == 1 && $EMBEDDINGS_CACHE == 1 ]]; then
  EXTRA_ARGS="$EXTRA_ARGS --vae_cache --embeddings_cache"
fi

for learning_rate in "${LEARNING_RATES[@]}"; do
  for optimizer in "${OPTIMIZERS[@]}"; do
    for steps in "${MAX_TRAIN_STEPS[@]}"; do
      output_dir="./lora__optimizer_${optimizer}__steps_${steps}__rate_${learning_rate}/"

      cmd="$LAUNCHER ${SCRIPT_DIR}/cogvideox_image_to_video_lora.py \
        --pretrained_model_name_or_path $MODEL_PATH \
        --data_root $DATA_ROOT --caption_column prompt.txt --video_column videos.txt \
        --height_buckets 768 --width_buckets 1360 --frame_buckets 77 --max_num_frames 77 \
        --gradient_accumulation_steps 1 --dataloader_num_workers 2 --seed 42 \
        --mixed_precision $MIXED_PRECISION --output_dir $output_dir --train_batch_size 1 \
        --max_train_steps $steps --checkpointing_steps 2000 --gradient_checkpointing \
        --scale_lr --learning_rate $learning_rate --lr_scheduler cosine_with_restarts \
        --lr_warmup_steps 800 --lr_num_cycles 1 --enable_tiling \
        --noised_image_dropout 0.05 \
        --optimizer $optimizer --beta1 0.9 --beta2 0.95 --weight_decay 0.001 \
        --max_grad_norm 1.0 --report_to tensorboard --mindspore_mode 0 --jit_level O1 \
        $EXTRA_ARGS"

      echo "Running: $cmd"
      eval $cmd
    done
  done
done
