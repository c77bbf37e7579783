"""EraseFlow's trajectories, log-densities, losses and gradients are those of the authors' code."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from erasure.methods.eraseflow.balance import (
    ConstantUnconditional,
    denoising_log_probs,
    noising_log_probs,
    residuals,
)
from overpaint.policy import ClassifierFree, Conditioning, DiffusionPolicy, Trajectory
from overpaint.policy.ddim import ddim_mean_and_std, noising_mean_and_std
from overpaint.policy.weights import base_parameters
from tests.erasure.erasure_case import TINY_SD, ErasureCase, perturb

CASE = ErasureCase("eraseflow")
HYPER = CASE.record["hyper"]
STEPS = HYPER["steps"]
ALL = list(range(STEPS))
FORMS = {
    "all": (ALL, ClassifierFree),
    "subset": (HYPER["subset"], ClassifierFree),
    "uncond_detached": (ALL, ConstantUnconditional),
    "no_cfg": (ALL, lambda scale: ClassifierFree(1.0)),
    "sum": (ALL, ClassifierFree),
}
"""The steps that count, and the guidance of their likelihood."""

LORA_TARGETS = ("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")
SETS: dict[str, Callable[[str], bool]] = {
    "xattn": lambda name: "attn2" in name,
    "lora_targets": lambda name: ("attn1." in name or "attn2." in name) and name.endswith(LORA_TARGETS),
    "full": lambda name: True,
}
"""Which parameters each stored gradient norm is over."""


@pytest.fixture
def student(in_double: Callable[[DiffusionPolicy], DiffusionPolicy]) -> DiffusionPolicy:
    return in_double(DiffusionPolicy.from_pretrained(TINY_SD, train="full", device="cpu"))


def encoded(name: str) -> Conditioning:
    return CASE.encoded(name).expand(HYPER["trajectories"])


def stored() -> Trajectory:
    latents = CASE.tensors["latents"]
    return Trajectory(
        latents, torch.zeros(len(latents), STEPS), CASE.tensors["timesteps"].long(), encoded("emb_target")
    )


def chosen(steps: list[int]) -> Tensor:
    return torch.tensor([steps] * HYPER["trajectories"])


def test_schedule_and_embeddings_are_those_of_the_case() -> None:
    policy = DiffusionPolicy.from_pretrained(TINY_SD, device="cpu")
    assert HYPER["schedule"].startswith("DDIM over 1000 steps, scaled_linear 0.00085-0.012, leading spacing")
    plan = policy.plan(STEPS)
    assert plan.timesteps.tolist() == CASE.tensors["timesteps"].tolist()
    assert torch.equal(plan.next_levels, policy.process.levels(CASE.tensors["prev_timesteps"].long()))
    for name, text in (("target", "target_prompt"), ("anchor", "anchor_prompt"), ("empty", "negative_prompt")):
        CASE.check_embedding(policy, f"emb_{name}", HYPER[text])


def test_deviations_of_both_kernels_are_theirs(student: DiffusionPolicy) -> None:
    plan = student.plan(STEPS)
    levels = plan.levels, plan.next_levels
    blank = torch.zeros(STEPS, 4, 1, 1)
    _, std = ddim_mean_and_std(blank, blank, *levels, eta=HYPER["eta"], prediction_type="epsilon")
    CASE.check("sigma", std)
    _, std = noising_mean_and_std(blank, *levels)
    CASE.check("backward_std", std)


def test_trajectory_is_theirs(student: DiffusionPolicy) -> None:
    latents, noise = CASE.tensors["x_T"], CASE.tensors["noise"]
    states = [latents]
    for step in range(STEPS):
        latents = student.denoise(
            latents, encoded("emb_anchor"), step=step, steps=STEPS, guidance=ClassifierFree(HYPER["guidance"]),
            eta=HYPER["eta"], noise=noise[:, step],
        )  # fmt: skip
        states.append(latents)
    CASE.check("latents", torch.stack(states, dim=1))


@pytest.mark.parametrize("weights", ["on", "stale"])
def test_log_densities_are_theirs(weights: str, student: DiffusionPolicy) -> None:
    if weights == "stale":
        perturb(student, HYPER["student"])
    trajectory, guidance = stored(), ClassifierFree(HYPER["guidance"])
    CASE.check("log_pb", noising_log_probs(student.process, trajectory.latents, student.plan(STEPS)))
    for name in ("target", "anchor"):
        prompted = trajectory._replace(conditioning=encoded(f"emb_{name}"))
        found = denoising_log_probs(student, prompted, chosen(ALL), guidance=guidance)
        CASE.check(f"{weights}/log_pf_{name}", found)
    if weights == "on":
        found = denoising_log_probs(student, trajectory, chosen(ALL), guidance=ClassifierFree(1.0))
        CASE.check("on/no_cfg/log_pf_target", found)


@pytest.mark.parametrize(
    ("weights", "form"), [*(("on", form) for form in FORMS), ("stale", "all"), ("stale", "subset")]
)
def test_loss_and_gradients_are_theirs(weights: str, form: str, student: DiffusionPolicy) -> None:
    if weights == "stale":
        perturb(student, HYPER["student"])
    trajectory = stored()
    steps, guidance = FORMS[form]
    log_z = torch.tensor(HYPER["log_z"], dtype=torch.float64, requires_grad=True)
    forward = denoising_log_probs(student, trajectory, chosen(steps), guidance=guidance(HYPER["guidance"]))
    plan = student.plan(STEPS)
    backward = noising_log_probs(student.process, trajectory.latents, plan)[:, steps]
    # In place of means over elements, the sum over them is the contrast of one form.
    scale = trajectory.latents[0, 0].numel() if form == "sum" else 1.0
    level = (HYPER["log_beta"] - log_z).expand(HYPER["trajectories"])
    found = residuals(forward, backward, torch.full_like(forward, scale), level)
    prefix = f"{weights}/{form}"
    CASE.check(f"{prefix}/residual", found)
    loss = found.square().mean()
    CASE.check(f"{prefix}/loss", loss)

    loss.backward()
    assert log_z.grad is not None
    CASE.check(f"{prefix}/grad_log_z", log_z.grad)
    gradients = {name: value.grad for name, value in base_parameters(student.unet).items() if value.grad is not None}
    for name, counts in SETS.items():
        squares = [gradient.double().square().sum() for key, gradient in gradients.items() if counts(key)]
        CASE.check(f"{prefix}/grad_norm_{name}", torch.stack(squares).sum().sqrt())
    for name in CASE.tensors.under(f"{prefix}/grad/"):
        CASE.check(f"{prefix}/grad/{name}", gradients[name])
