"""What is published: every module and data file, one version, metadata that match the repository."""

import ast
import fnmatch
import re
import runpy
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest

import se_flax
import train
from tools import slow_tests

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "se_flax"
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, SETUPTOOLS = SETTINGS["project"], SETTINGS["tool"]["setuptools"]


def test_every_folder_with_code_is_packaged():
    included = SETUPTOOLS["packages"]["find"]["include"]
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        name = ".".join(folder.relative_to(ROOT).parts)
        assert (folder / "__init__.py").exists(), f"{name} has no __init__.py, so setuptools leaves it out"
        assert any(fnmatch.fnmatch(name, pattern) for pattern in included), name


def test_every_other_file_is_package_data():
    patterns = SETUPTOOLS["package-data"]["se_flax"]
    others = [path for path in PACKAGE.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert {path.name for path in others} >= {"py.typed", "checkpoints.json", "imagenet_labels.tsv"}
    for path in others:
        name = path.relative_to(PACKAGE).as_posix()
        assert any(fnmatch.fnmatch(name, pattern) for pattern in patterns), f"{name} is in no pattern of package-data"


def test_the_version_comes_from_one_place():
    version = se_flax.__version__
    assert "version" in PROJECT["dynamic"]
    assert SETUPTOOLS["dynamic"]["version"] == {"attr": "se_flax.version.__version__"}
    assert re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1] == version
    assert re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1] == version
    assert distribution("se-flax").version == version


def test_addresses_agree():
    repository = PROJECT["urls"]["Repository"]
    assert f"repository-code: {repository}\n" in (ROOT / "CITATION.cff").read_text()
    pages = [ROOT / "README.md", ROOT / "docs" / "index.md", ROOT / "docs" / "hosts.md"]
    cloned = {found for page in pages for found in re.findall(r"git clone (\S+)", page.read_text())}
    assert cloned == {repository}
    assert all(url.startswith(repository) for url in PROJECT["urls"].values())


def test_the_long_description_leads_from_pypi_to_files_that_are_there(monkeypatch):
    """PyPI shows the README without the files beside it."""
    setuptools = type(sys)("setuptools")  # not every environment of the tests has it
    setuptools.setup = None
    monkeypatch.setitem(sys.modules, "setuptools", setuptools)
    text = runpy.run_path(str(ROOT / "setup.py"))["long_description"]()
    targets = re.findall(r"\]\(([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    starts = (f"{PROJECT['urls']['Repository']}/blob/main/", "https://raw.githubusercontent.com/se-flax/se-flax/main/")
    ours = [target for target in targets if target.startswith(starts)]
    assert len(ours) > 20 and any(target.startswith(starts[1]) for target in ours)
    for target in targets:
        assert target.startswith("https://"), target
    for target in ours:
        file = re.sub("|".join(starts), "", target).partition("#")[0]
        assert (ROOT / file).exists(), f"{target} leads nowhere"


def test_the_classifiers_start_at_the_oldest_python():
    versions = [c.rsplit(" ", 1)[1] for c in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", c)]
    assert versions[0] == PROJECT["requires-python"].removeprefix(">=")
    assert versions == [f"3.{11 + i}" for i in range(len(versions))]


def test_the_workflow_does_what_a_change_must_pass():
    commands = set(re.findall(r"\bmake ([\w -]+)$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert commands
    for command in commands:
        assert f"run: make {command}\n" in workflow, command


def test_the_list_of_slow_tests_names_tests_that_are_there():
    names = (ROOT / "tests" / "slow.txt").read_text().split()
    for name in names:
        file, _, function = name.partition("::")
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(), name


def test_slow_tests_are_those_whose_calls_take_long_together():
    cases = (
        '<testcase classname="tests.test_a" name="x[1]" time="0.50" />',
        '<testcase classname="tests.test_a" name="x[2 b]" time="0.40"></testcase>',
        '<testcase classname="tests.test_a" name="y" time="0.40" />',
    )
    report = f"<testsuites><testsuite>{''.join(cases)}</testsuite></testsuites>"
    assert slow_tests.slow_tests(report) == ["test_a.py::x"]


@pytest.mark.parametrize("extra", ["dev", "docs"])
def test_what_the_makefile_installs_is_pinned(extra):
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {_plain(line.split("==")[0]) for line in lines if "==" in line}
    needed = _packages(PROJECT["optional-dependencies"][extra])
    # Hooks of one's own checkout; they are no part of what a change must pass.
    assert needed - pinned <= {"pre-commit"}


def _packages(needs):
    """Their names, those of our own extras included."""
    names = set()
    for need in needs:
        own = re.match(r"se-flax\[([\w,]+)\]", need)
        inner = [_packages(PROJECT["optional-dependencies"][extra]) for extra in own[1].split(",")] if own else []
        names |= set().union(*inner) if own else {_plain(re.match(r"[\w.-]+", need)[0])}
    return names


# Where a package is imported by another name than it is installed by.
IMPORTED_AS = {"PIL": "pillow", "orbax": "orbax-checkpoint", "sklearn": "scikit-learn", "absl": "absl-py"}
# Imported where they are needed, with a sentence of their own where they are missing.
OPTIONAL = {"matplotlib", "onnx", "onnxruntime", "tensorflow", "torch", "simplejpeg", "cykooz"}
OPTIONAL |= {"aiohttp", "gcsfs", "s3fs"}


def imported_by(package):
    """Packages of others that the modules of one of ours import, wherever in a file."""
    nodes = [node for path in (ROOT / package).rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
    tops = {name.split(".")[0] for name in names} - sys.stdlib_module_names - {"se_flax", "train", "configs"}
    return {_plain(IMPORTED_AS.get(top, top)) for top in tops - OPTIONAL}


def test_the_package_needs_what_it_imports_and_no_more():
    needed = _packages(PROJECT["dependencies"])
    # Of JAX, ml_dtypes; jax.export imports flatbuffers.
    assert imported_by("se_flax") - {"ml-dtypes"} == needed - {"flatbuffers"}


def test_the_extra_train_is_what_the_training_program_imports_beside_that():
    extra = _packages(PROJECT["optional-dependencies"]["train"]) - {"matplotlib"}
    assert (imported_by("train") | imported_by("configs")) - _packages(PROJECT["dependencies"]) == extra
    assert {_plain(package) for package in train._NEEDED.values()} == extra | {"matplotlib"}


def test_the_training_program_says_which_packages_are_missing(monkeypatch):
    monkeypatch.setitem(train._NEEDED, "no_such_package", "no-such-package")
    assert train.missing_packages() == ["no-such-package"]
    with pytest.raises(ModuleNotFoundError, match=r"needs no-such-package, which .* pip install -e '\.\[train\]'"):
        train._refuse(train.missing_packages())
    monkeypatch.setattr(sys, "argv", ["-m"])
    with pytest.raises(SystemExit, match=r"^error: the training program needs"):
        train._refuse(train.missing_packages())


def _plain(name):
    return re.sub(r"[-_.]+", "-", name).lower()
