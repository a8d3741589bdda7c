"""``kvroute ui``: a local page over an engine."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvroute.cli.common import Device, Dtype, EngineName, load_engine
from kvroute.errors import InvalidInputError, UnsupportedModelError

if TYPE_CHECKING:
    from kvroute import DifficultyHead, Router, TransformersEngine
    from kvroute.ui.desk import Desk


def command(
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="smollm2, a folder or a hub id; by default the tiny thinker of a checkout."),
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option("--policy", "-p", help="A policy's .json file, its name in KVROUTE_POLICIES, fast or slow."),
    ] = None,
    head: Annotated[
        str | None, typer.Option(help="A difficulty head, in place of the one the policy names; it reads --labels too.")
    ] = None,
    confidence: Annotated[
        str | None, typer.Option(help="A folder with a head for answers; over vLLM also the name of one it has loaded.")
    ] = None,
    labels: Annotated[Path | None, typer.Option(help="A file that kvroute label wrote, to try thresholds on.")] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 for a free one.")] = 8010,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
    dtype: Dtype = "auto",
    device: Device = None,
    engine_name: EngineName = "transformers",
) -> None:
    """Serve a local page: answers as they are written, with difficulty, confidence and switches; thresholds; layers."""
    app_of = _require_extra()
    from kvroute.ui.demo import THINKER_PAIR, THINKER_QUESTIONS, demo_folder
    from kvroute.ui.guard import Hosts, is_loopback

    demo = demo_folder() if model is None else None
    if demo is not None:
        model, policy = str(demo / "model"), policy or str(demo / "policy.json")
        confidence = confidence or str(demo / "confidence")
    listening = _listen(host, port)
    try:
        desk = _desk(model or "smollm2", policy, head, confidence, labels, dtype, device, engine_name)
        if demo is not None:
            desk.examples, desk.pair = THINKER_QUESTIONS, THINKER_PAIR
        place = f"http://{_shown(host)}:{listening.getsockname()[1]}/"
        typer.echo(f"{desk.engine.info.name} at {place} (stop with Ctrl+C)")
        if not is_loopback(host):
            typer.echo("Whoever reaches this address may use the model: there is no key.", err=True)
        sys.stdout.flush()
        names = [] if is_loopback(host) else [socket.gethostname()]
        _serve(app_of(desk, Hosts(host, names)), listening, place if browser else None)
    finally:
        listening.close()


def _require_extra() -> Any:
    from kvroute.errors import MissingExtraError

    try:
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("uvicorn", "ui") from error
    from kvroute.ui.app import build_app

    return build_app


def _listen(host: str, port: int) -> socket.socket:
    """A socket, before a model is loaded for nothing.

    Raises:
        InvalidInputError: the address can't be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((host, port))
        found.listen()  # who comes before the model is there waits
    except OSError as error:
        found.close()
        raise InvalidInputError(
            f"Can't listen at {host}, port {port}: {error.strerror or error}.",
            hint="Give another --port; 0 takes a free one.",
        ) from error
    return found


def _desk(
    model: str,
    policy: str | None,
    head: str | None,
    confidence: str | None,
    labels: Path | None,
    dtype: str,
    device: str | None,
    engine_name: str,
) -> Desk:
    from kvroute import DifficultyHead
    from kvroute.engines.base import decides_inside
    from kvroute.ui.desk import Desk, Example
    from kvroute.ui.labelled import Labelled

    engine = load_engine(model, dtype, device, engine_name, policy=policy)
    given: DifficultyHead | str | None = confidence
    if confidence is not None and not (decides_inside(engine) and not Path(confidence).is_dir()):
        given = DifficultyHead.load(confidence, engine.info)
    router, why = _router(engine, policy, head, given)
    at_hand = None if isinstance(given, str) else given
    found = None
    examples: list[Example] = []
    if labels is not None:
        difficulty = None if head is None else DifficultyHead.load(head, engine.info)
        name = "the policy's head" if head is None else Path(head).resolve().name
        if difficulty is None and router is not None:
            difficulty = router.head
        if difficulty is None:
            raise InvalidInputError(
                "The thresholds of labelled questions need a head.", hint="Give --head FOLDER (kvroute train wrote it)."
            )
        found = Labelled.open(labels, difficulty, name, engine)
        some = [r for r in found.rows if r.part == found.rows[0].part and len(r.question) <= 400][:8]
        examples = [Example(_short(r.question), r.question) for r in some]
    return Desk(engine, router, why, at_hand, found, examples)


def _router(
    engine: TransformersEngine, policy: str | None, head: str | None, confidence: DifficultyHead | str | None
) -> tuple[Router | None, str | None]:
    """A router; or None, and why, where none was asked for and it is not known how the model thinks."""
    from kvroute import Router
    from kvroute.engines.base import decides_inside

    own = None if decides_inside(engine) else head
    try:
        return Router(engine, policy or "slow", head=own, confidence=confidence), None
    except UnsupportedModelError as error:
        if policy is not None or isinstance(confidence, str):
            raise
        return None, error.message


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:59]}\u2026"


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _serve(app: Any, listening: socket.socket, place: str | None) -> None:
    import uvicorn

    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=2, lifespan="off"
    )
    server = uvicorn.Server(config)
    if place is not None:
        import threading
        import webbrowser

        threading.Thread(target=webbrowser.open, args=(place,), daemon=True).start()
    server.run(sockets=[listening])
