"""Lists of module names, globs and re:patterns, as configs and users write them.

Configs come from strangers, and a regular expression can take for ever: `re:(a+)+$` doubles its time with
every letter. So a pattern is measured before it is used: what it may cost on a name, at worst, and how long
all of them have taken. One that is refused matches nothing and is named in `refused`.
"""

import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import translate
from functools import lru_cache
from math import comb

try:
    from re import _constants as sre
    from re import _parser
except ImportError:  # Python 3.10
    import sre_constants as sre
    import sre_parse as _parser

MAX_LENGTH = 1000  # characters; exporters' own have 150
MAX_STEPS = 1e8  # of one match: a second or two; `.*layers\.\d+\..*proj$` on 100 characters: 2e5
MAX_SECONDS = 60  # of all matches of a list: a pattern takes 0.1 s for the names of 250,000 modules
ENDLESS = 16  # a repeat that may differ by as much as this counts as one over the whole name


@dataclass(frozen=True)
class _Pattern:
    entry: str
    start: str  # what every match starts with: most modules are told apart by it
    compiled: re.Pattern
    ways: float  # to go through a name of length L: ways * comb(L + repeats, repeats)
    repeats: int


class Entries:
    """A name fits every module that has it as a run of its parts, as in vLLM and SGLang. Names are looked up
    and not searched: a model has 250,000 modules and 500 entries."""

    def __init__(self, entries: Iterable[str]):
        self.literal, self.patterns = set(), []
        self.refused: dict[str, str] = {}  # entry -> why
        self._seconds = 0.0
        for entry in entries:
            if not entry.startswith("re:") and not any(c in entry for c in "*?["):
                self.literal.add(entry)
                continue
            try:
                self.patterns.append(_parse(entry))
            except ValueError as error:
                self.refused[entry] = str(error)
        self.first_parts = {name.split(".")[0] for name in self.literal}

    def first_match(self, module: str) -> str | None:
        literal = next(self._runs(module), None)
        return literal or self._spend(
            lambda: next((p.entry for p in self.patterns if self._fits(p, module)), None)
        )

    def every_match(self, module: str) -> list[str]:
        fitting = self._spend(lambda: [p.entry for p in self.patterns if self._fits(p, module)])
        return [*self._runs(module), *fitting]

    def _runs(self, module: str) -> Iterator[str]:
        if not self.literal:
            return iter(())
        parts = module.split(".")
        starts = [i for i, part in enumerate(parts) if part in self.first_parts]
        runs = (".".join(parts[i:j]) for i in starts for j in range(i + 1, len(parts) + 1))
        return (run for run in runs if run in self.literal)

    def _spend(self, search):
        begun = time.perf_counter()
        found = search()
        self._seconds += time.perf_counter() - begun
        if self._seconds > MAX_SECONDS:
            why = f"all patterns together took more than {MAX_SECONDS} s"
            self.refused |= {pattern.entry: why for pattern in self.patterns}
            self.patterns = []
        return found

    def _fits(self, pattern: _Pattern, module: str) -> bool:
        if not module.startswith(pattern.start) or pattern.entry in self.refused:
            return False
        if pattern.ways * comb(len(module) + pattern.repeats, pattern.repeats) > MAX_STEPS:
            self.refused[pattern.entry] = f"it may take for ever on a name of {len(module)} characters"
            return False
        return pattern.compiled.match(module) is not None


def _parse(entry: str) -> _Pattern:
    if len(entry) > MAX_LENGTH:
        raise ValueError(f"it has {len(entry)} characters, at most {MAX_LENGTH} are read")
    if not entry.startswith("re:"):  # fnmatch's own expressions do not backtrack over their stars
        return _Pattern(entry, re.split(r"[*?\[]", entry, maxsplit=1)[0], re.compile(translate(entry)), 1, 1)
    try:
        ways, repeats = _cost(_parser.parse(entry[3:]))
        return _Pattern(entry, "", re.compile(entry[3:]), ways, repeats)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"it is no regular expression: {str(error)[:100]}") from None


def _cost(tree) -> tuple[float, int]:
    """(ways, repeats) of _Pattern: how often a matcher that backtracks may try, at worst."""
    ways, repeats = 1.0, 0
    for op, value in tree:
        more, again = 1.0, 0
        if op in (sre.MAX_REPEAT, sre.MIN_REPEAT, getattr(sre, "POSSESSIVE_REPEAT", None)):
            low, high, body = value
            more, again = _cost(body)
            if (again or more > 1) and high > 1:
                raise ValueError("a repeat within a repeat may take for ever")
            if high - low >= ENDLESS:
                again += 1
            else:
                more *= 1 + high - low
        elif op is sre.BRANCH:
            costs = [_cost(branch) for branch in value[1]]
            more, again = sum(w for w, _ in costs), max(r for _, r in costs)
        elif op is sre.SUBPATTERN:
            more, again = _cost(value[3])
        elif op in (sre.ASSERT, sre.ASSERT_NOT):
            more, again = _cost(value[1])
        elif op in (sre.GROUPREF, sre.GROUPREF_EXISTS):
            raise ValueError("references to groups are not read")
        elif op is getattr(sre, "ATOMIC_GROUP", None):
            more, again = _cost(value)
        ways, repeats = ways * more, repeats + again
    return ways, repeats


@lru_cache(1024)
def _entry(entry: str) -> Entries:
    return Entries([entry])


def matches(entry: str, module: str) -> bool:
    return _entry(entry).first_match(module) is not None


def refusal_of(entry: str) -> str | None:
    """Why an entry matches nothing, whatever the names."""
    return _entry(entry).refused.get(entry)
