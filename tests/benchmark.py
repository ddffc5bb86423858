"""How fast is it? One table, every row beside the one it is compared with, all measured in one process.

    python tests/benchmark.py                              # on a GPU where there is one, else on the CPU
    python tests/benchmark.py --device cpu --out results/benchmark-cpu.json

Rows of a group take turns, in another order each round, so that a busy machine is fair to all of them; a
figure is the median over the rounds, and behind ± half the distance between the quartiles. A step is
`train.Trainer.step`: augmentation, forward, backward with the hooks, Muon and SGD. Operations are those that
compute or copy something; on a GPU each is at least one kernel launch, but a captured step is one in all.

The ceiling of a precision is what large matrix products and convolutions reach in it, measured in the same
process. A precision that the machine has no instructions for is left out.
"""
import itertools
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import fa  # noqa: E402
import models  # noqa: E402
import muon  # noqa: E402
import rank  # noqa: E402
import train  # noqa: E402
from harness import files, flags, graph, session  # noqa: E402


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def in_turns(device: torch.device, rows: dict, rounds: int, repeat: int = 1) -> dict[str, list[float]]:
    """Seconds a call, for each row a list over the rounds. Every row is called twice before, to warm up."""
    seconds, order = {name: [] for name in rows}, random.Random(0)
    for call in [*rows.values(), *rows.values()]:
        call()
    for _ in range(rounds):
        for name in order.sample(list(rows), len(rows)):    # what ran just before leaves traces in the caches
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


def row_of(group: str, name: str, seconds: list[float], against: str | None) -> dict:
    return {"group": group, "row": name, "seconds": statistics.median(seconds), "spread": spread(seconds),
            "against": against}


def rows_of(group: str, seconds: dict[str, list[float]]) -> list[dict]:
    """Each row against the first."""
    first = next(iter(seconds))
    return [row_of(group, name, each, None if name == first else first) for name, each in seconds.items()]


# ---- the step ----------------------------------------------------------------------------------------------

def plain_hooks(trainer: train.Trainer, rule: fa.Rule) -> None:
    """Feedback alignment by a full backward hook alone: autograd computes Wᵀδ too,
    and the hook throws it away."""
    layers = [m for m in trainer.model.modules() if isinstance(m, fa.Layer)]
    for layer in layers[1:]:
        rule.prepare(layer)
        layer.rule = rule
        layer.register_full_backward_hook(fa._replace_error)


FLAGS = {"BP + norm": "--rule bp --norm", "FA + norm, plain hook": "--rule bp --norm",
         "FA + norm": "--rule fa --norm", "FA": "--rule fa", "BP": "--rule bp",
         "FA + Muon": "--rule fa --muon", "FA + Muon + norm": "--rule fa --muon --norm"}
AGAINST = {"FA": "BP", "FA + Muon": "BP",
           **{name: "BP + norm" for name in FLAGS if name.startswith("FA") and "norm" in name}}
MAIN = ["BP + norm", "FA + norm", "FA + Muon + norm"]


class Variant(NamedTuple):
    flags: str                  # of train.py
    against: str | None         # the row that it is compared with
    precision: str


def precisions(device: torch.device) -> dict[str, torch.dtype]:
    """Those that a step is measured in: on a GPU its default, on a CPU both that it has instructions for."""
    native = {"bf16": torch.bfloat16} if flags.computes_bf16(device) else {}
    return native if native and device.type == "cuda" else {"float32": torch.float32, **native}


def variants(device: torch.device, names: list[str]) -> dict[str, Variant]:
    """What is measured, by the names of its rows: `names` in the first precision,
    MAIN in the other and in a CUDA graph."""
    listed, first = {}, next(iter(precisions(device)))
    for precision in precisions(device):
        tail, amp = (", bf16", "--amp") if precision == "bf16" else ("", "--no-amp")
        for name in names if precision == first else MAIN:
            against = AGAINST[name] + tail if name in AGAINST else None if precision == first else name
            listed[name + tail] = Variant(f"{FLAGS[name]} {amp} --no-graph", against, precision)
        for name in MAIN if device.type == "cuda" else []:
            against = f"{AGAINST[name]}{tail}, captured" if name in AGAINST else name + tail
            listed[f"{name}{tail}, captured"] = Variant(f"{FLAGS[name]} {amp} --graph", against, precision)
    return listed


def step_of(device: torch.device, width: int, batch: int, name: str, asked: str) -> Callable[[], None]:
    """A function that makes one training step."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (4 * batch, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(100, (4 * batch,), generator=generator)
    dataset = data.Dataset(images, labels, images[:10], labels[:10], [str(i) for i in range(100)])
    rates = ["--lr", "1e-6", *["--muon-lr", "1e-6"] * ("--muon" in asked)]
    args = flags.parse(["--dataset", "cifar100", "--width", str(width), "--batch-size", str(batch),
                        "--epochs", "100000", "--device", str(device), *rates, *asked.split()])
    trainer = train.Trainer(args, dataset)
    step = graph.Graphed(trainer.step, trainer.generator) if args.graph else trainer.step
    trainer.model.train()
    if "plain hook" in name:
        plain_hooks(trainer, fa.FA(seed=0))
    order = (chosen for _ in itertools.count()
             for chosen in data.indices(4 * batch, batch, trainer.generator))
    return lambda: step(next(order))


def resnet(width: int) -> nn.Module:
    return models.resnet18(100, "batch", width).to(memory_format=torch.channels_last)


def flops_an_image(width: int) -> int:
    """Of one training step by backprop, forward and backward, an image."""
    with FlopCounterMode(display=False) as counter:
        resnet(width)(torch.randn(2, 3, 32, 32)).square().sum().backward()
    return counter.get_total_flops() // 2


def ceiling(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product.

    The product by itself, or in a convolution of many channels, which on some CPUs has the faster library.
    """
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    images, kernel = (torch.randn(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
                      for shape in ((64, 512, 16, 16), (512, 512, 3, 3)))
    ways = {"product": lambda: a @ b, "convolution": lambda: nn.functional.conv2d(images, kernel, padding=1)}
    flops = {"product": 2 * n ** 3, "convolution": 2 * images.numel() * kernel[0].numel()}
    return max(flops[way] / statistics.median(each) for way, each in in_turns(device, ways, 10).items())


def step_rows(device: torch.device, width: int, batch: int, rounds: int, top: dict[str, float],
              names: list[str]) -> list[dict]:
    gpu, flops, calls, at_rest = device.type == "cuda", flops_an_image(width), {}, {}
    listed, held = variants(device, names), allocated(device)
    for name, variant in listed.items():
        calls[name] = step_of(device, width, batch, name, variant.flags)
        for _ in range(4 if gpu else 0):                        # until the graph is recorded
            calls[name]()
        held, at_rest[name] = allocated(device), allocated(device) - held
    # To wait for the GPU after each step would time the waiting: a captured step is handed over in no time.
    seconds, rows = in_turns(device, calls, rounds, repeat=10 if gpu else 1), []
    for name, each in seconds.items():
        median, captured = statistics.median(each), name.endswith("captured")
        # a graph's own peak is not seen
        peak = None if captured or not gpu else at_rest[name] + more_in(device, calls[name])
        rows.append({**row_of(f"step, ResNet-18 of width {width}, batch {batch}", name, each,
                              listed[name].against),
                     "images_per_second": batch / median,
                     "share_of_ceiling": batch * flops / median / top[listed[name].precision],
                     "peak_MiB": peak and peak / 2 ** 20,
                     "operations": 1 if captured else operations_of(calls[name])})
    return rows


def allocated(device: torch.device) -> int:
    wait(device)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def more_in(device: torch.device, call: Callable[[], None]) -> int:
    """Bytes on a GPU that a call needs at its peak, beyond those that are held before it."""
    before = allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    wait(device)
    return torch.cuda.max_memory_allocated(device) - before


# ---- the parts ---------------------------------------------------------------------------------------------

class CountOperations(TorchDispatchMode):
    """Operations that compute or copy something; on a GPU each is at least one kernel launch.
    Views are none."""
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view and "unsafe_view" not in str(function)
        return function(*args, **(kwargs or {}))


def operations_of(call) -> int:
    with CountOperations() as counter:
        call()
    return counter.count


def memory_rows(device: torch.device, width: int, batch: int, rounds: int) -> list[dict]:
    """A step before and after graph.prepare, which on a CPU keeps the memory of dead tensors;
    so call it first of all."""
    call, seconds = step_of(device, width, batch, "", FLAGS["FA + Muon + norm"] + " --no-amp"), {}
    for name in ("given back", "kept"):
        seconds[name] = in_turns(device, {name: call}, rounds)[name]
        graph.prepare(device)
    return rows_of(f"memory of dead tensors, FA + Muon + norm, width {width}, batch {batch}", seconds)


def convolution_rows(device: torch.device, width: int, batch: int, rounds: int, precision: str) -> list[dict]:
    """Error and weight gradient of a step's hidden convolutions: by one call, as autograd does with W,
    or by two, as with B."""
    calls, dtype = [], precisions(device)[precision]
    model = resnet(width).to(device, dtype)

    def see(layer: nn.Conv2d, inputs: tuple, output: torch.Tensor) -> None:
        geometry = (None, layer.stride, layer.padding, layer.dilation, False, (0, 0), layer.groups)
        calls.append((torch.randn_like(output), inputs[0].detach(), layer.weight.detach(), *geometry))

    for layer in [m for m in model.modules() if isinstance(m, nn.Conv2d)][1:]:
        layer.register_forward_hook(see)
    model(torch.randn(batch, 3, 32, 32, device=device, dtype=dtype).to(memory_format=torch.channels_last))
    backward = torch.ops.aten.convolution_backward

    def run(*masks: tuple) -> None:
        for call in calls:
            for mask in masks:
                backward(*call, mask)

    ways = {"one call for both gradients": lambda: run((True, True, False)),
            "two calls": lambda: run((False, True, False), (True, False, False))}
    return rows_of(f"backward of the {len(calls)} hidden convolutions, width {width}, batch {batch}, "
                   f"{precision}", in_turns(device, ways, rounds))


def muon_rows(device: torch.device, width: int, rounds: int) -> list[dict]:
    hidden, _ = muon.split(resnet(width).to(device))
    flat, same = [[nn.Parameter(p.detach().flatten(1).clone()) for p in hidden] for _ in range(2)]
    for p, q, r in zip(hidden, flat, same):
        p.grad = torch.randn_like(p)
        q.grad = r.grad = p.grad.flatten(1).clone()             # neither writes to it
    settings = dict(lr=1e-6, weight_decay=0.01)
    rows = {"torch.optim.Muon, flattened weights": torch.optim.Muon(flat, **settings).step,
            "ours, flattened weights": muon.Muon(same, **settings).step,
            "ours": muon.Muon(hidden, **settings).step}
    result = rows_of(f"Muon step, the {len(hidden)} hidden matrices of ResNet-18, width {width}",
                     in_turns(device, rows, rounds))
    for row, call in zip(result, rows.values()):
        row["operations"] = operations_of(call)
    return result


def rank_rows(device: torch.device, rounds: int) -> list[dict]:
    M = torch.randn(512, 4608, device=device) * torch.logspace(0, -2, 4608, device=device)
    ways = {"torch.linalg.svdvals, float64": lambda: torch.linalg.svdvals(M.double()),
            "ours, float64 Gram matrix": lambda: rank.effective_rank(M)}
    return rows_of("effective rank of a 512 × 4608 matrix", in_turns(device, ways, rounds))


def epoch_rows(device: torch.device, rounds: int) -> list[dict]:
    """The data's part of an epoch: order, crops and flips of 50,000 images."""
    images = torch.randint(256, (50000, 3, 32, 32), dtype=torch.uint8, device=device)
    labels = torch.zeros(50000, dtype=torch.int64, device=device)
    generator = torch.Generator(device).manual_seed(0)

    def epoch() -> None:
        for _ in data.batches(images, labels, 512, generator):
            pass

    return rows_of("data of an epoch, 50,000 images in batches of 512",
                   in_turns(device, {"order, crops and flips": epoch}, rounds))


def start_rows(device: torch.device, rounds: int) -> list[dict]:
    """From the command to the end of the first epoch, whose own seconds are taken off."""
    seconds = []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as folder:
            out, start = Path(folder) / "run", time.perf_counter()
            command = [sys.executable, ROOT / "train.py", "--subset", "64", "--width", "4", "--epochs", "1"]
            process = subprocess.Popen([*command, "--device", str(device), "--out", out],
                                       stdout=subprocess.DEVNULL)
            while not (out / "log.jsonl").exists() and process.poll() is None:
                time.sleep(0.005)
            stopped = time.perf_counter() - start
            process.wait()
            seconds.append(stopped - json.loads((out / "log.jsonl").read_text())["seconds"])
    return [row_of("start", "from the command to the first step, gratings", seconds, None)]


# ---- the table ---------------------------------------------------------------------------------------------

def ratio(row: dict, rows: list[dict]) -> float | None:
    """Its seconds over those of the row that it is compared with."""
    for other in rows:
        if other["group"] == row["group"] and other["row"] == row["against"]:
            return row["seconds"] / other["seconds"]
    return None


def duration(seconds: float) -> str:
    return (f"{seconds:.2f} s" if seconds >= 1 else
            f"{1000 * seconds:.{max(0, 2 - int(math.log10(1000 * seconds + 1e-9)))}f} ms")


def table(rows: list[dict]) -> str:
    lines = ["| | time | ratio | |", "| --- | --- | --- | --- |"]
    for i, row in enumerate(rows):
        if i == 0 or rows[i - 1]["group"] != row["group"]:
            lines.append(f"| **{row['group']}** | | | |")
        more = []
        if row.get("images_per_second"):
            more.append(f"{row['images_per_second']:,.0f} images/s, "
                        f"{row['share_of_ceiling']:.0%} of the ceiling")
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
    p = flags.Parser(prog="benchmark.py", description=__doc__.splitlines()[0])
    p.add_argument("--device", default="auto",
                   help="cpu, cuda or cuda:N (default: auto, the first GPU where there is one)")
    p.add_argument("--rounds", type=flags.number(int, 2), default=9,
                   help="how often every row is timed (default: 9; of a wide network on a CPU half as often)")
    p.add_argument("--batch-sizes", type=flags.number(int, 1), nargs="+", default=[128, 512], metavar="N")
    p.add_argument("--width", type=flags.number(int, 1),
                   help="of ResNet-18 (default: 64 on a GPU; on a CPU 16, and 64 for the first batch size)")
    p.add_argument("--out", type=Path, metavar="FILE.json",
                   help="keep the rows, and what they were measured with")
    args = p.parse_args(argv)
    device, _ = flags.choose_device(p, args.device)
    width = args.width or (64 if device.type == "cuda" else 16)
    memory = memory_rows(device, width, max(args.batch_sizes), args.rounds) if device.type == "cpu" else []
    graph.prepare(device)
    top = {precision: ceiling(device, dtype) for precision, dtype in precisions(device).items()}
    gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if gpu else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name} · torch {torch.__version__} · large matrix products reach "
          + ", ".join(f"{reached / 1e12:.3g} TFLOP/s in {precision}" for precision, reached in top.items()))
    if "bf16" not in top:
        print("no rows in bf16, as that of torch.optim.Muon: there are no instructions for it here")
    rows = []
    for batch in args.batch_sizes:
        rows += step_rows(device, width, batch, args.rounds, top, list(FLAGS))
    if device.type == "cpu" and not args.width:
        rows += step_rows(device, 64, args.batch_sizes[0], (args.rounds + 1) // 2, top, MAIN)
    rows += memory
    for precision in top:
        rows += convolution_rows(device, width, args.batch_sizes[0], args.rounds, precision)
    if "bf16" in top:
        rows += muon_rows(device, 64, args.rounds)
    rows += rank_rows(device, args.rounds) + epoch_rows(device, 3) + start_rows(device, 3)
    print(table(rows))
    if args.out:
        content = {"device": name, "rounds": args.rounds, "ceiling_flop_per_second": top,
                   **session.provenance(), "rows": rows}
        files.write_json(args.out, content)
        print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
