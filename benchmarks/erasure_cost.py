"""What erasing costs beyond the model calls that it cannot do without.

    python benchmarks/erasure_cost.py

Every trained method runs updates on the tiny world, each against the calls of the UNet that it made, repeated with the
same inputs: with gradient where it had one, then clipping and the optimizer's step. The two alternate in one process
and are timed in CPU-seconds; medians count. The tiny world is the hard case: its UNet is a thousandth of Stable
Diffusion's, and what is around it is the same.

UCE, which makes no such calls, erases nudity from a Stable Diffusion v1.4 with random weights; loading is not counted.
"""

import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import tyro
from torch import Tensor

from benchmarks.random_models import stable_diffusion
from benchmarks.timing import CPU, IdleOptimizer, ratio, seconds, take_turns, temporary_run
from erasure import NUDITY, UCE
from erasure.descend import DescentConfig, descend_once
from erasure.methods.mace import TARGETS, with_lora
from erasure.methods.sa.fisher import FisherConfig
from erasure.phrases import own_phrases
from erasure.registry import method_named
from overpaint.policy import DiffusionPolicy, LoRAConfig
from overpaint.settings import Field, settings
from overpaint.tinyworld.presets import PRESETS, STRIPES

TARGET_RATIO = 1.15
TARGET_SECONDS = 20.0
METHODS = ("esd", "ac", "sa", "receler", "ant", "mace", "eraseflow")
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


class Recorder:
    """Notes every call of a policy's UNet, and makes them again."""

    def __init__(self, policy: DiffusionPolicy) -> None:
        self.policy = policy
        self.calls: list[Call] = []
        self.optimizer = IdleOptimizer(policy.trainable_parameters())
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
        self.optimizer.step()


def measure(name: str, policy: DiffusionPolicy, repeats: int) -> dict[str, list[float]]:
    """Times updates of a method and their calls in turn, in CPU-seconds."""
    method: Any = method_named(name, PRESETS[name])
    fewer: dict[str, Any] = {"images": 4} if hasattr(method.config, "images") else {}
    if name == "sa":
        fewer["fisher"] = FisherConfig(images=2, timesteps=2)
    method.config = replace(method.config, **fewer)
    method.progress = False
    student = student_of(name, method, policy)
    method.prepare(student, CONCEPT)
    descent: DescentConfig = method.config.descent
    recorder = Recorder(student)
    rates = {"learning_rate": descent.learning_rate, "max_grad_norm": descent.max_grad_norm}
    with temporary_run(student, iterations=repeats + 2, **rates) as run:

        def update() -> None:
            descend_once(method, student, CONCEPT, descent, run)

        def recorded() -> Iterator[int]:
            for k in run.iterations():
                state = run.generator.get_state()
                with recorder:
                    update()
                run.generator.set_state(state)  # the timed update draws what the recorded one drew
                yield k

        return take_turns({"update": update, "calls": recorder.again}, recorded(), warm_up=2)


def student_of(name: str, method: Any, policy: DiffusionPolicy) -> DiffusionPolicy:
    """Returns what the method trains."""
    if name == "receler":
        return method.student(policy)
    if name == "mace":
        rank = method.config.rank
        return with_lora(policy.student_copy("xattn-kv"), LoRAConfig(rank=rank, alpha=float(rank), targets=TARGETS))
    return policy.student_copy("full" if name == "ant" else method.config.train)


def main(config: Config) -> dict[str, dict[str, list[float]]]:
    """Measures and prints."""
    from overpaint import tinyworld

    torch.manual_seed(0)
    policy = tinyworld.load_policy()
    found = {}
    print(f"CPU-seconds of an update, medians of {config.repeats}; target: a ratio of at most {TARGET_RATIO:.2f}")
    for name in config.methods:
        times = found[name] = measure(name, policy, config.repeats)
        update, calls = (statistics.median(values) for values in times.values())
        print(f"  {name:8} update {update:.3f}  its UNet calls {calls:.3f}  ratio {ratio(*times.values()):.3f}")
    if config.uce:
        pipeline = DiffusionPolicy(stable_diffusion(CPU, tiny=config.tiny), device="cpu")
        taken = seconds(lambda: UCE().erase(pipeline, STRIPES if config.tiny else NUDITY))
        print(f"UCE: {taken:.1f} CPU-seconds (target: at most {TARGET_SECONDS:.0f})")
    return found


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
