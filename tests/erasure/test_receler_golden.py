"""Receler against numbers of the authors' own code."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from erasure.attention_maps import concept_map, recorded_attention, words_of
from erasure.erasers import recorded_erasers
from erasure.receler import Receler, RecelerConfig, outside, with_tokens
from policy import DiffusionPolicy

GOLDEN = Path(__file__).parents[1] / "golden"
RECORD = json.loads((GOLDEN / "receler.json").read_text(encoding="utf-8"))
HYPER = RECORD["hyper"]
PROMPTS = [HYPER["concept"]]
LAYER = ".transformer_blocks.0.attn2"
TIMESTEPS = torch.tensor([HYPER["timestep"]])
SIZE = {"height": 16, "width": 16}

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return load_file(GOLDEN / "receler.safetensors")


@pytest.fixture
def original() -> DiffusionPolicy:
    return DiffusionPolicy.from_pretrained(GOLDEN / "tiny-sd", device="cpu")


@pytest.fixture
def student(original: DiffusionPolicy, tensors: Tensors) -> DiffusionPolicy:
    """The model with the file's erasers; its reference has fresh ones, which do nothing."""
    found = Receler(RecelerConfig(rank=HYPER["rank"])).student(original)
    weights = {}
    for key, value in tensors.items():
        if key.startswith("eraser/"):
            _, block, name = key.split("/")
            weights[f"{block}{LAYER}.added.{name}"] = value
    found.load_trainable_state(weights)
    return found


def check(found: torch.Tensor, tensors: Tensors, key: str) -> None:
    """Compares by the rule of the file."""
    expected = tensors[key]
    assert found.shape == expected.shape, key
    difference, scale = (found - expected).abs().max(), expected.abs().max()
    assert difference <= RECORD["tensors"][key]["tol"] * scale, key


def config(case: str, inner_steps: int = 1) -> RecelerConfig:
    variant = "paper" if case == "adversarial" else "released"
    return RecelerConfig(variant=variant, tokens=len(HYPER["adv_positions"]), inner_steps=inner_steps)


def prompted(policy: DiffusionPolicy, tensors: Tensors, case: str) -> torch.Tensor:
    embeddings, words = policy.encode(PROMPTS), words_of(policy, PROMPTS)
    return with_tokens(embeddings, words, tensors["adv_tokens"]) if case == "adversarial" else embeddings


def test_embeddings_and_places_are_those_of_the_authors_code(original: DiffusionPolicy, tensors: Tensors) -> None:
    for prompt, key in (("", "emb_empty"), (PROMPTS[0], "emb_concept")):
        torch.testing.assert_close(original.encode([prompt]), tensors[key], rtol=0, atol=1e-5)  # of order 1
    assert words_of(original, PROMPTS)[0].nonzero().flatten().tolist() == HYPER["concept_token_positions"]
    changed = (prompted(original, tensors, "adversarial") != original.encode(PROMPTS)).any(dim=2)
    assert changed[0].nonzero().flatten().tolist() == HYPER["adv_positions"]


def test_predictions_maps_and_masks_are_those_of_the_authors_code(original: DiffusionPolicy, tensors: Tensors) -> None:
    words = words_of(original, PROMPTS)
    with torch.no_grad(), recorded_attention(original.unet) as attention:
        check(original.predict_noise(tensors["x_t"], TIMESTEPS, original.encode([""])), tensors, "eps_uncond")
        check(original.predict_noise(tensors["x_t"], TIMESTEPS, original.encode(PROMPTS)), tensors, "eps_concept")
    assert len(attention) == 7
    for layer, found in attention.items():
        check(found.probabilities()[..., words[0]], tensors, f"attn_concept/{layer}")

    where = concept_map(attention, words, side=HYPER["map_resolution"], **SIZE)
    check(where, tensors, "mask_map_normalised")


def test_masks_are_resized_to_each_layer_as_in_the_authors_code(original: DiffusionPolicy, tensors: Tensors) -> None:
    words = words_of(original, PROMPTS)
    with torch.no_grad(), recorded_attention(original.unet) as attention:
        original.predict_noise(tensors["x_t"], TIMESTEPS, original.encode(PROMPTS))
    mask = concept_map(attention, words, **SIZE) >= HYPER["mask_threshold"]
    for layer, found in attention.items():
        expected = tensors[f"mask/{layer.removesuffix(LAYER)}"]
        pixels = found.queries.shape[2]
        for pixel in range(pixels):
            # An eraser that adds 1 at one pixel alone costs 1 / (pixels outside) there if that pixel is outside.
            added = torch.zeros(1, pixels, 2)
            added[0, pixel] = 1.0
            free = 1 - expected.flatten()[pixel]
            cost = outside({layer: added}, mask, **SIZE)
            torch.testing.assert_close(cost, (free / (1 - expected).sum()).reshape(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("case", ["clean", "adversarial"])
def test_losses_and_gradients_are_those_of_the_authors_code(
    student: DiffusionPolicy, tensors: Tensors, case: str
) -> None:
    loss = Receler(config(case)).loss_at(student, PROMPTS, tensors["x_t"], TIMESTEPS, tensors["adv_tokens"])
    check(loss[0], tensors, f"{case}/loss_total")
    loss.backward()
    grads = [parameter.grad for parameter in student.trainable_parameters() if parameter.grad is not None]
    check(torch.nn.utils.get_total_norm(grads), tensors, f"{case}/grad_norm")


@pytest.mark.parametrize("case", ["clean", "adversarial"])
def test_both_terms_of_the_loss_are_those_of_the_authors_code(
    student: DiffusionPolicy, tensors: Tensors, case: str
) -> None:
    def loss(weight: float) -> torch.Tensor:
        method = Receler(RecelerConfig(variant=config(case).variant, inner_steps=1, regularization=weight))
        return method.loss_at(student, PROMPTS, tensors["x_t"], TIMESTEPS, tensors["adv_tokens"])[0].detach()

    check(loss(0.0), tensors, f"{case}/loss_erase")
    check((loss(1e4) - loss(0.0)) / 1e4, tensors, f"{case}/loss_reg")  # of order 1e4 times the other


@pytest.mark.parametrize("case", ["clean", "adversarial"])
def test_erasers_read_and_add_what_they_do_in_the_authors_code(
    student: DiffusionPolicy, tensors: Tensors, case: str
) -> None:
    read: Tensors = {}

    def keeping(name: str) -> object:
        def keep(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            read[name] = inputs[0]

        return keep

    for name, module in student.unet.named_modules():
        if name.endswith(".added"):
            module.register_forward_pre_hook(keeping(name.removesuffix(".added")))
    with torch.no_grad(), recorded_erasers(student.unet) as added:
        prediction = student.predict_noise(tensors["x_t"], TIMESTEPS, prompted(student, tensors, case))
    check(prediction, tensors, f"{case}/eps_eraser")
    assert set(read) == set(added)
    for key in (key for key in tensors if key.startswith((f"{case}/eraser_in/", f"{case}/eraser_out/"))):
        _, direction, name = key.split("/")
        check((read if direction == "eraser_in" else added)[name.removesuffix(".adapter")], tensors, key)


def test_soft_tokens_move_as_in_the_authors_code(student: DiffusionPolicy, tensors: Tensors) -> None:
    embeddings, words = student.encode(PROMPTS), words_of(student, PROMPTS)
    tokens = tensors["adv_tokens"].clone().requires_grad_()
    prediction = student.predict_noise(tensors["x_t"], TIMESTEPS, with_tokens(embeddings, words, tokens))
    distance = (prediction - tensors["eps_concept"]).square().mean()
    check(torch.autograd.grad(distance, tokens)[0], tensors, "adversarial/grad_tokens")

    moved = Receler(config("adversarial", inner_steps=2)).attack(
        student, embeddings, words, tensors["x_t"], TIMESTEPS, tensors["eps_concept"], tokens
    )
    check(moved, tensors, "adversarial/tokens_after_one_step")
