"""The hf format in each of its layouts: one file, shards, and a folder whose library is transformers."""

from cvx_core.testing import format, plugin

MIB = 2**20

test_all = plugin.suite("formats")
test_file = format.suite("hf", file="model.safetensors")
test_whole = format.suite("hf")
test_shards = format.suite("hf", shard_limit=8 * MIB)
test_one_tensor_per_shard = format.suite("hf", shard_limit=1, config={"model_type": "t5"})
