"""Prompts with free vectors among their tokens, and prompts that encode to something else for a while."""

import pytest
import torch

from erasure import SAFREE
from overpaint import tinyworld
from overpaint.policy import ClassifierFree, DiffusionPolicy
from overpaint.policy.soft_prompts import encode_soft, initial_vectors, soft_texts, token_vectors


@pytest.fixture(scope="module")
def policy() -> DiffusionPolicy:
    return tinyworld.load_policy()


def vectors_of(policy: DiffusionPolicy, words: str) -> torch.Tensor:
    return token_vectors(policy.prompts)[policy.prompts.ids(words)[1:-1]]


def test_vectors_of_words_encode_as_the_words_do(policy: DiffusionPolicy) -> None:
    vectors = vectors_of(policy, "large striped").expand(2, -1, -1)
    soft = encode_soft(policy.prompts, ["a {} red star", "a {} blue circle in prison"], vectors)
    words = policy.encode(["a large striped red star", "a large striped blue circle in prison"])
    assert torch.allclose(soft.tokens, words.tokens, atol=1e-5)


def test_vectors_stand_before_a_text_without_a_place(policy: DiffusionPolicy) -> None:
    soft = encode_soft(policy.prompts, ["red star"], vectors_of(policy, "a striped")[None])
    assert torch.allclose(soft.tokens, policy.encode(["a striped red star"]).tokens, atol=1e-5)


def test_gradients_reach_each_texts_own_vectors(policy: DiffusionPolicy) -> None:
    vectors = vectors_of(policy, "large striped").repeat(2, 1, 1).requires_grad_()
    encode_soft(policy.prompts, ["a {} star", "a {} cross"], vectors).tokens[0].square().sum().backward()
    assert vectors.grad is not None
    assert vectors.grad[0].abs().min() > 0
    assert vectors.grad[1].abs().max() == 0


def test_the_encoder_is_as_before(policy: DiffusionPolicy) -> None:
    before = policy.encode(["a red star"]).tokens
    encode_soft(policy.prompts, ["a {} star"], torch.ones(1, 1, before.shape[2]))
    policy.prompts.clear()
    assert torch.equal(policy.encode(["a red star"]).tokens, before)


@pytest.mark.parametrize(
    ("texts", "shape", "message"),
    [
        (["a {} {}"], (1, 1, 96), "at most one"),
        (["a {}"], (2, 1, 96), "vectors must be"),
        (["a {}"], (1, 1, 7), "vectors must be"),
        (["a {}"], (1, 99, 96), "within 24 tokens"),
        ([], (0, 1, 64), "must not be empty"),
    ],
)
def test_what_does_not_fit_is_refused(
    policy: DiffusionPolicy, texts: list[str], shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        encode_soft(policy.prompts, texts, torch.zeros(shape))


def test_whoever_reads_a_text_meets_its_vectors(policy: DiffusionPolicy) -> None:
    encoder, words = policy.prompts, "large striped"
    with soft_texts(encoder, ["a {} red star"], vectors_of(policy, words)[None]) as texts:
        soft = encoder.run(torch.tensor([encoder.read(texts[0])]))
        assert len(encoder.ids(texts[0])) == len(encoder.ids(f"a {words} red star"))
    plain = encoder.run(torch.tensor([encoder.read(f"a {words} red star")]))
    torch.testing.assert_close(soft.pooler_output, plain.pooler_output, rtol=1e-4, atol=1e-4)


def test_a_guard_that_reads_words_meets_vectors_and_lets_gradients_through() -> None:
    policy = tinyworld.load_policy()
    SAFREE(tinyworld.PRESETS["safree"]).erase(policy, tinyworld.STRIPES).apply(policy)
    latents, timesteps, once = torch.randn(1, 4, 8, 8), torch.tensor([600]), ClassifierFree(1.0)
    words = policy.predict_noise(latents, timesteps, policy.encode(["a striped red star"]), once)
    vectors = vectors_of(policy, "striped")[None].requires_grad_()
    with soft_texts(policy.prompts, ["a {} red star"], vectors) as texts:
        soft = policy.predict_noise(latents, timesteps, policy.encode(texts), once)
    torch.testing.assert_close(soft, words, rtol=0, atol=1e-4)
    soft.square().sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.abs().min() > 0
    policy.guard = None
    assert (policy.predict_noise(latents, timesteps, policy.encode(["a striped red star"])) - words).abs().max() > 1e-3


def test_words_are_coined_all_at_once_and_forgotten(policy: DiffusionPolicy) -> None:
    vectors = torch.zeros(1, 1, 96)
    with (
        soft_texts(policy.prompts, ["a {} star"], vectors),
        pytest.raises(ValueError, match="must be coined all at once"),
        soft_texts(policy.prompts, ["a {} star"], vectors),
    ):
        pass
    with (
        pytest.raises(ValueError, match="vectors of <new> must be 96 wide, got 5"),
        policy.prompts.coined({"<new>": torch.zeros(1, 5)}),
    ):
        pass
    with policy.prompts.coined({"<new>": vectors[0]}):
        coined = policy.prompts.ids("<new>")
    assert coined[1:-1] == [-1]
    assert min(policy.prompts.ids("<new>")) >= 0
    assert not policy.text_encoder.get_input_embeddings()._forward_hooks


def test_vectors_begin_as_a_texts_tokens_in_turn(policy: DiffusionPolicy) -> None:
    torch.testing.assert_close(initial_vectors(policy.prompts, "red star", 3), vectors_of(policy, "red star red"))


def test_replaced_texts_encode_otherwise_for_a_while_and_carry_gradient(policy: DiffusionPolicy) -> None:
    plain = policy.encode(["a red star", "a blue star"]).tokens
    other = (plain[0] + 1).requires_grad_()
    with policy.prompts.replaced({"a red star": other}):
        inside = policy.encode(["a red star", "a blue star"]).tokens
        with policy.prompts.replaced({"a blue star": plain[0]}):
            assert torch.equal(policy.encode(["a blue star", "a red star"]).tokens[1], other)
    assert torch.equal(inside[0], other)
    assert torch.equal(inside[1], plain[1])
    assert inside.requires_grad
    assert torch.equal(policy.encode(["a red star"]).tokens[0], plain[0])
    assert not policy.encode(["a red star"]).tokens.requires_grad
