"""No step waits for its device: nothing is read from it, and what it needs of the host it fetches by itself.

On a CPU there is nothing to wait for, so what would wait on a GPU is counted; where there is a GPU, torch refuses.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from app.domain.datasets import DatasetFacts
from app.domain.spec import Training
from tests.worker import sets
from tests.worker.objectives import CPU, Rows, plan, whole
from tests.worker.sets import Heard
from worker import catalogue, loop
from worker.checkpoint import Checkpoints
from worker.data.images import Images
from worker.data.policy import on_host
from worker.data.source import Data, ahead, in_order, part
from worker.finetune.image_classification import ClassificationParams, Classifier, inputs
from worker.parts import backbones, optim
from worker.parts.window import Window
from worker.recipe import Info, Progress
from worker.trainer.assembly import assemble

pytestmark = pytest.mark.worker
SIZE, ROWS, BATCH = 16, 96, 16
META = torch.device("meta")
RECIPES, SEMI, NETWORK = catalogue.recipes(), "semi_supervised", {"architecture": "small_cnn", "width": 0.25}

# What needs a number from the device, or a number made on the host, before the host can go on.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive",
    "lift_fresh",
}  # fmt: skip


class Operations(TorchDispatchMode):
    """Writes down the operations that would make the host wait, and every copy from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = 0
        self.waiting: list[str] = []
        self.copies: list[bool] = []  # whether nobody waits for it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        name, given = func.overloadpacket.__name__, dict(kwargs or {})
        by_mask = name.startswith("index") and any(
            isinstance(each, Tensor) and each.dtype == torch.bool
            for argument in args[1:] if isinstance(argument, list | tuple) for each in argument
        )  # fmt: skip
        if name in WAITING or by_mask:
            self.waiting.append(name)
        to = given.get("device")
        if name == "_to_copy" and to is not None and torch.device(to).type != args[0].device.type:
            self.copies.append(bool(given.get("non_blocking")))
        return func(*args, **given)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Look, at what is not dispatched as well."""

        def noting(name: str) -> Callable[..., Any]:
            real = getattr(Tensor, name)

            def call(tensor: Tensor, *args: Any, **given: Any) -> Any:
                self.waiting.append(name)
                return real(tensor, *args, **given)

            return call

        with pytest.MonkeyPatch.context() as patch, self:
            for name in ("tolist", "cpu", "item"):  # `numpy` of a tensor on a device is an error
                patch.setattr(Tensor, name, noting(name))
            yield


class Watched(Classifier):
    """A classifier that is watched from the second step of a run to the end of its last one."""

    watch: Callable[[], AbstractContextManager[None]]
    stack: ExitStack

    def at_step(self, progress: Progress) -> dict[str, float]:
        if progress.step == 1:
            self.stack.enter_context(self.watch())
        return {}

    def after_step(self, progress: Progress) -> None:
        if progress.step + 1 == progress.steps:
            self.stack.close()


PARAMS: dict[str, dict[str, Any]] = {
    "light": {"augmentation": "light", "mirror": "alternating"},
    "standard": {"augmentation": "standard", "vertical_flip": 0.5},
    "strong": {"augmentation": "strong"},
    "randaugment": {"augmentation": "strong", "rand_augment": {"operations": 3, "spread": 2.0}},
    "mixup and cutmix": {"augmentation": "light", "mixup": 0.3, "cutmix": 1.0},
    "weighted": {"augmentation": "none", "class_balance": "weighted", "label_smoothing": 0.1, "ema": 0.9},
}


def images(channels: int = 3) -> Images:
    draws = torch.Generator().manual_seed(2)
    pixels = torch.randint(256, (ROWS, channels, SIZE, SIZE), dtype=torch.uint8, generator=draws)
    return Images(pixels, torch.arange(ROWS) % 5, 0, (0.5,) * channels, (0.2,) * channels, "key")


def run(
    given: dict[str, Any], source: Images, device: torch.device, watch: Callable[[], AbstractContextManager[None]],
    folder: Path, *, accumulate: int = 1,
) -> None:  # fmt: skip
    """Train for six steps of an epoch that reports once, at its end."""
    channels = len(source.mean)
    backbone = backbones.build_backbone(
        {"architecture": "small_cnn", "width": 0.125, "image_size": SIZE}, channels=channels, image_size=SIZE, seed=0
    )
    params = ClassificationParams.model_validate(given)
    info = Info(
        task="image_classification", classes=tuple("abcde"), samples=ROWS, channels=channels, image_size=SIZE,
        feature_dimension=int(cast(Any, backbone.dimension)), architecture={}, class_counts=(20, 19, 19, 19, 19),
    )  # fmt: skip
    module = Watched(params, backbone, info)
    module.watch, module.stack = watch, ExitStack()
    training = Training(epochs=1, batch_size=BATCH, checkpoint_every=1000, gradient_clip=1.0)
    made = plan(
        training, ROWS, device=device.type, deterministic=False, log_every=1000, image_size=SIZE, accumulate=accumulate
    )
    heard = Heard()
    rows = part(source, torch.arange(ROWS))
    data = Data(rows, None, None, inputs(params, info), torch.tensor(source.mean), torch.tensor(source.std))
    with module.stack:  # whatever happens
        result = loop.train(module, data, training, made, device, heard.reporter, Checkpoints(folder, heard.reporter))
    assert result.step == 6


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("given", PARAMS.values(), ids=PARAMS)
def test_a_step_reads_nothing_from_the_device_and_makes_nothing_for_it(
    given: dict[str, Any], channels: int, tmp_path: Path
) -> None:
    seen = Operations()
    run(given, images(channels), CPU, seen.counted, tmp_path)
    assert seen.waiting == []


@pytest.mark.parametrize("recipe", [*sorted(name for name, each in RECIPES.items() if each.kind == "pretrain"), SEMI])
def test_no_step_of_a_method_reads_anything_from_the_device(
    recipe: str, digits: DatasetFacts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the second step to the last but one, where all that is told at an epoch's end is still to come."""
    network = {"architecture": "small_vit", "width": 24, "depth": 2, "heads": 3} if recipe == "mae" else NETWORK
    body = sets.spec(recipe, model=network, training={"epochs": 1, "batch_size": 20})
    made = assemble(sets.order(body, digits, tmp_path), sets.Heard().reporter)
    made_plan = made.plan.model_copy(update={"log_every": 1000, "deterministic": False})
    seen, stack, steps = Operations(), ExitStack(), list[int]()
    schedule, close_step = optim.Optimizers.schedule, Window.close_step

    def begins(*given: Any) -> None:
        steps.append(len(steps))
        if len(steps) == 2:
            stack.enter_context(seen.counted())
        schedule(*given)

    def ends(window: Window) -> None:
        close_step(window)
        if len(steps) == made_plan.steps - 1:
            stack.close()

    monkeypatch.setattr(optim.Optimizers, "schedule", begins)
    monkeypatch.setattr(Window, "close_step", ends)
    heard = Heard()
    with stack:
        loop.train(
            made.objective, made.data, made.spec.training, made_plan, CPU, heard.reporter,
            Checkpoints(tmp_path, heard.reporter), kind=made.recipe.kind,
        )  # fmt: skip
    assert len(steps) == made_plan.steps >= 6
    assert seen.operations > 100
    assert seen.waiting == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("given", PARAMS.values(), ids=PARAMS)
def test_on_a_gpu_torch_sees_no_step_that_waits(
    given: dict[str, Any], resident: bool, accumulate: int, tmp_path: Path
) -> None:
    @contextmanager
    def refused() -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    cuda = torch.device("cuda", 0)
    run(given, images().on(cuda) if resident else images(), cuda, refused, tmp_path, accumulate=accumulate)


def test_micro_batches_are_views_which_wait_for_nothing() -> None:
    batch = {"image": torch.rand(7, 2), "label": torch.arange(7)}
    made = plan(Training(batch_size=7), 7, accumulate=3)
    parts = list(loop._micro_batches(batch, 7, made))
    assert [each["label"].tolist() for each in parts] == [[0, 1, 2], [3, 4, 5], [6]]
    for each in parts:
        assert each["image"].untyped_storage().data_ptr() == batch["image"].untyped_storage().data_ptr()


def test_what_a_batch_needs_of_the_host_is_not_waited_for_and_constants_lie_there_already() -> None:
    source = images().on(META)
    data = Data(part(source, torch.arange(ROWS)), None, None, None, torch.tensor(source.mean), torch.tensor(source.std))
    rows = torch.arange(BATCH)
    data.ready(data.train.batch(rows), META)
    with Operations() as seen:
        ready = data.ready(data.train.batch(rows), META)
    assert {value.device for value in ready.values()} == {META}
    assert seen.copies == [True] * 4, "the rows to read, their labels, numbers and epoch, and no mean and deviation"


def test_what_is_read_ahead_for_a_gpu_is_pinned_by_the_thread_that_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[str] = []

    def pin(self: Tensor) -> Tensor:
        pinned.append(threading.current_thread().name)
        return self

    class Slow(Rows):
        slow = True

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    source = whole(Slow())
    read = list(ahead(source, in_order(source, 4), device=torch.device("cuda")))
    assert [rows.tolist() for rows, _ in read] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert len(pinned) == 3 * 3
    assert all(name.startswith("read-ahead") for name in pinned)
    pinned.clear()
    list(ahead(source, in_order(source, 4), device=CPU))
    assert pinned == []


class OfDevice:
    """A generator of a GPU, as far as `on_host` asks."""

    device = torch.device("cuda", 0)

    def __init__(self, seed: int, drawn: int) -> None:
        self.seed, self.drawn = seed, drawn

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        return self.drawn


def test_what_decides_on_the_host_is_drawn_there_as_a_function_of_seed_and_place() -> None:
    draws = torch.Generator().manual_seed(3)
    assert on_host(draws) is draws, "on a CPU the bits stay what they were"

    def drawn(seed: int, place: int) -> list[int]:
        made = on_host(cast(Any, OfDevice(seed, place)))
        assert made.device == CPU
        return torch.randint(1000, (8,), generator=made).tolist()

    assert drawn(3, 4) == drawn(3, 4)
    assert len({tuple(drawn(*each)) for each in ((3, 4), (4, 4), (3, 8))}) == 3
