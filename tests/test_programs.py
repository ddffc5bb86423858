"""fa.py and muon.split in other people's programs: where B is W the gradients are autograd's, whatever hooks
and odd layers there are; what cannot be right is refused; models can be saved, copied and replicated."""
import contextlib
import copy
import functools
import io
import warnings

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import fa
import muon
from test_fa import Transport, agree, contents, gradients, grads, relative


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 6, 3, stride=2), nn.Tanh(),
                         nn.Flatten(), nn.Linear(54, 8), nn.Tanh(), nn.Linear(8, 5)).double()


X, LABELS = (torch.randn(4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
             torch.arange(4))


def both(model=None):
    """(plain, with a rule whose B is W, its handle)"""
    plain = model or network()
    ours = copy.deepcopy(plain)
    return plain, ours, fa.attach(ours, Transport())


def backward(model):
    F.cross_entropy(model(X), LABELS).backward()


# ---- hooks, and backward passes of every kind --------------------------------------------------------------

@pytest.mark.parametrize("hook", [
    lambda layer: layer.register_forward_hook(lambda m, args, y: 0.1 * y),
    lambda layer: layer.register_forward_hook(lambda m, args, y: y.register_hook(lambda e: 0.1 * e) and None),
    lambda layer: layer.register_forward_pre_hook(lambda m, args: (0.1 * args[0],)),
    lambda layer: layer.register_full_backward_pre_hook(lambda m, e: (0.1 * e[0],))],
    ids=["output", "error", "input", "error before"])
def test_hooks_that_change_what_passes_and_a_loss_on_a_feature_that_a_hook_kept(hook):
    plain, ours, _ = both()
    for model in plain, ours:
        kept = []
        for index in 2, 5:
            hook(model[index])
            model[index].register_forward_hook(lambda m, args, y, kept=kept: kept.append(y))
        (F.cross_entropy(model(X), LABELS) + sum(3 * y.square().sum() for y in kept)).backward()
    agree(grads(ours), grads(plain))


def test_a_global_hook_changes_each_layers_output_once():
    plain, ours, _ = both()
    hook = nn.modules.module.register_module_forward_hook(
        lambda m, args, y: 0.5 * y if isinstance(m, fa.Layer) else None)
    try:
        agree(gradients(ours, X, LABELS), gradients(plain, X, LABELS))
    finally:
        hook.remove()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_a_part_of_the_gradients_first_in_anomaly_mode():
    plain, ours, handle = both()
    with torch.autograd.detect_anomaly(check_nan=True):
        for model in plain, ours:
            loss = F.cross_entropy(model(X), LABELS)
            (part,) = torch.autograd.grad(loss, model[5].weight, retain_graph=True)
            loss.backward()
            assert torch.equal(part, model[5].weight.grad)
    agree(grads(ours), grads(plain))
    handle.before_step()


def test_a_backward_pass_that_failed_half_way_and_was_repeated():
    plain, ours, handle = both()
    loss = F.cross_entropy(ours(X), LABELS)
    full = ours[2].weight.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loss.backward(retain_graph=True)
    full.remove()
    ours.zero_grad()
    loss.backward()
    agree(grads(ours), gradients(plain, X, LABELS))
    handle.before_step()


def test_a_frozen_stem_and_the_first_step_of_a_recurrent_net_give_no_warning():
    plain, ours, handle = both()
    recurrent, ours2, handle2 = both(nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 5)).double())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for model in plain, ours:
            model[0].requires_grad_(False)
            backward(model)
        for model in recurrent, ours2:
            h = torch.zeros(2, 5, dtype=torch.float64)
            for x in X[0, :, :2, :5]:
                h = torch.tanh(model[1](h) + x)
            h.square().sum().backward()
    agree(grads(ours), grads(plain))
    agree(grads(ours2), grads(recurrent))
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

    for again in False, True:                                   # the loss itself is in the sum, or is not
        results = []
        for run in model, reference:
            entry = x.clone().requires_grad_()
            loss = run(entry).square().sum()
            (gx,) = torch.autograd.grad(loss, entry, create_graph=True)
            results.append(torch.autograd.grad(gx.square().sum() + again * loss, weights))
        assert all(g.any() and relative(g, expected) < 1e-12 for g, expected in zip(*results))


def test_a_rule_that_reads_the_weight_refuses_another_one_than_that_of_the_forward_pass():
    for rule, message in (fa.FA(), None), (fa.SignSymmetry(), "SignSymmetry reads the weight of Linear"):
        model = network()
        fa.attach(model, rule)
        weights = {name: -weight.detach().requires_grad_() for name, weight in model.named_parameters()}
        loss = F.cross_entropy(torch.func.functional_call(model, weights, (X,)), LABELS)
        with pytest.raises(fa.RuleError, match=message) if message else contextlib.nullcontext():
            loss.backward()


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")         # torch's own, within jvp
def test_derivatives_that_go_forward_are_exact_or_refused():
    plain, ours, _ = both()
    along, weights = torch.randn_like(X), dict(plain.named_parameters())
    values = {name: weight.detach() for name, weight in weights.items()}
    results = []
    for model in plain, ours:
        given = functools.partial(torch.func.functional_call, model)
        results.append([torch.func.jvp(model, (X,), (along,))[1],
                        torch.func.jacfwd(model)(X[:1, :, :7, :7]),
                        torch.func.jvp(lambda w: given(w, (X,)), (values,), (values,))[1]])     # noqa: B023
    assert all(torch.equal(*pair) and pair[0].any() for pair in zip(*results))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
        ours(forward_ad.make_dual(X, along))                    # recorded for a backward pass as well


def test_a_second_derivative_of_weight_gradients_is_refused():
    _, ours, _ = both()
    for loss_of in (lambda y: F.cross_entropy(y, LABELS)), (lambda y: y.sum()):
        for parameters in [*ours.parameters()], [ours[2].weight], [ours[7].weight], [ours[5].bias]:
            first = torch.autograd.grad(loss_of(ours(X)), parameters, create_graph=True)    # alone no harm
            with pytest.raises(RuntimeError, match="differentiated again"):
                sum(g.square().sum() for g in first).backward()


# ---- which layers, and how they are called -----------------------------------------------------------------

class Tokens(nn.Module):
    """Calls its layer, reads its weight as attention does, both, or leaves it out."""

    def __init__(self):
        super().__init__()
        self.stem, self.qkv, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x, how):
        h = torch.tanh(self.stem(x))
        if "calls" in how:
            h = h + self.qkv(h)
        return self.head(h + F.linear(h, self.qkv.weight) if "reads" in how else h)


def test_a_layer_whose_class_was_extended_as_fully_shard_does_still_follows_its_rule():
    plain, ours, handle = both()
    layer = ours[2]
    layer.__class__ = type("Sharded", (type("Mixed", (), {}), type(layer)), {})
    for model in plain, ours:
        backward(model)
    agree(grads(ours), grads(plain))
    handle.before_step()


@pytest.mark.parametrize("zero", [lambda o: o.zero_grad(), lambda o: o.zero_grad(set_to_none=False),
                                  lambda o: None], ids=["to none", "to zero", "never"])
def test_a_weight_may_be_left_out_of_a_step_but_not_used_without_calling_its_layer(zero):
    torch.manual_seed(0)
    model = Tokens()
    handle, optimiser = fa.attach(model, fa.FA()), torch.optim.SGD(model.parameters(), 0.01)

    def step(how):
        zero(optimiser)
        model(torch.randn(5, 4), how).square().mean().backward()
        handle.before_step()
        optimiser.step()

    for how in ("calls", "leaves out", "calls and reads", "leaves out", "leaves out", "calls"):
        step(how)
    with pytest.raises(fa.HookError, match="'qkv': its weight was used .* .name it in except_"):
        step("reads")


def test_a_new_gradient_is_not_taken_for_the_one_that_lay_in_its_place():
    for _ in range(100):
        stem, body, head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        model, x = nn.Sequential(stem, body, head), torch.randn(5, 4)
        handle = fa.attach(model, fa.FA())
        model(x).sum().backward()
        handle.before_step()
        model.zero_grad()
        head(F.linear(stem(x), body.weight)).sum().backward()
        with pytest.raises(fa.HookError, match="'1': its weight was used in exact"):
            handle.before_step()


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


class Odd(nn.Module):
    """Layers that the rules do not know, beside two that they do, body and head."""

    def __init__(self):
        super().__init__()
        self.stem, self.up = nn.Conv2d(3, 8, 3, padding=1, stride=2), nn.ConvTranspose2d(8, 1, 2, stride=2)
        self.attention, self.place = nn.MultiheadAttention(8, 2, batch_first=True), nn.Embedding(8, 8)
        self.mix, self.position = nn.ParameterList([torch.randn(8, 8)]), nn.Parameter(torch.randn(1, 8, 8))
        self.one = SameConv(1, 1, 3)
        self.norm, self.same, self.relu = nn.LayerNorm((8, 8)), SameConv(8, 8, 3), LinearReLU(8, 8)
        self.body, self.twice, self.head = Initialised(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.twice.forward = lambda x: 2 * F.linear(x, self.twice.weight)

    def forward(self, x):
        x = self.one(self.up(self.same(self.stem(x))))[:, 0]                            # (N, 8, 8)
        x = x + self.place(torch.arange(8)) + self.position
        x = self.norm(self.attention(x, x, x, need_weights=False)[0] @ self.mix[0])
        return self.head(self.twice(self.body(self.relu(x))).tanh().mean(1))


def test_layers_that_are_not_known_keep_exact_backprop_and_are_named_once():
    """Among them subclasses with a forward of their own; but not what is only looked up or added."""
    torch.manual_seed(0)
    plain = Odd().double()
    torch.manual_seed(0)
    ours = Odd().double()
    with pytest.warns(UserWarning) as caught:
        handle = fa.attach(ours, Transport())
    (said,) = [str(warning.message) for warning in caught]
    assert said.endswith("through up (ConvTranspose2d), attention (MultiheadAttention), mix (ParameterList), "
                         "one (SameConv), same (SameConv), relu (LinearReLU), twice (Linear)")
    assert repr(handle) == "<Transport through body, head; the stem is stem>" and "Initialised(" in repr(ours)
    agree(gradients(ours, X, LABELS), gradients(plain, X, LABELS))
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fa.attach(ours, fa.BP())                                # goes through everything
    assert [*fa.find(nn.ConvTranspose2d(1, 4, 3))[1]] == [""]
    model = nn.Sequential(nn.Linear(4, 4), parametrizations.weight_norm(nn.Linear(4, 4)), nn.RMSNorm((4, 4)))
    assert [*fa.find(model)[1]] == []


def test_a_stem_with_a_forward_of_its_own_is_the_stem_and_is_named_where_no_layer_has_the_rule():
    model = nn.Sequential(LinearReLU(3, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    for stem in (None, ["0"], model[0]):
        with pytest.warns(UserWarning, match=r"exact backprop goes through 0 \(LinearReLU\)"):
            handle = fa.attach(model, fa.FA(), stem=stem)
        assert [*handle.layers] == ["1", "2"]
        model(torch.randn(5, 3)).sum().backward()
        handle.before_step()
        handle.remove()
    with pytest.warns(UserWarning, match=r"exact backprop goes through 0 \(LinearReLU\), 1 \(LinearReLU\)"):
        fa.attach(nn.Sequential(LinearReLU(3, 4), LinearReLU(4, 2)), fa.FA())


# ---- models that travel ------------------------------------------------------------------------------------

def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def replicate(model):
    """What torch.nn.parallel.replicate, which needs GPUs, does: (the replica, twice the weights in it)."""
    replica, leaves = model._replicate_for_data_parallel(), {}
    for name, module in model._modules.items():
        replica._modules[name] = copied = module._replicate_for_data_parallel()
        for key, p in module._parameters.items():
            leaves[f"{name}.{key}"] = leaf = (2 * p).detach().requires_grad_()
            setattr(copied, key, leaf / 2)
        for key, b in module._buffers.items():
            setattr(copied, key, b)
    return replica, leaves


@pytest.mark.parametrize("rule", ["fa", "dfa", "kp", "frozen"])
@pytest.mark.parametrize("travel", [through_torch_save, copy.deepcopy])
def test_a_model_that_was_saved_whole_or_copied_follows_its_rule(travel, rule):
    model = network()
    handle = fa.attach(model, fa.RULES[rule](seed=3))
    early, its = travel((model, handle))                        # before dfa has drawn its feedback
    expected = gradients(model, X, LABELS)
    learn = {name.partition(".")[0] for name, g in expected.items() if g is not None}
    assert learn == ({"7"} if rule == "frozen" else {"0", "2", "5", "7"})
    for clone in early, travel(model):
        agree(gradients(clone, X, LABELS), expected, 0)
        assert type(clone[2]).__name__ == "Conv2d" and isinstance(clone[5], nn.Linear)
    its.before_step()
    its.remove()
    assert contents(early) == contents(network())
    agree(gradients(early, X, LABELS), gradients(network(), X, LABELS), 0)
    agree(gradients(model, X, LABELS), expected, 0)


def child(model, connection):
    connection.send({name: g.numpy() for name, g in gradients(model, X, LABELS).items()})


def test_a_model_that_was_sent_to_another_process_follows_its_rule():
    model = network()
    fa.attach(model, fa.FA())
    context = torch.multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=child, args=(model, theirs))
    process.start()
    theirs.close()                              # so that a child that dies does not leave us waiting
    got = {name: torch.from_numpy(g) for name, g in ours.recv().items()}
    process.join()
    agree(got, gradients(model, X, LABELS), 1e-12)


def test_a_replica_of_data_parallel_follows_the_rule_with_its_own_weights():
    model = network()
    handle = fa.attach(model, fa.FA())
    expected = gradients(model, X, LABELS)
    model.zero_grad()
    replica, leaves = replicate(model)
    backward(replica)
    assert all(p.grad is None for p in model.parameters())
    agree({name: 2 * leaf.grad for name, leaf in leaves.items()}, expected, 1e-12)
    handle.before_step()
    fa.attach(fresh := network(), fa.DFA())
    with pytest.raises(fa.RuleError, match=r"feedback of shape \(0,\)"):    # the model would not keep it
        backward(replicate(fresh)[0])


# ---- feedback that learns, and dfa -------------------------------------------------------------------------

@pytest.mark.parametrize("spoil", [parametrizations.weight_norm,
                                   lambda layer: prune.random_unstructured(layer, "weight", 0.5)])
def test_kp_refuses_a_weight_that_is_computed(spoil):
    model = network()
    spoil(model[5])
    before = contents(model)
    with pytest.raises(ValueError, match="its weight is computed from others"):
        fa.attach(model, fa.KolenPollack())
    assert contents(model) == before
    handle = fa.attach(model, fa.FA())
    backward(model)
    handle.before_step()


@pytest.mark.parametrize("when", ["before attach", "without the feedback", "right"])
def test_kp_notices_an_optimiser_that_has_not_got_its_feedback(when):
    """And does not mind a step that is left out."""
    model = network()
    early = [*model.parameters()]
    handle = fa.attach(model, fa.KolenPollack())
    optimiser = torch.optim.AdamW({
        "before attach": early, "right": model.parameters(),
        "without the feedback": [p for n, p in model.named_parameters() if "feedback" not in n]}[when], 0.1)

    def steps(*takes):
        for take in takes:
            optimiser.zero_grad()
            backward(model)
            handle.before_step()
            if take:
                optimiser.step()

    if when == "right":
        steps(False, True, False, False, True, True)
    else:
        steps(False, True)
        with pytest.raises(fa.HookError, match="has moved the weight of Conv2d.* but not its feedback"):
            steps(True)


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
    fa.attach(other := network(), model.body.rule)              # one rule, two models
    backward(other)
    model(x, 0).square().sum().backward()


def test_dfa_uses_the_outputs_error_within_a_checkpoint():
    torch.manual_seed(0)
    stem, head = nn.Linear(3, 8), nn.Linear(8, 4)
    block = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model, x = nn.Sequential(stem, block, head), torch.randn(5, 3)
    fa.attach(model, fa.DFA())
    found = []
    for reentrant in (None, True, False, True):
        model.zero_grad()
        hidden = stem(x).tanh()
        hidden = block(hidden) if reentrant is None else checkpoint(block, hidden, use_reentrant=reentrant)
        head(hidden).square().sum().backward()
        found.append(grads(model))
    for other in found[1:]:
        agree(other, found[0])


def test_dfa_takes_other_batches_and_an_empty_one():
    model, fresh = network(), network()
    fa.attach(model, fa.DFA())
    for n in (4, 2, 1):
        assert gradients(model, X[:n], LABELS[:n])["2.weight"].any()
    fa.attach(fresh, fa.DFA())
    for each in model, fresh:
        assert not gradients(each, X[:0])["2.weight"].any()


def test_dfa_refuses_what_does_not_match():
    sequence = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    images = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                           nn.Linear(4, 2))
    heads = Heads((3, 4))
    for model in sequence, images, heads:
        fa.attach(model, fa.DFA())
    x = torch.randn(5, 4)
    images(torch.randn(2, 3, 9, 9)).sum().backward()
    heads(x, 0).sum().backward()
    for output in (sequence[2](sequence[:2](torch.randn(7, 5, 4)).mean(0)),     # (T, N, C), then (N, C)
                   images(torch.randn(2, 3, 8, 8)), heads(x, 1)):
        with pytest.raises(fa.RuleError, match="expected the batch on the first axis") as error:
            output.sum().backward()
        assert "\n" not in str(error.value)


# ---- who goes to Muon --------------------------------------------------------------------------------------

@pytest.mark.parametrize("by", ["name", "module", "list"])
def test_split_takes_stem_and_classifier_by_name_or_layer_and_a_shared_weight_once(by):
    model = nn.ModuleDict({name: nn.Linear(6, 6) for name in ("tied", "head", "twice", "body", "stem")})
    model["twice"].weight, model["tied"].weight = model["body"].weight, model["head"].weight
    stem, head = {"name": ("stem", "head"), "module": (model["stem"], model["head"]),
                  "list": (["stem"], [model["head"]])}[by]
    hidden, others = muon.split(model, stem=stem, classifier=head)
    assert [id(p) for p in hidden] == [id(model["body"].weight)]
    assert len({id(p) for p in hidden + others}) == len(hidden + others) == len([*model.parameters()])
    for wrong in ("nothing", nn.Linear(2, 2), 3):
        with pytest.raises(ValueError, match="layers"):
            muon.split(model, stem=wrong)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_muon_refuses_duplicates_and_complex_weights():
    p = nn.Parameter(torch.randn(3, 4))
    with pytest.raises(ValueError, match="more than once"):
        muon.Muon([p, p])
    with pytest.raises(ValueError, match="more than one"):
        muon.Muon([{"params": [p]}, {"params": [p]}])
    with pytest.raises(ValueError, match="complex"):
        muon.Muon([nn.Parameter(torch.randn(3, 4, dtype=torch.complex64))])
