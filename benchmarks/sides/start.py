"""Times one start of a training: `python -m benchmarks.sides.start MODEL IMAGE_SIZE BATCH CACHE`; prints JSON."""

import time

_BEGUN = time.perf_counter()

import dataclasses  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from importlib.metadata import version  # noqa: E402

import jax  # noqa: E402
import numpy as np  # noqa: E402

from se_flax.runtime import keep_memory  # noqa: E402
from train.aot import lower_train_step, settings_for_model, with_batch  # noqa: E402
from train.optim.finetune import complete  # noqa: E402
from train.run.parallel import make_replicas  # noqa: E402
from train.run.program import make_program  # noqa: E402
from train.run.runtime import use_compilation_cache  # noqa: E402


def main() -> None:
    """Starts once, as `python -m train` does, and ends after the first update."""
    name, side, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    keep_memory()
    use_compilation_cache(sys.argv[4])
    marks = [_BEGUN, time.perf_counter()]
    config = dataclasses.replace(settings_for_model(name, side), precision="float32")
    config = complete(with_batch(config, batch, 1), None, None)
    replicas = make_replicas("shard_map", 1)
    program = make_program(config, config.model.num_classes, 1000.0, 1000)
    state = jax.block_until_ready(replicas.replicate(program.init()))
    marks.append(time.perf_counter())
    lowered = lower_train_step(config, program, replicas)
    marks.append(time.perf_counter())
    step = lowered.compile()
    marks.append(time.perf_counter())
    images = np.zeros((batch, side, side, 3), np.uint8)
    jax.block_until_ready(step(state, replicas.shard({"image": images, "label": np.zeros(batch, np.int32)})))
    marks.append(time.perf_counter())
    phases = dict(zip(("import", "parameters", "trace", "compile", "update"), np.diff(marks).tolist(), strict=True))
    print(json.dumps({"phases": phases, "versions": {"jax": jax.__version__, "se_flax": version("se-flax")}}))


if __name__ == "__main__":
    main()
