"""How many graphs `torch.compile(dynamic=True)` makes of each loss for twelve batch sizes.

    python benchmarks/compiled_graphs.py

prints a table: every loss on embeddings with its default distance, all pairs. Eight is where torch gives up and runs
the rest eagerly.
"""

import logging

import torch
from torch._dynamo.testing import CompileCounter
from tqdm import tqdm

from pml_distill import losses
from pml_distill.utils.report import format_table

SIZES = range(9, 21)
WIDTH = 16


def graphs(loss: torch.nn.Module) -> int:
    """Return the number of graphs."""
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(loss, backend=counter, dynamic=True)
    for size in SIZES:
        compiled(torch.randn(size, WIDTH, requires_grad=True), ref_emb=torch.randn(size, WIDTH))
    return counter.frame_count


def main() -> None:
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    rows = []
    for entry in tqdm([e for e in losses.catalogue() if e.family != "feature maps"]):
        arguments = (64, WIDTH) if "queue" in entry.needs else ()
        rows.append({"loss": entry.name, "graphs": str(graphs(getattr(losses, entry.name)(*arguments)))})
    print(format_table(rows))


if __name__ == "__main__":
    main()
