"""harness/session.py: a run that is stopped, by whatever, goes on as if it had not been: weights, logs,
generators and ranks to the last bit. What is not this run is refused in one line, and nothing is lost."""
import contextlib
import json
import os
import re
import shutil
import signal
import types
import zipfile
from pathlib import Path

import pytest
import torch
from test_files import files_of_at_most
from test_train import SMALL, small_gratings, tensors, without_time  # noqa: F401  (a fixture)

import train
from harness import session

SMALL = [*SMALL, "--device", "cpu"]
VARIANTS = {"muon, ranks": "--muon --norm --rank 2", "kp": "--rule kp --muon --norm",
            "dfa, whitening, held out": "--rule dfa --norm whiten --validate 60",
            "a rule that draws": "--rule unreliable.py:Unreliable"}
UNRELIABLE = """
import torch, fa
from torch.nn import functional as F
class Unreliable(fa.FA):
    def backward(self, layer, error, input_shape):
        kept = torch.rand(layer.feedback.shape, generator=self.generator) < 0.9     # its own, and torch's
        return fa.project(layer, F.dropout(layer.feedback, 0.1) * kept, error, input_shape)
"""


def left_by(folder):
    """What a run leaves, but for the seconds it took."""
    logs = [without_time([json.loads(line) for line in (folder / name).read_text().splitlines()])
            for name in ("log.jsonl", "rank.jsonl") if (folder / name).exists()]
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    state["log"], state["ranks"] = without_time(state["log"]), without_time(state["ranks"])
    return logs, state


def assert_same(one, other):
    (logs, state), (other_logs, other_state) = left_by(one), left_by(other)
    assert logs == other_logs and state.keys() == other_state.keys()
    said, other_said = ({k: v for k, v in each.items() if not tensors(v)} for each in (state, other_state))
    assert said == other_said
    pairs = list(zip(tensors(state), tensors(other_state), strict=True))
    assert len(pairs) > 10 and all(torch.equal(x, y) for x, y in pairs)
    assert (one / "curves.png").read_bytes() == (other / "curves.png").read_bytes()


def contents(folder):
    return {path: path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


@contextlib.contextmanager
def stopping(step, number=signal.SIGTERM):
    """Send this process a signal in the middle of a step."""
    real, calls = train.Trainer.step, []

    def descend(self, *args):
        calls.append(0)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return real(self, *args)

    train.Trainer.step = descend
    try:
        yield
    finally:
        train.Trainer.step = real


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_and_resumed_is_never_stopped(variant, capsys):
    Path("unreliable.py").write_text(UNRELIABLE)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    args = [*SMALL, "--epochs", "3", *VARIANTS[variant].split()]
    assert train.main([*args, "--out", "whole"]) == 0
    with stopping(6):                                           # of 12 steps, 4 an epoch: in the second
        assert train.main([*args, "--out", "parts"]) == 143
    assert "stopped after step 6 of 12; go on with: python train.py --resume parts" in capsys.readouterr().err
    with stopping(2, signal.SIGINT):                            # at the end of the second
        assert train.main(["--resume", "parts"]) == 130
    with stopping(1):
        assert train.main(["--resume", "parts"]) == 143
    assert train.main(["--resume", "parts"]) == 0
    assert "going on after step 9 of 12, epoch 2 of 3" in capsys.readouterr().out
    assert_same(Path("whole"), Path("parts"))
    assert len(json.loads(Path("parts/config.json").read_text())["resumed"]) == 3
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_a_second_interrupt_is_obeyed_at_once(capsys):
    with stopping(6, signal.SIGINT), stopping(6, signal.SIGINT):                # both in one step
        assert train.main([*SMALL, "--out", "run"]) == 130
    assert "stopped at once; finished epochs are in run" in capsys.readouterr().err
    assert len(Path("run/log.jsonl").read_text().splitlines()) == 1
    assert train.main(["--resume", "run"]) == 0


def test_a_run_that_is_done_can_only_be_made_longer(capsys):
    """Also one that was started again after it had been killed before it wrote anything."""
    Path("run").mkdir()
    Path("run/.config.json.partial").write_text("{")
    assert train.main([*SMALL, "--out", "run"]) == 0
    assert not list(Path("run").glob(".*"))
    said = re.search("final test accuracy.*last", capsys.readouterr().out)[0]
    checkpoint = Path("run/checkpoint.pt").read_bytes()
    assert train.main(["--resume", "run"]) == 0
    assert said in capsys.readouterr().out and Path("run/checkpoint.pt").read_bytes() == checkpoint
    before = contents("run")
    for more in ([], ["--out", "shorter"]):
        assert train.main(["--resume", "run", "--epochs", "1", *more]) == 2
        out, err = capsys.readouterr()
        assert not out and err == ("train.py: the run has made 8 steps already, and --epochs 1 are 4; "
                                   "give more epochs\n")
    assert train.main(["--resume", "run", "--epochs", "3", "--out", "longer"]) == 0
    assert ("--epochs is 3 and was 2: from here on the learning rates follow the new cosine"
            in capsys.readouterr().out)
    assert len(Path("longer/log.jsonl").read_text().splitlines()) == 3
    assert json.loads(Path("longer/config.json").read_text())["args"]["epochs"] == 3
    assert contents("run") == before and not Path("shorter").exists()


# ---- kills, damage, full disks -----------------------------------------------------------------------------

class Killed(BaseException):
    pass


def test_epochs_after_the_last_checkpoint_are_done_again(monkeypatch):
    args = [*SMALL, "--epochs", "4", "--muon", "--norm", "--rank"]
    assert train.main([*args, "--out", "whole"]) == 0
    real, tested = train.Trainer.test, []

    def test(self):
        tested.append(0)
        if len(tested) == 2:
            monkeypatch.setattr(session, "CHECKPOINT_SECONDS", float("inf"))
        if len(tested) == 4:
            raise Killed
        return real(self)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train.Trainer, "test", test)
        train.main([*args, "--out", "parts"])
    logs, state = left_by(Path("parts"))
    assert [line["epoch"] for line in logs[0]] == [1, 2, 3] and state["step"] == 4      # 4 steps an epoch
    with stopping(2):                                           # the logs are cut to the checkpoint at once
        assert train.main(["--resume", "parts"]) == 143
    assert [len(log) for log in left_by(Path("parts"))[0]] == [1, 2]
    assert train.main(["--resume", "parts"]) == 0
    assert_same(Path("whole"), Path("parts"))


def test_a_checkpoint_every_30_seconds_and_at_the_end(monkeypatch):
    tested, kept = [], []
    monkeypatch.setattr(session, "CHECKPOINT_SECONDS", 30)
    # 12 s an epoch
    monkeypatch.setattr(session, "time", types.SimpleNamespace(perf_counter=lambda: 12.0 * len(tested)))
    monkeypatch.setattr(train.Trainer, "test", lambda self: tested.append(0) or 0.5)

    def checkpoint(self):
        kept.append(len(self.lines))
        self._kept = session.time.perf_counter()

    monkeypatch.setattr(session.Run, "_checkpoint", checkpoint)
    assert train.main([*SMALL, "--epochs", "8", "--out", "run"]) == 0
    assert kept == [3, 6, 8]


def flip(path):
    """One bit of a weight: torch.load would not notice."""
    with zipfile.ZipFile(path) as archive:
        start = max(archive.infolist(), key=lambda info: info.file_size).header_offset
    raw = bytearray(path.read_bytes())
    name, extra = (int.from_bytes(raw[start + i:start + i + 2], "little") for i in (26, 28))
    raw[start + 30 + name + extra + 5] ^= 1
    path.write_bytes(raw)


def test_a_damaged_checkpoint_gives_way_to_the_one_before(capsys):
    args = [*SMALL, "--epochs", "3"]
    assert train.main([*args, "--out", "whole"]) == 0
    with stopping(9):
        train.main([*args, "--out", "stopped"])
    for number, damage in enumerate((flip, lambda path: torch.save([1], path))):
        run = Path(shutil.copytree("stopped", f"parts{number}"))
        last, previous = run / "checkpoint.pt", run / "checkpoint.previous.pt"
        damage(last)
        assert train.main(["--resume", str(run)]) == 0
        out = capsys.readouterr().out
        assert (f"{last} is damaged" in out and "going on from the one before" in out
                and "after step 8 of 12" in out)
        assert_same(Path("whole"), run)
        assert torch.load(previous, weights_only=True)["step"] == 8                     # not the damaged one
        damage(last)
        damage(previous)
        assert train.main(["--resume", str(run)]) == 2
        assert "nothing to go on from" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_spoils_nothing(capsys):
    assert train.main([*SMALL, "--out", "whole"]) == 0
    with stopping(6):
        train.main([*SMALL, "--out", "parts"])
    before = contents("parts")
    capsys.readouterr()
    with files_of_at_most(20_000):
        assert train.main(["--resume", "parts"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "cannot write parts/checkpoint.pt: File too large" in err
    after = contents("parts")
    assert after.keys() == before.keys() and after[Path("parts/checkpoint.pt")] == before[
        Path("parts/checkpoint.pt")]
    assert train.main(["--resume", "parts"]) == 0
    assert_same(Path("whole"), Path("parts"))


# ---- what a run does not go on with ------------------------------------------------------------------------

def config(**changes):
    """A function that changes the run's config.json."""
    def change(run):
        content = json.loads((run / "config.json").read_text())
        (run / "config.json").write_text(json.dumps({**content, **changes}))
    return change


def state(change):
    """A function that changes the run's checkpoint."""
    def rewrite(run):
        content = torch.load(run / "checkpoint.pt", weights_only=True)
        change(content)
        torch.save(content, run / "checkpoint.pt")
    return rewrite


def nudge(weights):
    weights[0, 0, 0, 0] += 1


SPOILS = {
    "version": (config(version=0), "made by version 0 of train.py"),
    "an old config": (config(args={"rule": "fa"}), "it was made by version 2 of"),
    "config no JSON": (lambda run: (run / "config.json").write_text("{"), "is no JSON"),
    "config a list": (lambda run: (run / "config.json").write_text("[]"), "holds no arguments"),
    "another network": (state(lambda s: s["identity"].update({"--width": 8})), "with --width 8 and not 4"),
    "another data set": (state(lambda s: s["identity"].update(data="0")), "with data 0"),
    "no identity": (state(lambda s: s.pop("identity")), "not this run's"),
    "feedback": (state(lambda s: nudge(s["model"]["layers.2.feedback"])),
                 "feedback weights are not those that the run began with"),
    "weights of another shape": (state(lambda s: s["model"].update({"layers.1.weight": torch.ones(2)})),
                                 "the checkpoint does not fit the network"),
    "no optimiser": (state(lambda s: s.update(optimisers=[])), "does not fit the"),
    "another device": (state(lambda s: s.update(device="cuda")), "stopped within an epoch on a cuda device"),
}


def test_what_is_not_this_run_is_refused(capsys):
    with stopping(6):
        assert train.main([*SMALL, "--out", "run"]) == 143
    Path("run/checkpoint.previous.pt").unlink()
    for name, (spoil, said) in SPOILS.items():
        spoil(Path(shutil.copytree("run", name)))
        before = contents(".")
        capsys.readouterr()
        try:
            status = train.main(["--resume", name])
        except SystemExit as e:
            status = e.code
        out, err = capsys.readouterr()
        assert status == 2 and said in err and err.count("\n") == 1 and out == "", (name, err)
        assert contents(".") == before, name


def test_a_rule_file_that_changed_is_refused(capsys):
    rule = "import fa\nclass Mine(fa.FA):\n    pass\n"
    Path("mine.py").write_text(rule)
    with stopping(6):
        assert train.main([*SMALL, "--rule", "mine.py:Mine", "--out", "run"]) == 143
    Path("mine.py").write_text(rule + "\n")
    with pytest.raises(SystemExit):
        train.main(["--resume", "run"])
    assert "mine.py:Mine has changed since" in capsys.readouterr().err


def test_a_default_folder_is_one_that_nobody_has():
    assert [session.create(None, "fa").name for _ in range(3)] == ["fa", "fa-2", "fa-3"]


def test_only_one_process_writes_to_a_run(monkeypatch, capsys):
    """While it is new, and while it goes on."""
    tried = []

    def test(self):
        tried.append(train.main(["--resume", "run"]))
        return 0.5

    monkeypatch.setattr(train.Trainer, "test", test)
    with stopping(5):
        train.main([*SMALL, "--out", "run"])
    train.main(["--resume", "run"])
    assert tried == [2, 2] and capsys.readouterr().err.count("another process is writing to run") == 2


def test_feedback_that_changes_in_secret_stops_the_run(capsys):
    source = ("import fa\nclass Mine(fa.FA):\n"
              "    def backward(self, layer, error, input_shape):\n"
              "        if len(error) > 4:\n"                        # not when it is tried
              "            layer.feedback.mul_(0.99)\n"
              "        return super().backward(layer, error, input_shape)\n")
    Path("mine.py").write_text(source)
    assert train.main([*SMALL, "--rule", "mine.py:Mine", "--out", "run"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "the feedback weights have changed since the run began" in err
    assert len(Path("run/log.jsonl").read_text().splitlines()) == 1 and not Path("run/checkpoint.pt").exists()
    Path("mine.py").write_text(source.replace("(fa.FA):\n", "(fa.FA):\n    learns = True\n"))
    assert train.main([*SMALL, "--rule", "mine.py:Mine", "--out", "again"]) == 0


def test_a_rule_that_is_gone_stops_the_run(monkeypatch, capsys):
    real = train.Trainer.step

    def step(self, chosen):
        for layer in self.handle.layers.values():
            layer.forward = lambda x, layer=layer: layer.crossing.plain.forward(layer, x)
        return real(self, chosen)

    monkeypatch.setattr(train.Trainer, "step", step)
    assert train.main([*SMALL, "--out", "run"]) == 2
    assert ("FA did not carry the error through layer 'layers.1': its forward was replaced"
            in capsys.readouterr().err)
