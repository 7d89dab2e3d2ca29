"""Mirrors that alternate: every sample is seen once in each form in any two epochs, which no coin gives."""

import torch
from torch import Tensor

from worker.recipe import Batch

_LOW = (1 << 32) - 1


def alternating(batch: Batch, seed: int) -> Batch:
    """Mirror the images of a batch that are due, left to right (Jordan, arXiv 2404.00498, "alternating flip").

    Which form comes first is a coin of (seed, sample number); from then on it changes with every epoch.
    """
    due = (first_mirrored(batch["index"], seed) + batch["epoch"]) % 2 == 1
    images = batch["image"]
    return {**batch, "image": torch.where(due[:, None, None, None], images.flip(3), images)}


def first_mirrored(index: Tensor, seed: int) -> Tensor:
    """Toss a coin for each sample number, the same every time: int64, 0 or 1, in the shape of `index`.

    The number is mixed as MurmurHash3 ends (fmix32), because neighbours of one class often differ in their last bits.
    """
    mixed = (index + (seed * 0x9E3779B9 & _LOW)) & _LOW
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        mixed = mixed ^ (mixed >> shift)
        mixed = (mixed * factor) & _LOW  # wraps at 64 bits, of which the low 32 are right
    return (mixed ^ (mixed >> 16)) & 1
