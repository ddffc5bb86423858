"""How fast is it? One table, every row beside the one it is compared with, all measured in one process.

    python tests/benchmark.py                              # on a GPU where there is one, else on the CPU
    python tests/benchmark.py --device cpu --out results/benchmark-cpu.json

Rows of a group take turns, in another order each round, so that a busy machine is fair to all of them; a figure is the median
over the rounds, and behind ± half the distance between the quartiles. A step is `train.Trainer.update` with its batch:
augmentation, forward, backward with the hooks, schedule, Muon and SGD. Operations are those that compute or copy something; on
a GPU each is at least one kernel launch, but a captured step is one in all.
"""
import copy
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import fa  # noqa: E402
import muon  # noqa: E402
import options  # noqa: E402
import rank  # noqa: E402
import runs  # noqa: E402
import speed  # noqa: E402
import train  # noqa: E402


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(device: torch.device, rows: dict, rounds: int, repeat: int = 1) -> dict[str, list[float]]:
    """Seconds a call, for each row a list over the rounds. Every row is called twice before, to warm up."""
    seconds, order = {name: [] for name in rows}, random.Random(0)
    for call in [*rows.values(), *rows.values()]:
        call()
    for _ in range(rounds):
        for name in order.sample(list(rows), len(rows)):        # what ran just before leaves its traces in caches and memory
            call = rows[name]
            wait(device)
            start = time.perf_counter()
            for _ in range(repeat):
                call()
            wait(device)
            seconds[name].append((time.perf_counter() - start) / repeat)
    return seconds


def spread(seconds: list[float]) -> float:
    low, _, high = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else (0, 0, 0)
    return (high - low) / 2


# ---- the step --------------------------------------------------------------------------------------------------

def plain_hooks(trainer: train.Trainer, rule: fa.Rule) -> None:
    """Feedback alignment by a full backward hook alone: autograd computes Wᵀδ too, and the hook throws it away."""
    layers = [m for m in trainer.model.modules() if isinstance(m, fa.Layer)]
    for layer in layers[1:]:
        rule.prepare(layer)
        layer.rule, layer.unreplaced = rule, 0
        layer.register_full_backward_hook(fa._replace_error)


def steps(device: torch.device, width: int, batch: int) -> dict:
    """name -> a function that makes one training step."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4 * batch, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(100, (4 * batch,), generator=generator)
    dataset = data.Dataset(images, labels, images[:10], labels[:10], [str(i) for i in range(100)])
    common = ["--dataset", "cifar100", "--width", str(width), "--batch-size", str(batch), "--epochs", "100000",
              "--device", str(device)]
    variants = {"BP + norm": ["--rule", "bp", "--norm"], "FA + norm, plain hook": ["--rule", "bp", "--norm"],
                "FA + norm": ["--rule", "fa", "--norm"], "FA": ["--rule", "fa"], "BP": ["--rule", "bp"],
                "FA + Muon": ["--rule", "fa", "--muon"], "FA + Muon + norm": ["--rule", "fa", "--muon", "--norm"]}
    if device.type == "cuda":
        variants.update({f"{name}, captured": variants[name] for name in ("BP + norm", "FA + norm", "FA + Muon + norm")})
    calls = {}
    for name, own in variants.items():
        own = [*own, "--graph" if name.endswith("captured") else "--no-graph"]
        rates = ["--lr", "1e-6", *["--muon-lr", "1e-6"] * ("--muon" in own)]
        trainer = train.Trainer(train.parse([*common, *own, *rates]), dataset)
        trainer.model.train()
        if name.endswith("plain hook"):
            plain_hooks(trainer, fa.FA(seed=0))

        def call(trainer=trainer, batches=[]) -> None:                          # noqa: B006  (it is this trainer's own)
            if not batches:
                batches.append(iter(()))
            chosen = next(batches[0], None)
            if chosen is None:
                batches[0] = data.indices(4 * batch, batch, trainer.generator)
                chosen = next(batches[0])
            trainer.update(chosen)

        calls[name] = call
    return calls


COMPARED = {"FA + norm, plain hook": "BP + norm", "FA + norm": "BP + norm", "FA": "BP", "FA + Muon": "BP",
            "FA + Muon + norm": "BP + norm", "BP + norm, captured": "BP + norm", "FA + norm, captured": "BP + norm, captured",
            "FA + Muon + norm, captured": "BP + norm, captured"}


def flops_an_image(width: int) -> int:
    """Of one training step by backprop, forward and backward, an image."""
    import models
    model, x = models.resnet18(100, "batch", width), torch.randn(2, 3, 32, 32)
    with FlopCounterMode(display=False) as counter:
        model(x).square().sum().backward()
    return counter.get_total_flops() // 2


def ceiling(device: torch.device) -> float:
    """FLOP/s of a large matrix product, in the precision that the step uses: bf16 on a GPU, float32 on a CPU.

    The product by itself, or in a convolution of many channels, which on some CPUs has the faster library.
    """
    n, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (2048, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    images, kernel = (torch.randn(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
                      for shape in ((64, 512, 16, 16), (512, 512, 3, 3)))
    ways = {"product": lambda: a @ b, "convolution": lambda: nn.functional.conv2d(images, kernel, padding=1)}
    flops = {"product": 2 * n ** 3, "convolution": 2 * images.numel() * kernel[0].numel()}
    return max(flops[way] / statistics.median(each) for way, each in in_turns(device, ways, 10).items())


def step_rows(device: torch.device, width: int, batch: int, rounds: int, top: float) -> list[dict]:
    calls, flops = steps(device, width, batch), flops_an_image(width)
    if device.type == "cuda":
        for call in calls.values():                                             # until the graphs are recorded
            for _ in range(4):
                call()
    seconds, rows = in_turns(device, calls, rounds), []
    for name, each in seconds.items():
        median, peak, operations = statistics.median(each), None, 1
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            calls[name]()
            wait(device)
            peak = torch.cuda.max_memory_allocated(device) / 2 ** 20
        if not name.endswith("captured"):
            operations = operations_of(calls[name])
        rows.append({"group": f"step, ResNet-18 of width {width}, batch {batch}", "row": name, "seconds": median,
                     "spread": spread(each), "against": COMPARED.get(name), "images_per_second": batch / median,
                     "share_of_ceiling": batch * flops / median / top, "peak_MiB": peak, "operations": operations})
    return rows


# ---- the parts -------------------------------------------------------------------------------------------------

class CountOperations(TorchDispatchMode):
    """Operations that compute or copy something; on a GPU each is at least one kernel launch. Views are none."""

    def __init__(self):
        super().__init__()
        self.counts: Counter = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and "unsafe_view" not in str(function):
            self.counts[str(function)] += 1
        return result


def operations_of(call) -> int:
    with CountOperations() as counter:
        call()
    return sum(counter.counts.values())


def memory_rows(device: torch.device, width: int, batch: int, rounds: int) -> list[dict]:
    """A step before and after speed.prepare, which on a CPU keeps the memory of dead tensors; so call it first of all."""
    call, seconds = steps(device, width, batch)["FA + Muon + norm"], {}
    for name in ("given back", "kept"):
        seconds[name] = in_turns(device, {name: call}, rounds)[name]
        speed.prepare(device)
    return rows_of(f"memory of dead tensors, FA + Muon + norm, width {width}, batch {batch}", seconds)


def convolution_rows(device: torch.device, width: int, batch: int, rounds: int) -> list[dict]:
    """Error and weight gradient of a step's hidden convolutions: by one call, as autograd does with W, or by two, as with B."""
    import models
    model, calls = models.resnet18(100, "batch", width).to(device, memory_format=torch.channels_last), []

    def see(layer: nn.Conv2d, inputs: tuple, output: torch.Tensor) -> None:
        geometry = (None, layer.stride, layer.padding, layer.dilation, False, (0, 0), layer.groups)
        calls.append((torch.randn_like(output), inputs[0].detach(), layer.weight.detach(), *geometry))

    for layer in [m for m in model.modules() if isinstance(m, nn.Conv2d)][1:]:
        layer.register_forward_hook(see)
    model(torch.randn(batch, 3, 32, 32, device=device).to(memory_format=torch.channels_last))
    backward = torch.ops.aten.convolution_backward

    def one() -> None:
        for call in calls:
            backward(*call, (True, True, False))

    def two() -> None:
        for call in calls:
            backward(*call, (False, True, False))
            backward(*call, (True, False, False))

    return timed(device, f"backward of the {len(calls)} hidden convolutions, width {width}, batch {batch}",
                 {"one call for both gradients": one, "two calls": two}, rounds)


def muon_rows(device: torch.device, width: int, rounds: int) -> list[dict]:
    import models
    hidden, _ = muon.split(models.resnet18(100, "batch", width).to(device, memory_format=torch.channels_last))
    flat = [nn.Parameter(p.detach().flatten(1).clone()) for p in hidden]
    for p, q in zip(hidden, flat):
        p.grad = torch.randn_like(p)
        q.grad = p.grad.flatten(1).clone()
    ours = muon.Muon(hidden, 1e-6, weight_decay=0.01)
    theirs = torch.optim.Muon(flat, 1e-6, weight_decay=0.01)
    rows = {"torch.optim.Muon, flattened weights": theirs.step, "ours": ours.step}
    result = timed(device, f"Muon step, the {len(hidden)} hidden matrices of ResNet-18, width {width}", rows, rounds)
    for row, call in zip(result, rows.values()):
        row["operations"] = operations_of(call)
    return result


def rank_rows(device: torch.device, rounds: int) -> list[dict]:
    M = torch.randn(512, 4608, device=device)
    M = M * torch.logspace(0, -2, 4608, device=device)
    return timed(device, "effective rank of a 512 × 4608 matrix",
                 {"torch.linalg.svdvals, float64": lambda: torch.linalg.svdvals(M.double()), "ours, float64 Gram matrix":
                  lambda: rank.effective_rank(M)}, rounds)


def epoch_rows(device: torch.device, rounds: int) -> list[dict]:
    """The data's part of an epoch: order, crops and flips of 50,000 images."""
    images = torch.randint(256, (50000, 3, 32, 32), dtype=torch.uint8, device=device)
    labels, generator = torch.zeros(50000, dtype=torch.int64, device=device), torch.Generator(device).manual_seed(0)

    def epoch() -> None:
        for _ in data.batches(images, labels, 512, generator):
            pass

    return timed(device, "data of an epoch, 50,000 images in batches of 512", {"order, crops and flips": epoch}, rounds)


def start_rows(device: torch.device, rounds: int) -> list[dict]:
    """From the command to the end of the first epoch, whose own seconds are taken off."""
    seconds = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            out, start = Path(folder) / "run", time.perf_counter()
            command = [sys.executable, ROOT / "train.py", "--subset", "64", "--width", "4", "--epochs", "1"]
            process = subprocess.Popen([*command, "--device", str(device), "--out", out], stdout=subprocess.DEVNULL)
            while not (out / "log.jsonl").exists() and process.poll() is None:
                time.sleep(0.005)
            stopped = time.perf_counter() - start
            process.wait()
            seconds.append(stopped - json.loads((out / "log.jsonl").read_text())["seconds"])
    return [{"group": "start", "row": "from the command to the first step, gratings", "seconds": statistics.median(seconds),
             "spread": spread(seconds), "against": None}]


def timed(device: torch.device, group: str, rows: dict, rounds: int) -> list[dict]:
    """Each row against the first."""
    return rows_of(group, in_turns(device, rows, rounds))


def rows_of(group: str, seconds: dict[str, list[float]]) -> list[dict]:
    first = next(iter(seconds))
    return [{"group": group, "row": name, "seconds": statistics.median(each), "spread": spread(each),
             "against": None if name == first else first} for name, each in seconds.items()]


# ---- the table -------------------------------------------------------------------------------------------------

def ratio(row: dict, rows: list[dict]) -> float | None:
    """Its seconds over those of the row that it is compared with."""
    for other in rows:
        if other["group"] == row["group"] and other["row"] == row["against"]:
            return row["seconds"] / other["seconds"]
    return None


def duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.{max(0, 2 - int(math.log10(1000 * seconds + 1e-9)))}f} ms"


def table(rows: list[dict]) -> str:
    lines = ["| | time | ratio | |", "| --- | --- | --- | --- |"]
    for i, row in enumerate(rows):
        if i == 0 or rows[i - 1]["group"] != row["group"]:
            lines.append(f"| **{row['group']}** | | | |")
        more = []
        if row.get("images_per_second"):
            more.append(f"{row['images_per_second']:,.0f} images/s, {row['share_of_ceiling']:.0%} of the ceiling")
        if row.get("peak_MiB"):
            more.append(f"{row['peak_MiB']:,.0f} MiB")
        if row.get("operations"):
            more.append("one launch" if row["operations"] == 1 else f"{row['operations']:,} operations")
        compared = ratio(row, rows)
        against = f"{compared:.2f} × {row['against']}" if compared else ""
        took = f"{duration(row['seconds'])} ± {duration(row['spread'])}"
        lines.append(f"| {row['row']} | {took} | {against} | {', '.join(more)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    p = options.Parser(prog="benchmark.py", description=__doc__.splitlines()[0])
    p.add_argument("--device", default="auto", help="cpu, cuda or cuda:N (default: auto, the first GPU where there is one)")
    p.add_argument("--rounds", type=options.number(int, 2), default=15, help="how often every row is timed (default: 15)")
    p.add_argument("--batch-sizes", type=options.number(int, 1), nargs="+", default=[128, 512], metavar="N")
    p.add_argument("--width", type=options.number(int, 1), help="of ResNet-18 (default: 64 on a GPU, 16 on a CPU)")
    p.add_argument("--out", type=Path, metavar="FILE.json", help="keep the rows, and what they were measured with")
    args = p.parse_args(argv)
    device, _ = options.choose_device(p, args.device)
    width = args.width or (64 if device.type == "cuda" else 16)
    memory = memory_rows(device, width, max(args.batch_sizes), args.rounds) if device.type == "cpu" else []
    speed.prepare(device)
    top = ceiling(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name} · torch {torch.__version__} · large matrix products reach {top / 1e12:.3g} TFLOP/s")
    rows = []
    for batch in args.batch_sizes:
        rows += step_rows(device, width, batch, args.rounds, top)
    rows += memory + convolution_rows(device, width, args.batch_sizes[0], args.rounds)
    rows += muon_rows(device, 64, args.rounds) + rank_rows(device, args.rounds) + epoch_rows(device, 3)
    rows += start_rows(device, 3)
    print(table(rows))
    if args.out:
        content = {"device": name, "rounds": args.rounds, "ceiling_flop_per_second": top, **runs.provenance(), "rows": rows}
        runs.write_json(args.out, copy.deepcopy(content))
        print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
