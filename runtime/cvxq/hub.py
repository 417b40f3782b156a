"""`.cvxq` files of the Hugging Face hub: `user/repo`, or `hf://user/repo[@revision][/file]`.

Downloads land in the hub client's cache, go on where they broke off, and are verified once; what is
cached needs no network.  The hub client fails in many ways; each becomes one line that says what to
do about it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from cvxq.errors import HubError

MODEL_FILE = "model.cvxq"  # what it is called where there is no reason for another name
_SCHEME = "hf://"
_NAME = r"[A-Za-z0-9][\w.-]*"
_ID = re.compile(rf"({_NAME}/{_NAME})(?:@([^/]+))?(?:/(.+))?")
_SUFFIX = ".cvxq"


@dataclass(frozen=True)
class HubFile:
    """A file of a repository; file: None for the one `.cvxq` file that it has."""

    repo: str
    revision: str | None = None
    file: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{_SCHEME}{self.repo}{revision}" + (f"/{self.file}" if self.file else "")

    @property
    def name(self) -> str:
        """What to call the model."""
        if self.file and self.file != MODEL_FILE:
            return PurePosixPath(self.file).stem
        return self.repo.partition("/")[2]


def hub_file(text: str) -> HubFile | None:
    """Return what `text` names on the hub, None for a path.

    A bare `user/repo` is a path where there is such a file or folder.  Raises HubError for what
    begins with hf:// and goes on otherwise than it may.
    """
    if text.startswith(_SCHEME):
        found = _ID.fullmatch(text.removeprefix(_SCHEME).rstrip("/"))
        if found is None:
            raise HubError(
                f"{text!r} is not hf://user/repo, nor hf://user/repo@revision/file.cvxq; use one "
                "of these forms"
            )
        return HubFile(found[1], found[2], found[3])
    found = _ID.fullmatch(text)
    if found is None or found[3] or text.endswith(_SUFFIX) or Path(text).exists():
        return None
    return HubFile(found[1], found[2])


def fetch(wanted: HubFile) -> Path:
    """Return the file in the cache, downloaded and verified if it was not there.

    Raises HubError where it cannot be had, or is corrupt.
    """
    found = find(wanted)
    if found is None:
        raise HubError(f"{wanted}: the repository has no {_SUFFIX} file; name one that has")
    return found


def find(wanted: HubFile) -> Path | None:
    """Return what `fetch` does, or None for a repository without `.cvxq` files.

    Raises HubError also where there are several, none of them model.cvxq, and NotCvxqError or
    UnsupportedError for a file that is something else.
    """
    from cvxq_format import FormatError
    from huggingface_hub.errors import EntryNotFoundError

    try:
        try:
            return _download(wanted, wanted.file or MODEL_FILE)
        except EntryNotFoundError as error:
            if wanted.file:
                raise
            name = _only(wanted, _names(wanted, error))
            return None if name is None else _download(wanted, name)
    except (HubError, FormatError):
        raise
    except Exception as error:  # the hub client raises many types, all meaning "not to be had"
        raise HubError(f"{wanted}: {reason(error)}") from error


def _download(wanted: HubFile, name: str) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    known = try_to_load_from_cache(wanted.repo, name, revision=wanted.revision)
    path = Path(hf_hub_download(wanted.repo, name, revision=wanted.revision))
    if known != str(path):
        _verify(path, wanted)
    return path


def _names(wanted: HubFile, error: Exception) -> list[str]:
    """Names of the repository's `.cvxq` files; of those in the cache, if `error` is: no network."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    if not isinstance(error, LocalEntryNotFoundError):
        names = HfApi().list_repo_files(wanted.repo, revision=wanted.revision)
        return [name for name in names if name.endswith(_SUFFIX)]
    try:
        found = snapshot_download(
            wanted.repo,
            revision=wanted.revision,
            allow_patterns=f"*{_SUFFIX}",
            local_files_only=True,
        )
    except LocalEntryNotFoundError:
        raise error from error.__cause__
    folder = Path(found)
    return [path.relative_to(folder).as_posix() for path in folder.rglob(f"*{_SUFFIX}")]


def _only(wanted: HubFile, names: list[str]) -> str | None:
    if len(names) > 1:
        listed = ", ".join(sorted(names))
        raise HubError(f"{wanted} has several: {listed}; name one, as in {wanted}/{names[0]}")
    return names[0] if names else None


@dataclass(frozen=True)
class Uploaded:
    """Where a folder went; card_written: whether README.md is new."""

    url: str
    card_written: bool


def upload(file: Path, folder: Path, repo: str, card: str, *, private: bool) -> Uploaded:
    """Put a `.cvxq` file, what `folder` holds, and `card` into a repository, in one commit.

    A README.md that lacks the mark of our cards stays.  private: of a repository made now.
    Raises HubError where the hub does not take it.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    if not re.fullmatch(f"{_NAME}/{_NAME}", repo):
        raise HubError(f"{repo!r} is not USER/REPO; give both names")
    api = HfApi()
    try:
        url = str(api.create_repo(repo, private=private, exist_ok=True))
        is_ours = _has_our_card(repo)
        if is_ours:
            (folder / "README.md").write_text(card, encoding="utf-8")
        others = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        named = {path.relative_to(folder).as_posix(): path for path in others} | {MODEL_FILE: file}
        operations = [CommitOperationAdd(name, path) for name, path in named.items()]
        api.create_commit(repo, operations, commit_message=f"Upload {MODEL_FILE}")
    except Exception as error:
        raise HubError(f"{repo}: {reason(error)}") from error
    return Uploaded(url, is_ours)


def _has_our_card(repo: str) -> bool:
    """Whether README.md of the repository is of `cvxq push`, or missing."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import RemoteEntryNotFoundError

    from cvxq.card import MARK

    try:
        found = hf_hub_download(repo, "README.md", force_download=True)
    except RemoteEntryNotFoundError:
        return True
    return MARK in Path(found).read_text(encoding="utf-8")


def _verify(path: Path, wanted: HubFile) -> None:
    """Check every checksum of what was downloaded, and throw it away if one is wrong."""
    from cvxq_format import FormatError, NotCvxqError, Reader, UnsupportedError, verify

    try:
        with Reader(path):
            problems = [problem.message for problem in verify(path)]
    except (NotCvxqError, UnsupportedError):
        raise  # something else, or of a later version, but not damaged
    except FormatError as error:
        problems = [str(error)]
    if problems:
        path.resolve().unlink()
        path.unlink(missing_ok=True)
        raise HubError(
            f"{wanted} came damaged and was thrown away ({problems[0]}); try again, and if that "
            "does not help, tell its author"
        )


def reason(error: Exception) -> str:
    """Say why the hub gives nothing, and what to do."""
    from huggingface_hub import errors

    cause = error.__cause__
    if isinstance(error, RuntimeError) and isinstance(cause, Exception):  # of an upload
        return reason(cause)
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(cause, Exception):
        if isinstance(cause, errors.OfflineModeIsEnabled):
            return (
                "not in the hub's local cache, while HF_HUB_OFFLINE forbids to download it; "
                "unset that, or check the spelling"
            )
        error = cause  # a snapshot that is not cached hides what the hub answered
    if isinstance(error, errors.GatedRepoError):
        return (
            "the model is gated on the hub; accept its license on its page there, "
            "then log in with `hf auth login`"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "the hub has the model, but no such revision; check its spelling"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return "the hub has the model, but no such file; check the spelling"
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "the hub has no such model, or it is private; check the spelling, "
            "or log in with `hf auth login`"
        )
    if status in (401, 403):
        return (
            f"the hub refuses access (HTTP {status}); log in with `hf auth login`, "
            "with a token that may read this model"
        )
    if status is not None:
        return f"the hub answers with HTTP {status}; try again later"
    if isinstance(error, OSError) and error.errno and not isinstance(error, ConnectionError):
        return _one_line(error)  # of this machine, such as a disk that is full
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE forbids to reach the hub; unset that"
    return f"the hub is out of reach and has left no copy here: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
