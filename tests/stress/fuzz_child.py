"""Feeds one format's reader with mutated inputs, in a process with little memory that may open and start nothing.

`fuzz` starts it. It writes the input at hand to `current`, what it did so far to `report.json`, and findings to files.
"""

import argparse
import contextlib
import faulthandler
import importlib
import json
import os
import random
import resource
import shutil
import sys
import sysconfig
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn
from unicodedata import category

SECONDS_PER_INPUT = 60.0  # wall time, on a machine that may have other work
OURS = ("se_flax", "train")
_MIB = 1 << 20
# What a reader never does; each is the name of an event of Python's audit hooks.
_FORBIDDEN = (
    *("os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn"),
    *("subprocess.Popen", "socket.connect", "socket.bind", "pickle.find_class", "ctypes.dlopen", "webbrowser.open"),
)
_CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod")


class Guard:
    """Collects what an input made the process do beyond reading.

    Args:
      folder: in which files may be written.
    """

    def __init__(self, folder: Path):
        self.folder = os.fsencode(folder)
        self.watching = False
        self.seen: list[str] = []
        trusted = (sysconfig.get_paths()["stdlib"], *sys.path, str(folder))
        self._trusted = tuple(path for path in map(os.path.abspath, filter(None, trusted)))
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        if event in _FORBIDDEN:
            self.seen.append(f"{event} {arguments!r:.300}")
        elif event == "exec":
            name = arguments[0].co_filename
            if not name.startswith(("<frozen", "<attrs", *self._trusted)) and not _in_library():
                self.seen.append(f"exec of {name}")
        elif event == "open":
            path, mode, flags = arguments
            writes = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) or any(c in (mode or "") for c in "wax+")
            if writes and isinstance(path, str | bytes) and not self._inside(path):
                self.seen.append(f"open {path!r} to write")
        elif event in _CHANGES and not self._inside(arguments[event == "os.symlink"]):  # what is made comes second
            self.seen.append(f"{event} {arguments!r:.300}")

    def _inside(self, path: Any) -> bool:
        raw = os.path.abspath(os.fsencode(path)) if isinstance(path, str | bytes | os.PathLike) else b""
        return raw.startswith(self.folder + b"/") or raw == b"/dev/null"


def _in_library() -> bool:
    """Whether a class is being made, as `dataclasses` and `namedtuple` do by exec."""
    frame = sys._getframe(2)
    return frame.f_code.co_filename.endswith(
        ("/dataclasses.py", "/collections/__init__.py", "/typing.py", "/functools.py")
    )


def _status(name: str) -> float:
    """A line of /proc/self/status in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name + ":"))


class Child:
    """One target with what it found."""

    def __init__(self, options: argparse.Namespace, module: Any):
        self.options, self.target = options, module.TARGETS[options.target]
        self.module = module
        self.user_error = importlib.import_module("se_flax.errors").UserError
        self.work: Path = options.work
        self.inside = self.work / "a" / "b"
        self.report: dict[str, Any] = {
            "inputs": 0,
            "accepted": 0,
            "refused": 0,
            "mib": 0.0,
            "seconds": 0.0,
            "done": False,
        }
        self.keys: set[str] = set(options.known)
        self.report["findings"] = []
        self.begun = time.monotonic()
        self.log = (self.work / "log").open("w")

    def prepare(self) -> list[bytes]:
        """Runs the seeds, after which everything is imported, then takes rights away."""
        seeds: list[bytes] = self.module.seeds_of(self.target, self.inside / "seed")
        reasons = []
        for seed in seeds:
            folder = self.inside / "x"
            folder.mkdir()
            try:
                self.target.run(seed, folder)
            except self.user_error as error:
                reasons.append(error)
            shutil.rmtree(folder)
        if len(reasons) == len(seeds):  # then nothing behind the first check would be reached
            raise reasons[0]
        os.chdir(self.inside)
        self.guard = Guard(self.work)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        return seeds

    def one(self, data: bytes) -> None:
        """An input."""
        data = bytes(data)
        (self.work / "current").write_bytes(data)
        folder = self.inside / "x"
        folder.mkdir()
        begun, found = time.monotonic(), ""
        error: BaseException | None = None
        self.watch()
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
        first = _status("VmRSS")
        self.guard.watching = True
        self.limit(self.target.mebibytes)
        try:
            self.target.run(data, folder)
            self.report["accepted"] += 1
        except self.user_error as caught:
            self.report["refused"] += 1
            error, found = caught, _wrong_refusal(caught)
        except (SystemExit, Exception) as caught:
            error, found = caught, type(caught).__name__
        finally:
            self.guard.watching = False
            self.limit(None)
            # What follows has a limit too: the next mutation, in which a library may hang as well.
            self.watch()
        seconds = time.monotonic() - begun
        self.report["seconds"] = max(self.report["seconds"], seconds)
        self.report["mib"] = max(self.report["mib"], _status("VmHWM") - first)
        self.report["inputs"] += 1
        if found:
            self.finding(found, data, error)
        for text in self.guard.seen:
            self.finding(text, data, None)
        self.guard.seen.clear()
        shutil.rmtree(folder, ignore_errors=True)
        if self.report["inputs"] % 100 == 0:
            self.elsewhere(data)
            self.save()
        over = time.monotonic() - self.begun > self.options.seconds
        if self.report["inputs"] >= self.options.inputs or over:
            self.finish()

    def watch(self) -> None:
        """Ends the process in a minute, unless it is called again."""
        faulthandler.dump_traceback_later(SECONDS_PER_INPUT, exit=True, file=self.log)

    def limit(self, mebibytes: int | None) -> None:
        """Bounds the memory that is taken from now on; None takes the bound away, for what makes the next input."""
        most = resource.RLIM_INFINITY
        if mebibytes is not None:
            most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + mebibytes * _MIB
        resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))

    def elsewhere(self, data: bytes) -> None:
        """Files that C code wrote beside the folder, which no audit hook sees."""
        there = {path.relative_to(self.work).as_posix() for path in self.work.glob("*")} - {"corpus"}
        there |= {f"a/b/{path.name}" for path in self.inside.glob("*")} | {
            f"a/{path.name}" for path in (self.work / "a").glob("*")
        }
        known = {"a", "a/b", "a/b/images.py", "a/b/tables.py", "current", "log", "output", "report.json", "report.new"}
        if strange := there - known - {"a/b/x"}:
            self.finding(f"files elsewhere: {sorted(strange)}", data, None)

    def finding(self, what: str, data: bytes, error: BaseException | None) -> None:
        """Writes it down, once per kind and line."""
        key = f"{what.split(' (')[0][:200]} at {_place(error)}"
        if key in self.keys:
            return
        self.keys.add(key)
        target = self.options.findings / f"{self.options.target.replace(' ', '_')}-{len(self.keys)}"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_suffix(".input").write_bytes(data)
        text = "".join(traceback.format_exception(error)) if error else ""
        target.with_suffix(".txt").write_text(f"{key}\n\n{text}", errors="backslashreplace")
        self.report["findings"].append(key)
        self.save()

    def save(self) -> None:
        """Writes the report."""
        (self.work / "report.new").write_text(json.dumps(self.report))
        os.replace(self.work / "report.new", self.work / "report.json")

    def finish(self) -> NoReturn:
        """Ends the process: libFuzzer does not return."""
        self.report["done"] = True
        self.save()
        os._exit(0)


def _wrong_refusal(error: BaseException) -> str:
    """What is wrong with a UserError: memory ran out, or it is no single sentence."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MemoryError):
            return "MemoryError"
        cause = cause.__cause__ or cause.__context__
    text = str(error)
    if len(text) > 4000 or len(text.splitlines()) != 1:
        return f"a message ({len(text)} characters, {len(text.splitlines())} lines)"
    return "a message with control characters" if any(category(c) in ("Cc", "Cs") for c in text) else ""


def _place(error: BaseException | None) -> str:
    """The innermost line of ours, or the innermost at all."""
    frames = traceback.extract_tb(error.__traceback__) if error else []
    ours = [f for f in frames if any(f"/{name}/" in f.filename for name in OURS) and "/tests/" not in f.filename]
    frame = next(reversed(ours or frames), None)
    return f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno}" if frame else "no line"


def random_inputs(child: Child, seeds: list[bytes], rng: random.Random) -> Iterator[bytes]:
    """Without coverage: seeds changed a few times."""
    while True:
        data = rng.choice(seeds)
        for _ in range(rng.choice((1, 1, 2, 3, 6))):
            data = child.target.mutate(data, rng)
        yield data


def guided(atheris: Any, child: Child, seeds: list[bytes], seed: int) -> None:
    """By coverage: libFuzzer keeps inputs that reach new lines."""
    corpus = child.work / "corpus"
    corpus.mkdir(exist_ok=True)
    for i, each in enumerate(seeds):
        (corpus / str(i)).write_bytes(each)

    def mutate(data: bytes, most: int, number: int) -> bytes:
        rng = random.Random(number)
        if rng.random() < 0.15:
            return bytes(atheris.Mutate(data, most))
        for _ in range(rng.choice((1, 1, 2, 3))):
            data = child.target.mutate(bytes(data), rng)
        return data[:most]

    flags = [
        "-max_len=300000",
        "-len_control=0",
        "-rss_limit_mb=0",
        "-timeout=1000",
        "-verbosity=0",
        "-report_slow_units=100000",
    ]
    flags += [f"-handle_{name}=0" for name in ("segv", "abrt", "bus", "fpe", "ill", "int", "term", "xfsz")]
    atheris.Setup([sys.argv[0], f"-seed={seed + 1}", *flags, str(corpus)], child.one, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, kind in (
        ("target", str),
        ("inputs", int),
        ("seconds", float),
        ("seed", int),
        ("work", Path),
        ("findings", Path),
    ):
        parser.add_argument(f"--{name}", type=kind, required=True)
    parser.add_argument("--known", action="append", default=[])
    parser.add_argument("--random", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    atheris = None if options.random else _optional("atheris")
    instrumented: Callable[[], Any] = contextlib.nullcontext
    if atheris is not None:
        instrumented = lambda: atheris.instrument_imports(include=list(OURS), enable_loader_override=False)  # noqa: E731
    with instrumented():
        module = importlib.import_module("tests.stress.fuzz_targets")
    faulthandler.enable()
    child = Child(options, module)
    seeds = child.prepare()
    if atheris is not None:
        guided(atheris, child, seeds, options.seed)
    for data in random_inputs(child, seeds, random.Random(options.seed)):
        child.one(data)


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


if __name__ == "__main__":
    main()
