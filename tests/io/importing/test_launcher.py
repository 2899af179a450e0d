"""How many devices there are is read from the launcher, or asked for; never guessed."""

import pytest

from cvx_core import FormatError
from cvx_io.importing import shell
from cvx_io.importing.draft import Draft, flags_of
from cvx_io.importing.launcher import launch_of

CONFIG = "num_processes: 6\ndistributed_type: FSDP\nfsdp_config: {fsdp_sharding_strategy: SHARD_GRAD_OP}\n"


def launched(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "six.yaml").write_text(CONFIG)
    path = tmp_path / "s.sh"
    path.write_text(f"{start} train.py --a 1")
    [command] = shell.launches(shell.read_script(path))
    place = command.words.index("train.py")
    first = next((i for i, word in enumerate(command.words[:place]) if word.startswith("--")), place)
    return launch_of(command, flags_of(command.words[first:place]), path, "s.sh:1")


@pytest.mark.parametrize(
    ("start", "count", "strategy"),
    [
        ("python", 1, "ddp"),
        ("CUDA_VISIBLE_DEVICES=0,1 python -u", 1, "ddp"),
        ("accelerate launch --num_processes 3", 3, "ddp"),
        ("accelerate launch --num_processes=3 --gpu_ids 0,1,2", 3, "ddp"),
        ("accelerate launch --gpu_ids 0,1", 2, "ddp"),
        ("accelerate launch --config_file six.yaml --gpu_ids all", 6, "zero2"),
        ("accelerate launch --config_file six.yaml --num_processes 2", 2, "zero2"),
        ("accelerate launch --config_file fsdp.yaml --gpu_ids 0,1", 2, "zero3"),
        ("accelerate launch --use_deepspeed --zero_stage 3 --gpu_ids 0,1", 2, "zero3"),
        ("CUDA_VISIBLE_DEVICES=0,1,2 accelerate launch", 3, "ddp"),
        ("export CUDA_VISIBLE_DEVICES=0,1,2,3\naccelerate launch --multi_gpu", 4, "ddp"),
        ("torchrun --nproc_per_node=4", 4, "ddp"),
        ("torchrun --nnodes 2 --nproc-per-node 4 --node_rank $RANK", 8, "ddp"),
        ("torchrun", 1, "ddp"),
        ("python -m torch.distributed.run --nproc_per_node 2", 2, "ddp"),
        ("msrun --worker_num=16 --local_worker_num=8", 16, "ddp"),
        ("deepspeed --num_gpus 2 --num_nodes 3", 6, "ddp"),
    ],
)
def test_devices_are_counted(start, count, strategy, tmp_path, monkeypatch):
    launch = launched(start, tmp_path, monkeypatch)
    assert launch.strategy() == strategy
    draft = Draft("s.sh:1", {})
    assert launch.devices(draft) == count
    assert [entry.outcome for entry in draft.entries] == ["mapped"] * (launch.kind != "python")


@pytest.mark.parametrize(
    ("start", "says"),
    [
        ("accelerate launch", "given no --num_processes, .* state --also num_processes=N"),
        ("accelerate launch --gpu_ids all", "given --gpu_ids all, which does not say how many"),
        ("accelerate launch --config_file a.yaml --gpu_ids all", "and a.yaml is not at hand. Put it there"),
        ("torchrun --nproc_per_node gpu", "--nproc_per_node is 'gpu', which is no number of devices"),
        ("torchrun --nproc_per_node $GPUS", "State --also nproc_per_node=N"),
        ("torchrun --nnodes 1:4", "--nnodes is '1:4', which is no number of devices"),
        ("msrun --bind_core=True", "state --also worker_num=N"),
    ],
)
def test_a_number_that_nothing_tells_is_asked_for(start, says, tmp_path, monkeypatch):
    with pytest.raises(FormatError, match=says):
        launched(start, tmp_path, monkeypatch).devices(Draft("s.sh:1", {}))


def test_a_config_that_is_no_mapping_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(FormatError, match="is no config of accelerate"):
        launched("accelerate launch --config_file list.yaml", tmp_path, monkeypatch)
