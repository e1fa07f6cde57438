"""The pages of docs/ and the README: what they show exists, what is generated is current, what one types parses."""

import re
import shlex
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from costs import count

import se_flax
import train.aot
import train.cli
from se_flax.cli import _parser
from tools import attention_pictures, layers_picture, zoo_table

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_every_public_name_is_in_the_reference():
    reference = "".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))
    shown = set(re.findall(r"^::: se_flax\.(?:\w+\.)*(\w+)$", reference, re.MULTILINE))
    assert set(se_flax.__all__) - {"__version__"} <= shown


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    there = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert there == listed


# Imports


@pytest.fixture(scope="module")
def edges():
    return layers_picture.graph()


def test_imports_go_one_way(edges):
    layers_picture.heights(edges)  # no circles
    allowed = {"se_flax": {"se_flax"}, "train": {"train", "se_flax"}, "configs": {"configs", "train", "se_flax"}}
    for name, others in edges.items():
        package = name.split(".")[0]
        assert {other.split(".")[0] for other in others} <= allowed[package], name


# Folders and modules of se_flax by level.
LEVELS = (
    {"errors", "version", "runtime"},
    {"arrays", "lowering", "synonyms"},
    {"functional"},
    {"nn"},
    {"attention"},
    {"variant", "ctr"},
    {"images", "backbones"},
    {"zoo"},
    {"analysis", "checkpoints"},
    {"export"},
    {"cli", "__init__"},
    {"__main__"},
)


def test_folders_import_from_lower_levels_only(edges):
    level = {name: i for i, names in enumerate(LEVELS) for name in names}
    for module, others in edges.items():
        package, _, rest = module.partition(".")
        here = rest.split(".")[0] or "__init__"
        for other in others if package == "se_flax" else ():
            there = other.partition(".")[2].split(".")[0] or "__init__"
            assert here == there or level[there] < level[here], f"{module} imports {other}"


def test_tables_import_the_training_program_and_nothing_imports_them(edges):
    for module, others in edges.items():
        if module.startswith("train.") and not module.startswith("train.ctr"):
            assert not any(other.startswith("train.ctr") for other in others), module


# Modules in folders of `train` that take the settings of a whole run.
WHOLE = {"optim.finetune", *(f"run.{name}" for name in ("loop", "setup", "trainer", "program", "length", "save_model"))}


def test_other_modules_take_a_section_of_the_settings():
    readers = set()
    for path in (ROOT / "train").rglob("*/*.py"):
        taken = re.findall(r"^from train\.config import (.+|\([^)]+\))$", path.read_text(), re.MULTILINE)
        if any("Config" in re.findall(r"\w+", names) for names in taken):
            readers.add(".".join(path.relative_to(ROOT / "train").with_suffix("").parts))
    assert readers == WHOLE
    text = (ROOT / "train" / "config.py").read_text().split('"""')[1]
    assert all(f"`{name.removeprefix('run.')}`" in text.replace("train.optim.", "optim.") for name in WHOLE)


def test_every_folder_says_what_is_in_it(edges):
    folders = {path.parent for package in ("se_flax", "train") for path in (ROOT / package).rglob("*.py")}
    for folder in folders:
        assert (folder / "__init__.py").read_text().startswith('"""'), folder


def test_a_circle_of_imports_is_named():
    with pytest.raises(ValueError, match="import each other: a -> b -> a"):
        layers_picture.heights({"a": {"b"}, "b": {"a"}, "c": {"a"}})


def test_a_module_stands_above_all_that_it_imports(edges):
    rows = {}
    for package, levels in layers_picture.bands(edges):
        for row, names in enumerate(levels):
            rows |= {name: (layers_picture.PACKAGES.index(package), row) for name in names}
    assert rows["se_flax.attention"] < rows["se_flax.functional"]  # rows count from the top
    assert rows["train.run.loop"] < rows["train.run.step"] < rows["se_flax.zoo"]
    for name, others in edges.items():
        assert all(rows[name] < rows[other] for other in others if name in rows and other in rows), name


@pytest.mark.parametrize(
    ("path", "text", "command"),
    [
        (layers_picture.PICTURE, layers_picture.draw, "python tools/layers_picture.py"),
        *(
            (attention_pictures.FOLDER / name, partial(str, text), "python tools/attention_pictures.py")
            for name, text in attention_pictures.PICTURES.items()
        ),
    ],
    ids=lambda x: x.name if isinstance(x, Path) else "",
)
def test_a_picture_is_what_its_script_draws(path, text, command):
    drawn, expected = (re.sub(r"<g><title>.*?</title>", "", svg) for svg in (path.read_text(), text()))
    assert drawn == expected, f"run {command}"


# Figures


def test_the_zoo_page_is_current():
    counts, parity = zoo_table.read(zoo_table.COUNTS), zoo_table.read(zoo_table.PARITY)
    variants = {name: se_flax.get_variant(name) for name in se_flax.list_models()}
    assert not zoo_table.missing(variants, counts), "run python tools/zoo_table.py"
    assert zoo_table.PAGE.read_text() == zoo_table.page(zoo_table.FAMILIES, counts, parity), (
        "run python tools/zoo_table.py"
    )


@pytest.mark.parametrize("name", ["seresnet20", "seresnet18", "mobilenetv3_small_050"])
def test_the_zoo_pages_figures_are_those_of_today(name):
    row = zoo_table.read(zoo_table.COUNTS)[name]
    counted = se_flax.costs(name, row["image_size"])
    assert (row["params"], row["macs"]) == (counted.params, counted.macs)


def test_parameters_of_attention_are_those_on_the_page():
    rows = re.findall(r"^\| \[`(\w+)`\].*\| ([\d,]+) \|$", (ROOT / "docs" / "attention.md").read_text(), re.MULTILINE)
    assert len(rows) == 6
    for name, number in rows:
        module = getattr(se_flax.attention, name)()
        shapes = jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 4, 4, 256), jnp.float32))
        assert count(shapes["params"]) == int(number.replace(",", "")), name


# Code and commands


def python_blocks(page):
    """Python of a page, joined: later blocks use the names of earlier ones."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))


def stand_in(ref, **_):
    """What `load_pretrained` gives, without the network: a small untrained one."""
    model = se_flax.create_model("seresnet18", num_classes=10)
    variables = model.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    return se_flax.Pretrained("seresnet18", model, variables, lambda image: jnp.zeros((1, 32, 32, 3)))


@pytest.mark.parametrize("name", ["README.md", "docs/index.md", "docs/attention.md"])
def test_the_code_on_a_page_runs(name, monkeypatch):
    code = python_blocks(ROOT / name)
    assert "se_flax." in code
    monkeypatch.setattr(se_flax, "load_pretrained", stand_in)
    names = {"__name__": "page", "se_flax": se_flax}
    # Traced, not computed: full-size networks take a second that way.
    jax.eval_shape(lambda: exec(compile(code, name, "exec"), names))
    assert issubclass(names.get("Block", nn.Module), nn.Module)


SOURCES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "colab").glob("*.py"))]


def eager_calls(code):
    """Statements that call a network outside a function, and not under `jax.jit`."""
    lines = [line for line in code.splitlines() if re.match(r"(?!\s|def |@|#).*\w\.(apply|init)\(", line)]
    return [line for line in lines if "lambda" not in line]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_networks_on_a_page_are_compiled(path):
    assert not eager_calls(path.read_text() if path.suffix == ".py" else python_blocks(path))


@pytest.mark.parametrize("name", ["__init__", "zoo", "checkpoints/pretrained", "export/folding"])
def test_networks_in_a_docstring_are_compiled(name):
    text = (ROOT / "se_flax" / f"{name}.py").read_text()
    assert not eager_calls("\n".join(re.findall(r"^(?: *>>> )?(\w.*)$", text, re.MULTILINE)))


def test_an_eager_call_is_found():
    assert eager_calls("logits = model.apply(variables, x)") and eager_calls("v = loaded.model.init(key, x)")
    assert not eager_calls("logits = jax.jit(model.apply)(variables, x)\n    y = model.apply(variables, x)")


def commands(page):
    """Command lines of a page, indented or fenced: joined where a backslash ends a line, without comments."""
    text = re.sub(r"\\\n\s*", "", page.read_text())
    fenced = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^    +(.*)$", text, re.MULTILINE) + [line for block in fenced for line in block.splitlines()]
    for line in lines:
        started = re.match(r"(?:\$ |srun |cd \S+ && |\w+=\S+ )*(?=(?:\S*/)?python -m train\b|se-flax )", line)
        if started:
            command = line[started.end() :].rstrip("& ")
            # The last line of a quoted script for other hosts ends in its quote.
            yield shlex.split(command.rstrip("'") if command.count("'") % 2 else command, comments=True)


FOUND = [(page.name, words) for page in PAGES for words in commands(page)]


@pytest.mark.parametrize("words", [pytest.param(words, id=f"{page}: {' '.join(words)[:60]}") for page, words in FOUND])
def test_a_command_on_a_page_can_be_typed(words):
    if words[0] == "se-flax":
        assert _parser().parse_args(words[1:]).run
    elif words[2] == "train" and words[3] != "--help":
        config, workdir = train.cli.parse([re.sub(r"<\w+>", "x", word) for word in words[3:]])
        assert workdir and config
    elif words[2] == "train.aot":
        assert "--model=seresnet50" in words


def test_commands_are_found():
    assert sum(words[0] == "se-flax" for _, words in FOUND) >= 10
    assert sum(words[2:3] == ["train"] for _, words in FOUND) >= 10
