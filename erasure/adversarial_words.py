"""Words of free vectors that are learned against a policy while it is trained, and kept from update to update.

Each update takes one of a few words; whoever trains moves it, and it goes on from there when it is taken again. So
every word is as strong as the policy lets it become, where one that begins anew in each update is only as strong as a
few steps make it.
"""

import random
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from overpaint.policy import DiffusionPolicy
from overpaint.policy.soft_prompts import token_vectors
from overpaint.training import TrainingRun

from .controllers import check_keys

Word = Float[Tensor, "vectors dim"]


class AdversarialWords:
    """A few words, of which each update takes one; a `Learner`'s state.

    A word begins where it is first taken, in half the cases at words of the vocabulary, in half at noise of their size.

    Args:
        count: Words.
        vectors: Of each.
        renewal: Chance of a word to begin anew when it is taken.
        seed: Of everything random; all processes of a run need the same.
    """

    def __init__(self, count: int, vectors: int, renewal: float, seed: int) -> None:
        self.count, self.vectors, self.renewal, self.seed = count, vectors, renewal, seed
        self._words: dict[int, Word] = {}  # those that have moved
        self._before: Word | None = None  # of this update, once it was taken
        self._moved: list[Word] = []
        self._updates = 0

    def current(self, policy: DiffusionPolicy) -> Word:
        """Returns the word of this update, on the policy's device."""
        word = self._words.get(self._chosen)
        if self._random("renewal", self._updates).random() < self.renewal:
            word = self._begun(policy, self.count + self._updates)
        elif word is None:
            word = self._begun(policy, self._chosen)
        self._before = word
        return word.to(policy.device)

    def move(self, word: Word) -> None:
        """Notes where a batch has moved the word of this update; each batch moves a copy of its own."""
        self._moved.append(word.detach().cpu())

    def learn(self, run: TrainingRun) -> dict[str, float]:
        """Lets the word of this update go on from the mean of where it was moved to, over all batches and processes.

        Once for each update, by every process.

        Returns:
            How far it has moved, as a root mean square; nothing where it was not taken.
        """
        logged: dict[str, float] = {}
        if (before := self._before) is not None:
            total = sum((one - before for one in self._moved), torch.zeros_like(before))
            count = run.gather(torch.tensor([float(len(self._moved))])).sum().clamp(min=1.0)
            moved = (run.gather(total[None]).sum(dim=0) / count).cpu()
            if not moved.isfinite().all():  # a batch has failed, and its update is skipped
                moved = torch.zeros_like(before)
            self._words[self._chosen] = before + moved
            logged["erasure/word_moved"] = float(moved.square().mean().sqrt())
        self._before, self._moved = None, []
        self._updates += 1
        return logged

    def state_dict(self) -> dict[str, Any]:
        """Returns the words, and the number of updates."""
        return {"words": dict(self._words), "updates": self._updates}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        """Takes over what `state_dict` returned.

        Raises:
            ValueError: It is of other words, or one is not finite. Nothing is changed.
        """
        check_keys(state, ("words", "updates"))
        words = dict(state["words"])
        for number, word in words.items():
            if number not in range(self.count) or len(word) != self.vectors or not word.isfinite().all():
                raise ValueError(
                    f"state['words'] must be of {self.count} words with {self.vectors} finite vectors, got number "
                    f"{number} with {len(word)}"
                )
        self._words, self._updates = words, int(state["updates"])
        self._before, self._moved = None, []

    @property
    def _chosen(self) -> int:
        """Which word this update takes."""
        return self._random("word", self._updates).randrange(self.count)

    def _begun(self, policy: DiffusionPolicy, number: int) -> Word:
        """Returns where a word begins."""
        generator = torch.Generator().manual_seed(self._random("begin", number).randrange(2**31))
        vocabulary = token_vectors(policy.prompts).float().cpu()
        if torch.rand((), generator=generator) < 0.5:
            return vocabulary[torch.randint(len(vocabulary), (self.vectors,), generator=generator)]
        noise = torch.randn(self.vectors, vocabulary.shape[1], generator=generator)
        return noise * vocabulary.square().mean().sqrt()

    def _random(self, what: str, number: int) -> random.Random:
        return random.Random(f"{what} {number} of {self.seed}")
