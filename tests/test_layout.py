"""Tables, paragraphs and help texts in a terminal of any width."""

import os
import subprocess
import sys

import pytest

import se_flax
import train.ablation
import train.cli
from se_flax.cli import main
from se_flax.cli.layout import print_table, reflowed, terminal_width, wrapped
from train.aot import main as aot
from train.ctr.__main__ import main as train_tables

HEAD = ("name", "size", "tags", "where it comes from")
TABLE = [
    HEAD,
    ("resnet", "1.5 M", "a_tag, another_tag, a_third_tag, a_fourth_tag", "a paper, its first table and its appendix"),
    ("seresnet", "25.25 M", "-", "another paper"),
]


def printed(capsys, function, *arguments, **keywords):
    function(*arguments, **keywords)
    return capsys.readouterr().out


def at_width(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))


def widest(text):
    return max(map(len, text.splitlines()))


def test_a_table_that_fits_is_one_line_a_row(monkeypatch, capsys):
    at_width(monkeypatch, 120)
    assert printed(capsys, print_table, TABLE, right=(1,)).splitlines() == [
        "name         size  tags                                           where it comes from",
        "--------  -------  ---------------------------------------------  -----------------------------------------",
        "resnet      1.5 M  a_tag, another_tag, a_third_tag, a_fourth_tag  a paper, its first table and its appendix",
        "seresnet  25.25 M  -                                              another paper",
    ]


def test_a_narrower_table_wraps_its_wide_cells(monkeypatch, capsys):
    at_width(monkeypatch, 72)
    lines = printed(capsys, print_table, TABLE, right=(1,)).splitlines()
    assert lines[2:5] == [
        "resnet      1.5 M  a_tag, another_tag,        a paper, its first table",
        "                   a_third_tag, a_fourth_tag  and its appendix",
        "seresnet  25.25 M  -                          another paper",
    ]


def test_a_column_that_can_be_done_without_goes_first(monkeypatch, capsys):
    at_width(monkeypatch, 72)
    lines = printed(capsys, print_table, TABLE, right=(1,), optional=(3,)).splitlines()
    assert lines[0].split() == ["name", "size", "tags"] and len(lines) == 4


def test_a_still_narrower_table_goes_on_below(monkeypatch, capsys):
    at_width(monkeypatch, 36)
    lines = printed(capsys, print_table, TABLE, right=(1,)).splitlines()
    heads = [line.split() for line in lines if line.startswith("name")]
    assert heads == [["name", "size"], ["name", "tags"], ["name", "where", "it", "comes", "from"]]
    assert [line.split()[0] for line in lines if line.startswith(("resnet", "seresnet"))] == ["resnet", "seresnet"] * 3


def test_the_narrowest_table_is_a_paragraph_a_row(monkeypatch, capsys):
    at_width(monkeypatch, 25)
    lines = printed(capsys, print_table, TABLE, right=(1,)).splitlines()
    assert lines[-5:] == [
        "seresnet",
        "  size: 25.25 M",
        "  tags: -",
        "  where it comes from:",
        "    another paper",
    ]


@pytest.mark.parametrize("columns", [120, 100, 80, 60, 40, 36, 30])
def test_no_table_is_wider_than_the_terminal_and_none_loses_a_word(monkeypatch, capsys, columns):
    at_width(monkeypatch, columns)
    out = printed(capsys, print_table, TABLE, right=(1,))
    assert widest(out) <= columns
    for row in TABLE[1:]:
        for cell in row:
            assert all(word in out.split() for word in cell.split())
    everything = printed(capsys, main, ["list"])
    assert widest(everything) <= max(columns, 32)  # as the longest name
    assert set(se_flax.list_models()) <= set(everything.split())
    for words in (["info", "seresnet50"], ["info", "efficientnet_b0"], ["costs", "seresnet20", "--by-layer"]):
        assert widest(printed(capsys, main, words)) <= max(columns, 42)  # as the longest word of these


def test_a_pipe_gets_whole_lines():
    environment = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    command = [sys.executable, "-m", "se_flax", "list", "seresnet50"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    (row,) = (line for line in done.stdout.splitlines() if line.startswith("seresnet50"))
    assert "a1_in1k, a2_in1k, a3_in1k, ra2_in1k" in row and row.endswith(se_flax.get_variant("seresnet50").source)


@pytest.mark.parametrize("columns", ["0", "5", "x"])
def test_a_width_that_is_none_is_no_harm(monkeypatch, columns):
    at_width(monkeypatch, columns)
    assert terminal_width() >= 20 and wrapped("one two") == "one two"


USAGE = """\
A program with one long sentence about what it does,
which goes on.

  program --flag --another-flag --a-third-flag --a-fourth-flag --a-fifth-flag

  --flag=X   what it is for, in a sentence that is longer than the line can be
             and goes on in its column
  --other    short
"""


def test_a_help_text_is_wrapped_anew(monkeypatch):
    at_width(monkeypatch, 50)
    assert (
        reflowed(USAGE)
        == """\
A program with one long sentence about what it
does, which goes on.

  program --flag --another-flag --a-third-flag --a-fourth-flag --a-fifth-flag

  --flag=X   what it is for, in a sentence that is
             longer than the line can be and goes
             on in its column
  --other    short
"""
    )
    at_width(monkeypatch, 40)
    assert "  --flag=X\n        what it is for, in a sentence\n" in reflowed(USAGE)


@pytest.mark.parametrize("columns", [80, 120])
def test_help_is_as_wide_as_the_terminal(monkeypatch, capsys, columns):
    at_width(monkeypatch, columns)
    programs = [
        lambda: train.cli.main(["--help"]),
        lambda: train_tables(["--help"]),
        lambda: train.ablation.main(["--help"]),
    ]
    commands = [(), ("list",), ("info",), ("costs",), ("predict",), ("eval",), ("gates",), ("convert",), ("export",)]
    programs += [lambda words=words: main([*words, "--help"]) for words in commands]
    programs.append(lambda: aot(["--help"]))
    for program in programs:
        try:
            program()
        except SystemExit as done:
            assert done.code == 0
        out = capsys.readouterr().out
        assert widest(out) <= columns, max(out.splitlines(), key=len)
        assert len(out.splitlines()) > 5
