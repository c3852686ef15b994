"""Brings a repository of the Hugging Face Hub to this machine. Knows file names, no formats.

The huggingface_hub package does it, through its own cache: what is there already is not fetched again, and works
offline. Only the files that an export reads are asked for, one after the other, so that Ctrl-C ends it at once. Nothing
of a repository is run.
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

from llm_edge.checkpoint.download.progress import downloads_told, in_words
from llm_edge.runtime.errors import CheckpointError, InputError, MachineError
from llm_edge.runtime.safe_io import MIB, read_json

ANSWER_SECONDS = 20.0  # to wait for an answer; the package itself would wait for ever

_ID = re.compile(
    r"(?P<repo>[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@(?P<revision>[\w][\w./-]{0,199}))?", re.ASCII
)
_FILE_ENDS = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".json", ".zip", ".git")
_COMMIT = re.compile(r"[0-9a-f]{40}")

_CONFIGS = ("config.json", "generation_config.json")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_VOCABULARY = ("vocab.json", "merges.txt", "added_tokens.json")  # where there is no tokenizer.json
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the first that is there, whole or in shards with an index
_ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")


def is_hub_id(text: str) -> bool:
    """Whether a text reads `owner/name` or `owner/name@revision`; the caller has looked for such a path before."""
    found = _ID.fullmatch(text)
    if not found or found["repo"].endswith((*_FILE_ENDS, ".", "-")) or "--" in text or ".." in text:
        return False
    return not any(part.endswith((".", "-")) or not part for part in re.split("[/@]", text))


def fetch_checkpoint(
    hub_id: str, progress: Callable[[str], None], *, endpoint: str | None = None, cache: Path | None = None
) -> Path:
    """Bring the files of a model that an export reads, and return their folder (links into the package's cache).

    Weights are safetensors where the repository has them, else `pytorch_model.bin`, never both.

    Args:
        hub_id: `owner/name`, or `owner/name@revision` with a branch, a tag or a commit.
        progress: is told in a few words what is fetched, with sizes.
        endpoint: the Hub's address; by default the package's own, `HF_ENDPOINT`.
        cache: its cache; by default the package's own, `HF_HUB_CACHE`.

    Raises:
        CheckpointError: there is no such repository or revision, it is not open to this user, or has no weights that
            are read.
        MachineError: there is no network and the cache does not hold it, or the disk is full.
        InputError: the package is not installed.
    """
    with _Repository.open(hub_id, progress, endpoint, cache) as repository:
        sizes = repository.sizes
        if "config.json" not in sizes and _ADAPTER_CONFIG in sizes:
            raise CheckpointError(f"{hub_id}: a LoRA adapter, not a model: export its base model with this adapter")
        weights = _weights(hub_id, sizes)
        if "config.json" not in sizes:
            raise CheckpointError(f"{hub_id}: the repository has no config.json, so it is no model that is read here")
        names = [*_CONFIGS, *_TOKENIZER, *(() if "tokenizer.json" in sizes else _VOCABULARY)]
        wanted = [name for name in names if name in sizes]
        if weights.endswith(".index.json"):
            wanted += [weights, *repository.shards(weights)]
        else:
            wanted.append(weights)
        return repository.fetch(wanted)


def fetch_adapter(
    hub_id: str, progress: Callable[[str], None], *, endpoint: str | None = None, cache: Path | None = None
) -> Path:
    """Bring a LoRA adapter, as `fetch_checkpoint` brings a model; takes and raises the same."""
    with _Repository.open(hub_id, progress, endpoint, cache) as repository:
        weights = next((name for name in _ADAPTER if name in repository.sizes), None)
        if _ADAPTER_CONFIG not in repository.sizes or weights is None:
            raise CheckpointError(f"{hub_id}: the repository holds no adapter ({_ADAPTER_CONFIG}, {_ADAPTER[0]})")
        return repository.fetch([_ADAPTER_CONFIG, weights])


def _weights(hub_id: str, sizes: Mapping[str, int]) -> str:
    """The file that holds the weights, or the index of several."""
    for name in _WEIGHTS:
        for found in (f"{name}.index.json", name):
            if found in sizes:
                return found
    only = [name for name in sizes if name.endswith(".safetensors") and name not in _ADAPTER]
    if len(only) == 1:
        return only[0]
    ggufs = sorted((name for name in sizes if name.endswith(".gguf")), key=lambda name: (sizes[name], name))
    if ggufs:
        repo = hub_id.partition("@")[0]
        raise CheckpointError(
            f"{hub_id}: the repository holds GGUF files only: download one, and give its path: "
            f"hf download {repo} {ggufs[0]} --local-dir ."
        )
    raise CheckpointError(f"{hub_id}: the repository holds no weights that are read: {' or '.join(_WEIGHTS)} is needed")


@dataclass(frozen=True, slots=True)
class _Repository:
    """One commit of a repository, and how to bring its files."""

    hub_id: str
    repo: str
    snapshot: Path  # the package's folder for this commit
    sizes: Mapping[str, int]  # bytes of the files in the repository's own folder; of none below it
    progress: Callable[[str], None]
    options: Mapping[str, Any]

    @classmethod
    @contextmanager
    def open(
        cls, hub_id: str, progress: Callable[[str], None], endpoint: str | None, cache: Path | None
    ) -> Iterator[_Repository]:
        """Find the commit and its list of files, asking the Hub or else the cache; put errors within into words."""
        package = _package()
        found = _ID.fullmatch(hub_id)
        if not found or not is_hub_id(hub_id):
            raise CheckpointError(
                f"{hub_id[:100]!r} is not a repository's name, which is owner/name or owner/name@revision"
            )
        repo, revision = found["repo"], found["revision"]
        options = {"endpoint": endpoint, "cache_dir": cache}
        with _in_our_words(package, hub_id), _quiet(package), _limited_waiting(package):
            progress(f"looking up {hub_id}")
            resolved = package.HfApi(endpoint=endpoint).resolve_revision(repo, revision=revision, cache_dir=cache)
            commit = resolved.resolved
            if not _COMMIT.fullmatch(commit):
                raise CheckpointError(f"{hub_id}: the Hub named no commit but {commit[:50]!r}: check HF_ENDPOINT")
            # A download of little, for what comes with it: the list of files, which the cache keeps.
            told = downloads_told(lambda _: None)
            path = package.snapshot_download(
                repo, revision=commit, allow_patterns=["config.json"], tqdm_class=told, **options
            )
            try:
                tree = package.get_cached_repo_tree(repo, revision=commit, cache_dir=cache)
                sizes = {file.path: int(file.size) for file in tree if "/" not in file.path and "\\" not in file.path}
            except package.errors.CachedRepoTreeNotFoundError:  # offline, with the cache of an older package
                sizes = {file.name: file.stat().st_size for file in Path(path).iterdir() if file.is_file()}
            yield cls(hub_id, repo, Path(path), sizes, progress, options)

    def shards(self, index: str) -> list[str]:
        """The files that an index of weights names, which are all in the repository's own folder."""
        self.fetch([index])
        table = read_json(self.snapshot / index, 256 * MIB, error=CheckpointError).get("weight_map")
        if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
            raise CheckpointError(f"{self.hub_id}: {index}: weight_map is not a table of file names")
        names = sorted(set(table.values()))
        for name in names:
            if name not in self.sizes:
                raise CheckpointError(f"{self.hub_id}: {index} names {name[:100]!r}, which the repository lacks")
        return names

    def fetch(self, names: list[str]) -> Path:
        """Bring files that are not in the cache yet, and return their folder."""
        package = _package()
        missing = [name for name in names if not (self.snapshot / name).exists()]
        total = sum(self.sizes[name] for name in missing)
        if not missing:
            return self.snapshot
        self._check_room(total)
        count = f"{len(missing)} files" if len(missing) > 1 else missing[0]
        self.progress(f"downloading {self.repo}: {count}, {in_words(total)}")
        for number, name in enumerate(missing, 1):
            place = f" ({number} of {len(missing)})" if len(missing) > 1 else ""
            told = downloads_told(self.progress, f"{name}{place}", self.sizes[name])
            package.hf_hub_download(self.repo, name, revision=self.snapshot.name, tqdm_class=told, **self.options)
        return self.snapshot

    def _check_room(self, needed: int) -> None:
        folder = self.snapshot
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise MachineError(
                f"{folder}: {self.hub_id} needs {in_words(needed)}, {in_words(free)} are free: make room, or set "
                "HF_HUB_CACHE to another disk"
            )


def _package() -> Any:
    """huggingface_hub, imported when it is needed and with its reports to its maker off (a value given is kept)."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.file_download  # what sets the level of the package's log
    except ImportError as e:
        raise InputError(
            "models of the Hugging Face Hub need the package huggingface_hub: pip install 'llm-edge[export]'"
        ) from e
    return huggingface_hub


@contextmanager
def _quiet(package: Any) -> Iterator[None]:
    """No lines of the package on stderr: what matters of them comes as an error."""
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
def _limited_waiting(package: Any) -> Iterator[None]:
    """Give every request without a time limit one."""

    def limit(request: Any) -> None:
        limits = request.extensions.get("timeout") or dict.fromkeys(("connect", "read", "write", "pool"))
        request.extensions["timeout"] = {
            kind: ANSWER_SECONDS if seconds is None else seconds for kind, seconds in limits.items()
        }

    client = package.get_session()
    before = client.event_hooks
    client.event_hooks = {**before, "request": [*before.get("request", []), limit]}
    try:
        yield
    finally:
        client.event_hooks = before


@contextmanager
def _in_our_words(package: Any, hub_id: str) -> Iterator[None]:
    try:
        yield
    except (InputError, MachineError):
        raise
    except Exception as e:  # noqa: BLE001 (the package and what it stands on raise all kinds; see _explain)
        _explain(package.errors, hub_id, e)


def _explain(errors: Any, hub_id: str, error: Exception) -> NoReturn:
    """Raise what went wrong as one line; an error of this program itself goes on as it is."""
    repo, _, revision = hub_id.partition("@")
    chain = list(_chain(error))
    status = next((e.response.status_code for e in chain if isinstance(e, errors.HfHubHTTPError)), None)
    if any(isinstance(e, errors.GatedRepoError) for e in chain):
        raise CheckpointError(
            f"{hub_id}: access is granted by its owner: ask for it at huggingface.co/{repo}, then log in with "
            "'hf auth login' or set HF_TOKEN"
        ) from error
    if any(isinstance(e, errors.RevisionNotFoundError) for e in chain):
        raise CheckpointError(f"{hub_id}: the repository has no revision {revision or 'main'!r}") from error
    if any(isinstance(e, errors.DisabledRepoError) for e in chain):
        raise CheckpointError(f"{hub_id}: the Hub has disabled this repository") from error
    if any(isinstance(e, errors.RepositoryNotFoundError) for e in chain):
        raise CheckpointError(
            f"{hub_id}: neither a path here nor a repository of the Hub that you can see: check the name; if it is "
            "private, log in with 'hf auth login' or set HF_TOKEN"
        ) from error
    if status in (401, 403):
        raise CheckpointError(
            f"{hub_id}: the Hub refuses your token: log in with 'hf auth login' or set HF_TOKEN"
        ) from error
    if any(isinstance(e, errors.RemoteEntryNotFoundError) for e in chain):
        raise CheckpointError(f"{hub_id}: the Hub lists a file that it does not have: try again") from error
    if status is not None:
        raise MachineError(f"{hub_id}: the Hub answers with HTTP status {status}: try again later") from error
    if any(isinstance(e, errors.HFValidationError) for e in chain):
        raise CheckpointError(f"{hub_id}: not a repository's name ({_line(error)})") from error
    no_space = os.strerror(errno.ENOSPC)
    if any(getattr(e, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or no_space in str(e) for e in chain):
        raise MachineError(
            f"{hub_id}: no space left on the disk of the cache: make room, or set HF_HUB_CACHE to another disk"
        ) from error
    local = next((e for e in chain if isinstance(e, OSError) and e.filename), None)
    if local:
        raise MachineError(
            f"{local.filename}: {local.strerror}: set HF_HUB_CACHE to a folder that can be written"
        ) from error
    if any(isinstance(e, errors.OfflineModeIsEnabled) for e in chain):
        raise MachineError(
            f"{hub_id}: not (or not wholly) in the cache, and HF_HUB_OFFLINE is set: unset it to download"
        ) from error
    network = ("httpx", "httpcore", "hf_xet", errors.__name__)
    if any(type(e).__module__.startswith(network) for e in chain) or isinstance(error, OSError | RuntimeError):
        raise MachineError(
            f"{hub_id}: the Hub cannot be reached, or the connection broke off ({_line(chain[-1])}): try again; files "
            "that have arrived are kept"
        ) from error
    if isinstance(error, ValueError | TypeError | KeyError | AssertionError):
        raise MachineError(f"{hub_id}: the Hub's answer is none of a Hub's: check HF_ENDPOINT") from error
    raise error


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it came from, the nearest first."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        yield found
        found = found.__cause__ or found.__context__


def _line(error: BaseException) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= 120 else f"{words[:117]}…"
