"""The examples in docstrings, run."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest

import se_flax
import train


def modules_with_examples():
    """Modules of both packages whose source holds an example."""
    for package in (se_flax, train):
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            source = importlib.util.find_spec(info.name).loader.get_source(info.name)
            if ">>>" in source:
                yield info.name


MODULES = sorted(modules_with_examples())


def test_examples_are_found():
    assert {"se_flax.zoo", "se_flax.export.folding"} <= set(MODULES)
    assert doctest.DocTestFinder().find(importlib.import_module("se_flax.zoo").create_model)[0].examples


def test_examples_stand_under_the_heading_that_the_reference_knows():
    """Under `Example:` the site would show a doctest as a quotation."""
    for name in MODULES:
        source = Path(importlib.util.find_spec(name).origin).read_text()
        assert not re.search(r"^ +Example:$", source, re.MULTILINE), name


@pytest.mark.parametrize("name", MODULES)
def test_examples_give_what_they_say(name, tmp_path, monkeypatch):
    module = importlib.import_module(name)
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(
        module, extraglobs={"se_flax": se_flax}, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    )
    assert result.failed == 0
