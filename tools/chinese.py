"""The figures of README.zh-CN.md: lines that tools write into README.md, in Chinese."""

import re
from collections.abc import Iterable

PHRASES = {
    # accuracy
    "WQL of the mixture against": "混合模型的 WQL 相对于",
    "demo domains left out in turn": "轮流留出的示例领域",
    "demo domains": "示例领域",
    r"(\d+) public files nobody trained on": r"\1 个从未参与训练的公开文件",
    r"one mixture for (\d+) public sets": r"\1 个公开数据集共用一个混合模型",
    r"each domain's \*\*own single\*\*": "各领域**自己的单一学生**",
    "each domain's own expert, looked up by name": "各领域自己的专家（按名字直接取用）",
    r"\*\*a generalist\*\* of the same size and all of the training": "同等大小、用掉全部训练量的**通才**",
    "a generalist of twice the layers": "层数加倍的通才",
    "a single picked blindly, likewise": "盲选的单一学生（同样由教师预测陌生序列）",
    "a single picked blindly": "盲选的单一学生",
    "the average of all experts": "所有专家的简单平均",
    r"the teacher, where it \[forecasts what is unfamiliar\]\((\S+)\)": r"教师，[陌生序列由它预测](\1)",
    "the teacher": "教师",
    r" \((\S+) to (\S+)\)": r"（\1 至 \2）",
    # speed
    r"Milliseconds of a batch of forecasts, context (\d+), horizon (\d+): upstream's code on a full-size Chronos-2 "
    r"\((\S+) parameters, random weights\), and a mixture of (\d+) `(\w+)` students of it \((\S+) each\) at its mean "
    r"number of experts\. (.*); \[more\]\(docs/speed\.md\)\.": (
        r"预测一批序列所需的毫秒数，上下文 \1，预测步长 \2：上游代码运行完整大小的 Chronos-2（\3 参数，随机权重），"
        r"与由它的 \4 个 `\5` 学生（各 \6）组成的混合模型（按平均专家数计）相比。\7；[详情](docs/speed.md)。"
    ),
    r"(\d+) of (\d+) cores": r"\2 核中的 \1 核",
    "no vector units known": "未知向量单元",
    "wall clock": "墙钟时间",
    "processor time": "处理器时间",
    "one run": "运行一次",
    "series \\| experts": "序列数 | 专家数",
    "upstream (float32|bf16)": r"上游 \1",
    "mixture (float32|bf16)": r"混合模型 \1",
    "times as fast": "加速比",
    r"Router training on cached forecasts, (\d+) windows, (\d+) experts, (\d+) epochs: (\d+) s\.": (
        r"在缓存的专家预测上训练路由器（\1 个窗口、\2 个专家、\3 轮）：\4 秒。"
    ),
}
"""What tools write, as patterns, longer ones before those that they hold."""


def chinese(lines: Iterable[str]) -> list[str]:
    """Translate lines; what no phrase matches stays."""
    translated = []
    for line in lines:
        for pattern, phrase in PHRASES.items():
            line = re.sub(pattern, phrase, line)
        translated.append(line)
    return translated
