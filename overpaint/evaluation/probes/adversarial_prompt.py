"""Adversarial prompt: a few words before each prompt are sought that make the model show the concept.

Each of k words is a point on the simplex of the vocabulary. For an update it is drawn from that point, the gradient
with respect to the drawn word goes straight to the point, clipped to ±1, and after the update the point is projected
back onto the simplex. Pictures are drawn with the likeliest words. P4D's form is an option (`form`): free vectors, each
replaced by the word whose vector is nearest in angle, the gradient going straight to the vector.

Source: as in `prompt_attack`; the projection is that of Duchi et al. (2008), "Efficient projections onto the l1-ball",
figure 1, in place of the authors' bisection to 1e-5. Departure: the words that name the concept are barred from the
vocabulary, since a prompt that names it in more words would be no attack; and so are the tokens of start and end.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from erasure import Concept
from erasure.phrases import own_phrases
from overpaint.policy import DiffusionPolicy
from overpaint.policy.prompts import PromptEncoder
from overpaint.policy.soft_prompts import token_vectors
from overpaint.settings import Field, settings

from .noise_error import generator_of
from .probe import Attempt, Floor, Need, ProbeTask
from .prompt_attack import AttackConfig, FreeTokens, PromptAttack

LONG_WORD = 4
"""Letters from which on a word of the concept is barred also as a part of other words, as in "zebras"."""


@settings
class AdversarialPromptConfig:
    """Settings of the attack with words; by default those of UnlearnDiffAtk."""

    tokens: int = Field(5, ge=1)
    """Words before each prompt, one token each."""

    form: Literal["simplex", "nearest"] = "simplex"
    """What a word is while it is sought: a point on the vocabulary's simplex, or a vector whose nearest word counts."""

    attack: AttackConfig = AttackConfig()
    """How long and how fast they are moved, and towards what."""

    @classmethod
    def p4d(cls) -> "AdversarialPromptConfig":
        """P4D, with the budget that UnlearnDiffAtk's authors compared it at."""
        return cls(form="nearest", attack=AttackConfig(target="original"))


class AdversarialPrompt:
    """Seeks words before each prompt that bring the concept back."""

    name: ClassVar[str] = "adversarial-prompt"
    floors: ClassVar[tuple[Floor, ...]] = ("benign", "foreign")
    needs: ClassVar[tuple[Need, ...]] = ("one text encoder",)

    def __init__(self, config: AdversarialPromptConfig | None = None) -> None:
        self.config = config or AdversarialPromptConfig()

    def attempt(self, policy: DiffusionPolicy, task: ProbeTask) -> list[Attempt]:
        """Attacks the prompts that do not show the concept by themselves; `numbers` hold the rate before and after.

        Raises:
            ValueError: The settings name a timestep that there is not.
        """
        words = token_vectors(policy.prompts)[allowed_tokens(policy.prompts, task.concept)].float()
        tokens: FreeTokens
        if self.config.form == "simplex":
            tokens = SimplexTokens(words, len(task.prompts), self.config.tokens)
        else:
            generators = [generator_of(f"{self.name}: beginning", seed) for seed in task.seeds]
            tokens = NearestTokens(words, self.config.tokens, generators)
        attack = PromptAttack(policy, task, tokens, self.config.attack, self.name)
        return [attack.run(f"{self.config.tokens} words")]


class SimplexTokens:
    """Words as points on a vocabulary's simplex, at first its middle."""

    def __init__(self, words: Float[Tensor, "vocabulary dim"], prompts: int, tokens: int) -> None:
        self.words = words
        self.free: Tensor = words.new_full((prompts, tokens, len(words)), 1 / len(words)).requires_grad_()

    def drawn(self, rows: Sequence[int], generators: Sequence[torch.Generator]) -> Float[Tensor, "rows tokens dim"]:
        """Returns the vectors of words drawn from the points."""
        points = self.free[list(rows)]
        chosen = torch.stack(
            [
                torch.multinomial(point, 1, generator=generator)[:, 0]
                for point, generator in zip(points.detach().cpu(), generators, strict=True)
            ]
        ).to(points.device)
        straight: Any = StraightThrough.apply(points, chosen)
        return straight @ self.words

    @torch.no_grad()
    def settle(self) -> None:
        """Projects the points back onto the simplex."""
        self.free.copy_(onto_simplex(self.free))

    @torch.no_grad()
    def found(self, rows: Sequence[int]) -> Float[Tensor, "rows tokens dim"]:
        """Returns the vectors of the likeliest words."""
        return self.words[self.free[list(rows)].argmax(dim=2)]


class StraightThrough(torch.autograd.Function):
    """Words in place of the points they were drawn from; the words' gradient, clipped to ±1, is that of the points."""

    @staticmethod
    def forward(
        ctx: Any, points: Float[Tensor, "rows tokens vocabulary"], chosen: Int[Tensor, "rows tokens"]
    ) -> Float[Tensor, "rows tokens vocabulary"]:
        """Returns 1 at the chosen words and 0 elsewhere."""
        return torch.zeros_like(points).scatter_(2, chosen[..., None], 1.0)

    @staticmethod
    def backward(
        ctx: Any, *gradients: Float[Tensor, "rows tokens vocabulary"]
    ) -> tuple[Float[Tensor, "rows tokens vocabulary"], None]:
        """Returns the gradient, clipped."""
        return gradients[0].clamp(-1, 1), None


class NearestTokens:
    """Words as the nearest ones to free vectors, at first words drawn at random."""

    def __init__(
        self, words: Float[Tensor, "vocabulary dim"], tokens: int, generators: Sequence[torch.Generator]
    ) -> None:
        self.words = words
        first = torch.stack([torch.randint(len(words), (tokens,), generator=one) for one in generators])
        self.free: Tensor = words[first.to(words.device)].clone().requires_grad_()

    def drawn(self, rows: Sequence[int], generators: Sequence[torch.Generator]) -> Float[Tensor, "rows tokens dim"]:
        """Returns the vectors of the nearest words, whose gradient is that of the free vectors."""
        free = self.free[list(rows)]
        return self.found(rows) + free - free.detach()

    def settle(self) -> None:
        """Leaves the vectors where they are."""

    @torch.no_grad()
    def found(self, rows: Sequence[int]) -> Float[Tensor, "rows tokens dim"]:
        """Returns the vectors of the nearest words."""
        directions, words = (torch.nn.functional.normalize(one, dim=-1) for one in (self.free[list(rows)], self.words))
        return self.words[(directions @ words.T).argmax(dim=2)]


def onto_simplex(points: Float[Tensor, "*batch vocabulary"]) -> Float[Tensor, "*batch vocabulary"]:
    """Returns the nearest points whose coordinates are not negative and sum to 1."""
    falling = points.sort(dim=-1, descending=True).values
    excess = falling.cumsum(dim=-1) - 1
    counts = torch.arange(1, points.shape[-1] + 1, device=points.device)
    kept = (falling * counts > excess).sum(dim=-1, keepdim=True)
    return (points - excess.gather(-1, kept - 1) / kept).clamp(min=0)


def allowed_tokens(encoder: PromptEncoder, concept: Concept) -> Int[Tensor, " tokens"]:
    """Returns the tokens that an attack may use: none that begins or ends a text, and none of the concept's words.

    These are the words of the phrases that hold no other phrase, their pieces where they have several, and what holds a
    word of some length.

    Raises:
        ValueError: None is left.
    """
    tokenizer: Any = encoder.tokenizer
    phrases = own_phrases(concept.phrases)
    barred = {*tokenizer.all_special_ids, *(token for phrase in phrases for token in encoder.ids(phrase)[1:-1])}
    words = {word for phrase in phrases for word in phrase.lower().split()}
    long = [word for word in words if len(word) >= LONG_WORD]
    allowed = []
    for token, text in enumerate(tokenizer.convert_ids_to_tokens(range(len(token_vectors(encoder))))):
        letters = text.removesuffix("</w>").lower()
        if token not in barred and letters not in words and not any(word in letters for word in long):
            allowed.append(token)
    if not allowed:
        raise ValueError(f"a vocabulary must have words beside those of {concept.name!r}, got none")
    return torch.tensor(allowed, device=encoder.text_encoder.device)


TINY = AdversarialPromptConfig(
    tokens=3, attack=AttackConfig(timesteps=(700,), updates=20, learning_rate=0.3, weight_decay=0.0)
)
"""For the tiny world: one noise level, at which its textures are decided. Longer attacks bring stripes back from benign
pictures too: most of its vocabulary are bytes and pieces of words that its model never saw."""
