"""Latent re-attention: the low frequencies of a UNet's skip features, compared between two prompts and damped.

The part of SAFREE that acts inside the network: see `erasure.methods.safree`. The filter is FreeU's (Si et al. 2023,
https://arxiv.org/abs/2309.11497) at radius 1, applied where the filtered prompt's coefficient is not below the
original prompt's.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from overpaint.policy.parts import UNet

ROUNDING = 8.0
"""Units in the last place within which two coefficients count as equal: the same features in two rows of a batch."""


def damp_low_frequencies(
    filtered: Float[Tensor, "batch channels h w"],
    original: Float[Tensor, "batch channels h w"],
    factor: float,
    *,
    replace: bool,
) -> Float[Tensor, "batch channels h w"]:
    """Damps low frequencies of features wherever their real part is not below that of other features.

    Low are the four coefficients around the centre of the spectrum: frequency 0 and -1 along each side. They are
    multiplied by the factor, or, with `replace`, become the factor itself, as in the authors' code.
    """
    low = torch.zeros(filtered.shape[-2:], dtype=torch.bool, device=filtered.device)
    low[0, 0] = low[0, -1] = low[-1, 0] = low[-1, -1] = True
    spectrum, reference = (torch.fft.fft2(features.float()) for features in (filtered, original))
    rounding = ROUNDING * torch.finfo(filtered.dtype).eps * filtered.float().norm(dim=(-2, -1), keepdim=True)
    damped = low & ((reference - spectrum).real <= rounding.detach())
    changed = torch.full_like(spectrum, factor) if replace else factor * spectrum
    return torch.fft.ifft2(torch.where(damped, changed, spectrum)).real.to(filtered.dtype)


class Reattention:
    """Damps the skip features of a UNet's up blocks, while it is running and no longer.

    Stable Diffusion v1 damps where a block's features are 1280 wide (`coarse`) and 640 wide (`fine`). Any UNet: where
    they are as wide as its widest, and as the next width below.

    Args:
        unet: Whose up blocks are changed; branches of a call lie one behind the other along its batch. It must not be
            compiled: a compiled network overlooks what is changed between its calls.
        coarse: Factor at the widest features.
        fine: Factor at the next width.
        replace: See `damp_low_frequencies`.
    """

    def __init__(self, unet: UNet, *, coarse: float, fine: float, replace: bool) -> None:
        if unet._compiled_call_impl is not None:
            raise ValueError("latent re-attention needs a UNet that is not compiled; pass latent_reattention=False")
        self.unet = unet
        channels = cast(Sequence[int], unet.config["block_out_channels"])
        widths = sorted(set(channels), reverse=True)
        self.factors = dict(zip(widths, (coarse, fine), strict=False))
        self.replace = replace
        self._handles: list[Any] = []
        self._running = self._used = False
        self._active: Bool[Tensor, " batch"] | None = None
        self._branches = 0

    def start(self, active: Bool[Tensor, " batch"] | None, *, branches: int) -> None:
        """Changes the next call of the UNet.

        Args:
            active: Samples whose prompt's branch is compared with one more, the original prompt's; the others' own
                branch is the original prompt's already, and is compared with itself. None: there is no such branch.
            branches: How many there are without that one, 1 or 2; the prompt's is the last of them.
        """
        self.stop()
        self._active, self._branches = active, branches
        self._running, self._used = True, False
        self._handles = [block.register_forward_pre_hook(self._damp, with_kwargs=True) for block in self.unet.up_blocks]
        self._handles.append(self.unet.register_forward_hook(self._end, always_call=True))

    def stop(self) -> bool:
        """Leaves the UNet as it was, and tells whether it was called."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._active, self._running = [], None, False
        return self._used

    def _end(self, unet: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        """Ends after one call, even one that failed."""
        self._running, self._used = False, True

    def _damp(
        self, block: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._running:
            return None
        skips = list(named["res_hidden_states_tuple"])
        for index, layer in enumerate(block.get_submodule("resnets").children()):
            skip = skips[-1 - index]  # the block takes them from the end
            width = layer.in_channels - skip.shape[1]  # what the block itself brings
            if width in self.factors:
                skips[-1 - index] = self._damp_skip(skip, self.factors[width])
        return inputs, {**named, "res_hidden_states_tuple": tuple(skips)}

    def _damp_skip(self, skip: Float[Tensor, "rows channels h w"], factor: float) -> Tensor:
        parts = list(skip.chunk(self._branches + (self._active is not None)))
        compared = filtered = parts[self._branches - 1]
        if self._active is not None:
            compared = torch.where(self._active.view(-1, 1, 1, 1), parts[-1], filtered)
        parts[self._branches - 1] = damp_low_frequencies(filtered, compared, factor, replace=self.replace)
        return torch.cat(parts)
