"""What a probe is: it is asked to bring something back with a policy, and shows the pictures that it got.

A probe knows no eraser, and no part of it is used in training. The same `attempt` gives four numbers: with the policy
under test its *rate*, with the original model its *ceiling*, and with a task in which something else stands in the
place of the concept its *floors*, which is what a probe draws by itself.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from erasure import Concept
from overpaint.policy import ClassifierFree, DiffusionPolicy
from overpaint.policy.process import Diffusion
from overpaint.policy.types import Images, Latents, PerSample
from rewards import Reward

Made = TypeVar("Made")

Floor = Literal["benign", "foreign"]
"""What stands in the concept's place: a benign prompt, or a texture that the model never saw."""

Need = Literal["diffusion", "one text encoder"]
"""What a probe may need of a model: the levels of a diffusion, in which its formulas are written and which a rectified
flow has not; or one text encoder alone, among whose tokens free vectors can stand."""

Pictures = tuple[Sequence[str], Images]
"""Captions, and a picture for each."""


@dataclass(frozen=True, kw_only=True)
class ProbeTask:
    """What is to be brought back, and how it is known. All sequences have an entry for each attempt."""

    original: DiffusionPolicy
    """The model before it was erased; no probe changes it."""
    concept: Concept
    """What was erased."""
    prompts: tuple[str, ...]
    """Texts that name it, or that name nothing, where this is a floor."""
    templates: tuple[str, ...]
    """The same with `soft_prompts.PLACE` for the words that name it; at its beginning where no word does."""
    benign: tuple[str, ...]
    """The same without these words."""
    seeds: tuple[int, ...]
    """Of the attempts; all else that is random in a probe follows from them too."""
    score: Callable[[Images], PerSample]
    """Grows with the concept."""
    shown_from: float
    """The concept shows in pictures of this score or more."""
    steps: int
    """Denoising steps of a whole image."""
    guidance_scale: float
    """Classifier-free guidance."""
    size: int | None = None
    """Side of all pictures in pixels; None is the model's own."""
    reference_pictures: Images | None = None
    """Pictures of what is to be brought back; None are those that the original draws for the prompts."""
    examples: Callable[[int], Pictures] | None = None
    """Gives so many further captions and pictures of what is to be brought back, others than those of the attempts."""
    benign_pictures: Callable[[int], Pictures] | None = None
    """Gives so many benign captions and pictures to tune on; None are those that the original draws for the training
    prompts."""
    wordings: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Further prompts by how they name the concept, or by what else they show, for probes of wording."""
    kept: Mapping[str, Callable[[Images, Sequence[str]], PerSample]] = field(default_factory=dict)
    """For the wordings of what has to survive: 1 for each picture that shows what its caption asks for, and else 0."""
    left_open: Callable[[Images, Sequence[str]], Mapping[str, Sequence[str | None]]] | None = None
    """Tells by attribute what pictures show of what their captions leave open; None for a picture whose caption says it
    and for one that cannot be read."""
    kinds: Callable[[Images], Sequence[str]] | None = None
    """Tells in a word what each picture shows, beside the concept others as well."""
    reward: Reward | None = None
    """What benign tuning raises."""
    training_prompts: tuple[str, ...] = ()
    """Benign prompts to tune on."""
    progress: bool = True
    """Whether progress bars are shown."""
    _made: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def guidance(self) -> ClassifierFree:
        """The guidance of whole images."""
        return ClassifierFree(self.guidance_scale)

    @cached_property
    def pictures(self) -> Images:
        """A picture of what is to be brought back for each attempt."""
        if self.reference_pictures is not None:
            return self.reference_pictures
        return self.drawn_by(self.original)

    def drawn_by(
        self, policy: DiffusionPolicy, prompts: Sequence[str] | None = None, *, steps: int | None = None
    ) -> Images:
        """Returns what a policy draws with the task's seeds: its prompts or others, in its steps or in others."""
        texts = self.prompts if prompts is None else prompts
        return policy.draw(
            texts, seeds=self.seeds, steps=steps or self.steps, guidance=self.guidance, height=self.size,
            width=self.size,
        )  # fmt: skip

    @cached_property
    def picture_latents(self) -> Latents:
        """The latents of `pictures`."""
        return self.original.encode_images(self.pictures)

    def shown(self, scores: Float[Tensor, "*batch"]) -> Bool[Tensor, "*batch"]:
        """Tells which pictures show what is to be brought back, by their scores."""
        return scores >= self.shown_from

    def rate(self, scores: PerSample) -> float:
        """Returns the share of pictures that show it."""
        return self.shown(scores).float().mean().item()

    def once(self, name: str, make: Callable[[], Made]) -> Made:
        """Returns what is the same for every policy of this task, made when it is first wanted."""
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


class Attempt(NamedTuple):
    """What a probe got in one of its variants."""

    variant: str
    """Name of the variant for tables, such as "4 vectors"."""
    images: Images
    """The picture of each attempt; where a probe draws several, the one with the highest score."""
    scores: PerSample
    """Its score."""
    mean_rate: float | None = None
    """Where the best of several counts: the share of all of them that show the concept."""
    numbers: Mapping[str, float] = MappingProxyType({})
    """What else was measured, by its name."""
    curve: tuple[tuple[float, float], ...] = ()
    """Rates by strength, updates or noise level, for a chart."""
    prompts: tuple[str, ...] | None = None
    """Of the pictures, where they are not the task's."""


def best_of(
    candidates: Sequence[Images], score: Callable[[Images], PerSample]
) -> tuple[Images, PerSample, Float[Tensor, "candidates batch"]]:
    """Returns the picture with the highest score of each attempt, its score, and the scores [candidates, attempts]."""
    scores = torch.stack([score(images).float() for images in candidates])
    best = scores.argmax(dim=0)
    return torch.stack(list(candidates))[best, torch.arange(len(best))], scores.amax(dim=0), scores


@runtime_checkable
class Probe(Protocol):
    """One way of bringing a concept back."""

    name: ClassVar[str]
    """For tables and folders: small letters and hyphens."""
    floors: ClassVar[tuple[Floor, ...]]
    """Which floors it has."""
    config: Any
    """Its budget: settings whose defaults are the paper's."""

    def attempt(self, policy: DiffusionPolicy, task: ProbeTask) -> Sequence[Attempt]:
        """Tries to bring the concept back with a policy, which is left as it was, its guard at work.

        Returns:
            One `Attempt` for each variant, always the same variants in the same order.
        """
        ...


@runtime_checkable
class PreparedProbe(Protocol):
    """A probe with work that is the same for every policy, and no part of what the probe costs for one of them."""

    def prepare(self, task: ProbeTask) -> None:
        """Does it, and keeps what comes of it with `ProbeTask.once`; an attempt that finds nothing kept does it too."""
        ...


@runtime_checkable
class DemandingProbe(Protocol):
    """A probe that cannot be tried on every model."""

    needs: ClassVar[tuple[Need, ...]]
    """All that it needs of a model."""


def why_not(probe: Probe, policy: DiffusionPolicy) -> str | None:
    """Returns why a probe cannot be tried on a policy, as a clause; None where it can."""
    needs, kind = probe.needs if isinstance(probe, DemandingProbe) else (), policy.family.pipelines[0]
    if "diffusion" in needs and not isinstance(policy.process, Diffusion):
        return f"a model of diffusion is needed, and a {kind} is a rectified flow"
    if "one text encoder" in needs and len(policy.family.encoders) > 1:
        return f"a model with one text encoder is needed, and a {kind} has several"
    return None
