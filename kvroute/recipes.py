"""Recipes: what ``kvroute reproduce`` runs, and the figures that were published for it. YAML, checked whole.

A recipe names a model, sets of questions or texts, and up to three parts: ``routing`` (label, train, calibrate,
evaluate), ``scores`` (answer, score) and ``embeddings``. Nothing in it is code, and a set is a file or the name of a
maker that kvroute has.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from kvroute.errors import FileFormatError, InvalidInputError
from kvroute.heads.search import Kind
from kvroute.labelling import SHORT
from kvroute.pooling import PRESETS, PoolingSpec
from kvroute.scores import SCORES

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]
"""Of a set; figures put a dot behind it."""
Count = Annotated[int, Field(ge=1, strict=True)]
Maker = Literal["tiny-thinker", "sums", "topics"]

POLICIES = ("fast", "slow", "one-step", "two-step", "calibrated")
"""Policies of the routing part, in the order they are shown in."""
_MOST_BYTES = 1 << 20


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class DataSet(_Part):
    """Questions (``id``, ``question``, ``answer``, ``answer_type``) or texts (``id``, ``text``, ``label``)."""

    name: Name
    """What its figures begin with."""
    file: str | None = None
    """JSON Lines, in the folder that ``--data`` names, beside the recipe, or absolute. Of texts, the name without
    ``.train.jsonl`` and ``.test.jsonl``."""
    maker: Maker | None = None
    """Makes the rows, instead of a file."""
    rows: Count | None = None
    """At most so many, from the beginning."""
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    """Of the maker."""
    tolerance: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Relative error allowed in numbers."""
    optional: bool = False
    """Whether its figures are left out where the file is not there (of texts alone)."""

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.file is None) == (self.maker is None):
            raise ValueError("a set has a file or a maker, one of the two")
        if self.maker is not None and self.rows is None:
            raise ValueError("a maker needs rows")
        return self


class Limits(_Part):
    """Tokens of an answer at most, by mode."""

    fast: Count = 256
    slow: Count = 1024


class HeadPart(_Part):
    """How the head is made."""

    spec: PoolingSpec | None = None
    """Pooling: a preset's name or a spec; searched for by default."""
    kinds: tuple[Kind, ...] = Field(default=("mlp",), min_length=1)
    bare: bool | None = True
    """Whether bare questions are trained on too; null tries both."""
    quick: bool = False
    """A smaller search."""

    @field_validator("spec", mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        return _preset(given)


class TwoStep(_Part):
    """The two-step policy; its head for mid-thought needs checkpoints in the labels."""

    tau_fast: float = 30.0
    tau_slow: float = 70.0
    every: Count = 16


class RoutingPart(_Part):
    """Fast and slow thinking."""

    train: tuple[DataSet, ...] = Field(min_length=1)
    """The head is trained, chosen and calibrated on them; questions alike to one of ``test`` are left out."""
    test: tuple[DataSet, ...] = Field(min_length=1)
    prompt: str = "{question}"
    fast_instruction: str | None = None
    """For a model without thinking tokens."""
    slow_instruction: str | None = None
    max_tokens: Limits = Limits()
    short: Count = SHORT
    samples: Count = 1
    temperature: Annotated[float, Field(ge=0)] = 0.0
    seed: Annotated[int, Field(ge=0, strict=True)] = 0
    checkpoints: Count | None = None
    """Thoughts are closed at every n-th token."""
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.2
    calibration: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Shares of the training sets' questions that are chosen on and calibrated on; the rest is trained on."""
    head: HeadPart = HeadPart()
    tau: Annotated[float, Field(ge=-1, le=101)] = 50.0
    """Threshold of the one-step policy as it was published."""
    two_step: TwoStep | None = None
    max_loss: Annotated[float, Field(gt=0, lt=100)] = 1.0
    """Points of accuracy that the calibrated policy may lose."""
    delta: Annotated[float, Field(gt=0, lt=1)] = 0.1
    baselines: tuple[str, ...] = ("length",)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.validation + self.calibration >= 1:
            raise ValueError("validation and calibration leave nothing to train on")
        if self.two_step is not None and self.checkpoints is None:
            raise ValueError("two_step needs checkpoints")
        if "{question}" not in self.prompt:
            raise ValueError("the prompt has no {question} in it")
        return self


class ScoresPart(_Part):
    """Self-evaluation: answers, and how well scores tell the right ones."""

    test: tuple[DataSet, ...] = Field(min_length=1)
    prompt: str = "{question}"
    max_tokens: Count = 1024
    scores: tuple[str, ...] = ("kv_coe_r_token", "kv_coe_c_token", "mean_logprob", "entropy", "max_probability")

    @field_validator("scores")
    @classmethod
    def _known(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        for name in given:
            if name not in SCORES:
                raise ValueError(f"no score is named {name!r}; there are {', '.join(SCORES)}")
        return given


class EmbeddingsPart(_Part):
    """Classification by vectors, as MTEB does it: a logistic regression on a few rows a label, several times."""

    sets: tuple[DataSet, ...] = Field(min_length=1)
    spec: PoolingSpec = PRESETS["paper-mteb"]
    """A preset's name, or a spec."""
    samples_per_label: Count = 8
    experiments: Annotated[int, Field(ge=2, strict=True)] = 10
    seed: Annotated[int, Field(ge=0, strict=True)] = 42

    @field_validator("spec", mode="before")
    @classmethod
    def _preset(cls, given: Any) -> Any:
        return _preset(given)


class Recipe(_Part):
    """What is run, and what was published."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    about: str
    source: str
    """Where settings and figures come from."""
    model: str
    """A hub id, ``smollm2``, or a folder (also one beside the recipe)."""
    dtype: str = "auto"
    chunk: Count = 256
    """Questions that are answered together, of which a killed run loses one lot."""
    routing: RoutingPart | None = None
    scores: ScoresPart | None = None
    embeddings: EmbeddingsPart | None = None
    published: dict[str, float | None] = {}
    """By figure, such as ``gsm8k.one-step.accuracy``; null where the figure is not known here."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.routing is None and self.scores is None and self.embeddings is None:
            raise ValueError("a recipe has a part at least: routing, scores or embeddings")
        if self.routing is not None:
            names = [part.name for part in (*self.routing.train, *self.routing.test)]
            twice = sorted({name for name in names if names.count(name) > 1})
            if twice:
                raise ValueError(f"two sets of the routing part are named {twice[0]}")
        known = set(self.figures())
        for name in self.published:
            if name not in known:
                raise ValueError(f"the recipe gives no figure {name!r}; it gives {', '.join(sorted(known))}")
        return self

    def figures(self) -> Iterator[str]:
        """Names of all figures, in the order they are shown in. Accuracies, AUROC and FPR95 lie in [0, 1]; tokens are
        those of an answer on the mean."""
        if self.routing is not None:
            for part in self.routing.test:
                for policy in POLICIES:
                    if policy != "two-step" or self.routing.two_step is not None:
                        yield from (f"{part.name}.{policy}.accuracy", f"{part.name}.{policy}.tokens")
                yield f"{part.name}.auroc-fast-is-right"
        if self.scores is not None:
            for part in self.scores.test:
                for score in self.scores.scores:
                    yield from (f"{part.name}.{score}.auroc", f"{part.name}.{score}.fpr95")
        if self.embeddings is not None:
            yield from (f"{part.name}.accuracy" for part in self.embeddings.sets)


def _preset(given: Any) -> Any:
    if isinstance(given, str):
        if given not in PRESETS:
            raise ValueError(f"no preset is named {given!r}; there are {', '.join(PRESETS)}")
        return PRESETS[given]
    return given


# ---------------------------------------------------------------------- files


def recipe_folder() -> Path:
    """Where the recipes are that come with kvroute: in the package, or beside it in a checkout."""
    package = Path(__file__).parent
    packed = package / "_recipes"
    return packed if packed.is_dir() else package.parent / "recipes"


def recipe_names() -> list[str]:
    """Names of the recipes that come with kvroute."""
    return sorted(path.stem for path in recipe_folder().glob("*.yaml"))


def load_recipe(name: str) -> tuple[Recipe, Path]:
    """A recipe by its name, or from a ``.yaml`` file.

    Returns:
        the recipe and the folder it lies in.

    Raises:
        InvalidInputError: no such recipe, or no such file.
        FileFormatError: not YAML, or not a recipe; the message says where.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
    elif name in recipe_names():
        path = recipe_folder() / f"{name}.yaml"
    else:
        raise InvalidInputError(
            f"No recipe is named {name!r}.", hint=f"There are: {', '.join(recipe_names())}; or give a .yaml file."
        )
    return read_recipe(path), path.resolve().parent


def read_recipe(path: Path) -> Recipe:
    """A recipe from a file.

    Raises:
        as :func:`load_recipe`.
    """
    import yaml

    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidInputError(f"{path} can't be read: {error.strerror or error}.") from error
    if len(data) > _MOST_BYTES:
        raise FileFormatError(f"{path} is no recipe: it has {len(data)} bytes.")
    try:
        body = yaml.safe_load(data.decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise FileFormatError(f"{path} is not YAML: {error}") from error
    try:
        return Recipe.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise FileFormatError(f"{path} is not a recipe ({where}: {first['msg']}).") from error
