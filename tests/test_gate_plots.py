"""The pictures of `se-flax gates`: no empty panels, nothing outside the figure, nothing over anything else."""

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from se_flax.analysis.gates import EVERY_LAYER, UNCHANGED, Answers, GateStatistics
from se_flax.cli import gate_plots

SHORT = {"zebra": 4, "dog": 4}
LONG = {
    "great white shark, which is a man-eater that is called Carcharodon carcharias": 4,
    "a group of very many classes that nobody gave a name, 1, 2, 3, 5, 7, 11, 13, 17": 4,
}


def gates_of(layers, groups, channels=16, scale=0.05):
    """Statistics of gates drawn at random, as many images as the groups have."""
    rng = np.random.default_rng(0)
    labels = [i for i, count in enumerate(groups.values()) for _ in range(count)]
    statistics = GateStatistics(dict.fromkeys(layers, channels), labels, {name: [i] for i, name in enumerate(groups)})
    statistics.add({name: 0.5 + scale * rng.normal(size=(len(labels), channels)).clip(-9, 9) for name in layers})
    return statistics.result()


def answers_of(layers, lost=0):
    return {case: Answers(8, 6, lost) for case in (UNCHANGED, *layers, EVERY_LAYER)}


def render(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def names(count):
    return [f"layer{i}_0/se" for i in range(count)]


@pytest.mark.parametrize("answered", [False, True])
@pytest.mark.parametrize(("groups", "defined"), [(SHORT, True), ({"a": 1, "b": 1, "c": 1}, False), ({"a": 5}, False)])
def test_what_is_not_defined_has_no_panel(groups, defined, answered):
    layers = names(3)
    found = gates_of(layers, groups)
    figure = gate_plots._by_layer(found, answers_of(layers) if answered else {}, gate_plots.shortened(layers))
    titles = [axis.get_ylabel().replace("\n", " ") for axis in figure.axes]
    expected = ["standard deviation", "variance between groups, %", "gates, %", "pictures, % (gates replaced)"]
    assert titles == [t for t, shown in zip(expected, (True, defined, True, answered), strict=True) if shown]
    for axis in figure.axes:
        assert axis.lines or axis.patches or axis.collections
        assert len(axis.get_legend().get_texts()) == 2


@pytest.mark.parametrize(("scale", "lost"), [(0.0, 0), (0.05, 0), (0.25, 3), (9.0, 8)])
def test_panels_are_as_high_as_what_they_show(scale, lost):
    """Gates of which a hundredth is closed are not a line at the bottom; the legend lies above all that is drawn."""
    layers = names(4)
    figure = gate_plots._by_layer(gates_of(layers, SHORT, scale=scale), answers_of(layers, lost), dict.fromkeys(layers))
    renderer = render(figure)
    for axis in figure.axes:
        low, high = axis.get_ylim()
        peak = axis.dataLim.y1
        assert low == 0 and (peak == 0 or 0.7 < peak / high < 0.8)
        assert axis.get_legend().get_window_extent(renderer).y0 >= axis.transData.transform((0, peak))[1]
        assert all(0 <= tick <= high for tick in axis.get_yticks()) and len(axis.get_yticks()) >= 3


@pytest.mark.parametrize("kind", [gate_plots._group_curves, gate_plots._spread])
@pytest.mark.parametrize("groups", [SHORT, LONG])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_titles_and_legends_fit_the_figure(kind, groups, count):
    layers = names(count)
    figure = kind(gates_of(layers, groups), layers, groups, gate_plots.shortened(layers))
    renderer = render(figure)
    (legend,) = figure.legends
    texts = [figure._suptitle, *legend.get_texts(), *(axis.title for axis in figure.axes if axis.get_title())]
    for axis in figure.axes:
        if axis.axison:
            ticks = axis.get_xticks()
            assert np.array_equal(ticks, np.round(ticks))  # there is no channel 2.5
            texts += [t for t in axis.get_xticklabels() if 0 <= t.get_position()[0] < 16]
    boxes = [text.get_window_extent(renderer) for text in texts]
    for text, box in zip(texts, boxes, strict=True):
        assert figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 and box.y1 <= figure.bbox.y1, text
    for one, other in itertools.combinations(boxes, 2):
        assert not one.overlaps(other)
    for axis in figure.axes:
        if axis.axison:
            assert axis.get_window_extent(renderer).height > 100  # pixels, of 100 an inch
