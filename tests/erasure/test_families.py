"""Every method on every family of models: those that carry over change pictures, the others are refused by name."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from golden_case import GOLDEN
from torch import Tensor

from erasure import Concept, Erasure
from erasure.descend import DescentConfig
from erasure.methods.ac import AC, ACConfig
from erasure.methods.ant import ANT, ANTConfig
from erasure.methods.ant.saliency import SaliencyConfig
from erasure.methods.eraseflow import EraseFlow, EraseFlowConfig
from erasure.methods.esd import ESD, ESDConfig
from erasure.methods.mace import MACE, MACEConfig
from erasure.methods.receler import Receler, RecelerConfig
from erasure.methods.sa import SA, SAConfig
from erasure.methods.sa.fisher import FisherConfig
from erasure.methods.safree import SAFREE
from erasure.methods.sld import SLD, SLDConfig
from erasure.methods.uce import UCE
from erasure.registry import METHODS as NAMES
from erasure.registry import erase
from overpaint.policy import ClassifierFree, DiffusionPolicy

STRIPED = Concept(name="stripes", phrases=("striped", "with stripes"))
PICTURES = ("a red circle", "a cat")
DESCENT = DescentConfig(iterations=2, learning_rate=3e-3, batch_size=2)
SALIENCY = SaliencyConfig(prompts=STRIPED.phrases, seeds=(3,), iterations=1, learning_rate=1e-3)
METHODS: dict[str, Callable[[str], Any]] = {
    "sld": lambda train: SLD(SLDConfig(warmup_steps=0, guidance_scale=20.0, threshold=0.1)),
    "safree": lambda train: SAFREE(),
    "uce": lambda train: UCE(),
    "mace": lambda train: MACE(
        MACEConfig(
            templates=("a {} circle",), prior=PICTURES, prior_weight=0.1, fusion_prior_weight=0.1, prior_size=None,
            prompts=("a {}",), images=2, steps=2, guidance_scale=3.0, mask_timesteps=(400,), descent=DESCENT,
        )
    ),
    "esd": lambda train: ESD(ESDConfig(train=train, steps=2, descent=DESCENT)),
    "ac": lambda train: AC(
        ACConfig(
            anchors=PICTURES, templates=("{concept} {anchor}",), images=2, steps=2, train=train, detach_start=False,
            descent=DESCENT,
        )
    ),
    "sa": lambda train: SA(
        SAConfig(
            train=train, surrogates=PICTURES, replay=("a dog",), images=2, steps=2,
            fisher=FisherConfig(images=1, timesteps=2), descent=DESCENT,
        )
    ),
    "receler": lambda train: Receler(RecelerConfig(rank=4, tokens=2, inner_steps=2, steps=2, descent=DESCENT)),
    "ant": lambda train: ANT(ANTConfig(steps=2, saliency=SALIENCY, descent=DESCENT)),
    "eraseflow": lambda train: EraseFlow(EraseFlowConfig(steps=3, retain_share=0.0, train=train, descent=DESCENT)),
}  # fmt: skip
"""Each with settings that take a moment."""

CARRIED = {
    "sdxl": {"sld", "uce", "mace", "esd", "ac", "sa", "receler", "ant", "eraseflow"},
    "sd3": {"sld", "esd", "ac", "sa", "ant", "eraseflow"},
    "flux": {"uce", "esd", "ac", "sa", "ant", "eraseflow"},
}
"""Which methods carry over."""

UNET = "must be given a model with a UNet, whose cross-attention it works on, got a {}, which has a transformer"
REFUSED = {
    "safree": "SAFREE must be given a Stable Diffusion v1 or v2, whose one text encoder's tokens it filters, got a {}",
    "sld": "SLD must be given a model with classifier-free guidance, got a {}, which has none",
    "uce": "UCE must be given a model whose texts pass matrices of their own, .* or FLUX's projections, got a {}",
    "mace": UNET,
    "receler": UNET,
}
PAIRS = [(name, family) for family in CARRIED for name in METHODS]


@pytest.fixture(scope="module")
def policies() -> dict[str, DiffusionPolicy]:
    return {name: DiffusionPolicy.from_pretrained(GOLDEN / "flow" / f"tiny-{name}", device="cpu") for name in CARRIED}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLUX's checkpoints do not say how large its pictures are, and those of 1024 pixels take long."""
    monkeypatch.setattr("overpaint.policy.families.flux.Flux.sample_size", 8)


def drawn(policy: DiffusionPolicy) -> Tensor:
    return policy.draw(["a striped circle"], seeds=[1], steps=3, guidance=ClassifierFree(3.0))


def test_the_table_has_every_method() -> None:
    assert METHODS.keys() == NAMES.keys()


@pytest.mark.parametrize(("name", "family"), PAIRS)
def test_methods_change_pictures_or_are_refused_by_name(
    name: str, family: str, policies: dict[str, DiffusionPolicy], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policies[family]
    method = METHODS[name]("xattn" if family == "sdxl" else "attn")
    if name == "eraseflow" and family != "sdxl":
        with pytest.raises(ValueError, match="of a flow are those of chain='ancestral', got another"):
            erase(method, policy, STRIPED, progress=False)
        monkeypatch.setattr(policy, "process", policy.family.process("ancestral"))
    if name not in CARRIED[family]:
        with pytest.raises(ValueError, match=REFUSED[name].format(policy.family.pipelines[0])):
            erase(method, policy, STRIPED, progress=False)
        return
    before = drawn(policy)
    erasure = erase(method, policy, STRIPED, progress=False)
    assert torch.equal(drawn(policy), before)
    erasure.save(tmp_path)
    with Erasure.load(tmp_path).applied(policy):
        assert (drawn(policy) - before).abs().max() > 1e-4
    assert torch.equal(drawn(policy), before)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_an_erasure_of_weights_is_applied_to_a_plain_pipeline(
    family: str, policies: dict[str, DiffusionPolicy]
) -> None:
    policy = policies[family]
    erasure = erase(METHODS["esd"]("attn"), policy, STRIPED, progress=False)
    pipeline = policy.to_pipeline()
    pipeline.transformer = type(pipeline.transformer).from_config(pipeline.transformer.config)
    pipeline.transformer.load_state_dict(policy.model.state_dict())
    erasure.apply_to_pipeline(pipeline)
    plain = DiffusionPolicy(pipeline, device="cpu")
    with erasure.applied(policy):
        torch.testing.assert_close(drawn(plain), drawn(policy), atol=1e-5, rtol=0)


def test_guards_are_attached_to_pipelines_of_the_first_family_only(policies: dict[str, DiffusionPolicy]) -> None:
    policy = policies["sdxl"]
    erasure = erase(METHODS["sld"](""), policy, STRIPED, progress=False)
    with pytest.raises(ValueError, match="must be attached to a pipeline of Stable Diffusion v1 or v2, got a Stable"):
        erasure.apply_to_pipeline(policy.to_pipeline())


def test_a_set_that_a_transformer_lacks_is_refused_with_those_that_it_has(
    policies: dict[str, DiffusionPolicy],
) -> None:
    method = METHODS["esd"]("xattn")
    with pytest.raises(ValueError, match=r"'xattn' must be one of the model's, and a Flux.* has attn, text-attn, full"):
        erase(method, policies["flux"], STRIPED, progress=False)
    text = replace(method.config, train="text-attn")
    changed = erase(ESD(text), policies["flux"], STRIPED, progress=False).delta.tensors
    assert changed
    assert all(".add_" in name or ".to_add_out." in name for name in changed)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_detaching_the_start_token_is_refused_for_a_transformer_before_a_picture_is_drawn(
    family: str, policies: dict[str, DiffusionPolicy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DiffusionPolicy, "sample", lambda *arguments, **options: pytest.fail("a picture was drawn"))
    with pytest.raises(ValueError, match="detach_start must be False for a model without a UNet's cross-attention"):
        AC(ACConfig(anchors=PICTURES, train="attn", descent=DESCENT)).erase(policies[family], STRIPED, progress=False)


def test_a_negative_prompt_for_a_model_with_one_branch_is_refused_by_its_setting(
    policies: dict[str, DiffusionPolicy],
) -> None:
    config = ACConfig(anchors=PICTURES, train="attn", detach_start=False, negative="a cat", descent=DESCENT)
    with pytest.raises(
        ValueError, match=r"ACConfig\.negative must be None or empty for a model with one branch, got 'a"
    ):
        AC(config).erase(policies["flux"], STRIPED, progress=False)
