"""Aesthetic score: how beautiful people find an image, whatever its prompt.

Source: LAION's predictor sac+logos+ava1 on CLIP ViT-L/14, christophschuhmann/improved-aesthetic-predictor, and
kvablack/ddpo-pytorch, `aesthetic_scorer.py`, which computes it without gradients. Its layers are all linear.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from torch import nn

from overpaint.policy.types import Images, PerSample
from overpaint.settings import Count

from .blip_network import in_precision_of
from .checkpoint import frozen_with, read_tensors, renamed
from .clip_encoder import VIT_L_14, ClipEncoder, Vectors, at_least_float32
from .public_files import PublicFile, fetch
from .types import check_pairs

HEAD = PublicFile(
    name="sac+logos+ava1-l14-linearMSE.pth",
    url=(
        "https://raw.githubusercontent.com/christophschuhmann/improved-aesthetic-predictor/"
        "6934dd81792f086e613a121dbce43082cb8be85e/sac%2Blogos%2Bava1-l14-linearMSE.pth"
    ),
    sha256="21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0",
    licence="Apache-2.0",
    source="LAION, https://github.com/christophschuhmann/improved-aesthetic-predictor",
)
"""The head's weights, 3.7 MB."""
WIDTHS = (768, 1024, 128, 64, 16, 1)
"""Widths of the official head, from CLIP's embedding to the score."""
RENAMINGS = tuple(
    (rf"layers\.{theirs}\.(weight|bias)", rf"layers.{ours}.\1") for ours, theirs in enumerate((0, 2, 4, 6, 7))
)
"""Pattern of an official name, and the name that takes its place; dropouts have the numbers between."""


class AestheticHead(nn.Module):
    """Maps unit embeddings of CLIP to scores of about 1 to 10, by linear layers with nothing between them.

    There is no dropout: the official head has some, which acts while it is trained only.

    Args:
        widths: Widths of the layers, from the embedding's to 1.
    """

    def __init__(self, widths: Sequence[Count] = WIDTHS) -> None:
        super().__init__()
        if len(widths) < 2 or widths[-1] != 1:
            raise ValueError(f"widths must be at least two, the last of them 1, got {tuple(widths)}")
        self.widths = tuple(widths)
        self.layers = nn.Sequential(*(nn.Linear(*pair) for pair in pairwise(widths)))

    @classmethod
    def from_official(cls, path: str | Path) -> "AestheticHead":
        """Loads the weights with their official names, every one of which must fit; frozen.

        Raises:
            ValueError: A tensor is missing, unknown or of another shape.
        """
        state = read_tensors(Path(path))
        what = "of the official aesthetic head"
        return frozen_with(cls(), {renamed(name, RENAMINGS, what): tensor for name, tensor in state.items()})

    def collapsed(self) -> "AestheticHead":
        """Returns the same map as one frozen layer, computed in float64."""
        state = {name: tensor.double() for name, tensor in self.state_dict().items()}
        weight, bias = state["layers.0.weight"], state["layers.0.bias"]
        for layer in range(1, len(self.layers)):
            weight = state[f"layers.{layer}.weight"] @ weight
            bias = state[f"layers.{layer}.weight"] @ bias + state[f"layers.{layer}.bias"]
        return frozen_with(
            AestheticHead((self.widths[0], 1)).to(weight), {"layers.0.weight": weight, "layers.0.bias": bias}
        )

    def forward(self, embeddings: Vectors) -> PerSample:
        """Returns the score of each embedding; always computed in float32 at least."""
        return in_precision_of(at_least_float32(embeddings), self.layers)[:, 0]


class Aesthetic(nn.Module):
    """Scores images, mostly between 4 and 7; prompts do not matter. Differentiable in the images.

    Args:
        encoder: OpenAI's CLIP ViT-L/14.
        head: Maps its unit embeddings to scores.
    """

    differentiable = True
    reads_prompts = False

    def __init__(self, encoder: ClipEncoder, head: AestheticHead) -> None:
        super().__init__()
        if encoder.dim != head.widths[0]:
            raise ValueError(f"head must take the encoder's embeddings of width {encoder.dim}, got {head.widths[0]}")
        self.encoder = encoder
        self.head = head

    @classmethod
    def load(cls, folder: str | Path | None = None) -> "Aesthetic":
        """Loads frozen weights.

        Args:
            folder: Holds CLIP ViT-L/14 in transformers' layout with its tokenizer, and the head's file under its
                official name, whose content is checked; from the Hugging Face hub and the head's own repository
                where it is not given.
        """
        head = AestheticHead.from_official(fetch(HEAD, None if folder is None else Path(folder)))
        return cls(ClipEncoder.from_folder(folder or VIT_L_14.fetch()), head)

    def forward(self, images: Images, prompts: Sequence[str]) -> PerSample:
        """Returns the score of each image; RGB in [0, 1]."""
        check_pairs(images, prompts)
        return self.head(self.encoder.image_embeddings(images))
