"""Evaluation over several processes: each draws and scores its shard, then the scores are brought together."""

from collections.abc import Sequence

from overpaint.training import process_state

from .images.plan import PlannedImage, kinds_of
from .scoring.score import Column, Scores


def process_rank_and_count() -> tuple[int, int]:
    """Asks accelerate which process this is, and of how many."""
    state = process_state()
    return state.process_index, state.num_processes


def shard(planned: Sequence[PlannedImage], rank: int, world_size: int) -> tuple[PlannedImage, ...]:
    """Returns the images that one of several processes draws into memory: every `world_size`-th.

    Raises:
        ValueError: The process is not one of the processes.
    """
    check_rank(rank, world_size)
    return tuple(planned[rank::world_size])


def batches_of(planned: Sequence[PlannedImage], batch_size: int) -> list[tuple[PlannedImage, ...]]:
    """Cuts a plan into batches.

    Processes that share a folder share out whole batches, so that the batches, and with them the last bit of every
    image, do not depend on the number of processes.

    Raises:
        ValueError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return [tuple(planned[start : start + batch_size]) for start in range(0, len(planned), batch_size)]


def check_rank(rank: int, world_size: int) -> None:
    """Raises a ValueError unless the process is one of the processes."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be at least 0 and below world_size {world_size}, got {rank}")


def gather(scores: Scores, planned: Sequence[PlannedImage]) -> Scores:
    """Brings the scores of all processes together, on every process.

    Args:
        scores: Scores of this process's shard.
        planned: The whole plan, which gives the order.
    """
    from accelerate.utils import gather_object

    if process_state().num_processes == 1:
        return scores
    return merge(gather_object([scores]), planned)


def merge(parts: Sequence[Scores], planned: Sequence[PlannedImage]) -> Scores:
    """Joins the scores of shards, in the order of the plan.

    Raises:
        ValueError: The parts are of different models or settings, or do not hold each planned image once.
    """
    model, config = parts[0].model, parts[0].config
    for part in parts[1:]:
        if (part.model, part.config) != (model, config):
            raise ValueError(f"parts must be of one model, got {model}, {config} and {part.model}, {part.config}")
    columns = [column for part in parts for column in part.columns]
    measures = dict.fromkeys(column.measure for column in columns)
    merged = []
    for measure in measures:
        for kind in kinds_of(planned):
            pieces = [column for column in columns if (column.measure, column.kind) == (measure, kind)]
            if pieces:
                merged.append(_joined(pieces, [image for image in planned if image.kind == kind]))
    return Scores(model=model, config=config, columns=tuple(merged))


def _joined(pieces: Sequence[Column], planned: Sequence[PlannedImage]) -> Column:
    pairs = [pair for piece in pieces for pair in zip(piece.images, piece.values, strict=True)]
    values = dict(pairs)
    if len(pairs) != len(planned) or values.keys() != set(planned):
        raise ValueError(
            f"parts must hold each of {len(planned)} planned images of kind {pieces[0].kind!r} once, "
            f"got {len(pairs)} values of {len(values)} images"
        )
    return pieces[0]._replace(images=tuple(planned), values=tuple(values[image] for image in planned))
