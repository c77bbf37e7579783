"""A reward that stands for a process that dies."""

from collections.abc import Sequence

from overpaint.policy.types import Images, PerSample


class KilledError(Exception):
    """Stands for a process that dies: the run saves nothing when it sees an exception."""


class Mortal:
    """The mean of a colour, which kills the process at its n-th call."""

    differentiable = True

    def __init__(self, channel: int = 0, dies_at: int | None = None) -> None:
        self.channel = channel
        self.calls_left = dies_at

    def __repr__(self) -> str:
        return f"Mortal({self.channel})"

    def __call__(self, images: Images, prompts: Sequence[str]) -> PerSample:
        if self.calls_left is not None:
            self.calls_left -= 1
            if self.calls_left < 0:
                raise KilledError
        return images[:, self.channel].mean(dim=(1, 2))
