"""Which weights are these? The same ones however they are stored; others and slightly changed ones in every form."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig
from torch import nn

from dit_accel.patches.fingerprint import Fingerprint
from dit_accel.patches.samples import WeightSample, sample
from dit_accel.patches.targets import self_attentions, transformers_of
from dit_accel.patches.weights import weights_of
from tests.tiny import TINY

CPU = torch.device("cpu")


def model_of(family: str = "wan", seed: int = 0) -> Any:
    model = TINY[family].build().transformer
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        # The rows of one matrix have the spread that trained ones have: a few binades.
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return model


def fingerprint(model: nn.Module) -> Fingerprint:
    """After a round trip through a file."""
    found = Fingerprint.of(model, attentions(model))
    return Fingerprint.from_dict(json.loads(json.dumps(found.to_dict(), allow_nan=False)))


def attentions(model: nn.Module) -> dict[str, nn.Module]:
    ((_, _, family),) = transformers_of(model)
    return dict(self_attentions(model, family))


def difference(mine: nn.Module | Fingerprint, its: nn.Module) -> str | None:
    known = mine if isinstance(mine, Fingerprint) else fingerprint(mine)
    return known.difference(its, attentions(its))


def with_lora(model: Any, std: float = 0.03) -> Any:
    layers = [
        f"{path}.{name}"
        for path, attention in attentions(model).items()
        for name, module in attention.named_modules()
        if isinstance(module, nn.Linear)
    ]
    model.add_adapter(
        LoraConfig(r=2, lora_alpha=3, target_modules=layers, init_lora_weights=False), adapter_name="mine"
    )
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = (std * torch.randn(parameter.shape, generator=generator)).to(parameter)
    return model


def fused_lora(model: Any, scale: float = 0.7) -> Any:
    with_lora(model).fuse_lora(lora_scale=scale)
    return model


def unfused_lora(model: Any) -> Any:
    fused_lora(model).unfuse_lora()
    return model


def fused_projections(model: Any) -> Any:
    model.fuse_qkv_projections()
    return model


def sequential(model: Any) -> Any:
    return accelerate.cpu_offload(model, execution_device=CPU)


def cast(dtype: torch.dtype, **options: Any) -> Callable[[Any], Any]:
    def apply(model: Any) -> Any:
        model.enable_layerwise_casting(storage_dtype=dtype, compute_dtype=torch.float32, **options)
        return model

    return apply


def groups(kind: str, folder: Any = None) -> Callable[[Any], Any]:
    def apply(model: Any) -> Any:
        model.enable_group_offload(
            CPU,
            offload_type=kind,
            num_blocks_per_group=1,
            offload_to_disk_path=None if folder is None else str(folder),
        )
        return model

    return apply


def quantised(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def with_hook(model: Any) -> Any:
    return accelerate.cpu_offload_with_hook(model, CPU)[0]


def in_turn(*steps: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def apply(model: Any) -> Any:
        for step in steps:
            model = step(model)
        return model

    return apply


FORMS: dict[str, Callable[[Any], Any]] = {
    "plain": lambda model: model,
    "bf16": lambda model: model.to(torch.bfloat16),
    "fp16": lambda model: model.to(torch.float16),
    "bf16 and back": lambda model: model.to(torch.bfloat16).to(torch.float32),
    "e4m3": cast(torch.float8_e4m3fn),
    "e5m2": cast(torch.float8_e5m2),
    "all e4m3": cast(torch.float8_e4m3fn, skip_modules_pattern=None),
    "bf16, then e4m3": in_turn(lambda model: model.to(torch.bfloat16), cast(torch.float8_e4m3fn)),
    "e4m3 and back": lambda model: model.to(torch.float8_e4m3fn).to(torch.float32),
    "sequential offload": sequential,
    "model offload": with_hook,
    "groups of blocks": groups("block_level"),
    "groups of leaves": groups("leaf_level"),
    "e4m3, offloaded": in_turn(cast(torch.float8_e4m3fn), sequential),
    "fused projections": fused_projections,
    "LoRA": with_lora,
    "fused LoRA": fused_lora,
    "LoRA fused and taken out": unfused_lora,
    "bf16, fused LoRA": in_turn(lambda model: model.to(torch.bfloat16), fused_lora),
    "bf16, LoRA fused and taken out": in_turn(lambda model: model.to(torch.bfloat16), unfused_lora),
    "fused LoRA, then projections": in_turn(fused_lora, fused_projections),
    "fused projections, then LoRA": in_turn(fused_projections, fused_lora),
    "fused LoRA, offloaded": in_turn(fused_lora, sequential),
    "quantised": quantised,
}


@pytest.fixture(scope="module")
def known() -> Fingerprint:
    return fingerprint(model_of())


@pytest.mark.parametrize("form", FORMS)
def test_the_same_weights_in_another_form_are_the_same_and_others_are_not(form, known):
    stored = FORMS[form](model_of())
    assert difference(known, stored) is None
    if form != "quantised":
        assert difference(stored, model_of()) is None
        assert difference(stored, FORMS[form](model_of())) is None
        assert len(fingerprint(stored).weights) > 40
    for other in (FORMS[form](model_of(seed=1)), FORMS[form](tuned(0.1))):
        assert "other weights" in difference(known, other)


def tuned(share: float, dtype: torch.dtype = torch.float32) -> Any:
    """Every weight has changed by about this share of its spread."""
    model = model_of()
    generator = torch.Generator().manual_seed(9)
    for parameter in model.parameters():
        spread = parameter.std() if parameter.numel() > 1 else parameter.abs()
        parameter.data += share * spread * torch.randn(parameter.shape, generator=generator)
    return model.to(dtype)


@pytest.mark.parametrize(
    ("form", "share"),
    [("plain", 1e-4), ("bf16", 0.01), ("fp16", 0.01), ("e4m3", 0.05), ("sequential offload", 1e-4), ("LoRA", 1e-4)],
)
def test_a_slight_fine_tuning_shows(form, share, known):
    assert "other weights" in difference(known, FORMS[form](tuned(share)))
    assert "other weights" in difference(FORMS[form](tuned(share)), model_of())


@pytest.mark.parametrize("family", ["flux", "sd3", "hunyuan", "qwen-image", "ltx", "cogvideox"])
def test_families(family):
    for form in ("e4m3", "sequential offload", "fused projections", "fused LoRA"):
        stored = FORMS[form](model_of(family))
        assert difference(model_of(family), stored) is None, form
        assert difference(stored, model_of(family)) is None, form
        other = model_of(family, seed=1)
        assert "other weights" in difference(stored, other), form


def test_weights_on_disk(tmp_path, known):
    for name, offload in (
        ("accelerate", lambda model, folder: accelerate.disk_offload(model, folder, execution_device=CPU)),
        ("groups", lambda model, folder: groups("block_level", folder)(model)),
        ("leaves", lambda model, folder: groups("leaf_level", folder)(model)),
    ):
        stored = offload(model_of(), tmp_path / name)
        assert difference(known, stored) is None
        assert difference(stored, model_of()) is None
        assert "other weights" in difference(known, offload(model_of(seed=1), tmp_path / f"other {name}"))


def test_what_cannot_be_read_is_said_in_a_sentence(known):
    model = model_of().to("meta")
    with pytest.raises(
        ValueError, match=r"weights of WanTransformer3DModel cannot be read: they are on the meta device"
    ):
        fingerprint(model)
    assert "cannot be read: they are on the meta device" in difference(known, model)
    # A part of them is enough.
    model = model_of()
    model.blocks[0].to("meta")
    assert difference(known, model) is None
    assert difference(model, model_of()) is None


def test_a_lora_that_was_fused_and_unloaded_has_changed_the_weights(known):
    model = fused_lora(model_of())
    model.unload_lora()
    assert "other weights" in difference(known, model)


def test_an_adapter_of_another_kind_hides_only_what_it_is_fused_into(known):
    def with_dora(model):
        layers = ["blocks.0.attn1.to_q", "blocks.0.attn1.to_k"]
        config = LoraConfig(r=2, target_modules=layers, use_dora=True, init_lora_weights=False)
        model.add_adapter(config, adapter_name="mine")
        model.fuse_lora()
        return model

    assert difference(known, with_dora(model_of())) is None
    assert "other weights" in difference(known, with_dora(model_of(seed=1)))


def test_tied_weights_are_known_by_each_of_their_names():
    def tied():
        model = model_of()
        model.blocks[1].attn1.to_q.weight = model.blocks[0].attn1.to_q.weight
        return model

    names = {"blocks.0.attn1.to_q.weight", "blocks.1.attn1.to_q.weight"}
    assert names <= weights_of(tied()).keys()
    assert names <= weights_of(sequential(tied())).keys()
    assert difference(tied(), sequential(tied())) is None
    assert difference(sequential(tied()), tied()) is None
    assert "blocks.1.attn1.to_q.weight" in (difference(tied(), model_of()) or "")


def test_compiled_blocks_have_the_names_they_had(known):
    model = model_of()
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    names = {plain for plain in weights_of(model) if plain.startswith("blocks.0.")}
    assert names == {name for name in weights_of(model_of()) if name.startswith("blocks.0.")}
    assert difference(known, model_of()) is None


def test_writing_reaches_the_weights_that_the_model_computes_with(tmp_path):
    """Through the map of a hook, a file's place in memory, a group's copy, and the rows of a fused projection."""
    name, call = "blocks.0.attn1.to_q.weight", {"timestep": torch.ones(1)}
    call |= {"hidden_states": torch.randn(1, 16, 2, 4, 4), "encoder_hidden_states": torch.randn(1, 4, 32)}
    forms = {key: FORMS[key] for key in ("plain", "sequential offload", "groups of blocks", "fused projections")}
    forms["disk"] = lambda model: accelerate.disk_offload(model, tmp_path, execution_device=CPU)
    wanted = model_of()
    before = wanted(**call).sample
    wanted.blocks[0].attn1.to_q.weight.data *= 2
    for form, store in forms.items():
        model = store(model_of())
        kept = weights_of(model)[name].read().clone()
        with torch.no_grad():
            weights_of(model)[name].write(2 * kept)
            torch.testing.assert_close(model(**call).sample, wanted(**call).sample, msg=form)
            weights_of(model)[name].write(kept)
            torch.testing.assert_close(model(**call).sample, before, msg=form)


def test_a_group_with_streams_keeps_what_is_written(monkeypatch):
    """On a GPU a copy on the CPU takes the parameter's place after every forward; here only the copy is looked at."""
    model = groups("block_level")(model_of())
    group = model.blocks[0]._diffusers_hook.get_hook("group_offloading").group
    group.stream, group.low_cpu_mem_usage = object(), True
    group.cpu_param_dict = group._init_cpu_param_dict()
    weight = model.blocks[0].attn1.to_q.weight
    weights_of(model)["blocks.0.attn1.to_q.weight"].write(torch.full_like(weight, 3.0))
    assert (group.cpu_param_dict[weight] == 3.0).all()
    assert (weight == 3.0).all()


def test_files_of_before_are_read(known):
    """Four values of each tensor, and nothing on how they were stored."""
    old = {name: sample(weight.read(), count=4).values for name, weight in weights_of(model_of()).items()}
    data = json.loads(json.dumps(known.to_dict() | {"weights": old}))
    for form in ("plain", "bf16", "e4m3"):
        assert difference(Fingerprint.from_dict(data), FORMS[form](model_of())) is None
    assert "other weights" in difference(Fingerprint.from_dict(data), model_of(seed=1))


def test_damaged_fingerprints_are_refused(known):
    good = known.to_dict()
    for bad, words in (
        ([], "a fingerprint has transformer"),
        ({**good, "layers": "two"}, "layers in a fingerprint must be of type int, got 'two'"),
        ({name: value for name, value in good.items() if name != "heads"}, "a fingerprint has transformer"),
        ({**good, "weights": {"a": "b"}}, "must be a list of numbers, got 'b'"),
        ({**good, "weights": {"a": [1.0, "b"]}}, "must be a list of numbers"),
        ({**good, "weights": {"a": {"stored": "float99", "values": [1.0]}}}, "must be a list of numbers"),
    ):
        with pytest.raises(ValueError, match=words):
            Fingerprint.from_dict(bad)


FORMATS = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
@pytest.mark.parametrize("scale", [0.02, 1.0, 100.0])
def test_no_rounding_counts_as_a_difference(first, second, scale):
    """From one number to both formats, also by way of a third, and into a wider one again."""
    value = scale * torch.randn(4096, generator=torch.Generator().manual_seed(3))
    for between in (torch.float32, torch.bfloat16, torch.float16):
        mine, its = (value.to(between).to(getattr(torch, name)) for name in (first, second))
        for a, b in ((mine, its), (mine.float(), its), (mine.float(), its.float())):
            assert sample(a, count=4096).apart(sample(b, count=4096)) is None


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
@pytest.mark.parametrize("scale", [1e-6, 1e5])
def test_where_formats_run_out_of_numbers(first, second, scale):
    value = scale * torch.randn(4096, generator=torch.Generator().manual_seed(3))
    mine, its = (value.to(getattr(torch, name)) for name in (first, second))
    assert sample(mine, count=4096).apart(sample(its, count=4096)) is None


@pytest.mark.parametrize("first", FORMATS)
@pytest.mark.parametrize("second", FORMATS)
def test_sixteen_values_of_other_matrices_always_differ(first, second):
    """In a hundred pairs; in two vectors of ones nothing does."""
    value = 0.02 * torch.randn(2, 100, 256, generator=torch.Generator().manual_seed(4))
    for a, b in zip(*value, strict=True):
        mine, its = sample(a.to(getattr(torch, first))), sample(b.to(getattr(torch, second)))
        assert mine.apart(its) is not None
    ones = [torch.ones(8).to(getattr(torch, name)) for name in (first, second)]
    assert sample(ones[0]).apart(sample(ones[1])) is None


def test_not_a_number_equals_only_itself_and_what_is_too_large():
    stored = WeightSample("float16", (None, 1.0))
    assert stored.apart(WeightSample("float32", (None, 1.0))) is None
    assert stored.apart(WeightSample("float32", (2e5, 1.0))) is None
    assert stored.apart(WeightSample("float32", (3.0, 1.0))) is not None
    assert sample(torch.tensor([torch.inf, -torch.inf]).half()).values == (65504.0, -65504.0)


class Packed(torch.Tensor):
    """A quantised tensor, as libraries make them: it looks like half precision, and knows its real values."""

    @staticmethod
    def __new__(cls, value):
        return torch.Tensor._make_wrapper_subclass(cls, value.shape, dtype=torch.bfloat16)

    def __init__(self, value):
        self.scale = value.abs().amax(1, keepdim=True) / 7
        self.numbers = (value / self.scale).round().to(torch.int8)

    def dequantize(self):
        return self.numbers.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(function)


def test_quantised_tensors_are_compared_by_their_real_values(known):
    def packed(model):
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight = nn.Parameter(Packed(module.weight.data), requires_grad=False)
        return model

    assert difference(known, packed(model_of())) is None
    assert difference(packed(model_of()), model_of()) is None
    only = Fingerprint.from_dict(
        known.to_dict() | {"weights": {n: w for n, w in known.to_dict()["weights"].items() if "ffn" in n}}
    )
    assert "other weights" in difference(only, packed(model_of(seed=1)))
    assert weights_of(packed(model_of()))["blocks.0.attn1.to_q.weight"].why_fixed == "is quantised"
