"""Does pretraining pay? The cells, the table and the sentence as pure functions; then one real run on digits."""

import statistics
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.domain.datasets import DatasetFacts
from app.domain.errors import DataFault, UserFault
from app.domain.models import ModelConfig
from app.domain.spec import Spec
from tests.worker import sets
from worker import catalogue
from worker.apply import label_efficiency
from worker.apply.label_efficiency import LabelEfficiencyParams
from worker.parts import chart
from worker.recipe import Child, Facts
from worker.report import Finished
from worker.trainer import alone, local, process

pytestmark = pytest.mark.worker
MODEL = f"mdl_{'7' * 26}"
CONFIG = ModelConfig(
    architecture={"architecture": "small_cnn", "width": 0.125, "weights": None}, task="image_classification",
    image_size=8, channels=1, mean=(0.3,), std=(0.4,),
)  # fmt: skip
DIGITS = DatasetFacts(
    id="ds_1", sha256="", task="image_classification", classes=tuple("0123456789"), splits={"train": 100, "test": 50},
    features={}, labelled={"train": 100, "test": 50}, image_sizes={}, channels=1, shards=(),
)  # fmt: skip


def facts(*, dataset: DatasetFacts = DIGITS, model: str | None = MODEL, **spec: Any) -> Facts:
    body = catalogue.merge(label_efficiency.RECIPE.defaults, {"recipe": "label_efficiency", **spec})
    config = CONFIG if model else None
    return Facts(Spec.model_validate(body), dataset, model, config, "convolutional", catalogue.recipes())


def child(body: dict[str, Any], accuracy: float | None, **given: Any) -> Child:
    well = accuracy is not None
    return Child(**{
        "key": body["child_key"], "job": "job_1", "status": "succeeded" if well else "failed", "spec": body,
        "result": {}, "metrics": {"test/accuracy": accuracy} if well else {}, "best": None, "model": None,
        "error": None if well else {"message": "It diverged."},
    } | given)  # fmt: skip


def gathered(accuracies: dict[str, float | None], **params: Any) -> dict[str, Any]:
    """Gather cells whose accuracy is given by key."""
    chosen = LabelEfficiencyParams(**params)
    bodies = label_efficiency.plan(chosen, facts(), ())
    children = [child(body, accuracies[body["child_key"]]) for body in bodies if body["child_key"] in accuracies]
    return label_efficiency.gather(chosen, facts(), children).result


def test_every_cell_is_a_job_with_the_same_budget_and_both_starts_see_the_same_labels() -> None:
    params = LabelEfficiencyParams(fractions=(0.1, 0.01), seeds=2, finetune={"trainable": "last:1"})
    bodies = label_efficiency.plan(params, facts(training={"seed": 5, "steps": 70, "learning_rate": 0.01}), ())
    assert [body["child_key"] for body in bodies] == [
        "random-1pc-0", "model-1pc-0", "random-10pc-0", "model-10pc-0", "random-1pc-1", "model-1pc-1", "random-10pc-1",
        "model-10pc-1",
    ]  # fmt: skip
    for random, model in zip(bodies[::2], bodies[1::2], strict=True):
        assert random["model"] == {**CONFIG.architecture, "image_size": 8, "weights": None}
        assert model["model"] == MODEL
        same = {key: random[key] for key in ("recipe", "params", "training", "data")}
        assert same == {key: model[key] for key in same}
    assert {body["training"]["steps"] for body in bodies} == {70}
    assert {body["training"]["seed"] for body in bodies} == {5, 6}
    assert bodies[0]["data"] == {"label_fraction": 0.01, "validation_fraction": 0.1}
    assert label_efficiency.plan(params, facts(), [child(body, 0.5) for body in bodies])[0]["child_key"] == (
        "random-1pc-0"
    ), "what is there already is named again, and not made again"


def test_labels_per_class_take_the_place_of_fractions() -> None:
    params = LabelEfficiencyParams(labels_per_class=(5, 1), seeds=1)
    bodies = label_efficiency.plan(params, facts(), ())
    assert [body["child_key"] for body in bodies] == [
        "random-1each-0",
        "model-1each-0",
        "random-5each-0",
        "model-5each-0",
    ]
    assert bodies[2]["data"]["labels_per_class"] == 5


def test_published_weights_are_a_given_model_too() -> None:
    start = {"architecture": "resnet18", "weights": "IMAGENET1K_V1"}
    bodies = label_efficiency.plan(LabelEfficiencyParams(seeds=1), Facts(
        Spec.model_validate({"recipe": "label_efficiency", "model": start}), DIGITS, None, None, "convolutional",
        catalogue.recipes()), ())  # fmt: skip
    assert [(body["model"]["architecture"], body["model"]["weights"]) for body in bodies[:2]] == [
        ("resnet18", None), ("resnet18", "IMAGENET1K_V1"),
    ]  # fmt: skip


def test_linear_heads_are_one_job_for_each_start() -> None:
    params = LabelEfficiencyParams(fractions=(0.1, 1.0), seeds=3, finetune={"trainable": "head"})
    given_ = facts(training={"learning_rate": 0.02, "batch_size": 64, "steps": 300})
    bodies = label_efficiency.plan(params, given_, ())
    assert [(body["child_key"], body["recipe"]) for body in bodies] == [
        ("random-heads", "linear_heads"), ("model-heads", "linear_heads"),
    ]  # fmt: skip
    assert bodies[0]["params"] == bodies[1]["params"]
    assert catalogue.recipe("linear_heads").Params.model_validate(bodies[0]["params"]).model_dump() == {
        "fractions": (0.1, 1.0), "labels_per_class": None, "seeds": 3, "steps": 300, "batch_size": 64,
        "learning_rates": (0.02,), "weight_decay": 0.05, "validation_fraction": 0.1,
    }  # fmt: skip
    rows = {
        start: [{"label_fraction": amount, "seed": seed, "test/accuracy": base + amount / 10 + seed / 100}
                for amount in (0.1, 1.0) for seed in range(3)]
        for start, base in (("random", 0.3), ("model", 0.6))
    }  # fmt: skip
    children = [child(body, 0.0, result={"rows": rows[body["child_key"].removesuffix("-heads")]}) for body in bodies]
    result = label_efficiency.gather(params, given_, children).result
    assert [(row["start"], row["n"]) for row in result["rows"]] == [("random", 3), ("model", 3)] * 2
    assert [gain["mean"] for gain in result["gains"]] == pytest.approx([0.3, 0.3])
    assert result["budget"] == {"steps": 300}
    by_epochs = facts(training={"steps": None, "epochs": 7})
    planned = label_efficiency.plan(params, by_epochs, ())[0]["params"]["steps"]
    assert label_efficiency.gather(params, by_epochs, children).result["budget"] == {"steps": planned}
    more = LabelEfficiencyParams(finetune={"trainable": "head", "augmentation": "light"})
    assert len(label_efficiency.plan(more, given_, ())) == 18, "what more is asked of fine-tuning needs fine-tuning"


@pytest.mark.parametrize(
    ("fault", "says", "given_"),
    [
        (UserFault, "give the pretrained model", {"model": None}),
        (UserFault, "training.early_stopping", {"training": {"early_stopping": {"patience": 3}}}),
        (UserFault, "training.max_seconds", {"training": {"max_seconds": 5}}),
        (UserFault, "params.fractions", {"data": {"label_fraction": 0.5}}),
        (UserFault, "params.fractions", {"data": {"labels_per_class": 5}}),
        (DataFault, "test split", {"dataset": DIGITS.model_copy(update={"labelled": {"train": 100}})}),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    fault: type[Exception], says: str, given_: dict[str, Any]
) -> None:
    with pytest.raises(fault, match=says):
        label_efficiency.plan(LabelEfficiencyParams(), facts(**given_), ())


def test_a_gain_is_the_mean_of_paired_differences() -> None:
    result = gathered(
        {"random-1pc-0": 0.30, "model-1pc-0": 0.42, "random-1pc-1": 0.50, "model-1pc-1": 0.60, "random-1pc-2": 0.40,
         "model-1pc-2": 0.54}, fractions=(0.01,),
    )  # fmt: skip
    (gain,) = result["gains"]
    assert gain["values"] == pytest.approx([0.12, 0.10, 0.14])
    assert gain["spread"] == pytest.approx(0.02), "far below the spread of either start, 0.1"
    assert [row["spread"] for row in result["rows"]] == pytest.approx([0.1, 0.0916515], rel=1e-5)
    assert result["sentence"] == "With 1 % of the labels, pretraining gains 12.0 ± 2.0 points (3 seeds)."


@pytest.mark.parametrize(
    ("gains", "says"),
    [
        ([0.123, 0.134, 0.112], "pretraining gains 12.3 ± 1.1 points (3 seeds)"),
        ([-0.05, -0.03], "pretraining costs 4.0 ± 1.4 points (2 seeds)"),
        ([0.10, -0.08, 0.01], "pretraining makes no clear difference (+1.0 ± 9.0 points, 3 seeds)"),
        ([-0.02, 0.01], "pretraining makes no clear difference (-0.5 ± 2.1 points, 2 seeds)"),
        ([0.0, 0.0], "pretraining makes no clear difference (+0.0 ± 0.0 points, 2 seeds)"),
        ([0.07], "pretraining gains 7.0 points in the only pair of runs"),
    ],
)
def test_the_sentence_is_honest(gains: list[float], says: str) -> None:
    cells = {f"random-10pc-{seed}": 0.5 for seed in range(len(gains))}
    cells |= {f"model-10pc-{seed}": 0.5 + gain for seed, gain in enumerate(gains)}
    result = gathered(dict(cells), fractions=(0.1,), seeds=len(gains))
    assert result["sentence"] == f"With 10 % of the labels, {says}."


def test_one_sentence_speaks_of_every_budget() -> None:
    cells: dict[str, float | None] = {}
    for seed in range(3):
        cells |= {f"random-1each-{seed}": 0.3, f"model-1each-{seed}": 0.4 + seed / 100,
                  f"random-50each-{seed}": 0.9, f"model-50each-{seed}": 0.9 + (seed - 1) / 100}  # fmt: skip
    assert gathered(cells, labels_per_class=(50, 1))["sentence"] == (
        "With 1 label per class, pretraining gains 11.0 ± 1.0 points (3 seeds); with 50 labels per class, pretraining "
        "makes no clear difference (+0.0 ± 1.0 points, 3 seeds)."
    )


def test_a_failed_cell_leaves_its_pair_out_and_is_named() -> None:
    cells: dict[str, float | None] = {"random-10pc-0": 0.3, "model-10pc-0": 0.5, "random-10pc-1": None,
                                      "model-10pc-1": 0.6}  # fmt: skip
    result = gathered(cells, fractions=(0.1,), seeds=2)
    assert result["failed"] == {"random-10pc-1": "It diverged."}
    assert [(row["start"], row["n"]) for row in result["rows"]] == [("random", 1), ("model", 2)]
    assert (result["gains"][0]["n"], result["gains"][0]["verdict"]) == (1, "one run")
    with pytest.raises(UserFault, match=r"random-10pc-0: It diverged\."):
        gathered({"random-10pc-0": None, "model-10pc-0": 0.5}, fractions=(0.1,), seeds=1)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=6))
def test_a_verdict_never_says_more_than_the_spread_allows(gains: list[float]) -> None:
    said = label_efficiency.verdict(gains)
    assert (said == "one run") == (len(gains) == 1)
    if said in ("gains", "costs"):
        assert abs(statistics.fmean(gains)) > statistics.stdev(gains)
        assert (statistics.fmean(gains) > 0) == (said == "gains")


@given(
    st.dictionaries(
        st.text(max_size=8), st.lists(st.tuples(st.sampled_from([0.01, 0.1, 1.0]), st.floats(0, 100),
                                                st.none() | st.floats(0, 50)), min_size=1, max_size=3),
        min_size=1, max_size=3,
    )
)  # fmt: skip
def test_a_chart_is_well_formed_and_stays_inside(series: dict[str, list[chart.Point]]) -> None:
    names = {f"{index} <&\"{''.join(c for c in name if c.isprintable())}": row
             for index, (name, row) in enumerate(series.items())}  # fmt: skip
    drawn = chart.lines(names, title="a < b", x_label="x", y_label="y", ticks={0.01: "1 %", 0.1: "10 %", 1.0: "100 %"})
    root = ElementTree.fromstring(drawn)
    places = [
        (float(dot.get("cx", "nan")), float(dot.get("cy", "nan"))) for dot in root.iter() if dot.tag.endswith("circle")
    ]
    assert len(places) == sum(len(row) for row in names.values())
    assert all(chart.LEFT <= x <= chart.WIDTH - chart.RIGHT for x, _ in places)
    assert all(chart.TOP <= y <= chart.HEIGHT - chart.BOTTOM for _, y in places)


def test_more_is_drawn_higher_and_to_the_right() -> None:
    drawn = ElementTree.fromstring(
        chart.lines({"a": [(1, 20, None), (10, 80, 5)]}, title="t", x_label="x", y_label="y", ticks={1: "1", 10: "10"})
    )
    first, second = (dot for dot in drawn.iter() if dot.tag.endswith("circle"))
    assert float(first.get("cx", "nan")) < float(second.get("cx", "nan"))
    assert float(first.get("cy", "nan")) > float(second.get("cy", "nan"))


def real(digits: DatasetFacts, folder: Path, **params: Any) -> Finished:
    """Pretrain for a moment, then ask, with no server."""
    pretrain = sets.order(
        sets.spec("autoencoder", training={"epochs": 1}), digits, folder / "pretrain"
    )  # fmt: skip
    sets.carry_out(pretrain)
    body = {
        "recipe": "label_efficiency", "resources": {"device": "cpu"}, "params": {"fractions": [0.2, 1.0], **params},
        "training": {"steps": 12},
    }  # fmt: skip
    order = sets.order(body, digits, folder / "ask", model=local.local_model(Path(pretrain.scratch) / "model"))
    heard = sets.Heard()
    alone.carry_out(order, heard.reporter, process.carry_out)
    last = heard.messages[-1]
    assert isinstance(last, Finished), last
    assert "label_efficiency.svg" in [file.name for file in last.files]
    assert "pretrained" in (Path(order.scratch) / "label_efficiency.svg").read_text()
    return last


def test_it_runs_on_real_digits(digits: DatasetFacts, tmp_path: Path) -> None:
    last = real(digits, tmp_path, seeds=2)
    assert last.result is not None
    assert last.result["failed"] == {}
    assert [(row["start"], row["label_fraction"], row["n"]) for row in last.result["rows"]] == [
        ("random", 0.2, 2), ("model", 0.2, 2), ("random", 1.0, 2), ("model", 1.0, 2),
    ]  # fmt: skip
    assert last.result["budget"] == {"steps": 12}
    assert last.result["sentence"].startswith("With 20 % of the labels, pretraining ")
    assert set(last.metrics) == {"gain/label_fraction_0.2", "gain/label_fraction_1"}


def test_linear_heads_run_on_real_digits(digits: DatasetFacts, tmp_path: Path) -> None:
    last = real(digits, tmp_path, seeds=3, finetune={"trainable": "head"})
    assert last.result is not None
    assert [row["n"] for row in last.result["rows"]] == [3, 3, 3, 3]
