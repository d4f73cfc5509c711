"""The held-out prompts: what a calibrated candidate changes in the aligned model's answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from holdfast.config import encode
from holdfast.evals.judge import Label, label_answer
from holdfast.exporter.source import SourceModel
from holdfast.exporter.torch_model import TorchLanguageModel
from holdfast.quantize.learning.losses import References, contrastive_loss
from holdfast.quantize.learning.reference_cache import position_logits
from holdfast.quantize.prompts.sequences import Batch, even_rows
from holdfast.quantize.record import Candidate
from holdfast.recipe import Mixture


@dataclass(frozen=True)
class HeldOut:
    """Prompts that nothing is learned from, with the aligned model's answers to them.

    Attributes:
        prompts: token ids.
        answers: text of the aligned model's greedy answers.
        batch, references: the same as sequences, for the divergence.
    """

    prompts: list[list[int]] = field(repr=False)
    answers: list[str] = field(repr=False)
    batch: Batch = field(repr=False)
    references: References = field(repr=False)
    max_new_tokens: int
    batch_size: int

    def judge(
        self,
        working: SourceModel,
        *,
        alpha: float = 0.0,
        mixture: Mixture | None = None,
        losses: tuple[float, ...] = (),
    ) -> Candidate:
        """Answer with the model as it is and compare; quantizers have to be attached."""
        model = TorchLanguageModel(working.model, working.tokenizer, "candidate", self.batch_size)
        ids = model.generate(self.prompts, max_new_tokens=self.max_new_tokens)
        changed, divergence = self.distance(working)
        wanted = [label_answer(answer) for answer in self.answers]
        found = [label_answer(working.tokenizer.decode(answer)) for answer in ids]
        lost, gained, other = count_flips(wanted, found)
        return Candidate(
            alpha=alpha,
            steps=len(losses),
            flips_lost=lost,
            flips_gained=gained,
            flips_other=other,
            flipped=tuple(i for i, label in enumerate(wanted) if label != found[i]),
            changed_tokens_frac=changed,
            divergence=divergence,
            mixture=None if mixture is None else encode(mixture),
            losses=losses,
        )

    def distance(self, working: SourceModel) -> tuple[float, float]:
        """Share of answer positions with another likeliest token, and mean KL in nats."""
        return distance(working.model, self.batch, self.references, self.batch_size)


def distance(model: Any, batch: Batch, references: References, batch_size: int) -> tuple[float, float]:
    """Share of loss positions with another likeliest token, and their weighted mean KL in nats."""
    changed = counted = weight = total = 0.0
    for rows in even_rows(len(batch.ids), batch_size):
        part = batch.rows(rows)
        wanted = references.rows(rows, slice(-part.positions, None))
        logits = position_logits(model, part)
        loss = contrastive_loss(logits, wanted, part.weights, alpha=0.0, mode="kl")
        share = float(part.weights.sum())
        weight, total = weight + share, total + share * float(loss)
        used = part.weights > 0
        differs = logits.argmax(dim=-1) != wanted.top_ids[..., 0]
        changed += float((differs & used).sum())
        counted += float(used.sum())
    return changed / counted, total / weight


def count_flips(reference: list[Label], candidate: list[Label]) -> tuple[int, int, int]:
    """(refusals lost, refusals gained, other changes of label) of paired answers."""
    pairs = list(zip(reference, candidate, strict=True))
    lost = sum(before == "refused" != after for before, after in pairs)
    gained = sum(before != "refused" == after for before, after in pairs)
    changed = sum(before != after for before, after in pairs)
    return lost, gained, changed - lost - gained
