from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from app.domain.errors import UserFault
from worker.finetune.image_classification import RECIPE, ClassificationParams, Classifier, inputs
from worker.parts.architectures import facts
from worker.parts.backbones import build_backbone
from worker.recipe import Info, Progress

pytestmark = pytest.mark.worker
START = Progress(step=0, steps=10, epoch=0, epochs=1)
FACTS = {row["name"]: row["facts"] for row in facts()}


def make(architecture="resnet18", *, class_counts=(8, 8, 8), size=16, **params) -> Any:
    backbone: Any = build_backbone({"architecture": architecture}, channels=3, image_size=size, seed=0)
    info = Info(
        task="image_classification", classes=("a", "b", "c"), samples=24, channels=3, image_size=size,
        feature_dimension=backbone.dimension, architecture=FACTS[architecture], class_counts=class_counts,
    )  # fmt: skip
    return Classifier(ClassificationParams.model_validate(params), backbone, info), info


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    return {"image": torch.randn(6, 3, 16, 16, generator=generator), "label": torch.tensor([0, 1, 2, 0, 1, 2])}


def trained(module):
    return {name.split(".")[0] + "." + name.split(".")[1] for name, p in module.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("trainable", "frozen", "parts"),
    [
        ("head", 5, {"head.weight", "head.bias"}),
        ("last:1", 4, {"head.weight", "head.bias", "backbone.layer4"}),
        ("last:2", 3, {"head.weight", "head.bias", "backbone.layer4", "backbone.layer3"}),
    ],
)
def test_frozen_stages_neither_train_nor_move_their_batch_norm(batch, trainable, frozen, parts):
    module, _ = make(trainable=trainable)
    module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module(batch, START)["loss"].backward()
    assert module.frozen_stages == frozen
    assert trained(module) == parts
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    moved = {name.split(".")[1] for name, value in module.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {part.split(".")[1] for part in parts if part.startswith("backbone")}


def test_everything_trains(batch):
    module, _ = make(trainable="all")
    module.train()
    module(batch, START)["loss"].backward()
    assert module.frozen_prefix is None
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.parametrize("trainable", ["head", "last:1", "last:2"])
def test_a_cached_prefix_gives_the_same_loss(batch, trainable):
    first, second = (make(trainable=trainable)[0].train() for _ in range(2))
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        prefix = first.frozen_prefix.eval()(batch["image"])
    whole = first(batch, START)["loss"]
    cached = second({"prefix": prefix, "label": batch["label"]}, START)["loss"]
    assert torch.equal(whole, cached)


def test_a_frozen_prefix_is_not_offered_where_images_are_mixed():
    assert make(trainable="head", mixup=0.2)[0].frozen_prefix is None
    assert make(trainable="head", cutmix=1.0)[0].frozen_prefix is None


def test_gradual_thaws_from_the_back(batch):
    module, _ = make(trainable="gradual")
    module.train()
    reached = []
    for step in range(11):
        module.zero_grad(set_to_none=True)
        module(batch, Progress(step=step, steps=10, epoch=0, epochs=1))["loss"].backward()
        stages = ["conv1", "layer1", "layer2", "layer3", "layer4"]
        reached.append([any(p.grad is not None for p in getattr(module.backbone, s).parameters()) for s in stages])
    assert reached[0] == [False] * 5
    assert reached[1] == [False] * 4 + [True]
    assert reached[5] == reached[10] == [True] * 5
    counts = [sum(each) for each in reached]
    assert counts == sorted(counts)
    # Going back in time, as a resumed run may, gives what it was.
    module.zero_grad(set_to_none=True)
    module(batch, Progress(step=0, steps=10, epoch=0, epochs=1))["loss"].backward()
    assert module.backbone.layer4[0].conv1.weight.grad is None
    assert not module.backbone.layer4[0].bn1.training


def test_layer_decay_and_backbone_scale():
    module, _ = make(layer_decay=0.5, backbone_learning_rate_scale=0.1)
    groups = module.parameter_groups(None)
    scale = {id(parameter): group["lr_scale"] for group in groups for parameter in group["params"]}
    assert len(scale) == len(list(module.parameters()))
    assert scale[id(module.head.weight)] == 1
    assert scale[id(module.backbone.layer4[0].conv1.weight)] == pytest.approx(0.05)
    assert scale[id(module.backbone.conv1.weight)] == pytest.approx(0.1 * 0.5**5)


def test_weighted_loss_is_the_textbook_one(batch):
    module, _ = make(class_balance="weighted", class_counts=(12, 6, 6), label_smoothing=0.0)
    module.eval()
    logits = module.evaluate(batch)["logits"].detach()
    weights = torch.tensor([24 / (3 * 12), 24 / (3 * 6), 24 / (3 * 6)])
    expected: Any = sum(
        -weights[label] * torch.log_softmax(row, 0)[label] for row, label in zip(logits, batch["label"], strict=True)
    )
    assert module(batch, START)["loss"].item() == pytest.approx(expected.item() / 6, rel=1e-5)
    assert (weights * torch.tensor([12, 6, 6])).sum() == 24


def test_mixed_targets_with_one_hot_rows_equal_hard_labels(batch):
    cases: list[dict[str, Any]] = [
        {}, {"class_balance": "weighted", "class_counts": (12, 6, 6)}, {"label_smoothing": 0.1},
    ]  # fmt: skip
    for options in cases:
        module, _ = make(**options)
        module.eval()
        hard = module(batch, START)["loss"]
        soft = module({**batch, "target": torch.eye(3)[batch["label"]]}, START)["loss"]
        assert torch.allclose(hard, soft, rtol=1e-5)


def test_unlabelled_rows_count_for_nothing(batch):
    module, _ = make()
    module.eval()
    some = {"image": batch["image"][:4], "label": batch["label"][:4]}
    masked = {**batch, "label": torch.tensor([0, 1, 2, 0, -1, -1])}
    assert torch.allclose(module(some, START)["loss"], module(masked, START)["loss"], rtol=1e-5)


def test_resample_draws_every_class_as_often():
    labels = torch.tensor([0] * 90 + [1] * 9 + [2] + [-1] * 5)
    weights = make(class_balance="resample")[0].sample_weights(labels)
    assert [weights[labels == number].sum().item() for number in (0, 1, 2, -1)] == pytest.approx([1, 1, 1, 0])
    assert make()[0].sample_weights(labels) is None


def test_head_options():
    module, _ = make(head={"hidden": [32, 16], "activation": "gelu", "dropout": 0.5})
    assert [type(layer) for layer in module.head] == [
        nn.Linear, nn.GELU, nn.Dropout, nn.Linear, nn.GELU, nn.Dropout, nn.Linear,
    ]  # fmt: skip
    assert [type(layer) for layer in make(head={"hidden": 32})[0].head] == [nn.Linear, nn.ReLU, nn.Linear]
    assert [type(layer) for layer in make(head={"dropout": 0.1})[0].head] == [nn.Dropout, nn.Linear]
    assert isinstance(make()[0].head, nn.Linear)


def test_nothing_to_prepare_lets_a_prefix_be_cached():
    def prepare(**params):
        return inputs(ClassificationParams.model_validate(params), make(size=16)[1])

    assert prepare(trainable="head") is None
    assert prepare(trainable="last:1") is None
    assert prepare(trainable="all", augmentation="none") is None
    assert prepare(trainable="all") is not None
    assert prepare(trainable="head", augmentation="light") is not None


def test_prepared_batches_are_mixed_and_keep_their_labels(batch):
    params = ClassificationParams(augmentation="none", mixup=0.4)
    image = torch.randint(0, 256, (6, 3, 16, 16), dtype=torch.uint8)
    prepare: Any = inputs(params, make()[1])
    prepared = prepare({"image": image, "label": batch["label"]}, torch.Generator().manual_seed(1))
    assert prepared["image"].shape == image.shape
    assert torch.equal(prepared["label"], batch["label"])
    assert torch.allclose(prepared["target"].sum(1), torch.ones(6))
    module, _ = make(mixup=0.4)
    logged = module({**prepared, "image": prepared["image"].float()}, START)
    assert set(logged) == {"loss"}
    assert logged["loss"].isfinite()


def test_rand_augment_is_drawn_beside_any_level():
    image = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    for level, same in (("none", 1), ("light", 0)):
        params = ClassificationParams.model_validate({"augmentation": level, "rand_augment": {"operations": 1}})
        prepare: Any = inputs(params, make()[1])
        made = prepare({"image": image, "label": torch.zeros(40)}, torch.Generator().manual_seed(1))["image"]
        assert made.dtype == torch.uint8
        untouched = sum(torch.equal(one, other) for one, other in zip(made, image, strict=True))
        assert untouched <= 40 // 3
        assert untouched >= same, "one operation of 14 is the identity"
    assert inputs(ClassificationParams.model_validate({"trainable": "head", "rand_augment": {}}), make()[1]) is not None


@pytest.mark.parametrize("wrong", [
    {"rand_augment": {"operations": 0}}, {"rand_augment": {"magnitude": 31}}, {"rand_augment": "strong"},
    {"trainable": "last:0"}, {"trainable": "half"}, {"layer_decay": 0}, {"ema": 1.0}, {"mixup": -1}, {"colour": 1},
    {"head": {"hidden": [0]}}, {"head": {"dropout": 1.0}}, {"augmentation": "wild"}, {"label_smoothing": 1.0},
])  # fmt: skip
def test_nonsense_is_refused(wrong):
    with pytest.raises(ValidationError):
        ClassificationParams.model_validate(wrong)


def test_more_stages_than_there_are():
    with pytest.raises(UserFault, match="has 5 stages: use last:1 to last:5"):
        make(trainable="last:6")


def test_the_state_holds_no_weight_twice():
    module, _ = make(trainable="last:1")
    pointers = [value.data_ptr() for value in module.state_dict().values() if value.numel() > 1]
    assert len(pointers) == len(set(pointers))
    assert {name.split(".")[0] for name in module.state_dict()} == {"backbone", "head"}


def test_the_recipe_is_complete():
    assert RECIPE.kind == "finetune"
    assert RECIPE.requires.labels
    schema = ClassificationParams.model_json_schema()
    described = [*schema["properties"].values(), *schema["$defs"]["Head"]["properties"].values()]
    assert all(entry.get("description") for entry in described)


def test_it_learns_two_batches(batch):
    torch.manual_seed(0)
    module, _ = make("small_cnn")
    module.train()
    optimiser = torch.optim.AdamW(module.parameters(), lr=2e-3)
    for step in range(20):
        optimiser.zero_grad()
        module(batch, Progress(step, 20, 0, 1))["loss"].backward()
        optimiser.step()
    assert module(batch, START)["accuracy"] == 1
