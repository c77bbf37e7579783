"""Images that another system drew: a folder in ImageReward's layout, `<id>_<k>.png`, and a file of their prompts."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from overpaint.evaluation.scoring.pairs import read_pairs

from .files import read_png
from .folder import check_model_name
from .images import Pixels
from .plan import PlannedImage

UNKNOWN_SEED = -1
"""Stands for the seed of an image that another system drew."""


@dataclass(frozen=True, kw_only=True)
class OtherImages:
    """Images of which it is known what they show, and not how they were drawn."""

    folder: Path
    model: str
    """The name of the system."""
    planned: tuple[PlannedImage, ...]
    """What each image shows; no seed is known."""

    @property
    def config(self) -> None:
        """How the images were drawn: unknown."""
        return None

    @classmethod
    def open(cls, folder: Path | str, model: str, prompts: Path | str, *, kind: str = "benign") -> "OtherImages":
        """Opens a folder.

        Args:
            folder: Holds `<id>_<k>.png`, image k of the prompt `<id>`.
            model: What the system is called.
            prompts: A list of {"id", "prompt"} in JSON, the `prompts.json` of drawn images, or a table with the columns
                "image" and "prompt".
            kind: Kind of the prompts of which the file says none.

        Raises:
            FileNotFoundError: There is no folder or no such file.
            ValueError: There are no images, one has another name or no prompt, or the model's name cannot be that of a
                folder.
        """
        folder, prompts = Path(folder), Path(prompts)
        check_model_name(model)
        kinds = _kinds(prompts)
        planned = []
        for pair in read_pairs(folder, prompts=prompts):
            match = re.fullmatch(r"([^/]+)_(0|[1-9]\d*)\.png", pair.name)
            if match is None or pair.prompt is None:
                raise ValueError(f"images in {folder} must be named <id>_<k>.png and have a prompt, got {pair.name}")
            found = kinds.get(match[1], kind)
            planned.append(PlannedImage(found, match[1], int(match[2]), pair.prompt, UNKNOWN_SEED))
        planned.sort(key=lambda image: (image.kind, _natural(image.id), image.copy))
        return cls(folder=folder, model=model, planned=tuple(planned))

    def pixels(self, positions: Sequence[int]) -> Pixels:
        """Reads the images at these places of `planned`; they have to be of one size.

        Raises:
            ValueError: They are not, or one cannot be read.
        """
        return torch.stack([_read(self.folder / self.planned[k].file_name) for k in positions])


def _kinds(prompts: Path) -> dict[str, str]:
    """Returns the kind of each prompt, where the file is JSON and says it; `read_pairs` has more to say about it."""
    if prompts.suffix != ".json":
        return {}
    try:
        content: Any = json.loads(prompts.read_text(encoding="utf-8"))
        entries = content["images"] if isinstance(content, dict) else content
        return {str(entry["id"]): entry["kind"] for entry in entries if "kind" in entry}
    except (KeyError, TypeError, ValueError, OSError):
        return {}


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Returns a key that sorts 2 before 10."""
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def _read(path: Path) -> Any:
    try:
        return read_png(path)
    except (OSError, SyntaxError) as error:  # Pillow raises SyntaxError for a damaged PNG chunk
        raise ValueError(f"{path} must be an image, and cannot be read: {error}") from error
