"""A report's record → `report.json` and `index.html` in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from cvxq_format.unfinished import write_whole
from jinja2 import Environment, PackageLoader, StrictUndefined

from cvxq_converter.measure.curve import Curve
from cvxq_converter.write.details import LIMIT
from cvxq_converter.write.page.charts import (
    Chart,
    depth_chart,
    distribution_chart,
    loss_chart,
    position_chart,
)
from cvxq_converter.write.page.tables import byte_parts, depth_map, flat, time_parts

CURVE_STEPS = 120


def write_report(folder: Path, report: Mapping[str, Any], file: Mapping[str, Any]) -> None:
    """Write the page and its figures into `folder`, which is made if it does not exist.

    report: of `ConversionReport.to_json`, with details. file: what is in the `.cvxq` file, by
    `cvxq.summary.FileSummary.record`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    record = {**report, "file": dict(file)}
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_whole(folder / "report.json", text.encode())
    write_whole(folder / "index.html", render(record).encode())


def render(record: Mapping[str, Any]) -> str:
    """The whole page as text, from what report.json holds."""
    environment = Environment(
        loader=PackageLoader("cvxq_converter", "write/page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    file = record["file"]
    provenance = file["provenance"] or {}
    return environment.get_template("report.html.jinja").render(
        report=record,
        file=file,
        source=provenance.get("source", "model"),
        charts=charts(record),
        depths=depth_map(file["matrices"]),
        parts=byte_parts(file["bytes_by_kind"]),
        times=time_parts(record["stage_seconds"]),
        provenance=flat(provenance),
        kurtosis={n: record["details"][n]["kurtosis"] for n in ("by_group", "by_matrix")},
    )


def charts(record: Mapping[str, Any]) -> dict[str, Chart | None]:
    """The charts by name, None for those that this conversion has no figures for."""
    details = record["details"]
    positions = [
        (p["first"], p["last"], p["kl"], p["standard_error"]) for p in details["positions"]
    ]
    return {
        "loss": _loss_chart(record) if details["curve"] else None,
        "depths": depth_chart(record["depth_histogram"]),
        "weights": distribution_chart(
            details["by_group"]["density"], details["by_matrix"]["density"], LIMIT
        ),
        "positions": position_chart(positions) if positions else None,
    }


def _loss_chart(record: Mapping[str, Any]) -> Chart:
    """The curve, in the terms of the target where there was one."""
    curve = Curve.from_json(record["details"]["curve"])
    rates = np.linspace(curve.lowest_rate, curve.highest_rate, CURVE_STEPS)
    rate, target = record["rate_bits_per_weight"], record["target"]
    achieved = target["achieved"] if target else record["kl"]
    if achieved is None:
        achieved = float(curve.loss_at([rate])[0])
    name = "KL, nats per token" if record["details"]["is_kl"] else "share of the weights' energy"
    if target is not None and target["option"] == "--max-perplexity-increase":
        name = "increase of perplexity, 0.01 being 1 %"
    return loss_chart(
        rates.tolist(),
        curve.loss_at(rates).tolist(),
        [(t.rate_bits_per_weight, t.achieved) for t in curve.trials],
        (rate, achieved),
        target["asked"] if target else None,
        name,
    )
