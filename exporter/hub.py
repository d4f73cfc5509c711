"""Where a model comes from: a folder, or a name on the Hugging Face hub pinned to one commit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from holdfast.chat import TOKENIZER_FILES
from holdfast.errors import ModelSourceError, UsageError
from holdfast.files import disk_errors

WANTED = (
    *TOKENIZER_FILES,
    "config.json",
    "adapter_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
)
# Patterns match across `/`: copies of the weights in sub-folders, and Mistral's second copy beside them.
UNWANTED = ("*/*", "consolidated*")
CODE = ("*.py",)


@dataclass(frozen=True)
class ResolvedSource:
    """A model folder on this machine and where it came from.

    Attributes:
        folder: holds config.json (or adapter_config.json), weights and tokenizer.
        name: what the user asked for, a path or a hub name.
        revision: commit hash on the hub; None for a folder.
    """

    folder: Path
    name: str
    revision: str | None = None


def resolve_source(
    name: str,
    revision: str | None = None,
    *,
    role: str = "model",
    trust_remote_code: bool = False,
    cache_dir: Path | None = None,
    endpoint: str | None = None,
) -> ResolvedSource:
    """The folder of a model; a hub name (`owner/name`, or a bare `gpt2`) is downloaded first.

    An existing path always wins over a hub name. Only what Holdfast reads is downloaded: configs,
    tokenizer and safetensors, never a pickle. Without a network, or with `HF_HUB_OFFLINE=1`, a
    snapshot that is already in the cache is used; its commit is stated all the same.

    Arguments:
        revision: branch, tag or commit hash; the default branch when None. Only for hub names.
        role: what messages call it.
        trust_remote_code: download the repository's Python files too; see `load_source`.
        cache_dir: the hub cache, by default where huggingface_hub keeps it.
        endpoint: URL of another hub.

    Raises:
        UsageError: a revision for a folder.
        ModelSourceError: no such folder or repository, no such revision, no access, not reachable,
            or no safetensors there.
        DiskFullError: no space left for the download.
    """
    if Path(name).exists():
        if revision is not None:
            raise UsageError(
                f"A revision belongs to a hub name, and {name} is on this machine: "
                f"leave out the revision `{revision}`."
            )
        return ResolvedSource(Path(name), name)
    try:
        folder = _download(name, revision, trust_remote_code, cache_dir, endpoint)
    except HFValidationError:
        raise ModelSourceError(
            f"The {role} folder {name} does not exist: give the path of a Hugging Face model, or its "
            "hub name (owner/name)."
        ) from None
    if not any(folder.glob("*.safetensors")):
        raise ModelSourceError(
            f"`{name}` at {folder.name} gave no safetensors weights (pickles, GGUF files and sub-folders "
            "are not downloaded; without a network only the cache is seen): use a repository or revision "
            "that has them in its top folder."
        )
    return ResolvedSource(folder, name, folder.name)


def _download(
    name: str, revision: str | None, trust_remote_code: bool, cache_dir: Path | None, endpoint: str | None
) -> Path:
    """The snapshot folder, which is named after its commit."""
    cache = cache_dir or Path(constants.HF_HUB_CACHE)
    try:
        with disk_errors(cache):
            snapshot = snapshot_download(
                name,
                revision=revision,
                cache_dir=cache,
                endpoint=endpoint,
                allow_patterns=[*WANTED, *CODE] if trust_remote_code else [*WANTED],
                ignore_patterns=[*UNWANTED],
                local_files_only=constants.HF_HUB_OFFLINE,
            )
    except OSError as error:  # every error of huggingface_hub and requests is one
        raise ModelSourceError(_explain(error, name, revision, endpoint or constants.ENDPOINT)) from error
    return Path(snapshot)


def _explain(error: Exception, name: str, revision: str | None, endpoint: str) -> str:
    """One sentence for a failed download; the order follows the classes' inheritance."""
    match error:
        case GatedRepoError():
            return (
                f"`{name}` is gated on {endpoint}: accept its terms on its page and log in with "
                "`hf auth login` or HF_TOKEN."
            )
        case RepositoryNotFoundError():
            return (
                f"`{name}` is neither a folder here nor a repository that {endpoint} shows you: check the "
                "spelling, or log in with `hf auth login` or HF_TOKEN if it is private."
            )
        case RevisionNotFoundError():
            return (
                f"`{name}` has no revision `{revision}` on {endpoint}: give one of its branches, tags or "
                "full commit hashes."
            )
        case LocalEntryNotFoundError() if constants.HF_HUB_OFFLINE:
            return (
                f"`{name}` at `{revision or 'main'}` is neither a folder here nor in the hub cache, and "
                "HF_HUB_OFFLINE forbids the download: unset it, or download the model first."
            )
        case HfHubHTTPError(response=response) if response is not None:
            return (
                f"{endpoint} answered {response.status_code} for `{name}`: try again later, or give a "
                "downloaded folder."
            )
        case _:
            return (
                f"`{name}` is no folder here, and cannot be downloaded from {endpoint} "
                f"({_first_line(error.__cause__ or error)}): check the network, or give a folder."
            )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
