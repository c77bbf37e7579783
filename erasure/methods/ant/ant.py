"""ANT: the early denoising steps keep their prediction, and the later ones are led away from the concept.

With ε* the original model, and x on the way to a picture of the concept c, drawn with the model as trained so far:

    early:      keep = ε*(x, ∅) + η (ε*(x, c) - ε*(x, ∅))       reverse = ε*(x, ∅) - η (ε*(x, c) - ε*(x, ∅))    :late
    loss = (ε(x_late, c) - reverse)² + λ3 (ε(x_late, ∅) - ε*(x_late, ∅))²
         + λ1 [ (ε(x_early, c) - keep)² + λ2 (ε(x_early, ∅) - ε*(x_early, ∅))² ]

Only weights that the loss pulls at for every one of several prompts and seeds are trained: see `saliency`.

Source: Li et al. (2025), https://arxiv.org/abs/2504.12782, written from its equations. The authors' code is
lileyang1210/ANT, for non-commercial use only; nothing here was taken from it. See docs/methods/ant.md for each
departure.
"""

import json
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from erasure.changes import weights_hash
from erasure.concept import Concept
from erasure.descend import DescentConfig, erase_by_descent
from erasure.erased import Erasure
from erasure.phrases import check_words
from erasure.protocols import ConceptBatch, UNetCalls, check_trainable
from erasure.rollout import erased_target, latents_before, random_stops, rollout_calls
from overpaint.policy import ClassifierFree, Conditioning, DiffusionPolicy
from overpaint.policy.types import PerSample
from overpaint.settings import Field, settings
from overpaint.training import TrainingConfig, check_output_dir, from_main

from .saliency import Mask, SaliencyConfig, masked_gradients, read_mask, saliency_mask, write_mask


class Behaviour(NamedTuple):
    """What the paper and the released code do differently."""

    stage_orientation: Literal["keep_early", "keep_late"]
    mask_keep: Literal["high", "low"]
    uncond_grad: bool


BEHAVIOURS = {
    "paper": Behaviour("keep_early", "high", uncond_grad=True),
    "released": Behaviour("keep_late", "low", uncond_grad=False),
}


@settings
class ANTConfig:
    """Settings of ANT; those of the paper for nudity by default."""

    variant: Literal["paper", "released"] = "paper"
    """What the three fields after it are where they are None; ``released`` is what the code for a single concept
    does, against the paper in all three."""

    stage_orientation: Literal["keep_early", "keep_late"] | None = None
    """Which end of the way is kept: ``keep_early``, the paper's, the noisy one; ``keep_late`` the clean one."""

    mask_keep: Literal["high", "low"] | None = None
    """Which half of each tensor's summed gradients a saliency map keeps: ``high``, the paper's, or ``low``."""

    uncond_grad: bool | None = None
    """Whether gradients flow through the predictions for the empty prompt, as in the paper. Without it these terms
    are constants, that train nothing."""

    kept_share: float = Field(0.14, gt=0, lt=1)
    """Share of the denoising steps that are kept. The paper counts 50 steps from 50 down to 1 and keeps those above
    t' = 43, which are 7 of 50: index 0 to 6 from noise. At least one step is kept, and not all."""

    negative_guidance: float = Field(1.0, gt=0)
    """How far from the unconditional prediction both targets lie (η)."""

    keep_weight: float = Field(1.0, gt=0)
    """Of what is kept, against what is reversed (λ1)."""

    keep_empty_weight: float = Field(0.5, gt=0)
    """Of the unconditional prediction in what is kept (λ2)."""

    reverse_empty_weight: float = Field(0.5, gt=0)
    """Of the unconditional prediction where the concept is reversed (λ3)."""

    steps: int = Field(50, ge=2)
    """Denoising steps of a whole image (DDIM); each of a stage is as likely to be trained on as any other of it."""

    guidance_scale: float = Field(3.0, ge=0)
    """Classifier-free guidance of the rollout that leads to noised latents."""

    saliency: SaliencyConfig | None = SaliencyConfig()
    """How the weights that are trained are found; None trains the whole UNet."""

    descent: DescentConfig = DescentConfig(iterations=250, learning_rate=5e-4)
    """How the loss is descended."""

    def __post_init__(self) -> None:
        """Checks that the optimizer leaves weights outside of a mask alone."""
        if self.saliency is not None and self.descent.weight_decay:
            decay = self.descent.weight_decay
            raise ValueError(f"descent.weight_decay must be 0 with a mask, as it moves every weight, got {decay}")

    def behaviour(self) -> Behaviour:
        """Returns the variant, with what was chosen otherwise."""
        chosen = {name: getattr(self, name) for name in Behaviour._fields}
        return BEHAVIOURS[self.variant]._replace(**{name: value for name, value in chosen.items() if value is not None})

    def stages(self) -> tuple[range, range]:
        """Returns the steps that are kept and those that are reversed, by their index from noise."""
        kept = min(max(round(self.kept_share * self.steps), 1), self.steps - 1)
        if self.behaviour().stage_orientation == "keep_early":
            return range(kept), range(kept, self.steps)
        return range(self.steps - kept, self.steps), range(self.steps - kept)


class Terms(NamedTuple):
    """The parts of a loss, for each sample."""

    keep: PerSample
    keep_empty: PerSample
    reverse: PerSample
    reverse_empty: PerSample


class ANT:
    """Erases a concept by turning the way to its pictures round, after the steps in which they are laid out.

    As an objective in a trainer it is the loss alone, without a mask: there it moves what the policy trains, such as a
    LoRA, and a mask over the gradients would be one over the reward's gradient too. `erase` masks.
    """

    name = "ANT"

    def __init__(self, config: ANTConfig | None = None) -> None:
        self.config = config or ANTConfig()

    def erase(
        self,
        policy: DiffusionPolicy,
        concept: Concept,
        *,
        output_dir: str | Path | None = None,
        resume: bool = False,
        progress: bool = True,
    ) -> Erasure:
        """Erases as `erase_by_descent` does; the saliency mask is kept in `output_dir` too.

        Raises:
            ValueError: The saliency prompts are another concept's, the maps have nothing in common, or as `descend`.
        """
        student = policy.student_copy("full")
        self.prepare(student, concept)
        mask = self._mask(student, concept, output_dir, resume=resume, progress=progress)
        with nullcontext() if mask is None else masked_gradients(student, mask):
            erasure = erase_by_descent(
                self, policy, concept, output_dir=output_dir, resume=resume, progress=progress, student=student
            )
        return replace(erasure, config={**erasure.config, **self.config.behaviour()._asdict()})

    def unet_calls(self) -> UNetCalls:
        """Returns the calls for a sample: one way to its two steps, and two prompts at each, original and trained.

        The saliency maps, which come before, are not counted; each of their updates takes as many for its one sample.
        """
        last = max(self.config.stages(), key=lambda stage: stage.start)
        way = rollout_calls(last[0], last[-1], self.config.guidance_scale)
        if self.config.behaviour().uncond_grad:
            return UNetCalls(forward=way + 4, backward=4)
        return UNetCalls(forward=way + 6, backward=2)

    def prepare(self, policy: DiffusionPolicy, concept: Concept) -> None:
        """Raises a `ValueError` where the text encoder would cut a text off, or nothing is trainable."""
        check_words(policy, concept)
        check_trainable(policy, f"erasing {concept.name!r} by ANT", "load it with lora=LoRAConfig() or train='full'")

    def loss(self, policy: DiffusionPolicy, batch: ConceptBatch) -> PerSample:
        """Returns the loss of each sample, at one step of each stage on one way from noise, with gradient."""
        cfg = self.config
        prompts, empty = policy.encode(batch.prompts), policy.encode([""] * len(batch.prompts))
        kept, reversed_ = cfg.stages()
        # Other numbers than the seeds themselves, so that one stage's step tells nothing of the other's.
        others = [~seed for seed in batch.seeds]
        stops = torch.stack(
            [random_stops(batch.seeds, kept[0], kept[-1]), random_stops(others, reversed_[0], reversed_[-1])]
        )
        guidance = ClassifierFree(cfg.guidance_scale)
        latents = latents_before(policy, prompts, stops, steps=cfg.steps, guidance=guidance, seeds=batch.seeds)
        timesteps = policy.plan(cfg.steps).timesteps[stops]
        return self.total(self.terms(policy, latents, timesteps, prompts, empty))

    def total(self, terms: Terms) -> PerSample:
        """Returns the weighted sum of the parts."""
        cfg = self.config
        keep = terms.keep + cfg.keep_empty_weight * terms.keep_empty
        return terms.reverse + cfg.reverse_empty_weight * terms.reverse_empty + cfg.keep_weight * keep

    def terms(
        self,
        policy: DiffusionPolicy,
        latents: Float[Tensor, "2 batch channels h w"],
        timesteps: Shaped[Tensor, "2 batch"],
        prompts: Conditioning,
        empty: Conditioning,
    ) -> Terms:
        """Returns the parts of the loss, with gradient; of the latents, those of the kept steps come first."""

        def predictions(*prompted: Conditioning) -> list[Float[Tensor, "2 batch channels h w"]]:
            count = len(prompted)
            conditioning = Conditioning.cat([each for each in prompted for _ in range(2)])
            flat = latents.flatten(0, 1).repeat(count, 1, 1, 1), timesteps.flatten().repeat(count)
            return list(policy.predict_direction(*flat, conditioning).unflatten(0, (count, *timesteps.shape)))

        with policy.reference():
            conditional, unconditional = predictions(prompts, empty)
        if self.config.behaviour().uncond_grad:
            with_prompt, without = predictions(prompts, empty)
        else:
            (with_prompt,) = predictions(prompts)
            with torch.no_grad():
                (without,) = predictions(empty)
        eta = self.config.negative_guidance
        pairs = zip(conditional, unconditional, (-eta, eta), strict=True)
        targets = torch.stack([erased_target(*pair, negative_guidance=scale) for *pair, scale in pairs])
        keep, reverse = (with_prompt - targets).square().flatten(2).mean(dim=2)
        keep_empty, reverse_empty = (without - unconditional).square().flatten(2).mean(dim=2)
        return Terms(keep, keep_empty, reverse, reverse_empty)

    def _mask(
        self, student: DiffusionPolicy, concept: Concept, output_dir: str | Path | None, *, resume: bool, progress: bool
    ) -> Mask | None:
        """Returns the saliency mask, from the run's folder where it is there; None trains everything."""
        cfg = self.config
        if output_dir is not None:
            wanted = TrainingConfig(output_dir=Path(output_dir), iterations=cfg.descent.iterations, resume=resume)
            check_output_dir(wanted)  # before long work
        if cfg.saliency is None:
            return None
        prompts = cfg.saliency.prompts_for(concept)
        if not any(prompt.lower() in phrase.lower() for prompt in prompts for phrase in concept.phrases):
            raise ValueError(
                f"saliency.prompts must be {concept.name!r}'s, one of them part of a phrase that elicits it, got "
                f"{', '.join(prompts)}"
            )
        base = weights_hash(student.model, student.trainable_state())
        chosen = replace(cfg, saliency=replace(cfg.saliency, prompts=prompts))
        record = json.dumps(asdict(chosen) | cfg.behaviour()._asdict() | {"descent": None, "base": base})
        path = None if output_dir is None else Path(output_dir) / "saliency.safetensors"
        if resume and path is not None and path.is_file():
            return read_mask(path, record)
        mask = saliency_mask(
            student, self.loss, prompts, cfg.saliency, keep=cfg.behaviour().mask_keep, progress=progress
        )
        if path is not None:
            from_main(partial(write_mask, path, mask, record))
        return mask
