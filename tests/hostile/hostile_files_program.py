"""Reads files that mean harm with everything of the project that reads such files, and prints what came of each.

    python hostile_files_program.py PIPELINE FOLDER

A line of JSON for each: what was read with what, the exception's bases and text, CPU-seconds, and by how many MiB the
process has grown. `test_hostile_files.py` says what they must be.
"""

import hashlib
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hostile_files import (
    GIGABYTE,
    SETTINGS,
    Write,
    erasures,
    indexes,
    libraries,
    loras,
    made_once,
    pickles,
    pictures,
    plans,
    safetensors_files,
    schedulers,
    sparse,
    tables,
    texts,
)

from erasure import SLD, Concept, Erasure, SLDConfig
from erasure.cache import claim as claim_cache
from erasure.changes import WeightChange
from erasure.official import load_erasure
from overpaint.evaluation import DrawConfig, DrawnImages, ImageFolder, PlannedImage, Scores, write_folder
from overpaint.evaluation.experiments.program import read_settings
from overpaint.evaluation.images.drawable import read_record
from overpaint.evaluation.metrics.distances import Inception
from overpaint.evaluation.probes.result import ProbeResult, load_outcomes
from overpaint.evaluation.scoring.pair_scores import Journal, read_ranked
from overpaint.evaluation.tables import read_prompt_rows, read_table
from overpaint.image_files import read_image
from overpaint.policy import DiffusionPolicy, LoRAConfig, WeightDelta, check_checkpoint
from overpaint.policy.sealed import read_tensors as read_sealed
from overpaint.policy.weight_files import flat_tensors, read_weights, state_dict_of
from overpaint.training import TrainingConfig, TrainingRun, load_checkpoint, read_run_record
from overpaint.training.folder import claim
from rewards.blip_network import BlipTokenizer
from rewards.checkpoint import read_tensors
from rewards.clip_encoder import ClipEncoder, ClipTokenizer
from rewards.encoded import decode_image

Read = Callable[[Path], object]
CONCEPT = Concept(name="cat", phrases=("cat",))


class Case(NamedTuple):
    """One hostile file and what reads it."""

    name: str
    path: Path
    """The file."""
    read: Callable[[], object]
    names: tuple[str, ...]
    """What the message has to name: the file, or the folder that was read as a whole."""


class Places:
    """Good folders, of which one file at a time is replaced by a hostile one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.whole: dict[str, Path] = {}

    def add(self, kind: str) -> Path:
        """Returns a new folder, to be filled with what is good."""
        self.whole[kind] = self.folder / "whole" / kind
        self.whole[kind].mkdir(parents=True)
        return self.whole[kind]

    def with_files(self, kind: str, names: tuple[str, ...], files: Mapping[str, Write], read: Read) -> Iterator[Case]:
        """Yields the folder with each hostile file in the place of each name."""
        for name in names:
            for what, put in files.items():
                root = self.folder / "place"
                shutil.rmtree(root, ignore_errors=True)
                shutil.copytree(self.whole[kind], root)
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                if name.endswith(".bin"):
                    (root / name.replace(".bin", ".safetensors")).unlink(missing_ok=True)
                    (root / name.replace("pytorch_model.bin", "model.safetensors")).unlink(missing_ok=True)
                (root / name).unlink(missing_ok=True)
                put(root / name)
                yield Case(f"{kind}/{name}: {what}", root / name, partial(read, root), (Path(name).name, str(root)))


class Good(NamedTuple):
    """What is whole: a model, and folders of everything that is written and read."""

    pipeline: Path
    policy: DiffusionPolicy
    places: Places
    folder: Path

    @classmethod
    def made(cls, pipeline: Path, folder: Path) -> "Good":
        """Fills the folders."""
        policy, places = load(pipeline), Places(folder)
        key = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
        change = WeightChange(WeightDelta({key: torch.zeros_like(policy.unet.get_parameter(key))}))
        Erasure.of(policy, "ESD", {}, CONCEPT, change).save(places.add("erasure"))
        SLD(SLDConfig()).erase(policy, CONCEPT).save(places.add("guard"))
        shutil.copytree(pipeline, places.add("pipeline"), dirs_exist_ok=True)
        places.add("release").joinpath("unet").mkdir()
        other = load(pipeline, lora=LoRAConfig())
        other.save_lora(places.add("LoRA"))
        save_clip(places.add("CLIP"), pipeline)
        with TrainingRun(other, TrainingConfig(output_dir=places.add("run"), iterations=1, progress=False)) as run:
            list(run.iterations())
        plan = (PlannedImage("benign", "a", 0, "a cat", 1),)
        images = DrawnImages(model="m", planned=plan, config=DrawConfig(), stack=torch.zeros(1, 3, 8, 8).byte())
        write_folder(images, places.add("drawn"))
        places.add("loose")
        return cls(pipeline, policy, places, folder)

    def loose(self, name: str, files: Mapping[str, Write], readers: Mapping[str, Read]) -> Iterator[Case]:
        """Yields a single file of a name with each of its readers."""
        for reader, read in readers.items():
            for case in self.places.with_files("loose", (name,), files, lambda root, read=read: read(root / name)):
                yield case._replace(name=f"{reader}, {case.name}")


def load(path: Path, **options: Any) -> DiffusionPolicy:
    """Loads a policy for the CPU."""
    return DiffusionPolicy.from_pretrained(path, device="cpu", **options)


def of_weights(good: Good) -> Iterator[Case]:
    """Yields weights: pickles that run code or take all memory, and safetensors whose headers lie."""
    bombs = made_once(pickles(good.folder / "executed"), good.folder / "pickles")
    lies = made_once(safetensors_files(), good.folder / "safetensors")
    release = partial(load_erasure, base=good.policy, concept=CONCEPT)
    readers: dict[str, Read] = {"reward": read_tensors, "release": release, "LoRA": good.policy.load_lora}
    readers["model"] = partial(check_checkpoint, config=good.pipeline)
    pickled: dict[str, Read] = {
        "Inception": lambda path: Inception.from_file(path, sha256=None),
        "weights": lambda path: flat_tensors(state_dict_of(read_weights([path])), path),
    }
    for suffix in (".bin", ".pt", ".ckpt", ".pth"):
        yield from good.loose(f"w{suffix}", bombs, readers | pickled)
    yield from good.loose("w.safetensors", lies, {**readers, "cache": read_sealed})
    yield from good.loose("w.ckpt", bombs, {"loaded model": partial(load, config=good.pipeline)})
    yield from good.loose("w.safetensors", lies, {"loaded model": partial(load, config=good.pipeline)})
    for kind, names, read in (
        ("pipeline", ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"), load),
        ("release", ("unet/diffusion_pytorch_model",), release),
        ("LoRA", ("pytorch_lora_weights",), good.policy.load_lora),
    ):
        yield from good.places.with_files(kind, tuple(f"{name}.bin" for name in names), bombs, read)
        yield from good.places.with_files(kind, tuple(f"{name}.safetensors" for name in names), lies, read)
    yield from good.places.with_files("pipeline", ("text_encoder/pytorch_model.bin",), bombs, load)
    yield from good.places.with_files("pipeline", ("text_encoder/model.safetensors",), lies, load)
    yield from good.places.with_files("CLIP", ("pytorch_model.bin",), bombs, ClipEncoder.from_folder)
    yield from good.places.with_files("CLIP", ("model.safetensors",), lies, ClipEncoder.from_folder)
    yield from good.places.with_files("erasure", ("weight_delta.safetensors",), lies, Erasure.load)
    newest = "checkpoints/iteration-00000001"
    harmless = ("a mapping in itself", "2^60 tensors by doubling")  # where nothing walks through it
    states = {what: put for what, put in bombs.items() if what not in harmless}
    for name, files in (("state.pt", states), ("weights.safetensors", lies)):
        read = lambda root: load_checkpoint(root / newest)  # noqa: E731
        for case in good.places.with_files("run", (f"{newest}/{name}",), files, read):
            fit_manifest(case.path.parent)
            yield case


def of_json(good: Good) -> Iterator[Case]:
    """Yields JSON that is too large, nests too deep, or is none, in the place of every file that is read as JSON."""
    said = made_once(texts(), good.folder / "texts")
    pipeline = tuple(str(path.relative_to(good.pipeline)) for path in sorted(good.pipeline.rglob("*.json")))
    config = TrainingConfig(output_dir=good.folder, iterations=1, progress=False, resume=True)
    release = partial(load_erasure, base=good.policy, concept=CONCEPT)
    index, newest = "unet/diffusion_pytorch_model.safetensors.index.json", "checkpoints/iteration-00000001"
    places: tuple[tuple[str, tuple[str, ...], Read], ...] = (
        ("erasure", ("erasure.json", "weight_delta.json"), Erasure.load),
        ("guard", ("erasure.json", "sld.json"), Erasure.load),
        ("pipeline", pipeline, load),
        ("CLIP", ("config.json", "vocab.json"), ClipEncoder.from_folder),
        ("release", (index,), release),
        ("run", ("run.json",), read_run_record),
        ("run", ("run_config.json",), lambda root: claim(replace(config, output_dir=root), {})),
        ("run", (f"{newest}/manifest.json",), lambda root: load_checkpoint(root / newest)),
        ("drawn", ("prompts.json",), lambda root: ImageFolder.open(root, "m")),
        ("drawn", ("m/model.json",), lambda root: read_record(root / "m")),
    )
    for kind, names, read in places:
        yield from good.places.with_files(kind, names, said, read)
    yield from good.loose(
        "t.json",
        said,
        {
            "cache": lambda path: claim_cache(path, {"a": 1}, "latents"),
            "scores": Scores.load,
            "probe": ProbeResult.load,
            "ceiling": load_outcomes,
            "prompts": read_prompt_rows,
            "ranking": read_ranked,
            "vocabulary": BlipTokenizer.from_file,
        },
    )
    yield from good.loose("t.jsonl", said, {"lines": read_table})
    followed = {what: after(put) for what, put in said.items()}
    yield from good.loose("j.jsonl", followed, {"journal": lambda path: Journal(path, {"a": 1})})


def of_contents(good: Good) -> Iterator[Case]:
    """Yields files that are well-formed, and name or hold what they must not."""
    release = partial(load_erasure, base=good.policy, concept=CONCEPT)
    erased, drawn = good.places.whole["erasure"], good.places.whole["drawn"]
    yield from good.loose("w.safetensors", loras(), {"LoRA": good.policy.load_lora})
    elsewhere = indexes(good.folder)
    places: tuple[tuple[str, str, Mapping[str, Write], Read], ...] = (
        ("erasure", "erasure.json", erasures(erased), Erasure.load),
        ("release", "unet/diffusion_pytorch_model.safetensors.index.json", elsewhere, release),
        ("pipeline", "unet/diffusion_pytorch_model.safetensors.index.json", elsewhere, load),
        ("pipeline", "text_encoder/model.safetensors.index.json", elsewhere, load),
        ("pipeline", "model_index.json", libraries(good.pipeline), load),
        ("pipeline", "scheduler/scheduler_config.json", schedulers(good.pipeline), load),
        ("drawn", "prompts.json", plans(drawn), lambda root: ImageFolder.open(root, "m")),
    )
    for kind, name, files, read in places:
        yield from good.places.with_files(kind, (name,), files, read)


def of_others(good: Good) -> Iterator[Case]:
    """Yields images, tables and settings."""
    folder = good.folder / "others"
    folder.mkdir()
    for what, (suffix, content) in pictures().items():
        path = folder / f"image{suffix}"
        path.write_bytes(content)
        yield Case(f"image: {what}", path, partial(read_image, path), (str(path),))
        yield Case(f"image of a request: {what}", path, partial(decode_image, content, 2**24), ("image",))
    for what, path in tables(folder):
        yield Case(f"table: {what}", path, partial(read_table, path), (str(path),))
    for what, content in SETTINGS.items():
        path = folder / "settings.yaml"
        if content is None:
            sparse(path, b"a: 1", GIGABYTE)
        else:
            path.write_bytes(content.replace(b"MARKER", bytes(good.folder / "executed")))
        yield Case(f"settings: {what}", path, partial(read_settings, path), (str(path),))


def after(put: Write) -> Write:
    """Returns what writes a file and a line behind it, without which the last line of a journal counts as torn."""

    def write_both(path: Path) -> None:
        put(path)
        if path.stat().st_size < GIGABYTE:
            content = path.read_bytes()
            path.unlink()  # a link
            path.write_bytes(content + b"\n{}\n")

    return write_both


def fit_manifest(checkpoint: Path) -> None:
    """Makes a checkpoint's manifest vouch for what is there, as whoever changed it would."""
    path = checkpoint / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        content = (checkpoint / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_text(json.dumps(manifest))


def save_clip(folder: Path, pipeline: Path) -> None:
    """Writes a CLIP of a few weights."""
    tokenizer = ClipTokenizer.from_folder(pipeline / "tokenizer")
    tower = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    text = {**tower, "vocab_size": len(tokenizer), "max_position_embeddings": 8}
    vision = {**tower, "image_size": 8, "patch_size": 8}
    ClipEncoder({"text_config": text, "vision_config": vision, "projection_dim": 4}, tokenizer).save_pretrained(folder)


def main(pipeline: Path, folder: Path) -> None:
    """Reads everything, and prints what came of it."""
    modules = folder / "modules"  # stands for whatever lies where Python looks
    modules.mkdir()
    (modules / "imported_by_name.py").write_text(f"open({str(folder / 'executed')!r}, 'w').close()")
    sys.path.insert(0, str(modules))
    programs = folder / "programs"  # Ghostscript, if anything asked for it
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {folder / 'executed'}\n")
    (programs / "gs").chmod(0o755)
    os.environ["PATH"] = f"{programs}:{os.environ['PATH']}"
    good = Good.made(pipeline, folder)
    for case in (case for kind in (of_weights, of_json, of_contents, of_others) for case in kind(good)):
        start, size = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        try:
            case.read()
        except BaseException as error:
            kinds, told = [kind.__name__ for kind in type(error).__mro__], str(error)
        else:
            kinds, told = [], "was read"
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - size) // 1024
        seconds = time.process_time() - start
        executed = [name for name in ("executed", "escaped") if (folder / name).exists()]
        line = {"name": case.name, "names": case.names, "kinds": kinds, "told": told[:2000], "executed": executed}
        sys.stdout.write(json.dumps({**line, "seconds": seconds, "grown": grown}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
