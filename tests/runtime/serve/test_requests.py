"""What is refused, in which words and shape; who may ask; what is to be seen."""

from __future__ import annotations

import json
from typing import Any

import pytest
from cvxq.serve.server import Limits

HELLO = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("chat/completions", {**HELLO, "temperature": -1}, "temperature is -1"),
        ("chat/completions", {**HELLO, "top_p": 0}, "top_p is 0"),
        ("chat/completions", {**HELLO, "mirostat": 2}, "mirostat: this server does not know it"),
        ("chat/completions", {**HELLO, "n": 0}, "n: "),
        ("chat/completions", {**HELLO, "logit_bias": {"96": 1}}, "logit_bias: token 96"),
        ("chat/completions", {**HELLO, "max_tokens": 0}, "max_tokens: "),
        ("chat/completions", {"messages": []}, "messages: "),
        ("chat/completions", {"messages": [{"role": "king", "content": "x"}]}, "messages.0.role"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "content of type 'image_url' is not supported",
        ),
        (
            "chat/completions",
            {**HELLO, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "odd"}}}},  # noqa: E501
            "response_format: Invalid type: odd",
        ),
        ("completions", {"prompt": []}, "prompt"),
        ("completions", {"prompt": [96]}, "token 96"),
        ("completions", {"prompt": [-1]}, "token -1"),
        ("completions", {"prompt": "a", "max_tokens": 0}, "only makes sense with echo"),
        ("completions", {"prompt": "a", "suffix": "b"}, "suffix is not supported"),
        ("responses", {"input": "a", "tools": [{"type": "web_search"}]}, "tools: "),
        ("responses", {"input": "a", "previous_response_id": "b"}, "previous_response_id"),
        ("responses", {"input": []}, "input has no messages"),
    ],
)  # fmt: skip
def test_bad_requests_get_one_line(
    tiny: Any, path: str, body: dict[str, Any], message: str
) -> None:
    answer = tiny.http.post(f"/v1/{path}", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert message in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"
    assert {"param", "code"} <= error.keys()


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"messages": 3}'])
def test_what_is_no_request_is_refused(tiny: Any, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    answer = tiny.http.post("/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"]


def test_only_json_is_read(tiny: Any) -> None:
    """A page of another site may send forms and plain text without asking first."""
    body = json.dumps(HELLO).encode()
    for kind in (None, "text/plain", "application/x-www-form-urlencoded"):
        headers = {} if kind is None else {"Content-Type": kind}
        answer = tiny.http.post("/v1/chat/completions", content=body, headers=headers)
        assert answer.status_code == 415
        assert "send application/json" in answer.json()["error"]["message"]
    headers = {"Content-Type": "application/json; charset=utf-8"}
    answer = tiny.http.post("/v1/chat/completions", content=body, headers=headers)
    assert answer.status_code == 200


def test_null_is_as_good_as_absent(tiny: Any) -> None:
    assert tiny.chat("Hi", top_p=None, stop=None, tools=None, logit_bias=None, user="me")


def test_unknown_models_and_pages(tiny: Any) -> None:
    answer = tiny.http.post("/v1/chat/completions", json={**HELLO, "model": "big"})
    assert answer.status_code == 404
    assert answer.json()["error"] == {
        "message": "there is no model 'big'; served are tiny",
        "type": "invalid_request_error",
        "param": "model",
        "code": "model_not_found",
    }
    for method, path, status in (("GET", "/v2", 404), ("GET", "/v1/completions", 405)):
        answer = tiny.http.request(method, path)
        assert answer.status_code == status
        assert answer.json()["error"]["message"]


def test_a_failure_of_ours_tells_nothing_of_the_machine(
    tiny: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(ids: object) -> None:
        raise RuntimeError("/home/somebody/secret")

    monkeypatch.setattr(tiny.served.caches, "take", fail)
    answer = tiny.http.post("/v1/chat/completions", json=HELLO)
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert answer.json()["error"]["type"] == "server_error"
    [event] = tiny.events("/v1/chat/completions", HELLO)
    assert event["error"]["type"] == "server_error"
    assert "secret" in capsys.readouterr().err
    assert tiny.is_idle()


def test_no_answer_names_a_path_of_the_file(tiny: Any) -> None:
    folder = str(tiny.served.model.reader.path.parent)
    for path in ("/v1/models", "/metrics", "/health", "/"):
        assert folder not in tiny.http.get(path).text


def test_models_health_and_counters(tiny: Any) -> None:
    [model] = tiny.http.get("/v1/models").json()["data"]
    assert model["id"] == "tiny"
    assert model["max_model_len"] == 2048
    assert tiny.http.get("/v1/models/tiny").json() == model
    assert tiny.http.get("/v1/models/other").status_code == 404
    assert tiny.http.get("/health").json() == {"status": "ok"}
    used = tiny.chat("Hi")["usage"]
    counters = dict(
        line.rsplit(" ", 1)
        for line in tiny.http.get("/metrics").text.splitlines()
        if not line.startswith("#")
    )
    assert float(counters["cvxq_prompt_tokens_total"]) == used["prompt_tokens"]
    assert float(counters["cvxq_drawn_tokens_total"]) == used["completion_tokens"]
    assert float(counters["cvxq_first_token_seconds_count"]) == 1
    answered = 'cvxq_answers_total{route="/v1/chat/completions",status="200"}'
    assert float(counters[answered]) == 1


def test_texts_to_tokens_and_back(tiny: Any) -> None:
    answer = tiny.http.post("/tokenize", json={"prompt": "Hi!", "return_token_strs": True}).json()
    assert answer["token_strs"] == ["H", "i", "!"]
    assert answer["count"] == 3
    back = tiny.http.post("/detokenize", json={"tokens": answer["tokens"]}).json()
    assert back == {"prompt": "Hi!"}
    assert tiny.http.post("/detokenize", json={"tokens": [96]}).status_code == 400
    assert tiny.http.post("/tokenize", json={}).status_code == 400


def test_keys_guard_all_but_the_page_and_health(model: Any, serve: Any) -> None:
    with serve(model, keys=["first", "second"]) as tiny:
        for path in ("/v1/models", "/metrics", "/nothing"):
            answer = tiny.http.get(path)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            for wrong in ("Bearer third", "Bearer", "first2", "Bearer firs"):
                refused = tiny.http.get(path, headers={"Authorization": wrong})
                assert refused.status_code == 401
        for key in ("first", "second"):
            headers = {"Authorization": f"Bearer {key}"}
            assert tiny.http.get("/v1/models", headers=headers).status_code == 200
        assert tiny.http.get("/").status_code == tiny.http.get("/health").status_code == 200


def test_a_server_of_this_machine_only_goes_by_its_names(model: Any, serve: Any) -> None:
    with serve(model, hosts=("127.0.0.1", "localhost")) as tiny:
        assert tiny.http.get("/health").status_code == 200
        port = tiny.url.rsplit(":", 1)[1]
        for host, status in ((f"localhost:{port}", 200), (f"evil.example:{port}", 403)):
            assert tiny.http.get("/health", headers={"Host": host}).status_code == status


def test_other_sites_may_read_only_if_asked_for(model: Any, serve: Any) -> None:
    site = {"Origin": "https://chat.example"}
    with serve(model) as tiny:
        assert "access-control-allow-origin" not in tiny.http.get("/health", headers=site).headers
    with serve(model, origins=["https://chat.example"], keys=["k"]) as tiny:
        asked = {**site, "Access-Control-Request-Method": "POST"}
        answer = tiny.http.options("/v1/models", headers=asked)
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"


def test_large_requests_are_refused_before_they_are_read(model: Any, serve: Any) -> None:
    with serve(model, limits=Limits(body_bytes=1000)) as tiny:
        body = json.dumps({"prompt": "a" * 1000}).encode()
        headers = {"Content-Type": "application/json"}
        for content in (body, iter([body[:600], body[600:]])):  # with its length, and without
            answer = tiny.http.post("/v1/completions", content=content, headers=headers)
            assert answer.status_code == 413
            assert "larger than 1,000 bytes" in answer.json()["error"]["message"]
        assert tiny.complete("a", max_tokens=2)
