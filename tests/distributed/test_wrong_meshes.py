"""Meshes that cannot be: refused before any rank looks for another, with numbers, a remedy and the line."""

import re

import pytest
import torch.distributed as dist

from cvx_core import run

TRAIN = """
video: {frames: 9, height: 48, width: 80}
predictor: {use: cogvideox, num_layers: 4, num_heads: 3, head_dim: 16, latent_channels: 4, text_dim: 32}
text_encoder: {use: t5, num_layers: 1, dim: 32, num_heads: 2, tokenizer: bytes}
autoencoder: {use: cogvideox-vae, latent_channels: 4, base_channels: 8, blocks_per_level: 1}
dataset: {use: synthetic, rows: 8}
loader: {batch: 2}
"""
MEMORY = "video.start=center task.memory=true task.image_noise=null"
AUTOENCODER = """
video: {frames: 9, height: 48, width: 80}
autoencoder: {use: cogvideox-vae, latent_channels: 4, base_channels: 8, blocks_per_level: 1}
dataset: {use: synthetic, rows: 8}
task: {use: train-autoencoder}
"""
CACHE = TRAIN.replace("use: synthetic, rows: 8", "use: feature-cache, path: .")
WEIGHTS = "weights: {use: hf, path: .}"
SAMPLE = TRAIN.replace("loader: {batch: 2}", "task: {use: sample, guidance: 1.0}")
SAMPLE = SAMPLE.replace("text_dim: 32}", f"text_dim: 32, {WEIGHTS}}}").replace(
    "level: 1}", f"level: 1, {WEIGHTS}}}"
)

# name: (entries of `parallel`, the entry at fault or None for all of it, what is said of it)
WRONG = {
    "nothing at all": ([], None, "nothing says how 8 processes share the work. Add `parallel: [{use: ddp}]`"),
    "nothing that owns an axis": (
        ["recompute"],
        None,
        "the mesh has one rank, but there are 8 processes. Add `- {use: ddp}`, or start 1 process.",
    ),
    "too few ranks": (
        ["ddp, size: 3"],
        0,
        "ddp 3, but there are 8 processes. Set ddp.size to 8, or start 3 proc",
    ),
    "too many ranks": (
        ["zero3, size: 16"],
        0,
        "zero3 16, but there are 8 processes. Set zero3.size to 8, or",
    ),
    "a product that is too large": (
        ["tp, size: 2", "cp, ulysses: 2, ring: 3", "zero2, size: 2"],
        1,
        "tp 2 x cp.ring 3 x cp.ulysses 2 x zero2 2 = 24, but there are 8 processes. Set cp.ring to 1,",
    ),
    "a product without data ranks": (
        ["tp, size: 2", "pp, size: 2"],
        None,
        "tp 2 x pp 2 = 4, but there are 8 processes. Add `- {use: ddp}`, or start 4 processes.",
    ),
    "no whole number is left for data ranks": (
        ["ddp", "tp, size: 3"],
        1,
        "which does not divide 8 processes, so nothing whole is left for ddp. Set tp.size to 2, or start 6",
    ),
    "a group that does not divide the world": (
        ["layerzero, zero3_size: 3"],
        0,
        "layerzero.zero3_size 3, which does not divide 8 processes. Set layerzero.zero3_size to 4, or start",
    ),
    "a group that does not divide the data ranks": (
        ["layerzero, size: 8, zero3_size: 3"],
        0,
        "zero3_size 3 does not divide size 8; 2 would.",
    ),
    "two owners of the data axis": (
        ["ddp", "zero3"],
        1,
        "'zero3' and 'ddp' both own axis dp_replicate. Keep one.",
    ),
    "zero and layerzero": (
        ["layerzero, zero3_size: 2", "tp, size: 2", "zero2"],
        2,
        "'zero2' and 'layerzero' both own axis dp_shard. Keep one.",
    ),
    "the same twice": (["ddp, size: 2", "tp", "ddp, size: 2"], 2, "'ddp' is given twice. Keep one."),
    "the same twice without an axis": (
        ["zero2", "recompute", "recompute, every: 2"],
        2,
        "'recompute' is given twice",
    ),
    "size 0": (["ddp, size: 0"], 0, "size: got 0; expected a value greater than or equal to 1 or 'auto'."),
    "a size that is no number": (["zero3, size: all"], 0, "got 'all'; expected a whole number or 'auto'."),
    "a typo in a strategy": (["zero33"], 0, "no strategy 'zero33'. Did you mean 'zero3'?"),
    "a typo in a field": (["ddp", "tp, sise: 2"], 1, "'tp' has no such field. Did you mean 'size'?"),
    "more stages than layers": (
        ["pp, size: 8"],
        0,
        "8 ranks x 1 = 8 stages, which 4 blocks do not fill. Use at most 4 ranks.",
    ),
    "more virtual stages than layers": (
        ["ddp", "pp, size: 4, virtual: 2, schedule: interleaved"],
        1,
        "4 ranks x 2 = 8 stages, which 4 blocks do not fill.",
    ),
    "stages that are not all layers": (
        ["ddp", "pp, stages: [1, 2]"],
        1,
        "lists 1 + 2 = 3 blocks; the predictor has 4. Add 1.",
    ),
    "no stages": (["ddp", "pp, stages: []"], 1, "stages lists no rank; give the blocks of each, such as"),
    "no stages on a rank": (
        ["ddp", "pp, stages: [[2, 2], []]"],
        1,
        "stages[1]: got []; expected a whole number or a list of at least 1.",
    ),
    "stages that leave no whole number": (
        ["ddp", "pp, stages: [1, 1, 2]"],
        1,
        "pp 3, which does not divide 8 processes, so nothing whole is left for ddp. Start 6 or 9 processes.",
    ),
    "stages for no number of ranks": (
        ["pp, stages: [1, 1, 2]"],
        None,
        "there are 8 processes. Start 3 processes, or add `- {use: ddp}` and start 6 or 9 processes.",
    ),
    "stages for other ranks": (["pp, size: 8, stages: [2, 2]"], 0, "size is 8, but stages lists 2 ranks"),
    "a pipeline of one": (
        ["ddp", "pp, size: 1"],
        1,
        "has no effect with 1 rank. Use 2 or more, or",
    ),
    "empty microbatches": (
        ["ddp", "pp, size: 2, microbatches: 4"],
        1,
        "4 parts of 2 rows leave some empty. Set loader.batch to 4 or more, or microbatches to 2 or less.",
    ),
    "a split backward pass through recomputed blocks": (
        ["ddp", "recompute", "pp, size: 2, schedule: zero-bubble"],
        2,
        "'zero-bubble' goes back through a block in pieces",
    ),
    "more tensor ranks than heads": (
        ["ddp", "tp, size: 4"],
        1,
        "tp 4 shares out the heads of predictor 'cogvideox', which has 3. Use a size of at most 3.",
    ),
    "heads for what is left": (
        ["ddp, size: 2", "tp, size: auto"],
        1,
        "size: got 'auto', which only strategies that read different rows take: ddp, zero1, zero2, zero3 and",
    ),
    "tokens for what is left": (
        ["ddp, size: 2", "cp, ulysses: auto"],
        1,
        "ulysses: got 'auto', which only strategies that read different rows take",
    ),
    "a sequence by another name": (
        ["ddp", "sp"],
        1,
        "no strategy 'sp'. Here that is `{use: tp, sequence: tr",
    ),
    "shards by another name": (["fsdp"], 0, "no strategy 'fsdp'. Here that is `{use: zero3}`."),
    "a sequence shared by one": (["ddp", "tp, size: 1, sequence: true"], 1, "has no effect with size 1"),
    "tokens shared by one": (["ddp", "cp"], 1, "ulysses 1 x ring 1 shares out nothing. Set one of them to 2"),
    "an ignored module that is not there": (
        ["layerzero, zero3_size: 4, ignored_modules: [embeding_layers]"],
        0,
        "predictor 'cogvideox' has no module 'embeding_layers' with parameters.",
    ),
    "an autoencoder among ignored modules": (
        ["layerzero, zero3_size: 4, ignored_modules: [ae]"],
        0,
        "'ae' is a model of its own here, which every rank keeps whole; only the predictor is shared out.",
    ),
    "blocks that layerzero is told": (
        ["layerzero, transformer_layers: [mindspeed_mm.models.predictor.dits.sat_dit.VideoDiTBlock]"],
        0,
        "'layerzero' has no such field: blocks are those that the predictor's plan names.",
    ),
    "a checkpoint that layerzero is told": (
        ["layerzero, ckpt_load_path: /old"],
        0,
        "'layerzero' has no such field: a run goes on from its own checkpoint by `task.resume`",
    ),
    "gradients summed in float16": (
        ["layerzero, reduce_dtype: fp16"],
        0,
        "reduce_dtype: is float16, in which small gradients vanish",
    ),
    "blocks gathered without limit": (
        ["layerzero, limit_all_gathers: false"],
        0,
        "limit_all_gathers: no more blocks are gathered ahead than forward_prefetch and backward_prefetch",
    ),
    "encoders shared by nobody": (
        ["ddp", "encoder-dp"],
        1,
        "pp 1 x ring 1 x ulysses 1 x tp 1 = 1 rank sees them. Add tp, cp or pp, or remove this strategy.",
    ),
    "an autoencoder shared by nobody": (
        ["zero3", "vae-cp"],
        1,
        "codes chunks of a clip over the ranks that",
    ),
    "encoder-dp of what is in memory": (
        ["ddp", "cp, ring: 2", "encoder-dp"],
        2,
        "encodes every row once (memory: true), so later batches need no encoder. Set task.memory=false",
        TRAIN + f"# {MEMORY}",
    ),
    "interleave of what is in memory": (
        ["ddp", "interleave"],
        1,
        "encodes every row once (memory: true)",
        TRAIN + f"# {MEMORY}",
    ),
    "encoder-dp of what is in a cache": (
        ["ddp", "cp, ring: 2", "encoder-dp"],
        2,
        "dataset 'feature-cache' is encoded already, so no batch needs an encoder. Name the clips",
        CACHE,
    ),
    "vae-cp of what is in a cache": (
        ["ddp", "cp, ring: 2", "vae-cp"],
        2,
        "dataset 'feature-cache' is encoded already, so no clip is coded. Name the clips themselves,",
        CACHE,
    ),
    "interleave of what is in a cache": (
        ["ddp", "interleave"],
        1,
        "dataset 'feature-cache' is encoded already, so no batch needs an encoder. Name the clips",
        CACHE,
    ),
    "guidance in training": (
        ["ddp, size: 4", "cfg-parallel"],
        1,
        "guidance, which task 'train' has not",
    ),
    "guidance that is off": (
        ["ddp, size: 4", "cfg-parallel"],
        1,
        "task.guidance 1 asks for one",
        SAMPLE,
    ),
    "optimizer state of what is not trained": (["zero1"], 0, "task 'sample' trains nothing", SAMPLE),
    "gradients of what is not trained": (["zero2"], 0, "task 'sample' trains nothing", SAMPLE),
    "recompute without a backward pass": (
        ["ddp", "recompute"],
        1,
        "'sample' has no backward pass",
        SAMPLE,
    ),
    "a pipeline of an autoencoder": (["ddp", "pp"], 1, "which task 'train-autoencoder' has not", AUTOENCODER),
    "heads of an autoencoder": (["ddp", "tp"], 1, "task 'train-autoencoder' has no predictor", AUTOENCODER),
}


def recipe(entries: list[str], base: str) -> str:
    """Return a recipe with one line for each entry of `parallel`, from line 2 on."""
    task = "" if "task:" in base else "task: {use: train}\n"
    return "".join(
        ["parallel:\n" if entries else "\n", *(f"- {{use: {e}}}\n" for e in entries), base, "\n", task]
    )


class MeetingError(Exception):
    """Raised where a run looks for the other processes."""


@pytest.fixture
def as_rank(monkeypatch):
    """Return what makes this process one of 8, raising MeetingError at a store or a group."""

    def met(*_args, **_options):
        raise MeetingError

    for name in ("rendezvous", "init_process_group", "TCPStore", "FileStore", "HashStore", "PrefixStore"):
        monkeypatch.setattr(dist, name, met)

    def become(rank):
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": 1}
        for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 8, **address}.items():
            monkeypatch.setenv(name, str(value))

    return become


@pytest.mark.parametrize("name", WRONG)
def test_refused(name, tmp_path, capsys, as_rank):
    """By each rank for itself, in the words in which `--check` refuses without any."""
    entries, fault, says, *rest = WRONG[name]
    base = rest[0] if rest else TRAIN
    path = tmp_path / "r.yaml"
    path.write_text(recipe(entries, base))
    settings = [f"--set={item}" for item in MEMORY.split()] if MEMORY in base else []
    assert run.main([str(path), "--check", "--world", "8", *settings]) == 2
    error = capsys.readouterr().err
    problem, count = error.strip().split("\n")
    assert count == "1 problem; nothing was built."
    assert says in problem
    where = re.match(r".*/r\.yaml(?::(\d+))?: parallel(\[\d+\])?", problem)
    assert where is not None, problem
    if fault is not None:
        assert (where[1], where[2]) == (str(fault + 2), f"[{fault}]"), problem
    for rank in (0, 7):
        as_rank(rank)
        assert run.main([str(path), *settings]) == 2
        assert capsys.readouterr().err == error


def test_the_same_recipes_without_fault_are_taken(tmp_path, capsys, as_rank):
    path = tmp_path / "r.yaml"
    for entries, mesh in (
        (["ddp"], "dp_replicate 8"),
        (["zero3, size: 2", "tp, size: 2, sequence: true", "cp, ring: 2"], "dp_shard 2 x ring 2 x tp 2"),
        (["layerzero, zero3_size: 2", "pp, stages: [1, 3]"], "pp 2 x dp_replicate 2 x dp_shard 2"),
        (
            ["ddp", "cp, ulysses: 4", "encoder-dp", "vae-cp", "interleave", "recompute"],
            "dp_replicate 2 x ulysses 4",
        ),
    ):
        path.write_text(recipe(entries, TRAIN))
        assert run.main([str(path), "--check", "--world", "8"]) == 0, capsys.readouterr().err
        assert f": {mesh} = 8 processes" in capsys.readouterr().out
        as_rank(7)
        with pytest.raises(MeetingError):
            run.main([str(path)])
