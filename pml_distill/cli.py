"""The console command ``pml-distill``."""

import argparse
import contextlib
import errno
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = vars(new_parser().parse_args(arguments))
    command, out = options.pop("command"), options.get("out")
    try:
        with processes(options):
            COMMANDS[command]({name: value for name, value in options.items() if value is not None})
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
    from .recipe.settings import Settings

    parser = argparse.ArgumentParser(prog="pml-distill", description="Distillation for pytorch-metric-learning.")
    commands = parser.add_subparsers(dest="command", required=True)
    made = {name: commands.add_parser(name, help=text, description=text) for name, text in HELP.items()}
    train, test, embed, demo = made.values()
    train.epilog = (
        "Interrupted, the same command continues; finished, it prints the result again. "
        "torchrun --nproc-per-node N -m pml_distill train ... trains on several GPUs."
    )
    for command in (train, test, embed):
        command.add_argument(
            "images", help="a folder with a folder per class, a flat folder, or a CSV: path,label,split"
        )
    texts = dict(re.findall(r"^ {8}(\w+): (.*)", Settings.__doc__ or "", re.M))
    shared = ("batch_size", "image_size", "skip_broken")
    for field in fields(Settings):
        flag, text, kind = "--" + field.name.replace("_", "-"), texts[field.name], str(field.type)
        if field.name == "pretrained":
            continue
        for command in (train, test, embed) if field.name in shared else (train,):
            if isinstance(field.default, bool):
                command.add_argument(flag, action="store_true", help=text)
            elif field.name == "losses":
                command.add_argument(flag, nargs="+", default=(), metavar="NAME", help=text)
            else:
                value = int if "int" in kind else float if "float" in kind else str
                command.add_argument(flag, type=value, help=text, required=field.name == "student")
    test.add_argument("--networks", nargs="+", required=True, help="names or folders of runs")
    embed.add_argument("--network", required=True, help="a name or the folder of a run")
    for command, default in ((train, "run"), (embed, "vectors"), (demo, "pml_distill_demo")):
        command.add_argument("--out", type=Path, default=Path(default), help=f"folder to write to ({default})")
    for command in (test, embed):
        command.add_argument("--weights", help="file of weights in place of the pretrained ones")
    for command in (train, test, embed):
        command.add_argument("--workers", type=int, help="processes that read images")
        command.add_argument(
            "--no-pretrained", dest="pretrained", action="store_false", help="start from random weights"
        )
    for command in made.values():
        command.add_argument("--device", help="where to run (the GPU, if there is one)")
    demo.add_argument("--seeds", type=int, default=1, help="how many; from two on, standard errors are shown (1)")
    demo.add_argument("--epochs", type=int, default=10, help="of every network, the teacher's included (10)")
    demo.add_argument("--dataset", choices=("glyphs", "digits"), default="glyphs", help="images (glyphs)")
    demo.add_argument("--losses", nargs="+", default=["core"], metavar="NAME", help="core (six losses), all, or names")
    return parser


HELP = {
    "train": "teach a small network to retrieve like a large one, test it, and write the files to deploy it",
    "test": "compare networks on images; of a folder that a run was trained on, on its test images",
    "embed": "write the embeddings of images, vectors.npy, and their order, paths.csv",
    "demo": "distil with several losses on images that are rendered on the spot, and compare them",
}


def run_train(options: dict[str, Any]) -> None:
    """Train, and print the table."""
    from .recipe import distill
    from .recipe.report import text_table
    from .utils.report import write

    run = distill(**options)
    write(text_table(run.table))
    write(f"\nIn {run.out}: report.html, student.safetensors, student.onnx, config.json, results.csv.")


def run_test(options: dict[str, Any]) -> None:
    """Compare networks, and print the table."""
    from .recipe import test
    from .recipe.report import text_table

    print(text_table(test(**options)))


def run_embed(options: dict[str, Any]) -> None:
    """Write embeddings."""
    from .recipe import embed

    vectors = embed(**options)
    print(f"{len(vectors):,} embeddings of {vectors.shape[1]} numbers are in {options['out'] / 'vectors.npy'}.")


def run_demo(options: dict[str, Any]) -> None:
    """Run the demo."""
    from .recipe.demo import run_demo

    run_demo(**options)


COMMANDS = {"train": run_train, "test": run_test, "embed": run_embed, "demo": run_demo}


@contextlib.contextmanager
def processes(options: dict[str, Any]) -> Iterator[None]:
    """Join the processes that torchrun has started."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    import torch
    import torch.distributed.nn  # before there is a group, whose threads it would hold

    rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.is_available() and options["device"] != "cpu"
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
    # Not all libraries pass the number of the error on.
    full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if full or re.search("No space left|disk is full|file write failed|PytorchStreamWriter", text):
        return f"The disk of {out} is full. Free some space and run the same command again; what is finished is kept."
    if isinstance(error, PermissionError):
        return f"{error.filename or out} may not be written or read. Give --out a folder of your own."
    if isinstance(error, OSError):
        return f"{error.filename or out}: {error.strerror or text}."
    return text if isinstance(error, (ValueError, ModuleNotFoundError)) else None
