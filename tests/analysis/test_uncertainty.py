import itertools
import math

import numpy as np
import pytest
from scipy import stats
from statsmodels.stats.proportion import proportion_confint

from analysis import uncertainty
from analysis.criterion import values, weights
from analysis.uncertainty import Family
from tests.analysis.simulate import draw, truth

DRAWS = 1000


def coverage(draw_interval, truth):
    held = 0
    for seed in range(DRAWS):
        low, high = draw_interval(np.random.default_rng(seed))
        held += low <= truth <= high
    return held / DRAWS


def family(answers, **options):
    return Family({str(i): values for i, values in enumerate(answers)}, **options)


@pytest.mark.parametrize("right", [0, 1, 37, 60])
def test_image_interval_of_one_seed_is_wilsons(right):
    correct = np.arange(60)[None] < right
    theirs = stats.binomtest(right, 60).proportion_ci(method="wilson")
    assert uncertainty.image_interval(correct) == pytest.approx((theirs.low, theirs.high))
    assert uncertainty.image_interval(correct) == pytest.approx(
        proportion_confint(right, 60, method="wilson")
    )
    twice = np.repeat(correct, 3, axis=0)  # seeds that agree add nothing
    assert uncertainty.image_interval(twice) == pytest.approx((theirs.low, theirs.high))


def test_wilson_interval_of_eight_in_ten():
    assert uncertainty.wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert uncertainty.wilson(0, 0) == (0, 1)


@pytest.mark.parametrize("accuracy", [0.6, 0.9, 0.97])
def test_image_interval_of_one_seed_covers_the_truth(accuracy):
    share = coverage(
        lambda rng: uncertainty.image_interval(rng.random((1, 500)) < accuracy), accuracy
    )
    assert 0.93 <= share <= 0.97


def test_image_interval_of_several_seeds_covers_the_truth():
    """Images differ in difficulty, so the seeds' mistakes go together."""
    truth = 8 / (8 + 2)

    def draw(rng):
        easy = rng.beta(8, 2, 500)
        return uncertainty.image_interval(rng.random((3, 500)) < easy)

    assert 0.93 <= coverage(draw, truth) <= 0.97


# Models, seeds of each, images, scatter of seeds in points of accuracy.
EQUAL_MODELS = [
    ((2,) * 2, 600, 2),
    ((2,) * 5, 600, 2),
    ((3,) * 5, 600, 2),
    ((2,) * 10, 400, 2),
    ((10,) * 3, 400, 2),
    ((3,) * 5, 600, 0),
    ((2,) * 2, 600, 0),
    ((1,) * 5, 400, 0),
    ((2, 3, 5, 8, 10), 300, 2),
    ((1, 1, 1, 3, 3), 400, 2),
    ((3,) * 5, 30, 2),
]


@pytest.mark.parametrize(("seeds", "images", "scatter"), EQUAL_MODELS)
def test_equal_models_are_rarely_told_apart(seeds, images, scatter):
    """Some difference is established in at most 6 % of experiments; here 400 of them."""
    wrong = sum(
        family(draw(np.random.default_rng(i), seeds, images, scatter / 100)).pairs.established.any()
        for i in range(400)
    )
    assert wrong / 400 <= 0.06


def test_better_models_are_found():
    """Five points, 3 seeds without scatter and 600 images: the rule of two-way analyses found 60 %."""
    found = [
        family(draw(np.random.default_rng(i), (3,) * 5, 600, 0, [0.05])).pairs.established[:4]
        for i in range(100)
    ]
    assert np.mean(found) > 0.6


@pytest.mark.parametrize(
    ("seeds", "images", "scatter", "group"),
    [
        (3, 600, 2, 1),
        (3, 600, 0, 1),
        (2, 600, 2, 1),
        (1, 400, 0, 1),
        (3, 900, 1, 10),
        (1, 900, 0, 20),
    ],
)
def test_intervals_over_seeds_and_images_cover_the_truth(seeds, images, scatter, group):
    """Also of images in groups; over images alone they would cover 54 to 82 % there."""
    clusters = np.arange(images) // group if group > 1 else None
    held, alone = [], []
    for i in range(300):
        answers = draw(np.random.default_rng(i), (seeds,) * 3, images, scatter / 100, group=group)
        of_all = family(answers, clusters=clusters)
        held += [
            low <= truth(scatter / 100) <= high for low, high in map(of_all.interval, of_all.mean)
        ]
        if group > 1:
            wrong = family(answers)
            alone += [
                low <= truth(scatter / 100) <= high for low, high in map(wrong.interval, wrong.mean)
            ]
    assert 0.93 <= np.mean(held) <= 0.995
    assert group == 1 or np.mean(alone) < 0.85


def test_groups_keep_equal_models_together():
    wrong = []
    for i in range(300):
        answers = draw(np.random.default_rng(i), (2,) * 4, 600, 0.01, group=10)
        wrong.append(
            [
                family(answers, clusters=clusters).pairs.established.any()
                for clusters in (np.arange(600) // 10, None)
            ]
        )
    grouped, alone = np.mean(wrong, axis=0)
    assert grouped <= 0.06 < 0.12 < alone


@pytest.mark.parametrize("sizes", [(30,) * 10, (150, 50, 30, 20, 15, 10, 10, 5, 5, 5)])
def test_few_groups_of_unequal_size(sizes):
    """Counted as ten, the intervals of the second cover 80 %; the first must not grow for it."""
    clusters = np.repeat(np.arange(10), sizes)
    held, widths, apart = [], [], 0
    for i in range(200):
        rng = np.random.default_rng(i)
        shared = 1.2 + 0.6 * rng.normal(size=10)[clusters] + 0.7 * rng.normal(size=300)
        of_all = family(
            [
                (
                    shared
                    + 0.3 * rng.normal(size=10)[clusters]
                    + 0.5 * rng.normal(size=300)
                    + 0.7 * rng.normal(size=(3, 300))
                    > 0
                ).astype(float)
                for _ in range(3)
            ],
            clusters=clusters,
        )
        true = stats.norm.cdf(1.2 / math.sqrt(0.6**2 + 0.7**2 + 0.3**2 + 0.5**2 + 0.7**2))
        ends = [of_all.interval(label) for label in of_all.mean]
        held += [low <= true <= high for low, high in ends]
        widths += [high - low for low, high in ends]
        apart += of_all.pairs.established.any()
    assert np.mean(held) > 0.91 and apart / 200 <= 0.06
    assert max(sizes) > 30 or np.mean(widths) < 0.25


def test_groups_whose_images_are_not_alike_cost_little_power():
    """20 points between two models, in 20 groups of 10 images: made-up whole groups would hide it."""
    found = 0
    for i in range(50):
        answers = draw(np.random.default_rng(i), (3, 3), 200, 0, [0.12])
        found += family(answers, clusters=np.arange(200) // 10).pairs.established[0]
    assert found / 50 > 0.6


def test_seeds_that_agree_by_chance_are_no_less_uncertain_than_their_images():
    """Three seeds, each right 9 times in 10 on other images, are 270 answers and no more."""
    answers = np.ones((3, 90))
    for seed in range(3):
        answers[seed, 9 * seed : 9 * seed + 9] = 0
    of_one, by_answers = family([answers]), uncertainty.wilson(243, 270)
    assert of_one.seed_variance == 0
    low, high = of_one.interval("0")
    assert low < by_answers[0] and high > by_answers[1]


def test_one_group_says_nothing_of_others():
    answers = draw(np.random.default_rng(0), (3, 3), 200, 0, [0.1])
    of_both = family(answers, clusters=np.zeros(200, int))
    low, high = of_both.interval("0")
    assert high - low > 0.5 and not of_both.pairs.established[0]


@pytest.mark.parametrize("criterion", ["balanced_accuracy", "macro_f1"])
def test_rare_classes_leave_wide_intervals(criterion):
    """5 images of 600 are half of the balanced accuracy: all right by chance, they seem certain.

    Without weights the interval covers 0.6 with 3 seeds, and 0.2 with one.
    """
    labels = np.repeat([0, 1], [595, 5])
    pool = np.repeat([0, 1], [59_500, 500])

    def answers(rng, labels, seeds):
        shared = 1.9 + rng.normal(size=len(labels))
        noise = 0.5 * rng.normal(size=(seeds, len(labels)))
        return np.where(shared + noise > 0, labels, 1 - labels)

    rng = np.random.default_rng(0)
    true = np.mean([values(pool, of, criterion).mean() for of in answers(rng, pool, 4)])
    for seeds in (1, 3):
        held, apart = [], 0
        for i in range(200):
            rng = np.random.default_rng(i)
            drawn = [
                np.stack([values(labels, of, criterion) for of in answers(rng, labels, seeds)])
                for _ in range(3)
            ]
            of_all = family(drawn, weights=weights(labels, criterion))
            held += [low <= true <= high for low, high in map(of_all.interval, of_all.mean)]
            apart += of_all.pairs.established.any()
        assert np.mean(held) > 0.92 and apart / 200 <= 0.06


def test_the_interval_of_a_model_picked_by_its_test_score_is_the_simultaneous_one():
    held = {0.95: 0, 0.95 ** (1 / 10): 0}
    for i in range(300):
        of_all = family(draw(np.random.default_rng(i), (3,) * 10, 400, 0))
        best = max(of_all.mean, key=of_all.mean.get)
        for level in held:
            low, high = of_all.interval(best, level)
            held[level] += low <= truth(0) <= high
    plain, simultaneous = (count / 300 for count in held.values())
    assert plain < 0.93 < simultaneous


def test_probabilities_are_right_as_often_as_they_say():
    said, true = [], []
    for i in range(1500):
        rng = np.random.default_rng(i)
        gain = rng.normal(0, 0.05)
        of_both = family(draw(rng, (3, 3), 300, 0.01, [gain]))
        said.append(of_both.probability(of_both.pairs.iloc[0]))
        true.append(gain > 0)
    said, true = np.array(said), np.array(true)
    for low, high in ((0, 0.2), (0.2, 0.5), (0.5, 0.8), (0.8, 1.01)):
        inside = (said >= low) & (said < high)
        assert abs(said[inside].mean() - true[inside].mean()) < 0.08


def test_what_is_needed_is_enough():
    """As many seeds, or images, as `needed` says establish the difference in about 80 %."""
    reached = {"seeds": [], "images": []}
    pair_seed = 0
    while len(reached["images"]) < 3:
        pair_seed += 1
        answers = draw(np.random.default_rng(pair_seed), (3, 3), 400, 0.002, [0.03])
        first = family(answers)
        row = first.pairs.iloc[0]
        _, images, _ = first.needed(row)
        if row.established or not 0.02 < row.difference < 0.04 or not images < 3000:
            continue
        found = [
            family(
                draw(
                    np.random.default_rng([pair_seed, k]),
                    (3, 3),
                    int(images),
                    0.002,
                    [row.difference],
                )
            ).pairs.established[0]
            for k in range(60)
        ]
        reached["images"].append(np.mean(found))
    assert 0.55 <= np.mean(reached["images"]) <= 0.97
    far = family([np.tile([1.0, 0.0], (3, 50)), np.tile([0.0, 1.0], (3, 50))])
    assert all(math.isinf(x) for x in far.needed(far.pairs.iloc[0]))


def test_the_verdict_the_interval_and_p_agree():
    for i in range(60):
        pairs = family(draw(np.random.default_rng(i), (3,) * 4, 300, 0.01, [0.06, 0.03])).pairs
        apart = (pairs.ci95_low > 0) | (pairs.ci95_high < 0)
        assert (apart == pairs.established).all()
        assert ((pairs.p < 0.05) == pairs.established).all()
        assert (pairs.ci95_low < pairs.difference).all() and (
            pairs.difference < pairs.ci95_high
        ).all()


def test_quantiles_are_tukeys_and_students():
    assert uncertainty.quantile(2, 7, 0.05) == pytest.approx(stats.t.isf(0.025, 7))
    both = stats.tukey_hsd(*np.random.default_rng(0).normal(size=(3, 5)))
    half = (both.confidence_interval(0.95).high - both.confidence_interval(0.95).low)[0, 1] / 2
    scale = both._stand_err  # of one difference, times the root of a half
    assert uncertainty.quantile(3, 12, 0.05) * math.sqrt(2) == pytest.approx(half / scale, rel=1e-3)


def test_equal_and_opposite_models_have_intervals_of_some_width():
    answers = (np.random.default_rng(0).random((3, 50)) < 0.7).astype(float)
    row = family([answers, answers]).pairs.iloc[0]
    assert row.difference == 0 and row.p == pytest.approx(1) and not row.established
    assert row.ci95_low < 0 < row.ci95_high
    right = np.ones((3, 50))
    row = family([right, 0 * right]).pairs.iloc[0]
    assert row.established and row.ci95_low < 1 and row.ci95_high == 1
    low, high = family([right, right]).interval("0")
    assert 0.9 < low < 1 and high == 1


def test_one_seed_speaks_of_images_alone_and_a_fixed_model_of_no_seeds():
    answers = draw(np.random.default_rng(0), (1, 1), 200, 0)
    of_both = family(answers)
    assert of_both.freedom == 0 and (of_both.pairs.variance_seeds == 0).all()
    drawn = draw(np.random.default_rng(0), (3, 3), 200, 0.02)
    drawn[1] = np.repeat(drawn[1][:1], 3, axis=0)
    fixed = family(drawn, fixed={"1"})
    assert fixed.freedom == 2 and family(drawn).freedom == 4
    assert fixed.pairs.variance_seeds[0] > family(drawn).pairs.variance_seeds[0] / 4 > 0


def test_letters_are_shared_by_those_that_cannot_be_told_apart():
    rng = np.random.default_rng(0)
    labels = list("ABCDEFG")
    for share in (0, 0.2, 0.5, 0.8, 1):
        apart = {p for p in itertools.combinations(labels, 2) if rng.random() < share}
        letters = uncertainty.letters(labels, apart)
        for pair in itertools.combinations(labels, 2):
            assert bool(set(letters[pair[0]]) & set(letters[pair[1]])) == (pair not in apart)
        assert letters["A"].startswith("a")
    assert set(uncertainty.letters(labels, set()).values()) == {"a"}


def test_pareto_front_against_the_definition():
    rng = np.random.default_rng(0)
    costs, values = rng.integers(0, 8, 30).astype(float), rng.integers(0, 8, 30).astype(float)
    front = uncertainty.pareto_front(costs, values)
    for i in range(30):
        beaten = any(
            costs[j] <= costs[i]
            and values[j] >= values[i]
            and (costs[j], values[j]) != (costs[i], values[i])
            for j in range(30)
        )
        assert (i in front) == (not beaten)
    assert uncertainty.pareto_front([1, math.nan, 2], [1, 2, 0.5]) == [0]
