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
    (tmp_path / "held_out.json").write_text(json.dumps({"claims": {"teacher": {"all": [1.4, 1.3, 1.5]}}}))
    ratios = {"teacher": [1.1, 1.0, 1.2], "average single": [0.7, 0.6, 0.8]}
    (tmp_path / "unfamiliar.json").write_text(json.dumps({"left_out": {"0.98": {"claims": ratios}}}))
    before, after = tool.ACCURACY
    (tmp_path / "docs").mkdir()
    for page in ("README.md", "README.zh-CN.md", "docs/figures.md"):
        (tmp_path / page).write_text(f"# A\n{before}\nold\n{after}\nend\n")
    monkeypatch.chdir(tmp_path)
    made = ("--date", "2026-11-26", "--commit", "7a80e29", "--processor", "A Processor")
    monkeypatch.setattr(sys, "argv", ["update_readme.py", str(tmp_path), *made])
    tool.main()
    table = (
        "| WQL of the mixture against | demo domains | demo domains left out in turn "
        "| one mixture for 12 public sets |\n"
        "| --- | --- | --- | --- |\n"
        "| each domain's **own single** | 0.990 ± 0.014 | - | 0.970 (0.950 to 0.990) |\n"
        "| the teacher | - | 1.400 (1.300 to 1.500) | - |\n"
        "| the teacher, where it [forecasts what is unfamiliar](docs/tasks/unseen.md) "
        "| - | 1.100 (1.000 to 1.200) | - |\n"
        "| a single picked blindly, likewise | - | 0.700 (0.600 to 0.800) | - |\n"
    )
    assert (tmp_path / "README.md").read_text() == f"# A\n{before}\n{table}{after}\nend\n"
    source = "`make figures DATA=...` · A Processor, ? of ? cores · 2026-11-26 · commit 7a80e29\n\n"
    assert (
        tmp_path / "docs/figures.md"
    ).read_text() == f"# A\n{before}\n{source}{table.replace('(docs/', '(')}{after}\nend\n"
    assert (tmp_path / "README.zh-CN.md").read_text() == (
        f"# A\n{before}\n"
        "| 混合模型的 WQL 相对于 | 示例领域 | 轮流留出的示例领域 | 12 个公开数据集共用一个混合模型 |\n"
        "| --- | --- | --- | --- |\n"
        "| 各领域**自己的单一学生** | 0.990 ± 0.014 | - | 0.970（0.950 至 0.990） |\n"
        "| 教师 | - | 1.400（1.300 至 1.500） | - |\n"
        "| 教师，[陌生序列由它预测](docs/tasks/unseen.md) | - | 1.100（1.000 至 1.200） | - |\n"
        "| 盲选的单一学生（同样由教师预测陌生序列） | - | 0.700（0.600 至 0.800） | - |\n"
        f"{after}\nend\n"
    )


def test_the_pages_have_the_marks(tool):
    for page in ("README.md", "README.zh-CN.md", "docs/figures.md"):
        assert [(ROOT / page).read_text().count(mark) for mark in tool.ACCURACY] == [1, 1]
