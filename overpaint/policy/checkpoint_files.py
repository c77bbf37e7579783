"""What the files of a checkpoint say before any weight is loaded: a folder in diffusers' layout, here or on the hub."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from overpaint.text_files import read_json, read_json_object

from .families import FAMILIES, Family, family_named, supported
from .weight_files import VARIANTS, flat_tensors, read_weights, shards_of, weight_files

PARTS = tuple(dict.fromkeys(part for family in FAMILIES for part in family.folders()))
CONFIGURATION = [
    "model_index.json",
    *(f"{part}/*.{ending}" for part in PARTS for ending in ("json", "txt")),
    *(f"{part}/spiece.model" for part in PARTS if part.startswith("tokenizer")),
]
"""The files of a checkpoint that are no weights."""


INDEX = re.compile(r"\.index(\.\w+)?\.json$")
"""How the names of indexes end, which list the files of a model in shards."""

MOST_LEVELS = 100_000
"""Noise levels that a scheduler may have; it makes tables of them, and published ones have 1,000."""


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a checkpoint in diffusers' layout."""

    name: str
    """The folder's path, or the hub id."""

    files: frozenset[str]
    """Names of the files, relative, with forward slashes."""

    folder: Path
    """Where the configuration lies; for a hub id, in the cache."""

    def read(self, name: str) -> Mapping[str, Any]:
        """Returns a file of the configuration.

        Raises:
            ValueError: It is not there, or no JSON.
        """
        if not (self.folder / name).is_file():
            raise ValueError(f"a checkpoint's folder must hold {name}, and {self.name} does not")
        return read_json_object(self.folder / name)

    @property
    def family(self) -> type[Family]:
        """The family of models that it is of.

        Raises:
            ValueError: It is of none that is known.
        """
        kind = self.read("model_index.json").get("_class_name")
        family = family_named(kind)
        if family is None:
            raise ValueError(f"the checkpoint must be one of {supported()}, and {self.name} is a {kind}")
        return family

    def check(self) -> None:
        """Checks that the files are those of a text-to-image model of a known family, leaving weights aside.

        Raises:
            ValueError: They are not.
        """
        family = self.family
        for part in self.parts():
            if not any(file.startswith(f"{part}/") for file in self.files):
                raise ValueError(f"a checkpoint's folder must hold {part}/, and {self.name} does not")
        self._check_index()
        for file in sorted(self.files):
            if file.endswith(".json") and (self.folder / file).is_file():
                read_json(self.folder / file)  # before libraries do, which bound neither size nor depth
                if INDEX.search(file):
                    shards_of(self.folder / file)
        family.check_network(self.read(f"{family.network}/config.json"))
        import diffusers

        config = self.read("scheduler/scheduler_config.json")
        make: Any = getattr(diffusers, str(config.get("_class_name")), None)
        if not isinstance(make, type) or not issubclass(make, diffusers.SchedulerMixin):
            raise ValueError(f"the scheduler must be one of diffusers, got {config.get('_class_name')} in {self.name}")
        if not isinstance(levels := config.get("num_train_timesteps", 1000), int) or not 1 <= levels <= MOST_LEVELS:
            raise ValueError(
                f"the scheduler's num_train_timesteps must be from 1 to {MOST_LEVELS}, got {levels!r} in {self.name}"
            )
        family.check_scheduler(make.from_config(config))

    def _check_index(self) -> None:
        """Checks that every part is of a library that pipelines are made of: diffusers imports what the index names."""
        from diffusers import pipelines

        for part, value in self.read("model_index.json").items():
            library = value[0] if isinstance(value, list) and value else None
            if library is None or library in ("diffusers", "transformers"):
                continue
            if not isinstance(library, str) or not isinstance(getattr(pipelines, library, None), ModuleType):
                raise ValueError(
                    f"the parts of {self.name} must be of diffusers or transformers, got {part} of {library!r}"
                )

    def parts(self) -> tuple[str, ...]:
        """Returns the folders that it has to hold: all of its family but those that its index says it lacks."""
        index, family = self.read("model_index.json"), self.family
        lacking = {part for part in family.optional() if (index.get(part) or [None, None])[1] is None}
        return tuple(part for part in family.folders() if part not in lacking)

    def check_weights(self) -> None:
        """Checks what the weight files of a folder say of themselves, before libraries read them.

        Raises:
            ValueError: One is damaged, needs code to be run, or claims more than it has.
        """
        for part in self.parts():
            for stem in weight_stems(part):
                for file in weight_files(self.folder / part, stem):
                    flat_tensors(read_weights([file], device="meta"), file)

    def variants(self) -> dict[str, str]:
        """Returns the variant of each network that has its weights under no other name.

        Raises:
            ValueError: A network has no weights.
        """
        networks = [part for part in self.parts() if part in self.family.classes]
        return variants(self.files, self.name, networks)


def weight_stems(part: str) -> tuple[str, ...]:
    """Returns what the weight files of a network begin with; those of text encoders are of transformers."""
    return ("model", "pytorch_model") if part.startswith("text_encoder") else ("diffusion_pytorch_model",)


def variants(
    files: Iterable[str], name: str, networks: Sequence[str] = ("unet", "vae", "text_encoder")
) -> dict[str, str]:
    """Returns the variant of each network that has its weights under no plain name; sharded or whole.

    Args:
        files: Names of a checkpoint's files.
        name: What the checkpoint is called in errors.
        networks: Their folders.

    Raises:
        ValueError: A network has no weights, or in variants only that are no half precision.
    """
    listed, chosen = list(files), {}
    for part in networks:
        starts = weight_stems(part)
        weights = [Path(file).name for file in listed if file.startswith(f"{part}/") and _holds_weights(file)]
        found = {_variant(file) for file in weights if file.startswith(starts)}
        if None in found:
            continue
        half = [variant for variant in VARIANTS if variant in found]
        if not half:
            raise ValueError(f"{name} must hold the weights of {part}/, got {', '.join(sorted(weights)) or 'no file'}")
        chosen[part] = half[0]
    return chosen


def _holds_weights(file: str) -> bool:
    return file.endswith((".safetensors", ".bin"))


def _variant(file: str) -> str | None:
    """Returns what stands between a weight file's first dot and its number or its ending."""
    middle = file.split(".")[1:-1]
    return middle[0].partition("-")[0] if middle else None


def of_folder(folder: Path) -> CheckpointFiles:
    """Returns the files of a folder.

    Raises:
        ValueError: There is no such folder.
    """
    if not folder.is_dir():
        raise ValueError(
            "the checkpoint must be a folder in diffusers' layout or a hub id owner/name, or a single .safetensors or "
            f".ckpt file, got {folder}"
        )
    return CheckpointFiles(str(folder), _files(folder), folder)


def of_hub(name: str) -> CheckpointFiles:
    """Returns the files of a hub id; its configuration is fetched, or taken from the cache where there is no hub.

    Raises:
        ValueError: There is no such checkpoint, or the hub cannot be reached and the cache has none.
    """
    import httpx2
    from huggingface_hub import list_repo_files

    folder = fetch_configuration(name)
    try:
        files = frozenset(list_repo_files(name))
    except (OSError, httpx2.HTTPError):  # out of reach, or told to stay offline: what is in the cache is what there is
        files = _files(folder)
    return CheckpointFiles(name, files, folder)


def fetch_configuration(name: str) -> Path:
    """Returns the folder of the cache that holds a hub id's configuration and tokenizer, after fetching them.

    Raises:
        ValueError: There is no such checkpoint, or the hub cannot be reached and the cache has none.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        IncompleteSnapshotError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(snapshot_download(name, allow_patterns=CONFIGURATION))
    except IncompleteSnapshotError as error:
        return Path(error.snapshot_path)
    except GatedRepoError as error:
        raise ValueError(
            f"the checkpoint must be one that this account may read, and {name!r} is not; ask for it on its page"
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ValueError(f"the checkpoint must be a folder or a hub id of a pipeline, got {name!r}") from error
    except LocalEntryNotFoundError as error:
        raise ValueError(
            f"the hub must be within reach for {name!r}, which its cache does not hold, and it is not"
        ) from error


def _files(folder: Path) -> frozenset[str]:
    """Returns the files of a folder and of the folders in it."""
    found = (*folder.glob("*"), *folder.glob("*/*"))
    return frozenset(file.relative_to(folder).as_posix() for file in found if file.is_file())
