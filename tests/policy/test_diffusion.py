from policy import DiffusionPolicy


def test_draw_gives_images_in_range(policy: DiffusionPolicy) -> None:
    images = policy.draw(["a red circle", "a cat"], seeds=[0, 1], steps=4)
    assert images.shape == (2, 3, 64, 64)
    assert images.min() >= 0
    assert images.max() <= 1
