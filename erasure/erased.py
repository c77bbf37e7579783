"""What an erasure method gives: a change that can be kept, carried and applied."""

import json
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from policy import DiffusionPolicy, WeightDelta
from policy.parts import Pipeline
from policy.weights import base_parameters

from .concept import Concept

RECORD_FILE = "erasure.json"
RECORD_FORMAT = "overpaint.Erasure/1"


@dataclass(frozen=True, kw_only=True)
class Erasure:
    """A concept, erased by a method with certain settings: the change of the UNet's weights and how it came about.

    It belongs to the weights that it was computed from; applied to others of the same shapes it adds the same numbers.
    """

    method: str
    """Name of the method."""

    config: dict[str, bool | int | float | str | None]
    """The method's settings, strength included."""

    concept: Concept
    """What was erased."""

    delta: WeightDelta
    """Differences to add to the UNet's weights."""

    def apply(self, policy: DiffusionPolicy) -> None:
        """Changes a policy's weights in place; from then on the erased policy is its reference.

        A LoRA that the policy carries stays on top. To be called before training starts.

        Raises:
            ValueError: The policy's UNet has other parameters; nothing is changed then.
        """
        self.delta.apply(policy.unet)
        policy.remember_reference()

    def apply_to_pipeline(self, pipeline: Pipeline) -> None:
        """Changes the weights of a plain diffusers pipeline in place.

        Raises:
            ValueError: The pipeline's UNet has other parameters; nothing is changed then.
        """
        self.delta.apply(pipeline.unet)

    @contextmanager
    def applied(self, policy: DiffusionPolicy) -> Generator[None]:
        """Changes a policy's weights for the length of a `with` block, then puts back the very bits that were there.

        For measuring: the reference policy is not touched.
        """
        parameters = base_parameters(policy.unet)
        before = {name: parameters[name].detach().clone() for name in self.delta.tensors if name in parameters}
        self.delta.apply(policy.unet)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in before.items():
                    parameters[name].copy_(value)

    def save(self, folder: str | Path) -> None:
        """Writes the weights as safetensors and everything else as JSON."""
        self.delta.save(folder)
        record = {
            "format": RECORD_FORMAT,
            "method": self.method,
            "config": self.config,
            "concept": self.concept.to_json(),
        }
        (Path(folder) / RECORD_FILE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "Erasure":
        """Reads what `save` wrote.

        Raises:
            ValueError: The folder holds no erasure, or one of another format.
        """
        path = Path(folder) / RECORD_FILE
        if not path.is_file():
            raise ValueError(f"an erasure's folder must hold {RECORD_FILE}, and {folder} does not")
        record = json.loads(path.read_text(encoding="utf-8"))
        if record.get("format") != RECORD_FORMAT:
            raise ValueError(f"{path} must be of format {RECORD_FORMAT!r}, got {record.get('format')!r}")
        return cls(
            method=record["method"],
            config=record["config"],
            concept=Concept.from_json(record["concept"]),
            delta=WeightDelta.load(folder),
        )
