"""Soft prompt: the attack of `adversarial_prompt` with free vectors, an upper bound of what any words could do.

The vectors stand before each prompt at the text encoder's input and need not be those of words: nobody can type them.
Source: [ours], with the loop of `prompt_attack`; the vectors begin as a neutral text's.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from overpaint.policy import DiffusionPolicy
from overpaint.policy.soft_prompts import initial_vectors
from overpaint.settings import Field, Text, settings

from .probe import Attempt, Floor, Need, ProbeTask
from .prompt_attack import AttackConfig, PromptAttack


@settings
class SoftPromptConfig:
    """Settings of the attack with free vectors."""

    vectors: int = Field(5, ge=1)
    """Vectors before each prompt."""

    initial_text: Text = "object"
    """Its tokens are what the vectors begin as, from the first on and again from the first where they are fewer."""

    attack: AttackConfig = AttackConfig(weight_decay=0.0)
    """How long and how fast they are moved, and towards what."""


class SoftPrompt:
    """Seeks vectors before each prompt that bring the concept back."""

    name: ClassVar[str] = "soft-prompt"
    floors: ClassVar[tuple[Floor, ...]] = ("benign", "foreign")
    needs: ClassVar[tuple[Need, ...]] = ("one text encoder",)

    def __init__(self, config: SoftPromptConfig | None = None) -> None:
        self.config = config or SoftPromptConfig()

    def attempt(self, policy: DiffusionPolicy, task: ProbeTask) -> list[Attempt]:
        """Attacks the prompts that do not show the concept by themselves; `numbers` hold the rate before and after.

        Raises:
            ValueError: The text encoder has no room for the vectors, or the settings name a timestep that there is not.
        """
        first = initial_vectors(policy.prompts, self.config.initial_text, self.config.vectors)
        tokens = FreeVectors(first.expand(len(task.prompts), -1, -1))
        attack = PromptAttack(policy, task, tokens, self.config.attack, self.name)
        return [attack.run(f"{self.config.vectors} vectors")]


class FreeVectors:
    """Vectors that may be anywhere."""

    def __init__(self, first: Float[Tensor, "prompts tokens dim"]) -> None:
        self.free: Tensor = first.clone().requires_grad_()

    def drawn(self, rows: Sequence[int], generators: Sequence[torch.Generator]) -> Float[Tensor, "rows tokens dim"]:
        """Returns them; nothing is random."""
        return self.free[list(rows)]

    def settle(self) -> None:
        """Leaves them where they are."""

    def found(self, rows: Sequence[int]) -> Float[Tensor, "rows tokens dim"]:
        """Returns them."""
        return self.free[list(rows)]


TINY = SoftPromptConfig(
    initial_text="a",
    attack=AttackConfig(timesteps=(700,), updates=20, learning_rate=0.005, weight_decay=0.0),
)
"""For the tiny world: one noise level, at which its textures are decided. Longer or faster attacks bring stripes back
from benign pictures too."""
