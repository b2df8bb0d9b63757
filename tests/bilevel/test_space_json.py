"""Spaces as text: JSON, fingerprint, differences, table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings

from bilevel import Choice, Fixed, Float, Grad, Int, Space, Switch
from tests.bilevel.strategies import owned

ROOT = Path(__file__).parents[2]
DECLARATION = """Space(
    lr=Grad(0.1, 1e-4, 1.0, "log", doc="learning rate"),
    arch=Choice("mlp", "cnn"),
    width=Int(16, 256, log=True, when={"arch": ("mlp", "cnn")}),
).own(lr="sampler")"""


def example() -> Space:
    names = {c.__name__: c for c in (Space, Grad, Choice, Int)}
    return eval(DECLARATION, {}, names)  # type: ignore[no-any-return]


@given(owned())
@settings(deadline=None, max_examples=100)
def test_json_round_trip(space: Space) -> None:
    again = Space.from_json(space.to_json())
    assert again == space
    assert again.to_json() == space.to_json()
    assert list(again) == list(space)
    assert dict(again) == dict(space)
    assert again.constants == space.constants
    assert [again.owner(n) for n in again] == [space.owner(n) for n in space]
    assert space.differences(again) == []


def test_fingerprint_is_the_same_in_another_process() -> None:
    code = f"from bilevel import *\nprint({DECLARATION}.fingerprint)"
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in ("0", "1")
    }
    assert found == {example().fingerprint}


def test_fingerprint_ignores_order_and_doc_only() -> None:
    space = example()
    shuffled = json.loads(space.to_json())
    entries = {k: dict(reversed(v.items())) for k, v in reversed(shuffled["space"].items())}
    again = Space.from_json(json.dumps({"space": entries, "format": 1}))
    assert list(again) == ["width", "arch", "lr"]
    assert again.fingerprint == space.fingerprint
    assert (space | Space(a=Switch())).fingerprint != space.fingerprint
    assert space.own(lr="grad").fingerprint != space.fingerprint
    assert space.fix(lr=0.1).fingerprint != space.fix(lr=0.2).fingerprint
    documented = Space(a=Switch(doc="x"))
    assert documented.fingerprint == Space(a=Switch()).fingerprint
    assert Space.from_json(documented.to_json())["a"].doc == "x"
    assert Space(a=Fixed(1)) != Space(a=Fixed(True))


def test_differences_are_readable() -> None:
    before = example()
    after = Space(
        lr=Grad(0.1, 1e-4, 0.5, "log"),
        arch=Choice("mlp", "cnn", "vit"),
        width=Float(16, 256),
        beta=Float(0.0, 1.0),
    )
    assert before.differences(after) == [
        "lr: owner 'sampler' -> 'grad'",
        "lr: high 1.0 -> 0.5",
        "arch: values ['mlp', 'cnn'] -> ['mlp', 'cnn', 'vit']",
        "width: Int(when={'arch': ('mlp', 'cnn')}, low=16, high=256, log=True, default=64) -> "
        "Float(low=16.0, high=256.0, default=136.0)",
        "beta: added, Float(low=0.0, high=1.0, default=0.5)",
    ]
    assert before.differences(before.without("lr")) == ["lr: removed, was " + repr(before["lr"])]
    assert Space(a=Fixed(1)).differences(Space(a=Fixed(True))) == [
        "a: value 1 -> True",
        "a: fixed_at 1 -> True",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON text of a space"),
        ("[]", "expected a space in format 1, but got 'list'"),
        ('{"format": 2}', "expected a space in format 1, but got 2"),
        ('{"format": 1}', "the key 'space' is missing"),
        ('{"format": 1, "space": {"a": {"kind": "Float"}}}', "the key 'owner' is missing"),
        (
            '{"format": 1, "space": {"a": {"kind": "Flaot", "owner": "grad"}}}',
            "a has the unknown kind 'Flaot'; did you mean 'Float'",
        ),
        (
            '{"format": 1, "space": {"a": {"kind": "Switch", "owner": "grad", "low": 1}}}',
            "a cannot be a Switch: .*'low'",
        ),
        (
            '{"format": 1, "space": {"a": {"kind": "Switch", "owner": "grad"}}}',
            "a cannot be owned by 'grad'",
        ),
    ],
)
def test_bad_json(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Space.from_json(text)


def test_table() -> None:
    space = example() | Space(wd=Grad([0.1, 0.2], shape=(2,), schedule=3), epochs=Fixed(20))
    assert repr(space) == "\n".join(
        [
            "Space of 5 names: 1 grad, 3 sampled, 1 fixed",
            "  name    owner    range          scale   shape           default     when",
            "  lr      sampler  [0.0001, 1.0]  log                     0.1",
            "  arch    sampler  mlp | cnn                              mlp",
            "  width   sampler  16..256        log                     64          "
            "arch='mlp' or 'cnn'",
            "  wd      grad     (-inf, inf)    linear  3 knots x (2,)  0.1 to 0.2",
            "  epochs  fixed                                           20",
        ]
    )
    assert repr(Space()) == "Space of 0 names"
