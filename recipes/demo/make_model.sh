#!/usr/bin/env bash
# Remakes the demo's tokenizer, and trains an autoencoder from scratch: about 25 CPU-minutes. See README.md.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python="${PYTHON:-.venv/bin/python}"
runs=runs/demo-autoencoder

"$python" recipes/demo/make_tokenizer.py recipes/demo/model/tokenizer
"$python" recipes/demo/make_clips.py "$runs/clips" --busy 300
"$python" recipes/demo/make_clips.py "$runs/polish-clips" --busy 100
"$python" -m cvx_core.run recipes/demo/autoencoder-frames.yaml
"$python" -m cvx_core.run recipes/demo/autoencoder.yaml
# Once more with fewer busy clips, for the pictures that the demo is about.
"$python" -m cvx_core.run recipes/demo/autoencoder.yaml --set seed=1 --set task.steps=700 \
  --set optimizer.lr=2e-3 --set output="$runs/polish" --set dataset.path="$runs/polish-clips/clips.jsonl" \
  --set autoencoder.weights.path="$runs/clips-run/model"
echo "the autoencoder is in $runs/polish/model"
