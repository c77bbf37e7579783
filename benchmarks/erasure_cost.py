"""What erasing costs beyond the model calls that it cannot do without.

    python benchmarks/erasure_cost.py

Every trained method runs updates on the tiny world, each against the calls of the UNet that it made, repeated with the
same inputs: with gradient where it had one, then clipping and the optimizer's step. The two alternate in one process
and are timed in CPU-seconds; medians count. The tiny world is the hard case: its UNet is a thousandth of Stable
Diffusion's, and what is around it is the same.

UCE, which makes no such calls, erases nudity from a Stable Diffusion v1.4 with random weights; loading is not counted.
"""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks.gpu import stable_diffusion
from benchmarks.overhead import cpu_seconds
from erasure import NUDITY, UCE
from erasure.descend import DescentConfig, descend_once
from erasure.methods.mace import TARGETS, with_lora
from erasure.methods.sa.fisher import FisherConfig
from erasure.phrases import own_phrases
from erasure.registry import method_named
from overpaint.policy import DiffusionPolicy, LoRAConfig
from overpaint.settings import Field, settings
from overpaint.tinyworld.presets import PRESETS, STRIPES
from overpaint.training import TrainingConfig, TrainingRun

TARGET_RATIO = 1.15
TARGET_SECONDS = 20.0
METHODS = ("esd", "ac", "sa", "receler", "ant", "mace")
CONCEPT = replace(STRIPES, phrases=tuple(own_phrases(STRIPES.phrases)))


@settings
class Config:
    """What is measured."""

    methods: tuple[str, ...] = METHODS
    """Trained methods."""

    repeats: int = Field(10, ge=1)
    """Timed updates of each, after two that are not."""

    uce: bool = True
    """Whether UCE is timed at Stable Diffusion's size, which takes 8 GiB of memory."""

    tiny: bool = False
    """UCE on the tiny world's sizes: only shows that the program runs."""

    def __post_init__(self) -> None:
        """Checks the names."""
        if unknown := [name for name in self.methods if name not in METHODS]:
            raise ValueError(f"methods must be among {', '.join(METHODS)}, got {unknown[0]!r}")


class Call(NamedTuple):
    """A call of the UNet as a method made it."""

    inputs: tuple[Tensor, ...]
    """Latents, timesteps and embeddings."""
    wanted: Literal["nothing", "embeddings", "weights"]
    """What its gradient was wanted for."""


class Timing(NamedTuple):
    """CPU-seconds of each update, and of its calls alone."""

    update: list[float]
    calls: list[float]

    @property
    def ratio(self) -> float:
        """The median of updates over that of the calls."""
        return statistics.median(self.update) / statistics.median(self.calls)


class Recorder:
    """Notes every call of a policy's UNet, and makes them again."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        self.policy = policy
        self.calls: list[Call] = []
        self.parameters = policy.trainable_parameters()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=0.0)
        self._hook: Any = None

    def __enter__(self) -> "Recorder":
        self.calls.clear()
        self._hook = self.policy.unet.register_forward_pre_hook(self._note, with_kwargs=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _note(self, _: Any, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        embeddings = options["encoder_hidden_states"]
        wanted: Literal["nothing", "embeddings", "weights"] = "nothing"
        if torch.is_grad_enabled():
            wanted = "embeddings" if embeddings.requires_grad else "weights"
        self.calls.append(Call(tuple(value.detach() for value in (*args, embeddings)), wanted))

    def again(self) -> None:
        """Makes the same calls, one update's."""
        for (latents, timesteps, embeddings), wanted in self.calls:
            embeddings.requires_grad_(wanted == "embeddings")
            with torch.set_grad_enabled(wanted != "nothing"):
                out = self.policy.unet(latents, timesteps, encoder_hidden_states=embeddings, return_dict=False)[0]
            if wanted == "embeddings":
                torch.autograd.grad(out.square().sum(), embeddings)
            elif wanted == "weights":
                out.square().mean().backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def measure(name: str, policy: DiffusionPolicy, repeats: int) -> Timing:
    """Times updates of a method and their calls in turn, each going first every other time."""
    method: Any = method_named(name, PRESETS[name])
    fewer: dict[str, Any] = {"images": 4} if hasattr(method.config, "images") else {}
    if name == "sa":
        fewer["fisher"] = FisherConfig(images=2, timesteps=2)
    method.config = replace(method.config, **fewer)
    method.progress = False
    student = student_of(name, method, policy)
    method.prepare(student, CONCEPT)
    descent: DescentConfig = method.config.descent
    recorder, timing = Recorder(student), Timing([], [])
    with tempfile.TemporaryDirectory() as folder:
        run_config = TrainingConfig(
            output_dir=Path(folder),
            iterations=repeats + 2,
            learning_rate=descent.learning_rate,
            max_grad_norm=descent.max_grad_norm,
            progress=False,
        )
        with TrainingRun(student, run_config) as run:
            for k in run.iterations():
                state = run.generator.get_state()
                with recorder:
                    descend_once(method, student, CONCEPT, descent, run)
                run.generator.set_state(state)  # the timed update draws what the recorded one drew

                def update() -> None:
                    descend_once(method, student, CONCEPT, descent, run)

                works: tuple[Callable[[], None], ...] = (update, recorder.again)
                seconds = {work: cpu_seconds(work) for work in (works if k % 2 else works[::-1])}
                if k >= 2:
                    timing.update.append(seconds[works[0]])
                    timing.calls.append(seconds[works[1]])
    return timing


def student_of(name: str, method: Any, policy: DiffusionPolicy) -> DiffusionPolicy:
    """Returns what the method trains."""
    if name == "receler":
        return method.student(policy)
    if name == "mace":
        rank = method.config.rank
        return with_lora(policy.student_copy("xattn-kv"), LoRAConfig(rank=rank, alpha=float(rank), targets=TARGETS))
    return policy.student_copy("full" if name == "ant" else method.config.train)


def uce_seconds(*, tiny: bool = False) -> float:
    """Returns the CPU-seconds of erasing nudity by UCE from a Stable Diffusion v1.4 with random weights."""
    pipeline = stable_diffusion(torch.device("cpu"), tiny=tiny)
    policy = DiffusionPolicy(pipeline, device="cpu")
    return cpu_seconds(lambda: UCE().erase(policy, STRIPES if tiny else NUDITY))


def main(config: Config) -> dict[str, Timing]:
    """Measures and prints."""
    from overpaint import tinyworld

    torch.manual_seed(0)
    policy = tinyworld.load_policy()
    timings = {}
    print(f"CPU-seconds of an update, medians of {config.repeats}; target: a ratio of at most {TARGET_RATIO:.2f}")
    for name in config.methods:
        timing = timings[name] = measure(name, policy, config.repeats)
        update, calls = (statistics.median(values) for values in timing)
        print(f"  {name:8} update {update:.3f}  its UNet calls {calls:.3f}  ratio {timing.ratio:.3f}")
    if config.uce:
        seconds = uce_seconds(tiny=config.tiny)
        print(f"UCE: {seconds:.1f} CPU-seconds (target: at most {TARGET_SECONDS:.0f})")
    return timings


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Config, description=__doc__))
