import numpy as np
import pytest

from analysis.explain import selection
from analysis.runs import load_run
from errors import UserError
from tests.analysis.fabricate import write_run


def test_images_are_chosen_by_disagreement_and_spread_over_classes():
    labels = np.repeat([0, 1, 2], 10)
    votes = np.stack([labels, labels, labels, labels])
    votes[0, [3, 4, 14]] = (labels[[3, 4, 14]] + 1) % 3
    votes[1, 3] = 2  # three opinions about image 3
    rows = selection.by_disagreement(votes, labels, 6)
    assert rows[:3] == [3, 14, 4]  # the most disputed of each class first
    assert len(set(rows)) == 6 and not {3, 4, 14} & set(rows[3:])
    assert sorted(labels[rows].tolist()) == [0, 0, 1, 1, 2, 2]
    assert rows == selection.by_disagreement(votes, labels, 6)
    assert len(selection.by_disagreement(votes[:1], labels, 4)) == 4  # one model: no dispute


def test_images_are_found_by_number_or_id(tmp_path):
    run = load_run(write_run(tmp_path, "cnn", 0, count=50))
    rows = selection.find_images(run, "8")
    assert len(set(rows)) == 8
    assert (np.bincount(run.test["labels"][rows]) == 2).all()  # spread over the four classes
    assert selection.find_images(run, "test/7.png, test/3.png,") == [7, 3]
    assert selection.find_image(run, "test/7.png") == 7
    with pytest.raises(UserError, match=r"not tested on an image 'tests/7.png'.*'test/7\.png'"):
        selection.find_image(run, "tests/7.png")
    for nothing in ("0", ","):
        with pytest.raises(UserError, match="at least one image"):
            selection.find_images(run, nothing)
