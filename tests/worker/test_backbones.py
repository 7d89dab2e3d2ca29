import copy
from typing import Any

import pytest
import torch
from torch import nn

from app.domain.errors import UserFault
from worker.parts import small_networks
from worker.parts.architectures import facts
from worker.parts.backbones import (
    build_backbone,
    initialise_from,
    load_backbone,
    names,
    stage_modules,
    stages,
)
from worker.parts.exact_pool import pool_by_products
from worker.parts.stock_networks import meta_parameters, undrawn_parameters

pytestmark = pytest.mark.worker

# The smallest network of every torchvision class, and ours, at a small image size.
FAMILIES = {
    "alexnet": 63, "vgg11_bn": 32, "squeezenet1_1": 32, "resnet18": 32, "regnet_x_400mf": 32, "densenet121": 32,
    "efficientnet_b0": 32, "mobilenet_v2": 32, "mobilenet_v3_small": 32, "mnasnet0_5": 32, "shufflenet_v2_x0_5": 32,
    "googlenet": 32, "inception_v3": 75, "convnext_tiny": 32, "swin_t": 32, "swin_v2_t": 32, "vit_b_32": 32,
    "maxvit_t": 224, "small_cnn": 32, "mlp": 8, "small_vit": 32,
}  # fmt: skip
STEMS = [
    "squeezenet1_1", "resnet18", "regnet_x_400mf", "densenet121", "efficientnet_b0", "mobilenet_v2",
    "mobilenet_v3_small", "mnasnet0_5", "shufflenet_v2_x0_5", "googlenet", "convnext_tiny",
]  # fmt: skip
SLOW = {"inception_v3", "maxvit_t", "vgg11_bn"}  # to build or to run; `make test-long` has them
GIANTS = {"vit_h_14", "vit_l_16", "vit_l_32", "regnet_y_128gf", "regnet_y_32gf", "convnext_large"}
FACTS = {row["name"]: row["facts"] for row in facts()}


def make(name, *, channels=3, size=32, seed=0, **options) -> Any:
    architecture = {"architecture": name, **options}
    return build_backbone(architecture, channels=channels, image_size=size, seed=seed)


def assert_stages_are_the_forward(backbone, x):
    backbone.eval()
    with torch.no_grad():
        whole, composed = backbone(x), x
        for _, stage in stages(backbone):
            composed = stage(composed)
    assert whole.shape == (len(x), backbone.dimension)
    assert torch.equal(whole, composed)
    own = [id(parameter) for parameter in backbone.parameters()]
    assert sorted(id(p) for stage in stage_modules(backbone) for p in stage.parameters()) == sorted(own)


@pytest.mark.parametrize(("name", "size"), FAMILIES.items())
def test_stages_composed_are_the_forward_bit_for_bit(name, size):
    backbone = make(name, size=size)
    assert_stages_are_the_forward(backbone, torch.randn(1, 3, size, size))


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(set(names()) - GIANTS))
def test_stages_of_every_architecture_are_its_forward_at_its_smallest_size(name):
    size = FACTS[name]["min_image_size"]
    assert_stages_are_the_forward(make(name, size=size), torch.randn(2, 3, size, size))


@pytest.mark.parametrize("name", names())
def test_every_architecture_builds_without_memory_and_has_its_published_parameters(name):
    size = 32 if name in ("small_cnn", "mlp", "small_vit") else 224
    with meta_parameters():
        backbone = make(name, size=size)
    assert sum(parameter.numel() for parameter in backbone.parameters()) == FACTS[name]["parameters"]
    # Constructors compute with a few small tables and scales, which are real.
    assert sum(p.numel() for p in backbone.parameters() if not p.is_meta) < 0.02 * FACTS[name]["parameters"]
    assert [stage for stage, _ in stages(backbone)] == FACTS[name]["stage_names"]


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "small_cnn", "small_vit", "mlp"])
def test_gradients_reach_every_parameter(name):
    backbone = make(name).train()
    backbone(torch.randn(4, 3, 32, 32)).square().mean().backward()
    # The last convolution bias before a pooled batch norm may get zeros, but nothing is left out of the graph.
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in backbone.parameters())


@pytest.mark.parametrize("name", STEMS)
def test_small_stem_sees_small_images(name):
    x = torch.randn(1, 3, 16, 16)
    backbone = make(name, size=16, stem="small")
    assert_stages_are_the_forward(backbone, x)
    first = next(module for module in backbone.modules() if isinstance(module, nn.Conv2d))
    assert first.kernel_size == (3, 3)
    assert first.stride == (1, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_vit_sees_its_patches_as_strongly_in_grey_as_in_colour(channels):
    backbone = make("small_vit", channels=channels)
    tokens = backbone._process_input(torch.randn(64, channels, 32, 32))
    assert tokens.std().item() == pytest.approx(1, abs=0.1), "white patches give tokens of variance 1"


@pytest.mark.parametrize(
    ("stem", "channels", "one_over_variance"), [("small", 3, 3 * 27), ("small", 1, 3 * 9), ("standard", 1, 64 * 49 / 2)]
)
def test_new_first_filters_start_as_torch_or_torchvision_starts_its_own(stem, channels, one_over_variance):
    first = make("resnet18", channels=channels, stem=stem).conv1
    assert 1 / first.weight.var().item() == pytest.approx(one_over_variance, rel=0.1)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vit_b_32", "small_vit", "mlp"])
def test_one_channel(name):
    assert_stages_are_the_forward(make(name, channels=1), torch.randn(1, 1, 32, 32))


@pytest.mark.long
@pytest.mark.parametrize(("name", "size"), FAMILIES.items())
def test_one_channel_in_every_family(name, size):
    assert_stages_are_the_forward(make(name, size=size, channels=1), torch.randn(1, 1, size, size))


CUTTABLE = {name: size for name, size in FAMILIES.items() if name != "mlp"}


@pytest.mark.parametrize(("name", "size"), [item for item in CUTTABLE.items() if item[0] not in SLOW])
def test_keep_stages_cuts_the_network(name, size):
    cut = make(name, size=size, keep_stages=2)
    assert_stages_are_the_forward(cut, torch.randn(1, 3, size, size))
    assert [stage for stage, _ in stages(cut)] == FACTS[name]["stage_names"][:2]


@pytest.mark.long
@pytest.mark.parametrize(("name", "size"), CUTTABLE.items())
def test_every_number_of_kept_stages(name, size):
    for keep in range(1, FACTS[name]["stages"] + 1):
        cut = make(name, size=size, keep_stages=keep)
        assert_stages_are_the_forward(cut, torch.randn(1, 3, size, size))
        assert len(stages(cut)) == keep


def test_a_cut_network_starts_with_the_whole_ones_weights():
    whole, cut = make("resnet18").state_dict(), make("resnet18", keep_stages=3).state_dict()
    assert set(cut) < set(whole)
    assert all(torch.equal(whole[key], value) for key, value in cut.items())


def test_too_many_stages_names_how_many_there_are():
    with pytest.raises(UserFault, match="resnet18 has 5 stages"):
        make("resnet18", keep_stages=6)


def test_seed_decides_the_weights_and_the_global_state_is_left_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, same, other = make("resnet18", seed=1), make("resnet18", seed=1), make("resnet18", seed=2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.conv1.weight, same.conv1.weight)
    assert not torch.equal(one.conv1.weight, other.conv1.weight)


def test_keys_are_torchvisions_without_the_head():
    import torchvision

    stock = torchvision.models.resnet18(num_classes=10)
    found = stock.load_state_dict(make("resnet18").state_dict(), strict=False)
    assert found.missing_keys == ["fc.weight", "fc.bias"]
    assert found.unexpected_keys == []


def test_a_deep_copy_stands_on_its_own():
    backbone = make("small_vit")
    twin = copy.deepcopy(backbone)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.zero_()
    copied = copy.deepcopy(stage_modules(twin)[0])
    assert twin.dimension == 192
    assert twin.eval()(x).abs().sum() > 0
    assert copied(x).abs().sum() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "resnet19"}, "There is no architecture 'resnet19'"),
        ({"architecture": "vit_b_16"}, "patches of 16"),
        ({"architecture": "maxvit_t"}, "multiple of 224"),
        ({"architecture": "vgg11", "stem": "small"}, "no small stem"),
        ({"architecture": "small_cnn", "stem": "small"}, "no small stem"),
        ({"architecture": "small_cnn", "depth": 3}, "no option 'depth'"),
        ({"architecture": "small_cnn", "weights": "DEFAULT"}, "no published weights"),
        ({"architecture": "small_vit", "width": 100}, "multiple of its heads"),
        ({"architecture": "mlp", "keep_stages": 1}, "no keep_stages"),
    ],
)
def test_impossible_options_are_refused_with_a_reason(options, message):
    with pytest.raises(UserFault, match=message):
        build_backbone(options, channels=3, image_size=24 if options["architecture"] == "vit_b_16" else 30, seed=0)


@pytest.mark.parametrize("size", [8, 9, 12, 16, 28, 32, 48, 64, 96, 224])
@pytest.mark.parametrize("channels", [1, 3])
def test_small_cnn_takes_every_size(size, channels):
    for whitening in (False, True):
        backbone = make("small_cnn", channels=channels, size=size, width=0.25, whitening=whitening).eval()
        assert backbone(torch.randn(1, channels, size, size)).shape == (1, 64)


def test_small_cnn_has_two_million_parameters():
    assert sum(parameter.numel() for parameter in make("small_cnn").parameters()) == pytest.approx(2e6, rel=0.05)


@pytest.mark.parametrize(("size", "wanted"), [(1, 7), (2, 7), (7, 7), (8, 7), (14, 7), (5, 3), (13, 6)])
def test_the_pool_for_deterministic_gradients_is_the_same_pool(size, wanted):
    x = torch.randn(2, 3, size, size + 1)
    expected = nn.functional.adaptive_avg_pool2d(x, (wanted, wanted))
    assert torch.allclose(pool_by_products(x, wanted, wanted), expected, atol=1e-6)


def test_whitening_makes_patches_white():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(64, 3, 33, 33, generator=generator)
    images = (noise[:, :, 1:, 1:] + noise[:, :, :-1, :-1] + noise.mean(1, keepdim=True)[:, :, 1:, 1:]) * 2 + 1
    backbone = make("small_cnn", whitening=True)
    assert small_networks.fixed_stem(backbone)
    assert not small_networks.fixed_stem(make("small_cnn"))
    initialise_from(backbone, images)
    stem = backbone.stem[0]
    with torch.no_grad():
        responses = stem(images).transpose(0, 1).flatten(1)[:12]  # one of each pair of opposite filters
    covariance = torch.cov(responses)
    assert torch.allclose(covariance, torch.eye(12), atol=0.02)
    assert torch.equal(stem.weight[:12], -stem.weight[12:])
    assert not stem.weight.requires_grad


@pytest.mark.parametrize("name", ["mnasnet0_5", "densenet121", "small_vit"])
def test_a_plain_dictionary_of_tensors_loads(name):
    source, backbone = make(name, seed=1), make(name, seed=2)
    load_backbone(copy.deepcopy(backbone), dict(source.state_dict()), source="mdl_1")
    load_backbone(backbone, {key: value.clone() for key, value in source.state_dict().items()}, source="mdl_1")
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in backbone.state_dict().items())


def test_a_deep_copy_loads_into_itself():
    backbone = make("mnasnet0_5", seed=2)
    before = backbone.state_dict()["layers.0.weight"].clone()
    twin = copy.deepcopy(backbone)
    twin.load_state_dict(dict(make("mnasnet0_5", seed=1).state_dict()))
    assert torch.equal(backbone.state_dict()["layers.0.weight"], before)
    assert not torch.equal(twin.state_dict()["layers.0.weight"], before)


def test_load_backbone_leaves_a_head_out_and_names_what_does_not_fit():
    source = make("resnet18", seed=1).state_dict()
    backbone = make("resnet18", seed=2)
    load_backbone(backbone, {**source, "fc.weight": torch.zeros(7, 512), "fc.bias": torch.zeros(7)}, source="mdl_1")
    assert torch.equal(backbone.state_dict()["layer4.1.conv2.weight"], source["layer4.1.conv2.weight"])
    small = make("resnet18", stem="small").state_dict()
    with pytest.raises(UserFault, match=r"conv1.weight is \[64, 3, 3, 3\] and should be \[64, 3, 7, 7\]"):
        load_backbone(backbone, small, source="mdl_2")
    with pytest.raises(UserFault, match=r"bn1.weight is missing.*rogue is not known"):
        load_backbone(
            backbone, {**{k: v for k, v in source.items() if k != "bn1.weight"}, "rogue": torch.zeros(1)}, source="x"
        )


@pytest.mark.parametrize("name", ["resnet18", "regnet_x_400mf", "swin_t", "small_vit", "mlp"])
def test_a_network_whose_weights_are_loaded_draws_none(name):
    with undrawn_parameters():
        undrawn = make(name)
    assert not any(weight.any() for key, weight in undrawn.named_parameters() if weight.ndim > 1)
    drawn = make(name)
    assert any(weight.any() for weight in drawn.parameters() if weight.ndim > 1)
    load_backbone(undrawn, drawn.state_dict(), source="mdl_1")
    unlike = [key for key, value in drawn.named_buffers() if not torch.equal(value, undrawn.get_buffer(key))]
    assert not unlike
