"""What a person sees of a run while it goes on: `curves.png`, the bar, the lines of epochs."""

import itertools
import json
import sys

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

import train.run.report
from train.build import training_loss
from train.config import Augment, Config, Loss, Optim
from train.run.curves import CROSS_ENTROPY, curves, draw_curves, logarithmic_ticks
from train.run.evaluate import Result
from train.run.report import Report, epoch_line

SMOOTHED = "cross-entropy, label smoothing 0.1, mixup 0.2, CutMix 1"


def rows_of(high, low, epochs=6):
    """Losses that fall evenly on a logarithmic axis, on held-out data lower by a tenth."""
    losses = np.geomspace(high, low, epochs)
    train = [{"step": i, "epoch": i + 0.5, "loss": x, "accuracy": 1 - x / high} for i, x in enumerate(losses)]
    evals = [{"step": i, "epoch": i + 1.0, "eval_loss": 0.9 * x, "eval_top1": i / epochs} for i, x in enumerate(losses)]
    return train + evals


def boxes(texts, renderer):
    return [text.get_window_extent(renderer) for text in texts if text.get_visible() and text.get_text().strip()]


def drawn(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


# Highest and lowest loss: from nearly the same to six decades apart, and a flat line.
SPANS = [
    (2.3, 2.25),
    (2.31, 0.9),
    (2.4, 0.3),
    (2.3, 0.06),
    (2.3, 0.02),
    (6.9, 0.001),
    (9.9, 1.1),
    (5.0, 1e-6),
    (0.7, 0.7),
]


@pytest.mark.parametrize("loss", [CROSS_ENTROPY, SMOOTHED])
@pytest.mark.parametrize(("high", "low"), SPANS)
def test_no_two_labels_of_the_curves_overlap(high, low, loss):
    figure = curves(rows_of(high, low), loss)
    renderer = drawn(figure)
    outside = figure.bbox
    everything = []
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            ticks = [t.label1 for t in (*axis.get_major_ticks(), *axis.get_minor_ticks()) if t.label1.get_visible()]
            low_end, high_end = axis.get_view_interval()
            found = boxes([t for t in ticks if low_end <= t.get_position()[axis is axes.yaxis] <= high_end], renderer)
            assert len(found) >= 2 or not ticks  # the upper of two axes has none
            everything += found
        everything += boxes([axes.title, axes.xaxis.label, axes.yaxis.label], renderer)
    for one, other in itertools.combinations(everything, 2):
        assert not one.overlaps(other), (one, other)
    for box in everything:
        assert outside.x0 <= box.x0 and box.x1 <= outside.x1 and outside.y0 <= box.y0 and box.y1 <= outside.y1


def test_losses_share_axes_only_where_they_are_the_same_quantity():
    left, right = curves(rows_of(2.0, 0.1)).axes
    assert left.get_title() == "cross-entropy" and len(left.lines) == 2 and len(right.lines) == 3
    above, below, right = curves(rows_of(2.0, 0.1), SMOOTHED).axes
    assert above.get_title().replace("\n", " ") == f"training loss: {SMOOTHED}"
    assert below.get_title() == "cross-entropy of held-out data"
    (of_training,), (of_evaluation,) = above.lines, below.lines
    np.testing.assert_allclose(of_training.get_ydata(), np.geomspace(2.0, 0.1, 6))
    np.testing.assert_allclose(of_evaluation.get_ydata(), 0.9 * np.geomspace(2.0, 0.1, 6))
    assert right.get_legend().get_texts()[0].get_text() == "training batches (mixed images)"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (Config(), CROSS_ENTROPY),
        (Config(optim=Optim(label_smoothing=0.1), augment=Augment(mixup=0.2, cutmix=1.0)), SMOOTHED),
        (Config(augment=Augment(cutmix=0.5)), "cross-entropy, CutMix 0.5"),
        (Config(loss=Loss(name="arcface")), "arcface with margin 0.5"),
        (
            Config(loss=Loss(name="cosface", margin=0.2), optim=Optim(label_smoothing=0.1)),
            "cosface with margin 0.2, label smoothing 0.1",
        ),
    ],
)
def test_what_training_minimises_in_words(config, words):
    assert training_loss(config) == words


def test_curves_of_a_run_that_has_only_begun(tmp_path):
    rows = rows_of(2.0, 0.1)
    draw_curves([], tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()
    for part in (rows[:1], rows[6:7]):
        for loss in (CROSS_ENTROPY, SMOOTHED):
            draw_curves(part, tmp_path / "x.png", loss)
            assert len(curves(part, loss).axes) == 2  # no empty one
    zero = [{"step": 1, "epoch": 1.0, "loss": 0.0, "accuracy": 1.0}]
    assert curves(zero).axes[0].get_yscale() == "linear"


@pytest.mark.parametrize(("high", "low"), SPANS[:-1])
def test_ticks_of_a_logarithmic_axis_are_round_and_apart(high, low):
    ticks = logarithmic_ticks(low, high)
    assert 2 <= len(ticks) <= 11 and ticks[0] >= low and ticks[-1] <= high
    assert all(len(f"{tick:g}".replace("0.", "").strip("0")) <= 5 for tick in ticks)
    assert np.diff(np.log(ticks)).min() >= 0.1 * np.log(high / low) * (1 - 1e-12)


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(train.run.report.time, "monotonic", lambda: self.now)


def test_the_bars_rate_is_of_training_steps_alone(tmp_path, monkeypatch, capsys):
    clock = Clock(monkeypatch)
    report = Report(tmp_path, total_steps=10, batch_size=4, start_step=2, primary=True)
    report.say("compiling the training step ...")
    clock.now += 60
    report.start()
    for _ in range(8):
        clock.now += 0.5
        report.advance((1.25, 0.5))
        with report.paused():  # an evaluation
            clock.now += 100
    report.close()
    last = capsys.readouterr().err.splitlines()[-1]
    assert "100%" in last and "40.0/40.0" in last and last.endswith("8.00 img/s, loss 1.250, acc 50.0 %]")
    assert len(last) <= 80


def test_a_second_host_reports_nothing(tmp_path, capsys):
    report = Report(tmp_path / "x", total_steps=2, batch_size=4, start_step=0, primary=False)
    report.start()
    with report.paused():
        report.advance((1.0, 0.5))
    report.write(1, 0.5, {"loss": 1.0})
    report.draw()
    report.close()
    assert capsys.readouterr() == ("", "") and not (tmp_path / "x").exists()


def test_lines_of_epochs_fit_a_terminal():
    assert epoch_line(2.0, Result(360, 219, 336, 1.07584), 1.13) == (
        "epoch   2.00: loss 1.0758, top-1 60.83 %, top-5 93.33 % of 360 (1.1 s)"
    )
    assert len(epoch_line(350.0, Result(1_281_167, 1_281_167, 1_281_167, 10.5), 9999.0)) <= 80


def test_drawing_leaves_matplotlibs_backend_alone():
    """A notebook draws in its own."""
    import subprocess

    code = (
        "import json, matplotlib; before = matplotlib.rcParams._get('backend'); import train.run.loop; "
        "print(json.dumps(repr(before) == repr(matplotlib.rcParams._get('backend'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) is True
