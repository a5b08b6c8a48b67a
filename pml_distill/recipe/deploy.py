"""The files that leave a run: each is run on test images and compared with the student before the run is finished."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset

from ..capacity import load_compact, save_compact
from ..evaluation import neighbor_agreement
from ..utils.files import whole_file
from .networks import STUDENT
from .views import loader_of

ONNX, INT8 = "student.onnx", "student.int8.onnx"
#: How many test images are compared, and how many training images calibrate the quantisation.
COMPARED, CALIBRATED, BATCH = 256, 128, 32
#: The largest difference of a number of an embedding of length 1, and the least share of common neighbours.
TOLERANCE, LEAST_COMMON, LEAST_COMMON_INT8 = 1e-3, 0.98, 0.6


def write_files(
    folder: Path,
    student: nn.Module,
    again: nn.Module,
    shape: tuple[int, ...],
    tested: Dataset,
    calibration: Dataset | None,
) -> dict[str, Any]:
    """Write ``student.safetensors``, ``student.onnx`` and, quantised, ``student.int8.onnx``, and try each.

    Args:
        folder: to write to.
        student: in eval mode.
        again: a new network like the student, to load the weights into.
        shape: (C, H, W) of the images.
        tested: (image, label) of the images to compare on.
        calibration: of the images to measure ranges on; None for no quantised file.

    Returns:
        For each file the number of ``images``, the largest ``difference`` and the share of ``common_neighbors``.

    Raises:
        ValueError: a file disagrees with the student; the file is removed.
    """
    student = student.cpu().to(memory_format=torch.contiguous_format).eval()
    save_compact(student, folder / STUDENT)
    write_onnx(folder, student, shape)
    if calibration is not None:
        write_int8(folder, calibration)
    images = list(batches(tested, COMPARED))
    with torch.no_grad():
        wanted = torch.cat([student(batch) for batch in images])
        loaded = load_compact(folder / STUDENT, again)
        found = {STUDENT: torch.cat([loaded(batch) for batch in images])}
    for name in (ONNX,) if calibration is None else (ONNX, INT8):
        found[name] = run_onnx(folder / name, images)
    return {name: compared(folder / name, outputs, wanted) for name, outputs in found.items()}


def compared(path: Path, outputs: torch.Tensor, wanted: torch.Tensor) -> dict[str, Any]:
    """Return how far outputs differ from those wanted; ``ValueError`` if too far."""
    difference = float((outputs - wanted).abs().max() / wanted.abs().max().clamp(min=1))
    common = neighbor_agreement(outputs, wanted, min(10, len(wanted) - 1))
    exact = path.name != INT8
    if not common >= (LEAST_COMMON if exact else LEAST_COMMON_INT8) or (exact and not difference <= TOLERANCE):
        path.unlink()
        advice = "Please report this network." if exact else "Run without --int8, or quantise the student yourself."
        raise ValueError(
            f"{path.name} disagrees with the student (largest difference {difference:.2g}, {common:.0%} of the "
            f"neighbours in common) and is removed. {advice}"
        )
    return {"images": len(wanted), "difference": difference, "common_neighbors": common}


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Keep warnings, and what these loggers say below an error, from the user for a while."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels):
            logger.setLevel(level)


def write_onnx(folder: Path, student: nn.Module, shape: tuple[int, ...]) -> None:
    """Write ``student.onnx``, images (batch, C, H, W) to embeddings, for batches of any size."""
    with quiet("torch.onnx", "onnxscript", "onnx_ir"), whole_file(folder / ONNX) as unfinished:
        program: Any = torch.onnx.export(
            student,
            (torch.zeros(2, *shape),),
            input_names=["images"],
            output_names=["embeddings"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=1 << 20)},),
            dynamo=True,
            verbose=False,
        )
        program.save(str(unfinished), external_data=False)


class Calibration:
    """Training images, batch by batch, as onnxruntime asks for them."""

    def __init__(self, images: Dataset):
        self.batches = batches(images, CALIBRATED)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next batch, None at the end."""
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch.numpy()}


def write_int8(folder: Path, images: Dataset) -> None:
    """Write ``student.int8.onnx``: weights and activations of 8 bits, their ranges measured on training images."""
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = folder / "prepared.onnx.tmp"
    try:
        # onnxruntime's quantisation logs by the root logger.
        with quiet("root"), whole_file(folder / INT8) as unfinished:
            quant_pre_process(str(folder / ONNX), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(unfinished),
                Calibration(images),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                calibrate_method=CalibrationMethod.MinMax,
            )
    finally:
        prepared.unlink(missing_ok=True)


def run_onnx(path: Path, tested: list[torch.Tensor]) -> torch.Tensor:
    """Return what onnxruntime makes of batches of images."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    # The last image alone too: a batch of any size must do.
    parts = [*tested[:-1], tested[-1][:-1], tested[-1][-1:]]
    outputs = [session.run(None, {"images": part.numpy()})[0] for part in parts if len(part)]
    return torch.from_numpy(np.concatenate(outputs))


def batches(images: Dataset, most: int) -> Iterator[torch.Tensor]:
    """Yield batches of up to so many images, spread over the dataset."""
    size: int = len(images)  # type: ignore[arg-type]
    rows = torch.linspace(0, size - 1, min(most, size)).round().long().tolist()
    for batch in loader_of(torch.utils.data.Subset(images, rows), BATCH, 0):
        yield batch[0]
