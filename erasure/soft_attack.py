"""Prompts made hard: free vectors behind their words, moved so that the constraint is violated, before each update.

The inner maximisation of adversarial training (Madry et al. 2018, https://arxiv.org/abs/1706.06083), with what a prompt
says in the place of pixels: the policy minimises the constraint's cost at the vectors v that make it large,

    min over the policy of max over v of cost(policy, [prompt; v])

by a few steps of gradient ascent in v, the highest point of which is kept. The vectors stand behind the words, where
the words' own tokens do not see them, so that what reads words by their places (SAFREE's filter, Receler's maps) reads
the same ones. They start as what stands there anyway, the end of the text and its padding: before the first step the
attacked prompt is the plain one, exactly where the tokenizer pads with its end token, as that of Stable Diffusion v1
does.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from overpaint.policy import DiffusionPolicy
from overpaint.policy.prompts import PromptEncoder
from overpaint.policy.soft_prompts import PLACE, check_room, encode_soft, token_vectors
from overpaint.policy.types import PerSample
from overpaint.policy.unet_rows import counted_rows
from overpaint.settings import Field, Index, Seed, settings
from overpaint.training import TrainingRun
from rewards import RewardLike, as_reward

from .protocols import UNetCalls


@settings
class SoftAttackConfig:
    """How strong the attack is, and how often it is made."""

    vectors: int = Field(4, ge=1)
    """Free vectors behind the words of each attacked prompt, which has to leave room for them."""

    steps: int = Field(5, ge=1)
    """Steps of gradient ascent, each of which costs what the constraint's cost costs with gradient. The policy learns
    from the highest point on the way, the plain prompt included."""

    learning_rate: float = Field(1.0, gt=0)
    """Of the Adam that moves the vectors, in units of the root mean square of the text encoder's token embeddings: the
    most by which a step moves an element, near enough."""

    share: float = Field(0.5, gt=0, le=1)
    """Chance of each sample of the constraint to be attacked; which are follows from their seeds."""

    every: int = Field(1, ge=1)
    """Updates (rounds of DDPO) from one attack to the next."""


class Judged(NamedTuple):
    """What a constraint says of some samples; both with gradient."""

    violation: PerSample
    """In the units of the constraint."""

    climbed: PerSample | None = None
    """What an attack raises; None is the violation."""


Judge = Callable[[Sequence[str], Sequence[int]], Judged]
"""Judges samples by their prompts and seeds, as many times as it is asked; it encodes the prompts by the policy."""


class SoftAttack:
    """Raises a constraint's violation in the prompts' vectors, and lets the policy learn from where they end.

    Args:
        config: Settings.
        score: What the vectors climb in pictures, in place of the constraint's cost: for a detector that is flat where
            it sees nothing, and so has no gradient to start with. A reward, or plain function of images and prompts;
            differentiable. Not for objectives.
    """

    def __init__(self, config: SoftAttackConfig | None = None, score: RewardLike | None = None) -> None:
        self.config = config or SoftAttackConfig()
        self.score = None if score is None else as_reward(score, "SoftAttack.score")
        if self.score is not None and not self.score.differentiable:
            raise ValueError(f"SoftAttack.score must be differentiable, got {score!r}, which says that it is not")
        self._tally = torch.zeros(len(TAGS))

    def __repr__(self) -> str:
        """Shows the settings and the score."""
        return f"SoftAttack({self.config!r}, score={self.score!r})"

    def unet_calls(self, cost: UNetCalls) -> UNetCalls:
        """Returns the calls for each sample of the constraint, on average, on top of the cost's own.

        Args:
            cost: Calls of the constraint's cost for a sample.
        """
        steps, often = self.config.steps, self.config.share / self.config.every
        forward = steps * cost.forward + (cost.forward + cost.backward)  # at last how far the last step has led
        return UNetCalls(often * forward, often * steps * cost.backward)

    def check(self, policy: DiffusionPolicy, prompts: Sequence[str]) -> None:
        """Checks that the vectors have room behind every prompt.

        Raises:
            ValueError: They do not, or a prompt has a place for vectors of its own.
        """
        check_room(policy.prompts, prompts, self.config.vectors, "SoftAttackConfig.vectors")

    def judged(
        self, policy: DiffusionPolicy, prompts: Sequence[str], seeds: Sequence[Seed], judge: Judge, *, iteration: Index
    ) -> PerSample:
        """Returns the violation of samples, some of them attacked, with gradient to the policy and not to the vectors.

        Samples of one prompt that are judged together have their vectors in common. Gradients of the ascent reach the
        vectors alone; guards stay at work.

        Args:
            policy: What is attacked; it is as before afterwards, also after an error.
            prompts: One for each sample.
            seeds: Everything random follows from them: what is attacked, and how it is judged.
            judge: What the constraint says; of as many numbers for each sample as it likes.
            iteration: Of the run, for `SoftAttackConfig.every`.

        Raises:
            ValueError: There is no gradient from the judge to the vectors, or the vectors find no room.
        """
        attacked = [iteration % self.config.every == 0 and self._takes(seed) for seed in seeds]
        parts: list[PerSample] = []
        order: list[int] = []
        for wanted in (True, False):
            places = [place for place, flag in enumerate(attacked) if flag is wanted]
            if not places:
                continue
            texts, own = [prompts[place] for place in places], [seeds[place] for place in places]
            violation = self._raised(policy, texts, own, judge) if wanted else judge(texts, own).violation
            parts.append(violation.unflatten(0, (len(places), -1)))
            order += places
        return torch.cat(parts)[torch.tensor(order).argsort().to(parts[0].device)].flatten()

    def _takes(self, seed: int) -> bool:
        return random.Random(f"attack of {seed}").random() < self.config.share

    def _raised(self, policy: DiffusionPolicy, prompts: Sequence[str], seeds: Sequence[int], judge: Judge) -> PerSample:
        """Returns the violation of samples under attack."""
        cfg, texts = self.config, list(dict.fromkeys(prompts))
        members = torch.tensor([[own == text for own in prompts] for text in texts], device=policy.device).float()
        vectors = start_vectors(policy.prompts, texts, cfg.vectors).requires_grad_()
        unit = float(token_vectors(policy.prompts).float().square().mean().sqrt())
        adam = torch.optim.Adam([vectors], lr=unit * cfg.learning_rate, maximize=True)
        best, highest = vectors.detach().clone(), torch.full((len(texts),), -math.inf, device=policy.device)
        before = torch.zeros(())
        with counted_rows() as rows:
            for step in range(cfg.steps + 1):
                with (
                    torch.set_grad_enabled(step < cfg.steps),
                    policy.prompts.replaced(_encoded(policy, texts, vectors)),
                ):
                    violation, climbed = judge(prompts, seeds)
                climbed = violation if climbed is None else climbed
                if step == 0:
                    before = violation.detach()
                reached = members @ climbed.detach().float().unflatten(0, (len(prompts), -1)).mean(dim=1)
                better = reached > highest
                best[better], highest[better] = vectors.detach()[better], reached[better]
                if step < cfg.steps:
                    vectors.grad = _ascent(climbed, vectors, judge)
                    adam.step()
        with torch.no_grad():
            encoded = _encoded(policy, texts, best)
        with policy.prompts.replaced(encoded):
            violation = judge(prompts, seeds).violation
        self._tally += torch.tensor(
            [len(before), float(before.sum()), float(violation.detach().sum()), rows.forward, rows.backward]
        )
        return violation

    def measured(self, run: TrainingRun) -> dict[str, float]:
        """Returns what the attacks since the last call did, of all processes, under the tags of the log; and forgets.

        Empty where nothing was attacked. Every process has to call it.
        """
        count, before, after, forward, backward = run.gather(self._tally[None]).sum(dim=0).tolist()
        self._tally.zero_()
        if not count:
            return {}
        return dict(zip(TAGS, (count, before / count, after / count, forward, backward), strict=True))


TAGS = (
    "erasure/attacked_samples",
    "erasure/violation_before_attack",
    "erasure/violation_after_attack",
    "erasure/attack_rows_forward",
    "erasure/attack_rows_backward",
)
"""What is logged of the attacks of an iteration: how many numbers of the constraint were attacked, their mean before
the first step and after the last, and how many samples went through the UNet for it, without gradient and with."""


def start_vectors(encoder: PromptEncoder, texts: Sequence[str], count: int) -> Float[Tensor, "texts vectors dim"]:
    """Returns what stands behind the words of any text: its end, and what the tokenizer fills up with."""
    tokenizer: Any = encoder.tokenizer
    ids = [encoder.ids("")[-1], *[tokenizer.pad_token_id] * (count - 1)]
    return token_vectors(encoder)[ids].float().expand(len(texts), -1, -1).clone()


def _encoded(
    policy: DiffusionPolicy, texts: Sequence[str], vectors: Float[Tensor, "texts vectors dim"]
) -> Mapping[str, Tensor]:
    """Returns each text's encoding with its vectors."""
    tokens = encode_soft(policy.prompts, [f"{text} {PLACE}" for text in texts], vectors).tokens
    return dict(zip(texts, tokens, strict=True))


@torch.enable_grad()
def _ascent(
    climbed: PerSample, vectors: Float[Tensor, "texts vectors dim"], judge: Judge
) -> Float[Tensor, "texts vectors dim"]:
    """Returns the gradient of what is climbed; no weight gets any."""
    if climbed.requires_grad:
        # Of the sum: the gradient of a mean would be small for half precision, and Adam does not mind the factor.
        (gradient,) = torch.autograd.grad(climbed.sum(), vectors, allow_unused=True)
        if gradient is not None:
            return torch.nan_to_num(gradient)
    raise ValueError(
        f"what an attack climbs must have a gradient to how its prompts are encoded, and {judge!r} has none: it is not "
        "differentiable, or it encodes prompts of its own; train without SoftAttack"
    )
