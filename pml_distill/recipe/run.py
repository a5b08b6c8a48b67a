"""What people call: a whole run in a folder that one configuration owns, networks compared, images embedded."""

import csv
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..evaluation import neighbor_agreement
from ..utils.distributed import in_first_process
from ..utils.files import whole_file, write_json
from . import deploy, report
from .images import ImageSet, find_images
from .job import Job
from .networks import CONFIG, build_student, find_network, load_student
from .settings import Settings
from .training import Machine
from .views import SharedViews

CLAIM, REPORT = "settings.json", "report.html"
EXTRA = (
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "record_keeper",
    "safetensors",
    "tensorboard",
    "torchvision",
)


class Run(NamedTuple):
    """A finished run: its folder, the student, the rows of the table, what was noted, and the path of the report."""

    out: Path
    student: Any
    table: list[dict[str, Any]]
    notes: list[str]
    report: Path


def distill(
    images: Any,
    teacher: str | nn.Module | None = None,
    student: str | nn.Module | None = None,
    out: str | os.PathLike = "run",
    device: str | torch.device | None = None,
    workers: int | None = None,
    augmentation: Callable[[Any], Any] | None = None,
    **options: Any,
) -> Run:
    """Teach a small network to retrieve like a large one, test it, and write the files to deploy it.

    What the teacher returns for a few augmented views of each image is stored, centred, rotated and whitened; the
    rotation is tuned on the labels, if there are any. The student learns from that and from the labels, with the weight
    that is best on the validation images. Called again after an interruption, it continues; after the end, it loads
    the result.

    Args:
        images: see ``find_images``.
        teacher: the large network or its name, see ``find_network``; None with ``teacher_embeddings``.
        student: the small one.
        out: folder of the run.
        device: where to train; None: the GPU, if there is one.
        workers: processes that read images; None: by the number of cores.
        augmentation: from an image to a random view of it, in place of crops, mirroring and jittered colours.
        **options: see ``Settings``. ``teacher_embeddings`` may also be an array (N, D).

    Raises:
        ValueError: images, names or options cannot serve, or ``out`` holds something else.
        ModuleNotFoundError: the extra ``train`` is not installed.
        OSError: the disk is full, or ``out`` may not be written to.
    """
    require_extra()
    if student is None:
        raise ValueError("Give a student (--student), such as timm/mobilenetv4_conv_small.e2400_r224_in1k.")
    vectors: Any = options.get("teacher_embeddings")
    if vectors is not None and not isinstance(vectors, (str, os.PathLike)):
        vectors = torch.as_tensor(vectors, dtype=torch.float32)
        options["teacher_embeddings"] = str(tuple(vectors.shape))
    options["losses"] = tuple(options.get("losses") or ())
    options |= {key: str(value) for key, value in options.items() if isinstance(value, os.PathLike)}
    settings = Settings(name_of(teacher), str(name_of(student)), **options)
    machine = new_machine(device, workers, settings.batch_size)
    out, found = Path(out), find_images(images, settings.skip_broken)
    if isinstance(vectors, torch.Tensor) and (vectors.ndim != 2 or len(vectors) != len(found.all)):
        raise ValueError(f"teacher_embeddings must be ({len(found.all)}, D), but are {tuple(vectors.shape)}.")
    source = vectors if teacher is None and isinstance(vectors, torch.Tensor) else teacher
    job = Job(out, settings, machine, found, source, student, augmentation)
    claim(out, settings.to_dict() | {"images": found.digest, "augmentation": repr(augmentation)})
    given = student if isinstance(student, nn.Module) else None
    if not (out / CONFIG).exists():
        job.note(str(found))
        job.teach()
        networks, best = job.students()
        in_first_process(lambda: finish(job, networks, best, given is None))
    config = json.loads((out / CONFIG).read_text(encoding="utf-8"))
    return Run(out, load_student(out, given), config["table"], config["notes"], out / REPORT)


def claim(out: Path, ours: dict[str, Any]) -> None:
    """Write a configuration into a folder, or check that it is the one there."""

    def in_one_process() -> None:
        if out.exists() and not out.is_dir():
            raise ValueError(f"{out} is a file; give --out the name of a folder.")
        path, new = out / CLAIM, not out.exists()
        # Looked for before the configuration: another process may claim the folder meanwhile.
        others = not new and any(not other.name.startswith(CLAIM) for other in out.iterdir())
        if not path.exists():
            if others:
                raise ValueError(f"The folder {out} is not empty and holds no run; give --out another name.")
            try:
                write_json(path, ours)
            except OSError:
                if new and out.exists():
                    out.rmdir()
                raise
        theirs = json.loads(path.read_text(encoding="utf-8"))
        differing = [f"{key} {theirs.get(key)!r}, not {ours[key]!r}" for key in ours if theirs.get(key) != ours[key]]
        if differing:
            raise ValueError(
                f"The folder {out} holds a run with {'; '.join(differing)}. Give --out another name, or the same "
                "options."
            )

    in_first_process(in_one_process)


def finish(job: Job, networks: dict[str, Any], best: str, has_name: bool) -> None:
    """Write the files and try them, test all networks, write the report; the configuration comes last."""
    out, settings, sees, test = job.out, job.settings, job.student.preprocessing, job.images["test"]
    tested = SharedViews(test, None, sees, None)
    calibration = SharedViews(job.images["train"], None, sees, None) if settings.int8 else None
    again = build_student(job.student, job.width, settings.bits)
    files = deploy.write_files(out, networks[best], again, sees.image_shape, tested, calibration)
    for name, result in files.items():
        job.notes.append(
            f"{name} was run on {result['images']} test images: largest difference from the student "
            f"{result['difference']:.1g}, {result['common_neighbors']:.1%} of the nearest neighbours in common."
        )
    own, gallery = job.teaching.outputs(test), job.teaching.embeddings(test)
    spaces = {"teacher": own}
    rows: list[dict[str, Any]] = [{"network": "teacher"} | report.accuracy(own, test.labels)]
    rows[0] |= report.beside_teacher(gallery, gallery, test.labels)
    if not isinstance(job.teacher, torch.Tensor):
        rows[0] |= report.cost(job.teacher.network.to(job.machine.device), job.teacher.preprocessing.image_shape)
    for name, network in networks.items():
        found = spaces[name] = job.machine.embed(network, tested)
        figures = report.accuracy(found, test.labels) | report.beside_teacher(found, gallery, test.labels)
        rows.append({"network": name} | figures | report.cost(network, sees.image_shape))
    report.write_csv(out / "results.csv", rows)
    pictures = report.draw(out, job.curves, test, spaces)
    title = f"{settings.student} taught by {settings.teacher or settings.teacher_embeddings}"
    report.write_page(out / REPORT, title, job.notes, rows, pictures, settings.to_dict())
    student = {"network": settings.student if has_name else None, "image_size": settings.image_size}
    versions = {name: version(name) for name in ("torch", "torchvision", "onnxruntime")}
    provenance = {"settings": settings.to_dict(), "images": job.images.digest, "files": files, "versions": versions}
    config = {
        "student": student | {"width": job.width, "bits": settings.bits},
        "preprocessing": sees.to_dict(),
        "provenance": provenance,
        "notes": job.notes,
        "table": rows,
    }
    write_json(out / CONFIG, config)


def test(
    images: Any,
    networks: Sequence[str | nn.Module],
    device: str | torch.device | None = None,
    workers: int | None = None,
    batch_size: int = 64,
    skip_broken: bool = False,
    **options: Any,
) -> list[dict[str, Any]]:
    """Compare networks on images: retrieval where there are labels, and how far they agree with the first.

    Args:
        images: see ``find_images``. Of a folder that one of the networks was trained on, the part to test on; of
            others all, or what is given as ``test``.
        networks: names, run folders or networks.
        device: where to run; None: the GPU, if there is one.
        workers: processes that read images; None: by the number of cores.
        batch_size: images at a time.
        skip_broken: leave out images that cannot be read.
        **options: of ``network_by_name``.

    Returns:
        A row for each network.
    """
    require_extra()
    machine = new_machine(device, workers, batch_size)
    loaded = [find_network(network, **options) for network in networks]
    tested = part_to_test(images, networks, skip_broken)
    rows: list[dict[str, Any]] = []
    first = None
    for named in loaded:
        found = machine.embed(named.network, SharedViews(tested, None, named.preprocessing, None), named.name)
        first = found if first is None else first
        figures = {"agreement": neighbor_agreement(found, first, min(10, len(found) - 1))}
        figures |= report.accuracy(found, tested.labels) | report.cost(named.network, named.preprocessing.image_shape)
        rows.append({"network": named.name} | figures)
    return rows


def part_to_test(images: Any, networks: Sequence[str | nn.Module], skip_broken: bool) -> ImageSet:
    """Return the test images of a folder that a run among the networks was trained on, else all."""
    configs = [Path(network) / CONFIG for network in networks if isinstance(network, str)]
    digests = {
        json.loads(path.read_text(encoding="utf-8"))["provenance"]["images"] for path in configs if path.is_file()
    }
    if digests:
        try:
            divided = find_images(images, skip_broken)
        except ValueError:
            divided = None  # what cannot be divided did not train
        if divided is not None and divided.digest in digests:
            return divided["test"]
    return find_images(images, skip_broken, divide=False)["test"]


def embed(
    images: Any,
    network: str | nn.Module,
    out: str | os.PathLike,
    device: str | torch.device | None = None,
    workers: int | None = None,
    batch_size: int = 64,
    skip_broken: bool = False,
    **options: Any,
) -> np.ndarray:
    """Write the embeddings of all images, ``vectors.npy``, and in ``paths.csv`` which row is which image.

    Args:
        images: see ``find_images``.
        network: a name, a run folder or a network.
        out: folder to write to.
        device: where to run; None: the GPU, if there is one.
        workers: processes that read images; None: by the number of cores.
        batch_size: images at a time.
        skip_broken: leave out images that cannot be read.
        **options: of ``network_by_name``.

    Returns:
        The embeddings, (N, D) float32.
    """
    require_extra()
    out, names = Path(out), {"vectors.npy", "paths.csv"}
    if out.exists() and (not out.is_dir() or {path.name for path in out.iterdir()} - names):
        raise ValueError(f"{out} holds other things than embeddings; give --out another name.")
    machine = new_machine(device, workers, batch_size)
    named = find_network(network, **options)
    found = find_images(images, skip_broken, divide=False).all
    vectors = machine.embed(named.network, SharedViews(found, None, named.preprocessing, None), named.name).numpy()
    out.mkdir(parents=True, exist_ok=True)
    with whole_file(out / "vectors.npy") as unfinished, open(unfinished, "wb") as file:
        np.save(file, vectors)
    with whole_file(out / "paths.csv") as unfinished, open(unfinished, "w", newline="", encoding="utf-8") as table:
        csv.writer(table).writerows([["path"], *([name] for name in found.names)])
    return vectors


def new_machine(device: str | torch.device | None, workers: int | None, batch_size: int) -> Machine:
    """Return where to run; ``ValueError`` for a device that is not there."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        usable = torch.zeros(0, device=device).device
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"--device {device} cannot be used: {str(error).splitlines()[0]}") from error
    for name, value, least in (("workers", workers, 0), ("batch-size", batch_size, 1)):
        if value is not None and value < least:
            raise ValueError(f"--{name} must be at least {least}, but is {value}.")
    return Machine(usable, min(8, (os.cpu_count() or 1) // 2) if workers is None else workers, batch_size)


def name_of(network: str | nn.Module | None) -> str | None:
    """Return what a network is called in the settings."""
    named = network is None or isinstance(network, str)
    return network if named else f"{type(network).__module__}:{type(network).__qualname__}"  # type: ignore[return-value]


def require_extra() -> None:
    """Raise an error that names the extra if something of it is missing."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(f'{", ".join(missing)} missing. Install them: pip install "pml-distill[train]"')
