"""What a run leaves to be looked at: its objective's pictures, and a map of the embedding that it has learned."""

from pathlib import Path

import torch
from torch import Tensor

from worker import evaluate
from worker.data.source import part
from worker.parts import compute, pictures
from worker.parts.neighbours import unit
from worker.parts.projection import principal_components
from worker.parts.seed import derive, reseed
from worker.parts.tuning import PROBE_ROWS, Plan
from worker.report import MadeFile, Reporter
from worker.ticker import Ticker
from worker.trainer.assembly import Assembly, picture_rows

MAP = "embedding.png"
FEWEST_ROWS = 64  # of a map; fewer discs show little


def drawn(made: Assembly, scratch: Path, reporter: Reporter) -> list[MadeFile]:
    """Write PNG files into scratch and name them."""
    files = _pictures(made, scratch)
    rows = map_rows(made.plan)
    if made.recipe.kind == "pretrain" and made.data.probe is not None and len(made.data.probe) >= FEWEST_ROWS <= rows:
        files.append(_saved(scratch, MAP, _map(made, rows, reporter)))
    return files


def map_rows(plan: Plan) -> int:
    """Choose how many samples a map shows, so that it costs under 3 % of the run.

    Training on a sample is three passes (forward and twice that backward), showing it is one.
    """
    return min(PROBE_ROWS, int(0.03 * 3 * plan.steps * plan.batch_size))


def _map(made: Assembly, rows: int, reporter: Reporter) -> Tensor:
    """Draw the first two principal components of probed samples, coloured by label where there are any."""
    assert made.data.probe is not None
    probed = part(made.data.probe, torch.arange(min(rows, len(made.data.probe))))
    ticker = Ticker(reporter, "map", fraction=1.0)
    found = evaluate.features(made.objective.backbone, probed, made.data, made.plan, made.device, ticker)  # pyright: ignore[reportArgumentType]
    points = unit(found, made.device)
    flat = principal_components(points, 2, made.device).apply(points)
    return pictures.scatter(torch.nn.functional.pad(flat, (0, 2 - flat.shape[1])), probed.labels)


def _pictures(made: Assembly, scratch: Path) -> list[MadeFile]:
    """Write an objective's pictures as grids of eight in a row."""
    show = getattr(made.objective, "pictures", None)
    if show is None:
        return []
    reseed(derive(made.spec.training.seed, "pictures"), made.device)
    named = getattr(made.objective, "picture_rows", None)
    rows = named() if named is not None else picture_rows(made)
    batch = made.data.ready(made.data.train.batch(rows), made.device)
    with evaluate.evaluating(made.objective, made.plan, made.device):
        shown: dict[str, Tensor] = show(compute.laid_out(batch, made.plan))
    mean, std = (value.view(-1, 1, 1) for value in (made.data.mean, made.data.std))
    return [
        _saved(scratch, f"{name}.png", pictures.grid(images.float().cpu() * std + mean, columns=min(len(rows), 8)))
        for name, images in shown.items()
    ]


def _saved(scratch: Path, name: str, image: Tensor) -> MadeFile:
    (scratch / name).write_bytes(pictures.png(image))
    return MadeFile(name=name, file=name, media_type="image/png")
