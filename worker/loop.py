"""train(): the loop, top to bottom. Pretraining and fine-tuning share it; what differs lies in the objective.

Two promises hold it together. Everything random is a function of (seed, step), so a run that was killed and resumed
ends with the same bits. And no number is read back from the device within a step: losses gather in a window there and
are looked at every `plan.log_every` steps, which is also when a loss that was not finite is found.

Several processes may run it together (parts/distributed.py): each computes its share of every batch, gradients are
averaged, and whatever decides the way of the run is agreed on, so that all of them take the same way. The first one's
reporter and checkpoints are the run's.
"""

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from app.domain.errors import UserFault
from app.domain.spec import Optimizer, Training
from worker import evaluate, stopping
from worker.agreement import Agreement
from worker.checkpoint import Checkpoints
from worker.clock import Clock
from worker.data.order import draw_order, shown
from worker.data.shares import Share
from worker.data.source import Data, ahead
from worker.parts import compute, distributed, optim, schedule
from worker.parts.ema import Average
from worker.parts.memory import not_training
from worker.parts.optim import Optimizers
from worker.parts.seed import derive, generator, reseed
from worker.parts.tuning import Plan
from worker.parts.window import Window
from worker.recipe import Batch, Progress
from worker.report import Metrics, Outcome, Reporter, Wish
from worker.state import State, first_not_finite, pack, unpack
from worker.ticker import Ticker


@dataclass(frozen=True)
class Result:
    """How a run ended; the module holds the weights to keep."""

    outcome: Outcome
    ended_by: str  # epochs, early_stopping, collapse, max_seconds, or the wish
    step: int
    epoch: int
    metrics: dict[str, float | None]
    best: dict[str, Any] | None
    seconds: float  # of this attempt
    samples_per_second: float


def train(
    module: nn.Module, data: Data, training: Training, plan: Plan, device: torch.device, report: Reporter,
    checkpoints: Checkpoints, *, kind: str = "finetune",
) -> Result:  # fmt: skip
    """Train `module`, an objective (see recipe.py), until its epochs are over or something else ends it.

    Raises:
        UserFault: the loss is not finite, or early stopping looks at a metric that this run does not have.
    """
    stopping.refuse_blind(training, module, data, plan)
    objective = cast(Any, module)
    compute.settle(plan)
    compute.place(module, plan, device)
    distributed.synchronise_norms(module, device.type)
    named = objective.parameter_groups(training) if hasattr(module, "parameter_groups") else ()
    scale = getattr(module, "backbone_learning_rate_scale", 1.0)
    optimizer = optim.build(optim.groups(module, named, backbone_scale=scale), Optimizer.model_validate(plan.optimizer))
    decay = getattr(module, "ema_decay", None)
    average = Average(module, decay) if decay else None
    scaler = torch.amp.GradScaler(device.type, enabled=plan.precision == "float16")
    state, window, best_weights = State(), Window(plan.log_every), dict[str, Tensor]()

    saved = checkpoints.load()
    if saved is not None:
        state = unpack(saved, module, optimizer, average, scaler, window, best_weights)
        report.event("train.resumed", f"Going on after step {state.step} of {plan.steps}.", step=state.step)
    if plan.compile:
        for compiled in getattr(module, "compiled_parts", [objective.backbone]):
            compiled.compile(dynamic=False)  # each size for itself, whichever a resumed run happens to see first
    forward = distributed.parallel(module, idle_parameters=getattr(module, "idle_parameters", False))
    module.train()
    share = Share(data, plan, without_labels=hasattr(module, "labelled_part"))
    clock = Clock(plan, before=state.seconds or 0.0, start=state.step)
    agreement = Agreement(clock)
    wish: Wish = "run"

    def halted() -> bool:
        nonlocal wish
        late = training.max_seconds is not None and clock.used() >= training.max_seconds
        wish, late = agreement.before(state.step, report.wanted, late)
        if late:
            state.ended_by = state.ended_by or "max_seconds"
        return wish != "run" or state.ended_by is not None

    def save() -> None:
        _refuse_non_finite(window, state, data, module, training, plan, report)
        _refuse_damage(module, optimizer, state, training, plan)
        state.seconds = clock.used() if training.max_seconds is not None else None
        contents = pack(state, plan, module, optimizer, average, scaler, window, best_weights)
        best_step = state.best["step"] if state.best is not None else None
        with clock.saving():
            epoch = state.step // plan.steps_per_epoch
            checkpoints.save(contents, step=state.step, epoch=epoch, metrics=state.metrics, best_step=best_step)

    def ticker(phase: str) -> Ticker:
        return Ticker(report, phase, fraction=state.step / plan.steps)

    def tell(numbers: Mapping[str, float]) -> None:
        if not numbers:
            return
        finite = state.note(numbers)
        report.send(Metrics(rows=tuple((name, state.step, value) for name, value in finite.items())))

    spread: float | None = None
    numbers: dict[str, float] = {}  # of the last look
    while state.step < plan.steps and not halted():
        epoch, position = divmod(state.step, plan.steps_per_epoch)
        if position == 0 and hasattr(module, "before_epoch"):
            reseed(derive(training.seed, "epoch", epoch), device)
            features_of = evaluate.FeaturesOf(objective.backbone, data, plan, device, ticker("features"))
            with not_training():
                stale = objective.before_epoch(features_of, _progress(state.step, plan))
            optimizer.reset(stale or ())
            distributed.agree(module)
        order = draw_order(module, data.train.labels, plan, seed=training.seed, epoch=epoch)

        for rows, batch in ahead(data.train, _batches(order, plan, state.step, share), epoch, device=device):
            progress = _progress(state.step, plan)
            learning_rate, weight_decay = _rates(module, progress, training, plan)
            optimizer.schedule(learning_rate, weight_decay)

            # Dropout, and whatever a recipe draws: another draw for the other samples of another process.
            reseed(derive(training.seed, "step", state.step, *distributed.lane()), device)
            draws = generator(training.seed, "inputs", state.step, device=device)
            batch = shown(module, state.step, batch)
            for number, part in enumerate(_micro_batches(batch, len(rows), plan), start=1):
                ready = compute.laid_out(share.ready(part, device, draws), plan)
                with distributed.without_averaging(forward, when=number < plan.accumulate):
                    with compute.autocast(plan, device):
                        losses: dict[str, Tensor] = forward(ready, progress)
                    window.add(losses, share=1 / plan.accumulate)
                    scaler.scale(losses["loss"] / plan.accumulate).backward()
            if distributed.world_size() > 1:  # the hooks draw alike everywhere
                reseed(derive(training.seed, "hooks", state.step), device)
            if hasattr(module, "after_backward"):
                objective.after_backward(progress)
            if scaler.is_enabled():
                optimizer.unscale(scaler)
            if training.gradient_clip is not None:
                nn.utils.clip_grad_norm_(optimizer.parameters, training.gradient_clip)
            optimizer.step(scaler)
            optimizer.zero_grad()
            if hasattr(module, "after_step"):
                objective.after_step(progress)
            if average is not None:
                average.update()
            state.step += 1
            window.close_step()

            if state.step == clock.start + 1:
                report.event("train.first_step", f"Step {state.step} of {plan.steps} is done.", step=state.step)
            epoch_over = state.step % plan.steps_per_epoch == 0 or state.step == plan.steps
            if window.full or epoch_over:
                _refuse_non_finite(window, state, data, module, training, plan, report)
                tell({**window.means("train/"), "train/learning_rate": learning_rate})
                spread = window.last("spread")
                window.clear()
            if clock.should_show():
                report.send(clock.shown(state.step))
            if epoch_over:
                _refuse_damage(module, optimizer, state, training, plan)
                with average.in_place() if average is not None else contextlib.nullcontext():
                    numbers = _look(module, data, plan, device, epoch, ticker("validate"))
                    tell(numbers)
                    if stopping.judge(state, training, kind):
                        best_weights.update({key: value.clone() for key, value in module.state_dict().items()})
                stopping.report_collapse(module, spread, numbers, state, training, report)
            # The last one is written below, when everything about the end is known.
            if (
                state.step < plan.steps
                and state.ended_by is None
                and clock.should_save(training, state.step, epoch_over)
            ):
                save()
            # Not before an epoch's first step: what `before_epoch` made would be kept, and be made again on resuming.
            if state.step < plan.steps and halted():
                break

    if state.step == plan.steps:
        wish = "run"  # too late to wish for anything
    if wish == "cancel" or (wish == "stop" and state.step == 0):
        outcome: Outcome = "cancelled"
    elif wish in ("pause", "drain"):
        outcome = "paused" if wish == "pause" else "drained"
        if state.step > clock.start:
            save()
    else:
        outcome = "stopped" if wish == "stop" or state.ended_by == "collapse" else "succeeded"
        if wish == "run":
            state.ended_by = state.ended_by or "epochs"
        if state.step > clock.start:
            save()
        if average is not None:
            average.keep()
        if best_weights and (wish == "stop" or training.early_stopping is not None):
            module.load_state_dict(best_weights)
            # A fine-tune is measured in any case; here the last look may have been at these weights, probes included.
            probed = not plan.probe_every or any(name.startswith("probe/") for name in numbers)
            if kind == "pretrain" and not (probed and (state.best or {}).get("step") == state.step):
                state.note(_look(module, data, plan, device, plan.epochs - 1, ticker("validate")))
    distributed.separate_norms(module)
    report.send(clock.shown(state.step))
    return Result(
        outcome, state.ended_by or wish, state.step, state.step // plan.steps_per_epoch, state.metrics, state.best,
        clock.used() - clock.before, clock.rate(state.step),
    )  # fmt: skip


def _progress(step: int, plan: Plan) -> Progress:
    return Progress(step, plan.steps, step // plan.steps_per_epoch, plan.epochs)


def _rates(module: nn.Module, progress: Progress, training: Training, plan: Plan) -> tuple[float, float]:
    """Give the learning rate and the weight decay of a step."""
    scales = cast(Any, module).at_step(progress) if hasattr(module, "at_step") else {}
    # Half a step on, so that neither the first step of a warm-up nor the last of a decay is spent at zero.
    fraction = (progress.step + 0.5) / plan.steps
    rate = plan.learning_rate * schedule.scale(training.schedule, fraction, training.warmup_fraction)
    return rate * scales.get("learning_rate", 1.0), training.weight_decay * scales.get("weight_decay", 1.0)


def _batches(order: Tensor, plan: Plan, step: int, share: Share) -> Iterator[Tensor]:
    """Cut an epoch's order into batches of one size, from `step` on, and give this process's share of each.

    The rest comes in another epoch.
    """
    position = step % plan.steps_per_epoch
    for number in range(position, min(plan.steps_per_epoch, position + plan.steps - step)):
        yield share.rows(order[number * plan.batch_size : (number + 1) * plan.batch_size])


def _micro_batches(batch: Batch, size: int, plan: Plan) -> Iterator[Batch]:
    if plan.accumulate == 1:
        yield batch
        return
    # Slices, which are views: numbers of rows would have to reach the device first, and the host would wait for that.
    each = math.ceil(size / plan.accumulate)
    for start in range(0, size, each):
        yield {key: value[start : start + each] for key, value in batch.items()}


@not_training()
def _look(
    module: nn.Module, data: Data, plan: Plan, device: torch.device, epoch: int, tick: Ticker
) -> dict[str, float]:
    """Measure at the end of an epoch: the validation split, and now and then the features."""
    numbers: dict[str, float] = {}
    if data.validation is not None:
        found = evaluate.measure(evaluate.outputs(module, data.validation, data, plan, device, tick))
        numbers |= {f"validation/{name}": value for name, value in found.items()}
    due = plan.probe_every and ((epoch + 1) % plan.probe_every == 0 or epoch + 1 == plan.epochs)
    if due and data.probe is not None:
        found = evaluate.probe(module, data, plan, device, tick)
        numbers |= {f"probe/{name}": value for name, value in found.items()}
    return distributed.from_first(numbers)


def _refuse_non_finite(
    window: Window, state: State, data: Data, module: nn.Module, training: Training, plan: Plan, report: Reporter
) -> None:
    found = window.first_not_finite()
    if found is None:
        return
    step = state.step - len(window) + found  # from 0
    epoch, position = divmod(step, plan.steps_per_epoch)
    order = draw_order(module, data.train.labels, plan, seed=training.seed, epoch=epoch)
    rows = order[position * plan.batch_size : (position + 1) * plan.batch_size]
    samples = data.train.numbers(rows).tolist()
    report.event(
        "loss.not_finite", f"The loss was not finite at step {step + 1}.", level="error", step=step + 1, samples=samples
    )
    rate, _ = _rates(module, _progress(step, plan), training, plan)
    raise UserFault(
        f"The loss was not finite at step {step + 1} (learning rate {rate:.3g}); the batch held the samples "
        f"{', '.join(map(str, samples[:32]))}{', … (all in the event loss.not_finite)' if len(samples) > 32 else ''}.",
        code="loss_not_finite", hint=evaluate.CALMER, phase="train",
    )  # fmt: skip


def _refuse_damage(module: nn.Module, optimizer: Optimizers, state: State, training: Training, plan: Plan) -> None:
    """Refuse to keep or to measure what a step has spoilt whose loss, taken before it, was still finite."""
    found = first_not_finite(module, optimizer)
    if found is None:
        return
    rate, _ = _rates(module, _progress(state.step - 1, plan), training, plan)
    raise UserFault(
        f"The loss was finite, but {found} was not any more by step {state.step} (learning rate {rate:.3g}).",
        code="loss_not_finite", hint=evaluate.CALMER, phase="train",
    )  # fmt: skip
