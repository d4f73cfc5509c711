"""The ONNX session against torch: logits, log-probabilities and greedy answers, padded and not."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from transformers import PreTrainedModel

from holdfast.errors import ExecutionError, InputError, ModelSourceError, TokenizerError
from holdfast.runtime.session import OnnxLanguageModel, attention_heads, context_tokens, logprobs_of

PROMPTS = [[20, 31, 5], [7], list(range(40, 71)), [99, 98, 97, 96, 12, 13]]
ATOL = 1e-4  # fp32 on both sides, logits of the order of 1


def torch_logits(reference: PreTrainedModel, ids: list[int]) -> np.ndarray:
    """Logits [token, vocabulary] of one sequence alone: no padding on the reference's side."""
    with torch.no_grad():
        logits = reference(input_ids=torch.tensor([ids])).logits
    return logits[0].numpy()


def torch_answer(reference: PreTrainedModel, ids: list[int], new_tokens: int) -> list[int]:
    prompt = torch.tensor([ids])
    out = reference.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=new_tokens,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(ids) :].tolist()


def without_stop(model: OnnxLanguageModel, *stop: int) -> OnnxLanguageModel:
    return replace(model, tokenizer=replace(model.tokenizer, eos_ids=stop))


def test_next_token_logits_equal_torch_for_prompts_of_unequal_length(
    model: OnnxLanguageModel, reference: PreTrainedModel
) -> None:
    logits = model.next_token_logits(PROMPTS)
    assert logits.shape == (len(PROMPTS), 300)
    assert logits.dtype == np.float32
    expected = np.stack([torch_logits(reference, prompt)[-1] for prompt in PROMPTS])
    np.testing.assert_allclose(logits, expected, atol=ATOL, rtol=0)


def test_token_logprobs_equal_torch(model: OnnxLanguageModel, reference: PreTrainedModel) -> None:
    continuations = [[8, 9], [250], [1, 2, 3, 4, 5], [77, 76, 75]]
    found = model.token_logprobs(PROMPTS, continuations)
    for prompt, continuation, logprobs in zip(PROMPTS, continuations, found, strict=True):
        logits = torch.tensor(torch_logits(reference, prompt + continuation))
        rows = torch.log_softmax(logits.double(), dim=-1)[len(prompt) - 1 : -1]
        expected = rows[torch.arange(len(continuation)), torch.tensor(continuation)]
        assert logprobs.dtype == np.float32
        np.testing.assert_allclose(logprobs, expected.numpy(), atol=ATOL, rtol=0)


def test_greedy_answers_equal_torch_one_by_one(
    model: OnnxLanguageModel, reference: PreTrainedModel
) -> None:
    answers = without_stop(model).generate(PROMPTS, max_new_tokens=24)
    assert answers == [torch_answer(reference, prompt, 24) for prompt in PROMPTS]


@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_rows_leave_the_batch_at_their_stop_token_and_the_others_go_on(
    model: OnnxLanguageModel, reference: PreTrainedModel, batch_size: int
) -> None:
    free = [torch_answer(reference, prompt, 24) for prompt in PROMPTS]
    stops = (free[0][3], free[3][9])
    ended = [
        answer[: next((i for i, token in enumerate(answer) if token in stops), len(answer))]
        for answer in free
    ]
    assert len({len(answer) for answer in ended}) > 1  # the case is worth testing
    one = replace(without_stop(model, *stops), batch_size=batch_size)
    assert one.generate(PROMPTS, max_new_tokens=24) == ended


def test_an_answer_can_be_empty_and_nothing_asked_gives_nothing(model: OnnxLanguageModel) -> None:
    first = int(model.next_token_logits([[20]]).argmax())
    assert without_stop(model, first).generate([[20]], max_new_tokens=5) == [[]]
    assert model.generate([], max_new_tokens=5) == []
    assert model.next_token_logits([]).shape == (0, 300)


@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_results_do_not_depend_on_the_batch_size(model: OnnxLanguageModel, batch_size: int) -> None:
    other = replace(model, batch_size=batch_size)
    np.testing.assert_allclose(
        other.next_token_logits(PROMPTS), model.next_token_logits(PROMPTS), atol=1e-5, rtol=0
    )


def test_every_prompt_is_told_once(model: OnnxLanguageModel) -> None:
    done: list[int] = []
    small = replace(model, batch_size=3)
    small.generate(PROMPTS, max_new_tokens=6, on_done=done.append)
    assert sum(done) == len(PROMPTS)
    done.clear()
    small.next_token_logits(PROMPTS, on_done=done.append)
    assert done == [3, 1]
    done.clear()
    small.token_logprobs(PROMPTS, [[1]] * 4, on_done=done.append)
    assert done == [3, 1]


def test_the_same_call_gives_the_same_bits(model: OnnxLanguageModel) -> None:
    first, second = model.next_token_logits(PROMPTS), model.next_token_logits(PROMPTS)
    assert first.tobytes() == second.tobytes()


def test_prompts_beyond_the_context_are_refused_before_anything_runs(
    model: OnnxLanguageModel,
) -> None:
    fits, too_long = [5] * 128, [5] * 129
    assert model.next_token_logits([fits]).shape == (1, 300)
    with pytest.raises(InputError, match=r"Prompt 1 has 129 tokens .* holds 128: shorten"):
        model.next_token_logits([fits, too_long])
    with pytest.raises(InputError, match="Prompt 0 has 129 tokens"):
        model.generate([too_long], max_new_tokens=1)
    with pytest.raises(InputError, match="129"):
        model.token_logprobs([[5] * 120], [[6] * 9])
    assert len(model.token_logprobs([[5] * 120], [[6] * 8])[0]) == 8


def test_an_answer_ends_where_the_context_does(model: OnnxLanguageModel) -> None:
    free = without_stop(model)
    prompts = [[5] * 120, [6] * 128, [7, 8, 9], [5] * 127]
    answers = free.generate(prompts, max_new_tokens=12)
    assert [len(answer) for answer in answers] == [8, 0, 12, 1]
    assert answers[2] == free.generate([prompts[2]], max_new_tokens=12)[0]


def test_empty_prompts_and_continuations_are_refused(model: OnnxLanguageModel) -> None:
    with pytest.raises(InputError, match="Prompt 1 is empty"):
        model.generate([[5], []], max_new_tokens=1)
    with pytest.raises(InputError, match="continuations of at least one token"):
        model.token_logprobs([[5]], [[]])


def test_logprobs_of_a_hand_worked_case() -> None:
    """Logits ln 1, ln 2, ln 5 are the probabilities 1/8, 2/8, 5/8, at any offset."""
    logits = np.log(np.array([[1.0, 2.0, 5.0], [5.0, 1.0, 2.0]], np.float32)) + 300
    np.testing.assert_allclose(logprobs_of(logits, [2, 1]), np.log([5 / 8, 1 / 8]), atol=1e-4, rtol=0)


def damaged(exported: Path, folder: Path) -> Path:
    """A copy whose embedding table is NaN."""
    shutil.copytree(exported, folder)
    graph = onnx.load(folder / "model.onnx")
    table = next(t for t in graph.graph.initializer if list(t.dims) == [300, 32])
    table.CopyFrom(numpy_helper.from_array(np.full((300, 32), np.nan, np.float32), table.name))
    onnx.save(graph, folder / "model.onnx")
    return folder


def test_logits_that_are_not_numbers_are_an_error(exported: Path, tmp_path: Path) -> None:
    broken = OnnxLanguageModel.open(damaged(exported, tmp_path / "m"), threads=1, name="broken")
    with pytest.raises(ExecutionError, match="broken gave logits that are not finite numbers"):
        broken.generate([[5]], max_new_tokens=2)
    with pytest.raises(ExecutionError, match="finite"):
        broken.token_logprobs([[5]], [[6]])


def test_a_token_id_outside_the_vocabulary_is_one_sentence(model: OnnxLanguageModel) -> None:
    with pytest.raises(ExecutionError, match="ONNX Runtime failed while running") as caught:
        model.next_token_logits([[100_000]])
    assert "\n" not in str(caught.value)


def test_open_names_what_is_missing(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match="found none"):
        OnnxLanguageModel.open(tmp_path / "nowhere")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json"):
        OnnxLanguageModel.open(tmp_path)
    copy = shutil.copytree(exported, tmp_path / "m")
    (copy / "model.onnx").unlink()
    with pytest.raises(ExecutionError, match=r"Expected model\.onnx or model\.ort in .*, found none"):
        OnnxLanguageModel.open(copy)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"max_position_embeddings": 96}, 96),
        ({"n_positions": 1024, "n_embd": 8}, 1024),
        ({"text_config": {"max_position_embeddings": 77}}, 77),
    ],
)
def test_context_length_comes_from_the_config(
    tmp_path: Path, config: dict[str, object], expected: int
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert context_tokens(tmp_path) == expected


@pytest.mark.parametrize("text", ["{}", "[]", '{"max_position_embeddings": null}'])
def test_a_config_without_a_context_length_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelSourceError, match="states no context length"):
        context_tokens(tmp_path)


@pytest.mark.parametrize("key", ["num_attention_heads", "n_head", "num_heads"])
def test_attention_heads_come_from_the_config(tmp_path: Path, key: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({key: 12}))
    assert attention_heads(tmp_path) == 12
    with pytest.raises(ModelSourceError, match="states no context length"):
        context_tokens(tmp_path)


def test_a_config_without_heads_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"n_positions": 8}')
    with pytest.raises(ModelSourceError, match="states no number of attention heads"):
        attention_heads(tmp_path)


def test_an_unreadable_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelSourceError, match="not readable JSON"):
        context_tokens(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelSourceError, match="not readable JSON"):
        context_tokens(tmp_path)
