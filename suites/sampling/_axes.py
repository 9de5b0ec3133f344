"""The axes that operators on distributions over tokens share: rows of a vocabulary, and the filters on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from kerneltest.model import Case, InputStrategy, Relation, Size

if TYPE_CHECKING:
    from hypothesis import strategies as st

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16", "float16")
IndexDtype = Literal["", "int32", "int64"]
# Where some library changes its algorithm, and vocabularies of models that people run.
SWITCHES = (32, 256, 1024, 2048, 4096, 8192, 16_384, 32_000, 65_536, 128_256, 151_936, 262_144)
# Elements of a case: most are small, so that there can be many of them.
CELLS = (1 << 18, 1 << 18, 1 << 20, 1 << 20, 1 << 22, 1 << 24)
MOST_CELLS = 60_000_000
# Draws of a case, and the elements that they may read: in a small vocabulary each token comes up many times.
MOST_DRAWS = 65_536
READ_BY_DRAWS = 1 << 20
FEW_TOKENS = 40
# Input strategies of probabilities and of logits; see :mod:`._inputs`.
ALL = ("generic", "ties", "near_ties", "masked", "heavy_tail", "peaked", "subnormal", "uniform", "zipf", "dyadic")
ALL_LOGITS = ("generic", "ties", "masked", "heavy_tail", "peaked", "uniform", "zipf", "dyadic", "subnormal_logits")
TOP_P = (0.9, 1.0, 0.5, 0.75, 0.25, 0.95, 0.999, 0.1, 1e-3)
TOP_K = (1, 2, 3, 8, 20, 50, 256, 257)
MIN_P = (0.1, 0.5, 1.0, 0.05, 1e-3, 0.0)
TEMPERATURE = (1.0, 0.7, 2.0, 0.1, 0.01, 100.0)
PARAMETERS = ("top_k", "top_p", "min_p", "temperature")


# Of a parameter that is a real number: common values, the least and the greatest.
REAL = {"top_p": (TOP_P, 2.0**-20, 1.0), "min_p": (MIN_P, 0.0, 1.0), "temperature": (TEMPERATURE, 2.0**-6, 64.0)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """Axes of a case: ``rows`` distributions over a ``vocabulary``, and the filters that apply to them.

    ``per_row``: each row has parameters of its own, drawn with the values; otherwise all have those given here.
    ``order``: whether two filters look at the same probabilities ("joint") or the second at what the first leaves.
    ``indices``: if not empty, ``outputs`` draws pick their rows through a tensor of that dtype; otherwise there is one
    draw from each row. ``shared``: all rows hold the same values. ``device_seed``: the state of the random numbers is
    in device memory. ``sorted`` and ``tie`` are what plain top-k is asked for.

    Raises ValueError for what makes no sense.
    """

    rows: int
    vocabulary: int
    dtype: Dtype = "float32"
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    temperature: float | None = None
    order: Literal["", "joint", "top_k_first"] = ""
    per_row: bool = False
    indices: IndexDtype = ""
    outputs: int = 0
    shared: bool = False
    device_seed: bool = False
    sorted: bool = False
    tie: Literal["any", "index", "reverse"] = "any"

    def __post_init__(self) -> None:
        if self.rows < 1 or self.vocabulary < 1:
            raise ValueError(f"rows and vocabulary must be at least 1, got {self.rows} and {self.vocabulary}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {value}")
        if self.temperature is not None and not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if bool(self.indices) != bool(self.outputs) or self.outputs < 0:
            raise ValueError(f"outputs and indices come together, got {self.outputs} and {self.indices!r}")

    @property
    def draws(self) -> int:
        """How many tokens are drawn."""
        return self.outputs if self.indices else self.rows

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters there are."""
        return tuple(name for name in PARAMETERS if getattr(self, name) is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """What the cases of an operator are drawn from, besides rows and vocabulary.

    ``parameters`` of :class:`Rows` that it has; ``draws``: it is random, so that there are indices and seeds;
    ``per_row``: its parameters may differ by row.
    """

    operator: str
    inputs: tuple[InputStrategy, ...]
    parameters: tuple[str, ...] = ()
    orders: tuple[Literal["", "joint", "top_k_first"], ...] = ("",)
    dtypes: tuple[Dtype, ...] = ("float32",)
    draws: bool = False
    per_row: bool = True
    selects: bool = False
    relations: tuple[Relation, ...] = ()


def strategies(*names: str) -> tuple[InputStrategy, ...]:
    """Input strategies by name, all judged in the worst case; on "dyadic" rows sums are exact."""
    return tuple(InputStrategy(name=name, tier="exact" if name == "dyadic" else "hard") for name in names)


def cases(family: Family) -> Callable[[Size], st.SearchStrategy[Case[Rows]]]:
    """What draws a family's cases; the simplest is one row of two tokens."""

    def of(size: Size) -> st.SearchStrategy[Case[Rows]]:
        from hypothesis import strategies as st

        from kerneltest.strategies import edges

        large = edges(size.vocabulary, *SWITCHES, minimum=2)

        @st.composite
        def draw_case(draw: st.DrawFn) -> Case[Rows]:
            vocabulary = draw(edges(FEW_TOKENS, 4, minimum=2) if draw(st.booleans()) else large)
            cells = min(draw(st.sampled_from(CELLS)), size.rows * size.vocabulary, MOST_CELLS)
            most_rows = max(1, min(size.rows, cells // vocabulary))
            rows = draw(st.one_of(edges(most_rows, 16, 128, minimum=1), st.just(most_rows)))
            more: dict[str, Any] = {"dtype": draw(st.sampled_from(family.dtypes))}
            if "top_k" in family.parameters:
                more["top_k"] = draw(_top_k(vocabulary))
            for name, (common, least, most) in REAL.items():
                if name in family.parameters:
                    usual = st.sampled_from(common)
                    more[name] = draw(st.one_of(usual, usual, st.floats(least, most, width=32)))
            more["order"] = draw(st.sampled_from(family.orders))
            if family.parameters and family.per_row:
                more["per_row"] = draw(st.sampled_from((False, True, True)))
            if family.draws:
                # Many draws from few rows, so that what never comes up can show.
                most = max(rows, min(MOST_DRAWS, max(cells, READ_BY_DRAWS) // vocabulary))
                more["indices"] = draw(st.sampled_from(("", "int32", "int64")))
                outputs = st.one_of(st.just(most), st.just(most), edges(most, minimum=1))
                more["outputs"] = draw(outputs) if more["indices"] else 0
                more["device_seed"] = draw(st.booleans())
            if family.selects:
                more["sorted"] = draw(st.booleans())
                more["tie"] = draw(st.sampled_from(("any", "index", "reverse")))
            more["shared"] = draw(st.sampled_from((False, False, False, True)))
            inputs = draw(st.sampled_from([strategy.name for strategy in family.inputs]))
            axes = Rows(rows=rows, vocabulary=vocabulary, **more)
            case = Case(operator=family.operator, axes=axes, inputs=inputs, seed=draw(st.integers(0, 2**32 - 1)))
            # Drawn from all of them, whether they apply or not: shrinking the case must not turn one into another.
            relation = draw(st.sampled_from((None, *family.relations)))
            return replace(case, relation=relation.name) if relation and relation.applies(case) else case

        return draw_case()

    return of


def _top_k(vocabulary: int) -> st.SearchStrategy[int]:
    from hypothesis import strategies as st

    usual = [k for k in TOP_K if k <= vocabulary]
    return st.one_of(st.sampled_from(usual), st.sampled_from((vocabulary - 1, vocabulary)), st.integers(1, vocabulary))


def simpler(family: Family) -> Callable[[Case[Rows]], Iterator[Case[Rows]]]:
    """The case with fewer rows or tokens, or one choice at its simplest."""

    def of(case: Case[Rows]) -> Iterator[Case[Rows]]:
        axes = case.axes
        if case.relation:
            yield replace(case, relation="")

        def with_axes(**changes: Any) -> Iterator[Case[Rows]]:
            try:
                yield replace(case, axes=replace(axes, **changes))
            except ValueError:
                return

        if axes.indices:
            yield from with_axes(indices="", outputs=0)
        simplest: dict[str, Any] = {
            "shared": False,
            "device_seed": False,
            "sorted": False,
            "tie": "any",
            "per_row": False,
            "dtype": family.dtypes[0],
            "order": family.orders[0],
        }
        for name, value in simplest.items():
            if getattr(axes, name) != value:
                yield from with_axes(**{name: value})
        if axes.rows > 1:
            yield from with_axes(rows=1)
            yield from with_axes(rows=axes.rows // 2)
        smaller = {2, axes.vocabulary // 2, axes.vocabulary - axes.vocabulary % 4, axes.vocabulary - 1}
        for vocabulary in sorted(smaller):
            if 2 <= vocabulary < axes.vocabulary:
                k = None if axes.top_k is None else min(axes.top_k, vocabulary)
                yield from with_axes(vocabulary=vocabulary, top_k=k)
        if axes.outputs > 1:
            yield from with_axes(outputs=axes.outputs // 2)
        if axes.indices == "int64":
            yield from with_axes(indices="int32")
        for name, plain in (("top_k", 1), ("top_p", 0.5), ("min_p", 0.5), ("temperature", 1.0)):
            if name in axes.parameters and getattr(axes, name) != plain:
                yield from with_axes(**{name: plain})
        first = family.inputs[0].name
        if case.inputs != first:
            yield replace(case, inputs=first)
        if case.seed:
            yield replace(case, seed=0)

    return of


def locate(case: Case[Rows], output: str, index: tuple[int, ...]) -> str:
    """An index in words: "draw 17" of tokens, "row 3, token 17" of a distribution, "row 3, place 17" of a selection."""
    if output == "tokens":
        return f"draw {index[0]}" if case.axes.indices else f"row {index[0]}"
    return f"row {index[0]}, {'place' if output in ('values', 'indices') else 'token'} {index[1]}"
