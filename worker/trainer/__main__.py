"""`python -m worker.trainer run spec.json --data FOLDER --out DIR` trains without any server.

`python -m worker.trainer rank` is one of the other processes of a run, which the first one starts.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from worker.trainer import local, ranks, training


def arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m worker.trainer")
    verbs = parser.add_subparsers(required=True)
    verb = verbs.add_parser("run", help="train from a spec and a folder of images, with no server")
    verb.add_argument("spec", help="the body of a job as a JSON file; `dataset` may be left out")
    verb.add_argument("--data", required=True, help="a folder or archive of images, or builtin:NAME")
    verb.add_argument("--out", required=True, help="where the model goes")
    verb.add_argument("--model", help="a folder with model.safetensors and config.json to start from or to use")
    verb.add_argument("--cache", help="where decoded images are kept; in the output folder by default")
    verb.add_argument(
        "--cache-bytes", type=int, default=os.environ.get("TUNEYARD_CACHE_BYTES", 50 * 2**30),
        help="disk budget of decoded images and features; by default what TUNEYARD_CACHE_BYTES says, or 50 GiB",
    )  # fmt: skip
    verb.add_argument("--threads", type=int, default=0, help="of each process; 0 shares what torch takes by itself")
    verb.add_argument("--processes", type=_positive, help="that train together; on GPUs, one for each")
    verb.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    verb.set_defaults(work=local.run)
    rank = verbs.add_parser("rank", help="be one of the other processes of a run; the first one starts it")
    rank.set_defaults(work=lambda _: os._exit(ranks.follow(training.follow)))  # at once: the first one waits
    return parser.parse_args(given)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("at least 1 process trains")
    return number


if __name__ == "__main__":
    chosen = arguments(sys.argv[1:])
    raise SystemExit(chosen.work(chosen))
