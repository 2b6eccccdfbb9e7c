"""``dit-accel finetune``: a short fine-tuning under a recipe, on one device or many."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .backend import refuse_backend
from .errors import one_sentence_errors
from .few_steps import FewStepsAsked
from .options import (
    BackendOption,
    DebugOption,
    DeviceOption,
    DtypeOption,
    FramesOption,
    ImportOption,
    JsonOption,
    ModelArgument,
    SetOption,
    SizeOption,
    import_modules,
    quiet_libraries,
    read_device,
    read_dtype,
    read_recipe,
    read_seed,
)
from .processes import accelerate_state
from .samples import COUNT, SamplesAsked
from .settings import Asked


@one_sentence_errors
def finetune(
    model: ModelArgument = None,
    recipe: Annotated[str, typer.Option(help="A name from `dit-accel info`, or a recipe file.")] = "sla",
    changes: SetOption = None,
    imports: ImportOption = None,
    data: Annotated[Path | None, typer.Option(help="Folder of precomputed samples (*.safetensors).")] = None,
    clips: Annotated[Path | None, typer.Option(help="Folder of clips with captions (cat.mp4, cat.txt).")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="UTF-8, one prompt a line, for samples that the model itself generates.")
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help=f"Samples to generate, without --data and --clips. Default: {COUNT}.")
    ] = None,
    size: SizeOption = None,
    frames: FramesOption = None,
    generate_steps: Annotated[int | None, typer.Option(min=1, help="Denoising steps of generated samples.")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of generated samples.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for samples, curves, checkpoints and the adapter.")] = Path(
        "outputs/finetune"
    ),
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps.")] = 500,
    max_seconds: Annotated[float | None, typer.Option(help="Stop after so many seconds, and save as usual.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples a device and micro-batch.")] = 1,
    accumulate: Annotated[int, typer.Option(min=1, help="Micro-batches a step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-5,
    warmup: Annotated[int, typer.Option(min=0, help="Steps until the learning rate is reached.")] = 0,
    decay: Annotated[str, typer.Option(metavar="none|cosine", help="Descent of the learning rate to 0.")] = "none",
    transformer: Annotated[
        str, typer.Option(metavar="transformer|transformer_2", help="Which of two experts: high noise, low noise.")
    ] = "transformer",
    train: Annotated[str, typer.Option(metavar="learned|attention|all", help="What is trained.")] = "attention",
    lora_rank: Annotated[int, typer.Option(min=0, help="Train LoRA layers of this rank; 0 trains weights.")] = 0,
    objective: Annotated[
        str | None,
        typer.Option(metavar="flow|distill|clear|ssa|gate|consistency|dmd", help="Default: as the recipe's authors."),
    ] = None,
    teacher: Annotated[
        str, typer.Option(metavar="frozen|current", help="Dense teacher: weights before the training, or present.")
    ] = "frozen",
    few_steps: Annotated[int, typer.Option(min=1, help="Of consistency and dmd: steps of the distilled model.")] = 4,
    teacher_steps: Annotated[int, typer.Option(min=1, help="Of consistency and dmd: steps of the dense teacher.")] = 30,
    teacher_guidance: Annotated[
        float | None,
        typer.Option(help="Of consistency and dmd: the teacher's guidance scale. Default: --guidance, or the model's."),
    ] = None,
    density_start: Annotated[float | None, typer.Option(help="Begin here and go down to the recipe's.")] = None,
    density_steps: Annotated[int, typer.Option(min=0, help="Steps until the recipe's density.")] = 0,
    precision: Annotated[str | None, typer.Option(metavar="no|bf16", help="Default: bf16 for a bf16 model.")] = None,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Trade time for memory.")] = False,
    context_parallel: Annotated[
        int, typer.Option(min=1, help="Processes that share each sequence, by heads; torchrun starts a multiple of it.")
    ] = 1,
    ema: Annotated[float | None, typer.Option(help="Decay of a moving average to evaluate and save.")] = None,
    adapter_dtype: Annotated[
        str, typer.Option(metavar="model|int8", help="Of the stored differences of weights.")
    ] = "model",
    seed: Annotated[int, typer.Option(help="Of data order and noise.")] = 0,
    checkpoint_every: Annotated[int, typer.Option(min=0, help="Steps; 0: never.")] = 100,
    evaluate_every: Annotated[int, typer.Option(min=0, help="Steps; 0: at both ends.")] = 100,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out, with the same settings.")
    ] = False,
    start_over: Annotated[
        bool,
        typer.Option(
            "--start-over", help="Make new samples where --out holds those of other settings, which are set aside."
        ),
    ] = False,
    backend: BackendOption = "auto",
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Fine-tune a model under sparse attention and save an adapter.

    `accelerate launch -m dit_accel.cli.main finetune` trains on several devices.
    """
    quiet_libraries()
    import_modules(imports)
    if resume and start_over:
        raise ValueError("Give --resume or --start-over, not both.")
    read_seed(seed)
    settings = Asked.read(size, frames, generate_steps, guidance)
    few = FewStepsAsked(few_steps, teacher_steps, teacher_guidance)
    asked = SamplesAsked(data, clips, prompts_file, count, settings, start_over)
    chosen = read_recipe(recipe, changes)
    if chosen is None:
        raise ValueError("--recipe auto cannot be trained; name a recipe, such as sla.")
    target = read_device(device)
    number = read_dtype(dtype, target)

    from ..files import refuse_unwritable_folder
    from ..training.config import FinetuneConfig
    from ..training.finetune import finetune as run
    from ..training.fitness import refuse_unfit
    from ..training.objective import OBJECTIVES, objective_for
    from ..training.samples import LatentFolder
    from ..training.sequence_shares import refuse_shares, share_sequences
    from .model import open_model

    aim = objective or objective_for(recipe)
    if aim not in OBJECTIVES:
        raise ValueError(f"--objective must be one of {', '.join(OBJECTIVES)}, got {aim!r}.")
    config = FinetuneConfig(
        steps=steps,
        max_seconds=max_seconds,
        batch_size=batch,
        accumulation=accumulate,
        learning_rate=learning_rate,
        warmup_steps=warmup,
        decay=decay,
        transformer=transformer,
        train=train,
        lora_rank=lora_rank,
        objective=OBJECTIVES[aim],
        few_steps=few.check(),
        teacher=teacher,
        density_start=density_start,
        density_steps=density_steps,
        precision=precision or ("bf16" if str(number) == "torch.bfloat16" else "no"),
        gradient_checkpointing=gradient_checkpointing,
        ema_decay=ema,
        adapter_dtype=adapter_dtype,
        seed=seed,
        checkpoint_every=checkpoint_every,
        evaluate_every=evaluate_every,
    )
    samples, prompts = asked.check()
    refuse_backend(backend, number, target, chosen)
    refuse_unwritable_folder(out)
    state = accelerate_state(target)
    refuse_shares(state.num_processes, context_parallel)
    unused = asked.unused()
    if unused is not None and state.is_main_process:
        print(unused, file=sys.stderr)
    quiet = as_json or not state.is_main_process
    name, builtin, pipe = open_model(model, number, state.device if state.num_processes > 1 else target, quiet=quiet)
    if config.objective.is_few_step:
        config = replace(config, few_steps=few.config(pipe, builtin, settings))
    refuse_unfit(pipe, chosen, out, config, resume=resume, backend=backend)
    guided = config.objective.is_few_step and config.few_steps.guidance > 1.0
    skipped = []
    if samples is None:
        say = None if quiet else lambda done, total: _say(f"sample {done} of {total}", done, total)
        # The first process makes the files, the others find them.
        with state.main_process_first():
            skipped = asked.make(pipe, builtin, prompts, out / "samples", seed, say, unconditional=guided)
        samples = LatentFolder(out / "samples")
    if context_parallel > 1:
        from ..benchmarking.context_parallel import cp_plan

        trained = getattr(pipe, transformer)
        share_sequences(trained, context_parallel, cp_plan(trained))
    result = run(
        pipe,
        chosen,
        samples,
        out,
        config,
        resume=resume,
        backend=backend,
        on_step=None if quiet else lambda n: _say(f"step {n['step']}: loss {n['loss']:.4g}", n["step"], steps),
    )
    if not state.is_main_process:
        return
    evaluations = result.curves.evaluations
    report: dict[str, Any] = {
        "model": name,
        "recipe": chosen.to_dict(),
        "objective": aim,
        "steps": len(result.curves.steps),
        "processes": state.num_processes,
        "context_parallel": context_parallel,
        "samples": len(samples),
        "skipped": {item.name: item.reason for item in [*skipped, *samples.skipped]},
        "first": {**result.curves.steps[0], **evaluations[0]} if evaluations else result.curves.steps[0],
        "last": {**result.curves.steps[-1], **evaluations[-1]} if evaluations else result.curves.steps[-1],
        "adapter": str(result.adapter),
        "curves": str(out / "curves.json"),
    }
    if as_json:
        from .environment import environment

        print(json.dumps({**report, **environment(target)}, indent=2))
        return
    for label in ("first", "last"):
        numbers = report[label]
        print(f"{label:5}  loss {numbers['loss']:.4g}   velocity error against dense {numbers['velocity_error']:.4g}")
    print(f"adapter  {report['adapter']}")
    print(f"curves   {out / 'curves.png'}")


def _say(text: str, done: float, total: float) -> None:
    """About twenty lines in all, on stderr."""
    if done == total or done % max(1, total // 20) == 0:
        print(text, file=sys.stderr)
