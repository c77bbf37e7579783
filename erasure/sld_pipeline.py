"""SLD in a plain diffusers pipeline: two hooks on its UNet, and no class of diffusers changed or derived from.

Before the UNet is called, the doubled batch of classifier-free guidance gets a third part with the safety concept. From
its answer, the pipeline is given the first part and, in place of the prompt's prediction, that prediction less the
safety term: the pipeline's own formula then gives SLD's result at whatever scale. Where the pipeline draws without
guidance its single part gets the empty prompt's as well, and it is given the second of the two.
"""

import weakref
from typing import Any

import torch
from torch import Tensor

from overpaint.policy import StepContext
from overpaint.policy.ddim import cumulative_alphas, noise_scale
from overpaint.policy.parts import Pipeline
from overpaint.policy.prompts import PromptEncoder

from .sld import SLDConfig, SLDGuard

ATTRIBUTE = "guard"
"""Where a pipeline's UNet has what is attached to it."""


def attach(pipeline: Pipeline, config: SLDConfig) -> None:
    """Makes a pipeline draw with safety guidance, with classifier-free guidance or without.

    Raises:
        ValueError: The pipeline has a guard, or its text encoder cuts the safety concept off.
    """
    if (found := getattr(pipeline.unet, ATTRIBUTE, None)) is not None:
        raise ValueError(f"a pipeline takes one guard, and this one has {found!r}")
    prompts = PromptEncoder(pipeline.text_encoder, pipeline.tokenizer)
    setattr(pipeline.unet, ATTRIBUTE, AttachedGuard(pipeline, SLDGuard.of(config, prompts), prompts))


def detach(pipeline: Pipeline) -> None:
    """Takes off what `attach` put on.

    Raises:
        ValueError: There is nothing to take off.
    """
    found = getattr(pipeline.unet, ATTRIBUTE, None)
    if not isinstance(found, AttachedGuard):
        raise ValueError(f"the pipeline must have SLD attached, got {found!r}")
    found.remove()
    delattr(pipeline.unet, ATTRIBUTE)


class AttachedGuard:
    """The hooks, and where in its loop the pipeline is."""

    def __init__(self, pipeline: Pipeline, guard: SLDGuard, prompts: PromptEncoder) -> None:
        self.guard = guard
        self._prompts = prompts
        self._guided = False
        self._pipeline = weakref.ref(pipeline)
        self._step = -1
        self._moment: StepContext | None = None
        self._handles = (
            pipeline.unet.register_forward_pre_hook(self._before, with_kwargs=True),
            pipeline.unet.register_forward_hook(self._after),
        )

    def __repr__(self) -> str:
        """Shows the guard."""
        return f"AttachedGuard({self.guard!r})"

    def remove(self) -> None:
        """Takes the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _before(
        self, unet: Any, inputs: tuple[Any, ...], options: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Adds what is missing of the three parts to a call of the pipeline's."""
        self._moment = None
        pipeline = self._pipeline()
        timestep = inputs[1] if len(inputs) == 2 else None
        if pipeline is None or not isinstance(timestep, Tensor) or timestep.ndim:
            raise ValueError(
                "a UNet with SLD attached must be called by the pipeline that it was attached in, got another call; "
                "erasure.sld_pipeline.detach(pipeline) takes SLD off"
            )
        if self.guard.config.guidance_scale == 0:
            return None
        if options.get("added_cond_kwargs") is not None:
            raise ValueError("SLD in a pipeline must be used without image prompts (IP-Adapter), got one")
        # The pipeline has this property from its first drawing on.
        self._guided = getattr(pipeline, "do_classifier_free_guidance", False)
        latents, embeddings = inputs[0], options["encoder_hidden_states"]
        if self._guided:
            latents = latents.chunk(2)[1]
        else:
            embeddings = torch.cat([self._prompts.empty(embeddings), embeddings])
        self._moment = self._moment_of(pipeline.scheduler, timestep, len(latents), latents.device)
        safety = self.guard.embedding(embeddings[: len(latents)])
        more = {**options, "encoder_hidden_states": torch.cat([embeddings, safety])}
        return (latents.repeat(3, 1, 1, 1), timestep), more

    def _after(self, unet: Any, inputs: tuple[Any, ...], output: tuple[Tensor]) -> tuple[Tensor] | None:
        """Makes of the three parts those that the pipeline asked for."""
        if self._moment is None:
            return None
        predictions = output[0].float().unflatten(0, (3, -1))
        towards = self.guard.towards(predictions, self._moment, self)
        return ((torch.cat([predictions[0], towards]) if self._guided else towards).to(output[0].dtype),)

    def _moment_of(self, scheduler: Any, timestep: Tensor, count: int, device: torch.device) -> StepContext:
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
