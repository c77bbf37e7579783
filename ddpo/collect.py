"""A round's samples: drawn, decoded and graded, the grading beside the drawing."""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from erasure import ImageCost
from overpaint.policy import DiffusionPolicy
from overpaint.policy.types import Embeddings, Images, PerSample, Trajectory
from overpaint.training import TrainingRun
from rewards import Reward

from .kept import KeptSamples
from .scoring import RewardError, RewardPool, ScoringConfig

PICTURES = 16
"""Images of a round that are kept to be looked at."""

Draw = Callable[[Embeddings, Sequence[int]], Trajectory]
"""Draws a batch from its prompts and seeds."""


class Graded(NamedTuple):
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
    """Draws a round batch by batch, and has each batch graded by worker threads while it draws the next.

    Where the reward or the cost fails for good, the samples are kept in the folder of the run, together with a
    checkpoint; when the run is resumed they are graded again, and not drawn again.

    Args:
        policy: Decodes what was drawn.
        draw: Draws a batch.
        reward: Grades every sample.
        cost: Grades the samples of the concept beside the reward.
        batch_size: Images drawn at a time.
        scoring: How reward and cost are run.
    """

    def __init__(
        self,
        policy: DiffusionPolicy,
        draw: Draw,
        reward: Reward,
        cost: ImageCost | None,
        *,
        batch_size: int,
        scoring: ScoringConfig,
    ) -> None:
        self.policy = policy
        self.draw = draw
        self.reward = reward
        self.cost = cost
        self.batch_size = batch_size
        self.scoring = scoring

    @torch.no_grad()
    def collect(self, run: TrainingRun, prompts: list[str], seeds: list[int], *, of_concept: int = 0) -> Graded:
        """Draws and grades this process's part of a round.

        Args:
            run: Says where samples are kept, and which round it is.
            prompts: One for each sample.
            seeds: One for each sample.
            of_concept: How many of the samples, the last ones, are of the concept and so have a cost.

        Raises:
            RewardError: The reward or the cost failed for good, in this process or in another.
        """
        kept = KeptSamples(Path(run.config.output_dir), round=run.iteration, process=run.process_index)
        batches = kept.load(self.policy, prompts, seeds)
        graded, failure = None, None
        try:
            graded = self._graded(run, batches, prompts, seeds, first_of_concept=len(prompts) - of_concept)
        except RewardError as error:
            failure = error
        if run.in_any(failure is not None):
            kept.save(batches, prompts, seeds)
            raise failure or RewardError("the reward failed in another process, whose message says how")
        kept.forget()
        assert graded is not None
        return graded

    def _graded(
        self,
        run: TrainingRun,
        batches: list[Trajectory],
        prompts: list[str],
        seeds: list[int],
        *,
        first_of_concept: int,
    ) -> Graded:
        """Draws the batches that are missing from a list, adds them to it, and grades all of them."""
        sampling, pictures = 0.0, []
        with ExitStack() as stack:
            pools = [stack.enter_context(RewardPool("reward", self.reward, self.scoring))]
            if self.cost is not None:
                pools.append(stack.enter_context(RewardPool("erasure cost", self.cost, self.scoring)))
            for index, first in enumerate(range(0, len(prompts), self.batch_size)):
                texts = prompts[first : first + self.batch_size]
                start = time.perf_counter()
                with run.autocast():
                    if index == len(batches):
                        batches.append(self.draw(self.policy.encode(texts), seeds[first : first + self.batch_size]))
                    images = self.policy.decode(batches[index].latents[:, -1])
                sampling += time.perf_counter() - start
                pools[0].submit(images, texts)
                if self.cost is not None and first + len(texts) > first_of_concept:
                    skipped = max(0, first_of_concept - first)
                    pools[1].submit(images[skipped:], texts[skipped:])
                if first < PICTURES:
                    pictures.append(images.cpu())
            scores = [pool.results() for pool in pools]
            grading = sum(pool.busy_seconds for pool in pools)
        return Graded(
            trajectory=joined(batches),
            rewards=scores[0],
            costs=scores[1] if self.cost is not None else torch.empty(0),
            pictures=torch.cat(pictures)[:PICTURES],
            seconds_sampling=sampling,
            seconds_reward=grading,
            retries=sum(pool.retries for pool in pools),
        )


@contextmanager
def asked_again_on_failure(run: TrainingRun) -> Generator[None, None, None]:
    """Returns the block in which a round is asked for and graded.

    Where the reward fails for good, it saves a checkpoint from which the same round will be asked for again.
    """
    begin = run.generator.get_state()
    try:
        yield
    except RewardError:
        run.generator.set_state(begin)
        run.save()
        raise


def joined(batches: Sequence[Trajectory]) -> Trajectory:
    """Returns trajectories of the same steps as one."""
    return Trajectory(
        torch.cat([batch.latents for batch in batches]),
        torch.cat([batch.log_probs for batch in batches]),
        batches[0].timesteps,
        torch.cat([batch.embeddings for batch in batches]),
    )
