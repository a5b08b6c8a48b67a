import random

import numpy as np
import pytest
import torch
from pytorch_metric_learning.samplers import FixedSetOfTriplets, HierarchicalSampler, MPerClassSampler
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from pml_distill.datasets import SeededViews
from pml_distill.trainers.resumable_data_loader import ResumableDataLoader

LABELS = torch.arange(8).repeat_interleave(6)


class ShuffledInPlace(Sampler):
    """Shuffles a list of its batches before each pass, as user code may."""

    def __init__(self):
        self.batches = [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(16)]

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        random.shuffle(self.batches)
        yield from self.batches


class MadeAnew(Sampler):
    """Makes its order in each pass, as user code may."""

    def __init__(self):
        self.order, self.filled, self.size, self.losses = None, [], np.array(48), [0.0]

    def __len__(self):
        return 48

    def __iter__(self):
        self.order = torch.randperm(48).tolist()
        self.filled[:] = self.order
        self.losses.append(float(self.order[0]))
        return iter(self.order)


SAMPLERS = {
    "m_per_class": lambda: {"sampler": MPerClassSampler(LABELS, 2, 8, 48), "batch_size": 8},
    "triplets": lambda: {"sampler": FixedSetOfTriplets(LABELS, 16), "batch_size": 6},
    "hierarchical": lambda: {"batch_sampler": HierarchicalSampler(torch.stack([LABELS, LABELS // 2], 1), 4, 2)},
    "wrapped": lambda: {"batch_sampler": BatchSampler(MPerClassSampler(LABELS, 2, 8, 48), 8, True)},
    "batches": lambda: {"batch_sampler": ShuffledInPlace()},
    "distributed": lambda: {"sampler": DistributedSampler(range(48), num_replicas=1, rank=0), "batch_size": 8},
    "made_anew": lambda: {"sampler": MadeAnew(), "batch_size": 8},
    "generator": lambda: {
        "sampler": WeightedRandomSampler(torch.rand(48) + 0.1, 48, generator=torch.Generator().manual_seed(3)),
        "batch_size": 8,
    },
    "shuffle": lambda: {"shuffle": True, "batch_size": 8},
}


def loader(kind):
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return DataLoader(torch.arange(48), **SAMPLERS[kind]())


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("batches_of_second_pass", [1, 5, "all"])
def test_goes_on_in_a_new_process_as_if_never_stopped(kind, batches_of_second_pass, tmp_path):
    straight = ResumableDataLoader(loader(kind))
    list(straight)
    second = iter(straight)
    for _ in range(len(straight) if batches_of_second_pass == "all" else batches_of_second_pass):
        next(second)
    torch.save(straight.position(), tmp_path / "position.pth")
    state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = [batch.tolist() for batch in (*second, *straight, *straight)]

    fresh = loader(kind)
    never_started = ResumableDataLoader(fresh, torch.load(tmp_path / "position.pth", weights_only=True))
    resumed = ResumableDataLoader(fresh, never_started.position())
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    rest = list(resumed) if batches_of_second_pass != "all" else []
    assert [batch.tolist() for batch in (*rest, *resumed, *resumed)] == expected


def test_a_list_that_keeps_its_order_is_not_written_to():
    places = np.arange(48)
    places.flags.writeable = False
    sampler = SubsetRandomSampler(places)
    first = ResumableDataLoader(DataLoader(torch.arange(48), 8, sampler=sampler))
    next(iter(first))
    ResumableDataLoader(DataLoader(torch.arange(48), 8, sampler=sampler), first.position())


def test_leaves_what_a_hook_changes_in_a_sampler():
    sampler = SubsetRandomSampler([*range(48)])
    resumable = ResumableDataLoader(DataLoader(torch.arange(48), 8, sampler=sampler))
    list(resumable)
    del sampler.indices[16:]
    assert sorted(torch.cat(list(resumable)).tolist()) == [*range(16)]


@pytest.mark.parametrize(
    "saved, now, named",
    [
        (SubsetRandomSampler([*range(32)]), SubsetRandomSampler([*range(16, 48)]), "SubsetRandomSampler.indices"),
        (MPerClassSampler(LABELS, 2, 8, 48), MPerClassSampler(LABELS // 2, 2, 8, 48), "MPerClassSampler.labels"),
        (MPerClassSampler(LABELS, 2, 8, 48), None, "MPerClassSampler.labels"),
    ],
)
def test_refuses_a_sampler_of_other_items(saved, now, named):
    first = ResumableDataLoader(DataLoader(torch.arange(48), 8, sampler=saved))
    next(iter(first))
    with pytest.raises(ValueError, match=f"sampler must be as it was .*, but {named} holds other items"):
        ResumableDataLoader(DataLoader(torch.arange(48), 8, sampler=now), first.position())


def test_a_distributed_sampler_draws_each_pass_in_another_order():
    first, second = (torch.cat(list(straight)) for straight in [ResumableDataLoader(loader("distributed"))] * 2)
    assert not torch.equal(first, second) and len(first) == 48


class Noisy(torch.utils.data.Dataset):
    """Items that draw from all global generators, and count how many were read in this process."""

    def __init__(self):
        self.asked = 0

    def __len__(self):
        return 48

    def __getitem__(self, i):
        self.asked += 1
        return torch.tensor([i, torch.rand(()), np.random.rand(), random.random()], dtype=torch.float64)


class OwnGenerator(Noisy):
    def __init__(self):
        super().__init__()
        self.noise = np.random.default_rng(0)

    def __getitem__(self, i):
        return super().__getitem__(i) + self.noise.random()


class DrawnInThePass(Sampler):
    def __len__(self):
        return 48

    def __iter__(self):
        return (int(torch.randint(48, ())) for _ in range(48))


def seeded(dataset, **settings):
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return DataLoader(dataset, 4, **{"shuffle": True, **settings})


def rest_of_two_passes(straight, done):
    """Read ``done`` batches of the second pass; return the place, the random states and the batches that follow."""
    list(straight)
    second = iter(straight)
    for _ in range(done):
        next(second)
    place, state = straight.position(), (random.getstate(), np.random.get_state(), torch.get_rng_state())
    return place, state, [*second, *straight]


def equal(ours, theirs):
    batches = [[*batch] if isinstance(batch, list) else [batch] for batch in (*ours, *theirs)]
    pairs = zip(batches[: len(ours)], batches[len(ours) :], strict=True)
    return all(torch.equal(a, b) for one, other in pairs for a, b in zip(one, other, strict=True))


def resumed_rest(loader, place, state):
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    resumed = ResumableDataLoader(loader, place)
    return [*resumed, *resumed]


@pytest.mark.parametrize("settings", [{}, {"num_workers": 2}, {"num_workers": 2, "persistent_workers": True}])
@pytest.mark.parametrize("done", [1, 6, 7])
def test_what_was_read_is_not_read_again(settings, done, caplog):
    place, state, expected = rest_of_two_passes(ResumableDataLoader(seeded(Noisy(), **settings)), done)
    dataset = Noisy()
    assert equal(resumed_rest(seeded(dataset, **settings), place, state), expected)
    assert dataset.asked in (0, 4 * (12 - done + 12))
    assert not caplog.records


@pytest.mark.parametrize(
    ("dataset", "settings", "told"),
    [
        (OwnGenerator, {}, ["7 batches before the checkpoint are read again: the dataset has a random generator"]),
        (Noisy, {"shuffle": False, "sampler": DrawnInThePass()}, []),
    ],
)
def test_what_has_to_be_read_again_is_told(dataset, settings, told, caplog):
    straight = ResumableDataLoader(seeded(dataset(), **settings))
    first = iter(straight)
    for _ in range(7):
        next(first)
    place, state = straight.position(), (random.getstate(), np.random.get_state(), torch.get_rng_state())
    expected = [*first]
    assert equal(resumed_rest(seeded(dataset(), **settings), place, state)[:5], expected)
    assert [text in record.message for text, record in zip(told, caplog.records, strict=True)] == [True] * len(told)


def test_batches_do_not_depend_on_how_many_workers_read_them():
    one, two = ([*ResumableDataLoader(seeded(Noisy(), num_workers=workers))] for workers in (1, 2))
    assert equal(one, two) and len({float(item[1]) for batch in one for item in batch}) == 48


def test_a_generator_that_is_seeded_for_each_item_is_no_cause_to_read_again(caplog):
    noise = random.Random()

    class Images(Noisy):
        def __getitem__(self, i):
            self.asked += 1
            return torch.tensor(noise.random())

    images = Images()
    images.noise = noise
    views = SeededViews(images, reseed=noise.seed, views=3)
    place, state, expected = rest_of_two_passes(ResumableDataLoader(seeded(views)), 7)
    images.asked = 0
    assert equal(resumed_rest(seeded(views), place, state), expected)
    assert images.asked == 4 * (5 + 12) and not caplog.records
