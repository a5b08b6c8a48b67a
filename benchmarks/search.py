"""What quantised copies of embeddings keep of an exact search, in which memory and time, beside faiss's own indices.

    python benchmarks/search.py --out search

embeds nothing: it draws clustered embeddings of length 1, searches the ten nearest of some queries, and writes
search.csv and search.md into the folder. search_memory.csv has the peak memory of the mean average precision over a
database of packed codes, beyond these. If sentence-transformers is installed, its search with rescoring runs on the
same vectors.
"""

import argparse
import csv
import resource
import time
from pathlib import Path

import faiss
import numpy as np
import torch

from pml_distill.evaluation import HashAccuracyCalculator, QuantizedKNN, pack_codes

K = 10


def clustered(size: int, queries: int, width: int, per_cluster: int, spread: float, seed: int = 0) -> tuple:
    """Return queries and a database of unit rows around random centers, ``per_cluster`` to each on average."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.randn(max(1, size // per_cluster), width, generator=generator)
    rows = torch.empty(size + queries, width)
    for part in rows.split(50_000):
        chosen = torch.randint(len(centers), (len(part),), generator=generator)
        part.copy_(centers[chosen] + spread * torch.randn(len(part), width, generator=generator))
        part /= part.norm(dim=1, keepdim=True)
    return rows[:queries], rows[queries:]


def recall(found: np.ndarray, exact: np.ndarray) -> float:
    """Return the share of the exact neighbours that were found."""
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found.tolist(), exact.tolist())]))


def timed(searches: list, repeats: int) -> tuple[list, list[float]]:
    """Return what each search finds and its least time in seconds; they take turns, since machines are shared."""
    found, times = [None] * len(searches), [float("inf")] * len(searches)
    for _ in range(repeats):
        for place, search in enumerate(searches):
            start = time.perf_counter()
            found[place] = search()
            times[place] = min(times[place], time.perf_counter() - start)
    return found, times


def measure(args: argparse.Namespace) -> list[dict]:
    """Search one database in each way."""
    query, database = clustered(args.size, args.queries, args.width, args.per_cluster, args.spread)
    exact = faiss.knn(query.numpy(), database.numpy(), K)[1]
    rows: list[dict] = []

    def record(name: str, search, bytes_per_vector: float, rival=None) -> None:
        found, seconds = timed([search] if rival is None else [search, rival], args.repeats)
        rows.append(
            {
                "search": name,
                "recall_at_10": round(recall(np.asarray(found[0]), exact), 4),
                "bytes_per_vector": round(bytes_per_vector, 1),
                "ms_per_query": round(1000 * seconds[0] / len(query), 3),
                "ratio_to_faiss": "" if rival is None else round(seconds[0] / seconds[1], 2),
            }
        )
        print(rows[-1], flush=True)

    def built(bits: int, factor: int, source: str) -> QuantizedKNN:
        knn = QuantizedKNN(bits, factor, source)
        knn.calibrate(database)
        for part in database.split(50_000):
            knn.add(part)
        knn.originals = database if source == "float" else None
        return knn

    scalar = faiss.IndexScalarQuantizer(args.width, faiss.ScalarQuantizer.QT_8bit)
    scalar.train(database[:100_000].numpy())
    scalar.add(database.numpy())

    def by_scalar() -> np.ndarray:
        return scalar.search(query.numpy(), K)[1]

    record("faiss IndexScalarQuantizer", by_scalar, args.width)
    for source in ("int8", "float"):
        knn = built(8, args.rescore, source)
        record(f"QuantizedKNN(8), {source}", lambda knn=knn: knn(query, K)[1], knn.memory / len(knn), by_scalar)
    scalar.reset()

    means = database[:100_000].mean(dim=0)
    binary = faiss.IndexBinaryFlat(args.width)
    for part in database.split(50_000):
        binary.add(pack_codes(part - means).numpy())
    asked = pack_codes(query - means).numpy()
    record("faiss IndexBinaryFlat", lambda: binary.search(asked, K)[1], args.width / 8)
    for factor in args.rescore_bits:
        for source in ("bits", "int8", "float"):
            knn = built(1, factor, source)
            name = f"QuantizedKNN(1), rescore={factor}, {source}"

            def by_binary(factor: int = factor) -> np.ndarray:
                return binary.search(asked, factor * K)[1]

            record(name, lambda knn=knn: knn(query, K)[1], knn.memory / len(knn), by_binary)
    try:
        from sentence_transformers.quantization import quantize_embeddings, semantic_search_faiss
    except ImportError:
        print("sentence-transformers is not installed: its search was not measured.")
        return rows
    stored = quantize_embeddings(database.numpy(), "ubinary")
    for factor in args.rescore_bits:

        def theirs(factor: int = factor) -> np.ndarray:
            found, _ = semantic_search_faiss(
                query.numpy(), corpus_embeddings=stored, corpus_precision="ubinary", top_k=K, rescore_multiplier=factor
            )
            return np.array([[hit["corpus_id"] for hit in hits] for hits in found])

        record(f"sentence-transformers, ubinary, rescore={factor}", theirs, args.width / 8)
    return rows


def hashing_memory(size: int, queries: int, bits: int) -> dict:
    """Return the peak memory beyond the packed codes, of the mean average precision over a database of them."""
    random = np.random.default_rng(0)
    packed = random.integers(256, size=(size, bits // 8), dtype=np.uint8)
    labels = torch.from_numpy(random.integers(100, size=size))
    query, query_labels = torch.randn(queries, bits), torch.arange(queries) % 100
    calculator = HashAccuracyCalculator(include=("mean_average_precision",), device=torch.device("cpu"))
    calculator.get_accuracy(query[:2], query_labels[:2], packed[:1000], labels[:1000])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    calculator.get_accuracy(query, query_labels, packed, labels)
    seconds = time.perf_counter() - start
    extra = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"mAP over {size:,} codes of {bits} bits, {queries} queries: {extra:.0f} MB more than before, {seconds:.1f} s"
    )
    return {"codes": size, "bits": bits, "queries": queries, "extra_mb": round(extra), "seconds": round(seconds, 1)}


def write(path: Path, rows: list[dict]) -> None:
    """Write rows of figures."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="search", type=Path)
    parser.add_argument("--size", default=1_000_000, type=int)
    parser.add_argument("--width", default=256, type=int)
    parser.add_argument("--queries", default=100, type=int)
    parser.add_argument("--per-cluster", default=100, type=int)
    parser.add_argument(
        "--spread", default=0.6, type=float, help="noise around a center, whose values have deviation 1"
    )
    parser.add_argument("--rescore", default=4, type=int)
    parser.add_argument("--rescore-bits", default=[4, 16], type=int, nargs="+")
    parser.add_argument("--repeats", default=2, type=int)
    parser.add_argument("--codes", default=5_000_000, type=int)
    args = parser.parse_args()
    # First, since the peak of a process only grows.
    memory = hashing_memory(args.codes, 100, 64)
    rows = measure(args)
    args.out.mkdir(parents=True, exist_ok=True)
    write(args.out / "search_memory.csv", [memory])
    write(args.out / "search.csv", rows)
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    lines += ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
    (args.out / "search.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
