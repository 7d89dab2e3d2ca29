"""MAE: show a vision transformer a quarter of an image's patches, and have a small decoder paint the others.

He, Chen, Xie, Li, Dollár, Girshick: Masked Autoencoders Are Scalable Vision Learners, 2022, arXiv 2111.06377. The
encoder runs on the visible patches alone. Its class token passes through the decoder, as in the authors' code, and is
what the exported backbone gives.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from app.domain.errors import UserFault
from worker.data.policy import View
from worker.parts import seed
from worker.parts.masked_vit import PatchDecoder, encode_visible, images_of, least_visible, patches_of, places
from worker.recipe import Batch, Info, PretrainParams, Progress, Recipe, Requires

PICTURES = 8


class MaeParams(PretrainParams):
    """The mask, the decoder and the crops."""

    mask_ratio: float = Field(default=0.75, gt=0, lt=1, description="Part of the patches that is hidden.")
    decoder_width: int | None = Field(
        default=None, ge=32, le=2048, multiple_of=32,
        description="Of the decoder's tokens, a multiple of 32; null is half the encoder's, as in the paper.",
    )  # fmt: skip
    decoder_depth: int | None = Field(
        default=None,
        ge=1,
        le=48,
        description="Layers of the decoder; null is a third of the encoder's, as in the paper.",
    )
    normalise_targets: bool = Field(
        default=True, description="Reconstruct pixels less their patch's mean, over its deviation."
    )
    crop_min_scale: float | None = Field(
        default=None, gt=0, le=1, description="Least part of the area a crop keeps; null is 0.2, and 0.5 if greyscale."
    )
    flip: float | None = Field(
        default=None, ge=0, le=1, description="Probability of mirroring; null is 0.5, and 0 for greyscale images."
    )


class Mae(nn.Module):
    """A ViT and the decoder, which is thrown away afterwards."""

    couples_batch = False
    step_passes = 2.0  # measured with small_vit: the backbone sees a quarter of the patches, the decoder is light

    def __init__(self, params: MaeParams, backbone: nn.Module, info: Info) -> None:
        super().__init__()
        vit = cast(Any, backbone)
        self.backbone, self._normalise = backbone, params.normalise_targets
        self._patch, self._size = int(vit.patch_size), info.image_size
        side = info.image_size // self._patch
        self._visible = visible_patches(params, side * side)
        encoder = int(vit.hidden_dim)
        if not info.pretrained and encoder % 4 == 0:
            # The paper's positions are sines and fixed; torchvision's may train on, but start as those.
            with torch.no_grad():
                vit.encoder.pos_embedding[0, 0] = 0
                vit.encoder.pos_embedding[0, 1:] = places(side, encoder)
        width = params.decoder_width or max(32, encoder // 2 // 32 * 32)  # 512 of 1024
        self.decoder = PatchDecoder(
            encoder, width=width, depth=params.decoder_depth or max(1, len(vit.encoder.layers) // 3), heads=width // 32,
            side=side, pixels=info.channels * self._patch**2,
        )  # fmt: skip

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """Name what is called: the backbone as a whole is not."""
        return [cast(Any, self.backbone).encoder.layers, self.decoder]

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:  # noqa: ARG002 (the contract's argument)
        return {"loss": self._errors(batch["image"], self._noise(batch["image"]))[0].mean()}

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """Give the loss of each image under masks that are the same at every call: {"loss": [batch]}."""
        return {"loss": self._errors(batch["image"], self._same_noise(batch["image"]))[0]}

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Show images, what the encoder saw of them, and what came out: three rows."""
        images = batch["image"][:PICTURES].contiguous()
        _, painted, hidden = self._errors(images, self._same_noise(images))
        patches = patches_of(images.float(), self._patch)
        if self._normalise:
            mean, deviation = moments(patches)
            painted = painted * deviation + mean
        hidden = hidden[:, :, None]
        rows = [patches, patches * ~hidden, torch.where(hidden, painted, patches)]
        return {"reconstructions": torch.cat([images_of(row, self._patch, self._size) for row in rows])}

    def _errors(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give the loss of each image [batch], all patches as painted, and which were hidden [batch, patches].

        The loss is the squared error of the hidden patches, each normalised by itself (section 3, reconstruction
        target).

        Args:
            noise: [batch, patches]; the patches with the least of it stay visible.
        """
        order = noise.argsort(dim=1)
        restore = order.argsort(dim=1)
        encoded = encode_visible(self.backbone, images, order[:, : self._visible])
        painted = self.decoder(encoded, restore).float()
        target = patches_of(images.float(), self._patch)
        if self._normalise:
            mean, deviation = moments(target)
            target = (target - mean) / deviation
        hidden = restore >= self._visible
        error = (painted - target).square().mean(2)  # [batch, patches]
        return (error * hidden).sum(1) / (noise.shape[1] - self._visible), painted, hidden

    def _noise(self, images: Tensor, draws: Generator | None = None) -> Tensor:
        return torch.rand(len(images), (self._size // self._patch) ** 2, generator=draws, device=images.device)

    def _same_noise(self, images: Tensor) -> Tensor:
        return self._noise(images, seed.generator(0, "mae", device=images.device))


def moments(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Give mean and deviation of every patch, each [batch, patches, 1]; a flat patch has a deviation of 0.001."""
    return patches.mean(2, keepdim=True), (patches.var(2, keepdim=True) + 1e-6).sqrt()


def visible_patches(params: MaeParams, patches: int) -> int:
    """Count the patches that stay visible.

    Raises:
        UserFault: none would, or all.
    """
    visible = least_visible(patches, params.mask_ratio)
    if not 0 < visible < patches:
        raise UserFault(
            f"params.mask_ratio: of {patches} patches {params.mask_ratio} would leave {visible} visible; use smaller "
            "patches (model.patch of small_vit), larger images, or another ratio.", code="mask_ratio",
        )  # fmt: skip
    return visible


def inputs(params: MaeParams, info: Info) -> Callable[[Batch, Generator], Batch]:
    """Crop and mirror, which is all the augmentation of the paper."""
    colour = info.channels == 3
    view = View(info.image_size, crop_scale=(0.2 if colour else 0.5, 1.0), flip=0.5 if colour else 0.0)
    if params.crop_min_scale is not None:
        view = replace(view, crop_scale=(params.crop_min_scale, 1.0))
    if params.flip is not None:
        view = replace(view, flip=params.flip)
    return lambda batch, generator: {**batch, "image": view(batch["image"], generator)}


RECIPE = Recipe(
    name="mae",
    kind="pretrain",
    version="1",
    summary="Learn features without labels: paint the three quarters of an image that a ViT was not shown.",
    tasks=("image_classification", "unlabelled_images"),
    Params=MaeParams,
    requires=Requires(
        min_samples=2, min_batch=2, architectures=("vit",),
        reason="mae leaves out patches, which only plain vision transformers (small_vit, vit_…) can do without",
    ),
    defaults={
        "training": {
            "epochs": 100, "weight_decay": 0.05, "optimizer": {"name": "adamw", "betas": [0.9, 0.95]},
        },
    },
    build=Mae,
    inputs=inputs,
)  # fmt: skip
