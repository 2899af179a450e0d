"""The wrong model, format or option: the error names it and what fits, and nothing is written."""

from __future__ import annotations

import shutil
import sys
import types

import pytest
import torch

from tests.conversion.sources import HF, HF_FILE, LORA, LORA_HF, MM, SAT, SAT_FILE, VAE, edit, says

# The wrong model, format or path


@pytest.mark.parametrize(
    ("source", "options", "told"),
    [
        (SAT, ["--model", "cogvideox-5b"], ["as cogvideox-5b: does not fit", "960 missing", "--model"]),
        (SAT, ["--model", "cogvideox-2b"], ["as cogvideox-2b: does not fit", "missing"]),
        (
            HF,
            ["--model", "cogvideox-1.5-5b-i2v"],
            ["as cogvideox-1.5-5b-i2v: does not fit", "of another shape"],
        ),
        (MM, ["--model", "cogvideox-5b-i2v"], ["as cogvideox-5b-i2v: does not fit"]),
        (VAE, ["--model", "cogvideox-2b"], ["holds nothing of this model", "Check the path"]),
        (SAT, ["--model", "cogvideox-5d"], ["--model: ", "Did you mean 'cogvideox-5b'?"]),
        (SAT, ["--model", "nowhere.json"], ["nowhere.json: cannot be read", "Check the path"]),
        (SAT, ["--set-model", "num_layers=3"], ["24 missing", "transformer_blocks.2.", "--set-model"]),
        (SAT, ["--set-model", "num_heads=1000000000"], ["of these sizes cannot be built", "--set-model"]),
        (SAT, ["--from", "hf"], ["no .safetensors or pytorch_model.bin file in it", "Check the path"]),
        (SAT, ["--from", "megatron"], ["has no latest_checkpointed_iteration.txt", "Give the folder"]),
        (SAT, ["--from", "dcp"], ["no file .metadata in it", "Give the folder"]),
        (SAT, ["--from", "layerzero"], ["no iteration with model_*.pt files", "Give the folder"]),
        (SAT, ["--from", "sta"], ["no format 'sta'", "Did you mean 'sat'?"]),
        (HF, ["--from", "sat"], ["holds no mp_rank_00_model_states.pt", "complete?"]),
        (HF, ["--from", "comfyui"], ["64 names are not of a plain LoRA", "Expected"]),
        (HF, ["--from", "peft"], ["adapter_config.json: cannot be read", "Check the path"]),
        (MM, ["--from", "sat"], ["holds no mp_rank_00_model_states.pt", "complete?"]),
        (f"{HF}/{HF_FILE}", ["--from", "sat"], ["not a torch.save file", "again"]),
        (f"{SAT}/{SAT_FILE}", ["--from", "hf"], ["are no tensors", "Is it a training state"]),
        (f"{SAT}/latest", [], ["of no format that is known", "--from"]),
        (f"{HF}/config.json", [], ["of no format that is known", "--from"]),
        (f"{HF}/config.json/x", [], ["no such file or folder", "Check the path"]),
        (f"{HF}/no-such-folder", ["--from", "sat"], ["no such file or folder", "Check the path"]),
        (HF, ["--to", "hff"], ["no format 'hff'", "Did you mean 'hf'?"]),
        (HF, ["--to", "layerzero"], ["are written by training", "Convert to megatron"]),
        (LORA_HF, ["--to", "dcp", "--alpha", "1"], ["holds no LoRA weights", "Formats that do: "]),
        (HF, ["--to", "comfyui"], ["'hf' holds a model's weights", "--from"]),
        (SAT, ["--to", "peft", "--alpha", "1"], ["Does it hold LoRA weights?"]),
    ],
)
def test_what_is_not_what_it_was_taken_for(source, options, told, made, fails):
    path = made(source)
    about = [] if "--to" in options or "Did you mean" in told[-1] or "nowhere.json" in options else [path]
    says(fails(path, *options), *about, *told)


def test_image_to_video_weights_taken_for_text_to_video(made, fails):
    path, config = made("sat/i2v_5b/transformer"), made("sat/t2v_5b/hf/transformer") / "config.json"
    says(
        fails(path, "--model", config),
        path,
        "patch_embed.proj.weight is [48, 8, 2, 2], expected [48, 4, 2, 2]",
    )


def test_names_of_a_newer_export(copied, fails):
    path = copied(SAT)

    def rename(state):
        for name in list(state):
            state[name.replace("attention.dense", "attn.out")] = state.pop(name)

    edit(path / SAT_FILE, rename, "module")
    error = fails(path)
    says(error, path / SAT_FILE, "no rule matches 4 of the names", "transformer.layers.0.attn.out.weight")
    says(error, "Nearest rule: 'model.diffusion_model.transformer.layers.{i}.attention", "newer export?")


def test_an_empty_folder(tmp_path, fails):
    (tmp_path / "empty").mkdir()
    says(fails(tmp_path / "empty"), tmp_path / "empty", "an empty folder. Check the path")


def test_a_folder_of_several_models_lists_them(made, tmp_path, fails):
    for name in ("a", "b"):
        shutil.copytree(made(SAT), tmp_path / "models" / name)
    error = fails(tmp_path / "models")
    says(error, "not the weights of one model, but it holds:", "a (sat)", "b (sat)", "Convert one of them")


def test_a_whole_module_in_a_file(tmp_path, fails, monkeypatch):
    theirs = types.ModuleType("theirs")
    theirs.Net = type("Net", (torch.nn.Linear,), {"__module__": "theirs"})
    monkeypatch.setitem(sys.modules, "theirs", theirs)
    torch.save(theirs.Net(2, 2), tmp_path / "net.pt")
    says(
        fails(tmp_path / "net.pt"),
        tmp_path / "net.pt",
        "holds <theirs.Net, not loaded>",
        "Save a state_dict()",
    )


# Settings and options


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--set", "tp=4"], ["tp=4 does not divide the model's 3 heads", "Choose one of [1, 3]"]),
        (["--set", "tp=0"], ["--set tp: got 0; Input should be greater than or equal to 1"]),
        (["--set", "tp=two"], ["--set tp: got 'two'; Input should be a valid integer"]),
        (["--set", "tp=2.0"], ["--set tp: got 2.0; Input should be a valid integer"]),
        (["--set", "tpp=2"], ["--set tpp: 'megatron' has no such field. Did you mean 'tp'?"]),
        (
            ["--set", "pp=[1,2.5]"],
            ["--set pp: got [1, 2.5]; Input should be a valid integer", "layers of each"],
        ),
        (["--set", "pp=[]"], ["--set pp: got []", "layers of each"]),
        (["--set", "pp=[2,0]"], ["--set pp: got [2, 0]", "layers of each"]),
        (["--set", "pp=[3,4]"], ["pp sizes [3, 4] sum to 7, but the model has 2 layers", "Give 2 sizes"]),
        (["--set", "pp=[[1,1],[1]]"], ["every virtual chunk needs the same number of stages"]),
        (["--set", "pp=3"], ["pp=3 is more than the model's 2 layers", "Choose fewer"]),
        (["--set", "tp=1", "--set", "tp=3"], ["--set tp: given twice. Leave one out"]),
        (["--set", "tp"], ["--set tp: expected KEY=VALUE, such as tp=2"]),
        (["--set", "=2"], ["--set =2: expected KEY=VALUE"]),
        (["--set", "tp=["], ["--set tp=[: '[' is no YAML value"]),
        (["--set", "path=x"], ["--set path: paths are SRC and DST"]),
        (["--set", "replicas=first"], ["--set replicas: does nothing here. Give it with --set-from"]),
        (
            ["--set", "positions=other"],
            ["--set positions: got 'other'; Input should be 'pos_embed' or 'rope'"],
        ),
        (["--to", "hf", "--set-from", "lorra=drop"], ["'sat' has no such field. Did you mean 'lora'?"]),
        (["--to", "hf", "--set", "shard_limit=0"], ["--set shard_limit: got 0"]),
        (
            ["--to", "sat", "--set", "tag=../x"],
            ["--set tag: got '../x'; expected the plain name of a folder"],
        ),
        (["--to", "sat", "--set", "tag=.."], ["--set tag: got '..'; expected the plain name of a folder"]),
        (["--to", "hf", "--set-model", "sample_hight=8"], ["Did you mean 'sample_height'?"]),
        (["--to", "hf", "--set-model", "num_layers=-3"], ["--set-model num_layers: got -3"]),
        (["--to", "hf", "--dtype", "int8"], ["--dtype int8: expected float16, bfloat16, float32 or float64"]),
        (["--to", "hf", "--alpha", "1"], ["--alpha: does nothing here", "Leave it out"]),
        (["--to", "hf", "--scale", "2"], ["--scale: does nothing here", "Leave it out"]),
        (["--to", "hf", "--alpha", "big"], ["argument --alpha: invalid float value: 'big'"]),
        (["--to", "hf", "--merge-lora", "nowhere"], ["nowhere: no such file or folder. Check the path"]),
    ],
)
def test_an_option_that_does_not_fit(options, told, made, fails):
    to = [] if "--to" in options else ["--to", "megatron"]
    says(fails(made(SAT), *to, *options), *told)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ([], ["states no alpha for 8 modules", "transformer_blocks.0.attn1.to_q", "pass --alpha"]),
        (["--alpha", "nan"], ["alpha of", "is not a finite number"]),
        (["--alpha", "1", "--model", "cogvideox-2b"], ["--model: does nothing here", "LoRA weights alone"]),
        (["--alpha", "1", "--set-model", "num_layers=2"], ["--set-model: does nothing here"]),
        (["--alpha", "1", "--scale", "2"], ["--scale: does nothing here"]),
        (["--alpha", "1", "--merge-lora", "x"], ["--merge-lora: does nothing here"]),
        (
            ["--alpha", "1", "--to", "megatron-lora", "--set", "tp=5"],
            ["cannot be split over tp=5", "divides"],
        ),
        (["--alpha", "1", "--to", "megatron-lora", "--set", "pp=[1,2]"], ["sum to 3", "Give 2 sizes"]),
        (["--alpha", "1", "--to", "comfyui"], ["out: this layout is one file", "ends in .safetensors"]),
        (["--alpha", "1", "--to", "comfyui", "--set", "rank=4"], ["--set rank: 'comfyui' has no such field"]),
    ],
)
@pytest.mark.parametrize("run", [[], ["--dry-run"]])
def test_an_option_that_does_not_fit_a_lora(options, told, run, made, fails):
    to = [] if "--to" in options else ["--to", "diffusers-lora"]
    says(fails(made(LORA), *to, *options, *run), *told)


def test_a_lora_that_fits_no_layer(made, fails):
    lora = made(LORA_HF)
    smaller = fails(made("megatron/src/sat_i2v10_L2/transformer"), "--merge-lora", lora, "--alpha", "1")
    says(smaller, lora, "to_k.weight' is float32 [32, 32], but its LoRA changes", "for another model?")
    other = fails(made(VAE), "--merge-lora", lora, "--alpha", "1", "--set-model", "scale_factor=0.7")
    says(other, lora, "no weight for 8 of 8 LoRA modules", "transformer_blocks.0.attn1.to_k.weight")


def test_a_model_given_as_a_lora(made, fails):
    says(fails(made(SAT), "--merge-lora", made(HF)), made(HF), "'hf' holds a model's weights", "--from")


def test_a_scale_that_is_no_number(made, fails):
    options = ["--merge-lora", made(LORA_HF), "--alpha", "1", "--scale", "inf"]
    says(fails(made(LORA), "--set-from", "lora=drop", *options), "--scale inf: expected a finite number")
