"""What the scores of a round are compared with, and the advantages that come of it."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from overpaint.policy import DiffusionPolicy, Trajectory
from overpaint.policy.types import PerSample
from overpaint.training import Stateful, TrainingRun

from .advantage import EPSILON, PromptStatistics, centred, centred_advantages, group_advantages, round_advantages
from .collect import ScoredSamples
from .config import DDPOConfig
from .constraints import RoundWeights
from .critic import Critic, explained_variances, generalised_advantages
from .requests import SampleRequest


class Advantages(NamedTuple):
    """By how much the steps of a round's samples are better than expected, and what that was computed from."""

    rewards: Float[Tensor, " samples"]
    """Of the samples of all processes, on the CPU; as the next two."""
    concept_rewards: Float[Tensor, " concept_samples"]
    violations: Float[Tensor, " concept_samples"]
    advantages: Float[Tensor, "mine steps"]
    """Of this process's samples, clipped; on the device."""
    explained: dict[str, float]
    """What share of the scores' variance the critic has explained, by tag; empty without a critic."""


class Baseline:
    """Compares a round's scores with what was to be expected, in the way that the settings say.

    Args:
        policy: What draws the samples.
        config: Settings.
        with_violations: Whether there are samples of the concept, which have a violation beside their reward.
    """

    def __init__(self, policy: DiffusionPolicy, config: DDPOConfig, *, with_violations: bool) -> None:
        self.config = config
        self.with_violations = with_violations
        self.statistics = PromptStatistics(config.buffer_size, config.min_count)
        self.critic: Critic | None = None
        if config.baseline == "critic":
            self.critic = Critic(policy, config.critic, scores=2 if with_violations else 1)

    @property
    def state(self) -> dict[str, Stateful]:
        """What belongs in checkpoints, by name."""
        state: dict[str, Stateful] = {"statistics": self.statistics}
        return state if self.critic is None else {**state, "critic": self.critic}

    def start(self, run: TrainingRun) -> None:
        """Readies the critic of a run, if there is one, also where the run goes on."""
        if self.critic is not None:
            self.critic.start(run)

    def advantages(
        self,
        run: TrainingRun,
        requests: Sequence[SampleRequest],
        scored: ScoredSamples,
        violations: PerSample,
        weights: RoundWeights,
    ) -> Advantages:
        """Computes the advantages of a round.

        Samples of the concept are worth their weighted reward less their weighted violation. They are compared with
        each other, or with the others of their prompt, and never with earlier rounds, where the weights were others.
        Where their reward counts, their advantages have the unit of the other samples', one standard deviation of the
        reward: were they normalised by their own, no weight could make the constraint count for more than the reward
        does. Where it does not, each kind is normalised by its own, and an update weighs the two.

        Args:
            run: Joins the processes.
            requests: The samples of the prompts, and those of the concept where there are any.
            scored: This process's samples.
            violations: Of its samples of the concept; empty where there are none.
            weights: What rewards and violations are multiplied by in this round.
        """
        prompts, limit = requests[0], self.config.max_advantage
        mine = len(prompts.mine)
        rewards = prompts.gathered(run, scored.rewards[:mine])
        values = None if self.critic is None else self.critic.values(scored.trajectory)
        expected = None if values is None else prompts.gathered(run, values[:mine])
        explained: dict[str, float] = {}
        if expected is None:
            compared = self._compare(rewards, prompts.prompts)[:, None]
            unit = centred(rewards, self._groups(prompts)).square().mean().sqrt()
        else:
            compared = self._differences(prompts, rewards, expected[..., 0])
            unit = compared.square().mean().sqrt()
            compared = compared / (unit + EPSILON)
            explained |= _by_thirds("critic/explained", expected[..., 0], rewards)
        parts = [compared[prompts.mine]]

        concept_rewards = all_violations = torch.zeros(1)
        if self.with_violations:
            concept = requests[1]
            concept_rewards = concept.gathered(run, scored.rewards[mine:])
            all_violations = concept.gathered(run, violations)
            # Alone, a violation needs no weight among its like.
            weight = weights.violation if weights.concept_reward else 1.0
            worth = weights.concept_reward * concept_rewards - weight * all_violations
            expected_worth = None
            if values is not None:
                expected = concept.gathered(run, values[mine:])
                expected_worth = weights.concept_reward * expected[..., 0] - weight * expected[..., 1]
                explained |= _by_thirds("critic/violation_explained", expected[..., 1], all_violations)
            compared = self._differences(concept, worth, expected_worth)
            if not weights.concept_reward:
                unit = compared.square().mean().sqrt()
            parts.append((compared / (unit + EPSILON))[concept.mine])
        steps = scored.trajectory.log_probs.shape[1]
        clipped = torch.cat([part.expand(-1, steps) for part in parts]).clamp(-limit, limit)
        advantages = clipped.to(run.device, torch.float32)
        return Advantages(rewards, concept_rewards, all_violations, advantages, explained)

    def learn(
        self, run: TrainingRun, requests: Sequence[SampleRequest], trajectory: Trajectory, advantages: Advantages
    ) -> dict[str, float]:
        """Trains the critic, if there is one, on a round whose updates were taken; returns its loss by tag."""
        if self.critic is None:
            return {}
        scores, mine = advantages.rewards[:, None], requests[0].mine
        if self.with_violations:
            unknown = torch.full_like(advantages.rewards, math.nan)
            ordinary = torch.stack([advantages.rewards, unknown], dim=1)
            scores = torch.cat([ordinary, torch.stack([advantages.concept_rewards, advantages.violations], dim=1)])
            mine = torch.cat([mine, requests[1].mine + len(ordinary)])
        return {"critic/loss": self.critic.fit(run, trajectory, mine, scores)}

    def _compare(self, rewards: Float[Tensor, " samples"], prompts: Sequence[str]) -> Float[Tensor, " samples"]:
        """Returns rewards normalised as the baseline says, where it is no critic."""
        compare = {
            "prompt": self.statistics.advantages,
            "group": group_advantages,
            "centred": centred_advantages,
            "round": round_advantages,
        }
        return compare[self.config.baseline](rewards, prompts)

    def _differences(
        self, samples: SampleRequest, scores: Float[Tensor, " samples"], expected: Float[Tensor, "samples steps"] | None
    ) -> Float[Tensor, "samples columns"]:
        """Returns by how much scores are better than expected, with mean 0: for each step with a critic, or for all."""
        if expected is None:
            return centred(scores, self._groups(samples))[:, None]
        assert self.critic is not None
        advantages = generalised_advantages(expected, scores.double(), gae_lambda=self.critic.config.gae_lambda)
        return advantages - advantages.mean()

    def _groups(self, samples: SampleRequest) -> list[str]:
        """Returns a name for each sample of those that it is compared with: those of its prompt, or all."""
        return samples.prompts if self.config.images_per_prompt > 1 else [""] * len(samples.prompts)


def _by_thirds(
    tag: str, expected: Float[Tensor, "samples steps"], scores: Float[Tensor, " samples"]
) -> dict[str, float]:
    """Returns the explained variance in each third of the trajectory, by tag; nothing where the scores do not vary."""
    if not scores.double().var(correction=0):
        return {}
    return dict(
        zip((f"{tag}_first", f"{tag}_middle", f"{tag}_last"), explained_variances(expected, scores), strict=True)
    )
