"""What every part of a run works with."""

import json

from rsq_stream.config.quantization_plan import QuantizationPlan
from rsq_stream.storage.journal import Journal


def settled(journal: Journal, plan: QuantizationPlan) -> QuantizationPlan:
    """Give the plan to go on with: the journal's, where a change of device is noted."""
    kept = QuantizationPlan.from_fields(
        json.loads(journal.get("plan") or plan.canonical_json())
    )
    changes = json.loads(journal.get("device_changes") or "[]")
    last_kind = changes[-1]["device_kind"] if changes else kept.device_kind
    if last_kind != plan.device_kind:
        last = journal.last_block()
        block = 0 if last is None else last + 1
        changes.append({"from_block": block, "device_kind": plan.device_kind})
        journal.put({"device_changes": json.dumps(changes)})
    return kept
