"""The notebooks of `colab/`: each is its script, holds no outputs, and runs from top to bottom without a network.

`SE_FLAX_SMALL=1` chooses small settings. Three run as scripts; the one on training runs as a notebook, in a kernel, on
a "second machine": the first one was taken away in the middle of the run.
"""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import bucket_servers
import nbformat
import pytest
from PIL import Image

from se_flax.checkpoints.object_store import ObjectStore
from tools.notebooks import FOLDER, notebook_text

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("finetune", "own_model", "restore", "train_on_tpu")
COLAB = "https://colab.research.google.com/github/se-flax/se-flax/blob/main/colab/"
SOURCE = "https://github.com/se-flax/se-flax/blob/main/"


# --- Without running them ---------------------------------------------------------------------------------------------


def test_every_notebook_has_its_script():
    assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == list(NAMES)
    assert sorted(path.stem for path in FOLDER.glob("*.py")) == list(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_its_script(name):
    written = (FOLDER / f"{name}.ipynb").read_text()
    expected = notebook_text((FOLDER / f"{name}.py").read_text())
    assert written == expected, f"{name}.ipynb is not what {name}.py says; run python -m tools.notebooks"


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_valid_and_holds_no_outputs(name):
    """Read as plain JSON, beside the tool that wrote it."""
    path = FOLDER / f"{name}.ipynb"
    nbformat.validate(nbformat.read(path, as_version=4))
    notebook = json.loads(path.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(code) > 4 and len(notebook["cells"]) > len(code)
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)
    # What a reader of the script sees is what the notebook executes, line by line.
    lines = {line for cell in code for line in "".join(cell["source"]).splitlines() if line.strip()}
    assert lines <= set((FOLDER / f"{name}.py").read_text().splitlines())


@pytest.mark.parametrize("name", NAMES)
def test_badges_and_links_lead_somewhere(name):
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text())
    title = "".join(notebook["cells"][0]["source"])
    assert title.startswith("# ") and f"]({COLAB}{name}.ipynb)" in title
    assert all(f"]({COLAB}{name}.ipynb)" in path.read_text() for path in (ROOT / "README.md", FOLDER / "README.md"))
    text = "\n".join("".join(cell["source"]) for cell in notebook["cells"])
    for linked in re.findall(re.escape(COLAB) + r"([\w./]+)", text):
        assert (FOLDER / linked).is_file()
    for linked in re.findall(re.escape(SOURCE) + r"([\w./]+)", text):
        assert (ROOT / linked).is_file()


def test_all_install_alike():
    """One cell, four times: a change of it is a change of all. Training keeps its files in a bucket."""
    cells = set()
    for name in NAMES:
        notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        cell = next(cell.source for cell in notebook.cells if cell.cell_type == "code")
        cells.add(cell.replace("[train,gcs{extra}]", "[train{extra}]"))
    assert len(cells) == 1 and "SE_FLAX_SMALL" in cells.pop()


# --- Running them -----------------------------------------------------------------------------------------------------

# TensorFlow cannot be imported: no notebook may need it.
WITHOUT_TENSORFLOW = "import runpy, sys; sys.modules['tensorflow'] = None; runpy.run_path(sys.argv[1])"


def environment(**more):
    """Small settings, one device, and the test run's compilation cache."""
    kept = {key: value for key, value in os.environ.items() if key not in ("XLA_FLAGS", "MPLBACKEND")}
    return {**kept, "SE_FLAX_SMALL": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **more}


def execute(script, folder, **more):
    """Runs a script in an empty folder; returns what it printed."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-c", WITHOUT_TENSORFLOW, str(script)]
    done = subprocess.run(command, cwd=folder, env=environment(**more), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def has_a_picture(path):
    """Whether a figure has something in it: more than one colour, and of a readable size."""
    with Image.open(path) as picture:
        return min(picture.size) > 200 and len(picture.convert("RGB").getcolors(1 << 24)) > 50


def test_restore(tmp_path):
    printed = execute(FOLDER / "restore.py", tmp_path)
    assert "seresnet20 {'data': 'digits', 'steps': 30" in printed
    # Below each picture's name its five likeliest classes; thirty steps are enough for a three.
    three = printed.split("\nthree\n")[1].splitlines()
    assert three[0].endswith("  3") and three[5] == "eight"
    shares = [float(line.split()[0]) for line in three[:5]]
    assert shares == sorted(shares, reverse=True) and 100 / 10 < shares[0] <= sum(shares) <= 100.3
    assert has_a_picture(tmp_path / "gates.png") and has_a_picture(tmp_path / "layers.png")


def test_finetune(tmp_path):
    printed = execute(FOLDER / "finetune.py", tmp_path)
    assert "{'china': 200, 'flower': 200}" in printed
    # Even on random weights a linear classifier tells a sky from a flower bed.
    right, count = map(int, re.search(r"top-1 [\d.]+ % \((\d+) of (\d+)\)", printed).groups())
    assert count == 40 and right >= 28  # chance alone gets there once in a hundred times
    assert has_a_picture(tmp_path / "runs/finetuned/curves.png") and has_a_picture(tmp_path / "answers.png")
    settings = json.loads((tmp_path / "runs/finetuned/config.json").read_text())
    assert settings["optim.train_only"] == "head" and settings["init_from"] == "start"


def test_own_model(tmp_path):
    printed = execute(FOLDER / "own_model.py", tmp_path)
    parameters = dict(re.findall(r"^(.+?) +([\d,]+) parameters", printed, re.MULTILINE))
    plain = 9 * (1 * 16 + 16 * 32 + 32 * 64) + 16 + 32 + 64 + 64 * 10 + 10
    # Two layers with biases and a quarter of the channels between them; three kernels of the length that C asks for.
    attention = sum(2 * c * (c // 4) + c // 4 + c for c in (16, 32, 64))
    assert {name: int(count.replace(",", "")) for name, count in parameters.items()} == {
        "none": plain,
        "SE, reduction 4": plain + attention,
        "ECA": plain + 3 + 3 + 3,
    }
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", printed).groups())
    assert abs(first - 2.3) < 0.3 and last < 0.7 * first  # log(10) at the start
    differences = [float(x) for x in re.findall(r"largest difference: (\S+)", printed)]
    assert len(differences) == 2 and max(differences) < 1e-5
    assert "on each device: (4, 8, 8, 1) of (32, 8, 8, 1)" in printed
    assert "on each device: (4, 4, 4, 16) of (8, 4, 4, 64)" in printed
    one, eight, apart = re.search(r"one device (\S+), on eight (\S+); gradients apart by (\S+)", printed).groups()
    assert abs(float(one) - float(eight)) < 1e-5 and float(apart) < 1e-5
    forward, backward = map(int, re.search(r"forward (\d+) - with gradients (\d+)", printed).groups())
    assert forward == 0 and backward > 0
    assert has_a_picture(tmp_path / "losses.png")


IN_A_KERNEL = """
import sys, nbformat, nbclient
notebook = nbformat.read(sys.argv[1], as_version=4)
nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
nbformat.write(notebook, sys.argv[1])
"""


def on_a_machine(folder, *command, **more):
    """Starts a program where no other one has left files."""
    (folder / "temporary").mkdir(parents=True)
    env = environment(TMPDIR=str(folder / "temporary"), **more)
    return subprocess.Popen(
        [sys.executable, "-c", *command], cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_training_goes_on_from_a_bucket_on_another_machine(tmp_path, monkeypatch):
    with bucket_servers.gcs_server() as port:
        servers = bucket_servers.environment("gs", port)
        for name, value in servers.items():
            monkeypatch.setenv(name, value)
        go_on_from_a_bucket(tmp_path, f"gs://{bucket_servers.BUCKET}/colab/run", servers)


def go_on_from_a_bucket(tmp_path, url, servers):
    def chosen(text):
        for old, new in (('KEEP = "drive"', 'KEEP = "bucket"'), ("gs://your-bucket/se-flax/run", url)):
            text = text.replace(old, new)
        return text

    first, second, bucket = tmp_path / "first", tmp_path / "second", ObjectStore(url)
    first.mkdir(), second.mkdir()
    script = chosen((FOLDER / "train_on_tpu.py").read_text())
    assert 'KEEP = "bucket"' in script and url in script
    (first / "notebook.py").write_text(script)
    run = on_a_machine(first, WITHOUT_TENSORFLOW, "notebook.py", **servers)
    deadline = time.monotonic() + 600
    while not any(name.endswith("digests.json") for name in bucket.find()):
        assert run.poll() is None and time.monotonic() < deadline, run.stderr.read() if run.poll() else ""
        time.sleep(0.1)
    run.kill()
    run.communicate()
    saved = {int(name.split("/")[1]) for name in bucket.find() if name.endswith("digests.json")}

    notebook = nbformat.read(FOLDER / "train_on_tpu.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = chosen(cell.source)
    nbformat.write(notebook, second / "notebook.ipynb")
    run = on_a_machine(second, IN_A_KERNEL, "notebook.ipynb", **servers)
    _, error = run.communicate(timeout=600)
    assert run.returncode == 0, error

    cells = nbformat.read(second / "notebook.ipynb", as_version=4).cells
    outputs = [output for cell in cells if cell.cell_type == "code" for output in cell.outputs]
    printed = "".join(output.text for output in outputs if output.output_type == "stream")
    resumed = int(re.search(r"resuming from step (\d+)", printed).group(1))
    assert resumed in saved
    right, count = map(int, re.search(r"best top-1 .*\ntop-1 [\d.]+ % \((\d+) of (\d+)\), top-5 ", printed).groups())
    assert count == 360 and right > 180
    assert [o for o in outputs if o.output_type == "display_data" and "image/png" in o.data]
    # The figures of both machines make one curve, and the bucket has all of it.
    rows = [json.loads(line) for line in bucket.read("metrics.jsonl").splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(2, 31, 2))
    assert {"model/se_flax.json", "curves.png"} <= bucket.find().keys()
