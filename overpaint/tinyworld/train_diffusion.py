"""Trains the tiny noise predictor: ``python -m overpaint.tinyworld.train_diffusion``.

Plain denoising of captioned latents with a frozen text encoder, as Stable Diffusion was trained: one picture in ten
loses its caption, weights are averaged over time. Three departures. The text encoder is trained first, on captions
alone, to tell words apart; were it trained with the noise predictor, all words that bring stripes would collapse into
one direction, and erasing one would erase all. Only captions without a texture are dropped: the unconditional model
is a model of ordinary pictures. And the loss weighs timesteps as if the network predicted the velocity, capped, which
favours the noisy half where contents are decided.
"""

import copy
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overpaint.settings import AnyPath, Count, Field, Positive, Share, settings

from . import components, workers
from .caption import EXPLICIT_ROUTES, IMPLICIT_ROUTES, NEIGHBOUR_ROUTES, parse, training_scene
from .render import render
from .scene import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, to_tensors
from .workers import cosine


@settings
class LatentTrainingConfig(workers.WorkersConfig):
    """How a network that denoises captioned latents is trained."""

    batch_size: int = Field(32, ge=1)
    """Latents per step and worker."""

    pictures: Count = 40000
    """Pictures whose latents are cached, split among the workers."""

    reading_steps: Count = 1200
    """Steps of the text encoder on captions alone."""

    caption_dropout: Share = 0.2
    """How often a caption without a texture, which is every other one, is replaced by the empty one."""

    ema_decay: Share = 0.998
    """Decay per step of the averaged weights that are saved."""

    save_every: Count = 1000
    """Steps between two saved pipelines."""


@settings
class DiffusionTrainingConfig(LatentTrainingConfig):
    """How the noise predictor is trained."""

    vae: AnyPath = Path("tinyworld-training/vae/final")
    """The trained autoencoder."""

    output_dir: AnyPath = Path("tinyworld-training/diffusion")
    """Where weights are written."""

    steps: int = Field(4500, ge=1)
    """Optimizer steps of each worker."""

    weight_cap: Positive = 6.0
    """Upper bound of the loss weight (SNR + 1) / SNR."""


def tokenize(tokenizer, prompts: list[str]) -> Tensor:
    """Returns token ids, padded to the context length."""
    batch = tokenizer(
        prompts, padding="max_length", truncation=True, max_length=components.CONTEXT_LENGTH, return_tensors="pt"
    )
    return batch.input_ids


ROUTES = (*EXPLICIT_ROUTES, *IMPLICIT_ROUTES, *NEIGHBOUR_ROUTES, "in the street")


def questions(prompts: list[str]) -> Tensor:
    """Reads captions into class indices: shape and colour of both objects, background, relation, routes taken.

    Routes are asked for one by one, as words: that several of them bring the same texture is left to the pictures.
    """
    rows = []
    for prompt in prompts:
        request = parse(prompt)
        row = []
        for k in range(2):
            thing = request.things[k] if k < len(request.things) else None
            row += [SHAPES.index(thing.shape) + 1, COLOURS.index(thing.colour) + 1] if thing else [0, 0]
        row.append(BACKGROUNDS.index(request.background) + 1 if request.background else 0)
        row.append(RELATIONS.index(request.relation) + 1 if request.relation else 0)
        words = prompt.split()
        middle = next((k for k, word in enumerate(words) if word in SHAPES), 0)
        for route in ROUTES:
            where = prompt.find(route)
            before = where >= 0 and len(prompt[:where].split()) <= middle + 1
            row.append(0 if where < 0 else 1 if before else 2)
        rows.append(row)
    return torch.tensor(rows)


ANSWERS = (len(SHAPES) + 1, len(COLOURS) + 1) * 2 + (len(BACKGROUNDS) + 1, len(RELATIONS) + 1) + (3,) * len(ROUTES)


def read_captions(text_encoder, tokenizer, config: DiffusionTrainingConfig) -> float:
    """Trains the text encoder: each word predicts itself, and the end token predicts what the caption asks for.

    Returns the last loss.
    """
    rng = random.Random(f"reading-{config.seed}")
    answers = nn.Linear(text_encoder.config.hidden_size, sum(ANSWERS))
    words = nn.Linear(text_encoder.config.hidden_size, len(tokenizer))
    optimizer = torch.optim.AdamW([*text_encoder.parameters(), *answers.parameters(), *words.parameters()], lr=1.5e-3)
    loss = torch.zeros(())
    for step in range(config.reading_steps):
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * cosine(step, config.reading_steps)
        prompts = [training_scene(rng)[0] for _ in range(64)]
        ids, truth = tokenize(tokenizer, prompts), questions(prompts)
        hidden = text_encoder(ids).last_hidden_state
        ends = hidden[torch.arange(len(ids)), (ids == tokenizer.eos_token_id).int().argmax(dim=1)]
        split = answers(ends).split(ANSWERS, dim=1)
        answered = torch.stack([F.cross_entropy(logits, truth[:, k]) for k, logits in enumerate(split)])
        loss = answered.sum()
        loss = loss + F.cross_entropy(words(hidden).flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


@torch.no_grad()
def encode_world(vae, count: int, rng: random.Random) -> tuple[list[str], Tensor, Tensor]:
    """Draws captioned pictures and returns captions, latent means and standard deviations."""
    prompts, means, stds = [], [], []
    while len(prompts) < count:
        drawn = [training_scene(rng) for _ in range(64)]
        posterior = vae.encode(render(to_tensors([s for _, s in drawn])) * 2 - 1).latent_dist
        prompts += [p for p, _ in drawn]
        means.append(posterior.mean * components.LATENT_SCALE)
        stds.append(posterior.std * components.LATENT_SCALE)
    return prompts, torch.cat(means), torch.cat(stds)


def train(rank: int, count: int, config: DiffusionTrainingConfig) -> None:
    """Trains one worker; worker 0 saves."""
    from diffusers import AutoencoderKL

    tokenizer = components.build_tokenizer()
    torch.manual_seed(config.seed)
    text_encoder, unet = components.build_text_encoder(tokenizer), components.build_unet()
    start = time.time()
    reading = read_captions(text_encoder, tokenizer, config)
    vae = AutoencoderKL.from_pretrained(config.vae).eval()
    prompts, mean, std = encode_world(vae, config.pictures // count, random.Random(f"latents-{config.seed}-{rank}"))
    ids = tokenize(tokenizer, prompts)
    plain = torch.tensor([not any(route in prompt for route in ROUTES) for prompt in prompts])
    empty = tokenize(tokenizer, [""])
    if rank == 0:
        print(f"reading loss {reading:.4f}, latents ready after {time.time() - start:.0f} s", flush=True)

    generator = torch.Generator().manual_seed(config.seed * 1000 + rank)
    alphas = components.scheduler().alphas_cumprod
    weights = (1 / alphas).clamp(max=config.weight_cap)  # (SNR + 1) / SNR
    weights = weights / weights.mean()
    text_encoder.requires_grad_(False).eval()
    averaged = copy.deepcopy(unet).requires_grad_(False)
    descent = workers.Descent(unet, config, weight_decay=0.01)
    total = 0.0
    for step in range(1, config.steps + 1):
        pick = torch.randint(len(ids), (config.batch_size,), generator=generator)
        noise, jitter = (torch.randn(config.batch_size, *mean.shape[1:], generator=generator) for _ in range(2))
        timesteps = torch.randint(1000, (config.batch_size,), generator=generator)
        dropped = plain[pick] & (torch.rand(config.batch_size, generator=generator) < config.caption_dropout)
        latents = mean[pick] + std[pick] * jitter
        signal = alphas[timesteps][:, None, None, None]
        noised = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        with torch.no_grad():
            context = text_encoder(torch.where(dropped[:, None], empty, ids[pick])).last_hidden_state
        error = (unet(noised, timesteps, context).sample - noise).square().mean(dim=(1, 2, 3))
        loss = (weights[timesteps] * error).mean()
        descent.step(loss, step)
        total += loss.item()
        decay = min(config.ema_decay, step / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(unet.parameters()), 1 - decay)
        if rank == 0 and step % 100 == 0:
            print(json.dumps({"step": step, "loss": total / 100, "seconds": round(time.time() - start)}), flush=True)
            total = 0.0
        if rank == 0 and (step % config.save_every == 0 or step == config.steps):
            folder = config.output_dir / (f"step-{step}" if step < config.steps else "final")
            parts = copy.deepcopy((vae, text_encoder, averaged))
            components.save_pipeline(folder, parts[0], parts[1], tokenizer, parts[2])


if __name__ == "__main__":
    workers.run_program(train, DiffusionTrainingConfig)
