// Which pages of a paged key/value cache hold which tokens of which sequence (Kwon et al. 2023, arXiv:2309.06180,
// section 4). It holds numbers, no keys: forks share pages, a page is copied by the caller when one of those who share
// it writes to it, and a page whose token ids are known is found again by the next sequence that begins with them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <list>
#include <map>
#include <unordered_map>
#include <utility>
#include <vector>

namespace pygen {

class PageTable {
 public:
  using Tokens = std::vector<int64_t>;
  using Copies = std::vector<std::pair<int32_t, int32_t>>;  // (from page, to page)

  PageTable(int64_t pages, int64_t page_size);

  // A new, empty sequence, or one that begins with the whole pages of `tokens` that are there already; its number, and
  // how many tokens that are. The last of `tokens` is never taken from there: its output is still to be computed.
  std::pair<int64_t, int64_t> add(const Tokens& tokens);

  // Room for `count` more tokens of each sequence. `tokens`, where not empty, has the ids of each sequence's. Returns
  // the pages that the caller has to copy before it writes. All or nothing.
  Copies append(const std::vector<int64_t>& sequences, int64_t count, const std::vector<Tokens>& tokens);

  // The caller has written all tokens of these sequences: their whole pages can be found by the ids from now on. Those
  // of a sequence that is appended to before that never are.
  void written(const std::vector<int64_t>& sequences);

  // Further sequences with the same tokens, on the same pages.
  std::vector<int64_t> fork(int64_t sequence, int64_t copies);
  void crop(int64_t sequence, int64_t length);
  void free(int64_t sequence);

  int64_t length(int64_t sequence) const;
  const std::vector<int32_t>& pages_of(int64_t sequence) const;
  int64_t page_size() const { return page_size_; }
  int64_t page_count() const { return static_cast<int64_t>(pages_.size()); }
  // Pages that no sequence holds; some of them may still be found by their tokens until they are needed.
  int64_t free_pages() const { return static_cast<int64_t>(empty_.size() + kept_.size()); }
  int64_t references(int64_t page) const;
  std::vector<int64_t> sequences() const;

 private:
  // What a page is known by: the tokens in it, behind those of the page before. Numbers of pages' contents are never
  // used again, so that equal contents mean equal tokens from the beginning of the sequence on.
  struct Content {
    int64_t before;  // 0 at the beginning of a sequence
    Tokens tokens;
    bool operator==(const Content&) const = default;
  };
  struct Hash {
    std::size_t operator()(const Content& content) const;
  };
  struct Page {
    int64_t references = 0;
    int64_t content = 0;  // its number, or 0 while it is not known
    const Content* known = nullptr;
    std::list<int32_t>::iterator kept;  // its place among those kept, while no sequence holds it and it is known
  };
  struct Sequence {
    std::vector<int32_t> pages;
    int64_t length = 0, written = 0;
    bool known = true;  // the ids of all its tokens, which are in `tokens`
    Tokens tokens;
  };

  const Sequence& find(int64_t sequence) const;
  Sequence& find(int64_t sequence) { return const_cast<Sequence&>(std::as_const(*this).find(sequence)); }
  Page& page(int32_t number) { return pages_[static_cast<size_t>(number)]; }
  Content content(const Tokens& tokens, int64_t index, int64_t before) const;
  int32_t take();
  void hold(int32_t number);
  void release(int32_t number);
  void release_after(Sequence& sequence, int64_t pages);
  void forget(int32_t number);
  int64_t pages_for(int64_t tokens) const { return (tokens + page_size_ - 1) / page_size_; }
  int64_t missing_pages(const std::vector<int64_t>& sequences, int64_t count) const;

  int64_t page_size_, next_sequence_ = 0, next_content_ = 1;
  std::vector<Page> pages_;
  std::vector<int32_t> empty_;
  std::list<int32_t> kept_;  // known pages that no sequence holds, the next to be given away in front
  std::unordered_map<Content, int32_t, Hash> page_of_;
  std::map<int64_t, Sequence> sequences_;
};

}  // namespace pygen
