"""Hypothesis looks for an input that breaks something: each property here holds for every input, or one of
the stated errors.

The oracles share no code with what they check: autograd, an SVD, the file before it was damaged. The examples
are the same in every run. These tests need hypothesis (tests/requirements.txt) and are skipped without it.
"""
import contextlib
import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import data
import fa
import models
import muon
import norm
import rank
from harness import files, flags, rulefile

hypothesis = pytest.importorskip("hypothesis")
st = pytest.importorskip("hypothesis.strategies")
given, example, settings = hypothesis.given, hypothesis.example, hypothesis.settings

# derandomize: a failure belongs to a change of the code, not to chance. No deadline: the first call of a
# kernel is slow.
settings.register_profile("suite", derandomize=True, deadline=None, max_examples=150)
settings.load_profile("suite")

SEEDS = st.integers(0, 2 ** 32 - 1)
FLOATS = st.sampled_from([torch.float32, torch.float64])


def normal(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def close(a, b, tolerance):
    """a and b have the same shape, and differ by little beside the largest entry of b."""
    return (a.shape == b.shape
            and bool(((a - b).abs() <= tolerance * b.abs().max()).all() if b.numel() else True))


# ---- fa.project: autograd's gradient, with the weight put in -----------------------------------------------

def one_or_two(low, high):
    number = st.integers(low, high)
    return number | st.tuples(number, number)


@st.composite
def convolutions(draw):
    """(layer, input shape) with at least one pixel of output."""
    padding = draw(st.just("same") | st.just("valid") | one_or_two(0, 3))
    groups = draw(st.integers(1, 3))
    layer = nn.Conv2d(groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2)),
                      draw(one_or_two(1, 4)), padding=padding,
                      stride=1 if padding == "same" else draw(one_or_two(1, 3)),
                      dilation=draw(one_or_two(1, 3)), groups=groups)
    pads = (0, 0) if isinstance(padding, str) else layer.padding
    size = [max(1, d * (k - 1) + 1 - 2 * p) + draw(st.integers(0, 4))
            for d, k, p in zip(layer.dilation, layer.kernel_size, pads)]
    images = draw(st.sampled_from([(), (0,), (1,), (3,)]))  # () is one image without a batch dimension
    return layer, (*images, layer.in_channels, *size)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@example((nn.Conv2d(2, 2, (3, 2), padding="same", dilation=(1, 3)), (2, 2, 5, 6)), 0, *[torch.float64] * 2)
@given(convolutions(), SEEDS, FLOATS, FLOATS)
def test_an_error_crosses_any_convolution_as_autograd_sends_it(case, seed, dtype, weight_dtype):
    layer, shape = case
    weight = normal(seed, *layer.weight.shape, dtype=weight_dtype)
    x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    y = F.conv2d(x, weight.double(), None, layer.stride, layer.padding, layer.dilation, layer.groups)
    error = normal(seed + 1, *y.shape, dtype=dtype)
    expected, = torch.autograd.grad(y, x, error.double())
    got = fa.project(layer, weight, error, torch.Size(shape))
    assert (got.dtype == dtype
            and close(got, expected, 1e-5 if torch.float32 in (dtype, weight_dtype) else 1e-12))


# ---- muon.newton_schulz: the polynomial on the singular values of an SVD -----------------------------------

@st.composite
def stacks(draw, smallest=1):
    """(..., m, n) in float64, of any rank and scale, contiguous or not."""
    batch = draw(st.lists(st.integers(1, 3), max_size=2))
    m, n = draw(st.integers(smallest, 9)), draw(st.integers(smallest, 9))
    r, seed = draw(st.integers(0, 9)), draw(SEEDS)                          # rank 0: a zero matrix
    M = (normal(seed, *batch, m, r) @ normal(seed + 1, *batch, r, n) if draw(st.booleans()) else
         normal(seed, *batch, m, n))
    M = M * 10.0 ** draw(st.integers(-30, 100))
    layout = draw(st.sampled_from(["contiguous", "transposed", "strided"]))
    if layout == "transposed":
        return M.mT.contiguous().mT
    return torch.stack([M, M + 1], -1)[..., 0] if layout == "strided" else M


def polynomial_of_the_singular_values(M, steps, eps=1e-7):
    U, sigma, Vh = torch.linalg.svd(M, full_matrices=False)
    sigma = sigma / sigma.square().sum(-1, keepdim=True).sqrt().clamp(min=eps)
    for _ in range(steps):
        sigma = 3.4445 * sigma - 4.7750 * sigma ** 3 + 2.0315 * sigma ** 5
    return U @ torch.diag_embed(sigma) @ Vh


@given(stacks(), st.integers(0, 6))
def test_newton_schulz_is_its_polynomial_of_the_singular_values(M, steps):
    before = M.clone()
    got = muon.newton_schulz(M, steps, torch.float64)
    assert got.dtype == torch.float64 and close(got, polynomial_of_the_singular_values(M, steps), 1e-9)
    assert close(muon.newton_schulz(M.mT, steps, torch.float64).mT, got, 1e-9)
    assert torch.equal(M, before)


@given(stacks(smallest=0), st.sampled_from([torch.float32, torch.float64, torch.int64]),
       st.sampled_from([torch.bfloat16, torch.float32, torch.float64]))
def test_newton_schulz_is_finite_in_every_dtype_and_zero_where_the_norm_overflows(M, given_as, dtype):
    got = muon.newton_schulz(M.clamp(-2 ** 60, 2 ** 60).to(given_as), dtype=dtype)
    assert got.shape == M.shape and got.dtype == dtype and got.isfinite().all()
    assert muon.newton_schulz(torch.full_like(M, math.nan), dtype=dtype).isnan().all()
    if M.shape[-2:] != (1, 1):                          # the norm of a number is taken without squaring it
        large = torch.full_like(M, 1e160 if dtype == torch.float64 else 1e25)
        assert not muon.newton_schulz(large, dtype=dtype).any()


# ---- rank.py: the formulas on the singular values of an SVD ------------------------------------------------

def by_svd(M):
    """(effective rank, participation ratio, stable rank), from the formulas in rank.py's docstring."""
    sigma = torch.linalg.svdvals(M.double())
    p = (sigma / sigma.sum())[sigma > 0]
    energy = (sigma / sigma[0]) ** 2
    return ((-(p * p.log()).sum()).exp().item(), (energy.sum() ** 2 / (energy ** 2).sum()).item(),
            energy.sum().item())


def measured(M):
    return rank.effective_rank(M), rank.participation_ratio(M), rank.stable_rank(M)


@st.composite
def matrices(draw):
    """(m, n), not zero, of any rank."""
    m, n, r, seed = draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(st.integers(1, 12)), draw(SEEDS)
    M = normal(seed, m, r) @ normal(seed + 1, r, n) if draw(st.booleans()) else normal(seed, m, n)
    return M * 10.0 ** -torch.arange(n).double() if draw(st.booleans()) else M          # a steep spectrum


@given(matrices(), FLOATS, st.floats(1e-290, 1e290))
def test_the_measures_are_their_formulas_at_any_scale(M, dtype, scale):
    M = M.to(dtype)
    expected = by_svd(M)
    for same in (M, scale * M.double(), M.mT):
        assert measured(same) == pytest.approx(expected, rel=1e-5)
    assert all(1 - 1e-9 <= value <= min(M.shape) * (1 + 1e-9) for value in measured(M))


@given(st.integers(1, 6), st.integers(1, 6), st.floats(1e300, 1.7e308))
def test_a_matrix_near_the_largest_number_has_a_rank_or_a_stated_error(m, n, value):
    try:
        assert measured(torch.full((m, n), value, dtype=torch.float64)) == pytest.approx((1, 1, 1))
    except ValueError as e:
        assert "too large" in str(e) and value * math.sqrt(m * n) > 1e308


# ---- data.load: a damaged cache is an error or does no harm ------------------------------------------------

WHOLE = data.Dataset(torch.arange(2 * 3072).remainder(251).to(torch.uint8).view(2, 3, 32, 32),
                     torch.tensor([0, 9]),
                     torch.arange(3072).remainder(241).to(torch.uint8).view(1, 3, 32, 32), torch.tensor([4]),
                     [*map(str, range(10))])


def contents(dataset):
    """Whatever the order of the images: pairs of image and label, of the training set and of the test set."""
    return [sorted((bytes(image), int(label)) for image, label in zip(images.numpy(), labels))
            for images, labels in (dataset[:2], dataset[2:4])]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@example(damage=[], kind="flip")
@example(damage=[(5000, 1)], kind="flip")                       # a pixel
@given(damage=st.lists(st.tuples(st.integers(0, 2 ** 20), st.integers(1, 255)), min_size=1, max_size=4),
       kind=st.sampled_from(["flip", "cut", "insert"]))
def test_a_cache_with_a_few_bytes_changed(root, damage, kind):
    file = io.BytesIO()
    torch.save(WHOLE._asdict(), file)
    changed = bytearray(file.getvalue())
    for place, byte in damage:
        place %= max(1, len(changed))
        if kind == "flip":
            changed[place] ^= byte
        elif kind == "cut":
            del changed[place:]
        else:
            changed.insert(place, byte)
    (root / "cifar10.pt").write_bytes(changed)
    try:
        got = data.load("cifar10", root)
        assert contents(got) == contents(WHOLE) and got.classes == WHOLE.classes
    except files.Problem as e:
        assert damage and len(str(e).splitlines()) == 1


# ---- flags.parse: arguments, or one line and status 2 ------------------------------------------------------

FLAGS = sorted(flag for action in flags.parser()._actions for flag in action.option_strings
               if flag not in ("-h", "--help"))
NUMBERS = st.integers().map(str) | st.floats().map(str) | \
    st.sampled_from(["0", "1", "2", "-1", "1e400", "-0.0", "nan", "inf", "0x10", "1_0", "\u0663", "9" * 400])
# Lone surrogates too: sys.argv has them where bytes are not UTF-8.
ANY_TEXT = st.text(st.characters(), max_size=8)
WORDS = st.sampled_from([*fa.RULES, *norm.KINDS, *data.NAMES, *models.MODELS, *models.INITS, "cpu", "cuda",
                         "cuda:0", "meta", "cpu:-1", "cuda:99999999999", ".", "..", "x" * 300, "no.py:Rule",
                         "tests:", "--", "-", "", "[]"])
VALUES = WORDS | NUMBERS | ANY_TEXT


@example([("--seed", "9" * 400)], False)
@example([("--dataset", "x" * 300)], False)
@example([("--device", "a\nb")], True)
@given(st.lists(st.tuples(st.sampled_from(FLAGS) | st.text(max_size=3).map("--{}".format),
                          st.none() | VALUES),
                max_size=5), st.booleans())
def test_any_arguments_are_taken_or_refused_in_one_line(pairs, joined):
    argv = []
    for flag, value in pairs:
        argv += [flag] if value is None else [f"{flag}={value}"] if joined else [flag, value]
    hypothesis.assume(not any(len(arg) > 2 and "--help".startswith(arg) for arg in argv))
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            args = flags.parse(argv)
    except SystemExit as e:
        assert (e.code == 2 and said.getvalue().startswith("train.py: ")
                and len(said.getvalue().splitlines()) == 1)
    else:
        assert said.getvalue() == "" and args.epochs >= 1 and args.batch_size >= 1 and args.width >= 1
        assert 0 < args.lr < math.inf and args.device.type == "cpu"


# ---- rulefile.load: a rule, or one line --------------------------------------------------------------------

SOURCE = """import fa

class MyRule(fa.FA):
    def backward(self, layer, error, input_shape):
        return fa.project(layer, layer.feedback, error, input_shape)
"""
PIECES = st.sampled_from([*"()[]{}:=.,'\"\\#\n \t\0é", "\n    ", "self", "fa", "None", "1", "error",
                          "lambda:", "def "])


@given(st.lists(st.tuples(st.integers(0, len(SOURCE)), st.integers(0, 6), PIECES), min_size=1, max_size=2),
       st.sampled_from(["MyRule", "MyRule", "fa", ""]))
def test_a_rule_with_a_few_characters_changed(tmp_path_factory, edits, name):
    source, file = SOURCE, tmp_path_factory.getbasetemp() / "edited_rule.py"
    for place, removed, piece in edits:
        source = source[:place] + piece + source[place + removed:]
    file.write_text(source, encoding="utf-8")
    try:
        assert issubclass(rulefile.load(f"{file}:{name}"), fa.Rule)
    except rulefile.RuleFileError as e:
        assert len(str(e).splitlines()) == 1 and str(file) in str(e)
