"""ANT against its equations, computed by someone else."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from erasure.ant import ANT, ANTConfig, Terms
from erasure.esd import erased_target
from erasure.saliency import salient
from policy import DiffusionPolicy

GOLDEN = Path(__file__).parents[1] / "golden"
RECORD = json.loads((GOLDEN / "ant.json").read_text(encoding="utf-8"))
HYPER = RECORD["hyper"]
PROBED = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v.weight"


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return load_file(GOLDEN / "ant.safetensors")


@pytest.fixture
def student() -> DiffusionPolicy:
    policy = DiffusionPolicy.from_pretrained(GOLDEN / "tiny-sd", device="cpu", train="full")
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.copy_(1.01 * parameter + 0.001)
    return policy


def check(actual: Tensor, name: str, tensors: dict[str, Tensor]) -> None:
    expected = tensors[name]
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() / expected.abs().max() <= RECORD["tensors"][name]["tol"], name


def terms(student: DiffusionPolicy, tensors: dict[str, Tensor], config: ANTConfig) -> Terms:
    latents = torch.stack([tensors["early/x_t"], tensors["late/x_t"]])
    timesteps = torch.tensor([[HYPER["t_early"]], [HYPER["t_late"]]])
    return ANT(config).terms(student, latents, timesteps, tensors["emb_concept"], tensors["emb_empty"])


def grad_norm(student: DiffusionPolicy, loss: Tensor) -> Tensor:
    loss.backward()
    return torch.stack([parameter.grad.norm() for parameter in student.unet.parameters()]).norm()


def test_official_settings_are_those_of_the_paper() -> None:
    config = ANTConfig()
    assert (config.keep_weight, config.keep_empty_weight) == (HYPER["lambda1"], HYPER["lambda2"])
    assert (config.reverse_empty_weight, config.negative_guidance) == (HYPER["lambda3"], HYPER["eta"])
    assert (config.descent.iterations, config.descent.learning_rate, config.descent.weight_decay) == (250, 5e-4, 0.0)
    # t' = 43 counted from 50, the first step, to 1, the last
    assert config.stages() == (range(7), range(7, 50))
    assert [50 - step for step in config.stages()[0]] == [50, 49, 48, 47, 46, 45, 44]


def test_embeddings_are_those_of_the_golden_model(student: DiffusionPolicy, tensors: dict[str, Tensor]) -> None:
    texts = {"emb_concept": HYPER["concept"], "emb_empty": ""}
    for name, text in texts.items():
        torch.testing.assert_close(student.encode([text]), tensors[name], rtol=0, atol=1e-5)  # of order 1


@pytest.mark.parametrize("stage", ["early", "late"])
def test_targets_are_those_of_the_equations(stage: str, student: DiffusionPolicy, tensors: dict[str, Tensor]) -> None:
    latents, timesteps = tensors[f"{stage}/x_t"], torch.tensor([HYPER[f"t_{stage}"]])
    with student.reference():
        conditional = student.predict_noise(latents, timesteps, tensors["emb_concept"])
        unconditional = student.predict_noise(latents, timesteps, tensors["emb_empty"])
    check(conditional, f"{stage}/eps_cond", tensors)
    check(unconditional, f"{stage}/eps_uncond", tensors)
    sign = 1 if stage == "late" else -1
    for eta in (1.0, 3.0):
        target = erased_target(conditional, unconditional, negative_guidance=sign * eta)
        check(target, f"{stage}/target_eta{eta:.0f}", tensors)


def test_loss_and_gradient_are_those_of_the_equations(student: DiffusionPolicy, tensors: dict[str, Tensor]) -> None:
    found = terms(student, tensors, ANTConfig())
    names = {"keep": "L_keep", "keep_empty": "U_keep", "reverse": "L_rev", "reverse_empty": "U_rev"}
    for field, name in names.items():
        check(getattr(found, field)[0], f"loss/{name}", tensors)
    others = ANTConfig(keep_weight=0.7, keep_empty_weight=0.3, reverse_empty_weight=0.6)
    check(ANT(others).total(found)[0], "loss/total_l1_0.7_l2_0.3_l3_0.6", tensors)
    total = ANT().total(found)[0]
    check(total, "loss/total", tensors)
    check(grad_norm(student, total), "loss/grad_norm_full", tensors)
    check(student.unet.get_parameter(PROBED).grad, f"loss/grad/{PROBED}", tensors)


def test_without_their_gradient_the_unconditional_terms_keep_their_value(
    student: DiffusionPolicy, tensors: dict[str, Tensor]
) -> None:
    config = ANTConfig(uncond_grad=False)
    total = ANT(config).total(terms(student, tensors, config))[0]
    check(total, "loss/total", tensors)
    check(grad_norm(student, total), "loss/grad_norm_full_uncond_constant", tensors)


def test_saliency_maps_and_what_they_have_in_common_are_those_of_the_equations(tensors: dict[str, Tensor]) -> None:
    for tensor in ("a", "b", "c"):
        sums = [tensors[f"saliency/grad{index}/{tensor}"] for index in range(3)]
        for index, total in enumerate(sums):
            check(salient(total, 0.5).float(), f"saliency/high{index}/{tensor}", tensors)
        for keep in ("high", "low"):
            maps = [salient(total, 0.5, keep=keep) for total in sums]
            check((maps[0] & maps[1] & maps[2]).float(), f"saliency/{keep}_intersection/{tensor}", tensors)


def test_every_expected_tensor_is_checked(tensors: dict[str, Tensor]) -> None:
    checked = {f"{stage}/{name}" for stage in ("early", "late") for name in ("eps_cond", "eps_uncond")}
    checked |= {f"{stage}/target_eta{eta}" for stage in ("early", "late") for eta in (1, 3)}
    checked |= {f"loss/{name}" for name in ("L_keep", "U_keep", "L_rev", "U_rev", "total", "grad_norm_full")}
    checked |= {"loss/total_l1_0.7_l2_0.3_l3_0.6", "loss/grad_norm_full_uncond_constant", f"loss/grad/{PROBED}"}
    checked |= {f"saliency/high{index}/{tensor}" for index in range(3) for tensor in "abc"}
    checked |= {f"saliency/{keep}_intersection/{tensor}" for keep in ("high", "low") for tensor in "abc"}
    assert checked == {name for name, about in RECORD["tensors"].items() if about["kind"] == "expected"}
