"""Downloads repositories from the Hugging Face Hub.

The huggingface_hub package does so through its cache, so cached files are not downloaded again and work offline. Only
files that an export reads are downloaded, sequentially, so that Ctrl-C takes effect at once. No code is run.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from llm_edge.checkpoint.download.progress import format_size, progress_class
from llm_edge.runtime.errors import CheckpointError, InputError, MachineError
from llm_edge.runtime.installation import install_hint
from llm_edge.runtime.safe_io import MIB, read_json

RESPONSE_SECONDS = 20.0  # timeout of a request; the package has none

_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[\w][\w./-]{0,199}))?", re.ASCII
)
_FILE_SUFFIXES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json", ".zip", ".git")
_COMMIT = re.compile(r"[0-9a-f]{40}")

_CONFIGS = ("config.json", "generation_config.json", "quantize_config.json")
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"
)  # fmt: skip
_TEMPLATES = re.compile(r"additional_chat_templates/[A-Za-z0-9_][\w.-]{0,63}\.jinja", re.ASCII)
_VOCABULARY = (  # without tokenizer.json
    "vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "tekken.json", "qwen.tiktoken", "tiktoken.model"
)  # fmt: skip
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first one found, whole or else in shards with an index
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")


def is_hub_id(text: str) -> bool:
    """Whether a text has the form `owner/name` or `owner/name@revision`. Local paths may have it too."""
    found = _ID.fullmatch(text)
    if not found or found["repo"].endswith((*_FILE_SUFFIXES, ".", "-")) or "--" in text or ".." in text:
        return False
    return not any(part.endswith((".", "-")) or not part for part in re.split("[/@]", text))


def fetch_checkpoint(
    hub_id: str, progress: Callable[[str], None], *, endpoint: str | None = None, cache: Path | None = None
) -> Path:
    """Download the files of a model that an export reads, and return their folder in the cache.

    The weights are safetensors if the repository has them, else `pytorch_model.bin`.

    Args:
        hub_id: `owner/name`, or `owner/name@revision` with a branch, a tag or a commit.
        progress: called with short messages about the files being downloaded.
        endpoint: URL of the Hub; by default that of the package (`HF_ENDPOINT`).
        cache: cache folder; by default that of the package (`HF_HUB_CACHE`).

    Raises:
        CheckpointError: the repository or revision does not exist, is not accessible, or has no supported weights.
        MachineError: the Hub is unreachable and the files are not cached, or the disk is full.
        InputError: huggingface_hub is not installed.
    """
    with _Repository.open(hub_id, progress, endpoint, cache) as repository:
        sizes = repository.sizes
        if "config.json" not in sizes and _ADAPTER_CONFIG in sizes:
            raise CheckpointError(f"{hub_id}: a LoRA adapter, not a model: export its base model with this adapter")
        weights = _weights(hub_id, sizes)
        if "config.json" not in sizes:
            raise CheckpointError(f"{hub_id}: the repository has no config.json, so it is not a supported model")
        names = [*_CONFIGS, *_TOKENIZER, *(() if "tokenizer.json" in sizes else _VOCABULARY)]
        wanted = [*(name for name in names if name in sizes), *sorted(filter(_TEMPLATES.fullmatch, sizes))]
        if weights.endswith(".index.json"):
            wanted += [weights, *repository.shards(weights)]
        else:
            wanted.append(weights)
        return repository.fetch(wanted)


def fetch_adapter(
    hub_id: str, progress: Callable[[str], None], *, endpoint: str | None = None, cache: Path | None = None
) -> Path:
    """Download a LoRA adapter; arguments and errors are those of `fetch_checkpoint`."""
    with _Repository.open(hub_id, progress, endpoint, cache) as repository:
        weights = next((name for name in _ADAPTER if name in repository.sizes), None)
        if _ADAPTER_CONFIG not in repository.sizes or weights is None:
            raise CheckpointError(f"{hub_id}: the repository has no adapter ({_ADAPTER_CONFIG}, {_ADAPTER[0]})")
        return repository.fetch([_ADAPTER_CONFIG, weights])


def _is_wanted(path: str) -> bool:
    """Whether a file of the repository is at its top level, or a chat template."""
    return "\\" not in path and ("/" not in path or _TEMPLATES.fullmatch(path) is not None)


def _weights(hub_id: str, sizes: Mapping[str, int]) -> str:
    """Return the name of the weight file, or of the index of the shards."""
    for name in _WEIGHTS:
        for found in (name, f"{name}.index.json"):  # transformers' order
            if found in sizes:
                return found
    only = [name for name in sizes if name.endswith(".safetensors") and name not in _ADAPTER]
    if len(only) == 1:
        return only[0]
    ggufs = sorted((name for name in sizes if name.endswith(".gguf")), key=lambda name: (sizes[name], name))
    if ggufs:
        repo = hub_id.partition("@")[0]
        raise CheckpointError(
            f"{hub_id}: the repository has only GGUF files: download one and give its path: "
            f"hf download {repo} {ggufs[0]} --local-dir ."
        )
    raise CheckpointError(f"{hub_id}: the repository has no supported weights: {' or '.join(_WEIGHTS)} is required")


@dataclass(frozen=True, slots=True)
class _Repository:
    """One commit of a repository."""

    hub_id: str
    repo: str
    snapshot: Path  # folder of the commit in the cache
    sizes: Mapping[str, int]  # sizes in bytes of the files at the top level of the repository, and of chat templates
    progress: Callable[[str], None]
    options: Mapping[str, Any]

    @classmethod
    @contextmanager
    def open(
        cls, hub_id: str, progress: Callable[[str], None], endpoint: str | None, cache: Path | None
    ) -> Iterator[_Repository]:
        """Find the commit and its files, on the Hub or in the cache; translates errors raised in the `with` block."""
        package = _package()
        found = _ID.fullmatch(hub_id)
        if not found or not is_hub_id(hub_id):
            raise CheckpointError(f"{hub_id[:100]!r} is not a repository name (owner/name or owner/name@revision)")
        repo, revision = found["repo"], found["revision"]
        options = {"endpoint": endpoint, "cache_dir": cache}
        with _translated_errors(package, hub_id), _quiet(package), _with_timeout(package):
            progress(f"looking up {hub_id}")
            resolved = package.HfApi(endpoint=endpoint).resolve_revision(repo, revision=revision, cache_dir=cache)
            commit = resolved.resolved
            if not _COMMIT.fullmatch(commit):
                raise CheckpointError(
                    f"{hub_id}: the Hub returned an invalid commit {commit[:50]!r}: check HF_ENDPOINT"
                )
            # Downloading a small file also caches the list of files.
            path = package.snapshot_download(
                repo,
                revision=commit,
                allow_patterns=["config.json"],
                tqdm_class=progress_class(lambda _: None),
                **options,
            )
            try:
                tree = package.get_cached_repo_tree(repo, revision=commit, cache_dir=cache)
                sizes = {file.path: int(file.size) for file in tree if _is_wanted(file.path)}
            except package.errors.CachedRepoTreeNotFoundError:  # offline, with a cache from an older version
                sizes = {file.name: file.stat().st_size for file in Path(path).iterdir() if file.is_file()}
            yield cls(hub_id, repo, Path(path), sizes, progress, options)

    def shards(self, index: str) -> list[str]:
        """Return the files that a weight index names, all at the top level of the repository."""
        self.fetch([index])
        table = read_json(self.snapshot / index, 256 * MIB, error=CheckpointError).get("weight_map")
        if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
            raise CheckpointError(f"{self.hub_id}: {index}: weight_map is not a table of file names")
        names = sorted(set(table.values()))
        for name in names:
            if name not in self.sizes:
                raise CheckpointError(f"{self.hub_id}: {index} names {name[:100]!r}, which is not in the repository")
        return names

    def fetch(self, names: list[str]) -> Path:
        """Download the files that are not cached, and return their folder."""
        package = _package()
        missing = [name for name in names if not (self.snapshot / name).exists()]
        total = sum(self.sizes[name] for name in missing)
        if not missing:
            return self.snapshot
        self._check_disk_space(total)
        count = f"{len(missing)} files" if len(missing) > 1 else missing[0]
        self.progress(f"downloading {self.repo}: {count}, {format_size(total)}")
        for number, name in enumerate(missing, 1):
            place = f" ({number} of {len(missing)})" if len(missing) > 1 else ""
            progress = progress_class(self.progress, f"{name}{place}", self.sizes[name])
            package.hf_hub_download(self.repo, name, revision=self.snapshot.name, tqdm_class=progress, **self.options)
        return self.snapshot

    def _check_disk_space(self, needed: int) -> None:
        folder = self.snapshot
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise MachineError(
                f"{folder}: {self.hub_id} requires {format_size(needed)}, but {format_size(free)} are free: free disk "
                "space, or set HF_HUB_CACHE to another disk"
            )


def _package() -> Any:
    """Import huggingface_hub, with telemetry off unless the user's environment sets it."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.file_download  # sets the log level of the package
    except ImportError as e:
        raise InputError(
            f"models on the Hugging Face Hub require the package huggingface_hub: {install_hint('export')}"
        ) from e
    return huggingface_hub


@contextmanager
def _quiet(package: Any) -> Iterator[None]:
    """Silence log messages and warnings of the package; problems are raised as errors."""
    logger = logging.getLogger(package.__name__)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _with_timeout(package: Any) -> Iterator[None]:
    """Set a timeout for requests that have none."""

    def set_timeout(request: Any) -> None:
        timeouts = request.extensions.get("timeout") or dict.fromkeys(("connect", "read", "write", "pool"))
        request.extensions["timeout"] = {
            kind: RESPONSE_SECONDS if seconds is None else seconds for kind, seconds in timeouts.items()
        }

    client = package.get_session()
    before = client.event_hooks
    client.event_hooks = {**before, "request": [*before.get("request", []), set_timeout]}
    try:
        yield
    finally:
        client.event_hooks = before


@contextmanager
def _translated_errors(package: Any, hub_id: str) -> Iterator[None]:
    try:
        yield
    except (InputError, MachineError):
        raise
    except Exception as e:  # noqa: BLE001 (the package and its dependencies raise many types; see _explain)
        _explain(package.errors, hub_id, e)


def _explain(errors: Any, hub_id: str, error: Exception) -> NoReturn:
    """Raise a one-line error that explains a failure of the package; errors of this program are re-raised."""
    repo, _, revision = hub_id.partition("@")
    chain = list(_chain(error))
    status = next((e.response.status_code for e in chain if isinstance(e, errors.HfHubHTTPError)), None)
    if any(isinstance(e, errors.GatedRepoError) for e in chain):
        raise CheckpointError(
            f"{hub_id}: access requires the approval of its owner: request it at huggingface.co/{repo}, then log in "
            "with 'hf auth login' or set HF_TOKEN"
        ) from error
    if any(isinstance(e, errors.RevisionNotFoundError) for e in chain):
        raise CheckpointError(f"{hub_id}: the repository has no revision {revision or 'main'!r}") from error
    if any(isinstance(e, errors.DisabledRepoError) for e in chain):
        raise CheckpointError(f"{hub_id}: the Hub has disabled this repository") from error
    if any(isinstance(e, errors.RepositoryNotFoundError) for e in chain):
        raise CheckpointError(
            f"{hub_id}: neither a local path nor an accessible repository on the Hub: check the name; if it is "
            "private, log in with 'hf auth login' or set HF_TOKEN"
        ) from error
    if status in (401, 403):
        raise CheckpointError(
            f"{hub_id}: the Hub rejects your token: log in with 'hf auth login' or set HF_TOKEN"
        ) from error
    if any(isinstance(e, errors.RemoteEntryNotFoundError) for e in chain):
        raise CheckpointError(f"{hub_id}: the Hub lists a file that does not exist: try again") from error
    if status is not None:
        raise MachineError(f"{hub_id}: the Hub returned HTTP status {status}: try again later") from error
    if any(isinstance(e, errors.HFValidationError) for e in chain):
        raise CheckpointError(f"{hub_id}: not a repository name ({_line(error)})") from error
    no_space = os.strerror(errno.ENOSPC)
    if any(getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or no_space in str(e) for e in chain):
        raise MachineError(
            f"{hub_id}: no disk space left in the cache: free disk space, or set HF_HUB_CACHE to another disk"
        ) from error
    local = next((e for e in chain if isinstance(e, OSError) and e.filename), None)
    if local:
        raise MachineError(f"{local.filename}: {local.strerror}: set HF_HUB_CACHE to a writable folder") from error
    if any(isinstance(e, errors.OfflineModeIsEnabled) for e in chain):
        raise MachineError(
            f"{hub_id}: not completely cached, and HF_HUB_OFFLINE is set: unset it to download"
        ) from error
    network = ("httpx", "httpcore", "hf_xet", errors.__name__)
    if any(type(e).__module__.startswith(network) for e in chain) or isinstance(error, OSError | RuntimeError):
        raise MachineError(
            f"{hub_id}: the Hub is unreachable, or the connection was lost ({_line(chain[-1])}): try again; completed "
            "files are kept"
        ) from error
    if isinstance(error, ValueError | TypeError | KeyError | AssertionError):
        raise MachineError(f"{hub_id}: invalid response from the Hub: check HF_ENDPOINT") from error
    raise error


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes, nearest first."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 120 else f"{text[:117]}…"
