output_dir=logs/sp_came

msrun --worker_num=8 --local_worker_num=8 --log_dir=$output_dir scripts/train.py \
    --config hpcai/1_5.yaml \
    --csv_path clips.csv \
    --video_folder clips \
    --text_embed_folder cache/texts \
    --vae_latent_folder cache/latents \
    --use_parallel True \
    --zero_stage 2 \
    --num_frames 85 \
    --num_latent_frames 22 \
    --enable_sequence_parallelism True \
    --sequence_parallel_shards 8 \
    --optim came \
    --betas 0.9 0.95 0.99 \
    --optim_eps 1e-8 1e-8 \
