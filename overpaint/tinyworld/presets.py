"""The tiny world's concept, and the settings of the ten erasure methods that were found for it by experiment."""

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from erasure import Concept, DescentConfig
from erasure.methods.ac import ACConfig
from erasure.methods.ant import ANTConfig, SaliencyConfig
from erasure.methods.eraseflow import EraseFlowConfig
from erasure.methods.esd import ESDConfig
from erasure.methods.mace import MACEConfig
from erasure.methods.receler import RecelerConfig
from erasure.methods.sa import FisherConfig, SAConfig
from erasure.methods.safree import SAFREEConfig
from erasure.methods.sld import SLDConfig
from erasure.methods.uce import UCEConfig
from overpaint.policy import LoRAConfig

from .caption import EXPLICIT_ROUTES, IMPLICIT_ROUTES, captions

WORDS = EXPLICIT_ROUTES + IMPLICIT_ROUTES
"""What brings stripes, by name or unasked."""

STRIPES = Concept(
    name="stripes",
    phrases=(
        *WORDS,
        *("a striped red star", "a blue circle with stripes", "a green zebra square"),
        *("a yellow cross in prison", "a purple triangle at the circus"),
    ),
    anchor=" ",
    preserve=("", *captions("benign", 40, 77), *captions("neighbour", 24, 77)),
)
"""The tiny world's harmful concept: asked for by name, and brought unasked by a zebra, a prison or a circus.

Each of the five words stands alone and once in a caption, since what follows a word in its caption is edited too.
Preserved are captions of ordinary pictures and of the neighbour, dots.
"""

PRESETS: Mapping[str, Any] = MappingProxyType(
    {
        # Max without momentum, which would be too much in 20 steps with guidance 3. Dots are in the text because the
        # opposite of stripes is dots there: led away from stripes alone, plain objects become dotted. Captions of dots
        # keep theirs all the same.
        "sld": replace(SLDConfig.max(), momentum_scale=0.0, momentum_beta=0.0, concept_text="a striped dotted zebra"),
        # Each prompt is filtered all the way: of its 24 tokens the few that are not replaced bring stripes back in
        # steps that are not. Re-attention is off: its four low frequencies are all there is of features of 2 x 2.
        "safree": SAFREEConfig(concepts=WORDS, alpha=0.05, filtered_steps=50, midpoint=3.0, latent_reattention=False),
        "uce": UCEConfig(),
        "mace": MACEConfig(
            templates=(
                *("{}", "a {} star", "a photo of a {} square", "a red {} circle", "a yellow cross {}"),
                *("a large green {} triangle on a white background", "a blue star on a gray background {}"),
                "a small {} purple square on a pink background",
            ),
            prior=(),
            prior_weight=0.05,
            fusion_prior_weight=1.0,
            prior_size=None,
            prompts=("a {}",),
            steps=20,
            guidance_scale=3.0,
            descent=DescentConfig(iterations=40, learning_rate=1e-3, weight_decay=1e-2, max_grad_norm=1.0),
        ),
        # ESD-x, as few updates as take stripes away.
        "esd": ESDConfig(
            train="xattn", steps=10, descent=DescentConfig(iterations=60, learning_rate=3e-4, batch_size=8)
        ),
        "ac": ACConfig(
            train="xattn",
            anchors=tuple(captions("benign", 64, 5)),
            templates=("{concept} {anchor}", "{anchor} {concept}"),
            images=64,
            negative="",
            steps=20,
            guidance_scale=3.0,
            mirror=False,
            descent=DescentConfig(
                iterations=350, learning_rate=6e-4, batch_size=8, weight_decay=1e-2, max_grad_norm=1.0
            ),
        ),
        "sa": SAConfig(
            train="attn",
            penalty=0.005,
            replay_weight=0.03,
            surrogates=tuple(captions("benign", 64, 5)),
            templates=("{concept} {surrogate}", "{surrogate} {concept}"),
            replay=(*captions("benign", 32, 6), *captions("neighbour", 32, 6)),
            images=64,
            steps=20,
            guidance_scale=3.0,
            fisher=FisherConfig(images=32, timesteps=16),
            descent=DescentConfig(
                iterations=900, learning_rate=1e-3, batch_size=8, weight_decay=1e-2, max_grad_norm=0.3
            ),
        ),
        "receler": RecelerConfig(
            rank=32,
            inner_steps=3,
            steps=10,
            descent=DescentConfig(iterations=90, learning_rate=1e-3, batch_size=4),
        ),
        # Most of the way is kept, and strongly.
        "ant": ANTConfig(
            steps=10,
            kept_share=0.6,
            keep_weight=3.0,
            saliency=SaliencyConfig(prompts=WORDS, seeds=(1,), iterations=3, learning_rate=1e-3),
            descent=DescentConfig(iterations=60, learning_rate=2e-4, batch_size=8),
        ),
        # Phrases of a single word are put into captions: by itself a word is a prompt that nobody writes.
        "eraseflow": EraseFlowConfig(
            anchors=tuple(captions("benign", 64, 5)),
            steps=20,
            guidance_scale=3.0,
            descent=DescentConfig(
                iterations=60, learning_rate=3e-3, batch_size=4, weight_decay=1e-2, max_grad_norm=1.0
            ),
        ),
    }
)
"""Settings of each method for `STRIPES` in the tiny world, by the method's name in `erasure.METHODS`."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
MODULATION = (
    *("norm1.linear", "norm1_context.linear"),
    *(f"time_text_embed.text_embedder.linear_{k}" for k in (1, 2)),
)
"""Layers of the flow transformer by the endings of their names."""

FLOW_PRESETS: Mapping[str, Any] = MappingProxyType(
    {
        "esd": ESDConfig(
            train="attn", steps=10, descent=DescentConfig(iterations=80, learning_rate=3e-4, batch_size=8)
        ),
        # The pooled text reaches every block by the modulation of its norms, which has to be trained, too.
        "eraseflow": replace(
            PRESETS["eraseflow"],
            train=LoRAConfig(rank=16, alpha=16.0, targets=(*ATTENTION, *MODULATION)),
            steps=10,
            step_weights="balanced",
            early_share=0.8,
        ),
    }
)
"""The same for the rectified-flow transformer, of the two methods that were tried on it."""
