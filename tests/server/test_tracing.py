"""A trace for each request, sent to a collector on a loopback port."""

from __future__ import annotations

import gzip
import logging
import secrets
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from argus.config import Settings
from argus.core.errors import BadRequest
from argus.server.tracing import Tracing
from tests.server.running import Running, running, wait_until

PARENT = "00f067aa0ba902b7"  # of W3C's example
ROOT = "POST /v1/images/generations"
SECRET = "xylograph"  # in every prompt below


class Collector:
    """Keeps the spans that it is sent; answers 503 while it `refuses`."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.raw = b""
        self.services: set[str] = set()
        self.refuses, self.refused = False, 0
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                if self.headers.get("content-encoding") == "gzip":
                    body = gzip.decompress(body)
                self.send_response(400 if outer.refuses or self.path != "/v1/traces" else 200)
                self.send_header("content-length", "0")
                self.end_headers()
                outer.refused += outer.refuses
                if not outer.refuses:
                    outer.take(body)

            def log_message(self, *_: object) -> None:
                """Nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def take(self, body: bytes) -> None:
        self.raw += body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            facts = {one.key: one.value.string_value for one in resource.resource.attributes}
            self.services.add(facts["service.name"])
            for scope in resource.scope_spans:
                self.spans += scope.spans

    def trace(self, number: str) -> dict[str, list[Span]]:
        """The spans of a trace by name, once its root was sent, which is the last."""

        def spans() -> list[Span]:
            return [one for one in self.spans if one.trace_id.hex() == number]

        wait_until(lambda: any(one.name == ROOT for one in spans()))
        found: dict[str, list[Span]] = {}
        for one in spans():
            found.setdefault(one.name, []).append(one)
        return found

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    collector = Collector()
    yield collector
    collector.close()


@pytest.fixture(scope="module")
def traced(
    measured_family: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    settings = Settings(
        family=str(measured_family), data=tmp_path_factory.mktemp("data"), workers=1,
        otlp_endpoint=collector.url,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        with running(settings) as server:
            yield server


def asked(server: Running, prompt: str, sampled: bool = True, **body: Any) -> tuple[Any, str]:
    """The answer to a request that a client traces, and the trace's number."""
    trace = secrets.token_hex(16)
    parent = f"00-{trace}-{PARENT}-0{int(sampled)}"
    content, headers = {"prompt": prompt, **body}, {"traceparent": parent}
    return server.http.post("/v1/images/generations", json=content, headers=headers), trace


def facts(span: Span) -> dict[str, object]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in span.attributes}


def seconds(span: Span) -> float:
    return (span.end_time_unix_nano - span.start_time_unix_nano) / 1e9


def test_a_request_is_a_trace_that_continues_the_client_s(
    traced: Running, collector: Collector
) -> None:
    answer, trace = asked(traced, f"a {SECRET}", negative_prompt=SECRET)
    found = collector.trace(trace)
    assert set(found) == {
        ROOT, "prepare", "picture", "decide", "run", "queue", "encode", "denoise", "decode",
        "finish",
    }  # fmt: skip
    (root,), (picture,), (run,) = found[ROOT], found["picture"], found["run"]
    assert root.parent_span_id.hex() == PARENT
    assert facts(root)["argus.request_id"] == answer.headers["x-request-id"]
    assert facts(root)["http.response.status_code"] == 200
    for name in ("prepare", "picture"):
        assert found[name][0].parent_span_id == root.span_id
    for name in ("decide", "run", "finish"):
        assert found[name][0].parent_span_id == picture.span_id
    stages = [found[name][0] for name in ("queue", "encode", "denoise", "decode")]
    assert {one.parent_span_id for one in stages} == {run.span_id}
    begins = [one.start_time_unix_nano for one in stages]
    ends = [one.end_time_unix_nano for one in stages]
    assert begins == [run.start_time_unix_nano, *ends[:-1]]  # one after the other
    assert ends[-1] <= run.end_time_unix_nano
    made, decided = answer.json()["argus"][0], facts(found["decide"][0])
    assert decided["argus.variant"] == made["variant"]
    assert decided["argus.worker"] == made["worker"]
    assert decided["argus.reason"] == made["reason"]
    assert collector.services == {"argus"}
    assert SECRET.encode() not in collector.raw


def test_latents_of_a_neighbour_are_a_span_of_their_own(
    traced: Running, collector: Collector
) -> None:
    prompt = f"a cached {SECRET}"
    traced.generate(prompt, argus={"variant": "exact"})
    wait_until(lambda: len(traced.service.cache) > 0 and not traced.service.retrieval.storing)
    answer, trace = asked(traced, prompt, argus={"variant": "skip-3"})
    assert answer.json()["argus"][0]["variant"] == "skip-3"
    (fetch,) = collector.trace(trace)["fetch"]
    assert seconds(fetch) > 0


def test_a_trace_that_the_client_does_not_sample_is_not_sent(
    traced: Running, collector: Collector
) -> None:
    answer, dark = asked(traced, f"a {SECRET} in the dark", sampled=False)
    assert answer.status_code == 200
    _, later = asked(traced, f"a {SECRET} in the light")
    assert collector.trace(later)
    assert dark not in {one.trace_id.hex() for one in collector.spans}


def test_every_picture_of_a_request_has_its_own_spans(
    traced: Running, collector: Collector
) -> None:
    _, trace = asked(traced, f"two {SECRET}s", n=2)
    found = collector.trace(trace)
    assert [len(found[name]) for name in ("prepare", "picture", "run", "finish")] == [1, 2, 2, 2]
    runs = {one.parent_span_id for one in found["run"]}
    assert runs == {one.span_id for one in found["picture"]}


def test_what_failed_is_named_without_its_message(
    traced: Running, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise ValueError(f"cannot encode {SECRET}")

    monkeypatch.setattr("argus.server.pictures.encode_picture", fail)
    answer, trace = asked(traced, f"a broken {SECRET}")
    assert answer.status_code == 500
    found = collector.trace(trace)
    assert facts(found["finish"][0])["error.type"] == "ValueError"
    assert found["finish"][0].status.code == found["picture"][0].status.code == 2
    assert facts(found[ROOT][0])["http.response.status_code"] == 500
    assert SECRET.encode() not in collector.raw


def test_a_collector_that_is_out_costs_a_line_in_the_log_and_no_request(
    traced: Running, collector: Collector, caplog: pytest.LogCaptureFixture
) -> None:
    def said() -> list[str]:
        return [one.getMessage() for one in caplog.records if "race" in one.getMessage()]

    with caplog.at_level(logging.INFO, logger="argus"):
        collector.refuses, collector.refused = True, 0
        assert traced.generate(f"an untold {SECRET}").status_code == 200
        wait_until(lambda: collector.refused > 0)
        assert traced.generate(f"another {SECRET}").status_code == 200
        wait_until(lambda: collector.refused > 1)
        collector.refuses = False
        traced.generate(f"a told {SECRET}")
        wait_until(lambda: said()[-1:] == ["The collector takes traces again"])
    assert len(said()) == 2
    assert "Traces are lost" in said()[0]


def test_without_a_collector_nothing_is_traced(tmp_path: Path) -> None:
    assert Tracing.of(Settings(data=tmp_path)) is None


def test_the_usual_variables_name_a_collector_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    assert Tracing.of(Settings(data=tmp_path)) is not None


def test_where_opentelemetry_is_not_installed_the_setting_is_refused_and_the_variable_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(BadRequest, match=r"pip install 'argus-t2i\[otel\]'"):
        Tracing.of(Settings(data=tmp_path, otlp_endpoint="http://127.0.0.1:9"))
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    assert Tracing.of(Settings(data=tmp_path)) is None
    assert "No traces are sent" in caplog.text
