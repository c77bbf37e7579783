"""The README of an output folder, which is the model card on the hub, and the way there."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from erasure.erased import Erasure
from overpaint.evaluation.scoring.compare import Comparison
from overpaint.policy.atomic import write_text
from overpaint.policy.lora_files import KOHYA_FILE, LORA_FILE, recorded_base

from .table import Table, render, results_table

README = "README.md"

PARTS: Mapping[str, str] = {
    "report.html": "The report: tables, charts and pictures, in one page that needs no network.",
    "pipeline": "The whole model in diffusers' layout, any LoRA added in.",
    "model_index.json": "The model, in diffusers' layout: it says what the folders beside it hold.",
    "lora": "What was trained: a LoRA in diffusers' format, with the hash of the model that it belongs on.",
    LORA_FILE: "A LoRA in diffusers' format.",
    KOHYA_FILE: "The same LoRA in kohya's format, for A1111 and ComfyUI.",
    "erasure": "The erasure: what changes the original, and how that was computed. `Erasure.load` reads it.",
    "table.txt": "The table of results, as it was printed.",
    "comparison.json": "Every number of the results, with its interval.",
    "settings.yaml": "All settings of the program, for `--settings`.",
    "run.json": "The record of the training run: model, data, device, versions, commit, duration.",
    "run_config.json": "Every setting of the training run, which resuming has to keep.",
    "settings.json": "Every setting of the comparison.",
    "metrics.jsonl": "What was logged during training, one line for each iteration.",
    "images": "Images drawn during training.",
    "checkpoints": "The states that training can be resumed from; not needed for drawing.",
    "training": "The training run of the erasure, resumable.",
    "erasing": "The training run of the erasure, resumable.",
    "constraint": "Pictures that the loss of the constraint was computed on.",
    "pictures": "The pictures that were scored, of every model, on the same prompts and seeds.",
    "scores.json": "What each picture scored.",
    "scores.csv": "What each picture scored.",
    "scores": "Scores of single pictures, from which an interrupted evaluation goes on.",
    "means.json": "The mean of each model.",
    "prompts.json": "The prompts that were drawn.",
    "minutes.json": "How long each step took.",
    "table.md": "The table of results.",
}
"""What each part of an output folder is, by its name; in the order in which it is told."""

NOT_UPLOADED = ("checkpoints/**", "**/checkpoints/**", ".*", "**/.*")
"""What resumes a run and draws nothing, and hidden files."""


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What is known of a model or a run, for those who find its folder; what is empty is not told."""

    title: str
    summary: str = ""
    """What was done and what came out, in a sentence or two."""
    base_model: str = ""
    """What it was made of: a hub id, or words."""
    erasures: Sequence[Erasure] = ()
    """What was erased from it, in this order."""
    reward: str = ""
    """What was raised afterwards, such as "ImageReward with ReFL"."""
    comparison: Comparison | None = None
    """The results."""
    tables: Sequence[Table] = ()
    """Further results."""
    notes: Sequence[str] = ()
    """What a reader has to know to use the model or to read the numbers right."""
    commands: Sequence[str] = ()
    """Commands that repeat the run."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the run."""
    license: str = ""
    """The license's name on the hub, such as "creativeml-openrail-m"; a changed model has its base's."""
    tags: Sequence[str] = ()
    """Tags on the hub, besides those that follow from what is told."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """What further files and folders are, by their names; and what stands in for `PARTS`."""

    def markdown(self, folder: Path | str) -> str:
        """Returns the card of a folder: its metadata as the hub reads it, then what is known, and which parts it has.

        Only parts that are there are told, and a LoRA on an erased model never without the warning that it belongs on
        that model alone.
        """
        from huggingface_hub import ModelCardData

        folder = Path(folder)
        lora = next((path for path in (folder / LORA_FILE, folder / "lora" / LORA_FILE) if path.is_file()), None)
        pipeline = next((path for path in (folder, folder / "pipeline") if (path / "model_index.json").is_file()), None)
        data = ModelCardData(
            base_model=self.base_model if re.fullmatch(r"[\w.-]+/[\w.-]+", self.base_model) else None,
            library_name="diffusers",
            license=self.license or None,
            pipeline_tag="text-to-image" if lora or pipeline else None,
            tags=[
                "overpaint",
                *["concept-erasure"] * bool(self.erasures),
                *["lora"] * (lora is not None),
                *self.tags,
            ],
        )
        tables = [*([results_table(self.comparison)] if self.comparison else []), *self.tables]
        body = render(
            "model_card.md.j2",
            card=self,
            tables=[(table.label, _ungrouped(table).markdown(), table.caption) for table in tables],
            settings=json.dumps(self.settings, indent=2, default=str) if self.settings else "",
            parts={name: what for name, what in {**PARTS, **self.parts}.items() if (folder / name).exists()},
            pipeline="" if pipeline is None else pipeline.relative_to(folder).as_posix(),
            lora="" if lora is None else lora.parent.relative_to(folder).as_posix(),
            erasure="erasure" if (folder / "erasure").is_dir() else "",
            base={} if lora is None else recorded_base(lora),
        )
        return f"---\n{data.to_yaml()}\n---\n\n{body}\n"

    def save(self, folder: Path | str) -> Path:
        """Writes the card into a folder, which is made, as README.md; returns the file."""
        path = Path(folder) / README
        write_text(path, self.markdown(folder))
        return path


def push_to_hub(
    folder: Path | str,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    endpoint: str | None = None,
) -> str:
    """Uploads a folder with its model card to the Hugging Face hub, without checkpoints and hidden files.

    Args:
        folder: With a README.md, as `ModelCard.save` writes it.
        repo_id: "owner/name"; the repository is made where there is none.
        private: Whether others cannot see a new repository.
        token: The right to write; None is the one that `hf auth login` has saved, or HF_TOKEN.
        endpoint: Another hub's address.

    Returns:
        The repository's address.

    Raises:
        ValueError: The folder has no model card, or the name is not one of a repository.
        PermissionError: There is no token, or the hub does not accept it for this repository.
        ConnectionError: The hub cannot be reached, or has failed.
    """
    import httpx2
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    folder = Path(folder)
    if not (folder / README).is_file():
        raise ValueError(f"a folder for the hub must hold a model card, {README}, and {folder} does not")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(f"repo_id must be owner/name, got {repo_id!r}")
    if (token := token or get_token()) is None:
        raise PermissionError(
            "the hub must be given a token with the right to write, and there is none: pass token=..., set HF_TOKEN, "
            "or call `hf auth login` once. Nothing was uploaded"
        )
    api = HfApi(endpoint=endpoint, token=token)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            ignore_patterns=list(NOT_UPLOADED),
            commit_message="Upload of the model and its card",
        )
    except HfHubHTTPError as error:
        if error.response.status_code in (401, 403):
            raise PermissionError(f"the hub must accept the token for {repo_id}, and it does not: {error}") from error
        raise ConnectionError(f"the hub must take the upload to {repo_id}, and it failed: {error}") from error
    except (OfflineModeIsEnabled, httpx2.TransportError) as error:
        raise ConnectionError(f"the hub must be reachable for the upload to {repo_id}, and is not: {error}") from error
    return str(url)


def _ungrouped(table: Table) -> Table:
    """Returns a table with the name of each group in front of its lines' names."""
    lines = [line._replace(name=f"{line.group}: {line.name}" if line.group else line.name) for line in table.lines]
    return replace(table, lines=lines)
