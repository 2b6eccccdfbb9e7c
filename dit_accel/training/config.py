"""The settings of a fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass, field

from .few_steps import FewStepConfig
from .objective import Objective

TRANSFORMERS = ("transformer", "transformer_2")
TRAINED = ("learned", "attention", "all")
TEACHERS = ("frozen", "current")
DECAYS = ("none", "cosine")
ADAPTER_DTYPES = ("model", "int8")


@dataclass(frozen=True)
class FinetuneConfig:
    """How to fine-tune a model under a recipe.

    Attributes:
        steps: optimizer steps.
        max_seconds: after so many seconds the present step is the last; the run ends as usual. None: no limit.
        batch_size: samples a device and micro-batch.
        accumulation: micro-batches a step.
        learning_rate, betas, weight_decay: of AdamW.
        warmup_steps: steps over which the learning rate rises from 0.
        decay: "none", or "cosine": from there the learning rate descends to 0 along half a cosine, which ends
            with ``steps`` or with ``max_seconds``, whichever is nearer at each step. A run that stops by the
            clock does not repeat to the bit.
        max_grad_norm: gradients are scaled down to this norm.
        transformer: the one to train, of a pipeline with two experts "transformer" (high noise) or
            "transformer_2"; each sees its own range of sigmas, and gets an adapter of its own.
        train: "learned", a recipe's own parameters alone (SLA's author: not enough); "attention", also
            queries, keys, values and output of the patched attentions; "all", the whole transformer.
        lora_rank: train LoRA layers of this rank (peft) around the linear layers of the patched attentions
            in place of their weights; 0 trains the weights.
        objective: what is minimised.
        few_steps: of an objective to few steps, how many, and of which teacher.
        teacher: "frozen", the weights before the training; only the trained ones are kept twice, none with
            LoRA. "current", the present weights.
        density_start: density at the first step, from which it descends to the recipe's; None stays there.
        density_steps: length of that descent.
        precision: "no" or "bf16" (autocast; trained weights stay float32).
        gradient_checkpointing: compute a block again in the backward instead of keeping it.
        adapter_dtype: of the weights that the adapter stores: "model", the transformer's; "int8", 8-bit integers
            with one scale a row, for differences of weights.
        ema_decay: of the moving average that is evaluated and saved; None keeps none.
        time_mean, time_std: of the normal distribution whose sigmoid is sigma, for flow matching; of a discrete
            schedule all timesteps are drawn alike, and objectives to few steps draw those of their teacher.
        shift: of sigma; None takes the scheduler's.
        seed: of data order and noise.
        checkpoint_every, evaluate_every: steps; 0 only at the end.
        keep_checkpoints: the newest ones that stay.
        evaluate_samples: samples held out for evaluation, where there are enough.
    """

    steps: int = 1000
    max_seconds: float | None = None
    batch_size: int = 1
    accumulation: int = 1
    learning_rate: float = 1e-5
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.01
    warmup_steps: int = 0
    decay: str = "none"
    max_grad_norm: float = 1.0
    transformer: str = "transformer"
    train: str = "attention"
    lora_rank: int = 0
    objective: Objective = field(default_factory=Objective)
    few_steps: FewStepConfig = field(default_factory=FewStepConfig)
    teacher: str = "frozen"
    density_start: float | None = None
    density_steps: int = 0
    precision: str = "no"
    gradient_checkpointing: bool = False
    adapter_dtype: str = "model"
    ema_decay: float | None = None
    time_mean: float = 0.0
    time_std: float = 1.0
    shift: float | None = None
    seed: int = 0
    checkpoint_every: int = 0
    evaluate_every: int = 0
    keep_checkpoints: int = 2
    evaluate_samples: int = 2

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulation", "keep_checkpoints", "evaluate_samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("warmup_steps", "density_steps", "lora_rank", "checkpoint_every", "evaluate_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if not self.learning_rate > 0.0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}.")
        if self.max_seconds is not None and not self.max_seconds > 0.0:
            raise ValueError(f"max_seconds must be above 0, got {self.max_seconds}.")
        if self.density_start is not None and not 0.0 < self.density_start <= 1.0:
            raise ValueError(f"density_start must lie in (0, 1], got {self.density_start}.")
        if self.density_steps and self.density_start is None:
            raise ValueError(f"density_steps = {self.density_steps} needs a density_start to descend from.")
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must lie in (0, 1), got {self.ema_decay}.")
        for name, allowed in (
            ("transformer", TRANSFORMERS),
            ("train", TRAINED),
            ("teacher", TEACHERS),
            ("precision", ("no", "bf16")),
            ("decay", DECAYS),
            ("adapter_dtype", ADAPTER_DTYPES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")
        if self.lora_rank and self.train != "attention":
            raise ValueError(f"LoRA is for train = 'attention', got {self.train!r}.")
        if self.objective.gate and self.train != "learned":
            raise ValueError(f"objective.gate trains gates alone, with train = 'learned', got {self.train!r}.")
        if self.objective.gate and self.gradient_checkpointing:
            raise ValueError("gradient_checkpointing is of no use with objective.gate, whose backbone has no gradient.")
        if self.objective.dmd and self.train == "learned":
            raise ValueError("objective.dmd trains a critic of the model's own weights, train attention or all.")
        if self.objective.is_few_step and self.teacher != "frozen":
            raise ValueError(f"An objective to few steps needs teacher = 'frozen', got {self.teacher!r}.")
        if self.adapter_dtype == "int8" and (self.lora_rank or self.train == "learned"):
            raise ValueError("adapter_dtype 'int8' is for differences of weights, which this training has none of.")
