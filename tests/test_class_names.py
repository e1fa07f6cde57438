"""Which class a name means: labels first, exactly as they are; other readings only where they are certain."""

import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from se_flax.errors import UserError
from se_flax.images.class_names import ClassNames
from se_flax.images.labels import imagenet_labels

IMAGENET = tuple(label.name for label in imagenet_labels())


def mapped(labels, names, num_classes=None):
    found = ClassNames(labels, num_classes or len(labels)).classes(names, lambda name: f"the folder {name!r}")
    return [found[name] for name in names]


def refusal(labels, names, num_classes=None):
    with pytest.raises(UserError) as caught:
        mapped(labels, names, num_classes)
    return str(caught.value)


# Letters with and without case and marks, digits of two scripts, symbols, punctuation, blanks, joiners.
ALPHABET = "aAäÄéß\u017fİ\u0131\u03c3ςΣ猫अि10\u0663²+-\u2212_.,#!'/ \u200d\u0301"
TEXT = st.text(ALPHABET, min_size=1, max_size=4)
LABELS = st.lists(TEXT, min_size=1, max_size=8, unique_by=lambda x: unicodedata.normalize("NFC", x))
CHANGES = (str.upper, str.lower, str.title, lambda x: x.replace(" ", "_"), lambda x: x.partition(", ")[0], lambda x: x)


@st.composite
def labels_and_names(draw):
    """Labels, and folders named by changed labels, by numbers, or anyhow."""
    labels = draw(LABELS)
    changed = st.builds(lambda change, label: change(label), st.sampled_from(CHANGES), st.sampled_from(labels))
    numbers = st.integers(0, len(labels)).map(str)
    one = draw(st.sampled_from([changed, changed, numbers, changed | numbers | TEXT]))
    return labels, draw(st.lists(one.filter(bool), min_size=1, max_size=4, unique=True))


@given(LABELS, st.sampled_from(["NFC", "NFD"]), st.randoms())
@settings(max_examples=300, deadline=None)
def test_a_label_is_its_class_whatever_else_it_could_mean(labels, spelling, random):
    chosen = random.sample(range(len(labels)), random.randint(1, len(labels)))
    assert mapped(labels, [unicodedata.normalize(spelling, labels[i]) for i in chosen]) == chosen


@given(labels_and_names(), st.data())
@settings(max_examples=500, deadline=None)
def test_what_is_no_label_is_near_one_label_or_a_number_or_refused(labels_and_names, data):
    labels, names = labels_and_names
    try:
        classes = mapped(labels, names)
    except UserError:
        return

    def bare(text):
        """Letters, marks and digits: all that another reading of a name may not change."""
        text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        return "".join(c for c in text if unicodedata.category(c)[0] in "LMN")

    exact = [unicodedata.normalize("NFC", label) for label in labels]
    numbered = all(name.isascii() and name.isdigit() and int(name) == i for name, i in zip(names, classes, strict=True))
    for name, i in zip(names, classes, strict=True):
        canonical = unicodedata.normalize("NFC", name)
        if canonical in exact:
            assert exact[i] == canonical
        elif not numbered:
            firsts = [label.partition(", ")[0] for label in exact]
            if canonical in firsts:
                assert [j for j, first in enumerate(firsts) if first == canonical] == [i]
            assert bare(name) in (bare(exact[i]), bare(firsts[i]))
        else:  # a number: no label is another class's number
            assert not any(x in exact and exact.index(x) != int(x) for x in map(str, range(len(labels))))
    # Neither fewer folders nor another order makes a folder another class.
    kept = data.draw(st.permutations(range(len(names))))[: data.draw(st.integers(1, len(names)))]
    assert mapped(labels, [names[i] for i in kept]) == [classes[i] for i in kept]


# ---- other readings, where no label fits


@pytest.mark.parametrize(
    ("labels", "names", "classes"),
    [
        (("Golden retriever", "cat"), ["golden_retriever", "CAT"], [0, 1]),
        (("daisy, white", "rose"), ["daisy", "Rose"], [0, 1]),
        (("men/women", "St. Bernard"), ["men_women", "st bernard"], [0, 1]),
        (("GROẞE STRASSE", "Ärger"), ["große-straße", "ärger"], [0, 1]),
        (("cat", "dog", "cow"), ["0", "02"], [0, 2]),
        (("3d printer", "BMW X5 2012", "BMW X6 2013"), ["1", "2"], [1, 2]),
        (("digit 0", "digit 1", "digit 2"), ["2", "1"], [2, 1]),
        (("n01440764 tench", "n01443537"), ["n01440764", "n01443537-goldfish"], [0, 1]),
        (IMAGENET, ["n01440764", "goldfish", "Carcharodon carcharias", "tiger_shark"], [0, 1, 2, 3]),
        (IMAGENET, ["jack_o_lantern", "yellow_lady's_slipper", "Band Aid"], [607, 986, 419]),
        (IMAGENET, ["Cardigan", "cardigan", "maillot", "crayfish"], [264, 474, 638, 124]),
        (IMAGENET, ["n02012849", "n03126707"], [134, 517]),
        (IMAGENET, ["0", "999", "0134"], [0, 999, 134]),
    ],
)
def test_names_that_are_no_labels(labels, names, classes):
    assert mapped(labels, names) == classes


def test_what_fits_no_class_or_several_is_refused():
    assert (
        "the folder 'crane' fits several classes: class 134 ('crane'), class 517 ('crane'); use a name that only "
        in (refusal(IMAGENET, ["tench", "crane"]))
    )
    assert "use a name that only one of them has: a label or a WordNet id or a class number, 0 to 999" in (
        refusal(IMAGENET, ["CARDIGAN"])
    )
    assert refusal(("cat", "dog"), ["cats", "dog"]) == (
        "the folder 'cats' names none of the network's 2 classes (1 of 2 names do not); give a label or a class "
        "number, 0 to 1, for all of them; closest: cat"
    )
    # A number beside names, out of range, negative, or not a number of classes.
    for names in (["0", "dog"], ["0", "2"], ["-1", "0"], ["1.0"], ["²"], ["\u0660"]):
        assert "names none of the network's 2 classes" in refusal(("cat", "dog"), names)
    # Labels with numbers of their own: neither is guessed.
    for labels in (
        ("1", "2", "3"),
        ("1.0", "2.0", "3.0"),
        ("grade 1", "grade 2", "x"),
        ("-1", "0", "+1"),
        ("①", "②", "x"),
    ):
        assert "give a label (class numbers do not count, as the labels have numbers)" in refusal(labels, ["2 ", "01"])
    # Signs say something; so do marks that are no mere separators.
    for label, name in (
        ("AB-", "ab"),
        ("AB+", "AB"),
        ("C#", "C"),
        ("grade -1", "grade 1"),
        ("बिल्ली", "बल्ली"),
        ("猫", "犬"),
    ):
        assert "names none of the network's 1 classes" in refusal((label,), [name])
