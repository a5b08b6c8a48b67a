"""Embeddings that were made elsewhere: from tensors and files, by row and by id, in trainers and as a cache."""

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from pml_distill.datasets import SeededViews
from pml_distill.losses import RelativeTeacherLoss
from pml_distill.teachers import CachedTeacher, EnsembleTeacher, StandardizedTeacher, TensorTeacher
from pml_distill.trainers import DistillationTrainer

TABLE = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))


def saved(folder, kind):
    """Write the table as a file of this kind and return its name."""
    path = str(folder / f"vectors.{kind}")
    if kind == "npy":
        np.save(path, TABLE.numpy())
    elif kind == "safetensors":
        from safetensors.torch import save_file

        save_file({"embeddings": TABLE}, path)
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table({"id": list(range(12)), "embedding": TABLE.tolist()}), path)
    return path


@pytest.mark.parametrize("kind", ["npy", "safetensors", "parquet"])
def test_files_are_read(tmp_path, kind):
    path, index = saved(tmp_path, kind), torch.tensor([3, 0, 3])
    assert torch.allclose(TensorTeacher(path)(torch.zeros(3), index).float(), TABLE[index])
    name = {"npy": "", "safetensors": ":embeddings", "parquet": ":embedding"}[kind]
    assert torch.allclose(TensorTeacher(f"{path}{name}")(torch.zeros(3), index).float(), TABLE[index])


def test_arrays_views_and_half_precision_are_served():
    index = torch.tensor([1, 14])
    views = torch.stack([TABLE, -TABLE]).half()
    assert torch.equal(TensorTeacher(views)(torch.zeros(2), index), torch.stack([TABLE[1], -TABLE[2]]).half())
    assert torch.equal(TensorTeacher(TABLE.numpy().astype(int))(torch.zeros(1), torch.tensor([2])), TABLE[2:3].int())
    assert TensorTeacher(TABLE.tolist())(None, torch.tensor([2])).shape == (1, 5)


def test_rows_are_found_by_ids():
    teacher = TensorTeacher(TABLE, ids=np.arange(12) * 10)
    assert torch.equal(teacher(torch.zeros(2), torch.tensor([110, 20])), TABLE[[11, 2]])
    teacher = TensorTeacher(TABLE, ids=[f"image{i}" for i in range(12)])
    assert torch.equal(teacher(torch.zeros(2), ["image3", "image1"]), TABLE[[3, 1]])


def test_it_teaches_in_a_trainer_and_in_other_teachers():
    data = [(torch.randn(4), i % 3, i) for i in range(12)]
    student = torch.nn.Linear(4, 4)
    teacher = EnsembleTeacher([TensorTeacher(TABLE), StandardizedTeacher(TensorTeacher(TABLE), 3)])
    teacher.teachers[1].fit(torch.utils.data.DataLoader(data, 6))
    trainer = DistillationTrainer(
        models={"trunk": student},
        optimizers={"trunk_optimizer": torch.optim.Adam(student.parameters())},
        batch_size=6,
        loss_funcs={"distillation_loss": RelativeTeacherLoss()},
        dataset=data,
        teacher=teacher,
        dataloader_num_workers=0,
        iterations_per_epoch=2,
    )
    trainer.train(1, 1)
    assert trainer.epoch_losses["distillation_loss"] > 0


@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_they_become_a_cache_in_one_call(tmp_path, dtype):
    TensorTeacher(TABLE, ids=[f"image{i}" for i in range(12)]).write(tmp_path / "cache", dtype)
    stored = np.load(tmp_path / "cache" / "embeddings.npy", mmap_mode="r")
    assert np.allclose(stored[0], TABLE, atol=1e-2)
    dataset = SeededViews([(torch.randn(4), 0) for _ in range(3)], views=2, ids=["image3", "image11", "image0"])
    cached = CachedTeacher(tmp_path / "cache", dataset)
    expected = TABLE[[3, 11, 0]].to(dtype or torch.float32)
    # Vectors of one view serve all views.
    assert torch.equal(cached(torch.zeros(6, 4), torch.arange(6)), expected.repeat(2, 1))
    cached.check_dataset(dataset)
    with pytest.raises(ValueError, match="holds a teacher cache already"):
        TensorTeacher(TABLE).write(tmp_path / "cache")
    unknown = SeededViews([(torch.randn(4), 0)] * 2, ids=["image3", "image77"])
    with pytest.raises(ValueError, match="incomplete: 1 of 2 rows are written.*such as image77"):
        CachedTeacher(tmp_path / "cache", unknown)


def test_rows_without_ids_are_those_of_the_whole_dataset(tmp_path):
    TensorTeacher(TABLE).write(tmp_path)
    data = [(torch.randn(4), 0) for _ in range(12)]
    part = SeededViews(Subset(data, [7, 2]))
    assert torch.equal(CachedTeacher(tmp_path, part)(torch.zeros(2, 4), torch.arange(2)), TABLE[[7, 2]])
    assert torch.equal(CachedTeacher(tmp_path)(torch.zeros(2, 4), torch.tensor([7, 2])), TABLE[[7, 2]])


def test_imported_and_computed_rows_of_other_widths_do_not_mix(tmp_path):
    TensorTeacher(TABLE).write(tmp_path / "one")
    TensorTeacher(TABLE[:, :3]).write(tmp_path / "two")
    with pytest.raises(ValueError, match="All folders must hold the same outputs.*'embeddings': 5.*'embeddings': 3"):
        CachedTeacher([tmp_path / "one", tmp_path / "two"], SeededViews([(torch.zeros(1), 0)] * 12))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TensorTeacher(torch.ones(4)), r"embeddings must be \(N, Dt\) or \(views, N, Dt\), but are \(4,\)"),
        (lambda: TensorTeacher(torch.tensor([[1.0], [torch.nan]])), "NaN or infinite in row 1"),
        (lambda: TensorTeacher(TABLE, ids=range(3)), "ids must be 12, .* but are 3 with 3"),
        (lambda: TensorTeacher(TABLE, ids=[0] * 12), "ids must be 12, .* but are 12 with 1"),
        (lambda: TensorTeacher(TABLE, ids=range(12))(torch.zeros(1), torch.tensor([99])), r"index has the ids \[99\]"),
        (lambda: TensorTeacher(TABLE)(torch.zeros(1)), "needs the index of each sample"),
        (lambda: TensorTeacher("nothing.npz"), "must be a .npy, .safetensors or .parquet file that exists"),
    ],
)
def test_wrong_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_files_with_several_tensors_or_widths_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": TABLE, "b": TABLE.clone()}, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match=r"holds \['a', 'b'\]; name one of them"):
        TensorTeacher(tmp_path / "two.safetensors")
    assert TensorTeacher(f"{tmp_path}/two.safetensors:b").table.shape == (1, 12, 5)
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table({"v": [[1.0, 2.0], [1.0]]}), tmp_path / "uneven.parquet")
    with pytest.raises(ValueError, match=r"have the widths \[1, 2\]; all must be alike"):
        TensorTeacher(tmp_path / "uneven.parquet")


def test_an_index_out_of_range_is_refused():
    with pytest.raises(IndexError, match="index must be from 0 to 11"):
        TensorTeacher(TABLE)(torch.zeros(1), torch.tensor([12]))
