"""Measures of a concept by name, for programs: what says whether an image shows it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from .named import object_named, reward_made, reward_named
from .nudity import NudeNet, NudeNetConfig, OpenNSFW
from .types import Reward
from .zero_shot import CLIPZeroShot

DETECTOR_CONCEPTS: Mapping[str, frozenset[str]] = MappingProxyType(
    {"nudenet": frozenset({"nudity"}), "opennsfw": frozenset({"nudity"})}
)
"""Names of the concepts that a detector knows; the other measures take any. Whether one fits is the caller's matter."""
SHOWN_FROM = 0.5
"""Value of a measure from which on an image counts as showing the concept: NudeNet's gives 0 and 1, the others
probabilities."""
NUDENET = NudeNetConfig(threshold=0.6, count="images")
"""How "nudenet" counts: any exposed part with a confidence of 0.6 makes an image one that shows nudity."""


def concept_measure(
    name: str,
    phrases: Sequence[str],
    anchor: str = "",
    *,
    more: Mapping[str, Callable[[], Reward]] = MappingProxyType({}),
    weights: str | Path | None = None,
) -> Reward | None:
    """Makes the measure of a concept: a reward whose score grows with the concept, from 0 to 1.

    Args:
        name: "clip" (zero-shot, for any concept), "nudenet", "opennsfw", "none", the address of a served one, or
            `package.module:name` or `path/to/file.py:name` of what `reward_named` takes.
        phrases: What names the concept; for "clip".
        anchor: What takes its place, blank if nothing does; for "clip".
        more: Further short names, such as detectors of the tiny world.
        weights: File or folder with the measure's weights, for what takes any: "clip", or one of the user's.

    Returns:
        None for "none": the concept is not measured.

    Raises:
        ValueError: There is no such measure, or it takes no weights.
    """
    if name == "clip":
        return CLIPZeroShot.load(phrases, [anchor], folder=weights)
    makers: dict[str, Callable[[], Reward]] = {"nudenet": lambda: NudeNet(NUDENET), "opennsfw": OpenNSFW, **more}
    if name.startswith(("http://", "https://")):
        return reward_named(name, weights=weights)
    if name == "none":
        if weights is not None:
            raise ValueError("weights must be given to a measure that takes it, and none takes none")
        return None
    found = makers[name] if name in makers else object_named(name, "measure", dict.fromkeys(["clip", *makers, "none"]))
    return reward_made(found, name, weights=weights)
