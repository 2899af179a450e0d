"""Pipeline: stages on several ranks do what one process does."""

import json

import pytest
import yaml
from safetensors.torch import load_file, save_file

from cvx_core import run
from cvx_core.errors import RecipeError
from cvx_core.recipe import parse
from cvx_core.spec import resolve
from cvx_io.tensors.dcp_metadata import read_checkpoint
from cvx_plugins.parallel.pp_config import PipelineConfig
from tests.distributed import matrix
from tests.distributed.harness import on_ranks
from tests.distributed.matrix import compare_all

SCHEDULES = [
    {"schedule": "1f1b"},
    {"schedule": "gpipe", "microbatches": 3},
    {"schedule": "zero-bubble"},
    {"schedule": "interleaved"},
    {"schedule": "zero-bubble", "virtual": 2},
]


def pp(**fields):
    return {"use": "pp", **fields}


def test_every_schedule():
    cases = [("1.5-i2v", [pp(**fields)]) for fields in SCHEDULES]
    compare_all([*cases, ("1.0-t2v", [pp()])], world=2)


def test_uneven_stages():
    cases = [
        ("1.0-i2v", [pp(stages=[1, 2, 1, 3])]),
        ("2b", [pp(stages=[2, 1, 3, 1], microbatches=2)]),
        ("1.0-t2v", [pp(stages=[2, 1, 3, 1], schedule="zero-bubble")]),
    ]
    compare_all(cases, world=4, layers=7)


def test_with_data_strategies():
    compare_all([("1.0-t2v", [pp(), {"use": use}]) for use in ("ddp", "zero3")], world=4)


@pytest.mark.slow
def test_every_schedule_with_data_strategies():
    data = [{"use": "ddp"}, {"use": "zero3"}]
    cases = [("1.5-i2v", [pp(**fields), strategy]) for fields in SCHEDULES[2:] for strategy in data]
    compare_all([*cases, ("1.0-t2v", [pp(), {"use": "zero2"}])], world=4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "other",
    [
        {"use": "tp", "size": 2},
        {"use": "tp", "size": 2, "sequence": True},
        {"use": "cp", "ulysses": 2},
        {"use": "cp", "ring": 2},
    ],
    ids=str,
)
def test_every_schedule_with_model_axes(other):
    variants = ["1.0-t2v", "1.0-i2v", "1.5-i2v"]
    cases = [
        (variant, [pp(**fields), other]) for variant, fields in zip(variants, SCHEDULES[2:], strict=True)
    ]
    compare_all(cases, world=4)


def argv(folder, out, *settings):
    fixed = (f"output={folder / out}", "task.trackers=[]", "task.accumulate=2", "loader.batch=3")
    return [str(folder / "r.yaml"), *(f"--set={item}" for item in (*fixed, *settings))]


def run_all(argvs):
    """Run recipes one after the other; returns their exit codes."""
    return [run.main(arguments) for arguments in argvs]


def lines(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs of three steps, from one file of weights. `whole`: one process; `ahead`: two stages that one
    process takes over after two steps; `behind`: the other way round. Batches make parts of two rows and one.
    """
    folder = tmp_path_factory.mktemp("pp")
    (folder / "r.yaml").write_text(matrix.recipe("1.5-i2v", [], "float64", layers=3))
    assert run.main(argv(folder, "first", "task.steps=1", "task.export={use: hf}")) == 0
    weights = f"predictor.weights={{use: hf, path: {folder / 'first/model/transformer'}}}"
    cut = "parallel=[{use: pp, stages: [2, 1], microbatches: 2}]"
    every = ("task.steps=3", weights)
    assert run.main(argv(folder, "whole", *every, "task.save_every=2")) == 0
    source = f"task.resume={folder / 'whole/checkpoints/step-00000002'}"
    runs = [argv(folder, "ahead", *every, cut, "task.stop_at=2"), argv(folder, "behind", *every, cut, source)]
    assert on_ranks(2, run_all, runs) == [[0, 0], [0, 0]]
    assert run.main(argv(folder, "ahead", *every, "task.resume=auto")) == 0
    return folder


def test_every_rank_saves_what_it_has_under_the_names_of_the_whole(folder):
    step = "checkpoints/step-00000002"
    ahead, whole = (read_checkpoint(folder / out / step) for out in ("ahead", "whole"))
    assert {n: t.info for n, t in ahead.tensors.items()} == {n: t.info for n, t in whole.tensors.items()}
    assert set(ahead.objects) == set(whole.objects)
    assert len({chunk.place.file for tensor in ahead.tensors.values() for chunk in tensor.chunks}) == 2


def test_stages_and_one_process_go_on_from_each_other(folder):
    whole = lines(folder / "whole")
    for out, steps in (("ahead", whole), ("behind", whole[2:])):
        ours = lines(folder / out)
        assert [line["rows"] for line in ours] == [line["rows"] for line in steps]
        assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in steps], rel=1e-9)
        norms = [line["grad_norm"] for line in ours]
        assert norms == pytest.approx([line["grad_norm"] for line in steps], rel=1e-6)


def test_a_name_that_no_rank_has_is_refused(folder, tmp_path):
    [file] = (folder / "first/model/transformer").glob("*.safetensors")
    tensors = load_file(file)
    tensors["stray"] = tensors.pop("proj_out.bias")
    save_file(tensors, tmp_path / "weights.safetensors")
    weights = f"predictor.weights={{use: hf, path: {tmp_path / 'weights.safetensors'}}}"
    arguments = argv(folder, "refused", weights, "parallel=[{use: pp}]")
    said = on_ranks(2, complaint, arguments)
    for text in said:
        assert "1 missing" in text
        assert "proj_out.bias" in text
        assert "stray" in text


def complaint(arguments):
    """Return what a refused run says."""
    import contextlib
    import io

    with contextlib.redirect_stderr(io.StringIO()) as said:
        assert run.main(arguments) == 2
    return said.getvalue()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"size": 5}, "5 ranks x 1 = 5 stages, which 4 blocks do not fill. Use at most 4 ranks."),
        ({"virtual": 3, "schedule": "interleaved"}, "2 ranks x 3 = 6 stages, which 4 blocks do not fill."),
        ({"stages": [2, 3]}, "lists 2 + 3 = 5 blocks; the predictor has 4. Take away 1."),
        ({"stages": [1, 1]}, "lists 1 + 1 = 2 blocks; the predictor has 4. Add 2."),
        ({"stages": [2, 2], "size": 3}, "size is 3, but stages lists 2 ranks"),
        ({"stages": [[1, 1], 2]}, "lists [1, 2] stages on ranks; give each as many"),
        ({"stages": [[1, 1], [1, 1]]}, "schedule '1f1b' has one stage on a rank, not 2; use interleaved"),
        ({"virtual": 1, "schedule": "interleaved"}, "with one stage on a rank is 1f1b"),
        ({"microbatches": 5}, "5 parts of 4 rows leave some empty. Set loader.batch to 5 or more"),
        ({"size": 1}, "has no effect with 1 rank"),
    ],
)
def test_refused(fields, message):
    text = matrix.recipe("1.0-t2v", [pp(**fields)], "float32")
    with pytest.raises(RecipeError) as refused:
        resolve(parse(text))
    assert message in str(refused.value)


def test_microbatches_fill_rounds():
    data = yaml.safe_load(matrix.recipe("1.0-t2v", [pp(microbatches=5, schedule="zero-bubble")], "float32"))
    data["loader"]["batch"] = 5
    with pytest.raises(RecipeError, match=r"5 of them over 2 ranks in 2 rounds, .* Use 4\."):
        resolve(parse(yaml.safe_dump(data)))
    config = PipelineConfig(schedule="interleaved", size=4)
    assert [config.parts(rows) for rows in (1, 3, 7, 8, 9, 11, 13)] == [1, 3, 7, 8, 8, 10, 12]


@pytest.mark.parametrize("other", ["recompute", "compile"])
def test_a_split_pass_goes_with_no_other_way_of_running_blocks(other):
    parallel = [pp(schedule="zero-bubble"), {"use": other}]
    with pytest.raises(RecipeError, match=f"with '{other}' each of them would cost a whole pass"):
        resolve(parse(matrix.recipe("1.0-t2v", parallel, "float32")))


def test_only_the_training_of_a_predictor_can_be_cut():
    data = yaml.safe_load(matrix.recipe("1.0-t2v", [pp()], "float32"))
    del data["predictor"], data["text_encoder"]
    data["task"]["use"] = "train-autoencoder"
    with pytest.raises(RecipeError, match="which task 'train-autoencoder' has not"):
        resolve(parse(yaml.safe_dump(data)))


def test_stages_go_round_the_ranks():
    assert PipelineConfig(stages=[[1, 2], [3, 4]], schedule="interleaved").counts(10) == [1, 3, 2, 4]
    assert PipelineConfig(size=4).counts(42) == [10, 11, 10, 11]
    assert PipelineConfig(size=2, schedule="interleaved").bounds(5) == [(0, 1), (1, 2), (2, 3), (3, 5)]
