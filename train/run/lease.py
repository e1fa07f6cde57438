"""One run at a time in a bucket's folder: a lock that its holder must renew, so that a dead run's ends by itself."""

import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from se_flax.checkpoints.object_store import ObjectStore
from se_flax.errors import UserError

NAME = ".lock"
# The holder renews its lease this often; one that stays the same for `EXPIRES` seconds is a dead run's.
RENEW, EXPIRES = 10.0, 60.0
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class InUse(UserError):
    """Another run has the lease."""


class Lease:
    """The lock object of a folder in a bucket.

    Args:
      store: of the folder.
    """

    def __init__(self, store: ObjectStore):
        self._store = store
        self._machine = f"{socket.gethostname()} {_BOOT.read_text().strip() if _BOOT.exists() else ''}".strip()
        self._said = {
            "run": uuid.uuid4().hex,
            "process": os.getpid(),
            "host": socket.gethostname(),
            "machine": self._machine,
            "renewed": 0,
        }

    def take(self, say: Callable[[str], None]) -> None:
        """Takes the lease, at the latest when another one has expired.

        The caller holds a lock of this machine, so a lease of the same machine is a dead run's.

        Args:
          say: is told what is waited for.

        Raises:
          InUse: another run renews its lease.
        UserError: the bucket cannot be written.
        """
        # Not every server knows writes that must not replace anything, so it is asked first and afterwards.
        while (other := self._read()) is not None or not self._store.write(NAME, self._text(), new=True):
            if other is None:
                continue
            if other.get("machine") != self._machine:
                self._outlive(other, say)
            self._store.delete([NAME])
        if (other := self._read()) is None or other.get("run") != self._said["run"]:
            raise self._in_use(other)

    def _outlive(self, other: dict[str, object], say: Callable[[str], None]) -> None:
        """Waits until a lease has expired."""
        say(f"waiting up to {EXPIRES:.0f} s: {self._store.url} may be in use{_holder(other)} ...")
        end = time.monotonic() + EXPIRES
        while time.monotonic() < end:
            time.sleep(min(RENEW / 2, EXPIRES))
            if self._read() != other:
                raise self._in_use(other)

    def renew(self) -> None:
        """Tells other runs that this one is alive.

        Raises:
          InUse: another run has taken the lease, since this one was silent for too long.
        """
        other = self._read()
        if other is not None and other.get("run") != self._said["run"]:
            raise self._in_use(other)
        self._said["renewed"] = int(str(self._said["renewed"])) + 1
        self._store.write(NAME, self._text())

    def give_back(self) -> None:
        """Ends the lease, if it is still this run's."""
        other = self._read()
        if other is not None and other.get("run") == self._said["run"]:
            self._store.delete([NAME])

    def _text(self) -> bytes:
        return json.dumps(self._said).encode()

    def _read(self) -> dict[str, object] | None:
        """What the lock object says; None without one."""
        data = self._store.read(NAME)
        try:
            said = json.loads(data) if data is not None else None
        except ValueError:
            said = {}
        return said if isinstance(said, dict) or said is None else {}

    def _in_use(self, other: dict[str, object] | None) -> InUse:
        return InUse(
            f"another run is using {self._store.url}{_holder(other or {})}; wait for its end or stop it, or use "
            "another --workdir"
        )


def _holder(said: dict[str, object]) -> str:
    text = f"process {said.get('process')} on {said.get('host')}"
    return f" ({text[:200]})" if said and text.isprintable() else ""
