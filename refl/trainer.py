"""The ReFL trainer.

Algorithm 1 of Xu et al. (2023), https://arxiv.org/abs/2304.05977, with two additions: an optional constraint that keeps an erased
concept erased, and a second, held-out reward that is watched. What is not here: the engine (`training`), the denoising (`policy`), the
constraint's arithmetic (`erasure`). See docs/refl.md for each departure from the authors' code, and for results.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from erasure import ErasureConstraint, ImageConstraint
from erasure.protocols import ConceptBatch
from policy import ClassifierFree, DiffusionPolicy
from policy.prompts import check_prompts
from policy.types import PerSample
from rewards import Reward
from training import TrainingConfig, TrainingRun

from .config import ReFLConfig
from .graded import graded_images
from .held_out import HeldOut, HeldOutWatch
from .loss import hinge
from .pretraining import PretrainingPairs, pairs_from_policy

Term = Callable[[], Tensor]
"""A part of the loss that is computed, differentiated and forgotten before the next."""


class ReFLMetrics(NamedTuple):
    """What one iteration measured: means over the batch of all processes, before the update."""

    reward: float
    reward_loss: float
    pretraining_loss: float
    erasure_cost: float
    erasure_weight: float
    gradient_cosine: float
    grad_norm: float
    graded_step: int


class ReFLTrainer:
    """Tunes a policy by backpropagating a reward through one late denoising step.

        trainer = ReFLTrainer(policy, reward, prompts, ReFLConfig(batch_size=8))
        trainer.train(TrainingConfig(output_dir="run", iterations=100))

    Args:
        policy: What is tuned, in place; needs a LoRA or `train=`.
        reward: What is raised. Must be differentiable in the images.
        prompts: What images are drawn for.
        config: Settings; those of the authors' code by default.
        erasure: What is kept erased: a cost on images of the concept, or an objective on noise predictions.
        pretraining: Pairs of the pretraining term; drawn from the frozen policy itself where none are given.
        held_out: Prompts and a reward that are watched and not trained on; the weights that it liked best are kept.

    Raises:
        ValueError: The reward has no gradient, there are no prompts, or the policy has nothing to train.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        reward: Reward,
        prompts: Sequence[str],
        config: ReFLConfig | None = None,
        *,
        erasure: ErasureConstraint | None = None,
        pretraining: PretrainingPairs | None = None,
        held_out: HeldOut | None = None,
    ) -> None:
        if not reward.differentiable:
            raise ValueError(f"reward must be differentiable for ReFL, got {reward!r}; use DDPO, which needs no gradient")
        if not policy.trainable_parameters():
            raise ValueError("policy must have trainable weights: load it with lora= or train=, got none")
        self.policy = policy
        self.reward = reward
        self.prompts = check_prompts(prompts)
        self.config = config or ReFLConfig()
        self.erasure = erasure
        self.pretraining = pretraining
        self.watch = HeldOutWatch(held_out, patience=self.config.patience) if held_out else None

    def train(self, run_config: TrainingConfig) -> ReFLMetrics | None:
        """Trains, or goes on with an interrupted run, and ends with the weights that the held-out reward liked best.

        Returns:
            What the last iteration measured; None where a resumed run had nothing left to do.
        """
        state = {} if self.erasure is None else {"lagrangian": self.erasure.lagrangian}
        if self.watch:
            state["held_out"] = self.watch
        metrics = None
        with TrainingRun(self.policy, run_config, state=state, configs={"refl": self.config}) as run:
            self.prepare(run)
            for iteration in run.iterations():
                if self.watch and iteration % self.config.evaluate_every == 0:
                    self._look(run, iteration)
                    if self.watch.should_stop:
                        break
                metrics = self.step(run)
                run.log(_tagged(metrics))
            if self.watch and not self.watch.should_stop and metrics is not None:
                self._look(run, run.iteration)
        if self.watch:
            self.watch.restore(self.policy)
        return metrics

    def prepare(self, run: TrainingRun) -> None:
        """Draws the pairs of the pretraining term where none were given, and readies an erasure objective."""
        cfg = self.config
        if cfg.pretraining_weight and self.pretraining is None:
            self.pretraining = pairs_from_policy(
                self.policy,
                self.prompts,
                count=cfg.pretraining_batch_size * 4,
                steps=cfg.steps,
                guidance=ClassifierFree(max(cfg.guidance_scale, 1.0)),
                seed=2_000_000 + run.config.seed,
            )
        if self.erasure is not None and not isinstance(self.erasure, ImageConstraint):
            self.erasure.prepare(self.policy)

    def step(self, run: TrainingRun) -> ReFLMetrics:
        """Samples a batch, grades it and takes one gradient step.

        Raises:
            ValueError: The reward gave no gradient, or not one number for each image.
        """
        cfg, erasure = self.config, self.erasure
        graded_step = int(torch.randint(cfg.first_graded_step, cfg.last_graded_step + 1, (), generator=run.generator))
        rewards: list[Tensor] = []
        losses: list[Tensor] = []
        costs: list[Tensor] = []

        prompts, seeds = self._draw(run, self.prompts, cfg.batch_size)
        reward_terms = [
            lambda p=part: self._reward_term(prompts[p], seeds[p], graded_step, rewards) * _share(p, len(prompts))
            for part in self._parts(len(prompts))
        ]
        erasure_terms: list[Term] = []
        if erasure is not None:
            concept, concept_seeds = self._draw(run, erasure.prompts, cfg.erasure_batch_size)
            erasure_terms = [
                lambda p=part: self._erasure_term(concept[p], concept_seeds[p], graded_step, costs) * _share(p, len(concept))
                for part in self._parts(len(concept))
            ]
        pretraining_terms = [lambda: self._pretraining_term(run, losses)] if cfg.pretraining_weight else []

        # The gradient adds up; only the very last backward averages it over the processes.
        self._descend(run, reward_terms, sync=not erasure_terms and not pretraining_terms)
        cosine = 0.0
        if erasure_terms:
            reward_gradient = self._gradient()
            self._descend(run, erasure_terms, sync=not pretraining_terms)
            cosine = _cosine(reward_gradient, self._gradient() - reward_gradient)
        self._descend(run, pretraining_terms, sync=True)
        grad_norm = run.update()

        cost, weight = 0.0, 0.0
        if erasure is not None:
            weight = erasure.lagrangian.weight
            cost = run.mean(torch.cat(costs))
            erasure.lagrangian.update(cost)
        seen = torch.cat(rewards)
        return ReFLMetrics(
            reward=run.mean(seen),
            reward_loss=run.mean(hinge(seen, margin=cfg.reward_margin)),
            pretraining_loss=run.mean(torch.cat(losses)) if losses else 0.0,
            erasure_cost=cost,
            erasure_weight=weight,
            gradient_cosine=run.mean(cosine),
            grad_norm=grad_norm,
            graded_step=graded_step,
        )

    # The three terms of the loss.

    def _reward_term(self, prompts: Sequence[str], seeds: Sequence[int], graded_step: int, seen: list[Tensor]) -> Tensor:
        cfg = self.config
        images = graded_images(self.policy, prompts, seeds, cfg, graded_step=graded_step)
        rewards = self.reward(images, self._captions(prompts))
        if rewards.shape != (len(images),):
            raise ValueError(f"reward must give one number for each of {len(images)} images, got {tuple(rewards.shape)}")
        if not rewards.requires_grad:
            raise ValueError(f"reward must be differentiable for ReFL, got {self.reward!r} without a gradient; use DDPO")
        seen.append(rewards.detach())
        return cfg.reward_scale * hinge(rewards, margin=cfg.reward_margin).mean()

    def _erasure_term(self, prompts: Sequence[str], seeds: Sequence[int], graded_step: int, seen: list[Tensor]) -> Tensor:
        cfg, erasure = self.config, self.erasure
        if isinstance(erasure, ImageConstraint):
            images = graded_images(self.policy, prompts, seeds, cfg, graded_step=graded_step)
            cost: PerSample = erasure.cost(images, self._captions(prompts))
            if not cost.requires_grad:
                raise ValueError(f"erasure cost must be differentiable for ReFL, got {erasure.cost!r} without a gradient")
        else:
            assert erasure is not None
            cost = erasure.cost(self.policy, ConceptBatch(prompts, seeds))
        seen.append(cost.detach())
        return cfg.reward_scale * erasure.lagrangian.weight * cost.mean()

    def _pretraining_term(self, run: TrainingRun, seen: list[Tensor]) -> Tensor:
        cfg, pairs = self.config, self.pretraining
        assert pairs is not None
        pick = torch.randint(len(pairs.captions), (cfg.pretraining_batch_size,), generator=run.generator)
        chosen = run.shard(pick)
        generator = torch.Generator().manual_seed(int(_seeds(run, 1)[0]) + run.process_index)
        embeddings = self.policy.encode([pairs.captions[k] for k in chosen.tolist()])
        latents = pairs.latents[chosen.to(pairs.latents.device)].to(self.policy.device)
        loss = self.policy.denoising_loss(latents, embeddings, generator=generator)
        seen.append(loss.detach())
        return cfg.pretraining_weight * loss.mean()

    # Small things.

    def _draw(self, run: TrainingRun, prompts: Sequence[str], count: int) -> tuple[list[str], list[int]]:
        """Draws prompts and seeds for the whole batch, and returns this process's part."""
        pick = torch.randint(len(prompts), (count,), generator=run.generator)
        seeds = run.shard(_seeds(run, count))
        return [prompts[k] for k in run.shard(pick).tolist()], seeds.tolist()

    def _parts(self, count: int) -> list[slice]:
        size = self.config.micro_batch_size
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def _captions(self, prompts: Sequence[str]) -> list[str]:
        """Repeats each prompt for the images that it stands for."""
        return [prompt for prompt in prompts for _ in range(max(1, self.config.low_variance_noises))]

    def _descend(self, run: TrainingRun, terms: Sequence[Term], *, sync: bool) -> None:
        """Adds the gradient of each term; `sync` says whether the last of them ends the iteration."""
        for k, term in enumerate(terms, start=1):
            with run.autocast():
                loss = term()
            run.backward(loss, sync=sync and k == len(terms))

    def _gradient(self) -> Tensor:
        """Copies the gradient that has been added up so far."""
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.policy.trainable_parameters()]
        return torch.cat([g.flatten().float() for g in grads])

    def _look(self, run: TrainingRun, iteration: int) -> None:
        """Measures trained and held-out reward on the held-out prompts, and logs both."""
        assert self.watch is not None
        count = len(self.watch.held_out.prompts)
        mine = run.shard(range(count))
        trained, held_out = self.watch.measure(
            self.policy,
            self.reward,
            part=slice(mine.start, mine.stop),
            steps=self.config.steps,
            guidance=ClassifierFree(self.config.guidance_scale),
        )
        means = run.mean(trained), run.mean(held_out)
        self.watch.note(self.policy, iteration=iteration, trained=means[0], held_out=means[1])
        run.log({"reward/validation": means[0], "reward/held_out": means[1]})


def _seeds(run: TrainingRun, count: int) -> Tensor:
    return torch.randint(2**31 - 1, (count,), generator=run.generator)


def _share(part: slice, count: int) -> float:
    """Returns what a micro-batch counts in the mean over its process's batch."""
    return (part.stop - part.start) / count


def _cosine(first: Tensor, second: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(first, second, dim=0))


def _tagged(metrics: ReFLMetrics) -> dict[str, float]:
    """Returns the metrics under the tags that docs/refl.md defines."""
    return {
        "reward/mean": metrics.reward,
        "train/reward_loss": metrics.reward_loss,
        "train/pretraining_loss": metrics.pretraining_loss,
        "train/grad_norm": metrics.grad_norm,
        "train/graded_step": metrics.graded_step,
        "erasure/cost": metrics.erasure_cost,
        "erasure/weight": metrics.erasure_weight,
        "erasure/gradient_cosine": metrics.gradient_cosine,
    }
