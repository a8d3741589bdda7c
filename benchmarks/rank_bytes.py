"""Bytes that cross the ranks of a tensor-parallel group for kvroute, measured on what the worker's side sends.

One rank's worker reads pages with the sizes of a model (by default those of Qwen3-8B, 36 layers with 8 KV heads of 128,
on 2 ranks), as an engine would have it read them: a prompt with a policy's look, then one token of the answer. No model
runs, for bytes depend on sizes alone. Beside each measured number stands its formula's; docs/deploy.md explains them.
"""

from __future__ import annotations

import argparse
import pickle
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from _harness import add_common_arguments, exact, figure_table, finish, table
from kvroute import DifficultyHead, Policy, PoolingSpec
from kvroute.confidence_maps import LogisticMap
from kvroute.features import plan_features
from kvroute.heads.models import RidgeModel
from kvroute.info import LayerInfo, ModelInfo
from kvroute.serving.asks import Ask
from kvroute.serving.config import ServingConfig
from kvroute.serving.feeding import feature_key
from kvroute.serving.forcing import Board
from kvroute.serving.messages import Look, StepMeta, StepRequest, StepResults
from kvroute.serving.pages import LayerPages
from kvroute.serving.worker import WorkerSide

BLOCK = 16
FEATURES = ("prompt:best", "answer:paper-mteb", "kv-coe")
LOOK = "paper-classifier"
"""The preset that the policy's head reads."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What bytes depend on.

    Attributes:
        layers: attention layers.
        heads: KV heads of the model.
        size: of a head.
        ranks: that share the heads.
        tokens: of the prompt.
    """

    layers: int = 36
    heads: int = 8
    size: int = 128
    ranks: int = 2
    tokens: int = 1024

    @property
    def local(self) -> int:
        """Heads of one rank; where there are more ranks than heads, each head lies on several."""
        return max(1, self.heads // self.ranks)


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes of one rank and one request.

    Attributes:
        gathered: that a look gives to the gather.
        sums: by feature, of the arrays in the step's results.
        chain: of the arrays of the chains, for one new token.
        kept: in the rank's memory, whatever the answer's length.
        down: pickled, to the rank: at the prompt's end, and at an answer's token.
        up: pickled, from the rank, likewise.
    """

    gathered: int
    sums: Mapping[str, int]
    chain: int
    kept: int
    down: tuple[int, int]
    up: tuple[int, int]


def look_bytes(spec: PoolingSpec, sizes: Sizes) -> int:
    """Of a look: the sums of a rank's heads and the weight, float32."""
    return 4 * (_numbers(spec, sizes) + 1)


def sum_bytes(spec: PoolingSpec, sizes: Sizes) -> int:
    """Of a pooled feature: the sums of a rank's heads in float32, the weight in float64."""
    return 4 * _kept_numbers(spec, sizes) + 8


def chain_bytes(sizes: Sizes, tokens: int) -> int:
    """Of the chains: two squared lengths in float64 a new token and a layer, and three numbers a request."""
    return 16 * tokens + 16 * sizes.layers + 24


def kept_bytes(sizes: Sizes) -> int:
    """Of a request on the rank: an answer's sums in float64, two tokens of the chains in float32 with a count and three
    sums, and a sum by layer."""
    answers = [spec for of, spec in plan_features(list(FEATURES)).pooled.values() if of == "answer"]
    token = 2 * sizes.local * sizes.size
    return sum(8 * _kept_numbers(spec, sizes) + 8 for spec in answers) + 2 * 4 * token + 25 + 8 * sizes.layers * token


def _numbers(spec: PoolingSpec, sizes: Sizes) -> int:
    return len(spec.read_layers(sizes.layers)) * sizes.local * sizes.size * len(spec.part)


def _kept_numbers(spec: PoolingSpec, sizes: Sizes) -> int:
    """Layers and heads that a spec makes one are one before they are kept and sent."""
    layers = len(spec.read_layers(sizes.layers)) if spec.layer_reduce == "concat" else 1
    return layers * (1 if spec.heads == "mean" else sizes.local) * sizes.size * len(spec.part)


def measure(sizes: Sizes) -> Measured:
    """Have one rank read a prompt with a look, then a token of the answer."""
    model = _model(sizes)
    gathered: list[int] = []

    def gather(x: torch.Tensor) -> torch.Tensor:
        gathered.append(x.numel() * x.element_size())
        return x[None].expand(sizes.ranks, -1)

    blocks = -(-(sizes.tokens + 2) // BLOCK) + 1
    memory = torch.zeros(sizes.layers, blocks, sizes.local, BLOCK, 2 * sizes.size, dtype=torch.bfloat16)
    pages = [LayerPages(i, f"l{i}", m[..., : sizes.size], m[..., sizes.size :], 0) for i, m in enumerate(memory)]
    with tempfile.TemporaryDirectory() as folder:
        _head(model).save(Path(folder) / "head")
        Policy(kind="one-step", head="head").save(Path(folder) / "policy.json")
        config = ServingConfig(policies=Path(folder), strict=True)
    worker = WorkerSide(pages, config=config, board=Board(), gather=gather)
    prompt, ask = sizes.tokens, Ask(features={name: name for name in FEATURES}, policy="policy").to_dict()
    all_blocks = list(range(1, blocks))
    pooled = plan_features(list(FEATURES)).pooled.values()
    sif = {s.sif_a: np.ones(prompt, np.float32) for of, s in pooled if (of, s.weights) == ("prompt", "sif")}
    first = StepRequest(
        "a-request-0000", prompt, prompt, prompt, prompt, True, (0,), (all_blocks,), ask=ask, weights=sif,
        look=Look("policy", False, prompt, None, 0, {"fast": [1, 2], "slow": [1]}),
    )  # fmt: skip
    start = prompt + 2  # the mode's tokens lie between
    skip = start // BLOCK
    second = StepRequest("a-request-0000", prompt, start, start, start + 1, False, (skip,), (all_blocks[skip:],))
    metas = [StepMeta([first]), StepMeta([second])]
    results = []
    for meta in metas:
        worker.step(meta)
        found = worker.results()
        assert found is not None
        assert not found.faults, found.faults
        results.append(found)
    norms = results[1].norms
    assert norms is not None
    down, up = ([len(pickle.dumps(x, protocol=pickle.HIGHEST_PROTOCOL)) for x in some] for some in (metas, results))
    return Measured(
        sum(gathered),
        _sums(results),
        sum(a.nbytes for a in (norms.counts, norms.steps, norms.span, norms.layers, norms.layer_span)),
        sum(rows[0].nbytes for rows in worker._rows.tensors.values()),
        (down[0], down[1]),
        (up[0], up[1]),
    )


def _sums(results: list[StepResults]) -> dict[str, int]:
    found = {}
    for name, (of, spec) in plan_features(list(FEATURES)).pooled.items():
        sums = results[0 if of == "prompt" else 1].sums[feature_key(of, spec)]
        found[name] = sum(a.nbytes for a in (sums.keys, sums.values, sums.weight) if a is not None)
    return found


def expected(sizes: Sizes) -> Measured:
    """The same by the formulas; what is pickled has none."""
    pooled = plan_features(list(FEATURES)).pooled
    return Measured(
        look_bytes(PoolingSpec.preset(LOOK), sizes),
        {name: sum_bytes(spec, sizes) for name, (_, spec) in pooled.items()},
        chain_bytes(sizes, 1),
        kept_bytes(sizes),
        (0, 0),
        (0, 0),
    )


def rows(sizes: Sizes, found: Measured) -> list[tuple[str, str, str, int]]:
    """Of the table in docs/deploy.md: what, when, how, bytes a rank and request."""
    return [
        (f"a look, head by `{LOOK}`", "once a request, and at checkpoints", "all-gather", found.gathered),
        *(
            (
                f"`{name}`",
                "once a request" if name.startswith("prompt") else "each step",
                "to the scheduler",
                found.sums[name],
            )
            for name in found.sums
        ),
        ("`kv-coe`, one token", "each step", "to the scheduler", found.chain),
        ("state of these features", "while it runs", "kept on the rank", found.kept),
        ("all of this, pickled, at the prompt's end", "once a request", "to the scheduler", found.up[0]),
        ("all of this, pickled, at a token", "each step", "to the scheduler", found.up[1]),
        (f"what to read of {sizes.tokens} tokens, pickled", "once a request", "to the rank", found.down[0]),
        ("what to read of a token, pickled", "each step", "to the rank", found.down[1]),
    ]


HEADER = ("what", "when", "how", "bytes")


def _model(sizes: Sizes) -> ModelInfo:
    layer = {"kv_heads": sizes.heads, "key_size": sizes.size, "value_size": sizes.size}
    return ModelInfo(
        name="sizes",
        architecture="Sizes",
        hidden_size=sizes.heads * sizes.size,
        vocab_size=1000,
        context=1 << 20,
        layers=tuple(LayerInfo(model_layer=i, **layer) for i in range(sizes.layers)),
        model_layers=sizes.layers,
        rope="{}",
        weights_digest="none",
        dtype="bfloat16",
    )


def _head(model: ModelInfo) -> DifficultyHead:
    """A head that reads what a trained one does, and knows nothing."""
    spec = PoolingSpec.preset(LOOK)
    zeros = np.zeros(spec.dimension(model), dtype=np.float32)
    return DifficultyHead(
        spec=spec,
        target="difficulty",
        predictor=RidgeModel(zeros, zeros, zeros, np.array([0.4])),
        map=LogisticMap(means=(50.0,), scales=(20.0,), coefficients=(-2.0,), intercept=0.0),
        model=model.name,
        fingerprint=model.fingerprint,
        data_hash="none",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_common_arguments(parser)
    for name, value in (("layers", 36), ("heads", 8), ("size", 128), ("ranks", 2), ("tokens", 1024)):
        parser.add_argument(f"--{name}", type=int, default=value)
    arguments = parser.parse_args()
    sizes = Sizes(arguments.layers, arguments.heads, arguments.size, arguments.ranks, arguments.tokens)
    found, formula = measure(sizes), expected(sizes)
    print(f"{sizes.layers} layers, {sizes.heads} KV heads of {sizes.size}, {sizes.ranks} ranks: bytes a rank\n")
    print(table(HEADER, [(*row[:3], f"{row[3]:,}") for row in rows(sizes, found)]))
    figures = {"look_to_formula": exact(found.gathered / formula.gathered, "<= 1.0")}
    figures |= {f"{n}_to_formula": exact(b / formula.sums[n], "<= 1.0") for n, b in found.sums.items()}
    figures["chain_to_formula"] = exact(found.chain / formula.chain, "<= 1.0")
    figures["kept_to_formula"] = exact(found.kept / formula.kept, "<= 1.0")
    print("\n" + figure_table(figures))
    finish(arguments, name="rank_bytes", figures=figures, baseline="the formulas", n=1)


if __name__ == "__main__":
    main()
