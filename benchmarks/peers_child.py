"""What the children of peers.py share: they run in different environments, and speak the same few lines.

A child reads its job as JSON from the file that its command line names. For each line on its standard input it does
one round and saves the trained weights in the file that the line names, which is not timed. It answers with a line of
JSON that says what the round cost.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from rewards import Reward

RewardName = Literal["image-reward", "compressibility"]


def load_reward(name: RewardName) -> "Reward":
    """Loads the tiny world's ImageReward, or makes JPEG compressibility."""
    if name == "compressibility":
        from rewards.jpeg import Compressibility

        return Compressibility()
    from overpaint import tinyworld

    return tinyworld.load_reward()


def serve(round_: Callable[[], float], weights: Callable[[], Mapping[str, "Tensor"]]) -> None:
    """Does a round for each line on standard input, which names the file for its weights, until there is none.

    Args:
        round_: Does one round and returns the mean reward of its samples.
        weights: Returns what is trained, by the names of `DiffusionPolicy.trainable_state`.
    """
    from safetensors.torch import save_file

    # What libraries print goes to the log, so that the answers stand alone on standard output.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            start = time.process_time()
            reward = round_()
            seconds = time.process_time() - start
            save_file({name: value.detach().contiguous() for name, value in weights().items()}, line.strip())
            print(json.dumps({"seconds": seconds, "reward": reward}), file=answers, flush=True)
