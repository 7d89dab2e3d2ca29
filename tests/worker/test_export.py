import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest
import torch
import torchvision
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision.transforms.v2.functional import to_pil_image

from app.domain.errors import UserFault
from app.domain.models import ModelConfig
from worker.parts.backbones import build_backbone
from worker.parts.export import Card, export, model_card
from worker.parts.heads import build_head
from worker.parts.networks import Network, assemble, load_network, load_state, state_dict
from worker.parts.snippets import LINES, input_snippet, loading_snippet
from worker.parts.stock_networks import meta_parameters

pytestmark = pytest.mark.worker

CLASSES = ("cat", "dog", "bird")
# Name, image size, what is changed. One of every family unmodified; then changed stems, heads, channels, lengths.
PLAIN = {
    "alexnet": 63, "vgg11_bn": 32, "resnet18": 32, "regnet_x_400mf": 32, "densenet121": 32, "efficientnet_b0": 32,
    "mobilenet_v2": 32, "mobilenet_v3_small": 32, "mnasnet0_5": 32, "shufflenet_v2_x0_5": 32, "googlenet": 32,
    "inception_v3": 75, "convnext_tiny": 32, "swin_t": 32, "swin_v2_t": 32, "vit_b_32": 64, "maxvit_t": 224,
    "small_vit": 32,
}  # fmt: skip
CHANGED = [
    ({"architecture": "resnet18", "stem": "small"}, 3, None),
    ({"architecture": "resnet18", "keep_stages": 3}, 3, None),
    ({"architecture": "resnet18"}, 1, None),
    ({"architecture": "resnet18"}, 3, {"hidden": [16, 8], "activation": "gelu"}),
    ({"architecture": "squeezenet1_1"}, 3, None),
    ({"architecture": "squeezenet1_1", "keep_stages": 2}, 3, {"hidden": [16], "activation": "tanh"}),
    ({"architecture": "mobilenet_v3_small", "keep_stages": 4, "stem": "small"}, 1, None),
    ({"architecture": "convnext_tiny", "keep_stages": 2}, 3, {"hidden": [16], "activation": "relu"}),
    ({"architecture": "swin_t", "keep_stages": 2}, 3, None),
    ({"architecture": "vit_b_32", "keep_stages": 3}, 3, {"hidden": [16], "activation": "silu"}),
    ({"architecture": "densenet121", "keep_stages": 2, "stem": "small"}, 3, None),
    ({"architecture": "googlenet", "keep_stages": 1}, 3, None),
    ({"architecture": "small_cnn"}, 1, None),
    ({"architecture": "small_cnn", "whitening": True, "width": 0.5, "keep_stages": 2}, 3, None),
    ({"architecture": "small_cnn"}, 3, {"hidden": [16], "activation": "relu"}),
    ({"architecture": "mlp", "hidden": [32, 16], "activation": "tanh"}, 1, None),
    ({"architecture": "small_vit", "patch": 8, "width": 48, "depth": 2, "heads": 4}, 1, None),
]
READER = """
import os, sys
root = sys.argv[1]
# An editable install puts a finder for this project into every interpreter of the environment.
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path = [entry for entry in sys.path if os.path.realpath(entry or ".") != root]
try:
    import worker
except ImportError:
    pass
else:
    sys.exit("this project is importable, so the test would prove nothing")
import safetensors.torch, torch
for folder in sys.argv[2:]:
    os.chdir(folder)
    names = {}
    exec(open("snippet.py").read(), names)
    with torch.no_grad():
        output = names["model"](safetensors.torch.load_file("input.safetensors")["x"])
    safetensors.torch.save_file({"output": output}, "output.safetensors")
"""


def make_config(architecture, *, size=32, channels=3, head=None, classes=CLASSES):
    return ModelConfig(
        architecture=architecture, task="image_classification", classes=classes, head=head, image_size=size,
        channels=channels, mean=(0.5,) * channels, std=(0.25,) * channels,
    )  # fmt: skip


def made_network(config, *, dropout=0.3):
    """Give a network as training leaves it: dropout in the head, running statistics that are not the first ones."""
    backbone: Any = build_backbone(config.architecture, channels=config.channels, image_size=config.image_size, seed=1)
    torch.manual_seed(0)
    options = config.head or {}
    head = None
    if config.classes:
        head = build_head(backbone.dimension, len(config.classes), **options, dropout=dropout, bias=backbone.head_bias)
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.8, 1.2)
    return Network(backbone, head).eval()


def assert_load_elsewhere(tmp_path, configs):
    """Run the snippets in one fresh interpreter that cannot see this project, each in the folder with its weights."""
    expected = {}
    for number, config in enumerate(configs):
        folder = tmp_path / str(number)
        network = made_network(config)
        made = export(
            tmp_path, network.backbone, network.head, config=config, card=Card("A model"), metrics={},
            folder=str(number),
        )  # fmt: skip
        assert made.parameters == sum(parameter.numel() for parameter in network.parameters())
        snippet = loading_snippet(config)
        assert snippet in (folder / "README.md").read_text()
        assert len(snippet.splitlines()) <= LINES
        x = torch.randn(1, config.channels, config.image_size, config.image_size)
        with torch.no_grad():
            expected[folder] = network(x)
            assert torch.equal(load_network(config, folder / "model.safetensors")(x), expected[folder])
        (folder / "snippet.py").write_text(snippet)
        save_file({"x": x}, folder / "input.safetensors")
    run = subprocess.run(
        [sys.executable, "-I", "-c", READER, os.path.realpath("."), *map(str, expected)],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    for folder, output in expected.items():
        found = load_file(folder / "output.safetensors")["output"]
        assert torch.allclose(found, output, rtol=1e-5, atol=1e-5), (folder / "snippet.py").read_text()


def plain(name):
    return make_config({"architecture": name}, size=PLAIN[name])


def changed(number):
    architecture, channels, head = CHANGED[number]
    return make_config(architecture, channels=channels, head=head)


@pytest.mark.parametrize("name", sorted(set(PLAIN) - {"mnasnet0_5", "squeezenet1_1"}))
def test_an_unmodified_architecture_loads_in_three_lines_of_torchvision(name):
    snippet = loading_snippet(plain(name))
    lines = [line for line in snippet.splitlines() if line and not line.startswith("import ")]
    constructor = "VisionTransformer" if name == "small_vit" else name
    assert len(lines) == 3
    assert re.fullmatch(rf"model = torchvision\.models\.{constructor}\(num_classes=3.*\)", lines[0])
    assert lines[1:] == ['model.load_state_dict(safetensors.torch.load_file("model.safetensors"))', "model.eval()"]
    if name == "resnet18":
        assert lines[0] == "model = torchvision.models.resnet18(num_classes=3)"


@pytest.mark.parametrize("architecture", [
    {"architecture": "inception_v3", "keep_stages": 1}, {"architecture": "mlp", "hidden": [64] * 12},
    {"architecture": "googlenet", "keep_stages": 1, "stem": "small"},
    {"architecture": "squeezenet1_1", "keep_stages": 1, "stem": "small"},
])  # fmt: skip
def test_the_longest_snippets_have_25_lines_at_most(architecture):
    config = make_config(architecture, size=96, channels=1, head={"hidden": [64] * 8, "activation": "gelu"})
    assert len(loading_snippet(config).splitlines()) <= LINES


QUICK_CHANGES = (0, 1, 4, 7, 8, 13, 14, 15)


def test_snippets_load_the_weights_without_this_project(tmp_path):
    headless = [make_config({"architecture": name}, classes=()) for name in ("resnet18", "small_cnn")]
    quick = [plain(name) for name in ("resnet18", "mobilenet_v3_small", "mnasnet0_5", "small_vit")]
    assert_load_elsewhere(tmp_path, [*quick, *headless, *map(changed, QUICK_CHANGES)])


@pytest.mark.long
def test_snippets_of_every_family_load_the_weights_without_this_project(tmp_path):
    assert_load_elsewhere(tmp_path, [plain(name) for name in PLAIN])


@pytest.mark.long
def test_snippets_of_every_change_load_the_weights_without_this_project(tmp_path):
    assert_load_elsewhere(tmp_path, [changed(number) for number in range(len(CHANGED))])


@pytest.mark.parametrize("name", sorted(set(PLAIN) - {"squeezenet1_1"}))
def test_exported_keys_are_those_of_stock_torchvision(name):
    options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    with meta_parameters():
        network = assemble(plain(name))
        if name == "small_vit":
            stock = torchvision.models.VisionTransformer(32, 4, 6, 3, 192, 768, num_classes=3)
        else:
            options |= {"image_size": PLAIN[name]} if name.startswith("vit") else {}
            stock = torchvision.models.get_model(name, num_classes=3, **options)
        keys = dict(network.backbone.state_dict())
        assert network.head is not None
        own = network.head.state_dict().items()
        keys |= {f"{network.backbone.head_path}.{key}": value for key, value in own}
    assert {key: value.shape for key, value in keys.items()} == {
        key: value.shape for key, value in stock.state_dict().items()
    }


def test_the_same_weights_give_the_same_bytes(tmp_path):
    config = make_config({"architecture": "small_cnn"})
    for folder in ("one", "two"):
        network = made_network(config)
        export(
            tmp_path, network.backbone, network.head, config=config, card=Card("x"), metrics={"b": 1.0, "a": 2.0},
            folder=folder,
        )  # fmt: skip
    for name in ("model.safetensors", "config.json", "README.md", "metrics.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_channels_last_weights_come_out_plain(tmp_path):
    config = make_config({"architecture": "small_cnn"})
    network = made_network(config).to(memory_format=torch.channels_last)
    state = state_dict(network.backbone, network.head)
    assert all(value.is_contiguous() for value in state.values())


def test_files(tmp_path):
    config = make_config({"architecture": "small_cnn", "width": 0.5})
    network = made_network(config)
    made = export(
        tmp_path, network.backbone, network.head, config=config, card=Card("cats", {"dataset": "pets v1"}),
        metrics={"test/accuracy": 0.93215, "test/loss": float("nan")}, details={"classes": {"cat": {"f1": 1.0}}},
    )  # fmt: skip
    assert [file.name for file in made.files] == ["model.safetensors", "config.json", "README.md", "metrics.json"]
    assert all((tmp_path / file.file).is_file() for file in made.files)
    assert ModelConfig.model_validate_json((tmp_path / "model" / "config.json").read_text()) == config
    metrics = json.loads((tmp_path / "model" / "metrics.json").read_text())
    assert metrics == {
        "metrics": {"test/accuracy": 0.93215, "test/loss": None}, "classes": {"cat": {"f1": 1.0}},
    }  # fmt: skip
    assert made.metrics == metrics["metrics"]
    card = (tmp_path / "model" / "README.md").read_text()
    assert "| test/accuracy | 0.9321 |" in card or "| test/accuracy | 0.9322 |" in card
    assert "| test/loss | - |" in card
    assert "| dataset | pets v1 |" in card
    assert card.startswith("---\nlibrary_name: torchvision\n")
    assert "pipeline_tag: image-classification" in card


def test_a_strangers_words_cannot_break_out_of_the_card():
    config = make_config({"architecture": "resnet18"}, classes=("a\n# owned", "<script>", "`x` | y"))
    card = model_card(config, Card("t\n---\nlicense: mit"), {})
    assert "\n# owned" not in card
    assert "<script>" not in card.replace("\\<script\\>", "")
    assert card.count("\n---\n") == 1


def test_the_input_lines_do_what_training_does(tmp_path, monkeypatch):
    config = make_config({"architecture": "small_cnn"}, size=16, channels=1)
    image = torch.randint(0, 256, (1, 16, 16), dtype=torch.uint8)
    to_pil_image(image).save(tmp_path / "image.png")
    monkeypatch.chdir(tmp_path)
    seen: dict[str, Any] = {"model": lambda x: x}
    exec(input_snippet(config), seen)
    assert torch.allclose(seen["output"], (image[None] / 255 - 0.5) / 0.25)


def test_weights_of_another_network_are_refused_by_name():
    network = assemble(make_config({"architecture": "resnet18"}))
    other = assemble(make_config({"architecture": "resnet18"}, classes=("a", "b")))
    with pytest.raises(UserFault, match=r"fc.weight is \[2, 512\] and should be \[3, 512\]"):
        load_state(network, state_dict(other.backbone, other.head), source="model.safetensors")
