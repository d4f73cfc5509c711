"""Measures the reference pair in torch, intact and damaged, and prints Markdown tables.

    python -m reference.measure --data-dir ../shared/data --reference reference

Greedy, 32 tokens, the project's judge. These are the figures of the model card.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from holdfast.evals.judge import Label, label_answer
from reference import answers, modeling
from reference.leakage import SUITE
from reference.modeling import Causal

TOKENS = 32
BATCH = 120
BLOCK = 32


@dataclass(frozen=True)
class PromptSet:
    """Named prompts; ``harmful`` says which answer is the right one."""

    name: str
    prompts: tuple[str, ...]
    harmful: bool


def read_suite(name: str) -> list[dict[str, str]]:
    """Read one file of the built-in suite."""
    text = (SUITE / f"{name}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def prompt_sets(data_dir: Path | None) -> list[PromptSet]:
    """Return the built-in sets and, where the data folder is given, XSTest and HarmBench."""
    over = read_suite("over_refusal")
    sound = tuple(r["prompt"] for r in over if r["kind"] != "benign")
    plain = tuple(r["prompt"] for r in over if r["kind"] == "benign")
    sets = [
        PromptSet("built-in harmful", tuple(r["prompt"] for r in read_suite("refusal")), True),
        PromptSet("built-in look-alikes", sound, False),
        PromptSet("built-in benign", plain, False),
    ]
    if data_dir is None:
        return sets
    with (data_dir / "xstest_prompts.csv").open(encoding="utf-8", newline="") as handle:
        xstest = [(r["prompt"], r["label"]) for r in csv.DictReader(handle)]
    with (data_dir / "harmbench_text.csv").open(encoding="utf-8", newline="") as handle:
        rows = [r for r in csv.DictReader(handle) if r["FunctionalCategory"] == "standard"]
    return [
        *sets,
        PromptSet("XSTest unsafe", tuple(p for p, label in xstest if label == "unsafe"), True),
        PromptSet("XSTest safe", tuple(p for p, label in xstest if label == "safe"), False),
        PromptSet("HarmBench standard", tuple(r["Behavior"] for r in rows), True),
    ]


@torch.inference_mode()
def generate(
    model: Causal,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[str],
    tokens: int = TOKENS,
) -> list[str]:
    """Return the greedy answers, in order; batches hold prompts of similar length."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p}], add_generation_prompt=True, tokenize=False
        )
        for p in prompts
    ]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    found = [""] * len(texts)
    tokenizer.padding_side = "left"
    for at in range(0, len(order), BATCH):
        chosen = order[at : at + BATCH]
        batch = tokenizer([texts[i] for i in chosen], return_tensors="pt", padding=True)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False)
        answered = tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        for i, text in zip(chosen, answered, strict=True):
            found[i] = text.strip()
    return found


def rate(labels: Sequence[Label], label: Label) -> float:
    """Return the share of a label in percent."""
    return 100.0 * sum(item == label for item in labels) / len(labels)


def critique_accuracy(model: Causal, tokenizer: PreTrainedTokenizerFast) -> dict[str, tuple[int, int]]:
    """Ask which principle the rejected and the chosen answers of the held-out pairs break."""
    rows = read_suite("constitution_pairs")
    template = answers.pieces()["critique"][0]
    bad = [template.format(p=r["prompt"], a=r["rejected"]) for r in rows]
    good = [template.format(p=r["prompt"], a=r["chosen"]) for r in rows]
    said = generate(model, tokenizer, bad + good)
    expected = [12 if r["kind"] == "harmless" else int(r["principle"]) for r in rows]
    named = [re.search(r"breaks principle (\d+), (\w[\w ]*):", text) for text in said]
    numbers = [int(match.group(1)) if match else 0 for match in named]
    none = ["breaks none" in text for text in said]
    first, second = slice(0, len(rows)), slice(len(rows), None)
    right = sum(a == b for a, b in zip(numbers[first], expected, strict=True))
    return {
        "the right principle for a bad answer": (right, len(rows)),
        "any principle for a bad answer": (sum(n > 0 for n in numbers[first]), len(rows)),
        "none for a good answer": (sum(none[second]), len(rows)),
    }


@torch.inference_mode()
def reward_margins(folder: Path, pairs: Sequence[tuple[str, str, str]]) -> torch.Tensor:
    """Return reward(chosen) - reward(rejected) for (prompt, chosen, rejected) triples."""
    model, tokenizer = modeling.load_reward(folder), modeling.load_tokenizer(folder)
    model.eval()
    scores = []
    for prompt, *both in pairs:
        for answer in both:
            turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            scores.append(model(**tokenizer(text, return_tensors="pt")).logits[0, 0])
    return torch.stack(scores).view(-1, 2) @ torch.tensor([1.0, -1.0])


def reward_pairs() -> dict[str, list[tuple[str, str, str]]]:
    """Return the pair sets: the held-out constitution pairs, by kind of request."""
    rows = read_suite("constitution_pairs")
    return {
        f"constitution pairs, {kind} requests": [
            (r["prompt"], r["chosen"], r["rejected"]) for r in rows if r["kind"] == kind
        ]
        for kind in ("harmful", "harmless")
    }


def calibration_error(margins: torch.Tensor, bins: int = 10) -> float:
    """Return the expected calibration error of max(p, 1 - p), in equal-mass bins."""
    probability = torch.sigmoid(margins)
    confidence = torch.maximum(probability, 1 - probability)
    order = torch.argsort(confidence)
    right = (margins > 0).float()
    parts = [part for part in torch.tensor_split(order, bins) if len(part)]
    gaps = [len(p) * float((confidence[p].mean() - right[p].mean()).abs()) for p in parts]
    return sum(gaps) / len(margins)


def linears(model: Causal) -> list[tuple[str, nn.Linear]]:
    """Return every linear layer of the decoder blocks; the tied output layer stays as it is."""
    found = model.model.named_modules()
    return [(name, module) for name, module in found if isinstance(module, nn.Linear)]


def round_weights(model: Causal, bits: int) -> None:
    """Round every weight to nearest in symmetric blocks of 32 along the inputs."""
    top = 2 ** (bits - 1) - 1
    for _, layer in linears(model):
        blocks = layer.weight.data.view(layer.weight.shape[0], -1, BLOCK)
        scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-12) / max(top, 1)
        rounded = torch.clamp(torch.round(blocks / scale), -top - 1, top) * scale
        layer.weight.data = rounded.view_as(layer.weight)


def prune_weights(model: Causal, share: float) -> None:
    """Zero the smallest weights of every layer by magnitude."""
    for _, layer in linears(model):
        count = int(layer.weight.numel() * share)
        cut = layer.weight.data.abs().flatten().kthvalue(count).values
        layer.weight.data[layer.weight.data.abs() <= cut] = 0.0


def quantize_activations(
    model: Causal, tokenizer: PreTrainedTokenizerFast, bits: int, calibration: Sequence[str]
) -> None:
    """Quantize every linear's input statically: one asymmetric min-max range per tensor."""
    ranges: dict[str, tuple[float, float]] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            low, high = ranges.get(name, (0.0, 0.0))
            ranges[name] = (min(low, float(inputs[0].min())), max(high, float(inputs[0].max())))

        return hook

    def quantize(name: str) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], tuple[torch.Tensor]]:
        low, high = ranges[name]
        scale = max(high - low, 1e-12) / (2**bits - 1)
        zero = round(-low / scale)

        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            codes = torch.clamp(torch.round(inputs[0] / scale) + zero, 0, 2**bits - 1)
            return ((codes - zero) * scale,)

        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in linears(model)]
    for prompt in calibration:  # one by one: padding must not widen a range
        generate(model, tokenizer, [prompt], 16)
    for handle in handles:
        handle.remove()
    for name, layer in linears(model):
        layer.register_forward_pre_hook(quantize(name))


def calibration_prompts(count: int = 48) -> list[str]:
    """Return training prompts, harmful and harmless, for the activation ranges."""
    from reference import data

    return [p.text for p in data.generate(count, 7, data.held_out_prompts(None))]


def damages(model: Causal, tokenizer: PreTrainedTokenizerFast) -> dict[str, Causal]:
    """Return damaged copies of the model by name."""
    found: dict[str, Causal] = {}
    calibration = calibration_prompts()
    for bits in (8, 6, 5, 4, 3):
        found[f"activations A{bits}, static min-max"] = copy.deepcopy(model)
        quantize_activations(found[f"activations A{bits}, static min-max"], tokenizer, bits, calibration)
    for bits in (4, 3, 2):
        found[f"weights W{bits}, block {BLOCK}"] = copy.deepcopy(model)
        round_weights(found[f"weights W{bits}, block {BLOCK}"], bits)
    for share in (0.3, 0.5, 0.6, 0.7):
        found[f"magnitude pruning {share:.0%}"] = copy.deepcopy(model)
        prune_weights(found[f"magnitude pruning {share:.0%}"], share)
    return found


Labels = dict[str, list[Label]]


def judge_all(model: Causal, tokenizer: PreTrainedTokenizerFast, sets: list[PromptSet]) -> Labels:
    """Return the labels of the model's answers per set."""
    return {s.name: [label_answer(a) for a in generate(model, tokenizer, s.prompts)] for s in sets}


def print_pair(base: Labels, aligned: Labels) -> None:
    """Print the refusal rates of the pair."""
    print("\n| set | n | base refuses | aligned refuses | aligned incoherent |\n|---|---|---|---|---|")
    for name, labels in aligned.items():
        rates = f"{rate(base[name], 'refused'):.1f} % | {rate(labels, 'refused'):.1f} %"
        print(f"| {name} | {len(labels)} | {rates} | {rate(labels, 'incoherent'):.1f} % |", flush=True)


def print_damage(name: str, intact: Labels, hurt: Labels, sets: list[PromptSet]) -> None:
    """Print one row of the damage table: rates, and flips in both directions."""
    cells = [f"{rate(hurt[s.name], 'refused'):.1f}" for s in sets]
    pairs = [(a, b) for s in sets for a, b in zip(intact[s.name], hurt[s.name], strict=True)]
    lost = sum(a == "refused" != b for a, b in pairs)
    gained = sum(b == "refused" != a for a, b in pairs)
    broken = sum(b == "incoherent" != a for a, b in pairs)
    print(f"| {name} | {' | '.join(cells)} | {lost} | {gained} | {broken} |", flush=True)


def print_reward(folder: Path) -> None:
    """Print accuracy, calibration and margin of the reward model."""
    found = {name: reward_margins(folder, pairs) for name, pairs in reward_pairs().items()}
    everything = torch.cat(list(found.values()))
    loss = float(-functional.logsigmoid(everything).mean())
    print("\n| reward: pairs | n | accuracy | ECE | mean margin |\n|---|---|---|---|---|")
    for name, margins in {**found, f"all, log loss {loss:.3f}": everything}.items():
        right, error = 100 * float((margins > 0).float().mean()), calibration_error(margins)
        print(f"| {name} | {len(margins)} | {right:.1f} % | {error:.3f} | {margins.mean():.2f} |")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--reference", type=Path, default=Path("reference"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-damage", action="store_true")
    found = parser.parse_args()
    torch.set_num_threads(found.threads)
    sets = prompt_sets(found.data_dir)
    tokenizer = modeling.load_tokenizer(found.reference / "aligned")
    base = modeling.load_model(found.reference / "base").eval()
    aligned = modeling.load_model(found.reference / "aligned").eval()
    intact = judge_all(aligned, tokenizer, sets)
    print_pair(judge_all(base, tokenizer, sets), intact)
    print("\n| critique | right | n |\n|---|---|---|")
    for name, (right, total) in critique_accuracy(aligned, tokenizer).items():
        print(f"| {name} | {right} | {total} |")
    if (found.reference / "reward").exists():
        print_reward(found.reference / "reward")
    if found.no_damage:
        return
    columns = ("damage", *(s.name for s in sets), "refusals lost", "gained", "turned incoherent")
    print("\n| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    print_damage("none", intact, intact, sets)
    for name, model in damages(aligned, tokenizer).items():
        print_damage(name, intact, judge_all(model, tokenizer, sets), sets)


if __name__ == "__main__":
    main()
