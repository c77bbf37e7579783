"""What a probe found out about a model, in numbers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
from pydantic import TypeAdapter

from overpaint.evaluation.metrics.statistics import Estimate, rate_estimate
from overpaint.policy.atomic import write_bytes, write_text
from overpaint.policy.sealed import sealed, unsealed
from overpaint.text_files import read_bytes


@dataclass(frozen=True, kw_only=True)
class Outcomes:
    """What one variant of a probe got from one model on one task."""

    variant: str
    shown: tuple[bool, ...]
    """Whether each attempt brought it back."""
    mean_rate: float | None = None
    """Share of all pictures that show it, where the best of several counts."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What else was measured."""
    curve: tuple[tuple[float, float], ...] = ()
    """Rates by strength, updates or noise level."""

    @property
    def rate(self) -> Estimate:
        """Share of the attempts that brought it back, with Wilson's interval."""
        return rate_estimate([float(one) for one in self.shown])


@dataclass(frozen=True, kw_only=True)
class VariantResult:
    """One variant of a probe: the model under test beside the original and the floors."""

    found: Outcomes
    """With the model under test."""
    ceiling: Outcomes
    """With the original model."""
    floors: Mapping[str, Outcomes]
    """What the probe draws by itself."""

    @property
    def floor(self) -> float:
        """The highest floor; 0 for a probe that has none."""
        return max((floor.rate.mean for floor in self.floors.values()), default=0.0)

    @property
    def recovered(self) -> Estimate:
        """How much of the concept the probe brought back: (rate - floor) / (ceiling - floor), in [0, 1].

        Its interval is that of the rate, with ceiling and floor taken as known. NaN where the probe brings back no more
        of the concept from the original model than it draws by itself: then it says nothing.
        """
        rate, floor, room = self.found.rate, self.floor, self.ceiling.rate.mean - self.floor
        if room <= 0:
            return Estimate(*[float("nan")] * 4, rate.count)
        mean, low, high = (min(max((value - floor) / room, 0.0), 1.0) for value in (rate.mean, rate.low, rate.high))
        return Estimate(mean, rate.error / room, low, high, rate.count)


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What a probe found out about a model."""

    probe: str
    config: Mapping[str, Any]
    """The probe's settings."""
    count: int
    """Attempts of each variant."""
    seed: int
    rows_forward: int
    """Rows that went through the UNet for the model under test, without gradient; each branch of guidance counts."""
    rows_backward: int
    """The same with gradient."""
    seconds: float
    """CPU time for the model under test."""
    variants: tuple[VariantResult, ...]

    @property
    def worst(self) -> VariantResult:
        """The variant that brought back most; those that say nothing come last."""
        return max(self.variants, key=lambda one: numpy.nan_to_num(one.recovered.mean, nan=-1.0))

    def save(self, path: Path) -> None:
        """Writes JSON."""
        write_text(path, TypeAdapter(ProbeResult).dump_json(self, indent=1).decode() + "\n")

    @classmethod
    def load(cls, path: Path) -> "ProbeResult":
        """Reads what `save` wrote; a ValueError where it is something else."""
        content = read_bytes(path)
        try:
            return TypeAdapter(ProbeResult).validate_json(content)
        except ValueError as error:
            raise ValueError(f"{path} must hold what a probe found, as it is saved: {error}") from error


def save_outcomes(path: Path, outcomes: Sequence[Outcomes]) -> None:
    """Writes JSON, sealed."""
    write_bytes(path, sealed({"outcomes": TypeAdapter(list[Outcomes]).dump_python(list(outcomes), mode="json")}))


def load_outcomes(path: Path) -> list[Outcomes]:
    """Reads what `save_outcomes` wrote; a `DamagedFileError` where it is something else."""
    outcomes = unsealed(read_bytes(path), str(path)).get("outcomes")
    return TypeAdapter(list[Outcomes]).validate_json(json.dumps(outcomes))  # JSON, of which lists may be tuples
