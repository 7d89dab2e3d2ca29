"""Which way a metric of a run improves. Pure."""

from difflib import get_close_matches

# How the names of metrics end that are better when they are higher, or lower.
_RISING = (
    "accuracy", "precision", "recall", "f1", "matched", "hit", "nmi", "purity", "elbo", "effective_rank", "spread",
)  # fmt: skip
_FALLING = (
    "loss", "error", "supervised", "kl", "reconstruction", "invariance", "variance", "covariance", "redundancy",
    "frechet_distance", "uniformity", "alignment",
)  # fmt: skip


def falls(name: str) -> bool:
    """Say whether a metric, such as `validation/loss`, is better when it is lower.

    Raises:
        ValueError: nobody knows, because it is no measure of quality, such as a learning rate, or misspelt.
    """
    last = name.rpartition("/")[2]
    if last.endswith(_RISING):
        return False
    if last.endswith(_FALLING):
        return True
    close = get_close_matches(last, [*_RISING, *_FALLING], n=1)
    guess = f" Did you mean something like {close[0]}?" if close else " Choose another, such as validation/loss."
    raise ValueError(f"Nobody knows whether {name!r} is to rise or to fall.{guess}")
