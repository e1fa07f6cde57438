"""Figures of a whole set, in float64: area under the ROC curve and log loss."""

import numpy as np

from se_flax.errors import UserError


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Probability that a random click has a higher score than a random non-click, ties counting half: exact.

    The Mann-Whitney statistic from mid-ranks, in integers up to the last division, so neither ties nor the number of
    rows cost accuracy.

    Args:
      scores: floats [n]; any increasing function of the probability.
      labels: 0 or 1, [n].

    Returns:
      AUC in [0, 1].

    Raises:
      UserError: a score that is not a number, or labels that are all the same.
    """
    scores, clicks = np.asarray(scores), np.asarray(labels) > 0.5
    if np.isnan(scores).any():
        raise UserError(f"{np.isnan(scores).sum():,} of {len(scores):,} scores are not numbers; AUC needs all of them")
    positive = int(clicks.sum())
    negative = len(clicks) - positive
    if not positive or not negative:
        raise UserError(
            f"got {positive:,} clicks among {len(clicks):,} rows; AUC needs rows with and without a click, so evaluate "
            "on more rows"
        )
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    # Twice the mid-rank of a group of equal scores: first rank plus last rank.
    last = np.cumsum(sizes, dtype=np.int64)
    twice_ranks = 2 * last - sizes + 1
    clicks_by_group = np.bincount(group, weights=clicks, minlength=len(sizes)).astype(np.int64)
    twice = int(np.dot(twice_ranks, clicks_by_group)) - positive * (positive + 1)
    return twice / (2 * positive * negative)


def log_loss(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log of the probability given to what happened, in nats.

    Args:
      logits: floats [n]; probability of a click = 1 / (1 + exp(-logit)).
      labels: 0 or 1, [n].

    Returns:
      The mean, computed in float64 without forming probabilities, so it is finite for finite logits.
    """
    x, y = np.asarray(logits, np.float64), np.asarray(labels, np.float64)
    return float(np.mean(np.logaddexp(0.0, x) - y * x))
