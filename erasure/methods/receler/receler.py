"""Receler: adapters on the cross-attentions unlearn a concept, adversarially against learned soft prompts.

With ε* the original model, x_t on the way to a picture of the concept c, drawn with the erasers as they are:

    target = ε*(x_t, ∅) - η (ε*(x_t, c) - ε*(x_t, ∅))
    loss = mean (ε(x_t, c_adv) - target)² + 0.1 · regularisation
    regularisation = mean over layers of  sum over pixels of mean over channels of (e (1 - M))² / sum of (1 - M)

e is what a layer's eraser adds, M where the original model attends to the concept's words. c_adv is the concept with
soft tokens behind its words, which some steps of Adam have moved to bring ε*(x_t, c) back.

Source: Huang et al. (2023), https://arxiv.org/abs/2311.17717, written from its equations. The authors' code is
jasper0314-huang/Receler (MIT), commit 3ccedc9. See docs/methods/receler.md for each departure.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from erasure.concept import Concept
from erasure.descend import DescentConfig, descend
from erasure.erased import Erasure
from erasure.methods.attention_maps import concept_map, layer_shape, recorded_attention, words_of
from erasure.phrases import check_words, own_phrases
from erasure.protocols import ConceptBatch, UNetCalls, check_trainable, check_unet
from erasure.rollout import erased_target, noised_latents, rollout_calls, squared_error
from overpaint.policy import Conditioning, DiffusionPolicy
from overpaint.policy.added import add_networks, remove_networks
from overpaint.policy.types import Latents, PerSample
from overpaint.settings import Field, settings

from .erasers import AddedNetworks, check_free, fresh_erasers, recorded_erasers

SoftTokens = Float[Tensor, "batch count dim"]
"""Conditioning that are no word's, some for each prompt; float32."""


@settings
class RecelerConfig:
    """Settings of Receler; those of the authors' code by default, with soft tokens that work."""

    rank: int = Field(128, ge=1)
    """Channels inside an eraser."""

    negative_guidance: float = Field(1.0, gt=0)
    """How far the prediction is led away from the concept (η)."""

    regularization: float = Field(0.1, ge=0)
    """Factor of what the erasers add outside of the concept."""

    mask_threshold: float = Field(0.1, ge=0, le=1)
    """Attention to the concept's words, of the picture's highest, from which on a pixel belongs to the concept."""

    mask_side: int = Field(16, ge=1)
    """Which cross-attentions tell: the smallest with at least this many pixels along a side, or the largest of all."""

    variant: Literal["paper", "released"] = "paper"
    """``paper`` writes soft tokens into the prompt, ``released`` leaves the prompt as it is: in the released code they
    never reach the network."""

    tokens: int = Field(16, ge=1)
    """Soft tokens behind the concept's words; as many of them as the text encoder's context has room for."""

    inner_steps: int = Field(50, ge=1)
    """Calls of the network for each update. The soft tokens move after all but the last, which the erasers learn from.
    Only in the variant ``paper``."""

    token_learning_rate: float = Field(0.1, gt=0)
    """Of the Adam that moves the soft tokens."""

    token_weight_decay: float = Field(0.1, ge=0)
    """Of that Adam; it is added to the gradient, not decoupled from it."""

    steps: int = Field(50, ge=1)
    """Denoising steps of a whole image (DDIM); each is as likely to be trained on as any other."""

    guidance_scale: float = Field(3.0, ge=0)
    """Classifier-free guidance of the rollout that leads to a noised latent."""

    descent: DescentConfig = DescentConfig(iterations=500, learning_rate=3e-4)
    """How the loss is descended."""


class Terms(NamedTuple):
    """The parts of a loss, for each sample."""

    erased: PerSample  # squared distance from what is to be predicted for the concept
    outside: PerSample  # what the erasers add outside of the concept; zero where there are none


class Receler:
    """Erases a concept with erasers beside the UNet's cross-attentions; the UNet itself stays as it is.

    As an objective it takes a policy with whatever trained: erasers (see `student`), or a LoRA or a parameter set of a
    model that has or has not been erased with erasers. Where there are no erasers, there is no regularisation.
    """

    name = "Receler"

    def __init__(self, config: RecelerConfig | None = None) -> None:
        self.config = config or RecelerConfig()

    def erase(
        self,
        policy: DiffusionPolicy,
        concept: Concept,
        *,
        output_dir: str | Path | None = None,
        resume: bool = False,
        progress: bool = True,
    ) -> Erasure:
        """Trains erasers beside a copy of the UNet; arguments as in `erase_by_descent`.

        Each update takes some of the concept's phrases that hold no other: what a longer one says besides, as the star
        of "a striped red star", would be erased with it.

        Raises:
            ValueError: The policy has erasers already; or as `descend`.
        """
        check_unet(policy, self.name)
        student = self.student(policy)
        alone = replace(concept, phrases=tuple(own_phrases(concept.phrases)))
        descend(self, student, alone, output_dir=output_dir, resume=resume, progress=progress)
        return Erasure.of(policy, self.name, asdict(self.config), concept, AddedNetworks.of(student.unet))

    def student(self, policy: DiffusionPolicy) -> DiffusionPolicy:
        """Returns a policy that draws the same, with fresh erasers beside a UNet of its own; they are what it trains.

        Its reference is the original model, as fresh erasers add zero. A `ValueError` refuses a policy with erasers.
        """
        check_free(policy.unet)
        # The student copies what the UNet has, so the erasers are put there for that long.
        add_networks(policy.unet, fresh_erasers(policy.unet, self.config.rank, self.config.descent.seed))
        try:
            return policy.student_copy("added")
        finally:
            remove_networks(policy.unet)

    def unet_calls(self) -> UNetCalls:
        """Returns the calls for a sample: the way to its step, the original's two predictions, and the inner steps.

        All inner steps but the last want a gradient for the soft tokens only.
        """
        inner = self.config.inner_steps if self.config.variant == "paper" else 1
        return UNetCalls(rollout_calls(0, self.config.steps - 1, self.config.guidance_scale) + 2, backward=inner)

    def prepare(self, policy: DiffusionPolicy, concept: Concept) -> None:
        """Raises a `ValueError` where the text encoder would cut a text off, or nothing is trainable."""
        check_words(policy, concept)
        check_trainable(policy, f"erasing {concept.name!r} by Receler", "see Receler.student")

    def loss(self, policy: DiffusionPolicy, batch: ConceptBatch) -> PerSample:
        """Returns the loss of each sample, with gradient; see the module for the equations."""
        cfg = self.config
        prompts = policy.encode(batch.prompts)
        latents, timesteps = noised_latents(
            policy, prompts, batch.seeds, steps=cfg.steps, guidance_scale=cfg.guidance_scale
        )
        tokens = first_tokens(batch.seeds, cfg.tokens, prompts.tokens.shape[-1]).to(policy.device)
        return self.total(self.terms(policy, batch.prompts, latents, timesteps, tokens))

    def total(self, terms: Terms) -> PerSample:
        """Returns the loss of each sample from its parts."""
        return terms.erased + self.config.regularization * terms.outside

    def terms(
        self,
        policy: DiffusionPolicy,
        prompts: Sequence[str],
        latents: Latents,
        timesteps: Shaped[Tensor, " batch"],
        tokens: SoftTokens,
    ) -> Terms:
        """Returns the parts of the loss for given latents and soft tokens before their first step, with gradient."""
        cfg = self.config
        conditioning, words = policy.encode(prompts), words_of(policy, prompts)
        height, width = latents.shape[-2:]
        with policy.reference():
            unconditional = policy.predict_noise(latents, timesteps, policy.encode([""] * len(prompts)))
            with recorded_attention(policy.unet) as attention:
                conditional = policy.predict_noise(latents, timesteps, conditioning)
            where = concept_map(attention, words, height=height, width=width, side=cfg.mask_side)
        target = erased_target(conditional, unconditional, negative_guidance=cfg.negative_guidance)

        if cfg.variant == "paper":
            tokens = self.attack(policy, conditioning, words, latents, timesteps, conditional, tokens)
            conditioning = with_tokens(conditioning, words, tokens)
        with recorded_erasers(policy.unet) as added:
            prediction = policy.predict_noise(latents, timesteps, conditioning)
        erased = squared_error(prediction, target)
        if not added:
            return Terms(erased, torch.zeros_like(erased))
        return Terms(erased, outside(added, where >= cfg.mask_threshold, height=height, width=width))

    def attack(
        self,
        policy: DiffusionPolicy,
        conditioning: Conditioning,
        words: Bool[Tensor, "batch tokens"],
        latents: Latents,
        timesteps: Shaped[Tensor, " batch"],
        wanted: Latents,
        tokens: SoftTokens,
    ) -> SoftTokens:
        """Returns the soft tokens, moved so that the policy predicts what the original does for the concept."""
        cfg = self.config
        tokens = tokens.detach().clone().requires_grad_()
        adam = torch.optim.Adam([tokens], lr=cfg.token_learning_rate, weight_decay=cfg.token_weight_decay)
        for _ in range(cfg.inner_steps - 1):
            with torch.enable_grad():
                prediction = policy.predict_noise(latents, timesteps, with_tokens(conditioning, words, tokens))
                distance = (prediction - wanted).square().sum()
            # Of the sum and then divided: the gradient of a mean is too small for half precision.
            tokens.grad = torch.autograd.grad(distance, tokens)[0] / wanted[0].numel()
            adam.step()
        return tokens.detach()


def first_tokens(seeds: Sequence[int], count: int, width: int) -> SoftTokens:
    """Returns soft tokens as they are before the first step, uniform from 0 to 1; they follow from the seed alone."""
    generators = [torch.Generator().manual_seed(random.Random(f"tokens of {seed}").getrandbits(63)) for seed in seeds]
    return torch.stack([torch.rand(count, width, generator=generator) for generator in generators])


def with_tokens(prompts: Conditioning, words: Bool[Tensor, "batch tokens"], tokens: SoftTokens) -> Conditioning:
    """Returns prompts in which soft tokens take the places behind the words, as far as there are places.

    The end token's place is the first of them. Gradients flow to the tokens.
    """
    hard = prompts.tokens
    places = torch.arange(hard.shape[1], device=hard.device) - 1 - words.sum(dim=1, keepdim=True)
    taken = (places >= 0) & (places < tokens.shape[1])
    index = places.clamp(0, tokens.shape[1] - 1).unsqueeze(-1).expand_as(hard)
    return prompts.with_tokens(torch.where(taken.unsqueeze(-1), tokens.gather(1, index), hard))


def outside(
    added: Mapping[str, Tensor], mask: Bool[Tensor, "batch mask_h mask_w"], *, height: int, width: int
) -> PerSample:
    """Returns what erasers add outside of a mask: the mean square there, averaged over the layers."""
    found = []
    for output in added.values():
        shape = layer_shape(output.shape[1], height, width)
        weight = (~nearest(mask, *shape)).float().flatten(1)
        square = output.float().square().mean(dim=2)
        found.append((square * weight).sum(dim=1) / (weight.sum(dim=1) + 1e-9))
    return torch.stack(found).mean(dim=0)


def nearest(mask: Bool[Tensor, "batch mask_h mask_w"], height: int, width: int) -> Bool[Tensor, "batch h w"]:
    """Returns a mask of another size, each pixel that of the nearest."""
    return torch.nn.functional.interpolate(mask.float().unsqueeze(1), (height, width), mode="nearest").squeeze(1) > 0
