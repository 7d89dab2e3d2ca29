"""Randomness as a function of (seed, what for, step): nothing to save, nothing to lose in a kill."""

import hashlib

import torch


def derive(seed: int, *purpose: str | int) -> int:
    """Give a 63-bit seed for one purpose; unlike `seed + step`, neighbours have nothing in common."""
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def reseed(value: int, device: torch.device | str = "cpu") -> None:
    """Seed what draws without a generator, such as dropout.

    Not `torch.manual_seed`: without an initialised GPU that puts a call with its whole stack trace on a list, every
    time, which costs a third of a millisecond a step and never gives the memory back.
    """
    torch.default_generator.manual_seed(value)
    if torch.device(device).type == "cuda":
        torch.cuda.manual_seed(value)


def generator(seed: int, *purpose: str | int, device: torch.device | str = "cpu") -> torch.Generator:
    """Give a generator for one purpose."""
    return torch.Generator(device).manual_seed(derive(seed, *purpose))
