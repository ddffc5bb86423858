"""rank.py: the measures are their formulas on the singular values of an SVD; cutting and flattening change
the singular values of any optimiser's update and nothing else; angles are those of the gradients."""
import copy
import math

import pytest
import torch

import fa
import models
import muon
import rank

MEASURES = [rank.effective_rank, rank.participation_ratio, rank.stable_rank]
SHAPES = [(12, 30), (30, 12), (16, 16)]


def with_spectrum(sigma, m=40, n=60):
    generator = torch.Generator().manual_seed(0)
    k = len(sigma)
    P = torch.linalg.qr(torch.randn(m, k, generator=generator, dtype=torch.float64))[0]
    Q = torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64))[0]
    return P @ torch.tensor(sigma, dtype=torch.float64).diag() @ Q.mT


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_singular_values_and_measures_are_those_of_an_svd(shape):
    torch.manual_seed(0)
    M = torch.randn(shape)
    sigma = torch.linalg.svdvals(M.double())
    assert torch.allclose(rank.singular_values(M), sigma, rtol=1e-9)
    p, energy = sigma / sigma.sum(), sigma ** 2
    expected = (torch.exp(-(p * p.log()).sum()), energy.sum() ** 2 / (energy ** 2).sum(),
                energy.sum() / sigma[0] ** 2)
    assert [measure(M) for measure in MEASURES] == pytest.approx([e.item() for e in expected], rel=1e-9)


@pytest.mark.parametrize("measure", MEASURES)
def test_n_equal_singular_values_have_rank_n_at_any_scale(measure):
    for n in (1, 2, 40):
        M = with_spectrum([3.0] * n)
        for matrix in (M, M.mT, 1e-30 * M, 1e200 * M, M.float()):
            assert measure(matrix) == pytest.approx(n, rel=1e-3 if n > 1 else 1e-2)
    assert measure(torch.zeros(3, 4)) == 0
    for bad in (torch.zeros(0, 4), torch.zeros(4), torch.zeros(2, 3, 4), torch.tensor([[1, math.nan]]),
                torch.tensor([[1, math.inf]])):
        with pytest.raises(ValueError, match="rank"):
            measure(bad)


def test_the_docstrings_example():
    M = with_spectrum([1 / i for i in range(1, 101)], 100, 100)
    assert [round(measure(M), 1) for measure in MEASURES] == [39.7, 2.5, 1.6]


# ---- cut and flatten ---------------------------------------------------------------------------------------

def made(m, n):
    torch.manual_seed(0)
    return torch.randn(m, n) @ torch.logspace(0, -2, n).diag()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_cut_is_the_nearest_matrix_of_that_rank_at_the_same_norm(shape):
    M = made(*shape)
    P, sigma, Qt = torch.linalg.svd(M.double(), full_matrices=False)
    for r in (1, 3, 100):
        nearest = P[:, :r] @ sigma[:r].diag() @ Qt[:r]                          # Eckart & Young 1936
        assert torch.allclose(rank.cut(M, r).double(), nearest * (M.norm() / nearest.norm()), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flatten_keeps_singular_vectors_and_norm_and_nothing_else(shape):
    M = made(*shape)
    P, _, Qt = torch.linalg.svd(M.double(), full_matrices=False)
    length = M.double().norm() / min(shape) ** 0.5
    assert torch.allclose(rank.flatten(M).double(), P @ Qt * length, atol=1e-4)


@pytest.mark.parametrize("change", [rank.flatten, lambda u: rank.cut(u, 2)])
def test_what_is_zero_or_not_finite_stays(change):
    for value in (0.0, math.nan, math.inf):
        M = torch.full((4, 6), value)
        assert torch.allclose(change(M), M, equal_nan=True)


@pytest.mark.parametrize("make, layout", [
    (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01), torch.contiguous_format),
    (lambda p: muon.Muon(p, 0.1), torch.channels_last)])
def test_the_update_of_any_optimiser_is_replaced(make, layout):
    def weights():
        torch.manual_seed(0)
        kernels = torch.randn(6, 4, 3, 3).to(memory_format=layout)
        return torch.nn.Parameter(kernels), torch.nn.Parameter(torch.randn(5, 6))

    plain, changed = weights(), weights()
    for params in (plain, changed):
        for p in params:
            p.grad = torch.ones_like(p) + p.detach() ** 2
    was = [p.detach().clone() for p in plain]
    make(plain).step()
    with rank.updates(changed[:1], lambda u: rank.cut(u, 2)):
        make(changed).step()
    wanted = rank.cut((plain[0].detach() - was[0]).flatten(1), 2).view_as(was[0])
    assert torch.allclose(changed[0], was[0] + wanted, atol=1e-6)
    assert not torch.allclose(changed[0], plain[0], atol=1e-3)
    assert torch.equal(changed[1], plain[1])                    # only what was named
    assert changed[0].stride() == plain[0].stride()


# ---- angles ------------------------------------------------------------------------------------------------

def test_alignment_is_the_angle_between_both_gradients_in_one_call():
    torch.manual_seed(0)
    model, x, labels = models.cnn(5, "batch", 4, size=8), torch.randn(6, 3, 8, 8), torch.arange(6) % 5
    model.insert = torch.nn.Dropout(0.5)
    handle = fa.attach(model, fa.FA())

    def loss():
        return torch.nn.functional.cross_entropy(model(model.insert(x)), labels)

    def gradients():
        torch.manual_seed(1)
        return dict(zip(handle.layers, torch.autograd.grad(
            loss(), [layer.weight for layer in handle.layers.values()])))

    ours = gradients()
    with handle.exact():
        exact = gradients()
    torch.manual_seed(1)
    angles = rank.alignment(handle, loss)
    assert angles == {name: rank.angle(ours[name], exact[name]) for name in handle.layers}
    assert angles["classifier"] == 0 and 45 < angles["layers.1"] < 135
    assert all(p.grad is None for p in model.parameters())


@torch.no_grad()                                        # as in a function that evaluates
def test_alignment_knows_computed_weights_and_leaves_out_frozen_ones():
    torch.manual_seed(0)
    plain, x = models.mlp(3, None, 8, size=4, depth=3), torch.randn(6, 48)
    computed, angles = copy.deepcopy(plain), []
    for layer in computed.layers:
        torch.nn.utils.parametrizations.weight_norm(layer)
    for model in plain, computed:
        model.layers[2].requires_grad_(False)
        handle = fa.attach(model, fa.FA(seed=0))
        angles.append(rank.alignment(handle, lambda model=model: model(x).square().mean()))
    assert angles[1] == pytest.approx(angles[0]) and 45 < angles[0]["layers.1"] < 135
    assert angles[0].keys() == {"layers.1", "classifier"}
    assert rank.alignment(fa.attach(models.mlp(3, size=4), fa.BP()), lambda: 0) == {}


def test_angles_and_the_mean_cosine_by_hand():
    a = torch.tensor([[1.0, 0.0]])
    assert rank.angle(a, torch.tensor([[0.0, 2.0]])) == pytest.approx(90)
    assert rank.angle(a, torch.tensor([[3.0, 3.0]])) == pytest.approx(45)
    assert rank.angle(a, torch.tensor([[1.0, 1e-9]])) == pytest.approx(math.degrees(1e-9))
    assert rank.angle(a, -a) == pytest.approx(180) and math.isnan(rank.angle(a, 0 * a))
    with pytest.raises(ValueError, match="no angle"):
        rank.angle(a, torch.ones(2))
    rows = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0]])
    assert rank.mean_cosine(rows) == rank.mean_cosine(1e-20 * rows) == pytest.approx((1 + 0 + 0) / 3)
