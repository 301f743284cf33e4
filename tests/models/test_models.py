"""The models: their sizes, the shapes they take, and what build_model refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from sparse_training.errors import UserError
from sparse_training.models.build import MODELS, build_model
from sparse_training.models.resnet import ResidualBlock
from sparse_training.models.vit import Attention, Tokens, tile_of, tile_order, vit
from sparse_training.nn import BlockSparseAttention

CIFAR = (3, 32, 32)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("cnn-620k", 620_362),
        ("cnn-2m", 2_193_226),
        # He et al. give 0.27M without projections; two of these with their BatchNorm add 2,752.
        ("resnet", 272_474),
        # 3x3x12x32 + 3x3x32x64 + 3x3x64x128 weights, BatchNorm 448, a head of 2,048x10 + 10.
        ("cnn-bn", 116_554),
        ("cnn-tiny", 6_418),
        # Tokens 9,216 + 12,288 places; two blocks of 444,864; LayerNorm 384; 1,930.
        ("vit", 913_738),
        # The same with 1x1 patches: tokens 768 + 196,608 places.
        ("vit-sparse", 1_089_418),
    ],
)
def test_parameter_counts(name: str, count: int) -> None:
    assert parameters(build_model(name, shape=CIFAR, classes=10)) == count


@pytest.mark.parametrize(
    ("name", "count", "layers"),
    [
        # As published with torchvision's resnet50; 53 convolutions with BatchNorm and the head.
        ("resnet50", 25_557_032, {nn.Conv2d: 53, nn.BatchNorm2d: 53, nn.Linear: 1}),
        # As published with timm's vit_small_patch16_224: 12 blocks, a class token, 197 places.
        ("vit-s", 22_050_664, {nn.Conv2d: 1, nn.LayerNorm: 25, nn.Linear: 49}),
    ],
)
def test_models_of_imagenet_are_the_published_ones(name: str, count: int, layers: dict[type, int]) -> None:
    model = build_model(name, shape=(3, 224, 224), classes=1000).eval()
    assert parameters(model) == count
    for kind, number in layers.items():
        assert sum(isinstance(module, kind) for module in model.modules()) == number
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).shape == (1, 1000)
        assert model(torch.randn(1, 3, 96, 160)).shape == (1, 1000), "and other sizes than it was made for"


def test_every_stage_of_resnet50_but_the_first_halves_the_image() -> None:
    model = build_model("resnet50", shape=(3, 224, 224), classes=5).eval()
    sides, x = [], torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        for layer in model[:-3]:  # type: ignore[index]
            x = layer(x)
            sides.append((x.shape[1], x.shape[2]))
    assert list(dict.fromkeys(sides)) == [(64, 112), (64, 56), (256, 56), (512, 28), (1024, 14), (2048, 7)]


def test_the_class_token_of_vit_s_sees_every_patch() -> None:
    torch.manual_seed(0)
    model, images = build_model("vit-s", shape=(3, 32, 48), classes=5), torch.randn(1, 3, 32, 48, requires_grad=True)
    (gradient,) = torch.autograd.grad(model(images).sum(), images)
    assert (torch.nn.functional.avg_pool2d(gradient.abs(), 16) > 0).all()


@pytest.mark.parametrize("shape", [CIFAR, (1, 28, 28), (1, 8, 8), (3, 11, 40)])
@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward(name: str, shape: tuple[int, int, int]) -> None:
    if (name == "vit" and shape[1] % 4) or (name == "cnn-bn" and shape[1] % 2) or (name == "vit-s" and shape[1] % 16):
        pytest.skip("refused: see below")
    model = build_model(name, shape=shape, classes=7)
    logits = model(torch.randn(2, *shape))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_resnet_takes_large_images() -> None:
    model = build_model("resnet", shape=(3, 224, 224), classes=5).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, 224, 224)).shape == (1, 5)


def test_the_transformer_takes_other_sizes_than_it_was_made_for_and_refuses_what_it_cannot_cut() -> None:
    model = build_model("vit", shape=CIFAR, classes=5)
    assert model(torch.randn(2, 3, 16, 24)).shape == (2, 5)
    with pytest.raises(UserError, match=r"4x4 pixels; their sides must be divisible by 4, got \(11, 40\)"):
        build_model("vit", shape=(3, 11, 40), classes=5)
    with pytest.raises(UserError, match=r"16x16 pixels; their sides must be divisible by 16, got \(32, 40\)"):
        build_model("vit-s", shape=(3, 32, 40), classes=5)


def test_the_sparse_transformer_reads_a_part_of_the_pixels_and_has_the_parameters_of_the_dense() -> None:
    torch.manual_seed(0)
    options = {"shape": (1, 28, 28), "classes": 5, "width": 16, "heads": 2, "patch": 1}
    dense, sparse = vit(**options), vit(**options, attention="sparse", block=32)
    sparse.load_state_dict(dense.state_dict())
    attention = sparse[1].attention
    assert isinstance(attention, BlockSparseAttention)
    assert not attention.blocks.dense(784)
    images = torch.randn(2, 1, 28, 28)
    assert not torch.allclose(dense(images), sparse(images))
    assert attention.blocks.summary
    named = build_model("vit-sparse", shape=(1, 28, 28), classes=5)
    assert [block.attention.blocks.block for block in named[1:3]] == [28, 28], "tiles of 4x7 pixels"
    with pytest.raises(UserError, match="`attention` must be one of dense, sparse, got 'flash'"):
        vit(**options, attention="flash")
    with pytest.raises(UserError, match="0x0 pixels"):
        vit(**{**options, "patch": 0})


@pytest.mark.parametrize(
    ("sides", "block", "tile"),
    [
        ((28, 28), 64, (7, 7)), ((28, 28), 32, (4, 7)), ((32, 32), 64, (8, 8)), ((32, 32), 32, (4, 8)),
        ((6, 40), 32, (6, 5)), ((29, 31), 36, (6, 6)), ((4, 4), 64, (4, 4)), ((5, 5), 1, (1, 1)),
    ],
)  # fmt: skip
def test_a_block_of_tokens_is_a_tile_of_the_image(sides: tuple[int, int], block: int, tile: tuple[int, int]) -> None:
    assert tile_of(*sides, block) == tile
    order = tile_order(*sides, tile)
    assert sorted(order.tolist()) == list(range(sides[0] * sides[1]))
    row, column = order // sides[1], order % sides[1]
    if sides[0] % tile[0] == sides[1] % tile[1] == 0:
        places = torch.stack([row // tile[0], column // tile[1]], 1).view(-1, tile[0] * tile[1], 2)
        assert (places == places[:, :1]).all(), "tokens of a block are of one tile"
        assert ((places[1:, 0] - places[:-1, 0]).abs().sum(1) == 1).all(), "tiles that follow one another touch"


def test_tokens_in_tiles_are_those_row_by_row_in_another_order() -> None:
    torch.manual_seed(0)
    plain, tiled = Tokens((1, 12, 12), 8, 1), Tokens((1, 12, 12), 8, 1, (3, 4))
    tiled.load_state_dict(plain.state_dict())
    for side in (12, 14):  # 14: positions are interpolated, and the last tiles are smaller
        images = torch.randn(2, 1, side, side)
        torch.testing.assert_close(tiled(images), plain(images)[:, tile_order(side, side, (3, 4))])


def test_positions_begin_as_waves_of_row_and_column() -> None:
    places = Tokens((1, 8, 12), 16, 1).places.detach()[0]
    assert places.abs().max() <= 0.5
    assert (places[:8] == places[:8, :, :1]).all()
    assert (places[8:] == places[8:, :1]).all()
    flat = places.flatten(1).T
    assert len(flat.unique(dim=0)) == 8 * 12, "each place has one of its own"
    assert not Tokens((1, 4, 4), 3, 1).places.any()  # too narrow for waves


def test_odd_sides_are_refused_where_pixels_are_taken_in_blocks() -> None:
    with pytest.raises(UserError, match=r"2x2 pixels; their sides must be even, got \(28, 27\)"):
        build_model("cnn-bn", shape=(1, 28, 27), classes=5)


def test_the_transformers_attention_is_what_it_says() -> None:
    torch.manual_seed(0)
    attention, x = Attention(8, 2), torch.randn(3, 5, 8)
    q, k, v = (part.view(3, 5, 2, 4).transpose(1, 2) for part in attention.qkv(x).chunk(3, -1))
    weights = (q @ k.transpose(2, 3) / 2.0).softmax(-1)
    torch.testing.assert_close(attention(x), attention.out((weights @ v).transpose(1, 2).reshape(3, 5, 8)))


def layers(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.children()]


def test_layers_are_the_originals() -> None:
    head = ["Flatten", "Linear", "ReLU", "Dropout", "Linear"]
    conv, pooled = ["Conv2d", "ReLU"], ["Conv2d", "ReLU", "MaxPool2d"]
    small = build_model("cnn-620k", shape=CIFAR, classes=10)
    large = build_model("cnn-2m", shape=CIFAR, classes=10)
    assert layers(small) == pooled * 3 + head
    assert layers(large) == conv + pooled * 2 + head
    for model in (small, large):
        assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.5]
        convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
        assert [m.out_channels for m in convolutions] == [32, 64, 128]


def test_residual_blocks_start_as_their_shortcuts() -> None:
    model = build_model("resnet", shape=CIFAR, classes=10)
    blocks = [module for module in model.modules() if isinstance(module, ResidualBlock)]
    assert len(blocks) == 9
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(blocks[0](x), x.relu())


def test_weights_follow_the_seed() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return nn.utils.parameters_to_vector(build_model("resnet", shape=CIFAR, classes=10).parameters())

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


@pytest.mark.parametrize(
    ("name", "shape", "smallest"),
    [("cnn-620k", (1, 7, 28), "8x8"), ("cnn-2m", (1, 28, 3), "4x4")],
)
def test_images_too_small_for_the_pools(name: str, shape: tuple[int, int, int], smallest: str) -> None:
    with pytest.raises(UserError, match=f"{name}.*{smallest}.*{shape[1]}x{shape[2]}"):
        build_model(name, shape=shape, classes=10)


def test_bad_shape_and_classes() -> None:
    for shape in [(32, 32), (3, 0, 32), (3, 32, 32, 1)]:
        with pytest.raises(UserError, match="`shape` must be"):
            build_model("resnet", shape=shape, classes=10)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="`classes` must be an integer of at least 2, got 1"):
        build_model("resnet", shape=CIFAR, classes=1)


def test_unknown_name_lists_the_known() -> None:
    known = "cnn-620k, cnn-2m, cnn-bn, cnn-tiny, resnet, resnet50, vit, vit-s, vit-sparse or module:factory"
    with pytest.raises(UserError, match=f"'vgg'.*{known}"):
        build_model("vgg", shape=CIFAR, classes=10)


@pytest.fixture
def own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of an importable module with factories good and bad."""
    (tmp_path / "own_factories.py").write_text(
        "from torch import nn\n"
        "def linear(*, shape, classes):\n"
        "    c, h, w = shape\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(c * h * w, classes))\n"
        "def nothing(shape, classes): pass\n"
        "def positional(images): pass\n"
        "def broken(shape, classes): raise TypeError('my own')\n"
        "number = 5\n"
    )
    (tmp_path / "own_broken.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    return "own_factories"


def test_import_path(own_module: str) -> None:
    model = build_model(f"{own_module}:linear", shape=(1, 8, 8), classes=3)
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("no_such_module_at_all:f", "cannot import no_such_module_at_all"),
        ("own_broken:f", "cannot import own_broken: No module named 'no_such_module_at_all'"),
        ("own_factories:missing", "module own_factories has no 'missing'"),
        ("own_factories:number", "number must be callable, got int"),
        ("own_factories:nothing", "must return a torch.nn.Module, got NoneType"),
        ("own_factories:positional", r"must be callable as positional\(shape=..., classes=...\)"),
        (":f", "not an import path"),
        ("own_factories:", "not an import path"),
        (".own_factories:f", "not an import path"),
        ("a:b:c", "not an import path"),
    ],
)
@pytest.mark.usefixtures("own_module")
def test_bad_import_path(path: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        build_model(path, shape=CIFAR, classes=10)
    assert repr(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_inside_the_factory_is_not_hidden(own_module: str) -> None:
    with pytest.raises(TypeError, match="my own"):
        build_model(f"{own_module}:broken", shape=CIFAR, classes=10)
