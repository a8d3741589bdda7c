"""``kvroute serve``, and ``--engine`` of the other commands."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvroute import cli
from kvroute.cli.common import KEY_VARIABLE
from kvroute.engines import vllm_engine
from kvroute.errors import InvalidInputError, MissingExtraError
from kvroute.serving import launching
from kvroute.serving.about import About
from kvroute.serving.launching import MIDDLEWARE, server_command, shown
from kvroute.serving.unreadable import unreadable
from kvroute.token_weights import vocabulary_digest
from serving_files import INFO, a_head, write_policy
from tiny_models import build_tokenizer
from vllm_stand_in import StandIn


def option(command: list[str], name: str) -> list[str]:
    return [command[i + 1] for i, word in enumerate(command) if word == name]


def test_the_command(tmp_path: Path) -> None:
    write_policy(tmp_path / "policies", "support")
    a_head(target="correct").save(tmp_path / "heads" / "right")
    made = server_command(
        "some/model", policies=tmp_path / "policies", heads=tmp_path / "heads", settings={"max_features": 3},
        name="tiny", host="0.0.0.0", port=9, options=["--max-model-len", "512"], python="python",
    )  # fmt: skip
    assert made[:3] == ["python", "-m", "vllm.entrypoints.openai.api_server"]
    assert [option(made, n) for n in ("--model", "--served-model-name", "--host", "--port", "--max-model-len")] == [
        ["some/model"], ["tiny"], ["0.0.0.0"], ["9"], ["512"],
    ]  # fmt: skip
    assert option(made, "--middleware") == list(MIDDLEWARE)
    (transfer,) = map(json.loads, option(made, "--kv-transfer-config"))
    assert (transfer["kv_connector"], transfer["kv_role"]) == ("KVRouteConnector", "kv_producer")
    assert transfer["kv_connector_extra_config"] == {
        "policies": str(tmp_path / "policies"), "heads": str(tmp_path / "heads"), "max_features": 3,
    }  # fmt: skip
    file = server_command("m", policies=tmp_path / "policies" / "support.json")
    assert json.loads(option(file, "--kv-transfer-config")[0])["kv_connector_extra_config"] == {
        "policies": str(tmp_path / "policies")
    }
    assert option(file, "--served-model-name") == ["m"]
    # a two-step policy looks at what was written, which an engine that schedules ahead does not have yet
    assert made.count("--no-async-scheduling") == file.count("--no-async-scheduling") == 1
    details = "--enable-prompt-tokens-details"
    for options in ([], [details], ["--no-enable-prompt-tokens-details"]):  # else usage has no cached tokens
        assert server_command("m", options=options).count(details) == (details in options or not options)
    own = server_command("m", policies=tmp_path / "policies", options=["--async-scheduling"])
    assert "--no-async-scheduling" not in own + server_command("m")


def test_the_middleware_is_there_to_be_loaded() -> None:
    import importlib

    for name in MIDDLEWARE:
        module, _, found = name.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), found), type)


def test_what_vllm_finds_only_where_kvroute_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for there in (True, False):
        monkeypatch.setattr(launching.importlib.metadata, "entry_points", lambda there=there, **_: [1] if there else [])
        made = server_command("m")
        (transfer,) = map(json.loads, option(made, "--kv-transfer-config"))
        assert ("kv_connector_module_path" in transfer) is not there
        assert len(option(made, "--logits-processors")) == (not there)


def test_what_can_be_known_to_fail_fails_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="can't be listed"):
        server_command("m", policies=tmp_path / "none")
    with pytest.raises(InvalidInputError, match="max_features"):
        server_command("m", settings={"max_feature": 3})
    with pytest.raises(InvalidInputError, match="--dry-run"):
        server_command("m", options=["--kv-transfer-config={}"])


@pytest.mark.parametrize(
    "options",
    [
        ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'],
        ['--speculative_config={"method": "ngram"}'],
        ["--speculative-config.method", "ngram"],
        ["-sc", "{}"],
        ["--spec-method=ngram"],
        ["--pipeline-parallel-size", "2"],
        ["--pipeline_parallel_size=2"],
        ["-pp", "2"],
    ],
)
def test_an_engine_that_nothing_can_be_read_from(
    tmp_path: Path, options: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Refused with policies, a default that decides and in a strict server; else started, and without the logits
    processor that vLLM would not start with."""
    monkeypatch.setattr(launching.importlib.metadata, "entry_points", lambda **_: [])
    ran: list[Any] = []
    monkeypatch.setattr(os, "execv", lambda *words: ran.append(words))
    write_policy(tmp_path / "policies")
    why = "drafted tokens" if "sc" in options[0] or "spec" in options[0] else "a rank has only some of the layers"
    with pytest.raises(InvalidInputError, match=f"{why}.*serve policies.*Start the engine without it"):
        server_command("m", policies=tmp_path / "policies", options=["--seed", "1", *options])
    with pytest.raises(InvalidInputError, match="policies or a mode"):
        server_command("m", settings={"default": {"mode": "fast"}}, options=options)
    with pytest.raises(InvalidInputError, match="are strict"):
        server_command("m", settings={"strict": True}, options=options)
    with pytest.raises(SystemExit) as ended:
        run(["serve", "m", "--policy", str(tmp_path / "policies"), *options])
    assert ended.value.code == 2
    assert why in capsys.readouterr().err.replace("\n", " ")
    assert not ran
    made = server_command("m", settings={"default": {"features": ["kv-coe"]}}, options=options)
    assert made[-len(options) :] == options
    assert "--logits-processors" not in made


def test_what_vllms_config_says_of_it() -> None:
    def made(speculative: object, pipeline: int) -> Any:
        parallel = SimpleNamespace(pipeline_parallel_size=pipeline)
        return SimpleNamespace(speculative_config=speculative, parallel_config=parallel)

    assert unreadable(made(None, 1)) is None
    assert "drafted tokens" in str(unreadable(made(object(), 1)))
    assert "some of the layers" in str(unreadable(made(None, 2)))


def test_a_pipeline_of_one_is_none(tmp_path: Path) -> None:
    write_policy(tmp_path / "policies")
    for options in (["-pp", "1"], ["--pipeline-parallel-size=1"], ["--tensor-parallel-size", "2"]):
        assert server_command("m", policies=tmp_path / "policies", options=options)[-len(options) :] == options


def test_a_shell_takes_what_is_shown() -> None:
    made = server_command("a model", settings={"default": {"features": ["kv-coe"]}}, options=["--api-key", "it's"])
    assert shlex.split(shown(made).replace("\\\n", " ")) == made


def test_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[Any] = []
    monkeypatch.setattr(os, "execv", lambda file, words: ran.append((file, words)))
    (tmp_path / "s.json").write_text('{"max_features": 3}')
    words = [
        "serve",
        "some/model",
        "--port",
        "9",
        "--settings",
        str(tmp_path / "s.json"),
        "--enforce-eager",
        "--seed",
        "3",
    ]
    run([*words, "--dry-run"])
    printed = shlex.split(capsys.readouterr().out.replace("\\\n", " "))
    assert not ran
    assert printed[-3:] == ["--enforce-eager", "--seed", "3"]
    run(["serve", "m", "-tp", "2", "-pp", "1", "-dp=2", "--dry-run"])  # vLLM's short names, of several letters
    assert shlex.split(capsys.readouterr().out.replace("\\\n", " "))[-5:] == ["-tp", "2", "-pp", "1", "-dp=2"]
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        run(words)
    assert ended.value.code == 2
    assert "kvroute[vllm]" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(os, "execv", lambda file, words: ran.append((file, words)))
    monkeypatch.setattr(launching, "require_vllm", lambda: None)
    run(words)
    assert ran == [(sys.executable, printed)]
    for settings, said in (("{", "no JSON"), ("{}x", "no JSON"), (str(tmp_path / "none"), "can't be read")):
        with pytest.raises(SystemExit):
            run(["serve", "m", "--settings", settings, "--dry-run"])
        assert said in capsys.readouterr().err


def run(words: list[str]) -> None:
    try:
        cli.main(words)
    except SystemExit as ended:
        if ended.code not in (0, None):
            raise


def test_without_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError):
        launching.require_vllm()


# ---------------------------------------------------------------------- --engine vllm


def test_vllm_in_this_process_has_the_policies_that_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[Any] = []

    def engine(model: str, **options: Any) -> Any:
        made.append((model, options, os.environ["VLLM_LOGGING_STREAM"]))
        raise InvalidInputError("No further.")

    monkeypatch.setattr(vllm_engine, "VLLMEngine", engine)
    monkeypatch.setenv("KVROUTE_POLICIES", str(write_policy(tmp_path / "named", "mine")))
    monkeypatch.delenv("VLLM_LOGGING_STREAM", raising=False)
    write_policy(tmp_path / "file", "own")
    monkeypatch.chdir(tmp_path)
    route = ["route", "--ask", "what?", "--model", "m", "--engine", "vllm", "--dtype", "float32"]
    folders = {"mine": tmp_path / "named", "file/own.json": tmp_path / "file", "slow": None}
    for policy, folder in folders.items():
        with pytest.raises(SystemExit):
            run([*route, "--policy", policy])
        # what vLLM logs belongs to no answer
        assert made.pop() == ("m", {"policies": folder, "dtype": "float32"}, "ext://sys.stderr")
    with pytest.raises(SystemExit):
        run(["ask", "what?", "--model", "m", "--engine", "vllm"])
    assert made.pop()[1] == {"policies": None, "dtype": "auto"}
    capsys.readouterr()
    for policy, why in (("yours", "There are: mine"), ("none.json", "none.json")):  # before anything is started
        with pytest.raises(SystemExit):
            run([*route, "--policy", policy])
        assert why in capsys.readouterr().err
    assert not made


# ---------------------------------------------------------------------- --engine URL


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture
def server() -> Iterator[StandIn]:
    with StandIn(token="sesam") as it:
        it.about = About("1", True, INFO, vocabulary=vocabulary_digest(build_tokenizer())).to_dict()
        yield it


def test_a_command_over_a_server(
    server: StandIn, tokenizer: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sesam")
    server.result = lambda *_: {"kvroute": {"scores": {"kv_coe_r_token": {"value": 0.5}, "length": {"value": 4}}}}
    engine = ["--engine", server.url, "--model", str(tokenizer)]
    run(["ask", "what?", "--max-tokens", "4", "--json", *engine])
    said = json.loads(capsys.readouterr().out)
    assert said["text"] == " w0 w1 w2 w3"
    assert said["scores"]["kv_coe_r_token"] == 0.5
    run(["info", str(tokenizer), "--engine", server.url, "--json"])
    assert json.loads(capsys.readouterr().out)["fingerprint"] == INFO.fingerprint
    server.about = {**(server.about or {}), "vocabulary": "0123"}
    for words, why in (
        (["ask", "what?", *engine], "whose tokens are not those"),
        (["ask", "what?", "--engine", "vlm"], "transformers, vllm or an address"),
        (["ask", "what?", *engine, "--dtype", "float32"], "--dtype"),
        (["ask", "what?", *engine, "--device", "cpu"], "--device"),
        (["evaluate", "routing", "l", "--head", "h", "--out", "o", *engine], "--engine transformers"),
        (["train", "l", "--out", "o", *engine], "--engine transformers"),
        (["calibrate", "--routing", "l", "--out", "o.json", *engine], "--engine transformers"),
    ):
        with pytest.raises(SystemExit):
            run(words)
        assert why in capsys.readouterr().err
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(SystemExit):
        run(["ask", "what?", *engine])
    assert "api_key" in capsys.readouterr().err
