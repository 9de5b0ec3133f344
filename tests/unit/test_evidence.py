"""The store of evidence: what it keeps, what it refuses, and how it writes."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from attention_cases import case, paged

from kerneltest.engine import evidence as stored
from kerneltest.engine.evidence import ALPHA, MOST, BadEvidence, Store, nothing_yet
from kerneltest.model import Counts, DecodeError, Device, Evidence, Kernel, Started, decode, encode
from kerneltest.oracle.eprocess import ALPHA as oracle_alpha

SEEN = Evidence(
    kernel="lib.top_p[fp16]",
    library="lib 1.2.post1+cu13",
    device="cuda",
    config="0123abcd",
    draws=7,
    next_draw=5,
    partitions=(Counts(partition="id mod 4", probabilities=(0.1, 0.9), counts=(2, 5)),),
    log_e=-0.25,
    highest=1.5,
    detectable=0.03,
)
EMPTY = Evidence(kernel=SEEN.kernel, library=SEEN.library, device=SEEN.device, config=SEEN.config)
CPU = Device(kind="cpu", ordinal=0, name="", sm=(0, 0), units=1)
CUDA = replace(CPU, kind="cuda")
STARTED = Started(device=CUDA, libraries={"torch": "2.9", "lib": "1.2.post1+cu13"})
KERNEL = Kernel(name="lib.top_p[fp16]", operator=paged.paged_prefill, launch=lambda call: {}, library="lib")


def test_evidence_survives_the_codec() -> None:
    assert decode(Evidence, json.loads(json.dumps(encode(SEEN)))) == SEEN


def test_a_count_for_each_bin_or_nothing() -> None:
    data = encode(SEEN)
    data["partitions"][0]["counts"].append(1)
    with pytest.raises(DecodeError, match=r"partitions\[0\]: id mod 4: 2 bins, and no count for each"):
        decode(Evidence, data)
    with pytest.raises(ValueError, match="no count"):
        Counts(partition="", probabilities=(0.5, 0.5), counts=(1, -1))


def test_e_is_infinite_after_an_impossible_draw() -> None:
    assert SEEN.log10_e == pytest.approx(1.5 / math.log(10))
    assert replace(SEEN, impossible=1).log10_e == math.inf


def test_all_false_alarms_together_are_one_in_a_million() -> None:
    assert MOST * ALPHA <= 1e-6 * (1 + 1e-12)
    assert oracle_alpha == ALPHA


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    store = Store(tmp_path / "of" / "evidence")
    assert store.load(EMPTY) == EMPTY
    store.save(SEEN)
    assert store.load(EMPTY) == SEEN
    assert [path.relative_to(store.folder).as_posix() for path in store.folder.rglob("*") if path.is_file()] == [
        "lib.top_p-fp16/lib-1.2.post1+cu13-cuda-0123abcd.json"
    ]
    later = replace(SEEN, draws=9)
    store.save(later)
    assert store.load(EMPTY) == later


@pytest.mark.parametrize("field", ["kernel", "library", "device", "config"])
def test_every_part_of_the_key_makes_another_series(tmp_path: Path, field: str) -> None:
    store = Store(tmp_path)
    store.save(SEEN)
    other = replace(EMPTY, **{field: "other"})
    assert store.load(other) == other


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[1]", "expected an object"),
        ('{"schema": "kerneltest.evidence/1"}', "field 'evidence' is missing"),
        ('{"schema": "kerneltest.evidence/0", "evidence": {}}', "expected 'kerneltest.evidence/1'"),
        ('{"schema": "kerneltest.evidence/1", "evidence": {"kernel": 3}}', "evidence: field 'library' is missing"),
    ],
)
def test_a_file_that_is_none_is_named(tmp_path: Path, text: str, why: str) -> None:
    store = Store(tmp_path)
    path = store.path(EMPTY)
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(BadEvidence, match=f"^{re.escape(str(path))}: .*{why}"):
        store.load(EMPTY)


def test_bytes_and_folders_are_no_evidence(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.path(EMPTY)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BadEvidence, match=f"^{re.escape(str(path))}: cannot be read"):
        store.load(EMPTY)
    path.unlink()
    path.mkdir()
    with pytest.raises(BadEvidence, match=f"^{re.escape(str(path))}: cannot be read"):
        store.load(EMPTY)


def test_evidence_of_another_kernel_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.save(SEEN)
    foreign = replace(SEEN, config="ffff0000")
    store.path(foreign).write_text(store.path(SEEN).read_text())
    with pytest.raises(BadEvidence, match=r"holds the evidence of .*0123abcd, not of .*ffff0000"):
        store.load(foreign)


def test_no_room_for_more_series_than_share_the_false_alarms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored, "MOST", 2)
    store, other = Store(tmp_path), replace(SEEN, kernel="other")
    assert not store.full(EMPTY)
    store.save(SEEN)
    assert not store.full(other)
    store.save(other)
    assert store.full(replace(SEEN, config="third"))
    assert not store.full(EMPTY)


def test_nothing_is_left_of_a_write_that_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.save(SEEN)

    def full_disk(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="no space"):
        store.save(replace(SEEN, draws=8))
    assert store.load(EMPTY) == SEEN
    assert [path.name for path in tmp_path.rglob("*.tmp")] == []


def test_the_key_of_a_series_and_its_first_number() -> None:
    one = nothing_yet(KERNEL, case((1, 1)), STARTED, 5)
    assert one.key == (KERNEL.name, "lib 1.2.post1+cu13", "cuda", case((1, 1)).id)
    assert one.draws == 0
    assert nothing_yet(KERNEL, case((1, 1)), STARTED, 5) == one
    starts = {nothing_yet(KERNEL, case((1, 1)), STARTED, seed).next_draw for seed in range(100)}
    assert len(starts) == 100
    assert all(0 <= start < 2**31 for start in starts)
    assert nothing_yet(replace(KERNEL, library=None), case((1, 1)), STARTED, 5).library == "torch 2.9"
