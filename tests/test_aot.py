"""Compiling ahead of time: the same program as a run's, and figures that arithmetic confirms."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import se_flax
from train import aot
from train.build import build_model
from train.cli import parse
from train.optim.finetune import complete
from train.run import loop, trainer
from train.run.init import trace
from train.run.parallel import Replicas, make_replicas
from train.run.program import make_program
from train.tools.costs import compile_step
from train.tools.hlo import Collective, array_bytes, collectives
from train.tools.topology import CHIPS, find_topology

ROOT = Path(__file__).parents[1]
DIGITS = [f"--config={ROOT / 'configs' / 'digits.py'}"]
SMALL = [*DIGITS, "--config.data.image_size=8", "--config.data.batch_size=16", "--config.precision=bfloat16"]
NEEDS_LIBTPU = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not there")


def figures(*words, capsys):
    assert aot.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(*words, capsys):
    assert aot.main(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    return err


# --- Is it the same program? ------------------------------------------------------------------------------------------


class Caught(Exception):
    """Ends a run where it would compile."""


@pytest.mark.parametrize("backend", ["shard_map", "pmap"])
def test_the_step_is_to_the_letter_the_one_that_a_run_compiles(tmp_path, monkeypatch, backend):
    settings = [*DIGITS, "--config.data.image_size=8", "--config.steps=5", "--config.optim.schedule=constant"]
    settings += [f"--config.parallel.backend={backend}", "--config.optim.warmup_epochs=0", "--config.augment.mixup=0"]

    def catch(self, batch):
        raise Caught(self.train_step.lower(self.state, batch).as_text())

    monkeypatch.setattr(trainer.Trainer, "compile", catch)
    config, _ = parse([*settings, "--config.compilation_cache=", f"--workdir={tmp_path}"])
    with pytest.raises(Caught) as caught:
        loop.run(config, tmp_path)

    config = complete(config, None, None)
    lowered = aot.lower_train_step(config, make_program(config, 10, 1, 5), make_replicas(backend, 0))
    assert lowered.as_text() == str(caught.value)


# --- Figures ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """One compilation for several tests."""
    topology = find_topology("cpu")
    config, _ = parse([*SMALL, "--workdir=none"])
    costs, text = aot.compile_run(config, topology)
    return config, costs, text


def test_arguments_are_state_and_batch(small):
    config, costs, _ = small
    shapes = trace(build_model(config, 10), 8).shapes
    params, stats = (sum(x.size for x in jax.tree.leaves(shapes[name])) for name in ("params", "batch_stats"))
    # Parameters, momentum and moving average; statistics and theirs; two counters (the step's and the schedule's) and
    # the key; on each of 8 devices two images with their labels.
    state = 4 * (3 * params + 2 * stats) + 4 + 4 + 8
    batch = 2 * (8 * 8 * 3 + 4)
    assert costs.argument_bytes == pytest.approx(state + batch, rel=1e-3)
    assert costs.donated_bytes == state
    # New state and four metrics (and a table of addresses, on a CPU).
    assert state + 16 <= costs.output_bytes <= state + 16 + 8 * 400


def test_collectives_are_gradients_statistics_and_two_means(small):
    config, costs, _ = small
    shapes = trace(build_model(config, 10), 8).shapes
    averaged = sum(x.size for x in jax.tree.leaves(shapes)) + 2  # the loss and the accuracy
    assert costs.collective_bytes == 4 * averaged
    assert set(costs.collectives) == {"all-reduce"}


def test_peak_is_the_sum_of_what_is_held_at_once(small):
    _, costs, _ = small
    held = costs.argument_bytes + costs.output_bytes - costs.donated_bytes + costs.temporary_bytes
    assert costs.temporary_bytes > 0
    assert held <= costs.peak_memory_bytes < 1.5 * held
    assert costs.fits


def test_a_device_that_is_too_small_is_said_to_be():
    class Compiled:
        """Stands for a program of the given figures; compiling the same one again would show nothing more."""

        def cost_analysis(self):
            return {"flops": 2.0, "bytes accessed": 3.0}

        def memory_analysis(self):
            names = ("argument", "output", "alias", "temp", "generated_code")
            sizes = dict(zip(names, (100, 90, 80, 1000, 7), strict=True))
            return type("Memory", (), {f"{name}_size_in_bytes": size for name, size in sizes.items()})

        def as_text(self):
            return ""

    lowered = type("Lowered", (), {"compile": lambda self: Compiled()})()
    exact, _ = compile_step(lowered, 1117)
    assert exact.peak_memory_bytes == 1117 and exact.fits
    assert not compile_step(lowered, 1116)[0].fits


@pytest.mark.parametrize(
    ("message", "gigabytes"),
    [
        # What libtpu 0.0.42 says, and what it says when the temporaries alone would fit.
        ("the total memory required for HLO temporaries (152.79G) exceeds available HBM (15.75G).", 152.79),
        ("XLA:TPU compile permanent error. Used 20.50G of 15.75G hbm. Exceeded hbm capacity by 4.75G.", 20.5),
        ("no figure", None),
    ],
)
def test_a_program_that_the_compiler_refuses_for_its_size_does_not_fit(message, gigabytes):
    def refuse(self):
        raise jax.errors.JaxRuntimeError(f"RESOURCE_EXHAUSTED: Ran out of memory: {message}")

    costs, text = compile_step(type("Lowered", (), {"compile": refuse})(), 16 * 2**30)
    assert not costs.fits
    assert costs.peak_memory_bytes == (gigabytes and round(gigabytes * 2**30))
    assert costs.flops is None and text == ""


def test_other_errors_of_the_compiler_are_not_hidden():
    def fail(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        compile_step(type("Lowered", (), {"compile": fail})(), 16 * 2**30)


def test_flops_of_an_evaluation_are_those_of_its_convolutions(capsys):
    """SE-ResNet-20: He et al. 2016, section 4.2 give 41 M multiply-adds at 32 pixels."""
    found = figures(*DIGITS, "--eval", "--config.data.image_size=32", "--batch-per-device=4", capsys=capsys)
    assert found["step"] == "eval" and found["batch_per_device"] == 4 and found["devices"] == jax.device_count()
    macs = found["flops"] / 2 / 4
    # Norms, activations and gates come on top; XLA leaves the zeros of a padded border out of its count.
    assert 0.85 * 41e6 < macs < 1.15 * 41e6
    assert found["collective_bytes"] == 16  # four sums


def test_compare_gives_both_and_the_ratios(capsys):
    found = figures(*SMALL, "--eval", "--compare", capsys=capsys)
    bare = figures(*SMALL, "--eval", "--without-attention", capsys=capsys)
    assert bare["attention"] is False and found["attention"] is True
    for name in ("flops", "bytes_accessed", "peak_memory_bytes", "collective_bytes"):
        assert found["without_attention"][name] == bare[name]
        assert found["ratios"][name] == pytest.approx(found[name] / bare[name], abs=1e-4)
    # The gates' parameters, in float32, are what the arguments differ by.
    with_, without = (
        sum(x.size for x in jax.tree.leaves(trace(se_flax.create_model(name), 8).shapes))
        for name in ("seresnet20", "resnet20")
    )
    assert found["argument_bytes"] - bare["argument_bytes"] == 4 * (with_ - without)


def test_a_network_without_a_recipe(capsys):
    found = figures("--model=seresnet20", "--image-size=8", "--batch-per-device=2", "--eval", capsys=capsys)
    assert found["precision"] == "bfloat16" and found["image_size"] == 8
    assert {"flops", "bytes_accessed", "peak_memory_bytes", "collective_bytes", "compile_seconds", "fits"} <= set(found)
    assert found["versions"]["jax"] == jax.__version__
    config = aot.settings_for_model("seresnet50", 0)
    assert (config.optim.name, config.optim.momentum, config.data.image_size) == ("sgd", 0.9, 224)
    assert config.model.num_classes == 1000


def test_lean_reaches_the_norms_and_the_record(capsys):
    config = dataclasses.replace(aot.settings_for_model("seresnet50", 32), lean=True)
    assert build_model(config, 10).norm.keywords["defer_conv"] is True
    found = figures("--model=seresnet20", "--image-size=8", "--batch-per-device=2", "--eval", "--lean", capsys=capsys)
    assert found["lean"] is True
    assert aot.main([*DIGITS, "--lean"]) == 2
    assert "--lean goes with --model; with a recipe give --config.lean=True" in capsys.readouterr().err


def test_the_table_names_every_figure(capsys, tmp_path):
    words = ["--model=seresnet20", "--image-size=8", "--batch-per-device=2", "--eval", f"--hlo={tmp_path / 'step.txt'}"]
    assert aot.main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith(
        f"seresnet20, evaluation step: {jax.device_count()} x cpu (cpu), 2 images of 8 pixels on each"
    )
    for title in ("bytes accessed", "arguments", "temporaries", "peak memory", "all-reduce", "fits", "compiled in"):
        assert title in out
    assert (tmp_path / "step.txt").read_text().startswith("HloModule")


def test_nothing_is_drawn_or_allocated(monkeypatch):
    monkeypatch.setattr(aot, "compile_step", lambda lowered, memory: (None, ""))
    monkeypatch.setattr(jax, "device_put", lambda *a, **k: pytest.fail("an array was placed"))
    before = sum(x.nbytes for x in jax.live_arrays())
    config = aot.with_batch(aot.settings_for_model("seresnet20", 32), 4096, jax.device_count())
    aot.compile_run(config, find_topology("cpu"))
    # Pixel means and a key; the parameters would be 1.1 MB, the batch 100 MB.
    assert sum(x.nbytes for x in jax.live_arrays()) - before < 10_000


# --- Reading HLO ------------------------------------------------------------------------------------------------------


def test_bytes_of_a_shape_are_numpys():
    for shape, dtype in (((128, 56, 56, 64), "float32"), ((), "int8"), ((3, 0), "float64"), ((7,), "complex64")):
        name = {"float32": "f32", "int8": "s8", "float64": "f64", "complex64": "c64"}[dtype]
        text = f"{name}[{','.join(map(str, shape))}]"
        assert array_bytes(text) == np.zeros(shape, dtype).nbytes
        assert array_bytes(f"({text}{{0:T(8,128)(2,1)S(1)}}, pred[5], {text})") == 2 * np.zeros(shape, dtype).nbytes + 5
    assert array_bytes("bf16[2,3]{1,0:T(4,128)(2,1)}") == 12
    assert array_bytes("token[]") == 0


@pytest.mark.parametrize(
    ("kind", "collective"),
    [
        ("all-reduce", lambda x: jax.lax.psum(x, "d")),
        ("all-gather", lambda x: jax.lax.all_gather(x, "d", tiled=True)),
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "d", tiled=True)),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "d", 0, 0, tiled=True)),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "d", [(i, (i + 1) % 8) for i in range(8)])),
    ],
)
def test_operands_of_collectives_are_counted(kind, collective):
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("d",))
    spread = jax.shard_map(
        collective, mesh=mesh, in_specs=PartitionSpec("d"), out_specs=PartitionSpec(), check_vma=False
    )
    text = jax.jit(spread).lower(jax.ShapeDtypeStruct((8 * 16, 5), jnp.float32)).compile().as_text()
    assert collectives(text) == {kind: Collective(1, 16 * 5 * 4)}


def test_an_operation_that_is_started_and_awaited_apart_counts_once():
    text = """
%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}

ENTRY %main (p: f32[256], q: bf16[8,128]) -> (f32[256], bf16[8,128]) {
  %p = f32[256]{0:T(256)} parameter(0)
  %q = bf16[8,128]{1,0:T(8,128)(2,1)} parameter(1)
  %all-reduce-start = (f32[256]{0:T(256)}, bf16[8,128]{1,0:T(8,128)(2,1)}) all-reduce-start(%p, %q), to_apply=%sum
  ROOT %all-reduce-done = (f32[256]{0:T(256)}, bf16[8,128]{1,0}) all-reduce-done(%all-reduce-start)
}
"""
    assert collectives(text) == {"all-reduce": Collective(1, 1024 + 2048)}


# --- Shapes stand for arrays ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["shard_map", "pmap"])
def test_shapes_are_those_of_the_arrays(backend):
    replicas = Replicas(tuple(jax.devices()), backend)
    batch = {"image": np.zeros((16, 2, 2, 3), np.uint8), "label": np.zeros(16, np.int32)}
    shapes = replicas.sharded_shapes({k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()})
    state = {"w": np.zeros((3, 4), np.float32)}
    pairs = [*zip(shapes.values(), replicas.shard(batch).values(), strict=True)]
    pairs.append((replicas.replicated_shapes(state)["w"], replicas.replicate(state)["w"]))
    for shape, array in pairs:
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype)
        assert shape.sharding.is_equivalent_to(array.sharding, array.ndim)


# --- What a person may get wrong --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology=v5e:2x2x2", "--model=seresnet50"], "v5e has 2 axes: give the chips along each, as v5e:2x2, 2x4"),
        (["--topology=v5:2x2", "--model=seresnet50"], "unknown topology 'v5:2x2'; closest: v5"),
        (["--topology=gpu", "--model=seresnet50"], "give cpu, or a TPU such as v5e:2x2"),
        (["--topology=cpu"], "give either --config=configs/<recipe>.py or --model=<network>, and not both"),
        (
            ["--model=seresnet50", *DIGITS],
            "give either --config=configs/<recipe>.py or --model=<network>, and not both",
        ),
        (["--model=seresnet5"], "unknown model 'seresnet5'; closest: seresnet56, seresnet50"),
        (["--model=seresnet50", "--config.seed=1"], "overrides are for a recipe"),
        ([*DIGITS, "--image-size=8"], "with a recipe give --config.data.image_size"),
        ([*DIGITS, "--config.model.name="], "name it with --config.model.name"),
        (["--model=resnet50", "--compare"], "resnet50 has no attention that could be left out"),
        (["--model=seresnet50", "--batch-per-device=0"], "got '0', a whole number from 1 is expected"),
        (["--model=seresnet50", "--compare", "--without-attention"], "not allowed with argument --compare"),
        (["--model=seresnet50", "--jsn"], "unknown argument '--jsn'"),
        ([*DIGITS, "--config.optim.learning_rat=1"], "unknown setting 'optim.learning_rat'"),
        ([*DIGITS, "--config.data.batch_size=9"], "data.batch_size=9 does not divide into 8 equal parts"),
        ([*DIGITS, "--config.parallel.devices=9"], r"parallel.devices=9, but the topology has 8 cpu device\(s\)"),
    ],
)
def test_mistakes_are_one_sentence(words, message, capsys):
    assert re.search(message, refusal(*words, capsys=capsys))


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="the TPU compiler is there")
def test_without_libtpu_one_line_says_how_to_get_it(capsys):
    error = refusal("--model=seresnet50", "--topology=v5e:2x2", capsys=capsys)
    assert "--topology=v5e:2x2 needs the TPU compiler, which is not installed; pip install 'se-flax[tpu]'" in error


# --- A TPU that is not there ------------------------------------------------------------------------------------------

TINY = ("--model=seresnet20", "--image-size=8", "--batch-per-device=2")


def in_a_process(*words):
    """A process of its own: libtpu reads its environment once."""
    command = [sys.executable, "-m", "train.aot", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)


@NEEDS_LIBTPU
def test_a_step_compiles_for_a_tpu():
    done = in_a_process(*TINY, "--eval", "--topology=v5e:2x2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["device_kind"], found["devices"], found["memory_bytes"]) == ("TPU v5 lite", 4, 16 * 2**30)
    assert found["fits"] and found["flops"] > 1e6 and found["collective_bytes"] == 16
    assert "libtpu" in found["versions"]


@NEEDS_LIBTPU
@pytest.mark.parametrize(("name", "count"), [("v4:2x2x1", 4), ("v5e:1x1", 1), ("v5p:2x2x1", 4), ("v6e:2x4", 8)])
def test_every_generation_has_one_device_per_chip(name, count):
    code = (
        f"from train.tools.topology import find_topology as f; t = f({name!r}); print(len(t.devices), t.memory_bytes)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == [str(count), str(CHIPS[name.split(":")[0]].memory_gib * 2**30)], done.stderr


@NEEDS_LIBTPU
def test_a_layout_that_is_not_made_is_refused():
    done = in_a_process(*TINY, "--topology=v5e:3x3")
    assert done.returncode == 2
    assert "libtpu does not know --topology=v5e:3x3" in done.stderr.splitlines()[-1]
