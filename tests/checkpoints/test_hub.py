"""Uploads, as the hub sees them: a local server stands for it."""

import base64
import http.server
import json
import threading

import huggingface_hub.constants
import pytest

from chronomoe import ChronoMoEPipeline, load_model


@pytest.fixture
def hub(monkeypatch):
    """Answer as the hub does, as far as an upload asks; return what it was sent."""
    sent = {"requests": [], "files": {}}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            sent["requests"].append(self.path)
            answer = {"url": f"http://{self.headers['Host']}/someone/model"}
            if "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                answer = {"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]}
            if "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        sent["files"][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    else:
                        sent["message"] = line["value"]["summary"]
                answer = {"success": True, "commitOid": "0" * 40, "commitUrl": f"{answer['url']}/commit/0"}
            text = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield sent
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kind", ["plain", "mixture"])
def test_what_is_pushed_is_the_finished_folder(kind, make_teacher, make_mixture, hub, tmp_path):
    model = make_teacher(num_layers=1) if kind == "plain" else make_mixture()
    ChronoMoEPipeline(model).save_pretrained(
        tmp_path / "model", push_to_hub=True, repo_id="someone/model", token="hf_any", commit_message="Better"
    )
    saved = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert hub["files"] == saved
    assert set(saved) == {"README.md", "config.json", "model.safetensors"}
    assert hub["message"] == "Better"
    (tmp_path / "fetched").mkdir()
    for name, content in hub["files"].items():
        (tmp_path / "fetched" / name).write_bytes(content)
    assert load_model(tmp_path / "fetched").dtype == model.dtype
    config = json.loads(hub["files"]["config.json"])
    expected = ("Chronos2Model", "Chronos2Pipeline") if kind == "plain" else ("DistilledMoE", "ChronoMoEPipeline")
    assert (config["architectures"][0], config["chronos_pipeline_class"]) == expected


def test_nothing_is_pushed_unless_asked_for(make_teacher, hub, tmp_path):
    ChronoMoEPipeline(make_teacher(num_layers=1)).save_pretrained(tmp_path / "model", repo_id="someone/model")
    assert hub["requests"] == []


def test_a_failed_save_pushes_nothing(make_teacher, hub, tmp_path, unchecked):
    pipeline = ChronoMoEPipeline(make_teacher(num_layers=1))
    with pytest.raises(AttributeError):
        pipeline.save_pretrained(tmp_path / "model", sections={"Data": None}, push_to_hub=True, token="hf_any")
    assert hub["requests"] == []
