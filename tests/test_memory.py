"""Memory that stays in a process, and arrays that are computed once for all their readers."""

import ctypes
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_flax import runtime
from se_flax.lowering.dispatch import share_computation

# glibc's counters (mallinfo2) around a call of a compiled function whose result has 256 MB: by how much the bytes in
# mappings of their own grow with it, and by how much the heap shrinks when it is deleted.
PROBE = """
import ctypes, sys, time
import jax, jax.numpy as jnp
from se_flax.runtime import keep_memory

class Counters(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

counters = ctypes.CDLL(None).mallinfo2
counters.restype = Counters
if sys.argv[1] == "keep":
    assert keep_memory()
double = jax.jit(lambda x: x + x)
x = jnp.ones((1 << 13, 1 << 13))
double(x).block_until_ready()
before = counters()
for _ in range(20):  # the computation's thread may hold the first result for a moment longer
    time.sleep(0.05)
    now = counters()
    before = now if now.hblkhd < before.hblkhd else before
y = double(x).block_until_ready()
during = counters()
y.delete()
print(during.hblkhd - before.hblkhd, during.arena - counters().arena)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc's malloc is what the settings are for")
def test_a_freed_result_stays_in_the_process():
    grown = {}
    for mode in ("keep", "free"):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        words = [sys.executable, "-c", PROBE, mode]
        done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
        grown[mode] = [int(word) for word in done.stdout.split()]
    size = 4 << 26
    mapped, shrunk = grown["keep"]
    assert mapped < size / 2 and shrunk < size / 2
    assert grown["free"][0] >= size  # a mapping of its own, which goes when the result does


# Leaves with the number of devices set where the program keeps its memory, which cannot be set once JAX has looked.
FIRST = """
import sys
import jax
import {module} as module
def keep_memory():
    jax.config.update("jax_num_cpu_devices", 3)
    sys.exit(jax.device_count())
module.keep_memory = keep_memory
{start}
"""


@pytest.mark.parametrize(
    ("module", "start"),
    [
        ("train.run.loop", "from train.cli import main; main(['--config=configs/digits.py', '--workdir=never-made'])"),
        (
            "train.ctr.loop",
            "from train.cli import main; main(['--config=configs/ctr_frappe.py', '--workdir=never-made'])",
        ),
        ("se_flax.cli.images", "from se_flax.cli import main; main(['predict', 'no-such-folder', sys.executable])"),
    ],
)
def test_programs_keep_memory_before_jax_looks_for_devices(module, start):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    words = [sys.executable, "-c", FIRST.format(module=module, start=start)]
    done = subprocess.run(words, capture_output=True, text=True, env={**environment, "JAX_PLATFORMS": "cpu"})
    assert done.returncode == 3, done.stderr


def test_other_systems_are_left_alone(monkeypatch):
    class Libc:
        pass

    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda name: Libc())
    assert not runtime.keep_memory()


def residual_chain(depth, share):
    def run(x, kernels):
        for kernel in kernels:
            branch = (x.reshape(-1, 8) @ kernel).reshape(x.shape)
            x = share(jnp.maximum(x + branch, 0.0))
        return x

    return run, (jnp.ones((2, 16, 16, 8)), [jnp.eye(8)] * depth)


@pytest.mark.program
def test_a_sum_that_two_layers_read_is_computed_once():
    def sums(share):
        run, operands = residual_chain(6, share)
        return jax.jit(run).lower(*operands).compile().as_text().count(" maximum(")

    assert sums(share_computation) == 6 < sums(lambda x: x)


def test_computing_once_changes_no_number():
    shared, operands = residual_chain(3, share_computation)
    plain, _ = residual_chain(3, lambda x: x)

    def value(f):
        return lambda *x: jnp.sum(jnp.sin(f(*x)))

    for transform in (lambda f: f, jax.jit, lambda f: jax.grad(value(f), (0, 1)), jax.vmap):
        x, kernels = operands
        given = (x, jnp.stack(kernels)) if transform is not jax.vmap else (x, jnp.stack([jnp.stack(kernels)] * 2))
        jax.tree.map(np.testing.assert_array_equal, transform(shared)(*given), transform(plain)(*given))
    forward = jax.jvp(lambda x: shared(x, operands[1]), (operands[0],), (operands[0],))
    np.testing.assert_array_equal(forward[0], forward[1])  # homogeneous: ReLU and products
