"""``kvroute embed``: texts in a file to vectors in a file."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvroute.cli.common import (
    CHUNK,
    Device,
    Dtype,
    EngineName,
    Force,
    Json,
    Model,
    Quiet,
    Restart,
    load_engine,
    load_spec,
    print_json,
    work_to_run,
    work_to_stdout,
)
from kvroute.errors import EmptyTextError, InvalidInputError, MissingExtraError, TextTooLongError
from kvroute.rows import PartialRun, digest_of, parse_jsonl, parse_lines, read_text, text_field

if TYPE_CHECKING:
    import numpy as np

    from kvroute import KVEmbedder

_FORMATS = (".npy", ".jsonl", ".parquet")


def command(
    file: Annotated[str, typer.Argument(help="Texts, one a line, or JSON Lines; - for standard input.")],
    out: Annotated[
        str, typer.Option("--out", "-o", help=".npy, .jsonl or .parquet; - for JSON Lines on stdout.")
    ] = "-",
    model: Model = "smollm2",
    spec: Annotated[str, typer.Option(help="A preset, or a JSON file with a PoolingSpec.")] = "best",
    embedder: Annotated[Path | None, typer.Option(help="Folder with a saved KVEmbedder, instead of --spec.")] = None,
    field: Annotated[str, typer.Option(help="The text's field, in JSON Lines.")] = "text",
    jsonl: Annotated[bool, typer.Option("--jsonl", help="The input is JSON Lines, whatever its name.")] = False,
    prompt: Annotated[str | None, typer.Option(help="A text to put before each.")] = None,
    prompt_name: Annotated[str | None, typer.Option(help="Which of the saved embedder's prompts to put there.")] = None,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts past the context.")] = False,
    normalize: Annotated[bool, typer.Option("--normalize", help="Vectors of unit length.")] = False,
    skip_empty: Annotated[bool, typer.Option("--skip-empty", help="Pass over blank lines.")] = False,
    dtype: Dtype = "auto",
    device: Device = None,
    engine_name: EngineName = "transformers",
    restart: Restart = False,
    force: Force = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Embed the texts of a file. A run that is killed goes on where it was when it is started again."""
    suffix = ".jsonl" if out == "-" else Path(out).suffix
    if suffix not in _FORMATS:
        raise InvalidInputError(f"{out!r} ends in none of {', '.join(_FORMATS)}.")
    if suffix == ".parquet":
        _pyarrow()
    ids, texts, skipped = _read(file, field, jsonl, skip_empty)
    from kvroute import KVEmbedder

    pooling = load_spec(spec)  # before a model is loaded, or even converted
    engine = load_engine(model, dtype, device, engine_name)
    made = KVEmbedder.load(embedder, engine) if embedder is not None else KVEmbedder(engine, pooling)
    began = time.perf_counter()
    if prompt_name is not None:
        prompt = made.prompt(prompt_name, prompt)
    _check(made, file, texts, prompt, truncate)

    def chunk(start: int, stop: int) -> bytes:
        vectors = made.encode(
            texts[start:stop], prompt=prompt, truncate=truncate, normalize=normalize or None, progress=False
        )
        return _jsonl(ids, start, vectors) if suffix == ".jsonl" else _npy(vectors)

    if out == "-":
        work_to_stdout("Embedding", len(texts), CHUNK, chunk, quiet=quiet)
        return
    identity = {
        "command": "embed",
        "input": digest_of([ids, texts]),
        "fingerprint": engine.info.fingerprint,
        "dtype": engine.info.dtype,
        "spec": made.spec.model_dump(mode="json"),
        "fitted": None if made.postprocess is None else digest_of([made.postprocess.transform(_probe(made)).tolist()]),
        "frequencies": None if made.frequencies is None else digest_of([made.frequencies.frequencies.tolist()]),
        "prompt": prompt,
        "truncate": truncate,
        "normalize": normalize,
        "format": suffix,
    }
    with PartialRun(Path(out), identity, len(texts), chunk=CHUNK, restart=restart, force=force) as run:
        resumed = work_to_run("Embedding", run, chunk, quiet=quiet)
        if suffix == ".npy":
            run.finish(_join_npy)
        elif suffix == ".parquet":
            run.finish(lambda chunks: _join_parquet(chunks, ids))
        else:
            run.finish()
    done = {
        "texts": len(texts),
        "dimension": made.dimension,
        "out": out,
        "resumed": resumed,
        "skipped_blank_lines": skipped,
        "seconds": time.perf_counter() - began,
    }
    if as_json:
        print_json(done)
    else:
        note = f" ({resumed} were there already)" if resumed else ""
        blank = f" {skipped} blank lines were skipped." if skipped else ""
        typer.echo(f"{len(texts)} vectors of {made.dimension} numbers in {out}{note}.{blank}", err=True)


def _read(file: str, field: str, jsonl: bool, skip_empty: bool) -> tuple[list[Any], list[str], int]:
    text = read_text(file, sys.stdin.buffer)
    if jsonl or Path(file).suffix in (".jsonl", ".ndjson"):
        rows = parse_jsonl(text, file)
        texts = [text_field(row, field, file, number) for number, row in rows]
        ids, skipped = [_id(row, file, number) for number, row in rows], 0
        if any(i is None for i in ids):
            if any(i is not None for i in ids):
                raise InvalidInputError(f"{file}: some rows have an id and some have none.", hint="Give all or none.")
            ids = list(range(len(rows)))
    else:
        texts, skipped = parse_lines(text, file, skip_empty=skip_empty)
        ids = list(range(len(texts)))
    if not texts:
        raise InvalidInputError(f"{file} holds no text.")
    return ids, texts, skipped


def _id(row: dict[str, Any], file: str, number: int) -> int | str | None:
    value = row.get("id")
    if value is None or isinstance(value, str) or (type(value) is int and -(2**63) <= value < 2**63):
        return value
    raise InvalidInputError(f"{file}, line {number}: the id is neither a text nor a 64-bit whole number.")


def _check(embedder: KVEmbedder, file: str, texts: list[str], prompt: str | None, truncate: bool) -> None:
    """Find a text that can't be embedded before any work is done."""
    for start in range(0, len(texts), 4096):
        try:
            embedder.check(texts[start : start + 4096], prompt=prompt, truncate=truncate)
        except (EmptyTextError, TextTooLongError) as error:
            raise InvalidInputError(f"{file}, text {start + error.index} (from 0): {error}") from error


def _probe(embedder: KVEmbedder) -> np.ndarray[Any, Any]:
    import numpy as np

    assert embedder.postprocess is not None
    return np.eye(1, embedder.postprocess.input_dimension, dtype=np.float32)


def _jsonl(ids: list[Any], start: int, vectors: np.ndarray[Any, Any]) -> bytes:
    lines = [
        json.dumps({"id": ids[start + i], "embedding": [float(x) for x in vector]}) for i, vector in enumerate(vectors)
    ]
    return ("\n".join(lines) + "\n").encode()


def _npy(vectors: np.ndarray[Any, Any]) -> bytes:
    import numpy as np

    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(vectors, dtype=np.float32), allow_pickle=False)
    return buffer.getvalue()


def _load(chunks: Iterable[bytes]) -> np.ndarray[Any, Any]:
    import numpy as np

    return np.concatenate([np.load(io.BytesIO(c), allow_pickle=False) for c in chunks])


def _join_npy(chunks: Iterator[bytes]) -> list[bytes]:
    return [_npy(_load(chunks))]


def _join_parquet(chunks: Iterator[bytes], ids: list[Any]) -> list[bytes]:
    pa, pq = _pyarrow()
    vectors = _load(chunks)
    same = len({type(i) for i in ids}) == 1
    flat = pa.array(vectors.reshape(-1), type=pa.float32())
    table = pa.table(
        {
            "id": pa.array(ids if same else list(map(str, ids))),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1]),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return [sink.getvalue()]


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", "eval") from error
    return pa, pq
