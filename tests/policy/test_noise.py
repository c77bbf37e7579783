import itertools

import torch

from overpaint.policy import ClassifierFree, DiffusionPolicy, SampleNoise

CPU = torch.device("cpu")


def streams(seeds: list[int], draws: int = 4) -> dict[int, torch.Tensor]:
    noise = SampleNoise(seeds, (4, 8, 6), CPU)
    drawn = torch.stack([noise.draw() for _ in range(draws)], dim=1)
    return dict(zip(seeds, drawn, strict=True))


def test_noise_of_a_sample_is_the_same_in_any_batch_and_order() -> None:
    alone = {seed: streams([seed])[seed] for seed in (3, 5, 2**40)}
    for size in (2, 3):
        for seeds in itertools.permutations(alone, size):
            for seed, drawn in streams(list(seeds)).items():
                assert torch.equal(drawn, alone[seed])


def test_draws_of_a_stream_differ_and_are_standard_normal() -> None:
    drawn = streams(list(range(50)), draws=10)
    values = torch.stack(list(drawn.values()))
    assert values.flatten(0, 1).flatten(1).unique(dim=0).shape[0] == 500
    assert abs(values.mean().item()) < 0.02
    assert abs(values.std().item() - 1) < 0.02


def test_initial_latents_and_step_noises_of_a_policy_do_not_depend_on_the_batch(policy: DiffusionPolicy) -> None:
    # A network that predicts nothing leaves a rollout that is noise alone.
    policy.network = lambda latents, timesteps, **rest: (torch.zeros_like(latents),)
    conditioning = policy.encode(["a cat"])
    guidance = ClassifierFree(1.0)

    def states(seeds: list[int]) -> torch.Tensor:
        return policy.rollout(conditioning.expand(len(seeds)), steps=3, guidance=guidance, eta=1.0, seeds=seeds).latents

    together = states([7, 8, 9])
    assert torch.equal(together.flip(0), states([9, 8, 7]))
    assert torch.equal(together[1:2], states([8]))


def test_partial_rollout_of_no_steps_is_the_initial_noise(policy: DiffusionPolicy) -> None:
    conditioning = policy.encode(["a cat", "a dog"])
    latents = policy.sample(conditioning, steps=5, seeds=[4, 2], until=0)
    assert torch.equal(latents, SampleNoise([4, 2], (4, 8, 8), CPU).draw())
