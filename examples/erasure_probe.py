"""Try to bring an erased concept back: every probe tells how much of it is still in a model.

    python examples/erasure_probe.py --erasure runs/erase/erasure
    python examples/erasure_probe.py --erasure runs/refl_recover/erasure --lora-file runs/refl_recover/lora
    python examples/erasure_probe.py --policy my/erased --original CompVis/stable-diffusion-v1-4 --concept nudity

The model under test is an erasure of the model that is named, or an erased model with the original beside it; a LoRA
that was trained on it is put on top. Sampling guards and added networks stay at work. Each probe reports the share of
its pictures in which the concept shows, what it gets from the original model, what it draws by itself, and how much of
the concept it brought back, with pictures. Probes have their papers' settings, or for the tiny world those found for
it; those that need what the model has not, as vectors among the tokens of one text encoder, are left out unless they
are asked for, which is an error. What is finished is kept, so that the same command goes on where it was interrupted.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import get_args

from erasure.cache import claim
from overpaint.evaluation import Report
from overpaint.evaluation.experiments.options import OWNED
from overpaint.evaluation.experiments.probing import pictures_of, probes_section, probes_table, target_of
from overpaint.evaluation.experiments.program import (
    check_left_out,
    command_line,
    settings_from_command_line,
    usual_beside,
)
from overpaint.evaluation.experiments.recovery import first_policy, given_erasure
from overpaint.evaluation.experiments.recovery_options import RecoveryOptions, about_of, check_model
from overpaint.evaluation.probes.probe import why_not
from overpaint.evaluation.probes.registry import HEADLINE, ProbeName, probe_named
from overpaint.evaluation.probes.result import ProbeResult
from overpaint.evaluation.probes.run import run_probe
from overpaint.policy import DiffusionPolicy
from overpaint.policy.atomic import write_text
from overpaint.policy.digest import policy_record
from overpaint.settings import AnyPath, Distinct, Field, settings
from overpaint.training.logging import progress_bar


@settings
class Config(RecoveryOptions):
    """What is probed, and how."""

    output_dir: AnyPath = Path("runs/erasure_probe")
    """Where everything is written."""

    probes: Distinct[ProbeName] = Field(get_args(ProbeName), min_length=1)
    """Ways of bringing the concept back; by default all that can be tried on the model."""

    attempts: int = Field(16, ge=1)
    """Pictures that each probe tries to bring the concept back in."""

    fast: bool = False
    """Whether to try those probes alone that train nothing: completion, noise and semantics."""


FAST = ("completion", "noise", "semantics")
TRAINED = "nothing is trained"
LEFT_OUT: Mapping[str, str] = {
    **dict.fromkeys(("train", "kohya", "iterations", "learning_rate", "constraint", "ceiling", "attacked"), TRAINED),
    "resume": "the same command goes on where it was interrupted",
    "prompts_per_kind": "the number of pictures is --attempts",
    "push_to_hub": "nothing is made that could be uploaded",
}
"""Options of a recovery that mean nothing here, and why."""


def complete(config: Config) -> Config:
    """Fills in what depends on the model.

    Raises:
        ValueError: An option of a recovery is given.
    """
    check_left_out(config, LEFT_OUT)
    probes = FAST if config.fast and config.probes == get_args(ProbeName) else config.probes
    return replace(config, guidance_scale=config.usual_guidance, probes=probes)


def check(config: Config) -> None:
    """Checks what joins several options, before any work.

    Raises:
        ValueError: There is no erased model, or the original is not known, which every probe needs.
    """
    check_model(config)
    if config.erasure is None and config.original is None:
        raise ValueError(
            "original must be given with an erased policy, or an erasure with the original, since probes compare with "
            f"it; got {config.policy} alone"
        )


def left_out(config: Config, policy: DiffusionPolicy) -> dict[ProbeName, str]:
    """Returns which of the usual probes cannot be tried on a policy, and why.

    Raises:
        ValueError: One that was asked for cannot.
    """
    found = {name: why for name in config.probes if (why := why_not(probe_named(name), policy)) is not None}
    if found and config.probes != complete(replace(config, probes=get_args(ProbeName))).probes:
        name, why = next(iter(found.items()))
        raise ValueError(f"probes must be such as can be tried on the model, got {name}: {why}")
    return found


def main(config: Config) -> str:
    """Runs the probes that are missing, and writes the page.

    Raises:
        ValueError: As `check` and `left_out`, before anything is drawn.
    """
    config = complete(config)
    check(config)
    about, folder = about_of(config), config.output_dir
    original = first_policy(config, about, trained=False)
    target = target_of(about, config.drawing(config.evaluation_steps))
    tested = config.load()
    lacking = left_out(config, tested)
    erasure = given_erasure(config, about, original)
    if config.erasure is not None and erasure is not None:
        erasure.apply(tested)
    config.start(tested)
    claim(folder / "settings.json", deciding(config, policy_record(tested)), "probes")

    results: dict[str, ProbeResult] = {}
    probes = [name for name in config.probes if name not in lacking]
    for name in progress_bar(probes, desc="probes", unit="probe"):
        path = folder / "probes" / f"{name}.json"
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            run_probe(
                probe_named(name, tiny=config.tiny),
                tested,
                original,
                target,
                count=config.attempts,
                seed=config.seed,
                kept=folder / "kept",
                pictures=folder / "probes",
            ).save(path)
        results[name] = ProbeResult.load(path)
    eraser = "its eraser" if erasure is None else erasure.method
    return write(config, results, lacking, erased_by=eraser, concept=target.concept.name)


def write(
    config: Config, results: dict[str, ProbeResult], lacking: Mapping[ProbeName, str], *, erased_by: str, concept: str
) -> str:
    """Writes tables and page, and returns what was printed."""
    folder = config.output_dir
    tables = [f"{name}\n\n{probes_table(name, {erased_by: one}).markdown()}" for name, one in results.items()]
    verdict, untried = verdict_of(results, concept), untried_of(lacking)
    lead = f"Each probe tries to bring {concept} back from a model that {erased_by} erased it from."
    Report(
        title=f"Is {concept} gone?",
        verdict=verdict,
        lead=" ".join(filter(None, [lead, untried])),
        sections=[
            probes_section(name, {erased_by: result}, pictures_of(name, {erased_by: folder / "probes"}))
            for name, result in results.items()
        ],
        commands=[
            command_line(
                "python examples/erasure_probe.py", config, usual_beside(config, complete, ["policy", "fast"]), OWNED
            )
        ],
        settings={**asdict(config), "probe settings": {name: result.config for name, result in results.items()}},
    ).save(folder / "report.html")
    text = "\n\n".join([*tables, *filter(None, [untried]), verdict])
    write_text(folder / "table.md", text + "\n")
    print(text)
    print(f"\nThe page with pictures: {folder / 'report.html'}")
    return text


def untried_of(lacking: Mapping[ProbeName, str]) -> str:
    """Says in a sentence which probes were left out, and why; nothing where none was."""
    reasons = [
        f"{', '.join(name for name in lacking if lacking[name] == why)} ({why})"
        for why in dict.fromkeys(lacking.values())
    ]
    return f"Left out: {'; '.join(reasons)}." if reasons else ""


def verdict_of(results: dict[str, ProbeResult], concept: str) -> str:
    """Says which probe brings back most, of those that take the model as it is."""
    known = [one for name, one in results.items() if name in HEADLINE and not math.isnan(one.worst.recovered.mean)]
    if not known:
        return ""
    worst = max(known, key=lambda one: one.worst.recovered.mean)
    found, recovered = worst.worst.found, worst.worst.recovered
    if not any(found.shown):
        return f"None of {len(known)} probes brings {concept} back in any of its {worst.count} pictures."
    return (
        f"Of {len(known)} probes the {worst.probe.replace('-', ' ')} ({found.variant}) brings back most of {concept}: "
        f"it shows in {sum(found.shown)} of {len(found.shown)} pictures, {recovered.mean:.0%} (95 % interval "
        f"{recovered.low:.0%} to {recovered.high:.0%}) of what the same probe gets from the original model."
    )


def deciding(config: Config, tested: dict[str, object]) -> dict[str, str]:
    """Returns what decides the numbers of a probe: the model under test and the settings of all of them."""
    names = (
        "policy",
        "original",
        "guidance_scale",
        "size",
        "seed",
        "attempts",
        "evaluation_steps",
        "concept",
        "anchor",
        "preserve",
        "measure",
        "prompts_file",
        "reward",
        "reward_weights",
    )
    return {"tested": str(tested), **{name: str(getattr(config, name)) for name in names}}


if __name__ == "__main__":
    main(settings_from_command_line(Config, complete))
