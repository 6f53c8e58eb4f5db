"""The page of speed is written from lines, and the cost model finds the coefficients that made its cases."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
import cost_model
import run_benchmarks

FACTS = {
    "clock": "wall",
    "threads": 2,
    "machine": {"processor": "A Processor", "cores": 2, "flags": ["avx2", "amx_bf16"]},
    "versions": {"torch": "2.13.0"},
}
REACH = {
    "throughput": {"mixture against upstream float32, batch 256, float32": 15.0, "new measure": 3.0}
    | {"mixture against upstream float32, batch 256, bf16": 48.25},
    "startup": {"chronomoe --help against import torch": 0.134},
}
THROUGHPUT = {
    "parameters": {"upstream": 119_500_000, "student": 12_700_000},
    "context_length": 512,
    "horizon": 96,
    "num_experts": 4,
    "preset": "slim",
    "mean_experts": {"1": 1.0},
    "milliseconds": {
        "1": {"upstream float32": 90.0, "upstream bf16": 120.0, "mixture float32": 9.0, "mixture bf16": 7.5}
    },
}


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "speed.jsonl"
    found = {name: {"benchmark": name, "reach": reach, **FACTS} for name, reach in REACH.items()}
    found["throughput"] |= THROUGHPUT | {"date": "2026-11-26", "commit": "7a80e29"}
    path.write_text("".join(json.dumps(line) + "\n" for line in found.values()))
    return path


def test_the_page_shows_every_measure_once_beside_its_aim_and_says_where(lines, tmp_path, monkeypatch, capsys):
    page = tmp_path / "speed.md"
    start, end = run_benchmarks.MARKS
    page.write_text(f"before\n{start}\nold\n{end}\nafter\n")
    (tmp_path / "docs").mkdir()
    readme, chinese, sources = (tmp_path / name for name in ("README.md", "README.zh-CN.md", "docs/figures.md"))
    for one in (readme, chinese, sources):
        one.write_text("{}\nold\n{}\n".format(*run_benchmarks.SPEED))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["x", "--no-run", "--lines", str(lines), "--page", str(page)])
    run_benchmarks.main()
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")
    assert "old" not in text
    assert "Measured on A Processor (avx2, amx_bf16), 2 of 2 cores, torch 2.13.0, wall clock, one run." in text
    assert "| mixture against upstream float32, batch 256 | 15 | 48.25 | 18 / 50 |" in text
    assert "| chronomoe --help against import torch | 0.134 | - | 0.8 |" in text
    assert "| new measure | 3 | - | - |" in text
    row = "| 1 | 1.0 | 90 | 120 | 9 | 7.5 | **10.0** / **12.0** |"
    assert all(row in one.read_text() for one in (readme, chinese, sources))
    assert (
        "| 序列数 | 专家数 | 上游 float32 | 上游 bf16 | 混合模型 float32 | 混合模型 bf16 | 加速比 |"
        in chinese.read_text()
    )
    words = re.sub(r"`.*?`|float32|bf16|slim|docs/speed.md|<!--.*?-->|\((avx2|amx_bf16|, )+\)", "", chinese.read_text())
    assert set(re.findall(r"[A-Za-z]{2,}", words)) == {"Processor", "torch", "Chronos"}
    assert "one run · 2026-11-26 · commit 7a80e29\n" in sources.read_text()
    assert "| 15 | 48.25 |" in capsys.readouterr().out


def test_the_pages_have_the_marks():
    root = Path(__file__).parents[2]
    for page, marks in (
        ("docs/speed.md", run_benchmarks.MARKS),
        ("README.md", run_benchmarks.SPEED),
        ("README.zh-CN.md", run_benchmarks.SPEED),
        ("docs/figures.md", run_benchmarks.SPEED),
    ):
        assert [(root / page).read_text().count(mark) for mark in marks] == [1, 1]


def test_the_cost_model_finds_the_coefficients_that_made_its_cases():
    rng = np.random.default_rng(0)
    true = np.array([2.0, 1.5, 0.02, 0.04, 1e-4, 0.03])
    cases = [
        {
            "context_length": int(rng.choice([64, 512, 2048])),
            "horizon": int(rng.choice([16, 96, 384])),
            "rows": int(rng.choice([1, 8, 64])),
            "mean_experts": float(rng.choice([1, 2])),
            "experts_run": int(rng.choice([1, 4])),
            "dtype": "float32",
        }
        for _ in range(40)
    ]
    for case in cases:
        case["milliseconds"] = float(cost_model.terms(case, patch_size=16) @ true)
    found, error = cost_model.fit(cases, patch_size=16)
    np.testing.assert_allclose(list(found.values()), true, rtol=1e-3)
    assert error < 1e-3
    (row,) = cost_model.page({"patch_size": 16, "threads": 1, "cases": cases})[2:]
    batch = float(cost_model.terms(cost_model.USUAL, patch_size=16) @ true)
    assert row.endswith(f"| {batch / 1000 * 1e8 / 256 / 3600:.0f} |")
