"""Which pretraining method suits these pictures? Successive halving over methods, by the health of their features.

Every round, each method that is left trains for the same number of optimiser steps, and the best part of them goes on
(Jamieson and Talwalkar, arXiv 1502.07943, algorithm 1, with a factor of `eta`): from the model of the round before, not
from the start, so a round only adds what is missing to its budget. Projection heads and optimiser state begin anew with
each round, for all alike. A collapsed representation is out whatever else it shows. The last one left goes on with the
job's own `training`. The budget is in steps: methods differ in what a step costs, so the table also gives seconds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from pydantic import Field

from app.domain.errors import UserFault
from app.domain.inner_jobs import Part
from app.domain.spec import Architecture
from worker.parts import metrics
from worker.recipe import Child, Facts, Gathered, Params, Recipe, Requires

Score = Literal["knn_accuracy", "linear_accuracy", "effective_rank"]
_OF_METHOD = Part(named_by="recipe", called_by="name", kinds=("pretrain",))


class Method(Params):
    """One competitor."""

    recipe: str = Field(description="A pretraining recipe.")
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$")] | None = Field(
        default=None, description="What it is called in the table; null is the recipe's name."
    )
    params: dict[str, Any] = Field(
        default={}, description="`params` of the recipe.", json_schema_extra=_OF_METHOD.keyword()
    )
    training: dict[str, Any] = Field(
        default={}, description="Laid over the job's `training`, for this method.",
        json_schema_extra=_OF_METHOD.model_copy(update={"part": "training"}).keyword(),
    )  # fmt: skip

    @property
    def label(self) -> str:
        """Its name in keys and tables."""
        return self.name or self.recipe


class MethodRaceParams(Params):
    """Who takes part, and how long a round is."""

    methods: Annotated[tuple[Method, ...], Field(min_length=2, max_length=32)] | None = Field(
        default=None, description="null: every pretraining recipe that takes this network and data."
    )
    steps: int = Field(default=200, ge=1, le=1_000_000, description="Optimiser steps of every method in round one.")
    eta: int = Field(
        default=3, ge=2, le=10, description="One in `eta` goes on to the next round, which is `eta` times as long."
    )
    score: Score | None = Field(
        default=None, description="What decides; null: k-NN accuracy where there are labels, else the effective rank."
    )


@dataclass(frozen=True)
class Entry:
    """What became of one method in one round."""

    method: Method
    child: Child
    out: str | None  # why it cannot go on, whatever the others did

    @property
    def probes(self) -> dict[str, float]:
        """The health of its features."""
        found = {name.removeprefix("probe/"): value for name, value in self.child.metrics.items()}
        return {name: value for name, value in found.items() if value is not None and f"probe/{name}" in _PROBES}


_PROBES = ("probe/knn_accuracy", "probe/linear_accuracy", "probe/effective_rank", "probe/feature_spread")


@dataclass(frozen=True)
class Race:
    """A race as far as it has come."""

    wanted: list[dict[str, Any]] = field(default_factory=list)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    last: Entry | None = None  # the last one left, after its last round
    best: Entry | None = None  # of the newest round that somebody came through


def run(params: MethodRaceParams, facts: Facts, finished: Mapping[str, Child]) -> Race:
    """Follow the race from its beginning as far as the finished children go."""
    race, alive = Race(), _methods(params, facts)
    models: dict[str, Any] = {method.label: _start(facts) for method in alive}
    done, number = 0, 0
    while True:
        budget = params.steps * params.eta**number
        bodies = {
            method.label: _body(
                f"round{number + 1}-{method.label}", method, models[method.label], facts,
                {"steps": budget - done, "seed": facts.spec.training.seed + number},
            )
            for method in alive
        }  # fmt: skip
        race.wanted.extend(bodies.values())
        children = {label: finished.get(body["child_key"]) for label, body in bodies.items()}
        if any(child is None for child in children.values()):
            return race
        entries = [_entry(method, child) for method in alive if (child := children[method.label]) is not None]
        score, ranked = _ranked([entry for entry in entries if entry.out is None], params.score)
        kept = ranked[: max(1, len(alive) // params.eta)]
        race.rounds.append(_table(number + 1, budget, score, entries, ranked, kept))
        if not kept:
            return race
        race = replace(race, best=kept[0])
        if len(kept) == 1:
            last = kept[0]
            race.wanted.append(_body(f"winner-{last.method.label}", last.method, last.child.model, facts, {}))
            return replace(race, last=last)
        alive = [entry.method for entry in kept]
        models |= {entry.method.label: entry.child.model for entry in kept}
        done, number = budget, number + 1


def plan(params: MethodRaceParams, facts: Facts, finished: Sequence[Child]) -> list[dict[str, Any]]:
    """The rounds so far, and the next one as soon as it is known who takes part."""
    return run(params, facts, {child.key: child for child in finished}).wanted


def gather(params: MethodRaceParams, facts: Facts, children: Sequence[Child]) -> Gathered:
    """Give a table per round with reasons, and the model of the winner.

    Raises:
        UserFault: nobody came through.
    """
    by_key = {child.key: child for child in children}
    race = run(params, facts, by_key)
    chosen = race.last or (race.best if facts.stopping else None)
    if chosen is None:
        rows = race.rounds[-1]["methods"] if race.rounds else []
        why = "; ".join(f"{row['method']}: {row['reason']}" for row in rows) or "it was stopped before its end."
        raise UserFault(
            f"No method came through round {max(len(race.rounds), 1)}: {why}", code="child_failed", phase="gather"
        )
    label = chosen.method.label
    final = by_key.get(f"winner-{label}") if race.last is not None else None
    fully = final is not None and final.ended_well and final.model is not None
    child = final if fully and final is not None else chosen.child
    last = _entry(chosen.method, child)
    said = f"{label} {'led' if race.last is None else 'won'} over {len(race.rounds[0]['methods']) - 1} others in "
    said += f"{len(race.rounds)} round{'s' if len(race.rounds) > 1 else ''}"
    if fully:
        said += "."
    elif final is None:
        said += " when the race was stopped."
    else:
        said += f", but its last training failed: {final.why} Its model of the last round is given."
    return Gathered(
        {
            "sentence": said, "rounds": race.rounds,
            "winner": {
                "method": label, "recipe": chosen.method.recipe, "model": child.model, "job": child.job,
                "trained_fully": fully, **last.probes,
            },
            "failed": {child.key: child.why for child in children if not child.ended_well},
        },
        {f"winner/{name}": value for name, value in last.probes.items()}, model=child.model,
    )  # fmt: skip


def _methods(params: MethodRaceParams, facts: Facts) -> list[Method]:
    if params.methods is None:
        found = [Method(recipe=name) for name, recipe in sorted(facts.recipes.items()) if _fits(recipe, facts)]
    else:
        found = list(params.methods)
    labels = [method.label for method in found]
    for label in labels:
        if labels.count(label) > 1:
            raise UserFault(
                f"params.methods: two methods are called {label!r}; give one of them another `name`.", phase="plan"
            )
    for method in found:
        known = facts.recipes.get(method.recipe)
        if known is not None and known.kind != "pretrain":
            raise UserFault(
                f"params.methods: {method.recipe} is a {known.kind} recipe; only pretraining methods race.",
                phase="plan",
            )
    if len(found) < 2:
        raise UserFault("params.methods: only one pretraining recipe takes this network; name two.", phase="plan")
    return found


def _fits(recipe: Recipe, facts: Facts) -> bool:
    needs, samples = recipe.requires, facts.dataset.splits.get("train", 0) if facts.dataset is not None else 0
    family = needs.architectures is None or facts.family in needs.architectures
    return recipe.kind == "pretrain" and family and samples >= max(needs.min_samples, needs.min_batch)


def _start(facts: Facts) -> Any:
    if facts.model is not None:
        return facts.model
    if isinstance(facts.spec.model, Architecture):
        return facts.spec.model.model_dump(mode="json")
    raise UserFault("model: give a network to start from, or a model `mdl_…` to go on with.", phase="plan")


def _body(key: str, method: Method, model: Any, facts: Facts, budget: dict[str, Any]) -> dict[str, Any]:
    """Give a job of one method: within a budget, or without one as long as the race's own `training` says."""
    training = {**facts.spec.training.model_dump(mode="json", exclude_defaults=True), **method.training}
    if budget:
        training |= {"early_stopping": None, "max_seconds": None, **budget}
    return {
        "child_key": key, "recipe": method.recipe, "model": model, "params": method.params, "training": training,
    }  # fmt: skip


def _entry(method: Method, child: Child) -> Entry:
    out = None
    probes = Entry(method, child, None).probes
    if not child.ended_well or child.model is None:
        out = child.why
    elif "effective_rank" not in probes or "feature_spread" not in probes:
        out = "its features were not measured"
    elif metrics.collapsed(probes):
        out = f"collapsed: effective rank {probes['effective_rank']:.2f}, feature spread {probes['feature_spread']:.3f}"
    return Entry(method, child, out)


def _ranked(living: Sequence[Entry], score: Score | None) -> tuple[str, list[Entry]]:
    """Sort the methods that may go on, best first; a tie is decided by the spread of the features."""
    by = score or "knn_accuracy"
    if not all(by in entry.probes for entry in living):
        if score is not None:
            raise UserFault(f"params.score: there is no {score} without labels; use effective_rank.", phase="plan")
        by = "effective_rank"
    return by, sorted(living, key=lambda entry: (entry.probes[by], entry.probes["feature_spread"]), reverse=True)


def _table(
    number: int, budget: int, score: str, entries: Sequence[Entry], ranked: Sequence[Entry], kept: Sequence[Entry]
) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    for entry in [*ranked, *(entry for entry in entries if entry.out is not None)]:
        if entry.out is not None:
            reason = entry.out
        else:
            place = next(place for place, one in enumerate(ranked, start=1) if one is entry)
            reason = f"{score} {entry.probes[score]:.3f}, place {place} of {len(entries)}"
        rows.append({
            "method": entry.method.label, "recipe": entry.method.recipe, "job": entry.child.job,
            "model": entry.child.model, "goes_on": entry in kept, "reason": reason, **entry.probes,
            "seconds": (entry.child.result or {}).get("seconds"),
        })  # fmt: skip
    return {"round": number, "steps": budget, "score": score, "methods": rows}


RECIPE = Recipe(
    name="method_race",
    kind="apply",
    version="1",
    summary="Try several pretraining methods, halve the field by the health of their features, train the winner fully.",
    tasks=("image_classification", "unlabelled_images"),
    Params=MethodRaceParams,
    requires=Requires(where={"score": {name: {"labels": True} for name in ("knn_accuracy", "linear_accuracy")}}),
    plan=plan,
    gather=gather,
    gives_model=True,
)
