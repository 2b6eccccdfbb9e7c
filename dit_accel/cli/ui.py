"""``dit-accel ui``: a page in the browser, dense beside accelerated."""

from __future__ import annotations

import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from .errors import one_sentence_errors
from .options import (
    DebugOption,
    DeviceOption,
    DtypeOption,
    ImportOption,
    ModelArgument,
    import_modules,
    quiet_libraries,
    read_device,
    read_dtype,
)


@one_sentence_errors
def ui(
    model: ModelArgument = None,
    host: Annotated[str, typer.Option(help="Address to serve at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="To serve at.")] = 7860,
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in the browser of this machine.")] = False,
    imports: ImportOption = None,
    dtype: DtypeOption = None,
    device: DeviceOption = None,
    debug: DebugOption = False,
) -> None:
    """Serve a page: a prompt, dense beside accelerated, step by step, with what ran."""
    quiet_libraries()
    import_modules(imports)
    if find_spec("gradio") is None:
        raise ValueError("The page needs gradio: pip install 'dit-accel[ui]'.")
    target = read_device(device)
    number = read_dtype(dtype, target)

    from ..pipelines.encode import refuse_missing_encoder
    from ..ui.page import build_page, serve
    from ..ui.studio import Studio
    from .model import open_model

    refuse_missing_encoder()
    name, builtin, pipe = open_model(model, number, target, quiet=False)
    note, settings = ("", None) if builtin is None else (builtin.description, builtin.settings)
    with tempfile.TemporaryDirectory(prefix="dit-accel-ui-") as folder:
        # Gradio serves copies of the results; they go with these.
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "served")
        page = build_page(Studio(pipe, Path(folder)), name, note, settings)
        print(f"Serving at http://{host}:{port}; interrupt to end.", file=sys.stderr)
        try:
            serve(page, host, port, open_browser=open_browser)
        finally:
            page.close()
