"""models.py: ResNet and VGG compute what torchvision's do and have the published numbers of parameters; every
model takes any image; its initialisation keeps the signal."""
import pytest
import torch
import torchvision
from torch import nn

import models
import norm


def count(model):
    return sum(p.numel() for p in model.parameters())


def layers(model):
    return [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]


def test_resnet34_computes_what_torchvisions_does():
    """But for the stem, 3×3 for 7×7."""
    ours, theirs = models.resnet34(10, "batch", 64).eval(), torchvision.models.ResNet(
        torchvision.models.resnet.BasicBlock, [3, 4, 6, 3], num_classes=10).eval()
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    mine, other = ours.state_dict(), theirs.state_dict()
    assert len(mine) == len(other)
    theirs.load_state_dict(dict(zip(other, mine.values())))     # both list them in the same order
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


def torchvision_vgg11():
    vgg = torchvision.models.vgg
    return vgg.make_layers(vgg.cfgs["A"])                       # without the linear layers, which are large


def test_vgg11_computes_what_torchvisions_does():
    """But for one linear layer instead of three."""
    ours, theirs = models.vgg11(10, None, 64).double(), torchvision_vgg11().double()
    for layer, other in zip(ours.layers, [m for m in theirs if isinstance(m, nn.Conv2d)]):
        layer.load_state_dict(other.state_dict())
    x = torch.randn(1, 3, 64, 64).double()
    assert torch.allclose(ours(x), ours.classifier(theirs(x).mean((2, 3))))


def test_the_numbers_of_parameters_are_the_published_ones_and_those_by_hand():
    assert [count(make()) for make in (models.resnet18, models.resnet34, models.vgg11)] == [
        11_220_132, 21_328_292, 9_274_532]
    for kind, bias in ((None, 1), ("batch", 2), ("rms", 1)):                    # gain, bias, or both
        assert count(models.mlp(10, kind, 8)) == (3072 + 3 * 8) * 8 + 4 * bias * 8 + 8 * 10 + 10
        convolutions = 9 * (3 * 8 + 8 * 16 + 16 * 32 + 32 * 32) + bias * (8 + 16 + 32 + 32)
        assert count(models.cnn(10, kind, 8)) == convolutions + 32 * 16 * 10 + 10


@pytest.mark.parametrize("name", models.MODELS)
def test_any_image_goes_through_every_layer_from_the_stem_to_the_classifier(name):
    for size, channels in ((28, 1), (17, 3)):
        model = models.MODELS[name](13, "batch", width=4, channels=channels, size=size)
        assert model(torch.randn(2, channels, size, size)).shape == (2, 13)
        assert all(m.running_mean.any() for m in model.modules() if isinstance(m, norm.BatchNorm))
        first, *_, last = layers(model)
        assert first.weight.shape[1] in (channels, channels * size ** 2) and last.weight.shape[0] == 13


def test_no_hidden_layer_leaves_a_linear_classifier():
    for make in models.mlp, models.cnn:
        model = make(depth=0, size=8)
        assert len(layers(model)) == 1 and model(torch.randn(2, 3, 8, 8)).shape == (2, 10)


def test_layers_are_spread_evenly_over_the_stages_of_the_cnn():
    strides = {1: [1], 2: [1, 4], 3: [1, 2, 2], 6: [1, 1, 2, 2, 1, 2], 12: [1, 1, 1] + 3 * [2, 1, 1]}
    for depth, expected in strides.items():
        model = models.cnn(10, None, width=4, depth=depth)
        assert [layer.stride[0] for layer in model.layers] == expected
        assert model.layers[-1].out_channels == (4 if depth == 1 else 16)
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert len(layers(models.mlp(width=4, depth=6))) == 7


# ---- initialisation ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", models.MODELS)
def test_without_norm_images_do_not_meet_and_the_signal_neither_dies_nor_explodes(name):
    torch.manual_seed(0)
    model = models.MODELS[name](10, None, width=16)
    assert not [m for m in model.modules() if type(m) in norm.KINDS.values()]
    entering, x = {}, torch.randn(64, 3, 32, 32)
    model.classifier.register_forward_pre_hook(lambda m, args: entering.update(x=args[0]))
    together = model(x)
    assert 0.1 < entering["x"].square().mean() < (4 if name == "vgg11" else 3)  # each max-pool adds a little
    assert torch.allclose(model(x[:1]), together[:1], atol=1e-5)


@pytest.mark.parametrize("kind", ["batch", None])
def test_the_initialisation_can_be_chosen(kind):
    def weights(init):
        torch.manual_seed(0)
        return layers(models.resnet18(norm=kind, width=16, init=init))

    for he, default in zip(weights("he")[:-1], weights("torch")[:-1]):  # the classifier is always torch's
        root = he.weight[0].numel() ** 0.5                              # of the fan-in
        scale = he.initialise.keywords["scale"]
        assert he.weight.std().item() * root == pytest.approx(scale * 2 ** 0.5, rel=0.2)
        assert default.weight.abs().max().item() * root == pytest.approx(1, rel=0.05)
        assert not hasattr(default, "initialise") and (he.bias is None or not he.bias.any())
    chosen = weights("torch" if kind else "he")
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(weights(None), chosen))
    with pytest.raises(ValueError, match="init"):
        weights("xavier")


# ---- shortcuts ---------------------------------------------------------------------------------------------

def test_a_shortcut_without_weights_is_means_of_pixels_and_zeros_for_new_channels():
    x = torch.randn(2, 8, 7, 6)
    got = models.Pad(2, 3)(x)
    assert got.shape == (2, 11, 4, 3) and not got[:, 8:].any()
    assert torch.allclose(got[:, :8, 0, 1], x[:, :, :2, 2:4].mean((2, 3)), atol=1e-6)
    assert torch.equal(models.Pad(1, 0)(x), x)
    model = models.resnet18(10, None, 8, shortcut="pad")
    assert not [name for name, p in model.named_parameters() if "shortcut" in name]
    block, x = model.blocks[2], torch.rand(2, 8, 8, 8)          # 8 -> 16 channels, halved
    nn.init.zeros_(block.conv2.weight)                          # the branch ends in zeros
    assert torch.equal(block(x), models.Pad(2, 8)(x))


def test_a_resnet_can_do_without_shortcuts():
    model = models.resnet18(10, "batch", 8, shortcut="none").eval()
    assert not [name for name, p in model.named_parameters() if "shortcut" in name]
    nn.init.zeros_(model.blocks[3].conv2.weight)
    assert not model.blocks[3](torch.rand(1, 16, 4, 4)).any()           # nothing goes past the branch
    with pytest.raises(ValueError, match="shortcut must be one of"):
        models.resnet18(10, shortcut="long")
