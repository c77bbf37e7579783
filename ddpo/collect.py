"""A round's samples: drawn, decoded and scored, the scoring beside the drawing."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from overpaint.policy import Conditioning, DiffusionPolicy, Guidance, Trajectory
from overpaint.policy.types import Images, PerSample
from overpaint.training import TrainingRun
from rewards import Reward

from .requests import SampleRequest
from .sample_cache import SampleCache
from .scoring import RewardError, RewardPool, ScoringConfig

PICTURES = 16
"""Images of a round that are logged."""

Draw = Callable[[Conditioning, Sequence[int]], Trajectory]
"""Draws a batch from its prompts and seeds."""


def drawing_ends(policy: DiffusionPolicy, config: Any, guidance: Guidance) -> Draw:
    """Returns what draws a batch and keeps of its trajectory the end only, for trainers that ask for no density.

    Args:
        policy: What draws.
        config: Has `steps`, `eta`, `height` and `width`.
        guidance: Of the drawing.
    """

    def draw(conditioning: Conditioning, seeds: Sequence[int]) -> Trajectory:
        clean = policy.sample(
            conditioning, steps=config.steps, guidance=guidance, eta=config.eta, seeds=seeds, height=config.height,
            width=config.width,
        )  # fmt: skip
        none = clean.new_empty(len(clean), 0, dtype=torch.float64)
        return Trajectory(clean.unsqueeze(1), none, none.new_empty(0, dtype=torch.int64), conditioning)

    return draw


class ScoredSamples(NamedTuple):
    """A process's part of a round."""

    trajectory: Trajectory
    rewards: PerSample
    """One for each sample, on the CPU."""
    costs: PerSample
    """One for each sample of the concept, which are the last ones; on the CPU."""
    pictures: Images
    """The first images, on the CPU."""
    seconds_sampling: float
    seconds_reward: float
    """Time that reward and cost took, most of it while the drawing went on."""
    retries: int
    """Tries of the reward and the cost that failed."""


class Collector:
    """Draws a round batch by batch, and has each batch scored by worker threads while it draws the next.

    Where the reward or the cost fails for good, the samples are kept in the folder of the run, together with a
    checkpoint; when the run is resumed they are scored again, and not drawn again.

    Args:
        policy: Decodes what was drawn.
        draw: Draws a batch.
        reward: Scores every sample.
        cost: Scores the samples of the concept beside the reward.
        batch_size: Images drawn at a time.
        scoring: How reward and cost are run; by default as `ScoringConfig` says.
        kind: Name of its samples, where a round has those of several collectors.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        draw: Draw,
        reward: Reward,
        cost: Reward | None,
        *,
        batch_size: int,
        scoring: ScoringConfig | None = None,
        kind: str = "",
    ) -> None:
        self.policy = policy
        self.draw = draw
        self.reward = reward
        self.cost = cost
        self.batch_size = batch_size
        self.scoring = scoring or ScoringConfig()
        self.kind = kind

    @torch.no_grad()
    def collect(self, run: TrainingRun, requests: Sequence[SampleRequest]) -> ScoredSamples:
        """Draws and scores this process's part of a round.

        Args:
            run: Says where samples are kept, and which round it is.
            requests: The samples of the prompts, and those of the concept, which have a cost, where there are any.

        Raises:
            RewardError: The reward or the cost failed for good, in this process or in another.
        """
        prompts = [prompt for request in requests for prompt in request.my_prompts]
        seeds = [seed for request in requests for seed in request.my_seeds]
        folder = Path(run.config.output_dir)
        cache = SampleCache(folder, round=run.iteration, process=run.process_index, kind=self.kind)
        batches = cache.load(self.policy, prompts, seeds)
        if run.config.shard and run.in_any(_count(batches) < len(prompts)):
            batches.clear()  # all processes have to call a sharded network equally often
        scored, failure = None, None
        try:
            scored = self._scored(run, batches, prompts, seeds, first_of_concept=len(requests[0].mine))
        except RewardError as error:
            failure = error
        if run.in_any(failure is not None):
            cache.save(batches, prompts, seeds)
            raise failure or RewardError("the reward failed in another process, whose message says how")
        cache.forget()
        assert scored is not None
        return scored

    def _scored(
        self,
        run: TrainingRun,
        batches: list[Trajectory],
        prompts: list[str],
        seeds: list[int],
        *,
        first_of_concept: int,
    ) -> ScoredSamples:
        """Draws the batches that are missing from a list, adds them to it, and scores all of them."""
        sampling, pictures, first = 0.0, [], 0
        drawn = self._drawn(run, batches, prompts, seeds)
        with ExitStack() as stack:
            pools = [stack.enter_context(RewardPool("reward", self.reward, self.scoring))]
            if self.cost is not None:
                pools.append(stack.enter_context(RewardPool("erasure cost", self.cost, self.scoring)))
            start = time.perf_counter()
            for batch in list(drawn) if run.config.shard else drawn:  # where no failing reward may come between
                with run.autocast():
                    images = self.policy.decode(batch.latents[:, -1])
                sampling += time.perf_counter() - start
                texts = prompts[first : first + len(images)]
                pools[0].submit(images, texts)
                if self.cost is not None and first + len(texts) > first_of_concept:
                    skipped = max(0, first_of_concept - first)
                    pools[1].submit(images[skipped:], texts[skipped:])
                if first < PICTURES:
                    pictures.append(images.cpu())
                first += len(images)
                start = time.perf_counter()
            scores = [pool.results() for pool in pools]
            seconds_reward = sum(pool.busy_seconds for pool in pools)
        means = [batch.means for batch in batches if batch.means is not None]
        trajectory = Trajectory(
            torch.cat([batch.latents for batch in batches]),
            torch.cat([batch.log_probs for batch in batches]),
            batches[0].timesteps,
            Conditioning.cat([batch.conditioning for batch in batches]),
            torch.cat(means) if means else None,
        )
        return ScoredSamples(
            trajectory=trajectory,
            rewards=scores[0],
            costs=scores[1] if self.cost is not None else torch.empty(0),
            pictures=torch.cat(pictures)[:PICTURES],
            seconds_sampling=sampling,
            seconds_reward=seconds_reward,
            retries=sum(pool.retries for pool in pools),
        )

    def _drawn(
        self, run: TrainingRun, batches: list[Trajectory], prompts: Sequence[str], seeds: Sequence[int]
    ) -> Iterator[Trajectory]:
        """Yields the batches of a list, of whatever size they were kept, and then those that are missing from it."""
        yield from tuple(batches)
        while (first := _count(batches)) < len(prompts):
            part = slice(first, first + self.batch_size)
            with run.autocast():
                batches.append(self.draw(self.policy.encode(prompts[part]), seeds[part]))
            yield batches[-1]


def _count(batches: Sequence[Trajectory]) -> int:
    """Returns how many samples there are."""
    return sum(len(batch.latents) for batch in batches)


def tagged(metrics: Any, samples: int) -> dict[str, float]:
    """Returns what every trainer by sampling measures, under the tags that docs/ddpo.md defines.

    Args:
        metrics: Of a round.
        samples: How many all processes have drawn since the run began.
    """
    return {
        "reward/mean": metrics.reward,
        "reward/std": metrics.reward_std,
        "reward/retries": metrics.retries,
        "train/loss": metrics.loss,
        "train/grad_norm": metrics.grad_norm,
        "samples": samples,
        "reward_queries": samples,
        "seconds/sampling": metrics.seconds_sampling,
        "seconds/reward": metrics.seconds_reward,
        "seconds/update": metrics.seconds_update,
    }


@contextmanager
def requested_again_on_failure(run: TrainingRun) -> Generator[None, None, None]:
    """Returns the block in which the samples of a round are drawn and scored.

    Where the reward fails for good, it saves a checkpoint from which the same samples are requested again.
    """
    begin = run.generator.get_state()
    try:
        yield
    except RewardError:
        run.generator.set_state(begin)
        run.save()
        raise
