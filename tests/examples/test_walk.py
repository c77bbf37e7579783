"""A walk from nothing: model, concept, reward, measure, prompts and settings of one's own; erase, recover, export."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from erasure import UCE, Concept, Erasure, UCEConfig
from examples import erase, refl_erase_nudity
from overpaint.evaluation.experiments.program import settings_from_command_line
from overpaint.policy import DiffusionPolicy, LoRAConfig
from tests.examples.of_a_user import CONCEPT, SETTINGS, YAML

OTHERS = ("nudity", "NudeNet", "stripes", "Stripes", "ImageReward", "tiny world")
"""What belongs to other concepts and rewards, and must not be on any page."""


def pages(folder: Path) -> str:
    """All that a reader of an output folder reads, without the scripts of the page."""
    page = re.sub(r"<script.*?</script>|<style.*?</style>", "", (folder / "report.html").read_text(), flags=re.DOTALL)
    names = ("table.txt", "comparison.json", "settings.yaml", "README.md")
    told = page + "".join((folder / name).read_text() for name in names)
    return told.replace("refl_erase_nudity", "")  # the program's own name


def test_everything_is_about_what_was_brought(
    here: Path, pipeline_dir: Path, make_policy: Callable[..., DiffusionPolicy], look_at: Callable[[Path], object]
) -> None:
    model = ["--policy", "model.safetensors", "--policy-config", str(pipeline_dir)]
    mine = [*model, *CONCEPT, *SETTINGS]
    erased = settings_from_command_line(erase.Config, erase.complete, [*mine, "--output-dir", "erased"])
    assert erased.eraser == UCEConfig(regularization=0.1)
    erase.main(erased)
    erasure = Erasure.load("erased/erasure")
    assert (erasure.concept.name, erasure.concept.anchor) == ("gogh", "art")
    assert erasure.delta.tensors

    # The saved erasure brings its concept, and no other may be said of it.
    again = [*model, *SETTINGS, "--settings", "recovery.yaml", "--erasure", "erased/erasure"]
    program = refl_erase_nudity
    config = settings_from_command_line(program.Config, program.complete, [*again, "--output-dir", "recovered"])
    program.main(config)
    with pytest.raises(ValueError, match=r"concept must be the saved erasure's, gogh, got picasso"):
        program.main(
            settings_from_command_line(
                program.Config, program.complete, [*again, "--concept", "picasso", "--output-dir", "other"]
            )
        )

    for folder in (Path("erased"), Path("recovered")):
        text = pages(folder)
        assert "\n# Gogh not measurably reduced by UCE" in (folder / "README.md").read_text()
        assert "--policy model.safetensors" in text
        assert not [word for word in OTHERS if word in text]
        rows = json.loads((folder / "comparison.json").read_text())["rows"]
        kinds = {"explicit", "neighbour", "benign"}
        assert {(row["measure"], row["kind"]) for row in rows} == {
            *(("mine.py:redness", kind) for kind in kinds),
            ("concept rate", "explicit"),
            ("concept rate", "benign"),
        }
        (notes,) = {row["note"] for row in rows if row["measure"] == "concept rate"}
        assert notes.startswith("mine.py:swirls")
    record = json.loads(Path("recovered/run.json").read_text())
    assert record["notes"]["concept"]["name"] == "gogh"
    assert record["notes"]["policy"] == "model.safetensors"

    # What was exported draws the same in the same policy, and carries what it sits on.
    recovered = make_policy(path=Path("recovered/pipeline"))
    rebuilt = make_policy(lora=LoRAConfig(rank=2, alpha=2))
    with pytest.raises(ValueError, match="What was recovered on an erased model belongs on that model only"):
        rebuilt.load_lora("recovered/lora")
    Erasure.load("recovered/erasure").apply(rebuilt)
    rebuilt.load_lora("recovered/lora")
    drawn = [policy.draw(["by gogh"], seeds=[3], steps=2) for policy in (recovered, rebuilt)]
    torch.testing.assert_close(drawn[0], drawn[1], rtol=0, atol=1e-4)
    rebuilt.save_lora("kohya", format="kohya")
    assert Path("kohya/lora.safetensors").is_file()

    # And the settings that a run wrote make the same run, beside the code that they name.
    _, _, *code = SETTINGS
    words = [*code, "--settings", "recovered/settings.yaml", "--output-dir", "repeated"]
    same = settings_from_command_line(program.Config, program.complete, words)
    program.main(same)
    assert Path("repeated/table.txt").read_text() == Path("recovered/table.txt").read_text()
    look_at(here / "recovered/report.html")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--original", "x"], "original must come with the method none, got 'x' with uce"),
        (["--method", "none"], "policy must be an erased model with the method none, got the tiny world's"),
        (["--policy", "P", "--method", "none", "--erasure", "e"], "erasure must be None with the method none, got e"),
        (["--method", "sld", "--train", "xattn"], "train must be None with sld"),
        (["--preserve", "monet"], r"preserve must come with a concept, got \('monet',\) without"),
        (["--run.seed", "3"], r"run\.seed must be the program's own, 0, got 3"),
        (["--lora-file", "x", "--train", "xattn"], "lora_file must come without lora and train, got 'xattn' besides"),
    ],
)
def test_what_contradicts_is_said_before_any_work(
    options: list[str], message: str, pipeline_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = refl_erase_nudity
    monkeypatch.chdir(tmp_path)
    words = [str(pipeline_dir) if word == "P" else word for word in options]
    with pytest.raises((ValueError, SystemExit)) as refused:
        program.main(settings_from_command_line(program.Config, program.complete, [*words, "--output-dir", "run"]))
    assert re.search(message, str(refused.value))
    assert not (tmp_path / "run").exists()


def test_an_erased_model_is_recovered_with_the_original_beside_it_or_without(
    here: Path, pipeline_dir: Path, make_policy: Callable[..., DiffusionPolicy]
) -> None:
    policy = make_policy()
    UCE().erase(policy, Concept(name="gogh", phrases=("gogh",), anchor="art")).apply(policy)
    policy.save_pipeline("erased")
    Path("mine.yaml").write_text(YAML.replace("eraser: {regularization: 1e-1}", "method: none"))
    options = ["--policy", "erased", *CONCEPT, *SETTINGS, "--settings", "recovery.yaml"]
    program = refl_erase_nudity
    for name, more in (("alone", []), ("beside", ["--original", str(pipeline_dir)])):
        words = [*options, *more, "--output-dir", name]
        program.main(settings_from_command_line(program.Config, program.complete, words))
        models = json.loads(Path(name, "comparison.json").read_text())["models"]
        assert models == [*(["before"] if more else []), "erased", "recovered"]
        assert Path(name, "pipeline/model_index.json").is_file()
        assert Path(name, "erasure").exists() is bool(more)
    alone, beside = (json.loads(Path(name, "comparison.json").read_text())["rows"] for name in ("alone", "beside"))
    for one, other in zip(alone, beside, strict=True):
        assert one["models"]["erased"]["mean"] == pytest.approx(other["models"]["erased"]["mean"], abs=1e-5)
