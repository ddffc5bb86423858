"""The README's table of speed is what results/ says; the benchmark itself is run by hand, as speed is no test."""
import json
import re

import benchmark
from conftest import ROOT


def test_the_readme_shows_what_was_measured():
    rows = json.loads((ROOT / "results" / "benchmark-cpu.json").read_text())["rows"]
    shown = re.search("<!-- benchmark-cpu -->\n(.*?)<!-- end -->", (ROOT / "README.md").read_text(encoding="utf-8"), re.S)[1]
    assert shown == benchmark.table(rows) + "\n"


def test_a_ratio_is_of_the_row_it_names():
    rows = [{"group": "a", "row": "x", "seconds": 2.0, "spread": 0.1, "against": None},
            {"group": "a", "row": "y", "seconds": 3.0, "spread": 0.1, "against": "x"},
            {"group": "b", "row": "x", "seconds": 6.0, "spread": 0.1, "against": None}]
    assert [benchmark.ratio(row, rows) for row in rows] == [None, 1.5, None]
    assert "| y | 3.00 s ± 100 ms | 1.50 × x |" in benchmark.table(rows)
