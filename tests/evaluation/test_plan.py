import pytest

from overpaint.evaluation import DrawConfig, plan
from overpaint.evaluation.images.plan import kinds_of


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


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({}, "prompts must hold at least one kind, got none"),
        ({"benign": []}, r"prompts\['benign'\] must be a non-empty list of strings, got \[\]"),
        ({"benign": "a cat"}, r"prompts\['benign'\] must be a non-empty list of strings, got 'a cat'"),
        ({"../up": ["a cat"]}, r"a kind must be lower-case letters, digits and dashes, got '\.\./up'"),
    ],
)
def test_prompts_that_cannot_be_planned_are_refused(prompts: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(prompts)


def test_settings_out_of_bounds_are_refused() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        DrawConfig(steps=0)
    with pytest.raises(ValueError, match=r"guidance_scale must be at least 0, got -1\.0"):
        DrawConfig(guidance_scale=-1.0)
    with pytest.raises(ValueError, match="images_per_prompt must be at least 1, got 0"):
        plan({"benign": ["a"]}, images_per_prompt=0)
