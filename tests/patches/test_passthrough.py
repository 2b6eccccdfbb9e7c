"""A patch that does nothing changes nothing, and a removed patch leaves nothing."""

import copy
import gc
import itertools
import pkgutil
import sys
import threading
import weakref

import pytest
import torch

import dit_accel
from dit_accel.patches import seam, session
from tests.patches.symbols import replaced_symbols
from tests.recipes import POOLED, WINDOW
from tests.tiny import TINY


def _seam_users() -> dict[tuple[str, str], int]:
    """Users of each diverted symbol, once what nobody holds is gone. Another test's pipeline may be one."""
    gc.collect()
    return {key: replacement.users for key, replacement in seam._replacements.items()}


@pytest.fixture(autouse=True)
def _nothing_left_behind():
    before = _seam_users()
    yield
    assert _seam_users() == before


def _footprint(pipe: object) -> dict[str, object]:
    """Everything a patch could have touched: hooks, instance attributes and the seam's symbols."""
    seen: dict[str, object] = {}
    for name, model in pipe.components.items():
        if not name.startswith("transformer") or model is None:
            continue
        for path, module in model.named_modules():
            seen[f"{name}.{path}.class"] = type(module)
            for key, value in vars(module).items():
                if "hook" in key:
                    seen[f"{name}.{path}.{key}"] = dict(value) if isinstance(value, dict) else value
                else:
                    seen[f"{name}.{path}.{key}"] = id(value)
    return seen | replaced_symbols()


@pytest.mark.parametrize("family", TINY)
def test_dense_is_bit_equal_and_removal_is_complete(family):
    tiny = TINY[family]
    pipe = tiny.build()
    plain = tiny.run(pipe)
    before = _footprint(pipe)
    handle = dit_accel.patch(pipe, "dense")
    assert torch.equal(tiny.run(pipe), plain)
    calls = handle.summary().dense_calls
    assert set(calls) == {"recipe is dense"}
    assert calls["recipe is dense"] > 0
    handle.remove()
    assert _footprint(pipe) == before
    assert torch.equal(tiny.run(pipe), plain)


@pytest.mark.parametrize("family", TINY)
def test_every_self_attention_is_patched_and_nothing_else(family):
    tiny = TINY[family]
    pipe = tiny.build(3)
    with dit_accel.patch(pipe, POOLED) as handle:
        tiny.run(pipe, steps=2)
        summary = handle.summary()
    assert not summary.dense_calls
    assert all(layer.sparse_calls > 0 for layer in summary.layers)


def test_removing_a_sparse_patch_restores_the_output():
    tiny = TINY["wan"]
    pipe = tiny.build()
    plain = tiny.run(pipe)
    handle = dit_accel.patch(pipe, POOLED)
    assert not torch.equal(tiny.run(pipe), plain)
    handle.remove()
    handle.remove()  # twice does nothing
    assert not handle.active
    assert torch.equal(tiny.run(pipe), plain)


def _failing(function, number):
    """``function``, but its ``number``-th call raises."""
    calls = itertools.count(1)

    def call(*args, **kwargs):
        if next(calls) == number:
            raise RuntimeError("half-way")
        return function(*args, **kwargs)

    return call


@pytest.mark.parametrize(
    ("where", "recipe", "number"),
    [
        (f"torch.nn.Module.{hook}", POOLED, number)
        for hook in ("register_forward_pre_hook", "register_forward_hook")
        for number in (1, 3, 5)  # of two experts with a root and two layers each
    ]
    + [("dit_accel.patches.install.attach", "sla", 3), ("dit_accel.patches.processors.divert", POOLED, 2)],
)
def test_a_failed_patch_leaves_nothing(where, recipe, number, monkeypatch):
    pipe = TINY["wan2.2"].build()
    before = _footprint(pipe)
    with monkeypatch.context() as patched:
        patched.setattr(where, _failing(pkgutil.resolve_name(where), number))
        with pytest.raises(RuntimeError, match=r"^half-way$"):
            dit_accel.patch(pipe, recipe)
    assert _footprint(pipe) == before
    # Nothing is in the way of another patch.
    dit_accel.patch(pipe, recipe).remove()
    assert _footprint(pipe) == before


def test_a_dropped_model_gives_the_seam_back():
    before = _seam_users()
    dit_accel.patch(TINY["wan"].build(), POOLED)
    assert seam._replacements
    assert _seam_users() == before


def test_a_model_dropped_while_another_is_compiled_changes_no_symbol_under_the_compiler():
    """Found in the full suite: the collector ran in a trace, whose guards then named a closure that was gone."""
    dropped = TINY["wan"].build()
    dit_accel.patch(dropped, POOLED)
    kept = [dropped]
    del dropped

    def backend(graph, inputs):
        kept.clear()
        gc.collect()
        return graph

    pipe = TINY["wan"].build(12)
    expected = TINY["wan"].run(pipe)
    pipe.transformer.compile(fullgraph=True, backend=backend)
    assert torch.equal(TINY["wan"].run(pipe), expected)
    assert not kept
    # The next patch to end gives the symbol back.
    with dit_accel.patch(pipe, "dense"):
        pass
    torch._dynamo.reset()


def test_a_wrapper_that_somebody_else_put_around_the_symbol_is_left(monkeypatch):
    module, symbol = "diffusers.models.transformers.transformer_wan", "dispatch_attention_fn"
    host = sys.modules[module]
    original = getattr(host, symbol)
    pipe = TINY["wan"].build()
    with dit_accel.patch(pipe, POOLED) as handle:
        ours = getattr(host, symbol)

        def theirs(*args, **kwargs):
            return ours(*args, **kwargs)

        monkeypatch.setattr(host, symbol, theirs)
        with dit_accel.patch(TINY["wan"].build(), POOLED):
            TINY["wan"].run(pipe)
        assert handle.summary().sparse_calls
        assert getattr(host, symbol) is theirs
    assert getattr(host, symbol) is theirs
    monkeypatch.undo()
    setattr(host, symbol, original)


def test_unpatch_finds_the_patch():
    pipe = TINY["wan2.2"].build()
    before = _footprint(pipe)
    dit_accel.patch(pipe, POOLED)  # the handle is dropped: the patch stays
    gc.collect()
    with pytest.raises(ValueError, match="patched already"):
        dit_accel.patch(pipe, WINDOW)
    dit_accel.unpatch(pipe)
    assert _footprint(pipe) == before
    with pytest.raises(ValueError, match="not patched"):
        dit_accel.unpatch(pipe)


def test_two_pipelines_do_not_touch_each_other():
    tiny = TINY["wan"]
    first, second, third = tiny.build(), tiny.build(), tiny.build()
    plain = tiny.run(third)
    alone = []
    for recipe in (POOLED, WINDOW):
        with dit_accel.patch(first, recipe):
            alone.append(tiny.run(first))
    one = dit_accel.patch(first, POOLED)
    two = dit_accel.patch(second, WINDOW)
    assert torch.equal(tiny.run(first), alone[0])
    assert torch.equal(tiny.run(second), alone[1])
    assert torch.equal(tiny.run(third), plain)
    one.remove()
    assert torch.equal(tiny.run(second), alone[1])
    two.remove()
    assert torch.equal(tiny.run(second), plain)


def test_patching_while_another_pipeline_runs_in_a_thread():
    tiny = TINY["wan"]
    running, other = tiny.build(), tiny.build()
    plain = tiny.run(running, steps=2)
    with dit_accel.patch(other, POOLED):
        sparse = tiny.run(other, steps=2)
    results, stop = [], threading.Event()

    def generate():
        while not stop.is_set():
            results.append(tiny.run(running, steps=2))

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        for _ in range(5):
            with dit_accel.patch(other, POOLED):
                assert torch.equal(tiny.run(other, steps=2), sparse)
    finally:
        stop.set()
        thread.join()
    assert results
    assert all(torch.equal(result, plain) for result in results)


def test_an_exception_inside_a_forward_leaves_nothing_published():
    tiny = TINY["wan"]
    patched, other = tiny.build(), tiny.build()
    plain = tiny.run(other)
    with dit_accel.patch(patched, POOLED) as handle:
        attention = patched.transformer.blocks[1].attn1

        def fail(module, args):
            raise RuntimeError("inside attention")

        hook = attention.norm_q.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="inside attention"):
            tiny.run(patched)
        hook.remove()
        calls = handle.summary().sparse_calls
        assert torch.equal(tiny.run(other), plain)
        assert handle.summary().sparse_calls == calls


def test_a_deep_copy_is_not_patched():
    tiny = TINY["wan"]
    pipe = tiny.build()
    plain = tiny.run(pipe)
    with dit_accel.patch(pipe, POOLED) as handle:
        twin = copy.deepcopy(pipe.transformer)
        unpatched = tiny.build().transformer
        assert [type(m) for m in twin.modules()] == [type(m) for m in unpatched.modules()]
        sparse = tiny.run(pipe)
        calls = handle.summary().sparse_calls
        original, pipe.transformer = pipe.transformer, twin
        assert torch.equal(tiny.run(pipe), plain)
        assert handle.summary().sparse_calls == calls
        pipe.transformer = original
        assert torch.equal(tiny.run(pipe), sparse)


def test_a_removed_patch_frees_its_session():
    pipe = TINY["wan"].build()
    handle = dit_accel.patch(pipe, POOLED)
    alive = weakref.ref(handle.sessions["transformer"])
    number = handle.sessions["transformer"].id
    handle.remove()
    del handle
    gc.collect()
    assert alive() is None
    assert session.session_of(number) is None
