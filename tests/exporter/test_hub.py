"""Hub names: a real client against a local server that speaks the hub's protocol, and the cache."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote

import click
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import constants

from holdfast.cli.options import load_model, source_options
from holdfast.errors import HoldfastError, ModelSourceError, UsageError
from holdfast.exporter.hub import ResolvedSource, resolve_source
from holdfast.exporter.source import load_source
from tests.tiny import tiny_llama

OLD, NEW = "a" * 40, "b" * 40
NAME = "someone/tiny"


@dataclass
class Hub:
    """One repository with two commits; `main` is the new one, the tag `v1` the old one."""

    endpoint: str
    cache: Path
    commits: dict[str, dict[str, bytes]]
    refs: dict[str, str] = field(default_factory=lambda: {"main": NEW, "v1": OLD, OLD: OLD, NEW: NEW})
    gated: bool = False
    down: bool = False
    served: set[str] = field(default_factory=set)

    def resolve(
        self, name: str = NAME, revision: str | None = None, *, code: bool = False
    ) -> ResolvedSource:
        return resolve_source(
            name, revision, cache_dir=self.cache, endpoint=self.endpoint, trust_remote_code=code
        )


class Server(ThreadingHTTPServer):
    hub: Hub


class Handler(BaseHTTPRequestHandler):
    """The four answers that a download needs, with the hub's headers and error codes."""

    server: Server

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        path = unquote(self.path)
        if self.server.hub.down:
            self.fail(503, "")
        elif path.startswith(f"/api/models/{NAME}/revision/"):
            self.info(path.rpartition("/")[2])
        elif path.startswith(f"/{NAME}/resolve/"):
            commit, _, name = path.removeprefix(f"/{NAME}/resolve/").partition("/")
            self.file(commit, name)
        else:
            self.fail(404, "RepoNotFound")

    do_HEAD = do_GET  # noqa: N815 - the name that http.server looks for

    def info(self, revision: str) -> None:
        if revision not in self.server.hub.refs:
            self.fail(404, "RevisionNotFound")
            return
        commit = self.server.hub.refs[revision]
        names = [{"rfilename": name} for name in self.server.hub.commits[commit]]
        self.give(json.dumps({"id": NAME, "sha": commit, "siblings": names}).encode(), commit, "info")

    def file(self, commit: str, name: str) -> None:
        if self.server.hub.gated:
            self.fail(403, "GatedRepo")
            return
        self.server.hub.served.add(name)
        self.give(self.server.hub.commits[commit][name], commit, f"{commit[0]}-{name}")

    def fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def give(self, content: bytes, commit: str, etag: str) -> None:
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def hub(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    model = {path.name: path.read_bytes() for path in llama.iterdir()}
    newer = {
        **model,
        "chat_template.jinja": b"{{ messages[0]['content'] }}",
        "pytorch_model.bin": b"pickle",
        "modeling_tiny.py": b"raise SystemExit",
        "onnx/decoder.safetensors": b"a copy",
        "consolidated.safetensors": b"another copy",
        "model.gguf": b"GGUF",
    }
    server = Server(("127.0.0.1", 0), Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_port}", tmp_path / "cache", {OLD: model, NEW: newer})
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server.hub
    server.shutdown()
    server.server_close()


def expect(kind: type[HoldfastError], sentence: str, call: object) -> None:
    assert callable(call)
    with pytest.raises(HoldfastError) as caught:
        call()
    assert type(caught.value) is kind
    assert str(caught.value) == sentence


def test_a_folder_is_used_as_it_is(llama: Path) -> None:
    assert resolve_source(str(llama)) == ResolvedSource(llama, str(llama), None)


def test_a_folder_has_no_revision(llama: Path) -> None:
    expect(
        UsageError,
        f"A revision belongs to a hub name, and {llama} is on this machine: leave out the revision `main`.",
        lambda: resolve_source(str(llama), "main"),
    )


@pytest.mark.parametrize("name", ["/no/such/model", "./model", "a/b/c", "../x"])
def test_what_is_neither_a_folder_nor_a_hub_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where none of them exists
    expect(
        ModelSourceError,
        f"The base model folder {name} does not exist: give the path of a Hugging Face model, or its "
        "hub name (owner/name).",
        lambda: resolve_source(name, role="base model"),
    )


def test_a_hub_name_gives_the_model_and_its_commit(hub: Hub, llama: Path) -> None:
    resolved = hub.resolve()
    assert (resolved.name, resolved.revision) == (NAME, NEW)
    downloaded = load_source(resolved)
    original = load_source(llama)
    weights = original.model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in downloaded.model.state_dict().items())
    assert downloaded.origins == (resolved,)
    assert downloaded.tokenizer.template == "{{ messages[0]['content'] }}"


@pytest.mark.parametrize("revision", ["v1", OLD])
def test_a_revision_is_pinned(hub: Hub, revision: str) -> None:
    resolved = hub.resolve(revision=revision)
    assert resolved.revision == OLD
    assert "chat_template.jinja" not in os.listdir(resolved.folder)


def test_only_what_holdfast_reads_is_downloaded(hub: Hub) -> None:
    hub.resolve()
    assert hub.served == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_python_files_come_only_when_code_is_trusted(hub: Hub) -> None:
    hub.resolve(code=True)
    assert "modeling_tiny.py" in hub.served
    assert "pytorch_model.bin" not in hub.served


def test_the_cache_serves_when_the_hub_is_down(hub: Hub) -> None:
    first = hub.resolve()
    hub.down = True
    hub.served.clear()
    assert hub.resolve() == first
    assert hub.served == set()


def test_a_hub_that_is_down_without_a_cache(hub: Hub) -> None:
    hub.down = True
    with pytest.raises(ModelSourceError) as caught:
        hub.resolve()
    assert str(caught.value).startswith(
        f"`{NAME}` is no folder here, and cannot be downloaded from {hub.endpoint} (HfHubHTTPError: 503 "
    )
    assert str(caught.value).endswith("): check the network, or give a folder.")
    assert "\n" not in str(caught.value)


def test_no_network_at_all(hub: Hub) -> None:
    hub.endpoint = "http://127.0.0.1:1"
    with pytest.raises(ModelSourceError) as caught:
        hub.resolve()
    assert str(caught.value).startswith(
        f"`{NAME}` is no folder here, and cannot be downloaded from http://127.0.0.1:1 (ConnectionError: "
    )
    assert str(caught.value).endswith("): check the network, or give a folder.")


def test_an_unknown_repository(hub: Hub) -> None:
    expect(
        ModelSourceError,
        f"`someone/typo` is neither a folder here nor a repository that {hub.endpoint} shows you: check "
        "the spelling, or log in with `hf auth login` or HF_TOKEN if it is private.",
        lambda: hub.resolve("someone/typo"),
    )


@pytest.mark.parametrize("revision", ["v2", "c" * 40])
def test_an_unknown_revision(hub: Hub, revision: str) -> None:
    expect(
        ModelSourceError,
        f"`{NAME}` has no revision `{revision}` on {hub.endpoint}: give one of its branches, tags or full "
        "commit hashes.",
        lambda: hub.resolve(revision=revision),
    )


def test_a_gated_repository(hub: Hub) -> None:
    hub.gated = True
    expect(
        ModelSourceError,
        f"`{NAME}` is gated on {hub.endpoint}: accept its terms on its page and log in with `hf auth "
        "login` or HF_TOKEN.",
        hub.resolve,
    )


def test_a_repository_of_pickles(hub: Hub) -> None:
    del hub.commits[NEW]["model.safetensors"]
    del hub.commits[NEW]["consolidated.safetensors"]
    expect(
        ModelSourceError,
        f"`{NAME}` at {NEW} gave no safetensors weights (pickles, GGUF files and sub-folders are not "
        "downloaded; without a network only the cache is seen): use a repository or revision that has them "
        "in its top folder.",
        hub.resolve,
    )


@click.command
@click.argument("model")
@source_options
def show(model: str, **options: Any) -> None:
    """What a command with these options does."""
    click.echo(load_model(model, **options).origins)


def test_a_command_passes_its_options_on(llama: Path) -> None:
    result = CliRunner().invoke(show, [str(llama)])
    assert result.output == f"{(ResolvedSource(llama, str(llama)),)}\n"
    for arguments, kind in ((["--revision", "v1"], UsageError), (["--adapter-base", "x"], UsageError)):
        assert type(CliRunner().invoke(show, [str(llama), *arguments]).exception) is kind


def test_a_command_trusts_code_only_when_told(llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "auto_map": {}}))
    assert isinstance(CliRunner().invoke(show, [str(folder)]).exception, ModelSourceError)
    assert CliRunner().invoke(show, [str(folder), "--trust-remote-code"]).exit_code == 0


def cached(llama: Path, cache: Path) -> Path:
    """A hub cache with one snapshot, laid out as huggingface_hub does: links to blobs, and a ref."""
    repository = cache / "models--someone--tiny"
    snapshot = repository / "snapshots" / OLD
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(OLD)
    for path in llama.iterdir():
        shutil.copy(path, repository / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    return snapshot


@pytest.mark.parametrize("revision", [None, "main", OLD])
def test_offline_the_cache_is_enough(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str | None
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot = cached(llama, tmp_path)
    resolved = resolve_source(NAME, revision, cache_dir=tmp_path)
    assert resolved == ResolvedSource(snapshot, NAME, OLD)
    assert load_source(resolved).architecture == "LlamaForCausalLM"


def test_offline_and_not_in_the_cache(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    expect(
        ModelSourceError,
        f"`{NAME}` at `v1` is neither a folder here nor in the hub cache, and HF_HUB_OFFLINE forbids the "
        "download: unset it, or download the model first.",
        lambda: hub.resolve(revision="v1"),
    )
    assert hub.served == set()


def test_the_environment_variables_of_the_hub_are_heeded(llama: Path, tmp_path: Path) -> None:
    cached(llama, tmp_path)
    script = f"from holdfast.exporter.hub import resolve_source; print(resolve_source({NAME!r}).revision)"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path)}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == OLD
