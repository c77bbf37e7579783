"""Seeds of what a probe draws beside the pictures that it starts from, so that no two things share their noise."""

import random


def seed_of(purpose: str, seed: int) -> int:
    """Returns the seed of one purpose of an attempt; another for each purpose, and none that attempts have."""
    return random.Random(f"{purpose}-{seed}").getrandbits(63)
