"""SAFREE in a plain diffusers pipeline: before its text encoder and around its UNet, and no class derived from."""

from typing import Any

import torch
from torch import Tensor, nn

from overpaint.policy import ClassifierFree, StepContext
from overpaint.policy.parts import Pipeline
from overpaint.policy.prompts import PromptEncoder
from overpaint.policy.types import Embeddings

from .safree import SAFREEConfig, SAFREEGuard, SAFREEGuidance

ATTRIBUTE = "guard"
"""Where a pipeline's UNet has what is attached to it."""


def attach(pipeline: Pipeline, config: SAFREEConfig, strength: float) -> None:
    """Puts SAFREE to work in a pipeline, in place; without classifier-free guidance too.

    Raises:
        ValueError: The pipeline has a guard, or its UNet is compiled and latents are to be re-attended.
    """
    if (found := getattr(pipeline.unet, ATTRIBUTE, None)) is not None:
        raise ValueError(f"a pipeline takes one guard, and this one has {found!r}")
    setattr(pipeline.unet, ATTRIBUTE, AttachedSAFREE(pipeline, config, strength))


def detach(pipeline: Pipeline) -> None:
    """Makes a pipeline draw again as it did before `attach`.

    Raises:
        ValueError: SAFREE is not attached to it.
    """
    found = getattr(pipeline.unet, ATTRIBUTE, None)
    if not isinstance(found, AttachedSAFREE):
        raise ValueError(f"the pipeline must have SAFREE attached, got {found!r}")
    found.remove()
    delattr(pipeline.unet, ATTRIBUTE)


class AttachedSAFREE:
    """SAFREE in a plain diffusers pipeline: it stands before the text encoder, and around the UNet.

    Args:
        pipeline: What is changed.
        config: Settings, concepts included.
        strength: See `SAFREE.erase`.
    """

    def __init__(self, pipeline: Pipeline, config: SAFREEConfig, strength: float) -> None:
        self.pipeline = pipeline
        self.prompts = PromptEncoder(pipeline.text_encoder, pipeline.tokenizer)
        self.guard = SAFREEGuard(config, strength, self.prompts, pipeline.unet)
        self._rows: Embeddings | None = None
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
        return f"AttachedSAFREE({self.guard!r})"

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
        """Returns what the pipeline's own method returns, and notes the words.

        Raises:
            ValueError: Prompts come as embeddings, or as other embeddings than the encoder's last.
        """
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
        guided = ClassifierFree(2.0, encoded[1] if own else None)  # any scale: the pipeline applies its own
        self._guidance = SAFREEGuidance(self.guard, guided if do_classifier_free_guidance else ClassifierFree(1.0))
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        self._rows = self.prompts(texts).to(device).repeat_interleave(num_images_per_prompt, dim=0)
        return self._rows, encoded[1]

    def _before(
        self, unet: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Gives the UNet the prompts of this step, where the call is the pipeline's own."""
        self._changed = False
        states, rows = named.get("encoder_hidden_states"), self._rows
        if rows is None or self._guidance is None or states is None:
            return None
        count = self._guidance.guidance.branches
        if len(states) != count * len(rows):
            return None
        *away, prompts = states.chunk(count)
        if named.get("return_dict", True) or not torch.equal(prompts, rows):
            return None
        latents, timestep, *rest = inputs
        timesteps = self.pipeline.scheduler.timesteps.unique()  # some schedulers visit one twice
        steps = (timesteps > timestep).sum().expand(len(rows))
        context = StepContext(steps, len(timesteps), torch.ones(len(rows), device=rows.device))
        branches = self._guidance.embeddings(prompts, away[0] if away else self.prompts.empty(prompts), context)
        if len(branches) > count:
            latents = torch.cat([latents, latents[-len(rows) :]])
        self._changed = True
        return (latents, timestep, *rest), {**named, "encoder_hidden_states": branches.flatten(0, 1)}

    def _after(self, unet: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        """Leaves out the predictions that were only compared with."""
        if not self._changed or self._rows is None or self._guidance is None:
            return output
        if self.guard.reattention is not None:
            self.guard.reattention.stop()
        return (output[0][: self._guidance.guidance.branches * len(self._rows)],)
