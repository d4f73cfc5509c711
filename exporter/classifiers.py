"""The table of supported classifiers (reward and preference models): one row an architecture."""

from __future__ import annotations

from dataclasses import dataclass

from holdfast.errors import UnsupportedArchitectureError
from holdfast.exporter.architectures import CLASSIFIER, Refusal

SIDES = ("right", "left")


@dataclass(frozen=True)
class ClassifierRow:
    """One architecture with a classification head.

    Attributes:
        name: class of transformers, as `architectures` in config.json spells it.
        model_type: `model_type` in config.json.
        embedding: token embedding.
        attention: as in `architectures.Row`.
        decoder: whether the head reads the last token that is not padding, found by `pad_token_id`;
            otherwise it reads the first token, or all of them.
        learned_positions: whether positions are counted from the first column, padding or not, unless
            they are given: the graph then counts them from the attention mask.
        refused: as in `architectures.Row`.
    """

    name: str
    model_type: str
    embedding: str
    attention: str = "sdpa"
    decoder: bool = False
    learned_positions: bool = False
    refused: tuple[Refusal, ...] = ()

    @property
    def padding(self) -> tuple[str, ...]:
        """Sides that a row may be padded on. An encoder's first token has to stay first."""
        return SIDES if self.decoder else SIDES[:1]


def _decoder(name: str, model_type: str, embedding: str = "model.embed_tokens") -> ClassifierRow:
    return ClassifierRow(name + CLASSIFIER, model_type, embedding, decoder=True)


def _gpt2_like(name: str, model_type: str) -> ClassifierRow:
    return ClassifierRow(
        name + CLASSIFIER,
        model_type,
        "transformer.wte",
        attention="eager",
        decoder=True,
        learned_positions=True,
    )


CLASSIFIERS: dict[str, ClassifierRow] = {
    row.name: row
    for row in (
        _decoder("Llama", "llama"),
        _decoder("Mistral", "mistral"),
        _decoder("Qwen2", "qwen2"),
        _decoder("Qwen3", "qwen3"),
        _decoder("SmolLM3", "smollm3"),
        ClassifierRow(
            "Gemma2" + CLASSIFIER, "gemma2", "model.embed_tokens", attention="eager", decoder=True
        ),
        _decoder("Phi3", "phi3"),
        _gpt2_like("GPT2", "gpt2"),
        _gpt2_like("GPTNeo", "gpt_neo"),
        _decoder("GPTNeoX", "gpt_neox", "gpt_neox.embed_in"),
        _decoder("OPT", "opt", "model.decoder.embed_tokens"),
        ClassifierRow("Bert" + CLASSIFIER, "bert", "bert.embeddings.word_embeddings"),
        ClassifierRow("Roberta" + CLASSIFIER, "roberta", "roberta.embeddings.word_embeddings"),
        ClassifierRow("XLMRoberta" + CLASSIFIER, "xlm-roberta", "roberta.embeddings.word_embeddings"),
        ClassifierRow(
            "DebertaV2" + CLASSIFIER,
            "deberta-v2",
            "deberta.embeddings.word_embeddings",
            attention="eager",
        ),
        ClassifierRow("ModernBert" + CLASSIFIER, "modernbert", "model.embeddings.tok_embeddings"),
    )
}


def lookup_classifier(name: str) -> ClassifierRow:
    """The row of a classifier, by its class name.

    Raises:
        UnsupportedArchitectureError: no such row; the message names the supported ones.
    """
    if name not in CLASSIFIERS:
        raise UnsupportedArchitectureError(
            f"Classifier `{name}` is not supported: expected one of {', '.join(CLASSIFIERS)}."
        )
    return CLASSIFIERS[name]
