"""Maps of where cross-attentions look for words."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from erasure.methods.attention_maps import (
    CrossAttention,
    concept_map,
    cross_attentions,
    layer_shape,
    recorded_attention,
    words_of,
)
from overpaint.policy import DiffusionPolicy, LoRAConfig

PROMPTS = ["striped", "a red circle with stripes"]
TIMESTEPS = torch.tensor([500, 20])


def latents(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def tune(policy: DiffusionPolicy) -> DiffusionPolicy:
    for index, parameter in enumerate(policy.trainable_parameters()):
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    return policy


@pytest.fixture
def tuned(policy: DiffusionPolicy) -> DiffusionPolicy:
    return tune(policy)


def test_recording_changes_no_bit_and_leaves_nothing_behind(tuned: DiffusionPolicy) -> None:
    embeddings = tuned.encode(PROMPTS)
    before = tuned.predict_noise(latents(), TIMESTEPS, embeddings)
    with recorded_attention(tuned.unet) as record:
        assert torch.equal(tuned.predict_noise(latents(), TIMESTEPS, embeddings), before)
    assert set(record) == set(cross_attentions(tuned.unet))
    record.clear()
    tuned.predict_noise(latents(), TIMESTEPS, embeddings)
    assert not record


def test_probabilities_are_those_that_lead_to_the_layers_output(tuned: DiffusionPolicy) -> None:
    name, module = next(iter(cross_attentions(tuned.unet).items()))
    layer: Any = module
    outputs: list[torch.Tensor] = []
    hook = layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    embeddings = tuned.encode(PROMPTS)
    with recorded_attention(tuned.unet) as record:
        tuned.predict_noise(latents(), TIMESTEPS, embeddings)
    hook.remove()
    probabilities = record[name].probabilities()
    values = layer.to_v(embeddings.tokens).unflatten(2, (layer.heads, -1)).transpose(1, 2)
    expected = layer.to_out[0]((probabilities @ values).transpose(1, 2).flatten(2))
    torch.testing.assert_close(outputs[0], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(2, layer.heads, 64), rtol=0, atol=1e-5)


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_gradients_reach_a_lora_through_the_probabilities(
    make_policy: Callable[..., DiffusionPolicy], gradient_checkpointing: bool
) -> None:
    policy = tune(make_policy(lora=LoRAConfig(), gradient_checkpointing=gradient_checkpointing))
    with recorded_attention(policy.unet) as record:
        policy.predict_noise(latents(), TIMESTEPS, policy.encode(PROMPTS))
    loss = torch.stack([attention.probabilities()[..., 1].sum() for attention in record.values()]).sum()
    loss.backward()
    grads = {name: p.grad for name, p in policy.unet.named_parameters() if ".attn2.to_k.lora_B" in name}
    assert len(grads) == len(record)
    assert all(grad is not None and grad.abs().max() > 1e-6 for grad in grads.values())


def test_one_probability_has_the_slope_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(1, 2, 3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    keys = torch.randn(1, 2, 5, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k: CrossAttention(q, k, 0.5).probabilities(), (queries, keys))


def test_a_sample_has_the_same_map_in_any_batch(tuned: DiffusionPolicy) -> None:
    def found(rows: list[int]) -> torch.Tensor:
        prompts = [PROMPTS[row] for row in rows]
        with recorded_attention(tuned.unet) as record:
            tuned.predict_noise(latents()[rows], TIMESTEPS[rows], tuned.encode(prompts))
        return concept_map(record, words_of(tuned, prompts), height=8, width=8)

    both = found([0, 1])
    torch.testing.assert_close(both, torch.cat([found([0]), found([1])]), rtol=0, atol=1e-5)
    torch.testing.assert_close(both.flip(0), found([1, 0]), rtol=0, atol=1e-5)
    assert torch.equal(both.flatten(1).amin(dim=1), torch.zeros(2))
    assert torch.equal(both.flatten(1).amax(dim=1), torch.ones(2))


def attention(pixels: int, start: float) -> CrossAttention:
    """Looks for the second of two tokens, more so from pixel to pixel."""
    queries = torch.linspace(start, 1.0, pixels).view(1, 1, pixels, 1)
    return CrossAttention(queries, torch.tensor([0.0, 1.0]).view(1, 1, 2, 1), 1.0)


@pytest.mark.parametrize(("side", "shape"), [(1, (2, 3)), (2, (2, 3)), (3, (4, 6)), (4, (4, 6)), (16, (4, 6))])
def test_maps_are_of_the_smallest_size_that_is_asked_for_or_the_largest(side: int, shape: tuple[int, int]) -> None:
    record = {"large": attention(24, 0.0), "small": attention(6, 0.5)}
    found = concept_map(record, torch.tensor([[False, True]]), height=4, width=6, side=side)
    assert found.shape[1:] == shape
    assert bool((found.flatten().diff() > 0).all())


def test_a_flat_map_is_zero() -> None:
    found = concept_map({"flat": attention(4, 1.0)}, torch.tensor([[False, True]]), height=2, width=2)
    assert torch.equal(found, torch.zeros(1, 2, 2))


def test_words_are_between_the_start_and_the_end(policy: DiffusionPolicy) -> None:
    words = words_of(policy, ["red", "", "red " * 40])
    assert words.shape == (3, 24)
    assert words[0].tolist() == [False, True] + 22 * [False]
    assert not words[1].any()
    assert words[2].tolist() == [False] + 22 * [True] + [False]


def test_sides_are_halved_rounding_up() -> None:
    assert [layer_shape(count, 9, 6) for count in (54, 15, 6)] == [(9, 6), (5, 3), (3, 2)]
    with pytest.raises(ValueError, match="must have the latents' 9 x 6 pixels halved some times, got 7"):
        layer_shape(7, 9, 6)


def test_an_empty_record_and_a_prompt_without_words_are_refused() -> None:
    with pytest.raises(ValueError, match="the record must hold a call of the UNet, got none"):
        concept_map({}, torch.tensor([[True]]), height=2, width=2)
    with pytest.raises(ValueError, match="every prompt must have words to look for, and one has none"):
        concept_map({"one": attention(4, 0.0)}, torch.tensor([[False, False]]), height=2, width=2)
