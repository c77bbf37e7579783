"""One look at a policy: the pictures of a subject's prompts, and what is measured of them."""

from typing import NamedTuple

from overpaint.evaluation.images.generate import draw
from overpaint.evaluation.images.images import DrawnImages
from overpaint.evaluation.images.plan import DrawConfig, plan
from overpaint.evaluation.processes import gather, shard
from overpaint.evaluation.scoring.score import Scores, score
from overpaint.policy import DiffusionPolicy
from overpaint.training import process_state

from .experiment import Subject


class Examination(NamedTuple):
    """What came of it, on this process."""

    images: DrawnImages
    """This process's part."""

    scores: Scores
    """Those of all processes."""


def examine(
    policy: DiffusionPolicy,
    about: Subject,
    drawing: DrawConfig,
    *,
    model: str,
    prompts_per_kind: int,
    seed: int,
    progress: bool = True,
) -> Examination:
    """Draws prompts of every kind with a policy and measures them; under several processes each does its part.

    Policies that are examined with the same numbers are compared on the same prompts and seeds.

    Args:
        policy: What draws.
        about: Whose prompts and measures.
        drawing: How.
        model: Name for tables and pictures.
        prompts_per_kind: Prompts of each kind.
        seed: Chooses the prompts and their seeds.
        progress: Whether progress bars are shown, by the main process.
    """
    state = process_state()
    progress = progress and state.is_main_process
    planned = plan(about.evaluation_prompts(prompts_per_kind, seed + 100), seed=seed)
    mine = shard(planned, state.process_index, state.num_processes)
    images = draw(policy, mine, drawing, model=model, progress=progress)
    scores = score(images, about.measures, device=policy.device, progress=progress)
    return Examination(images, gather(scores, planned))
