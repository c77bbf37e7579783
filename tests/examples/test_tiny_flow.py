"""Programs on the tiny world's rectified flow take what was found for it, and the noise that is asked for."""

from dataclasses import replace

import pytest
import torch

from erasure import erase, method_named
from examples import ddpo_finetune, refl_erase_nudity
from overpaint import tinyworld
from overpaint.evaluation.experiments.options import TINY_FLOW, TINY_WORLD, ModelOptions


def test_the_erasers_settings_and_the_constraint_are_those_for_the_flow() -> None:
    for policy, presets, constraint in (
        (TINY_FLOW, tinyworld.FLOW_PRESETS, None),
        (TINY_WORLD, tinyworld.PRESETS, "destruction"),
    ):
        config = refl_erase_nudity.complete(refl_erase_nudity.Config(policy=policy, method="esd", seed=3))
        usual = presets["esd"]
        assert config.eraser == replace(usual, descent=replace(usual.descent, seed=3))
        assert config.constraint == constraint
    config = refl_erase_nudity.complete(refl_erase_nudity.Config(policy=TINY_FLOW, method="uce"))
    assert config.eraser == tinyworld.PRESETS["uce"]


@pytest.mark.parametrize("name", tinyworld.FLOW_PRESETS)
def test_an_update_with_the_settings_for_the_flow_moves_the_layers_that_they_name(name: str) -> None:
    config = tinyworld.FLOW_PRESETS[name]
    quick = replace(config.descent, iterations=2, batch_size=2)
    policy = ModelOptions(policy=TINY_FLOW, chain="ancestral").load()
    before = {layer: weight.clone() for layer, weight in policy.model.state_dict().items()}
    method = method_named(name, replace(config, descent=quick, steps=2))
    erase(method, policy, tinyworld.STRIPES, progress=False).apply(policy)
    moved = {layer for layer, weight in policy.model.state_dict().items() if not torch.equal(weight, before[layer])}
    assert {"attn" in layer for layer in moved} == ({True, False} if name == "eraseflow" else {True})
    for part in ("norm1.linear", "norm1_context.linear", "time_text_embed.text_embedder"):
        assert any(part in layer for layer in moved) == (name == "eraseflow"), part


def test_grpo_draws_windows_of_stochastic_steps() -> None:
    config = ddpo_finetune.complete(ddpo_finetune.Config(policy=TINY_FLOW, algorithm="grpo"))
    assert config.ddpo is not None
    assert (config.ddpo.steps, config.ddpo.window, config.ddpo.eta) == (10, 4, 0.7)


def test_the_noise_of_a_flows_steps_is_an_option() -> None:
    for chain in ("cps", "ancestral"):
        policy = ModelOptions(policy=TINY_FLOW, chain=chain).load()
        assert policy.process.reverses_noising == (chain == "ancestral")
    with pytest.raises(ValueError, match="chain must be left out for a diffusion model"):
        ModelOptions(chain="cps").load()
