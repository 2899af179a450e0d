"""Tensor parallel, with and without a shared sequence, does what one process does; so it does with others."""

import json
from collections import Counter

import pytest
import yaml

from cvx_core import run
from cvx_core.building import build
from cvx_core.errors import RecipeError
from cvx_core.placing import place
from cvx_core.recipe import parse
from cvx_core.spec import resolve
from cvx_parallel.tensor import overlaps, shares
from tests.distributed import matrix
from tests.distributed.harness import on_ranks
from tests.distributed.matrix import compare_all


def tp(size=2, sequence=False):
    return {"use": "tp", "size": size, "sequence": sequence}


PLAIN, SEQUENCE = tp(), tp(sequence=True)


def test_alone():
    cases = [(variant, [how]) for variant in ("1.0-t2v", "1.5-i2v", "2b") for how in (PLAIN, SEQUENCE)]
    compare_all([*cases, ("1.0-t2v", [SEQUENCE, {"use": "recompute"}])], world=2, layers=2)


def test_widths_that_do_not_divide():
    compare_all([("1.0-i2v", [tp(3)]), ("1.5-t2v", [tp(3, sequence=True)])], world=3, layers=2)


def test_with_data_and_context():
    others = ({"use": "ddp"}, {"use": "zero2"}, {"use": "zero3"}, {"use": "cp", "ulysses": 2})
    cases = [("1.5-i2v", [how, other]) for how in (PLAIN, SEQUENCE) for other in others]
    compare_all([*cases, ("1.0-t2v", [SEQUENCE, {"use": "cp", "ring": 2}])], world=4, layers=2)


def test_in_single_precision():
    compare_all([("1.5-i2v", [PLAIN]), ("1.5-i2v", [SEQUENCE])], world=2, dtype="float32", layers=2)


def test_collectives_are_no_more_than_needed():
    texts = [matrix.recipe("1.5-t2v", [how], "float32", layers=2) for how in (PLAIN, SEQUENCE)]
    # In each of 2 blocks, around attention and around the feed-forward layer: one forward, one back.
    plain = {"all_reduce": 8}
    # Text takes the all-reduces; the video is gathered once more, at the end.
    sequence = {"all_reduce": 8, "all_gather": 9, "reduce_scatter": 8}
    assert on_ranks(2, _counts, texts) == [[plain, sequence]] * 2


def _counts(texts: list[str]) -> list[dict[str, int]]:
    return [_count(text) for text in texts]


def _count(text: str) -> dict[str, int]:
    """Return how many collectives one forward and backward pass issues, by kind."""
    from torch.distributed.tensor.debug import CommDebugMode

    spec = resolve(parse(text))
    parts = place(build(spec), spec)
    features, draws = matrix._share(parts, spec, 0)
    with CommDebugMode() as mode:
        parts.forward_backward(features, draws)
    counts: Counter[str] = Counter()
    for operation, count in mode.get_comm_counts().items():
        counts[str(operation).split(".")[-1].removesuffix("_into_tensor").removesuffix("_tensor")] += count
    return dict(counts)


def test_a_checkpoint_goes_on_in_one_process(tmp_path):
    (tmp_path / "r.yaml").write_text(matrix.recipe("1.0-t2v", [], "float64", layers=2))

    def argv(out, *settings):
        fixed = (f"output={tmp_path / out}", "task.trackers=[]", "task.export=null", "task.steps=3")
        return [str(tmp_path / "r.yaml"), *(f"--set={item}" for item in (*fixed, *settings))]

    assert run.main(argv("whole")) == 0
    assert on_ranks(2, run.main, argv("parts", "parallel=[{use: tp}]", "task.stop_at=2")) == [0, 0]
    assert run.main(argv("parts", "task.resume=auto")) == 0
    whole, parts = (
        [json.loads(line) for line in (tmp_path / out / "log.jsonl").read_text().splitlines()]
        for out in ("whole", "parts")
    )
    assert len(parts) == 3
    assert [line["loss"] for line in parts] == pytest.approx([line["loss"] for line in whole], rel=1e-10)
    assert [line["grad_norm"] for line in parts] == pytest.approx([line["grad_norm"] for line in whole], 1e-6)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (tp(5), "tp 5 shares out the heads of predictor 'cogvideox', which has 3. Use a size of at most 3."),
        (tp(1, True), "has no effect with size 1"),
    ],
)
def test_refused(strategy, message):
    with pytest.raises(RecipeError, match=message):
        resolve(parse(matrix.recipe("1.0-t2v", [strategy], "float32")))


def test_refused_without_layers_to_share_out():
    data = yaml.safe_load(matrix.recipe("1.0-t2v", [tp()], "float32"))
    del data["predictor"], data["text_encoder"]
    data["task"]["use"] = "train-autoencoder"
    with pytest.raises(RecipeError, match="task 'train-autoencoder' has no predictor to share out"):
        resolve(parse(yaml.safe_dump(data)))


def test_shares_and_what_moves_between_two_of_them():
    assert shares(7, 3) == (3, 2, 2)
    held, used = (24, 24), (32, 16)
    assert [overlaps(rank, held, used) for rank in range(2)] == [[24, 0], [8, 16]]
    assert [overlaps(rank, used, held) for rank in range(2)] == [[24, 8], [0, 16]]
