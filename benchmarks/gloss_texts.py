"""WordNet's glosses as tokenised texts, what a teacher makes of them, and two encoders; see `glosses.py`."""

import copy
import os
import random
import re
import subprocess
from collections import defaultdict
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pml_distill.datasets import SeededViews
from pml_distill.teachers import CachedTeacher, FrozenTeacher, StandardizedTeacher, TeacherCache
from pml_distill.teachers.ask import ask

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "pml_distill"
BATCH, LONGEST, WIDTH = 64, 32, 256


class Gloss(NamedTuple):
    id: str
    text: str
    hypernym: str


def wordnet():
    """The nouns of WordNet, downloaded once."""
    path = CACHE / "wordnet/usr/share/wordnet/data.noun"
    if not path.exists():
        path.parents[3].mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "wordnet-base"], cwd=path.parents[3], check=True)
        (package,) = path.parents[3].glob("wordnet-base*.deb")
        subprocess.run(["dpkg", "-x", package, path.parents[3]], check=True)
    return path


def read_glosses(path):
    """The definitions without their examples and repetitions."""
    glosses = {}
    for line in path.read_text("latin-1").splitlines():
        head, _, text = line.partition(" | ")
        hypernym, text = re.search(r" @i? (\d{8}) n 0000", head), text.split('; "')[0].strip()
        if hypernym and text not in glosses:
            glosses[text] = Gloss(head[:8], text, hypernym[1])
    return list(glosses.values())


def split(glosses, sizes, more):
    """At most 20 glosses of each class for train, val, test; and train plus others of neither val nor test classes."""
    generator, classes = random.Random(0), defaultdict(list)
    for gloss in glosses:
        classes[gloss.hypernym].append(gloss)
    names = generator.sample([name for name, members in sorted(classes.items()) if len(members) >= 8], sum(sizes))
    parts = {part: [] for part in ("train", "val", "test")}
    for name, part in zip(names, [part for part, size in zip(parts, sizes) for _ in range(size)]):
        members = classes.pop(name)
        parts[part] += generator.sample(members, min(20, len(members)))
    others = [gloss for members in classes.values() for gloss in members]
    return parts | {"more": parts["train"] + generator.sample(others, min(more, len(others)))}


class Texts(Dataset):
    """Tokens of unequal length and a label, in dictionaries. A cache knows each text by its id, whatever its place."""

    def __init__(self, ids, tokens, labels):
        self.ids, self.tokens, self.labels = ids, tokens, labels

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        tokens = torch.tensor(self.tokens[i])
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "label": self.labels[i]}


def pad(items):
    """Make a batch of items (dictionary, label, row): a dictionary as transformers take it, labels, rows."""
    texts, labels, rows = zip(*items)
    columns = {key: [text[key] for text in texts] for key in ("input_ids", "attention_mask")}
    data = {key: nn.utils.rnn.pad_sequence(column, batch_first=True) for key, column in columns.items()}
    return data, torch.tensor(labels), torch.tensor(rows)


class SentenceEncoder(nn.Module):
    """A transformer and the mean of its outputs over the tokens."""

    def __init__(self, bert):
        super().__init__()
        self.bert = bert

    def forward(self, data):
        outputs, mask = self.bert(**data).last_hidden_state, data["attention_mask"][..., None]
        return (outputs * mask).sum(1) / mask.sum(1)

    def cut(self, layers):
        """A copy with some of the layers; all of it learns but the embeddings of tokens and places."""
        student = copy.deepcopy(self).requires_grad_(True)
        student.bert.encoder.layer = nn.ModuleList(student.bert.encoder.layer[i] for i in layers)
        student.bert.embeddings.requires_grad_(False)
        return student


class StaticEncoder(nn.Module):
    """One vector for each token, and their mean over a text; special tokens do not count."""

    def __init__(self, table, special):
        super().__init__()
        self.table = nn.Embedding.from_pretrained(table, freeze=False)
        self.register_buffer("counts", torch.ones(len(table)).index_fill(0, torch.tensor(special), 0))

    def forward(self, data):
        counts = (self.counts[data["input_ids"]] * data["attention_mask"])[..., None]
        return (self.table(data["input_ids"]) * counts).sum(1) / counts.sum(1).clamp(min=1)


class Glosses:
    """Texts in parts, and what the teacher makes of them and of single tokens."""

    def __init__(self, model, nouns, cache, sizes=(300, 50, 150), more=12000):
        from tokenizers import Tokenizer
        from transformers import BertModel

        self.cache, self.texts = cache, split(read_glosses(nouns), sizes, more)
        self.tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(LONGEST)
        self.teacher = SentenceEncoder(BertModel.from_pretrained(model, add_pooling_layer=False)).eval()
        # The teacher sees little padding if texts of like length are together.
        glosses = {gloss for part in self.texts.values() for gloss in part}
        glosses = sorted(glosses, key=lambda gloss: (len(gloss.text), gloss.id))
        self.write(self.cache / "texts", self.teacher, SeededViews(self.tokens(glosses)))
        self.data = {part: SeededViews(self.tokens(glosses)) for part, glosses in self.texts.items()}
        self.labels = {part: torch.tensor(data.labels) for part, data in self.data.items()}
        self.cached = {part: CachedTeacher(self.cache / "texts", data) for part, data in self.data.items()}
        self.ref = {part: embed(self.cached[part], self.data[part]) for part in ("val", "test")}
        vocabulary = sorted(self.tokenizer.get_vocab(), key=self.tokenizer.token_to_id)
        begin, end = self.tokenizer.encode("").ids
        self.special = [self.tokenizer.token_to_id("[PAD]"), begin, end]
        single = Texts(vocabulary, [[begin, i, end] for i in range(len(vocabulary))], [0] * len(vocabulary))
        self.write(self.cache / "vocabulary", self.teacher, SeededViews(single))
        self.single, self.cached_single = (
            SeededViews(single),
            CachedTeacher(self.cache / "vocabulary", SeededViews(single)),
        )

    def tokens(self, glosses):
        encoded = [e.ids for e in self.tokenizer.encode_batch([gloss.text for gloss in glosses])]
        return Texts([gloss.id for gloss in glosses], encoded, [int(gloss.hypernym) for gloss in glosses])

    def write(self, folder, network, data):
        TeacherCache(folder, FrozenTeacher(network), data, batch_size=BATCH, collate_fn=pad).write()

    def standardized(self, part, kind, width):
        teacher = StandardizedTeacher(self.cached[part], width, kind)
        return teacher.fit(DataLoader(self.data[part], batch_size=256, collate_fn=pad))

    @cached_property
    def token_vectors(self):
        """The teacher's outputs for single tokens, rotated to their main directions."""
        teacher = StandardizedTeacher(self.cached_single, min(WIDTH, self.ref["val"].shape[1]), "pca")
        teacher.fit(DataLoader(self.single, batch_size=1024, collate_fn=pad))
        return embed(teacher, self.single)


@torch.inference_mode()
def embed(network, data):
    """The embeddings of a dataset, by a network or a teacher."""
    order = sorted(range(len(data)), key=lambda i: len(data.dataset.tokens[i]))
    batches = [pad(data.read(order[first : first + BATCH])) for first in range(0, len(order), BATCH)]
    return torch.cat([ask(network, tokens, rows) for tokens, _, rows in batches])[torch.tensor(order).argsort()]
