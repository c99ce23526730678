"""No step calls for more of torch than it did: counted, since times here tell nothing."""

from __future__ import annotations

import json

import pytest
from step_costs import CASES, KEPT, measure, release


@pytest.mark.dist
@pytest.mark.deepspeed
@pytest.mark.parametrize("case", CASES)
def test_a_step_calls_for_no_more(case: str) -> None:
    """If it has to: `python tests/step_costs.py`, and say why in the commit. If it is less, too."""
    kept = json.loads(KEPT.read_text())
    if kept["torch"] != release():
        pytest.skip(f"counted with torch {kept['torch']}; another calls for other operations")
    before, now = kept[case], measure(case)
    assert now.keys() == before.keys()
    for kind, count in now.items():
        # An allocation or two come and go with torch's own caches.
        assert count <= before[kind] + (3 if kind == "allocations" else 0), kind
        assert count >= 0.9 * before[kind], f"{kind} are fewer than in {KEPT.name}: count them anew"
