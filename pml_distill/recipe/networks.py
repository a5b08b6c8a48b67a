"""The student of a run, new or finished."""

import json
import os
from pathlib import Path
from typing import Any

from torch import nn

from ..capacity import load_compact
from ..models import EmbeddingNetwork, HashHead, NamedNetwork, Preprocessing, network_by_name

CONFIG, STUDENT = "config.json", "student.safetensors"


def build_student(named: NamedNetwork, width: int, bits: int | None = None) -> EmbeddingNetwork:
    """Return a network with a new embedder, or a head of so many bits."""
    head = nn.Linear(named.width, width) if bits is None else HashHead(named.width, bits)
    return EmbeddingNetwork(named.network, head, normalize=bits is None)


def load_student(folder: str | os.PathLike, network: nn.Module | None = None) -> Any:
    """Return the student of a finished run, in eval mode: images in, embeddings out.

    Args:
        folder: of the run.
        network: the student's architecture, if a network was given for it in place of a name.

    Returns:
        An ``EmbeddingNetwork`` with an attribute ``preprocessing``, from a Pillow image to what it takes.

    Raises:
        ValueError: the folder holds no finished run, or its student has no name and ``network`` is missing.
    """
    path = Path(folder) / CONFIG
    if not path.is_file():
        raise ValueError(f"{folder} holds no finished run: there is no {CONFIG}. Run pml-distill train to its end.")
    config = json.loads(path.read_text(encoding="utf-8"))
    known = config["student"]
    if network is None and known["network"] is None:
        raise ValueError(f"The student of {folder} was given as a network; call load_student(folder, network).")
    named = network_by_name(network or known["network"], pretrained=False, image_size=known["image_size"])
    student: Any = load_compact(Path(folder) / STUDENT, build_student(named, known["width"], known["bits"]))
    student.preprocessing = Preprocessing.of(config["preprocessing"])
    return student


def find_network(name: str | nn.Module, **options: Any) -> NamedNetwork:
    """Return the student of a run if this is a folder, otherwise what ``network_by_name`` returns."""
    if not isinstance(name, str) or not Path(name).is_dir():
        return network_by_name(name, **options)
    student = load_student(name)
    width = student.embedder.out_features
    return NamedNetwork(str(name), student, student.preprocessing, width)
