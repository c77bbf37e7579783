"""Erasure by a sampling guard: no weight changes, a policy or a plain diffusers pipeline samples otherwise."""

import json
from abc import ABC, abstractmethod
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor, nn

from overpaint.policy import DiffusionPolicy, SamplingGuard
from overpaint.policy.atomic import write_text
from overpaint.policy.families import StableDiffusion
from overpaint.policy.parts import Pipeline, UNet
from overpaint.policy.prompts import PromptEncoder
from overpaint.settings import NonNegative
from overpaint.text_files import read_json_object

ATTRIBUTE = "guard"
"""Where a pipeline's UNet has what is attached to it."""


@runtime_checkable
class PipelineGuard(Protocol):
    """A guard at work in a pipeline, by hooks; no class of diffusers is changed or derived from."""

    def remove(self) -> None:
        """Takes the hooks off."""
        ...


@dataclass(frozen=True)
class GuardChange(ABC):
    """A guard that is not at work yet: settings and nothing else, which fit any weights."""

    config: Any  # settings, with the concept's texts; a `config_type`
    strength: NonNegative = 1.0  # see the method's `erase`

    kind: ClassVar[str]
    config_type: ClassVar[Any]

    @abstractmethod
    def guard(self, prompts: PromptEncoder, unet: UNet) -> SamplingGuard:
        """Returns the guard for a text encoder and the network that will predict; `ValueError` if it cannot work."""

    @abstractmethod
    def in_pipeline(self, pipeline: Pipeline, prompts: PromptEncoder) -> PipelineGuard:
        """Hooks the guard into a pipeline; errors as in `guard`."""

    def apply(self, policy: DiffusionPolicy) -> None:
        """Makes it the policy's guard; trained weights and their reference sample with it alike.

        Raises:
            ValueError: The policy has a guard, or as `guard`.
        """
        if policy.guard is not None:
            raise ValueError(f"a policy takes one guard, and this one has {policy.guard!r}")
        self.check(policy)
        policy.guard = self.guard(policy.prompts, policy.model)

    @abstractmethod
    def check(self, policy: DiffusionPolicy) -> None:
        """Checks that the guard can work with a kind of model; a `ValueError` where it cannot."""

    def apply_to_pipeline(self, pipeline: Pipeline) -> None:
        """Attaches it to a plain pipeline, with classifier-free guidance or without; `detach` takes it off again.

        Raises:
            ValueError: The pipeline has a guard, or as `guard`.
        """
        if (name := type(pipeline).__name__) not in StableDiffusion.pipelines:
            raise ValueError(
                f"a guard must be attached to a pipeline of Stable Diffusion v1 or v2, got a {name}; a policy takes it"
            )
        if (found := getattr(pipeline.unet, ATTRIBUTE, None)) is not None:
            raise ValueError(f"a pipeline takes one guard, and this one has {found!r}")
        prompts = PromptEncoder(pipeline.text_encoder, pipeline.tokenizer)
        setattr(pipeline.unet, ATTRIBUTE, self.in_pipeline(pipeline, prompts))

    @contextmanager
    def applied(self, policy: DiffusionPolicy) -> Generator[None]:
        """Makes it the policy's guard for the length of a `with` block."""
        self.apply(policy)
        try:
            yield
        finally:
            policy.guard = None

    def original(self, unet: nn.Module) -> dict[str, Tensor]:
        """Returns nothing: no weight is changed, and the guard is at work in the reference, too."""
        return {}

    def base(self, unet: nn.Module) -> None:
        """Returns None: it works with any weights."""
        return None

    def to_json(self) -> dict[str, Any]:
        """Returns settings and strength as JSON knows them."""
        return json.loads(json.dumps({**asdict(self.config), "strength": self.strength}))

    def save(self, folder: Path) -> None:
        """Writes the settings."""
        write_text(folder / f"{self.kind}.json", json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "GuardChange":
        """Reads what `save` wrote.

        Raises:
            ValueError: There is no such file, or a setting in it is not valid.
        """
        path = folder / f"{cls.kind}.json"
        if not path.is_file():
            raise ValueError(f"a saved {cls.kind} must hold {path.name}, and {folder} does not")
        saved = read_json_object(path)
        expected = {field.name for field in fields(cls.config_type)} | {"strength"}
        if saved.keys() != expected:
            raise ValueError(f"{path} must hold {sorted(expected)}, got {sorted(saved)}")
        strength = saved.pop("strength")
        settings = {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
        return cls(cls.config_type(**settings), strength)


def detach(pipeline: Pipeline) -> None:
    """Makes a pipeline draw again as it did before a guard was attached; `ValueError` if there is none."""
    found: PipelineGuard | None = getattr(pipeline.unet, ATTRIBUTE, None)
    if found is None:
        raise ValueError("the pipeline must have a guard attached, got none")
    found.remove()
    delattr(pipeline.unet, ATTRIBUTE)
