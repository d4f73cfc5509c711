"""The models that are measured: Llamas with random weights, for neither speed nor memory depends on them.

    python -m benchmarks.models --size 125m --out FOLDER

writes such a checkpoint, for onnxruntime-genai's model builder (see genai_builder.md).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
import transformers

from holdfast.exporter.source import copy_tokenizer_files
from holdfast.files import atomic_folder

TOKENIZER = Path(__file__).resolve().parent.parent / "reference" / "aligned"


@dataclass(frozen=True)
class Shape:
    """Fields of a LlamaConfig, as transformers calls them."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    tie_word_embeddings: bool
    initializer_range: float = 0.02


SHAPES = {
    "tiny": Shape(4096, 64, 128, 2, 4, 2, True, 0.15),  # for the tests: wide, so that tokens differ
    "125m": Shape(32000, 576, 1536, 30, 9, 3, True),
    "1b": Shape(32000, 2048, 5632, 22, 32, 4, False),  # TinyLlama's
}
CONTEXT_TOKENS = 2048


def random_llama(size: str) -> Any:
    """The model of a size; the same weights every time."""
    config = transformers.LlamaConfig(
        **asdict(SHAPES[size]),
        max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return transformers.LlamaForCausalLM(config).eval()


def checkpoint(size: str, folder: Path) -> Path:
    """The float32 checkpoint of a size, with the reference pair's tokenizer; made if it is not there."""
    if not folder.is_dir():
        with atomic_folder(folder) as out:
            random_llama(size).save_pretrained(out, max_shard_size="10GB", safe_serialization=True)
            copy_tokenizer_files(TOKENIZER, out)
    return folder


def weight_bytes(folder: Path) -> int:
    """Size of the weights of a checkpoint."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


@click.command()
@click.option("--size", type=click.Choice(list(SHAPES)), required=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The checkpoint to make.")
def main(size: str, out: Path) -> None:
    """Write the checkpoint of a size."""
    click.echo(checkpoint(size, out))


if __name__ == "__main__":
    main()
