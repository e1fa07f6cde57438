"""Matching of names (of folders, in files, or typed) with a network's classes.

A name that equals a label means that class. Only other names are matched more loosely, and a name that fits several
classes is refused. `docs/checkpoints.md` has the rule for users.
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence

from se_flax.errors import UserError, closest
from se_flax.images.class_folders import canonical
from se_flax.images.labels import imagenet_labels

_WORDNET_ID = re.compile(r"n[0-9]{8}(?![^\W_])")
_NUMBER = re.compile(r"(?:(?<!\w)-)?\d+(?:[.,]\d+)?")
# A hyphen before a number or after a word is a sign (`-1`, the blood group `AB-`); one between words is not.
_SIGN = re.compile(r"(?<![^\s_])-(?=\d)|(?<=[^\W_])-(?![^\s_])")
_MEANINGFUL = "#%&*@"


class ClassNames:
    """The allowed names of a network's classes.

    Args:
      labels: of the network, one per class; None if unknown.
      num_classes: of the network.

    Attributes:
      labels: as given.
      num_classes: as given.
      numbers: whether class numbers are allowed as names; False if the labels contain other numbers.
    """

    def __init__(self, labels: Sequence[str] | None, num_classes: int):
        self.labels, self.num_classes = labels, num_classes
        own = [canonical(label) for label in labels or ()]
        wordnet = [label.wordnet_id for label in imagenet_labels()] if own == _imagenet() else None
        names = [_names(label, wordnet is not None) for label in own]
        # Each tier has one kind of comparison; the first tier with the name decides.
        self._tiers: list[dict[str, set[int]]] = [{} for _ in range(5)]
        exact, first, other, loose, other_loose = self._tiers
        for i, label in enumerate(own):
            _add(exact, i, [label])
            _add(first, i, [names[i][0], *([wordnet[i]] if wordnet else _leading_id(label))])
            _add(other, i, names[i])
            _add(loose, i, map(_loosely, (label, names[i][0])))
            _add(other_loose, i, map(_loosely, names[i]))
        self.numbers = _numbered_as_classes(
            [*enumerate(own), *((i, name[0]) for i, name in enumerate(names))], num_classes
        )

    def named(self, name: str) -> tuple[int, ...]:
        """The classes whose label or WordNet id a name matches: none, one, or several.

        Args:
          name: any text.

        Returns:
          Class numbers, ascending.
        """
        name = canonical(name)
        keys = [name, name, name, _loosely(name), _loosely(name)]
        looked_up = [*zip(self._tiers, keys, strict=True), *((self._tiers[1], key) for key in _leading_id(name))]
        return next((tuple(sorted(tier[key])) for tier, key in looked_up if key in tier), ())

    def number(self, name: str) -> int | None:
        """The class whose number a name is; None for other names, and if class numbers are not allowed."""
        number = int(name) if re.fullmatch(r"[0-9]{1,18}", name) else self.num_classes
        return number if self.numbers and number < self.num_classes else None

    def one(self, name: str) -> int:
        """The class of a name or number.

        Args:
          name: as typed; surrounding blanks are ignored.

        Raises:
          UserError: the name fits no class, or several.
        """
        name = name.strip()
        fitting, number = self.named(name), self.number(name)
        if len(fitting) > 1:
            raise UserError(f"the class {name!r} {self._several(fitting)}")
        if fitting:
            return fitting[0]
        if number is None:
            raise UserError(f"unknown class {name!r}; give {self.allowed()}{self._nearest(name)}")
        return number

    def classes(self, names: Iterable[str], describe: Callable[[str], str]) -> dict[str, int]:
        """The classes of all names of a data set.

        Names are read as class numbers only if all are numbers and none is a label, so that the meaning of a name does
        not depend on the others.

        Args:
          names: of folders, without duplicates.
          describe: describes a name in a message.

        Returns:
          The class number by name.

        Raises:
          UserError: a name fits no class, or several.
        """
        fitting = {name: self.named(name) for name in names}
        if not any(fitting.values()):
            numbers = {name: number for name in fitting if (number := self.number(name)) is not None}
            if len(numbers) == len(fitting):
                return numbers
            unknown = [name for name in fitting if name not in numbers]
        else:
            unknown = [name for name, classes in fitting.items() if not classes]
        if unknown:
            raise UserError(
                f"{describe(unknown[0])} names none of the network's {self.num_classes} classes ({len(unknown)} of "
                f"{len(fitting)} names do not); give {self.allowed(together=True)}{self._nearest(unknown[0])}"
            )
        for name, classes in fitting.items():
            if len(classes) > 1:
                raise UserError(f"{describe(name)} {self._several(classes)}")
        return {name: classes[0] for name, classes in fitting.items()}

    def described(self, number: int) -> str:
        """A class for a message: its number, and its label if there is one."""
        return f"class {number}" + (f" ({self.labels[number]!r})" if self.labels else "")

    def allowed(self, *, together: bool = False) -> str:
        """The allowed kinds of names for this network, in words."""
        kinds = ["a label"] if self.labels else []
        kinds += ["a WordNet id"] if any(map(_WORDNET_ID.fullmatch, self._tiers[1])) else []
        if not self.numbers:
            return " or ".join(kinds) + " (class numbers do not count, as the labels have numbers)"
        number = f"a class number, 0 to {self.num_classes - 1}"
        return " or ".join([*kinds, f"{number}, for all of them" if together else number])

    def _several(self, classes: Sequence[int]) -> str:
        shown = ", ".join(self.described(i) for i in classes[:4]) + (", ..." if len(classes) > 4 else "")
        return f"fits several classes: {shown}; use a name that only one of them has: {self.allowed()}"

    def _nearest(self, name: str) -> str:
        hint = closest(_loosely(name) or name, self._tiers[3])
        return f"; {hint}" if hint.startswith("closest") else ""


def _names(label: str, synonyms: bool) -> list[str]:
    """The names in a label such as `tench, Tinca tinca`; only WordNet's labels are known to be lists of synonyms."""
    names = re.split(r",\s+", label)
    return names if synonyms else names[:1]


def _loosely(name: str) -> str:
    """A name without case and punctuation, with words joined by blanks; empty if it has no letter.

    Letters, their marks, digits and symbols of all scripts are kept. Names without letters are not matched, since `1.5`
    and `1/5` would be the same.
    """
    text = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    if not _has_letter(text):
        return ""
    text = _SIGN.sub("\N{MINUS SIGN}", text)
    kept = (c if c in _MEANINGFUL or unicodedata.category(c)[0] in "LMNS" else " " for c in text)
    return " ".join("".join(kept).split())


def _has_letter(text: str) -> bool:
    return any(unicodedata.category(character)[0] == "L" for character in text)


def _numbered_as_classes(names: Iterable[tuple[int, str]], num_classes: int) -> bool:
    """Whether labels that are numbers (`1`) or a numbered series (`grade 1`, `grade 2`) have their class's number.

    If not, a folder `1` could mean the label with that number or the class with that number.
    """
    series: dict[str, set[tuple[int, float]]] = {}
    for i, name in names:
        text = unicodedata.normalize("NFKC", name).casefold()
        found = _NUMBER.findall(text)
        if len(found) == 1:
            around = _NUMBER.sub("", text)
            series.setdefault(around, set()).add((i, float(found[0].replace(",", "."))))
    return all(
        number == i or number >= num_classes
        for around, members in series.items()
        if len(members) > 1 or not _has_letter(around)
        for i, number in members
    )


def _leading_id(name: str) -> list[str]:
    """The WordNet id at the beginning of `n02085620-Chihuahua`, if there is one."""
    found = _WORDNET_ID.match(name)
    return [found.group()] if found else []


def _imagenet() -> list[str]:
    return [canonical(label.name) for label in imagenet_labels()]


def _add(tier: dict[str, set[int]], number: int, names: Iterable[str]) -> None:
    for name in filter(None, names):
        tier.setdefault(name, set()).add(number)
