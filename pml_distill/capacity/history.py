"""The sizes of a shrinking network over the epochs, as tables and as a picture."""

import os
from typing import Any

from ..utils.report import format_table
from .export_meter import ExportMeter


def history_table(history: list[dict[str, Any]], meter: ExportMeter) -> str:
    """Return one line for each epoch, as Markdown."""
    channels = sum(sum(block.widths.values()) for block in meter.measure(0.0).blocks.values())
    return format_table(
        [
            {
                "epoch": str(row["epoch"]),
                "parameters": f"{row['parameters']:,}",
                "MFLOPs": f"{row['flops'] / 1e6:.1f}",
                "channels": f"{sum(widths_in(row).values())} of {channels}",
                "lasso weight": f"{row['lasso_weight']:.3g}",
            }
            for row in ended(history)
        ]
    )


def block_table(history: list[dict[str, Any]], meter: ExportMeter) -> str:
    """Return one line for each block after the last epoch, as Markdown."""
    whole, rows = meter.measure(0.0).blocks, []
    for name, block in ended(history)[-1]["blocks"].items():
        channels = ", ".join(f"{block['widths'][key]} of {all_}" for key, all_ in whole[name].widths.items())
        cost = {"parameters": f"{block['parameters']:,}", "MFLOPs": f"{block['flops'] / 1e6:.2f}"}
        rows.append({"block": name, "channels": channels, **cost})
    return format_table(rows)


def plot_history(history: list[dict[str, Any]], meter: ExportMeter, path: str | os.PathLike) -> None:
    """Draw the size of the network, and the width behind each compactor, over the epochs."""
    from matplotlib.figure import Figure

    whole = meter.measure(0.0)
    full = {name: width for block in whole.blocks.values() for name, width in block.widths.items()}
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    sizes, widths = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in ended(history)]
    for key in ("parameters", "flops"):
        sizes.plot(epochs, [100 * row[key] / getattr(whole, key) for row in history], label=key)
    sizes.set(xlabel="epoch", ylabel="% of the whole network", ylim=(0, 105))
    sizes.legend(frameon=False)
    shares = [[widths_in(row)[name] / width for row in history] for name, width in full.items()]
    extent = (0.5, len(epochs) + 0.5, len(full), 0)
    picture = widths.imshow(shares, aspect="auto", vmin=0, vmax=1, extent=extent)
    widths.set(xlabel="epoch", yticks=[i + 0.5 for i in range(len(full))], yticklabels=list(full))
    figure.colorbar(picture, ax=widths, label="share of channels left")
    figure.savefig(path, dpi=130)


def widths_in(row: dict[str, Any]) -> dict[str, int]:
    """Return the width behind each compactor in an entry of the history."""
    return {name: width for block in row["blocks"].values() for name, width in block["widths"].items()}


def ended(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the history, or raise ``ValueError`` if no epoch has ended."""
    if not history:
        raise ValueError("history is empty: no epoch has ended yet, see end_epoch and end_of_epoch_hook.")
    return history
