"""Studies of many runs: every cell of an axis, several seeds each, one table. `python -m train.ablation --help`.

Each run is one of `python -m train` in a folder of its own; what is finished is not run again.
"""

import json
import runpy
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from se_flax.cli.layout import reflowed
from se_flax.errors import UserError, closest
from train.cli import exit_code, parse
from train.config import SAME_NUMBERS, Config, changed_settings, flatten
from train.tools import results_file
from train.tools.ablation_table import Cell, Results, write_tables

USAGE = """\
Train every cell of an ablation with several seeds, and write one table.

  python -m train.ablation --config=configs/ablation.py:reduction \\
      --workdir=runs/reduction --seeds=3

  --config=FILE:AXIS         the study. Axes of configs/ablation.py: reduction, squeeze, excitation, stages, placement,
                             3x3, nosqueeze, attention, all. AXIS@RECIPE takes the settings of configs/RECIPE.py
                             (reduction@imagenet, reduction@cifar100:seresnet110; otherwise cifar10)
  --workdir=DIR              table.md, table.csv and one folder per run, DIR/<cell>/seed<n>
  --seeds=N                  so many seeds, 0 to N - 1 (default: 3); or the seeds themselves: --seeds=0,3,7, for one of
                             them --seeds=7,
  --cells=A,B                only these cells of the axis (default: all)
  --results=FILE             a file of finished runs, to which every run adds a line; runs that are in it are not run
                             again. Concatenate the files of several machines to merge them
  --config.A.B=VALUE         overrides one setting of every cell; python -m train --help lists them
  --help                     this text

The same command again skips the runs that are finished and continues the one that was stopped. The table has the error
of the last evaluation of each run (not of the best one): mean and standard deviation over the seeds, and the mean
difference from the cell `none`, seed by seed. It is written anew after every run.
"""

RESULT = "result.json"
_OWN = ("--config", "--workdir", "--seeds", "--cells", "--results")


@dataclass(frozen=True)
class Study:
    """Which runs a command line asks for.

    Attributes:
      title: of the table.
      recipe: file and axis, with what follows `@` apart.
      suffix: `@recipe`, or empty.
      cells: to run.
      seeds: of each.
      workdir: where everything goes.
      words: of the command line that every run gets.
      results: file of finished runs of any machine, or None.
    """

    title: str
    recipe: str
    suffix: str
    cells: tuple[Cell, ...]
    seeds: tuple[int, ...]
    workdir: Path
    words: tuple[str, ...]
    results: Path | None = None

    @property
    def name(self) -> str:
        """Axis and recipe, by which a file of results tells studies apart."""
        return self.title + self.suffix

    def folder(self, cell: Cell, seed: int) -> Path:
        """Where a run leaves its files."""
        return self.workdir / cell.name / f"seed{seed}"

    def config(self, cell: Cell, seed: int) -> Config:
        """Settings of a run.

        Raises:
          UserError: the command line has a setting that is wrong.
        """
        recipe = f"--config={self.recipe}={cell.name}{self.suffix}"
        config, _ = parse([*self.words, recipe, f"--workdir={self.workdir}", f"--config.seed={seed}"])
        return config


def read_study(words: Sequence[str]) -> Study:
    """Reads a command line.

    Args:
      words: without the program's name.

    Returns:
      The study.

    Raises:
      UserError: something is missing, unknown or wrong; every cell's settings are read before anything runs.
    """
    own: dict[str, str] = {}
    rest: list[str] = []
    waiting = iter(words)
    for word in waiting:
        name, equals, value = word.partition("=")
        if name in _OWN:
            own[name] = value if equals else next(waiting, "")
        else:
            rest.append(word)
    for name, example in (("--config", "configs/ablation.py:reduction"), ("--workdir", "runs/reduction")):
        if not own.get(name):
            raise UserError(f"{name}={example} is missing (python -m train.ablation --help)")
    recipe, at, base = own["--config"].partition("@")
    file, _, axis = recipe.partition(":")
    get_cells = runpy.run_path(file).get("get_cells") if Path(file).is_file() else None
    if get_cells is None:
        raise UserError(f"{file} is no study: it has no function get_cells(); see configs/ablation.py")
    if not axis or "=" in axis:
        raise UserError(f"got --config={own['--config']}; name an axis, such as {file}:reduction")
    cells = get_cells(axis)
    if "--cells" in own:
        named = {cell.name: cell for cell in cells}
        for name in own["--cells"].split(","):
            if name not in named:
                raise UserError(f"the axis {axis} has no cell {name!r}; {closest(name, named)}")
        cells = tuple(cell for cell in cells if cell.name in own["--cells"].split(","))
    study = Study(
        title=axis,
        recipe=recipe,
        suffix=at + base,
        cells=cells,
        seeds=_seeds(own.get("--seeds", "3")),
        workdir=Path(own["--workdir"]).expanduser().absolute(),
        words=tuple(rest),
        results=Path(own["--results"]).expanduser().absolute() if own.get("--results") else None,
    )
    for cell in cells:
        if not study.config(cell, 0).model.name:
            raise UserError("the recipe names no network; add one, such as --config.model.name=resnet18")
    return study


def _seeds(text: str) -> tuple[int, ...]:
    try:
        numbers = [int(part) for part in text.removesuffix(",").split(",")]
    except ValueError:
        numbers = []
    seeds = tuple(range(numbers[0])) if "," not in text and numbers else tuple(numbers)
    if not seeds or len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise UserError(f"got --seeds={text}; give how many (3), or different seeds (0,1,2; one alone is 7,)")
    return seeds


def run_study(study: Study, run: Callable[[Config, Path], Any], say: Callable[[str], None]) -> bool:
    """Trains what is not finished, seed by seed, so that a study that is stopped is a whole one of fewer seeds.

    Args:
      study: the cells and seeds.
      run: trains one run in its folder, as `train.run.loop.run` does.
      say: prints a line of progress.

    Returns:
      False when a signal stopped it before the end.

    Raises:
      UserError: settings or data are not usable, or the folder holds another study.
    """
    runs = [(cell, seed) for seed in study.seeds for cell in study.cells]
    elsewhere = results_of(study)
    results = {
        (cell.name, seed): read_result(study, cell, seed) or elsewhere.get((cell.name, seed)) for cell, seed in runs
    }
    done = sum(result is not None for result in results.values())
    if done:
        say(f"{done} of {len(runs)} runs are finished already")
    for number, (cell, seed) in enumerate(runs, start=1):
        if results[cell.name, seed] is not None:
            continue
        say(f"run {number} of {len(runs)}: {study.title} {cell.name}, seed {seed}")
        config, folder = study.config(cell, seed), study.folder(cell, seed)
        started, settings = time.monotonic(), flatten(config)
        figures: dict[str, Any]
        try:
            outcome = run(config, folder)
        except UserError as error:
            if not str(error).startswith("the loss became"):
                raise
            # A network that cannot be trained so is a finding, and no reason to leave out the others.
            figures = {"diverged": str(error)}
            say(f"diverged: {error}")
        else:
            if not outcome.completed:
                return False
            r = outcome.result
            figures = {"count": r.count, "top1": r.top1, "loss": r.loss}
            figures |= {} if r.top5 is None else {"top5": r.top5}
        network = network_costs(config)
        seconds = round(time.monotonic() - started, 1)
        result = {**figures, **network, "seconds": seconds, "config": settings}
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"{RESULT}.partial"
        partial.write_text(json.dumps(result, indent=2) + "\n")
        partial.replace(folder / RESULT)
        results[cell.name, seed] = json.loads(json.dumps(result))
        if study.results is not None:
            results_file.append(study.results, study.name, (cell.name, seed), result, folder)
        _write(study, results)
    _write(study, results)
    return True


def _write(study: Study, results: Results) -> None:
    config = study.config(study.cells[0], study.seeds[0])
    length = f"{config.steps} steps" if config.steps else f"{config.epochs:g} epochs"
    title = f"{study.title}: {config.model.name} on {config.data.source}, {length}"
    write_tables(study.workdir, title, study.cells, study.seeds, results)


def network_costs(config: Config) -> dict[str, int]:
    """Parameters and multiply-adds of a run's network, as the paper counts them."""
    from se_flax.analysis.costs import costs
    from train.build import build_model
    from train.data.sources import open_data

    classes = config.model.num_classes or len(open_data(config.data).class_names)
    counted = costs(build_model(config, classes), config.data.image_size)
    return {"params": counted.params, "macs_paper": counted.macs_paper}


def read_result(study: Study, cell: Cell, seed: int) -> dict[str, Any] | None:
    """The result of a finished run; None if it is not finished.

    Raises:
      UserError: it was another run's.
    """
    path = study.folder(cell, seed) / RESULT
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    here = json.loads(json.dumps(flatten(study.config(cell, seed))))
    changed = changed_settings(result["config"], here, SAME_NUMBERS)
    if changed:
        raise UserError(
            f"{path.parent} holds a result of another study ({'; '.join(changed[:3])}); use another --workdir, or the "
            "settings of that study"
        )
    return result


def results_of(study: Study) -> dict[tuple[str, int], dict[str, Any]]:
    """The finished runs in the study's file of results.

    Raises:
      UserError: the file has runs of the study with other settings.
    """
    if study.results is None:
        return {}
    found = results_file.runs_of(results_file.read(study.results), study.name, str(study.results))
    cells = {cell.name: cell for cell in study.cells}
    for (cell, seed), row in found.items():
        if cell in cells:
            here = json.loads(json.dumps(flatten(study.config(cells[cell], seed))))
            results_file.check_same_study(row, here, str(study.results))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program.

    Args:
      argv: words of the command line, without the program's name; the process's own when None.

    Returns:
      The exit code: 0 done, 2 a mistake of the user's (one sentence on stderr), 130 stopped early by a signal.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("-h", "--help", "-help") for word in words):
        print(reflowed(USAGE))
        return 0

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def study() -> int:
        asked = read_study(words)
        if not run_study(asked, _run, say):
            say("stopped; run the same command to continue")
            return 130
        print((asked.workdir / "table.md").read_text())
        return 0

    return exit_code(study)


def _run(config: Config, folder: Path) -> Any:
    import jax

    from train.run.loop import run  # imports JAX, which a wrong flag need not wait for

    outcome = run(config, folder)
    jax.clear_caches()  # the next network is another program
    return outcome


if __name__ == "__main__":
    sys.exit(main())
