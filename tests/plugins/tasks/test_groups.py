"""Groups of parameters by patterns: each has its settings, and none is empty without a word."""

from itertools import pairwise

import pytest
import torch
import torch.distributed.checkpoint as dcp

from cvx_core import CvxError, RecipeError
from cvx_plugins.optimizers.group_config import GroupConfig
from cvx_plugins.tasks.groups import grouped

NAMED = [(name, torch.zeros(1)) for name in ("a.weight", "a.bias", "b.weight", "c.weight")]


def names(part):
    return [name for name, _ in part.params]


def test_the_first_pattern_that_matches_counts_and_the_rest_comes_first():
    parts = grouped(
        NAMED, [GroupConfig(match="a.*", lr=0.5), GroupConfig(match="[ab].weight", weight_decay=0.1)]
    )
    assert [names(part) for part in parts] == [["c.weight"], ["a.weight", "a.bias"], ["b.weight"]]
    assert [part.options for part in parts] == [{}, {"lr": 0.5}, {"weight_decay": 0.1}]
    assert [names(part) for part in grouped(NAMED, [])] == [[name for name, _ in NAMED]]
    assert len(grouped(NAMED, [GroupConfig(match="*", lr=0.5)])) == 1


def test_a_pattern_without_a_parameter_is_an_error_unless_another_rank_has_one():
    group = GroupConfig(match="d.*", lr=0.5)
    with pytest.raises(
        CvxError, match=r"groups\[0\]\.match: 'd\.\*' gets no parameter: no trained .* 'a.weight'"
    ):
        grouped(NAMED, [group])
    assert len(grouped(NAMED, [group], elsewhere=["d.weight"])) == 1
    with pytest.raises(CvxError, match=r"groups\[1\]\.match: 'a\.bias' .* goes to 'a\.\*' before it"):
        grouped(NAMED, [GroupConfig(match="a.*", lr=0.5), GroupConfig(match="a.bias", lr=0.1)])


def test_a_run_uses_them_and_goes_on_with_them(tiny, launch):
    tiny |= {"video": {"frames": 1, "height": 32, "width": 32, "fps": 8}}
    tiny["optimizer"] |= {"groups": [{"match": "*.attn1.*", "lr": 0.0}]}
    tiny["task"] |= {"save_every": 1, "keep": 9, "resume": "auto"}
    launch(tiny, **{"task.stop_at": 2})
    out = launch(tiny)
    frozen, free = "model.transformer_blocks.0.attn1.to_q.weight", "model.proj_out.weight"
    rate = "optimizer.param_groups.transformer_blocks.0.attn1.to_q.weight.lr"
    states = []
    for step in (1, 2, 4):
        path = out / f"checkpoints/step-0000000{step}"
        tensors = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
        state = {name: torch.empty(tensors[name].size) for name in (frozen, free)} | {rate: None}
        dcp.load(state, checkpoint_id=path, no_dist=True)
        states.append(state)
    assert [state[rate] for state in states] == [0.0] * 3
    for one, other in pairwise(states):
        assert torch.equal(one[frozen], other[frozen])
        assert not torch.equal(one[free], other[free])


def test_a_group_that_sets_nothing_is_refused(tiny, launch):
    tiny["optimizer"] |= {"groups": [{"match": "*"}]}
    with pytest.raises(RecipeError, match=r"group '\*' sets nothing"):
        launch(tiny)
