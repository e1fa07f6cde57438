"""Download, cache and verification of published checkpoints from the Hugging Face hub."""

import contextlib
import hashlib
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from se_flax.checkpoints.array_file import one_line
from se_flax.errors import UserError

CONFIG = "config.json"
# In order of preference: timm writes the first; older repositories have only the second.
ARRAYS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Fetched:
    """Files of one repository in the local cache.

    Attributes:
      config: path of `config.json`.
      arrays: path of the weights.
      revision: commit of the files; empty if the cache does not tell.
      sha256: digest of the weights.
      verified: whether the digest was compared with the hub's record; small files have no record.
    """

    config: Path
    arrays: Path
    revision: str
    sha256: str
    verified: bool


def fetch(repo: str, revision: str | None = None, cache_dir: str | os.PathLike[str] | None = None) -> Fetched:
    """Fetches a repository's configuration and weights, from the cache if possible.

    Args:
      repo: `owner/name` on the hub.
      revision: branch, tag or commit; None is the main branch. For a commit in the cache the hub is not asked.
      cache_dir: cache folder; None is that of huggingface_hub (`HF_HOME`).

    Returns:
      Paths and digest of the files.

    Raises:
      UserError: there is no such repository, revision or file; the hub cannot be reached and the files are not in the
        cache; or the digest of the weights is not the hub's.
    """
    from huggingface_hub import errors, hf_hub_download  # half a second, needed here only

    folder = None if cache_dir is None else os.fspath(cache_dir)

    def files(*, cached: bool) -> tuple[Path, Path]:
        def download(name: str) -> Path:
            options: dict[str, Any] = {"revision": revision, "cache_dir": folder, "local_files_only": cached}
            return Path(hf_hub_download(repo, name, library_name="se-flax", **options))

        config = download(CONFIG)
        try:
            return config, download(ARRAYS[0])
        except (errors.RemoteEntryNotFoundError, errors.LocalEntryNotFoundError):
            return config, download(ARRAYS[1])

    why = ""
    try:
        if re.fullmatch(r"[0-9a-f]{40}", revision or ""):  # a commit never changes
            with contextlib.suppress(errors.LocalEntryNotFoundError):
                return _fetched(*files(cached=True))
        why = _unreachable()
        return _fetched(*files(cached=bool(why)))
    except errors.RepositoryNotFoundError as error:
        raise UserError(f"the hub has no public repository {repo!r}; see se-flax list for what is published") from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{repo} has no revision {revision!r}; give a branch, a tag or a commit of it") from error
    except errors.RemoteEntryNotFoundError as error:
        raise UserError(f"{repo} holds no {CONFIG} with {' or '.join(ARRAYS)}; it is not a timm checkpoint") from error
    except errors.HFValidationError as error:
        raise UserError(f"{repo!r} is not a repository name; give owner/name") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        which = f"{repo} at revision {revision!r}" if revision else repo
        raise UserError(
            f"{which} is not in the cache and the hub cannot be reached; connect once, or pass a local file"
            + f" ({why})" * bool(why)
        ) from error
    except OSError as error:  # every other failure of the connection, and a cache that cannot be written
        raise UserError(f"{repo} could not be fetched: {error}".splitlines()[0]) from error


def _unreachable() -> str:
    """The reason why the hub cannot be reached; empty if it can.

    Two requests decide; the hub's client would retry six times in half a minute, with a log line each time.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    why = ""
    for seconds in (3, 6):
        time.sleep(1 if why else 0)
        try:
            get_session().head(constants.ENDPOINT, timeout=seconds)
        except Exception as error:  # the class depends on the client's version
            why = one_line(error)
        else:
            return ""
    return why


def _fetched(config: Path, arrays: Path) -> Fetched:
    return Fetched(config, arrays, _revision(config), *_checked_digest(arrays))


def _revision(path: Path) -> str:
    """The commit of a cached file, from its folder `snapshots/<commit>/`; empty for other paths."""
    name = path.parent.name
    return name if re.fullmatch(r"[0-9a-f]{40}", name) else ""


def _checked_digest(path: Path) -> tuple[str, bool]:
    """SHA-256 of a cached file, and whether it was compared with the hub's record.

    The cache names the blob of a large file by the SHA-256 that the hub recorded at the upload. Blobs of small files
    have shorter names, which are other digests.

    Raises:
      UserError: the file has another digest than recorded.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    recorded = path.resolve().name
    known = re.fullmatch(r"[0-9a-f]{64}", recorded) is not None
    if known and recorded != digest:
        raise UserError(
            f"{path} is damaged: its SHA-256 is {digest[:12]}... and the hub recorded {recorded[:12]}...; "
            f"delete {path.resolve()} and load again"
        )
    return digest, known
