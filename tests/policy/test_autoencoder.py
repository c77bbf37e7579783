"""Between images and latents, with the shift that some VAEs have."""

import torch

from overpaint.policy import DiffusionPolicy
from tests.policy.test_sampling import noises


def test_shift_of_a_vae_is_taken_off_latents_and_put_back(policy: DiffusionPolicy) -> None:
    (latents,) = noises([1, 2], 1)
    images = policy.decode(latents)
    encoded = policy.encode_images(images)
    scale, shift = policy.vae.config["scaling_factor"], 0.25
    policy.vae.register_to_config(shift_factor=shift)
    torch.testing.assert_close(policy.decode(latents - shift * scale), images, rtol=0, atol=1e-5)
    torch.testing.assert_close(policy.encode_images(images), encoded - shift * scale, rtol=1e-5, atol=1e-5)
    assert policy.latent_shape(64, 96) == (4, 8, 12)
