"""The settings of a training run on a table: plain typed data, checked once before anything is read.

A recipe (`configs/ctr_<name>.py`) builds a `Config` in `get_config()`; the command line overrides single fields.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from se_flax.errors import UserError, closest
from train.config import Settings


@dataclass
class Model:
    """The network."""

    name: str = "fibinet"  # lr (logistic regression) | fm (factorisation machine) | fibinet
    embedding_size: int = 10  # fm, fibinet
    hidden: tuple[int, ...] = (400, 400, 400)  # fibinet: widths of the perceptron; () is the shallow network
    attention: str = "fibinet"  # fibinet: fibinet (ReLU twice, r=3, no bias) | sigmoid (r=4, rounded up) | none
    reduction: float = 0.0  # fibinet: r; 0 takes the form's own
    bilinear: str = "interaction"  # fibinet: all | each | interaction | hadamard
    dropout: float = 0.0  # fibinet: after each hidden layer


@dataclass
class Data:
    """Where rows come from, which columns they have and how these become ids."""

    train: str = ""  # csv:<path> | libsvm:<path> | npz:<path>:<name>; a path may have * and end in .gz
    eval: str = ""  # likewise, for early stopping; empty: a share of train
    test: str = ""  # likewise, used once at the end; empty: a share of train, where test_fraction is set
    eval_fraction: float = 0.1  # share of train held out where eval is empty ...
    test_fraction: float = 0.0  # ... and where test is empty; 0: no test rows
    split_seed: int = 0  # which rows these are
    columns: str = ""  # csv: names in the file's order, such as label,I1-I13,C1-C26; empty: its first line has them
    delimiter: str = ","  # csv: tab is written \t
    label: str = "label"  # csv: column with 0 or 1
    numeric: str = ""  # csv: columns such as I1-I13
    categorical: str = ""  # csv: columns such as C1-C26; what is named in neither is left out
    missing: str = ""  # csv: text of a missing value, beside the empty one
    bucketing: str = "quantile"  # numeric: quantile (of the training rows) | log (floor(log(x)^2), needs no first pass)
    quantiles: int = 32  # buckets per numeric field
    encoding: str = "vocabulary"  # categorical: vocabulary (of the training rows) | hash (needs no first pass)
    min_count: int = 1  # vocabulary: rarer values share one id with unseen ones
    hash_buckets: int = 100_000  # hash: ids per field
    chunk_rows: int = 16_384  # rows read at a time
    shuffle_rows: int = 262_144  # rows that the shuffle buffer holds
    batch_size: int = 1024
    eval_batch_size: int = 0  # 0: batch_size


@dataclass
class Optim:
    """Adam and what is added to the loss."""

    learning_rate: float = 1e-3
    l2: float = 0.0  # times half the sum of squares of all embeddings, the linear weights included
    non_finite: str = "stop"  # loss or gradient: stop | skip (the update, and count it)
    patience: int = 2  # evaluations without a better AUC after which the run ends; 0: never


@dataclass
class Checkpoint:
    """When state is written and what is kept."""

    every_steps: int = 0  # beside the one at the end of every epoch; 0: none
    keep_last: int = 2  # newest ones; two are kept at least
    keep_best: int = 1  # by evaluation AUC


@dataclass
class Config(Settings):
    """A whole run on a table."""

    program = "train.ctr"
    loop = "train.ctr.loop"

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    epochs: int = 10
    log_every_steps: int = 50
    seed: int = 0
    compilation_cache: str = "~/.cache/se-flax/xla"  # empty: off


_CHOICES = {
    "model.name": ("lr", "fm", "fibinet"),
    "model.attention": ("fibinet", "sigmoid", "none"),
    "model.bilinear": ("all", "each", "interaction", "hadamard"),
    "data.bucketing": ("quantile", "log"),
    "data.encoding": ("vocabulary", "hash"),
    "optim.non_finite": ("stop", "skip"),
}
_AT_LEAST = {
    "model.embedding_size": 1,
    "model.reduction": 0,
    "data.quantiles": 2,
    "data.min_count": 1,
    "data.hash_buckets": 1,
    "data.chunk_rows": 1,
    "data.shuffle_rows": 0,
    "data.batch_size": 1,
    "data.eval_batch_size": 0,
    "optim.l2": 0,
    "optim.patience": 0,
    "checkpoint.every_steps": 0,
    "checkpoint.keep_last": 1,
    "checkpoint.keep_best": 0,
    "epochs": 1,
    "log_every_steps": 1,
    "seed": 0,
    "data.split_seed": 0,
}


def _value(config: Config, name: str) -> object:
    value: object = config
    for part in name.split("."):
        value = getattr(value, part)
    return value


def check(config: Config) -> None:
    """Refuses settings that no run can have.

    Raises:
      UserError: one of them is out of range; the sentence names it.
    """
    if config.optim.non_finite == "rollback":
        raise UserError("got optim.non_finite='rollback', which runs on tables do not have; give stop or skip")
    for name, allowed in _CHOICES.items():
        value = _value(config, name)
        if value not in allowed:
            raise UserError(f"unknown {name} {value!r}; {closest(str(value), allowed)}")
    for name, least in _AT_LEAST.items():
        value = _value(config, name)
        if not isinstance(value, int | float) or not value >= least:
            raise UserError(f"got {name}={value}; it must be at least {least}")
    if not config.optim.learning_rate > 0:
        raise UserError(f"got optim.learning_rate={config.optim.learning_rate}; it must be positive")
    if not 0 <= config.model.dropout < 1:
        raise UserError(f"got model.dropout={config.model.dropout}; a probability below 1 is allowed")
    if any(width < 1 for width in config.model.hidden):
        raise UserError(f"got model.hidden={tuple(config.model.hidden)}; widths must be at least 1, () has no layer")
    data = config.data
    if not data.train:
        raise UserError("data.train is empty; give --config.data.train=csv:<path>, libsvm:<path> or npz:<path>:<name>")
    for name, share in (("eval_fraction", data.eval_fraction), ("test_fraction", data.test_fraction)):
        if not 0 <= share < 1:
            raise UserError(f"got data.{name}={share}; a share below 1 is allowed")
    if not data.eval and not data.eval_fraction:
        raise UserError("there is nothing to evaluate on: set data.eval to a file, or data.eval_fraction above 0")
    if data.eval_fraction + data.test_fraction >= 1:
        raise UserError(
            f"data.eval_fraction={data.eval_fraction} and data.test_fraction={data.test_fraction} leave nothing to "
            "train on; their sum must be below 1"
        )


_MOST_COLUMNS = 100_000


def expand(names: str) -> tuple[str, ...]:
    """Column names from a setting.

    Args:
      names: separated by commas; `I1-I13` stands for I1, I2, ..., I13.

    Returns:
      The names in order.

    Raises:
      UserError: a range that ends before it starts, a name given twice, or more names than a table has.
    """
    found: list[str] = []
    for part in (p.strip() for p in names.split(",")):
        if part:
            found.extend(_range(part))
        if len(found) > _MOST_COLUMNS:
            raise UserError(f"{names!r:.80} names over {_MOST_COLUMNS:,} columns; name those of the file")
    twice = sorted(name for name, count in Counter(found).items() if count > 1)
    if twice:
        raise UserError(f"column {twice[0]!r} is named twice in {names!r}; name each column once")
    return tuple(found)


def _range(part: str) -> Sequence[str]:
    first, dash, last = part.partition("-")
    stem = first.rstrip("0123456789")
    low, high = first[len(stem) :], last[len(stem) :]
    if not dash or not last.startswith(stem) or not re.fullmatch("[0-9]{1,9}-[0-9]{1,9}", f"{low}-{high}"):
        return [part]
    if int(low) > int(high):
        raise UserError(f"the range of columns {part!r} ends before it starts; write {stem}{high}-{stem}{low}")
    last_one = min(int(high), int(low) + _MOST_COLUMNS)  # one more than is allowed
    return [f"{stem}{i}" for i in range(int(low), last_one + 1)]
