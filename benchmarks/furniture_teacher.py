"""How `furniture.py` prepares a teacher: standardised, and a linear layer on its outputs tuned on labels."""

from typing import Any

import torch
from pytorch_metric_learning.losses import MultiSimilarityLoss
from torch import nn

from pml_distill.samplers import DistributedMPerClassSampler
from pml_distill.teachers import StandardizedTeacher

WIDTH = 128
STEPS, BATCH, RATE = 400, 128, 1e-3


class Stored:
    """A teacher whose embeddings are at hand, by row."""

    needs_index = True

    def __init__(self, embeddings: torch.Tensor):
        self.embeddings = embeddings

    def __call__(self, data: Any, index: torch.Tensor) -> torch.Tensor:
        return self.embeddings[index]


def tuned_head(outputs: torch.Tensor, labels: torch.Tensor, start: StandardizedTeacher, seed: int) -> nn.Linear:
    """A linear layer on the stored outputs, trained on the labels from where the standardisation starts."""
    views, count, width = outputs.shape
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        zero, unit = start.standardize(torch.zeros(1, width)), start.standardize(torch.eye(width))
        head = nn.Linear(width, zero.shape[1])
        head.weight.copy_((unit - zero).T)
        head.bias.copy_(zero[0])
    loss = MultiSimilarityLoss()
    optimizer = torch.optim.AdamW(head.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS)
    torch.manual_seed(seed)
    sampler = iter(DistributedMPerClassSampler(labels, 4, BATCH, BATCH * STEPS))
    for _ in range(STEPS):
        index = torch.tensor([next(sampler) for _ in range(BATCH)])
        view = torch.randint(views, index.shape, generator=generator)
        optimizer.zero_grad()
        loss(head(outputs[view, index]), labels[index]).backward()
        optimizer.step()
        schedule.step()
    return head.requires_grad_(False)


def prepared_teacher(
    outputs: torch.Tensor, kind: str, labels: torch.Tensor | None, seed: int, width: int = WIDTH
) -> nn.Module:
    """What makes a student's targets of the teacher's outputs, tuned on the labels if there are any."""
    if kind == "raw":
        return nn.Identity()
    stored = Stored(outputs.flatten(0, 1))
    teacher = StandardizedTeacher(stored, None if kind == "center" else width, kind)
    teacher.fit((torch.empty(len(rows)), None, rows) for rows in torch.arange(outputs[..., 0].numel()).split(1600))
    return Standardized(teacher) if labels is None else tuned_head(outputs, labels, teacher, seed)


class Standardized(nn.Module):
    def __init__(self, teacher: StandardizedTeacher):
        super().__init__()
        self.teacher = teacher

    def forward(self, outputs: torch.Tensor) -> torch.Tensor:
        return self.teacher.standardize(outputs)
