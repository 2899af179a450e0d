output_dir=logs/dp_lora

msrun --worker_num=8 --local_worker_num=8 --log_dir=$output_dir scripts/train.py \
    --config hpcai/1_5.yaml \
    --csv_path clips.csv \
    --video_folder clips \
    --text_embed_folder cache/texts \
    --use_parallel True \
    --warmup_steps 100 \
    --start_learning_rate 1e-4 \
    --lora_dim 128
