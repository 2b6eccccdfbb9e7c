"""Kept variants of compiled kernels: which launch goes where, and what a key must decide."""

import itertools

import pytest
import torch

from dit_accel.kernels import BlockMask, pool_blocks, pooled_scores, quantize_inputs, select_blocks
from dit_accel.kernels.common.compiled import MOST_KEPT, CompiledVariants, KeptKernel
from dit_accel.kernels.common.quantized_inputs import reference_quantize
from dit_accel.kernels.common.zeroed import MOST_KINDS, PIECES, ZeroedPieces
from dit_accel.kernels.mask.packed import PackedBlockMask
from dit_accel.kernels.mask.query_pairs import query_pairs
from dit_accel.kernels.selection.block_mass import block_mass
from tests.kernels.operations import CountedOperations


class Variant:
    packed_metadata = ()

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args: self.launches.append((grid, args))


class Kernel:
    """Stands for Triton's function of two arguments and two constants."""

    def __init__(self, result=Variant):
        self.arg_names = ["x", "n", "A", "B"]
        self.launches, self.result, self.variants = [], result, []

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.launches.append((grid, args, constants))
            self.variants.append(self.result())
            return self.variants[-1]

        return launch


def launch(variants, kernel, key, args=(1, 2), constants=None):
    variants.launch(kernel, (3, 1, 1), key, args, constants or {"A": 4, "B": 5}, num_warps=4)


def test_a_key_is_compiled_once_and_its_variant_gets_what_the_kernel_would():
    kernel, variants = Kernel(), CompiledVariants()
    launch(variants, kernel, "one")
    launch(variants, kernel, "one", args=(6, 7))
    launch(variants, kernel, "other")
    assert [args for _, args, _ in kernel.launches] == [(1, 2), (1, 2)]
    assert kernel.launches[0][2] == {"A": 4, "B": 5, "num_warps": 4}
    assert kernel.variants[0].launches == [((3, 1, 1), (6, 7, 4, 5))]
    assert kernel.variants[1].launches == []


def test_what_only_interprets_or_compiles_is_never_kept():
    kernel, variants = Kernel(result=lambda: None), CompiledVariants()
    for _ in range(3):
        launch(variants, kernel, "one")
    assert len(kernel.launches) == 3


def test_constants_in_another_order_are_refused():
    with pytest.raises(TypeError, match="must be A, B, got B, A"):
        launch(CompiledVariants(), Kernel(), "one", constants={"B": 5, "A": 4})


def test_variants_do_not_pile_up():
    kernel, variants = Kernel(), CompiledVariants()
    for key in range(MOST_KEPT + 3):
        launch(variants, kernel, key)
    assert len(variants._kept) == 3


def hopper_calls():
    """Calls that differ in what Triton looks at: batch, heads, lengths, strides, alignment, masks, permutations."""
    lead = [*itertools.product((1, 2), (1, 2, 3), (128, 200, 256), (64, 128), (128,), (64, 128))]
    lead += itertools.product((1, 2), (1, 3), (200, 256), (128,), (64,), (64, 128))
    for batch, heads, length, dim, block_q, block_k in lead:
        nq, nk = -(-length // block_q), -(-length // block_k)
        keep = torch.ones(1, heads, nq, nk, dtype=torch.bool)
        mask = BlockMask.from_dense(keep, block_q, block_k, length, length)
        plain = [torch.randn(batch, length, heads, dim, dtype=torch.float16) for _ in range(3)]
        fused = torch.randn(batch, length, 3 * heads, dim, dtype=torch.float16)
        # Tokens 8 numbers further apart than they need be.
        apart = torch.randn(3, batch, length, heads * dim + 8, dtype=torch.float16)[..., :-8].unflatten(
            -1, (heads, dim)
        )
        for tensors in (plain, [fused[:, :, n * heads : (n + 1) * heads] for n in range(3)], apart.unbind()):
            for dtype, hidden, permuted in itertools.product((torch.float16, torch.bfloat16), (0, 1, 2), (0, 1)):
                rows = torch.arange(length, dtype=torch.int32).expand(1, heads, length) if permuted else None
                # A key mask that begins anywhere.
                key_mask = (
                    None if not hidden else torch.ones(batch, length + 3, dtype=torch.bool)[:, hidden:][:, :length]
                )
                yield [x.to(dtype) for x in tensors], mask, rows, key_mask


def test_one_key_never_stands_for_two_of_tritons_variants(monkeypatch):
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from dit_accel.kernels.attention.hopper import forward

    kernel = forward.hopper_fwd_kernel
    specialise = create_function_from_signature(
        kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32))
    )
    found: dict[object, set[str]] = {}

    class Recorder:
        def launch(self, _kernel, _grid, key, args, constants, num_warps):
            found.setdefault(key, set()).add(str(specialise(*args, **constants, num_warps=num_warps)[1]))

    monkeypatch.setattr(forward, "_VARIANTS", Recorder())
    monkeypatch.setattr(forward, "multiprocessors", lambda _index: 132)
    monkeypatch.setattr(forward, "query_pairs", lambda mask, block_k, _backend: query_pairs(mask, block_k, "torch"))
    for (q, k, v), mask, rows, key_mask in hopper_calls():
        forward.hopper_forward(q, k, v, mask, rows, key_mask, 0.125)
        in_eights = q.shape[0] == 2 and q.dtype == torch.float16
        for precision in ("int8", "int8_fp8") if in_eights else ():
            for key_scales in ("block", "thread"):
                quantized = reference_quantize(
                    q, k, v, mask.block_q, mask.block_k, precision=precision, rows=rows, key_scales=key_scales
                )
                forward.hopper_forward(q, k, v, mask, rows, key_mask, 0.125, quantized=quantized)
    assert len(found) > 50
    assert all(len(variants) == 1 for variants in found.values())


def test_zeros_are_made_once_for_many_launches_and_taken_once():
    pieces, device = ZeroedPieces(), torch.device("cpu")
    with CountedOperations() as counted:
        taken = [pieces.take(6, device) for _ in range(PIECES)]
    assert counted.names["zeros"] == 1
    assert len({piece.data_ptr() for piece in taken}) == PIECES
    for number, piece in enumerate(taken):
        assert (piece.shape, piece.dtype, int(piece.abs().sum())) == ((6,), torch.int32, 0)
        piece.fill_(number + 1)  # as a kernel does: no other piece sees it
    assert int(pieces.take(6, device).abs().sum()) == 0
    assert pieces.take(4, device).shape == (4,)


def test_streams_share_no_zeros(monkeypatch):
    """What one stream wrote to zero another would read before it was written."""
    pieces, device = ZeroedPieces(), torch.device("cpu")
    first = pieces.take(2, device)
    monkeypatch.setattr("dit_accel.kernels.common.zeroed._stream", lambda _device: 7)
    assert pieces.take(2, device).untyped_storage().data_ptr() != first.untyped_storage().data_ptr()


def test_a_graph_that_is_captured_makes_its_own_zeros(monkeypatch):
    pieces, device = ZeroedPieces(), torch.device("cpu")
    pieces.take(2, device)
    monkeypatch.setattr("dit_accel.kernels.common.zeroed.is_captured", lambda _device: True)
    with CountedOperations() as counted:
        own = [pieces.take(2, device) for _ in range(3)]
    assert counted.names["zeros"] == 3
    assert len({piece.untyped_storage().data_ptr() for piece in own}) == 3


def test_kinds_of_zeros_do_not_pile_up():
    pieces = ZeroedPieces()
    for length in range(1, MOST_KINDS + 4):
        pieces.take(length, torch.device("cpu"))
    assert len(pieces._left) == 3


def test_a_form_that_is_kept_gives_the_launch_that_a_new_one_would(monkeypatch):
    """Whatever calls differ in: a fact that the form is not kept under would give one call another's numbers."""
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    from dit_accel.kernels.attention.hopper import forward

    launches = []

    class Recorder:
        def launch(self, _kernel, grid, key, args, constants, num_warps):
            tiles = [(x.shape, x.strides, x.block_shape) for x in args[:4]]
            numbers = [x if not isinstance(x, torch.Tensor) else x.shape for x in args[4:]]
            launches.append((grid, key, tiles, numbers, constants))

    class Forgetful(dict):
        def __setitem__(self, key, value):
            pass

    monkeypatch.setattr(forward, "_VARIANTS", Recorder())
    monkeypatch.setattr(forward, "query_pairs", lambda mask, block_k, _backend: query_pairs(mask, block_k, "torch"))
    found = {}
    for name, forms in (("kept", {}), ("new", Forgetful())):
        monkeypatch.setattr(forward, "_FORMS", forms)
        for programs in (132, 100):
            monkeypatch.setattr(forward, "multiprocessors", lambda _index, programs=programs: programs)
            for (q, k, v), mask, rows, key_mask in hopper_calls():
                forward.hopper_forward(q, k, v, mask, rows, key_mask, 0.125)
                if q.dtype == torch.float16 and q.shape[:2] == (1, 200) and key_mask is None:
                    for precision, scales in (("int8", "block"), ("int8", "thread"), ("int8_fp8", "block")):
                        eight = reference_quantize(
                            q, k, v, mask.block_q, mask.block_k, precision=precision, rows=rows, key_scales=scales
                        )
                        forward.hopper_forward(q, k, v, mask, rows, key_mask, 0.125, quantized=eight)
        found[name] = list(launches)
        launches.clear()
    assert found["kept"] == found["new"]


@pytest.mark.parametrize("permuted", [False, True], ids=["in order", "permuted"])
def test_a_second_call_of_a_form_makes_no_descriptor_and_no_form(permuted, monkeypatch):
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    from dit_accel.kernels.attention.hopper import forward

    monkeypatch.setattr(forward, "_VARIANTS", type("Nothing", (), {"launch": lambda *_args, **_named: None})())
    monkeypatch.setattr(forward, "multiprocessors", lambda _index: 132)
    monkeypatch.setattr(forward, "_FORMS", {})
    mask = BlockMask.from_dense(torch.ones(1, 2, 2, 4, dtype=torch.bool), 128, 64, 256, 256)
    q, k, v = (torch.randn(1, 256, 2, 128).half() for _ in range(3))
    rows = torch.arange(256, dtype=torch.int32).expand(1, 2, 256).contiguous() if permuted else None
    pieces = ZeroedPieces()
    forward.hopper_forward(q, k, v, mask, rows, None, 0.125, pieces=pieces)
    for name in ("default_config", "ring_heads", "TensorDescriptor"):
        monkeypatch.setattr(forward, name, None)  # whoever asks for it fails
    monkeypatch.setattr(forward, "TensorDescriptor", type("Tiles", (), {}))
    with CountedOperations() as counted:
        forward.hopper_forward(q, k, v, mask, rows, None, 0.125, pieces=pieces)
    # Output and log-sum-exp, and of a permuted call the buffers of keys and values in order.
    assert counted.names == ({"empty": 3, "unbind": 1} if permuted else {"empty": 2})


def test_a_kept_kernel_hands_its_variant_the_constants_in_the_kernels_order():
    x, kernel = torch.zeros(4), Kernel()
    kept = KeptKernel(kernel)
    for _ in range(2):
        kept[(3,)](x, 2, B=5, A=4, num_warps=1)
    assert kernel.launches == [((3,), (x, 2), {"A": 4, "B": 5, "num_warps": 1})]
    assert kernel.variants[0].launches == [((3, 1, 1), (x, 2, 4, 5))]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        ((torch.zeros(4), 3), {}),
        ((torch.zeros(4).half(), 2), {}),
        ((torch.zeros(5)[1:], 2), {}),
        ((torch.zeros(4), None), {}),
        ((torch.zeros(4), 2), {"A": 6}),
        ((torch.zeros(4), 2), {"num_warps": 2}),
    ],
    ids=["number", "dtype", "alignment", "none", "constant", "option"],
)
def test_what_triton_may_look_at_parts_the_launches_of_a_kept_kernel(args, named):
    kernel = Kernel()
    kept = KeptKernel(kernel)
    settings = {"A": 4, "B": 5, "num_warps": 1}
    kept[(3,)](torch.zeros(4), 2, **settings)
    kept[(3,)](*args, **settings | named)
    assert len(kernel.launches) == 2


def test_what_only_compiles_is_not_kept_by_a_kept_kernel_either():
    kernel = Kernel(result=lambda: None)
    kept = KeptKernel(kernel)
    for _ in range(3):
        kept[(3,)](torch.zeros(4), 2, A=4, B=5)
    assert len(kernel.launches) == 3


def planning_calls():
    """Calls that differ in batch, heads, lengths, head dims, strides, alignment, masks and permutations."""
    for batch, heads, length, dim, block_k in itertools.product((1, 2), (1, 3), (200, 256), (64, 96), (16, 64)):
        fused = torch.randn(batch, length, 3 * heads, dim, dtype=torch.float16)
        plain = [torch.randn(batch, length, heads, dim, dtype=torch.float16) for _ in range(3)]
        for q, k, v in (plain, [fused[:, :, n * heads : (n + 1) * heads] for n in range(3)]):
            for hidden, permuted in ((0, False), (1, True), (2, False)):
                rows = torch.arange(length, dtype=torch.int32).expand(1, heads, length) if permuted else None
                key_mask = (
                    None if not hidden else torch.ones(batch, length + 3, dtype=torch.bool)[:, hidden:][:, :length]
                )
                yield q, k, v, block_k, {"rows": rows, "key_mask": key_mask}


def test_one_key_of_a_kept_kernel_never_stands_for_two_of_tritons_variants(monkeypatch):
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    specialisers, found = {}, {}

    def recorded(self, _grid, *args, **named):
        name = self.kernel.fn.__name__
        if name not in specialisers:
            plain = JITFunction(self.kernel.fn)
            specialisers[name] = create_function_from_signature(plain.signature, plain.params, backend)
        variant = str(specialisers[name](*args, **named)[1:])
        found.setdefault(name, {}).setdefault(self.key(args, named), set()).add(variant)

    monkeypatch.setattr(KeptKernel, "_launch", recorded)
    here = {"backend": "triton"}
    for q, k, v, block_k, settings in planning_calls():
        nq, nk = -(-q.shape[1] // 128), -(-q.shape[1] // block_k)
        geometry = {"block_q": 128, "block_k": block_k, "q_len": q.shape[1], "kv_len": q.shape[1]}
        pool_blocks(k, block_k, **settings, **here)
        scores = pooled_scores(q, k, 128, block_k, **settings, **here)
        text = torch.zeros(nk, dtype=torch.bool)
        for more in ({}, {"forced_k": text, "forced_q": torch.zeros(nq, dtype=torch.bool)}, {"partial_k": text}):
            mask = select_blocks(scores, density=0.3, **geometry, **more, **here)
            select_blocks(scores, top_p=0.3, **geometry, **more, **here)
        block_mass(q, k, block_q=128, block_k=block_k, **settings, **here)
        PackedBlockMask.of(mask, False, "triton")
        if block_k >= 32:
            quantize_inputs(q, k, v, 128, block_k, rows=settings["rows"], **here)
    assert set(found) >= {
        "pool_fwd_kernel", "pool_pair_fwd_kernel", "select_fwd_kernel", "block_mass_fwd_kernel", "pack_fwd_kernel",
        "key_value_stats_kernel", "quantize_kernel",
    }  # fmt: skip
    assert all(len(variants) == 1 for keys in found.values() for variants in keys.values())
    assert sum(len(keys) for keys in found.values()) > 300
