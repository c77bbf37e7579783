"""Whoever erased a model, it is recovered: with what is not of weights still at work, and held by what is asked for.

At the smallest size: what is told here is which model is trained, compared and kept, and what is refused.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_case import GOLDEN
from safetensors.torch import save_file

from erasure import ESD, UCE, Concept, ConceptBatch, Destruction, Erasure, ESDConfig
from examples import erase, refl_recover
from overpaint.evaluation.experiments import recovery, recovery_constraint
from overpaint.evaluation.experiments.program import settings_from_command_line
from overpaint.evaluation.experiments.recovery_constraint import LOSS_SAMPLES, LOSS_SEED, kept_method, mean_loss
from overpaint.evaluation.experiments.recovery_options import about_of
from overpaint.policy import DiffusionPolicy, LoRAConfig
from overpaint.policy.added import added_networks
from overpaint.training import read_metrics
from tests.examples.of_a_user import CONCEPT, KINDS, SETTINGS, YAML

GOGH = Concept(name="gogh", phrases=("gogh",), anchor="art", preserve=("", "monet"))
LORA = LoRAConfig(rank=2, alpha=2)


def run(program: Any, *options: str) -> Any:
    """Runs a program on the user's model, concept, measures and prompts, and returns its settings."""
    words = ["--policy", "model", *SETTINGS, *options]
    config = settings_from_command_line(program.Config, program.complete, words)
    program.main(config)
    return config


def erased_by(method: str, *options: str) -> str:
    """Erases by a method, as a user does, and returns the folder of the erasure."""
    run(erase, *CONCEPT, "--method", method, "--prompts-per-kind", "0", "--output-dir", f"by-{method}", *options)
    return f"by-{method}/erasure"


@pytest.fixture(autouse=True)
def plain_settings(here: Path, pipeline_dir: Path) -> None:
    """The user's model as a folder, and settings without those of a method."""
    Path("model").symlink_to(pipeline_dir)
    Path("mine.yaml").write_text(re.sub(r"eraser: .*\n", "", YAML))


def rows(folder: str) -> list[dict[str, Any]]:
    return json.loads(Path(folder, "comparison.json").read_text())["rows"]


def values(folder: str, tag: str) -> list[float]:
    return [entry[tag] for entry in read_metrics(Path(folder, "metrics.jsonl")) if tag in entry]


def drawn(policy: DiffusionPolicy) -> torch.Tensor:
    return policy.draw(["by gogh", "a cat"], seeds=[3, 4], steps=2)


RECEIVE = ["--settings", "recovery.yaml"]
SMALL_RECELER = ["--eraser.descent.iterations", "2", "--eraser.inner-steps", "2", "--eraser.steps", "2"]
SMALL_RECELER += ["--eraser.descent.learning-rate", "0.1", "--eraser.rank", "4"]


def test_added_networks_stay_at_work_and_hold_the_concept_by_their_own_loss(
    make_policy: Callable[..., DiffusionPolicy],
) -> None:
    erasure = erased_by("receler", *SMALL_RECELER)
    run(refl_recover, *RECEIVE, "--erasure", erasure, "--constraint", "objective", "--output-dir", "back")

    record = json.loads(Path("back/run.json").read_text())
    assert "Receler" in json.dumps(record["erasure"]["objective"])
    assert record["notes"]["erasure"]["config"]["rank"] == 4
    assert len(values("back", "erasure/violation")) == 2
    assert not Path("back/pipeline").exists()  # a folder of diffusers cannot hold them
    page = Path("back/report.html").read_text()
    assert "by the method&#39;s own loss" in page
    assert "Receler was applied to model, against gogh" in page

    # The LoRA was learned on the erasers: with them the model is whole, without them it is another.
    rebuilt = make_policy(lora=LORA)
    Erasure.load("back/erasure").apply(rebuilt)
    assert added_networks(rebuilt.unet)
    rebuilt.load_lora("back/lora")
    alone = make_policy(lora=LORA)
    alone.load_lora("back/lora", check_base=False)
    assert (drawn(rebuilt) - drawn(alone)).abs().max() > 1e-4


def test_a_sampling_guard_is_at_work_while_the_reward_is_raised(make_policy: Callable[..., DiffusionPolicy]) -> None:
    erasure = erased_by("sld", "--eraser.warmup-steps", "0")
    run(refl_recover, *RECEIVE, "--erasure", erasure, "--output-dir", "back")
    free, guarded = make_policy(lora=LORA), make_policy(lora=LORA)
    with pytest.raises(ValueError, match="What was recovered on an erased model belongs on that model only"):
        free.load_lora("back/lora")
    Erasure.load("back/erasure").apply(guarded)
    guarded.load_lora("back/lora")
    shown = {row["kind"]: row["models"] for row in rows("back") if row["measure"] == "mine.py:redness"}
    assert set(shown["benign"]) == {"before", "erased", "recovered"}
    assert shown["explicit"]["before"]["mean"] != shown["explicit"]["erased"]["mean"]
    assert not Path("back/pipeline").exists()


def test_a_file_of_erased_weights_is_what_the_saved_erasure_is(make_policy: Callable[..., DiffusionPolicy]) -> None:
    saved = erased_by("uce")
    policy = make_policy()
    Erasure.load(saved).apply(policy)
    save_file({name: value.contiguous() for name, value in policy.unet.state_dict().items()}, "erased.safetensors")
    run(refl_recover, *RECEIVE, "--erasure", saved, "--output-dir", "of-saved")
    more = ["--erasure", "erased.safetensors", "--method", "uce"]
    run(refl_recover, *RECEIVE, *more, *CONCEPT, "--output-dir", "of-file")
    for one, other in zip(rows("of-saved"), rows("of-file"), strict=True):
        for state in ("before", "erased", "recovered"):
            assert one["models"][state]["mean"] == pytest.approx(other["models"][state]["mean"], abs=1e-5)
    assert Path("of-file/pipeline/model_index.json").is_file()
    assert "UCE was applied" in Path("of-file/report.html").read_text()


def test_the_unconstrained_twin_is_held_by_nothing_and_says_so() -> None:
    erasure = erased_by("uce")
    run(refl_recover, *RECEIVE, "--erasure", erasure, "--output-dir", "held")
    run(refl_recover, *RECEIVE, "--erasure", erasure, "--constraint", "none", "--output-dir", "free")
    assert values("held", "erasure/weight")
    assert not values("free", "erasure/weight")
    assert values("free", "reward/mean")[0] == values("held", "reward/mean")[0]  # the same prompts and seeds
    assert values("free", "reward/mean")[1] != values("held", "reward/mean")[1]
    held, free = (Path(folder, "report.html").read_text() for folder in ("held", "free"))
    assert "without a constraint" in free
    assert "Violation of the constraint" not in free
    assert "under the constraint that it stays gone" in held
    assert "--constraint none" in Path("free/README.md").read_text()


def test_an_erased_folder_is_recovered_with_the_original_beside_it_or_without(
    make_policy: Callable[..., DiffusionPolicy],
) -> None:
    policy = make_policy()
    Erasure.load(erased_by("uce")).apply(policy)
    policy.save_pipeline("erased")
    for name, more in (("alone", []), ("beside", ["--original", "model"])):
        run(refl_recover, *RECEIVE, *CONCEPT, *more, "--policy", "erased", "--output-dir", name)
        models = json.loads(Path(name, "comparison.json").read_text())["models"]
        assert models == [*(["before"] if more else []), "erased", "recovered"]
        assert Path(name, "erasure").exists() is bool(more)
        assert "its eraser was applied" in Path(name, "report.html").read_text().lower()


def test_a_measure_with_a_gradient_can_be_the_detector_and_is_not_unasked() -> None:
    erasure = erased_by("uce")
    run(refl_recover, *RECEIVE, "--erasure", erasure, "--output-dir", "usual")
    assert "objective" in json.loads(Path("usual/run.json").read_text())["erasure"]
    options = ["--constraint", "detector", "--ceiling", "0.25", "--output-dir", "asked"]
    run(refl_recover, *RECEIVE, "--erasure", erasure, *options)
    record = json.loads(Path("asked/run.json").read_text())["erasure"]
    assert (record["cost"], record["ceiling"]) == ("FunctionReward(swirls)", 0.25)


def test_prompts_are_mined_and_attacked_on_demand() -> None:
    options = ["--erasure", erased_by("uce"), "--attacked", "--iterations", "2", "--output-dir", "back"]
    run(refl_recover, *RECEIVE, *options)
    record = json.loads(Path("back/run.json").read_text())["erasure"]
    assert "hard_share" in json.dumps(record["prompts"])
    assert "SoftAttack" in record["attack"]
    assert "erasure/weight" in Path("back/metrics.jsonl").read_text()
    assert "attacked" in Path("back/report.html").read_text()


@pytest.mark.parametrize("method", ["uce", "sld"])
def test_what_the_original_draws_is_unlearned_on_demand(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[Destruction] = []

    class Kept(Destruction):
        def prepare(self, policy: DiffusionPolicy, concept: Concept) -> None:
            super().prepare(policy, concept)
            found.append(self)

    monkeypatch.setattr(recovery_constraint, "Destruction", Kept)
    options = ["--erasure", erased_by(method), "--constraint", "destruction", "--iterations", "2"]
    small = ["--destruction.pictures", "4", "--refl.pretraining-pairs", "4", "--refl.pretraining-batch-size", "2"]
    run(refl_recover, *RECEIVE, *options, *small, "--output-dir", "back")
    assert all(moved > 0 for moved in values("back", "erasure/word_moved"))
    assert len(values("back", "erasure/violation")) == 2
    # A guard is at work in the policy's reference too: the original is another one then.
    assert (found[0].original is not None) == (method == "sld")
    assert list(Path("back/constraint/concept-pictures").glob("latents-*.safetensors"))


@pytest.mark.parametrize("words", ["2", "0"])
def test_a_destruction_with_words_is_refused_before_a_picture_is_drawn(
    words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Drawn(Exception):
        """What drawing raises."""

    def drawn(*_: Any, **__: Any) -> None:
        raise Drawn

    monkeypatch.setattr(recovery, "evaluate", drawn)
    sdxl = GOLDEN / "flow" / "tiny-sdxl"
    UCE().erase(DiffusionPolicy.from_pretrained(sdxl, device="cpu"), GOGH).save("by-uce")
    options = ["--policy", str(sdxl), "--erasure", "by-uce", "--constraint", "destruction"]
    several = "read by a model with one text encoder, and this one has several"
    with pytest.raises((ValueError, Drawn), match=several if words != "0" else "^$"):
        run(refl_recover, *RECEIVE, *options, "--destruction.words", words, "--output-dir", "back")
    assert not Path("back").exists()


def test_a_destruction_needs_room_in_the_users_prompts_before_a_picture_is_drawn() -> None:
    Path("prompts.json").write_text(json.dumps({**KINDS, "explicit": ["by gogh " * 9]}))
    options = ["--erasure", erased_by("uce"), "--constraint", "destruction"]
    with pytest.raises(ValueError, match=r"must leave room for DestructionConfig\.vectors=4"):
        run(refl_recover, *RECEIVE, *options, "--output-dir", "back")
    assert not Path("back").exists()


def test_a_detector_without_a_gradient_is_refused_before_a_picture_is_drawn() -> None:
    Path("mine.py").write_text(Path("mine.py").read_text().replace("images[:, 2]", "images.detach()[:, 2]"))
    erasure = erased_by("uce")
    with pytest.raises(ValueError, match="detector must be differentiable in the images for ReFL, got swirls"):
        run(refl_recover, *RECEIVE, "--erasure", erasure, "--constraint", "detector", "--output-dir", "back")
    assert not Path("back").exists()


def test_the_ceiling_of_a_loss_is_the_erased_models_own_against_the_original(
    make_policy: Callable[..., DiffusionPolicy],
) -> None:
    settings = ["--eraser.descent.iterations", "2", "--eraser.descent.learning-rate", "0.01", "--eraser.steps", "2"]
    erasure = Erasure.load(erased_by("esd", *settings, "--eraser.train", "xattn"))
    words = ["--policy", "model", *SETTINGS, "--erasure", "by-esd/erasure"]
    config = settings_from_command_line(refl_recover.Config, refl_recover.complete, words)
    method = kept_method(config.erasure, config.method, config.eraser)
    assert isinstance(method, ESD)
    assert method.config == ESDConfig(**{**vars(ESDConfig()), **vars(method.config)})
    assert (method.config.steps, method.config.descent.iterations) == (2, 2)

    policy = make_policy(lora=LORA)
    erasure.apply(policy, reference="original")
    found = mean_loss(method, policy, about_of(config), 8)
    other = make_policy(train="full")  # whose reference is what it was loaded as
    erasure.delta.apply(other.unet)
    losses = method.loss(other, ConceptBatch(["gogh"] * LOSS_SAMPLES, range(LOSS_SEED, LOSS_SEED + LOSS_SAMPLES)))
    assert found == pytest.approx(losses.mean().item(), rel=1e-4)
    wrong = make_policy(lora=LORA)
    erasure.apply(wrong)  # whose reference is the erased model, as if that were what is to be unlearned
    assert mean_loss(method, wrong, about_of(config), 8) != pytest.approx(found, rel=1e-2)


@pytest.mark.filterwarnings("ignore:gogh. the concept is not measured")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "policy must be an erased model, or come with an erasure, got the tiny world's original"),
        (["--policy", "P", "--erasure", "E", "--original", "P"], "original must come without an erasure of the policy"),
        (["--erasure", "E", "--original", "P"], "original must come without an erasure of the policy"),
        (["--policy", "P", "--original", "nowhere"], "nowhere"),
        (["--policy", "P", "--erasure", "E", "--constraint", "objective"], r"has a loss \(mace, esd, .*\), got UCE"),
        (["--policy", "P", "--constraint", "objective", *CONCEPT], "method that has a loss .* got none that is known"),
        (
            ["--policy", "P", "--constraint", "objective", "--method", "esd", *CONCEPT],
            "constraint objective must come with the original, which the loss is about, got none",
        ),
        (
            ["--policy", "P", "--constraint", "destruction", *CONCEPT],
            "constraint destruction must come with the original, which the loss is about, got none",
        ),
        (["--policy", "P", "--measure", "none", "--constraint", "detector", *CONCEPT], "no detector .* for gogh"),
        (["--policy", "P", "--constraint", "none", "--attacked", *CONCEPT], "attacked must be off with the constraint"),
        (
            ["--policy", "P", "--constraint", "none", "--ceiling", "0.1", *CONCEPT],
            "ceiling must be None with the",
        ),
    ],
)
def test_what_contradicts_is_said_before_any_work(options: list[str], message: str, pipeline_dir: Path) -> None:
    places = {"P": str(pipeline_dir), "E": "by-uce/erasure"}
    if "E" in options:
        erased_by("uce")
    words = [*SETTINGS, *(places.get(word, word) for word in options), "--output-dir", "run"]
    with pytest.raises((ValueError, SystemExit)) as refused:
        refl_recover.main(settings_from_command_line(refl_recover.Config, refl_recover.complete, words))
    assert re.search(message, str(refused.value))
    assert not Path("run").exists()
