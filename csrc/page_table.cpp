// Which pages of a paged key/value cache hold which tokens of which sequence.
#include "page_table.h"

#include <algorithm>
#include <set>
#include <stdexcept>
#include <string>

namespace pygen {
namespace {

void require(bool holds, const std::string& sentence) {
  if (!holds) throw std::invalid_argument(sentence);
}

std::string text(int64_t number) { return std::to_string(number); }

}  // namespace

PageTable::PageTable(int64_t pages, int64_t page_size) : page_size_(page_size) {
  require(pages > 0 && pages <= INT32_MAX, "pages is " + text(pages) + ", but expected at least 1");
  require(page_size > 0 && (page_size & (page_size - 1)) == 0,
          "page_size is " + text(page_size) + ", but expected a power of two");
  pages_.resize(static_cast<size_t>(pages));
  for (int64_t number = pages - 1; number >= 0; --number) empty_.push_back(static_cast<int32_t>(number));
}

std::pair<int64_t, int64_t> PageTable::add(const Tokens& tokens) {
  Sequence sequence;
  const int64_t whole = tokens.empty() ? 0 : (static_cast<int64_t>(tokens.size()) - 1) / page_size_;
  int64_t before = 0;
  for (int64_t index = 0; index < whole; ++index) {
    const auto found = page_of_.find(content(tokens, index, before));
    if (found == page_of_.end()) break;
    hold(found->second);
    before = page(found->second).content;
    sequence.pages.push_back(found->second);
  }
  sequence.length = sequence.written = static_cast<int64_t>(sequence.pages.size()) * page_size_;
  sequence.tokens.assign(tokens.begin(), tokens.begin() + sequence.length);
  const int64_t reused = sequence.length;
  sequences_.emplace(next_sequence_, std::move(sequence));
  return {next_sequence_++, reused};
}

PageTable::Copies PageTable::append(const std::vector<int64_t>& sequences, int64_t count,
                                    const std::vector<Tokens>& tokens) {
  require(count >= 0, "count is " + text(count) + ", but expected at least 0");
  require(tokens.empty() || tokens.size() == sequences.size(),
          "tokens has ids for " + text(static_cast<int64_t>(tokens.size())) + " sequences, but expected them for " +
              text(static_cast<int64_t>(sequences.size())) + " or none");
  for (const Tokens& own : tokens) {
    require(static_cast<int64_t>(own.size()) == count, "tokens has " + text(static_cast<int64_t>(own.size())) +
                                                           " ids for a sequence, but expected " + text(count));
  }
  const int64_t missing = missing_pages(sequences, count);
  if (missing > free_pages()) {
    throw std::runtime_error("the sequences need " + text(missing) + " more pages, but " + text(free_pages()) + " of " +
                             text(page_count()) + " are free");
  }
  Copies copies;
  if (count == 0) return copies;
  for (size_t i = 0; i < sequences.size(); ++i) {
    Sequence& sequence = find(sequences[i]);
    if (sequence.length % page_size_) {
      int32_t& last = sequence.pages.back();
      if (page(last).references > 1) {
        const int32_t copy = take();
        copies.emplace_back(last, copy);
        release(last);
        last = copy;
      } else {
        forget(last);  // a page cropped into is written to again
      }
    }
    sequence.known = sequence.known && !tokens.empty() && sequence.written == sequence.length;
    if (sequence.known) {
      sequence.tokens.insert(sequence.tokens.end(), tokens[i].begin(), tokens[i].end());
    } else {
      sequence.tokens.clear();
    }
    sequence.length += count;
    while (static_cast<int64_t>(sequence.pages.size()) < pages_for(sequence.length)) sequence.pages.push_back(take());
  }
  return copies;
}

void PageTable::written(const std::vector<int64_t>& sequences) {
  for (const int64_t number : sequences) find(number);
  for (const int64_t number : sequences) {
    Sequence& sequence = find(number);
    sequence.written = sequence.length;
    if (!sequence.known) continue;
    const int64_t whole = sequence.length / page_size_;
    int64_t index = whole;
    while (index > 0 && !page(sequence.pages[static_cast<size_t>(index - 1)]).content) --index;
    for (; index < whole; ++index) {
      const int32_t own = sequence.pages[static_cast<size_t>(index)];
      const int64_t before = index ? page(sequence.pages[static_cast<size_t>(index - 1)]).content : 0;
      const auto [found, fresh] = page_of_.try_emplace(content(sequence.tokens, index, before), own);
      if (fresh) {
        page(own).known = &found->first;
        page(own).content = next_content_++;
      } else {
        page(own).content =
            page(found->second).content;  // another page has the same tokens, and is the one to be found
      }
    }
  }
}

std::vector<int64_t> PageTable::fork(int64_t sequence, int64_t copies) {
  require(copies >= 0, "copies is " + text(copies) + ", but expected at least 0");
  const Sequence& own = find(sequence);
  std::vector<int64_t> numbers;
  for (int64_t i = 0; i < copies; ++i) {
    for (const int32_t number : own.pages) ++page(number).references;
    sequences_.emplace(next_sequence_, own);
    numbers.push_back(next_sequence_++);
  }
  return numbers;
}

void PageTable::crop(int64_t sequence, int64_t length) {
  Sequence& own = find(sequence);
  require(length >= 0 && length <= own.length, "length is " + text(length) + ", but expected 0 to " + text(own.length) +
                                                   ", the tokens of sequence " + text(sequence));
  release_after(own, pages_for(length));
  own.length = length;
  own.written = std::min(own.written, length);
  if (own.known) own.tokens.resize(static_cast<size_t>(length));
}

void PageTable::free(int64_t sequence) {
  release_after(find(sequence), 0);
  sequences_.erase(sequence);
}

int64_t PageTable::length(int64_t sequence) const { return find(sequence).length; }

const std::vector<int32_t>& PageTable::pages_of(int64_t sequence) const { return find(sequence).pages; }

int64_t PageTable::references(int64_t page) const {
  require(page >= 0 && page < page_count(), "page is " + text(page) + ", but expected 0 to " + text(page_count() - 1));
  return pages_[static_cast<size_t>(page)].references;
}

std::vector<int64_t> PageTable::sequences() const {
  std::vector<int64_t> numbers;
  for (const auto& [number, sequence] : sequences_) numbers.push_back(number);
  return numbers;
}

// The splitmix64 finalizer (Steele et al. 2014, doi:10.1145/2660193.2660195) over one number after another.
size_t PageTable::Hash::operator()(const Content& content) const {
  auto hash = static_cast<uint64_t>(content.before);
  const auto mix = [&hash](uint64_t x) {
    hash = (hash ^ x) + 0x9e3779b97f4a7c15;
    hash = (hash ^ (hash >> 30)) * 0xbf58476d1ce4e5b9;
    hash = (hash ^ (hash >> 27)) * 0x94d049bb133111eb;
    hash ^= hash >> 31;
  };
  for (const int64_t token : content.tokens) mix(static_cast<uint64_t>(token));
  return static_cast<size_t>(hash);
}

const PageTable::Sequence& PageTable::find(int64_t sequence) const {
  const auto found = sequences_.find(sequence);
  require(
      found != sequences_.end(),
      "sequence " + text(sequence) + (sequence >= 0 && sequence < next_sequence_ ? " was freed" : " does not exist"));
  return found->second;
}

PageTable::Content PageTable::content(const Tokens& tokens, int64_t index, int64_t before) const {
  const auto from = tokens.begin() + index * page_size_;
  return {before, Tokens(from, from + page_size_)};
}

// The caller has made sure that a page is free.
int32_t PageTable::take() {
  if (empty_.empty()) {
    const int32_t oldest = kept_.front();
    kept_.pop_front();
    forget(oldest);
    empty_.push_back(oldest);
  }
  const int32_t number = empty_.back();
  empty_.pop_back();
  page(number).references = 1;
  return number;
}

void PageTable::hold(int32_t number) {
  if (page(number).references++ == 0) kept_.erase(page(number).kept);
}

void PageTable::release(int32_t number) {
  Page& own = page(number);
  if (--own.references > 0) return;
  if (own.known) {
    own.kept = kept_.insert(kept_.end(), number);
  } else {
    own.content = 0;
    empty_.push_back(number);
  }
}

// Last pages first: they are the first to be given away, and nothing is found behind a page that is gone.
void PageTable::release_after(Sequence& sequence, int64_t pages) {
  while (static_cast<int64_t>(sequence.pages.size()) > pages) {
    release(sequence.pages.back());
    sequence.pages.pop_back();
  }
}

void PageTable::forget(int32_t number) {
  Page& own = page(number);
  if (own.known) page_of_.erase(page_of_.find(*own.known));
  own.known = nullptr;
  own.content = 0;
}

// Pages that an append takes: new ones, and copies of last pages that are written to and shared. The last to write to a
// page keeps it.
int64_t PageTable::missing_pages(const std::vector<int64_t>& sequences, int64_t count) const {
  std::set<int64_t> distinct;
  std::map<int32_t, int64_t> writers;
  int64_t missing = 0;
  for (const int64_t number : sequences) {
    const Sequence& sequence = find(number);
    require(distinct.insert(number).second, "sequence " + text(number) + " was given twice, but expected once");
    missing += pages_for(sequence.length + count) - static_cast<int64_t>(sequence.pages.size());
    if (count && sequence.length % page_size_) ++writers[sequence.pages.back()];
  }
  for (const auto& [number, writing] : writers) missing += std::min(writing, references(number) - 1);
  return missing;
}

}  // namespace pygen
