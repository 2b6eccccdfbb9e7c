"""One clip on several GPUs, every process with the same lines: torchrun --nproc-per-node 2 examples/several_gpus.py"""

import torch
import torch.distributed as dist
from diffusers import ContextParallelConfig, WanPipeline
from diffusers.utils import export_to_video

import dit_accel

dist.init_process_group("nccl")
torch.cuda.set_device(dist.get_rank())
pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", torch_dtype=torch.bfloat16).to("cuda")
pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=dist.get_world_size()))
handle = dit_accel.patch(pipe, "mass", density=0.2)
frames = pipe("A cat on a boat", generator=torch.Generator().manual_seed(0)).frames[0]
if dist.get_rank() == 0:
    export_to_video(frames, "cat.mp4", fps=16)
    print(handle.summary())
dist.destroy_process_group()
