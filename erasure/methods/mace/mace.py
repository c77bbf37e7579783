"""MACE: keys and values are refined in closed form, then a LoRA for each phrase takes attention off it.

Three stages, all on the keys and values W of cross-attention:

1. Refinement in closed form. Tokens around a phrase answer as they would around its anchor:
   `W' = argmin Σ ‖W' f_old - W f_new‖² + p Σ ‖W' e - W e‖²`, the prior's tokens e staying as they are.
2. A rank-1 update ΔW_i of W' for each phrase i, trained to take attention off it: the sum over layers of
   `‖A[pixels of the concept, tokens of the phrase and of the end]‖` (Frobenius), with A the attention probabilities.
3. Fusion in closed form: `W* = argmin Σ_i Σ ‖W* f - (W' + ΔW_i) f‖² + p Σ ‖W* e - W e‖²`, with f all tokens of the
   prompts of phrase i.

Source: Lu et al. (2024), https://arxiv.org/abs/2403.06135, written from its equations. The authors' code is
Shilin-LU/MACE, for non-commercial use only; nothing here was taken from it. See docs/methods/mace.md for each
departure.
"""

import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor

from erasure.changes import WeightChange
from erasure.concept import Concept
from erasure.descend import DescentConfig, descend
from erasure.erased import Erasure
from erasure.generated import for_run, generated_latents, in_turns
from erasure.methods.attention_maps import CrossAttention, layer_shape, recorded_attention
from erasure.methods.keys_and_values import keys_and_values
from erasure.phrases import (
    SLOT,
    Placed,
    check_absent,
    check_words,
    holds,
    own_phrases,
    phrase_tokens,
    placed,
    template_of,
)
from erasure.protocols import ConceptBatch, UNetCalls, check_unet
from overpaint.policy import ClassifierFree, DiffusionPolicy, LoRAConfig, WeightDelta
from overpaint.policy.noise import SampleNoise
from overpaint.policy.saving import plain_pipeline
from overpaint.policy.types import Latents, PerSample
from overpaint.policy.weights import ADAPTER
from overpaint.settings import Field, NonNegative, settings

from .fusion import LowRank, fused, read_texts, refining_factor
from .masks import MaskedImages, Segmenter, at_size, attention_masks, checked_masks

TARGETS = ("attn2.to_k", "attn2.to_v")
"""Layers that are updated: keys and values of every cross-attention."""

DOWN, UP = f".lora_A.{ADAPTER}", f".lora_B.{ADAPTER}"
"""What peft puts into the names of the two factors of an update."""

TEMPLATES = tuple(
    f"{picture} {SLOT}{where}"
    for picture in ("a photo of", "a picture of", "an image of", "a drawing of", "a painting of", "a close view of")
    for where in ("", " in a room", " on a street", " seen from afar", " with other things")
)
"""Prompts that a phrase is put into, thirty as in the paper; ours."""

PRIOR = tuple(
    f"{picture} {thing}"
    for thing in (
        *("a person", "a man", "a woman", "a child", "people", "a dog", "a cat", "a bird", "a horse", "a fish"),
        *("a tree", "a flower", "a forest", "a mountain", "a river", "the sea", "a beach", "the sky", "snow"),
        *("a garden", "a house", "a street", "a city", "a bridge", "a car", "a train", "a boat", "an aeroplane"),
        *("a bicycle", "a bus"),
        *("a table", "a chair", "a bed", "a lamp", "a book", "a clock", "a cup", "a bottle", "a bag", "a computer"),
        *("bread", "fruit", "a cake", "a meal", "clothes", "a hat", "shoes", "a coat", "music", "a game of football"),
    )
    for picture in ("a photo of", "a painting of")
)
"""Texts whose keys and values stay, with those that the concept preserves. COCO's captions are not shipped; pass them
as `MACEConfig.prior` where you have them."""


@settings
class MACEConfig:
    """Settings of MACE; those of the authors for explicit content by default."""

    variant: Literal["paper", "released"] = "paper"
    """How the prior is weighted in the refinement: by p, or, as in the released code, twice and so by p², which is next
    to nothing."""

    templates: tuple[str, ...] = Field(TEMPLATES, min_length=1)
    """Prompts of both closed forms, with a place for the phrase."""

    prior: tuple[str, ...] = PRIOR
    """Texts whose keys and values stay, with those that the concept preserves; those that hold one of its phrases are
    left out."""

    prior_weight: float = Field(7e-7, ge=0)
    """Weight of each prior text in the refinement (p)."""

    fusion_prior_weight: float = Field(7e-7, ge=0)
    """Weight of each prior text in the fusion."""

    prior_size: int | None = Field(616_767, ge=1)
    """How many texts the prior stands for: those that there are weigh as much together as that many; by default the
    captions of COCO 2014, training and validation, which are the authors' prior. None counts them as they are."""

    prompts: tuple[str, ...] = Field((f"a photo of the {SLOT}",), min_length=1)
    """Prompts of the pictures of a phrase; they take turns."""

    images: int = Field(8, ge=1)
    """Pictures that are drawn of each phrase, where none are given."""

    steps: int = Field(30, ge=1)
    """Denoising steps of a picture (DDIM)."""

    guidance_scale: float = Field(7.5, ge=0)
    """Classifier-free guidance of a picture."""

    draw_batch_size: int = Field(8, ge=1)
    """Pictures drawn at a time. Changes speed and memory, not the pictures."""

    mask_threshold: float = Field(0.3, gt=0, le=1)
    """Where neither masks nor a segmenter are given: attention to the phrase, of a picture's highest, from which on a
    pixel shows the concept."""

    mask_side: int = Field(16, ge=1)
    """Which cross-attentions tell: the smallest with at least this many pixels along a side, or the largest of all."""

    mask_timesteps: tuple[Annotated[int, Field(ge=0)], ...] = Field((200, 400, 600), min_length=1)
    """To which a picture is noised for that; maps are averaged."""

    early_timesteps: bool = False
    """Whether timesteps are drawn by importance, most from 200 to 400, as the authors do for objects; for explicit
    content each is as likely as any other."""

    rank: int = Field(1, ge=1)
    """Of a phrase's update."""

    descent: DescentConfig = DescentConfig(iterations=120, learning_rate=1e-5, weight_decay=1e-2, max_grad_norm=1.0)
    """How the attention of one phrase is descended; each phrase has a descent of its own."""

    def __post_init__(self) -> None:
        """Checks that each template and prompt has one place for the phrase."""
        for name in ("templates", "prompts"):
            if wrong := [text for text in getattr(self, name) if text.count(SLOT) != 1]:
                raise ValueError(f"{name} must hold texts, each with one {SLOT}, got {wrong[0]!r}")


class Pictures(NamedTuple):
    """Pictures of a phrase, and where it is in them."""

    prompts: list[Placed]  # the prompt of each
    latents: Latents  # clean, on the CPU
    masks: Bool[Tensor, "batch mask_h mask_w"]  # pixels of the concept, in the images' size or that of an attention map


class MACE:
    """Erases a concept by keys and values that draw no attention to its words.

    Each phrase of the concept has an update of its own, unless it holds another phrase: then it is one more prompt of
    that, so that "a striped star" beside "striped" does not cost the star its attention.

    As an `Objective` its loss is no error of noise but attention, from 0 to about the square root of what is looked at
    times the layers.

    Args:
        config: Settings.
        images: Images of some phrases, with or without masks; `masked_images` reads them from a folder. Pictures of
            other phrases are drawn by the model itself.
        segment: Finds the phrase in images that have no masks. Without it cross-attention does, a variant of ours.
        folder: Keeps drawn pictures; by default `erase` keeps them in its own folder, if it has one.
        progress: Whether a progress bar is shown while they are drawn.
    """

    name = "MACE"
    folder_name = "pictures"

    def __init__(
        self,
        config: MACEConfig | None = None,
        *,
        images: Mapping[str, MaskedImages] | None = None,
        segment: Segmenter | None = None,
        folder: str | Path | None = None,
        progress: bool = True,
    ) -> None:
        self.config = config or MACEConfig()
        self.images = dict(images or {})
        self.segment = segment
        self.folder = None if folder is None else Path(folder)
        self.progress = progress
        self._pictures: dict[str, Pictures] = {}
        self._drawn = False

    def erase(
        self,
        policy: DiffusionPolicy,
        concept: Concept,
        strength: NonNegative = 1.0,
        *,
        output_dir: str | Path | None = None,
        resume: bool = False,
        progress: bool = True,
    ) -> Erasure:
        """Computes and trains new keys and values. The policy is not changed: see `Erasure.apply`.

        Args:
            policy: Whose model is erased; a LoRA counts as part of it.
            concept: Its phrases lose their attention, their neighbours answer as its anchor's do.
            strength: Share of the change of weights that is made: 0 none, 1 all of it. With the same folder and
                `resume`, another one costs no new training.
            output_dir: Keeps pictures, metrics and checkpoints, a folder for each phrase; None keeps nothing.
            resume: Go on with an interrupted run in the same folder.
            progress: Whether progress bars are shown.

        Raises:
            ValueError: The strength is negative or not finite, a text, an image or a mask cannot be used, or as
                `descend`.
        """
        check_unet(policy, self.name)
        cfg = self.config
        check_words(policy, concept)
        phrases = own_phrases(concept.phrases)
        objective = for_run(self, output_dir, progress=progress)
        prior, count = self.prior(concept)
        templates = {phrase: list(dict.fromkeys([*cfg.templates, *own])) for phrase, own in phrases.items()}
        texts = read_texts(policy, templates, concept.anchor, prior)
        objective._pictures, objective._drawn = objective.pictures(policy, phrases), True

        refined = policy.student_copy("xattn-kv")
        weights = keys_and_values(refined)
        weight = cfg.prior_weight**2 if cfg.variant == "released" else cfg.prior_weight
        factor = refining_factor(texts.old, texts.new, texts.prior, prior_weight=count * weight)
        WeightDelta({name: (value @ factor).float() for name, value in weights.items()}).apply(refined.unet)
        student = with_lora(refined, LoRAConfig(rank=cfg.rank, alpha=float(cfg.rank), targets=TARGETS))
        fresh = student.trainable_state()
        updates = []
        for index, phrase in enumerate(phrases):
            student.load_trainable_state(fresh)
            alone = replace(concept, phrases=(phrase,))
            descend(
                objective, student, alone,
                output_dir=None if output_dir is None else Path(output_dir) / f"phrase-{index:02d}",
                resume=resume, progress=progress, record={"concept": alone},
            )  # fmt: skip
            updates.append(low_rank(student))
        changes = fused(
            weights, factor, updates, texts.prompts, texts.prior, prior_weight=count * cfg.fusion_prior_weight
        )
        delta = WeightDelta({name: (strength * change).float() for name, change in changes.items()})
        settings = {**asdict(cfg), "strength": strength}
        return Erasure.of(policy, self.name, settings, concept, WeightChange(delta))

    def unet_calls(self) -> UNetCalls:
        """Returns the calls for a sample: its attention."""
        return UNetCalls(forward=0.0, backward=1.0)

    def prepare(self, policy: DiffusionPolicy, concept: Concept) -> None:
        """Draws pictures of each phrase with the policy's reference and finds the phrase in them; raises as `erase`."""
        check_words(policy, concept)
        phrases = own_phrases(concept.phrases)
        if not self._drawn:
            with policy.reference():
                self._pictures = self.pictures(policy, phrases)

    def loss(self, policy: DiffusionPolicy, batch: ConceptBatch) -> PerSample:
        """Returns the attention that each sample pays to its phrase and to the end where the concept is, with gradient.

        A prompt that is a phrase stands for the prompts of its pictures; any other must hold a phrase, else a
        `ValueError` refuses it, and is taken for the prompt of one of that phrase's pictures.
        """
        cfg = self.config
        choices = [random.Random(f"mace {seed}") for seed in batch.seeds]
        prompts, latents, masks = [], [], []
        for choice, text in zip(choices, batch.prompts, strict=True):
            phrase = self._phrase_in(text)
            pictures = self._pictures[phrase]
            index = choice.randrange(len(pictures.latents))
            own = text == phrase
            prompts.append(pictures.prompts[index] if own else placed(policy, template_of(phrase, text), phrase))
            latents.append(pictures.latents[index])
            masks.append(pictures.masks[index])
        total = policy.num_timesteps
        odds = timestep_odds(total) if cfg.early_timesteps else None
        timesteps = torch.tensor([choice.choices(range(total), odds)[0] for choice in choices], device=policy.device)
        clean = torch.stack(latents).to(policy.device)
        height, width = clean.shape[-2:]
        noise = SampleNoise(batch.seeds, clean.shape[1:], policy.device).draw()
        conditioning = policy.encode([prompt.text for prompt in prompts])
        with recorded_attention(policy.unet) as record:
            policy.predict_noise(policy.add_noise(clean, noise, timesteps), timesteps, conditioning)
        norm = attention_norm(record, masks, penalised(policy, prompts), height=height, width=width)
        # No attention depends on the last layer's values; training in several processes needs every weight reached.
        *_, last = record
        values = policy.unet.get_submodule(last).to_v
        return norm + 0 * sum(weight.sum() for weight in values.parameters() if weight.requires_grad)

    def pictures(self, policy: DiffusionPolicy, phrases: Collection[str]) -> dict[str, Pictures]:
        """Returns pictures of each phrase, given or drawn by the policy as it is, and where the phrase is in them."""
        cfg = self.config
        if unknown := sorted(self.images.keys() - set(phrases)):
            raise ValueError(f"images must be of the phrases {', '.join(map(repr, phrases))}, got {unknown[0]!r}")
        found = {}
        for number, phrase in enumerate(phrases):
            given = self.images.get(phrase)
            count = cfg.images if given is None else len(given.images)
            prompts = [placed(policy, template, phrase) for template in in_turns(cfg.prompts, count)]
            texts = [prompt.text for prompt in prompts]
            seeds = [random.Random(f"picture {index} of {phrase}").randrange(2**31) for index in range(count)]
            if given is None:
                latents = generated_latents(
                    policy, texts, seeds,
                    steps=cfg.steps, guidance=ClassifierFree(cfg.guidance_scale), batch_size=cfg.draw_batch_size,
                    folder=None if self.folder is None else self.folder / f"phrase-{number:02d}",
                    progress=self.progress,
                )  # fmt: skip
            else:
                latents = policy.encode_images(given.images.to(policy.device)).cpu()

            if given is not None and given.masks is not None:
                masks = checked_masks(given.masks, given.images, phrase)
            elif self.segment is not None:
                images = policy.decode(latents.to(policy.device)) if given is None else given.images
                masks = checked_masks(self.segment(images, phrase), images, phrase)
            else:
                masks = attention_masks(
                    policy, latents, texts, phrase_tokens(policy, prompts),
                    timesteps=cfg.mask_timesteps, threshold=cfg.mask_threshold, side=cfg.mask_side, seeds=seeds,
                )  # fmt: skip
            found[phrase] = Pictures(prompts, latents, masks.cpu())
        if len(sizes := {tuple(pictures.latents.shape[-2:]) for pictures in found.values()}) > 1:
            raise ValueError(f"pictures of all phrases must be of one size, got latents of {sorted(sizes)}")
        return found

    def prior(self, concept: Concept) -> tuple[list[str], float]:
        """Returns the texts whose keys and values are to stay, and how many each of them stands for."""
        cfg = self.config
        check_absent(concept, concept.preserve, "Concept.preserve")
        allowed = [text for text in cfg.prior if not any(holds(text, phrase) for phrase in concept.phrases)]
        texts = list(dict.fromkeys([*concept.preserve, *allowed]))
        if not texts:
            raise ValueError("there must be a prior, in MACEConfig.prior or Concept.preserve, and there is none")
        return texts, 1.0 if cfg.prior_size is None else cfg.prior_size / len(texts)

    def _phrase_in(self, prompt: str) -> str:
        """Returns the phrase that a prompt is or holds."""
        if not self._pictures:
            raise ValueError("prepare must be called before the first loss, and was not")
        held = [phrase for phrase in self._pictures if holds(prompt, phrase)]
        if not held:
            raise ValueError(f"a prompt must hold one of {', '.join(map(repr, self._pictures))}, got {prompt!r}")
        return held[0]


def attention_norm(
    record: Mapping[str, CrossAttention],
    masks: Sequence[Bool[Tensor, "_ _"]],
    tokens: Bool[Tensor, "batch tokens"],
    *,
    height: int,
    width: int,
) -> PerSample:
    """Returns the sum over layers of the Frobenius norm of attention, all heads, from some pixels to some tokens."""
    chosen = {}
    for count in {attention.queries.shape[2] for attention in record.values()}:
        shape = layer_shape(count, height, width)
        pixels = torch.cat([at_size(mask.unsqueeze(0), *shape) for mask in masks]).flatten(1).to(tokens.device)
        chosen[count] = pixels[:, None, :, None] & tokens[:, None, None, :]
    norms = [
        torch.linalg.vector_norm(attention.probabilities() * chosen[attention.queries.shape[2]], dim=(1, 2, 3))
        for attention in record.values()
    ]
    return torch.stack(norms).sum(dim=0)


def penalised(policy: DiffusionPolicy, prompts: Sequence[Placed]) -> Bool[Tensor, "batch tokens"]:
    """Tells which tokens are to lose attention: those of the phrase, the end token, and all that pads."""
    tokens = phrase_tokens(policy, prompts)
    for row, prompt in zip(tokens, prompts, strict=True):
        row[prompt.last :] = True
    return tokens


def timestep_odds(total: int) -> list[float]:
    """Returns `sigmoid(0.05 (t - 200)) - sigmoid(0.05 (t - 400))` for each timestep t."""
    steps = torch.arange(total, dtype=torch.float64)
    return (torch.sigmoid(0.05 * (steps - 200)) - torch.sigmoid(0.05 * (steps - 400))).tolist()


def with_lora(policy: DiffusionPolicy, lora: LoRAConfig) -> DiffusionPolicy:
    """Returns a policy with a fresh LoRA on the same weights; text encoder and VAE are shared."""
    plain = plain_pipeline(policy.family)
    student = DiffusionPolicy(plain, lora=lora, device=policy.device)
    student.prompts = policy.prompts
    return student


def low_rank(policy: DiffusionPolicy) -> dict[str, LowRank]:
    """Returns a copy of a policy's LoRA whose alpha is its rank, by the names of the weights that it updates."""
    state = {name: value.cpu() for name, value in policy.trainable_state().items()}
    return {
        name.replace(DOWN, ""): LowRank(state[name.replace(DOWN, UP)], value)
        for name, value in state.items()
        if DOWN in name
    }
