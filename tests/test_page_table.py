"""The page table of paged caches against a model that is a list of tokens for each sequence."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pygen._runtime import PageTable


class Pages:
    """What the caller keeps beside a table: memory of pages, copied and written as the table says."""

    def __init__(self, pages: int, page_size: int) -> None:
        self.table = PageTable(pages, page_size)
        self.size = page_size
        self.memory = [[None] * page_size for _ in range(pages)]
        self.model: dict[int, list[int]] = {}

    def add(self, tokens: list[int]) -> None:
        sequence, reused = self.table.add(tokens)
        assert sequence not in self.model
        assert reused % self.size == 0
        assert reused <= max(0, len(tokens) - 1)
        self.model[sequence] = list(tokens[:reused])

    def append(self, sequences: list[int], tokens: list[list[int]], told: bool) -> None:
        count = len(tokens[0]) if tokens else 0
        before = {sequence: len(self.model[sequence]) for sequence in sequences}
        free = self.table.free_pages
        shared = {page: self.table.references(page) for s in sequences for page in self.table.pages_of(s)}
        try:
            copies = self.table.append(sequences, count, tokens if told else [])
        except RuntimeError:  # too few pages are free
            assert self.table.free_pages == free
            return
        assert all(shared[source] > 1 for source, _ in copies)
        assert len({target for _, target in copies}) == len(copies)
        for source, target in copies:
            self.memory[target] = list(self.memory[source])
        for sequence, own in zip(sequences, tokens, strict=True):
            pages = self.table.pages_of(sequence)
            for i, token in enumerate(own, before[sequence]):
                assert self.table.references(pages[i // self.size]) == 1, "a shared page is written to"
                self.memory[pages[i // self.size]][i % self.size] = token
            self.model[sequence] += own
        self.table.written(sequences)

    def check(self) -> None:
        assert self.table.sequences == sorted(self.model)
        held = {}
        for sequence, tokens in self.model.items():
            pages = self.table.pages_of(sequence)
            assert self.table.length(sequence) == len(tokens)
            assert len(pages) == -(-len(tokens) // self.size)
            assert len(set(pages)) == len(pages)
            assert [self.memory[pages[i // self.size]][i % self.size] for i in range(len(tokens))] == tokens
            for page in pages:
                held[page] = held.get(page, 0) + 1
        for page in range(self.table.page_count):
            assert self.table.references(page) == held.get(page, 0)
        assert self.table.free_pages == self.table.page_count - len(held)


@settings(max_examples=150)
@given(st.data())
def test_sequences_are_lists_of_tokens_and_no_page_leaks(data):
    pages = Pages(data.draw(st.integers(1, 14), label="pages"), data.draw(st.sampled_from([1, 2, 4]), label="size"))
    # Few ids, so that sequences often begin alike.
    tokens = st.lists(st.integers(0, 1), max_size=9)
    for _ in range(data.draw(st.integers(1, 25), label="operations")):
        there = sorted(pages.model)
        action = data.draw(st.sampled_from(["add", "append", "append", "append", "fork", "crop", "free"]))
        if action == "add" or not there:
            pages.add(data.draw(tokens))
        elif action == "append":
            chosen = data.draw(st.lists(st.sampled_from(there), unique=True, max_size=4))
            count = data.draw(st.integers(0, 6))
            own = [data.draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)) for _ in chosen]
            pages.append(chosen, own, data.draw(st.sampled_from([True, True, False])))
        elif action == "fork":
            sequence = data.draw(st.sampled_from(there))
            for number in pages.table.fork(sequence, data.draw(st.integers(0, 3))):
                pages.model[number] = list(pages.model[sequence])
        elif action == "crop":
            sequence = data.draw(st.sampled_from(there))
            length = data.draw(st.integers(0, len(pages.model[sequence])))
            pages.table.crop(sequence, length)
            del pages.model[sequence][length:]
        else:
            sequence = data.draw(st.sampled_from(there))
            pages.table.free(sequence)
            del pages.model[sequence]
        pages.check()
    for sequence in sorted(pages.model):
        pages.table.free(sequence)
    assert pages.table.free_pages == pages.table.page_count
    # All of them can still be given out at once.
    sequence, _ = pages.table.add()
    pages.table.append([sequence], pages.table.page_count * pages.table.page_size)
    assert sorted(pages.table.pages_of(sequence)) == list(range(pages.table.page_count))


def test_a_shared_prefix_is_found_while_and_after_it_is_held():
    table = PageTable(8, 4)
    tokens = list(range(10))
    first, reused = table.add(tokens)
    assert reused == 0
    table.append([first], 10, [tokens])
    table.written([first])
    second, reused = table.add([*tokens[:9], 99])
    assert reused == 8
    assert table.pages_of(second) == table.pages_of(first)[:2]
    table.free(first)
    table.free(second)
    assert table.free_pages == 8
    third, reused = table.add(tokens)
    assert reused == 8
    # The last token's output is still to be computed, so its page is not taken over whole.
    assert table.add(tokens[:8])[1] == 4
    assert table.add([5, *tokens[1:]])[1] == 0
    # The second page alone, or behind another first page, is another content.
    assert table.add(tokens[4:])[1] == 0
    assert table.length(third) == 8


def test_kept_prefixes_give_way_to_new_tokens_last_pages_first():
    table = PageTable(4, 2)
    first, _ = table.add()
    table.append([first], 8, [[1, 2, 3, 4, 5, 6, 7, 8]])
    table.written([first])
    table.free(first)
    second, _ = table.add()
    table.append([second], 4)
    assert table.add([1, 2, 3, 4, 5, 6, 7, 8, 9])[1] == 4


def test_pages_are_not_found_by_tokens_that_were_written_over():
    table = PageTable(4, 2)
    first, _ = table.add()
    table.append([first], 4, [[1, 2, 3, 4]])
    table.written([first])
    table.crop(first, 3)
    table.append([first], 1, [[9]])
    table.written([first])
    assert table.add([1, 2, 3, 4, 5])[1] == 2
    assert table.add([1, 2, 3, 9, 5])[1] == 4


def test_pages_are_not_found_before_they_are_written():
    table = PageTable(6, 2)
    first, _ = table.add()
    table.append([first], 2, [[1, 2]])
    assert table.add([1, 2, 3])[1] == 0
    table.written([first])
    assert table.add([1, 2, 3])[1] == 2
    # A block that was given up stays unknown, also behind a later one; what was cropped away does not count.
    table.append([first], 2, [[3, 4]])
    table.append([first], 2, [[5, 6]])
    table.written([first])
    assert table.add([1, 2, 3, 4, 5, 6, 7])[1] == 2
    table.free(first)
    second, _ = table.add([1, 2, 0])
    table.append([second], 2, [[3, 4]])
    table.crop(second, 2)
    table.append([second], 2, [[7, 8]])
    table.written([second])
    assert table.add([1, 2, 7, 8, 9])[1] == 4


def test_the_last_writer_of_a_shared_page_keeps_it():
    table = PageTable(6, 4)
    first, _ = table.add()
    table.append([first], 6)
    second, third = table.fork(first, 2)
    shared = table.pages_of(first)[1]
    copies = table.append([first, second, third], 1)
    assert [source for source, _ in copies] == [shared, shared]
    assert table.pages_of(third)[1] == shared
    assert len({page for s in (first, second, third) for page in table.pages_of(s)}) == 4


def test_table_as_bytes():
    table = PageTable(5, 2)
    sequences = [table.add()[0] for _ in range(2)]
    table.append(sequences[:1], 3)
    table.append(sequences[1:], 1)
    numbers = memoryview(table.table(sequences, 3)).cast("i").tolist()
    assert numbers == [*table.pages_of(sequences[0]), -1, *table.pages_of(sequences[1]), -1, -1]
    with pytest.raises(ValueError, match="columns is 1, but sequence 0 has 2 pages"):
        table.table(sequences, 1)


def test_refuses_in_one_sentence_and_changes_nothing():
    table = PageTable(3, 4)
    first, _ = table.add()
    table.append([first], 5)
    freed, _ = table.add()
    table.free(freed)
    refusals = {
        "sequence 1 was freed": (lambda: table.append([first, freed], 1), lambda: table.free(freed),
                                 lambda: table.crop(freed, 0), lambda: table.fork(freed), lambda: table.length(freed),
                                 lambda: table.written([first, freed])),
        "sequence 7 does not exist": (lambda: table.pages_of(7), lambda: table.append([7], 0)),
        "sequence 0 was given twice": (lambda: table.append([first, first], 1),),
        "length is 6, but expected 0 to 5": (lambda: table.crop(first, 6),),
        "tokens has ids for 1 sequences, but expected them for 2": (lambda: table.append([0, 1], 1, [[1]]),),
        "tokens has 2 ids for a sequence, but expected 1": (lambda: table.append([first], 1, [[1, 2]]),),
        "count is -1": (lambda: table.append([first], -1),),
        "page is 3, but expected 0 to 2": (lambda: table.references(3),),
        "page_size is 3, but expected a power of two": (lambda: PageTable(1, 3),),
        "pages is 0, but expected at least 1": (lambda: PageTable(0, 4),),
    }  # fmt: skip
    for sentence, calls in refusals.items():
        for call in calls:
            with pytest.raises(ValueError, match=sentence):
                call()
    with pytest.raises(RuntimeError, match="the sequences need 2 more pages, but 1 of 3 are free"):
        table.append([first], 8)
    assert table.length(first) == 5
    assert table.free_pages == 1
    assert table.sequences == [first]
