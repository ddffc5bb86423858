"""Feedback alignment: train a deep network without ever sending the error back through its own weights.

Write a layer as  a = W x,  and let  δ = ∂loss/∂a  be the error at its output. Backprop uses δ for two things:

    gradient of the weights     ∂loss/∂W = δ xᵀ       local: the layer has both
    error for the layer below   ∂loss/∂x = Wᵀ δ       needs W, on another path, in the other direction

A synapse does not know the weight of the synapse that leads the other way, so Wᵀδ is biologically implausible
(the weight-transport problem). Feedback alignment (Lillicrap et al. 2016) sends the error through a fixed
random matrix instead; with φ the nonlinearity, layer by layer (Boeshertz, Pascanu & Clopath 2026, Eq. 4):

    backprop    δ_l = W_{l+1}ᵀ δ_{l+1} ⊙ φ'(a_l)
    feedback    δ_l = B_{l+1}ᵀ δ_{l+1} ⊙ φ'(a_l)      B drawn like W, then never changed

(the paper's B is our Bᵀ; here B has the shape of W). The surprising thing is that it learns at all: W turns
towards B, so that the random errors become useful ones. `python fa.py` shows the angles fall.

In this file a *rule* says how the error crosses one layer, and nothing else: loss, nonlinearities,
normalisation, pooling and additions keep autograd's own backward. A new rule overrides one short method:

    class Unreliable(fa.FA):        # what if half of the feedback synapses fail, a different half each time?
        def backward(self, layer, error, input_shape):
            return fa.project(layer, F.dropout(layer.feedback), error, input_shape)

    handle = fa.attach(model, Unreliable(seed=0))          # any model made of nn.Linear and nn.Conv2d
    loss.backward()                                        # now gives the rule's gradients
    handle.before_step()                                   # some rules learn their feedback weights

How it works: each layer runs on a detached input, which cuts the true path, so Wᵀδ is neither computed nor
able to leak. A tie connects the output to the input again, and a full backward hook around the tie puts the
rule's error where the true one would have been.

Other layers, and subclasses of Linear and Conv2d with a forward of their own, keep exact backprop; `attach`
names them. Second derivatives of weight gradients, and torch.compile, raise an error. Not noticed: where a
weight is also used elsewhere, as in F.linear(h, layer.weight.T), that other use's error goes back exactly.
"""
from __future__ import annotations

import contextlib
import fnmatch
import functools
import types
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Layer: TypeAlias = nn.Linear | nn.Conv2d


# ---- the error crosses one layer ---------------------------------------------------------------------------

def project(layer: Layer, weight: Tensor, error: Tensor, input_shape: torch.Size) -> Tensor:
    """Send the error at a layer's output to its input: through W that is backprop, through B FA.

    layer        nn.Linear, or nn.Conv2d of padding_mode 'zeros', any stride, padding, dilation and groups
    weight       shaped like layer.weight: (out, in) or (out, in / groups, kh, kw)
    error        δ at the output: (..., out) or (N, out, H', W')
    input_shape  of the layer's input: (..., in) or (N, in, H, W); with a stride it does not follow from δ's
    returns      δ at the input, of input_shape, in the error's dtype

    For Linear this is  δ_in = δ W  on rows, the batched form of Wᵀδ. A convolution is the same product with
    the sparse matrix that the kernel stands for. Raises ValueError for a padding_mode other than 'zeros'.
    """
    weight = weight.to(error.dtype)                     # under autocast δ is bf16 and the weights are float32
    if isinstance(layer, nn.Linear):
        return (error @ weight).to(error.dtype)         # (..., out) @ (out, in); under autocast bf16
    check(layer)
    if error.dim() == 3:                                # one unbatched image
        return project(layer, weight, error[None], torch.Size((1, *input_shape)))[0]
    before, extra = layer.padding, [0, 0]               # zeros before the image; zeros more after it
    if isinstance(before, str):                         # "same", or "valid": none
        sums = [d * (k - 1) * (before == "same") for d, k in zip(layer.dilation, layer.kernel_size)]
        before, extra = [s // 2 for s in sums], [s % 2 for s in sums]
    n, channels, height, width = input_shape
    padded = (n, channels, height + extra[0], width + extra[1])
    # nn.grad.conv2d_input does the same, but first writes out a whole input, of which only the shape counts.
    layout = next((torch.channels_last for t in (error, weight) if not t.is_contiguous() and
                   t.is_contiguous(memory_format=torch.channels_last)), torch.contiguous_format)
    unread = torch.empty(padded, dtype=error.dtype, device=error.device, memory_format=layout)
    error = torch.ops.aten.convolution_backward(
        error, unread, weight, None, layer.stride, before, layer.dilation, False, (0, 0), layer.groups,
        (True, False, False))[0]
    return error[..., :height, :width] if any(extra) else error     # a view cannot be added to in place


# ---- a rule ------------------------------------------------------------------------------------------------

class Rule:
    """How the error crosses a layer on its way back. Subclass it, override `backward`, and `attach` it.

    seed           of the feedback weights; the same seed draws the same B on every machine
    uses_weight    (of the class) one of its methods reads layer.weight, directly or through a forward pass
    learns         (of the class) its feedback weights change in training
    needs_input    (of the class) `backward` and `before_step` find layer.input and layer.output
    needs_targets  (of the class) `backward` finds in self.targets what was put into handle.rule.targets
    """

    uses_weight = learns = needs_input = needs_targets = False
    targets: Any = None

    def __init__(self, seed: int = 0):
        # W is usually drawn after torch.manual_seed(seed). Another stream keeps B independent of it.
        self.generator = torch.Generator().manual_seed(seed + 0xFEEDBAC)

    def prepare(self, layer: Layer) -> None:
        """Called once for each layer that gets the rule, layer.crossing.name: make what the rule needs."""

    def release(self, layer: Layer) -> None:
        """Called by `remove`: undo what `prepare` did beyond buffers and parameters, such as a hook."""

    def backward(self, layer: Layer, error: Tensor, input_shape: torch.Size) -> Tensor | None:
        """δ at the layer's output -> δ at its input, of input_shape; or None, and nothing below learns.

        Called in every backward pass; autograd records it only under create_graph=True."""
        raise NotImplementedError(f"{type(self).__name__} has no backward(layer, error, input_shape)")

    def before_step(self, layer: Layer) -> None:
        """Called for each of these layers before the optimiser's step, for feedback that learns."""

    def draw(self, layer: Layer) -> Tensor:
        """A tensor like layer.weight, drawn on the CPU by the same initialiser: layer.initialise(tensor,
        generator=...) where the model has one, else torch's default, uniform in ±1/√fan_in."""
        initialise = getattr(layer, "initialise", functools.partial(nn.init.kaiming_uniform_, a=5 ** 0.5))
        drawn = initialise(torch.empty(layer.weight.shape, dtype=torch.float32, device="cpu"),
                           generator=self.generator)
        return torch.empty_like(layer.weight).copy_(drawn)      # its device, dtype and order in memory

    def __getstate__(self) -> dict[str, Any]:           # torch cannot send a generator to a spawned process
        return {**vars(self), "generator": bytes(self.generator.get_state().tolist())}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, generator=torch.Generator())
        self.generator.set_state(torch.tensor(list(state["generator"]), dtype=torch.uint8))

    def state_dict(self) -> dict[str, Any]:
        """What to remember when a run stops: the generator, and all attributes without a leading _."""
        return {key: value for key, value in self.__getstate__().items() if not key.startswith("_")}

    load_state_dict = __setstate__


class FA(Rule):
    """Feedback alignment: δ_in = Bᵀδ, with B drawn like W and fixed (Lillicrap et al. 2016; paper, Eq. 4).

    gain    the scale of B relative to that of W. It matters where another path carries the error too: a
            residual block's shortcut is exact, so the gain weighs the branch against it
    """

    def __init__(self, seed: int = 0, gain: float = 1.0):
        super().__init__(seed)
        if not 0 < gain < float("inf"):
            raise ValueError(f"gain={gain}: expected a finite number above 0")
        self.gain = gain

    def draw(self, layer: Layer) -> Tensor:
        return self.gain * super().draw(layer)

    def prepare(self, layer: Layer) -> None:
        layer.register_buffer("feedback", self.draw(layer))

    def backward(self, layer: Layer, error: Tensor, input_shape: torch.Size) -> Tensor:
        return project(layer, layer.feedback, error, input_shape)


# ---- the hook ----------------------------------------------------------------------------------------------

class _Cut:
    """Mixed into the class of each layer that has a rule. Its forward cuts the true path and ties it again,
    inside any forward hooks: so the rule gets the whole error at the layer's own output, whatever they do."""

    def forward(self: Any, input: Tensor) -> Tensor:
        if self.crossing.mode.exact:
            return super().forward(input)                               # type: ignore[misc]
        if torch.compiler.is_compiling() or torch.jit.is_tracing() and torch.is_grad_enabled():
            _refuse_to_compile()
        self.crossing.used |= torch.is_grad_enabled()
        self.crossing.within = torch._C._current_graph_task_id()        # a backward pass; -1 outside of one
        if not (input.requires_grad and torch.is_grad_enabled()):       # no error is wanted below
            return super().forward(input)                               # type: ignore[misc]
        output = super().forward(input.detach())                        # type: ignore[misc]
        seen = (input.detach(), output.detach()) if self.rule.needs_input else None
        # What nn.Module.__call__ does for a full backward hook.
        replace = functools.partial(_replace_error, seen=seen, weight=self._parameters.get("weight"))
        hook = torch.utils.hooks.BackwardHook(self, [replace], [])
        return hook.setup_output_hook(_Tie.apply(*hook.setup_input_hook((input, output))))

    def _load_from_state_dict(self: Any, state: dict, prefix: str, *rest: Any) -> None:
        """A buffer that is not drawn yet, or was not when it was saved, takes the saved size."""
        for key, buffer in self._buffers.items():
            saved = state.get(prefix + key)
            if buffer is not None and saved is not None and 0 in (buffer.numel(), saved.numel()):
                setattr(self, key, buffer.new_empty(saved.shape))
        super()._load_from_state_dict(state, prefix, *rest)             # type: ignore[misc]

    def __reduce_ex__(self: Any, protocol: Any) -> tuple:
        """Let pickle and deepcopy find the mixed class by the one it was made of."""
        return _blank, (self.crossing.plain,), *super().__reduce_ex__(protocol)[2:]


class _Tie(torch.autograd.Function):
    """Return y, computed from x.detach(), as if x had led to it. Backward hands x zeros that take no memory,
    for the hook to replace, and y its error, from which autograd gets W's and b's gradients."""

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor) -> Tensor:
        ctx.shape, ctx.dtype = x.shape, x.dtype
        ctx.set_materialize_grads(False)                # no error stays None instead of zeros
        return y.view_as(y)

    @staticmethod
    def backward(ctx, error: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        if error is None:
            return None, None
        placeholder = error.new_zeros((), dtype=ctx.dtype).expand(ctx.shape)
        if torch.is_grad_enabled():                     # create_graph: raise later, a path is missing
            error = torch._C._functions.DelayedError(TWICE, 1)(error.detach().requires_grad_())
        return placeholder, error


def _replace_error(layer: Layer, grad_input: tuple, grad_output: tuple, seen: tuple | None = None,
                   weight: Tensor | None = None) -> tuple:
    """The full backward hook: δ_out comes in, the placeholder goes, the rule's δ_in takes its place."""
    (placeholder, *others), (error,) = grad_input, grad_output
    if error is None:                                   # none came, though autograd may have put zeros for it
        return (None,) * len(grad_input)
    rule, name = layer.rule, type(layer.rule).__name__
    if rule.needs_targets and rule.targets is None:
        raise RuleError(f"{name} needs each batch's targets: set handle.rule.targets")
    if rule.uses_weight and layer._parameters.get("weight") is not weight:
        raise RuleError(f"{name} reads the weight of {layer}, which is not that of the forward pass: "
                        "torch.func.functional_call has put it back")
    if seen is not None:
        layer.input, layer.output = seen
    sent = rule.backward(layer, error, placeholder.shape)
    if sent is None:
        return None, *others
    if not (isinstance(sent, Tensor) and (sent.shape, sent.device) == (placeholder.shape, error.device)
            and sent.dtype in (error.dtype, placeholder.dtype)):        # under autocast they may be two
        got = (f"a tensor of shape {tuple(sent.shape)}, {sent.dtype} on {sent.device}"
               if isinstance(sent, Tensor) else f"{sent!r:.80}")
        raise RuleError(f"{name}.backward returned {got} for {layer}; expected the error at its input, "
                        f"shape {tuple(placeholder.shape)}, {error.dtype} on {error.device}, or None")
    return sent.to(placeholder.dtype), *others


def attach(model: nn.Module, rule: Rule, stem: Iterable[str | nn.Module] | None = None,
           only: Iterable[str | nn.Module] | None = None,
           except_: Iterable[str | nn.Module] = ()) -> Attachment:
    """Let `rule` carry the error back through every Linear and Conv2d of `model`, except the stem.

    The stem is the layer that reads the data: nothing below it learns, so it needs no error. By default it is
    the first Linear or Conv2d that the model registered; give the layers, or their names, if that is wrong,
    or () where even the data needs a gradient. `only` and `except_` choose among the others by name or
    pattern, such as "blocks.*.conv1"; those left out keep exact backprop, or get a rule by another attach.
    The model is changed in place; with `bp` it is not changed. In activations inplace=True becomes False
    until `remove`, as a layer's output must stay as it was; torch refuses y += x and F.relu_ on it.

    Attach before DistributedDataParallel, before the optimiser is made, and after loading a checkpoint saved
    without a rule. Raises TypeError if `rule` is no instance of Rule, and ValueError if a layer already has a
    rule or cannot be projected through, a name fits no layer of the model, or the model is compiled.
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"attach takes an instance of a rule, such as fa.FA(seed=0), not {rule!r:.80}")
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl is not None for m in model.modules()):
        raise ValueError(f"the model is compiled: {UNCOMPILED}")
    layers, unknown = find(model)
    readers = {name: m for name, m in model.named_modules()
               if isinstance(m, Layer) and name in layers.keys() | unknown.keys()}
    stems = dict(list(readers.items())[:1]) if stem is None else _named(readers, stem)
    chosen = (layers if only is None else _named(layers, only)).keys() - _named(layers, except_)
    hidden = {name: layer for name, layer in layers.items() if name in chosen - stems.keys()}
    if isinstance(rule, BP):
        hidden, stems, unknown = {}, {}, {}             # it goes through everything
    for name, layer in hidden.items():
        if hasattr(layer, "rule"):
            raise ValueError(f"layer {name!r} already has a rule ({type(layer.rule).__name__}); remove() its "
                             "handle first")
        check(layer)
    if unknown:
        named = ", ".join(f"{name} ({type(m).__name__})" for name, m in unknown.items())
        warnings.warn(f"{type(rule).__name__} goes through Linear and Conv2d only; exact backprop goes "
                      f"through {named}", stacklevel=2)
    return Attachment(model, rule, hidden, stems)


class Attachment:
    """The handle that `attach` returns: `rule`; `layers` by name, those that the rule goes through; `made`,
    the names of what the rule made in each. `copy.deepcopy((model, handle))` copies both as a pair."""

    def __init__(self, model: nn.Module, rule: Rule, layers: dict[str, Layer], stem: dict[str, Layer]):
        self.rule, self.layers, self.made, self._model, self._stem = rule, layers, {}, model, [*stem]
        self._mode, self._hooks = types.SimpleNamespace(exact=0), []
        for name, layer in layers.items():
            layer.crossing = types.SimpleNamespace(name=name, plain=type(layer), mode=self._mode, within=-1,
                                                   used=_gradient(layer) is not None)
            before = {*layer._buffers, *layer._parameters}
            try:
                rule.prepare(layer)
                layer.__class__, layer.rule = _cut(layer.crossing.plain), rule
            finally:
                self.made[name] = sorted({*layer._buffers, *layer._parameters} - before)
                if not hasattr(layer, "rule"):          # the rule cannot prepare it: all is as before
                    self.remove()
        for module in model.modules() if layers else ():
            if getattr(module, "inplace", False) is True:
                module.inplace, module.was_inplace = False, True
        first = functools.partial(_stem_is_first, self._mode)
        self._hooks = [layer.register_forward_pre_hook(first, with_kwargs=True) for layer in stem.values()]

    def __repr__(self) -> str:
        stem = f"; the stem is {', '.join(self._stem)}" if self._stem else ""
        return f"<{type(self.rule).__name__} through {', '.join(self.layers) or 'no layer'}{stem}>"

    def before_step(self) -> None:
        """Call after the backward pass and before the optimiser's step; clip gradients before it, not after.

        Raises HookError if a layer or its forward was replaced, or its weight used without calling it."""
        there = dict(self._model.named_modules(remove_duplicate=False))
        for name, layer in self.layers.items():
            gradient = _gradient(layer)
            new = gradient is not None and getattr(gradient, "seen", None) != gradient._version
            if there.get(name) is not layer:
                wrong = "the model has another layer in its place"
            elif "forward" in vars(layer) or type(layer).forward is not _Cut.forward:
                wrong = "its forward was replaced"
            elif new and not layer.crossing.used and gradient.any():
                wrong = "its weight was used in exact(), or without calling the layer (name it in except_)"
            else:
                continue
            raise HookError(f"{type(self.rule).__name__} did not carry the error through layer {name!r}: "
                            f"{wrong}; attach to the complete model, and change no layer until remove()")
        for layer in self.layers.values():
            self.rule.before_step(layer)
            for seen in ("input", "output"):
                vars(layer).pop(seen, None)
            layer.crossing.used, gradient = False, _gradient(layer)
            if gradient is not None:
                gradient.seen = gradient._version       # how often it was written to, to know a new one by
        self.rule.targets = None                        # the next batch has its own

    @contextlib.contextmanager
    def exact(self) -> Iterator[None]:
        """Within this context the model attached to is plain backprop, other handles' layers in it too."""
        modes = [module.crossing.mode for module in self._model.modules() if hasattr(module, "crossing")]
        for mode in modes:
            mode.exact += 1                             # contexts that are open, times layers
        try:
            yield
        finally:
            for mode in modes:
                mode.exact -= 1

    def remove(self) -> None:
        """Make the model plain again: exact backprop, no feedback weights, in-place activations as before."""
        for hook in self._hooks:
            hook.remove()
        for name, layer in self.layers.items():
            if hasattr(layer, "rule"):
                self.rule.release(layer)
                layer.__class__ = layer.crossing.plain
            for made in self.made.get(name, ()):
                delattr(layer, made)
            for attribute in ("rule", "crossing", "input", "output"):
                vars(layer).pop(attribute, None)
        if not any(hasattr(module, "rule") for module in self._model.modules()):
            for module in self._model.modules():
                if vars(module).pop("was_inplace", False):
                    module.inplace = True
        self.layers, self.made, self._stem, self._hooks = {}, {}, [], []


# ---- more rules --------------------------------------------------------------------------------------------

class BP(Rule):
    """Backprop: δ_in = Wᵀδ. It is what autograd does already, so `attach` leaves the model as it is."""

    uses_weight = True

    def backward(self, layer: Layer, error: Tensor, input_shape: torch.Size) -> Tensor:
        return project(layer, layer.weight, error, input_shape)


class DFA(FA):
    """Direct feedback alignment: δ_in = Bᵀe, from the output's error e = ∂loss/∂logits (Nøkland 2016).

    Each layer has a B of shape (classes, all units of its input), 253 MiB in ResNet-18 for 100 classes, drawn
    as the Linear layer from there to the classes would be: for the classifier itself DFA is FA. A hidden
    layer ignores the error that comes in. The output is the layer whose error comes first in a backward pass.
    Expect about what FA reaches. Raises RuleError if the batch is not the first axis, or the units change.
    """

    def prepare(self, layer: Layer) -> None:
        layer.register_buffer("feedback", layer.weight.new_empty(0))    # drawn when the first error comes
        self._pass = self._output = None                # a backward pass, and the output layer in it

    def signal(self, error: Tensor) -> Tensor:
        """What the output sends to all layers, of its error (N, classes)."""
        return error

    def backward(self, layer: Layer, error: Tensor, input_shape: torch.Size) -> Tensor:
        within = layer.crossing.within                  # a checkpoint has a pass of its own within the pass
        this_pass = torch._C._current_graph_task_id() if within < 0 else within
        if this_pass != self._pass or layer is self._output:
            alone = error.dim() == (1 if isinstance(layer, nn.Linear) else 3)   # one image, no batch axis
            self._batch = error.shape[:0 if alone else 1]                       # () or (N,)
            self._error = self.signal(error.flatten()[None] if alone else error.flatten(1))
            self._pass, self._output = this_pass, layer
        axes = len(self._batch)
        wanted = (self._error.shape[1], input_shape[axes:].numel())
        if layer.feedback.numel() == 0 and not hasattr(layer, "_is_replica"):   # DataParallel's forget
            like = nn.utils.skip_init(nn.Linear, *wanted[::-1], bias=False)
            layer.feedback = self.draw(like).to(layer.weight)
        if input_shape[:axes] != self._batch or layer.feedback.shape != wanted:
            raise RuleError(f"DFA: {layer} has an input of shape {tuple(input_shape)} and feedback of shape "
                            f"{tuple(layer.feedback.shape)}; the output's error {tuple(self._error.shape)}; "
                            "expected the batch on the first axis, and always the same units")
        sent = self._error @ layer.feedback.to(self._error.dtype)
        return sent.to(error.dtype).reshape(input_shape)


class SignSymmetry(FA):
    """Sign-symmetry: δ_in = (sign W ⊙ |B|)ᵀδ, signs of W, magnitudes of B (Liao, Leibo & Poggio 2016: frSF).

    A synapse must know one bit of another. Expect something between FA and backprop in a short run, near
    backprop in a long one, even on ImageNet (Xiao et al. 2018).
    """

    uses_weight = True

    def backward(self, layer: Layer, error: Tensor, input_shape: torch.Size) -> Tensor:
        return project(layer, layer.weight.sign() * layer.feedback.abs(), error, input_shape)


class KolenPollack(FA):
    """Kolen–Pollack: δ_in = Bᵀδ, and B takes W's updates (Kolen & Pollack 1994; Akrout et al. 2019).

        W ← (1 - ηλ) W + ΔW        B ← (1 - ηλ) B + ΔW        so  W - B  ←  (1 - ηλ) (W - B)

    Only a locally known update is transported; the weight decay λ forgets the difference, and ∠(W, B) falls
    to 0. Expect FA in the beginning, backprop after some 1/(ηλ) steps (momentum μ: (1 - μ)/(ηλ)), and
    much sooner where the common updates outgrow the first weights, as Muon's do.

    B is a parameter: attach before the optimiser is made, and give it the same one as W. No error reaches it,
    so DistributedDataParallel needs find_unused_parameters=True. Raises ValueError for a computed weight
    (weight_norm), and HookError when an optimiser has moved W but not B.
    """

    learns = True

    def prepare(self, layer: Layer) -> None:
        if "weight" not in layer._parameters:
            raise ValueError(f"{layer}: its weight is computed from others, so B cannot take its updates")
        layer.feedback = nn.Parameter(self.draw(layer))

    def before_step(self, layer: Layer) -> None:
        now = layer.weight.detach(), layer.feedback.detach()
        if not hasattr(layer.crossing, "first"):
            layer.crossing.first = [tensor.clone() for tensor in now]
        moved = [not torch.equal(*pair) for pair in zip(now, layer.crossing.first)]
        if moved == [True, False]:
            raise HookError(f"the optimiser has moved the weight of {layer} but not its feedback: make it "
                            "after attach, and give it model.parameters()")
        if any(moved):
            layer.crossing.first = []                   # B has been seen to move, so the optimiser has it
        layer.feedback.grad = None if layer.weight.grad is None else layer.weight.grad.clone()


class Frozen(Rule):
    """No error: hidden layers stay as they were drawn, and the classifier learns on random features.

    The floor under every claim: a rule that is not above it has taught the hidden layers nothing useful.
    Hidden parameters get no gradient (None, not zero), so weight decay and momentum leave them alone too.
    """

    def backward(self, layer: Layer, error: Tensor, input_shape: torch.Size) -> None:
        return None


RULES = {"bp": BP, "fa": FA, "dfa": DFA, "sign": SignSymmetry, "kp": KolenPollack, "frozen": Frozen}


# ---- guards ------------------------------------------------------------------------------------------------

class HookError(RuntimeError):
    """An error crossed a layer in some way other than the rule's, or an optimiser left out the feedback."""


class RuleError(RuntimeError):
    """A rule cannot say, or said wrongly, what the error at a layer's input is."""


def check(layer: Layer) -> None:
    """Raise ValueError if no error can be projected through this layer."""
    if isinstance(layer.weight, nn.UninitializedParameter):
        raise ValueError(f"{layer} has no weights yet: run the model forward once, then attach")
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        raise ValueError(f"{layer}: feedback needs zero-padding, not padding_mode={layer.padding_mode!r}")


def find(model: nn.Module) -> tuple[dict[str, Layer], dict[str, nn.Module]]:
    """(layers, unknown) by name: what a rule goes through, and what else carries an error by a matrix."""
    layers, unknown = {}, {}
    attention = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    for name, module in model.named_modules():
        if any(module is m.out_proj for m in attention):    # attention reads its weight, but never calls it
            continue
        if isinstance(module, Layer) and (type(module).forward is _Cut.forward or _keeps_forward(module)):
            layers[name] = module
        elif ((isinstance(module, Layer) or _has_matrix(module))
              and name.partition(".parametrizations.")[0] not in layers):
            unknown[name] = module
    return layers, unknown


def _keeps_forward(layer: Layer) -> bool:
    """Does it compute W x + b, and not, as a subclass may, something more or something else?"""
    kind = nn.Linear if isinstance(layer, nn.Linear) else nn.Conv2d
    return all(getattr(type(layer), name, None) is getattr(kind, name, None) and name not in vars(layer)
               for name in ("forward", "_conv_forward"))


def _gradient(layer: Layer) -> Any:
    return getattr(layer._parameters.get("weight"), "grad", None)       # a computed weight is not in there


def _has_matrix(module: nn.Module) -> bool:
    """Does an error cross a parameter of it by a matrix? One of shape (1, tokens, units) is only added."""
    if isinstance(module, nn.Embedding | nn.EmbeddingBag | nn.LayerNorm | nn.RMSNorm):
        return False
    torchs = type(module).__module__.startswith("torch.nn")
    return any(isinstance(p, nn.UninitializedParameter) or
               sum(size > 1 for size in p.shape) > 1 and (torchs or len(p) > 1)
               for p in module.parameters(recurse=False))


def _named(layers: dict[str, Layer], wanted: Iterable[str | nn.Module]) -> dict[str, Layer]:
    """Those that these names, patterns or layers mean."""
    found: dict[str, Layer] = {}
    for each in [wanted] if isinstance(wanted, str | nn.Module) else wanted:
        fits = {name: layer for name, layer in layers.items()
                if (fnmatch.fnmatchcase(name, each) if isinstance(each, str) else layer is each)}
        if not fits:
            raise ValueError(f"{each!r} is none of the model's layers, which are {', '.join(layers)}")
        found.update(fits)
    return found


def _stem_is_first(mode: types.SimpleNamespace, layer: Layer, args: tuple, kwargs: dict) -> None:
    wanting = any(isinstance(x, Tensor) and x.requires_grad for x in (*args, *kwargs.values()))
    if wanting and torch.is_grad_enabled() and not mode.exact:
        raise RuntimeError(f"{layer} was taken for the stem, which reads the data, but its input wants a "
                           "gradient: the true error would leak through it. Name the layers that read the "
                           "data: attach(model, rule, stem=[...]), or stem=() if the data needs a gradient")


TWICE = (b"the gradient of a layer's weight was differentiated again; a feedback rule cuts the path that "
         b"this needs, so only gradients of inputs have second derivatives")
UNCOMPILED = "compiled code may ignore hooks (silent backprop); attach to an uncompiled model, and keep it so"


@torch._compile._disable_dynamo     # called, not compiled; torch.compiler.disable would import the compiler
def _refuse_to_compile() -> None:
    raise RuntimeError(f"a model with a feedback rule was given to torch.compile or jit.trace: {UNCOMPILED}")


@functools.cache
def _cut(plain: Any) -> Any:
    """The class of a layer like `plain` that has a rule."""
    return type(plain.__name__, (_Cut, plain), {"__module__": plain.__module__})


def _blank(plain: Any) -> nn.Module:
    """An empty layer, for pickle and deepcopy to fill."""
    return _cut(plain).__new__(_cut(plain))


if __name__ == "__main__":
    from harness import lessons
    lessons.main("fa")
