"""LoRA under strategies: the same loss, gradients of the factors and updates as one process."""

from tests.distributed.matrix import compare_all

LORA = {
    "use": "lora",
    "rank": 3,
    "alpha": 5,
    "targets": ["to_q", "to_k", "to_v", "to_out.0", "ff.net.*", "proj"],
}
USUAL = {"use": "lora", "rank": 4}


def test_data_strategies():
    cases = [("1.0-t2v", [LORA, {"use": use}]) for use in ("ddp", "zero3", "zero1")]
    compare_all([*cases, ("1.5-i2v", [LORA, {"use": "zero3"}, {"use": "recompute"}])], world=2, layers=2)


def test_tensor_parallel():
    cases = [(variant, [LORA, {"use": "tp"}]) for variant in ("1.0-t2v", "1.5-i2v")]
    compare_all([*cases, ("1.0-t2v", [LORA, {"use": "tp", "sequence": True}])], world=2, layers=2)


def test_layerzero():
    compare_all([("1.0-t2v", [USUAL, {"use": "layerzero", "zero3_size": 2}])], world=4, layers=2)
