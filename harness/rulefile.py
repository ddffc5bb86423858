"""Spares the reader how a learning rule comes out of anybody's file, with nothing to register and nothing to
fork.

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

import hashlib
import io
import sys
import traceback
import types
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import fa
from harness import files


class RuleFileError(files.Problem):
    """One line: which file, which line in it, what is wrong, what was expected."""


def load(text: str, saves: bool = True) -> type[fa.Rule]:
    """The class behind a name of fa.RULES, or behind FILE.py:CLASS. Raises RuleFileError.

    saves    what the rule keeps must fit into a checkpoint, or a run could not go on after an interruption
    """
    return fa.RULES[text] if text in fa.RULES else _load(*_source(text), saves)


def name(text: str) -> str:
    """What to call it: the name in fa.RULES, or file and class, as a whole course may call its classes MyRule."""
    path, _, name = text.rpartition(":")
    return f"{Path(path).stem}.{name}" if path else name


def digest(text: str) -> str | None:
    """Of the file, so that results of one version are not taken for another's; None for a name of fa.RULES."""
    return None if text in fa.RULES else hashlib.sha256(_source(text)[2].encode()).hexdigest()[:16]


def make(rule: type[fa.Rule], seed: int, gain: float | None = None, orthogonal: bool = False) -> fa.Rule:
    """An instance; a constructor of the class's own need only take what is asked for. Raises RuleFileError."""
    asked: dict = {"seed": seed}
    if gain:
        asked["gain"] = gain
    if orthogonal:
        asked["orthogonal"] = True
    try:
        made = rule(**asked)
    except TypeError as e:
        call = ", ".join(f"{key}={value}" for key, value in asked.items())
        raise RuleFileError(f"{rule.__name__}({call}) failed: {e}; expected an __init__(self, seed=0, ...), or "
                            "none at all") from e
    if not hasattr(made, "generator"):
        raise RuleFileError(f"{rule.__name__}.__init__ does not call super().__init__(seed), which makes "
                            "self.generator")
    return made


def explain(error: BaseException, text: str) -> str | None:
    """One line for an error that a rule's file caused, or None if it comes from elsewhere."""
    if isinstance(error, fa.RuleError | RuleFileError):
        return _line(error)
    return None if text in fa.RULES else _place(error, str(Path(text.rpartition(":")[0])))


# ---- from text to class ------------------------------------------------------------------------------------

def _source(text: str) -> tuple[str, str, str]:
    path, _, name = text.rpartition(":")
    if not path:
        raise RuleFileError(f"{text!r} is no rule: choose from {', '.join(fa.RULES)}, or name a class in a "
                            "file of yours, such as my_rule.py:MyRule")
    try:
        return str(Path(path)), name, Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as e:                  # ValueError: not UTF-8, or a path with a zero byte
        reason = e.strerror if isinstance(e, OSError) and e.strerror else _line(e)
        what = f"the class {name}" if name else "the class of a rule"
        raise RuleFileError(f"{path}: {reason}; expected a Python file with {what}") from e


@cache
def _load(path: str, name: str, source: str, saves: bool) -> type[fa.Rule]:
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
    rule = vars(module).get(name)
    if not (isinstance(rule, type) and issubclass(rule, fa.Rule)):
        own = [k for k, v in vars(module).items()
               if isinstance(v, type) and issubclass(v, fa.Rule) and v.__module__ == module.__name__]
        what = f"has no class {name}" if rule is None else f"{name} is not a subclass of fa.Rule"
        expected = ", ".join(own) or f"class {name or 'MyRule'}(fa.FA)"
        raise RuleFileError(f"{path}: {what}; expected one of: {expected}")
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
        try:
            handle = fa.attach(model, make(rule, seed=0))
            for layer in handle.layers.values():
                layer.register_full_backward_hook(
                    lambda layer, sent, came: _finite(rule, path, layer, sent[0]))
            for _ in range(2):
                F.cross_entropy(model(torch.randn(4, 3, 8, 8)), torch.tensor([0, 1, 2, 0])).backward()
                handle.before_step()
                model.zero_grad()
            if saves:
                _save(handle.rule, path)
            handle.remove()
        except RuleFileError as e:
            text = str(e)
            raise RuleFileError(text if path in text else f"{path}: {text}") from e
        except fa.RuleError as e:
            raise RuleFileError(_line(e)) from e
        except (Exception, SystemExit) as e:                    # it is anybody's code
            what = f"{path}: {rule.__name__}: {type(e).__name__}: {_line(e)}"
            raise RuleFileError(_place(e, path) or what) from e


def _save(rule: fa.Rule, path: str) -> None:
    for name, value in rule.state_dict().items():
        try:
            file = io.BytesIO()
            torch.save(value, file)
            file.seek(0)
            torch.load(file, weights_only=True)                 # as a checkpoint is read
        except Exception as e:                                  # pickle has no class for all that it refuses
            raise RuleFileError(f"{path}: self.{name} of {type(rule).__name__} cannot be saved in a checkpoint; "
                                "expected tensors, numbers, texts, and lists or dictionaries of them; give it a "
                                "name that begins with _ or override state_dict") from e


def _finite(rule: type[fa.Rule], path: str, layer: nn.Module, sent: torch.Tensor | None) -> None:
    if sent is not None and not sent.isfinite().all():
        line = rule.backward.__code__.co_firstlineno
        raise RuleFileError(f"{path}, line {line}: {rule.__name__}.backward returned NaN or infinity for {layer}, "
                            "whose own error was finite; expected finite numbers")


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
