"""Caches and teachers in the loops and with the data of other libraries, a few lines each."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Subset

from pml_distill.datasets import SeededViews
from pml_distill.losses import MultipleDistillationLosses, RelativeTeacherLoss, RKDLoss
from pml_distill.teachers import CachedTeacher, EMATeacher, EnsembleTeacher, FrozenTeacher, TeacherCache


def flat(size, width, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(size, width))


def test_rows_of_hugging_face_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    values = {"pixel_values": torch.randn(20, 3, 4, 4).tolist(), "label": [i % 4 for i in range(20)]}
    rows = datasets.Dataset.from_dict(values).with_format("torch")
    dataset, teacher = SeededViews(rows), FrozenTeacher(flat(48, 5))
    assert list(dataset.labels) == values["label"]
    TeacherCache(tmp_path, teacher, dataset).write()
    images, labels, index = next(iter(DataLoader(dataset, 6)))
    assert labels.tolist() == [0, 1, 2, 3, 0, 1]
    assert torch.allclose(CachedTeacher(tmp_path, dataset, teacher)(images, index), teacher(images), atol=1e-5)


def test_a_subset_of_an_image_folder(tmp_path):
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    for number in range(12):
        path = tmp_path / "images" / f"class{number % 3}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.RandomState(number).randint(0, 256, (4, 4, 3), dtype=np.uint8)).save(path)
    folder = ImageFolder(tmp_path / "images", v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]))
    dataset, teacher = SeededViews(Subset(folder, range(0, 12, 2))), FrozenTeacher(flat(48, 5))
    TeacherCache(tmp_path / "cache", teacher, dataset).write()
    assert list(dataset.labels) == [0, 0, 1, 1, 2, 2]
    images, _, index = next(iter(DataLoader(dataset, 6)))
    assert torch.allclose(CachedTeacher(tmp_path / "cache", dataset)(images, index), teacher(images), atol=1e-5)


def test_a_lightning_module_with_an_average_that_follows_by_a_callback(tmp_path):
    lightning = pytest.importorskip("lightning")
    dataset = SeededViews([(torch.randn(8), i % 4) for i in range(32)])
    TeacherCache(tmp_path / "cache", FrozenTeacher(flat(8, 5)), dataset).write()

    class Student(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = flat(8, 4, seed=1)
            self.average = EMATeacher(self.network, decay=0.5)
            self.cached = CachedTeacher(tmp_path / "cache", dataset)

        def training_step(self, batch, _):
            data, _, index = batch
            embeddings = self.network(data)
            return RelativeTeacherLoss()(embeddings, ref_emb=self.cached(data, index)) + RelativeTeacherLoss()(
                embeddings, ref_emb=self.average(data)
            )

        def configure_optimizers(self):
            return torch.optim.SGD(self.network.parameters(), lr=0.1)

    class Follow(lightning.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            module.average.update()

    student, quiet = Student(), {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    before = student.average.average[1].weight.clone()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[Follow()], enable_checkpointing=False, **quiet
    )
    trainer.fit(student, DataLoader(dataset, 8))
    assert not torch.equal(before, student.average.average[1].weight)
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    resumed = Student()
    resumed.load_state_dict(torch.load(tmp_path / "student.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(resumed.average.average[1].weight, student.average.average[1].weight)


def test_an_accelerate_loop(tmp_path):
    accelerate = pytest.importorskip("accelerate")
    dataset, teacher = SeededViews([(torch.randn(8), i % 4) for i in range(32)]), FrozenTeacher(flat(8, 5))
    TeacherCache(tmp_path, teacher, dataset).write()
    cached, student = CachedTeacher(tmp_path, dataset), flat(8, 4, seed=1)
    accelerator, optimizer = accelerate.Accelerator(cpu=True), torch.optim.SGD(student.parameters(), lr=0.1)
    student, optimizer, loader = accelerator.prepare(student, optimizer, DataLoader(dataset, 8, shuffle=True))
    for data, _, index in loader:
        loss = RKDLoss()(student(data), ref_emb=cached(data, index))
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
    assert loss.isfinite()


def test_the_transformers_trainer_with_texts_of_unequal_lengths(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )

    class Embedder(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = transformers.BertModel(config)

        def forward(self, data):
            return self.bert(**data).pooler_output

    class Student(Embedder):
        def forward(self, index, **data):
            embeddings = super().forward(data)
            return {"loss": RelativeTeacherLoss()(embeddings, ref_emb=cached(embeddings, index))}

    def collate(items):
        texts, _, rows = zip(*items)
        width = max(len(text["input_ids"]) for text in texts)
        padded = {k: torch.tensor([t[k] + [0] * (width - len(t[k])) for t in texts]) for k in texts[0]}
        return padded | {"index": torch.tensor(rows)}

    texts = [{"input_ids": [1 + i % 40] * (2 + i % 5), "attention_mask": [1] * (2 + i % 5)} for i in range(16)]
    dataset, teacher = SeededViews(texts), FrozenTeacher(Embedder())
    TeacherCache(tmp_path / "cache", teacher, dataset, batch_size=4, collate_fn=collate).write()
    cached = CachedTeacher(tmp_path / "cache", dataset, teacher, collate_fn=collate)
    batch = collate([dataset.read([row])[0] for row in (5, 2)])
    rows = batch.pop("index")
    assert torch.allclose(cached(batch, rows), teacher(batch), atol=1e-5)
    arguments = transformers.TrainingArguments(
        str(tmp_path / "run"),
        max_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        remove_unused_columns=False,
    )
    trainer = transformers.Trainer(Student(), arguments, train_dataset=dataset, data_collator=collate)
    assert trainer.train().global_step == 2


def test_one_head_per_teacher():
    """A shared trunk learns from each teacher through a head and a loss of its own; the heads are thrown away."""
    torch.manual_seed(0)
    data, trunk, teachers = torch.randn(32, 8), nn.Linear(8, 6), [FrozenTeacher(flat(8, width)) for width in (5, 9)]
    heads = nn.ModuleList(nn.Linear(6, width) for width in (5, 9))
    loss_of = MultipleDistillationLosses([RelativeTeacherLoss(), RKDLoss()])
    optimizer, losses = torch.optim.Adam([*trunk.parameters(), *heads.parameters()], lr=0.01), []
    for _ in range(60):
        features = trunk(data)
        loss = sum(loss_of(head(features), ref_emb=teacher(data)) for head, teacher in zip(heads, teachers))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert EnsembleTeacher(teachers)(data).shape == (32, 14)
