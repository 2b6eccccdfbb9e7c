"""The page itself: fields, two results beside each other, progress, and a summary. Imports gradio."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from html import escape
from typing import Any

import gradio as gr

from ..pipelines.generate import makes_video
from ..pipelines.settings import Settings
from .studio import Shown, Studio
from .wanted import Form, offered_recipes

# What waits behind the run under way; more are told to come back.
MOST_WAITING = 20
# Files of results that gradio serves: how often old ones are looked for, and how old these are, in seconds.
DELETE_CACHE = (3600, 24 * 3600)
# The visitor's own fonts and no others: the page asks nothing of the internet.
FONTS = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
CSS = """
.status {min-height: 3.2em}
.status progress {width: 100%; height: .6em}
.status .failed {color: var(--error-text-color, #b91c1c); font-weight: 600}
.summary pre {white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85em}
"""


def build_page(studio: Studio, name: str, note: str, settings: Settings | None) -> Any:
    """The page of a studio, a ``gradio.Blocks``; nothing is served yet.

    Args:
        name: of the model.
        note: a sentence about it; may be empty.
        settings: its own, which the fields begin with; None leaves them empty.
    """
    is_video = makes_video(studio.pipe)
    own = {} if settings is None else vars(settings)
    with gr.Blocks(title=f"dit_accel: {name}", analytics_enabled=False, delete_cache=DELETE_CACHE) as page:
        gr.Markdown(f"# dit_accel\n{name}{': ' + note if note else ''}")
        prompt = gr.Textbox(label="Prompt", lines=2, max_lines=6)
        with gr.Row():
            recipe = gr.Dropdown(offered_recipes(), value="auto", label="Recipe or profile", min_width=160)
            density = _field("Density, up to 1", None, "the recipe's own")
            steps = _field("Steps", own.get("steps"))
            seed = _field("Seed", 0)
        with gr.Row():
            width = _field("Width", own.get("width"))
            height = _field("Height", own.get("height"))
            frames = _field("Frames", own.get("frames"), visible=is_video)
            dense_too = gr.Checkbox(value=True, label="Also run dense", min_width=120)
        with gr.Row():
            start = gr.Button("Generate", variant="primary", elem_id="generate")
            cancel = gr.Button("Cancel", elem_id="cancel")
        status = gr.HTML(elem_classes="status", elem_id="status")
        with gr.Row():
            dense, fast = _result("Dense", is_video), _result("Accelerated", is_video)
        verdict = gr.Markdown(elem_id="verdict")
        picture = gr.HTML(elem_id="steps")
        summary = gr.HTML(elem_classes="summary", elem_id="summary")

        def run(
            prompt: str,
            width: str,
            height: str,
            frames: str,
            steps: str,
            seed: str,
            recipe: str,
            density: str,
            dense_too: bool,
            request: gr.Request,
        ) -> Iterator[Any]:
            form = Form(prompt, width, height, frames, steps, seed, recipe, density, dense_too)
            for shown in studio.run(form, _visitor(request)):
                yield _outputs(shown)

        def stop(request: gr.Request) -> None:
            studio.cancel(_visitor(request))

        inputs = [prompt, width, height, frames, steps, seed, recipe, density, dense_too]
        outputs = [status, dense, fast, verdict, picture, summary]
        # One run at a time, whoever asks: a pipeline cannot be shared.
        queued = {"concurrency_limit": 1, "concurrency_id": "pipeline", "show_progress": "hidden"}
        # A button of a job under way does nothing until it has ended.
        gr.on([start.click, prompt.submit], run, inputs, outputs, trigger_mode="once", api_name="generate", **queued)
        cancel.click(stop, queue=False, api_name="cancel", show_progress="hidden")
    page.queue(max_size=MOST_WAITING)
    return page


def serve(page: Any, host: str, port: int, *, open_browser: bool, block: bool = True) -> str:
    """Serve a page until the process is interrupted, or, where ``block`` is False, beside the caller. Returns its
    address."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of gradio, about itself
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            show_error=False,
            footer_links=[],
            theme=gr.themes.Default(**FONTS),
            css=CSS,
            ssr_mode=False,
        )
    if block:
        page.block_thread()
    return str(address)


def _visitor(request: gr.Request) -> str:
    return str(request.session_hash)


def _field(label: str, value: int | None, empty: str = "the model's own", visible: bool = True) -> Any:
    """A number as text: a field may stay empty, which a number's own field shows as 0."""
    text = "" if value is None else str(value)
    return gr.Textbox(text, label=label, placeholder=empty, max_lines=1, min_width=120, visible=visible)


def _result(label: str, is_video: bool) -> Any:
    if is_video:
        return gr.Video(label=label, autoplay=True, loop=True, interactive=False, elem_id=label.lower(), min_width=280)
    return gr.Image(label=label, interactive=False, elem_id=label.lower(), min_width=280)


def _outputs(shown: Shown) -> list[Any]:
    files = [None if file is None else str(file) for file in (shown.dense, shown.fast)]
    summary = f"<pre>{escape(shown.summary)}</pre>" if shown.summary else ""
    return [_status(shown), *files, shown.verdict, shown.picture, summary]


def _status(shown: Shown) -> str:
    kind = 'class="failed" role="alert"' if shown.failed else 'role="status"'
    bar = "" if shown.share is None else f'<progress max="1" value="{shown.share:.4f}"></progress>'
    return f"<div {kind}>{escape(shown.status)}</div>{bar}"
