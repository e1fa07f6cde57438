"""Published checkpoints on the Hugging Face hub: fetched, cached and verified."""

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
# The first that exists is taken; timm writes the first, older repositories hold the second.
ARRAYS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Fetched:
    """Files of one repository in the local cache.

    Attributes:
      config: its `config.json`.
      arrays: its weights.
      revision: the commit they belong to, empty where the cache does not say.
      sha256: of the weights; verified against the hub's own record where it has one.
      verified: whether there was such a record.
    """

    config: Path
    arrays: Path
    revision: str
    sha256: str
    verified: bool


def fetch(repo: str, revision: str | None = None, cache_dir: str | os.PathLike[str] | None = None) -> Fetched:
    """Fetches a repository's configuration and weights, from the cache where they are there already.

    Args:
      repo: `owner/name` on the hub.
      revision: branch, tag or commit; None is the main branch. With a commit the cache is used without asking the hub.
      cache_dir: instead of huggingface_hub's own cache (`HF_HOME`).

    Returns:
      Where the files are.

    Raises:
      UserError: no such repository, revision or file; the hub cannot be reached and the cache does not have it; the
        weights are not those that the hub recorded.
    """
    from huggingface_hub import errors, hf_hub_download  # half a second that only this function pays

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
        if re.fullmatch(r"[0-9a-f]{40}", revision or ""):  # a commit never changes, so the cache needs no asking
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
    """Why the hub cannot be reached, empty where it can.

    Its client would try six times in half a minute and say so each time; here two requests decide.
    """
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    why = ""
    for seconds in (3, 6):
        time.sleep(1 if why else 0)
        try:
            get_session().head(constants.ENDPOINT, timeout=seconds)
        except Exception as error:  # which class depends on the client's version; whatever it is, there was no answer
            why = one_line(error)
        else:
            return ""
    return why


def _fetched(config: Path, arrays: Path) -> Fetched:
    return Fetched(config, arrays, _revision(config), *_checked_digest(arrays))


def _revision(path: Path) -> str:
    """The cache keeps files under `snapshots/<commit>/`."""
    name = path.parent.name
    return name if re.fullmatch(r"[0-9a-f]{40}", name) else ""


def _checked_digest(path: Path) -> tuple[str, bool]:
    """SHA-256 of a cached file, and whether the hub's own record confirmed it.

    The cache names the content of a large file by the SHA-256 that the hub recorded when it was uploaded; a small
    file's name is shorter and says nothing here.

    Raises:
      UserError: the content has another digest.
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
