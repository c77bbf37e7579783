"""ANT against its equations, computed by someone else."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from erasure.methods.ant.ant import ANT, ANTConfig, Terms
from erasure.methods.ant.saliency import salient
from erasure.rollout import erased_target
from overpaint.policy import DiffusionPolicy
from tests.erasure.erasure_case import TINY_SD, ErasureCase, perturb

CASE = ErasureCase("ant")
HYPER = CASE.record["hyper"]
MAPS = CASE.tensors.under("saliency/")


@pytest.fixture
def student() -> DiffusionPolicy:
    policy = DiffusionPolicy.from_pretrained(TINY_SD, device="cpu", train="full")
    perturb(policy, HYPER["student"])
    return policy


@pytest.fixture
def exact(in_double: Callable[[DiffusionPolicy], DiffusionPolicy]) -> DiffusionPolicy:
    """The same in float64: between student and original there are small differences, whose squares are compared."""
    policy = in_double(DiffusionPolicy.from_pretrained(TINY_SD, device="cpu", train="full"))
    perturb(policy, HYPER["student"])
    return policy


def terms(student: DiffusionPolicy, config: ANTConfig) -> Terms:
    tensors = CASE.tensors
    latents = torch.stack([tensors["early/x_t"], tensors["late/x_t"]])
    timesteps = torch.tensor([[HYPER["t_early"]], [HYPER["t_late"]]])
    return ANT(config).terms(student, latents, timesteps, CASE.encoded("emb_concept"), CASE.encoded("emb_empty"))


def grad_norm(student: DiffusionPolicy, loss: Tensor) -> Tensor:
    loss.backward()
    return torch.stack([parameter.grad.double().norm() for parameter in student.unet.parameters()]).norm()


def test_official_settings_are_those_of_the_paper() -> None:
    config = ANTConfig()
    assert (config.keep_weight, config.keep_empty_weight) == (HYPER["lambda1"], HYPER["lambda2"])
    assert (config.reverse_empty_weight, config.negative_guidance) == (HYPER["lambda3"], HYPER["eta"])
    # What follows is in no stored case: table 6 of the paper.
    assert (config.descent.iterations, config.descent.learning_rate, config.descent.weight_decay) == (250, 5e-4, 0.0)
    # t' = 43 counted from 50, the first step, to 1, the last
    assert config.stages() == (range(7), range(7, 50))
    assert [50 - step for step in config.stages()[0]] == [50, 49, 48, 47, 46, 45, 44]


def test_steps_above_the_border_are_kept_and_the_others_reversed(student: DiffusionPolicy) -> None:
    border = HYPER["t_prime"]
    config = ANTConfig(kept_share=1 - border / student.num_timesteps)
    kept, turned = (student.plan(config.steps).timesteps[list(stage)].tolist() for stage in config.stages())
    assert min(kept) > border >= max(turned)
    assert HYPER["t_early"] in kept
    assert HYPER["t_late"] in turned


def test_embeddings_are_those_of_the_golden_model(student: DiffusionPolicy) -> None:
    CASE.check_embedding(student, "emb_concept", HYPER["concept"])
    CASE.check_embedding(student, "emb_empty", "")


@pytest.mark.parametrize("stage", ["early", "late"])
def test_targets_are_those_of_the_equations(stage: str, student: DiffusionPolicy) -> None:
    tensors = CASE.tensors.under(f"{stage}/")
    timesteps = torch.tensor([HYPER[f"t_{stage}"]])
    with student.reference():
        conditional = student.predict_noise(tensors["x_t"], timesteps, CASE.encoded("emb_concept"))
        unconditional = student.predict_noise(tensors["x_t"], timesteps, CASE.encoded("emb_empty"))
    CASE.check(f"{stage}/eps_cond", conditional)
    CASE.check(f"{stage}/eps_uncond", unconditional)
    sign = 1 if stage == "late" else -1
    for name in tensors.under("target_eta"):
        target = erased_target(conditional, unconditional, negative_guidance=sign * float(name))
        CASE.check(f"{stage}/target_eta{name}", target)


def test_loss_and_gradient_are_those_of_the_equations(exact: DiffusionPolicy) -> None:
    found = terms(exact, ANTConfig())
    names = {"keep": "L_keep", "keep_empty": "U_keep", "reverse": "L_rev", "reverse_empty": "U_rev"}
    for field, name in names.items():
        CASE.check(f"loss/{name}", getattr(found, field)[0])
    for name in CASE.tensors.under("loss/total_"):
        ((keep, keep_empty, reverse_empty),) = re.findall("l1_(.+)_l2_(.+)_l3_(.+)", name)
        others = ANTConfig(
            keep_weight=float(keep), keep_empty_weight=float(keep_empty), reverse_empty_weight=float(reverse_empty)
        )
        CASE.check(f"loss/total_{name}", ANT(others).total(found)[0])
    total = ANT().total(found)[0]
    CASE.check("loss/total", total)
    CASE.check("loss/grad_norm_full", grad_norm(exact, total))
    for name in CASE.tensors.under("loss/grad/"):
        gradient = exact.unet.get_parameter(name).grad
        assert gradient is not None
        CASE.check(f"loss/grad/{name}", gradient)


def test_without_their_gradient_the_unconditional_terms_keep_their_value(exact: DiffusionPolicy) -> None:
    config = ANTConfig(uncond_grad=False)
    total = ANT(config).total(terms(exact, config))[0]
    CASE.check("loss/total", total)
    CASE.check("loss/grad_norm_full_uncond_constant", grad_norm(exact, total))


@pytest.mark.parametrize("tensor", sorted({name.split("/")[1] for name in MAPS}))
def test_saliency_maps_and_what_they_have_in_common_are_those_of_the_equations(tensor: str) -> None:
    half = 0.5  # "floor(n/2) entries"
    indices = sorted({name.split("/")[0].removeprefix("grad") for name in MAPS if name.startswith("grad")})
    sums = [MAPS[f"grad{index}/{tensor}"] for index in indices]
    for index, total in zip(indices, sums, strict=True):
        CASE.check(f"saliency/high{index}/{tensor}", salient(total, half))
    for keep in ("high", "low"):
        common = torch.stack([salient(total, half, keep=keep) for total in sums]).all(dim=0)
        CASE.check(f"saliency/{keep}_intersection/{tensor}", common)
