"""What is on trial: the mutants, and the legal variants of the kernel that nobody may flag."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from kerneltest.model import BF16, FP16, FP32
from kerneltest.power.emulation import Arithmetic, Flaw
from kerneltest.power.problems import FAMILIES


class Kind(Enum):
    """LOGIC: wrong in what it computes. NUMERIC: right, but with less precision than declared."""

    LOGIC = "logic"
    NUMERIC = "numeric"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A flaw, the kernel it is planted in, and the families that have what it breaks."""

    flaw: Flaw
    kind: Kind = Kind.LOGIC
    how: Arithmetic = Arithmetic()  # noqa: RUF009  (frozen)
    families: tuple[str, ...] = tuple(FAMILIES)

    @property
    def name(self) -> str:
        return self.flaw.value


SPLIT = Arithmetic(splits=3)
_SPECIAL = {
    Flaw.CAUSAL_EDGE: Mutant(flaw=Flaw.CAUSAL_EDGE, families=("prefill",)),
    Flaw.CAUSAL_SHORT: Mutant(flaw=Flaw.CAUSAL_SHORT, families=("prefill",)),
    Flaw.NO_SOFTCAP: Mutant(flaw=Flaw.NO_SOFTCAP, families=("decode",)),
    Flaw.NOT_NORMALISED: Mutant(flaw=Flaw.NOT_NORMALISED, how=SPLIT),
    Flaw.PLAIN_MEAN: Mutant(flaw=Flaw.PLAIN_MEAN, how=SPLIT),
    Flaw.WRONG_LSE: Mutant(flaw=Flaw.WRONG_LSE, how=SPLIT),
    **{
        flaw: Mutant(flaw=flaw, kind=Kind.NUMERIC)
        for flaw in (Flaw.SCALE_PERMILLE, Flaw.P_TRUNCATED, Flaw.O_BF16, Flaw.SCORE_BF16)
    },
}
MUTANTS = {mutant.name: mutant for mutant in (_SPECIAL.get(flaw, Mutant(flaw=flaw)) for flaw in Flaw)}

LEGAL = {
    "tile 64": Arithmetic(),
    "tile 32": Arithmetic(tile=32),
    "tile 128": Arithmetic(tile=128),
    "2 splits": Arithmetic(splits=2),
    "3 splits": Arithmetic(splits=3),
    "tile 32, 3 splits": Arithmetic(tile=32, splits=3),
    "l of rounded P": Arithmetic(rounded_sum=True),
    "P in fp16": Arithmetic(p=FP16),
    "P in fp32": Arithmetic(p=FP32),
    "3 splits, partial outputs in bf16": Arithmetic(splits=3, partial=BF16),
}
