"""Does an image show a concept? CLIP as a zero-shot classifier, for any concept that words can name.

Source: Radford et al. (2021), https://arxiv.org/abs/2103.00020, sections 3.1.2 and 3.1.4: a class is the mean of its
captions' unit vectors, and probabilities are a softmax of cosines times CLIP's logit scale. As a measure of erasure,
against the anchor: the "CLIP accuracy" of Kumari et al. (2023), https://arxiv.org/abs/2303.13516.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from overpaint.policy.types import Images, PerSample
from overpaint.settings import Field, settings

from .clip import CHECKPOINTS, Checkpoint
from .clip_encoder import ClipEncoder
from .types import check_pairs, check_strings


@settings
class CLIPZeroShotConfig:
    """What the classes are made of, and with which network."""

    checkpoint: Checkpoint = "ViT-L/14"
    """OpenAI's network that `CLIPZeroShot.load` fetches."""
    template: str = Field("a photo of {}", pattern=r"\{\}")
    """Caption of a phrase, which takes the place of {}; "a painting in the style of {}" for a style."""
    neutral: str | None = "a photo"
    """Caption of an image of anything else, which is a class of its own; None leaves the anchors alone."""


class CLIPZeroShot(nn.Module):
    """The probability in [0, 1] that an image shows a concept, rather than an anchor or anything else.

    From 0.5 on the concept is likelier than all else together. Prompts do not matter. Differentiable in the images.

    Args:
        encoder: CLIP, whose text tower is not needed after this.
        phrases: What names the concept. Together they are one class, so that their number does not matter.
        anchors: What takes the concept's place, each a class of its own; blank ones are left out.
        config: The captions.

    Raises:
        ValueError: There are no phrases, nothing to tell the concept from, or a phrase is an anchor, too.
    """

    differentiable = True
    reads_prompts = False

    def __init__(
        self,
        encoder: ClipEncoder,
        phrases: Sequence[str],
        anchors: Sequence[str] = (),
        config: CLIPZeroShotConfig | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.config = config or CLIPZeroShotConfig()
        for name, texts in (("phrases", phrases), ("anchors", anchors)):
            if isinstance(texts, str):
                raise TypeError(f"{name} must be a sequence of strings, got the string {texts!r}")
            check_strings(texts, name)
        self.phrases = tuple(phrase.strip() for phrase in phrases)
        self.anchors = tuple(dict.fromkeys(anchor.strip() for anchor in anchors if anchor.strip()))
        if not self.phrases or not all(self.phrases):
            raise ValueError(f"phrases must hold at least one and none that is blank, got {list(phrases)!r}")
        if not self.anchors and self.config.neutral is None:
            raise ValueError("anchors must hold at least one where config.neutral is None, got none")
        both = sorted({one.lower() for one in self.phrases} & {one.lower() for one in self.anchors})
        if both:
            raise ValueError(f"anchors must be other than the concept's phrases, got {both[0]!r} among both")
        classes = [[self._caption(phrase) for phrase in self.phrases], *([self._caption(one)] for one in self.anchors)]
        if self.config.neutral is not None:
            classes.append([self.config.neutral])
        self.register_buffer("classes", self._embedded(classes), persistent=False)

    @classmethod
    def load(
        cls,
        phrases: Sequence[str],
        anchors: Sequence[str] = (),
        config: CLIPZeroShotConfig | None = None,
        *,
        folder: str | Path | None = None,
    ) -> "CLIPZeroShot":
        """Loads frozen weights.

        Args:
            phrases: What names the concept.
            anchors: What takes its place.
            config: The captions.
            folder: A checkpoint in transformers' layout with its tokenizer, taken whatever `config.checkpoint` says;
                that checkpoint from the Hugging Face hub where it is not given.
        """
        config = config or CLIPZeroShotConfig()
        where = CHECKPOINTS[config.checkpoint].fetch() if folder is None else Path(folder).expanduser()
        return cls(ClipEncoder.from_folder(where), phrases, anchors, config)

    def forward(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns the probability of the concept for each image; RGB in [0, 1]."""
        check_pairs(images, prompts)
        return self.probabilities(images)[:, 0]

    def probabilities(self, images: Images) -> Tensor:
        """Returns the probability of every class for each image: the concept, each anchor, anything else."""
        embeddings = self.encoder.image_embeddings(images)
        return (self.encoder.logit_scale * embeddings @ self.get_buffer("classes").to(embeddings).T).softmax(dim=1)

    @torch.no_grad()
    def _embedded(self, classes: Sequence[Sequence[str]]) -> Tensor:
        """Returns the mean of the unit vectors of each class's captions, at length 1."""
        means = [self.encoder.text_embeddings(captions).mean(dim=0) for captions in classes]
        return functional.normalize(torch.stack(means), dim=1)

    def _caption(self, phrase: str) -> str:
        return self.config.template.replace("{}", phrase)
