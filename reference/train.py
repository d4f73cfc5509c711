"""Trains the reference pair and its reward model from scratch.

    python -m reference.train all --data-dir ../shared/data --out reference
    python -m reference.train all --pair second --data-dir ../shared/data --out reference/second

Stages: tokenizer, base, sft, dpo, reward; the last two only where the pair has steps for them. Each
stage can be run alone, writes its checkpoint when it ends, keeps its state under ``--work`` while it
runs, and goes on from there when started again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

from reference import data, external, modeling
from reference.batches import Batch, Encoder, encode_all, encode_pairs, groups
from reference.modeling import Causal
from reference.pairs import PAIRS, Settings

STAGES = ("tokenizer", "base", "sft", "dpo", "reward")
SAVE_SECONDS = 120.0


@dataclasses.dataclass
class Run:
    """One invocation: settings, folders and the prompts that all stages share."""

    settings: Settings
    data_dir: Path | None
    out: Path
    work: Path

    def pool(self) -> tuple[data.Prompt, ...]:
        """Return all training prompts."""
        return data.prompts(
            self.settings.prompts, self.settings.seed, self.data_dir, self.settings.harmful_frac
        )

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return the shared tokenizer."""
        return modeling.load_tokenizer(self.work / "tokenizer")

    def record(self, stage: str, report: dict[str, Any]) -> dict[str, Any]:
        """Return what is written beside the stage's checkpoint."""
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        return {
            "stage": stage,
            "settings": dataclasses.asdict(self.settings),
            "seeds": {"settings": self.settings.seed, "stage": stage_seed(self.settings, stage)},
            "versions": versions,
            "data": external.digests(self.data_dir) if self.data_dir else {},
            "banks": data.bank_digests(),
            "prompts": len(self.pool()),
            **report,
        }


def stage_seed(settings: Settings, stage: str) -> int:
    """Return the seed of a stage."""
    return settings.seed + 100 * (STAGES.index(stage) + 1)


def seed_everything(seed: int) -> None:
    """Seed every generator that training draws from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def optimize(
    run: Run,
    stage: str,
    model: nn.Module,
    steps: int,
    rate: float,
    loss_of: Callable[[int], torch.Tensor],
) -> dict[str, Any]:
    """Train for ``steps``, resuming from the work folder, and return the report."""
    optimizer = _optimizer(model, rate, run.settings.decay)
    path = run.work / f"{stage}.pt"
    losses: list[float] = []
    first, spent = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent, losses = state["step"], state["seconds"], state["losses"]
    started = saved = time.monotonic()
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * _schedule(step, steps)
        loss = loss_of(step)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(round(float(loss.detach()), 5))
        if step % 50 == 0 or step == steps - 1:
            mean = sum(losses[-50:]) / len(losses[-50:])
            print(f"{stage} {step}/{steps} loss {mean:.4f} {time.monotonic() - started:.0f} s", flush=True)
        if time.monotonic() - saved > SAVE_SECONDS or step == steps - 1:
            saved = time.monotonic()
            seconds = spent + saved - started
            _save_state(path, model, optimizer, step + 1, seconds, losses)
    every = max(1, steps // 40)
    curve = [
        round(sum(losses[i : i + every]) / len(losses[i : i + every]), 4)
        for i in range(0, len(losses), every)
    ]
    return {"steps": steps, "wall_seconds": round(spent + time.monotonic() - started, 1), "losses": curve}


def _optimizer(model: nn.Module, rate: float, decay: float) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    grouped = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(grouped, rate, betas=(0.9, 0.98), fused=True)


def _schedule(step: int, steps: int) -> float:
    """Return the share of the peak rate: a short warm-up, then a straight line down to 2 %."""
    warm = max(1, min(100, steps // 10))
    return min((step + 1) / warm, max(0.02, 1.0 - step / steps))


def _save_state(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    seconds: float,
    losses: list[float],
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    spare = path.with_suffix(".tmp")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "step": step, "seconds": seconds, "losses": losses}, spare)
    spare.replace(path)  # a kill while writing leaves the last good state


def token_losses(model: Causal, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of every trained token and its weight, flat.

    Only the positions that carry weight go through the output layer: with answers alone trained,
    that is half of the work there.
    """
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.model(batch.ids, attention_mask=batch.mask, use_cache=False).last_hidden_state
        chosen = batch.weights[:, 1:] > 0
        logits = model.lm_head(hidden[:, :-1][chosen])
    losses = functional.cross_entropy(logits.float(), batch.ids[:, 1:][chosen], reduction="none")
    return losses, batch.weights[:, 1:][chosen]


def answer_logp(model: Causal, batch: Batch) -> torch.Tensor:
    """Return the log-probability of each row's answer."""
    losses, _ = token_losses(model, batch)
    rows = (batch.weights[:, 1:] > 0).nonzero()[:, 0]
    return torch.zeros(len(batch.ids)).index_add(0, rows, -losses)


def skipping(found: Iterator[list[int]]) -> Callable[[int], list[int]]:
    """Return the groups by step number, so that a resumed run goes on in the same order."""
    position = -1
    current: list[int] = []

    def at(step: int) -> list[int]:
        nonlocal position, current
        while position < step:
            current = next(found)
            position += 1
        return current

    return at


def train_tokenizer(run: Run) -> None:
    """Train and save the tokenizer."""
    found = data.base_examples(run.pool(), stage_seed(run.settings, "tokenizer"))
    texts = (text for item in found for text in (item.messages[-1][1], item.answer))
    modeling.train_tokenizer(texts, run.settings.vocabulary).save_pretrained(run.work / "tokenizer")


def train_language(run: Run, stage: str, model: Causal, prompt_weight: float) -> None:
    """Train base or sft: next-token prediction on the stage's conversations."""
    settings, seed = run.settings, stage_seed(run.settings, stage)
    seed_everything(seed)
    encoder = Encoder(run.tokenizer())
    make = data.base_examples if stage == "base" else data.aligned_examples
    items = encode_all(encoder, make(run.pool(), seed), seed)
    at = skipping(groups([len(i.ids) for i in items], settings.batch, seed))

    def loss_of(step: int) -> torch.Tensor:
        losses, weights = token_losses(model, encoder.batch([items[i] for i in at(step)], prompt_weight))
        return (losses * weights).sum() / weights.sum()

    steps = settings.base_steps if stage == "base" else settings.sft_steps
    rate = settings.base_rate if stage == "base" else settings.sft_rate
    report = optimize(run, stage, model, steps, rate, loss_of)
    last = run.out / "aligned" if settings.dpo_steps == 0 else run.work / "sft"
    folder = run.out / "base" if stage == "base" else last
    modeling.save(model, run.tokenizer(), folder, run.record(stage, {**report, "examples": len(items)}))


def train_base(run: Run) -> None:
    """Train the base from scratch: language, and compliance with everything."""
    seed_everything(stage_seed(run.settings, "base"))
    model = modeling.new_model(run.tokenizer(), run.settings.shape(), run.settings.family)
    train_language(run, "base", model, 1.0)


def train_sft(run: Run) -> None:
    """Grow the aligned model from the base: refusals with a reason, help, critiques."""
    train_language(run, "sft", modeling.load_model(run.out / "base"), 0.0)


def train_dpo(run: Run) -> None:
    """Sharpen the aligned model on the constitution's preference pairs (DPO)."""
    settings, seed = run.settings, stage_seed(run.settings, "dpo")
    seed_everything(seed)
    model, frozen = modeling.load_model(run.work / "sft"), modeling.load_model(run.work / "sft")
    encoder = Encoder(run.tokenizer())
    pairs = encode_pairs(encoder, data.aligned_examples(run.pool(), seed))
    at = skipping(groups([len(c.ids) for c, _ in pairs], settings.pair_batch, seed))

    def loss_of(step: int) -> torch.Tensor:
        chosen = encoder.batch([pairs[i][0] for i in at(step)], 0.0)
        rejected = encoder.batch([pairs[i][1] for i in at(step)], 0.0)
        with torch.no_grad():
            anchor = answer_logp(frozen, chosen) - answer_logp(frozen, rejected)
        good, bad = answer_logp(model, chosen), answer_logp(model, rejected)
        preference = -functional.logsigmoid(settings.beta * (good - bad - anchor)).mean()
        # DPO alone may lower both answers; a little of the likelihood keeps the chosen one fluent.
        return preference - settings.dpo_sft_weight * good.sum() / (chosen.weights > 0).sum()

    report = optimize(run, "dpo", model, settings.dpo_steps, settings.dpo_rate, loss_of)
    sft = json.loads((run.work / "sft" / "training.json").read_text(encoding="utf-8"))
    record = run.record("dpo", {**report, "examples": len(pairs), "sft": sft})
    modeling.save(model, run.tokenizer(), run.out / "aligned", record)


def train_reward(run: Run) -> None:
    """Train the preference model: the aligned body under a scalar head, on the same pairs."""
    settings, seed = run.settings, stage_seed(run.settings, "reward")
    seed_everything(seed)
    model = modeling.load_reward(run.out / "aligned")
    encoder = Encoder(run.tokenizer())
    pairs = encode_pairs(encoder, data.preference_examples(run.pool(), seed))
    at = skipping(groups([len(c.ids) for c, _ in pairs], settings.pair_batch, seed))

    def loss_of(step: int) -> torch.Tensor:
        items = [pairs[i] for i in at(step)]
        batch = encoder.batch([c for c, _ in items] + [r for _, r in items], 0.0)
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(batch.ids, attention_mask=batch.mask).logits.float()[:, 0]
        return -functional.logsigmoid(scores[: len(items)] - scores[len(items) :]).mean()

    report = optimize(run, "reward", model, settings.reward_steps, settings.reward_rate, loss_of)
    modeling.save(
        model, run.tokenizer(), run.out / "reward", run.record("reward", {**report, "examples": len(pairs)})
    )


TRAINERS: dict[str, Callable[[Run], None]] = {
    "tokenizer": train_tokenizer,
    "base": train_base,
    "sft": train_sft,
    "dpo": train_dpo,
    "reward": train_reward,
}


def parse(arguments: list[str] | None = None) -> tuple[Run, list[str]]:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("stage", choices=("all", *STAGES))
    parser.add_argument("--pair", choices=tuple(PAIRS), default="first", help="settings to start from")
    parser.add_argument("--data-dir", type=Path, help="folder with ailuminate and hh-rlhf")
    parser.add_argument("--out", type=Path, default=Path("reference"))
    parser.add_argument(
        "--work", type=Path, default=Path("build/reference"), help="state of unfinished stages"
    )
    for field in dataclasses.fields(Settings):
        parser.add_argument("--" + field.name.replace("_", "-"), type=type(field.default))
    found = parser.parse_args(arguments)
    given = {f.name: getattr(found, f.name) for f in dataclasses.fields(Settings)}
    settings = dataclasses.replace(PAIRS[found.pair], **{k: v for k, v in given.items() if v is not None})
    return Run(settings, found.data_dir, found.out, found.work), stages_of(settings, found.stage)


def stages_of(settings: Settings, asked: str) -> list[str]:
    """Return the stages to run; "all" leaves out those that the pair has no steps for."""
    without = {name for name in ("dpo", "reward") if getattr(settings, f"{name}_steps") == 0}
    return [name for name in STAGES if name not in without] if asked == "all" else [asked]


def main(arguments: list[str] | None = None) -> None:
    """Run the stages that were asked for."""
    run, stages = parse(arguments)
    torch.set_num_threads(run.settings.threads)
    for stage in stages:
        TRAINERS[stage](run)


if __name__ == "__main__":
    main()
