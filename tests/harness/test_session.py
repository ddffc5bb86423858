"""A run that is stopped, by whatever, ends as if it had not been:
weights, logs, generators and ranks to the last bit."""
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_train import (REAL_GRATINGS, SMALL, made_cifar100, small_gratings,  # noqa: F401  (a fixture)
                        tensors, without_time)

import fa
import train
from harness import session

VARIANTS = {"fa": "--norm", "muon": "--muon --norm", "ranks": "--muon --norm --rank 2",
            "kp": "--rule kp --muon --norm", "dfa": "--rule dfa --norm", "whiten": "--norm whiten",
            "frozen": "--rule frozen --norm --rank", "no norm": "",
            "resnet": "--muon --norm --model resnet18 --width 8", "held out": "--validate 60 --norm",
            "a rule that draws": "--rule unreliable.py:Unreliable --norm"}
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
    return logs, state


def assert_same(one, other):
    (logs, state), (other_logs, other_state) = left_by(one), left_by(other)
    assert logs == other_logs
    for ours in (state, other_state):
        ours["log"], ours["ranks"] = without_time(ours["log"]), without_time(ours["ranks"])
    assert state.keys() == other_state.keys()
    said, other_said = ({k: v for k, v in each.items() if not tensors(v)} for each in (state, other_state))
    assert said == other_said
    pairs = list(zip(tensors(state), tensors(other_state), strict=True))
    assert len(pairs) > 10 and all(torch.equal(x, y) for x, y in pairs)
    assert (one / "curves.png").read_bytes() == (other / "curves.png").read_bytes()


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
    args = [*SMALL, "--epochs", "3", "--device", "cpu", *VARIANTS[variant].split()]
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


def test_a_run_that_was_killed_before_it_had_written_anything_can_be_started_again():
    Path("run").mkdir()
    Path("run/.config.json.partial").write_text("{")
    assert train.main([*SMALL, "--norm", "--device", "cpu", "--out", "run"]) == 0
    assert not list(Path("run").glob(".*"))


def test_resuming_a_run_that_is_done_changes_nothing(capsys):
    assert train.main([*SMALL, "--norm", "--device", "cpu", "--out", "run"]) == 0
    said = re.search("final test accuracy.*last", capsys.readouterr().out)[0]
    before = Path("run/checkpoint.pt").read_bytes()
    assert train.main(["--resume", "run"]) == 0
    assert said in capsys.readouterr().out and Path("run/checkpoint.pt").read_bytes() == before


def test_more_epochs_into_another_folder(capsys):
    assert train.main([*SMALL, "--norm", "--device", "cpu", "--out", "run"]) == 0
    before = {p.name: p.read_bytes() for p in Path("run").iterdir()}
    assert train.main(["--resume", "run", "--epochs", "3", "--out", "longer"]) == 0
    assert ("--epochs is 3 and was 2: from here on the learning rates follow the new cosine"
            in capsys.readouterr().out)
    assert len(Path("longer/log.jsonl").read_text().splitlines()) == 3
    assert json.loads(Path("longer/config.json").read_text())["args"]["epochs"] == 3
    assert {p.name: p.read_bytes() for p in Path("run").iterdir()} == before


def test_fewer_epochs_than_are_done_are_refused(capsys):
    assert train.main([*SMALL, "--norm", "--device", "cpu", "--epochs", "3", "--out", "run"]) == 0
    before = {p.name: p.read_bytes() for p in Path("run").iterdir()}
    capsys.readouterr()
    for more in ([], ["--out", "shorter"]):
        assert train.main(["--resume", "run", "--epochs", "2", *more]) == 2
        out, err = capsys.readouterr()
        assert not out and err == ("train.py: the run has made 12 steps already, and --epochs 2 are 8; "
                                   "give more epochs\n")
    assert {p.name: p.read_bytes() for p in Path("run").iterdir()} == before and not Path("shorter").exists()


def test_a_second_interrupt_is_obeyed_at_once(capsys):
    with stopping(6, signal.SIGINT), stopping(6, signal.SIGINT):                # both in one step
        assert train.main([*SMALL, "--norm", "--device", "cpu", "--out", "run"]) == 130
    assert "stopped at once; finished epochs are in run" in capsys.readouterr().err
    assert len(Path("run/log.jsonl").read_text().splitlines()) == 1
    assert train.main(["--resume", "run"]) == 0


# ---- kill -9 -----------------------------------------------------------------------------------------------

KILLER = """
import os, random, signal, sys, time
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
import data, train
from harness import session
few = data.gratings(256, 64)
data.gratings = lambda: few
args = {args!r}

def epochs():
    return len(open("parts/log.jsonl").read().splitlines()) if os.path.exists("parts/log.jsonl") else 0

def run(argv, more=None, pause=0, every=0):
    # The exit status; killed, if it lives so long, `pause` seconds after it has finished so many `more`
    # epochs. A checkpoint is written `every` so many seconds.
    session.CHECKPOINT_SECONDS = every
    child, before = os.fork(), epochs()
    if child == 0:
        sys.stdout = open(os.devnull, "w")
        os._exit(train.main(argv))
    while more is not None and epochs() < before + more:
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
        time.sleep(0.001)
    if more is not None:
        time.sleep(pause)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]

start = time.time()
assert run([*args, "--out", "whole"]) == 0
took = time.time() - start
rng, killed, deaths = random.Random({seed}), 0, []
while killed < 10:
    begun = os.path.exists("parts/config.json")
    more = rng.randrange(4)                 # none: at the start, before or after it has read what there is
    status = run(["--resume", "parts"] if begun else [*args, "--out", "parts"], more,
                 rng.uniform(0, took / (8 if more else 2)), every=rng.choice([0, took / 10]))
    deaths.append(epochs())
    killed += os.WIFSIGNALED(status)
    if not os.WIFSIGNALED(status):
        assert os.WEXITSTATUS(status) == 0, status
        assert os.path.exists("parts/curves.png")
        import shutil                       # it got to its end: the next kills find a new one
        shutil.rmtree("done", ignore_errors=True)
        os.rename("parts", "done")
while run(["--resume", "parts"] if os.path.exists("parts/config.json") else [*args, "--out", "parts"]) != 0:
    raise SystemExit("could not go on")
print(killed, len(set(deaths)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
@pytest.mark.slow
def test_ten_kills_at_random_moments(tmp_path):
    args = [*SMALL, "--epochs", "16", "--device", "cpu", "--muon", "--norm", "--rank", "5"]
    done = subprocess.run([sys.executable, "-c",
                           KILLER.format(root=str(ROOT), args=args, seed=random.randrange(10 ** 6))],
                          cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr[-2000:]
    killed, epochs = map(int, done.stdout.split())
    assert killed == 10 and epochs > 3                          # they met the run in different epochs
    assert_same(tmp_path / "whole", tmp_path / "parts")
    assert (sorted(p.name for p in (tmp_path / "parts").iterdir())
            == sorted(p.name for p in (tmp_path / "whole").iterdir()))
    if (tmp_path / "done").exists():
        assert_same(tmp_path / "whole", tmp_path / "done")


class Killed(BaseException):
    pass


def test_epochs_after_the_last_checkpoint_are_done_again(monkeypatch):
    args = [*SMALL, "--epochs", "4", "--device", "cpu", "--muon", "--norm", "--rank"]
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
    assert train.main([*SMALL, "--epochs", "8", "--device", "cpu", "--out", "run"]) == 0
    assert kept == [3, 6, 8]


@pytest.mark.parametrize("moment", ["save", "fsync", "link", "replace"])
def test_a_kill_while_a_checkpoint_is_written(moment, monkeypatch):
    """The power goes at one of the calls that write it: something whole is there,
    and the run goes on from it."""
    args = [*SMALL, "--epochs", "3", "--device", "cpu", "--norm"]
    assert train.main([*args, "--out", "whole"]) == 0

    where = {"save": (torch, "save"), "fsync": (os, "fsync"), "link": (os, "link"),
             "replace": (os, "replace")}[moment]
    real, count = getattr(*where), []

    def dying(*args, **kwargs):
        if any(line.endswith("checkpoint.pt") for line in map(str, args)) or moment in ("save", "fsync"):
            count.append(0)
        if len(count) == {"save": 2, "fsync": 9, "link": 1, "replace": 2}[moment]:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(*where, dying)
        patch.setattr(Path, "unlink", lambda *_, **__: None)    # nobody cleans up after a power cut
        train.main([*args, "--out", "parts"])
    left = list(Path("parts").glob(".*.partial"))
    assert train.main(["--resume", "parts"]) == 0
    assert_same(Path("whole"), Path("parts"))
    assert left and not list(Path("parts").glob(".*"))


# ---- damaged, full, forbidden ------------------------------------------------------------------------------

def truncate(path):
    path.write_bytes(path.read_bytes()[:-3000])


def garbage(path):
    path.write_bytes(random.Random(0).randbytes(5000))


def flip(path):
    """One bit of a weight: torch.load would not notice."""
    with zipfile.ZipFile(path) as archive:
        start = max(archive.infolist(), key=lambda info: info.file_size).header_offset
    raw = bytearray(path.read_bytes())
    name, extra = (int.from_bytes(raw[start + i:start + i + 2], "little") for i in (26, 28))
    raw[start + 30 + name + extra + 5] ^= 1
    path.write_bytes(raw)


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def code(path):
    torch.save({"model": Code()}, path)


@pytest.mark.parametrize("damage", [truncate, garbage, flip, code, lambda path: path.write_bytes(b""),
                                    lambda path: torch.save([1], path)])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(damage, capsys):
    args = [*SMALL, "--epochs", "3", "--norm", "--device", "cpu"]
    assert train.main([*args, "--out", "whole"]) == 0
    with stopping(9):
        train.main([*args, "--out", "parts"])
    damage(Path("parts/checkpoint.pt"))
    assert train.main(["--resume", "parts"]) == 0
    out = capsys.readouterr().out
    assert ("parts/checkpoint.pt is damaged" in out and "going on from the one before" in out
            and "after step 8 of 12" in out)
    assert_same(Path("whole"), Path("parts"))
    session.read_checkpoint(Path("parts"))
    assert torch.load("parts/checkpoint.previous.pt", weights_only=True)["step"] == 8   # not the damaged one
    damage(Path("parts/checkpoint.pt"))
    damage(Path("parts/checkpoint.previous.pt"))
    assert train.main(["--resume", "parts"]) == 2
    assert "nothing to go on from" in capsys.readouterr().err and not Path("executed").exists()


FULL = """
import resource, sys
sys.path.insert(0, {root!r})
import data, train
few = data.gratings(256, 64)
data.gratings = lambda: few
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))    # for every file, like a quota
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="sets a limit of POSIX")
def test_a_full_disk_is_one_line_and_spoils_nothing(tmp_path):
    args = [*SMALL, "--norm", "--device", "cpu"]
    assert train.main([*args, "--out", "whole"]) == 0
    with stopping(6):
        train.main([*args, "--out", "parts"])
    before = {p.name: p.read_bytes() for p in Path("parts").iterdir() if p.name != "config.json"}
    done = subprocess.run([sys.executable, "-c", FULL.format(root=str(ROOT), limit=20000),
                           "--resume", "parts"],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert ("cannot write parts/checkpoint.pt: File too large; all that was written before is still there"
            in done.stderr)
    after = {p.name: p.read_bytes() for p in Path("parts").iterdir() if p.name != "config.json"}
    assert after.keys() == before.keys() and after["checkpoint.pt"] == before["checkpoint.pt"]
    assert train.main(["--resume", "parts"]) == 0
    assert_same(Path("whole"), Path("parts"))


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("cannot mount a small file system here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_small_disk_that_fills_up(small_disk, capsys):
    out = ["--out", str(small_disk / "run")]
    assert train.main([*SMALL, "--width", "8", "--epochs", "4", "--norm", "--device", "cpu", *out]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "No space left on device" in err and "cannot write" in err
    assert not list((small_disk / "run").glob(".*"))
    for name in {p.name for p in (small_disk / "run").glob("*.pt")}:
        torch.load(small_disk / "run" / name, weights_only=True)


def test_a_folder_that_vanishes(monkeypatch, capsys):
    real = train.Trainer.test

    def test(self):
        shutil.rmtree("run")
        return real(self)

    monkeypatch.setattr(train.Trainer, "test", test)
    assert train.main([*SMALL, "--device", "cpu", "--out", "run"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "cannot write run/log.jsonl: No such file or directory" in err


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(capsys):
    Path("locked").mkdir(mode=0o500)
    assert train.main([*SMALL, "--device", "cpu", "--out", "locked/run"]) == 2
    assert "cannot make the run folder locked/run: Permission denied" in capsys.readouterr().err


# ---- what a run does not go on with ------------------------------------------------------------------------

@pytest.fixture
def halted():
    """A run that was stopped in its second epoch."""
    with stopping(6):
        assert train.main([*SMALL, "--norm", "--device", "cpu", "--out", "run"]) == 143
    return Path("run")


def changed(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def rewritten(path, change):
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def other_network(run):
    with stopping(6):
        train.main([*SMALL, "--norm", "--width", "8", "--device", "cpu", "--out", "other"])
    shutil.copy("other/checkpoint.pt", run / "checkpoint.pt")


def other_feedback(run):
    def change(state):
        state["model"]["layers.2.feedback"][0, 0, 0, 0] += 1
    rewritten(run / "checkpoint.pt", change)


SPOILS = {
    "the network": (other_network, "made with --width 8 and not 4"),
    "feedback": (other_feedback, "feedback weights are not those that the run began with"),
    "version": (lambda run: changed(run / "config.json", lambda c: c.update(version=0)),
                "made by version 0 of train.py"),
    "an old config": (lambda run: changed(run / "config.json", lambda c: c["args"].pop("flatten")),
                      "it was made by version 2 of"),
    "no config": (lambda run: (run / "config.json").unlink(), "No such file or directory"),
    "config no JSON": (lambda run: (run / "config.json").write_text("{"), "is no JSON"),
    "config a list": (lambda run: (run / "config.json").write_text("[]"), "holds no arguments"),
    "config garbage": (lambda run: (run / "config.json").write_bytes(b"\xff\xfe"), "is no JSON"),
    "weights of another shape": (lambda run: rewritten(run / "checkpoint.pt", lambda s: s["model"].update(
        {"layers.1.weight": torch.ones(2)})), "the checkpoint does not fit the network"),
    "no optimiser": (lambda run: rewritten(run / "checkpoint.pt", lambda s: s.update(optimisers=[])),
                     "does not fit the"),
    "no identity": (lambda run: rewritten(run / "checkpoint.pt", lambda s: s.pop("identity")),
                    "not this run's"),
    "another data set":
        (lambda run: rewritten(run / "checkpoint.pt", lambda s: s["identity"].update(data="0")),
         "with data 0"),
    "another device": (lambda run: rewritten(run / "checkpoint.pt", lambda s: s.update(device="cuda")),
                       "stopped within an epoch on a cuda device"),
}


@pytest.mark.parametrize("spoil", SPOILS)
def test_what_is_not_this_run_is_refused(spoil, halted, capsys):
    SPOILS[spoil][0](halted)
    if spoil != "the network":
        (halted / "checkpoint.previous.pt").unlink()
    before = {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()}
    capsys.readouterr()
    try:
        status = train.main(["--resume", "run"])
    except SystemExit as e:
        status = e.code
    out, err = capsys.readouterr()
    assert status == 2 and SPOILS[spoil][1] in err and err.count("\n") == 1 and out == ""
    assert {p: p.read_bytes() for p in Path().rglob("*") if p.is_file()} == before


def test_a_rule_file_that_changed_is_refused(capsys):
    rule = "import fa\nclass Mine(fa.FA):\n    pass\n"
    Path("mine.py").write_text(rule)
    with stopping(6):
        assert train.main([*SMALL, "--rule", "mine.py:Mine", "--device", "cpu", "--out", "run"]) == 143
    Path("mine.py").write_text(rule + "\n")
    with pytest.raises(SystemExit):
        train.main(["--resume", "run"])
    assert "mine.py:Mine has changed since" in capsys.readouterr().err
    Path("mine.py").write_text(rule)
    assert train.main(["--resume", "run"]) == 0


def test_only_one_process_writes_to_a_run(halted, capsys):
    code = (f"import sys, time\nsys.path.insert(0, {str(ROOT)!r})\n"
            "from harness import files\nfrom pathlib import Path\n"
            "with files.claim(Path('run')):\n    print('has it', flush=True)\n    time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "has it\n"
        assert train.main(["--resume", "run"]) == 2
        assert "another process is writing to run" in capsys.readouterr().err
    finally:
        holder.kill()
        holder.wait()
    assert train.main(["--resume", "run"]) == 0                 # a dead process holds nothing


def test_two_runs_started_at_once_do_not_mix(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--subset", "64", "--width", "4", "--epochs", "1",
               "--batch-size", "32"]
    both = [subprocess.Popen([*command, "--seed", "0"], cwd=tmp_path, stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE,
                             env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""})
            for _ in range(2)]
    for process in both:
        assert process.communicate() and process.returncode == 0
    assert (sorted(p.name for p in (tmp_path / "runs").iterdir())
            == ["fa-gratings-cnn-s0", "fa-gratings-cnn-s0-2"])
    assert_same(*(tmp_path / "runs").iterdir())


def test_feedback_that_changes_in_secret_stops_the_run(capsys):
    Path("mine.py").write_text("import fa\nclass Mine(fa.FA):\n"
                               "    def backward(self, layer, error, input_shape):\n"
                               "        if len(error) > 4:\n"                # not when it is tried
                               "            layer.feedback.mul_(0.99)\n"
                               "        return super().backward(layer, error, input_shape)\n")
    assert train.main([*SMALL, "--rule", "mine.py:Mine", "--device", "cpu", "--out", "run"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "the feedback weights have changed since the run began" in err
    assert len(Path("run/log.jsonl").read_text().splitlines()) == 1 and not Path("run/checkpoint.pt").exists()
    Path("mine.py").write_text(Path("mine.py").read_text().replace("(fa.FA):\n",
                                                                   "(fa.FA):\n    learns = True\n"))
    assert train.main([*SMALL, "--rule", "mine.py:Mine", "--device", "cpu", "--out", "again"]) == 0
    assert fa.KolenPollack.learns and not fa.FA.learns


def test_a_rule_that_is_gone_stops_the_run(monkeypatch, capsys):
    real = train.Trainer.step

    def step(self, chosen):
        for layer in self.handle.layers.values():
            layer.forward = lambda x, layer=layer: layer.crossing.plain.forward(layer, x)
        return real(self, chosen)

    monkeypatch.setattr(train.Trainer, "step", step)
    assert train.main([*SMALL, "--device", "cpu", "--out", "run"]) == 2
    assert ("FA did not carry the error through layer 'layers.1': its forward was replaced"
            in capsys.readouterr().err)
