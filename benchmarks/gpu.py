"""Speed and memory of ReFL and of sampling at Stable Diffusion's full size, on the CUDA device at hand.

    python benchmarks/gpu.py                    # everything: about half an hour
    python benchmarks/gpu.py --batch-sizes 4 --no-compile
    python benchmarks/gpu.py --tiny             # the program itself, in seconds on a CPU; measures nothing

Networks have Stable Diffusion v1.4's architecture and ImageReward's, with random weights built here: speed does not
depend on their values, and nothing is downloaded. Images are 512 pixels wide, arithmetic is bf16. A ReFL iteration is
35 denoising steps without gradient, one with it, decoding, ImageReward, backward, the denoising loss on as many pairs,
and AdamW.

The share of the peak is useful arithmetic (what the iteration does without any recomputation, as torch's own counter
counts it) over time, divided by what the same device reaches on large bf16 matrix products in the same run.
"""

import gc
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from overpaint.policy import ClassifierFree, DiffusionPolicy, LoRAConfig
from overpaint.policy.parts import Pipeline
from overpaint.settings import AnyPath, Field, settings
from overpaint.training import TrainingConfig, TrainingRun
from refl import PretrainingPairs, ReFLConfig, ReFLTrainer
from rewards import BlipTokenizer, ImageReward, ImageRewardConfig

PROMPT = "a red circle"
GRADED_STEP = 35  # the authors draw from 30 to 39; one step for all, so that iterations are comparable
REFL_STEPS = 40


@settings
class Config:
    """What is measured."""

    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 4, 16), min_length=1)
    """Images per iteration, and images that are sampled together."""

    compile: bool = True
    """Whether to measure with torch.compile too; compiling takes a minute or two for each row."""

    sampling_steps: int = Field(50, ge=1)
    """Denoising steps of a sampled image."""

    repeats: int = Field(5, ge=1)
    """Timed runs of each row, after two that are not; the median counts."""

    tiny: bool = False
    """Tiny networks on the CPU, a few steps, no compilation: shows that the program runs, and measures nothing."""

    output: AnyPath | None = None
    """JSON file for the results; None prints only."""


class Switches(NamedTuple):
    """One way to run the same arithmetic."""

    trained: Literal["nothing", "LoRA", "full"]
    checkpointing: bool = False
    compile: bool = False
    eight_bit: bool = False

    def __str__(self) -> str:
        """Names what is on."""
        on = [("checkpointing", self.checkpointing), ("compile", self.compile), ("AdamW8bit", self.eight_bit)]
        return ", ".join([self.trained, *(name for name, active in on if active)])


class Row(NamedTuple):
    """One line of the table; rate, memory and share are NaN where they could not be measured."""

    task: Literal["refl", "sampling"]
    switches: str
    batch_size: int
    rate: float
    """Iterations per second for ReFL, images per second for sampling."""
    peak_gib: float
    """Most memory that tensors took, in GiB."""
    peak_share: float
    """Useful arithmetic per second over the measured bf16 matmul peak."""


# The networks.


def stable_diffusion(device: torch.device, *, tiny: bool) -> "Pipeline":
    """Builds the pipeline with random weights: Stable Diffusion v1.4's sizes, or the tiny world's."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    from overpaint.tinyworld import components

    tokenizer = components.build_tokenizer()
    with device:
        if tiny:
            vae, unet = components.build_vae(), components.build_unet()
            text_encoder = components.build_text_encoder(tokenizer)
        else:
            tokenizer.model_max_length = 77
            unet = UNet2DConditionModel(
                sample_size=64,
                block_out_channels=(320, 640, 1280, 1280),
                cross_attention_dim=768,
                attention_head_dim=8,
            )
            vae = AutoencoderKL(
                sample_size=512,
                block_out_channels=(128, 256, 512, 512),
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                layers_per_block=2,
                scaling_factor=0.18215,
            )
            text_encoder = CLIPTextModel(
                CLIPTextConfig(
                    hidden_size=768,
                    intermediate_size=3072,
                    num_hidden_layers=12,
                    num_attention_heads=12,
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )
            )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=components.scheduler(),
        safety_checker=None,  # ty: ignore[invalid-argument-type]  diffusers takes None
        feature_extractor=None,  # ty: ignore[invalid-argument-type]  diffusers takes None
        requires_safety_checker=False,
    )


def image_reward(device: torch.device, *, tiny: bool) -> ImageReward:
    """Builds a frozen ImageReward with random weights, in float32; autocast computes it in bf16."""
    config = ImageRewardConfig()
    if tiny:
        config = ImageRewardConfig(
            image_size=32,
            vision_hidden_size=16,
            vision_layers=1,
            vision_heads=2,
            vision_intermediate_size=32,
            hidden_size=16,
            text_layers=1,
            text_heads=2,
            text_intermediate_size=32,
            vocab_size=16,
        )
    tokenizer = BlipTokenizer(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PROMPT.split()))
    with device:
        return ImageReward(config, tokenizer).requires_grad_(False).eval()


def make_policy(switches: Switches, device: torch.device, *, tiny: bool) -> DiffusionPolicy:
    """Builds the policy: frozen weights in bf16, trained ones in float32."""
    full = switches.trained == "full"
    return DiffusionPolicy(
        stable_diffusion(device, tiny=tiny),
        lora=LoRAConfig() if switches.trained == "LoRA" else None,
        train="full" if full else None,
        dtype=torch.float32 if full else torch.bfloat16,
        device=device,
        gradient_checkpointing=switches.checkpointing,
        compile=switches.compile,
    )


# What is run.


@contextmanager
def refl_iteration(
    switches: Switches, batch_size: int, device: torch.device, *, tiny: bool
) -> Generator[Callable[[], object], None, None]:
    """Yields a function that takes one iteration of the trainer."""
    reward_step, steps = (2, 3) if tiny else (GRADED_STEP, REFL_STEPS)
    policy = make_policy(switches, device, tiny=tiny)
    reward = image_reward(device, tiny=tiny)
    reward.gradient_checkpointing = switches.checkpointing
    config = ReFLConfig(
        batch_size=batch_size,
        micro_batch_size=batch_size,
        pretraining_batch_size=batch_size,
        steps=steps,
        first_reward_step=reward_step,
        last_reward_step=reward_step,
    )
    latents = torch.randn(batch_size, 4, policy.sample_size, policy.sample_size, device=device)
    pairs = PretrainingPairs(latents, [PROMPT] * batch_size)
    trainer = ReFLTrainer(policy, reward, [PROMPT], config, pretraining=pairs)
    with tempfile.TemporaryDirectory() as folder:
        run_config = TrainingConfig(
            output_dir=Path(folder),
            iterations=1,
            mixed_precision="bf16",
            optimizer="adamw8bit" if switches.eight_bit else "adamw",
            progress=False,
        )
        with TrainingRun(policy, run_config) as run:
            trainer.prepare(run)
            yield lambda: trainer.step(run)


@contextmanager
def sampling(
    switches: Switches, batch_size: int, device: torch.device, *, steps: int, tiny: bool
) -> Generator[Callable[[], object], None, None]:
    """Yields a function that draws one batch of images with classifier-free guidance."""
    policy = make_policy(switches, device, tiny=tiny)
    guidance = ClassifierFree(5.0)
    prompts, seeds = [PROMPT] * batch_size, list(range(batch_size))
    yield lambda: policy.draw(prompts, seeds=seeds, steps=steps, guidance=guidance, batch_size=batch_size)


# How it is measured.


def seconds(work: Callable[[], object], device: torch.device, *, repeats: int) -> list[float]:
    """Times runs of the work on the clock, each until the device has finished."""
    times = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        times.append(time.perf_counter() - start)
    return times


def matmul_peak(device: torch.device, *, size: int) -> float:
    """Returns what the device reaches on a product of two square bf16 matrices, in operations per second."""
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    seconds(lambda: a @ b, device, repeats=3)
    return 2 * size**3 / min(seconds(lambda: a @ b, device, repeats=20))


def operations(work: Callable[[], object]) -> int:
    """Counts the floating-point operations of matrix products, convolutions and attention in one run."""
    work()  # encodes the prompts, which later runs have cached
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def measure(
    work: Callable[[], object], device: torch.device, repeats: int, seconds_at_peak: float
) -> tuple[float, float, float]:
    """Returns runs per second, GiB and the share of the peak; NaN for all three where memory runs out."""
    try:
        seconds(work, device, repeats=2)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        duration = statistics.median(seconds(work, device, repeats=repeats))
    except torch.OutOfMemoryError:
        return math.nan, math.nan, math.nan
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else math.nan
    return 1 / duration, memory, seconds_at_peak / duration


def variants(config: Config) -> list[Switches]:
    """Returns the ways in which a ReFL iteration is run."""
    chosen = [Switches("LoRA"), Switches("LoRA", checkpointing=True), Switches("full", checkpointing=True)]
    if not config.tiny:
        chosen += [Switches("full"), Switches("full", checkpointing=True, eight_bit=True)]
        if config.compile:
            chosen += [Switches("LoRA", compile=True), Switches("LoRA", checkpointing=True, compile=True)]
    return chosen


def refl_rows(config: Config, device: torch.device, peak: float) -> Iterator[Row]:
    """Measures ReFL iterations, for each switch and batch size."""
    useful: dict[str, int] = {}
    for switches in variants(config):
        if switches.trained not in useful:
            # Recomputation is no useful work: one image without it is counted, and the work grows with the batch.
            with refl_iteration(Switches(switches.trained), 1, device, tiny=config.tiny) as work:
                useful[switches.trained] = operations(work)
        for batch_size in config.batch_sizes:
            _forget(device)
            with refl_iteration(switches, batch_size, device, tiny=config.tiny) as work:
                batch_operations = useful[switches.trained] * batch_size
                rate, memory, share = measure(work, device, config.repeats, batch_operations / peak)
            yield Row("refl", str(switches), batch_size, rate, memory, share)


def sampling_rows(config: Config, device: torch.device, peak: float) -> Iterator[Row]:
    """Measures sampling, with and without compilation, for each batch size."""
    steps = 2 if config.tiny else config.sampling_steps
    plain = Switches("nothing")
    with sampling(plain, 1, device, steps=steps, tiny=config.tiny) as work:
        useful = operations(work)
    compiled = plain._replace(compile=True)
    for switches in [plain, compiled] if config.compile and not config.tiny else [plain]:
        for batch_size in config.batch_sizes:
            _forget(device)
            with sampling(switches, batch_size, device, steps=steps, tiny=config.tiny) as work:
                rate, memory, share = measure(work, device, config.repeats, useful * batch_size / peak)
            yield Row("sampling", str(switches), batch_size, rate * batch_size, memory, share)


def table(rows: list[Row]) -> str:
    """Returns the rows as a Markdown table; what could not be measured is a dash."""
    lines = ["| task | trained, switches | batch | rate | peak GiB | share of bf16 peak |", "|---|---|--:|--:|--:|--:|"]
    for row in rows:
        unit = "iterations/s" if row.task == "refl" else "images/s"
        rate = "out of memory" if math.isnan(row.rate) else f"{row.rate:.3f} {unit}"
        memory = "-" if math.isnan(row.peak_gib) else f"{row.peak_gib:.1f}"
        share = "-" if math.isnan(row.peak_share) else f"{100 * row.peak_share:.1f} %"
        lines.append(f"| {row.task} | {row.switches} | {row.batch_size} | {rate} | {memory} | {share} |")
    return "\n".join(lines)


def main(config: Config) -> list[Row]:
    """Measures everything and prints it.

    Raises:
        SystemExit: There is no CUDA device, and the tiny run was not asked for.
    """
    if not config.tiny and not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device, and torch sees none; --tiny runs the program on a CPU")
    device = torch.device("cpu" if config.tiny else "cuda")
    torch.manual_seed(0)
    peak = matmul_peak(device, size=128 if config.tiny else 8192)
    name = "the CPU, tiny: these are no measurements" if config.tiny else torch.cuda.get_device_name(device)
    print(f"{name}; torch {torch.__version__}; bf16 matmul peak {peak / 1e12:.1f} TFLOP/s")
    rows = []
    for row in chain(refl_rows(config, device, peak), sampling_rows(config, device, peak)):
        rows.append(row)
        print(table([row]).splitlines()[-1], file=sys.stderr, flush=True)
    print(table(rows))
    if config.output is not None:
        record = {
            "device": name,
            "torch": torch.__version__,
            "matmul_peak": peak,
            "config": asdict(config) | {"output": None},
            "rows": [{key: _json(value) for key, value in row._asdict().items()} for row in rows],
        }
        config.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return rows


def _json(value: object) -> object:
    """JSON has no NaN: what could not be measured is null."""
    return None if isinstance(value, float) and math.isnan(value) else value


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _forget(device: torch.device) -> None:
    """Frees what the row before left: memory, and what was compiled for its shapes."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
