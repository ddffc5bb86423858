"""fa.py and muon.split inside other people's programs: hooks, anomaly mode, second derivatives, odd layers,
pickles.

Where B is W the gradients must be autograd's; what cannot be right must be refused in one clear error.
"""
import copy
import io
import pickle
import types
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune

import fa
import muon
from harness import recorder
from test_fa import Transport, gradients, relative


def network(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 6, 3, stride=2), nn.Tanh(),
                         nn.Flatten(), nn.Linear(54, 8), nn.Tanh(), nn.Linear(8, 5)).to(dtype)


X, LABELS = (torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
             torch.arange(4))


def both(model=None, rule=None):
    """(plain, with a rule): two copies of a model, the second with a rule whose B is W."""
    model = model or network()
    ours = copy.deepcopy(model)
    return model, ours, fa.attach(ours, rule or Transport())


def grads(model):
    return {name: p.grad for name, p in model.named_parameters() if not name.endswith("feedback")}


def same(model, ours, tolerance=1e-10):
    expected, got = grads(model), grads(ours)
    assert expected.keys() == got.keys()
    for name, g in got.items():
        assert (g is None) == (expected[name] is None), name
        assert g is None or relative(g, expected[name]) < tolerance, name


# ---- A: the whole error at a layer's output ----------------------------------------------------------------

@pytest.mark.parametrize("index", [0, 2, 5, 7])
def test_a_loss_on_a_feature_that_a_forward_hook_kept(index):
    losses = []
    plain, ours, _ = both()
    for model in (plain, ours):
        kept = {}
        model[index].register_forward_hook(lambda a, b, o, kept=kept: kept.update(o=o))
        loss = F.cross_entropy(model(X), LABELS) + 3 * kept["o"].square().sum()
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == losses[1]
    same(plain, ours)


def halve(module, args, output):
    return 0.1 * output if isinstance(module, nn.Linear | nn.Conv2d) else None


@pytest.mark.parametrize("kind", ["forward hook", "global forward hook", "tensor hook", "pre-hook",
                                  "backward pre-hook"])
def test_hooks_that_change_what_passes(kind):
    plain, ours, _ = both()
    everywhere = ([torch.nn.modules.module.register_module_forward_hook(halve)]
                  if kind == "global forward hook" else [])
    try:
        for model in (plain, ours):
            layer = model[5]
            if kind == "forward hook":
                layer.register_forward_hook(halve)
            elif kind == "pre-hook":
                layer.register_forward_pre_hook(lambda m, args: (0.1 * args[0],))
            elif kind == "backward pre-hook":
                layer.register_full_backward_pre_hook(lambda m, e: (0.1 * e[0],))
            elif kind == "tensor hook":
                layer.register_forward_hook(lambda m, args, o: o.register_hook(lambda g: 0.1 * g) and None)
            F.cross_entropy(model(X), LABELS).backward()
    finally:
        for handle in everywhere:
            handle.remove()
    same(plain, ours)


def test_anomaly_mode_finds_anomalies_only():
    plain, ours, handle = both()
    with warnings.catch_warnings(), torch.autograd.detect_anomaly(check_nan=True):
        warnings.simplefilter("ignore")
        for model in (plain, ours):
            F.cross_entropy(model(X), LABELS).backward()
    same(plain, ours)
    handle.before_step()


def test_a_part_of_the_gradients_first():
    plain, ours, handle = both()
    for model in (plain, ours):
        loss = F.cross_entropy(model(X), LABELS)
        (part,) = torch.autograd.grad(loss, model[5].weight, retain_graph=True)
        loss.backward()
        assert torch.equal(part, model[5].weight.grad)
    same(plain, ours)
    handle.before_step()


def test_a_backward_pass_that_failed_half_way_and_was_repeated():
    plain, ours, handle = both()
    loss = F.cross_entropy(ours(X), LABELS)

    class Full(Exception):
        pass

    def fail(gradient):
        raise Full

    full = ours[2].weight.register_hook(fail)
    with pytest.raises(Full):
        loss.backward(retain_graph=True)
    full.remove()
    ours.zero_grad()
    loss.backward()
    F.cross_entropy(plain(X), LABELS).backward()
    same(plain, ours)
    handle.before_step()


def test_a_frozen_stem_and_the_first_step_of_a_recurrent_net_give_no_warning():
    plain, ours, handle = both()
    cell = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)).double()
    recurrent, ours2, handle2 = both(cell)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in (plain, ours):
            model[0].requires_grad_(False)
            F.cross_entropy(model(X), LABELS).backward()
        for model in (recurrent, ours2):
            h = torch.zeros(2, 5, dtype=torch.float64)
            for x in torch.randn(3, 2, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2)):
                h = torch.tanh(model[1](h) + x)
            h.square().sum().backward()
    same(plain, ours)
    same(recurrent, ours2)
    handle.before_step()
    handle2.before_step()


class ThroughB(torch.autograd.Function):
    """The reference: y = x Wᵀ forward, B in W's place backward, differentiable as often as one likes."""

    @staticmethod
    def forward(ctx, x, weight, feedback):
        ctx.save_for_backward(x, feedback)
        return x @ weight.mT

    @staticmethod
    def backward(ctx, error):
        x, feedback = ctx.saved_tensors
        return error @ feedback, error.mT @ x, None


def test_a_penalty_on_the_inputs_gradient_is_right():
    torch.manual_seed(0)
    model = nn.Sequential(*(m for i in range(3) for m in (nn.Linear(4, 4, bias=False), nn.Tanh()))).double()
    fa.attach(model, fa.FA(), stem=())
    x, weights = torch.randn(5, 4, dtype=torch.float64), [model[i].weight for i in (0, 2, 4)]

    def reference(h):
        for i, weight in zip((0, 2, 4), weights):
            h = torch.tanh(ThroughB.apply(h, weight, model[i].feedback))
        return h

    results = []
    for run in (model, reference):
        for again in (False, True):                             # the loss itself is in the sum, or is not
            entry = x.clone().requires_grad_()
            loss = run(entry).square().sum()
            (gx,) = torch.autograd.grad(loss, entry, create_graph=True)
            results.append(torch.autograd.grad(gx.square().sum() + again * loss, weights))
    for ours, expected in zip(results[:2], results[2:]):
        assert all(relative(g, e) < 1e-12 for g, e in zip(ours, expected))
        assert all(g.abs().sum() > 0 for g in ours)


def test_a_second_derivative_of_weight_gradients_is_refused():
    for loss_of in (lambda y: F.cross_entropy(y, LABELS), lambda y: y.sum()):
        _, ours, _ = both()
        for parameters in (list(ours.parameters()), [ours[2].weight], [ours[7].weight], [ours[5].bias]):
            first = torch.autograd.grad(loss_of(ours(X)), parameters, create_graph=True)    # alone no harm
            with pytest.raises(RuntimeError, match="differentiated again"):
                sum(g.square().sum() for g in first).backward()
        with torch.no_grad():
            assert all(g.isfinite().all() for g in first)


# ---- B, C, D: which layers, and how they are called --------------------------------------------------------

class Tokens(nn.Module):
    """A small transformer block that reads its layer's weight and never calls the layer."""

    def __init__(self, also_call=False):
        super().__init__()
        self.stem, self.qkv, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.also_call = also_call

    def forward(self, x):
        h = torch.tanh(self.stem(x))
        return self.head(F.linear(h, self.qkv.weight) + (self.qkv(h) if self.also_call else 0))


def test_a_weight_that_is_used_without_calling_its_layer():
    model = Tokens()
    handle = fa.attach(model, fa.FA())
    model(torch.randn(5, 4)).sum().backward()
    with pytest.raises(fa.HookError, match="'qkv': its weight was used without calling the layer"):
        handle.before_step()
    model = Tokens(also_call=True)
    handle = fa.attach(model, fa.FA())
    model(torch.randn(5, 4)).sum().backward()
    handle.before_step()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_layer_that_is_skipped_now_and_then_is_no_error(set_to_none):
    model = network(torch.float32)
    handle, optimiser = fa.attach(model, fa.FA()), torch.optim.SGD(model.parameters(), 0.1)
    for skipped in (False, True, False, True, True):
        optimiser.zero_grad(set_to_none=set_to_none)
        h = X.float()
        for layer in model[:5] if skipped else model:
            h = layer(h)
        h.square().mean().backward()
        handle.before_step()
        optimiser.step()


class LinearReLU(nn.Linear):
    def forward(self, x):
        return super().forward(x).relu()


class SameConv(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(F.pad(x, (1, 1, 1, 1)), weight, bias)


class Initialised(nn.Linear):
    def reset_parameters(self):
        nn.init.normal_(self.weight, std=0.1)
        nn.init.zeros_(self.bias)


def test_a_layer_with_a_forward_of_its_own_keeps_backprop_and_is_named():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), SameConv(4, 4, 3), nn.Flatten(), LinearReLU(144, 6),
                          Initialised(6, 5), nn.Linear(5, 5)).double()
    ours = copy.deepcopy(plain)
    replaced = ours[5].forward
    ours[5].forward = lambda x: 2 * replaced(x)
    plain[5].forward = lambda x, layer=plain[5]: 2 * nn.Linear.forward(layer, x)
    with pytest.warns(UserWarning, match=r"exact backprop goes through 1 \(SameConv\), 3 \(LinearReLU\), "
                                         r"5 \(Linear\)"):
        handle = fa.attach(ours, Transport())
    assert list(handle.layers) == ["4"] and isinstance(ours[4], Initialised) and "Initialised(" in repr(ours)
    for model in (plain, ours):
        F.cross_entropy(model(X), LABELS).backward()
    same(plain, ours)


def test_a_vision_transformer_is_not_named_for_its_position_embedding():
    class ViT(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch, self.pos_embed = nn.Conv2d(3, 8, 4, 4), nn.Parameter(torch.zeros(1, 4, 8))
            self.cls, self.mlp, self.mix = (nn.Parameter(torch.zeros(1, 1, 8)), nn.Linear(8, 8),
                                            nn.Parameter(torch.eye(8)))

    _, unknown = fa.find(ViT())
    assert list(unknown) == [""]                                # for `mix`, a matrix
    model = ViT()
    del model.mix
    assert fa.find(model)[1] == {} and list(fa.find(nn.ConvTranspose2d(1, 4, 3))[1]) == [""]


@pytest.mark.parametrize("keyword", ["hidden", "stem", "wrong stem"])
def test_inputs_by_keyword(keyword):
    plain = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)).double()
    ours, x = copy.deepcopy(plain), torch.randn(5, 3, dtype=torch.float64)
    fa.attach(ours, Transport(), stem=["1"] if keyword == "wrong stem" else None)
    chosen = {"hidden": 1, "stem": 0, "wrong stem": 1}[keyword]

    def run(model):
        h = x
        for i, layer in enumerate(model):
            h = layer(input=h) if i == chosen else layer(h)
        h.square().sum().backward()

    if keyword == "wrong stem":
        with pytest.raises(RuntimeError, match="taken for the stem"):
            run(ours)
        return
    run(plain)
    run(ours)
    same(plain, ours)


# ---- E: models that travel ---------------------------------------------------------------------------------

def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("rule", fa.RULES)
@pytest.mark.parametrize("travel", [through_torch_save, lambda m: pickle.loads(pickle.dumps(m)),
                                    copy.deepcopy],
                         ids=["save", "pickle", "deepcopy"])
def test_a_model_that_was_saved_whole_follows_its_rule(travel, rule):
    model = network()
    handle = fa.attach(model, fa.RULES[rule](seed=3))
    expected = gradients(model, X, LABELS) if rule != "frozen" else None
    clone, their_handle = travel((model, handle))
    alone = travel(model)
    for other in (clone, alone):
        assert type(other[2]).__name__ == "Conv2d" and isinstance(other[5], nn.Linear)
        if expected is None:
            F.cross_entropy(other(X), LABELS).backward()
            assert other[2].weight.grad is None
        else:
            assert all(torch.equal(g, expected[k]) for k, g in gradients(other, X, LABELS).items())
    their_handle.before_step()
    their_handle.remove()
    assert type(clone[2]) is nn.Conv2d and "forward" not in vars(clone[2])
    F.cross_entropy(clone(X), LABELS).backward()


def child(model, connection):
    connection.send({k: g.numpy() for k, g in gradients(model, X, LABELS).items()})


def test_a_model_that_was_sent_to_another_process():
    model = network()
    fa.attach(model, fa.FA())
    expected = gradients(model, X, LABELS)
    model.zero_grad()
    context = torch.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(model, theirs))
    process.start()
    theirs.close()                              # so that a child that dies does not leave us waiting
    got = ours.recv()
    process.join()
    assert (all(torch.allclose(torch.from_numpy(g), expected[k]) for k, g in got.items())
            and got.keys() == expected.keys())


def test_a_replica_of_data_parallel_follows_the_rule_with_its_own_weights():
    """torch.nn.parallel.replicate needs GPUs; this is what it does to each module."""
    model = network()
    handle = fa.attach(model, fa.FA())
    expected = gradients(model, X, LABELS)
    model.zero_grad()
    replica = model._replicate_for_data_parallel()
    leaves = {}
    for name, module in model._modules.items():
        replica._modules[name] = copied = module._replicate_for_data_parallel()
        for key, p in module._parameters.items():
            leaf = (2 * p).detach().requires_grad_()    # other numbers than the model's: which ones are used?
            leaves[f"{name}.{key}"] = leaf
            setattr(copied, key, leaf / 2)
        for key, b in module._buffers.items():
            setattr(copied, key, b)
    F.cross_entropy(replica(X), LABELS).backward()
    assert all(p.grad is None for p in model.parameters())
    for name, leaf in leaves.items():
        assert relative(2 * leaf.grad, expected[name]) < 1e-12, name
    handle.before_step()
    dfa = fa.attach(fresh := network(), fa.DFA())
    replicas = fresh._replicate_for_data_parallel()
    for name, module in fresh._modules.items():
        replicas._modules[name] = copied = module._replicate_for_data_parallel()
        for key, tensor in {**module._parameters, **module._buffers}.items():
            setattr(copied, key, tensor)
    with pytest.raises(fa.RuleError, match=r"feedback of shape \(0,\)"):
        F.cross_entropy(replicas(X), LABELS).backward()
    dfa.remove()


# ---- F: feedback that learns -------------------------------------------------------------------------------

@pytest.mark.parametrize("spoil", [lambda layer: parametrizations.weight_norm(layer),
                                   lambda layer: prune.random_unstructured(layer, "weight", 0.5),
                                   lambda layer: parametrizations.spectral_norm(layer)],
                         ids=["weight_norm", "prune", "spectral_norm"])
def test_kp_refuses_a_weight_that_is_computed(spoil):
    model = network(torch.float32)
    spoil(model[5])
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match="its weight is computed from others"):
        fa.attach(model, fa.KolenPollack())
    assert not any(hasattr(m, "feedback") or hasattr(m, "rule") or hasattr(m, "crossing")
                   for m in model.modules())
    assert type(model[2]) is nn.Conv2d and before.keys() == {name for name, _ in model.named_modules()}
    handle = fa.attach(model, fa.FA())
    F.cross_entropy(model(X.float()), LABELS).backward()
    handle.before_step()


@pytest.mark.parametrize("optimiser", [lambda p: torch.optim.SGD(p, 0.1),
                                       lambda p: torch.optim.AdamW(p, 0.1, foreach=True),
                                       lambda p: torch.optim.SGD(p, 0.1, fused=True)],
                         ids=["sgd", "adamw", "fused"])
@pytest.mark.parametrize("when", ["before attach", "without the feedback", "right"])
def test_kp_notices_an_optimiser_that_has_not_got_its_feedback(when, optimiser):
    model = network(torch.float32)
    early = optimiser(model.parameters())
    handle = fa.attach(model, fa.KolenPollack())
    chosen = {"before attach": early, "right": optimiser(model.parameters()),
              "without the feedback": optimiser([p for name, p in model.named_parameters()
                                                 if not name.endswith("feedback")])}[when]

    def steps(n):
        for _ in range(n):
            chosen.zero_grad()
            F.cross_entropy(model(X.float()), LABELS).backward()
            handle.before_step()
            chosen.step()

    if when == "right":
        steps(3)
        return
    with pytest.raises(fa.HookError, match="has moved the weight of Conv2d.* but not its feedback"):
        steps(2)


def test_kp_does_not_mind_a_step_that_is_left_out():
    model = network(torch.float32)
    handle = fa.attach(model, fa.KolenPollack())
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for take in (True, False, True, False, False, True):
        optimiser.zero_grad()
        F.cross_entropy(model(X.float()), LABELS).backward()
        handle.before_step()
        if take:
            optimiser.step()


# ---- G: dfa ------------------------------------------------------------------------------------------------

class Heads(nn.Module):
    def __init__(self, classes=(3, 3)):
        super().__init__()
        self.stem, self.body = nn.Linear(4, 6), nn.Linear(6, 6)
        self.heads = nn.ModuleList(nn.Linear(6, c) for c in classes)

    def forward(self, x, head):
        return self.heads[head](torch.tanh(self.body(torch.tanh(self.stem(x)))))


def test_dfa_uses_the_error_of_this_pass_and_of_no_other():
    model, x = Heads(), torch.randn(5, 4)
    fa.attach(model, fa.DFA())
    error, entry = {}, {}
    for head in model.heads:
        head.register_forward_hook(lambda m, a, o: o.register_hook(lambda g: error.update(e=g)) and None)
    model.body.register_forward_pre_hook(lambda m, a: a[0].register_hook(lambda g: entry.update(e=g))
                                         and None)
    for head in (0, 1, 0):
        model(x, head).square().sum().backward()
        assert torch.allclose(entry["e"], error["e"] @ model.body.feedback)
    rule, other = model.body.rule, network(torch.float32)
    fa.attach(other, rule)                                      # one rule, two models
    F.cross_entropy(other(X.float()), LABELS).backward()
    model(x, 0).square().sum().backward()


def test_dfa_takes_other_batches_and_an_empty_one():
    model = network(torch.float32)
    fa.attach(model, fa.DFA())
    for n in (4, 2, 1):
        model.zero_grad()
        F.cross_entropy(model(X[:n].float()), LABELS[:n]).backward()
        assert model[2].weight.grad.abs().sum() > 0
    model.zero_grad()
    model(X[:0].float()).sum().backward()
    assert model[2].weight.grad.abs().sum() == 0
    one = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    fa.attach(one, fa.DFA())
    one(torch.randn(3)).sum().backward()
    fresh = network(torch.float32)
    fa.attach(fresh, fa.DFA())
    fresh(X[:0].float()).sum().backward()


@pytest.mark.parametrize("case", ["sequence first", "image size", "classes"])
def test_dfa_refuses_what_does_not_match(case):
    if case == "sequence first":
        stem, body, head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        model = nn.Sequential(stem, body, nn.Tanh())
        whole = nn.ModuleList([model, head])
        fa.attach(whole, fa.DFA())
        y = head(model(torch.randn(7, 5, 4)).mean(0))   # (T, N, C), and the batch comes first at the end
        fails = lambda: y.sum().backward()
    elif case == "image size":
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                              nn.Linear(4, 2))
        fa.attach(model, fa.DFA())
        model(torch.randn(2, 3, 9, 9)).sum().backward()
        fails = lambda: model(torch.randn(2, 3, 8, 8)).sum().backward()
    else:
        model = Heads((3, 4))
        fa.attach(model, fa.DFA())
        model(torch.randn(5, 4), 0).sum().backward()
        fails = lambda: model(torch.randn(5, 4), 1).sum().backward()
    with pytest.raises(fa.RuleError, match="expected the batch on the first axis") as error:
        fails()
    assert "\n" not in str(error.value)


# ---- H: who goes to Muon -----------------------------------------------------------------------------------

def test_split_lists_a_shared_weight_once():
    shared = nn.Linear(6, 6)
    twice = nn.Linear(6, 6)
    twice.weight = shared.weight
    model = nn.Sequential(nn.Linear(4, 6), shared, nn.Tanh(), twice, nn.Linear(6, 3))
    hidden, others = muon.split(model)
    assert [id(p) for p in hidden] == [id(shared.weight)]
    assert len({id(p) for p in hidden + others}) == len(hidden) + len(others) == len(list(model.parameters()))


class HeadFirst(nn.Module):
    def __init__(self, tie=False):
        super().__init__()
        self.head, self.body, self.stem = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        if tie:
            self.head.weight = self.body.weight


@pytest.mark.parametrize("by", ["name", "module", "list"])
def test_stem_and_classifier_can_be_named(by):
    model = HeadFirst()
    stem, head = {"name": ("stem", "head"), "module": (model.stem, model.head),
                  "list": (["stem"], [model.head])}[by]
    hidden, others = muon.split(model, stem=stem, classifier=head)
    assert [id(p) for p in hidden] == [id(model.body.weight)]
    for wrong in ("nothing", nn.Linear(2, 2), 3):
        with pytest.raises(ValueError, match="layers"):
            muon.split(model, stem=wrong)


def test_a_head_that_is_tied_to_a_hidden_layer_is_a_head():
    model = HeadFirst(tie=True)
    hidden, _ = muon.split(model, stem="stem", classifier="head")
    assert hidden == []


def test_muon_refuses_duplicates_and_complex_weights():
    p = nn.Parameter(torch.randn(3, 4))
    with pytest.raises(ValueError, match="more than once"):
        muon.Muon([p, p])
    with pytest.raises(ValueError, match="more than one"):
        muon.Muon([{"params": [p]}, {"params": [p]}])
    with pytest.raises(ValueError, match="complex"):
        muon.Muon([nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))])


# ---- L: attach that fails, state that is lost --------------------------------------------------------------

@pytest.mark.parametrize("rule, stem, error", [
    (fa.FA, None, TypeError), ("fa", None, TypeError), ({}, None, TypeError), (None, None, TypeError),
    (fa.FA(), ["nothing"], ValueError), (fa.FA(), [nn.Linear(2, 2)], ValueError), (fa.FA(), [3], ValueError),
    (fa.FA(), "nothing", ValueError)])
def test_an_attach_that_fails_is_one_error_and_leaves_the_model_alone(rule, stem, error):
    model = network(torch.float32)
    with pytest.raises(error) as raised:
        fa.attach(model, rule, stem=stem)
    assert "\n" not in str(raised.value) and not any(hasattr(m, "crossing") for m in model.modules())
    fa.attach(model, fa.FA()).remove()


@pytest.mark.parametrize("stem", ["0", ["0"], lambda model: model[0], lambda model: [model[0]]])
def test_the_stem_by_name_or_layer(stem):
    model = network(torch.float32)
    handle = fa.attach(model, fa.FA(), stem=stem(model) if callable(stem) else stem)
    assert list(handle.layers) == ["2", "5", "7"]


def test_a_rule_that_fails_to_prepare_leaves_the_model_alone():
    class Half(fa.FA):
        def prepare(self, layer):
            super().prepare(layer)
            if isinstance(layer, nn.Linear):
                raise KeyError("half")

    plain, model = network(torch.float32), network(torch.float32)
    with pytest.raises(KeyError):
        fa.attach(model, Half())
    assert model.state_dict().keys() == plain.state_dict().keys() and type(model[2]) is nn.Conv2d
    assert {k for m in model.modules() for k in vars(m)} == {k for m in plain.modules() for k in vars(m)}
    fa.attach(model, fa.FA())


def test_a_rules_own_state_is_saved_and_comes_back():
    class Counting(fa.FA):
        calls, total = 0, 0.0

        def backward(self, layer, error, input_shape):
            self.calls += 1
            self._scratch = error
            self.mean = torch.rand((), generator=self.generator)
            return super().backward(layer, error, input_shape)

    rule, model = Counting(seed=2), network(torch.float32)
    fa.attach(model, rule)
    F.cross_entropy(model(X.float()), LABELS).backward()
    file = io.BytesIO()
    torch.save(rule.state_dict(), file)
    file.seek(0)
    other = Counting(seed=5)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert other.calls == 3 and torch.equal(other.mean, rule.mean) and not hasattr(other, "_scratch")
    assert torch.equal(other.draw(model[5]), rule.draw(model[5]))


def test_the_recorder_leaves_no_trace_in_a_model_with_a_rule():
    model = network(torch.float32)
    handle = fa.attach(model, fa.FA())
    before = {name: dict(vars(m)) for name, m in model.named_modules()}
    recorder.Recorder(model, handle, X.float(), LABELS).measure()
    for name, m in model.named_modules():
        now = {k: v for k, v in vars(m).items() if not isinstance(v, types.SimpleNamespace)}
        assert now.keys() == {k for k, v in before[name].items() if not isinstance(v, types.SimpleNamespace)}
