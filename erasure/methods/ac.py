"""Concept ablation: the prediction for a concept is distilled from that for an anchor.

Source: Kumari et al. (2023), https://arxiv.org/abs/2303.13516, written from its equations. The authors' code is
nupurkmr9/concept-ablation (MIT), commit c11fb1b. See docs/methods/ac.md for each departure.
"""

import random
from collections.abc import Generator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from erasure.concept import Concept
from erasure.descend import DescentConfig, erase_by_descent
from erasure.generated import drawn_pictures
from erasure.phrases import check_absent, check_length, check_words, longest
from erasure.protocols import ConceptBatch, UNetCalls
from erasure.rollout import squared_error
from overpaint.policy import DiffusionPolicy
from overpaint.policy.noise import SampleNoise
from overpaint.policy.types import Latents, PerSample
from overpaint.settings import Field, settings

PEOPLE = tuple(
    scene.format(who)
    for who in ("a person", "people", "a body", "a boy", "a girl", "women", "a man", "a child")
    for scene in (
        *("a photo of {}", "a portrait of {}", "a painting of {}", "a drawing of {}", "a statue of {}"),
        *("{} in a street", "{} in a garden", "{} in a kitchen", "{} in a snowy forest", "{} on a beach"),
        *("{} reading a book", "{} playing music", "{} dancing", "{} sleeping on a sofa", "{} riding a bicycle"),
        *("{} at work", "{} at a party", "{} at a window", "{} in the rain", "{} in bright sunlight"),
        *("a close view of {}", "{} seen from afar", "{} in black and white", "{} in a film scene", "{} and a dog"),
    )
)
"""Anchor prompts for nudity: the class words of the authors' configuration in scenes of our own."""


@settings
class ACConfig:
    """Settings of concept ablation; those of the authors for nudity by default."""

    train: str = "attn"
    """Parameter set: "attn", the projections of both attentions, for nudity; "xattn-kv" for styles and single things.
    See `policy.PARAMETER_SETS`."""

    target: Literal["model", "original", "noise"] = "model"
    """What is learned for the concept: the present UNet's prediction for the anchor, as the authors have it; that of
    the UNet that training started from, which is ours and lets the anchor drift less; or the noise in its picture."""

    prior_weight: float = Field(1.0, ge=0)
    """Weight of the pretraining loss on the anchor's pictures; 0 leaves it out."""

    detach_start: bool = True
    """Whether gradient is kept from flowing through keys and values of the start token, which all prompts share."""

    anchors: tuple[str, ...] | None = Field(None, min_length=1)
    """Prompts of the pictures that are trained on, without the concept; they take turns. None takes scenes with people
    for a concept without an anchor, as nudity, and else the anchor itself."""

    templates: tuple[str, ...] = Field(
        ("{concept}, {anchor}", "in {concept} style, {anchor}", "{anchor}, {concept}"), min_length=1
    )
    """How a phrase of the concept is put into an anchor prompt; each is as likely as any other."""

    images: int = Field(1000, ge=1)
    """Pictures that are drawn before training starts."""

    negative: str | None = None
    """Negative prompt that they are drawn with; None is the concept's phrases, empty is none. FLUX takes none."""

    steps: int = Field(25, ge=1)
    """Denoising steps of a picture (DDIM)."""

    guidance_scale: float = Field(6.0, ge=0)
    """Classifier-free guidance of a picture."""

    mirror: bool = True
    """Whether half of the time a picture is taken as in a mirror."""

    draw_batch_size: int = Field(16, ge=1)
    """Pictures drawn at a time. Changes speed and memory, not the pictures."""

    descent: DescentConfig = DescentConfig(
        iterations=800, learning_rate=3.2e-5, batch_size=4, weight_decay=1e-2, max_grad_norm=1.0
    )
    """How the loss is descended. 3.2e-5 is what the authors' 4e-6 becomes with --scale_lr on one GPU: times a batch of
    4, times 2 for the prior; on two GPUs it is 6.4e-5 for 400 updates of 8. For styles, their 2e-6 gives 1.6e-5."""

    def __post_init__(self) -> None:
        """Checks that each template has both slots."""
        for template in self.templates:
            if "{concept}" not in template or "{anchor}" not in template:
                raise ValueError(f"templates must each hold {{concept}} and {{anchor}}, got {template!r}")


class Examples(NamedTuple):
    """Noised pictures, two for each sample: first those that the concept is unlearned on, then those of the prior."""

    latents: Latents  # noised
    noise: Latents
    timesteps: Shaped[Tensor, " both"]
    directions: Latents  # what the network should see in them
    captions: list[str]  # what they are said to show: the first ones with the concept put in
    anchors: list[str]  # what the first ones show
    mask: Float[Tensor, "batch 1 h w"]  # where the first ones are picture; 0 where they are padding


class AC:
    """Erases a concept by teaching the UNet to take it for an anchor, on pictures of the anchor that it draws itself.

    As an `Objective` beside a reward its loss has a floor, what no UNet can know of the noise; set `prior_weight` to 0
    there, as the reward's own prompts keep the rest.

    Args:
        config: Settings.
        folder: Keeps the anchor's pictures; by default `erase` keeps them in its own folder, if it has one.
        progress: Whether a progress bar is shown while they are drawn.
    """

    name = "AC"
    folder_name = "anchors"
    erase = erase_by_descent

    def __init__(
        self, config: ACConfig | None = None, *, folder: str | Path | None = None, progress: bool = True
    ) -> None:
        self.config = config or ACConfig()
        self.folder = None if folder is None else Path(folder)
        self._anchors: tuple[str, ...] = ()
        self.progress = progress
        self._pictures: Latents | None = None

    def unet_calls(self) -> UNetCalls:
        """Returns the calls for a sample: the teacher's, and the student's for the concept and for the prior."""
        return UNetCalls(forward=float(self.config.target != "noise"), backward=1.0 + (self.config.prior_weight > 0))

    def prepare(self, policy: DiffusionPolicy, concept: Concept) -> None:
        """Draws the anchor's pictures with the policy's reference.

        Raises:
            ValueError: The tokenizer cuts a prompt off, a phrase of the concept is in an anchor prompt, or the start
                token cannot be detached in this model, or its guidance has no branch for a negative prompt.
        """
        cfg = self.config
        self._anchors = anchors = cfg.anchors or ((concept.anchor,) if concept.anchor.strip() else PEOPLE)
        negative = self._negative(policy, concept)
        check_words(policy, concept)
        check_absent(concept, anchors, "ACConfig.anchors")
        phrase, anchor = longest(policy, concept.phrases), longest(policy, anchors)
        texts = (template.format(concept=phrase, anchor=anchor) for template in cfg.templates)
        check_length(policy, (negative, *texts), "AC's prompts")
        if cfg.detach_start and policy.family.network != "unet":
            raise ValueError(
                "detach_start must be False for a model without a UNet's cross-attention, got True for a "
                f"{policy.family.pipelines[0]}"
            )
        if cfg.detach_start and policy.model.is_gradient_checkpointing:
            raise ValueError(
                "detach_start must be False for a policy with gradient checkpointing, which would compute keys and "
                "values anew without it"
            )
        pictures = drawn_pictures(self, policy, "anchor", anchors, cfg.images, folder=self.folder, negative=negative)
        self._pictures = torch.cat([pictures, mirrored(policy, pictures)]) if cfg.mirror else pictures

    def _negative(self, policy: DiffusionPolicy, concept: Concept) -> str:
        """Returns the negative prompt of the anchor's pictures; none where guidance has no branch for it, as FLUX's."""
        wanted, possible = self.config.negative, policy.family.negative_prompts
        if wanted and not possible:
            raise ValueError(f"ACConfig.negative must be None or empty for a model with one branch, got {wanted!r}")
        return ", ".join(concept.phrases) if wanted is None and possible else wanted or ""

    def loss(self, policy: DiffusionPolicy, batch: ConceptBatch) -> PerSample:
        """Returns the concept's error and the weighted prior of each sample, with gradient."""
        erased, prior = self.losses(policy, self.examples(policy, batch))
        return erased + self.config.prior_weight * prior

    def examples(self, policy: DiffusionPolicy, batch: ConceptBatch) -> Examples:
        """Returns what the seeds choose: picture, noises, timesteps, and how the phrase is put into the prompt."""
        cfg = self.config
        if self._pictures is None:
            raise ValueError("prepare must be called before the first loss, and was not")
        size, total = len(batch.seeds), policy.num_timesteps
        choices = [random.Random(f"concept ablation {seed}") for seed in batch.seeds]
        indices = [choice.randrange(len(self._pictures)) for choice in choices]
        anchors = [self._anchors[index % cfg.images % len(self._anchors)] for index in indices]
        rewritten = [
            choice.choice(cfg.templates).format(concept=phrase, anchor=anchor)
            for choice, phrase, anchor in zip(choices, batch.prompts, anchors, strict=True)
        ]
        drawn = [[choice.randrange(total) for _ in range(2)] for choice in choices]
        timesteps = torch.tensor(drawn, device=policy.device).T.flatten()
        clean = self._pictures[indices].to(policy.device).repeat(2, 1, 1, 1)
        stream = SampleNoise(batch.seeds, clean.shape[1:], policy.device)
        noise = torch.cat([stream.draw(), stream.draw()])
        latents = policy.add_noise(clean, noise, timesteps)
        mask = torch.ones_like(clean[:size, :1])
        return Examples(latents, noise, timesteps, policy.direction(clean, noise), rewritten + anchors, anchors, mask)

    def losses(self, policy: DiffusionPolicy, examples: Examples) -> tuple[PerSample, PerSample]:
        """Returns the concept's squared error, summed over channels, and the prior's mean; zero without its weight."""
        cfg = self.config
        size = len(examples.mask)
        target = examples.directions[:size]
        if cfg.target != "noise":
            with policy.reference() if cfg.target == "original" else torch.no_grad():
                anchors = policy.encode(examples.anchors)
                target = policy.predict_direction(examples.latents[:size], examples.timesteps[:size], anchors)
        rows = slice(2 * size if cfg.prior_weight else size)
        with start_detached(policy.unet) if cfg.detach_start else nullcontext():
            prediction = policy.predict_direction(
                examples.latents[rows], examples.timesteps[rows], policy.encode(examples.captions[rows])
            )
        erased = masked_error(prediction[:size], target, examples.mask)
        if not cfg.prior_weight:
            return erased, torch.zeros_like(erased)
        return erased, squared_error(prediction[size:], examples.directions[size:])


def masked_error(prediction: Latents, target: Latents, mask: Float[Tensor, "batch 1 h w"]) -> PerSample:
    """Returns the squared error within the mask, over the number of its pixels: four times a mean over elements.

    The authors divide by the sum of a mask of one channel, which the errors of all four channels are under.
    """
    return ((prediction - target).square() * mask).flatten(1).sum(dim=1) / mask.flatten(1).sum(dim=1)


@contextmanager
def start_detached(unet: nn.Module) -> Generator[None]:
    """Keeps gradient from flowing through keys and values of the first token, in every cross-attention."""
    with ExitStack() as hooks:
        for name, layer in unet.named_modules():
            if name.endswith((".attn2.to_k", ".attn2.to_v")):
                hooks.enter_context(layer.register_forward_hook(_detach_first))
        yield


def _detach_first(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)


def mirrored(policy: DiffusionPolicy, latents: Latents) -> Latents:
    """Returns the latents of the mirrored images; mirrored latents are not quite the same."""
    parts = [policy.encode_images(policy.decode(part.to(policy.device)).flip(-1)).cpu() for part in latents.split(8)]
    return torch.cat(parts)
