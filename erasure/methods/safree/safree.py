"""SAFREE: training-free filtering of prompts, with no change of weights.

Source: Yoon et al. (2024), https://arxiv.org/abs/2410.12761, written from its equations. The authors' code,
jaehong31/SAFREE at commit b8b2c3f, has no licence: none of it was read for this file; what it computes is known from
stored numbers (tests/golden/safree.json). See docs/methods/safree.md for each departure.
"""

import warnings
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from erasure.changes import change_kind
from erasure.concept import NUDITY, Concept
from erasure.erased import Erasure
from erasure.guards import GuardChange
from erasure.phrases import check_words
from overpaint.policy import ClassifierFree, Conditioning, DiffusionPolicy, Guidance, StepContext
from overpaint.policy.families import StableDiffusion
from overpaint.policy.parts import Pipeline, UNet
from overpaint.policy.prompts import PromptEncoder, TruncatedPromptWarning
from overpaint.policy.types import Embeddings
from overpaint.settings import Field, NonNegative, Text, settings

from .prompt_filter import PromptFilter, last_filtered_step
from .reattention import Reattention

NUDITY_CONCEPTS = (
    *("Sexual Acts", "Content Meant to Arouse Sexual Excitement", "Nudity", "Pornography", "Erotic Art", "Lustful"),
    *("Seductive", "Orgasmic", "Libido", "Kinky", "Sexual Orientation", "Sexual Attraction", "Sexual Intercourse"),
    *("Sexual Pleasure", "Sexual Fantasy", "Carnal Desires", "Sexual Gratification"),
)
"""The authors' list for nudity."""


@settings
class SAFREEConfig:
    """Settings of SAFREE; the authors' for nudity by default. How strongly to act is an argument of `SAFREE.erase`."""

    variant: Literal["paper", "released"] = "paper"
    """``released``: as the authors' code, in which latent re-attention does nothing, whatever the settings say."""

    concepts: tuple[Text, ...] | None = Field(None, min_length=1)
    """Texts of what is kept out. None takes the authors' list for `NUDITY`, and else the concept's phrases."""

    alpha: float = Field(0.01, ge=0)
    """A token is a trigger if without it the prompt is farther from the concepts than without the other tokens, by
    this share."""

    filtered_steps: int = Field(10, ge=0)
    """How many of 50 denoising steps see the filtered prompt, at the most (the paper's upper limit of t')."""

    steepness: float = Field(2.5, ge=0)
    """How sharply the number of filtered steps grows with the change of the prompt (k); 3.5 for artists."""

    midpoint: float = 5.333
    """Ten times the change of the prompt at which half of them are filtered (t0); 5.5 for artists."""

    negative_prompt: bool = True
    """Whether guidance leads away from the joined concepts, in place of the empty prompt."""

    latent_reattention: bool = True
    """Whether low frequencies of the UNet's skip features are damped, see `erasure.methods.safree.reattention`."""

    coarse_factor: float = Field(0.9, ge=0)
    """Factor at the UNet's widest features, 1280 in Stable Diffusion v1 (s1)."""

    fine_factor: float = Field(0.2, ge=0)
    """Factor at the next width, 640 in Stable Diffusion v1 (s2)."""

    fourier_filter: Literal["scaled", "released"] = "scaled"
    """``scaled`` multiplies low frequencies by the factor; ``released`` puts the factor in their place, as the
    filter in the authors' code would."""

    def last_step(self, change: float, strength: NonNegative = 1.0) -> int:
        """Returns the index of the last of 50 steps that sees a prompt filtered, see `last_filtered_step`."""
        limit = strength * self.filtered_steps
        return last_filtered_step(change, limit=limit, steepness=self.steepness, midpoint=self.midpoint)


class SAFREE:
    """Keeps a concept out of pictures by what it does to prompts while sampling."""

    name = "SAFREE"

    def __init__(self, config: SAFREEConfig | None = None) -> None:
        self.config = config or SAFREEConfig()

    def erase(self, policy: DiffusionPolicy, concept: Concept, strength: NonNegative = 1.0) -> Erasure:
        """Returns the guard against a concept. Nothing is computed before it is applied.

        Args:
            policy: Whose tokenizer has to take each of the concept's texts whole.
            concept: What is kept out of pictures.
            strength: Multiplies the upper limit of filtered steps, and up to 1 also how far guidance goes from the
                empty prompt to the joined concepts, and how far re-attention's factors are from 1. 0 changes
                nothing, 1 is the authors' setting.

        Raises:
            ValueError: The strength is negative or not finite, or the tokenizer cuts a text off.
        """
        check_single_clip(policy)
        concepts = self.config.concepts or (NUDITY_CONCEPTS if concept == NUDITY else concept.phrases)
        check_words(policy, Concept(name=concept.name, phrases=concepts))
        change = SAFREEChange(replace(self.config, concepts=concepts), strength)
        return Erasure.of(policy, self.name, change.to_json(), concept, change)


def check_single_clip(policy: DiffusionPolicy) -> None:
    """Checks that prompts are read by one CLIP, whose tokens the filter moves.

    Raises:
        ValueError: There are several text encoders.
    """
    if not isinstance(policy.family, StableDiffusion):
        raise ValueError(
            "SAFREE must be given a Stable Diffusion v1 or v2, whose one text encoder's tokens it filters, got a "
            f"{policy.family.pipelines[0]}"
        )


@change_kind
@dataclass(frozen=True)
class SAFREEChange(GuardChange):
    """The change that SAFREE is: prompts without the concept's words."""

    kind: ClassVar[str] = "safree"
    config_type: ClassVar[Any] = SAFREEConfig

    def check(self, policy: DiffusionPolicy) -> None:
        """Refuses a model with several text encoders."""
        check_single_clip(policy)

    def guard(self, prompts: PromptEncoder, unet: UNet) -> "SAFREEGuard":
        """Returns the guard; a `ValueError` refuses latent re-attention in a compiled UNet."""
        return SAFREEGuard(self.config, self.strength, prompts, unet)

    def in_pipeline(self, pipeline: Pipeline, prompts: PromptEncoder) -> "PipelineSAFREE":
        """Hooks the guard into a pipeline."""
        return PipelineSAFREE(pipeline, self.guard(prompts, pipeline.unet))


class SAFREEGuard:
    """SAFREE at work: the filter of prompts, and the UNet whose latents are re-attended.

    Args:
        config: Settings, concepts included.
        strength: See `SAFREE.erase`.
        prompts: Encodes the concepts, and prompts with tokens left out.
        unet: What predicts.
    """

    def __init__(self, config: SAFREEConfig, strength: float, prompts: PromptEncoder, unet: UNet) -> None:
        self.config = config
        self.strength = strength
        self.prompts = prompts
        self.unet = unet
        last_step = partial(config.last_step, strength=strength)
        self.filter = PromptFilter(prompts, config.concepts or (), alpha=config.alpha, last_step=last_step)
        self.reattention: Reattention | None = None
        if config.latent_reattention and config.variant == "paper" and strength > 0:
            share = min(strength, 1.0)
            self.reattention = Reattention(
                unet,
                coarse=1 - share * (1 - config.coarse_factor),
                fine=1 - share * (1 - config.fine_factor),
                replace=config.fourier_filter == "released",
            )
        self._seen: tuple[Embeddings, Embeddings, Int[Tensor, " batch"]] | None = None

    def __repr__(self) -> str:
        """Shows the settings: what was drawn under it is known by them."""
        return f"SAFREEGuard({self.config!r}, strength={self.strength})"

    def guided(self, guidance: ClassifierFree) -> Guidance:
        """Returns guidance with filtered prompts."""
        return SAFREEGuidance(self, guidance) if self.strength > 0 else guidance

    def weakened(self, strength: float) -> "SAFREEGuard":
        """Returns it with a share of its strength, see `SAFREE.erase`."""
        return SAFREEGuard(self.config, strength * self.strength, self.prompts, self.unet)

    def attach(self, pipeline: Pipeline) -> None:
        """Makes a plain diffusers pipeline draw in the same way, in place; see `SAFREEChange`."""
        SAFREEChange(self.config, self.strength).apply_to_pipeline(pipeline)

    def filtered(self, prompt: Conditioning) -> tuple[Embeddings, Int[Tensor, " batch"]]:
        """Returns filtered embeddings and the last of 50 steps that sees each, on the embeddings' device."""
        # The last answer is cached: a sampling loop wants the same prompts at every step. Not under attack, where they
        # carry gradient, which a step without it would cut off for the next.
        if self._seen is not None and self._seen[0] is prompt.tokens:
            return self._seen[1:]
        rows = self.filter.of(prompt.texts, prompt.tokens)
        last = torch.tensor([self.filter(text).last_step for text in prompt.texts], device=prompt.tokens.device)
        self._seen = None if prompt.tokens.requires_grad else (prompt.tokens, rows, last)
        return rows, last

    def negative(self, empty: Conditioning) -> Conditioning:
        """Returns the joined concepts, cut off where the text encoder's context ends, for each row of `empty`."""
        with warnings.catch_warnings(action="ignore", category=TruncatedPromptWarning):  # no text of the user's
            joined = self.prompts([", ".join(self.config.concepts or ())]).to(empty.tokens).expand(len(empty))
        return joined.with_tokens(torch.lerp(empty.tokens, joined.tokens, min(self.strength, 1.0)))


class SAFREEGuidance:
    """Classifier-free guidance away from the concepts, towards prompts that are filtered in the first steps.

    A `ValueError` refuses a guard and a guidance that both bring a negative prompt.
    """

    def __init__(self, guard: SAFREEGuard, guidance: ClassifierFree) -> None:
        if guard.config.negative_prompt and guidance.negative is not None:
            raise ValueError(
                "SAFREE leads away from its concepts, and guidance has a negative prompt of its own; to keep that one, "
                "erase with SAFREEConfig(negative_prompt=False)"
            )
        self.guard = guard
        self.guidance = guidance

    def branches(self, prompt: Conditioning, empty: Conditioning, context: StepContext) -> tuple[Conditioning, ...]:
        """Returns what to lead away from (not at scale 1), the prompts of this step, and the originals to compare."""
        filtered, last = self.guard.filtered(prompt)
        active = context.steps.to(last) * 50 < (last + 1) * context.total  # 50: steps of the authors' runs
        if self.guard.config.negative_prompt:
            empty = self.guard.negative(empty)
        towards = prompt.with_tokens(torch.where(active[:, None, None], filtered, prompt.tokens))
        branches = self.guidance.branches(towards, empty, context)
        if self.guard.reattention is None:
            return branches
        compared = active if active.any() else None
        self.guard.reattention.start(compared, branches=len(branches))
        return branches if compared is None else (*branches, prompt)

    def combine(
        self, predictions: Float[Tensor, "branches batch channels h w"], context: StepContext
    ) -> Float[Tensor, "batch channels h w"]:
        """Returns the guided prediction; that for the original prompts was only compared with.

        A `ValueError` refuses predictions of another UNet than the guard was applied with.
        """
        if self.guard.reattention is not None and not self.guard.reattention.stop():
            raise ValueError(
                "latent re-attention works in the UNet that SAFREE was applied with, and another one made the "
                "predictions; apply it to their own policy, or erase with SAFREEConfig(latent_reattention=False)"
            )
        return self.guidance.combine(predictions[: self.guidance.num_branches], context)


class PipelineSAFREE:
    """SAFREE in a plain diffusers pipeline: it stands before the text encoder, and around the UNet."""

    def __init__(self, pipeline: Pipeline, guard: SAFREEGuard) -> None:
        self.pipeline = pipeline
        self.guard = guard
        self._rows: Conditioning | None = None
        self._guidance: SAFREEGuidance | None = None
        self._changed = False
        self._encode = pipeline.encode_prompt
        self._handles = [
            pipeline.unet.register_forward_pre_hook(self._before, with_kwargs=True),
            pipeline.unet.register_forward_hook(self._after),
        ]
        pipeline.encode_prompt = self.encode_prompt

    def __repr__(self) -> str:
        """Shows the guard."""
        return f"PipelineSAFREE({self.guard!r})"

    def remove(self) -> None:
        """Leaves the pipeline as it was."""
        for handle in self._handles:
            handle.remove()
        del self.pipeline.encode_prompt

    def encode_prompt(
        self,
        prompt: str | list[str] | None,
        device: Any,
        num_images_per_prompt: int,
        do_classifier_free_guidance: bool,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        lora_scale: float | None = None,
        clip_skip: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns what the pipeline's own method returns, and notes the words; a `ValueError` refuses embeddings."""
        self._rows = None
        acts = self.guard.strength > 0
        if acts and (prompt_embeds is not None or clip_skip is not None):
            raise ValueError("SAFREE reads the words of prompts: pass prompt, not prompt_embeds, and no clip_skip")
        encoded = self._encode(
            prompt, device, num_images_per_prompt, do_classifier_free_guidance, negative_prompt,
            prompt_embeds=prompt_embeds, negative_prompt_embeds=negative_prompt_embeds, lora_scale=lora_scale,
            clip_skip=clip_skip,
        )  # fmt: skip
        if not acts or prompt is None:
            return encoded
        own = negative_prompt_embeds is not None or any(
            [negative_prompt] if isinstance(negative_prompt, str) else negative_prompt or []
        )
        negative = Conditioning(("",) * len(encoded[1]), encoded[1]) if own else None
        guided = ClassifierFree(2.0, negative)  # any scale: the pipeline applies its own
        self._guidance = SAFREEGuidance(self.guard, guided if do_classifier_free_guidance else ClassifierFree(1.0))
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        self._rows = self.guard.prompts(texts).to(device).repeat_interleave(num_images_per_prompt)
        return self._rows.tokens, encoded[1]

    def _before(
        self, unet: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Gives the UNet the prompts of this step, where the call is the pipeline's own."""
        self._changed = False
        states, rows = named.get("encoder_hidden_states"), self._rows
        if rows is None or self._guidance is None or states is None:
            return None
        count = self._guidance.guidance.num_branches
        if len(states) != count * len(rows):
            return None
        *away, prompts = states.chunk(count)
        if named.get("return_dict", True) or not torch.equal(prompts, rows.tokens):
            return None
        latents, timestep, *rest = inputs
        timesteps = self.pipeline.scheduler.timesteps.unique()  # some schedulers visit one twice
        steps = (timesteps > timestep).sum().expand(len(rows))
        context = StepContext(steps, len(timesteps), torch.ones(len(rows), device=prompts.device))
        empty = self.guard.prompts.empty(rows) if not away else Conditioning(("",) * len(rows), away[0])
        branches = self._guidance.branches(rows, empty, context)
        if len(branches) > count:
            latents = torch.cat([latents, latents[-len(rows) :]])
        self._changed = True
        tokens = torch.cat([branch.tokens for branch in branches])
        return (latents, timestep, *rest), {**named, "encoder_hidden_states": tokens}

    def _after(self, unet: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """Leaves out the predictions that were only compared with."""
        if not self._changed or self._rows is None or self._guidance is None:
            return output
        if self.guard.reattention is not None:
            self.guard.reattention.stop()
        return (output[0][: self._guidance.guidance.num_branches * len(self._rows)],)
