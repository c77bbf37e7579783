import pytest

from overpaint.evaluation import DrawConfig, PlannedImage, Prompt, plan
from overpaint.evaluation.images.plan import batches_of, kinds_of, plan_named


def test_plan_lists_each_prompt_of_each_kind_with_its_copies() -> None:
    planned = plan({"explicit": ["a", "b"], "benign": ["c"]}, images_per_prompt=2)
    assert [(image.kind, image.prompt, image.file_name) for image in planned] == [
        ("explicit", "a", "explicit-0000_0.png"),
        ("explicit", "a", "explicit-0000_1.png"),
        ("explicit", "b", "explicit-0001_0.png"),
        ("explicit", "b", "explicit-0001_1.png"),
        ("benign", "c", "benign-0000_0.png"),
        ("benign", "c", "benign-0000_1.png"),
    ]
    assert kinds_of(planned) == ("explicit", "benign")


def test_every_image_has_its_own_seed() -> None:
    planned = plan({"explicit": ["same"] * 100, "benign": ["same"] * 100}, images_per_prompt=2)
    assert len({image.seed for image in planned}) == 400


def test_adding_prompts_and_kinds_leaves_the_other_images_as_they_are() -> None:
    few = plan({"benign": ["a"]})
    many = plan({"explicit": ["x"], "benign": ["a", "b"]})
    assert set(few) < set(many)


def test_runs_with_neighbouring_seeds_share_no_noise() -> None:
    first, second = (plan({"benign": ["a"] * 100}, seed=seed) for seed in (0, 1))
    assert not {image.seed for image in first} & {image.seed for image in second}


def test_seeds_never_change_between_versions() -> None:
    # First four bytes of SHA-256 of "0/benign/0/0".
    assert plan({"benign": ["a"]})[0].seed == 0x5AE1691D


OWN = [Prompt("a", "a cat", 4261553411, {}, 7.5), Prompt("b", "a dog")]


def test_a_prompts_own_seed_draws_its_first_image_and_decides_the_others() -> None:
    first, second, *rest = plan_named(OWN, images_per_prompt=2, seed=1)
    again = plan_named(OWN, images_per_prompt=2, seed=2)
    assert first.seed == 4261553411
    assert second.seed == plan_named([Prompt("a", "a cat")], images_per_prompt=2, seed=4261553411)[1].seed
    assert [image.seed for image in again[:2]] == [first.seed, second.seed]
    assert [image.seed for image in again[2:]] != [image.seed for image in rest]
    assert [image.guidance_scale for image in (first, second, *rest)] == [7.5, 7.5, None, None]


def test_own_seeds_and_guidance_may_be_put_aside() -> None:
    plain = [Prompt("a", "a cat"), Prompt("b", "a dog")]
    assert plan_named(OWN, own_seeds=False, own_guidance=False) == plan_named(plain)
    assert plan_named(OWN, own_seeds=False)[0].guidance_scale == 7.5


def test_kinds_take_texts_and_prompts_with_seeds_of_their_own() -> None:
    planned = plan({"explicit": ["x"], "benign": [OWN[0], "a dog"]})
    texts = plan({"explicit": ["x"], "benign": ["a cat", "a dog"]})
    assert planned[1] == texts[1]._replace(seed=4261553411, guidance_scale=7.5)
    assert (planned[0], planned[2]) == (texts[0], texts[2])


def test_batches_are_of_one_guidance_scale_in_the_order_of_the_plan() -> None:
    scales = [None, 7.5, None, 3.0, 7.5, None]
    planned = plan_named([Prompt(str(k), "a", None, {}, scale) for k, scale in enumerate(scales)])
    assert [[image.id for image in batch] for batch in batches_of(planned, 2)] == [["0", "2"], ["5"], ["1", "4"], ["3"]]


def test_what_is_written_of_an_image_names_its_guidance_only_if_it_has_its_own() -> None:
    own, other = plan_named(OWN)
    assert own.to_dict()["guidance_scale"] == 7.5
    assert "guidance_scale" not in other.to_dict()
    assert [PlannedImage.from_dict({**image.to_dict(), "file": "x"}) for image in (own, other)] == [own, other]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({}, "prompts must hold at least one kind, got none"),
        ({"benign": []}, r"prompts\['benign'\] must be a non-empty list of strings, got \[\]"),
        ({"benign": "a cat"}, "prompts must be a sequence, got 'a cat'"),
        ({"../up": ["a cat"]}, r"a kind must be lower-case letters, digits and dashes, got '\.\./up'"),
    ],
)
def test_prompts_that_cannot_be_planned_are_refused(prompts: dict[str, list[str]], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        plan(prompts)


def test_settings_out_of_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        DrawConfig(steps=0)
    with pytest.raises(ValueError, match=r"guidance_scale must be at least 0, got -1\.0"):
        DrawConfig(guidance_scale=-1.0)
    with pytest.raises(ValueError, match="images_per_prompt must be at least 1, got 0"):
        plan({"benign": ["a"]}, images_per_prompt=0)
