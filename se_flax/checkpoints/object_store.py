"""Folders in buckets, `gs://bucket/folder` and `s3://bucket/folder`, through fsspec (gcsfs, s3fs)."""

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from se_flax.errors import UserError

T = TypeVar("T")
# Library and extra of each scheme.
SCHEMES = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}
# Seconds before the second and third attempt; gcsfs and botocore repeat what the server refuses for a moment as well.
_WAITS = (1.0, 4.0)
_CONNECT_SECONDS, _READ_SECONDS = 10, 60
_THREADS = 8
_COPIES = 3
# What another attempt does not change. Status codes of gcsfs's `HttpError`; other libraries raise types of their own.
_FINAL_CODES = ("400", "401", "403", "404")
_CREDENTIALS = ("DefaultCredentialsError", "NoCredentialsError", "PartialCredentialsError", "RefreshError")


def is_url(ref: str) -> bool:
    """Whether a reference names something in a bucket."""
    return "://" in ref


class ObjectStore:
    """The objects under one address. Names are relative to it, with `/` between their parts.

    Every method raises `UserError` in one sentence if the server cannot be reached, refuses or fails three times.

    Args:
      url: `gs://bucket/folder` or `s3://bucket/folder`. Credentials are those that gcsfs and s3fs find.

    Raises:
      UserError: the address is no such one, or the library is not installed.
    """

    def __init__(self, url: str):
        scheme, _, path = url.partition("://")
        if scheme not in SCHEMES or not path.strip("/"):
            raise UserError(f"got {url}; give a folder, gs://<bucket>/<folder> or s3://<bucket>/<folder>")
        self.url, self._root = url.rstrip("/"), path.strip("/")
        library, extra = SCHEMES[scheme]
        logging.getLogger(library).setLevel(logging.CRITICAL)  # it prints a traceback for what it raises as well
        try:
            self._fs: Any = _filesystem(scheme)
        except ImportError as error:
            raise UserError(
                f"got {url}, which needs the package {library} ({error}); pip install 'se-flax[{extra}]'"
            ) from error
        except Exception as error:
            raise self._failed("opened", error) from error

    def find(self, folder: str = "") -> dict[str, int]:
        """All names, or those in one folder, with their sizes in bytes; empty if there are none."""

        def listed() -> dict[str, int]:
            self._fs.invalidate_cache()
            found = self._fs.find(self._path(folder).rstrip("/"), detail=True)
            prefix = len(self._root) + 1
            return {path[prefix:]: int(info["size"]) for path, info in found.items() if path[prefix:]}

        return self._tried("listed", listed, absent=True) or {}

    def read(self, name: str) -> bytes | None:
        """The content of an object; None if there is no such one."""
        data: bytes | None = self._tried(f"read ({name})", lambda: self._fs.cat_file(self._path(name)), absent=True)
        return data

    def write(self, name: str, data: bytes, *, new: bool = False) -> bool:
        """Writes an object as a whole.

        Args:
          name: its name.
          data: its content.
          new: whether to write it only if there is none yet.

        Returns:
          Whether it was written.
        """
        more = {"mode": "create"} if new else {}
        try:
            self._tried(f"written ({name})", lambda: self._fs.pipe_file(self._path(name), data, **more))
        except FileExistsError:
            return False
        return True

    def upload(self, folder: Path, names: Iterable[str], to: str = "") -> None:
        """Copies local files, and compares the sizes of what is there afterwards.

        Args:
          folder: where they are.
          names: relative to it.
          to: put before the names: a folder that ends with `/`, or nothing.
        """

        def one(name: str) -> None:
            self._tried(f"written ({to}{name})", lambda: self._fs.put_file(str(folder / name), self._path(to + name)))

        left = list(names)
        for _ in range(_COPIES):
            self._all(one, left)
            if not to:
                return
            there = self.find(to)
            left = [name for name in left if there.get(to + name) != (folder / name).stat().st_size]
            if not left:
                return
        raise self._failed(f"written ({to}{left[0]})", OSError("the server took it and does not have it"))

    def download(self, names: Mapping[str, int], folder: Path, strip: str = "") -> None:
        """Copies objects into a local folder.

        Args:
          names: with their sizes, as `find` gives them.
          folder: where to.
          strip: what the names begin with and the local ones do not.
        """

        def one(name: str) -> None:
            place = folder / name.removeprefix(strip)
            place.parent.mkdir(parents=True, exist_ok=True)

            def get() -> None:
                self._fs.get_file(self._path(name), str(place))
                if (size := place.stat().st_size) != names[name]:
                    raise OSError(f"{size} of {names[name]} bytes arrived")

            self._tried(f"read ({name})", get)

        for name in names:
            if name.startswith("/") or ".." in name.split("/"):
                raise UserError(f"{self.url} has an object named {name!r}, which is no file of a folder; remove it")
        self._all(one, names)

    def copy(self, names: Iterable[str], old: str, new: str) -> None:
        """Copies objects within the bucket, with another beginning of their names."""

        def one(name: str) -> None:
            to = self._path(new + name.removeprefix(old))
            self._tried(f"copied ({name})", lambda: self._fs.cp_file(self._path(name), to))

        self._all(one, names)

    def delete(self, names: Iterable[str]) -> None:
        """Deletes objects; it is no error if one of them is gone already."""

        def one(name: str) -> None:
            self._tried(f"deleted ({name})", lambda: self._fs.rm_file(self._path(name)), absent=True)

        self._all(one, names)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _all(self, one: Callable[[str], Any], names: Iterable[str]) -> None:
        with ThreadPoolExecutor(_THREADS) as pool:
            list(pool.map(one, names))

    def _tried(self, what: str, call: Callable[[], T], *, absent: bool = False) -> T | None:
        """Calls a function up to three times; with `absent`, None if what it wants is not there."""
        for wait in (*_WAITS, None):
            try:
                return call()
            except FileExistsError:
                raise
            except FileNotFoundError as error:
                if absent:
                    return None
                raise self._failed(what, error) from error
            except Exception as error:
                if wait is None or _is_final(error):
                    raise self._failed(what, error) from error
            time.sleep(wait)
        raise AssertionError("not reached")

    def _failed(self, what: str, error: Exception) -> UserError:
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = "check address, credentials and permissions" if _is_final(error) else "try again later"
        return UserError(f"{self.url} could not be {what}: {reason[:200]}; {remedy}")


def _filesystem(scheme: str) -> Any:
    """The fsspec file system of a scheme, with time limits and without listings or clients of earlier calls."""
    fresh = {"use_listings_cache": False, "skip_instance_cache": True}
    if scheme == "gs":
        import aiohttp

        # Not `gcsfs.GCSFileSystem`, which may ask a second service what kind of bucket it is.
        from gcsfs.core import GCSFileSystem

        limits = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_SECONDS, sock_read=_READ_SECONDS)
        return GCSFileSystem(requests_timeout=limits, **fresh)
    from s3fs import S3FileSystem

    settings = {"connect_timeout": _CONNECT_SECONDS, "read_timeout": _READ_SECONDS}
    return S3FileSystem(config_kwargs={**settings, "retries": {"mode": "standard", "max_attempts": 5}}, **fresh)


def _is_final(error: Exception) -> bool:
    if isinstance(error, (PermissionError, FileNotFoundError)) or type(error).__name__ in _CREDENTIALS:
        return True
    return str(getattr(error, "code", "")) in _FINAL_CODES or str(error).startswith(("Forbidden", "Bad Request"))


@contextmanager
def local_copy(ref: str, suffixes: tuple[str, ...], manifest: str) -> Iterator[Path]:
    """A checkpoint in a bucket as a local one, for as long as it is read.

    Args:
      ref: address of a file or folder; of a run's work directory, its saved model is taken.
      suffixes: of references to one file.
      manifest: the file that tells a saved model.

    Raises:
      UserError: it cannot be read, or there is nothing.
    """
    with TemporaryDirectory(prefix="se-flax-") as temporary:
        if ref.endswith(suffixes):
            parent, _, name = ref.rpartition("/")
            store = ObjectStore(parent)
            beside = (name, f"{name}.json")  # the description, see `description.beside`
            sizes = {found: size for found, size in store.find().items() if found in beside}
            path = Path(temporary) / name
        else:
            store, path = ObjectStore(ref), Path(temporary) / ref.rstrip("/").rpartition("/")[2]
            sizes = store.find()
            if manifest not in sizes and f"model/{manifest}" in sizes:
                sizes = {name: size for name, size in sizes.items() if name.startswith("model/")}
        if not sizes:
            raise UserError(f"{ref}: no such file or folder")
        store.download(sizes, path.parent if path.name in sizes else path)
        yield path
