"""The walk over a whole model: what the baselines leave behind, and what they gain."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from holdfast.errors import QuantizationError
from holdfast.exporter.architectures import linear_modules
from holdfast.exporter.source import SourceModel, load_source
from holdfast.exporter.streamed import StreamedModel
from holdfast.quantize.formats import Format, formats
from holdfast.quantize.prompts.sequences import Batch
from holdfast.quantize.walk import WholeModel, padded_batch
from holdfast.quantize.weights.codes import WeightCodes
from holdfast.quantize.weights.gptq import gptq
from holdfast.quantize.weights.hqq import hqq
from holdfast.quantize.weights.rtn import rtn
from holdfast.quantize.weights.weight_only import awq_codes, gptq_codes, rounded_codes
from holdfast.recipe import QuantizeConfig
from tests.tiny import tiny_model

VARIANTS = {
    "llama": ("LlamaForCausalLM", {}),
    "llama, untied": ("LlamaForCausalLM", {"tie_word_embeddings": False}),
    "qwen2, biases": ("Qwen2ForCausalLM", {}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "opt": ("OPTForCausalLM", {}),
    "opt, projected": ("OPTForCausalLM", {"word_embed_proj_dim": 32, "do_layer_norm_before": False}),
}
Weights = dict[str, Tensor]


def build(folder: Path, name: str = "llama") -> SourceModel:
    architecture, settings = VARIANTS[name]
    return load_source(tiny_model(folder, architecture, **settings))


def sequences(seed: int = 0, rows: int = 24) -> list[Batch]:
    """Rows of 6 to 29 tokens, padded, in three batches."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(6, 30, (rows,), generator=generator).tolist()
    ids = [torch.randint(4, 300, (length,), generator=generator).tolist() for length in lengths]
    return [padded_batch(ids[start : start + 8], 0) for start in range(0, rows, 8)]


def w4(model: nn.Module, **settings: object) -> dict[str, Format]:
    config = QuantizeConfig(**{"scheme": "w4", "block_size": 16, **settings})  # type: ignore[arg-type]
    return formats(list(linear_modules(model)), config)


def logits(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(**b.inputs(), use_cache=False).logits[b.mask.bool()] for b in batches])


def divergence(source: SourceModel, codes: dict[str, WeightCodes], batches: Sequence[Batch]) -> float:
    """Mean KL of the quantized model from the full-precision one, nats a token."""
    model = source.model
    expected = logits(model, batches).log_softmax(-1)
    own = {path: model.get_submodule(path).weight for path in codes}
    for path, code in codes.items():
        model.get_submodule(path).weight = nn.Parameter(code.dequantized(), requires_grad=False)
    found = logits(model, batches).log_softmax(-1)
    for path, weight in own.items():
        model.get_submodule(path).weight = weight
    return float((expected.exp() * (expected - found)).sum(dim=-1).mean())


def snapshot(model: nn.Module) -> Weights:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_weights(model: nn.Module, before: Weights) -> None:
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", VARIANTS)
def test_gptq_covers_every_linear_and_leaves_the_model(name: str, tmp_path: Path) -> None:
    source = build(tmp_path / "m", name)
    wanted, before, done = w4(source.model), snapshot(source.model), []
    codes = gptq_codes(WholeModel(source.model), sequences(), wanted, on_done=done.append)
    assert list(codes) == list(wanted)
    assert done == [1] * len(wanted)
    assert_same_weights(source.model, before)
    for path, linear in linear_modules(source.model).items():
        assert codes[path].codes.shape == linear.weight.shape
    plain = rounded_codes(WholeModel(source.model), wanted, rtn)
    test = sequences(seed=1)
    assert divergence(source, codes, test) < 0.9 * divergence(source, plain, test)


@pytest.mark.parametrize(
    "path", ["model.layers.1.self_attn.q_proj", "model.layers.0.mlp.down_proj", "lm_head"]
)
def test_later_linears_read_what_quantized_ones_give(path: str, tmp_path: Path) -> None:
    source = build(tmp_path / "m", "llama, untied")
    model, batches, wanted = source.model, sequences(), w4(source.model)
    codes = gptq_codes(WholeModel(model), batches, wanted)
    linear = model.get_submodule(path)
    before = list(wanted)[: list(wanted).index(path)]
    if path.endswith("q_proj"):
        before = [p for p in before if not p.startswith("model.layers.1.")]
    for earlier in before:
        model.get_submodule(earlier).weight.data = codes[earlier].dequantized()
    hessian = torch.zeros(linear.in_features, linear.in_features, dtype=torch.float64)
    for batch in batches:
        seen: list[Tensor] = []
        handle = linear.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        logits(model, [batch])
        handle.remove()
        tokens = seen[0][batch.mask.bool()]
        hessian += tokens.T @ tokens
    expected = gptq(linear.weight, hessian, wanted[path])
    assert float((codes[path].codes == expected.codes).float().mean()) > 0.999
    torch.testing.assert_close(codes[path].scales, expected.scales, rtol=1e-3, atol=1e-5)


def test_gptq_from_disk_is_gptq_in_memory(tmp_path: Path) -> None:
    source = build(tmp_path / "m", "llama, untied")
    streamed = StreamedModel(tmp_path / "m")
    wanted = w4(source.model)
    in_memory = gptq_codes(WholeModel(source.model), sequences(), wanted)
    from_disk = gptq_codes(streamed, sequences(), wanted)
    rounded = rounded_codes(streamed, wanted, rtn)
    for path, weight in in_memory.items():
        assert torch.equal(from_disk[path].codes, weight.codes)
        assert torch.equal(
            rounded[path].codes, rtn(source.model.get_submodule(path).weight, wanted[path]).codes
        )
    assert all(parameter.is_meta for parameter in streamed.model.parameters())


def test_what_is_excluded_is_not_quantized(tmp_path: Path) -> None:
    source = build(tmp_path / "m")
    wanted = w4(source.model, exclude=("lm_head", "*.0.*", "*.k_proj"))
    for codes in (
        gptq_codes(WholeModel(source.model), sequences(), wanted),
        awq_codes(source.model, sequences(), wanted),
        rounded_codes(WholeModel(source.model), wanted, hqq),
    ):
        assert list(codes) == list(wanted)
        assert len(codes) == 6


@pytest.mark.parametrize("name", ["llama", "qwen2, biases", "gpt2", "opt"])
def test_awq_leaves_the_function_and_beats_rounding(name: str, tmp_path: Path) -> None:
    source = build(tmp_path / "m", name)
    model, batches, test, done = source.model, sequences(), sequences(seed=1), []
    _shout(model)
    wanted = w4(model)
    plain = divergence(source, rounded_codes(WholeModel(model), wanted, rtn), test)
    before, weights = logits(model, test), snapshot(model)
    codes = awq_codes(model, batches, wanted, on_done=done.append)
    torch.testing.assert_close(logits(model, test), before, atol=2e-3, rtol=0.0)
    assert any(not torch.equal(value, weights[key]) for key, value in model.state_dict().items())
    assert (list(codes), len(done)) == (list(wanted), len(wanted))
    assert divergence(source, codes, test) < plain


def _shout(model: nn.Module) -> None:
    """A few input channels of every block become much stronger than the others, as in large models."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (parameter.dim() == 1 and "norm" in name.lower()) or ".ln_" in name:
                parameter[:2] *= 12.0


def test_errors_name_the_module(tmp_path: Path) -> None:
    source = build(tmp_path / "m")
    path = "model.layers.1.mlp.up_proj"
    source.model.get_submodule(path).weight.data[0, 0] = float("nan")
    wanted = {name: form for name, form in w4(source.model).items() if name == path}
    for run in (
        lambda: rounded_codes(WholeModel(source.model), wanted, rtn),
        lambda: gptq_codes(WholeModel(source.model), sequences(), wanted),
        lambda: awq_codes(source.model, sequences(), wanted),
    ):
        with pytest.raises(QuantizationError, match=r"`model\.layers\.1\.mlp\.up_proj`: The weight holds"):
            run()


def test_the_model_is_itself_again_after_an_error(tmp_path: Path) -> None:
    source = build(tmp_path / "m")
    source.model.get_submodule("model.layers.1.mlp.up_proj").weight.data[0, 0] = float("inf")
    before = snapshot(source.model)
    with pytest.raises(QuantizationError):
        gptq_codes(WholeModel(source.model), sequences(), w4(source.model))
    assert_same_weights(source.model, before)
