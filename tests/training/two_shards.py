"""What each of two processes runs in the test of FSDP: accelerate's FSDP2 on gloo."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from dit_accel.training.config import FinetuneConfig
from dit_accel.training.finetune import finetune
from tests.training.samples import SLA, samples, tiny_pipe


def shard_on_cpus() -> None:
    """Accelerate takes FSDP for accelerators only and falls back to DDP on CPUs, so it is told directly."""
    state = Accelerator(cpu=True).state
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["WanTransformerBlock"],
        state_dict_type="SHARDED_STATE_DICT",
        cpu_ram_efficient_loading=False,
    )
    # Every new Accelerator takes the kind of the processes from here.
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    state.fsdp_plugin = plugin
    assert Accelerator(cpu=True).is_fsdp2


if __name__ == "__main__":
    kind, out, steps = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    config = FinetuneConfig(steps=steps, learning_rate=1e-3, evaluate_samples=1, checkpoint_every=2)
    config = replace(config, lora_rank=4 if kind == "lora" else 0)
    shard_on_cpus()
    pipe = tiny_pipe()
    finetune(pipe, SLA, samples(), out, config, resume=True)
    weight = pipe.transformer.blocks[0].ffn.net[0].proj.weight
    assert isinstance(weight, DTensor)
    assert 2 * weight.to_local().numel() == weight.numel()
