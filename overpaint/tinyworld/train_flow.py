"""Trains the tiny world's flow transformer: ``python -m overpaint.tinyworld.train_flow``.

Flow matching on captioned latents, as Stable Diffusion 3 was trained (Esser et al. 2024,
https://arxiv.org/abs/2403.03206): the velocity `noise - image` is predicted at levels that are drawn from a
logit-normal. The autoencoder and the first text encoder are those of the tiny world's Stable Diffusion; the second text
encoder learns to read captions from another seed. Captions without a texture are dropped now and then, as there.
"""

import copy
import json
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from overpaint.settings import AnyPath, Field, settings

from . import components, workers
from .loading import pipeline_dir
from .train_diffusion import (
    ROUTES,
    DiffusionTrainingConfig,
    LatentTrainingConfig,
    encode_world,
    read_captions,
    tokenize,
)


@settings
class FlowTrainingConfig(LatentTrainingConfig):
    """How the velocity predictor is trained."""

    pipeline: AnyPath = pipeline_dir()
    """The tiny world's Stable Diffusion, whose autoencoder and text encoder are taken."""

    output_dir: AnyPath = Path("tinyworld-training/flow")
    """Where weights are written."""

    steps: int = Field(6000, ge=1)
    """Optimizer steps of each worker."""


@torch.no_grad()
def encoded(text_encoders: list[Any], ids: Tensor) -> tuple[Tensor, Tensor]:
    """Returns tokens and pooled text as the family reads them, with one token of zeros in T5's place."""
    outputs = [encoder(ids, output_hidden_states=True) for encoder in text_encoders]
    tokens = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    zero = tokens.new_zeros(len(tokens), 1, tokens.shape[-1])
    return torch.cat([tokens, zero], dim=1), torch.cat([output.text_embeds for output in outputs], dim=-1)


def readers(config: FlowTrainingConfig, tokenizer: Any) -> list[Any]:
    """Returns both text encoders, frozen: the tiny world's own, and one that has learned from another seed."""
    from transformers import CLIPTextModel

    first = CLIPTextModel.from_pretrained(config.pipeline / "text_encoder", dtype=torch.float32)
    torch.manual_seed(config.seed + 1)
    second = components.build_text_encoder(tokenizer)
    read_captions(second, tokenizer, DiffusionTrainingConfig(reading_steps=config.reading_steps, seed=config.seed + 1))
    return [components.projected(encoder).requires_grad_(False).eval() for encoder in (first, second)]


def train(rank: int, count: int, config: FlowTrainingConfig) -> None:
    """Trains one worker; worker 0 saves."""
    from diffusers import AutoencoderKL

    tokenizer, start = components.build_tokenizer(), time.time()
    text_encoders = readers(config, tokenizer)
    torch.manual_seed(config.seed)
    transformer = components.build_transformer()
    vae = AutoencoderKL.from_pretrained(config.pipeline / "vae", torch_dtype=torch.float32).eval()
    prompts, mean, std = encode_world(vae, config.pictures // count, random.Random(f"latents-{config.seed}-{rank}"))
    ids, empty = tokenize(tokenizer, prompts), tokenize(tokenizer, [""])
    plain = torch.tensor([not any(route in prompt for route in ROUTES) for prompt in prompts])
    if rank == 0:
        print(f"ready after {time.time() - start:.0f} s", flush=True)

    generator = torch.Generator().manual_seed(config.seed * 1000 + rank)
    averaged = copy.deepcopy(transformer).requires_grad_(False)
    descent = workers.Descent(transformer, config, weight_decay=0.01)
    total = 0.0
    for step in range(1, config.steps + 1):
        pick = torch.randint(len(ids), (config.batch_size,), generator=generator)
        noise, jitter = (torch.randn(config.batch_size, *mean.shape[1:], generator=generator) for _ in range(2))
        levels = torch.randn(config.batch_size, generator=generator).sigmoid()
        dropped = plain[pick] & (torch.rand(config.batch_size, generator=generator) < config.caption_dropout)
        tokens, pooled = encoded(text_encoders, torch.where(dropped[:, None], empty, ids[pick]))
        clean, level = mean[pick] + std[pick] * jitter, levels[:, None, None, None]
        velocity = transformer(
            hidden_states=(1 - level) * clean + level * noise,
            timestep=1000 * levels,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
        ).sample
        loss = (velocity - (noise - clean)).square().mean()
        descent.step(loss, step)
        total += loss.item()
        decay = min(config.ema_decay, step / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(transformer.parameters()), 1 - decay)
        if rank == 0 and step % 100 == 0:
            print(json.dumps({"step": step, "loss": total / 100, "seconds": round(time.time() - start)}), flush=True)
            total = 0.0
        if rank == 0 and (step % config.save_every == 0 or step == config.steps):
            folder = config.output_dir / (f"step-{step}" if step < config.steps else "final")
            parts = copy.deepcopy((vae, text_encoders, averaged))
            components.save_flow_pipeline(folder, parts[0], parts[1], tokenizer, parts[2])


if __name__ == "__main__":
    workers.run_program(train, FlowTrainingConfig)
