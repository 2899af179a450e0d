export TOKENIZERS_PARALLELISM=true

GPU_IDS="0,1"
LEARNING_RATES=("1e-4")
LR_SCHEDULES=("cosine_with_restarts")
MAX_TRAIN_STEPS=("20000")
ACCELERATE_CONFIG_FILE="configs/deepspeed.yaml"

DATA_ROOT="clips"
MODEL_PATH="THUDM/CogVideoX1.5-5B-I2V"

for learning_rate in "${LEARNING_RATES[@]}"; do
  for lr_schedule in "${LR_SCHEDULES[@]}"; do
    for steps in "${MAX_TRAIN_STEPS[@]}"; do
      output_dir="./sft__steps_${steps}__rate_${learning_rate}/"
      cmd="accelerate launch --config_file $ACCELERATE_CONFIG_FILE \
        --gpu_ids $GPU_IDS \
        training/cogvideox_image_to_video_sft.py \
        --pretrained_model_name_or_path  $MODEL_PATH \
        --data_root $DATA_ROOT --caption_column prompt.txt --video_column videos.txt \
        --height_buckets 480 --width_buckets 720 --frame_buckets 77 --max_num_frames 77 \
        --validation_images \"/stills/one.png:::/stills/two.png\" --validation_prompt_separator ::: \
        --seed 42 --mixed_precision bf16 --output_dir $output_dir \
        --train_batch_size 1 --max_train_steps $steps --checkpointing_steps 2000 \
        --gradient_accumulation_steps 4 --gradient_checkpointing \
        --learning_rate $learning_rate --lr_scheduler $lr_schedule --lr_warmup_steps 800 \
        --noised_image_dropout 0.05 --optimizer adamw --beta1 0.9 --beta2 0.95 \
        --weight_decay 0.001 --max_grad_norm 1.0 --report_to wandb --nccl_timeout 1800"
      echo "Running: $cmd"
      eval $cmd
    done
  done
done
