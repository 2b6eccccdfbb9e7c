"""The fine-tuning loop, on accelerate: one process or many, from any checkpoint on with the same numbers."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..patches.handle import PatchHandle
from ..tensor_files import writing
from . import checkpoints, tracking
from .adapter import save_adapter
from .batches import Batches, Samples, mix
from .checkpoints import Checkpoints, newest_checkpoint
from .config import FinetuneConfig
from .consistency import consistency_loss
from .curves import JSON_NAME, PNG_NAME, Curves
from .distribution_matching import Critic, distribution_loss, generated
from .earlier import set_aside
from .evaluation import Evaluation
from .few_steps import FewSteps, Trajectory
from .identity import RunIdentity
from .noise import noise_process
from .noisy import NoisyBatch
from .objective import annealed_density, losses
from .sequence_shares import SequenceShares
from .tracking import Tracking, has_tensorboard
from .trainables import Trainables

logger = logging.getLogger("dit_accel")

ADAPTER = "adapter"
RUN_FILES = (checkpoints.FOLDER, tracking.FOLDER, ADAPTER, JSON_NAME, PNG_NAME)


class TrainingStopped(RuntimeError):
    """A loss or gradient was not finite; says at which step, in which batch, and the last good checkpoint."""


class Loop:
    """One training: from its newest checkpoint, or from the beginning, to its adapter.

    Args:
        handle: of the patch.
        trainables: the parameters that are trained, and the teacher.
        data, output, config: see :func:`~dit_accel.training.finetune.finetune`.
        run: says of a checkpoint whether it is of this very training.
        found: of the samples, for it.

    Attributes:
        curves: losses and evaluations so far.
        few_steps: how the trained model runs; None where it runs as before.
    """

    def __init__(
        self,
        pipe: Any,
        handle: PatchHandle,
        trainables: Trainables,
        data: Samples,
        output: Path,
        config: FinetuneConfig,
        run: RunIdentity,
        found: Mapping[str, Any],
    ) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.utils import DistributedType, ProjectConfiguration

        self.pipe, self.handle, self.trainables = pipe, handle, trainables
        self.data, self.output, self.config = data, output, config
        self.model = trainables.model
        self.dtype: torch.dtype = trainables.dtype
        self.accelerator = Accelerator(
            mixed_precision=config.precision,
            gradient_accumulation_steps=config.accumulation,
            log_with="tensorboard" if has_tensorboard() else None,
            project_config=ProjectConfiguration(str(output), logging_dir=str(output)),
            cpu=not torch.cuda.is_available() or torch.device(pipe.device).type == "cpu",
            step_scheduler_with_optimizer=False,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=config.train == "all")],
        )
        self.tracking = Tracking(self.accelerator, output)
        self.sharded = self.accelerator.distributed_type == DistributedType.FSDP
        if self.sharded and not getattr(self.accelerator, "is_fsdp2", False):
            raise ValueError(
                "FSDP 1 flattens parameters of one dtype together, which hides them from the adapter; launch with "
                "--fsdp_version 2."
            )
        if self.sharded and config.objective.needs_teacher and config.teacher == "frozen" and not config.lora_rank:
            raise ValueError("With FSDP a frozen teacher needs LoRA; set lora_rank, or teacher = 'current'.")
        if self.sharded and config.objective.dmd:
            raise ValueError("objective.dmd exchanges whole weights with its critic, and does not run with FSDP.")
        processes = self.accelerator.num_processes
        self.shares = SequenceShares.of(self.model, config.objective, self.accelerator.process_index, processes)
        optimizer = torch.optim.AdamW(
            self.trainables.named().values(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self.ema = self._average()
        self.curves = Curves()
        self.process = noise_process(pipe, config.transformer, config.shift)
        few = config.objective.is_few_step
        self.trajectory = Trajectory.of(config.few_steps, self.process.shift) if few else None
        self.few_steps: FewSteps | None = None
        if self.trajectory is not None:
            self.few_steps = self.trajectory.steps(renoise=bool(config.objective.dmd))
        self.critic: Critic | None = None
        if config.objective.dmd:
            self.critic = Critic(trainables, config, lambda value: self.accelerator.reduce(value, "mean"))
            self.accelerator.register_for_checkpointing(self.critic)
        self.batches = Batches(
            data,
            config,
            process=self.process,
            trajectory=self.trajectory,
            dtype=torch.float32 if config.precision == "no" else self.model.dtype,
            device=self.accelerator.device,
            rank=self.shares.group,
            processes=self.shares.groups,
        )
        self.evaluation = Evaluation(
            self.wrapped,
            trainables,
            self.batches,
            trajectory=self.trajectory,
            steps=self.few_steps,
            guidance=config.few_steps.guidance,
            sharded=self.sharded,
        )
        run = run.on(found, self.shares.groups)
        self.checkpoints = Checkpoints(output, self.accelerator, trainables, run, config.keep_checkpoints, self.sharded)
        self.density = handle.recipe.select.density
        self.spent = 0.0

    def run(
        self,
        resume: bool,
        on_step: Callable[[dict[str, float]], None] | None,
        measure: Callable[[int], Mapping[str, float]] | None,
    ) -> Path:
        """Train, and return the folder of the adapter.

        Raises:
            ValueError: a checkpoint of another training, or a folder that cannot be written.
            TrainingStopped: a loss or gradient is not finite.
        """
        first, begin = 0, time.monotonic()
        with ExitStack() as ends:
            ends.callback(self._unwrap)
            ends.callback(self.tracking.close)
            found = self.checkpoints.load() if resume else None
            if found is not None:
                first, self.curves = found
            if first == 0:
                self._evaluate(0, measure)
            # Only now: data that do not fit the model have failed, and nothing of an earlier training was touched.
            self._open_folder(fresh=found is None)
            ends.callback(self._write_curves)
            if first == 0:
                self._log_evaluation()
            for step in range(first, self.config.steps):
                numbers = self._step(step)
                self.curves.steps.append(numbers)
                self.tracking.log({k: v for k, v in numbers.items() if k != "step"}, step + 1)
                if on_step is not None and self.accelerator.is_main_process:
                    on_step(numbers)
                # Once a step: with several processes it is an all-reduce that all wait for.
                self.spent = self._time_spent(begin)
                last = step + 1 == self.config.steps or self.spent > 1.0
                if _due(step + 1, self.config.evaluate_every, last):
                    self._evaluate(step + 1, measure)
                    self._log_evaluation()
                if _due(step + 1, self.config.checkpoint_every, last and self.config.checkpoint_every > 0):
                    self._write_curves()
                    self.checkpoints.save(step + 1, self.curves)
                if last:
                    break
            return self._finish()

    def _open_folder(self, fresh: bool) -> None:
        if self.accelerator.is_main_process:
            self.output.mkdir(parents=True, exist_ok=True)
            earlier = set_aside(self.output, RUN_FILES) if fresh else None
            if earlier is not None:
                logger.warning("An earlier training in %s was moved to %s.", self.output, earlier)
        self.accelerator.wait_for_everyone()
        self.tracking.open()

    def _log_evaluation(self) -> None:
        numbers = dict(self.curves.evaluations[-1])
        step = int(numbers.pop("step"))
        self.tracking.log({f"evaluation/{name}": value for name, value in numbers.items()}, step)

    def _time_spent(self, begin: float) -> float:
        """Share of ``max_seconds`` since the start, the same on all processes; 0 without a limit."""
        if self.config.max_seconds is None:
            return 0.0
        share = (time.monotonic() - begin) / self.config.max_seconds
        return float(self.accelerator.reduce(torch.tensor(share, device=self.accelerator.device), "mean"))

    # One step.

    def _step(self, step: int) -> dict[str, float]:
        start, config = time.perf_counter(), self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * rate_factor(config, step, self.spent)
        density = self._set_density(step)
        generator = torch.Generator().manual_seed(mix(config.seed, step, 1))
        full_stream = float(torch.rand((), generator=generator)) < config.objective.full_stream
        torch.manual_seed(mix(config.seed, step, 2))  # for models with dropout
        sums: dict[str, torch.Tensor] = {}
        names: list[str] = []
        stop = int(torch.randint(config.few_steps.steps, (), generator=generator))
        if self.critic is not None:
            sums["critic"] = self._train_critic(self.critic, step, stop)
        for micro in range(config.accumulation):
            batch, batch_names = self.batches.training(step, micro)
            names += batch_names
            with (
                self.accelerator.accumulate(self.wrapped),
                losses(
                    self.wrapped,
                    self.handle,
                    config.objective,
                    batch,
                    self._teacher,
                    full_stream,
                    None if self.trajectory is None else lambda batch: self._few_step_loss(batch, stop),
                ) as found,
            ):
                for name, value in {"loss": found.total.detach(), **found.terms}.items():
                    sums[name] = sums.get(name, torch.zeros_like(value)) + value / config.accumulation
                self._stop_unless_finite("loss", found.total.detach(), step, names)
                self.accelerator.backward(self.shares.degree * found.total)
                if self.accelerator.sync_gradients:
                    norm = self.accelerator.clip_grad_norm_(list(self.wrapped.parameters()), config.max_grad_norm)
                    self._stop_unless_finite("gradient norm", norm, step, names)
                self.optimizer.step()
                self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.trainables.named().values())
        mean = {name: float(self.accelerator.reduce(value, "mean")) for name, value in sums.items()}
        numbers = {"step": step + 1, **mean, "learning_rate": self.optimizer.param_groups[0]["lr"]}
        if density is not None:
            numbers["density"] = density
        return {**numbers, "seconds": time.perf_counter() - start}

    def _few_step_loss(self, batch: NoisyBatch, stop: int) -> torch.Tensor:
        assert self.trajectory is not None
        guidance = self.config.few_steps.guidance
        if self.critic is None:
            return consistency_loss(self.wrapped, self._teacher(), batch, self.trajectory, guidance)
        return distribution_loss(
            self.wrapped,
            self._teacher(),
            self.critic.present(),
            batch,
            self.trajectory,
            stop,
            guidance,
            self.process.shift,
        )

    def _train_critic(self, critic: Critic, step: int, stop: int) -> torch.Tensor:
        """The critic follows the model before the model follows it; mean of its losses."""
        assert self.trajectory is not None
        found = []
        for update in range(self.config.few_steps.critic_updates):
            # Each of the model's steps in turn, so that the critic knows them all.
            last = (stop + update) % self.config.few_steps.steps
            batch, names = self.batches.training(step, update % self.config.accumulation, again=update + 1)
            with torch.no_grad():
                made = generated(self.model, batch, self.trajectory, last, gradient=False)
            found.append(critic.update(batch, made, self.process.shift))
            self._stop_unless_finite("critic's loss", found[-1], step, names)
        return torch.stack(found).mean()

    def _teacher(self) -> AbstractContextManager[None]:
        return self.trainables.dense_teacher(self.config.teacher == "frozen")

    def _set_density(self, step: int) -> float | None:
        if self.config.density_start is None or self.density is None:
            return self.density
        density = annealed_density(self.config.density_start, self.density, step, self.config.density_steps)
        self.handle.set_density(density)
        return density

    def _stop_unless_finite(self, what: str, value: Any, step: int, names: Sequence[str]) -> None:
        # The norm of sharded gradients is itself in shards.
        value = value.full_tensor() if hasattr(value, "full_tensor") else value
        value = torch.as_tensor(value, device=self.accelerator.device).float()
        bad = self.accelerator.reduce((~value.isfinite()).float(), "sum")
        if not bad:
            return
        good = newest_checkpoint(self.output)
        spelled = f"the last good checkpoint is {good}" if good else "there is no checkpoint yet"
        raise TrainingStopped(
            f"The {what} is {float(value)} at step {step + 1} (batch: {', '.join(names)}); {spelled}."
        )

    def _evaluate(self, step: int, measure: Callable[[int], Mapping[str, float]] | None) -> None:
        """With averaged weights, and the recipe's own density; see :class:`Evaluation`."""
        if self.ema is not None:
            self.ema.store(self.trainables.named().values())
            self.ema.copy_to(self.trainables.named().values())
        self.handle.set_density(None)
        self.model.eval()
        with torch.no_grad():
            numbers = self.evaluation.numbers()
            if measure is not None:
                numbers |= measure(step)
                self.pipe.scheduler.num_inference_steps = None
        self.model.train()
        if self.ema is not None:
            self.ema.restore(self.trainables.named().values())
        self.curves.evaluations.append({"step": step, **numbers})

    # Ends.

    def _average(self) -> Any:
        if self.config.ema_decay is None:
            return None
        from diffusers.training_utils import EMAModel

        # Parameter by parameter it would be a thousand launches a step.
        ema = EMAModel(list(self.trainables.named().values()), decay=self.config.ema_decay, foreach=not self.sharded)
        ema.to(self.accelerator.device)
        self.accelerator.register_for_checkpointing(ema)
        return ema

    def _finish(self) -> Path:
        if self.ema is not None:
            self.ema.copy_to(self.trainables.named().values())
        self.handle.set_density(None)
        folder = self.output / ADAPTER
        values = self.accelerator.get_state_dict(self.wrapped) if self.sharded else None
        if self.accelerator.is_main_process:
            self._save_adapter(folder, values)
        self.accelerator.wait_for_everyone()
        return folder

    def _save_adapter(self, folder: Path, values: Mapping[str, torch.Tensor] | None) -> None:
        with writing(folder):
            save_adapter(
                self.pipe,
                folder,
                transformer=self.config.transformer,
                backbone="lora" if self.trainables.lora else ("delta" if self.trainables.backbone else "none"),
                trained=self.trainables.backbone,
                base=self.trainables.base,
                values=values,
                # More digits than the model's own weights have are lost when the adapter is loaded.
                dtype=torch.int8 if self.config.adapter_dtype == "int8" else self.dtype,
                steps=self.few_steps,
                summary={
                    "steps": len(self.curves.steps),
                    "samples": len(self.data),
                    "processes": self.accelerator.num_processes,
                    "config": asdict(self.config),
                    "first": self.curves.evaluations[0] if self.curves.evaluations else None,
                    "last": self.curves.evaluations[-1] if self.curves.evaluations else None,
                },
            )

    def _write_curves(self) -> None:
        if self.accelerator.is_main_process:
            self.curves.write(self.output)

    def _unwrap(self) -> None:
        # Accelerate's autocast wrapper around forward is the training's, not the model's.
        self.accelerator.unwrap_model(self.wrapped, keep_fp32_wrapper=False)
        self.accelerator.free_memory()


def rate_factor(config: FinetuneConfig, step: int, spent: float = 0.0) -> float:
    """Factor on the learning rate at a step, in [0, 1]; ``spent`` is the share of the allowed time that is over."""
    rise = min(1.0, (step + 1) / max(1, config.warmup_steps))
    if config.decay == "none":
        return rise
    # The last step still moves: the descent would reach 0 at the one after it.
    done = max(0, step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return rise * 0.5 * (1.0 + math.cos(math.pi * min(1.0, max(done, spent))))


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)
