"""The operators alone, as Hugging Face's `kernels` loads them: without diffusers or this package, twice at once."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from integrations.kernels import build

if importlib.util.find_spec("tomllib") is None:
    import tomli as tomllib
else:
    import tomllib

ALONE = """
import importlib.util, sys
from pathlib import Path
for name in ("diffusers", "transformers", "dit_accel", "safetensors", "accelerate"):
    sys.modules[name] = None
import torch

def load(folder, name):
    spec = importlib.util.spec_from_file_location(name, Path(folder) / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

operators = [load(folder, f"loaded_{n}") for n, folder in enumerate(sys.argv[1:])]
torch.manual_seed(0)
q, k, v = (torch.randn(2, 300, 3, 32, requires_grad=True) for _ in range(3))
for one in operators:
    mask = one.select_pooled(q, k, density=0.4, block_q=64, block_k=32)
    out = one.block_sparse_attention(q, k, v, mask)
    kept = mask.to_dense().repeat_interleave(64, 2)[..., :300, :].repeat_interleave(32, 3)[..., :300]
    assert 0.2 < kept.double().mean() < 0.8
    Q, K, V = (x.detach().double().transpose(1, 2) for x in (q, k, v))
    wanted = ((Q @ K.transpose(-1, -2)) * 32 ** -0.5).masked_fill(~kept, -torch.inf).softmax(-1) @ V
    assert (out.double().transpose(1, 2) - wanted).abs().max() < 1e-5
    out.sum().backward()
    assert v.grad.abs().sum() > 0
    ran = one.block_sparse_attention(q.detach(), k.detach(), v.detach(), mask, backend="torch")
    assert torch.allclose(ran, out, atol=1e-5)
names = {importlib.import_module(f"{one.__name__}.attention.op").block_sparse_fwd._qualname for one in operators}
assert len(names) == len(operators), names
print(sorted(names))
"""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("kernels") / "out"
    build.write(out)
    return out


def run_alone(*folders: Path) -> list[str]:
    """The namespaces of the operators of folders that one process has loaded."""
    command = [sys.executable, "-c", ALONE, *map(str, folders)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folders[0])
    assert ran.returncode == 0, ran.stderr
    return list(ast.literal_eval(ran.stdout))


def test_it_runs_by_itself_and_two_versions_side_by_side(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = build.sources()
    changed = sources | {"__init__.py": sources["__init__.py"] + b"\n# another version\n"}
    monkeypatch.setattr(build, "sources", lambda: changed)
    build.write(tmp_path / "other")
    names = run_alone(written / "build" / "torch-cpu", tmp_path / "other" / "build" / "torch-cpu")
    assert all(re.fullmatch(r"_dit_accel_[0-9a-f]{10}::block_sparse_fwd", name) for name in names)


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""


def test_it_imports_torch_and_itself_alone(written: Path) -> None:
    """And flash-attn-4 where that is asked for by name."""
    folder = written / "build" / "torch-cuda"
    found = {name.partition(".")[0] for path in folder.rglob("*.py") for name in imported(path)}
    assert found - set(sys.stdlib_module_names) <= {"torch", "triton", "flash_attn"}
    for path in folder.rglob("*.py"):
        assert 'custom_op("dit_accel::' not in path.read_text(encoding="utf-8"), path


@pytest.mark.parametrize("backend", build.BACKENDS)
def test_metadata_is_of_the_files(written: Path, backend: str) -> None:
    folder = written / "build" / f"torch-{backend}"
    found = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
    assert found["backend"] == {"type": backend}
    assert found["id"].isidentifier()
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {"metadata.json"}
    assert set(found["digest"]["files"]) == there
    for name, digest in found["digest"]["files"].items():
        assert base64.b64decode(digest) == hashlib.sha256((folder / name).read_bytes()).digest()
    general = tomllib.loads((written / "build.toml").read_text(encoding="utf-8"))["general"]
    assert (general["name"], general["version"]) == (found["name"], found["version"])
    assert backend in general["backends"]
    assert (written / "torch-ext" / "dit_accel" / "__init__.py").is_file()


def test_a_folder_that_holds_something_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("kept")
    with pytest.raises(ValueError, match="--out must be a new or an empty folder, got "):
        build.write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_the_package_itself_loads_it(written: Path) -> None:
    pytest.importorskip("kernels", reason="needs kernels: pip install --target DIR kernels, and PYTHONPATH=DIR")
    code = """
import sys
from pathlib import Path
import torch
from kernels import get_local_kernel
one = get_local_kernel(Path(sys.argv[1]), backend="cpu")
q = torch.randn(1, 256, 2, 32)
out = one.block_sparse_attention(q, q, q, one.select_pooled(q, q, density=1.0, block_q=64, block_k=64))
wanted = torch.nn.functional.scaled_dot_product_attention(*(q.transpose(1, 2),) * 3).transpose(1, 2)
assert torch.allclose(out, wanted, atol=1e-5)
"""
    ran = subprocess.run([sys.executable, "-c", code, str(written)], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
