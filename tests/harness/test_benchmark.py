"""tests/benchmark.py: the table of speed in results/README.md is what was measured, and each row is compared
with one that is there. The benchmark itself is run by hand, as speed is no test."""
import json
import re

import benchmark
import pytest
import torch
from conftest import ROOT

from harness import flags


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_readme_shows_what_was_measured(device):
    rows = json.loads((ROOT / "results" / f"benchmark-{device}.json").read_text())["rows"]
    text = (ROOT / "results" / "README.md").read_text(encoding="utf-8")
    shown = re.search(f"<!-- benchmark-{device} -->\n(.*?)<!-- end -->", text, re.S)[1]
    assert shown == benchmark.table(rows) + "\n"
    assert benchmark.ratio({**rows[1], "group": "another"}, rows) is None


@pytest.mark.parametrize("device, bf16, first, last", [
    ("cpu", True, "BP + norm", "FA + Muon + norm, bf16"),
    ("cuda", True, "BP + norm, bf16", "FA + Muon + norm, bf16, captured"),
    ("cuda", False, "BP + norm", "FA + Muon + norm, captured")])
def test_the_rows_of_a_step_are_compared_with_rows_that_are_there(device, bf16, first, last, monkeypatch):
    monkeypatch.setattr(flags, "computes_bf16", lambda _: bf16)
    rows = benchmark.variants(torch.device(device), list(benchmark.FLAGS))
    assert list(rows)[0] == first and list(rows)[-1] == last
    for name, (asked, against, precision) in rows.items():
        assert ("--amp" in asked.split()) == (precision == "bf16") == ("bf16" in name)
        assert against is None if name in ("BP", first, "BP, bf16") else against in rows
    assert bf16 or not any("bf16" in name for name in rows)
