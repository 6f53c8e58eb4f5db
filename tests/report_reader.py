"""A reader of report pages, and of the files that a report is made from."""

import json
import shutil
from html.parser import HTMLParser


def results_of(run, folder):
    """Copy the files that a run's report is made from, without checkpoints and stages."""
    folder.mkdir(exist_ok=True)
    for path in run.iterdir():
        if path.suffix in (".json", ".jsonl", ".yaml"):
            shutil.copy(path, folder)
    return folder


def load(path):
    return json.loads(path.read_text())


def write(path, content):
    path.write_text(json.dumps(content))


def load_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


class Reader(HTMLParser):
    """Collects tables as text, attributes, and whether every tag is closed."""

    def __init__(self):
        super().__init__()
        self.tables, self.attributes, self.open, self.tags = [], [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag != "meta":
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data


def read(path):
    reader = Reader()
    reader.feed(path.read_text(encoding="utf-8"))
    assert not reader.open
    return reader
