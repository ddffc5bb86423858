"""Loads a learning rule from the user's own file, with nothing to register and nothing to fork.

    # my_rule.py, for python train.py --rule my_rule.py:MyRule
    import fa

    class MyRule(fa.FA):
        def backward(self, layer, error, input_shape):
            return fa.project(layer, layer.feedback.sign(), error, input_shape)

`load` runs the file and tries the class on a small network before any training begins, because a mistake is
cheap then: whatever is wrong becomes one line that names the file, the line in it, and what was expected.
`explain` does the same for an error that comes up in the middle of a run.
"""
from __future__ import annotations

import ast
import hashlib
import inspect
import io
import json
import re
import sys
import traceback
import types
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import fa
from harness import files


HERE = Path(__file__).resolve().parent.parent


class RuleFileError(files.Problem):
    """One line: which file, which line in it, what is wrong, what was expected."""


def load(text: str, saves: bool = True) -> type[fa.Rule]:
    """The class behind a name of fa.RULES, or behind FILE.py:CLASS, either with hyperparameters as in
    "fa(gain=3)", which then take the place of the constructor's defaults. Raises RuleFileError.

    saves    what the rule keeps must fit into a checkpoint, or a run could not go on after an interruption;
             and feedback that changes must be declared
    """
    base, given = parse(text)
    if base not in fa.RULES:
        return _load(*_source(base), json.dumps(given), saves)
    return configured(fa.RULES[base], given) if given else fa.RULES[base]


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """("fa", {"gain": 3}) of "fa(gain=3)", ("my_rule.py:MyRule", {}) of "my_rule.py:MyRule"."""
    parts = re.fullmatch(r"(?P<base>(.*:)?\w+)\((?P<given>.*)\)", text, re.DOTALL)
    if not parts:
        return text, {}
    try:
        call = ast.parse(f"f({parts['given']})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            raise ValueError
        given = {str(each.arg): ast.literal_eval(each.value) for each in call.keywords}
        if not all(isinstance(value, bool | int | float | str) for value in given.values()):
            raise ValueError
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise RuleFileError(f"{text}: expected NAME=VALUE between the brackets, each value a number, True, "
                            "False or a text, such as fa(gain=3)") from None
    return parts["base"], {key: int(value) if isinstance(value, float) and value.is_integer() else value
                           for key, value in sorted(given.items())}


def written(base: str, given: dict[str, Any]) -> str:
    """What `parse` reads; the same for all ways to write it."""
    return f"{base}({', '.join(f'{key}={value!r}' for key, value in given.items())})" if given else base


def configured(rule: type[fa.Rule], given: dict[str, Any]) -> type[fa.Rule]:
    """The class with other defaults of its constructor. Raises RuleFileError if it does not take them."""
    takes = inspect.signature(rule.__init__).parameters
    names = [key for key in takes if key not in ("self", "seed", "args", "kwargs")]
    wrong = [key for key in given if key not in names]
    if wrong and "kwargs" not in takes:
        raise RuleFileError(f"{rule.__name__} has no hyperparameter {wrong[0]}; it takes "
                            f"{', '.join(names) or 'none'} (and --seed gives its seed)")

    def init(self: fa.Rule, seed: int = 0) -> None:
        rule.__init__(self, seed=seed, **given)

    made = type(rule.__name__, (rule,), {"__init__": init, "__module__": rule.__module__})
    make(made, 0)
    return made


def name(text: str) -> str:
    """What to call it: the name in fa.RULES, or file and class, as a course may have many a MyRule."""
    base, given = parse(text)
    path, _, name = base.rpartition(":")
    return written(f"{Path(path).stem}.{name}" if path else name, given)


def digest(text: str) -> str | None:
    """Of the file, so that one version's results are not taken for another's; None for the rules of fa.py."""
    base, _ = parse(text)
    return None if base in fa.RULES else hashlib.sha256(_source(base)[2].encode()).hexdigest()[:16]


def make(rule: type[fa.Rule], seed: int) -> fa.Rule:
    """An instance. Raises RuleFileError."""
    try:
        made = rule(seed=seed)
    except (TypeError, ValueError) as e:
        raise RuleFileError(f"{rule.__name__}(seed={seed}) failed: {e}; expected an "
                            "__init__(self, seed=0, ...), or none at all") from e
    if not hasattr(made, "generator"):
        raise RuleFileError(f"{rule.__name__}.__init__ does not call super().__init__(seed), which makes "
                            "self.generator")
    return made


def feedback_digest(handle: fa.Attachment) -> str | None:
    """Hexadecimal, of all feedback weights: it never changes, unless the rule `learns`.

    None while some are not drawn yet.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, layer in handle.layers.items():
        for made in handle.made[name]:
            if getattr(layer, made).numel() == 0:
                return None
            digest.update(f"{name}.{made}".encode())
            digest.update(getattr(layer, made).detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def explain(error: BaseException, text: str) -> str | None:
    """One line for an error that a rule's file caused, or None if it comes from elsewhere."""
    base, _ = parse(text)
    if isinstance(error, RuleFileError):
        return _line(error)
    if isinstance(error, fa.RuleError):
        return _line(error) if base in fa.RULES else f"{_method(load(text))}{_line(error)}"
    return None if base in fa.RULES else _place(error, str(_file(base.rpartition(":")[0])))


# ---- from text to class ------------------------------------------------------------------------------------

def _file(path: str) -> Path:
    """Where it is: here, or else in the project's folder, so that assignments/... is found from anywhere."""
    try:
        return Path(path) if Path(path).exists() else HERE / path
    except (OSError, ValueError):                       # a name that is too long; a zero byte
        return Path(path)


def _source(text: str) -> tuple[str, str, str]:
    path, _, name = text.rpartition(":")
    if not path:
        raise RuleFileError(f"{text!r} is no rule: choose from {', '.join(fa.RULES)}, or name a class in a "
                            "file of yours, such as my_rule.py:MyRule")
    file = _file(path)
    try:
        return str(file), name, file.read_text(encoding="utf-8")
    except (OSError, ValueError) as e:                  # ValueError: not UTF-8, or a path with a zero byte
        reason = e.strerror if isinstance(e, OSError) and e.strerror else _line(e)
        what = f"the class {name}" if name else "the class of a rule"
        raise RuleFileError(f"{path}: {reason}; expected a Python file with {what}") from e


def find(text: str) -> Any:
    """What FILE.py:NAME names, or None; the file is run once. Raises RuleFileError."""
    path, name, source = _source(text)
    return vars(_module(path, source)).get(name)


@cache
def _module(path: str, source: str) -> types.ModuleType:
    module = types.ModuleType(f"rule_{hashlib.sha256(f'{path}{source}'.encode()).hexdigest()[:8]}")
    module.__file__ = path
    sys.modules[module.__name__] = module               # deepcopy and dataclasses look a class's module up
    folder = str(Path(path).resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)                                 # the file may import its neighbours
    try:
        exec(compile(source, path, "exec"), vars(module))       # and no __pycache__ is left behind
    except (Exception, SystemExit) as e:                        # it is anybody's code
        raise RuleFileError(_place(e, path) or f"{path}: {type(e).__name__}: {_line(e)}") from e
    return module


@cache
def _load(path: str, name: str, source: str, given: str, saves: bool) -> type[fa.Rule]:
    module = _module(path, source)
    rule = vars(module).get(name)
    if not (isinstance(rule, type) and issubclass(rule, fa.Rule)):
        own = [k for k, v in vars(module).items()
               if isinstance(v, type) and issubclass(v, fa.Rule) and v.__module__ == module.__name__]
        what = f"has no class {name}" if rule is None else f"{name} is not a subclass of fa.Rule"
        expected = ", ".join(own) or f"class {name or 'MyRule'}(fa.FA)"
        raise RuleFileError(f"{path}: {what}; expected one of: {expected}")
    try:
        rule = configured(rule, json.loads(given)) if given != "{}" else rule
    except RuleFileError as e:
        raise RuleFileError(f"{path}: {e}") from e
    for method in ("prepare", "release", "backward", "before_step"):
        names = [*inspect.signature(getattr(fa.Rule, method)).parameters]
        try:
            inspect.signature(getattr(rule, method)).bind(*names)
        except (TypeError, ValueError) as e:
            raise RuleFileError(f"{_method(rule, method) or path + ': '}{name}.{method} cannot be called as "
                                f"{method}({', '.join(names)}): {_line(e)}") from e
    _try(rule, path, saves)
    return rule


def _try(rule: type[fa.Rule], path: str, saves: bool) -> None:
    """One training step on a small network: strided and grouped convolutions, linear layers, finite
    errors."""
    with torch.random.fork_rng([]), torch.enable_grad():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(),
                              nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.ReLU(),
                              nn.Conv2d(6, 6, 3, padding=1, groups=2), nn.Flatten(),
                              nn.Linear(96, 5), nn.ReLU(), nn.Linear(5, 3))
        labels = torch.tensor([0, 1, 2, 0])
        try:
            handle = fa.attach(model, make(rule, seed=0))
            for layer in handle.layers.values():
                layer.register_full_backward_hook(
                    lambda layer, sent, came: _finite(rule, layer, sent[0]))
            drawn = None
            for _ in range(2):
                if rule.needs_targets:
                    handle.rule.targets = labels
                F.cross_entropy(model(torch.randn(4, 3, 8, 8)), labels).backward()
                drawn = drawn or feedback_digest(handle)
                handle.before_step()
                model.zero_grad()
            if saves and not rule.learns and feedback_digest(handle) != drawn:
                raise RuleFileError(f"{rule.__name__} changes its feedback weights; expected fixed ones, or "
                                    "learns = True in the class")
            if saves:
                _save(handle.rule, path)
            handle.remove()
        except RuleFileError as e:
            text = str(e)
            raise RuleFileError(text if path in text else f"{path}: {text}") from e
        except fa.RuleError as e:
            raise RuleFileError(f"{_method(rule)}{_line(e)}") from e
        except (Exception, SystemExit) as e:                    # it is anybody's code
            what = _place(e, path) or f"{path}: {rule.__name__}: {type(e).__name__}: {_line(e)}"
            if isinstance(e, AttributeError) and e.name in ("input", "output") and not rule.needs_input:
                what += "; expected needs_input = True in the class"
            raise RuleFileError(what) from e


def _save(rule: fa.Rule, path: str) -> None:
    for name, value in rule.state_dict().items():
        try:
            file = io.BytesIO()
            torch.save(value, file)
            file.seek(0)
            torch.load(file, weights_only=True)                 # as a checkpoint is read
        except Exception as e:                                  # pickle has no class for all that it refuses
            raise RuleFileError(f"{path}: self.{name} of {type(rule).__name__} cannot be saved in a "
                                "checkpoint; expected tensors, numbers, texts, and lists or dictionaries of "
                                "them; give it a name that begins with _ or override state_dict") from e


def _finite(rule: type[fa.Rule], layer: nn.Module, sent: torch.Tensor | None) -> None:
    if sent is not None and not sent.isfinite().all():
        raise RuleFileError(f"{_method(rule)}{rule.__name__}.backward returned NaN or infinity for "
                            f"{layer}, whose own error was finite; expected finite numbers")


def _method(rule: type[fa.Rule], method: str = "backward") -> str:
    """'my_rule.py, line 7: ', where that method stands, if it is a function of Python."""
    code = getattr(getattr(rule, method), "__code__", None)
    return f"{code.co_filename}, line {code.co_firstlineno}: " if code else ""


def _place(error: BaseException, path: str) -> str | None:
    """'my_rule.py, line 7, in backward: NameError: ...' if the error came up in that file."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return f"{path}, line {error.lineno}: {type(error).__name__}: {error.msg}; expected Python"
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    if not frames:
        return None
    where = f", in {frames[-1].name}" if frames[-1].name != "<module>" else ""
    return f"{path}, line {frames[-1].lineno}{where}: {type(error).__name__}: {_line(error)}"


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
