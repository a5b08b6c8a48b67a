"""The benchmark on text, with a tiny teacher and glosses of a few words."""

import csv
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gloss_texts
import glosses

tokenizers = pytest.importorskip("tokenizers", reason="the benchmark on text needs tokenizers")
transformers = pytest.importorskip("transformers", reason="the benchmark on text needs transformers")

KINDS = [f"kind{number}" for number in range(24)]
WORDS = [f"word{number}" for number in range(40)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


@pytest.fixture(scope="module")
def nouns(tmp_path_factory):
    """Ten glosses of each kind, as WordNet writes them, behind lines of its licence."""
    generator, lines = random.Random(0), ["  1 This software and database is being provided"]
    for kind, name in enumerate(KINDS):
        for number in range(10):
            text = " ".join([name, *generator.sample(WORDS, 2 + number % 4)])
            pointer = "@i" if number % 2 else "@"
            lines.append(
                f'{kind:04}{number:04} 03 n 01 x 0 001 {pointer} {kind:08} n 0000 | {text}; "an example {number}"  '
            )
        lines.append(f"{kind:04}9999 03 n 01 x 0 001 @ {kind:08} n 0000 | the same for all  ")
    path = tmp_path_factory.mktemp("wordnet") / "data.noun"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokens = {token: number for number, token in enumerate([*SPECIAL, *KINDS, *WORDS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(tokens, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokens), hidden_size=16, num_hidden_layers=6, num_attention_heads=2, intermediate_size=32
    )
    transformers.BertModel(config, add_pooling_layer=False).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def students(model, nouns, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return glosses.Students(model, nouns, cache, sizes=(16, 2, 3), more=20, steps={"static": 3, "cut": 2})


def test_glosses_have_no_examples_and_no_repetitions(nouns):
    read = gloss_texts.read_glosses(nouns)
    assert len({gloss.text for gloss in read}) == len(read) > 200
    assert not any("example" in gloss.text for gloss in read)
    assert {gloss.hypernym for gloss in read} == {f"{kind:08}" for kind in range(len(KINDS))}


def test_parts_share_no_class(students):
    classes = {part: {gloss.hypernym for gloss in texts} for part, texts in students.texts.items()}
    assert [len(classes[part]) for part in ("train", "val", "test")] == [16, 2, 3]
    assert not classes["more"] & (classes["val"] | classes["test"])
    assert not classes["train"] & (classes["val"] | classes["test"])
    assert students.texts["more"][: len(students.texts["train"])] == students.texts["train"]


@pytest.mark.parametrize("name", ["teacher", "static", "cut"])
def test_a_text_has_the_same_embedding_in_any_batch(students, name):
    network = {"teacher": students.teacher, "static": students.static(1e-3), "cut": students.teacher.cut((0, 5)).eval()}
    texts = ["kind1 word1", "kind2 word2 word3 word4 word5"]
    alone = [students.encode(network[name], [text]) for text in texts]
    torch.testing.assert_close(students.encode(network[name], texts), torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_the_cache_serves_each_part_by_its_ids(students):
    direct = gloss_texts.embed(students.teacher, students.data["test"])
    torch.testing.assert_close(students.ref["test"], direct, atol=1e-5, rtol=1e-5)


def test_a_cut_transformer_shares_no_weights_with_its_teacher(students):
    before = {name: value.clone() for name, value in students.teacher.state_dict().items()}
    students.network("cut", glosses.BOTH, glosses.BEST["cut", glosses.BOTH], 0)
    for name, value in students.teacher.state_dict().items():
        torch.testing.assert_close(value, before[name], atol=0, rtol=0)


def test_record_has_each_method_and_gains_over_labels_alone(students, tmp_path):
    rows = glosses.write(tmp_path / "glosses.csv", glosses.record(students, seeds=2))
    assert rows == list(csv.DictReader((tmp_path / "glosses.csv").open()))
    assert len(rows) == 5 + 2 * (len(glosses.BEST) - 5)
    assert [*dict.fromkeys((row["student"], row["method"]) for row in rows)] == [*glosses.BEST]
    for row in rows:
        assert 0 <= float(row[glosses.MAP]) <= float(row[glosses.P1]) * 2 <= 2
        assert int(row["sentences_per_second"]) > 0
        assert (row["gain"] == "") == (row["student"] in ("teacher", "TF-IDF") or row["method"] == glosses.LABELS)
    assert float(rows[0]["neighbor_agreement"]) == 1
    table = glosses.table(rows).splitlines()
    assert len(table) == 2 + len(glosses.BEST)
    glosses.picture(rows, tmp_path / "glosses.png")
    assert (tmp_path / "glosses.png").stat().st_size > 1000


def test_search_measures_on_the_validation_classes_what_is_not_done(students):
    row = next(glosses.search(students, set()))
    assert row["student"] == "TF-IDF" and 0 <= row[glosses.MAP] <= 1 and row["sentences_per_second"] == ""
    done = {(row["student"], row["method"], row["setting"])}
    assert next(glosses.search(students, done))["setting"] != row["setting"]
