"""Reward and preference models: one score in torch and in the graph, alone and in a padded batch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from holdfast.errors import ExportError, ModelSourceError, ParityError, UnsupportedArchitectureError
from holdfast.exporter.architectures import ROWS, lookup
from holdfast.exporter.classifier import (
    classifier_agreement,
    export_classifier,
    graph_scores,
    is_classifier,
    load_classifier,
    torch_scores,
)
from holdfast.exporter.classifiers import CLASSIFIERS, lookup_classifier
from holdfast.exporter.parity import open_session
from holdfast.exporter.source import load_source
from holdfast.recipe import ExportConfig
from tests.tiny import tiny_llama, tiny_model

ATOL = 1e-5
CONFIG = ExportConfig(atol=ATOL)
REWARD = Path(__file__).parents[2] / "reference" / "reward"

# Beside the tiny default of every row, what it does not show.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in CLASSIFIERS},
    "Llama, one label": ("LlamaForSequenceClassification", {"num_labels": 1}),
    "Mistral, sliding window": ("MistralForSequenceClassification", {"sliding_window": 6}),
    "DebertaV2, absolute positions, token types": (
        "DebertaV2ForSequenceClassification",
        {"relative_attention": False, "pos_att_type": None, "type_vocab_size": 2},
    ),
    "ModernBert, mean of the tokens": (
        "ModernBertForSequenceClassification",
        {"classifier_pooling": "mean"},
    ),
    "OPT, norms behind, narrower embedding": (
        "OPTForSequenceClassification",
        {"do_layer_norm_before": False, "word_embed_proj_dim": 16},
    ),
}


def tiny_classifier(folder: Path, architecture: str, **settings: Any) -> Path:
    return tiny_model(folder, architecture, **{"num_labels": 3, **settings})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_classifier(tmp_path_factory.mktemp("classifier"), "LlamaForSequenceClassification")


@pytest.mark.parametrize("variant", VARIANTS)
def test_padded_batches_and_single_rows_score_as_torch_scores_each_row_alone(
    variant: str, tmp_path: Path
) -> None:
    architecture, settings = VARIANTS[variant]
    source = load_classifier(tiny_classifier(tmp_path / "model", architecture, **settings))
    out = tmp_path / "out"
    out.mkdir()
    report = export_classifier(source, out, CONFIG)
    assert report.parity.max_abs < ATOL
    assert report.parity.positions == 3 * (len(report.padding) + 1)
    assert report.padding == (("right", "left") if CLASSIFIERS[architecture].decoder else ("right",))
    assert len(report.labels) == settings.get("num_labels", 3)
    check_sides(source, out)


def check_sides(source: Any, out: Path) -> None:
    """The report's comparison on hand-made rows of other lengths."""
    rows = [list(range(10, 40)), [7, 8, 9], [100, 250, 33, 4, 5, 6, 7]]
    session = open_session(out / "model.onnx")
    alone = np.concatenate([torch_scores(source.model, row) for row in rows])
    assert alone.std() > 0.05
    for side in source.row.padding:
        found = graph_scores(session, rows, source.model.config.pad_token_id, side)
        np.testing.assert_allclose(found, alone, rtol=0.0, atol=ATOL, err_msg=side)


def test_why_an_encoder_is_not_padded_on_the_left(tmp_path: Path) -> None:
    source = load_classifier(tiny_classifier(tmp_path / "model", "BertForSequenceClassification"))
    (tmp_path / "out").mkdir()
    export_classifier(source, tmp_path / "out", CONFIG)
    session = open_session(tmp_path / "out" / "model.onnx")
    rows = [list(range(10, 40)), [7, 8, 9]]
    alone = np.concatenate([torch_scores(source.model, row) for row in rows])
    assert np.abs(graph_scores(session, rows, 0, "left") - alone).max() > 0.01


def test_the_graph_is_what_plain_transformers_computes(llama: Path, tmp_path: Path) -> None:
    """The reference is not only our own loading: the class itself, padded by hand."""
    export_classifier(llama, tmp_path, CONFIG)
    model = transformers.LlamaForSequenceClassification.from_pretrained(llama).eval()
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]])
    with torch.inference_mode():
        expected = model(input_ids=ids, attention_mask=(ids != 0).long()).logits.numpy()
    found = graph_scores(open_session(tmp_path / "model.onnx"), [[5, 6, 7, 8], [9, 10]], 0, "right")
    np.testing.assert_allclose(found, expected, rtol=0.0, atol=ATOL)


def test_what_is_written(llama: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    export_classifier(llama, tmp_path, CONFIG, seed=3, on_stage=stages.append)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model.onnx", "config.json", "tokenizer.json", "tokenizer_config.json", "export.json"}
    assert (tmp_path / "tokenizer.json").read_bytes() == (llama / "tokenizer.json").read_bytes()
    written = json.loads((tmp_path / "export.json").read_text())
    assert (written["kind"], written["architecture"]) == ("classifier", "LlamaForSequenceClassification")
    assert (written["padding"], written["pad_id"], written["seed"]) == (["right", "left"], 0, 3)
    assert written["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    assert str(llama) not in "".join((tmp_path / name).read_text() for name in names - {"model.onnx"})
    assert stages == ["tracing", "comparing with torch"]


def test_exporting_twice_gives_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        export_classifier(llama, tmp_path / name, CONFIG)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_the_reference_pairs_reward_model(tmp_path: Path) -> None:
    report = export_classifier(REWARD, tmp_path, ExportConfig(atol=1e-4))
    assert report.labels == ("LABEL_0",)
    assert report.parity.max_abs < 1e-4


def test_the_comparison_sees_another_model(llama: Path, tmp_path: Path) -> None:
    export_classifier(llama, tmp_path, CONFIG)
    source = load_classifier(llama)
    source.model.score.weight[0, 0] += 0.01
    assert classifier_agreement(tmp_path / "model.onnx", source, seed=0).max_abs > 1e-4


def test_a_model_is_left_as_it_was(tmp_path: Path) -> None:
    source = load_classifier(tiny_classifier(tmp_path / "model", "GPT2ForSequenceClassification"))
    before = torch_scores(source.model, [5, 6, 7])
    (tmp_path / "out").mkdir()
    export_classifier(source, tmp_path / "out", CONFIG)
    assert type(source.model) is transformers.GPT2ForSequenceClassification
    assert np.array_equal(torch_scores(source.model, [5, 6, 7]), before)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_no_padding_token(tmp_path: Path) -> None:
    folder = tiny_classifier(tmp_path, "LlamaForSequenceClassification")
    edit(tmp_path / "config.json", pad_token_id=None)
    with pytest.raises(ModelSourceError) as caught:
        load_classifier(folder)
    assert str(caught.value) == (
        f"{folder / 'config.json'} names no `pad_token_id`, and without one LlamaForSequenceClassification "
        "cannot tell the text of a padded row from its padding: add the tokenizer's."
    )


def test_another_padding_token_in_the_tokenizer(tmp_path: Path) -> None:
    folder = tiny_classifier(tmp_path, "Qwen2ForSequenceClassification", pad_token_id=3)
    with pytest.raises(ModelSourceError) as caught:
        load_classifier(folder)
    assert str(caught.value) == (
        f"The tokenizer in {folder} pads with id 0 (`<|pad|>`) and config.json names `pad_token_id` 3: "
        "make the two agree."
    )


def test_an_encoder_whose_tokenizer_pads_on_the_left(tmp_path: Path) -> None:
    folder = tiny_classifier(tmp_path, "BertForSequenceClassification")
    edit(tmp_path / "tokenizer_config.json", padding_side="left")
    with pytest.raises(ModelSourceError) as caught:
        load_classifier(folder)
    assert str(caught.value) == (
        f"The tokenizer in {folder} pads on the left, and BertForSequenceClassification can only be "
        "padded on the right: correct `padding_side` in tokenizer_config.json."
    )


def test_the_checks_of_language_models_hold_here_as_well(tmp_path: Path) -> None:
    folder = tiny_classifier(tmp_path / "small", "BertForSequenceClassification", vocab_size=300)
    tiny_llama(tmp_path / "large", vocab=310)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((tmp_path / "large" / name).read_bytes())
    with pytest.raises(ModelSourceError, match="gives ids up to 309 and the model embeds 300 tokens"):
        load_classifier(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelSourceError, match=r"Expected model\.safetensors in"):
        load_classifier(folder)
    with pytest.raises(ModelSourceError, match=r"The classifier folder .* does not exist"):
        load_classifier(tmp_path / "nowhere")


def test_a_used_folder_is_refused(llama: Path) -> None:
    with pytest.raises(ExportError, match="Expected an existing, empty folder to export into"):
        export_classifier(llama, llama, CONFIG)


def test_a_tolerance_below_rounding_fails(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(ParityError, match="The graph and the torch model differ by up to"):
        export_classifier(llama, tmp_path, ExportConfig(atol=1e-12))


def test_names_that_no_table_has(llama: Path) -> None:
    with pytest.raises(UnsupportedArchitectureError) as caught:
        lookup_classifier("AlbertForSequenceClassification")
    assert str(caught.value) == (
        "Classifier `AlbertForSequenceClassification` is not supported: expected one of "
        f"{', '.join(CLASSIFIERS)}."
    )
    with pytest.raises(UnsupportedArchitectureError) as caught:
        load_source(llama)
    assert str(caught.value) == (
        "`LlamaForSequenceClassification` is a classifier and cannot answer: a language model is "
        f"expected, one of {', '.join(ROWS)}; only `holdfast export` takes classifiers."
    )
    with pytest.raises(UnsupportedArchitectureError, match="`BloomForCausalLM` is not supported"):
        lookup("BloomForCausalLM")


def test_classifiers_are_told_from_language_models(llama: Path, tmp_path: Path) -> None:
    assert is_classifier(llama)
    assert not is_classifier(tiny_llama(tmp_path / "lm"))
    assert not is_classifier(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"architectures": ["AlbertForSequenceClassification"]}')
    assert is_classifier(tmp_path)
    for broken in ("[", "{}", '{"architectures": []}', '{"architectures": null}', "[]"):
        (tmp_path / "config.json").write_text(broken)
        assert not is_classifier(tmp_path)
