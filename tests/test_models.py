"""models.py: parameter counts, shapes, and initialisation that backprop can train."""
import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import models
import norm


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_resnet18_has_the_published_number_of_parameters():
    assert count(models.resnet18()) == 11_220_132
    assert count(models.resnet18(10)) == 11_173_962


def test_resnet34_and_vgg11_have_torchvisions_numbers_of_parameters():
    """But for the stem, 3×3 for 7×7, and the one linear layer for VGG's three."""
    assert (count(models.resnet34()) == count(torchvision.models.resnet34(num_classes=100))
            - 64 * 3 * (49 - 9) == 21_328_292)
    features = torchvision.models.vgg11_bn().features
    biases = sum(m.bias.numel() for m in features if isinstance(m, nn.Conv2d))  # which the normalisation has
    assert count(models.vgg11()) == count(features) - biases + 512 * 100 + 100 == 9_274_532
    plain = torchvision.models.vgg11().features
    assert count(models.vgg11(norm=None)) == count(plain) + 512 * 100 + 100


def test_vgg11_computes_what_torchvisions_does():
    ours, theirs = models.vgg11(10, None, 64).double(), torchvision.models.vgg11().features.double()
    for layer, other in zip(ours.layers, [m for m in theirs if isinstance(m, nn.Conv2d)]):
        layer.load_state_dict(other.state_dict())
    x = torch.randn(2, 3, 64, 64).double()
    assert torch.allclose(ours(x), ours.classifier(theirs(x).mean((2, 3))))


def test_resnet34_computes_what_torchvisions_does():
    ours, theirs = models.resnet34(10, "batch", 64).eval(), torchvision.models.resnet34(num_classes=10).eval()
    theirs.conv1, theirs.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    mine, other = ours.state_dict(), theirs.state_dict()
    assert len(mine) == len(other)
    theirs.load_state_dict(dict(zip(other, mine.values())))     # both list them in the same order
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(ours(x), theirs(x), atol=1e-5)


@pytest.mark.parametrize("classes, w", [(10, 8), (100, 16), (7, 5)])
@pytest.mark.parametrize("kind", [None, *norm.KINDS])
def test_counts_by_hand(classes, w, kind):
    per_channel = {None: 1, "batch": 2, "layer": 2, "rms": 1, "whiten": 2}[kind]    # gain, bias, or both

    def conv(i, o, k=3):
        return i * o * k * k + per_channel * o

    mlp = 3072 * w + 3 * w * w + 4 * per_channel * w + w * classes + classes
    cnn = (conv(3, w) + conv(w, 2 * w) + conv(2 * w, 4 * w) + conv(4 * w, 4 * w)
           + 4 * w * 16 * classes + classes)
    resnet = conv(3, w) + 4 * conv(w, w) + 8 * w * classes + classes
    for o in (2 * w, 4 * w, 8 * w):
        resnet += conv(o // 2, o) + 3 * conv(o, o) + conv(o // 2, o, 1)
    assert count(models.mlp(classes, kind, w)) == mlp
    assert count(models.cnn(classes, kind, w)) == cnn
    assert count(models.resnet18(classes, kind, w)) == resnet


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("size, channels", [(32, 3), (28, 1), (17, 3)])
def test_shapes(name, size, channels):
    model = models.MODELS[name](13, "batch", width=4, channels=channels, size=size)
    assert model(torch.randn(2, channels, size, size)).shape == (2, 13)


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("make", [models.mlp, models.cnn])
def test_depth(make, depth):
    model = make(10, None, width=4, depth=depth)
    assert (len(model.layers) == len(model.norms) == depth
            and model(torch.randn(2, 3, 32, 32)).shape == (2, 10))
    if make is models.cnn:
        # 12: each stage three times
        strides = {1: [1], 2: [1, 4], 3: [1, 2, 2], 4: [1, 2, 2, 2], 6: [1, 1, 2, 2, 1, 2]}
        assert [layer.stride[0] for layer in model.layers] == strides.get(depth, [1, 1, 1] + 3 * [2, 1, 1])
        assert model.layers[-1].out_channels == (4 if depth == 1 else 16)
    if depth == 4:
        assert count(model) == count(make(10, None, width=4))


@pytest.mark.parametrize("name", models.MODELS)
def test_stem_first_classifier_last(name):
    layers = [m for m in models.MODELS[name](10, width=4).modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert layers[0].weight.shape[1] in (3, 3072) and layers[-1].weight.shape[0] == 10


@pytest.mark.parametrize("name", models.MODELS)
def test_without_norm_there_is_none(name):
    model = models.MODELS[name](10, None, width=4)
    assert not [m for m in model.modules() if type(m) in norm.KINDS.values()]
    one, two = torch.randn(2, 1, 3, 32, 32)
    assert torch.allclose(model(torch.cat([one, two]))[:1], model(one), atol=1e-6)      # images do not meet


@pytest.mark.parametrize("name", models.MODELS)
def test_without_norm_the_signal_neither_dies_nor_explodes(name):
    torch.manual_seed(0)
    model = models.MODELS[name](10, None, width=16)
    entering = {}
    model.classifier.register_forward_pre_hook(lambda m, args: entering.update(x=args[0]))
    model(torch.randn(64, 3, 32, 32))
    assert 0.1 < entering["x"].square().mean() < (4 if name == "vgg11" else 3)  # each max-pool adds a little


@pytest.mark.parametrize("kind", ["batch", None])
def test_a_shortcut_without_weights_is_means_of_pixels_and_zeros_for_new_channels(kind):
    x = torch.randn(2, 8, 7, 6)
    got = models.Pad(2, 3)(x)
    assert got.shape == (2, 11, 4, 3) and torch.equal(got[:, 8:], torch.zeros(2, 3, 4, 3))
    assert torch.allclose(got[:, :8, 0, 1], x[:, :, :2, 2:4].mean((2, 3)), atol=1e-6)
    assert torch.equal(models.Pad(1, 0)(x), x)
    model = models.resnet18(10, kind, 8, shortcut="pad").eval()
    assert not [name for name, p in model.named_parameters() if "shortcut" in name]
    block = model.blocks[2]                                     # 8 -> 16 channels, halved
    nn.init.zeros_(block.conv2.weight)                          # the branch ends in zeros
    x = torch.rand(2, 8, 8, 8)
    assert torch.equal(block(x), models.Pad(2, 8)(x))


def test_a_resnet_can_do_without_shortcuts():
    torch.manual_seed(0)
    model = models.resnet18(10, "batch", 8, shortcut="none")
    plain = models.resnet18(10, "batch", 8)
    assert {n for n, _ in plain.named_parameters()} - {n for n, _ in model.named_parameters()} == {
        n for n, _ in plain.named_parameters() if "shortcut" in n}
    nn.init.zeros_(model.eval().blocks[3].conv2.weight)
    assert not model.blocks[3](torch.rand(1, 16, 4, 4)).any()           # nothing goes past the branch
    with pytest.raises(ValueError, match="shortcut must be one of"):
        models.resnet18(10, shortcut="long")


@pytest.mark.parametrize("kind", ["batch", None])
@pytest.mark.parametrize("name", models.MODELS)
def test_backprop_learns_a_batch_by_heart(name, kind):
    torch.manual_seed(0)
    model = models.MODELS[name](10, kind, width=32 if name == "mlp" else 8, size=16)
    x, labels = torch.randn(16, 3, 16, 16), torch.randint(10, (16,))
    slow = name in ("resnet34", "vgg11") and kind is None
    optimiser = torch.optim.SGD(model.parameters(), lr=0.005 if slow else 0.02, momentum=0.9, nesterov=True)
    for _ in range(120 if slow else 60):
        loss = F.cross_entropy(model(x), labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss < 0.5


@pytest.mark.parametrize("name", models.MODELS)
@pytest.mark.parametrize("kind", ["batch", None])
def test_the_initialisation_can_be_chosen(name, kind):
    def weights(init):
        torch.manual_seed(0)
        model = models.MODELS[name](norm=kind, width=16, init=init)
        return [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]

    for he, default in zip(weights("he")[:-1], weights("torch")[:-1]):  # the classifier is always torch's
        fan_in = he.weight[0].numel()
        scale = he.initialise.keywords["scale"]
        assert he.weight.std().item() * fan_in ** 0.5 == pytest.approx(scale * 2 ** 0.5, rel=0.2)
        assert default.weight.abs().max().item() * fan_in ** 0.5 == pytest.approx(1, rel=0.05)
        assert not hasattr(default, "initialise")
    chosen = weights("torch" if kind else "he")
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(weights(None), chosen))
    with pytest.raises(ValueError, match="init"):
        weights("xavier")


def test_unknown_norm():
    with pytest.raises(ValueError, match="unknown normalisation"):
        models.cnn(norm="instance")
