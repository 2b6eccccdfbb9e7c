"""What comes to a model after it was offloaded runs where the rest does."""

from __future__ import annotations

from types import SimpleNamespace

import accelerate
import torch
from torch import nn

from dit_accel.patches.learned import FollowData, attach
from dit_accel.patches.offloading import execution_device
from dit_accel.stages.compensate.linear import LinearBranch
from tests.patches.test_fingerprint import groups, model_of

GPU = torch.device("cuda", 0)


def test_where_an_offloaded_layer_runs(tmp_path):
    layer = nn.Linear(4, 4)
    assert execution_device(layer, layer) is None
    accelerate.cpu_offload(layer, execution_device=GPU)
    assert execution_device(layer, layer) == GPU
    for kind, folder, moves_along in (
        ("block_level", None, True),
        ("leaf_level", None, False),
        ("block_level", tmp_path, False),
    ):
        model = groups(kind, folder)(model_of())
        found = execution_device(model, model.blocks[0].attn1.to_q)
        assert found == (None if moves_along else torch.device("cpu"))


def test_learned_parameters_follow_the_data_of_their_layer():
    learned = LinearBranch().build(2, 12)
    elsewhere = SimpleNamespace(device=torch.device("meta"))
    FollowData()(learned, (torch.zeros(1),))
    assert learned.weight.device.type == "cpu"
    FollowData()(learned, (elsewhere,))
    assert learned.weight.device.type == "meta"
    FollowData()(learned, (torch.zeros(1),))  # what offloading keeps elsewhere is not for the taking
    assert learned.weight.device.type == "meta"


def test_a_group_with_streams_learns_of_new_parameters_and_forgets_them():
    """It fails at a parameter that its list does not have."""
    model = groups("block_level")(model_of())
    group = model.blocks[0]._diffusers_hook.get_hook("group_offloading").group
    group.stream, group.low_cpu_mem_usage = object(), True
    group.cpu_param_dict = group._init_cpu_param_dict()
    before = set(map(id, group.cpu_param_dict))
    learned = LinearBranch().build(2, 12)
    undo = attach(model.blocks[0].attn1, learned, model)
    assert set(map(id, group.cpu_param_dict)) == before | set(map(id, learned.parameters()))
    undo()
    assert set(map(id, group.cpu_param_dict)) == before
    assert "dit_accel" not in model.blocks[0].attn1._modules
