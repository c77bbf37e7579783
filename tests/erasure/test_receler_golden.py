"""Receler against numbers of the authors' own code."""

import re

import pytest
import torch
from torch import Tensor

from erasure.methods.attention_maps import CrossAttention, concept_map, layer_shape, recorded_attention, words_of
from erasure.methods.receler.erasers import recorded_erasers
from erasure.methods.receler.receler import Receler, RecelerConfig, nearest, with_tokens
from overpaint.policy import Conditioning, DiffusionPolicy
from tests.erasure.erasure_case import TINY_SD, ErasureCase

CASE = ErasureCase("receler")
HYPER = CASE.record["hyper"]
PROMPTS = [HYPER["concept"]]
LAYER = ".transformer_blocks.0.attn2"
TIMESTEPS = torch.tensor([HYPER["timestep"]])
LATENTS = CASE.tensors["x_t"]
SIZE = {"height": LATENTS.shape[2], "width": LATENTS.shape[3]}
AFTER_A_STEP = "adversarial/tokens_after_one_step"


@pytest.fixture
def original() -> DiffusionPolicy:
    return DiffusionPolicy.from_pretrained(TINY_SD, device="cpu")


@pytest.fixture
def attention(original: DiffusionPolicy) -> dict[str, CrossAttention]:
    with torch.no_grad(), recorded_attention(original.unet) as record:
        original.predict_noise(LATENTS, TIMESTEPS, original.encode(PROMPTS))
    return record


@pytest.fixture
def student(original: DiffusionPolicy) -> DiffusionPolicy:
    """The model with the file's erasers; its reference has fresh ones, which do nothing."""
    found = Receler(RecelerConfig(rank=HYPER["rank"])).student(original)
    weights = {}
    for key, value in CASE.tensors.under("eraser/").items():
        block, name = key.split("/")
        weights[f"{block}{LAYER}.added.{name}"] = value
    found.load_trainable_state(weights)
    return found


def config(case: str, inner_steps: int = 1) -> RecelerConfig:
    """The file's settings; those of Adam stand in what it says about the tokens that it moved."""
    ((rate, decay),) = re.findall(r"lr ([\d.]+), weight_decay ([\d.]+)", CASE.record["tensors"][AFTER_A_STEP]["what"])
    return RecelerConfig(
        rank=HYPER["rank"],
        negative_guidance=HYPER["eta"],
        regularization=HYPER["reg_weight"],
        mask_threshold=HYPER["mask_threshold"],
        mask_side=HYPER["map_resolution"],
        variant="paper" if case == "adversarial" else "released",
        tokens=len(HYPER["adv_positions"]),
        inner_steps=inner_steps,
        token_learning_rate=float(rate),
        token_weight_decay=float(decay),
    )


def prompted(policy: DiffusionPolicy, case: str) -> Conditioning:
    conditioning, words = policy.encode(PROMPTS), words_of(policy, PROMPTS)
    return with_tokens(conditioning, words, CASE.tensors["adv_tokens"]) if case == "adversarial" else conditioning


def test_settings_are_those_of_the_authors() -> None:
    ours, theirs = RecelerConfig(), config("adversarial")
    for name in ("negative_guidance", "regularization", "mask_threshold", "mask_side"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("token_learning_rate", "token_weight_decay"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_embeddings_and_places_are_those_of_the_authors_code(original: DiffusionPolicy) -> None:
    CASE.check_embedding(original, "emb_empty", "")
    CASE.check_embedding(original, "emb_concept", PROMPTS[0])
    assert words_of(original, PROMPTS)[0].nonzero().flatten().tolist() == HYPER["concept_token_positions"]
    changed = (prompted(original, "adversarial").tokens != original.encode(PROMPTS).tokens).any(dim=2)
    assert changed[0].nonzero().flatten().tolist() == HYPER["adv_positions"]


def test_predictions_of_the_original_model_are_those_of_the_authors_code(original: DiffusionPolicy) -> None:
    with torch.no_grad():
        CASE.check("eps_uncond", original.predict_noise(LATENTS, TIMESTEPS, original.encode([""])))
        CASE.check("eps_concept", original.predict_noise(LATENTS, TIMESTEPS, original.encode(PROMPTS)))


def test_maps_are_those_of_the_authors_code(original: DiffusionPolicy, attention: dict[str, CrossAttention]) -> None:
    words = words_of(original, PROMPTS)
    assert attention.keys() == set(CASE.tensors.under("attn_concept/"))
    for layer, found in attention.items():
        CASE.check(f"attn_concept/{layer}", found.probabilities()[..., words[0]])
    where = concept_map(attention, words, side=HYPER["map_resolution"], **SIZE)
    CASE.check("mask_map_normalised", where)
    distance = (where - HYPER["mask_threshold"]).abs().min().item()
    allowed = CASE.allowed("mask_map_normalised")
    assert distance == pytest.approx(HYPER["smallest_distance_of_map_to_threshold"], rel=0, abs=allowed)


def test_masks_are_those_of_the_authors_code_at_each_layer(
    original: DiffusionPolicy, attention: dict[str, CrossAttention]
) -> None:
    # No pixel of the map is as near to the threshold as the map may be off, so that no mask hangs on rounding.
    assert HYPER["smallest_distance_of_map_to_threshold"] > CASE.allowed("mask_map_normalised")
    where = concept_map(attention, words_of(original, PROMPTS), side=HYPER["map_resolution"], **SIZE)
    mask = where >= HYPER["mask_threshold"]
    assert {layer.removesuffix(LAYER) for layer in attention} == set(CASE.tensors.under("mask/"))
    for layer, found in attention.items():
        shape = layer_shape(found.queries.shape[2], **SIZE)
        CASE.check(f"mask/{layer.removesuffix(LAYER)}", nearest(mask, *shape))


@pytest.mark.parametrize("case", ["clean", "adversarial"])
def test_losses_and_gradients_are_those_of_the_authors_code(student: DiffusionPolicy, case: str) -> None:
    method, given = Receler(config(case)), (LATENTS, TIMESTEPS, CASE.tensors["adv_tokens"])
    terms = method.terms(student, PROMPTS, *given)
    CASE.check(f"{case}/loss_erase", terms.erased[0])
    CASE.check(f"{case}/loss_reg", terms.outside[0])
    loss = method.total(terms)
    CASE.check(f"{case}/loss_total", loss[0])
    loss.backward()
    grads = [parameter.grad for parameter in student.trainable_parameters() if parameter.grad is not None]
    CASE.check(f"{case}/grad_norm", torch.nn.utils.get_total_norm(grads))


@pytest.mark.parametrize("case", ["clean", "adversarial"])
def test_erasers_read_and_add_what_they_do_in_the_authors_code(student: DiffusionPolicy, case: str) -> None:
    read: dict[str, Tensor] = {}

    def keeping(name: str) -> object:
        def keep(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            read[name] = inputs[0]

        return keep

    for name, module in student.unet.named_modules():
        if name.endswith(".added"):
            module.register_forward_pre_hook(keeping(name.removesuffix(".added")))
    with torch.no_grad(), recorded_erasers(student.unet) as added:
        prediction = student.predict_noise(LATENTS, TIMESTEPS, prompted(student, case))
    CASE.check(f"{case}/eps_eraser", prediction)
    assert set(read) == set(added)
    for direction, found in (("eraser_in", read), ("eraser_out", added)):
        for name in CASE.tensors.under(f"{case}/{direction}/"):
            CASE.check(f"{case}/{direction}/{name}", found[name.removesuffix(".adapter")])


def test_soft_tokens_move_as_in_the_authors_code(student: DiffusionPolicy) -> None:
    conditioning, words = student.encode(PROMPTS), words_of(student, PROMPTS)
    wanted, tokens = CASE.tensors["eps_concept"], CASE.tensors["adv_tokens"].clone().requires_grad_()
    prediction = student.predict_noise(LATENTS, TIMESTEPS, with_tokens(conditioning, words, tokens))
    distance = (prediction - wanted).square().mean()
    CASE.check("adversarial/grad_tokens", torch.autograd.grad(distance, tokens)[0])

    method = Receler(config("adversarial", inner_steps=2))  # all but the last move them
    CASE.check(AFTER_A_STEP, method.attack(student, conditioning, words, LATENTS, TIMESTEPS, wanted, tokens))
