"""Safe Latent Diffusion: guidance away from a safety concept wherever the prompt's prediction comes close to it.

With ε_u, ε_p and ε_S the noise predicted for the empty (or negative) prompt, the prompt and the safety concept, at step
i, element by element:

    μ = 0 where ε_p - ε_S >= λ, else min(|ε_p - ε_S| s_S, 1)
    term = μ (ε_S - ε_u) + s_m m
    m ← β_m m + (1 - β_m) term             from m = 0, during warm-up too
    ε = ε_u + s_g (ε_p - ε_u - term)       without the term during warm-up, i < δ

Source: Schramowski et al. (2023), https://arxiv.org/abs/2211.05105, equations 3 to 8, written from them. The authors'
code is ml-research/safe-latent-diffusion (MIT), commit a42923c. See docs/methods/sld.md for each departure.
"""

import weakref
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from erasure.changes import change_kind
from erasure.concept import Concept
from erasure.erased import Erasure
from erasure.guards import GuardChange
from overpaint.policy import ClassifierFree, Conditioning, DiffusionPolicy, Guidance, StepContext
from overpaint.policy.ddim import cumulative_alphas, noise_scale
from overpaint.policy.families import Flux
from overpaint.policy.parts import Pipeline, UNet
from overpaint.policy.prompts import PromptEncoder
from overpaint.policy.types import Latents
from overpaint.settings import Field, NonNegative, Text, settings

PUBLISHED_TEXT = (
    "hate, harassment, violence, suffering, humiliation, harm, suicide, sexual, nudity, bodily fluids, blood, "
    "obscene gestures, illegal activity, drug use, theft, vandalism, weapons, child abuse, brutality, cruelty"
)
"""The authors' safety concept, for `SLDConfig.concept_text`; diffusers puts "an image showing " before it."""


@settings
class SLDConfig:
    """Settings of SLD; the authors' Medium by default. How strongly to erase is an argument of `SLD.erase` besides."""

    warmup_steps: int = Field(10, ge=0)
    """Steps at the start, by index, that are drawn without safety guidance (δ). The authors draw in 50 steps."""

    guidance_scale: float = Field(1000.0, ge=0)
    """How soon an element counts as fully unsafe (s_S): from a difference of its inverse on."""

    threshold: float = 0.01
    """Signed difference from the safety concept, in units of noise, from which on an element is safe (λ)."""

    momentum_scale: float = Field(0.3, ge=0)
    """How much of the momentum is added (s_m). With 0 nothing is remembered from step to step, which updates that mix
    steps (DDPO) need."""

    momentum_beta: float = Field(0.4, ge=0, lt=1)
    """How much of the momentum is kept from step to step (β_m)."""

    concept_text: Text | None = None
    """The safety concept. None takes the phrases of the concept that is erased, joined by commas. `PUBLISHED_TEXT` is
    the authors' broad one; one for nudity alone is another setting than theirs."""

    @classmethod
    def weak(cls, variant: Literal["paper", "released"] = "paper") -> "SLDConfig":
        """The weakest of the paper's four settings; ``released`` has diffusers' tenth of its guidance scale."""
        if variant not in ("paper", "released"):
            raise ValueError(f"variant must be 'paper' or 'released', got {variant!r}")
        scale = 200.0 if variant == "paper" else 20.0
        return cls(warmup_steps=15, guidance_scale=scale, threshold=0.0, momentum_scale=0.0, momentum_beta=0.0)

    @classmethod
    def medium(cls) -> "SLDConfig":
        """The paper's second setting, and the default of its code."""
        return cls()

    @classmethod
    def strong(cls) -> "SLDConfig":
        """The paper's third setting."""
        return cls(warmup_steps=7, guidance_scale=2000.0, threshold=0.025, momentum_scale=0.5, momentum_beta=0.7)

    @classmethod
    def max(cls) -> "SLDConfig":
        """The strongest of the paper's four settings."""
        return cls(warmup_steps=0, guidance_scale=5000.0, threshold=1.0, momentum_scale=0.5, momentum_beta=0.7)


class SLD:
    """Keeps a concept out of pictures while they are sampled, with a third prediction at every step."""

    name = "SLD"

    def __init__(self, config: SLDConfig | None = None) -> None:
        self.config = config or SLDConfig()

    def erase(self, policy: DiffusionPolicy, concept: Concept, strength: NonNegative = 1.0) -> Erasure:
        """Returns the erasure of a concept. The policy is not changed: see `Erasure.apply`.

        Args:
            policy: What the safety concept has to be readable for.
            concept: Its phrases are the safety concept, unless the settings name one.
            strength: Factor of the guidance scale (s_S): 0 changes nothing, 1 is the setting.

        Raises:
            ValueError: The strength is negative or not finite, or the text encoder cuts the safety concept off.
        """
        check_guided(policy)
        text = self.config.concept_text or ", ".join(concept.phrases)
        _check_length(text, policy.prompts)
        change = SLDChange(replace(self.config, concept_text=text), strength)
        return Erasure.of(policy, self.name, {**asdict(self.config), "strength": strength}, concept, change)


def check_guided(policy: DiffusionPolicy) -> None:
    """Checks that a model is guided by two predictions, which the concept's joins.

    Raises:
        ValueError: It has learned to guide itself.
    """
    if isinstance(policy.family, Flux):
        raise ValueError("SLD must be given a model with classifier-free guidance, got a FluxPipeline, which has none")


@change_kind
@dataclass(frozen=True)
class SLDChange(GuardChange):
    """The change that SLD is: guidance away from a text."""

    kind: ClassVar[str] = "sld"
    config_type: ClassVar[Any] = SLDConfig

    def __post_init__(self) -> None:
        if self.config.concept_text is None:
            raise ValueError("SLDChange.config must give its concept_text, got None")

    def check(self, policy: DiffusionPolicy) -> None:
        """Refuses a model that guides itself."""
        check_guided(policy)

    def guard(self, prompts: PromptEncoder, unet: UNet) -> "SLDGuard":
        """Encodes the safety concept; a `ValueError` refuses one that the text encoder cuts off."""
        text = self.config.concept_text
        _check_length(text, prompts)
        scale = self.strength * self.config.guidance_scale
        return SLDGuard(replace(self.config, guidance_scale=scale), prompts([text]))

    def in_pipeline(self, pipeline: Pipeline, prompts: PromptEncoder) -> "PipelineSLD":
        """Hooks the guard into a pipeline."""
        return PipelineSLD(pipeline, self.guard(prompts, pipeline.unet), prompts)


class SLDGuard:
    """SLD at work: the safety concept's embedding, one row, and what is remembered of the trajectory that is drawn."""

    def __init__(self, config: SLDConfig, concept: Conditioning) -> None:
        self.config = config
        self._concept = concept
        self._history = MomentumHistory()

    def __repr__(self) -> str:
        """Shows the settings."""
        return f"SLDGuard({self.config!r})"

    def guided(self, guidance: ClassifierFree) -> Guidance:
        """Returns guidance with the safety concept as third branch, or the given one where there is nothing to do."""
        return guidance if self.config.guidance_scale == 0 else SLDGuidance(self, guidance)

    def without_momentum(self) -> "SLDGuard":
        """Returns the same guard with nothing to remember: for predictions at steps that are no trajectory."""
        return SLDGuard(replace(self.config, momentum_scale=0.0), self._concept)

    def weakened(self, strength: float) -> "SLDGuard":
        """Returns it with a share of the guidance scale (s_S)."""
        return SLDGuard(replace(self.config, guidance_scale=strength * self.config.guidance_scale), self._concept)

    def attach(self, pipeline: Pipeline) -> None:
        """Makes a plain diffusers pipeline draw in the same way, with its own text encoder's safety concept."""
        SLDChange(self.config).apply_to_pipeline(pipeline)

    def concept(self, like: Conditioning) -> Conditioning:
        """Returns the safety concept, once for each row of `like`; the copy on its device stays there."""
        own, wanted = self._concept.tokens, like.tokens
        if (own.device, own.dtype) != (wanted.device, wanted.dtype):
            self._concept = self._concept.to(wanted)
        return self._concept.expand(len(like))

    def towards(
        self, predictions: Float[Tensor, "3 batch channels h w"], context: StepContext, trajectory: int
    ) -> Float[Tensor, "batch channels h w"]:
        """Returns what takes the place of the prompt's prediction in classifier-free guidance.

        Args:
            predictions: For the empty or negative prompt, the prompt and the safety concept; of the network's kind.
            context: Where on the way each sample is; with momentum, at a step of the latest trajectory.
            trajectory: The same number at every step of one trajectory, see `Conditioning.key`.
        """
        scale = context.noise_scale.view(-1, 1, 1, 1)
        away, prompt, safety = scale * predictions
        remembers = self.config.momentum_scale > 0
        momentum = self._history.before(context, trajectory, away) if remembers else torch.zeros_like(away)
        term, momentum = safety_term(away, prompt, safety, momentum, self.config)
        if remembers:
            self._history.keep(momentum)
        acts = (context.steps >= self.config.warmup_steps).view(-1, 1, 1, 1)
        # At the very end of a schedule without any signal the scale is zero, and so is the term.
        own_kind = term / torch.where(scale == 0, 1.0, scale)
        return torch.where(acts, predictions[1] - own_kind, predictions[1])


class SLDGuidance:
    """Classifier-free guidance with the safety term taken from the prompt's prediction."""

    def __init__(self, guard: SLDGuard, guidance: ClassifierFree) -> None:
        self.guard = guard
        self.guidance = guidance
        self._trajectory = -1

    def branches(self, prompt: Conditioning, empty: Conditioning, context: StepContext) -> tuple[Conditioning, ...]:
        """Returns what to lead away from, the prompt and the safety concept: the term needs all three at any scale."""
        self._trajectory = prompt.key
        return self.guidance.away(prompt, empty), prompt, self.guard.concept(prompt)

    def combine(
        self, predictions: Float[Tensor, "branches batch channels h w"], context: StepContext
    ) -> Float[Tensor, "batch channels h w"]:
        """Returns away + scale * (towards - term - away)."""
        towards = self.guard.towards(predictions, context, self._trajectory)
        return self.guidance.combine(torch.stack([predictions[0], towards]), context)


class MomentumHistory:
    """The momentum before each step of the latest trajectory, so that any step that was taken may be taken again.

    Gradient checkpointing takes steps again, from late to early.
    """

    def __init__(self) -> None:
        self._trajectory: int | None = None
        self._before: dict[int, Latents] = {}
        self._step = 0

    def before(self, context: StepContext, trajectory: int, like: Latents) -> Latents:
        """Returns the momentum before a step, the same for all samples; `StepContext.start` begins a trajectory.

        A `ValueError` refuses a step whose earlier steps were not the latest taken.
        """
        first, last = int(context.steps.min()), int(context.steps.max())
        if first == last == context.start:
            self._trajectory, self._before = trajectory, {first: torch.zeros_like(like)}
        known = self._before if trajectory == self._trajectory else {}
        if first != last or first not in known:
            got = f"step {first}" if first == last else f"steps {first} to {last} together"
            raise ValueError(
                f"SLD's momentum needs the steps of one batch in their order from step 0 on, got {got} of a batch "
                "whose momentum before is not known; set SLDConfig.momentum_scale to 0 to do without (DDPO's updates "
                "mix steps)"
            )
        self._step = first
        return known[first]

    def keep(self, momentum: Latents) -> None:
        """Notes the momentum after the step that was asked for last."""
        self._before[self._step + 1] = momentum


def safety_term(
    away: Latents, prompt: Latents, safety: Latents, momentum: Latents, config: SLDConfig
) -> tuple[Latents, Latents]:
    """Returns the safety term and the momentum after the step, both in units of noise.

    Gradients flow through the predictions that the term is a difference of, not through the mask μ, which is a decision
    and changes by leaps, nor through the momentum.
    """
    difference = (prompt - safety).detach()
    weight = (difference.abs() * config.guidance_scale).clamp(max=1)
    weight = torch.where(difference >= config.threshold, 0.0, weight)  # the sign counts, unlike in the line above
    term = weight * (safety - away) + config.momentum_scale * momentum
    beta = config.momentum_beta
    return term, beta * momentum + (1 - beta) * term.detach()


def _check_length(text: str, prompts: PromptEncoder) -> None:
    """Raises a `ValueError` with the words of a text that are beyond what the text encoder reads."""
    room, tokens = prompts.room - 2, prompts.ids(text)[1:-1]
    if len(tokens) > room:
        lost = " ".join(str(prompts.tokenizer.decode(token)) for token in tokens[room:])
        raise ValueError(f"the safety concept must have at most {room} tokens, got {len(tokens)}; {lost!r} is cut off")


PIPELINE = -1
"""Stands for the one trajectory that a pipeline is drawing."""


class PipelineSLD:
    """SLD in a plain diffusers pipeline: two hooks on its UNet, and where in its loop the pipeline is.

    Before the UNet is called, the doubled batch of classifier-free guidance gets a third part with the safety concept.
    From its answer, the pipeline is given the first part and, in place of the prompt's prediction, that prediction less
    the safety term: the pipeline's own formula then gives SLD's result at whatever scale. Where the pipeline draws
    without guidance its single part gets the empty prompt's as well, and it is given the second of the two.
    """

    def __init__(self, pipeline: Pipeline, guard: SLDGuard, prompts: PromptEncoder) -> None:
        self.guard = guard
        self._prompts = prompts
        self._pipeline = weakref.ref(pipeline)
        self._guided, self._step = False, -1
        self._context: StepContext | None = None
        self._handles = (
            pipeline.unet.register_forward_pre_hook(self._before, with_kwargs=True),
            pipeline.unet.register_forward_hook(self._after),
        )

    def __repr__(self) -> str:
        """Shows the guard."""
        return f"PipelineSLD({self.guard!r})"

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _before(
        self, unet: Any, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Adds what is missing of the three parts to a call of the pipeline's."""
        self._context = None
        pipeline = self._pipeline()
        timestep = inputs[1] if len(inputs) == 2 else None
        if pipeline is None or not isinstance(timestep, Tensor) or timestep.ndim:
            raise ValueError(
                "a UNet with SLD attached must be called by the pipeline that it was attached in, got another call; "
                "erasure.guards.detach(pipeline) takes SLD off"
            )
        if self.guard.config.guidance_scale == 0:
            return None
        if options.get("added_cond_kwargs") is not None:
            raise ValueError("SLD in a pipeline must be used without image prompts (IP-Adapter), got one")
        # The pipeline has this property from its first drawing on.
        self._guided = getattr(pipeline, "do_classifier_free_guidance", False)
        latents, tokens = inputs[0], options["encoder_hidden_states"]
        if self._guided:
            latents = latents.chunk(2)[1]
        like = Conditioning(("",) * len(latents), tokens[: len(latents)])
        parts = [tokens, self.guard.concept(like).tokens]
        if not self._guided:
            parts.insert(0, self._prompts.empty(like).tokens)
        self._context = self._context_at(pipeline.scheduler, timestep, len(latents), latents.device)
        more = {**options, "encoder_hidden_states": torch.cat(parts)}
        return (latents.repeat(3, 1, 1, 1), timestep), more

    def _after(self, unet: Any, inputs: tuple[Any, ...], output: tuple[Tensor]) -> tuple[Tensor] | None:
        """Makes of the three parts those that the pipeline asked for."""
        if self._context is None:
            return None
        predictions = output[0].float().unflatten(0, (3, -1))
        towards = self.guard.towards(predictions, self._context, PIPELINE)
        return ((torch.cat([predictions[0], towards]) if self._guided else towards).to(output[0].dtype),)

    def _context_at(self, scheduler: Any, timestep: Tensor, count: int, device: torch.device) -> StepContext:
        """Counts the calls of a run; a schedule's first timestep begins one.

        Counted and not looked up, because the schedules of some samplers (PNDM) visit a timestep twice.
        """
        timesteps = scheduler.timesteps
        self._step += 1
        if timestep == timesteps[0]:
            self._step = 0
        if self._step >= len(timesteps) or timestep != timesteps[self._step]:
            raise ValueError(
                f"SLD needs every step of a pipeline's run from the first on, got timestep {timestep.item()} as step "
                f"{self._step} of {len(timesteps)}"
            )
        level = cumulative_alphas(scheduler.config)[round(timestep.item())]  # some samplers are between two of training
        alpha = level.to(device).expand(count)
        kind = scheduler.config.get("prediction_type", "epsilon")
        return StepContext(torch.full((count,), self._step, device=device), len(timesteps), noise_scale(alpha, kind))
