"""The benchmark of PML's losses: its jobs, what it resumes and chooses, a run of each kind, and its tables."""

import dataclasses
import sys
from multiprocessing.pool import ThreadPool
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import accuracy
import accuracy_report
import comparison

SMALL = accuracy.Preset(2, ("8", "4"), ("mutual_distance", "rkd_angle"), ("multi_similarity", "proxy_anchor"), 2, 2)


def pretended(job):
    """Give a run its figures without training: distillation gains 0.1, and the other setting another 0.05."""
    figure = 0.3 + 0.01 * job["seed"] + 0.001 * job["seed"] ** 2 * (job["distillation"] != "none")
    figure += 0.1 * (job["distillation"] != "none") + 0.05 * (job["setting"] in ("base 0.7", "alpha 16"))
    figures = dict.fromkeys(accuracy.COLUMNS, figure)
    return job | figures | {"parameters": 10_000 * int(job["student"]) if job["student"].isdigit() else 900_000}


@pytest.fixture
def threads(monkeypatch):
    class Context:
        Pool = ThreadPool

    monkeypatch.setattr(comparison.multiprocessing, "get_context", lambda method: Context)


def finish(path, preset=SMALL, run=pretended):
    order = []

    def do(jobs):
        def once(job):
            order.append(job)
            return run(job)

        return comparison.complete(path, jobs, once, 1, accuracy.COLUMNS, lambda row: None)

    accuracy.work(preset, "glyphs", do)
    return order


def test_every_loss_has_as_many_trials_alone_as_with_each_distillation_loss():
    for metric_loss in accuracy.METRIC_LOSSES:
        for distillation in ("none", *accuracy.DISTILLATIONS):
            tried = accuracy.trials(metric_loss, distillation, 0.02)
            assert len(set(tried)) == 4 and len({setting for setting, *_ in tried[:2]}) == 2
            assert all((weight > 0) == (distillation != "none") for *_, weight in tried)


def test_the_full_preset_has_all_losses_three_sizes_and_five_seeds():
    full = accuracy.PRESETS["full"]
    assert set(full.distillations) == set(accuracy.LOSSES) and len(full.metric_losses) == 7
    assert len(full.students) == 3 and full.seeds >= 5


def test_tests_use_the_best_trial_and_the_first_distillation_comes_first(tmp_path, threads):
    order = finish(tmp_path / "accuracy.csv")
    assert len(order) == accuracy.number_of_jobs(SMALL)
    for job in order:
        if job["split"] == "test" and job["student"] != "teacher":
            assert job["setting"] in ("base 0.7", "alpha 16")
    names = [job["distillation"] for job in order]
    assert "rkd_angle" not in names[: len(names) - names[::-1].index("mutual_distance")]
    tests = [job["seed"] for job in order if job["split"] == "test" and job["student"] == "8"]
    assert tests[: len(tests) // 2] == sorted(tests[: len(tests) // 2])  # seed by seed


def test_it_goes_on_from_the_csv_and_mends_a_torn_line(tmp_path, threads):
    path = tmp_path / "accuracy.csv"

    def fails(job):
        if job["split"] == "test" and job["seed"] == 1 and job["student"] == "4":
            raise KeyError
        return pretended(job)

    with pytest.raises(KeyError):
        finish(path, run=fails)
    kept = path.read_text()
    path.write_text(kept + kept.splitlines()[-1][:40])
    order = finish(path)
    assert path.read_text().startswith(kept)
    assert len(order) == accuracy.number_of_jobs(SMALL) - (kept.count("\n") - 1)
    assert len(comparison.finished(path)) == accuracy.number_of_jobs(SMALL)
    assert finish(path) == []


def test_a_preset_may_have_a_single_size_and_a_single_distillation_loss(tmp_path, threads):
    quick = dataclasses.replace(SMALL, students=("8",), distillations=("mutual_distance",))
    order = finish(tmp_path / "accuracy.csv", quick)
    assert len(order) == accuracy.number_of_jobs(quick) == 1 + 2 + 4 * (2 + 2)


def test_holm_corrects_as_by_hand():
    corrected = accuracy_report.holm([0.01, float("nan"), 0.04, 0.03])
    assert [corrected[i] for i in (0, 2, 3)] == pytest.approx([0.03, 0.06, 0.06])
    assert corrected[1] != corrected[1]


def test_the_paired_difference_is_that_of_the_seeds_in_common():
    gains, p = accuracy_report.paired({"0": 0.5, "1": 0.6, "2": 0.9}, {"0": 0.3, "1": 0.5, "3": 0.1})
    assert gains == pytest.approx([0.2, 0.1])
    assert p == pytest.approx(0.2048, abs=1e-4)  # t = 3 with one degree of freedom


def test_figures_that_are_all_the_same_have_no_p():
    gains, p = accuracy_report.paired({"0": 0.0, "1": 0.0}, {"0": 0.0, "1": 0.0})
    assert gains == [0, 0] and p != p


def test_other_methods_share_their_variance_with_a_comparison():
    alone, taught, other = {"0": 0.0, "1": 1.0}, {"0": 1.0, "1": 3.0}, {"0": 2.0, "1": 2.0}
    gains, p = accuracy_report.paired(taught, alone, [other])
    assert gains == [1.0, 2.0]
    # The squares of the residuals sum to 1, two degrees of freedom, t = 1.5 √2.
    assert p == pytest.approx(1 - (4.5 / 6.5) ** 0.5)


def test_the_report_shows_gains_and_where_there_are_none(tmp_path, threads):
    path = tmp_path / "accuracy.csv"

    def run(job):
        row = pretended(job)
        if job["metric_loss"] == "proxy_anchor" and job["distillation"] == "rkd_angle" and job["split"] == "test":
            row["mean_average_precision_at_r"] -= 0.1
        return row

    finish(path, run=run)
    rows = comparison.finished(path)
    text = accuracy_report.report(rows, tmp_path)
    assert (tmp_path / "table.md").read_text() == text
    assert "+0.101 ± 0.001" in text and "base 0.7, rate 0.02, weight 1.5" in text
    assert "proxy_anchor alone is not beaten by itself with rkd_angle" in text
    cells = {tuple(cell.strip() for cell in line.split("|")[2:4]) for line in text.splitlines() if line.count("|") > 9}
    assert {("distillation", "aligned"), ("none", ""), ("mutual_distance", "yes"), ("rkd_angle", "no")} <= cells
    assert "multi_similarity alone is not beaten" not in text
    for name in ("accuracy_glyphs_2_128.png", "accuracy_glyphs_2_128_sizes.png"):
        assert min(Image.open(tmp_path / name).size) > 100


def test_the_best_is_chosen_among_those_tested(tmp_path, threads):
    def run(job):
        row = pretended(job)
        row["mean_average_precision_at_r"] += 0.01 * (job["distillation"] == "rkd_angle" and job["split"] == "val")
        return row

    finish(tmp_path / "accuracy.csv", run=run)
    rows = comparison.finished(tmp_path / "accuracy.csv")
    tested = accuracy_report.where(rows, split="test", student="4")
    assert set(accuracy_report.best_distillations(rows, tested).values()) == {"rkd_angle"}
    unfinished = [row for row in tested if row["distillation"] != "rkd_angle"]
    assert set(accuracy_report.best_distillations(rows, unfinished).values()) == {"mutual_distance"}


def test_the_report_of_an_unfinished_csv_says_how_much_is_there(tmp_path, threads):
    path = tmp_path / "accuracy.csv"
    full = accuracy.PRESETS["full"]
    jobs = accuracy.teacher_jobs(full, "glyphs")[:3]
    alone = ("base 0.5", 0.02, 0.0)
    jobs.append(accuracy.new_job(full, "glyphs", "test", "multi_similarity", "none", "8", alone, 0))
    comparison.complete(path, jobs, pretended, 1, accuracy.COLUMNS, lambda row: None)
    text = accuracy_report.markdown(comparison.finished(path))
    assert f"4 of the {accuracy.number_of_jobs(accuracy.PRESETS['quick'])} runs of the preset `quick`" in text
    more = accuracy.trial_jobs(full, "glyphs", ("none", "mutual_distance"))
    comparison.complete(path, more, pretended, 1, accuracy.COLUMNS, lambda row: None)
    text = accuracy_report.markdown(comparison.finished(path))
    assert f"{4 + len(more)} of the {accuracy.number_of_jobs(full):,} runs of the preset `full`" in text
    assert "| multi_similarity" in text and "not beaten" not in text


def job(**changes):
    setting = ("alpha 32", 0.02, 0.0)
    made = accuracy.new_job(accuracy.PRESETS["quick"], "digits", "test", "proxy_anchor", "none", "4", setting, 0)
    return made | {"epochs": 2} | changes


def test_a_student_learns_with_proxies_and_with_a_teacher_that_remembers(tmp_path):
    run = lambda **changes: accuracy.run(tmp_path, "cpu", "", job(**changes))  # noqa: E731
    assert run(student="teacher")["parameters"] > 600_000
    alone = run()
    assert set(accuracy.COLUMNS) <= set(alone) and 10_000 < alone["parameters"] < 20_000
    taught = run(distillation="mutual_distance", weight=37.5)
    assert taught["asymmetric_map_at_r"] != alone["asymmetric_map_at_r"]
    demo = accuracy.experiment(job(), tmp_path, "cpu", "")
    teacher = demo.teacher(0)[0]
    teacher.teacher = None  # no new batch
    demo.teacher = lambda seed: (teacher, None)
    again = demo.run("again", 0, accuracy.Distillation(accuracy.LOSSES["mutual_distance"].make, 37.5), 0.02, 4)
    assert 0 < again["NMI"] < 1
    folder = tmp_path / "runs" / "digits-2-128-float32-test" / "seed0" / accuracy.run_name(job())
    assert (folder / "result.json").exists() and not (folder / "models.pth").exists()


def test_digits_are_tuned_on_two_of_them_that_do_not_train(tmp_path):
    demo = accuracy.experiment(job(split="val"), tmp_path, "cpu", "")
    train, val = set(demo.train_set.labels.tolist()), set(demo.test_set.labels.tolist())
    assert (len(train), len(val)) == (3, 2) and not train & val and len(demo.test_set) == len(demo.test_set.pixels)


def test_proxies_have_an_optimizer_of_their_own(tmp_path):
    demo = accuracy.experiment(job(), tmp_path, "cpu", "")
    loss = accuracy.METRIC_LOSSES["proxy_anchor"].settings["alpha 32"]
    trainer, _ = demo.trainer_and_tester(tmp_path / "x", demo.networks(4, 0), 0, 0.02, None, accuracy.Supervision(loss))
    before = trainer.loss_funcs["metric_loss"].proxies.clone()
    trainer.train(1, 1)
    assert (trainer.loss_funcs["metric_loss"].proxies - before).abs().min() > 0


def test_the_teacher_is_trained_anew_when_only_the_csv_was_kept(tmp_path):
    accuracy.with_teachers(tmp_path, "cpu", "", [job(), job(distillation="mutual_distance", weight=1.5)])
    assert len(list(tmp_path.glob("runs/*/seed0/teacher/models.pth"))) == 1
    accuracy.with_teachers(tmp_path / "alone", "cpu", "", [job()])
    assert not list((tmp_path / "alone").glob("runs/*/seed0"))


@pytest.fixture
def cub(tmp_path):
    """Two images of each of ten training and six test classes, in the layout of CUB."""
    root = tmp_path / "cub"
    (root / "CUB_200_2011" / "images").mkdir(parents=True)
    paths, labels = [], []
    for number, (label, place) in enumerate([(c, i) for c in (*range(1, 11), *range(101, 107)) for i in range(2)], 1):
        name = f"{label}_{place}.jpg"
        Image.new("RGB" if place else "L", (60, 40), label).save(root / "CUB_200_2011" / "images" / name)
        paths.append(f"{number} {name}")
        labels.append(f"{number} {label}")
    (root / "CUB_200_2011" / "images.txt").write_text("\n".join(paths))
    (root / "CUB_200_2011" / "image_class_labels.txt").write_text("\n".join(labels))
    return str(root)


def test_photographs_are_split_by_class(cub):
    classes = {
        split: set(accuracy.Photographs("CUB", cub, split, False).labels.tolist()) for split in ("train", "val", "test")
    }
    assert [len(classes[split]) for split in classes] == [8, 2, 6] and not classes["train"] & classes["val"]
    assert classes["test"] == set(range(101, 107))
    assert accuracy.Photographs("CUB", cub, "train+val", True)[0][0].shape == (3, 224, 224)


def test_a_dataset_of_pml_with_networks_of_torchvision(cub, tmp_path, monkeypatch):
    monkeypatch.setattr(accuracy.Photos, "pretrained", False)
    monkeypatch.setattr(accuracy.Photos, "workers", 0)
    monkeypatch.setattr(accuracy.Photos, "teacher_width", "mobilenet_v3_small")
    photo = job(dataset="CUB", batch_size=4, student="mobilenet_v3_small", metric_loss="arc_face", setting="scale 64")
    accuracy.run(tmp_path, "cpu", cub, photo | {"student": "teacher"})
    row = accuracy.run(tmp_path, "cpu", cub, photo | {"distillation": "cosine_teacher", "weight": 30.0})
    assert 0 <= row["NMI"] <= 1 and row["parameters"] > 900_000
