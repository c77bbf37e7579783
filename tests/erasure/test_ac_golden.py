"""Concept ablation against numbers of the authors' own training loop."""

from typing import Any

import pytest
import torch

from erasure.methods.ac import AC, ACConfig, Examples
from overpaint.policy import DiffusionPolicy
from overpaint.policy.weights import base_parameters, select_parameters
from tests.erasure.erasure_case import TINY_SD, ErasureCase

CASE = ErasureCase("ac")
HYPER = CASE.record["hyper"]
SETS = {"cross-attn": ("xattn-kv", "cross_attn"), "attn": ("attn", "attn")}
"""Our name of each of theirs: that of a norm, and that of the parameters."""


@pytest.fixture
def student() -> DiffusionPolicy:
    return DiffusionPolicy.from_pretrained(TINY_SD, device="cpu", train="attn")


def stored(policy: DiffusionPolicy) -> Examples:
    timesteps, noise = CASE.tensors["timesteps"].long(), CASE.tensors["noise"]
    return Examples(
        latents=policy.add_noise(CASE.tensors["latents"], noise, timesteps),
        noise=noise,
        timesteps=timesteps,
        directions=noise,
        captions=HYPER["target_captions"] + HYPER["prior_captions"],
        anchors=HYPER["anchor_captions"],
        mask=CASE.tensors["mask"][: len(HYPER["anchor_captions"])],
    )


def test_the_schedule_is_the_one_that_the_policy_noises_by(student: DiffusionPolicy) -> None:
    schedule: Any = student.scheduler.config
    betas = f"{schedule.beta_start}..{schedule.beta_end} {schedule.beta_schedule}"
    words = f"DDPM, {student.num_timesteps} steps, beta {betas}, {schedule.prediction_type} prediction"
    assert words == HYPER["scheduler"]


def test_noised_latents_and_predictions_are_those_of_the_authors_code(student: DiffusionPolicy) -> None:
    examples = stored(student)
    CASE.check("noisy_latents", examples.latents)
    images = len(examples.anchors)
    for name, texts, first in (
        ("pred_target", HYPER["target_captions"], 0),
        ("pred_anchor", HYPER["anchor_captions"], 0),
        ("pred_prior", HYPER["prior_captions"], images),
    ):
        rows = slice(first, first + images)
        prediction = student.predict_noise(examples.latents[rows], examples.timesteps[rows], student.encode(texts))
        CASE.check(name, prediction)
    assert (CASE.tensors["mask"][images:] == 1).all()  # the prior is over whole pictures, as it is here


@pytest.mark.parametrize("case", sorted(HYPER["prior_weight"]))
def test_loss_and_gradients_are_those_of_the_authors_code(case: str, student: DiffusionPolicy) -> None:
    weight = HYPER["prior_weight"][case]
    method = AC(ACConfig(prior_weight=weight, detach_start=case != "no_sos_detach"))
    erased, prior = method.losses(student, stored(student))
    loss = (erased + weight * prior).mean()
    loss.backward()
    CASE.check(f"{case}/loss", loss)
    CASE.check(f"{case}/prior_loss", prior.mean())

    gradients: dict[str, Any] = {name: value.grad for name, value in base_parameters(student.unet).items()}
    for name, (ours, theirs) in SETS.items():
        names = select_parameters(student.unet, ours)
        assert set(names) == set(CASE.record["parameter_sets"][theirs])
        norms = [gradients[key].double().square().sum() for key in names]
        CASE.check(f"{case}/grad_norm/{name}", torch.stack(norms).sum().sqrt())
    for name in CASE.tensors.under(f"{case}/grad/"):
        CASE.check(f"{case}/grad/{name}", gradients[name])
