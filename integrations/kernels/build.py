"""The operators alone, as a repository of Hugging Face's ``kernels`` has them.

    python integrations/kernels/build.py --out build/kernels

writes the source (build.toml, torch-ext) and, beside it, what that package loads (build/torch-*). Nothing of it is
compiled ahead: the kernels are Triton's. Neither diffusers nor dit_accel is needed to use it.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[2]
OPERATORS = ROOT / "dit_accel" / "kernels"
NAME = "dit-accel"
# 0 is what the package calls a kernel whose interface may still change.
VERSION = 0
BACKENDS = ("cpu", "cuda", "rocm")
# torch keeps one operator of a name, and two versions of the package may be loaded at once.
OPERATOR = re.compile(r'(custom_op\(\s*")dit_accel::')


def sources() -> dict[str, bytes]:
    """Files of the operators, by their path in the package."""
    paths = [
        path for path in OPERATORS.rglob("*") if path.suffix in (".py", ".json") and "__pycache__" not in path.parts
    ]
    return {path.relative_to(OPERATORS).as_posix(): path.read_bytes() for path in sorted(paths)}


def identity(files: dict[str, bytes]) -> str:
    """A name that no other version of these files has, and that Python can import."""
    digest = hashlib.sha256()
    for path, content in sorted(files.items()):
        digest.update(f"{path}\0{len(content)}\0".encode() + content)
    return f"_{NAME.replace('-', '_')}_{digest.hexdigest()[:10]}"


def renamed(content: bytes, namespace: str) -> bytes:
    """A file whose operators are registered under another namespace."""
    return OPERATOR.sub(rf"\g<1>{namespace}::", content.decode()).encode()


def metadata(namespace: str, backend: str, files: dict[str, bytes]) -> str:
    """What the package reads before it loads a variant."""
    digests = {path: base64.b64encode(hashlib.sha256(content).digest()).decode() for path, content in files.items()}
    found = {
        "id": namespace,
        "name": NAME,
        "version": VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digests},
    }
    return json.dumps(found, indent=2) + "\n"


def build_toml() -> str:
    """For those who build and upload with kernel-builder."""
    backends = ", ".join(f'"{backend}"' for backend in BACKENDS)
    return (
        f'[general]\nname = "{NAME}"\nversion = {VERSION}\nlicense = "Apache-2.0"\nbackends = [{backends}]\n\n'
        "[torch-noarch]\n"
    )


def write(out: Path) -> list[Path]:
    """Write the repository into a folder that is new or empty; the folders of its variants.

    Raises:
        ValueError: the folder holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out must be a new or an empty folder, got {out}.")
    package = NAME.replace("-", "_")
    files = sources()
    namespace = identity(files)
    _write_all(out / "torch-ext" / package, files)
    (out / "build.toml").write_text(build_toml(), encoding="utf-8")
    shutil.copy(ROOT / "LICENSE", out / "LICENSE")
    shutil.copy(Path(__file__).with_name("README.md"), out / "README.md")
    files = {path: renamed(content, namespace) for path, content in files.items()}
    # Older versions of the package look for a folder of the kernel's name.
    files[f"{package}/__init__.py"] = _older(package).encode()
    variants = []
    for backend in BACKENDS:
        variants.append(out / "build" / f"torch-{backend}")
        _write_all(variants[-1], files)
        (variants[-1] / "metadata.json").write_text(metadata(namespace, backend, files), encoding="utf-8")
    return variants


def _older(package: str) -> str:
    return f'''"""The folder above, under the name that older versions of `kernels` import."""

import importlib.util
import sys
from pathlib import Path

_above = Path(__file__).parents[1] / "__init__.py"
_name = f"{package}_{{abs(hash(str(_above))):x}}"
_spec = importlib.util.spec_from_file_location(_name, _above)
_module = importlib.util.module_from_spec(_spec)
sys.modules[_name] = _module
_spec.loader.exec_module(_module)
globals().update({{name: getattr(_module, name) for name in _module.__all__}})
__all__ = _module.__all__
'''


def _write_all(folder: Path, files: dict[str, bytes]) -> None:
    for path, content in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    arguments = parser.parse_args()
    try:
        variants = write(arguments.out)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(map(str, variants)))


if __name__ == "__main__":
    main()
