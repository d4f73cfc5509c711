"""The torch reference as a LanguageModel: against transformers' own generate and plain forward passes."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GenerationConfig

from holdfast.chat import user
from holdfast.errors import InputError
from holdfast.exporter.batching import length_batches, pad_left, positions
from holdfast.exporter.source import SourceModel, load_source
from holdfast.exporter.torch_model import TorchLanguageModel
from holdfast.language_model import LanguageModel
from tests.tiny import tiny_llama, tiny_model

WORDS = ("Hi", "How do I bake a loaf of bread?", "What is the capital?", "Write a poem about the sea, now.")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    return load_source(tiny_llama(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def prompts(source: SourceModel) -> list[list[int]]:
    return [source.tokenizer.encode_chat(user(text)) for text in WORDS]


def reference(source: SourceModel, batch_size: int = 32) -> TorchLanguageModel:
    return TorchLanguageModel(source.model, source.tokenizer, "reference", batch_size)


@torch.inference_mode()
def plain_logits(source: SourceModel, ids: list[int]) -> np.ndarray:
    """One row alone: no padding, no cache. Float32 [token, vocabulary]."""
    logits: np.ndarray = source.model(torch.tensor([ids]), use_cache=False).logits[0].numpy()
    return logits


def test_batches_by_length() -> None:
    assert length_batches([3, 9, 3, 5], 2) == [[1, 3], [0, 2]]
    assert length_batches([], 4) == []


def test_left_padding_by_hand() -> None:
    ids, mask = pad_left([[7, 8, 9], [5]], pad_id=0)
    assert ids.tolist() == [[7, 8, 9], [0, 0, 5]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert positions(mask).tolist() == [[0, 1, 2], [0, 0, 0]]


def test_is_a_language_model(source: SourceModel) -> None:
    model: LanguageModel = reference(source)
    assert model.name == "reference"
    assert model.tokenizer is source.tokenizer


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"])
def test_answers_are_those_of_transformers(tmp_path: Path, architecture: str) -> None:
    source = load_source(tiny_model(tmp_path, architecture, seed=3))
    prompts = [source.tokenizer.encode_chat(user(text)) for text in WORDS]
    settings = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=3, pad_token_id=0)
    expected = []
    for ids in prompts:
        whole = source.model.generate(torch.tensor([ids]), generation_config=settings)[0].tolist()
        answer = whole[len(ids) :]
        expected.append(answer[: answer.index(3)] if 3 in answer else answer)
    assert reference(source).generate(prompts, max_new_tokens=12) == expected


def test_answers_do_not_depend_on_the_batch(source: SourceModel, prompts: list[list[int]]) -> None:
    alone = reference(source, batch_size=1).generate(prompts, max_new_tokens=10)
    assert reference(source, batch_size=3).generate(prompts, max_new_tokens=10) == alone
    assert len({tuple(answer) for answer in alone}) > 1


def test_an_answer_ends_before_the_stop_id(source: SourceModel, prompts: list[list[int]]) -> None:
    first = reference(source).generate(prompts[:1], max_new_tokens=6)[0]
    tokenizer = dataclasses.replace(source.tokenizer, eos_ids=(first[3],))
    stopped = dataclasses.replace(source, tokenizer=tokenizer)
    assert reference(stopped).generate(prompts[:1], max_new_tokens=6)[0] == first[: first.index(first[3])]


def test_next_token_logits(source: SourceModel, prompts: list[list[int]]) -> None:
    found = reference(source, batch_size=3).next_token_logits(prompts)
    assert found.dtype == np.float32
    for row, ids in zip(found, prompts, strict=True):
        np.testing.assert_allclose(row, plain_logits(source, ids)[-1], rtol=0.0, atol=1e-5)


def test_token_logprobs(source: SourceModel, prompts: list[list[int]]) -> None:
    continuations = [[5], [40, 7, 9], [], [33, 260]]
    found = reference(source, batch_size=3).token_logprobs(prompts, continuations)
    for row, ids, rest in zip(found, prompts, continuations, strict=True):
        logits = plain_logits(source, ids + rest).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        expected = [logprobs[len(ids) - 1 + index, token] for index, token in enumerate(rest)]
        assert row.shape == (len(rest),)
        np.testing.assert_allclose(row, expected, rtol=0.0, atol=1e-5)


def test_progress_counts_every_prompt_once(source: SourceModel, prompts: list[list[int]]) -> None:
    done: list[int] = []
    reference(source, batch_size=3).generate(prompts, max_new_tokens=2, on_done=done.append)
    assert done == [3, 1]


def test_no_prompts_no_answers(source: SourceModel) -> None:
    assert reference(source).generate([], max_new_tokens=4) == []
    assert reference(source).next_token_logits([]).shape == (0, 300)


def test_an_answer_ends_where_the_context_does(source: SourceModel) -> None:
    full, nearly = [7] * 128, [7] * 126
    answers = reference(source).generate([full, nearly], max_new_tokens=50)
    assert answers[0] == []
    assert len(answers[1]) <= 2


def test_what_does_not_fit_is_refused(source: SourceModel) -> None:
    model = reference(source)
    with pytest.raises(InputError) as caught:
        model.generate([[7] * 129], max_new_tokens=1)
    assert str(caught.value) == (
        "A prompt has 129 tokens and the model's context holds 128: shorten the prompt."
    )
    for call in (
        lambda: model.next_token_logits([[5], []]),
        lambda: model.token_logprobs([[]], [[5, 6]]),
    ):
        with pytest.raises(InputError) as caught:
            call()
        assert str(caught.value) == "Expected at least one token in every prompt, found an empty prompt."
