"""Who listens besides the file: TensorBoard, and a webhook that may fail as it likes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import pytest
from llama_stack_meta_reference.training.job import run_job
from llama_stack_meta_reference.training.plan import EXIT_DONE, EXIT_FAILED, Failed

from tests.providers.meta_reference.training.jobs import events, make_job


@contextmanager
def listening(status: int = 200) -> Iterator[tuple[str, list[str]]]:
    """A server on loopback, and the events that it was sent."""
    heard: list[str] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            heard.append(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["event"])
            self.send_response(status)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/hook", heard
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_webhook_hears_all_but_steps(worded_checkpoint: Path, tmp_path: Path) -> None:
    with listening() as (url, heard):
        told = {"webhook_url": url, "webhook_hosts": ["127.0.0.1"]}
        assert run_job(make_job(tmp_path / "job", worded_checkpoint, loggers=told)) == EXIT_DONE
        assert heard == ["started", "sample", "checkpoint", "finished"]
        assert run_job(make_job(tmp_path / "failing", tmp_path / "nowhere", loggers=told)) == EXIT_FAILED
        assert heard[4:] == ["failed"]


def test_a_webhook_that_fails_is_given_up_on_and_not_the_training(worded_checkpoint: Path, tmp_path: Path) -> None:
    with listening(status=500) as (url, heard):
        told = {"webhook_url": url, "webhook_hosts": ["127.0.0.1"]}
        job = make_job(tmp_path / "job", worded_checkpoint, loggers=told, save_every=1)
        assert run_job(job) == EXIT_DONE
    assert len(heard) == 3


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest",
        "http://hooks.example@evil.example/",
        "http://hooks.example%2eevil.example/",
        "http://hooks.example\\@evil.example/",
        "file:///etc/passwd",
        "http://hooks.example.evil.example/",
    ],
)
def test_only_a_host_that_is_allowed_is_sent_to(url: str, worded_checkpoint: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", worded_checkpoint)
    values = json.loads((job / "plan.json").read_text())
    values["loggers"] = {"webhook_url": url, "webhook_hosts": ["hooks.example"]}
    (job / "plan.json").write_text(json.dumps(values))
    assert run_job(job) == EXIT_FAILED
    assert "webhook" in events(job, Failed)[0].reason


def test_tensorboard_is_written_or_refused_where_it_is_not_installed(worded_checkpoint: Path, tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", worded_checkpoint, loggers={"is_tensorboard": True})
    if find_spec("tensorboard") is None:
        assert run_job(job) == EXIT_FAILED
        assert "pip install tensorboard" in events(job, Failed)[0].reason
    else:
        assert run_job(job) == EXIT_DONE
        assert any((job / "tensorboard").iterdir())
