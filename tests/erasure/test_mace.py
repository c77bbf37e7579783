"""MACE: three stages, its pictures and masks, and what it refuses."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image

from erasure import NUDITY, Concept, Erasure, Objective, ObjectiveConstraint
from erasure.descend import DescentConfig, descend
from erasure.methods.attention_maps import CrossAttention, recorded_attention
from erasure.methods.mace.fusion import LowRank, around, fused, least_squares, refining_factor
from erasure.methods.mace.mace import MACE, MACEConfig, attention_norm, low_rank, penalised, timestep_odds, with_lora
from erasure.methods.mace.masks import MaskedImages, at_size, attention_masks, checked_masks, masked_images
from erasure.phrases import Placed, holds, own_phrases, phrase_tokens, placed, template_of
from erasure.protocols import ConceptBatch
from overpaint import tinyworld
from overpaint.policy import Conditioning, DiffusionPolicy, LoRAConfig, select_parameters
from overpaint.policy.noise import SampleNoise
from overpaint.policy.weights import base_parameters
from overpaint.tinyworld.presets import PRESETS, STRIPES

CONCEPT = Concept(name="stripes", phrases=("striped", "with stripes", "a striped cat"), anchor=" ")
DESCENT = DescentConfig(
    iterations=3, learning_rate=1e-2, batch_size=2, weight_decay=1e-2, max_grad_norm=1.0, checkpoint_every=1
)
CONFIG = MACEConfig(
    templates=("a {} circle", "{} and a dog"),
    prior=("a photo of a cat", "a red square"),
    prior_weight=0.1,
    fusion_prior_weight=0.1,
    prior_size=None,
    prompts=("a {}", "a photo of a {}"),
    images=3,
    steps=2,
    guidance_scale=3.0,
    mask_timesteps=(400,),
    descent=DESCENT,
)
BATCH = ConceptBatch(["striped", "with stripes", "striped"], [3, 8, 11])


@pytest.fixture
def bare(make_policy: Callable[..., DiffusionPolicy]) -> DiffusionPolicy:
    return make_policy()


def prepared(policy: DiffusionPolicy, config: MACEConfig = CONFIG, **options: Any) -> MACE:
    method = MACE(config, progress=False, **options)
    method.prepare(policy, CONCEPT)
    return method


def equal(one: Erasure, other: Erasure) -> bool:
    ours, theirs = one.delta.tensors, other.delta.tensors
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Phrases within prompts.


def test_a_phrase_that_holds_another_is_a_prompt_of_it() -> None:
    assert own_phrases(CONCEPT.phrases) == {"striped": ["a {} cat"], "with stripes": []}
    assert own_phrases(("Van Gogh", "a van gogh sky")) == {"Van Gogh": ["a {} sky"]}
    assert list(own_phrases(STRIPES.phrases)) == ["striped", "with stripes", "zebra", "in prison", "at the circus"]
    assert all(len(templates) == 1 for templates in own_phrases(STRIPES.phrases).values())


def test_phrases_are_whole_words() -> None:
    assert holds("a Red cat", "red ")
    assert not holds("a redder cat", "red")
    assert template_of("cat", "a cathedral, a Cat and a cat") == "a cathedral, a {} and a cat"


def test_a_placed_phrase_has_its_tokens(bare: DiffusionPolicy) -> None:
    found = placed(bare, "a photo of {} on a circle", "two red")
    assert found == Placed("a photo of two red on a circle", first=4, end=6, last=9)
    ids = bare.tokenizer(found.text)["input_ids"]
    assert ids[found.first : found.end] == bare.tokenizer("two red")["input_ids"][1:-1]
    assert ids[found.last] == bare.tokenizer.eos_token_id
    assert placed(bare, "a {} circle", " ")[1:] == (2, 2, 3)
    assert phrase_tokens(bare, [found])[0].nonzero().flatten().tolist() == [4, 5]


def test_tokens_that_lose_attention_are_the_phrase_and_all_from_the_end_on(bare: DiffusionPolicy) -> None:
    prompts = [placed(bare, "a photo of {} on a circle", "two red"), placed(bare, "{}", "striped")]
    first, second = penalised(bare, prompts)
    assert first.nonzero().flatten().tolist() == [4, 5, *range(9, 24)]
    assert second.nonzero().flatten().tolist() == list(range(1, 24))


@pytest.mark.parametrize(
    ("template", "phrase", "message"),
    [
        ("a circle", "red", "a template must hold {} once, got 'a circle'"),
        ("{} and {}", "red", "a template must hold {} once"),
        ("a {}s", "cat", "a phrase must keep its tokens within a template, and 'cat' does not in 'a {}s'"),
        ("a {}" + " red" * 22, "cat", "a template with its phrase must have at most 24 tokens, got 26 in "),
    ],
)
def test_templates_that_cannot_be_used_are_refused(
    bare: DiffusionPolicy, template: str, phrase: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        placed(bare, template, phrase)


# The closed forms.


def test_tokens_around_a_phrase_are_paired_from_both_of_its_sides() -> None:
    tokens = torch.arange(10.0).unsqueeze(1)
    old, new = Placed("", first=2, end=5, last=8), Placed("", first=2, end=3, last=6)
    before, after = around(old, new, tokens, tokens)
    assert before.flatten().tolist() == [0, 1, 5, 6, 7, 8, 9]
    assert after.flatten().tolist() == [0, 1, 3, 4, 5, 6, 7]


def test_refined_weights_are_the_least_squares() -> None:
    weight, old, new, prior = normal(3, 4), normal(9, 4, seed=1), normal(9, 4, seed=2), normal(5, 4, seed=3)
    refined = weight + weight @ refining_factor(old, new, prior.T @ prior, prior_weight=0.3)
    rows = torch.cat([old, 0.3**0.5 * prior])
    targets = torch.cat([new @ weight.T, 0.3**0.5 * prior @ weight.T])
    torch.testing.assert_close(refined, torch.linalg.lstsq(rows, targets).solution.T, rtol=0, atol=1e-10)


def test_fused_weights_are_the_least_squares() -> None:
    weight, factor, prior = normal(3, 4), normal(4, 4, seed=1), normal(5, 4, seed=2)
    tokens = [normal(6, 4, seed=3), normal(7, 4, seed=4)]
    updates = [{"w": LowRank(normal(3, 1, seed=5 + i), normal(1, 4, seed=7 + i))} for i in range(2)]
    moments = [each.T @ each for each in tokens]
    change = fused({"w": weight}, factor, updates, moments, prior.T @ prior, prior_weight=0.3)["w"]
    rows = torch.cat([*tokens, 0.3**0.5 * prior])
    wanted = [weight + weight @ factor + update["w"].up @ update["w"].down for update in updates]
    answers = [each @ target.T for each, target in zip(tokens, wanted, strict=True)]
    targets = torch.cat([*answers, 0.3**0.5 * prior @ weight.T])
    torch.testing.assert_close(weight + change, torch.linalg.lstsq(rows, targets).solution.T, rtol=0, atol=1e-10)


def test_directions_that_no_text_has_are_left_alone() -> None:
    old, new = normal(9, 6, seed=1), normal(9, 6, seed=2)
    old[:, 4:] = 0
    factor = refining_factor(old, new, torch.zeros(6, 6, dtype=torch.float64), prior_weight=0.0)
    assert not factor[:, 4:].any()
    torch.testing.assert_close(old @ (factor.T + torch.eye(6, dtype=torch.float64)), old + old @ factor.T)
    blank = torch.zeros(6, 6, dtype=torch.float64)
    assert not least_squares(normal(2, 6), blank).any()


# The loss.


def test_the_norm_is_over_heads_pixels_and_tokens_and_summed_over_layers() -> None:
    generator = torch.Generator().manual_seed(0)

    def layer(pixels: int) -> CrossAttention:
        queries = torch.randn(2, 3, pixels, 5, generator=generator)
        return CrossAttention(queries, torch.randn(2, 3, 4, 5, generator=generator), 0.5)

    record = {"large": layer(16), "small": layer(4)}
    masks = [torch.zeros(8, 8, dtype=torch.bool), torch.zeros(2, 2, dtype=torch.bool)]
    masks[0][7, 0] = masks[1][0, 1] = True
    tokens = torch.tensor([[False, True, False, True], [False, False, True, False]])
    norms = attention_norm(record, masks, tokens, height=4, width=4)

    large, small = (record[name].probabilities() for name in ("large", "small"))
    first = large[0, :, 12][:, [1, 3]].square().sum().sqrt() + small[0, :, 2][:, [1, 3]].square().sum().sqrt()
    second = large[1, :, [2, 3, 6, 7]][..., 2].square().sum().sqrt() + small[1, :, 1][:, 2].square().sum().sqrt()
    torch.testing.assert_close(norms, torch.stack([first, second]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_loss_is_the_attention_on_noised_pictures(
    make_policy: Callable[..., DiffusionPolicy], pipeline_dir: Path, v_pipeline_dir: Path, prediction: str
) -> None:
    policy = make_policy(path=pipeline_dir if prediction == "epsilon" else v_pipeline_dir, lora=LoRAConfig(rank=1))
    method = prepared(policy)
    losses = method.loss(policy, BATCH).detach()
    for index, (phrase, seed) in enumerate(zip(*BATCH, strict=True)):
        picture, timestep = _choice(seed)
        pictures = method._pictures[phrase]
        prompt, latents = pictures.prompts[picture], pictures.latents[picture : picture + 1]
        noise = SampleNoise([seed], (4, 8, 8), torch.device("cpu")).draw()
        noised = policy.add_noise(latents, noise, torch.tensor([timestep]))
        with recorded_attention(policy.unet) as record:
            policy.unet(noised, torch.tensor([timestep]), policy.encode([prompt.text]).tokens)
        tokens = penalised(policy, [prompt])
        alone = attention_norm(record, [pictures.masks[picture]], tokens, height=8, width=8)
        torch.testing.assert_close(losses[index : index + 1], alone.detach(), rtol=1e-4, atol=0)


def _choice(seed: int) -> tuple[int, int]:
    """Returns the picture and the timestep that follow from a seed."""
    choice = Random(f"mace {seed}")
    return choice.randrange(3), choice.choices(range(1000))[0]


def test_a_sample_has_its_loss_in_any_batch(bare: DiffusionPolicy) -> None:
    method = prepared(bare)
    together = method.loss(bare, BATCH)
    for index in range(3):
        alone = method.loss(bare, ConceptBatch(BATCH.prompts[index : index + 1], BATCH.seeds[index : index + 1]))
        torch.testing.assert_close(alone, together[index : index + 1], rtol=1e-4, atol=1e-6)
    turned = method.loss(bare, ConceptBatch(BATCH.prompts[::-1], BATCH.seeds[::-1]))
    torch.testing.assert_close(turned, together.flip(0), rtol=1e-4, atol=1e-6)


def test_a_prompt_that_holds_a_phrase_is_its_own(bare: DiffusionPolicy) -> None:
    method = prepared(bare, replace(CONFIG, prompts=("a photo of a {} cat",)))
    whole = method.loss(bare, ConceptBatch(["a photo of a striped cat"], [3]))
    assert torch.equal(whole, method.loss(bare, ConceptBatch(["striped"], [3])))
    assert not torch.equal(whole, method.loss(bare, ConceptBatch(["a striped dog"], [3])))
    with pytest.raises(ValueError, match="a prompt must hold one of 'striped', 'with stripes', got 'a zebra'"):
        method.loss(bare, ConceptBatch(["a zebra"], [3]))
    with pytest.raises(ValueError, match="prepare must be called before the first loss"):
        MACE(CONFIG).loss(bare, BATCH)


def test_early_timesteps_are_those_between_200_and_400() -> None:
    odds = torch.tensor(timestep_odds(1000))
    share = odds / odds.sum()
    assert share[200:400].sum() > 0.85
    assert share[100:500].sum() > 0.99
    assert odds.argmax().item() == 300
    assert odds[200].item() == pytest.approx(0.5, abs=1e-3)
    assert bool((odds >= 0).all())


def test_timesteps_are_drawn_as_the_settings_say(bare: DiffusionPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    predict = bare.predict_noise

    def noted(latents: torch.Tensor, timesteps: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        seen.append(timesteps)
        return predict(latents, timesteps, conditioning)

    methods = [prepared(bare, replace(CONFIG, early_timesteps=early)) for early in (False, True)]
    monkeypatch.setattr(bare, "predict_noise", noted)
    for method in methods:
        method.loss(bare, ConceptBatch(["striped"] * 60, list(range(60))))
    uniform, early = seen
    assert uniform.min() < 150
    assert uniform.max() > 850
    assert ((early > 100) & (early < 500)).all()


def test_the_loss_costs_what_is_said_and_reaches_every_weight(
    bare: DiffusionPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    student = with_lora(bare, LoRAConfig(rank=1, alpha=1.0, targets=("attn2.to_k", "attn2.to_v")))
    method, network, seen = prepared(student), student.network, {True: 0, False: 0}

    def counted(latents: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        seen[torch.is_grad_enabled()] += len(latents)
        return network(latents, *arguments, **options)

    monkeypatch.setattr(student, "network", counted)
    method.loss(student, BATCH).sum().backward()
    assert all(parameter.grad is not None for parameter in student.trainable_parameters())
    assert seen == {False: 3 * method.unet_calls().forward, True: 3 * method.unet_calls().backward}


# Masks.


def test_masks_of_another_size_lose_nothing() -> None:
    masks = torch.zeros(1, 64, 64, dtype=torch.bool)
    masks[0, 9, 63] = True
    assert at_size(masks, 8, 8)[0].nonzero().tolist() == [[1, 7]]
    assert at_size(at_size(masks, 8, 8), 16, 16)[0].nonzero().tolist() == [[2, 14], [2, 15], [3, 14], [3, 15]]
    assert torch.equal(at_size(masks, 64, 64), masks)


def test_a_users_masks_may_be_truth_values_or_shares() -> None:
    images, masks = torch.zeros(2, 3, 4, 6), torch.zeros(2, 4, 6)
    masks[:, 1, 2], masks[:, 0, 0] = 0.75, 0.5
    marked = checked_masks(masks, images, "cat")
    assert marked.nonzero().tolist() == [[0, 1, 2], [1, 1, 2]]
    assert torch.equal(checked_masks(marked, images, "cat"), marked)


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (torch.ones(2, 6, 4), r"masks of 'cat' must have the images' shape \(2, 4, 6\), got \(2, 6, 4\)"),
        (torch.ones(1, 4, 6), r"must have the images' shape \(2, 4, 6\), got \(1, 4, 6\)"),
        (torch.ones(2, 1, 4, 6), r"must have the images' shape \(2, 4, 6\), got \(2, 1, 4, 6\)"),
        (torch.eye(2).view(2, 2, 1, 1)[:, 0].expand(2, 4, 6), "must each mark some pixel, and that of image 1 marks"),
    ],
)
def test_masks_that_do_not_fit_are_refused(masks: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked_masks(masks, torch.zeros(2, 3, 4, 6), "cat")


def test_images_and_masks_of_the_user_are_taken(bare: DiffusionPolicy) -> None:
    images, masks = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.zeros(2, 64, 64)
    masks[:, :8, :8] = 1
    method = prepared(bare, images={"striped": MaskedImages(images, masks)})
    pictures = method._pictures["striped"]
    torch.testing.assert_close(pictures.latents, bare.encode_images(images), rtol=0, atol=1e-5)
    assert torch.equal(pictures.masks, masks.bool())
    assert len(method._pictures["with stripes"].latents) == 3
    with pytest.raises(ValueError, match="images must be of the phrases 'striped', 'with stripes', got 'zebra'"):
        prepared(bare, images={"zebra": MaskedImages(images, masks)})
    with pytest.raises(ValueError, match="masks of 'striped' must have the images' shape"):
        prepared(bare, images={"striped": MaskedImages(images, masks[:, :32])})
    with pytest.raises(ValueError, match=r"must be of one size, got latents of \[\(4, 8\), \(8, 8\)\]"):
        prepared(bare, images={"striped": MaskedImages(images[:, :, :32], masks[:, :32])})


def test_preparing_again_draws_pictures_of_the_policy_at_hand(make_policy: Callable[..., DiffusionPolicy]) -> None:
    first, second = make_policy(), make_policy()
    with torch.no_grad():
        second.unet.conv_out.bias.add_(0.5)
    method = prepared(first)
    before = method._pictures["striped"].latents
    method.prepare(second, CONCEPT)
    assert not torch.allclose(method._pictures["striped"].latents, before)


def test_pictures_are_the_references_whatever_was_trained_since(
    make_policy: Callable[..., DiffusionPolicy], policy: DiffusionPolicy
) -> None:
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.normal_()
    tuned, plain = (prepared(each)._pictures["striped"] for each in (policy, make_policy()))
    torch.testing.assert_close(tuned.latents, plain.latents, rtol=0, atol=1e-5)
    assert torch.equal(tuned.masks, plain.masks)


def test_a_segmenter_finds_the_phrase_where_there_is_no_mask(bare: DiffusionPolicy) -> None:
    asked: list[tuple[tuple[int, ...], str]] = []

    def segment(images: torch.Tensor, phrase: str) -> torch.Tensor:
        asked.append((tuple(images.shape), phrase))
        return images[:, 0] >= images[:, 0].amax(dim=(1, 2), keepdim=True)

    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    given = {"striped": MaskedImages(images, torch.ones(2, 64, 64))}
    method = prepared(bare, segment=segment, images=given)
    assert asked == [((3, 3, 64, 64), "with stripes")]
    assert method._pictures["with stripes"].masks.shape == (3, 64, 64)
    assert method._pictures["striped"].masks.all()
    with pytest.raises(ValueError, match="masks of 'striped' must have the images' shape"):
        prepared(bare, segment=lambda images, phrase: torch.ones(1, 2, 3))


def test_without_either_cross_attention_tells(bare: DiffusionPolicy) -> None:
    method = prepared(bare)
    pictures = method._pictures["striped"]
    words = phrase_tokens(bare, pictures.prompts)
    found = [
        attention_masks(
            bare, pictures.latents, [prompt.text for prompt in pictures.prompts], words,
            timesteps=(400,), threshold=threshold, side=16, seeds=[1, 2, 3],
        )
        for threshold in (0.2, 0.6, 1.0)
    ]  # fmt: skip
    assert pictures.masks.shape == (3, 8, 8)
    low, middle, high = (masks.flatten(1).sum(dim=1) for masks in found)
    assert (high >= 1).all()
    assert (low > middle).all()
    assert (middle > high).all()
    assert (found[0] | found[1]).equal(found[0])


def write(path: Path, image: torch.Tensor) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = (image * 255).round().to(torch.uint8)
    Image.fromarray(pixels.permute(1, 2, 0).numpy() if image.ndim == 3 else pixels.numpy()).save(path)


def test_a_folder_holds_images_and_masks_of_phrases(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 8, 16, generator=torch.Generator().manual_seed(0)).mul(255).round().div(255)
    mask = torch.zeros(8, 16)
    mask[2, 3] = 1
    for index in range(2):
        write(tmp_path / "with stripes" / f"{index}.png", images[index])
        write(tmp_path / "with stripes" / f"{index}.mask.png", mask)
        write(tmp_path / "striped" / f"{index}.png", images[index])
    found = masked_images(tmp_path)
    assert list(found) == ["striped", "with stripes"]
    torch.testing.assert_close(found["with stripes"].images, images, rtol=0, atol=1e-6)
    assert found["striped"].masks is None
    masks = found["with stripes"].masks
    assert masks is not None
    assert checked_masks(masks, images, "x").nonzero().tolist() == [[0, 2, 3], [1, 2, 3]]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "a folder of images must hold a folder for each phrase"),
        ({"cat/notes.txt": None}, "a folder of a phrase must hold images"),
        ({"cat/0.png": (8, 8), "cat/1.png": (8, 8), "cat/1.mask.png": (8, 8)}, r"a mask or none, and 0\.mask\.png"),
        ({"cat/0.png": (8, 8), "cat/1.png": (8, 16)}, "images of 'cat' must be of one size"),
        ({"cat/0.png": (8, 8), "cat/0.mask.png": (8, 16)}, r"masks of 'cat' must have the images' shape"),
        ({"cat/0.png": None}, r"0\.png: an image must be a PNG or a JPEG"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused(
    tmp_path: Path, files: dict[str, tuple[int, int] | None], message: str
) -> None:
    for name, size in files.items():
        if size is None:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text("no image")
        else:
            write(tmp_path / name, torch.ones(3, *size))

    def use() -> None:
        for phrase, (images, masks) in masked_images(tmp_path).items():
            assert masks is not None
            checked_masks(masks, images, phrase)

    with pytest.raises(ValueError, match=message):
        use()


# The erasure.


def test_the_policy_is_left_as_it_was_and_keys_and_values_change(bare: DiffusionPolicy) -> None:
    before = {name: value.detach().clone() for name, value in base_parameters(bare.unet).items()}
    erasure = MACE(CONFIG).erase(bare, CONCEPT, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in base_parameters(bare.unet).items())
    assert set(erasure.delta.tensors) == set(select_parameters(bare.unet, "xattn-kv"))


def test_each_phrase_meets_its_own_update(bare: DiffusionPolicy) -> None:
    erased = MACE(CONFIG).erase(bare, CONCEPT, progress=False).delta.tensors
    one = MACE(CONFIG).erase(bare, replace(CONCEPT, phrases=("striped",)), progress=False).delta.tensors
    assert any(not torch.allclose(erased[name], one[name]) for name in erased)


def test_training_takes_attention_off_the_phrase(bare: DiffusionPolicy) -> None:
    descent = replace(DESCENT, iterations=30, batch_size=4, learning_rate=3e-2, max_grad_norm=1e3)
    concept = replace(CONCEPT, phrases=("striped",))
    student = with_lora(
        bare.student_copy("xattn-kv"), LoRAConfig(rank=1, alpha=1.0, targets=("attn2.to_k", "attn2.to_v"))
    )
    method, batch = prepared(bare), ConceptBatch(["striped"] * 16, list(range(16)))
    with torch.no_grad():
        before = method.loss(bare, batch).mean()
    method.config = replace(CONFIG, descent=descent)
    descend(method, student, concept, progress=False)
    with torch.no_grad():
        assert method.loss(student, batch).mean() < 0.8 * before
        for name, (up, down) in low_rank(student).items():
            base_parameters(bare.unet)[name].add_(up @ down)
        torch.testing.assert_close(method.loss(bare, batch), method.loss(student, batch), rtol=1e-4, atol=1e-5)


def test_strength_scales_the_change(bare: DiffusionPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = MACE(CONFIG).erase(bare, CONCEPT, output_dir=tmp_path, progress=False)
    monkeypatch.setattr(MACE, "loss", lambda *arguments: pytest.fail("the phrases are trained already"))
    half = MACE(CONFIG).erase(bare, CONCEPT, 0.5, output_dir=tmp_path, resume=True, progress=False)
    none = MACE(CONFIG).erase(bare, CONCEPT, 0.0, output_dir=tmp_path, resume=True, progress=False)
    for name, value in whole.delta.tensors.items():
        torch.testing.assert_close(half.delta.tensors[name], 0.5 * value, rtol=1e-6, atol=1e-9)
        assert not none.delta.tensors[name].any()
    assert (half.config["strength"], whole.config["strength"]) == (0.5, 1.0)


def test_prior_texts_weigh_as_much_as_the_settings_say(bare: DiffusionPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    import erasure.methods.mace.mace as module

    weights: dict[str, list[float]] = {"refining_factor": [], "fused": []}

    def noting(name: str) -> Callable[..., Any]:
        solve = getattr(module, name)

        def noted(*arguments: Any, prior_weight: float) -> Any:
            weights[name].append(prior_weight)
            return solve(*arguments, prior_weight=prior_weight)

        return noted

    for name in weights:
        monkeypatch.setattr(module, name, noting(name))
    sized = replace(CONFIG, prior_weight=0.01, fusion_prior_weight=0.02, prior_size=300)
    for config in (sized, replace(sized, variant="released"), replace(sized, prior_size=None)):
        MACE(config).erase(bare, CONCEPT, progress=False)
    # There are three prior texts: two, and the empty one that the concept preserves.
    assert weights["refining_factor"] == pytest.approx([1.0, 0.01, 0.01])
    assert weights["fused"] == pytest.approx([2.0, 2.0, 0.02])


def test_a_saved_erasure_draws_the_same_in_a_policy_and_in_a_pipeline(
    make_policy: Callable[..., DiffusionPolicy], tmp_path: Path
) -> None:
    policies = [make_policy() for _ in range(3)]
    erasure = MACE(CONFIG).erase(policies[0], CONCEPT, progress=False)
    erasure.save(tmp_path)
    loaded = Erasure.load(tmp_path)
    assert (loaded.config, loaded.concept, loaded.method) == (erasure.config, CONCEPT, "MACE")
    erasure.apply(policies[0])
    loaded.apply(policies[1])
    pipeline = policies[2].to_pipeline()
    loaded.apply_to_pipeline(pipeline)
    drawn = [policy.draw(["a striped cat"], seeds=[1], steps=2) for policy in policies]
    assert all(torch.equal(image, drawn[0]) for image in drawn)
    assert not torch.equal(make_policy().draw(["a striped cat"], seeds=[1], steps=2), drawn[0])


def test_an_interrupted_training_goes_on_to_the_same_numbers(
    bare: DiffusionPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = MACE(CONFIG).erase(bare, CONCEPT, progress=False)
    loss, calls, sample, drawn = MACE.loss, 0, DiffusionPolicy.sample, 0

    def failing(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            raise KeyboardInterrupt
        return loss(*arguments)

    def counted(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal drawn
        drawn += 1
        return sample(*arguments, **options)

    monkeypatch.setattr(MACE, "loss", failing)
    monkeypatch.setattr(DiffusionPolicy, "sample", counted)
    with pytest.raises(KeyboardInterrupt):
        MACE(CONFIG).erase(bare, CONCEPT, output_dir=tmp_path, progress=False)
    resumed = MACE(CONFIG).erase(bare, CONCEPT, output_dir=tmp_path, resume=True, progress=False)
    assert (calls, drawn) == (7, 2)  # three for each phrase and the one that failed; pictures only once
    assert equal(resumed, whole)
    changed = replace(CONFIG, early_timesteps=True)
    with pytest.raises(ValueError, match="resume must keep the settings"):
        MACE(changed).erase(bare, CONCEPT, output_dir=tmp_path, resume=True, progress=False)


def test_a_lora_counts_as_part_of_the_model(
    make_policy: Callable[..., DiffusionPolicy], policy: DiffusionPolicy
) -> None:
    with torch.no_grad():
        for index, parameter in enumerate(policy.trainable_parameters()):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
    merged = make_policy()
    tuned = policy.to_pipeline().unet.state_dict()
    merged.unet.load_state_dict(tuned)
    first, second = (MACE(CONFIG).erase(each, CONCEPT, progress=False).delta.tensors for each in (policy, merged))
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=0, atol=1e-4 * value.abs().max().item())


def test_a_second_concept_is_erased_after_the_first(make_policy: Callable[..., DiffusionPolicy]) -> None:
    policy, method = make_policy(), MACE(CONFIG)
    first = method.erase(policy, CONCEPT, progress=False)
    first.apply(policy)
    second = method.erase(policy, Concept(name="dogs", phrases=("dog",), anchor="cat"), progress=False)
    second.apply(policy)
    again = make_policy()
    first.apply(again)
    second.apply(again)
    assert torch.equal(again.draw(["a dog"], seeds=[1], steps=2), policy.draw(["a dog"], seeds=[1], steps=2))
    with pytest.raises(ValueError, match="must have the weights that MACE erased 'dogs' from"):
        second.apply(make_policy())


def test_it_is_a_constraint_that_reaches_a_lora(policy: DiffusionPolicy) -> None:
    method = MACE(CONFIG, progress=False)
    assert isinstance(method, Objective)
    constraint = ObjectiveConstraint(method, CONCEPT)
    constraint.prepare(policy)
    constraint.violation(policy, ConceptBatch(list(CONCEPT.phrases), [1, 2, 3])).mean().backward()
    keys = {name: p.grad for name, p in policy.unet.named_parameters() if ".attn2.to_k.lora_B" in name}
    assert keys
    assert all(grad is not None and grad.any() for grad in keys.values())


# Settings.


def test_defaults_are_the_authors_for_explicit_content() -> None:
    config = MACEConfig()
    assert config.descent == DescentConfig(iterations=120, learning_rate=1e-5, weight_decay=1e-2, max_grad_norm=1.0)
    assert (config.images, config.steps, config.guidance_scale, config.rank) == (8, 30, 7.5, 1)
    assert (config.prior_weight, config.fusion_prior_weight) == (7e-7, 7e-7)
    assert (config.early_timesteps, len(set(config.templates)), len(set(config.prior))) == (False, 30, 100)
    _, count = MACE(config).prior(Concept(name="nudity", phrases=("nudity",), preserve=()))
    assert count * len(config.prior) == pytest.approx(616_767)


def test_prior_texts_that_hold_the_concept_are_left_out_or_refused() -> None:
    texts, _ = MACE().prior(Concept(name="dogs", phrases=("dog",), preserve=("", "a wolf")))
    assert texts[:2] == ["", "a wolf"]
    assert "a photo of a dog" not in texts
    assert "a photo of a cat" in texts
    with pytest.raises(ValueError, match=r"Concept\.preserve must be free of 'dogs', got 'dog' in 'a dog sled'"):
        MACE().prior(Concept(name="dogs", phrases=("dog",), preserve=("a dog sled",)))
    with pytest.raises(ValueError, match="there must be a prior"):
        MACE(replace(CONFIG, prior=())).prior(Concept(name="dogs", phrases=("dog",), preserve=()))


def test_defaults_fit_nudity_and_a_text_encoder_of_77_tokens() -> None:
    policy = DiffusionPolicy.from_pretrained(Path(__file__).parents[1] / "golden" / "tiny-sd", device="cpu")
    short = replace(MACEConfig(), images=1, steps=1, descent=replace(MACEConfig().descent, iterations=1))
    erasure = MACE(short).erase(policy, NUDITY, progress=False)
    assert all(value.isfinite().all() and value.any() for value in erasure.delta.tensors.values())


def test_settings_for_the_tiny_world_fit_it() -> None:
    policy = tinyworld.load_policy()
    config = replace(PRESETS["mace"], images=1, steps=1)
    method = MACE(config, progress=False)
    method.prepare(policy, STRIPES)
    texts, _ = method.prior(STRIPES)
    assert texts == list(dict.fromkeys(STRIPES.preserve))
    assert method.loss(policy, ConceptBatch(["zebra", *tinyworld.captions("implicit", 3)], [1, 2, 3, 4])).min() > 0


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("variant", "theirs", "must be 'paper' or 'released', got 'theirs'"),
        ("templates", (), r"must have at least 1 item, got \(\)"),
        ("prompts", ("a cat",), "must hold texts, each with one {}, got "),
        ("images", 0, "must be at least 1, got 0"),
        ("steps", 0, "must be at least 1, got 0"),
        ("draw_batch_size", 0, "must be at least 1, got 0"),
        ("mask_side", 0, "must be at least 1, got 0"),
        ("rank", 0, "must be at least 1, got 0"),
        ("prior_weight", -1.0, r"must be at least 0, got -1\.0"),
        ("guidance_scale", float("inf"), "must be a finite number, got inf"),
        ("prior_size", 0, "must be at least 1, got 0"),
        ("mask_threshold", 0.0, r"must be above 0, got 0\.0"),
        ("mask_timesteps", (), r"must have at least 1 item, got \(\)"),
        ("mask_timesteps", (-1, 3), r"must be at least 0, got -1"),
    ],
)
def test_settings_are_checked(field: str, value: object, rule: str) -> None:
    settings: dict[str, Any] = {field: value}
    with pytest.raises(ValueError, match=rf"MACEConfig(\.|: ){field}(\[0\])? {rule}"):
        MACEConfig(**settings)


@pytest.mark.parametrize("strength", [-1.0, float("nan"), float("inf")])
def test_a_strength_that_is_none_is_refused(bare: DiffusionPolicy, strength: float) -> None:
    with pytest.raises(ValueError, match=r"strength must be (at least 0|a finite number)"):
        MACE(CONFIG).erase(bare, CONCEPT, strength)


def test_words_that_are_cut_off_and_an_anchor_that_is_the_concept_are_refused(bare: DiffusionPolicy) -> None:
    with pytest.raises(ValueError, match="texts of 'x' must have at most 24 tokens"):
        MACE(CONFIG).erase(bare, Concept(name="x", phrases=("striped " * 30,)), progress=False)
    with pytest.raises(ValueError, match="must not be one of its phrases"):
        MACE(CONFIG).erase(bare, Concept(name="x", phrases=("Striped",), anchor="striped "), progress=False)
