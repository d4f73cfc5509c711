"""`holdfast serve`: an OpenAI-compatible server for a verified bundle."""

from __future__ import annotations

from pathlib import Path

import click

from holdfast.bundle import open_bundle, require_pass
from holdfast.cli.options import FOLDER, threads_option
from holdfast.extras import require_extra
from holdfast.progress import say


@click.command("serve")
@click.argument("bundle", type=FOLDER)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    help="0 picks a free one.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Longest answer a client may ask for.",
)
@click.option(
    "--queue",
    "queue_size",
    type=click.IntRange(min=0),
    default=8,
    show_default=True,
    help="Requests that may wait; further ones get 429.",
)
@click.option(
    "--serve-unverified-model",
    is_flag=True,
    help="Serve although the recorded verdict is not PASS.",
)
@threads_option
def command(
    bundle: Path,
    host: str,
    port: int,
    max_new_tokens: int,
    queue_size: int,
    serve_unverified_model: bool,
    threads: int,
) -> None:
    """Serve BUNDLE at /v1/chat/completions, /v1/models and /healthz.

    Files and verdict are checked before anything is loaded. Answers are greedy, as the suite saw
    them, unless a request sets a temperature.
    """
    opened = open_bundle(bundle)
    require_pass(opened, allow_unverified=serve_unverified_model)
    require_extra("serve", "`holdfast serve`")
    from holdfast.runtime.endpoints import ServerLimits
    from holdfast.runtime.server import create_app, serve
    from holdfast.runtime.session import OnnxLanguageModel

    model = OnnxLanguageModel.open(bundle, threads=threads, name=opened.model_id)
    limits = ServerLimits(max_new_tokens=max_new_tokens, queue_size=queue_size)
    verdict = {"outcome": opened.manifest.verdict, "chat_digest": opened.manifest.chat_digest}
    if opened.manifest.verdict != "PASS":
        say(f"holdfast: serving a model whose verdict is {opened.manifest.verdict}, as asked for.")
    serve(create_app(model, model_id=opened.model_id, verdict=verdict, limits=limits), host, port)
