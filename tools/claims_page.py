"""Write `docs/claims.md` from what the claim scripts measured last."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

INTRODUCTION = """# Claims at CPU size

What each paper found, what a small script measures of the same mechanism, and what came out, also where it did not.
`make claims` runs the scripts of [examples/claims](../examples/claims) again and rewrites this page. Means over seeds with
95 % intervals (Student's t); differences are to the first line, paired by seed.
"""


def page() -> str:
    """The whole page."""
    results = sorted((ROOT / "examples" / "claims" / "results").glob("*.json"))
    return INTRODUCTION + "".join(section(json.loads(path.read_text())) for path in results)


def section(result: dict[str, Any]) -> str:
    """One claim."""
    script = f"[{result['script']}](../examples/claims/{result['script']})"
    lines = [
        f"\n## [{result['plugin']}](../contrib/{result['plugin']}/README.md)\n",
        f"- **The paper**: {result['found']}",
        f"- **Measured** ({script}, {result['seeds']} seeds): {result['measured']}",
        f"- **Expected**: {result['expected']} the reference\n",
        "| variant | mean | difference | |",
        "|---|---|---|---|",
    ]
    for row in result["outcomes"]:
        difference = (
            f"{row['difference']:+.4g} ± {row['difference_half_width']:.2g}" if row["verdict"] != "reference" else ""
        )
        lines.append(
            f"| {row['variant']} | {row['mean']:.4g} ± {row['half_width']:.2g} | {difference} | {row['verdict']} |"
        )
    if result.get("note"):
        lines.append(f"\n{result['note']}")
    return "\n".join(lines) + "\n"
