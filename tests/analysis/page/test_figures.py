import numpy as np

from analysis.page.figures import draw_photos, heat_map, plt


def test_one_photo_is_drawn_no_larger_than_many():
    photos = [np.zeros((8, 8, 3), np.uint8)] * 7
    sizes = []
    for count in (1, 7):
        figure = draw_photos(photos[:count], ["a"] * count)
        assert sum(bool(axis.images) for axis in figure.axes) == count
        sizes.append(figure.get_size_inches()[0])
        plt.close(figure)
    assert sizes[0] == sizes[1]


def test_a_heat_map_writes_what_it_is_told_in_readable_ink():
    figure, axis = plt.subplots()
    values = np.array([[0.0, 1.0], [np.nan, 0.5]])
    texts = [["low", "high"], ["none", ""]]
    heat_map(axis, values, lambda i, j: texts[i][j], ["a", "$b"], [], cmap="Blues", vmin=0, vmax=1)
    assert {t.get_text(): t.get_color() for t in axis.texts} == {
        "low": "black", "high": "white", "none": "black",
    }  # fmt: skip
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", r"\$b"]
    plt.close(figure)
