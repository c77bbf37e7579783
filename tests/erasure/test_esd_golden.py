"""ESD's targets, predictions, losses, gradients and parameter sets are those of the authors' code."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from erasure.methods.esd import erased_loss, learned_target
from overpaint.policy import ClassifierFree, Conditioning, DiffusionPolicy, select_parameters
from overpaint.policy.weights import base_parameters
from tests.erasure.erasure_case import TINY_SD, ErasureCase, perturb

CASE = ErasureCase("esd")
HYPER = CASE.record["hyper"]
SETS = {
    "old": {"xattn": "xattn", "noxattn": "noxattn", "selfattn": "selfattn", "full": "full"},
    "new": {"esd-x": "xattn", "esd-x-strict": "xattn-kv", "esd-u": "noxattn-layers", "esd-all": "layers"},
}
"""Our name of each of theirs."""

FORMS = sorted(name for name in CASE.tensors.under("c0/target_"))
TIMES = range(len(HYPER["timesteps"]))


@pytest.fixture
def student() -> DiffusionPolicy:
    return DiffusionPolicy.from_pretrained(TINY_SD, train="full", device="cpu")


def noised(case: int) -> tuple[Tensor, Tensor]:
    return CASE.tensors[f"c{case}/x_t"], torch.tensor([HYPER["timesteps"][case]])


def guidance_of(form: str) -> float:
    """Our η: the newer code writes 1 + η, as it leads away from what was asked for and not from the empty prompt."""
    version = form.split("_")[0]
    return HYPER[f"eta_{version}"] - {"old": 0, "new": 1}[version]


def asked_in(form: str) -> Conditioning:
    """The prompt that the student is given."""
    return CASE.encoded("emb_from" if form.endswith("_from") else "emb_concept")


def test_embeddings_are_those_of_the_golden_model(student: DiffusionPolicy) -> None:
    CASE.check_embedding(student, "emb_concept", HYPER["concept"])
    CASE.check_embedding(student, "emb_empty", "")
    CASE.check_embedding(student, "emb_from", HYPER["erase_from"])


def test_parameter_sets_are_theirs(student: DiffusionPolicy) -> None:
    assert CASE.record["parameter_sets"].keys() == SETS.keys()
    for version, sets in CASE.record["parameter_sets"].items():
        assert sets.keys() == SETS[version].keys()
        for theirs, names in sets.items():
            assert set(select_parameters(student.unet, SETS[version][theirs])) == set(names), theirs


@pytest.mark.parametrize("case", TIMES)
@pytest.mark.parametrize("weights", HYPER["student"])
@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients_are_theirs(
    case: int,
    weights: str,
    form: str,
    student: DiffusionPolicy,
    in_double: Callable[[DiffusionPolicy], DiffusionPolicy],
) -> None:
    in_double(student)
    changed = HYPER["student"][weights]
    if weights == "same":
        assert changed.startswith("student weights equal")
    else:
        perturb(student, changed)
    prefix, (latents, timesteps), asked = f"c{case}/{weights}/{form}", noised(case), asked_in(form)
    concept, empty = CASE.encoded("emb_concept"), CASE.encoded("emb_empty")
    source = asked if form.endswith("_from") else None
    eta = guidance_of(form)
    target = learned_target(student, latents, timesteps, concept, empty, source=source, negative_guidance=eta)
    loss = erased_loss(student, latents, timesteps, asked, target).mean()
    CASE.check(f"{prefix}/loss", loss)

    loss.backward()
    for theirs, ours in SETS[form.split("_")[0]].items():
        gradients = [p.grad for p in select_parameters(student.unet, ours).values() if p.grad is not None]
        norm = torch.stack([gradient.double().square().sum() for gradient in gradients]).sum().sqrt()
        CASE.check(f"{prefix}/grad_norm/{theirs}", norm)
    for name in CASE.tensors.under(f"{prefix}/grad/"):
        gradient = base_parameters(student.unet)[name].grad
        assert gradient is not None
        CASE.check(f"{prefix}/grad/{name}", gradient)


@pytest.mark.parametrize("case", TIMES)
def test_predictions_of_a_changed_model_are_theirs(case: int, student: DiffusionPolicy) -> None:
    perturb(student, HYPER["student"]["perturbed"])
    latents, timesteps = noised(case)
    stored = CASE.tensors.under(f"c{case}/perturbed/")
    forms = [form for form in FORMS if f"{form}/eps_student" in stored]
    for form in forms:
        CASE.check(f"c{case}/perturbed/{form}/eps_student", student.predict_noise(latents, timesteps, asked_in(form)))


@pytest.mark.parametrize("case", TIMES)
def test_predictions_and_targets_of_the_original_model_are_theirs(case: int, student: DiffusionPolicy) -> None:
    perturb(student, HYPER["student"]["perturbed"])  # the original model is the reference, whatever is trained
    latents, timesteps = noised(case)
    guidance = ClassifierFree(HYPER["guidance_in_both_predictions"])
    with student.reference():
        for name, text in (("eps_cond", "emb_concept"), ("eps_uncond", "emb_empty"), ("eps_from", "emb_from")):
            prediction = student.predict_noise(latents, timesteps, CASE.encoded(text), guidance)
            CASE.check(f"c{case}/{name}", prediction)
    concept, empty = CASE.encoded("emb_concept"), CASE.encoded("emb_empty")
    for form in FORMS:
        source = asked_in(form) if form.endswith("_from") else None
        eta = guidance_of(form)
        target = learned_target(student, latents, timesteps, concept, empty, source=source, negative_guidance=eta)
        CASE.check(f"c{case}/target_{form}", target)
