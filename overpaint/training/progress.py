"""The progress bar."""

from collections.abc import Mapping

from tqdm import tqdm

SHOWN = ("reward/", "erasure/", "train/loss")
"""Beginnings of the tags that the bar shows, in this order: the reward, then the constraint, then the loss."""


class Progress:
    """A bar on stderr that counts iterations and shows the latest reward and constraint.

    Args:
        total: Number of iterations in all.
        done: Number of iterations done before.
        shown: Whether there is a bar at all.
    """

    def __init__(self, *, total: int, done: int, shown: bool) -> None:
        self._latest: dict[str, float] = {}
        self._bar = tqdm(total=total, initial=done, disable=not shown, unit="it", dynamic_ncols=True)

    def show(self, metrics: Mapping[str, float], skipped: int) -> None:
        """Shows the latest values, and the number of skipped updates once there is one."""
        self._latest.update(metrics)
        self._bar.set_postfix_str(postfix(self._latest, skipped), refresh=False)

    def advance(self) -> None:
        """Counts one iteration."""
        self._bar.update()

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


def postfix(metrics: Mapping[str, float], skipped: int) -> str:
    """Returns what stands behind the bar, such as `reward/mean 0.512, erasure/cost -0.02`."""
    parts = [f"{tag} {value:.3g}" for start in SHOWN for tag, value in metrics.items() if tag.startswith(start)]
    return ", ".join(parts + ([f"skipped {skipped}"] if skipped else []))
