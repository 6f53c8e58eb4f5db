"""The figures of the README: where they come from and where they stand."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import update_readme

    yield update_readme
    for name in ("update_readme", "evidence_tables"):
        del sys.modules[name]


def test_accuracy_is_written_between_the_marks_of_all_pages_and_nothing_else_changes(tool, monkeypatch, tmp_path):
    claims = {"own single": {"WQL": {"0": [0.98, 0.9, 1.0, None], "1": [1.0, 0.9, 1.1, None]}}}
    (tmp_path / "demo.json").write_text(json.dumps({"claims": claims}))
    real = [["own single", "WQL", 0.97, 0.95, 0.99, None], ["own single", "MAE", 0.5, 0.4, 0.6, None]]
    (tmp_path / "real.json").write_text(json.dumps({"claims": real}))
    before, after = tool.ACCURACY
    (tmp_path / "docs").mkdir()
    for page in ("README.md", "README.zh-CN.md", "docs/figures.md"):
        (tmp_path / page).write_text(f"# A\n{before}\nold\n{after}\nend\n")
    monkeypatch.chdir(tmp_path)
    made = ("--date", "2026-11-26", "--commit", "7a80e29", "--processor", "A Processor")
    monkeypatch.setattr(sys, "argv", ["update_readme.py", str(tmp_path), *made])
    tool.main()
    table = (
        "| WQL of the mixture against | demo domains | one mixture for 12 public sets |\n| --- | --- | --- |\n"
        "| each domain's **own single** | 0.990 ± 0.014 | 0.970 (0.950 to 0.990) |\n"
    )
    assert (tmp_path / "README.md").read_text() == f"# A\n{before}\n{table}{after}\nend\n"
    source = "`make figures DATA=...` · A Processor, ? of ? cores · 2026-11-26 · commit 7a80e29\n\n"
    assert (tmp_path / "docs/figures.md").read_text() == f"# A\n{before}\n{source}{table}{after}\nend\n"
    assert (tmp_path / "README.zh-CN.md").read_text() == (
        f"# A\n{before}\n"
        "| 混合模型的 WQL 相对于 | 示例领域 | 12 个公开数据集共用一个混合模型 |\n| --- | --- | --- |\n"
        "| 各领域**自己的单一学生** | 0.990 ± 0.014 | 0.970（0.950 至 0.990） |\n"
        f"{after}\nend\n"
    )


def test_the_pages_have_the_marks(tool):
    for page in ("README.md", "README.zh-CN.md", "docs/figures.md"):
        assert [(ROOT / page).read_text().count(mark) for mark in tool.ACCURACY] == [1, 1]
