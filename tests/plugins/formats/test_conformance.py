"""Every format that holds any weights, in each of its layouts."""

from cvx_core.testing import format, plugin

MIB = 2**20

test_all = plugin.suite("formats")
test_file = format.suite("hf", file="model.safetensors")
test_whole = format.suite("hf")
test_shards = format.suite("hf", shard_limit=8 * MIB)
test_one_tensor_per_shard = format.suite("hf", shard_limit=1, config={"model_type": "t5"})
test_sat = format.suite("sat", file="model.pt")
test_sat_folder = format.suite("sat")
test_megatron = format.suite("megatron")
test_merged = format.suite("megatron", file="model.pt")
test_two_ranks = format.suite("megatron", tp=2, iteration=12)
