output_dir=logs/i2v

msrun --worker_num=8 --local_worker_num=8 --log_dir=$output_dir scripts/train.py \
    --config hpcai/5b_i2v.yaml \
    --csv_path clips.csv \
    --video_folder clips \
    --text_embed_folder cache/texts \
    --use_parallel True \
    --num_frames 45
