"""Training scripts of three projects become recipes that pass the check; no setting is lost on the way."""

import json
from pathlib import Path

import pytest
import yaml

from cvx_core import FormatError, cli, run
from cvx_io.import_recipe import import_recipe, main
from cvx_io.importing import shell
from cvx_io.importing.mindspeed import flat
from tests.test_docs import release

FACTORY = r"""#!/bin/bash
export WANDB_MODE="offline"   # a comment with a 'quote
GPU_IDS="0,1"
RATES=("1e-4" "1e-3")
STEPS=("3000")
DATA_ROOT="clips"
for rate in "${RATES[@]}"; do
  for steps in "${STEPS[@]}"; do
    output_dir="./lora__rate_${rate}/"
    cmd="accelerate launch --config_file configs/two.yaml --gpu_ids $GPU_IDS \
      training/cogvideox_text_to_video_lora.py \
      --pretrained_model_name_or_path THUDM/CogVideoX-5b \
      --data_root $DATA_ROOT --caption_column prompt.txt --video_column videos.txt \
      --id_token FOX_STYLE --height_buckets 480 --width_buckets 720 --frame_buckets 49 \
      --dataloader_num_workers 8 --pin_memory --seed 42 --rank 128 --lora_alpha 64 \
      --validation_prompt \"FOX_STYLE a panda's drum:::a cat\" --validation_epochs 10 \
      --mixed_precision bf16 --output_dir $output_dir --max_num_frames 49 --train_batch_size 1 \
      --max_train_steps $steps --checkpointing_steps 1000 --gradient_accumulation_steps 2 \
      --gradient_checkpointing --learning_rate $rate --lr_scheduler cosine_with_restarts \
      --lr_warmup_steps 400 --lr_num_cycles 2 --enable_slicing --enable_tiling --optimizer adamw \
      --beta1 0.9 --beta2 0.95 --weight_decay 0.001 --max_grad_norm 1.0 --allow_tf32 \
      --report_to wandb --nccl_timeout 1800 --brand_new_flag 7"
    echo "Running: $cmd"
    eval $cmd
  done
done
"""

MINDSPEED = r"""#!/bin/bash
source /usr/local/set_env.sh
GPUS_PER_NODE=8
NNODES=1
WORLD_SIZE=$(($GPUS_PER_NODE*$NNODES))
TP=2; PP=1
CP=2
MBS=1
GBS=$(($WORLD_SIZE*$MBS/$CP/$TP*4))
MM_MODEL="./conf/model.json"
DISTRIBUTED_ARGS="
    --nproc_per_node $GPUS_PER_NODE \
    --nnodes $NNODES --master_port 29505
"
GPT_ARGS="
    --tensor-model-parallel-size ${TP} --pipeline-model-parallel-size ${PP} \
    --context-parallel-size ${CP} --context-parallel-algo ulysses_cp_algo \
    --micro-batch-size ${MBS} --global-batch-size ${GBS} \
    --lr 1e-5 --min-lr 1e-6 --lr-decay-style cosine --lr-warmup-iters 100 --lr-warmup-init 0 \
    --adam-beta1 0.9 --adam-beta2 0.95 --adam-eps 1e-8 --weight-decay 1e-4 --clip-grad 1.0 \
    --train-iters 5000 --load converted --no-load-optim --no-load-rng --bf16 \
    --recompute-granularity full --recompute-method block --recompute-num-layers 42 \
    --use-distributed-optimizer --overlap-grad-reduce --num-workers 8 --sequence-parallel \
"
LORA_ARGS=(--lora-r 16 --lora-alpha 8 --lora-target-modules proj_qkv proj_out)
logfile=$(date +%Y%m%d)
torchrun $DISTRIBUTED_ARGS pretrain_sora.py $GPT_ARGS "${LORA_ARGS[@]}" \
    --mm-data ./conf/data.json --mm-model $MM_MODEL --mm-tool tools.json \
    --save-interval 1000 --log-interval 1 --save trained \
    --distributed-backend nccl 2>&1 | tee logs/train_${logfile}.log
STEP=`grep "elapsed" logs/train_${logfile}.log | awk -F ':' '{print$5}'`
"""

MODEL = {
    "frames": 21,
    "task": "i2v",
    "enable_encoder_dp": True,
    "predictor": {
        "model_id": "satdit",
        "num_layers": 42,
        "num_heads": 48,
        "head_dim": 64,
        "in_channels": 32,
        "out_channels": 16,
        "patch_type": "3D",
        "input_size": [6, 96, 170],
        "text_length": 224,
        "learnable_pos_embed": False,
        "ofs_embed_dim": 512,
        "new_switch": True,
    },
    "diffusion": {
        "model_id": "cogvideo_diffusion",
        "sigma_sampler_config": {
            "uniform_sampling": True,
            "num_idx": 1000,
            "discretization_config": {"shift_scale": 1.0},
        },
    },
    "text_encoder": {"from_pretrained": "t5", "ucg_rate": 0.1, "use_attention_mask": False},
    "ae": {
        "from_pretrained": "3d-vae.pt",
        "cp_size": 1,
        "encoder_conv_in": "ContextParallelCausalConv3d",
        "i2v_processor": {"noised_image_dropout": 0.05, "noised_image_input": True},
    },
}

DATA = {
    "dataset_param": {
        "dataset_type": "t2v",
        "basic_parameters": {
            "data_path": "data.jsonl",
            "data_folder": "clips",
            "data_storage_mode": "standard",
        },
        "preprocess_parameters": {
            "video_processor_type": "CogVideoXProcessor",
            "train_fps": 8,
            "skip_frame_num": 3,
            "num_frames": 21,
            "max_height": 768,
            "max_width": 1360,
            "train_pipeline": {"video": [], "image": []},
        },
        "tokenizer_config": {"from_pretrained": "t5/tokenizer", "model_max_length": 224},
    },
    "dataloader_param": {"shuffle": True, "drop_last": True, "collate_param": {}},
}

MINDONE = """
model_version: CogVideoX-5B-v1.5
pretrained_model_path:
  - "models/x/transformer/diffusion_pytorch_model-00001-of-00002.safetensors"
  - "models/x/transformer/diffusion_pytorch_model-00002-of-00002.safetensors"
model_max_length: 224
noise_scheduler: ddpm
noise_schedule: quad
v_pred: True
beta_start: 0.00085
beta_end: 0.012
rescale_betas_zero_snr: True
vae_checkpoint: models/x/vae/diffusion_pytorch_model.safetensors
vae_dtype: fp32
sd_scale_factor: 0.7
use_recompute: True
image_size: [ 768, 1360 ]
num_frames: 85
num_latent_frames: 22
text_drop_prob: 0.1
dtype: bf16
scheduler: cosine_decay
start_learning_rate: 2.e-5
end_learning_rate: 2.e-6
warmup_steps: 10
batch_size: 1
clip_grad: True
max_grad_norm: 1.0
optim: adamw_re
optim_eps: 1.e-8
weight_decay: 1.e-4
betas: [0.9, 0.95]
epochs: 10
ckpt_save_interval: 50
ckpt_max_keep: 3
mask_ratios:
  identity: 1.0
odd_setting: 5
"""


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with everything the scripts name; weights are empty files, for nothing reads them."""
    monkeypatch.chdir(tmp_path)
    release(tmp_path / "weights/CogVideoX-5b", "cogvideox-5b")
    release(tmp_path / "models/x", "cogvideox-1.5-5b")
    for name in ("clips", "converted", "t5/tokenizer", "conf"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("clips/prompt.txt", "clips/videos.txt", "data.jsonl", "3d-vae.pt"):
        (tmp_path / name).write_text("")
    (tmp_path / "clips.csv").write_text("video,caption\n" + "a.mp4,a cat\n" * 20)
    (tmp_path / "conf/model.json").write_text(json.dumps(MODEL))
    (tmp_path / "conf/data.json").write_text(json.dumps(DATA))
    for name, text in (("factory.sh", FACTORY), ("mindspeed.sh", MINDSPEED), ("mindone.yaml", MINDONE)):
        (tmp_path / name).write_text(text)
    (tmp_path / "mindone.sh").write_text(
        "msrun --worker_num=8 scripts/train.py --config mindone.yaml --csv_path clips.csv \\\n"
        "  --video_folder clips --use_parallel True --enable_sequence_parallelism True \\\n"
        "  --sequence_parallel_shards 8\n"
    )
    return tmp_path


SOURCES = ("factory.sh", "mindspeed.sh", "mindone.sh")
UNKNOWN = ("--brand_new_flag 7", "new_switch", "odd_setting")


@pytest.mark.parametrize("source", SOURCES)
def test_the_recipe_passes_the_check_wherever_it_is_written(source, work, capsys):
    (work / "recipes").mkdir()
    for target in ("recipe.yaml", "recipes/recipe.yaml"):
        assert cli.main(["import-recipe", source, target]) == 0, capsys.readouterr().err
        assert run.main([target, "--check"]) == 0, capsys.readouterr().err


@pytest.mark.parametrize(("source", "name"), zip(SOURCES, UNKNOWN, strict=True))
def test_an_unknown_setting_is_listed_as_unmapped(source, name, work, capsys):
    assert main([source, "recipe.yaml"]) == 0
    said = capsys.readouterr().out
    assert "unmapped: unknown, and left out (1):" in said
    assert name in said.split("unmapped")[1].splitlines()[1]
    assert name in Path("recipe.yaml").read_text()


@pytest.mark.parametrize("source", SOURCES)
def test_every_setting_is_accounted_for(source, work):
    draft = import_recipe(Path(source), Path("weights"))
    assert draft.given == {}
    text = "\n".join(draft.account())
    if source.endswith("mindone.sh"):
        names = [name for name in yaml.safe_load(MINDONE) if name != "mask_ratios"]
    elif source.endswith("mindspeed.sh"):
        words = shell.launches(shell.read_script(Path(source)))[0].words
        names = [word for word in words if word.startswith("--")]
        names += [*flat(MODEL, ""), *flat(DATA, "")]
    else:
        words = shell.launches(shell.read_script(Path(source)))[0].words
        names = [word for word in words if word.startswith("--")]
    short = [name.lstrip("-") for name in names]
    known = {"nproc_per_node", "nnodes"}  # said as the number of devices
    assert [name for name in short if name not in text and name not in known] == []


def test_factory_values_and_defaults_go_where_they_belong(work):
    draft = import_recipe(Path("factory.sh"), Path("weights"))
    recipe = draft.recipe
    assert recipe["model"] == "weights/CogVideoX-5b"
    assert recipe["output"] == "./lora__rate_1e-4/"
    assert recipe["video"] == {"frames": 49, "height": 480, "width": 720}
    assert recipe["adapter"] == {
        "use": "lora",
        "rank": 128,
        "alpha": 64.0,
        "targets": ["to_k", "to_q", "to_v", "to_out.0"],
    }
    assert recipe["optimizer"]["lr"] == 1e-4
    assert recipe["optimizer"]["weight_decay"] == 0.001
    task = recipe["task"]
    assert (task["schedule"], task["warmup"], task["restarts"]) == ("cosine-restarts", 400, 2)
    assert (task["steps"], task["accumulate"], task["save_every"], task["keep"]) == (3000, 2, 1000, 4)
    assert task["text_dropout"] == 0.0, "the source drops no text; ours would by default"
    assert recipe["parallel"] == [{"use": "ddp"}, {"use": "recompute"}]
    assert any("rate, 1e-4 is taken, not 1e-3" in note for note in draft.notes)
    assert any(e.name == "--id_token" and "start of every caption" in e.text for e in draft.entries)


def test_factory_buckets_schedules_and_data_forms(work):
    text = FACTORY.replace("--height_buckets 480", "--height_buckets 480 720").replace("adamw", "adam")
    text = text.replace("cosine_with_restarts", "constant").replace(
        "--data_root", "--dataset_file clips.csv --data_root"
    )
    Path("factory.sh").write_text(text.replace("--max_grad_norm 1.0", "--scale_lr"))
    draft = import_recipe(Path("factory.sh"), Path("weights"))
    assert draft.recipe["loader"]["buckets"] == {"480x720": {49: [1.0, 1]}, "720x720": {49: [1.0, 1]}}
    assert "video" not in draft.recipe
    assert draft.recipe["dataset"]["use"] == "csv"
    assert draft.recipe["optimizer"]["lr"] == pytest.approx(1e-4 * 2 * 2)
    assert "warmup" not in draft.recipe["task"]
    differing = {e.name for e in draft.entries if e.outcome == "differs"}
    assert differing == {"--config_file", "frames of a clip", "--video_reshape_mode", "--optimizer"}


OPTIMIZERS = {
    "adam": ({"use": "adamw", "lr": 1e-4, "betas": [0.9, 0.95]}, {"--optimizer": "differs"}),
    "adamw --use_8bit --use_torchao": ({"use": "adamw-8bit"}, {"--use_8bit": "mapped"}),
    "adamw8bit": ({"use": "adamw-8bit"}, {"--optimizer": "mapped"}),
    "adamw --use_4bit": ({"use": "adamw-8bit"}, {"--use_4bit": "differs"}),
    "came --beta3 0.99": ({"use": "came", "betas": [0.9, 0.95, 0.99]}, {"--optimizer": "mapped"}),
    "CAME --epsilon 1e-7": ({"use": "came", "betas": [0.9, 0.95, 0.9999]}, {"--epsilon": "no counterpart"}),
    "prodigy --learning_rate 1.0 --beta3 0.9 --prodigy_decouple --prodigy_use_bias_correction": (
        {"use": "prodigy", "lr": 1.0, "beta3": 0.9, "decouple": True, "bias_correction": True},
        {"--optimizer": "mapped", "--beta3": "mapped", "--prodigy_decouple": "mapped"},
    ),
    "prodigy": (
        {"use": "prodigy", "lr": 1.0, "decouple": False, "safeguard_warmup": False},
        {"--learning_rate": "differs", "--prodigy_safeguard_warmup": "stated"},
    ),
    "adamw --use_cpu_offload_optimizer --offload_gradients": (
        {"use": "adamw", "offload": "state"},
        {"--use_cpu_offload_optimizer": "mapped", "--offload_gradients": "no counterpart"},
    ),
    "lion": ({"use": "adamw"}, {"--optimizer": "differs"}),
}


@pytest.mark.parametrize("flags", OPTIMIZERS)
def test_factory_optimizers_become_ours(work, capsys, flags):
    Path("factory.sh").write_text(FACTORY.replace("--optimizer adamw", f"--optimizer {flags}"))
    fields, outcomes = OPTIMIZERS[flags]
    draft = import_recipe(Path("factory.sh"), Path("weights"))
    assert fields.items() <= draft.recipe["optimizer"].items()
    assert outcomes.items() <= {e.name: e.outcome for e in draft.entries}.items()
    assert main(["factory.sh", "recipe.yaml"]) == 0
    assert run.main(["recipe.yaml", "--check"]) == 0, capsys.readouterr().err


def test_factory_offloads_gradients_of_one_process(work):
    for flags, offload in (("", "state"), ("--offload_gradients", True)):
        text = FACTORY.replace("--brand_new_flag 7", f"--use_cpu_offload_optimizer {flags}")
        Path("factory.sh").write_text(text.replace("--gpu_ids $GPU_IDS", "--gpu_ids 0"))
        recipe = import_recipe(Path("factory.sh"), Path("weights")).recipe
        assert recipe["optimizer"]["offload"] == offload
        assert recipe["parallel"] == [{"use": "recompute"}]


def test_factory_optimizers_that_need_whole_parameters_get_them(work, capsys):
    text = FACTORY.replace("configs/two.yaml", "configs/deepspeed.yaml")
    for flags, parallel in (("came", "ddp"), ("adamw --offload_gradients", "zero2")):
        Path("factory.sh").write_text(text.replace("--optimizer adamw", f"--optimizer {flags}"))
        assert import_recipe(Path("factory.sh"), Path("weights")).recipe["parallel"][0] == {"use": parallel}
        Path("recipe.yaml").unlink(missing_ok=True)
        assert main(["factory.sh", "recipe.yaml"]) == 0
        assert run.main(["recipe.yaml", "--check"]) == 0, capsys.readouterr().err


def test_factory_may_train_on_frame_counts_that_a_release_was_not_made_for(work, capsys):
    Path("factory.sh").write_text(FACTORY.replace("--frame_buckets 49", "--frame_buckets 29"))
    assert main(["factory.sh", "recipe.yaml"]) == 0
    assert "predictor.card.frames_step: 4; the model was released for 8*N+1" in capsys.readouterr().out
    assert run.main(["recipe.yaml", "--check"]) == 0, capsys.readouterr().err


def test_mindspeed_values_and_mesh(work):
    recipe = import_recipe(Path("mindspeed.sh"), Path("weights")).recipe
    assert recipe["predictor"]["use"] == "cogvideox-1.5-5b-i2v"
    assert recipe["predictor"]["card"] == {"frames_step": 4}, "21 frames are not a count of the release"
    assert recipe["predictor"]["weights"] == {"use": "megatron", "path": "converted"}
    assert recipe["parallel"] == [
        {"use": "zero1"},
        {"use": "tp", "size": 2, "sequence": True},
        {"use": "cp", "ulysses": 2},
        {"use": "encoder-dp"},
        {"use": "recompute", "mode": "full"},
    ]
    assert recipe["task"]["accumulate"] == 4, "a global batch of 8 over 2 data ranks of 1"
    assert recipe["task"]["final_lr"] == pytest.approx(0.1)
    assert recipe["scheduler"] == {"use": "ddim", "snr_shift": 1.0, "draw": "interval"}
    assert recipe["adapter"]["targets"] == ["to_q", "to_k", "to_v", "to_out.0"]
    assert recipe["video"]["rule"] == "cogvideox"
    assert recipe["task"]["image_noise"] == [-3.0, 0.5]


def test_mindone_counts_steps_from_the_clips_or_is_told(work, capsys):
    assert main(["mindone.sh", "r.yaml"]) == 0
    recipe = yaml.safe_load(Path("r.yaml").read_text())
    assert recipe["task"]["steps"] == 200, "10 epochs of 20 rows"
    assert recipe["parallel"] == [{"use": "ddp"}, {"use": "cp", "ulysses": 8}, {"use": "recompute"}]
    assert main(["mindone.yaml", "y.yaml"]) == 2
    assert "--also csv_path=FILE" in capsys.readouterr().err
    also = ["--also", "csv_path=absent.csv", "--also", "train_steps=77"]
    assert main(["mindone.yaml", "y.yaml", *also]) == 0
    assert yaml.safe_load(Path("y.yaml").read_text())["task"]["steps"] == 77


def test_mindone_buckets_and_images(work):
    text = MINDONE.replace("CogVideoX-5B-v1.5", "CogVideoX-5B-v1.5-I2V").replace(
        "epochs: 10", "train_steps: 9"
    )
    text += "csv_path: clips.csv\nimage_to_video: True\nsd_encode_scale_factor: 1.0\n"
    text += "use_ema: True\nema_decay: 0.99\n"
    text += 'bucket_config: {"480p": {49: [0.4, 8]}}\n'
    Path("b.yaml").write_text(text)
    recipe = import_recipe(Path("b.yaml"), Path("weights")).recipe
    assert recipe["predictor"]["use"] == "cogvideox-1.5-5b-i2v"
    assert recipe["loader"]["buckets"] == {"480p": {49: [0.4, 8]}}
    assert "batch" not in recipe["loader"]
    assert "video" not in recipe
    assert recipe["task"]["image_noise"] is None
    assert recipe["task"]["ema"] == {"decay": 0.99}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("--max_train_steps $steps", "", "epochs, and a recipe counts steps"),
        ("--lr_warmup_steps 400", "--lr_warmup_steps many", "--lr_warmup_steps is 'many', which is no whole"),
        ("cosine_with_restarts", "cosin", "expected constant"),
        ("--pretrained_model_name_or_path THUDM/CogVideoX-5b", "", "gives neither --pretrained"),
        ("accelerate launch", "sbatch", "starts no Python program"),
        ('"Running: $cmd"', '"Running: $cmd', "is not closed"),
    ],
)
def test_what_cannot_be_imported_is_an_error(old, new, says, work, capsys):
    Path("factory.sh").write_text(FACTORY.replace(old, new))
    assert main(["factory.sh", "recipe.yaml"]) == 2
    assert says in capsys.readouterr().err
    assert not Path("recipe.yaml").exists()


def test_a_script_that_trains_something_else_is_refused(work, capsys):
    text = FACTORY.replace("cogvideox_text_to_video_lora.py", "train.py")
    Path("factory.sh").write_text(text.replace("THUDM/CogVideoX-5b", "genmo/mochi-1-preview"))
    assert main(["factory.sh", "recipe.yaml"]) == 2
    assert "trains genmo/mochi-1-preview with train.py, which is no CogVideoX" in capsys.readouterr().err


def test_a_json_that_is_not_there_is_an_error(work, capsys):
    Path("conf/data.json").unlink()
    assert main(["mindspeed.sh", "recipe.yaml"]) == 2
    assert "names ./conf/data.json, which is neither here" in capsys.readouterr().err


def test_a_recipe_is_not_replaced_unasked_and_a_near_name_is_named(work, capsys):
    Path("recipe.yaml").write_text("mine")
    assert main(["factory.sh", "recipe.yaml"]) == 2
    assert Path("recipe.yaml").read_text() == "mine"
    assert main(["factory.sh", "recipe.yaml", "--overwrite"]) == 0
    assert main(["factry.sh", "other.yaml"]) == 2
    assert "Did you mean 'factory.sh'?" in capsys.readouterr().err


def test_an_unset_variable_is_named(work):
    Path("factory.sh").write_text(FACTORY.replace("--seed 42", "--seed 42 --logging_dir $LOGS"))
    draft = import_recipe(Path("factory.sh"), Path("weights"))
    assert "$LOGS: is set nowhere in the script; replace it" in draft.notes


def test_an_import_error_is_of_the_data(work):
    Path("x.yaml").write_text("a: 1\n")
    with pytest.raises(FormatError, match="is no training config of MindOne"):
        import_recipe(Path("x.yaml"), Path("weights"))


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("tensorboard", "task.trackers: tensorboard, which is the default"),
        ("wandb", "add `trackers: [{use: wandb}]` to the task where that package is installed"),
        ("all", "add `trackers: [{use: wandb}]` to the task where that package is installed"),
    ],
)
def test_where_a_run_is_shown_is_said(where, said, work):
    script = Path("factory.sh")
    script.write_text(script.read_text().replace("--report_to wandb", f"--report_to {where}"))
    account = import_recipe(script, Path("weights")).account()
    [line] = [line for line in account if "--report_to" in line]
    assert said in line
