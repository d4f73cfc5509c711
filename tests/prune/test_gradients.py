"""Gradients block by block against one plain backward pass for each sequence, without padding."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from holdfast.chat import user
from holdfast.exporter.architectures import ROWS, block_linear_modules, block_paths
from holdfast.exporter.source import SourceModel, load_source
from holdfast.exporter.walk import advance
from holdfast.prune import gradients
from holdfast.prune.gradients import answer_batches, mean_gradients, output_importances, own_answers
from holdfast.quantize.learning.losses import kl_divergence, make_references, renormalised_logp
from tests.tiny import LINES, tiny_llama, tiny_model

ANSWERS = [[40, 41, 3], [50, 51, 52, 53], [60], [70, 71], [80, 3], [90, 91, 92]]


def prompts(source: SourceModel) -> list[list[int]]:
    return [source.tokenizer.encode_chat(user(line)) for line in LINES]


def plain(source: SourceModel, unaligned: SourceModel | None = None) -> dict[str, Tensor]:
    """E|dL/dW| over sequences, from the definition."""
    linears = block_linear_modules(source.model)
    weights = [module.weight.requires_grad_() for module in linears.values()]
    totals = {name: torch.zeros_like(module.weight) for name, module in linears.items()}
    for prompt, answer in zip(prompts(source), ANSWERS, strict=True):
        ids = torch.tensor([[*prompt, *answer[:-1]]])
        logits = source.model(ids, use_cache=False).logits[0, -len(answer) :]
        if unaligned is None:
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
        else:
            with torch.no_grad():
                other = unaligned.model(ids, use_cache=False).logits[0, -len(answer) :]
            found = make_references(logits.detach(), other, 500)
            loss = kl_divergence(found.diff_logp, renormalised_logp(logits, found.diff_ids)).mean()
        for name, gradient in zip(linears, torch.autograd.grad(loss, weights), strict=True):
            totals[name] += gradient.abs() / len(ANSWERS)
    for weight in weights:
        weight.requires_grad_(False)
    return totals


def walked(source: SourceModel, unaligned: SourceModel | None = None) -> dict[str, Tensor]:
    """The same block by block, in padded batches."""
    batches = answer_batches(source, prompts(source), ANSWERS, unaligned and unaligned.model)
    linears, found = block_linear_modules(source.model), {}
    for index, path in enumerate(block_paths(source.model)):
        inside = {name: module for name, module in linears.items() if name.startswith(f"{path}.")}
        found |= mean_gradients(source.model, inside, batches, index)
        advance(source.model.get_submodule(path), [batch.state for batch in batches], index)
    return found


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, gradient in found.items():
        scale = float(expected[name].max())
        assert scale > 0
        torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("architecture", sorted(ROWS))
def test_against_plain_backward_passes(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "BATCH_SIZE", 4)
    source = load_source(tiny_model(tmp_path, architecture))
    same(walked(source), plain(source))
    assert not any(parameter.requires_grad for parameter in source.model.parameters())


def plain_importances(source: SourceModel) -> dict[str, Tensor]:
    """The mean of (dL/dy)^2 over the tokens of all sequences, from the definition."""
    seen: dict[str, list[Tensor]] = {name: [] for name in block_linear_modules(source.model)}
    for prompt, answer in zip(prompts(source), ANSWERS, strict=True):
        outputs: dict[str, Tensor] = {}
        handles = [
            linear.register_forward_hook(
                lambda _, __, output, name=name, to=outputs: to.update({name: output.requires_grad_()})
            )
            for name, linear in block_linear_modules(source.model).items()
        ]
        ids = torch.tensor([[*prompt, *answer[:-1]]])
        logits = source.model(ids, use_cache=False).logits[0, -len(answer) :]
        loss = torch.nn.functional.cross_entropy(logits, torch.tensor(answer))
        gradients = torch.autograd.grad(loss, list(outputs.values()))
        for name, gradient in zip(outputs, gradients, strict=True):
            seen[name].append(gradient.reshape(-1, gradient.shape[-1]).square())
        for handle in handles:
            handle.remove()
    return {name: torch.cat(squares).mean(dim=0) for name, squares in seen.items()}


@pytest.mark.parametrize("architecture", sorted(ROWS))
def test_importances_against_plain_backward_passes(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "BATCH_SIZE", 4)
    source = load_source(tiny_model(tmp_path, architecture))
    batches = answer_batches(source, prompts(source), ANSWERS)
    found = output_importances(source.model, block_linear_modules(source.model), batches)
    same(found, plain_importances(source))


def test_the_contrastive_loss(tmp_path: Path) -> None:
    source = load_source(tiny_llama(tmp_path / "aligned"))
    unaligned = load_source(tiny_llama(tmp_path / "base", seed=1))
    same(walked(source, unaligned), plain(source, unaligned))


def test_a_graph_never_spans_two_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a block is run on for its gradient has no history."""
    source = load_source(tiny_llama(tmp_path))
    seen = []
    run_block = gradients.run_block

    def watch(block: torch.nn.Module, hidden: Tensor, arguments: dict[str, object]) -> Tensor:
        seen.append(hidden.grad_fn is None)
        return run_block(block, hidden, arguments)

    monkeypatch.setattr(gradients, "run_block", watch)
    walked(source)
    assert seen and all(seen)


def test_own_answers_end_with_the_stop_token_or_at_the_limit(tmp_path: Path) -> None:
    source = load_source(tiny_llama(tmp_path))
    answers = own_answers(source, prompts(source), 5, 4)
    stop = source.tokenizer.eos_ids[0]
    assert len(answers) == len(LINES)
    assert all(len(answer) == 5 or answer[-1] == stop for answer in answers)
