"""Scripts in the style of the real ones become recipes of the same training that pass the check."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from cvx_core import run
from cvx_io.import_recipe import main
from tests.test_docs import release

SCRIPTS = Path(__file__).parent / "scripts"
RELEASES = {
    "weights/CogVideoX-2b": "cogvideox-2b",
    "weights/CogVideoX-5b": "cogvideox-5b",
    "weights/CogVideoX1.5-5B": "cogvideox-1.5-5b",
    "weights/CogVideoX1.5-5B-I2V": "cogvideox-1.5-5b-i2v",
    "models/2b": "cogvideox-2b",
    "models/5b-i2v": "cogvideox-5b-i2v",
    "models/1.5": "cogvideox-1.5-5b",
}
FOLDERS = ("clips", "converted", "t5/tokenizer", "cache/texts", "cache/latents")
FILES = ("clips/prompt.txt", "clips/videos.txt", "data.jsonl", "3d-vae.pt", "cache/texts/empty_text.npz")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with the scripts and everything they name; weights are empty files, for nothing reads them."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(SCRIPTS, tmp_path, dirs_exist_ok=True)
    for folder, preset in RELEASES.items():
        release(tmp_path / folder, preset)
        if preset == "cogvideox-2b":
            edit(tmp_path / folder / "vae/config.json", scaling_factor=1.15258426)
            edit(tmp_path / folder / "scheduler/scheduler_config.json", snr_shift_scale=3.0)
    for name in FOLDERS:
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    for name in FILES:
        (tmp_path / name).write_text("")
    (tmp_path / "clips.csv").write_text("video,caption\n" + "a.mp4,a cat\n" * 16)
    return tmp_path


def edit(path, **values):
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def imported(source, world, capsys, *also):
    """Import a script, check its recipe for so many processes, and return the recipe and what was said."""
    args = [arg for text in also for arg in ("--also", text)]
    assert main([source, "recipe.yaml", "--overwrite", *args]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert run.main(["recipe.yaml", "--check", "--world", str(world)]) == 0, capsys.readouterr().err
    return yaml.safe_load(Path("recipe.yaml").read_text()), said


def refused(source, capsys, *also):
    args = [arg for text in also for arg in ("--also", text)]
    assert main([source, "recipe.yaml", "--overwrite", *args]) == 2
    return capsys.readouterr().err


RECOMPUTE = {"use": "recompute"}
EXPECTED = {
    "factory/text_lora.sh": (1, [RECOMPUTE], "bfloat16", 1e-4, (49, 480, 720, 1), (128, 128.0)),
    "factory/image_sft.sh": (2, [{"use": "zero2"}, RECOMPUTE], "bfloat16", 1e-4, (77, 480, 720, 1), None),
    "factory/torchrun_lora.sh": (4, [{"use": "ddp"}], "bfloat16", 8e-4, (49, 480, 720, 1), (64, 64.0)),
    "mindone/image_sft.sh": (
        8,
        [{"use": "zero3"}, {"use": "cp", "ulysses": 8}, RECOMPUTE],
        "bfloat16",
        2e-5,
        (77, 768, 1360, 1),
        None,
    ),
    "mindone/text_lora.sh": (
        8, [{"use": "ddp"}, RECOMPUTE], "bfloat16", 8e-5, (77, 768, 1360, 1), (64, 64.0),
    ),
    "mindone/image_lora.sh": (
        8, [{"use": "ddp"}, RECOMPUTE], "bfloat16", 16e-5, (77, 768, 1360, 1), (64, 64.0),
    ),
    "hpcai/sp_came.sh": (
        8,
        [{"use": "ddp"}, {"use": "cp", "ulysses": 8}, RECOMPUTE],
        "bfloat16",
        1e-4,
        (85, 768, 1360, 1),
        None,
    ),
    "hpcai/dp_lora.sh": (
        8, [{"use": "zero2"}, RECOMPUTE], "bfloat16", 1e-4, (85, 768, 1360, 1), (128, 128.0),
    ),
    "hpcai/i2v.sh": (8, [{"use": "zero2"}, RECOMPUTE], "bfloat16", 2e-5, (45, 480, 720, 1), None),
    "mindspeed/pretrain_t2v.sh": (
        8,
        [
            {"use": "zero1"},
            {"use": "tp", "size": 4, "sequence": True},
            {"use": "encoder-dp"},
            {"use": "recompute", "mode": "full"},
        ],
        "bfloat16",
        1e-5,
        (37, 480, 720, 1),
        None,
    ),
    "mindspeed/pretrain_pp.sh": (
        8,
        [{"use": "zero1"}, {"use": "pp", "size": 4}, {"use": "recompute", "mode": "full"}],
        "bfloat16",
        1e-5,
        (37, 480, 720, 1),
        None,
    ),
    "mindspeed/pretrain_i2v.sh": (
        8,
        [{"use": "zero1"}, {"use": "cp", "ulysses": 2}, {"use": "recompute", "mode": "full"}],
        "bfloat16",
        1e-5,
        (37, 480, 720, 1),
        None,
    ),
    "mindspeed/finetune_lora.sh": (8, [{"use": "ddp"}], "bfloat16", 1e-5, (37, 480, 720, 1), (128, 64.0)),
    "mindspeed/pretrain_layerzero.sh": (
        8,
        [
            {
                "use": "layerzero",
                "zero3_size": 4,
                "param_dtype": "bfloat16",
                "reduce_dtype": "float32",
                "forward_prefetch": True,
            }
        ],
        "bfloat16",
        1e-5,
        (37, 480, 720, 1),
        None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("source", EXPECTED)
def test_the_numbers_of_a_training_are_those_of_its_script(source, place, capsys):
    world, parallel, dtype, rate, geometry, lora = EXPECTED[source]
    recipe, said = imported(source, world, capsys)
    assert ("1 device" if world == 1 else f"{world} devices") in said
    assert recipe.get("parallel") == parallel
    assert recipe["dtype"] == dtype
    assert recipe["optimizer"]["lr"] == pytest.approx(rate)
    video = recipe["video"]
    assert (video["frames"], video["height"], video["width"], recipe["loader"]["batch"]) == geometry
    adapter = recipe.get("adapter")
    assert (adapter and (adapter["rank"], adapter["alpha"])) == lora
    assert "unmapped" not in said


def test_a_bucket_file_and_its_frame_counts_are_taken_over(place, capsys):
    recipe, said = imported("mindone/text_sft.sh", 8, capsys)
    table = recipe["loader"]["buckets"]
    assert table["256"] == {45: [1.0, 54], 93: [1.0, 26], 189: [1.0, 12]}
    assert table["1024"] == {45: [0.0, 0]}
    assert "batch" not in recipe["loader"]
    assert "video" not in recipe
    assert recipe["predictor"]["card"] == {"frames_step": 4, "frames_max": 189}
    assert recipe["parallel"][:2] == [{"use": "zero3"}, {"use": "cp", "ulysses": 8}]
    assert recipe["optimizer"]["master_weights"] == "float32"
    assert "--train_batch_size 1 -> --scale_lr alone: each bucket states its own" in said


def test_settings_that_mindone_adds_go_where_they_belong(place, capsys):
    recipe, said = imported("mindone/image_sft.sh", 8, capsys)
    assert recipe["device"] == "npu"
    assert recipe["task"]["image_noise"] is None, "the source adds no noise to latents from its cache"
    assert recipe["task"]["image_dropout"] == 0.05
    assert recipe["optimizer"]["master_weights"] == "float32"
    assert "--vae_cache -> its .npy files are not read" in said
    assert "2e-05 x batch 1 x accumulation 1 x data ranks 1" in said
    lora, _ = imported("mindone/image_lora.sh", 8, capsys)
    assert lora["predictor"]["text_length"] == 226, "which the source takes where nothing is stated"
    assert lora["task"]["image_noise"] == [-3.0, 0.5]
    text, _ = imported("mindone/text_lora.sh", 8, capsys)
    assert "text_length" not in text["predictor"]


def test_the_branch_of_one_device_or_of_many_is_taken(place, capsys):
    source = Path("mindone/image_sft.sh")
    text = source.read_text()
    source.write_text(text.replace("NUM_NPUS=8", "NUM_NPUS=1"))
    recipe, said = imported(str(source), 1, capsys)
    assert recipe["parallel"] == [RECOMPUTE]
    assert "msrun" not in said
    source.write_text(text.replace("NUM_NPUS=8", "NUM_NPUS=16").replace("SP_SIZE=$NUM_NPUS", "SP_SIZE=4"))
    recipe, _ = imported(str(source), 16, capsys)
    assert recipe["parallel"][1] == {"use": "cp", "ulysses": 4}
    assert recipe["optimizer"]["lr"] == pytest.approx(8e-5), "times four data ranks"
    source.write_text(text.replace("NUM_NPUS=8", "NUM_NPUS=$(npu-smi info | wc -l)"))
    error = refused(str(source), capsys)
    assert '`[ "$NUM_NPUS" -eq 1 ]` on line' in error
    assert "SP, LAUNCHER, EXTRA_ARGS is not known after it" in error
    source.write_text(text.replace("--distributed ", ""))
    assert "8 processes are started without --distributed" in refused(str(source), capsys)


def test_the_number_of_devices_comes_from_the_config_or_is_asked_for(place, capsys):
    recipe, said = imported("factory/all_gpus_2b.sh", 8, capsys)
    assert recipe["parallel"] == [{"use": "ddp"}]
    assert recipe["dtype"] == "float32"
    assert recipe["optimizer"]["lr"] == pytest.approx(1e-3 * 2 * 8)
    assert set(recipe["loader"]["buckets"]) == {"256x256", "256x720", "480x256", "480x720"}
    assert "num_processes of configs/eight.yaml, accelerate --gpu_ids all 8 devices" in said
    Path("configs/eight.yaml").unlink()
    error = refused("factory/all_gpus_2b.sh", capsys)
    assert "--gpu_ids all, which does not say how many devices there are" in error
    assert "--also num_processes=N" in error
    recipe, _ = imported("factory/all_gpus_2b.sh", 3, capsys, "num_processes=3")
    assert recipe["optimizer"]["lr"] == pytest.approx(1e-3 * 2 * 3)


def test_what_deepspeed_is_told_is_read(place, capsys):
    recipe, said = imported("factory/image_sft.sh", 2, capsys)
    assert recipe["task"]["accumulate"] == 4
    assert "gradient_accumulation_steps of configs/deepspeed.yaml 1 -> task.accumulate follows" in said
    assert "offload_optimizer_device cpu -> zero2 keeps its share on the device" in said
    config = Path("configs/deepspeed.yaml")
    config.write_text(config.read_text().replace("zero_stage: 2", "zero_stage: 3"))
    recipe, _ = imported("factory/image_sft.sh", 2, capsys)
    assert recipe["parallel"][0] == {"use": "zero3"}


def test_float16_becomes_bfloat16_and_is_said(place, capsys):
    for source, name in (
        ("factory/torchrun_lora.sh", "--mixed_precision fp16"),
        ("mindspeed/finetune_lora.sh", "--fp16 fp16"),
    ):
        recipe, said = imported(source, {"factory/torchrun_lora.sh": 4}.get(source, 8), capsys)
        assert recipe["dtype"] == "bfloat16"
        assert recipe["optimizer"]["master_weights"] == "float32"
        assert name in said.split("mapped, with a difference")[1].split("no counterpart here")[0]
    recipe, said = imported("hpcai/2b.yaml", 1, capsys, "csv_path=clips.csv", "video_folder=clips")
    assert recipe["dtype"] == "bfloat16", "the yaml states none, and the source's default is fp16"
    assert recipe["predictor"] == {
        "use": "cogvideox-2b",
        "weights": {"use": "hf", "path": "models/2b/transformer"},
    }
    assert recipe["text_encoder"]["weights"]["path"] == "models/2b/text_encoder"
    assert recipe["task"]["steps"] == 1600, "100 epochs of 16 rows"


def test_latents_and_embeddings_that_the_source_kept_are_read(place, capsys):
    recipe, _ = imported("hpcai/sp_came.sh", 8, capsys)
    dataset = recipe["dataset"]
    assert (dataset["use"], dataset["latents"], dataset["texts"], dataset["unconditional"]) == (
        "npz-cache",
        "cache/latents",
        "cache/texts",
        "cache/texts/empty_text.npz",
    )
    assert recipe["optimizer"]["use"] == "came"
    assert recipe["optimizer"]["betas"] == [0.9, 0.95, 0.99]
    assert recipe["optimizer"]["eps"] == [1e-8, 1e-8]
    assert recipe["task"]["steps"] == 1600, "eight devices share each row"
    recipe, said = imported("hpcai/dp_lora.sh", 8, capsys)
    assert recipe["dataset"]["use"] == "csv"
    assert "text_embed_folder cache/texts -> its files are not read" in said
    assert recipe["task"]["steps"] == 200, "100 epochs of 16 rows over eight devices"
    assert recipe["adapter"]["targets"] == ["to_q", "to_k", "to_v", "to_out.0"]


def test_mindspeed_models_and_first_frames(place, capsys):
    recipe, _ = imported("mindspeed/pretrain_i2v.sh", 8, capsys)
    assert recipe["predictor"]["use"] == "cogvideox-5b-i2v"
    assert (recipe["task"]["image_noise"], recipe["task"]["image_dropout"]) == ([-3.0, 0.5], 0.05)
    assert (recipe["task"]["accumulate"], recipe["seed"]) == (4, 42)
    recipe, _ = imported("mindspeed/pretrain_t2v.sh", 8, capsys)
    assert recipe["predictor"]["use"] == "cogvideox-1.5-5b"
    assert recipe["predictor"]["text_length"] == 226
    assert recipe["optimizer"]["master_weights"] == "float32"


def test_a_layerzero_file_that_is_not_there_or_wrong_is_an_error(place, capsys):
    file = Path("mindspeed/zero.yaml")
    file.write_text(file.read_text().replace("zero3_size: 4", "zero3_size: 3"))
    assert "zero3_size is 3, which does not divide the 8 data ranks" in refused(
        "mindspeed/pretrain_layerzero.sh", capsys
    )
    file.write_text(file.read_text().replace('"bf16"', '"fp8"').replace("zero3_size: 3", "zero3_size: 2"))
    assert "param_dtype is 'fp8'; expected bf16, fp32" in refused("mindspeed/pretrain_layerzero.sh", capsys)
    file.unlink()
    assert "names mindspeed/zero.yaml, which is neither here" in refused(
        "mindspeed/pretrain_layerzero.sh", capsys
    )


@pytest.mark.parametrize(
    ("source", "old", "new", "says"),
    [
        ("factory/torchrun_lora.sh", "--nproc_per_node=4", "--nproc_per_node=gpu", "is no number of devices"),
        ("factory/torchrun_lora.sh", "LR=${LR:-1e-4}", "LR=$2", "--learning_rate is $2, which is not known"),
        ("factory/torchrun_lora.sh", '"$@"', "$MORE", "$MORE stands among the flags"),
        ("factory/torchrun_lora.sh", "LR=${LR:-1e-4}", "if grep -q a b; then LR=1; fi", "LR depends"),
        ("factory/torchrun_lora.sh", "--max_train_steps 100", "--max_train_steps", "is given no value"),
        ("hpcai/sp_came.sh", "0.9 0.95 0.99", "0.9 0.95", "and came has 3"),
        ("hpcai/sp_came.sh", "--num_frames 85", "--num_frames 77", "--also num_frames=85"),
        ("hpcai/dp_lora.sh", "--use_parallel True", "--use_parallel False", "without use_parallel"),
        ("hpcai/dp_lora.sh", "--worker_num=8 ", "", "is given no --worker_num"),
        ("mindone/text_sft.sh", "--zero_stage $DEEP", "--zero_stage 4 --tracker_name $DEEP", "0, 1, 2"),
        ("mindone/text_sft.sh", "bucket.yaml", "absent.yaml", "absent.yaml, which is neither here"),
        ("mindone/text_sft.sh", "--scale_lr", "--transformer_config big.yaml", "makes another model"),
    ],
)  # fmt: skip
def test_what_would_be_another_training_is_an_error(source, old, new, says, place, capsys):
    path = Path(source)
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert says in refused(source, capsys)


@pytest.mark.parametrize(
    ("source", "old", "new"),
    [
        ("mindspeed/pretrain_t2v.sh", "pretrain_sora.py", "inference_sora.py"),
        ("mindspeed/pretrain_t2v.sh", "pretrain_sora.py", "tools/get_sora_feature.py"),
        ("mindone/image_sft.sh", "cogvideox_image_to_video_sft.py", "prepare_dataset.py"),
    ],
)
def test_a_script_that_does_not_train_is_refused(source, old, new, place, capsys):
    path = Path(source)
    path.write_text(path.read_text().replace(old, new))
    assert f"{Path(new).name} does not train" in refused(source, capsys)


def test_an_older_data_json_is_read_as_well(place, capsys):
    path = Path("mindspeed/data.json")
    path.write_text(
        path.read_text().replace('"train_fps"', '"fps"').replace("video_processor", "data_process")
    )
    recipe, said = imported("mindspeed/pretrain_t2v.sh", 8, capsys)
    assert recipe["video"]["fps"] == 8
    assert "unmapped" not in said
    data = json.loads(path.read_text())
    data["dataset_param"]["use_feature_data"] = True
    path.write_text(json.dumps(data))
    assert "is of stored features" in refused("mindspeed/pretrain_t2v.sh", capsys)


def test_learned_positions_are_kept(place, capsys):
    path = Path("factory/image_sft.sh")
    flag = "--ignore_learned_positional_embeddings"
    path.write_text(path.read_text().replace("--optimizer adamw", f"--optimizer adamw {flag}"))
    _, said = imported(str(path), 2, capsys)
    assert f"{flag} -> nothing: this model has no learned positions" in said
    path.write_text(path.read_text().replace("CogVideoX1.5-5B-I2V", "CogVideoX-5b-I2V"))
    assert "without its learned positions" in refused(str(path), capsys)


def test_sizes_that_are_not_named_are_said_to_differ(place, capsys):
    path = Path("factory/torchrun_lora.sh")
    text = path.read_text().replace("--height_buckets 480 --width_buckets 720", "--height 256 --width 384")
    path.write_text(text)
    recipe, said = imported(str(path), 4, capsys)
    assert (recipe["video"]["height"], recipe["video"]["width"]) == (256, 384)
    assert "--height_buckets, --width_buckets none -> video: 256x384; the source has a list of sizes" in said
    path.write_text(text.replace("--seed 1", "--seed 1 --video_reshape_mode center"))
    _, said = imported(str(path), 4, capsys)
    assert (
        "--video_reshape_mode center -> clips are scaled to cover the size, and cut in the centre\n" in said
    )
    path.write_text(text.replace("--seed 1", "--seed 1 --video_reshape_mode random"))
    _, said = imported(str(path), 4, capsys)
    assert "cut in the centre; the source cuts them at random" in said


def test_arguments_of_the_script_are_taken_as_none_and_said(place, capsys):
    _, said = imported("factory/torchrun_lora.sh", 4, capsys)
    assert "the script is read as if it were given no arguments" in said


def test_of_commands_under_a_condition_that_is_not_known_one_has_to_be_chosen(place, capsys):
    path = Path("factory/torchrun_lora.sh")
    text = path.read_text()
    start = text.index("torchrun")
    head, command = text[:start], text[start:]
    path.write_text(f"{head}if [ -f clips/videos.txt ]; then\n{command}fi\n")
    _, said = imported(str(path), 4, capsys)
    assert "the command is taken to run, whatever `[ -f clips/videos.txt ]` on line" in said
    other = command.replace("1e-2", "1e-3")
    path.write_text(f"{head}if [ -f clips/videos.txt ]; then\n{command}else\n{other}fi\n")
    assert "2 commands train" in (error := refused(str(path), capsys))
    assert "which one depends on `[ -f clips/videos.txt ]` on line" in error
    path.write_text(f"{head}{command}{other}")
    assert "of 2 commands that train, the one at line 8 is taken" in imported(str(path), 4, capsys)[1]


def test_a_precision_that_only_accelerate_is_told_is_taken(place, capsys):
    path = Path("factory/text_lora.sh")
    path.write_text(path.read_text().replace("--mixed_precision bf16", "--pin_memory"))
    recipe, said = imported(str(path), 1, capsys)
    assert recipe["dtype"] == "bfloat16"
    assert "--mixed_precision bf16 is what accelerate is told, for the command states none" in said
    Path("configs/one.yaml").write_text("num_processes: 1\nmixed_precision: no\n")
    assert imported(str(path), 1, capsys)[0]["dtype"] == "float32"
    Path("configs/one.yaml").unlink()
    recipe, said = imported(str(path), 1, capsys)
    assert "dtype" not in recipe
    assert "configs/one.yaml, which may state another, is not at hand" in said


@pytest.mark.parametrize(
    "optimizer", ["adamw", "adamw8bit", "came", "prodigy", "adamw --use_cpu_offload_optimizer"]
)
def test_float16_goes_with_every_optimizer(optimizer, place, capsys):
    path = Path("factory/torchrun_lora.sh")
    path.write_text(path.read_text().replace("--optimizer adamw", f"--optimizer {optimizer}"))
    assert imported(str(path), 4, capsys)[0]["optimizer"]["master_weights"] == "float32"
