"""One of several processes that train together in a test: what it is told on stdin, it does; a line of JSON answers.

It lives through a whole test module, because starting torch takes longer than any of these runs.
"""

import hashlib
import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from tests.worker.sets import Heard
from worker import loop
from worker.checkpoint import Checkpoints
from worker.parts import distributed
from worker.parts.seed import reseed
from worker.parts.tuning import Plan
from worker.recipe import Progress
from worker.report import Order
from worker.trainer.assembly import assemble, start

MLP = {"architecture": "mlp", "hidden": [32]}
# Adam would hide a gradient that is wrong by a factor.
SGD = {"optimizer": "sgd", "precision": "float32", "weight_decay": 0.01}
PATIENCE = timedelta(seconds=60)  # nobody watches over the processes of these tests


class Turn(BaseModel):
    """One run."""

    order: Order
    plan: Plan | None = None
    rank: int
    world: int
    store: str
    hooked: bool = False


class Hooks:
    """Hooks that draw, cluster and average, as those of recipes with teachers and prototypes do."""

    def __init__(self, objective: nn.Module) -> None:
        self._objective = objective
        objective.register_buffer("prototypes", torch.zeros(3))
        objective.register_buffer("teacher", torch.zeros_like(next(objective.parameters())))
        made = cast(Any, objective)
        made.before_epoch, made.after_step = self.before_epoch, self.after_step

    def before_epoch(self, features_of: Any, progress: Progress) -> list[nn.Parameter]:
        """Draw prototypes from the features of all samples; forget the optimiser's state of one parameter."""
        features: Tensor = features_of()
        # The rank's own number stands for what a GPU computes a little differently every time.
        noise = torch.rand(3) + distributed.rank()
        cast(Tensor, self._objective.prototypes).copy_(features.mean() + noise)
        weights = next(self._objective.parameters())
        weights.data.add_(0.001 * noise.mean())
        return [weights]

    def after_step(self, progress: Progress) -> None:
        """Move the teacher, with a random part."""
        weights = next(self._objective.parameters()).detach()
        cast(Tensor, self._objective.teacher).lerp_(weights + 0.01 * torch.randn(1), 0.1)


def digest(module: nn.Module) -> str:
    """Hash all weights and buffers."""
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(name.encode() + value.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def run(turn: Turn, heard: Heard, checkpoints: Checkpoints) -> tuple[nn.Module, Plan, loop.Result]:
    """Train as one of the processes."""
    made = assemble(turn.order, heard.reporter, plan=turn.plan)
    made = start(made, turn.order, heard.reporter)
    if turn.hooked:
        Hooks(made.objective)
    reseed(turn.rank)
    given = (made.objective, made.data, made.spec.training, made.plan, made.device, heard.reporter, checkpoints)
    if turn.world == 1:
        return made.objective, made.plan, loop.train(*given, kind=made.recipe.kind)
    with distributed.joined(Path(turn.store), turn.rank, turn.world, "cpu"):
        return made.objective, made.plan, loop.train(*given, kind=made.recipe.kind)


class Unwritten(Checkpoints):
    """What the first process writes."""

    def save(self, *_: Any, **__: Any) -> None:
        """Write nothing."""


def main() -> None:
    """Serve until stdin ends."""
    torch.set_num_threads(1)
    distributed.PATIENCE = PATIENCE
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        turn, heard = Turn.model_validate_json(line), Heard()
        newest = Path(turn.order.checkpoint) if turn.order.checkpoint else None
        try:
            module, _, result = run(turn, heard, Unwritten(Path(turn.order.scratch), heard.reporter, newest=newest))
            answer = {"digest": digest(module), "step": result.step, "ended_by": result.ended_by}
        except Exception as error:
            traceback.print_exc()
            answer = {"fault": str(error)}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
