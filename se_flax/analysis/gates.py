"""Statistics of channel gates over a data set, and the accuracy with gates replaced by their means.

The network needs no change: `nn.intercept_methods` reads and replaces its channel gates while it is traced. The sums
are accumulated in float64 on the host, so memory grows with the number of classes, not of images.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from se_flax.errors import UserError

Array = jax.Array
Floats = NDArray[np.float64]
Batches = Iterable[tuple[np.ndarray, int]]
"""Images [B, H, W, C], with the same B in every batch, and the number of them before the padding at the end."""

EVERY_LAYER = "all layers"
UNCHANGED = "none"


@contextmanager
def _visited(visit: Callable[[str, Array], Array]) -> Iterator[None]:
    """Applies a function to every channel gate, with the path of its module, while a network is traced."""

    def call(method: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        module: Any = context.module
        name = "/".join(module.path) or type(module).__name__
        if context.method_name == "gates":
            return visit(name, method(*args, **kwargs))
        return method(*args, **kwargs)

    with nn.intercept_methods(call):
        yield


def apply_with_gates(
    model: nn.Module,
    variables: Mapping[str, Any],
    images: Array,
    means: Mapping[str, Array] | None = None,
    replaced: Mapping[str, Array] | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Runs a network in evaluation mode and returns its channel gates too; can be jitted.

    The gates are those of squeeze-and-excitation, ECA, effective SE, the channel half of CBAM, global context, and of
    any module that computes its gates in a method `gates`.

    Args:
      model: a network of the zoo, or another with such modules.
      variables: its variables.
      images: [N, H, W, C].
      means: replacements of the gates, float [channels] by layer.
      replaced: whether to replace the gates, bool scalars by layer, which may be traced; False for a layer that is
        absent.

    Returns:
      The logits; and the computed gates, before any replacement, float32 [N, channels] by layer (path of the attention
      module, `layer1_0/se`), in the order of the calls. Gates per pixel (no squeeze) are averaged over the map.

    Raises:
      UserError: a module computes its gates twice, so that the layers cannot be distinguished.
    """
    gates: dict[str, Array] = {}

    def visit(name: str, gate: Array) -> Array:
        if name in gates:
            raise UserError(f"the attention {name} is called twice; only networks that call each once can be analysed")
        gates[name] = jnp.mean(gate.astype(jnp.float32), axis=(1, 2)) if gate.ndim == 4 else gate
        if means is None or replaced is None or name not in replaced:
            return gate
        return jnp.where(replaced[name], means[name].astype(gate.dtype), gate)

    with _visited(visit):
        logits = model.apply(variables, images)
    return jnp.asarray(logits), gates


def gate_layers(model: nn.Module, variables: Mapping[str, Any], image_size: int) -> dict[str, int]:
    """The layers of `apply_with_gates`, without computing anything.

    Args:
      model: a network.
      variables: its variables, or their shapes.
      image_size: height and width of the images.

    Returns:
      Channels by layer, in the order of the calls.

    Raises:
      UserError: the network has no channel gates.
    """
    channels: dict[str, int] = {}

    def trace(variables: Any, images: Any) -> None:
        # JAX's transformations sort the keys of their results, so the order of the calls must be read here.
        channels.update({name: gate.shape[-1] for name, gate in apply_with_gates(model, variables, images)[1].items()})

    shape = (1, image_size, image_size, getattr(model, "in_channels", 3))
    jax.eval_shape(trace, dict(variables), jax.ShapeDtypeStruct(shape, jnp.float32))
    if not channels:
        raise UserError(
            "this network has no channel gates to read; choose one with squeeze-and-excitation, ECA, effective SE, "
            "CBAM or global context attention"
        )
    return channels


@dataclass(frozen=True)
class LayerGates:
    """Statistics of one layer's gates over a data set. Standard deviations are biased (divided by N).

    Attributes:
      mean: [C], over all images.
      std: [C].
      minimum: [C].
      maximum: [C].
      closed: share of the gates, over images and channels, below the lower threshold.
      open: share of the gates above the upper threshold.
      dead: share of the channels with a closed gate for every image.
      saturated: share of the channels with an open gate for every image.
      class_means: [K, C], in the order of the class numbers.
      group_means: [G, C].
      group_std: [G, C].
      between: variance between the groups' means over the total variance, among the images of all groups and summed
        over the channels. NaN if undefined: one group, or one image in each.
      chance: expected value of `between` for random groups, (G - 1) / (N - 1).
      permuted: [P], values of `between` for random groups of the same sizes.
    """

    mean: Floats
    std: Floats
    minimum: Floats
    maximum: Floats
    closed: float
    open: float
    dead: float
    saturated: float
    class_means: Floats
    group_means: Floats
    group_std: Floats
    between: float
    chance: float
    permuted: Floats


class GateStatistics:
    """Sums over the gates of a data set, which is added batch by batch.

    Args:
      layers: channels by layer, from `gate_layers`.
      labels: class of every image, in the order in which the images will be added.
      groups: class numbers by name of the group; each class is in one group at most.
      closed: threshold below which a gate is closed.
      open: threshold above which a gate is open.
      permutations: number of random groupings to compare with.
      seed: of the random groupings.
    """

    def __init__(
        self,
        layers: Mapping[str, int],
        labels: Sequence[int],
        groups: Mapping[str, Sequence[int]],
        *,
        closed: float = 0.1,
        open: float = 0.9,
        permutations: int = 99,
        seed: int = 0,
    ):
        self.labels = np.asarray(labels, np.int64)
        self.classes, self._row = np.unique(self.labels, return_inverse=True)
        self.groups = {name: tuple(members) for name, members in groups.items()}
        self._thresholds = closed, open
        self._done = 0
        group = np.full(len(self.labels), -1)
        for i, members in enumerate(self.groups.values()):
            group[np.isin(self.labels, members)] = i
        inside = np.flatnonzero(group >= 0)
        rng = np.random.default_rng(seed)
        self._group = np.tile(group, (permutations + 1, 1))  # the first row is the true grouping
        for row in self._group[1:]:
            row[inside] = rng.permutation(group[inside])
        self._sizes = np.bincount(group[inside], minlength=len(self.groups))
        self._sums = {name: self._empty(channels) for name, channels in layers.items()}

    def _empty(self, channels: int) -> dict[str, Floats]:
        count = len(self.groups)
        return {
            "class": np.zeros((len(self.classes), channels)),
            "square": np.zeros(channels),
            "group": np.zeros((len(self._group), count, channels)),
            "group_square": np.zeros((count, channels)),
            "minimum": np.full(channels, np.inf),
            "maximum": np.full(channels, -np.inf),
            "outside": np.zeros(2),
        }

    def add(self, gates: Mapping[str, np.ndarray]) -> None:
        """Adds the gates of the next images.

        Args:
          gates: [n, channels] by layer, for n images without padding.
        """
        count = len(next(iter(gates.values())))
        images = slice(self._done, self._done + count)
        rows, grouping = self._row[images], self._group[:, images]
        of_group = (grouping[:, None] == np.arange(len(self.groups))[:, None]).astype(np.float64)  # [P + 1, G, n]
        for name, sums in self._sums.items():
            x = np.asarray(gates[name], np.float64)
            np.add.at(sums["class"], rows, x)
            sums["square"] += np.square(x).sum(0)
            sums["group"] += of_group @ x
            sums["group_square"] += of_group[0] @ np.square(x)
            np.minimum(sums["minimum"], x.min(0), out=sums["minimum"])
            np.maximum(sums["maximum"], x.max(0), out=sums["maximum"])
            sums["outside"] += (x < self._thresholds[0]).sum(), (x > self._thresholds[1]).sum()
        self._done += count

    def result(self) -> dict[str, LayerGates]:
        """The statistics, after all images were added.

        Returns:
          Statistics by layer.

        Raises:
          ValueError: images are missing.
        """
        if self._done != len(self.labels):
            raise ValueError(f"{self._done} of {len(self.labels)} images were added")
        return {name: self._layer(sums) for name, sums in self._sums.items()}

    def _layer(self, sums: Mapping[str, Floats]) -> LayerGates:
        count, sizes = len(self.labels), self._sizes[:, None]
        mean = sums["class"].sum(0) / count
        group_means = sums["group"][0] / sizes
        members, total = sizes.sum(), sums["group"][0].sum(0)
        square = sums["group_square"].sum()
        whole = square - np.square(total).sum() / members
        between = (np.square(sums["group"]) / sizes).sum((1, 2)) - np.square(total).sum() / members
        # A smaller variance is rounding error of the gates.
        defined = 1 < len(sizes) < members and whole > 1e-12 * square
        shares = between / whole if defined else np.full(len(between), np.nan)
        closed, open_ = sums["outside"] / (count * len(mean))
        return LayerGates(
            mean=mean,
            std=_root(sums["square"] / count - np.square(mean)),
            minimum=sums["minimum"],
            maximum=sums["maximum"],
            closed=float(closed),
            open=float(open_),
            dead=float((sums["maximum"] < self._thresholds[0]).mean()),
            saturated=float((sums["minimum"] > self._thresholds[1]).mean()),
            class_means=sums["class"] / np.bincount(self._row)[:, None],
            group_means=group_means,
            group_std=_root(sums["group_square"] / sizes - np.square(group_means)),
            between=float(shares[0]),
            chance=(len(sizes) - 1) / (members - 1) if defined else float("nan"),
            permuted=shares[1:],
        )


def _root(variance: Floats) -> Floats:
    return np.sqrt(np.maximum(variance, 0.0))


def collect(
    model: nn.Module, variables: Mapping[str, Any], batches: Batches, statistics: GateStatistics
) -> dict[str, LayerGates]:
    """Runs a network over a data set and sums its gates.

    Args:
      model: the network.
      variables: its variables.
      batches: the images, in the order of the statistics' labels.
      statistics: the sums, to which the gates are added.

    Returns:
      The statistics by layer.
    """
    apply = jax.jit(lambda variables, images: apply_with_gates(model, variables, images)[1])
    for images, count in batches:
        gates = jax.device_get(apply(variables, jnp.asarray(images)))
        statistics.add({name: gate[:count] for name, gate in gates.items()})
    return statistics.result()


@dataclass
class Answers:
    """Predictions of a network with replaced gates on a labelled data set, compared with those of its own gates.

    Attributes:
      count: number of images.
      top1: number of correct predictions.
      lost: images predicted correctly with the network's own gates only.
      gained: images predicted correctly with the replaced gates only.
      changed: images with different predictions.
      loss: mean cross-entropy.
    """

    count: int = 0
    top1: int = 0
    lost: int = 0
    gained: int = 0
    changed: int = 0
    loss: float = 0.0


def usefulness(
    model: nn.Module,
    variables: Mapping[str, Any],
    means: Mapping[str, np.ndarray],
    batches: Batches,
    labels: Sequence[int],
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, Answers]:
    """Accuracy of a network with a layer's gates replaced by their means over the data set.

    With L layers, every image passes through the network L + 2 times.

    Args:
      model: the network.
      variables: its variables.
      means: mean of the gates over the data set, [channels] by layer.
      batches: the images.
      labels: classes of the images.
      progress: called after each forward pass of a batch, with the number of its images.

    Returns:
      The predictions by the layer whose gates were replaced; `UNCHANGED` has those with the network's own gates, and
      `EVERY_LAYER` those with the gates of all layers replaced.
    """
    constants = {name: jnp.asarray(mean, jnp.float32) for name, mean in means.items()}
    layers = list(means)
    # `replaced` is a traced argument, so one compilation serves all layers.
    apply = jax.jit(lambda v, c, images, replaced: apply_with_gates(model, v, images, c, replaced)[0])
    cases = {UNCHANGED: set[str](), **{name: {name} for name in layers}, EVERY_LAYER: set(layers)}
    answers = {case: Answers() for case in cases}
    done = 0
    for images, count in batches:
        truth = np.asarray(labels[done : done + count])
        on_device, done = jnp.asarray(images), done + count
        own = np.zeros(0)
        for case, chosen in cases.items():
            replaced = {name: np.asarray(name in chosen) for name in layers}
            logits = np.asarray(apply(variables, constants, on_device, replaced), np.float64)[:count]
            best = logits.argmax(-1)
            own = best if case == UNCHANGED else own
            peak = logits.max(-1)
            losses = np.log(np.exp(logits - peak[:, None]).sum(-1)) + peak - logits[np.arange(count), truth]
            into = answers[case]
            into.count += count
            into.top1 += int((best == truth).sum())
            into.lost += int(((own == truth) & (best != truth)).sum())
            into.gained += int(((own != truth) & (best == truth)).sum())
            into.changed += int((own != best).sum())
            into.loss += float(losses.sum())
            progress(count)
    for into in answers.values():
        into.loss /= max(into.count, 1)
    return answers
