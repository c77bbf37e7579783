"""From a concept to the tasks of probes: that of the concept, and those of the floors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from erasure import Concept
from overpaint.policy import ClassifierFree, DiffusionPolicy
from overpaint.policy.types import Images, PerSample
from rewards import Reward

from .probe import Floor, Pictures, ProbeTask

EXAMPLES = 500
"""What is added to the seed of the attempts for that of further examples."""


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """Something that the original model cannot know: what is drawn of it, a probe has painted by itself."""

    pictures: Callable[[int, int], Pictures]
    """Gives captions that do not name it, and pictures of it, by their count and a seed."""
    score: Callable[[Images], PerSample]
    """Grows with it."""
    shown_from: float
    """It shows in pictures of this score or more."""


@dataclass(frozen=True, kw_only=True)
class ProbeTarget:
    """What probes look for in a model."""

    name: str
    """Of the concept, the detector and the prompts together: results that are kept belong to it."""
    concept: Concept
    """What was erased."""
    prompts: Callable[[str, int, int], Sequence[str]]
    """Prompts by kind, count and seed: ``explicit`` ones, ``train`` ones and those of the wordings."""
    template: Callable[[str], str]
    """Puts `soft_prompts.PLACE` for the words of a prompt that name the concept."""
    score: Callable[[Images], PerSample]
    """Grows with the concept."""
    shown_from: float = 0.5
    """The concept shows in pictures of this score or more."""
    foreign: Foreign | None = None
    """For the second floor."""
    benign_pictures: Callable[[int, int], Pictures] | None = None
    """Gives benign captions and pictures to tune on, by their count and a seed; None are drawn by the original."""
    wordings: Mapping[str, Callable[[int, int], Sequence[str]]] = field(default_factory=dict)
    """Prompts by how they name the concept, or by what else they show; each by count and seed."""
    kept: Mapping[str, Callable[[Images, Sequence[str]], PerSample]] = field(default_factory=dict)
    """As in the task, with the next two."""
    left_open: Callable[[Images, Sequence[str]], Mapping[str, Sequence[str | None]]] | None = None
    """What pictures show of what their captions leave open."""
    kinds: Callable[[Images], Sequence[str]] | None = None
    """What each picture shows, in a word."""
    reward: Reward | None = None
    """What benign tuning raises."""
    steps: int = 50
    """Denoising steps of a whole image."""
    guidance_scale: float = 7.5
    """Classifier-free guidance."""
    size: int | None = None
    """Side of all pictures in pixels; None is the model's own."""
    _tasks: dict[Any, ProbeTask] = field(default_factory=dict, repr=False, compare=False)

    @property
    def floors(self) -> tuple[Floor, ...]:
        """What can stand in the concept's place: something foreign only where there is something of the kind."""
        return ("benign",) if self.foreign is None else ("benign", "foreign")

    def task(
        self, original: DiffusionPolicy, *, count: int, seed: int, floor: Floor | None = None, progress: bool = True
    ) -> ProbeTask:
        """Returns the task of the concept, or of a floor; the same one again for the same arguments.

        So what a task keeps (`ProbeTask.once`) serves every model that is probed with this target.

        Args:
            original: The model before it was erased.
            count: Attempts.
            seed: Chooses the prompts and the noise.
            floor: What stands in the concept's place; None is the concept itself.
            progress: Whether progress bars are shown.

        Raises:
            ValueError: There is nothing foreign for a floor that wants it; see `floors`.
        """
        key = id(original), count, seed, floor, progress  # a task that is kept keeps its original, and so the id
        if key not in self._tasks:
            self._tasks[key] = self._made(original, count, seed, floor, progress)
        return self._tasks[key]

    def _made(self, original: DiffusionPolicy, count: int, seed: int, floor: Floor | None, progress: bool) -> ProbeTask:
        prompts = tuple(self.prompts("explicit", count, seed))
        templates = tuple(self.template(prompt) for prompt in prompts)
        benign = tuple(without_place(template) for template in templates)
        pictures, score, shown_from, benign_of = None, self.score, self.shown_from, self.benign_pictures
        if floor == "benign":
            prompts = benign
        elif floor == "foreign":
            if self.foreign is None:
                raise ValueError(f"the floor 'foreign' needs a target with something foreign, got {self.name} without")
            captions, pictures = self.foreign.pictures(count, seed)
            prompts = benign = tuple(captions)
            templates = tuple(f"{{}} {caption}" for caption in captions)
            score, shown_from = self.foreign.score, self.foreign.shown_from
        return ProbeTask(
            original=original,
            concept=self.concept,
            prompts=prompts,
            templates=templates,
            benign=benign,
            seeds=tuple(range(1000 * seed, 1000 * seed + count)),
            score=score,
            shown_from=shown_from,
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            size=self.size,
            reference_pictures=pictures,
            examples=partial(self._examples, original, seed + EXAMPLES, floor),
            benign_pictures=None if benign_of is None else lambda wanted: benign_of(wanted, seed),
            wordings={name: tuple(texts(count, seed)) for name, texts in self.wordings.items()},
            kept=self.kept,
            left_open=self.left_open,
            kinds=self.kinds,
            reward=self.reward,
            training_prompts=tuple(self.prompts("train", 200, seed)) if self.reward is not None else (),
            progress=progress,
        )

    def _examples(self, original: DiffusionPolicy, seed: int, floor: Floor | None, count: int) -> Pictures:
        """Returns captions and pictures of the concept, or of what stands in its place."""
        if floor == "foreign" and self.foreign is not None:
            return self.foreign.pictures(count, seed)
        prompts = list(self.prompts("explicit", count, seed))
        if floor == "benign":
            prompts = [without_place(self.template(prompt)) for prompt in prompts]
        guidance = ClassifierFree(self.guidance_scale)
        return prompts, original.draw(
            prompts, seeds=range(1000 * seed, 1000 * seed + count), steps=self.steps, guidance=guidance,
            height=self.size, width=self.size,
        )  # fmt: skip


def without_place(template: str) -> str:
    """Returns a template without its place."""
    return " ".join(template.replace("{}", " ").split())
