"""The console command ``pml-distill``."""

import argparse
import contextlib
import errno
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

EPILOGS = {
    "train": "Interrupted, the same command continues; finished, it prints the result again. Under torchrun, "
    "`python -m pml_distill train` trains on several GPUs.",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = new_parser()
    options = vars(parser.parse_args(arguments))
    command, out = options.pop("command"), options.get("out")
    try:
        with processes(options):
            COMMANDS[command](options)
    except KeyboardInterrupt:
        print("\nInterrupted. The same command continues from here.", file=sys.stderr)
        return 130
    except Exception as error:
        message = explained(error, out)
        if message is None:
            raise
        print(f"pml-distill {command}: error: {message}", file=sys.stderr)
        return 2
    return 0


def new_parser() -> argparse.ArgumentParser:
    """Build the parser."""
    parser = argparse.ArgumentParser(prog="pml-distill", description="Distillation for pytorch-metric-learning.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, **more: Any) -> argparse.ArgumentParser:
        made = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".", **more)
        made.set_defaults(command=name)
        return made

    train = command("train", "teach a small network to retrieve like a large one", epilog=EPILOGS["train"])
    train.add_argument("images", help="a folder with a folder per class, a flat folder, or a CSV file")
    train.add_argument("--teacher", help="timm/NAME, torchvision/NAME, module:function, or the folder of a run")
    train.add_argument("--student", required=True, help="the same")
    train.add_argument("--out", default="run", help="folder of the run (default: run)")
    train.add_argument("--teacher-embeddings", metavar="FILE", help="vectors.npy in place of a teacher")
    train.add_argument("--losses", nargs="+", default=(), metavar="NAME[:WEIGHT]", help="to distil with")
    train.add_argument("--metric-loss", metavar="NAME", help="on the labels: multi_similarity or none")
    train.add_argument("--tune-teacher", type=int, metavar="EPOCHS", help="train the teacher on the labels first")
    train.add_argument("--views", type=int, help="augmented views of each image")
    train.add_argument("--width", type=int, help="of the embeddings")
    train.add_argument("--epochs", type=int)
    train.add_argument("--lr", type=float, help="highest learning rate")
    train.add_argument("--seed", type=int)
    train.add_argument("--baseline", action="store_true", help="also train the student without a teacher")
    train.add_argument("--bits", type=int, help="learn a binary code of this length")
    train.add_argument("--keep-flops", type=float, metavar="SHARE", help="shrink the student to this share of FLOPs")
    train.add_argument("--int8", action="store_true", help="also write a quantised ONNX file")
    train.add_argument("--teacher-weights", metavar="FILE", help="in place of the pretrained ones")
    train.add_argument("--student-weights", metavar="FILE", help="in place of the pretrained ones")

    test = command("test", "compare networks on images")
    test.add_argument("images", help="as for train; of a folder that a run was trained on, its test images")
    test.add_argument("--networks", nargs="+", required=True, help="names or folders of runs")

    embed = command("embed", "write the embeddings of images: vectors.npy, and their order in paths.csv")
    embed.add_argument("images", help="as for train")
    embed.add_argument("--network", required=True, help="a name or the folder of a run")
    embed.add_argument("--out", default="vectors", help="folder to write to (default: vectors)")

    demo = command(
        "demo",
        "distil a teacher into a small student with several losses, on images that are rendered on the spot",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--seeds", type=int, default=1, help="how many; from two on, standard errors are shown")
    demo.add_argument("--epochs", type=int, default=10, help="epochs of every network, the teacher's included")
    demo.add_argument("--device", help="where to train (the GPU, if there is one)")
    demo.add_argument("--out", type=Path, default=Path("pml_distill_demo"), help="folder of results, logs, pictures")
    demo.add_argument("--dataset", choices=("glyphs", "digits"), default="glyphs", help="data to train and test on")
    demo.add_argument("--losses", nargs="+", default=["core"], metavar="NAME", help="core (six losses), all, or names")

    for made in (test, embed):
        made.add_argument("--weights", metavar="FILE", help="in place of the pretrained ones")
    for made in (train, test, embed):
        made.add_argument("--device", help="where to run (default: the GPU, if there is one)")
        made.add_argument("--batch-size", type=int)
        made.add_argument("--workers", type=int, help="processes that read images")
        made.add_argument("--image-size", type=int, help="side of the images, in place of the networks' own")
        made.add_argument("--no-pretrained", dest="pretrained", action="store_false", help="start from random weights")
        made.add_argument("--skip-broken", action="store_true", help="leave out images that cannot be read")
    return parser


def run_train(options: dict[str, Any]) -> None:
    """Train, and print the table."""
    from .recipe import distill
    from .utils.report import write

    run = distill(**given(options))
    print_table(run.table)
    write(f"\nIn {run.out}: report.html, student.safetensors, student.onnx, config.json, results.csv.")


def run_test(options: dict[str, Any]) -> None:
    """Compare networks, and print the table."""
    from .recipe import test

    print_table(test(**given(options)))


def run_embed(options: dict[str, Any]) -> None:
    """Write embeddings."""
    from .recipe import embed

    vectors = embed(**given(options))
    print(f"{len(vectors):,} embeddings of {vectors.shape[1]} numbers are in {options['out']}/vectors.npy.")


def run_demo(options: dict[str, Any]) -> None:
    """Run the demo."""
    from .recipe.demo import run_demo

    run_demo(names=options.pop("losses"), **options)


COMMANDS = {"train": run_train, "test": run_test, "embed": run_embed, "demo": run_demo}


def given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that were given, so that what is not is left to the functions."""
    return {name: value for name, value in options.items() if value is not None}


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Print figures as a table, in the first process."""
    from .recipe.report import shown_table
    from .utils.report import format_table, write

    write(format_table(shown_table(rows)))


@contextlib.contextmanager
def processes(options: dict[str, Any]) -> Iterator[None]:
    """Join the processes that torchrun has started."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    import torch
    import torch.distributed.nn  # before there is a group, whose threads it would hold

    rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available() and options.get("device") != "cpu"
    if gpus:
        torch.cuda.set_device(rank)
        options["device"] = f"cuda:{rank}"
    torch.distributed.init_process_group("nccl" if gpus else "gloo")
    try:
        yield
        torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


def explained(error: Exception, out: Any) -> str | None:
    """Return what to tell the user of an error, None for one that is a fault of this program."""
    text = str(error)
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or "No space left" in text or "disk is full" in text or nearly_full(out):
        return f"The disk of {out} is full. Free some space and run the same command again; what is finished is kept."
    if isinstance(error, PermissionError):
        return f"{error.filename or out} may not be written or read. Give --out a folder of your own."
    if isinstance(error, OSError):
        return f"{error.filename or out}: {error.strerror or text}."
    return text if isinstance(error, (ValueError, ModuleNotFoundError)) else None


def nearly_full(out: Any) -> bool:
    """Whether there is less than a mebibyte left where the results go; not all libraries say so."""
    import shutil

    folder = Path(out or ".")
    return folder.exists() and shutil.disk_usage(folder).free < 2**20
