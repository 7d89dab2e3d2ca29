"""Objectives for tests of the loop, twelve rows to train them on, and a run of them."""

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from app.domain.spec import Optimizer, Training
from tests.worker.sets import Heard
from worker import loop
from worker.checkpoint import Checkpoints
from worker.data.source import Data, Part, part
from worker.loop import Result
from worker.parts.seed import reseed
from worker.parts.tuning import Plan
from worker.recipe import Batch, Progress
from worker.report import Saved
from worker.trainer import assembly, training

CPU = torch.device("cpu")


class Rows:
    """Twelve fixed rows of two classes."""

    slow = False

    def __init__(self, count: int = 12) -> None:
        draws = torch.Generator().manual_seed(5)
        self.pixels = torch.randint(256, (count, 1, 4, 4), dtype=torch.uint8, generator=draws)
        self.labels = torch.arange(count) % 2

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, rows: Tensor, epoch: int = 0) -> Batch:
        """Give some of them."""
        return {"image": self.pixels[rows], "label": self.labels[rows], "index": self.numbers(rows)}

    def numbers(self, rows: Tensor) -> Tensor:
        """Number them from 100."""
        return rows + 100


def whole(rows: Rows) -> Part:
    """Take all rows as one part of the data."""
    return part(rows, torch.arange(len(rows)))


def data(rows: Rows, *, validation: Rows | None = None) -> Data:
    """Take rows as the data of a run, whose pixels are not normalised."""
    return Data(whole(rows), whole(validation) if validation else None, None, None, torch.zeros(1), torch.ones(1))


def plan(training: Training, samples: int = 12, **given: Any) -> Plan:
    """Plan such a run on one thread, in float32."""
    batch = int(training.batch_size) if training.batch_size != "auto" else 4
    per_epoch = samples // batch
    made = Plan(
        device="cpu", threads=1, precision="float32", memory_format="contiguous", float32_matmul="highest",
        compile=False, deterministic=True, batch_size=batch, accumulate=1, learning_rate=0.05,
        optimizer=Optimizer(name="adamw").model_dump(), epochs=training.epochs, steps_per_epoch=per_epoch,
        steps=per_epoch * training.epochs, samples=samples, image_size=4, channels=1, mean=(0.0,), std=(1.0,),
        cache="memory_map", log_every=2,
    )  # fmt: skip
    return made.model_copy(update=given)


class Small(nn.Module):
    """A linear classifier with dropout and a buffer that every step moves."""

    couples_batch = False
    ema_decay: float | None = None

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        reseed(seed)
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3))
        self.head = nn.Linear(8, 2)
        self.register_buffer("queue", torch.zeros(4))

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        logits = self.head(self.backbone(batch["image"]))
        assert isinstance(self.queue, Tensor)
        self.queue.copy_(torch.cat([self.queue[1:], logits.detach().mean()[None]]))
        loss = nn.functional.cross_entropy(logits, batch["label"])
        return {"loss": loss + 0.01 * logits.mean() * self.queue.mean(), "spread": logits.std()}

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        return {"logits": self.head(self.backbone(batch["image"]))}


class Recording(nn.Module):
    """An objective with every optional member, which writes down when it is called."""

    couples_batch = True

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.backbone = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        self.linear.weight.register_hook(lambda _: self.calls.append("backward"))
        self.linear.weight.register_post_accumulate_grad_hook(lambda _: self.calls.append("gradient"))

    @property
    def linear(self) -> nn.Linear:
        return cast(nn.Linear, self.backbone[1])

    def parameter_groups(self, training: Training) -> list[dict[str, Any]]:
        self.calls.append("parameter_groups")
        return [{"names": ["backbone"], "lr_scale": 1.0}]

    def sample_weights(self, labels: Tensor) -> Tensor | None:
        self.calls.append("sample_weights")
        return None

    def before_epoch(self, features_of: Any, progress: Progress) -> list[nn.Parameter]:
        self.calls.append(f"before_epoch {progress.epoch} {tuple(features_of().shape)}")
        return [cast(nn.Parameter, self.linear.weight)]

    def at_step(self, progress: Progress) -> dict[str, float]:
        self.calls.append(f"at_step {progress.step}")
        return {"learning_rate": 0.5, "weight_decay": 0.0}

    def forward(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        self.calls.append(f"forward {progress.step} {len(batch['image'])}")
        return {"loss": self.backbone(batch["image"]).square().mean()}

    def after_backward(self, progress: Progress) -> None:
        self.calls.append("after_backward")
        self.weight_before = self.linear.weight.clone()

    def after_step(self, progress: Progress) -> None:
        moved = not torch.equal(self.weight_before, self.linear.weight)
        self.calls.append(f"after_step {moved}")

    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        assert not self.training
        self.calls.append("evaluate")
        return {"loss": self.backbone(batch["image"]).square().mean(1)}


def train(
    module: nn.Module, training: Training, folder: Path, *, heard: Heard | None = None, newest: Path | None = None,
    made: Plan | None = None, with_data: Data | None = None, kind: str = "finetune",
) -> tuple[Result, Heard]:  # fmt: skip
    """Train; give how it ended and what was heard."""
    heard = heard or Heard()
    checkpoints = Checkpoints(folder, heard.reporter, newest=newest)
    given = with_data or data(Rows(), validation=Rows(6))
    result = loop.train(
        module, given, training, made or plan(training), CPU, heard.reporter, checkpoints, kind=kind
    )  # fmt: skip
    return result, heard


def same(one: nn.Module, other: nn.Module) -> bool:
    """Say whether two modules hold the same bits."""
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


def keep_all(heard: Heard, folder: Path) -> None:
    """Keep a copy of every checkpoint, which the run itself would remove."""
    folder.mkdir()
    send = heard.reporter.send

    def copying(message: Any) -> None:
        if isinstance(message, Saved):
            (folder / f"kept-{message.step}.safetensors").write_bytes((folder / message.file).read_bytes())
        send(message)

    heard.reporter.send = copying  # type: ignore[method-assign]


class Hungry:
    """Make an objective run out of memory above some batch size, like a GPU does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
        self.sizes: list[int] = []
        self.most = most
        real = assembly.assemble

        def assemble(*given: Any, **named: Any) -> Any:
            made = real(*given, **named)
            forward = made.objective.forward

            def limited(batch: Any, progress: Any) -> Any:
                size = len(batch["label"])
                if size > self.most:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
                self.sizes.append(size)
                return forward(batch, progress)

            made.objective.forward = limited
            return made

        monkeypatch.setattr(training, "assemble", assemble)
