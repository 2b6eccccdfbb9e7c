"""What each of two processes runs in the test of that name."""

from __future__ import annotations

import sys
from pathlib import Path

from dit_accel.training.config import FinetuneConfig
from dit_accel.training.finetune import finetune
from tests.training.samples import SLA, samples, tiny_pipe

if __name__ == "__main__":
    config = FinetuneConfig(steps=3, learning_rate=1e-3, evaluate_samples=1, checkpoint_every=2)
    finetune(tiny_pipe(), SLA, samples(), Path(sys.argv[1]), config)
