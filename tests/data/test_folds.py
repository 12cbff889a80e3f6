import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.splits import assign_folds, fold_parts
from errors import UserError
from tests.test_input_pipeline import listing_of

TRAIN, VALIDATION, TEST = range(3)


def divide(listing, folds, usable=None, duplicates=(), fractions=(0.6, 0.2, 0.2)):
    """The fold of every image, and its part in each fold: int [N], [J, N]."""
    usable = np.ones(len(listing.ids), bool) if usable is None else usable
    groups = [np.asarray(group) for group in duplicates]
    fold_of = assign_folds(listing, usable, groups, folds, 0)
    parts = [
        fold_parts(listing, fold_of, usable, groups, fractions, 0, fold) for fold in range(folds)
    ]
    return fold_of, np.array(parts)


@settings(deadline=None, max_examples=40, derandomize=True)
@given(st.data())
def test_each_image_is_tested_once_and_what_belongs_together_stays_together(data):
    folds, classes = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    labels = rng.permutation(np.repeat(range(classes), rng.integers(4 * folds, 9 * folds, classes)))
    count = len(labels)
    groups = [str(x) for x in rng.integers(0, count, count)] if data.draw(st.booleans()) else None
    pairs = rng.permutation(count)[: 2 * data.draw(st.integers(0, count // 8))].reshape(-1, 2)
    given_part = data.draw(st.sampled_from(["", "test", "validation"]))
    parts = np.where(rng.random(count) < 0.1, given_part, "train" if given_part else "")
    usable = rng.random(count) > 0.05
    listing = listing_of(labels, parts.tolist(), groups)
    fold_of, of_folds = divide(listing, folds, usable, pairs)

    pool = usable & np.isin(parts, ("", "train"))
    assert ((of_folds == TEST).sum(axis=0) == pool).all()  # once, and no other image ever
    assert ((of_folds == TEST) == (fold_of == np.arange(folds)[:, None])).all()
    together = [pair[pool[pair]] for pair in pairs]
    together += [np.flatnonzero(pool & (np.array(groups) == name)) for name in set(groups or ())]
    for rows in together:
        assert (of_folds[:, rows] == of_folds[:, rows[:1]]).all()
    for own in of_folds:
        assert set(labels[own == TEST]) == set(labels[own == TRAIN]) == set(labels[pool])
        if "validation" in parts:
            assert ((own == VALIDATION) == (usable & (parts == "validation"))).all()
        elif not together:
            wanted = np.isin(own, (TRAIN, VALIDATION)).sum() / 4
            assert abs((own == VALIDATION).sum() - wanted) <= 1


def test_folds_are_as_even_as_scikit_learns():
    labels = np.repeat([0, 1, 2, 3], [101, 152, 13, 37])
    fold_of, of_folds = divide(listing_of(labels), 5)
    sizes = np.array([np.bincount(labels[fold_of == fold]) for fold in range(5)])
    assert np.ptp(sizes, axis=0).max() <= 1 and np.ptp(sizes.sum(axis=1)) <= 1
    assert len({own.tobytes() for own in of_folds == VALIDATION}) == 5


def test_folds_depend_on_ids_and_seed_but_not_on_order():
    labels = np.random.default_rng(0).integers(0, 3, 90)
    listing, usable = listing_of(labels), np.ones(90, bool)
    order = np.random.default_rng(1).permutation(90)
    shuffled = listing_of(labels[order], ids=[listing.ids[i] for i in order])
    fold_of, of_folds = divide(listing, 3)
    again, of_again = divide(shuffled, 3)
    assert (again == fold_of[order]).all() and (of_again == of_folds[:, order]).all()
    assert (assign_folds(listing, usable, [], 3, seed=1) != fold_of).any()


def test_a_class_that_cannot_be_in_every_fold_is_named():
    labels = [0] * 9 + [1] * 3
    with pytest.raises(UserError, match=r"data.folds=4: class '1' has 3 images, too few"):
        divide(listing_of(labels), 4)
    groups = [str(i // 3) for i in range(9)] + ["a", "b", "c"]
    divide(listing_of(labels, groups=groups), 3)
    groups[-1] = "b"
    with pytest.raises(UserError, match=r"class '1' has 3 images in 2 groups that stay together"):
        divide(listing_of(labels, groups=groups), 3)
