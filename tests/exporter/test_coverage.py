"""Every architecture and variant, tiny and random, of its real class: both graphs against torch."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import transformers
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from holdfast.exporter.architectures import ROWS, linear_modules, row_of, why_unfused
from holdfast.exporter.batching import pad_left
from holdfast.exporter.export import ExportReport, export_source
from holdfast.exporter.source import SourceModel, load_source, save_source
from holdfast.exporter.torch_model import TorchLanguageModel
from holdfast.exporter.tracing import pluggable
from holdfast.quantize.folding import fold_scales
from holdfast.quantize.plan import input_groups
from holdfast.recipe import ExportConfig
from holdfast.runtime.graph import DecoderGraph
from holdfast.runtime.session import context_tokens
from tests.exporter.coverage import ATOL, CASES, FUSED_CASES, PLAIN, VARIANTS, WINDOW, Case
from tests.exporter.coverage_table import PAGE, REFUSALS, refusal, render
from tests.tiny import tiny_model

LENGTHS = (21, 8, 13)  # tokens of each row; three more are fed one by one
STEPS = 3
WINDOWED = ("sliding_window", "window_size")


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def source(case: Case, tmp_path: Path) -> SourceModel:
    return load_source(tiny_model(tmp_path / "model", case.architecture, **case.settings))


def test_every_architecture_has_cases() -> None:
    assert set(VARIANTS) == set(ROWS)
    for architecture, variants in VARIANTS.items():
        assert {"tied head", "untied head"} <= set(variants), architecture


def test_windows_are_shorter_than_the_prompts() -> None:
    windows = [value for case in CASES.values() for key, value in case.settings.items() if key in WINDOWED]
    assert windows
    assert set(windows) == {WINDOW}
    assert min(LENGTHS) > WINDOW


def test_the_plain_graph_computes_what_torch_does(case: Case, source: SourceModel, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    report = export_source(source, out, PLAIN)
    assert report.parity.same_top_frac == 1.0
    assert report.tied is case.settings.get("tie_word_embeddings", True)
    check_linears(source, report, out)
    check_rows_alone(source, out)
    assert context_tokens(out) == source.model.config.max_position_embeddings == 128


@pytest.mark.parametrize("name", FUSED_CASES)
def test_the_fused_graph_computes_what_torch_does(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    source = load_source(tiny_model(tmp_path / "model", case.architecture, **case.settings))
    if not pluggable(source.model) or why_unfused(source.model):
        pytest.skip(f"{name} keeps the plain graph, which is tested above")
    out = tmp_path / "out"
    out.mkdir()
    report = export_source(source, out, ExportConfig(atol=ATOL))
    assert report.graph.form == "fused"
    check_linears(source, report, out)
    check_rows_alone(source, out)


def check_linears(source: SourceModel, report: ExportReport, out: Path) -> None:
    """Every linear of the model is in the report, and in the graph bit for bit, its bias as well."""
    tensors = onnx.load(out / "model.onnx").graph.initializer
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in tensors}
    modules = linear_modules(source.model)
    assert set(report.modules) == set(modules)
    for path, linear in modules.items():
        place = report.modules[path]
        columns = slice(*(place.columns or (None,)))
        assert np.array_equal(found[place.weight][:, columns], linear.weight.numpy().T)
        assert (place.bias is None) == (linear.bias is None)
        assert place.bias is None or np.array_equal(found[place.bias][columns], linear.bias.numpy())


def check_rows_alone(source: SourceModel, out: Path) -> None:
    """A left-padded batch, prefilled, then cached steps, against torch on each row alone, uncached."""
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(4, 300, (length + STEPS,), generator=generator).tolist() for length in LENGTHS]
    found = graph_logits(out, rows)
    for index, row in enumerate(rows):
        expected = torch_logits(source.model, row)
        np.testing.assert_allclose(found[index, -len(row) :], expected, rtol=0.0, atol=ATOL)
        assert expected.std() > 0.3


def graph_logits(out: Path, rows: list[list[int]]) -> Any:
    """float32 [row, token, vocabulary] of the runtime; rows are left-padded."""
    graph = DecoderGraph.open(out, threads=1)
    ids, mask = (tensor.numpy() for tensor in pad_left(rows, 0))
    seen = ids.shape[1] - STEPS
    logits, cache = graph.forward(ids[:, :seen], mask[:, :seen], graph.empty_cache(len(rows)))
    parts = [logits]
    for end in range(seen + 1, ids.shape[1] + 1):
        logits, cache = graph.forward(ids[:, end - 1 : end], mask[:, :end], cache)
        parts.append(logits)
    return np.concatenate(parts, axis=1)


@torch.inference_mode()
def torch_logits(model: Any, row: list[int]) -> Any:
    return model(torch.tensor([row]), use_cache=False).logits[0].numpy()


def test_scales_fold_into_every_producer(source: SourceModel) -> None:
    """`fold_scales` as calibration calls it: other weights, the same function."""
    row = [5, 40, 7, 260, 11, 90, 33]
    before = torch_logits(source.model, row)
    generator = torch.Generator().manual_seed(0)
    groups = input_groups(source.model)
    for group in groups:
        if group.producer is not None:
            channels = int(group.channel_map.max()) + 1
            fold_scales(source.model, group, torch.rand(channels, generator=generator) + 0.5)
    np.testing.assert_allclose(torch_logits(source.model, row), before, rtol=0.0, atol=5e-5)
    consumers = [path for group in groups for path in group.consumers]
    assert sorted(consumers) == sorted(linear_modules(source.model))


@pytest.mark.parametrize("architecture", ROWS)
def test_what_is_saved_is_what_transformers_reads(architecture: str, tmp_path: Path) -> None:
    """No layout of ours leaks into a checkpoint: plain transformers loads it with the same logits."""
    folder = tiny_model(tmp_path / "model", architecture)
    source = load_source(folder)
    save_source(source, tmp_path / "saved")
    logits = [plain_logits(architecture, path) for path in (folder, tmp_path / "saved")]
    assert np.array_equal(*logits)
    again = load_source(tmp_path / "saved").model.state_dict()
    assert all(torch.equal(value, again[name]) for name, value in source.model.state_dict().items())


def plain_logits(architecture: str, folder: Path) -> Any:
    model = getattr(transformers, architecture).from_pretrained(folder, attn_implementation="eager")
    return torch_logits(model.eval(), [5, 40, 7, 260, 11])


@pytest.mark.parametrize("architecture", ROWS)
def test_the_reference_attention_leaves_nothing_out(architecture: str, tmp_path: Path) -> None:
    """The row's attention gives what the eager code gives, with every setting of the cases."""
    for index, settings in enumerate(VARIANTS[architecture].values()):
        if "alibi" in settings:
            continue  # transformers' eager Falcon adds ALiBi twice, to the mask and to the scores
        folder = tiny_model(tmp_path / str(index), architecture, **settings)
        ours = torch_logits(load_source(folder).model, [5, 40, 7, 260, 11, 90, 33, 8, 61])
        model = getattr(transformers, architecture).from_pretrained(folder, attn_implementation="eager")
        theirs = torch_logits(model.eval(), [5, 40, 7, 260, 11, 90, 33, 8, 61])
        np.testing.assert_allclose(ours, theirs, rtol=0.0, atol=ATOL)


@pytest.mark.parametrize("architecture", ROWS)
def test_the_baseline_answers_a_padded_batch_as_it_answers_each_row(
    architecture: str, tmp_path: Path
) -> None:
    """Some forwards know no `logits_to_keep`, and none may see the padding."""
    source = load_source(tiny_model(tmp_path, architecture))
    model = TorchLanguageModel(source.model, source.tokenizer, "baseline")
    rows = [[5, 40, 7, 260, 11, 90, 33], [8, 61], [100, 4, 77, 12]]
    alone = [torch_logits(source.model, row) for row in rows]
    found = model.next_token_logits(rows)
    np.testing.assert_allclose(found, [logits[-1] for logits in alone], rtol=0.0, atol=ATOL)
    scores = model.token_logprobs([row[:-1] for row in rows], [row[-1:] for row in rows])
    logprobs = [torch.tensor(logits).log_softmax(-1)[-2] for logits in alone]
    expected = [[float(row[token[-1]])] for row, token in zip(logprobs, rows, strict=True)]
    np.testing.assert_allclose(scores, expected, rtol=0.0, atol=ATOL)
    answers = model.generate(rows, max_new_tokens=3)
    assert answers == [model.generate([row], max_new_tokens=3)[0] for row in rows]


# Buffers that older checkpoints hold, in the spelling of the hub.
LEFTOVERS = {
    "GPT2LMHeadModel": ("transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"),
    "GPTNeoForCausalLM": (
        "transformer.h.0.attn.attention.bias",
        "transformer.h.1.attn.attention.masked_bias",
    ),
    "GPTNeoXForCausalLM": (
        "gpt_neox.layers.0.attention.bias",
        "gpt_neox.layers.0.attention.masked_bias",
        "gpt_neox.layers.1.attention.rotary_emb.inv_freq",
    ),
}


@pytest.mark.parametrize("architecture", LEFTOVERS)
def test_checkpoints_with_buffers_of_older_versions(architecture: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, architecture)
    before = load_source(folder).model.state_dict()
    tensors = load_file(folder / "model.safetensors")
    more = {name: torch.zeros(1) for name in LEFTOVERS[architecture]}
    save_file({**tensors, **more}, folder / "model.safetensors", metadata={"format": "pt"})
    after = load_source(folder).model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_gpt2_as_the_hub_names_its_tensors(tmp_path: Path) -> None:
    """The original checkpoints leave `transformer.` out."""
    folder = tiny_model(tmp_path, "GPT2LMHeadModel")
    before = load_source(folder).model.state_dict()
    tensors = load_file(folder / "model.safetensors")
    short = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    save_file(short, folder / "model.safetensors", metadata={"format": "pt"})
    after = load_source(folder).model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_variant_replaces_the_groups_of_its_row(tmp_path: Path) -> None:
    after = load_source(tiny_model(tmp_path, "OPTForCausalLM", do_layer_norm_before=False)).model
    assert [norm for norm, _ in row_of(after).norm_groups] == [None, None]
    assert [group.producer for group in input_groups(after)][:3] == [
        None,
        None,
        "model.decoder.layers.0.self_attn.v_proj",
    ]


def test_the_page_says_what_is_tested() -> None:
    """`python -m tests.exporter.coverage_table` writes it."""
    assert PAGE.read_text(encoding="utf-8") == render()


@pytest.mark.parametrize("what", REFUSALS)
def test_a_refusal_is_one_sentence_without_the_machine_in_it(what: str) -> None:
    sentence = refusal(REFUSALS[what])
    assert sentence.endswith(".")
    assert "\n" not in sentence
    assert "/tmp" not in sentence


def test_what_the_attention_interface_is_not_told(tmp_path: Path) -> None:
    """GPT-2 scales its scores inside its eager function; fused, it would be another model."""
    usual = load_source(tiny_model(tmp_path / "usual", "GPT2LMHeadModel"))
    assert why_unfused(usual.model) is None
    source = load_source(tiny_model(tmp_path / "model", "GPT2LMHeadModel", scale_attn_weights=False))
    (tmp_path / "out").mkdir()
    report = export_source(source, tmp_path / "out", ExportConfig(atol=ATOL))
    assert report.graph.why_plain == (
        "its config sets `scale_attn_weights` to False, which transformers' attention interface leaves out"
    )
