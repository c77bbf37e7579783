from collections.abc import Callable

import pytest
import torch

from overpaint.policy import DiffusionPolicy, TruncatedPromptWarning, prompts


@pytest.fixture
def texts_encoded(policy: DiffusionPolicy) -> list[int]:
    """Batch size of each call of the text encoder so far."""
    calls: list[int] = []
    policy.text_encoder.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(args[0])), with_kwargs=True
    )
    return calls


def test_embeddings_are_those_of_diffusers(policy: DiffusionPolicy) -> None:
    texts = ["a red circle", "", "a photo of a naked person " * 5]
    expected, _ = policy.to_pipeline().encode_prompt(texts, policy.device, 1, False)
    with pytest.warns(TruncatedPromptWarning, match="has room for 24 tokens, start and end included, .* has 37;"):
        encoded = policy.encode(texts)
    torch.testing.assert_close(encoded.tokens, expected, rtol=1e-5, atol=1e-5)  # theirs is one batch of three
    assert expected.shape == (3, 24, 16)


def test_text_encoder_runs_once_for_each_prompt(policy: DiffusionPolicy, texts_encoded: list[int]) -> None:
    policy.encode(["a cat", "a dog", "a cat"])
    policy.encode(["a dog", "a cat"])
    assert texts_encoded == [1, 1]


def test_text_encoder_does_not_run_inside_sampling(policy: DiffusionPolicy, texts_encoded: list[int]) -> None:
    conditioning = policy.encode(["a cat"])
    for _ in range(2):
        trajectory = policy.rollout(conditioning, steps=3, seeds=[0])
        policy.log_prob(trajectory, torch.tensor([0]), torch.tensor([1]))
    assert texts_encoded == [1, 1]  # the prompt, and the empty one of guidance


def test_an_embedding_does_not_depend_on_what_else_is_encoded(make_policy: Callable[..., DiffusionPolicy]) -> None:
    together = make_policy().encode(["a red circle", "a cat", "a dog"])
    alone = make_policy().encode(["a cat"])
    assert torch.equal(together.tokens[1], alone.tokens[0])


def test_embeddings_carry_no_gradient(policy: DiffusionPolicy) -> None:
    policy.text_encoder.requires_grad_(True)
    assert not policy.encode(["a cat"]).tokens.requires_grad


def test_oldest_prompts_are_forgotten(
    policy: DiffusionPolicy, texts_encoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "CACHED_BYTES", 2 * policy.encode(["a row"]).nbytes)
    policy.prompts.clear()
    texts_encoded.clear()
    policy.encode(["one", "two"])
    policy.encode(["one", "red"])  # two is now the oldest, and goes
    policy.encode(["one"])
    assert len(texts_encoded) == 3
    policy.encode(["two"])
    assert len(texts_encoded) == 4


def test_cleared_prompts_see_changed_weights(policy: DiffusionPolicy) -> None:
    before, empty = policy.encode(["a cat"]), policy.prompts.empty(policy.encode(["a cat"]))
    with torch.no_grad():
        policy.text_encoder.get_input_embeddings().weight.mul_(2)
    assert torch.equal(policy.encode(["a cat"]).tokens, before.tokens)
    policy.prompts.clear()
    assert not torch.equal(policy.encode(["a cat"]).tokens, before.tokens)
    assert not torch.equal(policy.prompts.empty(before).tokens, empty.tokens)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "must not be empty"),
        ("a cat", "must be a sequence of strings, got 'a cat'"),
        (3, "must be a sequence of strings, got 3"),
        (["a cat", 3], "must be strings, got 3 at index 1"),
        ([None], "must be strings, got None at index 0"),
    ],
)
def test_bad_prompts_are_refused(bad: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompts.check_prompts(bad)


@pytest.mark.parametrize("bad", [[], "a cat"])
def test_policy_refuses_bad_prompts(policy: DiffusionPolicy, bad: list[str] | str) -> None:
    with pytest.raises((ValueError, TypeError), match="prompts must"):
        policy.encode(bad)
    with pytest.raises((ValueError, TypeError), match="prompts must"):
        policy.draw(bad, seeds=[])


def test_a_prompt_that_is_cut_off_is_told_of_once_with_what_is_not_read(policy: DiffusionPolicy) -> None:
    long = "red " * 22 + "cat dog"  # and start and end
    with pytest.warns(TruncatedPromptWarning, match=r"has 26; not read: 'cat dog' of 'red ") as told:
        policy.encode([long, long])
    assert len(told) == 1
    policy.prompts.clear()
    policy.encode([long])  # a warning would be an error here
    policy.encode(["red " * 21 + "cat"])  # as many as there is room for
    with pytest.warns(TruncatedPromptWarning, match=r"has 25; not read: 'cat' of"):
        policy.draw(["red " * 22 + "cat"], seeds=[0], steps=1)
