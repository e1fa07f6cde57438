"""The optional packages that speed up random crops, and how a test leaves some of them out."""

import contextlib

import pytest

import train.data.images

FAST = ("simplejpeg", "cykooz_resizer")


@contextlib.contextmanager
def only(packages):
    """Leaves only these optional packages; skips where one is not installed."""
    for name in packages:
        pytest.importorskip(name)
    with pytest.MonkeyPatch.context() as patch:
        for name in set(FAST) - set(packages):
            patch.setattr(train.data.images, name, None)
        yield
