"""What evaluation asks of a model."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from overpaint.policy.guidance import Guidance
from overpaint.policy.types import Images


@runtime_checkable
class Drawable(Protocol):
    """Whatever draws images from prompts; `policy.DiffusionPolicy` does, and `PipelineDrawable` for the others.

    What decides its images is known to a folder's record if it is `model_record.Described`.
    """

    def draw(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        steps: int,
        guidance: Guidance,
        eta: float,
        batch_size: int,
        height: int | None,
        width: int | None,
    ) -> Images:
        """Draws one image for each prompt from the noise of its seed; None is the model's own size in pixels."""
        ...
